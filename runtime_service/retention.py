"""Deletes runs and requests that are kept no longer, a little at a time. Knows no database and no command line."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from operator import add
from time import perf_counter

import msgspec

from runtime_service.errors import StoreUnavailable
from runtime_service.runs import now_ms
from runtime_service.store.base import Deleted, RunStore

log = logging.getLogger(__name__)

_DAY_MS = 24 * 60 * 60 * 1_000
_REQUEST_DAYS = 1.0
_BATCH_ROWS = 500
_REST = 4  # so many times as long as a batch took, nothing is deleted behind it: others write, too


class RetentionLimits(msgspec.Struct, frozen=True):
    """Runs to which nothing was written for `run_days` are deleted; 0: never. Looked for every `interval_seconds`."""

    run_days: float = 0.0
    interval_seconds: float = 600.0


class Retention:
    """Deletes old runs and requests from `start` to `stop`. Several processes may do so over one store."""

    def __init__(self, store: RunStore, limits: RetentionLimits) -> None:
        self._store = store
        self._limits = limits
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin at once, then again and again."""
        self._task = asyncio.create_task(self._delete_for_ever())

    async def stop(self) -> None:
        """Begin no batch any more; may be asked for without a start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _delete_for_ever(self) -> None:
        while True:
            try:
                await self._delete_requests()
                if self._limits.run_days:
                    await self._delete_runs()
            except StoreUnavailable as error:
                log.warning("what is old is deleted later: %s", error)
            except Exception:
                # Without it nothing would be deleted any more.
                log.exception("what is old is deleted later")
            await asyncio.sleep(self._limits.interval_seconds)

    async def _delete_requests(self) -> None:
        before_ms = _days_ago(_REQUEST_DAYS)
        total = 0
        try:
            while True:
                began = perf_counter()
                count = await self._store.delete_requests(before_ms, _BATCH_ROWS)
                if not count:
                    return
                total += count
                await _rest(perf_counter() - began)
        finally:
            if total:
                log.info("deleted %d requests", total)

    async def _delete_runs(self) -> None:
        total = Deleted(0, 0, 0)
        try:
            async for so_far in delete_old_runs(self._store, self._limits.run_days):
                total = so_far
        finally:
            if any(total):
                log.info("deleted %d runs, with %d turns and %d events", *total)


async def delete_old_runs(store: RunStore, days: float) -> AsyncGenerator[Deleted]:
    """Delete the runs to which nothing was written for so many days; after each batch, tell how much it is by then.

    Leaves most of the time between batches to others. Raises StoreUnavailable; what it told is deleted all the same.
    """
    before_ms = _days_ago(days)
    total = Deleted(0, 0, 0)
    while True:
        began = perf_counter()
        deleted = await store.delete_runs(before_ms, _BATCH_ROWS)
        took_seconds = perf_counter() - began
        if not any(deleted):
            return
        total = Deleted(*map(add, total, deleted))
        yield total
        await _rest(took_seconds)


def _days_ago(days: float) -> int:
    return now_ms() - round(days * _DAY_MS)


async def _rest(took_seconds: float) -> None:
    await asyncio.sleep(took_seconds * _REST)
