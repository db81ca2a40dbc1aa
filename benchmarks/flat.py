"""Costs that should not grow: a run's with the runs in the store, an event's with the length of its run."""

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.effort import Effort
from benchmarks.environment import BODY, EVENTS, TEXT
from benchmarks.fill import fill_store
from benchmarks.load import run_load
from benchmarks.processes import Server, cpu_seconds
from benchmarks.product import echo, events_request, finished_run, product, runs_path
from benchmarks.report import Section, Target, table
from benchmarks.sse import follow


def measure_stored_runs(directory: Path, effort: Effort) -> Section:
    """CPU of sync runs by how many runs the store held before; the stores take turns."""
    path = runs_path(echo(EVENTS))
    costs: dict[int, list[float]] = {runs: [] for runs in effort.stored_runs}
    with ExitStack() as stack:
        for runs in effort.stored_runs:
            fill_store(directory / f"stored-{runs}", runs)
        servers = {
            runs: stack.enter_context(product(directory, name=f"flat-{runs}", data_dir=directory / f"stored-{runs}"))
            for runs in effort.stored_runs
        }
        for server in servers.values():
            run_load(server, path, BODY, connections=16, requests=effort.stored_requests // 2)
        for _ in range(effort.rounds):
            for runs, server in servers.items():
                load = run_load(server, path, BODY, connections=16, requests=effort.stored_requests)
                costs[runs].append(load.cpu_per_thousand)
    smallest = costs[effort.stored_runs[0]]
    ratios = {
        runs: statistics.median(b / a for a, b in zip(smallest, each, strict=True)) for runs, each in costs.items()
    }
    spread = max(ratios.values()) / min(ratios.values()) - 1
    rows = ((f"{runs:,}", f"{statistics.median(each):.3f}", f"{ratios[runs]:.2f}×") for runs, each in costs.items())
    what = f"A run's cost, {effort.stored_runs[0]:,} to {effort.stored_runs[-1]:,} stored"
    return Section(
        "A run's cost by the runs in the store",
        table(("stored runs", "CPU-s / 1,000 runs", "to the smallest store"), rows),
        [Target(what, "≤ 10 % apart", f"{spread:.0%}", spread <= 0.1)],
    )


@dataclass(frozen=True, slots=True)
class _EventCost:
    """CPU-seconds of 1,000 more events in a run, when runs grow from `shorter` to `longer` events."""

    shorter: int
    longer: int
    sync: float  # said by the agent, stored, and collected into one answer
    replay: float  # read from the store by an SSE follower


def measure_event_cost(directory: Path, effort: Effort) -> Section:
    """What one more event costs in short, long and very long runs; a run's own cost cancels out."""
    with product(directory) as server:
        sync = _event_costs(server, effort, _sync_runs)
        requests = {
            length: events_request(server, echo(length), finished_run(server, echo(length), TEXT))
            for length in effort.log_lengths
        }

        def replays(server: Server, length: int, repeats: int) -> None:
            for _ in range(repeats):
                follow(server, requests[length], length + 1)

        replay = _event_costs(server, effort, replays)
    costs = [
        _EventCost(
            shorter,
            longer,
            *(1000 * (by[longer] - by[shorter]) / (longer - shorter) for by in (sync, replay)),
        )
        for shorter, longer in pairwise(effort.log_lengths)
    ]
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


def _sync_runs(server: Server, length: int, repeats: int) -> None:
    run_load(server, runs_path(echo(length)), BODY, connections=1, requests=repeats)


def _event_costs(server: Server, effort: Effort, work: Callable[[Server, int, int], None]) -> dict[int, float]:
    """CPU-seconds of one piece of work by length of the log: medians of rounds that take turns."""
    costs: dict[int, list[float]] = {length: [] for length in effort.log_lengths}
    for _ in range(max(1, effort.rounds // 2)):
        for length, repeats in effort.log_lengths.items():
            before = cpu_seconds(server.pids)
            work(server, length, repeats)
            costs[length].append((cpu_seconds(server.pids) - before) / repeats)
    return {length: statistics.median(each) for length, each in costs.items()}
