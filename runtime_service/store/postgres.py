"""The store for many machines: any number of processes over one PostgreSQL database. See `base` for what it promises.

What is written goes through one writer with a connection of its own, what is read through a small pool, and what
others write is heard over a third way. All that the processes have to agree on, the database decides.
"""

import asyncio
from collections.abc import Callable, Sequence

import asyncpg

from runtime_service.errors import InvalidRequest, RunNotFound, StoreUnavailable
from runtime_service.runs import EventDraft, EventRole, Run, RunEvent, RunStatus
from runtime_service.store import postgres_writes as writes
from runtime_service.store.base import (
    Cancel,
    Change,
    Deleted,
    NewAnswer,
    NewRun,
    NewTurn,
    Outcome,
    RunPage,
    StoreListener,
    TurnKey,
)
from runtime_service.store.columns import ROLES
from runtime_service.store.postgres_connection import FAILURES, QUERIES, Database, close_connection, is_refusal
from runtime_service.store.postgres_listener import PostgresListener
from runtime_service.store.postgres_rows import LIST_RUNS, event_from_row, run_from_row
from runtime_service.store.postgres_schema import check_schema
from runtime_service.store.postgres_writer import BatchWriter

_ACQUIRE_SECONDS = 5.0  # that a read waits for its turn, and for a connection
_AWAY_SECONDS = 1.0  # where the database is known to be away
_MAX_KEY = 2**63 - 1


