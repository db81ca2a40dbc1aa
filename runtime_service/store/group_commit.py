"""The one writer of a SQLite file: it puts everything that waits into one durable transaction.

Statements run on the event loop, where they cost microseconds; what waits for the disk, the COMMIT, runs in a
thread. So the interpreter lock changes hands once a transaction, not once a statement. What is asked for
meanwhile shares the next transaction. Knows connections and transactions; what is written is the caller's.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

import apsw

from runtime_service.errors import StoreUnavailable

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_Write = Callable[[apsw.Connection], Any]

_MAX_BATCH = 256
_BUSY_MS = 1_000


class _Asked:
    """A write, and whoever waits for it; `result` is what the write returned or the exception that it raised."""

    __slots__ = ("future", "result", "write")

    def __init__(self, write: _Write, future: asyncio.Future[Any]) -> None:
        self.write = write
        self.future = future
        self.result: Any = None


class GroupCommitWriter:
    """Owns the writing connection.

    A write is a function of the connection. It may raise an exception of its own before it has changed anything:
    the others of its transaction are committed all the same. A failure of the database, or an exception after a
    change, rolls the transaction back and gives each of its writes one more try, alone.
    """

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        # On the loop nobody waits for a lock that another process holds; the thread, which tries again, does.
        connection.set_busy_timeout(0)
        self._loop = asyncio.get_running_loop()
        self._waiting: list[_Asked] = []
        self._busy = False  # a batch is being committed, or about to be written
        self._closed: asyncio.Future[None] | None = None
        self._commits: SimpleQueue[list[_Asked] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="store-writer", daemon=True)
        self._thread.start()

    def submit(self, write: Callable[[apsw.Connection], _T]) -> asyncio.Future[_T]:
        """Queue a write; the future is done after the commit. Cancelling it does not undo the write.

        Fails with StoreUnavailable once the writer is closing.
        """
        future: asyncio.Future[_T] = self._loop.create_future()
        if self._closed is not None:
            future.set_exception(StoreUnavailable("The store is closed."))
        else:
            self._waiting.append(_Asked(write, future))
            if not self._busy:
                self._busy = True
                # At the end of this turn of the loop, so that what else is asked for in it comes along.
                self._loop.call_soon(self._write_batch)
        return future

    async def close(self) -> None:
        """Commit what waits, then close the connection."""
        if self._closed is None:
            self._closed = self._loop.create_future()
            if not self._busy:
                self._closed.set_result(None)
            await self._closed
            self._commits.put(None)
            await self._loop.run_in_executor(None, self._thread.join)
            self._connection.close()

    def _write_batch(self) -> None:
        batch, self._waiting = self._waiting[:_MAX_BATCH], self._waiting[_MAX_BATCH:]
        try:
            _write(self._connection, batch)
        except Exception:  # noqa: BLE001 - told to the one who asked for the write, once it has failed alone
            # The thread finds no transaction and begins again, one by one.
            _roll_back(self._connection)
        self._commits.put(batch)

    def _work(self) -> None:
        while (batch := self._commits.get()) is not None:
            _commit(self._connection, batch)
            self._loop.call_soon_threadsafe(self._on_committed, batch)

    def _on_committed(self, batch: list[_Asked]) -> None:
        for asked in batch:
            if asked.future.cancelled():
                continue
            if isinstance(asked.result, Exception):
                asked.future.set_exception(asked.result)
            else:
                asked.future.set_result(asked.result)
        if self._waiting:
            self._loop.call_soon(self._write_batch)
        else:
            self._busy = False
            if self._closed is not None:
                self._closed.set_result(None)


def _write(connection: apsw.Connection, batch: list[_Asked]) -> None:
    """Begin a transaction and do the writes in it. Raises apsw.Error, and what a write raised after a change."""
    connection.execute("BEGIN IMMEDIATE")
    for asked in batch:
        changes = connection.total_changes()
        try:
            asked.result = asked.write(connection)
        except Exception as error:
            if isinstance(error, apsw.Error) or connection.total_changes() != changes:
                raise
            asked.result = error


def _commit(connection: apsw.Connection, batch: list[_Asked]) -> None:
    """Commit the open transaction; where that fails, or there is none, each write in one of its own."""
    if connection.in_transaction:
        try:
            connection.execute("COMMIT")
            return
        except apsw.Error:
            _roll_back(connection)
    connection.set_busy_timeout(_BUSY_MS)
    for asked in batch:
        try:
            _write(connection, [asked])
            connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - handed to the one who asked for the write
            _roll_back(connection)
            log.error("the store refused a write: %s", error)
            asked.result = error
            if isinstance(error, apsw.Error):
                asked.result = StoreUnavailable("The store does not take writes at the moment; nothing was changed.")
    connection.set_busy_timeout(0)


def _roll_back(connection: apsw.Connection) -> None:
    if connection.in_transaction:
        with suppress(apsw.Error):  # the file is out of reach; what is asked for next finds that out
            connection.execute("ROLLBACK")
