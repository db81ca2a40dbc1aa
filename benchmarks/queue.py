"""Turns that wait, and how fast they are executed once there is room; beside the same turns sent directly.

The room of the runtime is taken by turns that wait for a gate. Behind them the others are accepted, all of them
before the first one runs; then the gate opens.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.database import Database, both_stores
from benchmarks.effort import Effort
from benchmarks.environment import EVENTS, TEXT
from benchmarks.load import run_load
from benchmarks.processes import Server, cpu_seconds
from benchmarks.product import GATE, echo, has_runs, runs_path
from benchmarks.report import Section, Target, table

_CONNECTIONS: Final = 64
_ROOM: Final = 1_024  # turns that run at once: ACP_MAX_TURNS
_LOOK_SECONDS: Final = 0.02
_LONGEST_SECONDS: Final = 300.0
_AGENT: Final = echo(EVENTS)
_ACCEPTED: Final = 202


@dataclass(frozen=True, slots=True)
class _Measured:
    """Some turns, until the last one had ended; CPU-seconds of the product for 1,000 of them, and of the database."""

    per_second: float
    cpu: float
    database: float


@dataclass(frozen=True, slots=True)
class _Store:
    """The product over one store, and that store's own processes."""

    name: str
    server: Server
    database: Database | None = None

    def measure(self, turns: int, work: Callable[[], float]) -> _Measured:
        """Do some work, which returns when its turns began, and wait for their end."""
        cpu, database = cpu_seconds(self.server.pids), self._database_seconds()
        began = work()
        _wait_until_ended(self.server)
        seconds = time.perf_counter() - began
        cpu, database = cpu_seconds(self.server.pids) - cpu, self._database_seconds() - database
        return _Measured(turns / seconds, 1000 * cpu / turns, 1000 * database / turns)

    def _database_seconds(self) -> float:
        return self.database.cpu_seconds() if self.database is not None else 0.0


def measure_queue(directory: Path, effort: Effort) -> Section:
    """Directly sent and queued turns in turns, over both stores."""
    turns = effort.queued_turns
    direct: dict[str, list[_Measured]] = {}
    queued: dict[str, list[_Measured]] = {}
    with both_stores(directory) as (embedded, replicated, postgres):
        stores = (_Store("SQLite", embedded), _Store("PostgreSQL", replicated, postgres))
        for n in range(effort.queue_rounds):
            for store in stores:
                direct.setdefault(store.name, []).append(store.measure(turns, partial(_send, store.server, turns)))
                gate = directory / f"gate-{store.name}-{n}"
                _fill_queue(store.server, gate, turns)
                queued.setdefault(store.name, []).append(store.measure(turns, partial(_open, gate)))
        for store in stores:
            if has_runs(store.server, _AGENT, "failed"):
                raise RuntimeError(f"turns failed over {store.name}")
    ratios = {
        name: statistics.median(b.per_second / a.per_second for a, b in zip(sent, queued[name], strict=True))
        for name, sent in direct.items()
    }
    rows = [
        (name, *_cells(how, measured), last)
        for name, sent in direct.items()
        for how, measured, last in (("sent", sent, ""), ("queued", queued[name], f"{ratios[name]:.2f}×"))
    ]
    return Section(
        f"{turns:,} queued turns of ten events",
        table(("store", "turns", "turns/s", "CPU-s / 1,000 turns", "of the database, besides", "to sent"), rows),
        [
            Target(
                f"Queued turns/s over {name}, {turns:,} turns", "≥ 0.7× sent directly", f"{ratio:.2f}×", ratio >= 0.7
            )
            for name, ratio in ratios.items()
        ],
    )


def _cells(how: str, measured: Sequence[_Measured]) -> tuple[str, ...]:
    database = statistics.median(each.database for each in measured)
    return (
        how,
        f"{statistics.median(each.per_second for each in measured):,.0f}",
        f"{statistics.median(each.cpu for each in measured):.3f}",
        f"{database:.3f}" if database else "",
    )


def _accept(server: Server, server_id: str, content: str, turns: int) -> float:
    """Have turns accepted, which nobody waits for; return how many seconds that took."""
    body = json.dumps({"content": content, "mode": "async"})
    return run_load(
        server, runs_path(server_id), body, connections=_CONNECTIONS, requests=turns, status=_ACCEPTED
    ).seconds


def _send(server: Server, turns: int) -> float:
    """Have turns accepted while there is room; return when the first one was sent."""
    seconds = _accept(server, _AGENT, TEXT, turns)
    return time.perf_counter() - seconds  # what the load's process took to end is not counted


def _fill_queue(server: Server, gate: Path, turns: int) -> None:
    """Take all room up to the opening of a gate, and have turns accepted behind it. RuntimeError if one runs."""
    _accept(server, GATE, str(gate), _ROOM)
    _accept(server, _AGENT, TEXT, turns)
    if has_runs(server, GATE, "queued") or has_runs(server, _AGENT, "running"):
        raise RuntimeError("the turns that should wait do not")


def _open(gate: Path) -> float:
    began = time.perf_counter()
    gate.touch()
    return began


def _wait_until_ended(server: Server) -> None:
    """Look now and then whether any turn is open. In this order: one that waited may run by the next look."""
    until = time.monotonic() + _LONGEST_SECONDS
    while any(has_runs(server, _AGENT, status) for status in ("running", "queued", "running")):
        if time.monotonic() > until:
            raise RuntimeError("the turns do not end")
        time.sleep(_LOOK_SECONDS)
