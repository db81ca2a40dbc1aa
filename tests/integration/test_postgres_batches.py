"""Writes that share a batch, and what they cost: as one by one, whatever else is in it, and however much is stored."""

import asyncio
import json
from functools import cache
from typing import Any

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_service.errors import RequestIdReused, RunNotFound, StoreUnavailable
from runtime_service.runs import RunMode, RunStatus, new_run_id
from runtime_service.store import postgres_writes as writes
from runtime_service.store.base import Change, NewRun, Outcome, TurnKey, TurnLost
from runtime_service.store.postgres import PostgresStore
from runtime_service.store.postgres_batch import Batch, Held
from runtime_service.store.postgres_connection import QUERIES
from runtime_service.store.postgres_rows import LIST_RUNS, run_from_row
from tests.integration.test_run_store_batches import ask, told
from tests.stores import PostgresStores
from tests.support import (
    ALL,
    OPTIONS,
    ORGANIZATION,
    SERVER,
    answer_to,
    cancel_of,
    contents,
    flood,
    key_of,
    log_of,
    new_run,
    next_turn,
    question,
    run_async,
    running,
    said,
)

COMPLETED = Outcome(RunStatus.COMPLETED, "done")
ONES = st.sampled_from([1, 1, 1, 2])
# Mostly of one run that is there; no claims: one sees all that is in its batch, also what was asked for behind it.
WRITES = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "start",
                "append",
                "log",
                "finish",
                "draft",
                "release",
                "continue",
                "cancel",
                "ask",
                "ask with text",
                "answer",
            ]
        ),
        st.sampled_from([0, 0, 0, 1]),  # which run
        ONES,  # which turn
        ONES,  # which epoch
    ),
    min_size=2,
    max_size=8,
)
STORED = """
SELECT 1, ROW(message_count, last_sequence, last_turn, status, question)::text FROM acp.runs WHERE id = '{run_id}'
UNION ALL
SELECT 2, ROW(number, status, first_sequence, output, error, attempt, epoch, ready, draft, holder IS NULL)::text
FROM acp.turns WHERE run_key = (SELECT run_key FROM acp.runs WHERE id = '{run_id}')
UNION ALL
SELECT 3, ROW(sequence, turn, role, content)::text
FROM acp.events WHERE run_key = (SELECT run_key FROM acp.runs WHERE id = '{run_id}') ORDER BY 1, 2
"""


@pytest.fixture
def stores() -> PostgresStores:
    """A database."""
    return PostgresStores()


@cache
def shared_stores() -> PostgresStores:
    """The database of all examples."""
    return PostgresStores()


def rows(stores: PostgresStores, ids: list[str]) -> list[str]:
    """All that is stored of some runs, names and times left out."""
    return [stores.execute(STORED.format(run_id=run_id)) for run_id in ids]


@settings(max_examples=60, deadline=None)
@given(asked=WRITES)
def test_writes_in_one_batch_leave_what_they_leave_one_by_one(asked: list[tuple[str, int, int, int]]) -> None:
    """The same rows and the same answers, refusals included."""

    stores = shared_stores()
    asked = [("start", 0, 1, 1), *asked]

    async def main() -> None:
        async with stores.open() as store:
            assert isinstance(store, PostgresStore)
            ids, others = [new_run_id(), new_run_id()], [new_run_id(), new_run_id()]
            shared = await asyncio.gather(*(ask(store, ids, write) for write in asked), return_exceptions=True)
            single: list[object] = []
            for write in asked:
                single += await asyncio.gather(ask(store, others, write), return_exceptions=True)
            assert [told(result) for result in shared] == [told(result) for result in single]
            assert rows(stores, ids) == rows(stores, others)

    run_async(main())


def test_a_short_run_takes_one_batch(stores: PostgresStores) -> None:
    """Accepted, extended and settled at once: each answer is of its own write."""

    async def main() -> None:
        async with stores.open() as store:
            new = new_run()
            key = TurnKey(new.id, 1, 1)
            started, extended, _, finished = await asyncio.gather(
                store.start_run(new, claim=True),
                store.append_events(key, said("a")),
                store.save_draft(key, "half"),
                store.finish_turn(key, said("b"), COMPLETED),
            )
            assert stores.execute("SELECT last_batch FROM acp.replicas") == "1"
            runs = [change.run for change in (started, extended, finished)]
            assert [run.status for run in runs] == ["running", "running", "completed"]
            assert [run.last_sequence for run in runs] == [1, 2, 3]
            assert await store.get_run(ORGANIZATION, SERVER, new.id) == finished.run
            assert contents(await log_of(store, new.id)) == ["hello", "a", "b"]
            with pytest.raises(TurnLost):
                await store.append_events(key, said("late"))

    run_async(main())


