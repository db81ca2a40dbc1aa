"""RunService over a real gRPC channel, against the whole runtime service as it is composed for production."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
import uvloop
from google.protobuf.message import Message as ProtobufMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.acp.runs.v1 import run_pb2 as pb
from protos.acp.runs.v1 import run_service_pb2 as rpc
from protos.acp.runs.v1 import run_service_pb2_grpc
from runtime_service.agents import AgentError, AgentOutput, Delta, Message, TurnContext
from runtime_service.config import RuntimeConfig, SettingError
from runtime_service.errors import StoreUnavailable
from runtime_service.executor import ExecutorLimits
from runtime_service.runs import Run, RunStatus
from runtime_service.server import RuntimeServer
from runtime_service.store.sqlite import SQLiteStore
from runtime_service.validation import RequestLimits
from tests.support import LIMIT_SECONDS, Disk, run_async

TOKEN = "a-service-token-of-the-tests"
SECRET = "password=hunter2"
SERVICE = "acp.runs.v1.RunService"
METADATA = b' {"n": 12345678901234567890123, "b":null, "a": {} }\n'

SERVERS = """
[servers.echo]
kind = "agent_runtime"
agent = "echo"

[servers.storefront]
kind = "web_app"
agent_runtime = "echo"

[servers.gated]
kind = "agent_runtime"
agent = "python"
options = { entrypoint = "tests.integration.test_run_service:gated" }

[servers.failing]
kind = "agent_runtime"
agent = "python"
options = { entrypoint = "tests.integration.test_run_service:failing" }

[servers.absent]
kind = "agent_runtime"
agent = "local"
options = { model_path = "no-such-file.gguf" }

[servers.theirs]
kind = "agent_runtime"
agent = "echo"
organization = "other"
"""

gate: list[asyncio.Event] = []


async def gated(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
    """Say a message and half of another, then wait for the test."""
    yield Message("one", {"tokens": 3})
    yield Delta("ha")
    yield Delta("lf")
    await gate[-1].wait()
    yield Message(f"re: {turn.input}")


async def failing(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
    """Fail as the input says."""
    yield Message("so far")
    if turn.input == "AgentError":
        raise AgentError("The model is away; try again.", "MODEL_AWAY")
    raise RuntimeError(SECRET)


@pytest.fixture(autouse=True)
def closed_gate() -> None:
    """Each test has a gate of its own, closed."""
    gate[:] = [asyncio.Event()]


class Client:
    """A caller of one organization."""

    def __init__(self, channel: grpc.aio.Channel, organization: str | None = "default", token: str | None = TOKEN):
        self.channel = channel
        self.stub: Any = run_service_pb2_grpc.RunServiceStub(channel)
        metadata = []
        if token is not None:
            metadata.append(("authorization", f"Bearer {token}"))
        if organization is not None:
            metadata.append(("x-acp-organization", organization))
        self.metadata = tuple(metadata)

    def as_caller(self, organization: str | None = "default", token: str | None = TOKEN) -> "Client":
        """Another caller over the same channel."""
        return Client(self.channel, organization, token)

    def call(self, method: str, request: ProtobufMessage) -> Any:
        """Call a method; what it returns is a call to be awaited or iterated over."""
        return getattr(self.stub, method)(request, metadata=self.metadata, timeout=LIMIT_SECONDS)

    async def updates(self, method: str, request: ProtobufMessage) -> list[rpc.RunUpdate]:
        """All updates of a stream, to its end."""
        return [response.update async for response in self.call(method, request)]

    async def start(self, text: str = "hello world", server: str = "echo", **fields: Any) -> pb.Run:
        """Start a run in mode async."""
        fields.setdefault("mode", pb.RUN_MODE_ASYNC)
        updates = await self.updates("StartRun", start_request(text, server, **fields))
        return updates[-1].run

    async def get(self, run: pb.Run) -> pb.Run:
        """Read a run."""
        request = rpc.GetRunRequest(server=reference(run.server_id), run_id=run.id)
        response: rpc.GetRunResponse = await self.call("GetRun", request)
        return response.run

    async def events(self, run: pb.Run, **fields: Any) -> rpc.ListRunEventsResponse:
        """Read a page of a run's log."""
        request = rpc.ListRunEventsRequest(server=reference(run.server_id), run_id=run.id, **fields)
        response: rpc.ListRunEventsResponse = await self.call("ListRunEvents", request)
        return response

    async def watch(self, run: pb.Run, **fields: Any) -> list[rpc.RunUpdate]:
        """Follow a run to its end."""
        return await self.updates("WatchRun", watch_request(run, **fields))

    async def cancel(self, run: pb.Run) -> rpc.CancelRunResponse:
        """Cancel a run."""
        request = rpc.CancelRunRequest(server=reference(run.server_id), run_id=run.id)
        response: rpc.CancelRunResponse = await self.call("CancelRun", request)
        return response

    async def until_said(self, run: pb.Run, last_sequence: int) -> None:
        """Return once the log is that long."""
        after = 0
        while after < last_sequence:
            page = await self.events(run, after_sequence=after, wait_ms=1_000)
            after = page.events[-1].sequence if page.events else after


