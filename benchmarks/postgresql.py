"""Sync runs of ten events over SQLite and over PostgreSQL in turns, round by round; and what the database spends."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.comparison import FIGURES, ratio
from benchmarks.database import both_stores
from benchmarks.effort import Effort
from benchmarks.environment import BODY, EVENTS
from benchmarks.load import Load, run_load
from benchmarks.product import echo, runs_path
from benchmarks.report import Section, Target, table


@dataclass(frozen=True, slots=True)
class _Rounds:
    """The loads of one number of connections, and the CPU-seconds that the database took for 1,000 runs."""

    connections: int
    sqlite: Sequence[Load]
    postgresql: Sequence[Load]
    database: Sequence[float]


def measure_postgresql(directory: Path, effort: Effort) -> Section:
    """The table, and its targets."""
    path = runs_path(echo(EVENTS))
    measured = []
    with both_stores(directory) as (embedded, replicated, postgres):
        for connections, requests in effort.store_requests.items():
            warm_up = requests // 10
            sqlite: list[Load] = []
            postgresql: list[Load] = []
            spent: list[float] = []
            for _ in range(effort.store_rounds):
                for loads, server in ((sqlite, embedded), (postgresql, replicated)):
                    before = postgres.cpu_seconds()
                    loads.append(
                        run_load(server, path, BODY, connections=connections, requests=requests, warm_up=warm_up)
                    )
                spent.append(1000 * (postgres.cpu_seconds() - before) / (requests + warm_up))
            measured.append(_Rounds(connections, sqlite, postgresql, spent))
    return Section(
        "Sync runs of ten events over PostgreSQL",
        table(
            ("connections", "figure", "SQLite", "PostgreSQL", "to SQLite"),
            (row for rounds in measured for row in _rows(rounds)),
        ),
        [_target(rounds) for rounds in measured],
    )


def _rows(rounds: _Rounds) -> list[list[str]]:
    rows = []
    for name, figure, form in FIGURES:
        cells = [format(statistics.median(map(figure, loads)), form) for loads in (rounds.sqlite, rounds.postgresql)]
        rows.append([str(rounds.connections), name, *cells, f"{ratio(figure, rounds.postgresql, rounds.sqlite):.2f}×"])
    database = f"{statistics.median(rounds.database):.3f}"
    rows.append([str(rounds.connections), "– of the database, besides", "", database, ""])
    return rows


def _target(rounds: _Rounds) -> Target:
    against = ratio(lambda load: load.cpu_per_thousand, rounds.postgresql, rounds.sqlite)
    where = f"{rounds.connections} connection{'s' * (rounds.connections > 1)}"
    what = f"CPU of a sync run over PostgreSQL without the database's, {where}"
    return Target(what, "≤ 1.3× SQLite", f"{against:.2f}×", against <= 1.3)
