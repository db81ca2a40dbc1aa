"""What every RunStore promises about runs and requests that are deleted, and how the embedded one finds them."""

import sqlite3
from typing import Any

import msgspec
import pytest

from runtime_service.errors import RunNotFound
from runtime_service.runs import RunStatus, now_ms
from runtime_service.store.base import Deleted, Outcome, RunStore
from runtime_service.store.sqlite_deletions import OldRuns, old_runs
from tests.stores import SQLiteStores, Stores
from tests.support import (
    ALL,
    ORGANIZATION,
    SERVER,
    cancel_of,
    contents,
    eventually,
    key_of,
    log_of,
    new_run,
    next_turn,
    run_async,
    running,
    said,
    snapshot,
    with_store,
)

COMPLETED = Outcome(RunStatus.COMPLETED, "done")
FAILED = Outcome(RunStatus.FAILED, error="It broke.", error_code="AGENT_FAILED")


async def delete_all(store: RunStore, before_ms: int, limit: int = 100) -> Deleted:
    """Delete until nothing is left to delete; return how much that was."""
    total = Deleted(0, 0, 0)
    while any(deleted := await store.delete_runs(before_ms, limit)):
        total = Deleted(*(a + b for a, b in zip(total, deleted, strict=True)))
    return total


async def later(than_ms: int) -> int:
    """A time by which everything until now was before."""
    await eventually(lambda: now_ms() > than_ms)
    return now_ms()


def test_delete_runs_deletes_what_was_not_used_since(stores: Stores) -> None:
    """Settled runs whose last write was before; not one that is open, was resumed, or is younger."""

    async def main() -> None:
        async with stores.open() as store:
            completed, failed, cancelled, resumed, open_run = [await running(store) for _ in range(5)]
            queued = (await store.start_run(new_run(), claim=False)).run
            other = (await store.start_run(new_run(organization="other"), claim=True)).run
            await store.finish_turn(key_of(other), [], COMPLETED)
            await store.finish_turn(key_of(completed), said("one", "two"), COMPLETED)
            second = (await store.continue_run(next_turn(completed, request_id="once"), claim=True)).run
            await store.finish_turn(key_of(second), said("three"), COMPLETED)
            await store.finish_turn(key_of(failed), [], FAILED)
            await store.cancel_run(cancel_of(cancelled), [], None)
            await store.finish_turn(key_of(resumed), [], COMPLETED)
            before_ms = await later(now_ms())
            again = (await store.continue_run(next_turn(resumed), claim=True)).run
            await store.finish_turn(key_of(again), [], COMPLETED)
            young = await running(store)
            await store.finish_turn(key_of(young), [], COMPLETED)
            kept = [resumed, open_run, queued, young]
            before = [await snapshot(store, run) for run in kept]
            assert await delete_all(store, before_ms) == Deleted(runs=4, turns=5, events=9)
            assert await store.delete_runs(before_ms, 100) == Deleted(0, 0, 0)
            assert [await snapshot(store, run) for run in kept] == before
            await store.append_events(key_of(open_run), said("goes on"))
        async with stores.open() as store:
            for run in (completed, failed, cancelled, other):
                with pytest.raises(RunNotFound):
                    await store.get_run(run.organization, SERVER, run.id)
                with pytest.raises(RunNotFound):
                    await store.continue_run(next_turn(run), claim=True)
                assert await store.read_events(run.id, 0, ALL, ALL) == []
                assert await store.read_messages(run.id, 9, ALL) == []
            page = await store.list_runs(ORGANIZATION, SERVER, status=None, token=None, limit=ALL)
            assert {run.id for run in page.runs} == {run.id for run in kept}
            # A request of a run that is gone is none that was made.
            assert not (await store.continue_run(next_turn(young, request_id="once"), claim=False)).replayed

    run_async(main())


def test_delete_runs_takes_the_earliest_first_in_batches(stores: Stores) -> None:
    """Each batch is about as large as it may be, and a later one goes on behind it."""

    async def check(store: RunStore) -> None:
        runs = [await running(store) for _ in range(12)]
        for run in runs:
            await store.finish_turn(key_of(run), said(*"abcdefgh"), COMPLETED)
        before_ms = await later(now_ms())
        batches = []
        while any(deleted := await store.delete_runs(before_ms, 33)):
            batches.append(deleted)
            page = await store.list_runs(ORGANIZATION, SERVER, status=None, token=None, limit=ALL)
            gone = sum(batch.runs for batch in batches)
            assert [run.id for run in page.runs] == [run.id for run in runs[gone:]][::-1]
        assert all(sum(batch) <= 33 for batch in batches)
        assert 4 <= len(batches) <= 6
        assert [sum(each) for each in zip(*batches, strict=True)] == [12, 12, 12 * 9]

    with_store(stores, check)