def reference(server: str, *, connected: bool = False) -> rpc.ServerReference:
    """Name a server."""
    return rpc.ServerReference(id=server, connected=connected)


def start_request(text: str = "hello world", server: str = "echo", **fields: Any) -> rpc.StartRunRequest:
    """Ask for a run."""
    return rpc.StartRunRequest(server=reference(server), input=text, **fields)


def continue_request(run: pb.Run, text: str = "more", **fields: Any) -> rpc.ContinueRunRequest:
    """Ask for the next turn."""
    return rpc.ContinueRunRequest(server=reference(run.server_id), run_id=run.id, input=text, **fields)


def watch_request(run: pb.Run, **fields: Any) -> rpc.WatchRunRequest:
    """Ask for a run's updates."""
    return rpc.WatchRunRequest(server=reference(run.server_id), run_id=run.id, **fields)


def events_of(updates: list[rpc.RunUpdate]) -> list[pb.RunEvent]:
    """All events, in the order in which they came."""
    return [event for update in updates for event in update.events]


def contents_of(updates: list[rpc.RunUpdate]) -> list[str]:
    """What the events say."""
    return [event.content for event in events_of(updates)]


@dataclass
class Refusal:
    """What a caller learns of an error."""

    code: grpc.StatusCode
    reason: str
    message: str
    field: str | None = None
    retry_seconds: float | None = None


async def _end_of(call: Awaitable[object] | AsyncIterable[object]) -> None:
    if isinstance(call, AsyncIterable):
        async for _ in call:
            pass
    else:
        await call


