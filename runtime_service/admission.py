"""Room for turns: how many run here, how many wait in the store, and the claiming of those that wait.

Knows nothing of agents: who has claimed turns says what becomes of them.
"""

import asyncio
import math
from collections.abc import Callable

from runtime_service.errors import CapacityExceeded, StoreUnavailable
from runtime_service.store.base import RETRY_SECONDS, Change, RunStore

_CLAIM_BATCH = 64
_COUNT_SECONDS = 0.25


class Admission:
    """`max_turns` run at once here, about `max_queued` wait; `launch` is called with each turn that was claimed."""

    def __init__(self, store: RunStore, max_turns: int, max_queued: int, launch: Callable[[Change], None]) -> None:
        self.occupied = 0  # running turns, and those that are being claimed
        self.claiming: asyncio.Task[None] | None = None
        self.is_closed = False
        self._store = store
        self._max_turns = max_turns
        self._max_queued = max_queued
        self._launch = launch
        self._queued = 0  # turns that wait, as far as is known here
        self._queueing = 0  # turns that are being stored as queued
        self._counted_at = -math.inf
        self._waits = False  # a turn may wait for room only
        self._noted = 0  # how often that was said

    def close(self) -> None:
        """Claim nothing any more."""
        self.is_closed = True

    def reserve(self) -> bool:
        """Reserve room for a new turn and return True, or a place in the queue and return False.

        Raises CapacityExceeded.
        """
        if self.occupied < self._max_turns and not self._waits:
            self.occupied += 1
            return True
        if self._queued + self._queueing >= self._max_queued:
            raise CapacityExceeded(
                f"{self._queued} turns are waiting already; try again in a moment.",
                retry_after_seconds=1.0,
            )
        self._queueing += 1
        return False

    def vacate(self) -> None:
        """Free the room of a turn."""
        self.occupied -= 1
        self.claim_if_room()

    def leave_queue(self) -> None:
        """Free the place in the queue of a turn that was stored, or was not."""
        self._queueing -= 1

    def note_queued(self, *, ready: bool) -> None:
        """A turn was stored as queued; it may be claimed if it is `ready`."""
        self._queued += 1
        if ready:
            self.note_ready()

    def note_ready(self) -> None:
        """A turn may be claimed by who has room."""
        self._waits = True
        self._noted += 1

    def claim_ready(self) -> None:
        """Claim the turns that are ready, as far as there is room."""
        self.note_ready()
        self.claim_if_room()

    async def count(self) -> bool:
        """Look how many turns wait, unless that was done a moment ago."""
        now = asyncio.get_running_loop().time()
        if now - self._counted_at < _COUNT_SECONDS:
            return False
        self._counted_at = now
        self._queued = await self._store.count_queued()
        return True

    async def recount(self) -> None:
        """Look how many turns wait, and claim what can be."""
        await self.count()
        if self._queued:
            self.claim_ready()

    def forget_count(self) -> None:
        """Turns may wait no longer: the next `count` looks."""
        self._counted_at = -math.inf

    def claim_if_room(self) -> None:
        """Claim what was noted, where there is room for it."""
        if self.claiming is None and self._waits and not self.is_closed:
            self.claiming = asyncio.create_task(self._claim())

    async def _claim(self) -> None:
        """Claim as long as there is room and something waits for it. What comes up meanwhile is seen here, too."""
        try:
            while self._waits and not self.is_closed:
                room = min(self._max_turns - self.occupied, _CLAIM_BATCH)
                if room <= 0:
                    return
                noted = self._noted
                self.occupied += room
                changes: list[Change] = []
                try:
                    changes = await self._store.claim_turns(room)
                except StoreUnavailable:
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
                finally:
                    self.occupied -= room - len(changes)
                self._queued = max(0, self._queued - len(changes))
                for change in changes:
                    self._launch(change)
                if len(changes) < room and noted == self._noted:
                    self._waits = False
        finally:
            self.claiming = None
