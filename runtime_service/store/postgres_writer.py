"""The one writer of a process to PostgreSQL: everything that waits goes into one batch, one batch at a time.

So this process's changes of a run come in the order of the store. A batch whose connection broke is sent again under
the same number until it is known what came of it: the database answers a number that it has had with what it did then.
What is written is the batch's business, who calls when the store's.
"""

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import asyncpg
import msgspec

from runtime_service.errors import StoreUnavailable
from runtime_service.store.postgres_batch import Batch, Held, Reply
from runtime_service.store.postgres_connection import (
    FAILURES,
    QUERIES,
    Database,
    close_connection,
    is_conflict,
    is_refusal,
)
from runtime_service.store.postgres_writes import REFUSED, Asked, find_lost

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_RETRY_SECONDS = (0.1, 1.0)  # the first pause, and the longest
_CLOSE_SECONDS = 3.0  # that `close` waits for a database that is away
_AWAY = "The store cannot be reached at the moment; nothing was changed."
_IN_DOUBT = "The store was lost while it wrote this; it may have taken effect."


class BatchWriter:
    """Writes under the name of a replica, registered at `open` with a lease that every write renews.

    A replica that did not renew in time is lost for good, and so is all that it held: `on_lost` is called, and the
    writer goes on as another one.
    """

    def __init__(self, database: Database, address: str, lease_seconds: float, on_lost: Callable[[], None]) -> None:
        self._database = database
        self._address = address
        self._lease_seconds = lease_seconds
        self._on_lost = on_lost
        self._own = [secrets.token_hex(8)]  # the names of this process, the newest last
        self._is_registered = False
        self._number = 0  # of the last batch
        self._held: dict[str, Held] = {}
        self._waiting: deque[Asked[Any]] = deque()
        self._batch = Batch(self._held)  # that is being written
        self._connection: asyncpg.Connection | None = None
        self._woken = asyncio.Event()
        self._is_closing = False
        self._task: asyncio.Task[None] | None = None

    @property
    def replica(self) -> str:
        """The name under which this process writes at the moment."""
        return self._own[-1]

    def is_own(self, replica: str) -> bool:
        """Return whether this process writes, or has written, under a name."""
        return replica in self._own

    @property
    def is_available(self) -> bool:
        """Whether the database answered when it was last asked."""
        return self._connection is not None and not (self._task is None or self._task.done())

    async def open(self) -> None:
        """Connect, register and begin to write. Raises one of the FAILURES of a connection."""
        await self._connected()
        self._task = asyncio.create_task(self._work())

    def submit(self, asked: Asked[_T]) -> asyncio.Future[_T]:
        """Queue a write; its future is done once the change is durable. Cancelling it does not undo the write.

        Fails with StoreUnavailable once the writer is closing; and while the database is known to be away, unless the
        write is patient.
        """
        if self._is_closing:
            asked.fail(StoreUnavailable("The store is closed."))
        elif not (self.is_available or asked.is_patient):
            asked.fail(StoreUnavailable(_AWAY))
        else:
            self._waiting.append(asked)
            self._woken.set()
        return asked.future

    async def renew(self) -> list[str]:
        """Renew the lease; return the runs of turns that somebody else has taken away since they were last written."""
        asked = {run_id: held.key for run_id, held in self._held.items()}
        lost = []
        for run_id in await self.submit(find_lost(list(asked.values()))):
            if (held := self._held.get(run_id)) is not None and held.key == asked[run_id]:
                del self._held[run_id]
                lost.append(run_id)
        return lost

    async def close(self) -> None:
        """Write what waits, give up what is held, and disconnect. Waits a few seconds for a database that is away."""
        self._is_closing = True
        self._woken.set()
        if (task := self._task) is None:
            return
        loop = asyncio.get_running_loop()
        until = loop.time() + _CLOSE_SECONDS
        while not task.done():
            await asyncio.wait([task], timeout=_RETRY_SECONDS[0])
            if not self.is_available and loop.time() > until:
                task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        if (connection := self._connection) is not None:
            self._connection = None
            with suppress(*FAILURES):
                await self._database.fetch(connection, QUERIES["give_up"], self.replica)
            await close_connection(connection)

    async def _work(self) -> None:
        try:
            while self._waiting or not self._is_closing:
                if not self._waiting and self._connection is not None:
                    self._woken.clear()
                    await self._woken.wait()
                # Behind the next turn of the loop: the tasks that began in this one get to ask for what they write.
                await asyncio.sleep(0)
                # Where the connection was lost there may be nothing to write; an empty batch brings it back.
                if self._waiting or self._connection is None:
                    self._batch = self._take_batch()
                    try:
                        await self._write(self._batch)
                    except Exception:  # noqa: BLE001 - logged there
                        self._lose_track()
        finally:
            self._is_closing = True
            for asked in self._batch.asked:
                asked.fail(StoreUnavailable(_IN_DOUBT if self._batch.is_in_doubt else _AWAY))
            for asked in self._waiting:
                asked.fail(StoreUnavailable(_AWAY))

    def _take_batch(self) -> Batch:
        batch = Batch(self._held)
        while self._waiting and batch.add(self._waiting[0]):
            self._waiting.popleft()
        return batch

    async def _write(self, batch: Batch) -> None:
        try:
            asked = batch.encode()
            self._number += 1
            reply = await self._apply(batch, asked)
        except (UnicodeEncodeError, StoreUnavailable) as error:
            if len(batch.asked) == 1:
                batch.asked[0].fail(error)
            else:
                await self._write_one_by_one(batch)
            return
        if reply.lost:
            self._begin_again(batch)
        else:
            batch.settle(reply, self.replica)

    async def _write_one_by_one(self, batch: Batch) -> None:
        """Write what a batch was refused for one of: all but that one will do."""
        batch.is_in_doubt = True  # each for itself, from here on
        for asked in batch.asked:
            alone = Batch(self._held)
            if not asked.is_told and alone.add(asked):
                await self._write(alone)

    async def _apply(self, batch: Batch, asked: str) -> Reply:
        """Return the answer to a batch, however often it has to be sent. Raises StoreUnavailable if it is refused."""
        pause, longest = _RETRY_SECONDS
        was_in_doubt = False
        while True:
            try:
                connection = await self._connected()
            except FAILURES as error:
                self._disconnect(error)
            else:
                batch.is_in_doubt = True
                try:
                    rows = await self._database.fetch(connection, QUERIES["apply"], self.replica, self._number, asked)
                except FAILURES as error:
                    if is_refusal(error) or is_conflict(error):
                        batch.is_in_doubt = was_in_doubt
                    else:
                        was_in_doubt = True
                        self._disconnect(error)
                    if is_refusal(error):
                        log.error("the store refused a write: %s", error)
                        raise StoreUnavailable(REFUSED) from error
                else:
                    batch.is_in_doubt = was_in_doubt
                    return msgspec.json.decode(rows[0][0], type=Reply)
            await asyncio.sleep(pause)
            pause = min(pause * 2, longest)

    async def _connected(self) -> asyncpg.Connection:
        """Return the connection, opened if there is none, once the replica is registered."""
        if (connection := self._connection) is None:
            connection = await self._database.connect()
        try:
            if not self._is_registered:
                for lost in self._own[:-1]:
                    await self._database.fetch(connection, QUERIES["give_up"], lost)
                register = (QUERIES["register"], self.replica, self._address, self._lease_seconds)
                await self._database.fetch(connection, *register)
                self._is_registered = True
        except BaseException:
            connection.terminate()
            raise
        if connection is not self._connection:
            connection.add_termination_listener(self._on_terminated)
            self._connection = connection
        return connection

    def _on_terminated(self, connection: asyncpg.Connection) -> None:
        if connection is self._connection:
            self._disconnect("the connection was closed")

    def _disconnect(self, reason: object) -> None:
        if (connection := self._connection) is not None:
            log.warning("the store is away: %s", reason or type(reason).__name__)
            self._connection = None
            self._woken.set()
            connection.terminate()

    def _lose_track(self) -> None:
        """Go on after a defect of ours: what was written is not known, so all that is held goes to others."""
        log.exception("a batch came to an end that nobody expected; all that this process held is given up")
        for asked in self._batch.asked:
            asked.fail(StoreUnavailable(_IN_DOUBT))
        self._begin_again(Batch(self._held))

    def _begin_again(self, batch: Batch) -> None:
        """Go on under another name: nothing of the batch was written now, and all that was held is lost."""
        log.warning("the lease ran out: what this process held is not its own any more")
        self._own.append(secrets.token_hex(8))
        self._is_registered = False
        self._number = 0
        self._held.clear()
        for asked in reversed(batch.asked):
            if batch.is_in_doubt and not asked.is_repeatable:
                asked.fail(StoreUnavailable(_IN_DOUBT))
            elif not asked.is_told:
                self._waiting.appendleft(asked)
        self._on_lost()