async def refusal(call: Awaitable[object] | AsyncIterable[object]) -> Refusal:
    """Return the error of a call, which has exactly one ErrorInfo and says the same in each place."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _end_of(call)
    error = caught.value
    trailers = dict(error.trailing_metadata() or ())
    packed = trailers["grpc-status-details-bin"]
    assert isinstance(packed, bytes)
    status = status_pb2.Status.FromString(packed)
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    info = [
        error_details_pb2.ErrorInfo() for detail in status.details if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)
    ]
    assert len(info) == 1
    assert status.details[0].Unpack(info[0])
    assert info[0].domain == "acp.runs.v1"
    found = Refusal(error.code(), info[0].reason, status.message)
    for detail in status.details:
        bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(bad):
            (violation,) = bad.field_violations
            found.field = violation.field
            assert violation.description in found.message
        if detail.Unpack(retry):
            found.retry_seconds = retry.retry_delay.ToMilliseconds() / 1000
    assert (found.field is not None) == (found.code is grpc.StatusCode.INVALID_ARGUMENT)
    return found


class Service:
    """Where the runtime service of a test has its data; it can be run again over the same."""

    def __init__(self, folder: Path) -> None:
        (folder / "servers.toml").write_text(SERVERS)
        self.config = RuntimeConfig(
            data_dir=folder / "data",
            service_token=TOKEN,
            listen="127.0.0.1:0",
            servers=folder / "servers.toml",
            drain_seconds=0,
            executor=ExecutorLimits(cancel_grace_seconds=0.05),
        )

    @asynccontextmanager
    async def open(self, **settings: Any) -> AsyncIterator[Client]:
        """The running service, and a caller."""
        server = await self.serve(**settings)
        try:
            async with self.connect(server) as client:
                yield client
        finally:
            await server.__aexit__(None, None, None)

    async def serve(self, **settings: Any) -> RuntimeServer:
        """The running service, to be stopped by the test."""
        return await RuntimeServer(msgspec.structs.replace(self.config, **settings)).__aenter__()

    @asynccontextmanager
    async def connect(self, server: RuntimeServer) -> AsyncIterator[Client]:
        """A caller."""
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield Client(channel)

    def run(self, check: Callable[[Client], Coroutine[Any, Any, None]], **settings: Any) -> None:
        """Run `check` against the running service."""

        async def main() -> None:
            async with self.open(**settings) as client:
                await check(client)

        in_loop(main())


def in_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run it in the loop that the service has in production."""
    run_async(main, loop_factory=uvloop.new_event_loop)


@pytest.fixture
def service(tmp_path: Path) -> Service:
    """A runtime service without any run."""
    return Service(tmp_path)


# StartRun and ContinueRun


def test_start_in_mode_sync_follows_to_the_end(service: Service) -> None:
    """The first update shows the accepted run, the last the outcome; every event comes once."""

    async def check(client: Client) -> None:
        request = start_request("hello world", title="A title", metadata_json=METADATA)
        updates = await client.updates("StartRun", request)
        run, thread = updates[-1].run, updates[-1].thread
        assert re.fullmatch(r"run_[0-9a-f]{32}", run.id)
        assert run.thread_id == thread.id == "thread_" + run.id[4:]
        assert (run.server_id, run.title, run.input, run.output) == ("echo", "A title", "hello world", "hello world")
        assert (run.status, run.mode, run.turn) == (pb.RUN_STATUS_COMPLETED, pb.RUN_MODE_SYNC, 1)
        assert (run.error, run.error_code, run.session_protocol) == ("", "", "in-process")
        assert (run.metadata_json, thread.metadata_json) == (METADATA, METADATA)
        assert (run.last_sequence, run.turn_first_sequence, thread.message_count) == (2, 1, 2)
        assert thread.status == pb.THREAD_STATUS_COMPLETED
        assert run.created_at_unix_ms <= run.completed_at_unix_ms <= thread.updated_at_unix_ms
        assert all(update.run.id == run.id for update in updates if update.HasField("run"))
        assert updates[0].HasField("run")
        user, assistant = events_of(updates)
        assert (user.sequence, user.role, user.content) == (1, pb.EVENT_ROLE_USER, "hello world")
        assert (assistant.sequence, assistant.role, assistant.turn) == (2, pb.EVENT_ROLE_ASSISTANT, 1)
        assert (user.metadata_json, assistant.metadata_json) == (METADATA, b"")
        assert [event.id for event in (user, assistant)] == [f"event_{run.id[4:]}_{n}" for n in (1, 2)]
        assert (await client.get(run)) == run

    service.run(check)


def test_start_in_mode_async_ends_with_the_accepted_run(service: Service) -> None:
    """One message, with the user's event; the run goes on by itself."""

    async def check(client: Client) -> None:
        request = start_request("hi", "gated", mode=pb.RUN_MODE_ASYNC, stream={"wait_ms": 3_600_000})
        (update,) = await client.updates("StartRun", request)
        assert update.run.status in (pb.RUN_STATUS_QUEUED, pb.RUN_STATUS_RUNNING)
        assert (update.run.mode, update.run.completed_at_unix_ms) == (pb.RUN_MODE_ASYNC, 0)
        assert [event.content for event in update.events] == ["hi"]
        gate[-1].set()
        updates = await client.watch(update.run, after_sequence=1)
        assert contents_of(updates) == ["one", "re: hi"]
        assert updates[-1].run.output == "re: hi"

    service.run(check)


