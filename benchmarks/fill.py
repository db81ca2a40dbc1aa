"""Filling a store before it is measured: one real run, then as many copies of it as were asked for.

The run is made over HTTP, so the schema and its rows are the product's own. The copies are made in SQL while
nothing runs, column by column as the schema has them; only keys and run ids are new.
"""

import tempfile
from pathlib import Path
from typing import Final

import apsw

from benchmarks.environment import BODY, EVENTS
from benchmarks.load import run_load
from benchmarks.product import echo, product, runs_path

_COPIES_A_TRANSACTION: Final = 10_000
_TABLES: Final = ("runs", "turns", "events")


def fill_store(data_dir: Path, runs: int) -> None:
    """Make `data_dir` the data directory of a product that has completed `runs` runs of ten messages."""
    with tempfile.TemporaryDirectory() as scratch, product(Path(scratch), data_dir=data_dir) as server:
        run_load(server, runs_path(echo(EVENTS)), BODY, connections=1, requests=1)
    database = apsw.Connection(str(_database(data_dir)))
    try:
        _copy_run(database, runs - 1)
    finally:
        database.close()


def _copy_run(database: apsw.Connection, copies: int) -> None:
    """Copy the newest run `copies` times; ids keep their form: a time, which grows, then chance."""
    source = database.execute("SELECT max(run_key) FROM runs").get
    statements = [_copying(database, table) for table in _TABLES]
    first = source + 1
    while first <= source + copies:
        last = min(first + _COPIES_A_TRANSACTION - 1, source + copies)
        with database:
            for statement in statements:
                database.execute(statement, {"source": source, "first": first, "last": last})
        first = last + 1


def _copying(database: apsw.Connection, table: str) -> str:
    """The statement that copies the rows of run `:source` in `table` to runs `:first` to `:last`."""
    columns = [str(row[1]) for row in database.execute(f"PRAGMA table_info({table})")]
    new = {
        "run_key": "copy.key",
        "id": "'run_' || printf('%012x', original.created_at_ms + copy.key) || lower(hex(randomblob(10)))",
    }
    return f"""
        WITH RECURSIVE copy(key) AS (VALUES (:first) UNION ALL SELECT key + 1 FROM copy WHERE key < :last)
        INSERT INTO {table} ({", ".join(columns)})
        SELECT {", ".join(new.get(column, f"original.{column}") for column in columns)}
        FROM copy CROSS JOIN {table} AS original WHERE original.run_key = :source
    """


def _database(data_dir: Path) -> Path:
    """The one SQLite file in a data directory."""
    (found,) = (
        path for path in data_dir.rglob("*") if path.is_file() and path.open("rb").read(15) == b"SQLite format 3"
    )
    return found