def test_start_that_comes_again_does_not_lose_what_its_turn_writes_meanwhile(stores: PostgresStores) -> None:
    """The writes of the turn that this process holds come behind the start, and are of their turn."""

    async def main() -> None:
        async with stores.open() as store:
            new = new_run()
            run = (await store.start_run(new, claim=True)).run
            again, extended, _ = await asyncio.gather(
                store.start_run(new, claim=True),
                store.append_events(key_of(run), said("a")),
                store.save_draft(key_of(run), "half"),
            )
            assert (again.replayed, again.run.last_sequence, extended.run.last_sequence) == (True, 1, 2)
            assert contents(await log_of(store, new.id)) == ["hello", "a"]

    run_async(main())


def test_write_that_is_refused_does_not_hurt_its_batch(stores: PostgresStores) -> None:
    """A domain error, and a text that no database takes, fail alone; nothing of them is there."""

    async def main() -> None:
        async with stores.open() as store:
            run = await running(store)
            news = [new_run(str(n)) for n in range(3)]
            results = await asyncio.gather(
                store.start_run(news[0], claim=False),
                store.append_events(TurnKey(run.id, 1, 9), said("wrong epoch")),
                store.append_events(key_of(run), said("kept")),
                store.append_events(key_of(run), said("x", "\ud800")),
                store.finish_turn(key_of(run), said("\0"), COMPLETED),
                store.start_run(new_run("\0"), claim=False),
                store.continue_run(next_turn(new_run()), claim=False),
                store.continue_run(next_turn(run, "\0"), claim=False),
                store.cancel_run(cancel_of(NewRun("run_\0", ORGANIZATION, SERVER, "", RunMode.SYNC, 1)), [], None),
                store.start_run(news[1], claim=False),
                return_exceptions=True,
            )
            assert [type(result) for result in results] == [
                Change,
                TurnLost,
                Change,
                UnicodeEncodeError,
                StoreUnavailable,
                StoreUnavailable,
                RunNotFound,
                StoreUnavailable,
                RunNotFound,
                Change,
            ]
            assert await store.count_queued() == 2
            assert contents(await log_of(store, run.id)) == ["hello", "kept"]
            assert (await store.get_run(ORGANIZATION, SERVER, run.id)).status is RunStatus.RUNNING
            with pytest.raises(RunNotFound):
                await store.get_run(ORGANIZATION, SERVER, "run_\0")

    run_async(main())


def test_cancelled_caller_beside_a_write_that_is_refused_does_not_undo_its_write(stores: PostgresStores) -> None:
    """It is written when the others of the batch are: each for itself."""

    async def main() -> None:
        async with stores.open() as store:
            new = new_run()
            asyncio.ensure_future(store.start_run(new, claim=False)).cancel()
            with pytest.raises(StoreUnavailable):
                await store.start_run(new_run("\0"), claim=False)
            assert contents(await log_of(store, new.id)) == ["hello"]

    run_async(main())


@pytest.mark.parametrize("first", ["start", "continue"])
def test_request_id_that_comes_twice_within_a_batch_is_refused(stores: PostgresStores, first: str) -> None:
    """The one that was asked for first is done, the other one is another request."""

    async def main() -> None:
        async with stores.open() as store:
            run = (await store.start_run(new_run(), claim=False)).run
            starting = [store.start_run(new_run(request_id="once"), claim=False)] if first == "start" else []
            resuming = store.continue_run(next_turn(run, request_id="once"), claim=False)
            starting = starting or [store.start_run(new_run(request_id="once"), claim=False)]
            done, refused = (starting[0], resuming) if first == "start" else (resuming, starting[0])
            assert not (await done).replayed
            with pytest.raises(RequestIdReused):
                await refused
            assert await store.count_queued() == 2

    run_async(main())


def test_a_cancelled_caller_does_not_undo_its_write(stores: PostgresStores) -> None:
    """The task that waits is cancelled while the batch is under way; the run is there, and the next write works."""

    async def main() -> None:
        async with stores.open() as store:
            new = new_run()

            async def start() -> None:
                await store.start_run(new, claim=True)

            waiting = asyncio.create_task(start())
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await store.append_events(TurnKey(new.id, 1, 1), said("a"))
            assert contents(await log_of(store, new.id)) == ["hello", "a"]

    run_async(main())


def test_a_flood_of_writes_goes_into_few_batches(stores: PostgresStores) -> None:
    """Whole and in order, a bounded number each."""

    async def main() -> None:
        async with stores.open() as store:
            run = await running(store)
            await flood(store, run)
            assert 5 <= int(stores.execute("SELECT last_batch FROM acp.replicas")) <= 8
            large = [store.append_events(key_of(run), said("x" * (1 << 20))) for _ in range(9)]
            await asyncio.gather(*large)
            assert 8 <= int(stores.execute("SELECT last_batch FROM acp.replicas")) <= 12

    run_async(main())


# Costs

