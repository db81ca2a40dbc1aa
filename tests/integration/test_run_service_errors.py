"""The errors of RunService, the same through both doors."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message as ProtobufMessage
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from protos.acp.runs.v1 import run_pb2 as pb
from protos.acp.runs.v1 import run_service_pb2 as rpc
from protos.acp.runs.v1 import run_service_pb2_grpc
from runtime_service.executor import ExecutorLimits
from runtime_service.store.sqlite import SQLiteStore
from runtime_service.validation import RequestLimits
from tests.integration.doors import (
    METHODS,
    ONE_DOOR,
    SECRET,
    SERVICE,
    TOKEN,
    WITH_TOKEN,
    Client,
    Service,
    continue_request,
    end_of,
    gate,
    reference,
    reflection_stub,
    refusal,
    requests_of,
    start_request,
    watch_request,
)
from tests.support import LIMIT_SECONDS, Disk


def test_every_method_of_the_service_is_tested() -> None:
    """The tables below leave none out."""
    descriptor = rpc.DESCRIPTOR.services_by_name["RunService"]
    assert sorted(method.name for method in descriptor.methods) == sorted([*METHODS, "Session"])


def test_another_organization_is_told_not_found_by_every_method(service: Service) -> None:
    """In the words that it gets for a server and a run that do not exist; and nothing has changed."""

    async def check(client: Client) -> None:
        run = (await client.updates("StartRun", start_request()))[-1].run
        stranger = client.as_caller("other")
        for method in METHODS:
            foreign = await refusal(stranger.call(method, requests_of(reference("echo"), run.id)[method]))
            missing = await refusal(stranger.call(method, requests_of(reference("none"), run.id)[method]))
            assert (foreign.code, foreign.reason) == (grpc.StatusCode.NOT_FOUND, "SERVER_NOT_FOUND")
            assert foreign.message == missing.message.replace("none", "echo")
        for method in METHODS:
            if method in ("StartRun", "ListRuns"):
                continue
            # On a server of its own, a run of another's is as one that there is not.
            foreign = await refusal(stranger.call(method, requests_of(reference("theirs"), run.id)[method]))
            missing = await refusal(stranger.call(method, requests_of(reference("theirs"), "run_none")[method]))
            assert (foreign.code, foreign.reason) == (grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND")
            assert foreign.message == missing.message.replace("run_none", run.id)
        assert await client.get(run) == run

    service.run(check)


@ONE_DOOR
@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN + "x", TOKEN[:-1], "é"])
def test_call_without_the_token_is_unauthenticated(service: Service, token: str | None) -> None:
    """Every method and `Session`, before anything else is looked at; reflection, too."""

    async def check(client: Client) -> None:
        metadata: tuple[tuple[str, str | bytes], ...] = (("x-acp-organization", "default"),)
        if token == "é":
            metadata += (("authorization", "Basic " + TOKEN),)
        elif token is not None:
            metadata += (("authorization", f"Bearer {token}"),)
        stub: Any = run_service_pb2_grpc.RunServiceStub(client.channel)
        known, unknown = requests_of(reference("echo"), "run_1"), requests_of(reference(""), "")
        for method in (*METHODS, "Session"):
            requests = [iter(())] if method == "Session" else [known[method], unknown[method]]
            for request in requests:
                found = await refusal(getattr(stub, method)(request, metadata=metadata, timeout=LIMIT_SECONDS))
                assert (found.code, found.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
                assert TOKEN not in found.message
        code = grpc.StatusCode.INTERNAL
        while code is grpc.StatusCode.INTERNAL:
            # The refusal can overtake the request, which the client is still sending; gRPC then tells that instead.
            call = reflection_stub(client.channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]),
                metadata=metadata,
                timeout=LIMIT_SECONDS,
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await end_of(call)
            code = caught.value.code()
        assert code is grpc.StatusCode.UNAUTHENTICATED
        health: Any = health_pb2_grpc.HealthStub(client.channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(), metadata=metadata, timeout=LIMIT_SECONDS)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING

    service.run(check)


INVALID: list[tuple[str, ProtobufMessage, str]] = [
    ("StartRun", start_request(""), "input"),
    ("StartRun", start_request(" \n\t "), "input"),
    ("StartRun", start_request("a\0b"), "input"),
    ("StartRun", start_request("x" * 65), "input"),
    ("StartRun", start_request("é" * 33), "input"),
    ("StartRun", start_request(title="x" * 9), "title"),
    ("StartRun", start_request(title="\0"), "title"),
    ("StartRun", start_request(metadata_json=b"[]"), "metadata_json"),
    ("StartRun", start_request(metadata_json=b"null"), "metadata_json"),
    ("StartRun", start_request(metadata_json=b"{"), "metadata_json"),
    ("StartRun", start_request(metadata_json=b'{"a":NaN}'), "metadata_json"),
    ("StartRun", start_request(metadata_json=b'{"a":"\xff"}'), "metadata_json"),
    ("StartRun", start_request(metadata_json=b'{"a":"' + b"x" * 60 + b'"}'), "metadata_json"),
    ("StartRun", start_request(stream={"wait_ms": -1}), "stream.wait_ms"),
    ("StartRun", start_request(mode=pb.RUN_MODE_ASYNC, stream={"wait_ms": -1}), "stream.wait_ms"),
    ("ListRuns", rpc.ListRunsRequest(server=reference("echo"), page_size=-1), "page_size"),
    ("ListRuns", rpc.ListRunsRequest(server=reference("echo"), page_token="x"), "page_token"),
]
OF_A_RUN: list[tuple[str, Callable[[pb.Run], ProtobufMessage], str]] = [
    ("ContinueRun", lambda run: continue_request(run, ""), "input"),
    ("ContinueRun", lambda run: continue_request(run, metadata_json=b"7"), "metadata_json"),
    ("ContinueRun", lambda run: continue_request(run, stream={"wait_ms": -1}), "stream.wait_ms"),
    ("WatchRun", lambda run: watch_request(run, after_sequence=-1), "after_sequence"),
    ("WatchRun", lambda run: watch_request(run, turn=-1), "turn"),
    ("WatchRun", lambda run: watch_request(run, turn=2), "turn"),
    ("WatchRun", lambda run: watch_request(run, stream={"wait_ms": -1}), "stream.wait_ms"),
    ("ListRunEvents", lambda run: _events_request(run, after_sequence=-1), "after_sequence"),
    ("ListRunEvents", lambda run: _events_request(run, page_size=-1), "page_size"),
    ("ListRunEvents", lambda run: _events_request(run, wait_ms=-1), "wait_ms"),
]


def _events_request(run: pb.Run, **fields: Any) -> rpc.ListRunEventsRequest:
    return rpc.ListRunEventsRequest(server=reference(run.server_id), run_id=run.id, **fields)


def test_invalid_arguments_name_their_field_and_store_nothing(service: Service) -> None:
    """INVALID_ARGUMENT with the one field that is wrong; nothing is stored, and the next call is served."""
    requests = RequestLimits(title_characters=8, metadata_bytes=64, input_bytes=64)

    async def check(client: Client) -> None:
        run = (await client.updates("StartRun", start_request()))[-1].run
        table = [*INVALID, *((method, make(run), field) for method, make, field in OF_A_RUN)]
        for method, request, field in table:
            found = await refusal(client.call(method, request))
            assert (method, found.code, found.reason, found.field) == (
                method,
                grpc.StatusCode.INVALID_ARGUMENT,
                "VALIDATION_FAILED",
                field,
            ), request
        without = client.as_caller(None)
        for method in METHODS:
            found = await refusal(without.call(method, requests_of(reference("echo"), run.id)[method]))
            assert found.field == client.organization_field
        listed = await client.call("ListRuns", rpc.ListRunsRequest(server=reference("echo")))
        assert list(listed.runs) == [run]

    service.run(check, requests=requests)


def test_full_queue_is_resource_exhausted(service: Service) -> None:
    """CAPACITY_EXCEEDED with a time to try again; served once there is room."""

    async def check(client: Client) -> None:
        run = await client.start("hi", "gated")
        queued = await client.start("queued", "echo")
        for method in ("StartRun", "ContinueRun"):
            found = await refusal(client.call(method, requests_of(reference("gated"), run.id)[method]))
            assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CAPACITY_EXCEEDED")
            assert found.retry_seconds
        gate[-1].set()
        await client.watch(queued)
        await client.updates("StartRun", start_request())

    service.run(check, executor=ExecutorLimits(max_turns=1, max_queued=1, cancel_grace_seconds=0.05))


def test_agent_that_is_not_there_is_unavailable(service: Service) -> None:
    """AGENT_UNAVAILABLE says what is missing; reads of the server work."""

    async def check(client: Client) -> None:
        found = await refusal(client.call("StartRun", start_request("hi", "absent")))
        assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "AGENT_UNAVAILABLE")
        assert "no-such-file.gguf" in found.message or "Install it with" in found.message
        listed = await client.call("ListRuns", rpc.ListRunsRequest(server=reference("absent")))
        assert len(listed.runs) == 0

    service.run(check)


def test_store_that_takes_no_writes_is_unavailable(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """STORE_UNAVAILABLE with a time to try again; reads go on, and the next start works."""
    disk = Disk(monkeypatch)

    async def check(client: Client) -> None:
        run = (await client.updates("StartRun", start_request()))[-1].run
        disk.refuse = 1_000
        for method in ("StartRun", "ContinueRun"):
            found = await refusal(client.call(method, requests_of(reference("echo"), run.id)[method]))
            assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
            assert found.retry_seconds
        assert await client.get(run) == run
        disk.refuse = 0
        await client.updates("StartRun", start_request())

    service.run(check)


def test_unexpected_exception_is_an_opaque_internal(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of what it says reaches the caller, from a unary call nor from a stream; the next call is served."""

    async def broken(*_: object) -> object:
        raise ValueError(SECRET)

    async def check(client: Client) -> None:
        run = (await client.updates("StartRun", start_request()))[-1].run
        with monkeypatch.context() as patch:
            patch.setattr(SQLiteStore, "get_run", broken)
            for method in ("GetRun", "WatchRun"):
                found = await refusal(client.call(method, requests_of(reference("echo"), run.id)[method]))
                assert (found.code, found.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
                assert SECRET not in str(found)
                assert "ValueError" not in str(found)
        assert await client.get(run) == run

    service.run(check)


@ONE_DOOR
def test_unknown_method_is_unimplemented(service: Service) -> None:
    """As gRPC has it."""

    async def check(client: Client) -> None:
        method: Any = client.channel.unary_unary(f"/{SERVICE}/Nothing")
        call = method(b"", metadata=WITH_TOKEN)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    service.run(check)
