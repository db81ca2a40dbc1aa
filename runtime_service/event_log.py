"""Following a run: replay from the store, then live.

A follower is a cursor into the log and a wake-up; nothing is queued for it. What it lacks it takes from the run's
tail, the newest events kept in memory once for all followers, or, where that no longer reaches back, from the
store. So a slow follower costs nobody anything and loses nothing. Text of an event in the making lives in one
`Draft` a run; each follower is sent what it has not had of it.

Knows the store and the domain; neither agents nor gRPC.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Container
from contextlib import aclosing
from typing import Protocol

import msgspec

from runtime_service.errors import Draining
from runtime_service.live_run import Draft, DraftCursor, Feed, LiveRun, Update
from runtime_service.runs import TERMINAL, Run, RunEvent, RunStatus
from runtime_service.store.base import Change, RunStore

# An update holds no more: who sends it, and who takes it in, has others to serve. And a follower that has to wait
# holds one.
_UPDATE_EVENTS = 128
_UPDATE_SIZE = 1 << 15  # of content in code points and of metadata in bytes
_COLLECTED_EVENTS = 1_000
_COLLECTED_SIZE = 1 << 18
_FEED_PAUSE_SECONDS = 1.0


class FollowOptions(msgspec.Struct, frozen=True):
    """`turn`: end with that turn, not with the run. `wait_seconds`: end then, whatever there is.

    `relayed`: for another process of the same store, which is to hear no more than what is known here.
    """

    turn: int | None = None
    deltas: bool = False
    wait_seconds: float | None = None
    relayed: bool = False


class Peers(Protocol):
    """The other processes over the same store."""

    def follow(self, address: str, run: Run, after: int) -> AsyncGenerator[Update]:
        """Yield what the process at `address` says of a run from behind a sequence, deltas included.

        Of an update's run nothing is told but that there is one. Ends when it has no more to say, also by an error.
        """


class _Held:
    """A `hold` for the length of a block."""

    __slots__ = ("_log", "_run_id")

    def __init__(self, log: "EventLog", run_id: str) -> None:
        self._log = log
        self._run_id = run_id

    def __enter__(self) -> None:
        self._log.hold(self._run_id)

    def __exit__(self, *_: object) -> None:
        self._log.let_go(self._run_id)


class EventLog:
    """All followers of all runs in this process."""

    def __init__(self, store: RunStore, peers: Peers | None = None) -> None:
        self._store = store
        self._peers = peers
        self._live: dict[str, LiveRun] = {}
        self._closed = False

    def hold(self, run_id: str) -> LiveRun:
        """Keep the run's tail from now on: it is about to be executed here. Ended by `let_go`."""
        live = self._live.get(run_id)
        if live is None:
            live = self._live[run_id] = LiveRun()
        live.held += 1
        return live

    def let_go(self, run_id: str) -> None:
        """Undo one `hold`."""
        live = self._live[run_id]
        live.held -= 1
        self._forget_if_idle(run_id, live)

    def held(self, run_id: str) -> "_Held":
        """Keep what is published of a run for one who is about to follow it: a context manager."""
        return _Held(self, run_id)

    def publish(self, change: Change) -> None:
        """Tell the followers of a change. It must be durable; changes of a run come in the store's order."""
        live = self._live.get(change.run.id)
        if live is not None:
            live.publish(change)

    def publish_settled(self, change: Change) -> None:
        """As `publish`, for a change that settled other turns of the run, too: their views are read again."""
        live = self._live.get(change.run.id)
        if live is not None:
            live.doubt()
            live.publish(change)

    def doubt(self, run_id: str) -> None:
        """Have those who follow the run look at the store: it was written to by others."""
        live = self._live.get(run_id)
        if live is not None:
            live.doubt()

    def doubt_all(self, but: Container[str]) -> None:
        """As `doubt`, for all runs of which nobody tells here; not for those in `but`."""
        for run_id, live in self._live.items():
            if live.feed is None and run_id not in but:
                live.doubt()

    def close(self) -> None:
        """End every follower with Draining."""
        self._closed = True
        for live in self._live.values():
            live.wake()

    async def follow(self, run: Run, after: int, options: FollowOptions) -> AsyncGenerator[Update]:
        """Yield what the log of `run` holds after sequence `after`, then what comes, until no turn is open.

        `run` names the run, in whatever state it was read. Raises Draining when this process stops first.
        """
        loop = asyncio.get_running_loop()
        live = self._live.setdefault(run.id, LiveRun())
        woken = asyncio.Event()
        live.add_follower(woken, deltas=options.deltas)
        timer, deadline = None, math.inf

        def expire() -> None:
            # Said, not read from the clock: a timer may be up to a millisecond early by it.
            nonlocal deadline
            deadline = -math.inf
            woken.set()

        if options.wait_seconds is not None:
            deadline = loop.time() + options.wait_seconds
            timer = loop.call_at(deadline, expire)
        cursor = after
        drafts = DraftCursor()
        told: tuple[int, RunStatus, bool] | None = None
        try:
            while True:
                woken.clear()
                view = live.view(options.turn or 0) or await self._read_view(live, run, options.turn)
                if self._closed:
                    raise Draining
                if not options.relayed:
                    self._see_to_feed(live, view)
                # Behind the end of the caller's turn the log may have grown already: that is not for this stream.
                over = view.status in TERMINAL or loop.time() >= deadline
                settled = options.turn is not None and view.status in TERMINAL
                end = view.last_sequence if settled else max(view.last_sequence, live.last_sequence)
                while cursor < end:
                    events = await self._events_after(live, run, cursor, end, _UPDATE_EVENTS, _UPDATE_SIZE)
                    if not events:
                        break
                    cursor = events[-1].sequence
                    state = _state(view)
                    last = over and cursor >= end
                    yield Update(view if last or state != told else None, events)
                    told = state
                    if last:
                        return
                if over or told != _state(view):
                    yield Update(view)
                    told = _state(view)
                if over:
                    return
                if options.deltas and (delta := drafts.advance(live.draft)) is not None:
                    if delta.sequence > cursor:
                        yield Update(delta=delta)
                    continue
                await woken.wait()
        finally:
            if timer is not None:
                timer.cancel()
            live.remove_follower(woken)
            self._forget_if_idle(run.id, live)

    async def collect(
        self,
        run: Run,
        after: int,
        send: Callable[[Update], Awaitable[None]],
        wait_seconds: float | None = None,
    ) -> None:
        """Wait until the turn that `run` shows is over or asks, or the time is over; send its events then.

        Those behind the sequence `after`, seldom in pieces. The first and the last update have the run as it was then.
        Raises Draining when this process stops first.
        (Sent, not yielded: for a short run the generators on the way cost as much as the rest of it.)
        """
        live = self.hold(run.id)
        number = run.turn.number
        try:
            view = await self._view_at_end(live, run, wait_seconds)
            cursor = after
            end = view.last_sequence if view.status in TERMINAL else max(view.last_sequence, live.last_sequence)
            first = True
            while cursor < end:
                events = await self._events_after(live, run, cursor, end, _COLLECTED_EVENTS, _COLLECTED_SIZE)
                if not events:
                    break
                cursor = events[-1].sequence
                own = tuple([event for event in events if event.turn == number])
                last = cursor >= end
                await send(Update(view if first or last else None, own))
                first = False
                if last:
                    return
            await send(Update(view))
        finally:
            self.let_go(run.id)

    async def _view_at_end(self, live: LiveRun, run: Run, wait_seconds: float | None) -> Run:
        """Return the run showing its turn once that is over or asks, or as it is when the time is."""
        number = run.turn.number
        deadline = None if wait_seconds is None else asyncio.get_running_loop().time() + wait_seconds
        expired = False
        while True:
            view = live.view(number) or await self._read_view(live, run, number)
            if self._closed:
                raise Draining
            self._see_to_feed(live, view)
            if expired or view.status in TERMINAL or (view.is_asking and view.status is RunStatus.RUNNING):
                return view
            expired = await live.wait_for_end(deadline)

    async def _events_after(
        self, live: LiveRun, run: Run, sequence: int, end: int, limit: int, limit_size: int
    ) -> tuple[RunEvent, ...]:
        """Return the next events after `sequence`; that the log goes up to `end` may be known by the store alone."""
        if live.tail and live.tail[-1].sequence >= end and (tail := live.tail_after(sequence, limit, limit_size)):
            return tail
        return tuple(await self._store.read_events(run.id, sequence, limit, limit_size))

    async def _read_view(self, live: LiveRun, run: Run, turn: int | None) -> Run:
        while True:
            doubts = live.doubts
            read = await self._store.get_run(run.organization, run.server_id, run.id, turn)
            if (view := live.read(turn or 0, read, doubts)) is not None:
                return view

    def _forget_if_idle(self, run_id: str, live: LiveRun) -> None:
        if live.is_idle and self._live.get(run_id) is live:
            del self._live[run_id]
            _end_feed(live)

    # Runs that are executed elsewhere

    def _see_to_feed(self, live: LiveRun, view: Run) -> None:
        """Listen to the process that executes the run, if that is another one."""
        if live.feed is None or live.feed.address != view.holder:
            _end_feed(live)
            if view.holder is not None and self._peers is not None:
                task = asyncio.create_task(self._take_from(self._peers, live, view, view.holder))
                live.feed = Feed(view.holder, task)

    async def _take_from(self, peers: Peers, live: LiveRun, run: Run, address: str) -> None:
        """Make what a peer says of a run known to those who follow it here, to its end; they look at the store then."""
        draft: Draft | None = None
        try:
            async with aclosing(peers.follow(address, run, run.last_sequence)) as updates:
                async for update in updates:
                    live.hear(update.events)
                    if draft is not None and draft.sequence <= live.last_sequence:
                        _show_instead(live, draft, None)
                        draft = None
                    if update.delta is not None:
                        sequence, offset, text = update.delta
                        shown = draft
                        if draft is None or not offset:
                            draft = Draft(sequence)
                        draft.parts.append(text)
                        _show_instead(live, shown, draft)
                    if update.run is not None:
                        live.doubt()
            # The peer has said it all, or cannot be reached: the store knows who is next, by and by.
            await asyncio.sleep(_FEED_PAUSE_SECONDS)
        finally:
            _show_instead(live, draft, None)
            if live.feed is not None and live.feed.task is asyncio.current_task():
                live.feed = None
        live.doubt()


def _state(view: Run) -> tuple[int, RunStatus, bool]:
    """Return what followers are told of when it changes."""
    return view.turn.number, view.status, view.is_asking


def _show_instead(live: LiveRun, old: Draft | None, new: Draft | None) -> None:
    """Show a draft in the place of another one, unless that is not what is shown: the run is executed here by now."""
    if live.draft is old:
        live.show_draft(new)


def _end_feed(live: LiveRun) -> None:
    if live.feed is not None:
        live.feed.task.cancel()
        live.feed = None
