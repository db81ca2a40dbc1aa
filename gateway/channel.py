"""A gRPC channel to one replica: the only user of the stubs, and what is asked of the connection.

Knows nothing of what is said through it.
"""

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.health import HealthStream
from gateway.session import Stream
from protos.acp.runs.v1 import run_service_pb2_grpc

MAX_MESSAGE_BYTES = 8 << 20
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # What may be asked again is known here, not to gRPC; its retry buffers cost each call and each idle stream.
    ("grpc.enable_retries", 0),
    # A session is always read; what a call may fill is bounded by its own window.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1 << 20),
    # A peer that swallows everything without closing is found within 20 seconds.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


class Channel:
    """A connection to the replica at `address`, made when it is needed; `authority` is by which name it was found."""

    def __init__(self, address: str, authority: str, service_token: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=(*_OPTIONS, ("grpc.default_authority", authority)))
        self._metadata = (("authorization", f"Bearer {service_token}"),)
        self._runs = run_service_pb2_grpc.RunServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def open_session(self) -> Stream:
        """Open `RunService.Session`, once the replica can be reached."""
        return self._runs.Session(metadata=self._metadata, wait_for_ready=True)

    def watch_health(self) -> HealthStream:
        """Open `Health.Watch` of the replica as a whole, once it can be reached."""
        watch = self._health.Watch  # type: ignore[attr-defined]  # the stubs know no aio stub
        stream: HealthStream = watch(health_pb2.HealthCheckRequest(), wait_for_ready=True)
        return stream

    async def close(self) -> None:
        """Close the connection, and whatever is open on it."""
        await self._channel.close()
