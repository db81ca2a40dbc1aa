"""What is deleted when it has become old, and what is said of it."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from time import monotonic

import msgspec
import pytest

from runtime_service import retention
from runtime_service.errors import StoreUnavailable
from runtime_service.retention import Retention, RetentionLimits, delete_old_runs
from runtime_service.runs import Run, RunStatus
from runtime_service.store.base import Deleted, Outcome
from runtime_service.store.sqlite import SQLiteStore
from tests.support import eventually, key_of, new_run, run_async, said

DAY_MS = 24 * 60 * 60 * 1_000
COMPLETED = Outcome(RunStatus.COMPLETED, "done")


class Clock:
    """The time by which runs are written and deleted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.days = 100.0
        for module in ("runtime_service.retention", "runtime_service.store.sqlite_turns"):
            monkeypatch.setattr(f"{module}.now_ms", lambda: round(self.days * DAY_MS))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that a test sets."""
    return Clock(monkeypatch)


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[SQLiteStore]:
    """A store, closed at the end."""
    store = await SQLiteStore.open(path / "runs.sqlite")
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def retaining(store: SQLiteStore, limits: RetentionLimits) -> AsyncIterator[None]:
    """Old things are deleted meanwhile."""
    kept = Retention(store, limits)
    kept.start()
    try:
        yield
    finally:
        await kept.stop()


async def ended(store: SQLiteStore, clock: Clock, request_id: str | None = None, events: int = 1) -> Run:
    """A run that is completed now."""
    new = msgspec.structs.replace(new_run(request_id=request_id), created_at_ms=round(clock.days * DAY_MS))
    run = (await store.start_run(new, claim=True)).run
    return (await store.finish_turn(key_of(run), said(*"x" * events), COMPLETED)).run


async def runs_of(store: SQLiteStore, of: Run) -> list[str]:
    """The ids of the runs that are there, the earliest first."""
    page = await store.list_runs(of.organization, of.server_id, status=None, token=None, limit=1_000)
    return [run.id for run in page.runs][::-1]


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged."""
    return [record.getMessage() for record in caplog.records if record.name == retention.__name__]