def test_collect_sends_one_message(service: Service) -> None:
    """With the run as it is at the end and its turn's events; no deltas, although asked for."""

    async def check(client: Client) -> None:
        (update,) = await client.updates("StartRun", start_request(stream={"collect": True, "deltas": True}))
        assert update.run.status == pb.RUN_STATUS_COMPLETED
        assert [event.sequence for event in update.events] == [1, 2]
        request = continue_request(update.run, "again", stream={"collect": True})
        (update,) = await client.updates("ContinueRun", request)
        assert (update.run.turn, update.run.turn_first_sequence, update.run.last_sequence) == (2, 3, 4)
        assert [(event.sequence, event.turn) for event in update.events] == [(3, 2), (4, 2)]

    service.run(check)


def test_deltas_come_only_to_who_asks(service: Service) -> None:
    """They add up to the text of the event that takes their place."""

    async def check(client: Client) -> None:
        text = "Grüß Gott, \U0001f600 wie geht's"
        updates = await client.updates("StartRun", start_request(text, stream={"deltas": True}))
        streamed = ""
        for update in updates:
            if update.HasField("delta"):
                assert (update.delta.sequence, update.delta.offset) == (2, len(streamed))
                streamed += update.delta.text
        assert text.startswith(streamed)
        assert contents_of(updates) == [text, text]
        plain = await client.updates("StartRun", start_request(text))
        assert not any(update.HasField("delta") for update in plain)

        run = await client.start("hi", "gated")
        await client.until_said(run, 2)
        call = client.call("WatchRun", watch_request(run, after_sequence=2, stream={"deltas": True}))
        async for response in call:
            if response.update.HasField("delta"):
                assert response.update.delta == rpc.ContentDelta(sequence=3, offset=0, text="half")
                break
        call.cancel()

    service.run(check)


def test_wait_ms_ends_a_stream_and_not_the_run(service: Service) -> None:
    """Of a start, a continue and a watch; the last update shows the run as it is then."""

    async def check(client: Client) -> None:
        updates = await client.updates("StartRun", start_request("hi", "gated", stream={"wait_ms": 50}))
        run = updates[-1].run
        assert run.status == pb.RUN_STATUS_RUNNING
        assert contents_of(updates) == ["hi", "one"]
        (update,) = await client.updates("ContinueRun", continue_request(run, stream={"wait_ms": 50, "collect": True}))
        assert (update.run.status, update.run.turn) == (pb.RUN_STATUS_QUEUED, 2)
        updates = await client.watch(run, after_sequence=3, stream={"wait_ms": 50})
        assert updates[-1].run.status == pb.RUN_STATUS_QUEUED
        gate[-1].set()
        updates = await client.watch(run)
        assert contents_of(updates) == ["hi", "one", "more", "re: hi", "one", "re: more"]

    service.run(check)


