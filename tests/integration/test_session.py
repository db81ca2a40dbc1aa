"""`RunService.Session`: what it has beside the operations, which the suite of both doors tests."""

import asyncio
import gc
import json
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.acp.runs.v1 import run_pb2 as pb
from protos.acp.runs.v1 import run_service_pb2 as rpc
from protos.acp.runs.v1 import run_service_pb2_grpc
from runtime_service import server
from runtime_service.errors import StoreUnavailable
from runtime_service.server import MAX_MESSAGE_BYTES
from runtime_service.session import SessionLimits
from runtime_service.store.sqlite import SQLiteStore
from tests.integration.doors import (
    METHODS,
    OPERATION,
    SECRET,
    TOKEN,
    WITH_TOKEN,
    Client,
    Service,
    SessionClient,
    contents_of,
    continue_request,
    end_of,
    events_of,
    gate,
    in_loop,
    reference,
    refusal,
    requests_of,
    start_request,
    watch_request,
)
from tests.integration.session_client import CallLostError, Session, SessionCall, error_from, session_over
from tests.support import eventually

Check = Callable[[SessionClient, Session], Coroutine[Any, Any, None]]


@pytest.fixture
def door() -> str:
    """This suite is for one of them."""
    return "session"


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing that a caller does is worth a warning in the service's log."""
    yield
    loud = [record for record in caplog.get_records("call") if record.levelno >= logging.WARNING]
    assert not loud


def in_session(service: Service, check: Check, **settings: Any) -> None:
    """Run `check` with a session of the running service."""

    async def main(client: Client) -> None:
        assert isinstance(client, SessionClient)
        await check(client, client.session)

    service.run(main, **settings)


@asynccontextmanager
async def another_session(client: SessionClient) -> AsyncGenerator[SessionClient]:
    """A second session over the same channel."""
    async with session_over(client.channel, TOKEN) as session:
        yield SessionClient(client.channel, session)


def get_request(run: pb.Run) -> rpc.GetRunRequest:
    """Ask for a run."""
    return rpc.GetRunRequest(server=reference(run.server_id), run_id=run.id)


def events_request(run: pb.Run, **fields: Any) -> rpc.ListRunEventsRequest:
    """Ask for a page of a run's log."""
    return rpc.ListRunEventsRequest(server=reference(run.server_id), run_id=run.id, **fields)


def sequences(call: SessionCall) -> list[int]:
    """Of the events that have come."""
    return [event.sequence for update in call.arrived for event in update.run_update.events]


async def all_updates(call: SessionCall) -> list[rpc.RunUpdate]:
    """The run's updates of a call, to its end."""
    return [update async for update in call.updates()]


async def settled(client: SessionClient, text: str, server: str = "talkative") -> pb.Run:
    """A run that has ended."""
    return (await client.updates("StartRun", start_request(text, server, stream={"collect": True})))[-1].run


def footprint() -> Counter[str]:
    """How many tasks there are, and objects of sessions by their type."""
    gc.collect()
    counts = Counter(str(type(each)) for each in gc.get_objects() if type(each).__module__ == "runtime_service.session")
    counts["tasks"] = len(asyncio.all_tasks())
    return counts


# The stream


def test_limits_come_first_and_alone(service: Service) -> None:
    """Before the caller has said anything."""

    async def check(client: SessionClient, session: Session) -> None:
        expected = rpc.SessionLimits(max_calls=7, window_updates=5, max_message_bytes=MAX_MESSAGE_BYTES)
        assert session.limits == expected
        stub: Any = run_service_pb2_grpc.RunServiceStub(client.channel)
        stream = stub.Session(metadata=WITH_TOKEN)
        assert await stream.read() == rpc.SessionResponse(limits=expected)
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() is grpc.StatusCode.OK

    in_session(service, check, sessions=SessionLimits(max_calls=7, window_updates=5))


def test_200_calls_at_once_are_answered_under_their_numbers(service: Service) -> None:
    """Of every kind, in one message; each call has its own answer, one `last`, and nothing after it."""

    async def check(client: SessionClient, session: Session) -> None:
        first = await settled(client, "3")
        kinds = 5
        calls = []
        for n in range(200):
            match n % kinds:
                case 0:
                    call = session.call("start_run", start_request(f"run {n}"))
                case 1:
                    call = session.call("get_run", get_request(first))
                case 2:
                    call = session.call("watch_run", watch_request(first, after_sequence=n % 4))
                case 3:
                    call = session.call("list_run_events", events_request(first, page_size=1 + n % 3))
                case _:
                    call = session.call("get_run", rpc.GetRunRequest(server=reference("echo"), run_id=f"run_{n}"))
            calls.append(call)
        for n, call in enumerate(calls):
            match n % kinds:
                case 0:
                    assert contents_of(await all_updates(call)) == [f"run {n}"] * 2
                    assert sequences(call) == [1, 2]
                case 1:
                    assert (await call.answer()).run == first
                case 2:
                    assert (await all_updates(call))[-1].run == first
                    assert sequences(call) == [1, 2, 3, 4][n % 4 :]
                case 3:
                    assert len((await call.answer()).events) == 1 + n % 3
                case _:
                    assert f"run_{n}" in ((await call.error()).details() or "")
        await client.get(first)
        assert all(call.ended for call in calls)

    in_session(service, check)


