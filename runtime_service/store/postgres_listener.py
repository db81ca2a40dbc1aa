"""What other replicas write to PostgreSQL, as this process hears of it: notifications, and slow polling behind them.

A notification can be missed, while a connection is lost or for good: behind a pooler that shares connections none
arrives at all. So the listener proves its hearing by a word to itself, and asks by itself, seldom where it hears.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable

import asyncpg
import msgspec

from runtime_service.store.base import StoreListener
from runtime_service.store.postgres_connection import FAILURES, QUERIES, Database, close_connection

log = logging.getLogger(__name__)

CHANNEL = "acp"
_POLL_SECONDS = 5.0
_DEAF_POLL_SECONDS = 1.0
_PROBE_SECONDS = 30.0
_HEAR_SECONDS = 2.0
_RETRY_SECONDS = 1.0


class _Notice(msgspec.Struct, frozen=True, rename={"sender": "from"}):
    """What `acp.tell_others` tells, or the word of a listener to itself."""

    sender: str = ""
    waits: bool = False
    runs: list[str] = []
    many: bool = False
    probe: str = ""


class PostgresListener:
    """Tells a StoreListener what others write, in a task from `start` to `close`.

    `is_own` says whether a replica is this one.
    """

    def __init__(self, database: Database, is_own: Callable[[str], bool]) -> None:
        self._database = database
        self._is_own = is_own
        self._listener: StoreListener | None = None
        self._is_deaf = True
        self._heard: dict[str, asyncio.Event] = {}
        self._task: asyncio.Task[None] | None = None

    def tell(self, listener: StoreListener) -> None:
        """Tell `listener` from now on."""
        self._listener = listener

    @property
    def is_deaf(self) -> bool:
        """Whether notifications do not arrive, as far as is known."""
        return self._is_deaf

    def start(self) -> None:
        """Begin to listen."""
        self._task = asyncio.create_task(self._listen())

    async def close(self) -> None:
        """Listen no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _listen(self) -> None:
        while True:
            try:
                connection = await self._database.connect()
                try:
                    await self._hear(connection)
                finally:
                    await close_connection(connection)
            except FAILURES as error:
                log.info("the store's notifications are not heard: %s", error or type(error).__name__)
            self._is_deaf = True
            await asyncio.sleep(_RETRY_SECONDS)

    async def _hear(self, connection: asyncpg.Connection) -> None:
        loop = asyncio.get_running_loop()
        lost = asyncio.Event()
        connection.add_termination_listener(lambda _: lost.set())
        if not self._database.is_pooled:
            await connection.add_listener(CHANNEL, self._on_notice)
        probe_at = loop.time()
        while not lost.is_set():
            if loop.time() >= probe_at and not self._database.is_pooled:
                self._is_deaf = not await self._probe(connection)
                probe_at = loop.time() + _PROBE_SECONDS
            await self._poll(connection)
            try:
                async with asyncio.timeout(_DEAF_POLL_SECONDS if self._is_deaf else _POLL_SECONDS):
                    await lost.wait()
            except TimeoutError:
                continue

    async def _probe(self, connection: asyncpg.Connection) -> bool:
        """Return whether a word to itself arrives."""
        word = secrets.token_hex(8)
        heard = self._heard[word] = asyncio.Event()
        try:
            await self._database.fetch(connection, QUERIES["probe"], msgspec.json.encode(_Notice(probe=word)).decode())
            async with asyncio.timeout(_HEAR_SECONDS):
                await heard.wait()
        except TimeoutError:
            return False
        finally:
            del self._heard[word]
        return True

    async def _poll(self, connection: asyncpg.Connection) -> None:
        if (listener := self._listener) is None:
            return
        listener.runs_changed(())
        (row,) = await self._database.fetch(connection, QUERIES["is_claimable"])
        if row[0]:
            listener.turns_wait()

    def _on_notice(self, _connection: object, _pid: int, _channel: str, text: str) -> None:
        try:
            notice = msgspec.json.decode(text, type=_Notice)
        except msgspec.DecodeError:
            return  # anybody may use the channel
        if (heard := self._heard.get(notice.probe)) is not None:
            heard.set()
        if (listener := self._listener) is None or notice.probe or self._is_own(notice.sender):
            return
        if notice.runs or notice.many:
            listener.runs_changed(notice.runs)
        if notice.waits:
            listener.turns_wait()
