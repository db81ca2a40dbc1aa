"""Where the SQLite store commits, and when it moves its write-ahead log into the file."""

import asyncio
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import apsw
import pytest

from runtime_service.errors import StoreUnavailable
from runtime_service.runs import Run
from runtime_service.store import group_commit
from runtime_service.store.base import Change
from runtime_service.store.sqlite import SQLiteStore
from tests.support import Disk, contents, eventually, key_of, log_of, run_async, running, said

QUICK, SLOW = 1_000, -1  # seconds that make every commit a quick one, or a slow one
PAGE_BYTES = 4_096 + 24  # in the log
TEXT = "x" * 3_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the store of the test is."""
    return tmp_path / "runs.sqlite"


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """A quick disk; the writer chooses where it commits."""
    monkeypatch.setattr(group_commit, "_QUICK_SECONDS", QUICK)
    return Disk(monkeypatch, choose=True)


def log_bytes(path: Path) -> int:
    """The size of the write-ahead log, 0 where there is none."""
    log = path.with_name(path.name + "-wal")
    return log.stat().st_size if log.exists() else 0


def texts_in_the_file(path: Path) -> int:
    """Count the events that the file has without its log; nothing is to be under way."""
    alone = path.with_name("alone.sqlite")
    shutil.copy(path, alone)
    connection = apsw.Connection(str(alone))
    try:
        return int(connection.execute("SELECT count(*) FROM events WHERE content = ?", (TEXT,)).get)
    finally:
        connection.close()
        alone.unlink()


@contextmanager
def reader(path: Path) -> Iterator[None]:
    """Somebody who goes on reading what is there now."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        connection.execute("BEGIN")
        connection.execute("SELECT count(*) FROM events").fetchall()
        yield
    finally:
        connection.close()


def places(disk: Disk) -> list[tuple[bool, int]]:
    """Where commits were made, from now back to the last call: (on the loop, how many in a row)."""
    here = threading.get_ident()
    in_a_row = [(on_loop, len(list(each))) for on_loop, each in groupby(thread == here for thread in disk.threads)]
    disk.threads.clear()
    return in_a_row


async def idle(store: SQLiteStore) -> None:
    """Return once the log is not being moved any more: the write that led to it is told before."""
    await eventually(lambda: not store._writer._busy)


async def append(store: SQLiteStore, run: Run, times: int = 1, text: str = TEXT) -> None:
    """Append a message so many times, with a commit each."""
    for _ in range(times):
        await store.append_events(key_of(run), said(text))


# On the loop, or in the thread


def test_commits_of_a_quick_disk_are_made_on_the_loop(path: Path, disk: Disk) -> None:
    """All of them, of whatever kind of write."""

    async def main() -> None:
        store = await SQLiteStore.open(path)
        disk.threads.clear()  # the schema
        run = await running(store)
        await append(store, run, 20)
        await store.save_draft(key_of(run), "half")
        assert await store.claim_turns(1) == []
        assert places(disk) == [(True, 23)]
        await store.close()

    run_async(main())


