"""Figures as Markdown: for the terminal and for RESULTS.md alike."""

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from benchmarks.environment import GRPC_EXPERIMENTS
from benchmarks.load import Load
from benchmarks.measures import EventCost, FollowerFigures, IdleFigures, Pair, StoredRunsCost

_LIBRARIES: Final = ("grpcio", "protobuf", "aiohttp", "uvloop", "msgspec", "apsw")


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that issue 2 asks for, beside the one that was measured."""

    what: str
    wanted: str
    measured: str
    met: bool


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the report."""

    title: str
    text: str
    targets: Sequence[Target] = ()


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with its columns padded, the first to the left, the others to the right."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(padded)} |"

    rule = f"|{'|'.join('-' * (width + 1) + ('-' if n == 0 else ':') for n, width in enumerate(widths))}|"
    return "\n".join([line(lines[0]), rule, *(line(row) for row in lines[1:])])


def sync_section(pairs: Sequence[Pair]) -> Section:
    """Sync runs beside the floor."""
    figures: list[tuple[str, Callable[[Load], float], str]] = [
        ("runs/s", lambda load: load.per_second, ",.0f"),
        ("p50 ms", lambda load: load.p50_ms, ".2f"),
        ("p99 ms", lambda load: load.p99_ms, ".2f"),
        ("CPU-s / 1,000 runs", lambda load: load.cpu_per_thousand, ".3f"),
        ("– of the gateway", lambda load: 1000 * load.cpu_seconds[0] / load.requests, ".3f"),
        ("– of the service", lambda load: 1000 * load.cpu_seconds[1] / load.requests, ".3f"),
    ]
    rows = []
    for pair in pairs:
        for name, figure, form in figures:
            a, b = (statistics.median(map(figure, loads)) for loads in (pair.floor, pair.product))
            cells = (format(a, form), format(b, form), f"{pair.ratio(figure):.2f}×")
            rows.append((str(pair.connections), name, *cells))
    ratios = [pair.ratio(lambda load: load.cpu_per_thousand) for pair in pairs]
    return Section(
        "Sync runs of ten events",
        table(("connections", "figure", "floor", "product", "product / floor"), rows),
        [
            Target(
                f"CPU of a sync run, {pair.connections} connection{'s' * (pair.connections > 1)}",
                "≤ 1.5× the floor",
                f"{ratio:.2f}×",
                ratio <= 1.5,
            )
            for pair, ratio in zip(pairs, ratios, strict=True)
        ],
    )


def follower_section(figures: FollowerFigures) -> Section:
    """One follower of a long run."""
    replay, live = f"{figures.replay_per_second:,.0f}", f"{figures.live_per_second:,.0f}"
    rows = [
        ("replay of a finished run", replay, "0"),
        ("live, from its start, stored meanwhile", live, f"{figures.live_deltas:,}"),
    ]
    return Section(
        f"One SSE follower, {figures.events:,} events",
        table(("stream", "events/s", "deltas beside them"), rows),
        [Target("One follower's replay", "≥ 50,000 events/s", replay, figures.replay_per_second >= 50_000)],
    )


def idle_section(figures: IdleFigures) -> Section:
    """Idle followers."""
    rows = [
        ("gateway", f"{figures.gateway_kib:.1f}"),
        ("runtime service", f"{figures.runtime_kib:.1f}"),
        ("together", f"{figures.kib:.1f}"),
    ]
    return Section(
        f"{figures.followers} idle SSE followers of a run that goes on",
        table(("process", "KiB a follower"), rows),
        [Target("An idle follower", "≤ 40 KiB", f"{figures.kib:.1f} KiB", figures.kib <= 40)],
    )


def first_byte_section(grpc_ms: float, sse_ms: float) -> Section:
    """First byte of an SSE start."""
    over = sse_ms - grpc_ms
    rows = [
        ("bare gRPC call, first message", f"{grpc_ms:.2f}"),
        ("SSE start, first byte of the body", f"{sse_ms:.2f}"),
        ("difference", f"{over:.2f}"),
    ]
    return Section(
        "First byte",
        table(("median", "ms"), rows),
        [Target("First byte of an SSE start", "≤ 2 ms over a bare call", f"{over:.2f} ms", over <= 2)],
    )


def stored_runs_section(costs: Sequence[StoredRunsCost]) -> Section:
    """The cost of a run by how full the store is."""
    ratios = [cost.ratio for cost in costs]
    spread = max(ratios) / min(ratios) - 1
    rows = ((f"{cost.runs:,}", f"{cost.cpu_per_thousand:.3f}", f"{cost.ratio:.2f}×") for cost in costs)
    what = f"A run's cost, {costs[0].runs:,} to {costs[-1].runs:,} stored"
    return Section(
        "A run's cost by the runs in the store",
        table(("stored runs", "CPU-s / 1,000 runs", "to the smallest store"), rows),
        [Target(what, "≤ 10 % apart", f"{spread:.0%}", spread <= 0.1)],
    )


def event_cost_section(costs: Sequence[EventCost]) -> Section:
    """The cost of an event by how long the run is."""
    growth_sync = costs[-1].sync / costs[0].sync - 1
    growth_replay = costs[-1].replay / costs[0].replay - 1
    rows = ((f"{cost.shorter:,} → {cost.longer:,}", f"{cost.sync:.4f}", f"{cost.replay:.4f}") for cost in costs)
    what = f"An event's cost, {costs[0].shorter:,} to {costs[-1].longer:,} a run"
    return Section(
        "One more event's cost by the length of the run",
        table(("events a run", "CPU-s / 1,000 events, sync run", "CPU-s / 1,000 events, SSE replay"), rows),
        [
            Target(f"{what}, sync run", "grows ≤ 10 %", f"{growth_sync:+.0%}", growth_sync <= 0.1),
            Target(f"{what}, replay", "grows ≤ 10 %", f"{growth_replay:+.0%}", growth_replay <= 0.1),
        ],
    )


def failed_section(title: str, error: BaseException) -> Section:
    """A measurement that could not be made."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return Section(title, f"Not measured: {reason}", [Target(title, "measured", "failed", False)])


def report(sections: Sequence[Section], arguments: str) -> str:
    """The whole document."""
    targets = [target for section in sections for target in section.targets]
    rows = [(each.what, each.wanted, each.measured, "yes" if each.met else "**no**") for each in targets]
    parts = ["# Benchmark results", f"`python -m benchmarks {arguments}`".replace(" `", "`"), _machine()]
    parts += ["## Targets", table(("what", "target", "measured", "met"), rows)]
    for section in sections:
        parts += [f"## {section.title}", section.text]
    return "\n\n".join(parts) + "\n"


def _machine() -> str:
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES)
    cores, kernel = len(os.sched_getaffinity(0)), platform.release().partition("-")[0]
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}",
        f"{cpu}, {cores} cores, {memory:.0f} GiB, Linux {kernel}",
        f"Python {platform.python_version()}, {versions}",
        f"`GRPC_EXPERIMENTS={GRPC_EXPERIMENTS}` on both sides",
    ]
    return "\n".join(f"- {line}" for line in lines)
