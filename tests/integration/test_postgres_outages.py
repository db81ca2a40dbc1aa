"""PostgreSQL goes away, comes back, and loses connections: what was accepted is there once, whatever broke."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from runtime_service.errors import RunNotFound, StoreUnavailable
from runtime_service.runs import Question, RunStatus, now_ms
from runtime_service.store import postgres_writer
from runtime_service.store.base import Change, Outcome, QuestionOpen, TurnLost
from runtime_service.store.postgres import PostgresStore
from runtime_service.store.postgres_batch import Batch
from runtime_service.store.postgres_schema import migrate
from tests.postgres import PostgresServer, session_server
from tests.stores import PostgresStores
from tests.support import (
    OPTIONS,
    ORGANIZATION,
    SERVER,
    answer_to,
    asking,
    cancel_of,
    contents,
    eventually,
    key_of,
    log_of,
    new_run,
    next_turn,
    question,
    run_async,
    said,
)

COMPLETED = Outcome(RunStatus.COMPLETED, "done")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PostgresServer]:
    """A server of the test's own, with a migrated database."""
    server = PostgresServer(tmp_path / "server", durable=False).start()
    run_async(migrate(server.url()))
    yield server
    server.stop()


@asynccontextmanager
async def opened(server: PostgresServer) -> AsyncIterator[PostgresStore]:
    """A store over a server, closed at the end."""
    store = await PostgresStore.open(server.url(), address="127.0.0.1:1")
    try:
        yield store
    finally:
        await store.close()


async def cut_at_random(stores: PostgresStores, choice: random.Random) -> None:
    """End sessions of the database, again and again, each in the middle of whatever it does."""
    cut = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
        f"WHERE datname = '{stores.database}' AND pid <> pg_backend_pid()"
    )
    while True:
        await asyncio.to_thread(session_server().execute, cut)
        await asyncio.sleep(choice.uniform(0, 0.03))


