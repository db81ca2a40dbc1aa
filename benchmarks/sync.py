"""Sync runs of ten events: the floor, the hand-made app and the product in turns, round by round."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.comparison import FIGURES, SERVICE, Figure, ratio
from benchmarks.effort import Effort
from benchmarks.environment import BODY, EVENTS
from benchmarks.floor import FLOOR_PATH, floor
from benchmarks.hand_made import hand_made
from benchmarks.load import Load, run_load
from benchmarks.product import echo, product, runs_path
from benchmarks.report import Section, Target, table


@dataclass(frozen=True, slots=True)
class _Rounds:
    """The loads of one number of connections: those at the same place ran right after each other."""

    connections: int
    floor: Sequence[Load]
    hand_made: Sequence[Load]
    product: Sequence[Load]

    def ratio(self, figure: Figure, reference: Sequence[Load]) -> float:
        """The product's figure to that of the reference."""
        return ratio(figure, self.product, reference)


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
    for name, figure, form in FIGURES:
        cells = [
            format(statistics.median(map(figure, loads)), form)
            for loads in (rounds.floor, rounds.hand_made, rounds.product)
        ]
        if name.startswith("–"):  # parts of the figure above
            ratios = ["", ""]
            if name == SERVICE:  # the hand-made app has none
                cells[1] = ""
        else:
            ratios = [f"{rounds.ratio(figure, each):.2f}×" for each in (rounds.floor, rounds.hand_made)]
        rows.append([str(rounds.connections), name, *cells, *ratios])
    return rows


def _targets(rounds: _Rounds) -> list[Target]:
    where = f"{rounds.connections} connection{'s' * (rounds.connections > 1)}"
    targets = []
    if rounds.connections == 1:
        against = rounds.ratio(lambda load: load.latency.p50, rounds.floor)
        targets.append(Target(f"Median of a sync run, {where}", "≤ 1× the floor", f"{against:.2f}×", against <= 1))
    else:
        against = rounds.ratio(lambda load: load.per_second, rounds.hand_made)
        targets.append(Target(f"Sync runs/s, {where}", "≥ 1× the hand-made app", f"{against:.2f}×", against >= 1))
    against = rounds.ratio(lambda load: load.cpu_per_thousand, rounds.floor)
    targets.append(Target(f"CPU of a sync run, {where}", "≤ 0.5× the floor", f"{against:.2f}×", against <= 0.5))
    return targets