def test_a_message_carries_what_many_calls_have_ready(service: Service) -> None:
    """A hundred calls that are answered at once take a few messages, not a hundred."""

    async def check(client: SessionClient, session: Session) -> None:
        calls = [session.call("list_runs", rpc.ListRunsRequest(server=reference("none"))) for _ in range(100)]
        for call in calls:
            assert (await call.error()).code() is grpc.StatusCode.NOT_FOUND
        assert len(session.responses) < 10

    in_session(service, check)


def test_calls_run_beside_each_other(service: Service) -> None:
    """One that waits holds up none that was opened later, and each follower has the whole log in order."""

    async def check(client: SessionClient, session: Session) -> None:
        waiting = session.call("start_run", start_request("hi", "gated"))
        first = (await waiting.read()).run_update.run
        followers = [session.call("watch_run", watch_request(first, stream={"deltas": True})) for _ in range(20)]
        page = session.call("list_run_events", events_request(first, after_sequence=2, wait_ms=3_600_000))
        await settled(client, "10")
        assert not any(call.ended for call in (waiting, page, *followers))
        gate[-1].set()
        for call in (waiting, *followers):
            assert (await all_updates(call))[-1].run.output == "re: hi"
            assert sequences(call) == [1, 2, 3]
        assert [event.content for event in (await page.answer()).events] == ["re: hi"]

    in_session(service, check)


def test_commands_are_taken_in_their_order(service: Service) -> None:
    """Within a message and across messages: what is sent last about a call is what holds."""

    async def check(client: SessionClient, session: Session) -> None:
        first = await client.start("hi", "gated")
        calls = [session.call("watch_run", watch_request(first)) for _ in range(3)]
        for call in calls:
            call.stop()
        stopped = len(session.calls)
        # Of as many calls as may be open; the stops before them made room.
        calls = [session.call("watch_run", watch_request(first)) for _ in range(3)]
        for call in calls:
            assert (await call.read()).run_update.run.id == first.id
        gate[-1].set()
        for call in calls:
            await end_of(call.updates())
        assert not any(session.calls[number].ended for number in range(stopped - 2, stopped + 1))

    in_session(service, check, sessions=SessionLimits(max_calls=3))


def test_two_sessions_know_nothing_of_each_other(service: Service) -> None:
    """Both use the same numbers; the end of one leaves the other as it is."""

    async def check(client: SessionClient, session: Session) -> None:
        mine = session.call("start_run", start_request("mine", "gated"))
        async with another_session(client) as other:
            theirs = other.session.call("start_run", start_request("theirs", "gated"))
            assert mine.number == theirs.number
            assert (await mine.read()).run_update.run.input == "mine"
            found = (await theirs.read()).run_update.run
            assert found.input == "theirs"
        assert not theirs.ended
        assert not mine.ended
        gate[-1].set()
        assert (await all_updates(mine))[-1].run.output == "re: mine"
        assert (await client.watch(found))[-1].run.output == "re: theirs"

    in_session(service, check)


# Who calls


def test_each_command_is_on_behalf_of_its_organization(service: Service) -> None:
    """Side by side in one message; neither sees what the other has."""

    async def check(client: SessionClient, session: Session) -> None:
        starts = {
            "default": session.call("start_run", start_request("ours"), "default"),
            "other": session.call("start_run", start_request("theirs", "theirs"), "other"),
        }
        runs = {name: (await all_updates(call))[-1].run for name, call in starts.items()}
        for name, stranger in (("default", "other"), ("other", "default")):
            mine = session.call("get_run", get_request(runs[name]), name)
            foreign = session.call("get_run", get_request(runs[name]), stranger)
            listed = session.call("list_runs", rpc.ListRunsRequest(server=reference(runs[name].server_id)), name)
            assert (await mine.answer()).run == runs[name]
            found = await refusal(foreign.answer())
            assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "SERVER_NOT_FOUND")
            assert list((await listed.answer()).runs) == [runs[name]]

    in_session(service, check)


