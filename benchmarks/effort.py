"""How much of everything: `THOROUGH` for figures to keep, `QUICK` to see that all of it works."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.environment import EVENTS


@dataclass(frozen=True, slots=True)
class Effort:
    """Sizes of the benchmarks, in the order in which these run."""

    rounds: int
    requests: Mapping[int, int]  # connections → requests a round
    store_rounds: int
    store_requests: Mapping[int, int]  # connections → requests a round
    queued_turns: int
    queue_rounds: int
    follower_events: Sequence[int]
    follows: int
    many_followers: int
    many_seconds: float
    idle_followers: int
    slow_followers: int  # as many healthy ones and stalled ones
    slow_seconds: float
    slow_rounds: int
    big_runs: int
    overload_seconds: float
    overload_rounds: int
    first_bytes: int
    starts: int
    idle_seconds: float
    stored_runs: Sequence[int]
    stored_requests: int
    log_lengths: Mapping[int, int]  # events of the agent a run → runs a round


THOROUGH: Final = Effort(
    rounds=7,
    requests={1: 1500, 16: 3000, 64: 3000},
    store_rounds=5,
    store_requests={1: 500, 16: 1500, 64: 1500},
    queued_turns=10_000,
    queue_rounds=2,
    follower_events=(10_000, 100_000),
    follows=9,
    many_followers=1000,
    many_seconds=15,
    idle_followers=500,
    slow_followers=200,
    slow_seconds=10,
    slow_rounds=2,
    big_runs=7,
    overload_seconds=6,
    overload_rounds=3,
    first_bytes=1000,
    starts=5,
    idle_seconds=30,
    stored_runs=(1_000, 10_000, 100_000),
    stored_requests=1500,
    log_lengths={EVENTS: 500, 1_000: 100, 100_000: 2},
)
QUICK: Final = Effort(
    rounds=2,
    requests={1: 300, 16: 600, 64: 600},
    store_rounds=2,
    store_requests={16: 600},
    queued_turns=1_000,
    queue_rounds=1,
    follower_events=(10_000, 100_000),
    follows=3,
    many_followers=200,
    many_seconds=5,
    idle_followers=100,
    slow_followers=50,
    slow_seconds=4,
    slow_rounds=1,
    big_runs=2,
    overload_seconds=3,
    overload_rounds=1,
    first_bytes=50,
    starts=2,
    idle_seconds=5,
    stored_runs=(1_000, 3_000),
    stored_requests=300,
    log_lengths={EVENTS: 200, 1_000: 4, 10_000: 1},
)