class PostgresStore:
    """Runs in one PostgreSQL database; `open` registers this process there, `close` gives up what it holds."""

    def __init__(self, database: Database, address: str, lease_seconds: float) -> None:
        self._database = database
        self._writer = BatchWriter(database, address, lease_seconds, self._on_lost)
        self._others = PostgresListener(database, self._writer.is_own)
        self._listener: StoreListener | None = None
        self._pool: asyncpg.Pool | None = None
        self._delete_from = (0, 0)  # the time of `delete_runs`, and the key behind which it goes on

    @classmethod
    async def open(cls, url: str, *, address: str, lease_seconds: float = 30.0) -> "PostgresStore":
        """Open the database at `url`, a URL of PostgreSQL; see `Database` for what may be added to it.

        `address` is where other processes reach this one. What it holds is lost when it was not renewed for
        `lease_seconds`, by the clock of the database. Raises StoreUnavailable when there is no such database, or its
        schema is of another version.
        """
        database = Database(url)
        store = cls(database, address, lease_seconds)
        try:
            await store._open()
        except FAILURES as error:
            await store.close()
            raise database.unavailable(error) from None
        except BaseException:
            await store.close()
            raise
        return store

    async def _open(self) -> None:
        connection = await self._database.connect()
        try:
            await check_schema(self._database, connection)
        finally:
            await close_connection(connection)
        self._pool = await self._database.open_pool()
        await self._writer.open()
        self._others.start()

    async def close(self) -> None:
        """Finish the writes that were asked for, give up what is held, then close."""
        await self._others.close()
        await self._writer.close()
        if (pool := self._pool) is not None:
            self._pool = None
            pool.terminate()

    @property
    def is_available(self) -> bool:
        """Whether the database answered when it was last asked. It comes back by itself."""
        return self._writer.is_available

    # Other processes

    def listen(self, listener: StoreListener) -> None:
        """Tell `listener` from now on."""
        self._listener = listener
        self._others.tell(listener)

    def _on_lost(self) -> None:
        if self._listener is not None:
            self._listener.held_lost()

    async def renew(self) -> None:
        """Hold for another lease what is held, and find out what is not any more."""
        lost = await self._writer.renew()
        if lost and self._listener is not None:
            self._listener.runs_changed(lost)

    # Writes

    def start_run(self, new: NewRun, *, claim: bool) -> asyncio.Future[Change]:
        """Accept a run."""
        return self._writer.submit(writes.Start(new, claim=claim))

    def continue_run(self, new: NewTurn, *, claim: bool) -> asyncio.Future[Change]:
        """Open the next turn of a run."""
        return self._writer.submit(writes.continue_run(new, claim=claim))

    def append_events(self, key: TurnKey, events: Sequence[EventDraft]) -> asyncio.Future[Change]:
        """Put events at the end of a running turn's log."""
        return self._writer.submit(writes.Extend(key, events))

    def save_draft(self, key: TurnKey, text: str) -> asyncio.Future[None]:
        """Keep the text so far of the message in the making."""
        return self._writer.submit(writes.SaveDraft(key, text))

    def finish_turn(self, key: TurnKey, events: Sequence[EventDraft], outcome: Outcome) -> asyncio.Future[Change]:
        """Append the last events and settle the turn."""
        return self._writer.submit(writes.Extend(key, events, outcome))

    def ask_question(
        self, key: TurnKey, events: Sequence[EventDraft], options: Sequence[tuple[str, str]]
    ) -> asyncio.Future[Change]:
        """Put events at the end of a running turn's log, the last of which asks a question."""
        return self._writer.submit(writes.ask_question(key, events, options))

    def answer_question(self, answer: NewAnswer) -> asyncio.Future[Change]:
        """Append the answer to the question of a run."""
        return self._writer.submit(writes.answer_question(answer))

    def release_turn(self, key: TurnKey, events: Sequence[EventDraft]) -> asyncio.Future[Change]:
        """Give a running turn back to the queue."""
        return self._writer.submit(writes.release_turn(key, events))

    def cancel_run(self, cancel: Cancel, events: Sequence[EventDraft], output: str | None) -> asyncio.Future[Change]:
        """Settle every open turn as cancelled."""
        return self._writer.submit(writes.cancel_run(cancel, events, output))

    def claim_turns(self, limit: int) -> asyncio.Future[list[Change]]:
        """Claim queued turns, oldest first."""
        return self._writer.submit(writes.claim_turns(limit))

    async def recover(self, max_attempts: int, may_repeat: Callable[[str], bool]) -> list[Change]:
        """Settle the turns that lost processes left running, some at a time."""
        changes: list[Change] = []
        while True:
            orphans = [found.run for found in await self._writer.submit(writes.find_orphans())]
            settling = [
                self._writer.submit(
                    writes.requeue_orphan(run)
                    if may_repeat(run.server_id) and run.turn.attempt < max_attempts
                    else writes.fail_orphan(run)
                )
                for run in orphans
            ]
            changes += [change for change in await asyncio.gather(*settling) if change is not None]
            if len(orphans) < writes.ORPHANS_AT_ONCE:
                return changes

    async def get_requested(self, new: NewRun | NewTurn) -> Change | None:
        """Return what an earlier request of the same id gave, one that is being written too."""
        return None if new.request is None else await self._writer.submit(writes.find_request(new, new.request))

    async def delete_runs(self, before_ms: int, limit: int) -> Deleted:
        """Delete runs that were last written to before a time, in the order of their acceptance."""
        earlier_ms, place = self._delete_from
        after: int | None = place if earlier_ms == before_ms else 0
        deleted = Deleted(0, 0, 0)
        while after is not None and not any(deleted):
            deleted, after = await self._writer.submit(writes.delete_runs(before_ms, limit, after))
        self._delete_from = (before_ms, after or 0)
        return deleted

    def delete_requests(self, before_ms: int, limit: int) -> asyncio.Future[int]:
        """Forget the requests made before a time."""
        return self._writer.submit(writes.delete_requests(before_ms, limit))

    # Reads

    async def count_queued(self) -> int:
        """Count the turns that wait."""
        (row,) = await self._fetch(QUERIES["count_queued"])
        return int(row[0])

    async def get_run(self, organization: str, server_id: str, run_id: str, turn: int | None = None) -> Run:
        """Return a run showing its latest turn, or `turn`."""
        rows = await self._fetch(QUERIES["get_run"], run_id, organization, server_id, turn)
        if not rows:
            raise RunNotFound(run_id)
        return run_from_row(rows[0], self._writer.replica)

    async def list_runs(
        self,
        organization: str,
        server_id: str,
        *,
        status: RunStatus | None,
        token: str | None,
        limit: int,
        limit_characters: int = 1 << 20,
    ) -> RunPage:
        """Return a page of runs, newest first; characters are counted as bytes of UTF-8."""
        before = _MAX_KEY
        if token is not None:
            keys = await self._fetch(QUERIES["run_key"], token, organization, server_id)
            if not keys:
                raise InvalidRequest("page_token", "is not a token that an earlier page gave")
            before = keys[0][0]
        rows = await self._fetch(LIST_RUNS[status], organization, server_id, before, limit, limit_characters)
        runs = [run_from_row(row, self._writer.replica) for row in rows]
        return RunPage(runs, runs[-1].id if rows and rows[0]["found"] > len(rows) else None)

    async def read_events(self, run_id: str, after: int, limit: int, limit_bytes: int) -> list[RunEvent]:
        """Return the events after a sequence."""
        rows = await self._fetch(QUERIES["read_events"], run_id, after, limit, limit_bytes)
        return [event_from_row(row) for row in rows]

    async def read_messages(self, run_id: str, before_turn: int, limit: int) -> list[tuple[EventRole, str]]:
        """Return the messages of the turns before, oldest first."""
        newest_first = await self._fetch(QUERIES["read_messages"], run_id, before_turn, limit)
        return [(ROLES[role], content) for role, content in reversed(newest_first)]

    async def read_latest_log(self, run_id: str, log_type: str, after: int = 0) -> RunEvent | None:
        """Return the newest event of a type behind a sequence."""
        rows = await self._fetch(QUERIES["read_latest_log"], run_id, log_type, after)
        return event_from_row(rows[0]) if rows else None

    async def _fetch(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        """Return rows, over another connection where the first one was broken. Raises StoreUnavailable."""
        if self._pool is None:
            raise StoreUnavailable("The store is closed.")
        patience_seconds = _ACQUIRE_SECONDS if self.is_available else _AWAY_SECONDS
        for is_last in (False, True):
            try:
                async with self._pool.acquire(timeout=patience_seconds) as connection:
                    return await self._database.fetch(connection, query, *arguments)
            except asyncpg.CharacterNotInRepertoireError:
                return []  # asked for by a name that no row can have
            except FAILURES as error:
                if is_last or is_refusal(error):
                    raise StoreUnavailable(
                        f"The store cannot be read at the moment ({type(error).__name__})."
                    ) from error
        raise AssertionError("the last try returns or raises")
