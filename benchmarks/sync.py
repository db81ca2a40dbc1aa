"""Sync runs of ten events: the floor, the hand-made app and the product in turns, round by round."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.effort import Effort
from benchmarks.environment import BODY, EVENTS
from benchmarks.floor import FLOOR_PATH, floor
from benchmarks.hand_made import hand_made
from benchmarks.load import Load, run_load
from benchmarks.product import echo, product, runs_path
from benchmarks.report import Section, Target, table

_Figure = Callable[[Load], float]
_SERVICE: Final = "– of the service"
_FIGURES: Final[tuple[tuple[str, _Figure, str], ...]] = (
    ("runs/s", lambda load: load.per_second, ",.0f"),
    ("p50 ms", lambda load: load.latency.p50, ".2f"),
    ("p99 ms", lambda load: load.latency.p99, ".2f"),
    ("CPU-s / 1,000 runs", lambda load: load.cpu_per_thousand, ".3f"),
    ("– of the gateway", lambda load: 1000 * load.cpu_seconds[0] / load.requests, ".3f"),
    (_SERVICE, lambda load: 1000 * sum(load.cpu_seconds[1:]) / load.requests, ".3f"),
    ("– of the load, besides", lambda load: 1000 * load.own_cpu_seconds / load.requests, ".3f"),
)


@dataclass(frozen=True, slots=True)
class _Rounds:
    """The loads of one number of connections: those at the same place ran right after each other."""

    connections: int
    floor: Sequence[Load]
    hand_made: Sequence[Load]
    product: Sequence[Load]

    def ratio(self, figure: _Figure, reference: Sequence[Load]) -> float:
        """Median over the rounds of product/reference, so that what slows a whole round down cancels out."""
        return statistics.median(figure(b) / figure(a) for a, b in zip(reference, self.product, strict=True))


def measure_sync(directory: Path, effort: Effort) -> Section:
    """The table, and its targets."""
    path = runs_path(echo(EVENTS))
    measured = []
    with floor(directory) as bare, hand_made(directory) as hand, product(directory) as whole:
        for connections, requests in effort.requests.items():
            loads: tuple[list[Load], list[Load], list[Load]] = ([], [], [])
            for _ in range(effort.rounds):
                for each, server, where in zip(loads, (bare, hand, whole), (FLOOR_PATH, path, path), strict=True):
                    load = run_load(
                        server, where, BODY, connections=connections, requests=requests, warm_up=requests // 10
                    )
                    each.append(load)
            measured.append(_Rounds(connections, *loads))
    return Section(
        "Sync runs of ten events",
        table(
            ("connections", "figure", "floor", "hand-made", "product", "to the floor", "to the hand-made"),
            (row for rounds in measured for row in _rows(rounds)),
        ),
        [target for rounds in measured for target in _targets(rounds)],
    )


def _rows(rounds: _Rounds) -> list[list[str]]:
    rows = []
    for name, figure, form in _FIGURES:
        cells = [
            format(statistics.median(map(figure, loads)), form)
            for loads in (rounds.floor, rounds.hand_made, rounds.product)
        ]
        if name.startswith("–"):  # parts of the figure above
            ratios = ["", ""]
            if name == _SERVICE:  # the hand-made app has none
                cells[1] = ""
        else:
            ratios = [f"{rounds.ratio(figure, each):.2f}×" for each in (rounds.floor, rounds.hand_made)]
        rows.append([str(rounds.connections), name, *cells, *ratios])
    return rows


def _targets(rounds: _Rounds) -> list[Target]:
    where = f"{rounds.connections} connection{'s' * (rounds.connections > 1)}"
    targets = []
    if rounds.connections == 1:
        ratio = rounds.ratio(lambda load: load.latency.p50, rounds.floor)
        targets.append(Target(f"Median of a sync run, {where}", "≤ 1× the floor", f"{ratio:.2f}×", ratio <= 1))
    else:
        ratio = rounds.ratio(lambda load: load.per_second, rounds.hand_made)
        targets.append(Target(f"Sync runs/s, {where}", "≥ 1× the hand-made app", f"{ratio:.2f}×", ratio >= 1))
    ratio = rounds.ratio(lambda load: load.cpu_per_thousand, rounds.floor)
    targets.append(Target(f"CPU of a sync run, {where}", "≤ 0.5× the floor", f"{ratio:.2f}×", ratio <= 0.5))
    return targets
