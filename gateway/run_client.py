"""Operations of the RunService as calls, with their deadlines and the ids by which they may be repeated.

Handlers ask for operations; what carries them is known here alone. Errors leave as ApiError.
"""

import itertools
import secrets
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from gateway.call import Call
from gateway.idempotency import Repetition
from gateway.replicas import Replicas
from protos.acp.runs.v1 import run_pb2 as pb
from protos.acp.runs.v1 import run_service_pb2 as rpc

_UNARY_SECONDS = 10.0
_MARGIN_SECONDS = 10.0


class CallContext(NamedTuple):
    """On whose behalf a call is made; every value is printable ASCII that the gateway has checked."""

    organization: str
    subject: str
    request_id: str
    traceparent: str | None


class ServerTarget(NamedTuple):
    """Which server an operation is about; `connected` goes through the binding of a resource."""

    id: str
    connected: bool


class UpdateStream:
    """The updates of one operation, in order. `stop` or `fail` it when it is left early."""

    __slots__ = ("_call", "_replicas", "fail", "stop")

    def __init__(self, call: Call, replicas: Replicas) -> None:
        self._call = call
        self._replicas = replicas
        self.stop = call.stop
        self.fail = call.fail

    def hurry(self) -> None:
        """Have a wait for the end of a turn answered with what there is by now."""
        self._replicas.hurry_call(self._call)

    async def next(self) -> rpc.RunUpdate | None:
        """Return the next update, None when the operation has ended. Raises ApiError."""
        update = await self._call.next()
        return None if update is None else update.run_update


class RunClient:
    """The RunService as its operations."""

    def __init__(self, replicas: Replicas) -> None:
        self.replicas = replicas
        # Ids of requests: unlike any other gateway's, and in the order in which they were made.
        prefix = secrets.token_hex(8)
        self._request_ids = (f"{prefix}-{number:010x}" for number in itertools.count(1))

    def start_run(
        self,
        context: CallContext,
        target: ServerTarget,
        *,
        input: str,
        title: str | None,
        mode: "pb.RunMode.ValueType",
        metadata: bytes | None,
        stream: rpc.StreamOptions,
        repetition: Repetition | None = None,
    ) -> UpdateStream:
        """Start a run."""
        command = _command(context)
        if title is not None:
            command.start_run.title = title
        return self._open_turn(command, command.start_run, target, input, mode, metadata, stream, repetition)

    def continue_run(
        self,
        context: CallContext,
        target: ServerTarget,
        run_id: str,
        *,
        input: str,
        mode: "pb.RunMode.ValueType",
        metadata: bytes | None,
        stream: rpc.StreamOptions,
        repetition: Repetition | None = None,
    ) -> UpdateStream:
        """Open the next turn of a run."""
        command = _command(context)
        command.continue_run.run_id = run_id
        return self._open_turn(command, command.continue_run, target, input, mode, metadata, stream, repetition)

    def _open_turn(
        self,
        command: rpc.SessionCommand,
        request: rpc.StartRunRequest | rpc.ContinueRunRequest,
        target: ServerTarget,
        input: str,
        mode: "pb.RunMode.ValueType",
        metadata: bytes | None,
        stream: rpc.StreamOptions,
        repetition: Repetition | None,
    ) -> UpdateStream:
        """Open a call by which a turn begins; `request` is the command's own."""
        _refer(request.server, target)
        request.input = input
        request.mode = mode
        if metadata is not None:
            request.metadata_json = metadata
        request.stream.CopyFrom(stream)
        self._identify(request, repetition)
        return UpdateStream(self.replicas.open(command, _stream_seconds(mode, stream)), self.replicas)

    def watch(self, context: CallContext, target: ServerTarget, run_id: str, after: int) -> UpdateStream:
        """Follow a run from behind sequence `after`, deltas included."""
        command = _command(context)
        request = command.watch_run
        _refer(request.server, target)
        request.run_id = run_id
        request.after_sequence = after
        request.stream.deltas = True
        return UpdateStream(self.replicas.open(command, None), self.replicas)

    async def get(self, context: CallContext, target: ServerTarget, run_id: str) -> rpc.GetRunResponse:
        """Return one run."""
        command = _command(context)
        _refer(command.get_run.server, target)
        command.get_run.run_id = run_id
        return (await self._answer(command)).get_run

    async def list(
        self,
        context: CallContext,
        target: ServerTarget,
        *,
        limit: int,
        page_token: str,
        status: "pb.RunStatus.ValueType",
    ) -> rpc.ListRunsResponse:
        """Return a page of runs."""
        command = _command(context)
        request = command.list_runs
        _refer(request.server, target)
        request.page_size = limit
        request.page_token = page_token
        request.status = status
        return (await self._answer(command)).list_runs

    async def list_events(
        self,
        context: CallContext,
        target: ServerTarget,
        run_id: str,
        *,
        after: int,
        limit: int,
        wait_seconds: float = 0,
        on_asked: Callable[[Callable[[], None]], None] | None = None,
    ) -> rpc.ListRunEventsResponse:
        """Return a page of a run's log: at most 1,000 events, and `limit`, unless that is 0.

        `on_asked` is given what cuts the wait short.
        """
        command = _command(context)
        request = command.list_run_events
        _refer(request.server, target)
        request.run_id = run_id
        request.after_sequence = after
        request.page_size = min(limit, 1_000)
        request.wait_ms = int(wait_seconds * 1000)
        return (await self._answer(command, wait_seconds, on_asked)).list_run_events

    async def cancel(
        self, context: CallContext, target: ServerTarget, run_id: str, repetition: Repetition | None = None
    ) -> rpc.CancelRunResponse:
        """Cancel a run."""
        command = _command(context)
        request = command.cancel_run
        _refer(request.server, target)
        request.run_id = run_id
        self._identify(request, repetition)
        return (await self._answer(command)).cancel_run

    def _identify(
        self,
        request: rpc.StartRunRequest | rpc.ContinueRunRequest | rpc.CancelRunRequest,
        repetition: Repetition | None,
    ) -> None:
        """Make a request safe to repeat: for its caller, who says by what, or for this gateway alone."""
        if repetition is None:
            request.request_id = next(self._request_ids)
        else:
            request.request_id = repetition.key
            request.request_digest = repetition.digest

    async def _answer(
        self,
        command: rpc.SessionCommand,
        wait_seconds: float = 0,
        on_asked: Callable[[Callable[[], None]], None] | None = None,
    ) -> rpc.SessionUpdate:
        call = self.replicas.open(command, _UNARY_SECONDS + wait_seconds)
        if on_asked is not None:
            on_asked(partial(self.replicas.hurry_call, call))
        try:
            update = await call.next()
        finally:
            call.stop()
        assert update is not None, "an operation that does not stream has one answer"
        return update


def _command(context: CallContext) -> rpc.SessionCommand:
    command = rpc.SessionCommand()
    command.organization = context.organization
    command.subject = context.subject
    command.correlation_id = context.request_id
    if context.traceparent is not None:
        command.traceparent = context.traceparent
    return command


def _refer(reference: rpc.ServerReference, target: ServerTarget) -> None:
    reference.id = target.id
    if target.connected:
        reference.connected = True


def _stream_seconds(mode: "pb.RunMode.ValueType", stream: rpc.StreamOptions) -> float | None:
    """Return the deadline of a call that opens a turn: none for one that is followed live to its end."""
    if mode == pb.RUN_MODE_ASYNC:
        return _UNARY_SECONDS
    return stream.wait_ms / 1000 + _MARGIN_SECONDS if stream.wait_ms else None