def test_organization_of_the_metadata_is_nothing_to_a_command(service: Service) -> None:
    """A command without one is INVALID_ARGUMENT, whatever the stream's metadata says."""

    async def check(client: SessionClient, _: Session) -> None:
        stub: Any = run_service_pb2_grpc.RunServiceStub(client.channel)
        stream = stub.Session(metadata=(*WITH_TOKEN, ("x-acp-organization", "default")))
        await stream.read()
        await stream.write(sent(rpc.SessionCommand(call=1, list_runs=rpc.ListRunsRequest(server=reference("echo")))))
        (update,) = (await stream.read()).updates
        assert (update.call, update.last) == (1, True)

        async def failed() -> None:
            raise error_from(update.error)

        assert (await refusal(failed())).field == "organization"
        await stream.done_writing()
        assert await stream.code() is grpc.StatusCode.OK

    in_session(service, check)


# Errors


def test_errors_are_those_of_the_plain_rpcs(service: Service) -> None:
    """To the byte, of every method; the session goes on."""

    async def check(client: SessionClient, session: Session) -> None:
        plain = Client(client.channel)
        found = await settled(client, "1")
        cases = [
            (method, request)
            for server, run_id in (("none", "run_1"), ("talkative", "run_1"), ("absent", found.id))
            for method, request in requests_of(reference(server), run_id).items()
            if (server, method) not in (("talkative", "StartRun"), ("talkative", "ListRuns"), ("absent", "ListRuns"))
        ]
        cases += [
            ("StartRun", start_request("")),
            ("StartRun", start_request(stream={"wait_ms": -1})),
            ("ContinueRun", continue_request(found, metadata_json=b"[]")),
            ("WatchRun", watch_request(found, turn=2)),
            ("ListRuns", rpc.ListRunsRequest(server=reference("echo"), page_token="x")),
            ("ListRunEvents", events_request(found, wait_ms=-1)),
        ]
        assert {method for method, _ in cases} == set(METHODS)
        for method, request in cases:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await end_of(plain.call(method, request))
            packed = dict(caught.value.trailing_metadata() or ())["grpc-status-details-bin"]
            assert isinstance(packed, bytes)
            call = session.call(OPERATION[method], request)
            (update,) = [await call.read()]
            assert update.last
            assert update.error == status_pb2.Status.FromString(packed), method
        assert await client.get(found) == found

    in_session(service, check)


