"""Composition of the runtime service: store, executor, servicer, health, reflection, and their lives."""

import asyncio
from types import TracebackType

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from protos.acp.runs.v1 import run_service_pb2, run_service_pb2_grpc
from runtime_service.config import RuntimeConfig, SettingError
from runtime_service.event_log import EventLog
from runtime_service.executor import Executor
from runtime_service.operations import Operations
from runtime_service.peers import Peers
from runtime_service.registry import Registry, load_registry
from runtime_service.retention import Retention
from runtime_service.rpc_errors import ErrorInterceptor
from runtime_service.service import RunService
from runtime_service.session import Sessions
from runtime_service.store.base import RunStore
from runtime_service.store.opening import open_store

_READINESS_SECONDS = 0.25

SERVICE = run_service_pb2.DESCRIPTOR.services_by_name["RunService"].full_name
MAX_MESSAGE_BYTES = 8 << 20
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)


class RuntimeServer:
    """The runtime service, from its open store to its closed one; an async context manager.

    `port` is the one bound. Raises StoreUnavailable, ConfigurationError or SettingError when it cannot start.
    """

    def __init__(self, config: RuntimeConfig) -> None:
        self._config = config
        self._serving = False
        self.port = 0

    async def __aenter__(self) -> "RuntimeServer":
        config = self._config
        self._registry: Registry = load_registry(config.servers)
        self._server = grpc.aio.server(interceptors=(ErrorInterceptor(config.service_token),), options=_OPTIONS)
        self.port = self._bind(config.listen)
        address = config.address(self.port)
        self._store: RunStore = await open_store(
            config.store, config.store_path, address=address, lease_seconds=config.lease_seconds
        )
        self._peers = Peers(address, config.service_token, _OPTIONS)
        self._event_log = EventLog(self._store, self._peers)
        self._executor = Executor(self._store, self._event_log, self._registry, config.executor)
        self._retention = Retention(self._store, config.retention)
        self._health = health.aio.HealthServicer()
        operations = Operations(
            self._store, self._executor, self._event_log, self._registry, self._peers, config.requests
        )
        self._sessions = Sessions(operations, config.sessions, MAX_MESSAGE_BYTES)
        run_service_pb2_grpc.add_RunServiceServicer_to_server(RunService(operations, self._sessions), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        try:
            await self._executor.start()
            await self._server.start()
        except BaseException:
            await self._store.close()
            raise
        self._retention.start()
        await self._set_health(self._store.is_available)
        self._readiness = asyncio.create_task(self._tell_readiness())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Readiness first, then no new work, then what runs, then who follows.
        self._readiness.cancel()
        await self._health.enter_graceful_shutdown()
        await self._retention.stop()
        await self._executor.drain(self._config.drain_seconds)
        self._event_log.close()
        self._sessions.close()
        await self._server.stop(grace=1.0)
        await self._peers.close()
        await self._registry.close()
        await self._store.close()

    def _bind(self, listen: str) -> int:
        try:
            return self._server.add_insecure_port(listen)
        except RuntimeError as error:
            raise SettingError(f"--listen {listen}: the address cannot be bound; is it in use?") from error

    async def _tell_readiness(self) -> None:
        """Say SERVING while the store can be used, else NOT_SERVING."""
        while True:
            await asyncio.sleep(_READINESS_SECONDS)
            await self._set_health(self._store.is_available)

    async def _set_health(self, serving: bool) -> None:
        if serving is not self._serving:
            self._serving = serving
            status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
            await asyncio.gather(*(self._health.set(name, status) for name in ("", SERVICE)))
