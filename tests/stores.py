"""Places that hold runs, one class a kind of store, so that one suite asks the same of each."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import apsw

from runtime_service.store.base import RunStore
from runtime_service.store.postgres import PostgresStore
from runtime_service.store.sqlite import SQLiteStore
from runtime_service.store.sqlite_rows import QUERIES
from tests.postgres import fresh_database, session_server


class Stores(ABC):
    """A place that holds runs while stores over it open and close."""

    @abstractmethod
    async def connect(self) -> RunStore:
        """Open a store over the place."""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[RunStore]:
        """A store, closed at the end; turns that run then are left running, as by a crash."""
        store = await self.connect()
        try:
            yield store
        finally:
            await store.close()


class SQLiteStores(Stores):
    """A SQLite file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "data" / "runs.sqlite"

    async def connect(self) -> SQLiteStore:
        """Open the file."""
        return await SQLiteStore.open(self.path)

    def plan_of(self, query: str, *bindings: object) -> list[str]:
        """The steps by which a query of the store is answered."""
        connection = apsw.Connection(str(self.path))
        try:
            return [row[3] for row in connection.execute("EXPLAIN QUERY PLAN " + QUERIES[query], bindings)]
        finally:
            connection.close()


class PostgresStores(Stores):
    """A PostgreSQL database."""

    def __init__(self) -> None:
        self.database = fresh_database()
        self.url = session_server().url(self.database)

    async def connect(self, *, address: str = "127.0.0.1:50051", lease_seconds: float = 30.0) -> PostgresStore:
        """Open the database."""
        return await PostgresStore.open(self.url, address=address, lease_seconds=lease_seconds)

    def execute(self, statement: str) -> str:
        """Execute a statement by another hand; return its rows, a line each, columns divided by `|`."""
        return session_server().execute(statement, self.database)


KINDS: dict[str, Callable[[Path], Stores]] = {"sqlite": SQLiteStores, "postgresql": lambda _: PostgresStores()}
"""By the name of a kind, what makes a place of it; a folder is given to it."""