def test_continue_opens_a_turn_also_of_a_running_run(service: Service) -> None:
    """It waits its turn; the sequence has no gap; without metadata it keeps the run's."""

    async def check(client: Client) -> None:
        run = await client.start("first", "gated", metadata_json=METADATA)
        await client.until_said(run, 2)
        following = asyncio.ensure_future(client.updates("ContinueRun", continue_request(run, "second")))
        await client.until_said(run, 3)
        assert (await client.get(run)).status == pb.RUN_STATUS_QUEUED
        own = continue_request(run, "third", mode=pb.RUN_MODE_ASYNC, metadata_json=b"{}")
        (accepted,) = await client.updates("ContinueRun", own)
        assert (accepted.run.turn, accepted.run.status) == (3, pb.RUN_STATUS_QUEUED)
        gate[-1].set()
        updates = await following
        last = updates[-1].run
        assert (last.turn, last.status, last.output) == (2, pb.RUN_STATUS_COMPLETED, "re: second")
        assert last.metadata_json == METADATA
        whole = events_of(await client.watch(run))
        assert [event.sequence for event in whole] == list(range(1, 10))
        assert [event.content for event in whole if event.turn == 2] == ["second", "one", "re: second"]
        assert [event.metadata_json for event in whole][:2] == [METADATA, b'{"tokens":3}']
        assert (await client.get(run)).metadata_json == b"{}"

    service.run(check)


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("AgentError", "MODEL_AWAY", "The model is away; try again."),
        ("other", "AGENT_FAILED", "The agent raised RuntimeError"),
    ],
)
def test_agents_failure_is_no_error_of_the_call(service: Service, text: str, code: str, message: str) -> None:
    """The stream ends well with a failed run; no secret is in it."""

    async def check(client: Client) -> None:
        updates = await client.updates("StartRun", start_request(text, "failing"))
        run, thread = updates[-1].run, updates[-1].thread
        assert (run.status, thread.status) == (pb.RUN_STATUS_FAILED, pb.THREAD_STATUS_FAILED)
        assert run.error_code == code
        assert run.error.startswith(message)
        assert run.output == "so far"
        last = events_of(updates)[-1]
        assert (last.role, last.log_type) == (pb.EVENT_ROLE_EXECUTION_LOG, "error")
        assert last.log_level == pb.LOG_LEVEL_ERROR
        assert SECRET not in str(updates)

    service.run(check)


def test_caller_that_goes_away_cancels_nothing(service: Service) -> None:
    """The run of a call that was cancelled in the middle is executed to its end."""

    async def check(client: Client) -> None:
        call = client.call("StartRun", start_request("hi", "gated"))
        run = (await call.read()).update.run
        call.cancel()
        assert await call.code() is grpc.StatusCode.CANCELLED
        gate[-1].set()
        assert (await client.watch(run))[-1].run.output == "re: hi"

    service.run(check)


def test_connected_resource_names_its_agent_runtime(service: Service) -> None:
    """Runs belong to the runtime, whichever way they came."""

    async def check(client: Client) -> None:
        connected = reference("storefront", connected=True)
        request = rpc.StartRunRequest(server=connected, input="hi")
        run = (await client.updates("StartRun", request))[-1].run
        assert run.server_id == "echo"
        for server in (connected, reference("echo"), reference("echo", connected=True)):
            got = await client.call("GetRun", rpc.GetRunRequest(server=server, run_id=run.id))
            assert got.run == run
            listed = await client.call("ListRuns", rpc.ListRunsRequest(server=server))
            assert [each.id for each in listed.runs] == [run.id]
            assert listed.agent_runtime_id == "echo"
        bare = await refusal(client.call("GetRun", rpc.GetRunRequest(server=reference("storefront"), run_id=run.id)))
        assert (bare.code, bare.reason) == (grpc.StatusCode.NOT_FOUND, "SERVER_NOT_FOUND")
        assert "bound to 'echo'" in bare.message

    service.run(check)


# WatchRun and the reads


def test_watch_replays_then_follows_to_the_end_of_the_run(service: Service) -> None:
    """From any sequence; of a settled run it ends at once; of one turn, with that."""

    async def check(client: Client) -> None:
        run = await client.start("hi", "gated")
        await client.until_said(run, 2)
        (await client.updates("ContinueRun", continue_request(run, "second", mode=pb.RUN_MODE_ASYNC)))
        whole = asyncio.ensure_future(client.watch(run))
        first = asyncio.ensure_future(client.watch(run, turn=1))
        late = asyncio.ensure_future(client.watch(run, after_sequence=3))
        gate[-1].set()
        assert [event.sequence for event in events_of(await whole)] == [1, 2, 3, 4, 5, 6]
        assert [event.sequence for event in events_of(await late)] == [4, 5, 6]
        of_first = await first
        assert (of_first[-1].run.turn, of_first[-1].run.status) == (1, pb.RUN_STATUS_COMPLETED)
        (replayed,) = await client.watch(run)
        assert replayed.run == await client.get(run)
        (nothing,) = await client.watch(run, after_sequence=1_000)
        assert (len(nothing.events), nothing.run.status) == (0, pb.RUN_STATUS_COMPLETED)

    service.run(check)


