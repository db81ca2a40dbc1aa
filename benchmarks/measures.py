"""The measurements, each a function from running servers to figures; printing them is not their job."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from benchmarks.environment import EVENTS, TEXT
from benchmarks.fill import fill_store
from benchmarks.load import Load, run_load
from benchmarks.processes import Server, cpu_seconds, memory_kib
from benchmarks.product import (
    IDLE,
    echo,
    events_request,
    finished_run,
    product,
    runs_path,
    start_request,
    start_run,
)
from benchmarks.sse import Follower, follow

FLOOR_PATH: Final = "/runs"
_BODY: Final = json.dumps({"content": TEXT})
_WORD: Final = TEXT.replace(" ", "-")  # one word, so one delta a message
_SETTLE_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class Effort:
    """How much of everything: `THOROUGH` for figures to keep, `QUICK` to see that all of it works."""

    rounds: int
    requests: Mapping[int, int]  # connections → requests a round
    follower_events: int
    follows: int
    idle_followers: int
    first_bytes: int
    stored_runs: Sequence[int]
    stored_requests: int
    log_lengths: Mapping[int, int]  # events of the agent a run → runs a round


THOROUGH: Final = Effort(
    rounds=9,
    requests={1: 1500, 16: 3000, 64: 3000},
    follower_events=10_000,
    follows=9,
    idle_followers=500,
    first_bytes=1000,
    stored_runs=(1_000, 10_000, 100_000),
    stored_requests=500,
    log_lengths={EVENTS: 500, 1_000: 100, 100_000: 2},
)
QUICK: Final = Effort(
    rounds=2,
    requests={1: 300, 16: 600, 64: 600},
    follower_events=10_000,
    follows=3,
    idle_followers=100,
    first_bytes=50,
    stored_runs=(1_000, 3_000),
    stored_requests=300,
    log_lengths={EVENTS: 200, 1_000: 4, 10_000: 1},
)


@dataclass(frozen=True, slots=True)
class Pair:
    """The loads of one number of connections, round by round: `floor[i]` ran right before `product[i]`."""

    connections: int
    floor: Sequence[Load]
    product: Sequence[Load]

    def ratio(self, figure: Callable[[Load], float]) -> float:
        """Median over the rounds of product/floor, so that what slows a whole round down cancels out."""
        return statistics.median(figure(b) / figure(a) for a, b in zip(self.floor, self.product, strict=True))


def measure_sync(floor: Server, product: Server, effort: Effort) -> list[Pair]:
    """Sync runs of ten events, floor and product in turns."""
    path = runs_path(echo(EVENTS))
    pairs = []
    for connections, requests in effort.requests.items():
        rounds: list[tuple[Load, Load]] = []
        for _ in range(effort.rounds):
            size = {"connections": connections, "requests": requests, "warm_up": requests // 10}
            bare = run_load(floor, FLOOR_PATH, _BODY, **size)
            rounds.append((bare, run_load(product, path, _BODY, **size)))
        pairs.append(Pair(connections, [a for a, _ in rounds], [b for _, b in rounds]))
    return pairs


@dataclass(frozen=True, slots=True)
class FollowerFigures:
    """One follower of a run with `events` events; `live` starts the run itself and gets its deltas too."""

    events: int
    replay_per_second: float
    live_per_second: float
    live_deltas: int


def measure_follower(product: Server, effort: Effort) -> FollowerFigures:
    """Events a second through one SSE stream: of a run that has finished, and of one while it goes on."""
    server_id, events = echo(effort.follower_events), effort.follower_events + 1
    replay = events_request(product, server_id, finished_run(product, server_id, _WORD))
    live = start_request(product, server_id, _WORD, accept="text/event-stream")
    replays = [follow(product, replay, events) for _ in range(effort.follows)]
    lives = [follow(product, live, events) for _ in range(max(1, effort.follows // 3))]
    return FollowerFigures(
        events,
        statistics.median(events / each.whole for each in replays),
        statistics.median(events / each.whole for each in lives),
        round(statistics.median(each.deltas for each in lives)),
    )


@dataclass(frozen=True, slots=True)
class IdleFigures:
    """Memory of one idle follower, in KiB of each process."""

    followers: int
    gateway_kib: float
    runtime_kib: float

    @property
    def kib(self) -> float:
        """Both processes together."""
        return self.gateway_kib + self.runtime_kib


def measure_idle(product: Server, effort: Effort) -> IdleFigures:
    """Memory that idle SSE followers of a run add to those (a fifth as many) that are there already."""
    request = events_request(product, IDLE, start_run(product, IDLE, TEXT))
    followers: list[Follower] = []
    try:
        followers += (Follower(product, request) for _ in range(effort.idle_followers // 5))
        time.sleep(_SETTLE_SECONDS)
        before = [memory_kib([pid]) for pid in product.pids]
        followers += (Follower(product, request) for _ in range(effort.idle_followers))
        time.sleep(_SETTLE_SECONDS)
        after = [memory_kib([pid]) for pid in product.pids]
    finally:
        for follower in followers:
            follower.close()
    gateway, runtime = ((b - a) / effort.idle_followers for a, b in zip(before, after, strict=True))
    return IdleFigures(effort.idle_followers, gateway, runtime)


@dataclass(frozen=True, slots=True)
class StoredRunsCost:
    """What runs cost in a store that held `runs` of them; `ratio` to the smallest store, in the same rounds."""

    runs: int
    cpu_per_thousand: float
    ratio: float


def measure_stored_runs(effort: Effort) -> list[StoredRunsCost]:
    """CPU of sync runs by how many runs the store held before; the stores take turns."""
    path = runs_path(echo(EVENTS))
    costs: dict[int, list[float]] = {runs: [] for runs in effort.stored_runs}
    with tempfile.TemporaryDirectory(prefix="acp-bench-") as name, ExitStack() as stack:
        directory = Path(name)
        for runs in effort.stored_runs:
            fill_store(directory / f"stored-{runs}", runs)
        servers = {
            runs: stack.enter_context(product(directory, name=f"flat-{runs}", data_dir=directory / f"stored-{runs}"))
            for runs in effort.stored_runs
        }
        for server in servers.values():
            run_load(server, path, _BODY, connections=16, requests=effort.stored_requests // 2)
        for _ in range(effort.rounds):
            for runs, server in servers.items():
                load = run_load(server, path, _BODY, connections=16, requests=effort.stored_requests)
                costs[runs].append(load.cpu_per_thousand)
    smallest = costs[effort.stored_runs[0]]
    return [
        StoredRunsCost(
            runs,
            statistics.median(each),
            statistics.median(b / a for a, b in zip(smallest, each, strict=True)),
        )
        for runs, each in costs.items()
    ]


@dataclass(frozen=True, slots=True)
class EventCost:
    """CPU-seconds of 1,000 more events in a run, when runs grow from `shorter` to `longer` events."""

    shorter: int
    longer: int
    sync: float  # said by the agent, stored, and collected into one answer
    replay: float  # read from the store by an SSE follower


def measure_event_cost(product: Server, effort: Effort) -> list[EventCost]:
    """What one more event costs in short, long and very long runs; a run's own cost cancels out."""
    lengths = list(effort.log_lengths)
    sync = _event_costs(product, effort, _sync_runs)
    requests = {
        length: events_request(product, echo(length), finished_run(product, echo(length), TEXT)) for length in lengths
    }

    def replays(server: Server, length: int, repeats: int) -> None:
        for _ in range(repeats):
            follow(server, requests[length], length + 1)

    replay = _event_costs(product, effort, replays)
    return [
        EventCost(
            shorter,
            longer,
            *(1000 * (by[longer] - by[shorter]) / (longer - shorter) for by in (sync, replay)),
        )
        for shorter, longer in pairwise(lengths)
    ]


def _sync_runs(server: Server, length: int, repeats: int) -> None:
    run_load(server, runs_path(echo(length)), _BODY, connections=1, requests=repeats)


def _event_costs(server: Server, effort: Effort, work: Callable[[Server, int, int], None]) -> dict[int, float]:
    """CPU-seconds of one piece of work by length of the log: medians of rounds that take turns."""
    costs: dict[int, list[float]] = {length: [] for length in effort.log_lengths}
    for _ in range(max(1, effort.rounds // 2)):
        for length, repeats in effort.log_lengths.items():
            before = cpu_seconds(server.pids)
            work(server, length, repeats)
            costs[length].append((cpu_seconds(server.pids) - before) / repeats)
    return {length: statistics.median(each) for length, each in costs.items()}
