"""The runtime service from its start to its stop, as callers of either door see it."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from protos.acp.runs.v1 import run_pb2 as pb
from protos.acp.runs.v1 import run_service_pb2 as rpc
from runtime_service.config import SettingError
from runtime_service.errors import StoreUnavailable
from runtime_service.executor import ExecutorLimits
from runtime_service.server import RuntimeServer
from runtime_service.store.base import ATTEMPT_BEGINS
from runtime_service.store.sqlite import SQLiteStore
from tests.integration.doors import (
    METADATA,
    ONE_DOOR,
    SERVICE,
    WITH_TOKEN,
    Client,
    Service,
    contents_of,
    gate,
    in_loop,
    reference,
    reflection_stub,
    refusal,
    start_request,
    watch_request,
)


def test_health_is_serving_until_the_stop(service: Service) -> None:
    """For the whole and for the service by name; a watcher sees NOT_SERVING while running turns may still end."""

    async def main() -> None:
        server = await service.serve(drain_seconds=60)
        async with service.connect(server) as client:
            health: Any = health_pb2_grpc.HealthStub(client.channel)
            serving = health_pb2.HealthCheckResponse.SERVING
            for name in ("", SERVICE):
                assert (await health.Check(health_pb2.HealthCheckRequest(service=name))).status == serving
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await health.Check(health_pb2.HealthCheckRequest(service="none"))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            run = await client.start("hi", "gated")
            watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            assert (await watch.read()).status == serving
            stopping = asyncio.ensure_future(server.__aexit__(None, None, None))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()
            # The drain waits for the run: until then the service answers, but takes no work.
            found = await refusal(client.call("StartRun", start_request()))
            assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
            assert found.retry_seconds
            assert (await client.get(run)).status == pb.RUN_STATUS_RUNNING
            gate[-1].set()
            await stopping
        async with service.open() as client:
            assert (await client.get(run)).output == "re: hi"

    in_loop(main())


def test_stop_tells_followers_that_it_is_draining(service: Service) -> None:
    """UNAVAILABLE with a time to try again, in the middle of a stream; what they had is a sequence to go on from."""

    async def main() -> None:
        server = await service.serve()
        async with service.connect(server) as client:
            run = await client.start("hi", "gated")
            await client.until_said(run, 2)
            calls = [
                client.call("WatchRun", watch_request(run)),
                client.call("StartRun", start_request("other", "gated", stream={"collect": True})),
            ]
            endings = [asyncio.ensure_future(refusal(call)) for call in calls]
            listing = rpc.ListRunsRequest(server=reference("gated"))
            while len((await client.call("ListRuns", listing)).runs) < 2:
                pass
            await server.__aexit__(None, None, None)
            for ending in endings:
                found = await ending
                assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
                assert found.retry_seconds
        gate[-1].set()
        async with service.open() as client:
            rest = await client.watch(run, after_sequence=2)
            assert contents_of(rest) == ["half", ATTEMPT_BEGINS.format(attempt=1), "one", "re: hi"]

    in_loop(main())


@ONE_DOOR
def test_reflection_lists_the_services(service: Service) -> None:
    """For callers that carry the token."""

    async def check(client: Client) -> None:
        call = reflection_stub(client.channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=WITH_TOKEN
        )
        names = [s.name async for answer in call for s in answer.list_services_response.service]
        assert sorted(names) == [SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"]

    service.run(check)


def test_restart_executes_what_was_accepted(service: Service) -> None:
    """Queued turns and those that ran; the caller finds them by the ids that it has."""

    async def main() -> None:
        limits = ExecutorLimits(max_turns=1, cancel_grace_seconds=0.05)
        async with service.open(executor=limits) as client:
            done = (await client.updates("StartRun", start_request("done")))[-1].run
            runs = [await client.start(str(n), "gated", metadata_json=METADATA) for n in range(3)]
            await client.until_said(runs[0], 2)
        gate[-1] = asyncio.Event()
        gate[-1].set()
        async with service.open(executor=limits) as client:
            for n, run in enumerate(runs):
                updates = await client.watch(run)
                last = updates[-1].run
                assert (last.status, last.output) == (pb.RUN_STATUS_COMPLETED, f"re: {n}")
                assert last.metadata_json == METADATA
            assert await client.get(done) == done

    in_loop(main())


@ONE_DOOR
def test_second_service_over_the_same_data_is_refused(service: Service) -> None:
    """And the first goes on; nor does a failed start keep the data from the next."""

    async def main() -> None:
        async with service.open() as client:
            with pytest.raises(StoreUnavailable, match="in use by another runtime service"):
                await RuntimeServer(service.config).__aenter__()
            await client.updates("StartRun", start_request())
        async with service.open() as client:
            listed = await client.call("ListRuns", rpc.ListRunsRequest(server=reference("echo")))
            assert len(listed.runs) == 1

    in_loop(main())


@ONE_DOOR
def test_port_that_is_taken_is_told_as_a_setting(service: Service, tmp_path: Path) -> None:
    """The message names the option; the data directory is free again."""

    async def main() -> None:
        async with RuntimeServer(service.config) as first:
            other = msgspec.structs.replace(
                service.config, data_dir=tmp_path / "other", listen=f"127.0.0.1:{first.port}"
            )
            with pytest.raises(SettingError, match=f"--listen 127.0.0.1:{first.port}"):
                await RuntimeServer(other).__aenter__()
            async with RuntimeServer(msgspec.structs.replace(other, listen="127.0.0.1:0")):
                pass

    in_loop(main())


@ONE_DOOR
def test_store_failing_at_the_start_leaves_nothing_held(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that fails after the store was opened closes it: the next one is not refused."""

    async def broken(*_: object) -> object:
        raise StoreUnavailable("no")

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(SQLiteStore, "recover", broken)
            with pytest.raises(StoreUnavailable, match="no"):
                await RuntimeServer(service.config).__aenter__()
        async with service.open() as client:
            await client.updates("StartRun", start_request())

    in_loop(main())