def test_list_runs_pages_newest_first(service: Service) -> None:
    """Runs and their threads, by token and by status."""

    async def check(client: Client) -> None:
        runs = [await client.start(str(n)) for n in range(5)]
        for run in runs:
            await client.watch(run)
        seen: list[str] = []
        token = ""
        while True:
            request = rpc.ListRunsRequest(server=reference("echo"), page_size=2, page_token=token)
            page = await client.call("ListRuns", request)
            assert [thread.id for thread in page.threads] == [run.thread_id for run in page.runs]
            seen += [run.id for run in page.runs]
            token = page.next_page_token
            if not token:
                break
        assert seen == [run.id for run in runs][::-1]
        for status, count in ((pb.RUN_STATUS_COMPLETED, 5), (pb.RUN_STATUS_QUEUED, 0), (pb.RUN_STATUS_RUNNING, 0)):
            page = await client.call("ListRuns", rpc.ListRunsRequest(server=reference("echo"), status=status))
            assert len(page.runs) == count
        huge = await client.call("ListRuns", rpc.ListRunsRequest(server=reference("echo"), page_size=2**31 - 1))
        assert len(huge.runs) == 5

    service.run(check)


def test_list_run_events_pages_and_tells_whether_there_is_more(service: Service) -> None:
    """Oldest first; the run comes with each page."""

    async def check(client: Client) -> None:
        run = (await client.updates("StartRun", start_request()))[-1].run
        for n in range(3):
            await client.updates("ContinueRun", continue_request(run, str(n)))
        page = await client.events(run, page_size=3)
        assert [event.sequence for event in page.events] == [1, 2, 3]
        assert page.has_more
        assert page.run == await client.get(run)
        page = await client.events(run, page_size=5, after_sequence=3)
        assert [event.sequence for event in page.events] == [4, 5, 6, 7, 8]
        assert not page.has_more
        page = await client.events(run, after_sequence=8, wait_ms=3_600_000)
        assert (len(page.events), page.has_more) == (0, False)

    service.run(check)


def test_list_run_events_waits_for_the_next_one(service: Service) -> None:
    """As long as a turn is open and the wait lasts; an event that is there already is not waited for."""

    async def check(client: Client) -> None:
        run = await client.start("hi", "gated")
        await client.until_said(run, 2)
        page = await client.events(run, after_sequence=1, wait_ms=3_600_000)
        assert [event.content for event in page.events] == ["one"]
        page = await client.events(run, after_sequence=2, wait_ms=30)
        assert (len(page.events), page.run.status) == (0, pb.RUN_STATUS_RUNNING)
        waiting = asyncio.ensure_future(client.events(run, after_sequence=2, wait_ms=3_600_000))
        gate[-1].set()
        page = await waiting
        assert [event.content for event in page.events] == ["re: hi"]
        assert page.run.last_sequence >= 3

    service.run(check)


