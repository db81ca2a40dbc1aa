"""One call to a runtime service, and what outlives the stream that carries it.

A call holds the command that opened it and how far its answer has come. So it can be asked again, through another
stream and of another replica, unseen by whoever waits for it: start, continue and cancel are safe by their request id,
followers by the last sequence that they had, the rest by what they do. Knows neither streams nor replicas.
"""

import asyncio
import math
from collections import deque
from typing import Protocol

from gateway.errors import ApiError
from protos.acp.runs.v1 import run_service_pb2 as rpc

_CHANGES = frozenset({"start_run", "continue_run", "cancel_run"})


class Place(Protocol):
    """Where a call is: with a session that carries it, or where it waits for one."""

    def acknowledge(self, call: "Call", updates: int) -> None:
        """Make room for more updates of a call."""

    def forget(self, call: "Call") -> None:
        """Take no more updates of a call."""


class Call:
    """One call: what has come of it and was not taken yet. `stop` or `fail` it when it is left early."""

    __slots__ = (
        "_acknowledge_after",
        "_arrived",
        "_asked_again",
        "_asked_at",
        "_error",
        "_loop",
        "_resumed",
        "_run_state",
        "_taken",
        "_waiter",
        "command",
        "deadline",
        "ended",
        "last_sequence",
        "place",
        "refusal",
        "refused_by",
        "sent",
        "waits_since",
    )

    def __init__(
        self, loop: asyncio.AbstractEventLoop, place: Place, command: rpc.SessionCommand, seconds: float | None
    ) -> None:
        now = loop.time()
        self._loop = loop
        self.place = place
        self.command = command
        self.deadline = math.inf if seconds is None else now + seconds
        self.waits_since: float | None = now  # since when it waits for a stream that lasts; None: it has one
        self.refusal: ApiError | None = None  # why it waits: what the last replica said
        self.refused_by: set[Place] | None = None  # those that need not be asked again before it got on
        self.ended = False
        self.sent = False  # to a service: it may have had effect
        self.last_sequence = 0
        self._acknowledge_after = 1
        self._arrived: deque[rpc.SessionUpdate] = deque()
        self._asked_again = False
        self._asked_at = now
        self._error: ApiError | None = None
        self._resumed = False
        self._run_state: tuple[int, int, int] | None = None
        self._taken = 0  # run updates that were not acknowledged yet
        self._waiter: asyncio.Future[None] | None = None

    async def next(self) -> rpc.SessionUpdate | None:
        """Return the next update, None when the call has ended. Raises ApiError."""
        while not self._arrived:
            if self._error is not None:
                raise self._error
            if self.ended:
                return None
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        update = self._arrived.popleft()
        if not self.ended:
            self._taken += 1
            if self._taken >= self._acknowledge_after:
                self.place.acknowledge(self, self._taken)
                self._taken = 0
        return update

    def stop(self) -> None:
        """Let go of the call, unless it has ended; the run goes on."""
        if not self.ended:
            self.place.forget(self)
            self.ended = True

    def fail(self, error: ApiError) -> None:
        """End the call with an error, behind what has come of it."""
        if not self.ended:
            self.stop()
            self.end_with(error)

    # What its place calls

    def end_with(self, error: ApiError) -> None:
        """Raise `error` from `next`, behind what has come."""
        self.ended = True
        self._error = error
        self._wake()

    def deliver(self, update: rpc.SessionUpdate) -> None:
        """Take in what has come."""
        self.waits_since = self.refused_by = None
        result = update.WhichOneof("result")
        if result == "run_update":
            news = update.run_update
            if self._asked_again:
                # Nobody but this gateway repeated anything.
                news.replayed = False
            if self._resumed:
                self._drop_known(news)
            if news.events:
                self.last_sequence = news.events[-1].sequence
            if news.HasField("run"):
                self._run_state = _state(news)
        elif result == "cancel_run" and self._asked_again:
            update.cancel_run.replayed = False
        if result is not None:
            self._arrived.append(update)
        if update.last:
            self.ended = True
        self._wake()

    def begin(self, number: int, acknowledge_after: int) -> rpc.SessionCommand:
        """Return the command that opens the call under this number, or goes on where it was cut."""
        self._acknowledge_after = acknowledge_after
        if self.sent or self.waits_since is not None:
            self._go_on()
        self.command.call = number
        self.sent = True
        return self.command

    def _go_on(self) -> None:
        """Have the command ask for no more than is still to come, and for no longer than is left."""
        # The one before may still wait to be written: it keeps its number.
        command = rpc.SessionCommand()
        command.CopyFrom(self.command)
        self.command = command
        now = self._loop.time()
        self._asked_again = self.sent
        self._resumed = self._run_state is not None
        self._taken = -len(self._arrived)  # those of the stream before are not acknowledged to this one
        self.refusal = None
        if command.WhichOneof("operation") == "watch_run":
            command.watch_run.after_sequence = max(command.watch_run.after_sequence, self.last_sequence)
        elif (wait := self._wait) is not None and wait.wait_ms:
            wait.wait_ms = max(1, wait.wait_ms - int((now - self._asked_at) * 1000))
        self._asked_at = now

    def cut_wait(self) -> bool:
        """Have the command, when it is sent again, wait for nothing; return whether it has waited for anything."""
        wait = self._wait
        if wait is None or wait.wait_ms <= 1:
            return False
        wait.wait_ms = 1
        return True

    @property
    def is_in_doubt(self) -> bool:
        """Whether it may have had effect where it was asked before it was asked where it is now."""
        return self._asked_again and self.command.WhichOneof("operation") in _CHANGES

    @property
    def _wait(self) -> rpc.ListRunEventsRequest | rpc.StreamOptions | None:
        """What of the command holds `wait_ms`."""
        command = self.command
        match command.WhichOneof("operation"):
            case "start_run":
                return command.start_run.stream
            case "continue_run":
                return command.continue_run.stream
            case "list_run_events":
                return command.list_run_events
        return None

    def _drop_known(self, news: rpc.RunUpdate) -> None:
        """Take out what had come before the stream broke."""
        known = 0
        for event in news.events:
            if event.sequence > self.last_sequence:
                break
            known += 1
        del news.events[:known]
        if news.HasField("run") and _state(news) == self._run_state:
            news.ClearField("run")
            news.ClearField("thread")

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _state(news: rpc.RunUpdate) -> tuple[int, int, int]:
    """Return what a follower is told of a run when it changes."""
    return news.run.turn, news.run.status, news.thread.status
