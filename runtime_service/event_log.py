"""Following a run: replay from the store, then live.

A follower is a cursor into the log and a wake-up; nothing is queued for it. What it lacks it takes from the run's
tail, the newest events kept in memory once for all followers, or, where that no longer reaches back, from the
store. So a slow follower costs nobody anything and loses nothing. Text of an event in the making lives in one
`Draft` a run; each follower is sent what it has not had of it.

Knows the store and the domain; neither agents nor gRPC.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import NamedTuple

import msgspec

from runtime_service.errors import Draining
from runtime_service.runs import TERMINAL, Run, RunEvent, RunStatus
from runtime_service.store.base import Change, RunStore

# An update holds no more: who sends it, and who takes it in, has others to serve. And a follower that has to wait
# holds one.
_UPDATE_EVENTS = 128
_UPDATE_SIZE = 1 << 15  # as _TAIL_SIZE
_COLLECTED_EVENTS = 1_000
_COLLECTED_SIZE = 1 << 18
_TAIL_EVENTS = 1_000
_TAIL_SIZE = 1 << 18  # of content in code points and of metadata in bytes
_VIEWS = 32


class Delta(NamedTuple):
    """A piece of the text of event `sequence`, from `offset` code points on."""

    sequence: int
    offset: int
    text: str


class Update(msgspec.Struct, frozen=True):
    """What is new to a follower; `run` is set on the first update, when its status changed, and on the last."""

    run: Run | None = None
    events: tuple[RunEvent, ...] = ()
    delta: Delta | None = None


class FollowOptions(msgspec.Struct, frozen=True):
    """`turn`: end with that turn, not with the run. `wait_seconds`: end then, whatever there is."""

    turn: int | None = None
    deltas: bool = False
    wait_seconds: float | None = None


class Draft:
    """The text of an event that is not complete yet, in the pieces in which it came.

    `sequence` is the one that the event will have, as far as is known; `size` counts its bytes in UTF-8.
    """

    __slots__ = ("parts", "sequence", "size")

    def __init__(self) -> None:
        self.sequence = 0
        self.parts: list[str] = []
        self.size = 0

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.parts)


class _DraftCursor:
    """How much of which draft a follower has had."""

    __slots__ = ("draft", "offset", "part", "sequence")

    def __init__(self) -> None:
        self.draft: Draft | None = None
        self.sequence = self.part = self.offset = 0

    def advance(self, draft: Draft | None) -> Delta | None:
        if draft is None:
            return None
        if draft is not self.draft or draft.sequence != self.sequence:
            self.draft, self.sequence = draft, draft.sequence
            self.part = self.offset = 0
        if self.part == len(draft.parts):
            return None
        text = "".join(draft.parts[self.part :])
        delta = Delta(self.sequence, self.offset, text)
        self.part = len(draft.parts)
        self.offset += len(text)
        return delta


class LiveRun:
    """What is known here of a run that is executed or followed here.

    `views` holds the run as it shows each turn (0: its latest), as far as known; a view that is missing is read
    from the store. `last_sequence` is the newest that was published.
    """

    __slots__ = ("_collectors", "_followers", "draft", "held", "last_sequence", "tail", "tail_size", "version", "views")

    def __init__(self) -> None:
        self._followers: dict[asyncio.Event, bool] = {}  # whether it wants deltas
        self._collectors: list[asyncio.Future[bool]] = []
        self.held = 0
        self.views: dict[int, Run] = {}
        self.version = 0
        self.last_sequence = 0
        self.tail: list[RunEvent] = []
        self.tail_size = 0
        self.draft: Draft | None = None

    def publish(self, change: Change) -> None:
        run = change.run
        self.views[run.turn.number] = run
        if run.turn.number == run.last_turn:
            self.views[0] = run
        if len(self.views) > _VIEWS:
            del self.views[min(number for number in self.views if number)]
        self.last_sequence = max(self.last_sequence, run.last_sequence)
        self.version += 1
        tail = self.tail
        if tail and change.events and change.events[0].sequence != tail[-1].sequence + 1:
            tail.clear()
            self.tail_size = 0
        tail += change.events
        self.tail_size += sum([_size(event) for event in change.events])
        if len(tail) > _TAIL_EVENTS or self.tail_size > _TAIL_SIZE:
            self._shorten_tail()
        for woken in self._followers:
            woken.set()
        if self._collectors and run.status in TERMINAL:
            self._wake_collectors()

    def _shorten_tail(self) -> None:
        tail, drop = self.tail, 0
        while len(tail) - drop > _TAIL_EVENTS or (self.tail_size > _TAIL_SIZE and len(tail) - drop > 1):
            self.tail_size -= _size(tail[drop])
            drop += 1
        del tail[:drop]

    def add_follower(self, woken: asyncio.Event, *, deltas: bool) -> None:
        """Set `woken` from now on when something changed; with `deltas` also when the draft has grown."""
        self._followers[woken] = deltas

    def remove_follower(self, woken: asyncio.Event) -> None:
        """Undo `add_follower`."""
        del self._followers[woken]

    async def wait_for_end(self, deadline: float | None) -> bool:
        """Wait until a turn is settled or `wake` is called; return whether the loop's time `deadline` came first."""
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[bool] = loop.create_future()
        timer = None if deadline is None else loop.call_at(deadline, _wake, woken, True)
        self._collectors.append(woken)
        try:
            return await woken
        finally:
            self._collectors.remove(woken)
            if timer is not None:
                timer.cancel()

    def wake(self) -> None:
        """Wake all that wait."""
        for woken in self._followers:
            woken.set()
        self._wake_collectors()

    def _wake_collectors(self) -> None:
        for woken in self._collectors:
            _wake(woken, False)

    def show_draft(self, draft: Draft | None) -> None:
        """Set the event in the making, or tell that it has grown."""
        self.draft = draft
        for woken, deltas in self._followers.items():
            if deltas:
                woken.set()

    @property
    def is_idle(self) -> bool:
        """Whether nobody executes or follows the run here."""
        return not self.held and not self._followers

    def tail_after(self, sequence: int, limit: int, limit_size: int) -> tuple[RunEvent, ...]:
        """Return the next events after `sequence`, at least one, if the tail reaches back that far, else nothing."""
        tail = self.tail
        if not tail or tail[0].sequence > sequence + 1:
            return ()
        skip = sequence + 1 - tail[0].sequence
        events = tail[skip : skip + limit]
        size = count = 0
        for event in events:
            size += _size(event)
            if size > limit_size and count:
                break
            count += 1
        return tuple(events[:count])


