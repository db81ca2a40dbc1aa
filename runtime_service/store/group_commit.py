"""The one writer of a SQLite file: a thread that puts everything that waits into one durable transaction.

Knows connections and transactions; what is written is the caller's.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

import apsw

from runtime_service.errors import StoreUnavailable

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_Write = Callable[[apsw.Connection], Any]
_Asked = tuple[_Write, asyncio.Future[Any]]

_MAX_BATCH = 1_000


class GroupCommitWriter:
    """Owns the writing connection.

    A write is a function of the connection. It may raise an exception of its own only before it has changed
    anything: the others of its transaction are committed all the same. A failure of the database rolls the
    transaction back and gives each of its writes one more try, alone.
    """

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._gathered: list[_Asked] = []
        self._waiting: SimpleQueue[list[_Asked] | None] = SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="store-writer", daemon=True)
        self._thread.start()

    def submit(self, write: Callable[[apsw.Connection], _T]) -> asyncio.Future[_T]:
        """Queue a write; the future is done after the commit. Cancelling it does not undo the write.

        Fails with StoreUnavailable once the writer is closing.
        """
        future: asyncio.Future[_T] = self._loop.create_future()
        if self._closing:
            future.set_exception(StoreUnavailable("The store is closed."))
        else:
            if not self._gathered:
                # What is asked for in one turn of the loop shares a commit, and wakes the thread once.
                self._loop.call_soon(self._hand_over)
            self._gathered.append((write, future))
        return future

    async def close(self) -> None:
        """Commit what waits, then close the connection."""
        if not self._closing:
            self._closing = True
            self._hand_over()
            self._waiting.put(None)
            await self._loop.run_in_executor(None, self._thread.join)
            self._connection.close()

    def _hand_over(self) -> None:
        if self._gathered:
            self._waiting.put(self._gathered)
            self._gathered = []

    def _work(self) -> None:
        waiting = self._waiting
        open_ = True
        while open_:
            batch: list[_Asked] = []
            while open_ and len(batch) < _MAX_BATCH:
                asked = waiting.get()
                if asked is None:
                    open_ = False
                else:
                    batch += asked
                if waiting.empty():
                    break
            if batch:
                results = self._commit([write for write, _ in batch])
                futures = [future for _, future in batch]
                self._loop.call_soon_threadsafe(_deliver, futures, results)

    def _commit(self, writes: list[_Write]) -> list[Any]:
        """Return, for each write, what it returned or the exception that it raised."""
        results: list[Any] = []
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for write in writes:
                try:
                    results.append(write(self._connection))
                except apsw.Error:
                    raise
                except Exception as error:  # noqa: BLE001 - handed to the one who asked for the write
                    results.append(error)
            self._connection.execute("COMMIT")
        except apsw.Error as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            if len(writes) > 1:
                return [result for write in writes for result in self._commit([write])]
            log.error("the store refused a write: %s", error)
            return [StoreUnavailable("The store does not take writes at the moment; nothing was changed.")]
        return results


def _deliver(futures: list[asyncio.Future[Any]], results: list[Any]) -> None:
    for future, result in zip(futures, results, strict=True):
        if future.cancelled():
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
