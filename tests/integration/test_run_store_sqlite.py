"""What the embedded store does with its file: shared commits, failures, older files, what a search costs."""

import asyncio
import sqlite3
from pathlib import Path

import pytest

from runtime_service.errors import StoreUnavailable
from runtime_service.runs import RunStatus, now_ms
from runtime_service.store.base import Change, Outcome, TurnKey, TurnLost
from tests.stores import SQLiteStores
from tests.support import (
    ALL,
    OPTIONS,
    ORGANIZATION,
    SERVER,
    Disk,
    answer_to,
    contents,
    eventually,
    flood,
    key_of,
    log_of,
    new_run,
    next_turn,
    question,
    run_async,
    running,
    said,
    snapshot,
    with_store,
    write_lock,
)

COMPLETED = Outcome(RunStatus.COMPLETED, "done")


def test_a_cancelled_caller_does_not_undo_its_write(file: SQLiteStores, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task that waits is cancelled while the commit is under way; the run is there, and the next write works."""
    disk = Disk(monkeypatch)

    async def main() -> None:
        async with file.open() as store:
            new = new_run()

            async def start() -> None:
                await store.start_run(new, claim=True)

            with disk.held():
                waiting = asyncio.create_task(start())
                await eventually(lambda: disk.holding)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
            await running(store)
            assert (await store.get_run(ORGANIZATION, SERVER, new.id)).status is RunStatus.RUNNING

    run_async(main())


def test_sqlite_writers_share_commits(file: SQLiteStores, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits while a commit is under way goes into the next one, whatever kind of write it is."""
    disk = Disk(monkeypatch)

    async def main() -> None:
        async with file.open() as store:
            run = await running(store)
            before = disk.commits
            with disk.held():
                first = asyncio.ensure_future(store.start_run(new_run(), claim=False))
                await eventually(lambda: disk.holding)
                writes = [store.start_run(new_run(str(n)), claim=bool(n % 2)) for n in range(300)]
                appends = [store.append_events(key_of(run), said(str(n))) for n in range(300)]
            await asyncio.gather(first, *writes, *appends)
            assert disk.commits - before <= 10
            assert contents(await log_of(store, run.id))[1:] == [str(n) for n in range(300)]

    run_async(main())


@pytest.mark.parametrize("constraint", [True, False])
def test_sqlite_write_that_is_refused_does_not_hurt_its_batch(
    file: SQLiteStores, monkeypatch: pytest.MonkeyPatch, constraint: bool
) -> None:
    """A domain error, a broken constraint and an unstorable text fail alone; nothing of them is there."""
    disk = Disk(monkeypatch)

    async def main() -> None:
        async with file.open() as store:
            run = await running(store)
            news = [new_run(str(n)) for n in range(4)]
            again = news[0] if constraint else new_run()
            with disk.held():
                store.start_run(new_run(organization="other"), claim=True)
                await eventually(lambda: disk.holding)
                writes = [
                    store.start_run(news[0], claim=False),
                    store.append_events(TurnKey(run.id, 1, 9), said("wrong epoch")),
                    store.start_run(news[1], claim=False),
                    store.start_run(again, claim=True),
                    store.append_events(key_of(run), said("kept")),
                    store.append_events(key_of(run), said("x", "\ud800")),
                    store.finish_turn(key_of(run), said("\ud800"), COMPLETED),
                    store.start_run(new_run("\ud800"), claim=False),
                    store.continue_run(next_turn(news[3]), claim=False),
                    store.start_run(news[2], claim=False),
                ]
            results = await asyncio.gather(*writes, return_exceptions=True)
            kinds = [type(result).__name__ for result in results]
            assert kinds == [
                "Change",
                "TurnLost",
                "Change",
                "StoreUnavailable" if constraint else "Change",
                "Change",
                "UnicodeEncodeError",
                "UnicodeEncodeError",
                "UnicodeEncodeError",
                "RunNotFound",
                "Change",
            ]
            assert await store.count_queued() == 3
            runs = await store.list_runs(ORGANIZATION, SERVER, status=RunStatus.QUEUED, token=None, limit=ALL)
            assert {each.id for each in runs.runs} == {new.id for new in news[:3]}
            assert contents(await log_of(store, run.id)) == ["hello", "kept"]
            after = await store.get_run(ORGANIZATION, SERVER, run.id)
            assert (after.status, after.last_sequence) == (RunStatus.RUNNING, 2)

    run_async(main())


@pytest.mark.parametrize("failure", ["full", "read-only", "commit", "locked"])
def test_sqlite_that_takes_no_writes_is_store_unavailable(
    file: SQLiteStores, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    """The caller may try again; nothing of the write is there, reads go on, and the next write works."""
    disk = Disk(monkeypatch)

    async def main() -> None:
        async with file.open() as store:
            run = await running(store)
            before = await snapshot(store, run)
            writer = disk.writer
            pages = writer.pragma("page_count")
            match failure:
                case "full":
                    writer.pragma("max_page_count", pages)
                case "read-only":
                    writer.pragma("query_only", True)
                case "commit":
                    disk.refuse = 10
                case "locked":
                    monkeypatch.setattr("runtime_service.store.group_commit._BUSY_MS", 1)
            lock = write_lock(file.path) if failure == "locked" else None
            if lock is not None:
                lock.__enter__()
            writes = [store.append_events(key_of(run), said("x" * 100_000)) for _ in range(4)]
            for result in await asyncio.gather(*writes, return_exceptions=True):
                assert isinstance(result, StoreUnavailable)
                assert result.retry_after_seconds is not None
            assert await snapshot(store, run) == before
            assert not store.is_available
            if failure != "full":  # a file that holds no more may take a change that needs no more room
                with pytest.raises(StoreUnavailable):
                    await store.renew()
            if lock is not None:
                lock.__exit__(None, None, None)
            writer.pragma("max_page_count", 1 << 30)
            writer.pragma("query_only", False)
            disk.refuse = 0
            await store.renew()
            assert store.is_available
            assert (await store.append_events(key_of(run), said("x" * 100_000))).events[0].sequence == 2

    run_async(main())


def test_sqlite_read_that_fails_is_store_unavailable(file: SQLiteStores, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says that the store cannot be read, and no more."""
    monkeypatch.setattr("runtime_service.store.sqlite._READERS", 1)
    disk = Disk(monkeypatch)

    async def main() -> None:
        async with file.open() as store:
            run = await running(store)
            await store.get_run(ORGANIZATION, SERVER, run.id)
            for connection in disk.connections:
                if connection is not disk.writer:
                    connection.interrupt()
                    connection.set_progress_handler(lambda: True, 1)
            with pytest.raises(StoreUnavailable, match="cannot be read"):
                await store.get_run(ORGANIZATION, SERVER, run.id)
            for connection in disk.connections:
                connection.set_progress_handler(None)
            assert (await store.get_run(ORGANIZATION, SERVER, run.id)) == run

    run_async(main())


def test_sqlite_second_opener_is_refused(file: SQLiteStores) -> None:
    """One file, one runtime service; the message says what to do, and the first goes on."""

    async def main() -> None:
        async with file.open() as store:
            with pytest.raises(StoreUnavailable, match="in use by another runtime service") as caught:
                await file.connect()
            assert str(file.path) in caught.value.message
            await running(store)
        async with file.open() as store:
            await running(store)

    run_async(main())


def test_sqlite_of_another_schema_is_refused_untouched(file: SQLiteStores) -> None:
    """A newer program's file is left alone, and can be opened by nobody else's fault afterwards."""

    async def main() -> None:
        async with file.open() as store:
            run = await running(store)
        with sqlite3.connect(file.path) as connection:
            connection.execute("PRAGMA user_version = 7")
        connection.close()
        with pytest.raises(StoreUnavailable, match=r"schema version 7; this program knows version 4") as caught:
            await file.connect()
        assert str(file.path) in caught.value.message
        with sqlite3.connect(file.path) as connection:
            connection.execute("PRAGMA user_version = 4")
        connection.close()
        async with file.open() as store:
            assert await store.get_run(ORGANIZATION, SERVER, run.id) == run

    run_async(main())


OLDER_SCHEMAS = {
    3: """
        ALTER TABLE runs DROP COLUMN question;
        PRAGMA user_version = 3;
    """,
    2: """
        DROP TABLE requests;
        DROP TABLE deleted_runs;
        ALTER TABLE turns ADD COLUMN request_id TEXT;
        CREATE INDEX turns_by_request ON turns (request_id) WHERE request_id IS NOT NULL;
        PRAGMA user_version = 2;
    """,
    1: """
        DROP INDEX turns_by_request;
        ALTER TABLE turns DROP COLUMN request_id;
        PRAGMA user_version = 1;
    """,
}
"""How a file becomes one of an older version, each step from the version behind it."""


def shape(path: Path) -> object:
    """The tables of a file with their columns, and the indexes."""
    with sqlite3.connect(path) as connection:
        names = list(connection.execute("SELECT type, name, tbl_name FROM sqlite_schema ORDER BY name"))
        columns = {name: list(connection.execute(f"PRAGMA table_xinfo({name})")) for _, name, _ in names}
    connection.close()
    return names, columns


@pytest.mark.parametrize("version", [1, 2, 3])
def test_sqlite_of_an_older_version_is_upgraded(file: SQLiteStores, version: int) -> None:
    """Runs that it holds are there, can be continued, and its tables are those of a new file."""

    async def main() -> None:
        async with file.open() as store:
            run = await running(store)
        new = shape(file.path)
        with sqlite3.connect(file.path) as connection:
            for older in range(3, version - 1, -1):
                connection.executescript(OLDER_SCHEMAS[older])
        connection.close()
        assert shape(file.path) != new
        async with file.open() as store:
            assert await store.get_run(ORGANIZATION, SERVER, run.id) == run
            asked = next_turn(run, request_id="once")
            assert (await store.continue_run(asked, claim=True)).run.turn.number == 2
            assert (await store.continue_run(asked, claim=True)).replayed
            asking = (await store.ask_question(key_of(run), [question()], OPTIONS)).run
            assert (await store.answer_question(answer_to(asking))).run == await store.get_run(
                ORGANIZATION, SERVER, run.id, 1
            )
        assert shape(file.path) == new

    run_async(main())


def test_sqlite_of_version_2_keeps_its_requests(file: SQLiteStores) -> None:
    """Each is known in its organization and shows the turn that it opened, whatever it had asked for."""

    async def main() -> None:
        async with file.open() as store:
            run = await running(store)
            await store.continue_run(next_turn(run), claim=True)
            other = (await store.start_run(new_run(organization="other"), claim=True)).run
        with sqlite3.connect(file.path) as connection:
            for older in (3, 2):
                connection.executescript(OLDER_SCHEMAS[older])
            connection.execute("UPDATE turns SET request_id = 'a' WHERE run_key = 1 AND number = 1")
            connection.execute("UPDATE turns SET request_id = 'b' WHERE run_key = 1 AND number = 2")
            connection.execute("UPDATE turns SET request_id = 'a' WHERE run_key = 2")
        connection.close()
        async with file.open() as store:
            first = await store.start_run(new_run("any", request_id="a"), claim=True)
            assert first == Change(await store.get_run(ORGANIZATION, SERVER, run.id, 1), replayed=True)
            second = await store.continue_run(next_turn(run, "any", request_id="b"), claim=True)
            assert second == Change(await store.get_run(ORGANIZATION, SERVER, run.id, 2), replayed=True)
            assert (await store.start_run(new_run(organization="other", request_id="a"), claim=True)).run == other
            assert await store.delete_requests(now_ms() + 1, 10) == 3

    run_async(main())


def test_sqlite_finds_a_request_by_its_id(file: SQLiteStores) -> None:
    """Not by looking at every run of the organization."""
    with_store(file, running)
    assert file.plan_of("requested_turn", "default", "once") == [
        "SEARCH requests USING INDEX sqlite_autoindex_requests_1 (organization=? AND request_id=?)",
        "SEARCH runs USING COVERING INDEX sqlite_autoindex_runs_1 (id=?)",
    ]


def test_sqlite_file_that_is_none_is_refused(file: SQLiteStores) -> None:
    """Something else under the store's name is not overwritten."""
    file.path.parent.mkdir()
    file.path.write_bytes(b"no database at all" * 1000)
    with pytest.raises(StoreUnavailable, match="cannot be opened as the run store"):
        run_async(file.connect())
    assert file.path.read_bytes().startswith(b"no database at all")


def test_sqlite_holds_more_writes_than_one_transaction_takes(file: SQLiteStores) -> None:
    """A flood of writes is served whole and in order, a bounded number a transaction."""

    async def main() -> None:
        async with file.open() as store:
            await flood(store, await running(store))

    run_async(main())


def test_sqlite_recovers_once_what_an_earlier_process_left(file: SQLiteStores) -> None:
    """Until then whoever has its key may write to it; what this process has claimed since is its own."""

    async def main() -> None:
        async with file.open() as store:
            lost, released = [await running(store) for _ in range(2)]
        async with file.open() as store:
            await store.append_events(key_of(lost), said("one"))
            await store.release_turn(key_of(released), [])
            (mine,) = await store.claim_turns(1)
            (change,) = await store.recover(3, lambda _: True)
            assert change.run.id == lost.id
            with pytest.raises(TurnLost):
                await store.append_events(key_of(lost), said("two"))
            await store.append_events(key_of(mine.run), said("goes on"))

    run_async(main())
