"""The gateway's side of `RunService.Session`: calls over one stream that outlive it.

When the stream breaks, what was in flight is asked again through the next one, unseen by whoever waits for it: start
and continue are safe by their request id, followers by the last sequence that they had, the rest by what they do.
"""

import asyncio
import itertools
import logging
import math
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

import grpc

from gateway.errors import ApiError, from_code, from_rpc_error, from_status
from protos.acp.runs.v1 import run_service_pb2 as rpc

log = logging.getLogger(__name__)

Stream: TypeAlias = "grpc.aio.StreamStreamCall[rpc.SessionRequest, rpc.SessionResponse]"

_TICK_SECONDS = 0.5
_RECONNECT_SECONDS = (0.05, 2.0)
_STEADY_SECONDS = 1.0  # so old is a stream that is taken for one that lasts
# What a batch of commands holds beside its last one, at most.
_BATCH_BYTES = 1 << 18
# A stream that ends with one of these would end the next one, too: nobody is kept waiting for it.
_HOPELESS = frozenset(
    {
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INVALID_ARGUMENT,
    }
)


class Call:
    """One call: what has come of it and was not taken yet. `stop` or `fail` it when it is left early."""

    __slots__ = (
        "_arrived",
        "_error",
        "_resumed",
        "_run_state",
        "_session",
        "_taken",
        "_waiter",
        "asked_at",
        "command",
        "deadline",
        "ended",
        "last_sequence",
        "parked_at",
        "parked_by",
        "sent",
    )

    def __init__(self, session: "Session", command: rpc.SessionCommand, asked_at: float, deadline: float) -> None:
        self._session = session
        self.command = command
        self.asked_at = asked_at  # the last time, by the loop's clock
        self.deadline = deadline
        self.parked_at: float | None = asked_at  # since when it waits for a stream that lasts; None: it has one
        self.parked_by: ApiError | None = None
        self._arrived: deque[rpc.SessionUpdate] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._error: ApiError | None = None
        self._taken = 0  # run updates that were not acknowledged yet
        self._resumed = False
        self._run_state: tuple[int, int] | None = None
        self.ended = False
        self.sent = False  # to a service: it may have had effect
        self.last_sequence = 0

    async def next(self) -> rpc.SessionUpdate | None:
        """Return the next update, None when the call has ended. Raises ApiError."""
        while not self._arrived:
            if self._error is not None:
                raise self._error
            if self.ended:
                return None
            self._waiter = self._session.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        update = self._arrived.popleft()
        if not self.ended:
            self._taken += 1
            if self._taken >= self._session.acknowledge_after:
                self._session.acknowledge(self, self._taken)
                self._taken = 0
        return update

    def stop(self) -> None:
        """Let go of the call, unless it has ended; the run goes on."""
        if not self.ended:
            self._session.forget(self)
            self.ended = True

    def fail(self, error: ApiError) -> None:
        """End the call with an error, behind what has come of it."""
        if not self.ended:
            self.stop()
            self.end_with(error)

    # What the session calls

    def end_with(self, error: ApiError) -> None:
        """Raise `error` from `next`, behind what has come."""
        self.ended = True
        self._error = error
        self._wake()

    def deliver(self, update: rpc.SessionUpdate) -> None:
        """Take in what has come."""
        self.parked_at = None
        result = update.WhichOneof("result")
        if result == "run_update":
            news = update.run_update
            if self._resumed:
                self._drop_known(news)
            if news.events:
                self.last_sequence = news.events[-1].sequence
            if news.HasField("run"):
                self._run_state = (news.run.turn, news.run.status)
        if result is not None:
            self._arrived.append(update)
        if update.last:
            self.ended = True
        self._wake()

    def begin(self, now: float) -> rpc.SessionCommand:
        """Return the command that opens the call, or goes on where it was cut, on a new stream."""
        self._resumed = self._run_state is not None
        self._taken = -len(self._arrived)  # those of the stream before are not acknowledged to this one
        self.parked_by = None
        self.sent = True
        command = self.command
        operation = command.WhichOneof("operation")
        if operation == "watch_run":
            command.watch_run.after_sequence = max(command.watch_run.after_sequence, self.last_sequence)
        elif operation == "list_run_events" and command.list_run_events.wait_ms:
            command.list_run_events.wait_ms = self._wait_left_ms(command.list_run_events.wait_ms, now)
        elif operation in ("start_run", "continue_run"):
            options = getattr(command, operation).stream
            if options.wait_ms:
                options.wait_ms = self._wait_left_ms(options.wait_ms, now)
        self.asked_at = now
        return command

    def _wait_left_ms(self, wait_ms: int, now: float) -> int:
        return max(1, wait_ms - int((now - self.asked_at) * 1000))

    def _drop_known(self, news: rpc.RunUpdate) -> None:
        """Take out what had come before the stream broke."""
        known = 0
        for event in news.events:
            if event.sequence > self.last_sequence:
                break
            known += 1
        del news.events[:known]
        if news.HasField("run") and (news.run.turn, news.run.status) == self._run_state:
            news.ClearField("run")
            news.ClearField("thread")

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Session:
    """One session with one runtime service, kept open: when its stream breaks, another one is opened."""

    def __init__(
        self, open_stream: Callable[[], Stream], max_calls: int, max_message_bytes: int, reconnect_seconds: float
    ) -> None:
        self._open_stream = open_stream
        self._own_max_calls = self._max_calls = max_calls
        self._own_max_message_bytes = self._max_message_bytes = max_message_bytes
        self._reconnect_seconds = reconnect_seconds
        self.acknowledge_after = 1
        self._numbers = itertools.count(1)
        self._retry_after = itertools.cycle("123")  # so that those who were refused do not come back all at once
        self._calls: dict[int, Call] = {}
        self._outbox: list[rpc.SessionCommand] = []
        self._connected = False
        self._connected_at = math.inf
        self._was_of_use = False
        self._to_send = asyncio.Event()  # the outbox is not empty
        self._clock: asyncio.TimerHandle | None = None
        self._life: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Open the stream and keep it open; calls can be made from now on."""
        self.loop = asyncio.get_running_loop()
        self._life = self.loop.create_task(self._live())
        self._clock = self.loop.call_later(_TICK_SECONDS, self._tick)

    async def close(self) -> None:
        """End the stream and whatever still waits for it."""
        if self._clock is not None:
            self._clock.cancel()
        if self._life is not None:
            self._life.cancel()
            await asyncio.wait([self._life])
        self._fail_all(_unreachable)

    def open(self, command: rpc.SessionCommand, seconds: float | None) -> Call:
        """Make a call; after `seconds` it fails with 504. Raises ApiError 503 when too many are open, 413."""
        if len(self._calls) >= self._max_calls:
            raise ApiError(
                503,
                "OVERLOADED",
                f"{self._max_calls} requests are under way already; nothing was changed. Try again in a moment.",
                headers={"Retry-After": next(self._retry_after)},
            )
        command.call = next(self._numbers)
        if not self._fits(command):
            raise _too_large()
        now = self.loop.time()
        call = Call(self, command, now, math.inf if seconds is None else now + seconds)
        self._calls[command.call] = call
        if self._connected:
            call.parked_at = None
            self._send(call.begin(now))
        return call

    def _fits(self, command: rpc.SessionCommand) -> bool:
        return command.ByteSize() <= self._max_message_bytes - _BATCH_BYTES

    # What calls ask for

    def acknowledge(self, call: Call, updates: int) -> None:
        """Make room for more updates of a call."""
        if self._connected:
            command = rpc.SessionCommand(call=call.command.call)
            command.acknowledge.updates = updates
            self._send(command)

    def forget(self, call: Call) -> None:
        """Take no more updates of a call."""
        number = call.command.call
        if self._calls.pop(number, None) is not None and self._connected:
            command = rpc.SessionCommand(call=number)
            command.stop.SetInParent()
            self._send(command)

    # The stream

    async def _live(self) -> None:
        shortest, longest = _RECONNECT_SECONDS
        pause = shortest
        while True:
            stream = self._open_stream()
            error: grpc.aio.AioRpcError | None = None
            try:
                hello = await stream.read()
                if isinstance(hello, rpc.SessionResponse):
                    await self._serve(stream, hello.limits)
            except grpc.aio.AioRpcError as broken:
                error = broken
                log.warning("the session with the runtime service broke: %s %s", broken.code().name, broken.details())
            except Exception:
                log.exception("the session with the runtime service failed; it is opened again")
            finally:
                stream.cancel()
            self._park(error)
            # A stream that breaks before it was of any use is tried again ever more slowly.
            steady = self.loop.time() - self._connected_at >= _STEADY_SECONDS
            pause = shortest if steady or self._was_of_use else min(pause * 2, longest)
            self._connected_at, self._was_of_use = math.inf, False
            await asyncio.sleep(pause)

    async def _serve(self, stream: Stream, limits: rpc.SessionLimits) -> None:
        self._max_calls = min(self._own_max_calls, limits.max_calls)
        self._max_message_bytes = min(self._own_max_message_bytes, limits.max_message_bytes)
        self.acknowledge_after = max(1, limits.window_updates // 2)
        for call in list(self._calls.values()):
            if not self._fits(call.command):
                call.fail(_too_large())  # it was made when that was not known
        now = self._connected_at = self.loop.time()
        self._outbox = [call.begin(now) for call in self._calls.values()]
        self._connected = True
        writer = self.loop.create_task(self._write(stream))
        try:
            while isinstance(response := await stream.read(), rpc.SessionResponse):
                self._take(response)
        finally:
            self._connected = False
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    def _take(self, response: rpc.SessionResponse) -> None:
        for update in response.updates:
            call = self._calls.get(update.call)
            if call is None:
                continue  # it was stopped meanwhile
            if update.HasField("error"):
                error = from_status(update.error)
                if error.code == "DRAINING":
                    # The service is stopping: its successor is asked.
                    call.parked_at, call.parked_by = self.loop.time(), error
                    continue
                del self._calls[update.call]
                call.end_with(error)
                continue
            if update.last:
                del self._calls[update.call]
            call.deliver(update)
            self._was_of_use = True

    def _send(self, command: rpc.SessionCommand) -> None:
        self._outbox.append(command)
        self._to_send.set()

    async def _write(self, stream: Stream) -> None:
        while True:
            if not self._outbox:
                self._to_send.clear()
                await self._to_send.wait()
            request = rpc.SessionRequest()
            size = count = 0
            for command in self._outbox:
                request.commands.append(command)
                count += 1
                size += command.ByteSize()
                if size > _BATCH_BYTES:
                    break
            del self._outbox[:count]
            await stream.write(request)

    # What does not come

    def _park(self, error: grpc.aio.AioRpcError | None) -> None:
        """Keep what is in flight for the next stream, unless that would end as this one did."""
        if error is not None and error.code() in _HOPELESS:
            self._fail_all(lambda _: _refused(error))
            return
        now = self.loop.time()
        for call in list(self._calls.values()):
            if call.parked_at is None:
                call.parked_at = now
            else:
                self._fail_if_overdue(call, now)

    def _tick(self) -> None:
        """End the calls whose time is over."""
        self._clock = self.loop.call_later(_TICK_SECONDS, self._tick)
        now = self.loop.time()
        for call in list(self._calls.values()):
            if now >= call.deadline:
                call.fail(from_code(grpc.StatusCode.DEADLINE_EXCEEDED))
            elif call.parked_by is not None or not self._connected:
                self._fail_if_overdue(call, now)
            elif now - self._connected_at >= _STEADY_SECONDS:
                call.parked_at = None

    def _fail_if_overdue(self, call: Call, now: float) -> None:
        if call.parked_at is not None and now - call.parked_at >= self._reconnect_seconds:
            call.fail(call.parked_by or _unreachable(call))

    def _fail_all(self, error_of: Callable[[Call], ApiError]) -> None:
        for call in list(self._calls.values()):
            call.fail(error_of(call))


# Errors are made anew for each call: one that is raised keeps hold of all that it passes through.


def _too_large() -> ApiError:
    return ApiError(413, "BODY_TOO_LARGE", "The request is larger than the runtime service takes.")


def _refused(error: grpc.aio.AioRpcError) -> ApiError:
    if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
        # It is about what the gateway wrote, not about what a caller did.
        return ApiError(502, "RUNTIME_INCOMPATIBLE", "The runtime service does not understand this gateway.")
    return from_rpc_error(error)


def _unreachable(call: Call) -> ApiError:
    what = "the request may still take effect" if call.sent else "nothing was changed"
    message = f"The runtime service cannot be reached; {what}. Try again in a moment."
    return ApiError(503, "RUNTIME_UNAVAILABLE", message, headers={"Retry-After": "1"})
