"""What goes on whatever becomes of those who asked for it: writes of the store, and what follows from them.

A caller waits for a write as long as a caller should; the write goes on to its end.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

from runtime_service.errors import StoreUnavailable
from runtime_service.store.base import Change

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 5.0
"""So long a caller waits for the store."""


class Errands:
    """`under_way`: all that has not ended yet."""

    def __init__(self) -> None:
        self.under_way: set[asyncio.Future[Any]] = set()
        self._callers: dict[asyncio.Future[Change], float] = {}  # who waits, and since when, in order

    def see_to(self, act: Coroutine[Any, Any, None]) -> None:
        """Do something for which nobody waits."""
        task = asyncio.create_task(act)
        self.under_way.add(task)
        task.add_done_callback(self.under_way.discard)

    async def told(
        self, write: asyncio.Future[Change], on_done: Callable[[asyncio.Future[Change]], None] | None = None
    ) -> Change:
        """Return what came of a write; it goes on to its end, where `on_done` sees to what follows.

        Raises StoreUnavailable when that takes too long.
        """
        self.under_way.add(write)
        # The caller waits for another future than the store's: its cancel is not the write's.
        loop = asyncio.get_running_loop()
        told: asyncio.Future[Change] = loop.create_future()
        self._callers[told] = loop.time()
        write.add_done_callback(partial(self._on_done, told, on_done))
        return await told

    async def stop_waiting(self) -> None:
        """Tell the callers that have waited too long for the store that they may ask again."""
        before = asyncio.get_running_loop().time() - PATIENCE_SECONDS
        for told, since in list(self._callers.items()):
            if since > before:
                return
            del self._callers[told]
            if not told.done():
                message = "The store does not answer; the request may still take effect. Ask again in a moment."
                told.set_exception(StoreUnavailable(message))

    def _on_done(
        self,
        told: asyncio.Future[Change],
        on_done: Callable[[asyncio.Future[Change]], None] | None,
        write: asyncio.Future[Change],
    ) -> None:
        self.under_way.discard(write)
        self._callers.pop(told, None)
        _pass_on(write, told)
        if on_done is not None:
            on_done(write)


def _pass_on(done: asyncio.Future[Change], told: asyncio.Future[Change]) -> None:
    """Give a result to one who waits for it, if he still does."""
    if told.done():
        return
    if done.cancelled():
        told.cancel()
    elif (error := done.exception()) is not None:
        told.set_exception(error)
    else:
        told.set_result(done.result())


async def repeat(seconds: float, act: Callable[[], Awaitable[object]]) -> None:
    """Act a little more often than asked, which leaves time to do it; processes do not stay in step."""
    while True:
        await asyncio.sleep(seconds * random.uniform(0.7, 0.9))  # noqa: S311 - no secret
        try:
            await act()
        except StoreUnavailable:
            continue  # there is a next time
        except Exception:
            # Without it, turns would be lost, or stay lost.
            log.exception("what is done again and again failed; it is tried again")
