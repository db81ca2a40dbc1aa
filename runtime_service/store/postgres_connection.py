"""Connections to PostgreSQL: where the server is, how it is asked, and what its errors mean. Knows no runs."""

from typing import Any
from urllib.parse import parse_qsl, urlencode

import asyncpg

from runtime_service.errors import StoreUnavailable
from runtime_service.store.columns import named_queries

QUERIES = named_queries("postgres.sql")

FAILURES = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # by the driver, where the server's farewell crosses a question
    ValueError,  # where there is no URL
)
"""What a connection may fail with."""

_CONNECT_SECONDS = 5.0
_STATEMENT_SECONDS = 10.0
_CLOSE_SECONDS = 2.0
_READ_CONNECTIONS = 4
# What a statement itself may be refused for, by the classes of SQLSTATE. Any other error says that the server is not to
# be used at the moment: it stops, or comes up, or is full, or takes no writes.
_REFUSALS = frozenset({"0A", "21", "22", "23", "42", "54", "P0", "XX"})
_CONFLICTS = frozenset({"40001", "40P01"})
# A process that stops between two statements keeps its locks no longer.
_BEGIN = "BEGIN; SET LOCAL idle_in_transaction_session_timeout = '5s'"


class Database:
    """One PostgreSQL database, by its URL.

    `?pooler=transaction` in the URL says that a pooler stands before the server which gives a connection to others
    after each transaction, as pgbouncer can. Then each query is a transaction of its own, nothing is prepared before
    it, and no notification arrives.
    """

    def __init__(self, url: str) -> None:
        base, _, query = url.partition("?")
        parameters = parse_qsl(query, keep_blank_values=True)
        self.is_pooled = ("pooler", "transaction") in parameters
        kept = urlencode([each for each in parameters if each[0] != "pooler"])
        self._url = base + ("?" + kept if kept else "")
        # As it may be shown: without who comes and with what password, even where that is not quoted as it should be.
        place = url.partition("://")[2].rpartition("@")[2].partition("?")[0]
        self.name = f"PostgreSQL at {place or 'localhost'}"
        self._settings: dict[str, Any] = {
            "timeout": _CONNECT_SECONDS,
            "command_timeout": _STATEMENT_SECONDS,
        }
        if "application_name" not in dict(parameters):
            self._settings["server_settings"] = {"application_name": "acp-runtime"}
        if self.is_pooled:
            self._settings["statement_cache_size"] = 0

    async def connect(self) -> asyncpg.Connection:
        """Open a connection. Raises one of FAILURES."""
        return await asyncpg.connect(self._url, **self._settings)

    async def open_pool(self) -> asyncpg.Pool:
        """Open a pool of connections to read from. Raises one of FAILURES."""
        return await asyncpg.create_pool(
            self._url, min_size=0, max_size=_READ_CONNECTIONS, reset=_keep_as_it_is, **self._settings
        )

    async def fetch(self, connection: asyncpg.Connection, query: str, *arguments: object) -> list[asyncpg.Record]:
        """Return the rows of a query, which is a transaction of its own. Raises one of FAILURES."""
        if not self.is_pooled:
            return list(await connection.fetch(query, *arguments))
        # The driver sends a query in two steps, which a pooler would give to two connections.
        await connection.execute(_BEGIN)
        try:
            rows = list(await connection.fetch(query, *arguments))
        except asyncpg.PostgresError:
            await connection.execute("ROLLBACK")
            raise
        await connection.execute("COMMIT")
        return rows

    def unavailable(self, error: BaseException) -> StoreUnavailable:
        """Return what to tell of a failure at the beginning, to somebody who can see to it."""
        if isinstance(error, ValueError) and not isinstance(error, asyncpg.PostgresError):
            return StoreUnavailable(f"{self.name} cannot be used as the run store: its URL is not one of PostgreSQL.")
        return StoreUnavailable(f"{self.name} cannot be used as the run store: {error or type(error).__name__}.")


async def close_connection(connection: asyncpg.Connection) -> None:
    """Close a connection in order, or not, when the server does not answer."""
    try:
        await connection.close(timeout=_CLOSE_SECONDS)
    except FAILURES:
        connection.terminate()


def is_refusal(error: BaseException) -> bool:
    """Return whether the server refused the statement for what it says: it would do so again."""
    return isinstance(error, asyncpg.PostgresError) and str(error.sqlstate)[:2] in _REFUSALS


def is_conflict(error: BaseException) -> bool:
    """Return whether the statement gave way to another one: the same may succeed now."""
    return isinstance(error, asyncpg.PostgresError) and error.sqlstate in _CONFLICTS


async def _keep_as_it_is(_: asyncpg.Connection) -> None:
    """Spare the round trip by which a pool would undo what no query of ours does."""