def test_retention_deletes_old_runs_and_requests_again_and_again(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Runs by the setting, requests after a day; counts are logged where there are any."""
    caplog.set_level(logging.INFO)

    async def main() -> None:
        async with opened(tmp_path) as store:
            first = await ended(store, clock, "a")
            clock.days += 3
            second = await ended(store, clock, "b")
            clock.days += 1.001
            async with retaining(store, RetentionLimits(run_days=4.0, interval_seconds=0.001)):
                await eventually(lambda: len(lines(caplog)) == 2)
                assert await runs_of(store, first) == [second.id]
                third = await ended(store, clock, "b")
                clock.days += 3
                await eventually(lambda: len(lines(caplog)) == 4)
                assert await runs_of(store, first) == [third.id]
        told = "deleted 1 runs, with 1 turns and 2 events"
        assert lines(caplog)[:2] == ["deleted 2 requests", told]
        assert sorted(lines(caplog)[2:]) == ["deleted 1 requests", told]

    run_async(main())


def test_retention_keeps_runs_for_ever_unless_told_otherwise(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests are forgotten all the same, but not before a day has passed."""
    caplog.set_level(logging.INFO)

    async def main() -> None:
        async with opened(tmp_path) as store:
            run = await ended(store, clock, "old")
            clock.days += 1_000
            young = await ended(store, clock, "young")
            clock.days += 0.999
            async with retaining(store, RetentionLimits(interval_seconds=0.001)):
                await eventually(lambda: lines(caplog))
                assert await runs_of(store, run) == [run.id, young.id]
                assert (await store.start_run(new_run(request_id="young"), claim=True)).run.id == young.id
        assert lines(caplog) == ["deleted 1 requests"]

    run_async(main())


class Flawed:
    """Stands in for a store's `delete_runs`: the call of a number fails, and each takes so long."""

    def __init__(
        self, store: SQLiteStore, *, fails: int = 0, by: type[Exception] = StoreUnavailable, seconds: float = 0.0
    ) -> None:
        self.calls = 0
        self.times: list[tuple[float, float]] = []  # of the calls that have ended
        self._delete_runs = store.delete_runs
        self._fails, self._by = fails, by
        self._seconds = seconds

    async def __call__(self, before_ms: int, limit: int) -> Deleted:
        """Delete, or fail."""
        self.calls += 1
        began = monotonic()
        try:
            await asyncio.sleep(self._seconds)
            if self.calls == self._fails:
                raise self._by("It is away.")
            return await self._delete_runs(before_ms, limit)
        finally:
            self.times.append((began, monotonic()))


@pytest.mark.parametrize("by", [StoreUnavailable, KeyError])
def test_retention_goes_on_behind_a_failure(
    tmp_path: Path,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    by: type[Exception],
) -> None:
    """What it did before is told, what is left is deleted at the next time; also if nobody foresaw the failure."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(retention, "_BATCH_ROWS", 3)

    async def main() -> None:
        async with opened(tmp_path) as store:
            runs = [await ended(store, clock) for _ in range(3)]
            clock.days += 2
            monkeypatch.setattr(store, "delete_runs", Flawed(store, fails=2, by=by))
            async with retaining(store, RetentionLimits(run_days=1.0, interval_seconds=0.001)):
                await eventually(lambda: len(lines(caplog)) == 3)
                assert await runs_of(store, runs[0]) == []
        assert lines(caplog) == [
            "deleted 1 runs, with 0 turns and 2 events",
            "what is old is deleted later" + (": It is away." if by is StoreUnavailable else ""),
            "deleted 2 runs, with 3 turns and 4 events",
        ]

    run_async(main())


def test_deletion_tells_how_much_it_is_by_then(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each batch the whole until then; a store that is away ends it."""
    monkeypatch.setattr(retention, "_BATCH_ROWS", 4)

    async def main() -> None:
        async with opened(tmp_path) as store:
            for _ in range(3):
                await ended(store, clock)
            clock.days += 2
            told = [total async for total in delete_old_runs(store, 1.0)]
            assert told == [Deleted(1, 1, 2), Deleted(2, 2, 4), Deleted(3, 3, 6)]
            assert [total async for total in delete_old_runs(store, 1.0)] == []
            monkeypatch.setattr(store, "delete_runs", Flawed(store, fails=1))
            with pytest.raises(StoreUnavailable):
                await anext(delete_old_runs(store, 1.0))

    run_async(main())


def test_deletion_rests_between_batches(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several times as long as each batch took."""
    monkeypatch.setattr(retention, "_BATCH_ROWS", 4)

    async def main() -> None:
        async with opened(tmp_path) as store:
            for _ in range(2):
                await ended(store, clock)
            clock.days += 2
            slow = Flawed(store, seconds=0.02)
            monkeypatch.setattr(store, "delete_runs", slow)
            assert len([total async for total in delete_old_runs(store, 1.0)]) == 2
            for (began, done), (next_began, _) in pairwise(slow.times):
                assert next_began - done >= 3.9 * (done - began)

    run_async(main())


def test_retention_that_is_stopped_deletes_no_more(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the middle, and when it was never started."""
    monkeypatch.setattr(retention, "_BATCH_ROWS", 4)

    async def main() -> None:
        async with opened(tmp_path) as store:
            await Retention(store, RetentionLimits()).stop()
            runs = [await ended(store, clock) for _ in range(3)]
            clock.days += 2
            slow = Flawed(store, seconds=0.05)
            monkeypatch.setattr(store, "delete_runs", slow)
            async with retaining(store, RetentionLimits(run_days=1.0)):
                await eventually(lambda: slow.calls == 2)
            assert len(slow.times) == 2
            assert await runs_of(store, runs[0]) == [run.id for run in runs[1:]]

    run_async(main())