def test_delete_runs_deletes_a_long_run_piece_by_piece(stores: Stores) -> None:
    """It is gone with the first piece; what is accepted meanwhile, also after a crash, has nothing to do with it."""

    async def main() -> None:
        async with stores.open() as store:
            run = await running(store)
            await store.finish_turn(key_of(run), said(*"x" * 250), COMPLETED)
            before_ms = await later(now_ms())
            first = await store.delete_runs(before_ms, 100)
            assert (first.runs, sum(first)) == (1, 100)
            with pytest.raises(RunNotFound):
                await store.get_run(ORGANIZATION, SERVER, run.id)
            assert await store.read_events(run.id, 0, ALL, ALL) == []
        async with stores.open() as store:
            other = await running(store, "other")
            second = await store.delete_runs(before_ms, 100)
            assert (second.runs, sum(second)) == (0, 100)
            rest = await delete_all(store, before_ms)
            assert Deleted(1, first.turns + second.turns + rest.turns, first.events + second.events + rest.events) == (
                Deleted(1, 1, 251)
            )
            assert contents(await log_of(store, other.id)) == ["other"]
            await store.append_events(key_of(other), said("goes on"))

    run_async(main())


def test_delete_runs_takes_fewer_rows_where_they_are_large(stores: Stores) -> None:
    """A batch is bounded by what its rows hold, too, but it takes at least one."""

    async def check(store: RunStore) -> None:
        run = await running(store)
        await store.finish_turn(key_of(run), said(*["x" * 100_000] * 20), COMPLETED)
        before_ms = await later(now_ms())
        batches = []
        while any(deleted := await store.delete_runs(before_ms, 60)):
            batches.append(deleted.events)
        assert max(batches) <= 4
        assert sum(batches) == 21
        run = await running(store)
        await store.finish_turn(key_of(run), said("x" * 100_000), COMPLETED)
        assert await delete_all(store, await later(now_ms()), limit=1) == Deleted(1, 1, 2)

    with_store(stores, check)


def test_delete_requests_forgets_those_made_before(stores: Stores) -> None:
    """So many at once, in whatever order they were made; the others are known still."""

    async def check(store: RunStore) -> None:
        news = [msgspec.structs.replace(new_run(request_id=str(n)), created_at_ms=n) for n in range(1, 8)]
        for new in reversed(news):
            await store.start_run(new, claim=True)
        assert [await store.delete_requests(6, 2) for _ in range(4)] == [2, 2, 1, 0]
        assert [await store.get_requested(new) is not None for new in news] == [False] * 5 + [True] * 2
        assert await store.delete_requests(8, 1) == 1
        assert sorted([await store.get_requested(new) is not None for new in news[5:]]) == [False, True]
        assert not (await store.start_run(new_run(request_id="1"), claim=False)).replayed

    with_store(stores, check)


# The SQLite file