def test_page_of_events_does_not_run_ahead_of_its_run(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events that are stored between reading the run and reading its log are left to the next page."""
    get_run = SQLiteStore.get_run

    async def overtaken(store: SQLiteStore, *names: Any) -> Run:
        before = await get_run(store, *names)
        gate[-1].set()
        while (await get_run(store, *names)).status is RunStatus.RUNNING:  # noqa: ASYNC110 - told by nobody
            await asyncio.sleep(0)
        return before

    async def check(client: Client) -> None:
        run = await client.start("hi", "gated")
        await client.until_said(run, 2)
        with monkeypatch.context() as patch:
            patch.setattr(SQLiteStore, "get_run", overtaken)
            page = await client.events(run)
        assert (page.run.status, page.run.last_sequence, page.has_more) == (pb.RUN_STATUS_RUNNING, 2, False)
        assert [event.sequence for event in page.events] == [1, 2]
        page = await client.events(run, after_sequence=2)
        assert [event.sequence for event in page.events] == [3]

    service.run(check)


def test_pages_stay_within_the_size_of_a_message(service: Service) -> None:
    """Large events of many bytes a character are paged and streamed whole, within gRPC's default limits."""

    async def check(client: Client) -> None:
        text = "\U0001f600" * 200_000
        run = await client.start(text)
        await client.watch(run)
        for _ in range(4):
            await client.updates("ContinueRun", continue_request(run, text))
        sequences: list[int] = []
        while True:
            page = await client.events(run, after_sequence=sequences[-1] if sequences else 0)
            assert page.ByteSize() < 4 << 20
            sequences += [event.sequence for event in page.events]
            if not page.has_more:
                break
        assert sequences == list(range(1, 11))
        updates = await client.watch(run)
        assert contents_of(updates) == [text] * 10

    service.run(check)


# CancelRun


def test_cancel_settles_every_open_turn_and_is_idempotent(service: Service) -> None:
    """The answer shows what the cancel added; a second one adds nothing; followers see the end."""

    async def check(client: Client) -> None:
        run = await client.start("hi", "gated")
        await client.until_said(run, 2)
        await client.updates("ContinueRun", continue_request(run, "waits", mode=pb.RUN_MODE_ASYNC))
        watching = asyncio.ensure_future(client.watch(run))
        cancelled = await client.cancel(run)
        assert (cancelled.run.turn, cancelled.run.status) == (2, pb.RUN_STATUS_CANCELLED)
        assert cancelled.thread.status == pb.THREAD_STATUS_CANCELLED
        assert [(event.content, event.log_type) for event in cancelled.events] == [
            ("half", "incomplete"),
            ("The run was cancelled.", "cancelled"),
        ]
        again = await client.cancel(run)
        assert (again.run, len(again.events)) == (cancelled.run, 0)
        updates = await watching
        assert updates[-1].run == cancelled.run
        assert contents_of(updates) == ["hi", "one", "waits", "half", "The run was cancelled."]
        assert await client.get(run) == cancelled.run
        gate[-1].set()
        resumed = await client.updates("ContinueRun", continue_request(run, "third"))
        assert (resumed[-1].run.turn, resumed[-1].run.output) == (3, "re: third")

    service.run(check)


def test_cancel_of_a_completed_run_shows_its_outcome(service: Service) -> None:
    """Nothing changes."""

    async def check(client: Client) -> None:
        run = (await client.updates("StartRun", start_request()))[-1].run
        cancelled = await client.cancel(run)
        assert (cancelled.run, len(cancelled.events)) == (run, 0)

    service.run(check)


# Errors


def _reflection(client: Client) -> Any:
    channel: Any = client.channel
    return reflection_pb2_grpc.ServerReflectionStub(channel)


def _requests(server: rpc.ServerReference, run_id: str) -> dict[str, ProtobufMessage]:
    return {
        "StartRun": rpc.StartRunRequest(server=server, input="hi"),
        "ContinueRun": rpc.ContinueRunRequest(server=server, run_id=run_id, input="hi"),
        "WatchRun": rpc.WatchRunRequest(server=server, run_id=run_id),
        "GetRun": rpc.GetRunRequest(server=server, run_id=run_id),
        "ListRuns": rpc.ListRunsRequest(server=server),
        "ListRunEvents": rpc.ListRunEventsRequest(server=server, run_id=run_id),
        "CancelRun": rpc.CancelRunRequest(server=server, run_id=run_id),
    }


METHODS = sorted(_requests(reference("echo"), ""))


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
            foreign = await refusal(stranger.call(method, _requests(reference("echo"), run.id)[method]))
            missing = await refusal(stranger.call(method, _requests(reference("none"), run.id)[method]))
            assert (foreign.code, foreign.reason) == (grpc.StatusCode.NOT_FOUND, "SERVER_NOT_FOUND")
            assert foreign.message == missing.message.replace("none", "echo")
        for method in METHODS:
            if method in ("StartRun", "ListRuns"):
                continue
            # On a server of its own, a run of another's is as one that there is not.
            foreign = await refusal(stranger.call(method, _requests(reference("theirs"), run.id)[method]))
            missing = await refusal(stranger.call(method, _requests(reference("theirs"), "run_none")[method]))
            assert (foreign.code, foreign.reason) == (grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND")
            assert foreign.message == missing.message.replace("run_none", run.id)
        assert await client.get(run) == run

    service.run(check)


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN + "x", TOKEN[:-1], "é"])
def test_call_without_the_token_is_unauthenticated(service: Service, token: str | None) -> None:
    """Every method, before anything else is looked at; reflection, too, and methods that there are not."""

    async def check(client: Client) -> None:
        metadata: tuple[tuple[str, str | bytes], ...] = (("x-acp-organization", "default"),)
        if token == "é":
            metadata += (("authorization", "Basic " + TOKEN),)
        elif token is not None:
            metadata += (("authorization", f"Bearer {token}"),)
        for method in METHODS:
            for request in (_requests(reference("echo"), "run_1")[method], _requests(reference(""), "")[method]):
                call = getattr(client.stub, method)(request, metadata=metadata, timeout=LIMIT_SECONDS)
                found = await refusal(call)
                assert (found.code, found.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
                assert TOKEN not in found.message
        code = grpc.StatusCode.INTERNAL
        while code is grpc.StatusCode.INTERNAL:
            # The refusal can overtake the request, which the client is still sending; gRPC then tells that instead.
            call = _reflection(client).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]),
                metadata=metadata,
                timeout=LIMIT_SECONDS,
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await _end_of(call)
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
            found = await refusal(without.call(method, _requests(reference("echo"), run.id)[method]))
            assert found.field == "x-acp-organization"
        listed = await client.call("ListRuns", rpc.ListRunsRequest(server=reference("echo")))
        assert list(listed.runs) == [run]

    service.run(check, requests=requests)


