"""The only user of the RunService stub: how operations become calls, with their deadlines.

Handlers ask for operations; what carries them (today a call each) is known here alone. Errors leave as
grpc.aio.AioRpcError, or as ApiError when the runtime service cannot be reached at all.
"""

import asyncio
from typing import Any, NamedTuple, TypeAlias

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.errors import ApiError
from protos.acp.runs.v1 import run_pb2 as pb
from protos.acp.runs.v1 import run_service_pb2 as rpc
from protos.acp.runs.v1 import run_service_pb2_grpc

MAX_MESSAGE_BYTES = 8 << 20
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # What may be asked again is known here, not to gRPC; its retry buffers cost each call and each idle stream.
    ("grpc.enable_retries", 0),
    # An unread stream is not to fill memory: keep the flow-control window at its start.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
_UNARY_SECONDS = 10.0
_MARGIN_SECONDS = 10.0
_HEALTH_SECONDS = 1.0


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


UpdateCall: TypeAlias = (
    "grpc.aio.UnaryStreamCall[rpc.StartRunRequest, rpc.StartRunResponse]"
    " | grpc.aio.UnaryStreamCall[rpc.ContinueRunRequest, rpc.ContinueRunResponse]"
    " | grpc.aio.UnaryStreamCall[rpc.WatchRunRequest, rpc.WatchRunResponse]"
)


class UpdateStream:
    """The updates of one operation, in order. `cancel` must be called when it is left early."""

    __slots__ = ("_call",)

    def __init__(self, call: UpdateCall) -> None:
        self._call = call

    async def next(self) -> rpc.RunUpdate | None:
        """Return the next update, None when the operation has ended. Raises grpc.aio.AioRpcError."""
        response: Any = await self._call.read()
        return None if response is grpc.aio.EOF else response.update

    def cancel(self) -> None:
        """Stop waiting for updates; the run goes on."""
        self._call.cancel()


class RunClient:
    """A connection to the runtime service, shared by all requests."""

    def __init__(self, target: str, service_token: str, connect_seconds: float = 5.0) -> None:
        self._channel = grpc.aio.insecure_channel(target, options=_OPTIONS)
        self._stub = run_service_pb2_grpc.RunServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._authorization = ("authorization", f"Bearer {service_token}")
        self._connect_seconds = connect_seconds

    async def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        await self._channel.close()

    async def is_serving(self) -> bool:
        """Return whether the runtime service says that it is ready for calls."""
        try:
            answer = await self._health.Check(  # type: ignore[attr-defined]  # the stubs know no aio stub
                health_pb2.HealthCheckRequest(), timeout=_HEALTH_SECONDS
            )
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def start(
        self,
        context: CallContext,
        target: ServerTarget,
        *,
        input: str,
        title: str | None,
        mode: "pb.RunMode.ValueType",
        metadata: bytes | None,
        stream: rpc.StreamOptions,
    ) -> UpdateStream:
        """Start a run."""
        request = rpc.StartRunRequest(
            server=_reference(target),
            input=input,
            title=title or "",
            mode=mode,
            metadata_json=metadata or b"",
            stream=stream,
        )
        metadata_pairs = await self._prepare(context)
        return UpdateStream(
            self._stub.StartRun(request, metadata=metadata_pairs, timeout=_stream_seconds(mode, stream))
        )

    async def continue_(
        self,
        context: CallContext,
        target: ServerTarget,
        run_id: str,
        *,
        input: str,
        mode: "pb.RunMode.ValueType",
        metadata: bytes | None,
        stream: rpc.StreamOptions,
    ) -> UpdateStream:
        """Open the next turn of a run."""
        request = rpc.ContinueRunRequest(
            server=_reference(target),
            run_id=run_id,
            input=input,
            mode=mode,
            metadata_json=metadata or b"",
            stream=stream,
        )
        metadata_pairs = await self._prepare(context)
        return UpdateStream(
            self._stub.ContinueRun(request, metadata=metadata_pairs, timeout=_stream_seconds(mode, stream))
        )

    async def watch(self, context: CallContext, target: ServerTarget, run_id: str, after: int) -> UpdateStream:
        """Follow a run from behind sequence `after`, deltas included."""
        request = rpc.WatchRunRequest(
            server=_reference(target),
            run_id=run_id,
            after_sequence=after,
            stream=rpc.StreamOptions(deltas=True),
        )
        return UpdateStream(self._stub.WatchRun(request, metadata=await self._prepare(context)))

    async def get(self, context: CallContext, target: ServerTarget, run_id: str) -> rpc.GetRunResponse:
        """Return one run."""
        request = rpc.GetRunRequest(server=_reference(target), run_id=run_id)
        metadata = await self._prepare(context)
        return await self._stub.GetRun(request, metadata=metadata, timeout=_UNARY_SECONDS)

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
        request = rpc.ListRunsRequest(server=_reference(target), page_size=limit, page_token=page_token, status=status)
        metadata = await self._prepare(context)
        return await self._stub.ListRuns(request, metadata=metadata, timeout=_UNARY_SECONDS)

    async def list_events(
        self,
        context: CallContext,
        target: ServerTarget,
        run_id: str,
        *,
        after: int,
        limit: int,
        wait_seconds: float = 0,
    ) -> rpc.ListRunEventsResponse:
        """Return a page of a run's log: at most 1,000 events, and `limit`, unless that is 0."""
        request = rpc.ListRunEventsRequest(
            server=_reference(target),
            run_id=run_id,
            after_sequence=after,
            page_size=min(limit, 1_000),
            wait_ms=int(wait_seconds * 1000),
        )
        metadata = await self._prepare(context)
        return await self._stub.ListRunEvents(request, metadata=metadata, timeout=_UNARY_SECONDS + wait_seconds)

    async def cancel(self, context: CallContext, target: ServerTarget, run_id: str) -> rpc.CancelRunResponse:
        """Cancel a run."""
        request = rpc.CancelRunRequest(server=_reference(target), run_id=run_id)
        metadata = await self._prepare(context)
        return await self._stub.CancelRun(request, metadata=metadata, timeout=_UNARY_SECONDS)

    async def _prepare(self, context: CallContext) -> tuple[tuple[str, str], ...]:
        """Wait, for a restart's window, until calls can be made; return the metadata of the call.

        Raises ApiError 503 RUNTIME_UNAVAILABLE.
        """
        if self._channel.get_state(try_to_connect=True) is not grpc.ChannelConnectivity.READY:
            try:
                async with asyncio.timeout(self._connect_seconds):
                    await self._channel.channel_ready()
            except TimeoutError:
                raise ApiError(
                    503,
                    "RUNTIME_UNAVAILABLE",
                    "The runtime service cannot be reached; nothing was changed. Try again in a moment.",
                    headers={"Retry-After": "1"},
                ) from None
        pairs = (
            self._authorization,
            ("x-acp-organization", context.organization),
            ("x-acp-subject", context.subject),
            ("x-request-id", context.request_id),
        )
        return pairs if context.traceparent is None else (*pairs, ("traceparent", context.traceparent))


def _reference(target: ServerTarget) -> rpc.ServerReference:
    return rpc.ServerReference(id=target.id, connected=target.connected)


def _stream_seconds(mode: "pb.RunMode.ValueType", stream: rpc.StreamOptions) -> float | None:
    """Return the deadline of a call that opens a turn: none for one that is followed live to its end."""
    if mode == pb.RUN_MODE_ASYNC:
        return _UNARY_SECONDS
    return stream.wait_ms / 1000 + _MARGIN_SECONDS if stream.wait_ms else None