MANY = """
INSERT INTO acp.runs
SELECT n, 'run_' || n, 'default', 'assistant', NULL, NULL, n, n, 2, 2, 1,
       CASE WHEN n % 2 = 0 THEN 'completed' ELSE 'queued' END
FROM generate_series(1000, 61000) AS n;
INSERT INTO acp.turns (run_key, number, organization, server_id, status, mode, input, first_sequence, created_at_ms,
                       attempt, epoch, ready)
SELECT run_key, 1, organization, server_id, status, 'sync', 'hello', 1, run_key, 0, 0, true
FROM acp.runs WHERE run_key >= 1000;
INSERT INTO acp.events (run_key, sequence, turn, role, content, created_at_ms)
SELECT run_key, n, 1, 'assistant', 'text', 1 FROM acp.runs, generate_series(1, 2) AS n WHERE run_key >= 1000;
INSERT INTO acp.requests SELECT 'default', id, '', run_key, 1, run_key FROM acp.runs WHERE run_key >= 1000;
SELECT setval('acp.run_keys', 70000);
"""
PAGES = 600  # that a batch may look at; who looks at all runs of a server looks at twice as many and more


async def pages_of(connection: asyncpg.Connection, query: str, *arguments: object) -> int:
    """How many pages the database looks at for a query, what it calls included."""
    rows = await connection.fetch("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + query, *arguments)
    (document,) = json.loads(rows[0][0])
    return int(document["Plan"]["Shared Hit Blocks"]) + int(document["Plan"]["Shared Read Blocks"])


def test_cost_does_not_grow_with_what_is_stored(stores: PostgresStores) -> None:
    """Of any write and read, even for a session that came when all tables were empty."""

    async def main() -> None:
        connection = await asyncpg.connect(stores.url)
        await connection.execute(QUERIES["register"], "me", "127.0.0.1:1", 30.0)
        number = 0

        async def write(*asked: writes.Asked[Any], held: dict[str, Held] | None = None) -> int:
            nonlocal number
            number += 1
            batch = Batch(held or {})
            for each in asked:
                assert batch.add(each)
            return await pages_of(connection, QUERIES["apply"], "me", number, batch.encode())

        async def all_pages() -> dict[str, int]:
            news = [new_run(str(n), request_id=new_run_id()) for n in range(3)]
            starts = [writes.Start(new, claim=True) for new in news]
            pages = {"start": await write(*starts)}
            held = {start.run.id: Held(start.run) for start in starts}
            keys = [held[new.id].key for new in news]
            pages["append"] = await write(*(writes.Extend(key, said("a", "b")) for key in keys), held=held)
            pages["draft"] = await write(writes.SaveDraft(keys[0], "half"), held=held)
            pages["ask"] = await write(writes.ask_question(keys[1], [question()], OPTIONS))
            asking = (QUERIES["get_run"], news[1].id, ORGANIZATION, SERVER, None)
            answer = answer_to(run_from_row((await connection.fetch(*asking))[0], "me"), request_id=new_run_id())
            pages["answer"] = await write(writes.answer_question(answer))
            assert not run_from_row((await connection.fetch(*asking))[0], "me").is_asking
            pages["continue"] = await write(
                writes.continue_run(next_turn(news[0], request_id=new_run_id()), claim=True)
            )
            pages["finish"] = await write(*(writes.Extend(key, [], COMPLETED) for key in keys[:2]), held=held)
            pages["release"] = await write(writes.release_turn(keys[2], []))
            pages["claim"] = await write(writes.claim_turns(3))
            pages["lost"] = await write(writes.find_lost(keys))
            pages["cancel"] = await write(*(writes.cancel_run(cancel_of(new), [], None) for new in news))
            pages["orphans"] = await write(writes.find_orphans())
            assert news[0].request is not None
            pages["request"] = await write(writes.find_request(news[0], news[0].request))
            pages["known"] = await write(*(writes.Start(new, claim=True) for new in news))
            pages["delete requests"] = await write(writes.delete_requests(1_010, 10))
            pages["delete runs"] = await write(writes.delete_runs(1_010, 10, 0))
            run_id = news[0].id
            read = {name: QUERIES[name] for name in ("get_run", "read_events", "read_messages", "is_claimable")}
            pages["get_run"] = await pages_of(connection, read["get_run"], run_id, ORGANIZATION, SERVER, None)
            pages["run_key"] = await pages_of(connection, QUERIES["run_key"], run_id, ORGANIZATION, SERVER)
            pages["read_events"] = await pages_of(connection, read["read_events"], run_id, 0, 100, ALL)
            pages["read_messages"] = await pages_of(connection, read["read_messages"], run_id, 9, 100)
            pages["read_latest_log"] = await pages_of(connection, QUERIES["read_latest_log"], run_id, "session", 0)
            pages["is_claimable"] = await pages_of(connection, read["is_claimable"])
            for status, query in LIST_RUNS.items():
                arguments = (ORGANIZATION, SERVER, 1 << 40, 20, ALL)
                pages[f"list {status}"] = await pages_of(connection, query, *arguments)
            return pages

        for _ in range(7):  # a session makes a plan for good when it has used a query some times
            await all_pages()
        await connection.execute(MANY)
        for _ in range(2):
            pages = await all_pages()
            assert {name: count for name, count in pages.items() if count > PAGES} == {}
            await connection.execute("ANALYZE")
        await connection.close()

    run_async(main())
