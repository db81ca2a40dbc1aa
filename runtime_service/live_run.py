"""What is known in this process of a run that is executed or followed here: newest events, draft, followers.

Knows the domain; neither the store nor who tells of changes.
"""

import asyncio
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from runtime_service.runs import TERMINAL, Run, RunEvent
from runtime_service.store.base import Change

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


class Feed(NamedTuple):
    """A task that brings what the process at `address` says of a run."""

    address: str
    task: asyncio.Task[None]


class Draft:
    """The text of an event that is not complete yet, in the pieces in which it came.

    `sequence` is the one that the event will have, as far as is known; `size` counts its bytes in UTF-8.
    """

    __slots__ = ("parts", "sequence", "size")

    def __init__(self, sequence: int = 0) -> None:
        self.sequence = sequence
        self.parts: list[str] = []
        self.size = 0

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.parts)


class DraftCursor:
    """How much of which draft a follower has had."""

    __slots__ = ("draft", "offset", "part", "sequence")

    def __init__(self) -> None:
        self.draft: Draft | None = None
        self.sequence = self.part = self.offset = 0

    def advance(self, draft: Draft | None) -> Delta | None:
        """Return what is new of a draft, from its beginning where it is another one."""
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

    A view is the run as it shows one of its turns (0: its latest); one that is not known, or in doubt because others
    have written to the run, is read from the store. `doubts` counts how often that happened. `last_sequence` is the
    newest that was published. `feed` brings what the process says that executes the run, where that is another one.
    """

    __slots__ = (
        "_checked",
        "_collectors",
        "_followers",
        "_views",
        "doubts",
        "draft",
        "feed",
        "held",
        "last_sequence",
        "tail",
        "tail_size",
    )

    def __init__(self) -> None:
        self._followers: dict[asyncio.Event, bool] = {}  # whether it wants deltas
        self._collectors: list[asyncio.Future[bool]] = []
        self.held = 0
        self.feed: Feed | None = None
        self.doubts = 0
        self._views: dict[int, Run] = {}
        self._checked: dict[int, int] = {}  # the doubts that there were when a view was read
        self.last_sequence = 0
        self.tail: list[RunEvent] = []
        self.tail_size = 0
        self.draft: Draft | None = None

    def publish(self, change: Change) -> None:
        """Take in what was written to the run, in the order of the writes of this process."""
        run = change.run
        self.show(run.turn.number, run)
        if run.turn.number == run.last_turn:
            self.show(0, run)
        for number, view in self._views.items():
            # The question is the run's, whichever turn is shown.
            if view.question != run.question and view.last_sequence <= run.last_sequence:
                self._views[number] = replace(view, question=run.question)
        self.last_sequence = max(self.last_sequence, run.last_sequence)
        self._add_to_tail(change.events)
        for woken in self._followers:
            woken.set()
        if self._collectors and (run.status in TERMINAL or run.is_asking):
            self._wake_collectors()

    def view(self, number: int) -> Run | None:
        """Return a view that is not in doubt."""
        return self._views.get(number) if not self.doubts or self._checked.get(number, 0) == self.doubts else None

    def show(self, number: int, run: Run) -> Run:
        """Set a view, unless a newer one is known; return the newer."""
        known = self._views.get(number)
        if known is not None and _age(run) < _age(known):
            return known
        self._views[number] = run
        if len(self._views) > _VIEWS:
            del self._views[min(number for number in self._views if number)]
        return run

    def read(self, number: int, run: Run, doubts: int) -> Run | None:
        """Take in a view whose reading began when there were so many doubts; return it unless it is in doubt."""
        if doubts != self.doubts:
            return None
        if doubts:
            self._checked[number] = doubts
        return self.show(number, run)

    def doubt(self) -> None:
        """Others wrote to the run, or this process to more than a change shows: look at the store."""
        self.doubts += 1
        self._views.clear()
        self._checked.clear()
        self.wake()

    def hear(self, events: tuple[RunEvent, ...]) -> None:
        """Take in events that another process has stored."""
        events = tuple([event for event in events if event.sequence > self.last_sequence])
        if events:
            self.last_sequence = events[-1].sequence
            self._add_to_tail(events)
            for woken in self._followers:
                woken.set()

    def _add_to_tail(self, events: tuple[RunEvent, ...]) -> None:
        tail = self.tail
        if tail and events and events[0].sequence != tail[-1].sequence + 1:
            tail.clear()
            self.tail_size = 0
        tail += events
        self.tail_size += sum([_size(event) for event in events])
        if len(tail) > _TAIL_EVENTS or self.tail_size > _TAIL_SIZE:
            self._shorten_tail()

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
        """Wait until a turn is settled or asks, or `wake` is called; return whether the time `deadline` came first."""
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


def _age(run: Run) -> tuple[int, int, bool, int, int]:
    """Return what grows with each write to the turn that `run` shows."""
    turn = run.turn
    return turn.number, turn.epoch, turn.status in TERMINAL, run.last_sequence, run.last_turn


def _size(event: RunEvent) -> int:
    return len(event.content) + (len(event.metadata) if event.metadata else 0)
