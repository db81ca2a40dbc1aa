"""The versions of the PostgreSQL schema: numbered migrations, applied by command and asked for at every start."""

from importlib.resources.abc import Traversable

import asyncpg

from runtime_service.errors import StoreUnavailable
from runtime_service.store.columns import SQL
from runtime_service.store.postgres_connection import FAILURES, Database, close_connection

# Of the advisory lock under which one process at a time migrates; any number that nobody else takes.
_LOCK = 4_710_815_001
_MIGRATION_SECONDS = 3_600.0
_PREPARE = """
CREATE SCHEMA IF NOT EXISTS acp;
CREATE TABLE IF NOT EXISTS acp.migrations (
    version     integer PRIMARY KEY,
    name        text NOT NULL,
    applied_at  timestamptz NOT NULL DEFAULT now()
);
"""


async def migrate(url: str) -> list[str]:
    """Bring the database to the version that this program knows; return the names of the migrations applied.

    Each is applied whole or not at all, and once, however many processes ask. Raises StoreUnavailable, also when the
    database was brought further by a newer program.
    """
    database = Database(url)
    try:
        connection = await database.connect()
    except FAILURES as error:
        raise database.unavailable(error) from None
    try:
        return [
            name for version, name, script in _MIGRATIONS if await _apply(database, connection, version, name, script)
        ]
    except FAILURES as error:
        raise database.unavailable(error) from None
    finally:
        await close_connection(connection)


async def check_schema(database: Database, connection: asyncpg.Connection) -> None:
    """Raise StoreUnavailable, saying what to do, unless the database has the version that this program knows."""
    try:
        rows = await database.fetch(connection, "SELECT max(version) AS version FROM acp.migrations")
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
        raise StoreUnavailable(
            f"{database.name} holds no runs yet. Prepare it by: python -m runtime_service migrate"
        ) from None
    version = rows[0]["version"] or 0
    if version < _KNOWN_VERSION:
        raise StoreUnavailable(
            f"{database.name} has schema version {version}; this program needs version {_KNOWN_VERSION}. "
            "Bring it there by: python -m runtime_service migrate"
        )
    _refuse_newer(database, version)


async def _apply(
    database: Database, connection: asyncpg.Connection, version: int, name: str, script: Traversable
) -> bool:
    async with connection.transaction():
        await connection.execute(f"SELECT pg_advisory_xact_lock({_LOCK})", timeout=_MIGRATION_SECONDS)
        await connection.execute(_PREPARE)
        applied = {row[0] for row in await connection.fetch("SELECT version FROM acp.migrations")}
        _refuse_newer(database, max(applied, default=0))
        if version in applied:
            return False
        await connection.execute(script.read_text(), timeout=_MIGRATION_SECONDS)
        await connection.execute("INSERT INTO acp.migrations (version, name) VALUES ($1, $2)", version, name)
        return True


def _refuse_newer(database: Database, version: int) -> None:
    if version > _KNOWN_VERSION:
        raise StoreUnavailable(
            f"{database.name} has schema version {version}; this program knows version {_KNOWN_VERSION}. "
            "Use the program that brought it there, or another database."
        )


def _migrations() -> list[tuple[int, str, Traversable]]:
    scripts = sorted((SQL / "postgres").iterdir(), key=lambda script: script.name)
    return [(int(script.name[:4]), script.name.removesuffix(".sql"), script) for script in scripts]


_MIGRATIONS = _migrations()
_KNOWN_VERSION = _MIGRATIONS[-1][0]