@pytest.mark.parametrize("seed", range(2))
def test_writes_are_done_once_while_connections_are_cut(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Every run has each event once and in order, and every answer tells what is stored."""
    monkeypatch.setattr(postgres_writer, "_RETRY_SECONDS", (0.001, 0.01))
    stores = PostgresStores()
    choice = random.Random(seed)

    async def patiently(store: PostgresStore, asked: str, *arguments: object, **named: object) -> Change:
        while True:
            writes = [getattr(store, asked)(*arguments, **named)]
            change: object = (await asyncio.gather(*writes, return_exceptions=True))[0]
            if isinstance(change, Change):
                return change
            assert isinstance(change, StoreUnavailable)
            assert "nothing was changed" in change.message
            await asyncio.sleep(0.005)

    async def live(store: PostgresStore, n: int) -> tuple[str, list[str]]:
        new = new_run(f"start {n}")
        run = (await patiently(store, "start_run", new, claim=True)).run
        expected = [f"start {n}"]
        for turn in range(2, 5):
            for step in range(3):
                texts = [f"{turn} {step} {place}" for place in range(choice.randrange(3))]
                change = await store.append_events(key_of(run), said(*texts))
                assert contents(change.events) == texts
                assert change.run.last_sequence == len(expected) + len(texts)
                expected += texts
            await store.save_draft(key_of(run), "half")
            finished = await store.finish_turn(key_of(run), said("end"), COMPLETED)
            assert finished.run.status is RunStatus.COMPLETED
            expected.append("end")
            resumed = await patiently(store, "continue_run", next_turn(run, f"turn {turn}"), claim=True)
            assert resumed.run.turn.number == turn
            run = resumed.run
            expected.append(f"turn {turn}")
        released = await store.release_turn(key_of(run), said("so far"))
        assert released.run.status is RunStatus.QUEUED
        expected.append("so far")
        cancelled = await patiently(store, "cancel_run", cancel_of(run), [], None)
        assert cancelled.run.status is RunStatus.CANCELLED
        expected.append("The run was cancelled.")
        return run.id, expected

    async def main() -> None:
        async with stores.open() as store:
            assert isinstance(store, PostgresStore)
            cutting = asyncio.create_task(cut_at_random(stores, choice))
            lives = await asyncio.gather(*(live(store, n) for n in range(10)))
            cutting.cancel()
            await asyncio.wait([cutting])
            await eventually(lambda: store.is_available)
            for run_id, expected in lives:
                assert contents(await log_of(store, run_id)) == expected
            assert stores.execute("SELECT count(*) FROM acp.runs") == "10"
            assert stores.execute("SELECT count(*) FROM acp.replicas") == "1"

    run_async(main())


def test_answer_that_was_lost_is_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of every kind was committed, and the connection broke before it was told so: each learns what it did."""
    monkeypatch.setattr(postgres_writer, "_RETRY_SECONDS", (0.001, 0.01))
    stores = PostgresStores()

    async def main() -> None:
        async with stores.open() as store:
            assert isinstance(store, PostgresStore)
            held, over, taken = [(await store.start_run(new_run(str(n)), claim=True)).run for n in range(3)]
            await store.finish_turn(key_of(over), [], COMPLETED)
            quiet, asked, told = (
                (await store.start_run(new_run(), claim=True)).run,
                await asking(store),
                await asking(store),
            )
            waiting = (await store.start_run(new_run(), claim=False)).run
            known = new_run("known", request_id="known")
            await store.start_run(known, claim=False)
            fetch = store._database.fetch
            sent: list[object] = []

            async def lose_the_answer(connection: object, query: str, *arguments: object) -> list[object]:
                rows = await fetch(connection, query, *arguments)
                if "acp.apply" in query:
                    sent.append(arguments[1])
                    if len(sent) == 1:
                        raise ConnectionResetError
                return list(rows)

            monkeypatch.setattr(store._database, "fetch", lose_the_answer)
            new = new_run("new")
            starting = [store.start_run(new, claim=True), store.start_run(known, claim=True)]
            appending = [store.append_events(key_of(held), said(text)) for text in ("a", "b")]
            resuming = store.continue_run(next_turn(over), claim=True)
            cancelling = store.cancel_run(cancel_of(taken), said("x"), "x")
            questioning = store.ask_question(key_of(quiet), [question()], OPTIONS)
            refused = store.continue_run(next_turn(asked, request_id="refused"), claim=True)
            answering = store.answer_question(answer_to(told, request_id="answer"))
            claiming = store.claim_turns(1)
            started, again = await asyncio.gather(*starting)
            first, second = await asyncio.gather(*appending)
            resumed, cancelled, (claimed,) = await resuming, await cancelling, await claiming
            assert sent[0] == sent[1]
            assert await store.get_run(ORGANIZATION, SERVER, new.id) == started.run
            assert (again.replayed, again.run.id) == (True, known.id)
            assert [event.sequence for event in (*first.events, *second.events)] == [2, 3]
            assert contents(await log_of(store, held.id)) == ["0", "a", "b"]
            assert (resumed.run.turn.number, contents(resumed.events)) == (2, ["more"])
            assert contents(cancelled.events) == ["x", "The run was cancelled."]
            assert claimed.run.id == waiting.id
            assert (await questioning).run.question == Question(2, options=OPTIONS)
            with pytest.raises(QuestionOpen):
                await refused
            answered = await answering
            assert (answered.replayed, contents(answered.events)) == (False, ["yes"])
            assert contents(await log_of(store, told.id)) == ["hello", "May I?", "yes"]
            assert (await store.append_events(key_of(told), [])).run.question == answered.run.question
            for change in (started, resumed, claimed):
                await store.finish_turn(key_of(change.run), [], COMPLETED)

    run_async(main())


def test_run_that_was_deleted_before_its_cancel_was_known_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer shows nothing; the next write is done as ever."""
    stores = PostgresStores()

    async def main() -> None:
        async with stores.open() as other, stores.open() as store:
            assert isinstance(store, PostgresStore)
            new = new_run()
            await store.start_run(new, claim=False)
            fetch = store._database.fetch

            async def lose_the_answer(connection: object, query: str, *arguments: object) -> list[object]:
                rows = await fetch(connection, query, *arguments)
                if "acp.apply" in query:
                    monkeypatch.undo()
                    assert (await other.delete_runs(now_ms() + 60_000, 100)).runs == 1
                    raise ConnectionResetError
                return list(rows)

            monkeypatch.setattr(store._database, "fetch", lose_the_answer)
            with pytest.raises(RunNotFound):
                await store.cancel_run(cancel_of(new), [], None)
            await store.start_run(new_run(), claim=False)

    run_async(main())


def test_lease_that_ran_out_behind_a_lost_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be found out is answered as it is; what cannot is said to be in doubt; nothing is done twice."""
    monkeypatch.setattr(postgres_writer, "_RETRY_SECONDS", (0.001, 0.01))
    stores = PostgresStores()

    async def main() -> None:
        async with stores.open() as store:
            assert isinstance(store, PostgresStore)
            over, other, held = [(await store.start_run(new_run(str(n)), claim=True)).run for n in range(3)]
            asked, told, doubted = [await asking(store) for _ in range(3)]
            for run in (over, other):
                await store.finish_turn(key_of(run), [], COMPLETED)
            fetch = store._database.fetch

            async def lose_all(connection: object, query: str, *arguments: object) -> list[object]:
                rows = await fetch(connection, query, *arguments)
                if "acp.apply" in query:
                    monkeypatch.setattr(store._database, "fetch", fetch)
                    stores.execute("UPDATE acp.replicas SET lease = '0', lease_until = '-infinity'")
                    raise ConnectionResetError
                return list(rows)

            monkeypatch.setattr(store._database, "fetch", lose_all)
            new, repeated = new_run("new"), new_run("repeated", request_id="once")
            started, known, resumed, unknown, appended, asked_again, answered, in_doubt = await asyncio.gather(
                store.start_run(new, claim=True),
                store.start_run(repeated, claim=True),
                store.continue_run(next_turn(over, request_id="twice"), claim=True),
                store.continue_run(next_turn(other), claim=True),
                store.append_events(key_of(held), said("a")),
                store.ask_question(key_of(asked), [question()], ()),
                store.answer_question(answer_to(told, request_id="answer")),
                store.answer_question(answer_to(doubted)),
                return_exceptions=True,
            )
            assert isinstance(started, Change)
            assert started.run.id == new.id
            assert isinstance(known, Change)
            assert known.run.id == repeated.id
            assert isinstance(resumed, Change)
            assert resumed.run.turn.number == 2
            assert isinstance(unknown, StoreUnavailable)
            assert "may have taken effect" in unknown.message
            assert isinstance(appended, TurnLost)
            assert isinstance(asked_again, TurnLost)
            assert isinstance(answered, Change)
            assert (answered.replayed, answered.run.is_asking) == (True, False)
            assert isinstance(in_doubt, StoreUnavailable)
            assert "may have taken effect" in in_doubt.message
            for run in (told, doubted):
                assert contents(await log_of(store, run.id)) == ["hello", "May I?", "yes"]
            assert stores.execute("SELECT count(*), max(last_turn) FROM acp.runs") == "8|2"
            # All that it held is nobody's now, and goes on.
            assert len(await store.recover(3, lambda _: True)) == 8
            assert len(await store.claim_turns(9)) == 8

    run_async(main())


def test_defect_that_ends_a_batch_does_not_end_the_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asked is told that it is in doubt; what is held goes to others, because nobody knows what was written."""
    stores = PostgresStores()

    async def main() -> None:
        async with stores.open() as store:
            run = (await store.start_run(new_run(), claim=True)).run

            def fail(*_: object) -> None:
                monkeypatch.undo()
                raise KeyError

            monkeypatch.setattr(Batch, "settle", fail)
            with pytest.raises(StoreUnavailable, match="may have taken effect"):
                await store.append_events(key_of(run), said("a"))
            with pytest.raises(TurnLost):
                await store.append_events(key_of(run), said("b"))
            assert [change.run.id for change in await store.recover(3, lambda _: True)] == [run.id]
            (change,) = await store.claim_turns(9)
            await store.finish_turn(key_of(change.run), [], COMPLETED)
            assert store.is_available

    run_async(main())


def test_cancel_that_is_in_doubt_does_not_reach_a_later_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was done, the lease ran out before that was known, the run was continued elsewhere: it is not done twice."""
    stores = PostgresStores()

    async def main() -> None:
        async with stores.open() as other, stores.open() as store:
            assert isinstance(store, PostgresStore)
            run = (await store.start_run(new_run(), claim=True)).run
            fetch = store._database.fetch

            async def lose_all(connection: object, query: str, *arguments: object) -> list[object]:
                rows = await fetch(connection, query, *arguments)
                if "acp.apply" in query:
                    monkeypatch.undo()
                    replica = store._writer.replica
                    stores.execute(
                        f"UPDATE acp.replicas SET lease = '0', lease_until = '-infinity' WHERE id = '{replica}'"
                    )
                    await other.continue_run(next_turn(run), claim=True)
                    raise ConnectionResetError
                return list(rows)

            monkeypatch.setattr(store._database, "fetch", lose_all)
            with pytest.raises(StoreUnavailable, match="may have taken effect"):
                await store.cancel_run(cancel_of(run), [], None)
            assert (await other.get_run(ORGANIZATION, SERVER, run.id, 1)).status is RunStatus.CANCELLED
            assert (await other.get_run(ORGANIZATION, SERVER, run.id, 2)).status is RunStatus.RUNNING

    run_async(main())


def test_store_survives_a_server_that_is_killed(server: PostgresServer) -> None:
    """Meanwhile requests are refused at once, what runs waits; then all goes on, and nothing is lost or doubled."""

    async def main() -> None:
        async with opened(server) as store:
            run = (await store.start_run(new_run(), claim=True)).run
            server.kill()
            writes = [store.append_events(key_of(run), said(str(n))) for n in range(5)]
            await eventually(lambda: not store.is_available)
            for refused in (
                store.start_run(new_run(), claim=True),
                store.continue_run(next_turn(run), claim=True),
                store.cancel_run(cancel_of(run), [], None),
                store.get_requested(new_run(request_id="x")),
                store.claim_turns(1),
                store.renew(),
            ):
                with pytest.raises(StoreUnavailable, match="nothing was changed"):
                    await refused
            for read in (store.get_run(ORGANIZATION, SERVER, run.id), store.count_queued()):
                with pytest.raises(StoreUnavailable, match="cannot be read"):
                    await read
            writes.append(store.finish_turn(key_of(run), said("end"), COMPLETED))
            assert not any(write.done() for write in writes)
            await asyncio.to_thread(server.start)
            changes = await asyncio.gather(*writes)
            assert [event.content for change in changes for event in change.events] == ["0", "1", "2", "3", "4", "end"]
            await eventually(lambda: store.is_available)
            assert contents(await log_of(store, run.id)) == ["hello", "0", "1", "2", "3", "4", "end"]
            await store.start_run(new_run(), claim=True)

    run_async(main())


def test_idle_store_notices_that_the_server_stops_and_comes_back(server: PostgresServer) -> None:
    """Without being asked for anything."""

    async def main() -> None:
        async with opened(server) as store:
            run = (await store.start_run(new_run(), claim=True)).run
            for end in (server.stop, server.kill):
                await asyncio.to_thread(end)
                await eventually(lambda: not store.is_available)
                await asyncio.to_thread(server.start)
                await eventually(lambda: store.is_available)
            await store.append_events(key_of(run), said("goes on"))

    run_async(main())


def test_close_does_not_wait_for_ever(server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for a server that is away is refused in the end; of what was sent it is said that it is in doubt."""
    monkeypatch.setattr(postgres_writer, "_CLOSE_SECONDS", 0.1)

    async def main() -> None:
        store = await PostgresStore.open(server.url(), address="127.0.0.1:1")
        run = (await store.start_run(new_run(), claim=True)).run
        server.kill()
        first = store.append_events(key_of(run), said("first"))
        await eventually(lambda: not store.is_available)
        second = store.append_events(key_of(run), said("second"))
        await store.close()
        for write, words in ((first, "may have taken effect"), (second, "nothing was changed")):
            with pytest.raises(StoreUnavailable, match=words):
                await write
        with pytest.raises(StoreUnavailable, match="closed"):
            await store.append_events(key_of(run), said("third"))
        with pytest.raises(StoreUnavailable, match="closed"):
            await store.count_queued()

    run_async(main())
