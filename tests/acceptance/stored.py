"""What the store itself holds, read past the product: by SQL, from the SQLite file or from PostgreSQL."""

import json
import sqlite3
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import asyncpg

from tests.acceptance.history import Event, Sample, Shown, StoredRun, StoredTurn, ordered

Row = tuple[Any, ...]
Select = Callable[[str], Awaitable[list[Row]]]
"""Gives the rows of a statement in which the store's tables are called `{runs}`, `{turns}` and `{events}`."""

_TABLES = ("runs", "turns", "events")


def sqlite_select(path: Path) -> Select:
    """Read from the file, whoever else has it open."""

    async def select(statement: str) -> list[Row]:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            return database.execute(statement.format_map({name: name for name in _TABLES})).fetchall()

    return select


def postgres_select(url: str) -> Select:
    """Read through a connection of one's own, which is opened each time: the server may have been killed."""

    async def select(statement: str) -> list[Row]:
        connection = await asyncpg.connect(url)
        try:
            rows = await connection.fetch(statement.format_map({name: f"acp.{name}" for name in _TABLES}))
        finally:
            await connection.close()
        return [tuple(row) for row in rows]

    return select


async def count_open(select: Select) -> int:
    """Count the turns that have not ended."""
    [(count,)] = await select("SELECT count(*) FROM {turns} WHERE status = 'queued' OR status = 'running'")
    return int(count)


async def is_stored(select: Select, text: str) -> bool:
    """Return whether a turn has this input."""
    quoted = text.replace("'", "''").replace("{", "{{").replace("}", "}}")
    return bool(await select(f"SELECT 1 FROM {{turns}} WHERE input = '{quoted}'"))


async def sample_turns(select: Select) -> list[Sample]:
    """Return how the newest turns stand."""
    rows = await select(
        "SELECT r.id, t.number, t.status, t.epoch FROM {turns} t JOIN {runs} r ON r.run_key = t.run_key"
        " ORDER BY t.run_key DESC LIMIT 200"
    )
    return [Sample(*row) for row in rows]


async def read_turns(select: Select) -> list[StoredTurn]:
    """Return every turn."""
    rows = await select(
        "SELECT r.id, r.server_id, t.number, t.input, t.status, t.output, t.error, t.error_code, t.completed_at_ms,"
        " t.attempt, t.epoch, t.draft"
        " FROM {turns} t JOIN {runs} r ON r.run_key = t.run_key ORDER BY t.run_key, t.number"
    )
    return [
        StoredTurn(
            run_id,
            server_id,
            number,
            Shown(run_id, text, status, output, error, code, None if ended_ms is None else ended_ms / 1000),
            attempt,
            epoch,
            draft,
        )
        for run_id, server_id, number, text, status, output, error, code, ended_ms, attempt, epoch, draft in rows
    ]


async def read_runs(select: Select) -> list[StoredRun]:
    """Return every run with its log."""
    logs: defaultdict[int, list[tuple[int, Event]]] = defaultdict(list)
    for key, turn, sequence, role, content, created_at_ms, log_type, log_level, metadata in await select(
        "SELECT run_key, turn, sequence, role, content, created_at_ms, log_type, log_level, metadata"
        " FROM {events} ORDER BY run_key, sequence"
    ):
        told = None if metadata is None else ordered(json.loads(metadata))
        logs[key].append((turn, Event(sequence, role, content, created_at_ms / 1000, log_type, log_level, told)))
    return [
        StoredRun(run_id, last_sequence, last_turn, message_count, tuple(logs[key]))
        for key, run_id, last_sequence, last_turn, message_count in await select(
            "SELECT run_key, id, last_sequence, last_turn, message_count FROM {runs}"
        )
    ]