def test_full_queue_is_resource_exhausted(service: Service) -> None:
    """CAPACITY_EXCEEDED with a time to try again; served once there is room."""

    async def check(client: Client) -> None:
        run = await client.start("hi", "gated")
        queued = await client.start("queued", "echo")
        for method in ("StartRun", "ContinueRun"):
            found = await refusal(client.call(method, _requests(reference("gated"), run.id)[method]))
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
            found = await refusal(client.call(method, _requests(reference("echo"), run.id)[method]))
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
                found = await refusal(client.call(method, _requests(reference("echo"), run.id)[method]))
                assert (found.code, found.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
                assert SECRET not in str(found)
                assert "ValueError" not in str(found)
        assert await client.get(run) == run

    service.run(check)


def test_unknown_method_is_unimplemented(service: Service) -> None:
    """As gRPC has it."""

    async def check(client: Client) -> None:
        method: Any = client.channel.unary_unary(f"/{SERVICE}/Nothing")
        call = method(b"", metadata=client.metadata)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    service.run(check)


# Health, reflection, lives


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
            assert contents_of(rest) == ["half", "one", "re: hi"]

    in_loop(main())


def test_reflection_lists_the_services(service: Service) -> None:
    """For callers that carry the token."""

    async def check(client: Client) -> None:
        call = _reflection(client).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=client.metadata
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


def test_many_callers_share_one_service(service: Service) -> None:
    """A hundred sync runs at once over one channel, each answered with its own events."""

    async def check(client: Client) -> None:
        async def one(n: int) -> None:
            updates = await client.updates("StartRun", start_request(f"run {n}", stream={"collect": True}))
            assert contents_of(updates) == [f"run {n}"] * 2

        await asyncio.gather(*(one(n) for n in range(100)))

    service.run(check)