def test_unexpected_exception_fails_its_call_only(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As an opaque INTERNAL; the log has it with the ids that the command gave, and another call goes on."""

    async def broken(*_: object) -> object:
        raise ValueError(SECRET)

    async def check(client: SessionClient, session: Session) -> None:
        following = session.call("start_run", start_request("hi", "gated"))
        started = (await following.read()).run_update.run
        await client.until_said(started, 2)
        with monkeypatch.context() as patch:
            patch.setattr(SQLiteStore, "get_run", broken)
            for n, method in enumerate(("GetRun", "WatchRun")):
                request = requests_of(reference("gated"), started.id)[method]
                ids = {"correlation_id": f"request-{n}", "traceparent": f"00-trace-{n}"}
                found = await refusal(end_of_call(session.call(OPERATION[method], request, **ids)))
                assert (found.code, found.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
                assert SECRET not in str(found)
                assert "ValueError" not in str(found)
                (record,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
                assert f"request-{n}" in record.getMessage()
                assert f"00-trace-{n}" in record.getMessage()
                assert record.exc_info is not None
                caplog.clear()
        gate[-1].set()
        assert (await all_updates(following))[-1].run.output == "re: hi"

    in_session(service, check)


async def end_of_call(call: SessionCall) -> None:
    """Wait for the end of a call; raises its error."""
    async for _ in call.updates():
        pass


def sent(*commands: rpc.SessionCommand) -> rpc.SessionRequest:
    """Commands in one message."""
    return rpc.SessionRequest(commands=commands)


def listing(number: int) -> rpc.SessionCommand:
    """Open a call of this number."""
    request = rpc.ListRunsRequest(server=reference("echo"))
    return rpc.SessionCommand(call=number, organization="default", list_runs=request)


VIOLATIONS: dict[str, tuple[Callable[[SessionCall], rpc.SessionRequest], str]] = {
    "no operation": (lambda _: sent(rpc.SessionCommand(call=99, organization="default")), "operation"),
    "nothing": (lambda _: sent(rpc.SessionCommand()), "operation"),
    "number 0": (lambda _: sent(listing(0)), "call"),
    "number below 0": (lambda _: sent(listing(-1)), "call"),
    "stop of 0": (lambda _: sent(rpc.SessionCommand(stop=rpc.StopCall())), "call"),
    "acknowledge of -1": (lambda _: sent(rpc.SessionCommand(call=-1, acknowledge=rpc.AcknowledgeUpdates())), "call"),
    "open call": (lambda call: sent(listing(call.number)), "call"),
    "twice in a message": (lambda _: sent(listing(99), listing(99)), "call"),
    "behind others": (lambda _: sent(listing(98), listing(99), listing(0)), "call"),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_broken_rule_ends_the_session(service: Service, name: str) -> None:
    """With INVALID_ARGUMENT that names what is wrong; the runs go on, and so does another session."""

    async def check(client: SessionClient, _: Session) -> None:
        make, field = VIOLATIONS[name]
        session = Session(client.channel, TOKEN)
        await session.open()
        following = session.call("start_run", start_request("hi", "gated"))
        started = (await following.read()).run_update.run
        session.send(*make(following).commands)
        found = await refusal(session.failure())
        assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED")
        assert found.field == f"commands.{field}"
        assert not following.ended
        with pytest.raises(CallLostError):
            await all_updates(following)
        gate[-1].set()
        assert (await client.watch(started))[-1].run.output == "re: hi"

    in_session(service, check)


def test_message_that_is_too_long_ends_the_session(service: Service) -> None:
    """As gRPC has it; one within the limit that `limits` told is taken."""

    async def check(client: SessionClient, _: Session) -> None:
        stub: Any = run_service_pb2_grpc.RunServiceStub(client.channel)
        stream = stub.Session(metadata=WITH_TOKEN)
        limit = (await stream.read()).limits.max_message_bytes
        command = listing(1)
        while (size := sent(command).ByteSize()) < limit:
            command.correlation_id += "x" * (limit - size - 8 if not command.correlation_id else 1)
        await stream.write(sent(command))
        (update,) = (await stream.read()).updates
        assert update.HasField("list_runs")
        command.call = 2
        command.correlation_id += "x"
        await stream.write(sent(command))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    in_session(service, check)


# Limits


def test_call_beyond_the_limit_is_told_that_the_session_is_full(service: Service) -> None:
    """SESSION_FULL with a time to try again; the others go on, and an end or a stop makes room at once."""

    async def check(client: SessionClient, session: Session) -> None:
        calls = [session.call("start_run", start_request(f"{n}", "gated")) for n in range(3)]
        for method, request in requests_of(reference("echo"), "run_1").items():
            found = await refusal(end_of_call(session.call(OPERATION[method], request)))
            assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SESSION_FULL")
            assert found.retry_seconds
        first = (await calls[0].read()).run_update.run
        calls[0].stop()
        assert (await client.get(first)).id == first.id
        assert not (await client.call("ListRuns", rpc.ListRunsRequest(server=reference("echo")))).runs
        gate[-1].set()
        for n, call in enumerate(calls[1:], 1):
            assert (await all_updates(call))[-1].run.output == f"re: {n}"
        for _ in range(100):
            # As many as there may be, and each next one as soon as one has ended.
            for call in [session.call("get_run", get_request(first)) for _ in range(3)]:
                assert (await call.answer()).run.id == first.id

    in_session(service, check, sessions=SessionLimits(max_calls=3))


def test_call_that_is_not_acknowledged_waits_and_holds_up_no_other(service: Service) -> None:
    """A window's worth comes of a log of thousands; each acknowledgement lets on what was said, without gap."""

    async def check(client: SessionClient, session: Session) -> None:
        long = await settled(client, "4500")
        slow = session.call("watch_run", watch_request(long))
        for count in (1, 2):
            await slow.read(acknowledge=False)
            assert len(slow.arrived) <= count + 1
        for _ in range(3):
            other = session.call("watch_run", watch_request(long))
            await end_of(other.updates())
            assert sequences(other) == list(range(1, 4502))
            await client.updates("StartRun", start_request())
        assert len(slow.arrived) == 2
        slow.acknowledge(1)
        await slow.read(acknowledge=False)
        await client.get(long)
        assert len(slow.arrived) == 3
        slow.acknowledge(2)
        await slow.read(acknowledge=False)
        await slow.read(acknowledge=False)
        await client.get(long)
        assert len(slow.arrived) == 5
        while not slow.ended:
            slow.acknowledge(1)
            await slow.read(acknowledge=False)
        assert sequences(slow) == list(range(1, 4502))
        assert slow.arrived[-1].run_update.run == long

    in_session(service, check, sessions=SessionLimits(window_updates=2))


def test_waiting_call_goes_on_with_what_it_missed(service: Service) -> None:
    """Whatever the run went through meanwhile comes once: its deltas, its events, its next turns, its end."""

    async def check(client: SessionClient, session: Session) -> None:
        started = await client.start("hi", "gated")
        await client.until_said(started, 2)
        slow = session.call("watch_run", watch_request(started, stream={"deltas": True}))
        first = await slow.read(acknowledge=False)
        gate[-1].set()
        await client.watch(started)
        for n in range(50):
            await client.updates("ContinueRun", continue_request(started, f"{n}"))
        assert slow.arrived == [first]
        slow.acknowledge(1)
        updates = await all_updates(slow)
        assert sequences(slow) == list(range(1, 154))
        assert updates[-1].run == await client.get(started)

    in_session(service, check, sessions=SessionLimits(window_updates=1))


def test_acknowledging_more_than_came_gives_no_more_room(service: Service) -> None:
    """The window is what it was; the client of these tests sees to that."""

    async def check(client: SessionClient, session: Session) -> None:
        long = await settled(client, "4500")
        slow = session.call("watch_run", watch_request(long))
        session.send(rpc.SessionCommand(call=slow.number, acknowledge=rpc.AcknowledgeUpdates(updates=2**31 - 1)))
        await slow.read(acknowledge=False)
        await client.watch(long)
        assert len(slow.arrived) == 1
        slow.acknowledge(1)
        await end_of(slow.updates())
        assert sequences(slow) == list(range(1, 4502))

    in_session(service, check, sessions=SessionLimits(window_updates=1))


def test_long_logs_are_cut_into_messages(service: Service) -> None:
    """Large updates of many calls share no message beyond what one of them needs; an event of 1 MiB passes."""

    async def main() -> None:
        server = await service.serve()
        options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        try:
            async with (
                grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=options) as channel,
                session_over(channel, TOKEN) as session,
            ):
                client = SessionClient(channel, session)
                text = "é" * (1 << 19)
                started = (await client.updates("StartRun", start_request(text)))[-1].run
                for n in range(3):
                    await client.updates("ContinueRun", continue_request(started, text if n else "\U0001f600" * 1000))
                watching = [session.call("watch_run", watch_request(started)) for _ in range(8)]
                pages = [session.call("list_run_events", events_request(started)) for _ in range(8)]
                for call in watching:
                    updates = await all_updates(call)
                    assert [event.sequence for event in events_of(updates)] == list(range(1, 9))
                    assert events_of(updates)[1].content == text
                for call in pages:
                    assert (await call.answer()).events[0].content == text
                assert max(response.ByteSize() for response in session.responses) < 5 << 20
        finally:
            await server.__aexit__(None, None, None)

    in_loop(main())


