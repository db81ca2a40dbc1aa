"""The one writer of a SQLite file: it puts everything that waits into one durable transaction.

Statements run on the event loop, where they cost microseconds. So does the COMMIT while the disk is quick: a thread
to wait in costs more than that. On a slow disk it runs in a thread, as do a write's second try and the checkpoints;
what is asked for meanwhile shares the next transaction. Knows connections and transactions; what is written, and
what is kept in memory to be written at a transaction's end, is the caller's.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from time import perf_counter
from typing import Any, Protocol, TypeVar

import apsw

from runtime_service.errors import StoreUnavailable

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_MAX_BATCH_ROWS = 1_000
# A commit that took longer sends the next ones to the thread: so many at first, twice as many each time in a row.
_QUICK_SECONDS = 0.002
_BATCHES_IN_THREAD = (16, 1_024)
# The write-ahead log is moved into the file when it has so many pages. Who reads from it then is waited for a while:
# only without readers can it begin anew. Where one stays, the next try is so many pages later.
_CHECKPOINT_PAGES = 4_000
_READER_MS = 100
_LOG_FILE_BYTES = 64 << 20  # what such a reader made it grow by is given back past this
_BUSY_MS = 1_000
_REFUSED = "The store does not take writes at the moment; nothing was changed."


class Rows(Protocol):
    """Rows that are changed in memory within a transaction and written at its end."""

    def write_out(self) -> None:
        """Write what is not written yet."""

    def forget_all(self) -> None:
        """Drop what is not written yet and all that is remembered: the transaction is rolled back."""


class _Asked:
    """A write, and whoever waits for it; `result` is what the write returned or the exception that it raised."""

    __slots__ = ("future", "on_rows", "result", "size", "write")

    def __init__(self, write: Callable[[], Any], size: int, future: asyncio.Future[Any], *, on_rows: bool) -> None:
        self.write = write
        self.size = size
        self.future = future
        self.on_rows = on_rows
        self.result: Any = None


class GroupCommitWriter:
    """Has the writing connection for itself until `close`, and says when `rows` are written out.

    A write may raise an exception of its own before it has changed anything: the others of its transaction are
    committed all the same. A failure of the database, or an exception after a change, rolls the transaction back
    and gives each of its writes one more try, alone.
    """

    def __init__(self, connection: apsw.Connection, rows: Rows) -> None:
        self._connection = connection
        self._rows = rows
        # On the loop nobody waits for a lock that another process holds; the thread, which tries again, does.
        connection.set_busy_timeout(0)
        self._loop = asyncio.get_running_loop()
        self._waiting: list[_Asked] = []
        self._busy = False  # a batch is being committed, or about to be written
        self._in_thread = 0  # so many batches are still to be committed in the thread
        self._slow_batches = _BATCHES_IN_THREAD[0]
        # Of the write-ahead log; whose turn it is to use the connection reads and sets them.
        self._log_pages = 0
        self._checkpoint_at = _CHECKPOINT_PAGES
        connection.set_wal_hook(self._on_logged)  # in place of SQLite's own checkpoints, which are part of a COMMIT
        connection.execute(f"PRAGMA journal_size_limit = {_LOG_FILE_BYTES}")
        self.was_refused = False  # the last write, by the file
        self._closed: asyncio.Future[None] | None = None
        self._commits: SimpleQueue[list[_Asked] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="store-writer", daemon=True)
        self._thread.start()

    def submit(self, write: Callable[[], _T], *, size: int = 1, on_rows: bool = False) -> asyncio.Future[_T]:
        """Queue a write; the future is done after the commit. Cancelling it does not undo the write.

        `size` is about how many rows it writes. One that is `on_rows` uses the rows in memory alone; before any
        other they are written out. Fails with StoreUnavailable once the writer is closing.
        """
        future: asyncio.Future[_T] = self._loop.create_future()
        if self._closed is not None:
            future.set_exception(StoreUnavailable("The store is closed."))
        else:
            self._waiting.append(_Asked(write, size, future, on_rows=on_rows))
            if not self._busy:
                self._busy = True
                self._loop.call_soon(self._write_soon)
        return future

    async def close(self) -> None:
        """Commit what waits; the connection is not used any more then."""
        if self._closed is None:
            self._closed = self._loop.create_future()
            if not self._busy:
                self._closed.set_result(None)
        await asyncio.wait([self._closed])
        self._commits.put(None)
        await self._loop.run_in_executor(None, self._thread.join)

    def _write_batch(self) -> None:
        batch = self._take_batch()
        try:
            self._write(batch)
            quick = self._may_commit_here()
            if quick:
                self._commit_here()
        except Exception:  # noqa: BLE001 - told to the one who asked for the write, once it has failed alone
            # The thread finds no transaction and begins again, one by one.
            self._roll_back()
            quick = False
        if quick:
            self._tell(batch)
            self._go_on()
        else:
            self._commits.put(batch)

    def _may_commit_here(self) -> bool:
        if self._in_thread:
            self._in_thread -= 1
            return False
        return self._log_pages < self._checkpoint_at

    def _commit_here(self) -> None:
        quick = False
        began = perf_counter()
        try:
            self._connection.execute("COMMIT")
            quick = perf_counter() - began <= _QUICK_SECONDS
        finally:
            # A disk that refuses is not one to wait for here either.
            if quick:
                self._slow_batches = _BATCHES_IN_THREAD[0]
            else:
                self._in_thread = self._slow_batches
                self._slow_batches = min(self._slow_batches * 2, _BATCHES_IN_THREAD[1])

    def _on_logged(self, _connection: apsw.Connection, _database: str, pages: int) -> int:
        self._log_pages = pages
        self.was_refused = False
        return apsw.SQLITE_OK

    def _write_soon(self) -> None:
        # Behind the next turn of the loop: the tasks that began in this one get to ask for what they write.
        self._loop.call_soon(self._write_batch)

    def _take_batch(self) -> list[_Asked]:
        """Take the oldest writes, as many as the loop and those behind them can wait for; at least one."""
        size = count = 0
        for asked in self._waiting:
            size += asked.size
            if count and size > _MAX_BATCH_ROWS:
                break
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch

    def _write(self, batch: list[_Asked]) -> None:
        """Begin a transaction and do the writes in it. Raises apsw.Error, and what a write raised after a change."""
        connection, rows = self._connection, self._rows
        connection.execute("BEGIN IMMEDIATE")
        for asked in batch:
            if not asked.on_rows:
                rows.write_out()
            changes = connection.total_changes()
            try:
                asked.result = asked.write()
            except Exception as error:
                if isinstance(error, apsw.Error) or connection.total_changes() != changes:
                    raise
                asked.result = error
        rows.write_out()

    def _work(self) -> None:
        while (batch := self._commits.get()) is not None:
            self._commit(batch)
            self._loop.call_soon_threadsafe(self._tell, batch)
            if self._log_pages >= self._checkpoint_at:
                self._checkpoint()
            self._loop.call_soon_threadsafe(self._go_on)

    def _checkpoint(self) -> None:
        """Move the log into the file, so that the next commit begins it anew."""
        self._connection.set_busy_timeout(_READER_MS)
        try:
            self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
            self._log_pages = 0
        except apsw.Error as error:
            log.warning("the write-ahead log has %s pages and grows: %s", self._log_pages, error)
        self._connection.set_busy_timeout(0)
        self._checkpoint_at = self._log_pages + _CHECKPOINT_PAGES

    def _commit(self, batch: list[_Asked]) -> None:
        """Commit the open transaction; where that fails, or there is none, each write in one of its own."""
        connection = self._connection
        if connection.in_transaction:
            try:
                connection.execute("COMMIT")
                return
            except apsw.Error:
                self._roll_back()
        connection.set_busy_timeout(_BUSY_MS)
        for asked in batch:
            try:
                self._write([asked])
                connection.execute("COMMIT")
            except Exception as error:  # noqa: BLE001 - handed to the one who asked for the write
                self._roll_back()
                if isinstance(error, apsw.BusyError):
                    connection.set_busy_timeout(0)  # once is enough: the rest of the batch does not wait, too
                log.error("the store refused a write: %s", error)
                asked.result = error
                if isinstance(error, apsw.Error):
                    self.was_refused = True
                    asked.result = StoreUnavailable(_REFUSED)
        connection.set_busy_timeout(0)

    def _roll_back(self) -> None:
        self._rows.forget_all()
        if self._connection.in_transaction:
            with suppress(apsw.Error):  # the file is out of reach; what is asked for next finds that out
                self._connection.execute("ROLLBACK")

    @staticmethod
    def _tell(batch: list[_Asked]) -> None:
        for asked in batch:
            if asked.future.cancelled():
                continue
            if isinstance(asked.result, Exception):
                asked.future.set_exception(asked.result)
            else:
                asked.future.set_result(asked.result)

    def _go_on(self) -> None:
        if self._waiting:
            self._loop.call_soon(self._write_soon)
        else:
            self._busy = False
            if self._closed is not None:
                self._closed.set_result(None)