def _wake(waiting: asyncio.Future[bool], expired: bool) -> None:
    if not waiting.done():
        waiting.set_result(expired)


def _size(event: RunEvent) -> int:
    return len(event.content) + (len(event.metadata) if event.metadata else 0)


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

    def __init__(self, store: RunStore) -> None:
        self._store = store
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
            live.views.clear()
            live.publish(change)

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
        drafts = _DraftCursor()
        told: tuple[int, RunStatus] | None = None
        try:
            while True:
                woken.clear()
                view = live.views.get(options.turn or 0) or await self._read_view(live, run, options.turn)
                if self._closed:
                    raise Draining
                # Behind the end of the caller's turn the log may have grown already: that is not for this stream.
                over = view.status in TERMINAL or loop.time() >= deadline
                settled = options.turn is not None and view.status in TERMINAL
                end = view.last_sequence if settled else max(view.last_sequence, live.last_sequence)
                while cursor < end:
                    events = await self._events_after(live, run, cursor, _UPDATE_EVENTS, _UPDATE_SIZE)
                    if not events:
                        break
                    cursor = events[-1].sequence
                    state = (view.turn.number, view.status)
                    last = over and cursor >= end
                    yield Update(view if last or state != told else None, events)
                    told = state
                    if last:
                        return
                if over or told != (view.turn.number, view.status):
                    yield Update(view)
                    told = (view.turn.number, view.status)
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
        self, run: Run, send: Callable[[Update], Awaitable[None]], wait_seconds: float | None = None
    ) -> None:
        """Wait until the turn that `run` shows is over or the time is, then send its events, seldom in pieces.

        The first and the last update have the run as it was then. Raises Draining when this process stops first.
        (Sent, not yielded: for a short run the generators on the way cost as much as the rest of it.)
        """
        live = self.hold(run.id)
        number = run.turn.number
        try:
            view = await self._view_at_end(live, run, wait_seconds)
            cursor = run.turn.first_sequence - 1
            end = view.last_sequence if view.status in TERMINAL else max(view.last_sequence, live.last_sequence)
            first = True
            while cursor < end:
                events = await self._events_after(live, run, cursor, _COLLECTED_EVENTS, _COLLECTED_SIZE)
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
        """Return the run showing its turn once that is over, or as it is when the time is."""
        number = run.turn.number
        deadline = None if wait_seconds is None else asyncio.get_running_loop().time() + wait_seconds
        expired = False
        while True:
            view = live.views.get(number) or await self._read_view(live, run, number)
            if self._closed:
                raise Draining
            if expired or view.status in TERMINAL:
                return view
            expired = await live.wait_for_end(deadline)

    async def _events_after(
        self, live: LiveRun, run: Run, sequence: int, limit: int, limit_size: int
    ) -> tuple[RunEvent, ...]:
        return live.tail_after(sequence, limit, limit_size) or tuple(
            await self._store.read_events(run.id, sequence, limit, limit_size)
        )

    async def _read_view(self, live: LiveRun, run: Run, turn: int | None) -> Run:
        while True:
            version = live.version
            view = await self._store.get_run(run.organization, run.server_id, run.id, turn)
            if live.version == version:
                live.views[turn or 0] = view
                return view
            if (known := live.views.get(turn or 0)) is not None:
                return known

    def _forget_if_idle(self, run_id: str, live: LiveRun) -> None:
        if live.is_idle and self._live.get(run_id) is live:
            del self._live[run_id]