def test_messages_are_filled_by_their_true_size(service: Service) -> None:
    """Also where it is metadata that makes updates large: those of sixty calls at once share no large message."""

    async def check(client: SessionClient, session: Session) -> None:
        metadata = json.dumps({"text": "x" * (16_384 - 20)}).encode()
        asked = start_request("hi", "gated", metadata_json=metadata, stream={"collect": True})
        starts = [session.call("start_run", asked) for _ in range(60)]
        started = await client.start("hi", "gated", metadata_json=metadata)
        await client.until_said(started, 2)
        watches = [session.call("watch_run", watch_request(started)) for _ in range(60)]
        for call in watches:
            assert (await call.read()).run_update.run.id == started.id
        gate[-1].set()
        for call in (*starts, *watches):
            assert (await all_updates(call))[-1].run.output == "re: hi"
        updates = [update for call in (*starts, *watches) for update in call.arrived]
        assert sum(update.ByteSize() for update in updates) > 180 * len(metadata)
        most = (1 << 18) + max(update.ByteSize() for update in updates)
        assert max(response.ByteSize() for response in session.responses) <= most + 8

    in_session(service, check)


def test_answer_that_no_message_holds_fails_alone(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ANSWER_TOO_LARGE; what shares its message is as it would be, and its place is free for another call."""
    monkeypatch.setattr(server, "MAX_MESSAGE_BYTES", 1 << 20)

    async def check(client: SessionClient, session: Session) -> None:
        small = await settled(client, "1")
        plain = Client(client.channel)
        large = await plain.start("é" * 400_000)
        requests = requests_of(reference("echo"), large.id)
        for method in ("WatchRun", "GetRun", "ListRuns", "ListRunEvents"):
            before = session.call("get_run", get_request(small))
            failing = session.call(OPERATION[method], requests[method])
            after = session.call("watch_run", watch_request(small))
            found = await refusal(end_of_call(failing))
            assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "ANSWER_TOO_LARGE"), method
            assert (await before.answer()).run == small
            assert (await all_updates(after))[-1].run == small

    in_session(service, check, sessions=SessionLimits(max_calls=3))


# Stop


def test_stopped_call_gets_nothing_more_and_its_run_goes_on(service: Service) -> None:
    """Also no `last`; what was started is executed to its end."""

    async def check(client: SessionClient, session: Session) -> None:
        call = session.call("start_run", start_request("hi", "gated"))
        started = (await call.read()).run_update.run
        await client.until_said(started, 2)
        page = session.call("list_run_events", events_request(started, after_sequence=2, wait_ms=3_600_000))
        call.stop()
        page.stop()
        await client.get(started)
        had = len(call.arrived)
        gate[-1].set()
        assert (await client.watch(started))[-1].run.output == "re: hi"
        await client.get(started)
        assert len(call.arrived) == had
        assert not call.ended
        assert not page.arrived

    in_session(service, check)


def test_call_is_stopped_while_it_waits_for_an_acknowledgement(service: Service) -> None:
    """Its place is free; a later acknowledgement is about a call that has ended."""

    async def check(client: SessionClient, session: Session) -> None:
        long = await settled(client, "3000")
        for _ in range(5):
            slow = session.call("watch_run", watch_request(long))
            await slow.read(acknowledge=False)
            await client.get(long)
            slow.stop()
            slow.acknowledge(1)
            await client.get(long)
            assert len(slow.arrived) == 1

    in_session(service, check, sessions=SessionLimits(max_calls=2, window_updates=1))


def test_command_about_a_call_that_has_ended_is_ignored(service: Service) -> None:
    """Or that there never was."""

    async def check(client: SessionClient, session: Session) -> None:
        done = await settled(client, "1")
        ended = session.call("get_run", get_request(done))
        await ended.answer()
        for number in (ended.number, 1 << 40, 2**63 - 1):
            session.send(
                rpc.SessionCommand(call=number, stop=rpc.StopCall()),
                rpc.SessionCommand(call=number, acknowledge=rpc.AcknowledgeUpdates(updates=1)),
            )
        assert await client.get(done) == done

    in_session(service, check)


def test_call_may_be_stopped_in_the_message_that_opens_it(service: Service) -> None:
    """Of every kind; the session goes on, and nothing more comes of them."""

    async def check(client: SessionClient, session: Session) -> None:
        done = await settled(client, "1")
        calls = []
        for _ in range(20):
            for method, request in requests_of(reference("talkative"), done.id).items():
                if method in ("WatchRun", "GetRun", "ListRuns", "ListRunEvents"):
                    calls.append(session.call(OPERATION[method], request))
                    calls[-1].stop()
        for _ in range(3):
            assert await client.get(done) == done
        assert not any(call.arrived for call in calls)

    in_session(service, check)


# Ends


def test_caller_that_closes_its_side_stops_its_calls(service: Service) -> None:
    """The session ends with OK at once; what it started goes on."""

    async def check(client: SessionClient, _: Session) -> None:
        session = Session(client.channel, TOKEN)
        await session.open()
        calls = [session.call("start_run", start_request(f"{n}", "gated")) for n in range(10)]
        runs = [(await call.read()).run_update.run for call in calls]
        watching = session.call("watch_run", watch_request(runs[0]))
        await watching.read()
        assert await session.close() is grpc.StatusCode.OK
        assert not any(call.ended for call in (*calls, watching))
        gate[-1].set()
        for n, started in enumerate(runs):
            assert (await client.watch(started))[-1].run.output == f"re: {n}"

    in_session(service, check)


def test_cancelled_stream_leaves_nothing(service: Service) -> None:
    """No task, no call, no word in the log; what it started goes on."""

    async def check(client: SessionClient, _: Session) -> None:
        long = await settled(client, "3000")
        gate[-1].set()
        await settled(client, "warm", "gated")
        gate[:] = [asyncio.Event()]
        before = footprint()
        runs = []
        for n in range(10):
            session = Session(client.channel, TOKEN)
            await session.open()
            following = session.call("start_run", start_request(f"{n}", "gated"))
            runs.append((await following.read()).run_update.run)
            for page in range(20):
                session.call("watch_run", watch_request(long))
                session.call("list_run_events", events_request(long, after_sequence=page))
                session.call("list_run_events", events_request(runs[-1], after_sequence=5, wait_ms=3_600_000))
            if n % 2:
                await session.call("get_run", get_request(long)).answer()
            session.stream.cancel()
            assert await session.end() in (grpc.StatusCode.CANCELLED, None)
        del session, following
        gate[-1].set()
        for name, started in enumerate(runs):
            assert (await client.watch(started))[-1].run.output == f"re: {name}"
        await eventually(lambda: footprint() <= before)

    in_session(service, check)


class Wire:
    """A TCP connection to the service that can be cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._pumps: list[asyncio.Task[None]] = []
        self._writers: list[asyncio.StreamWriter] = []

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[str]:
        """Its near end."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        try:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            self.cut()
            await asyncio.gather(*self._pumps, return_exceptions=True)

    def cut(self) -> None:
        """Lose the connection."""
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, far_writer]
        for each in ((reader, far_writer), (far_reader, writer)):
            self._pumps.append(asyncio.create_task(self._pump(*each)))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()


def test_lost_connection_leaves_nothing(service: Service) -> None:
    """As a cancelled stream; calls are told that they are lost, and another session finds the run."""

    async def main() -> None:
        server = await service.serve()
        async with service.connect(server) as client:
            assert isinstance(client, SessionClient)
            gate[-1].set()
            await settled(client, "warm", "gated")
            gate[:] = [asyncio.Event()]
            before = footprint()
            wire = Wire(server.port)
            async with wire.open() as target, grpc.aio.insecure_channel(target) as channel:
                session = Session(channel, TOKEN)
                await session.open()
                following = session.call("start_run", start_request("hi", "gated"))
                started = (await following.read()).run_update.run
                wire.cut()
                with pytest.raises(CallLostError):
                    await all_updates(following)
                assert await session.end() is not grpc.StatusCode.OK
            gate[-1].set()
            assert (await client.watch(started))[-1].run.output == "re: hi"
            del wire, session, following, channel
            await eventually(lambda: footprint() <= before)
        await server.__aexit__(None, None, None)

    in_loop(main())


def pages_of(run: pb.Run, *numbers: int) -> rpc.SessionRequest:
    """Ask for the log of a run, in a call of each number."""
    request = events_request(run)
    return sent(*(rpc.SessionCommand(call=each, organization="default", list_run_events=request) for each in numbers))


async def stuck_session(client: SessionClient, long: pb.Run) -> Any:
    """A session whose caller has asked 40 times for as much as the connection takes in, and reads nothing."""
    stub: Any = run_service_pb2_grpc.RunServiceStub(client.channel)
    stream = stub.Session(metadata=WITH_TOKEN)
    await anext(aiter(stream))
    await stream.write(pages_of(long, *range(1, 41)))
    await turns_passed(client, long)
    return stream


async def turns_passed(client: SessionClient, run: pb.Run) -> None:
    """Return when the service has long done what it can do."""
    for _ in range(20):
        await client.events(run)


async def until_answered(stream: Any, *numbers: int) -> list[rpc.SessionUpdate]:
    """Read until these calls have ended."""
    updates: list[rpc.SessionUpdate] = []
    while not {update.call for update in updates if update.last}.issuperset(numbers):
        updates += (await anext(aiter(stream))).updates
    return updates


def test_caller_that_does_not_read_holds_up_no_other_session(service: Service) -> None:
    """And finds everything once it does."""

    async def check(client: SessionClient, _: Session) -> None:
        long = await settled(client, "x" * 900_000, "echo")
        stream = await stuck_session(client, long)
        await end_of(client.call("WatchRun", watch_request(long)))
        await stream.write(sent(listing(41)))
        numbers = [update.call for update in await until_answered(stream, *range(1, 42))]
        assert sorted(numbers) == list(range(1, 42))
        await stream.done_writing()
        assert await stream.code() is grpc.StatusCode.OK

    in_session(service, check)


def test_error_comes_behind_what_was_ready_before(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update that waits to be sent when its call fails is sent first."""
    read_events = SQLiteStore.read_events

    async def soon_broken(store: SQLiteStore, run_id: str, after: int, *limits: Any) -> Any:
        if after:
            raise StoreUnavailable("no")
        return await read_events(store, run_id, after, *limits)

    async def check(client: SessionClient, _: Session) -> None:
        long = await settled(client, "x" * 900_000, "echo")
        many = await settled(client, "3000")
        stream = await stuck_session(client, long)
        with monkeypatch.context() as patch:
            patch.setattr(SQLiteStore, "read_events", soon_broken)
            command = rpc.SessionCommand(call=41, organization="default", watch_run=watch_request(many))
            await stream.write(sent(command))
            await turns_passed(client, long)
        await stream.write(sent(listing(42)))
        updates = await until_answered(stream, *range(1, 43))
        first, second = [update for update in updates if update.call == 41]
        assert (first.run_update.events[0].sequence, first.last) == (1, False)
        assert (second.HasField("error"), second.last) == (True, True)

    in_session(service, check)


def test_answer_that_is_not_sent_yet_is_stopped(service: Service) -> None:
    """A call is open until its `last` is on its way."""

    async def check(client: SessionClient, _: Session) -> None:
        long = await settled(client, "x" * 900_000, "echo")
        stream = await stuck_session(client, long)
        await stream.write(sent(*(rpc.SessionCommand(call=n, stop=rpc.StopCall()) for n in range(1, 41)), listing(41)))
        await turns_passed(client, long)
        assert len(await until_answered(stream, 41)) < 20
        await stream.done_writing()
        assert await stream.code() is grpc.StatusCode.OK

    in_session(service, check)


def test_answers_that_are_not_read_count_as_open_calls(service: Service) -> None:
    """So a caller that only asks is told that the session is full, and costs no memory without end."""

    async def check(client: SessionClient, _: Session) -> None:
        long = await settled(client, "x" * 900_000, "echo")
        stream = await stuck_session(client, long)
        await stream.write(pages_of(long, *range(41, 81)))
        await turns_passed(client, long)
        await stream.write(pages_of(long, 81))
        updates = await until_answered(stream, *range(1, 82))
        assert len(updates) == 81
        assert all(update.last for update in updates)
        assert sum(update.HasField("list_run_events") for update in updates) < 60

    in_session(service, check, sessions=SessionLimits(max_calls=40))


def test_broken_rule_is_told_to_a_caller_that_does_not_read(service: Service) -> None:
    """Behind what was on its way."""

    async def check(client: SessionClient, _: Session) -> None:
        long = await settled(client, "x" * 900_000, "echo")
        stream = await stuck_session(client, long)
        await stream.write(sent(listing(0)))
        await client.get(long)
        assert (await refusal(stream)).field == "commands.call"

    in_session(service, check)


def test_cancel_by_a_caller_that_does_not_read_leaves_nothing(service: Service) -> None:
    """What was to be sent is forgotten."""

    async def check(client: SessionClient, _: Session) -> None:
        long = await settled(client, "x" * 900_000, "echo")
        before = footprint()
        for n in range(4):
            stream = await stuck_session(client, long)
            if n % 2:
                # The session has ended then, but its status cannot be sent.
                await stream.write(sent(listing(0)))
                await client.get(long)
            stream.cancel()
        del stream
        await eventually(lambda: footprint() <= before)

    in_session(service, check)


def test_100_sessions_leave_nothing(service: Service) -> None:
    """Opened and closed, one after the other and at once."""

    async def check(client: SessionClient, _: Session) -> None:
        async def one(n: int) -> None:
            async with another_session(client) as other:
                assert (await settled(other, f"{n}", "echo")).output == f"{n}"

        await one(0)
        before = footprint()
        for n in range(20):
            await one(n)
        await asyncio.gather(*(one(n) for n in range(80)))
        await eventually(lambda: footprint() <= before)

    in_session(service, check)


def test_stop_of_the_service_ends_every_call_then_the_stream(service: Service) -> None:
    """With DRAINING, also those that wait for their caller; the stream ends with OK."""

    async def main() -> None:
        server = await service.serve(sessions=SessionLimits(window_updates=1))
        async with service.connect(server) as client:
            assert isinstance(client, SessionClient)
            session = client.session
            long = await settled(client, "3000")
            started = await client.start("hi", "gated")
            await client.until_said(started, 2)
            slow = session.call("watch_run", watch_request(long))
            await slow.read(acknowledge=False)
            calls = [
                slow,
                session.call("start_run", start_request("other", "gated", stream={"collect": True})),
                session.call("watch_run", watch_request(started)),
                session.call("list_run_events", events_request(started, after_sequence=1_000, wait_ms=3_600_000)),
            ]
            await calls[2].read()
            await server.__aexit__(None, None, None)
            for call in calls:
                found = await refusal(end_of_call(call))
                assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
                assert found.retry_seconds
            assert await session.end() in (grpc.StatusCode.OK, None)
        gate[-1].set()

    in_loop(main())


def test_stop_of_the_service_does_not_wait_for_a_caller_that_does_not_read(service: Service) -> None:
    """Its stream is cut after the grace that every call has; nothing of it is left."""

    async def main() -> None:
        server = await service.serve()
        async with service.connect(server) as client:
            assert isinstance(client, SessionClient)
            long = await settled(client, "x" * 900_000, "echo")
            stream = await stuck_session(client, long)
            await server.__aexit__(None, None, None)
            with suppress(grpc.aio.AioRpcError):
                await end_of(stream)
            assert await client.session.end() in (grpc.StatusCode.OK, None)

    in_loop(main())


def test_service_that_waits_for_running_turns_serves_its_sessions(service: Service) -> None:
    """Until they have ended it answers and follows, but takes no work; the followers see the end."""

    async def main() -> None:
        server = await service.serve(drain_seconds=60)
        async with service.connect(server) as client:
            assert isinstance(client, SessionClient)
            session = client.session
            following = session.call("start_run", start_request("hi", "gated"))
            started = (await following.read()).run_update.run
            health: Any = health_pb2_grpc.HealthStub(client.channel)
            watch = health.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            stopping = asyncio.ensure_future(server.__aexit__(None, None, None))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()
            assert (await refusal(client.call("StartRun", start_request()))).reason == "DRAINING"
            assert (await client.get(started)).status == pb.RUN_STATUS_RUNNING
            gate[-1].set()
            assert (await all_updates(following))[-1].run.output == "re: hi"
            await stopping
            assert await session.end() in (grpc.StatusCode.OK, None)

    in_loop(main())