def test_sqlite_deletes_runs_behind_many_that_stay(file: SQLiteStores, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are old but in use are passed over a page at a time; those from a wrong clock hold up nothing."""
    monkeypatch.setattr("runtime_service.store.sqlite_deletions._PAGE_RUNS", 3)
    pages: list[OldRuns] = []

    def look(*where: Any, **what: Any) -> OldRuns:
        pages.append(old_runs(*where, **what))
        return pages[-1]

    monkeypatch.setattr("runtime_service.store.sqlite_deletions.old_runs", look)

    async def main() -> None:
        async with file.open() as store:
            for at in [1] * 8 + [1 << 50] * 2:
                await store.start_run(msgspec.structs.replace(new_run(), created_at_ms=at), claim=False)
            old = await running(store)
            await store.finish_turn(key_of(old), [], COMPLETED)
            before_ms = await later(now_ms())
            for _ in range(40):
                await running(store)
            assert await delete_all(store, before_ms, 1) == Deleted(1, 1, 1)
            # Its run, its event, its turn, nothing: each looks no further than a page of young ones.
            assert [page.last_key for page in pages] == [3, 6, 9, 11, 14, 17, 20]
            for _ in range(2):
                # From the first run again: one of those that were passed over is in use no more.
                (change,) = await store.claim_turns(1)
                await store.finish_turn(key_of(change.run), [], COMPLETED)
                assert (await delete_all(store, 1 << 49, 1)).runs == 1
            assert await store.count_queued() == 8

    run_async(main())


def test_sqlite_run_that_is_deleted_while_it_is_read_is_not_found(
    file: SQLiteStores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read finds its key first; what has gone by then is as what never was."""

    async def main() -> None:
        async with file.open() as store:
            run = await running(store)
            monkeypatch.setattr("runtime_service.store.sqlite_rows.run_key", lambda *_: 2)
            with pytest.raises(RunNotFound):
                await store.get_run(ORGANIZATION, SERVER, run.id)

    run_async(main())


def test_sqlite_looks_from_the_first_run_again_for_another_time(file: SQLiteStores) -> None:
    """What was passed over as too young may be old by the later one."""

    async def main() -> None:
        async with file.open() as store:
            runs = [await running(store) for _ in range(3)]
            await store.finish_turn(key_of(runs[1]), [], COMPLETED)
            await store.finish_turn(key_of(runs[2]), [], COMPLETED)
            before_ms = await later(now_ms())
            await store.finish_turn(key_of(runs[0]), [], COMPLETED)
            assert (await store.delete_runs(before_ms, 3)).runs == 1
            assert await delete_all(store, await later(now_ms())) == Deleted(2, 2, 2)

    run_async(main())


def test_sqlite_does_not_delete_what_was_used_after_it_was_found(
    file: SQLiteStores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs are looked for outside of the transaction that deletes them."""
    found = OldRuns([1, 2, 3], 3, ended=True)
    monkeypatch.setattr("runtime_service.store.sqlite_deletions.old_runs", lambda *_, **__: found)

    async def main() -> None:
        async with file.open() as store:
            runs = [await running(store) for _ in range(3)]
            await store.finish_turn(key_of(runs[0]), [], COMPLETED)
            before_ms = await later(now_ms())
            await store.finish_turn(key_of(runs[1]), [], COMPLETED)
            assert await store.delete_runs(before_ms, 100) == Deleted(1, 1, 1)
            page = await store.list_runs(ORGANIZATION, SERVER, status=None, token=None, limit=ALL)
            assert [run.id for run in page.runs] == [runs[2].id, runs[1].id]

    run_async(main())


def test_sqlite_holds_nothing_of_what_was_deleted(file: SQLiteStores) -> None:
    """No row is left behind in any table, and the keys of runs that are left in pieces are not used again."""

    async def main() -> None:
        async with file.open() as store:
            for _ in range(5):
                run = (await store.start_run(new_run(request_id=new_run().id), claim=True)).run
                await store.finish_turn(key_of(run), said(*"abc"), COMPLETED)
                await store.cancel_run(cancel_of(run, request_id=new_run().id), [], None)
            before_ms = await later(now_ms())
            await delete_all(store, before_ms, 1)
            while await store.delete_requests(before_ms, 3):
                pass
        with sqlite3.connect(file.path) as connection:
            tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
            assert len(tables) == 5
            assert [connection.execute(f"SELECT count(*) FROM {name}").fetchone() for name in tables] == [(0,)] * 5
        connection.close()

    run_async(main())


def test_sqlite_finds_what_is_to_be_deleted_without_a_scan(file: SQLiteStores) -> None:
    """Requests from the first on, runs from a key on, rows of a run by its key."""
    with_store(file, running)
    plan = file.plan_of("forget_requests", 1, 1, 1)
    assert "SEARCH requests USING INTEGER PRIMARY KEY (rowid=?)" in plan
    assert not any("TEMP B-TREE" in step for step in plan)
    for query in ("runs_of_age", "sizes_of_events", "sizes_of_turns", "delete_run", "delete_events", "delete_turns"):
        bindings = (1, 1, 1)[: 3 if query == "runs_of_age" else 2]
        (step,) = file.plan_of(query, *bindings)
        assert step.startswith("SEARCH "), step
        assert "PRIMARY KEY" in step