def test_slow_commit_sends_the_next_ones_to_the_thread(path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many, twice as many when the one after them is slow as well, up to a limit; a quick one ends it."""
    monkeypatch.setattr(group_commit, "_BATCHES_IN_THREAD", (2, 8))

    async def main() -> None:
        store = await SQLiteStore.open(path)
        run = await running(store)
        disk.threads.clear()
        monkeypatch.setattr(group_commit, "_QUICK_SECONDS", SLOW)
        await append(store, run, 1 + 2 + 1 + 4 + 1 + 8 + 1 + 8 + 1)
        loop = (True, 1)
        assert places(disk) == [loop, (False, 2), loop, (False, 4), loop, (False, 8), loop, (False, 8), loop]
        monkeypatch.setattr(group_commit, "_QUICK_SECONDS", QUICK)
        await append(store, run, 8 + 5)
        assert places(disk) == [(False, 8), (True, 5)]
        monkeypatch.setattr(group_commit, "_QUICK_SECONDS", SLOW)
        await append(store, run, 1 + 2 + 1)
        assert places(disk) == [loop, (False, 2), loop]
        assert contents(await log_of(store, run.id)) == ["hello"] + [TEXT] * 44
        await store.close()

    run_async(main())


def test_loop_waits_once_for_a_disk_that_has_become_slow(
    path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then others get to run while it commits, and what they ask for shares the next commit."""
    monkeypatch.setattr(group_commit, "_QUICK_SECONDS", 0.02)

    async def main() -> None:
        store = await SQLiteStore.open(path)
        run = await running(store)
        disk.seconds = 0.03
        await append(store, run)
        disk.threads.clear()
        first = asyncio.ensure_future(append(store, run, text="first"))
        await eventually(lambda: disk.threads)
        assert not first.done()
        await asyncio.gather(*(append(store, run, text=str(n)) for n in range(5)))
        assert places(disk) == [(False, 2)]
        assert contents(await log_of(store, run.id))[2:] == ["first", *"01234"]
        await store.close()

    run_async(main())


def test_commit_that_fails_on_the_loop_is_made_up_for_one_by_one(path: Path, disk: Disk) -> None:
    """In the thread, as are the next ones: what is told is stored, once; what is refused is not."""

    async def main() -> None:
        store = await SQLiteStore.open(path)
        run = await running(store)
        for refused in (0, 1):
            disk.threads.clear()
            disk.refuse = 1 + refused  # the shared commit, then the first of those that follow
            writes = [store.append_events(key_of(run), said(f"{refused}{n}")) for n in range(3)]
            results = await asyncio.gather(*writes, return_exceptions=True)
            assert [type(result) for result in results] == [StoreUnavailable] * refused + [Change] * (3 - refused)
            await append(store, run, 16, "next")
            assert places(disk) == [(True, 1), (False, 3 + 16)]
            await append(store, run, 1, "quick")
            assert places(disk) == [(True, 1)]
        nexts = ["next"] * 16 + ["quick"]
        assert contents(await log_of(store, run.id)) == ["hello", "00", "01", "02", *nexts, "11", "12", *nexts]
        await store.close()

    run_async(main())


# The write-ahead log


def test_log_is_moved_into_the_file_and_begins_anew(path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is written; only the commit before that leaves the loop."""
    monkeypatch.setattr(group_commit, "_CHECKPOINT_PAGES", 50)

    async def main() -> None:
        store = await SQLiteStore.open(path)
        run = await running(store)
        disk.threads.clear()
        largest = 0
        for _ in range(30):
            await append(store, run, 10)
            largest = max(largest, log_bytes(path))
        # The one that reaches 50 pages, and the one behind it that goes to the thread.
        assert 50 * PAGE_BYTES <= largest <= 70 * PAGE_BYTES
        await idle(store)
        assert texts_in_the_file(path) >= 300 - 50
        assert {count for on_loop, count in places(disk) if not on_loop} == {1}
        assert len(await log_of(store, run.id)) == 301
        await store.close()

    run_async(main())


def test_reader_that_stays_holds_up_no_writes_and_the_log_is_given_back(
    path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moving the log is tried again now and then, not at every commit, and done once the reader has gone."""
    monkeypatch.setattr(group_commit, "_CHECKPOINT_PAGES", 50)
    monkeypatch.setattr(group_commit, "_READER_MS", 1)
    monkeypatch.setattr(group_commit, "_LOG_FILE_BYTES", 100 * PAGE_BYTES)

    async def main() -> None:
        store = await SQLiteStore.open(path)
        run = await running(store)
        await append(store, run, 100)
        await idle(store)
        with reader(path):
            in_the_file = texts_in_the_file(path)
            disk.threads.clear()
            await append(store, run, 200)
            grown = log_bytes(path)
            assert grown > 400 * PAGE_BYTES
            in_thread = sum(count for on_loop, count in places(disk) if not on_loop)
            assert 2 <= in_thread <= grown / PAGE_BYTES / 50
            await idle(store)
            assert texts_in_the_file(path) <= in_the_file + 50  # the rest is in the log alone
        await append(store, run, 100)
        assert log_bytes(path) <= 100 * PAGE_BYTES + 32
        await idle(store)
        assert texts_in_the_file(path) >= 300
        assert len(await log_of(store, run.id)) == 401
        await store.close()

    run_async(main())


@pytest.mark.parametrize("closing", [False, True])
def test_writes_wait_while_the_log_is_moved(
    path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, closing: bool
) -> None:
    """That which led to it is told before; those that came meanwhile share a commit, also of a store that closes."""
    monkeypatch.setattr(group_commit, "_CHECKPOINT_PAGES", 50)
    monkeypatch.setattr(group_commit, "_READER_MS", 20_000)

    async def main() -> None:
        store = await SQLiteStore.open(path)
        run = await running(store)
        ends: list[asyncio.Future[Any]] = []
        with reader(path):
            while disk.threads[-1] == threading.get_ident():
                await append(store, run, text="before")
            disk.threads.clear()
            writes = [asyncio.ensure_future(append(store, run, text=str(n))) for n in range(5)]
            if closing:
                await asyncio.sleep(0)
                ends.append(asyncio.ensure_future(store.close()))
            await asyncio.sleep(0.05)
            assert not any(each.done() for each in [*writes, *ends])
            assert not disk.threads
        await asyncio.gather(*writes, *ends)
        assert len(disk.threads) == 1
        if closing:
            store = await SQLiteStore.open(path)
        assert [text for text in contents(await log_of(store, run.id)) if text != "before"] == ["hello", *"01234"]
        await store.close()

    run_async(main())


def test_closed_store_is_one_file(path: Path, disk: Disk) -> None:
    """With all that was written, although others had read it; no log is left for the next one to go through."""

    async def main() -> None:
        store = await SQLiteStore.open(path)
        run = await running(store)
        await append(store, run, 10)
        await asyncio.gather(*(log_of(store, run.id) for _ in range(4)))
        assert log_bytes(path) > 0
        await store.close()
        assert {each.name for each in path.parent.iterdir()} == {path.name, path.name + ".lock"}
        assert texts_in_the_file(path) == 10

    run_async(main())


def test_close_may_be_asked_for_again(path: Path, disk: Disk) -> None:
    """Each returns when the store is closed, also when the first one to ask has gone."""

    async def main() -> None:
        store = await SQLiteStore.open(path)
        run = await running(store)
        write = asyncio.ensure_future(append(store, run))
        await asyncio.sleep(0)
        closes = [asyncio.create_task(store.close()) for _ in range(3)]
        await asyncio.sleep(0)
        assert not write.done()
        closes[0].cancel()
        results = await asyncio.gather(*closes, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError, type(None), type(None)]
        await write
        await store.close()
        store = await SQLiteStore.open(path)
        assert contents(await log_of(store, run.id)) == ["hello", TEXT]
        await store.close()

    run_async(main())


def test_nothing_is_lost_or_stored_twice_wherever_commits_are_made(
    path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many write and read; the disk is slow, or refuses, now and then; the log is moved; in the end it all closes."""
    monkeypatch.setattr(group_commit, "_CHECKPOINT_PAGES", 20)
    monkeypatch.setattr(group_commit, "_BATCHES_IN_THREAD", (2, 4))

    async def main() -> None:
        store = await SQLiteStore.open(path)
        runs = [await running(store) for _ in range(8)]
        told: dict[str, list[str]] = {run.id: ["hello"] for run in runs}
        closed = asyncio.Event()

        async def write(run: Run) -> None:
            for n in range(10_000):
                try:
                    change = await store.append_events(key_of(run), said(str(n)))
                except StoreUnavailable:
                    if closed.is_set():
                        return
                    continue
                told[run.id].append(str(n))
                assert change.run.last_sequence == len(told[run.id])
                if not n % 10 and not closed.is_set():
                    assert contents(await log_of(store, run.id)) == told[run.id]
            raise AssertionError("the store was not closed")

        async def disturb() -> None:
            for n in range(60):
                monkeypatch.setattr(group_commit, "_QUICK_SECONDS", SLOW if n % 3 else QUICK)
                disk.refuse = 2 if not n % 5 else 0
                await asyncio.sleep(0.004)

        writers = [asyncio.create_task(write(run)) for run in runs]
        await disturb()
        disk.refuse = 0
        here = threading.get_ident()
        assert {thread == here for thread in disk.threads} == {True, False}
        closed.set()
        await store.close()
        await asyncio.gather(*writers)
        store = await SQLiteStore.open(path)
        for run in runs:
            assert contents(await log_of(store, run.id)) == told[run.id]
            assert len(told[run.id]) > 20
        await store.close()

    run_async(main())
