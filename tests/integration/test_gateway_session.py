"""The gateway's session with a runtime service that does as the test says: batches, windows, breaks, ends."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import grpc
import pytest

from gateway import replicas, run_client, session
from gateway.errors import ApiError
from gateway.run_client import CallContext, RunClient, ServerTarget, UpdateStream
from protos.acp.runs.v1 import run_pb2 as pb
from protos.acp.runs.v1 import run_service_pb2 as rpc
from tests.integration.session_service import (
    THREAD,
    WINDOW,
    FakeService,
    FakeSession,
    answer_to,
    client_of,
    error_to,
    fake_service,
    last_of,
    news,
    run_message,
    update_of,
)
from tests.support import eventually, run_async

CALLER = CallContext("acme", "key_1", "req_1", "00-trace")
ECHO = ServerTarget("echo", connected=False)
RUNNING, COMPLETED, QUEUED = pb.RUN_STATUS_RUNNING, pb.RUN_STATUS_COMPLETED, pb.RUN_STATUS_QUEUED


def start(client: RunClient, *, wait_ms: int = 0, mode: "pb.RunMode.ValueType" = pb.RUN_MODE_SYNC) -> UpdateStream:
    """Start a run that is followed."""
    options = rpc.StreamOptions(deltas=True, wait_ms=wait_ms)
    return client.start_run(CALLER, ECHO, input="hello", title="T", mode=mode, metadata=b"{}", stream=options)


def continue_(client: RunClient, *, wait_ms: int = 0) -> UpdateStream:
    """Continue a run and follow the turn."""
    options = rpc.StreamOptions(deltas=True, wait_ms=wait_ms)
    return client.continue_run(
        CALLER, ECHO, "run_1", input="more", mode=pb.RUN_MODE_SYNC, metadata=None, stream=options
    )


def watch(client: RunClient, after: int = 0) -> UpdateStream:
    """Follow a run."""
    return client.watch(CALLER, ECHO, "run_1", after)


FOLLOWED: dict[str, Callable[[RunClient], UpdateStream]] = {
    "start_run": start,
    "continue_run": continue_,
    "watch_run": watch,
}


async def get(client: RunClient, run_id: str = "run_1") -> str:
    """Ask for a run; return the id in the answer."""
    return (await client.get(CALLER, ECHO, run_id)).run.id


async def refusal(answer: Awaitable[object]) -> ApiError:
    """What a call fails with."""
    with pytest.raises(ApiError) as caught:
        await answer
    return caught.value


class Reader:
    """Takes what a call gets, as it comes."""

    def __init__(self, updates: UpdateStream) -> None:
        self.updates = updates
        self.news: list[rpc.RunUpdate] = []
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while (update := await self.updates.next()) is not None:
            self.news.append(update)

    def has(self, count: int) -> bool:
        """Whether so many events have come."""
        return len(self.sequences) == count

    @property
    def sequences(self) -> list[int]:
        """The events that came."""
        return [event.sequence for update in self.news for event in update.events]

    @property
    def statuses(self) -> list[int]:
        """The runs that came."""
        return [update.run.status for update in self.news if update.HasField("run")]

    @property
    def deltas(self) -> list[tuple[int, int, str]]:
        """The text in the making that came."""
        found = [update.delta for update in self.news if update.HasField("delta")]
        return [(delta.sequence, delta.offset, delta.text) for delta in found]


@asynccontextmanager
async def connected(**settings: Any) -> AsyncIterator[tuple[FakeService, FakeSession, RunClient]]:
    """A service, its first stream, and the client that opened it and has read the hello."""
    async with fake_service() as service, client_of(service, **settings) as client:
        yield service, await settled(service, client), client


async def settled(service: FakeService, client: RunClient) -> FakeSession:
    """The next stream, once the client has taken in its limits."""
    stream = await service.session()
    await probe(stream, client)
    return stream


async def probe(stream: FakeSession, client: RunClient) -> None:
    """Make a call and answer it: it must be the next thing that the service hears."""
    asking = asyncio.create_task(get(client, "probe"))
    command = await stream.take("get_run")
    assert command.get_run.run_id == "probe"
    await stream.send(answer_to(command))
    assert await asking == "probe"


# How a stream breaks: (service, stream) -> nothing, with a service that can be reached again afterwards.
Break = Callable[[FakeService, FakeSession], Awaitable[None]]


async def unavailable(_: FakeService, stream: FakeSession) -> None:
    """End it as a proxy does that lost its backend."""
    stream.end(grpc.StatusCode.UNAVAILABLE)


async def cancelled(_: FakeService, stream: FakeSession) -> None:
    """End it as a server does that gives its calls up."""
    stream.end(grpc.StatusCode.CANCELLED)


async def internal(_: FakeService, stream: FakeSession) -> None:
    """End it as a service does whose handler failed."""
    stream.end(grpc.StatusCode.INTERNAL)


async def ended(_: FakeService, stream: FakeSession) -> None:
    """End it as a service does that stops."""
    stream.end()


async def killed(service: FakeService, _: FakeSession) -> None:
    """Kill the server and start another one at its port."""
    await service.kill()
    await service.start()


each_break = pytest.mark.parametrize("break_", [unavailable, cancelled, internal, ended, killed])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that looks often, so that a test waits for a deadline and not for the look at it."""
    monkeypatch.setattr(replicas, "_TICK_SECONDS", 0.01)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause before the next stream."""
    monkeypatch.setattr(session, "_RECONNECT_SECONDS", (0.0, 0.01))


# -- Messages ------------------------------------------------------------------------------------------


def test_calls_of_one_turn_leave_in_one_message() -> None:
    """What is asked at once costs one message, whose commands are in the order of the calls and say on whose behalf."""

    async def main() -> None:
        async with connected() as (_, stream, client):
            before = len(stream.requests)
            calls = [start(client), continue_(client), watch(client, after=7)]
            asking = asyncio.gather(get(client, "run_2"), client.cancel(CALLER, ECHO, "run_3"))
            commands = [await stream.take(name) for name in ("start_run", "continue_run", "watch_run")]
            commands += [await stream.take("get_run"), await stream.take("cancel_run")]
            assert len(stream.requests) <= before + 2  # those of the tasks may come a turn later
            assert len(stream.requests[before].commands) >= len(calls)
            assert len({command.call for command in commands}) == 5
            for command in commands:
                assert (command.organization, command.subject) == ("acme", "key_1")
                assert (command.correlation_id, command.traceparent) == ("req_1", "00-trace")
            first, second, third, *_ = commands
            assert (first.start_run.input, first.start_run.title) == ("hello", "T")
            assert (first.start_run.server.id, first.start_run.metadata_json) == ("echo", b"{}")
            assert (second.continue_run.run_id, second.continue_run.input) == ("run_1", "more")
            assert first.start_run.request_id != second.continue_run.request_id
            assert min(len(first.start_run.request_id), len(second.continue_run.request_id)) > 16
            assert (third.watch_run.after_sequence, third.watch_run.stream.deltas) == (7, True)
            await stream.send(*(answer_to(command) for command in commands[3:]))
            await asking

    run_async(main())


def test_large_calls_leave_in_several_messages() -> None:
    """What would be too much for one message is spread over as many as it takes, in order."""

    async def main() -> None:
        async with connected() as (_, stream, client):
            before = len(stream.requests)
            texts = [f"{number}" + "x" * 100_000 for number in range(40)]
            for text in texts:
                client.continue_run(
                    CALLER, ECHO, "r", input=text, mode=pb.RUN_MODE_SYNC, metadata=None, stream=rpc.StreamOptions()
                )
            assert [(await stream.take("continue_run")).continue_run.input for _ in texts] == texts
            sizes = [request.ByteSize() for request in stream.requests[before:]]
            assert len(sizes) < len(texts)
            assert max(sizes) < 1 << 20

    run_async(main())


def test_updates_of_one_message_reach_their_calls() -> None:
    """A message with updates of many calls is dealt out; each call has its own order, its own end and its own error."""

    async def main() -> None:
        async with connected() as (_, stream, client):
            one, two = Reader(start(client)), Reader(watch(client))
            asking = asyncio.create_task(get(client, "run_9"))
            failing = asyncio.create_task(refusal(get(client, "run_0")))
            first, second = await stream.take("start_run"), await stream.take("watch_run")
            third, fourth = await stream.take("get_run"), await stream.take("get_run")
            await stream.send(
                update_of(second, news(5, status=RUNNING)),
                update_of(first, news(1, status=RUNNING)),
                error_to(fourth, grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND", "There is no run 'run_0'."),
                update_of(second, news(6)),
                answer_to(third),
                update_of(first, news(2, status=COMPLETED), last=True),
                rpc.SessionUpdate(call=987_654, run_update=news(1)),
                last_of(second),
            )
            await asyncio.gather(one.task, two.task)
            assert (one.sequences, one.statuses) == ([1, 2], [RUNNING, COMPLETED])
            assert (two.sequences, two.statuses) == ([5, 6], [RUNNING])
            assert await asking == "run_9"
            error = await failing
            assert (error.status, error.code, error.message) == (404, "RUN_NOT_FOUND", "There is no run 'run_0'.")

    run_async(main())


def test_error_comes_behind_what_was_sent_before() -> None:
    """A follower gets every update that came before its call failed, and then the error, once and for all."""

    async def main() -> None:
        async with connected() as (_, stream, client):
            updates = watch(client)
            command = await stream.take("watch_run")
            await stream.send(
                update_of(command, news(1, status=RUNNING)),
                update_of(command, news(2)),
                error_to(command, grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE"),
            )
            assert (await updates.next(), await updates.next()) == (news(1, status=RUNNING), news(2))
            for _ in range(2):
                assert (await refusal(updates.next())).code == "STORE_UNAVAILABLE"
            updates.stop()
            await probe(stream, client)

    run_async(main())


def test_call_that_is_left_is_stopped() -> None:
    """Who leaves before the end says so, once; what is still under way to it is dropped; an ended call says nothing."""

    async def main() -> None:
        async with connected() as (_, stream, client):
            left, done, asking = watch(client), watch(client), asyncio.create_task(get(client))
            first, second = await stream.take("watch_run"), await stream.take("watch_run")
            third = await stream.take("get_run")
            left.stop()
            left.stop()
            assert (await stream.take("stop")).call == first.call
            asking.cancel()
            assert (await stream.take("stop")).call == third.call
            await stream.send(
                update_of(first, news(1, status=RUNNING)), answer_to(third), update_of(second, news(1), last=True)
            )
            assert await done.next() == news(1)
            assert await done.next() is None
            done.stop()
            await probe(stream, client)

    run_async(main())


def test_call_that_is_hurried_before_it_has_left_keeps_to_its_numbers() -> None:
    """What was to be sent is sent, stopped, and asked again under another number; one number twice ends the session."""

    async def main() -> None:
        async with connected() as (_, stream, client):
            reader = Reader(start(client, wait_ms=30_000))
            client.replicas.hurry()
            first, stop, again = [await stream.take_next() for _ in range(3)]
            assert [each.WhichOneof("operation") for each in (first, stop, again)] == ["start_run", "stop", "start_run"]
            assert first.call == stop.call != again.call
            assert again.start_run.stream.wait_ms == 1
            await stream.send(update_of(again, news(1, status=RUNNING), last=True))
            await reader.task
            assert reader.sequences == [1]

    run_async(main())


def test_failed_call_is_stopped_and_told() -> None:
    """`fail` ends a call as `stop` does, and raises its error behind what had come, also in one who waits already."""
    reason = ApiError(503, "DRAINING", "for the test")

    async def main() -> None:
        async with connected() as (_, stream, client):
            updates, waiting = watch(client), Reader(watch(client))
            first, second = await stream.take("watch_run"), await stream.take("watch_run")
            await stream.send(update_of(first, news(1)), update_of(second, news(1)))
            await eventually(lambda: waiting.sequences == [1])
            updates.fail(reason)
            waiting.updates.fail(reason)
            assert await updates.next() == news(1)
            assert await refusal(updates.next()) is reason
            assert await refusal(waiting.task) is reason
            assert {(await stream.take("stop")).call, (await stream.take("stop")).call} == {first.call, second.call}

    run_async(main())


# -- Windows -------------------------------------------------------------------------------------------


def test_updates_are_acknowledged_by_half_windows() -> None:
    """Whoever reads makes room as soon as half of the window is taken in; who has ended says nothing any more."""

    async def main() -> None:
        async with connected() as (_, stream, client):
            updates = watch(client)
            command = await stream.take("watch_run")
            half = WINDOW // 2
            for first in (1, 1 + half):
                await stream.send(*(update_of(command, news(number)) for number in range(first, first + half)))
                for _ in range(half - 1):
                    await updates.next()
                await probe(stream, client)
                await updates.next()
                acknowledged = await stream.take("acknowledge")
                assert (acknowledged.call, acknowledged.acknowledge.updates) == (command.call, half)
            await stream.send(*(update_of(command, news(number), last=number == 16) for number in range(9, 17)))
            await probe(stream, client)
            while await updates.next() is not None:
                pass
            await probe(stream, client)

    run_async(main())


def test_reader_who_does_not_read_holds_up_nobody() -> None:
    """A call that nobody reads gets no more than the window, while others are served; once it is read all comes."""
    flood = 500

    async def serve_flood(stream: FakeSession, command: rpc.SessionCommand) -> None:
        ahead = 0
        for number in range(1, flood + 1):
            while ahead >= WINDOW:
                ahead -= (await stream.take("acknowledge")).acknowledge.updates
            await stream.send(update_of(command, news(number), last=number == flood))
            ahead += 1

    async def main() -> None:
        async with connected() as (_, stream, client):
            unread = watch(client)
            command = await stream.take("watch_run")
            await stream.send(*(update_of(command, news(number)) for number in range(1, WINDOW + 1)))
            for _ in range(3):
                # Also: nothing is acknowledged.
                await probe(stream, client)
                reader = Reader(watch(client))
                flooded = await stream.take("watch_run")
                await serve_flood(stream, flooded)
                await reader.task
                stream.ignore(flooded)
                assert reader.sequences == list(range(1, flood + 1))
            late = Reader(unread)
            acknowledged = [(await stream.take("acknowledge")).acknowledge.updates for _ in range(2)]
            assert acknowledged == [WINDOW // 2] * 2
            await stream.send(update_of(command, news(WINDOW + 1), last=True))
            await late.task
            assert late.sequences == list(range(1, WINDOW + 2))

    run_async(main())


# -- Breaks --------------------------------------------------------------------------------------------


@each_break
@pytest.mark.parametrize("operation", ["start_run", "continue_run"])
def test_turn_is_asked_for_again_with_its_id(operation: str, break_: Break) -> None:
    """The same command with the same request id goes out again; only the time to wait is what is left of it."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with connected() as (service, stream, client):
            call = start if operation == "start_run" else continue_
            asked_at = loop.time()
            reader = Reader(call(client, wait_ms=30_000))
            command = await stream.take(operation)
            request = getattr(command, operation)
            assert request.request_id
            for breaks in (1, 2):
                await break_(service, stream)
                stream = await service.session()
                command = await stream.take(operation)
                repeated = getattr(command, operation)
                passed_ms = (loop.time() - asked_at) * 1000
                pause_ms = 50 * breaks
                assert 30_000 - passed_ms - 1 <= repeated.stream.wait_ms <= 30_000 - pause_ms + breaks
                repeated.stream.wait_ms = request.stream.wait_ms
                assert repeated == request
                assert (command.organization, command.subject) == ("acme", "key_1")
            await stream.send(update_of(command, news(1, status=COMPLETED), last=True))
            await reader.task
            assert (reader.sequences, reader.statuses) == ([1], [COMPLETED])

    run_async(main())


@each_break
def test_question_is_asked_again(break_: Break) -> None:
    """Get, list, events and cancel are asked again as they were, a long poll with what is left of its time."""

    async def main() -> None:
        async with connected() as (service, stream, client):
            asking = [
                asyncio.create_task(client.get(CALLER, ECHO, "run_1")),
                asyncio.create_task(client.list(CALLER, ECHO, limit=7, page_token="p", status=pb.RUN_STATUS_COMPLETED)),
                asyncio.create_task(client.list_events(CALLER, ECHO, "run_2", after=3, limit=9, wait_seconds=20)),
                asyncio.create_task(client.cancel(CALLER, ECHO, "run_3")),
            ]
            before = await stream.take_calls(4)
            for _ in range(2):
                await break_(service, stream)
                stream = await service.session()
                again = await stream.take_calls(4)
                left = again["list_run_events"].list_run_events
                assert 10_000 < left.wait_ms <= before["list_run_events"].list_run_events.wait_ms - 49
                before["list_run_events"].list_run_events.wait_ms = left.wait_ms
                assert unnumbered(again) == unnumbered(before)
            await stream.send(*(answer_to(command) for command in again.values()))
            run, page, events, cancelled_run = await asyncio.gather(*asking)
            assert (run.run.id, page.agent_runtime_id, events.run.id) == ("run_1", "echo", "run_2")  # type: ignore[attr-defined]
            assert cancelled_run.run.id == "run_3"  # type: ignore[attr-defined]

    run_async(main())


def unnumbered(calls: dict[str, rpc.SessionCommand]) -> list[rpc.SessionCommand]:
    """Commands without the number, which is another one each time."""
    commands = []
    for operation in sorted(calls):
        command = rpc.SessionCommand()
        command.CopyFrom(calls[operation])
        command.call = 0
        commands.append(command)
    return commands


def log_from(after: int, chunk: int) -> list[rpc.RunUpdate]:
    """What a service says of a run with six events after a sequence, `chunk` events at a time."""
    numbers = list(range(after + 1, 7))
    updates = [news(*numbers[first : first + chunk]) for first in range(0, len(numbers), chunk)] or [news()]
    for update, status in ((updates[0], RUNNING), (updates[-1], COMPLETED)):
        update.run.CopyFrom(run_message(status))
        update.thread.CopyFrom(THREAD)
    return updates


@each_break
@pytest.mark.parametrize("operation", FOLLOWED)
def test_follower_sees_no_break(operation: str, break_: Break, eager: None) -> None:
    """Wherever the stream is cut, however often: each event once, in order, each status once, one end."""

    async def main() -> None:
        async with connected() as (service, stream, client):
            reader = Reader(FOLLOWED[operation](client))
            # Each time a little more comes before the break, in other pieces; at last all but the `last`.
            for attempt, chunk in enumerate((6, 1, 2, 1, 3, 1, 1, 1, 2, 6)):
                command = await stream.take(operation)
                after = reader.sequences[-1] if reader.sequences else 0
                if operation == "watch_run":
                    assert command.watch_run.after_sequence == after
                story = log_from(after if operation == "watch_run" else 0, chunk)
                updates = story if attempt == 9 else story[:-1][:attempt]
                await stream.send(*(update_of(command, update) for update in updates))
                expected = max([after, *(event.sequence for update in updates for event in update.events)])
                await eventually(partial(reader.has, expected))
                await break_(service, stream)
                stream = await service.session()
            command = await stream.take(operation)
            story = log_from(6 if operation == "watch_run" else 0, 6)
            story[0].run.status = COMPLETED
            await stream.send(*(update_of(command, update) for update in story))
            await stream.send(last_of(command))
            await reader.task
            assert reader.sequences == [1, 2, 3, 4, 5, 6]
            assert reader.statuses == [RUNNING, COMPLETED]
            await probe(stream, client)

    run_async(main())


@pytest.mark.parametrize("operation", FOLLOWED)
def test_break_before_the_end_is_told_once(operation: str, eager: None) -> None:
    """When the run has ended and only the end of the call is missing, no status and no event is told again."""

    async def main() -> None:
        async with connected() as (service, stream, client):
            reader = Reader(FOLLOWED[operation](client))
            for _ in range(3):
                command = await stream.take(operation)
                replay = command.watch_run.after_sequence == 0
                await stream.send(update_of(command, news(*(1, 2) if replay else (), status=COMPLETED)))
                await eventually(lambda: reader.sequences == [1, 2])
                await unavailable(service, stream)
                stream = await service.session()
            command = await stream.take(operation)
            replay = command.watch_run.after_sequence == 0
            await stream.send(update_of(command, news(*(1, 2) if replay else (), status=COMPLETED), last=True))
            await reader.task
            assert (reader.sequences, reader.statuses) == ([1, 2], [COMPLETED])

    run_async(main())


@pytest.mark.parametrize("operation", FOLLOWED)
def test_other_status_after_a_break_is_told(operation: str, eager: None) -> None:
    """A turn that went back into the queue, or on to its next turn, is told; known events before it are not."""

    async def main() -> None:
        async with connected() as (service, stream, client):
            reader = Reader(FOLLOWED[operation](client))
            command = await stream.take(operation)
            await stream.send(update_of(command, news(1, 2, status=RUNNING)))
            await eventually(lambda: reader.sequences == [1, 2])
            await unavailable(service, stream)
            stream = await service.session()
            command = await stream.take(operation)
            known = () if operation == "watch_run" else (1, 2)
            await stream.send(update_of(command, news(*known, status=QUEUED)), update_of(command, news(3)))
            await stream.send(update_of(command, news(status=RUNNING)), update_of(command, news(4)))
            next_turn = news(5, status=RUNNING)
            next_turn.run.turn = 2
            await stream.send(update_of(command, next_turn))
            await stream.send(update_of(command, news(6, status=COMPLETED), last=True))
            await reader.task
            assert reader.sequences == [1, 2, 3, 4, 5, 6]
            assert reader.statuses == [RUNNING, QUEUED, RUNNING, RUNNING, COMPLETED]

    run_async(main())


@each_break
def test_text_in_the_making_starts_again(break_: Break) -> None:
    """After a break the text of the next event comes from its beginning, and then the event, whole."""

    def typed(offset: int, text: str) -> rpc.RunUpdate:
        return news(delta=rpc.ContentDelta(sequence=2, offset=offset, text=text))

    async def main() -> None:
        async with connected() as (service, stream, client):
            reader = Reader(watch(client))
            command = await stream.take("watch_run")
            await stream.send(
                *(update_of(command, each) for each in (news(1, status=RUNNING), typed(0, "Hel"), typed(3, "lo")))
            )
            await eventually(lambda: len(reader.deltas) == 2)
            await break_(service, stream)
            stream = await service.session()
            command = await stream.take("watch_run")
            assert command.watch_run.after_sequence == 1
            await stream.send(update_of(command, news(status=RUNNING)), update_of(command, typed(0, "Hello")))
            await stream.send(update_of(command, news(2, status=COMPLETED), last=True))
            await reader.task
            assert reader.deltas == [(2, 0, "Hel"), (2, 3, "lo"), (2, 0, "Hello")]
            assert (reader.sequences, reader.statuses) == ([1, 2], [RUNNING, COMPLETED])

    run_async(main())


def test_window_starts_again_after_a_break(eager: None) -> None:
    """What came through one stream is not acknowledged to the next one."""

    async def main() -> None:
        async with connected() as (service, stream, client):
            updates = watch(client)
            command = await stream.take("watch_run")
            await stream.send(*(update_of(command, news(number)) for number in range(1, 7)))
            await probe(stream, client)
            await updates.next()
            await unavailable(service, stream)
            stream = await service.session()
            command = await stream.take("watch_run")
            assert command.watch_run.after_sequence == 6
            await stream.send(*(update_of(command, news(number)) for number in range(7, 11)))
            await probe(stream, client)
            for _ in range(5 + 3):
                await updates.next()
            await probe(stream, client)
            await updates.next()
            assert (await stream.take("acknowledge")).acknowledge.updates == 4

    run_async(main())


@each_break
def test_call_that_was_left_meanwhile_is_not_asked_again(break_: Break) -> None:
    """Who left while there was no stream is not asked for on the next one; nor who had ended, nor who had failed."""

    async def main() -> None:
        async with connected() as (service, stream, client):
            left, ended_before, failed, goes_on = (watch(client, after) for after in (1, 2, 3, 4))
            asking = asyncio.create_task(get(client))
            commands = [await stream.take("watch_run") for _ in range(4)]
            await stream.take("get_run")
            await stream.send(last_of(commands[1]), error_to(commands[2], grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND"))
            assert await ended_before.next() is None
            assert (await refusal(failed.next())).code == "RUN_NOT_FOUND"
            await break_(service, stream)
            await stream.closed.wait()
            left.stop()
            asking.cancel()
            stream = await service.session()
            again = await stream.take("watch_run")
            assert again.watch_run.after_sequence == 4
            await probe(stream, client)
            await stream.send(last_of(again))
            assert await goes_on.next() is None

    run_async(main())


def test_calls_that_are_made_while_there_is_no_stream_wait_for_it() -> None:
    """A call that is made between two streams, or before the first, is asked on the next one."""

    async def main() -> None:
        async with fake_service() as service, client_of(service) as client:
            first = asyncio.create_task(get(client, "run_1"))
            stream = await service.session()
            await stream.send(answer_to(await stream.take("get_run")))
            assert await first == "run_1"
            await service.kill()
            second = asyncio.create_task(get(client, "run_2"))
            await asyncio.sleep(0)
            await service.start()
            stream = await service.session()
            await stream.send(answer_to(await stream.take("get_run")))
            assert await second == "run_2"

    run_async(main())


def test_service_that_breaks_before_its_hello_is_asked_again(eager: None) -> None:
    """Streams that end before they begin cost nobody anything but time."""

    async def main() -> None:
        async with fake_service() as service:
            limits, service.limits = service.limits, None
            async with client_of(service) as client:
                asking = asyncio.create_task(get(client))
                for number in range(6):
                    stream = await service.session()
                    if number == 5:
                        service.limits = limits
                    stream.end(grpc.StatusCode.UNAVAILABLE if number % 2 else grpc.StatusCode.OK)
                    assert not stream.requests
                stream = await service.session()
                await stream.send(answer_to(await stream.take("get_run")))
                assert await asking == "run_1"

    run_async(main())


# -- A service that stops, or is away for long ---------------------------------------------------------


@each_break
def test_call_that_is_refused_by_a_stopping_service_is_asked_of_the_next(break_: Break) -> None:
    """DRAINING is no answer while another service may come: the call waits for it, with its request id."""

    async def main() -> None:
        async with connected() as (service, stream, client):
            one, two = Reader(start(client)), Reader(watch(client))
            asking = asyncio.create_task(client.cancel(CALLER, ECHO, "run_1"))
            calls = await stream.take_calls(3)
            await stream.send(update_of(calls["watch_run"], news(1, 2, status=RUNNING)))
            await stream.send(*(error_to(each, grpc.StatusCode.UNAVAILABLE, "DRAINING") for each in calls.values()))
            await eventually(lambda: not client.replicas.is_serving)
            # Nothing is asked of who stops.
            late = asyncio.create_task(get(client, "late"))
            await asyncio.sleep(0)
            assert not any(task.done() for task in (one.task, two.task, asking))
            await break_(service, stream)
            assert len([command for request in stream.requests for command in request.commands]) == 3 + 1
            stream = await service.session()
            again = await stream.take_calls(4)
            await stream.send(answer_to(again.pop("get_run")))
            assert await late == "late"
            assert again["start_run"].start_run == calls["start_run"].start_run
            assert again["watch_run"].watch_run.after_sequence == 2
            await stream.send(
                update_of(again["start_run"], news(1, status=COMPLETED), last=True),
                update_of(again["watch_run"], news(3, status=COMPLETED), last=True),
                answer_to(again["cancel_run"]),
            )
            await asyncio.gather(one.task, two.task, asking)
            assert (one.sequences, two.sequences) == ([1], [1, 2, 3])

    run_async(main())


def test_stopping_service_without_a_next_one_is_told(quick: None) -> None:
    """After the time for a reconnect DRAINING is the answer, whether the old stream is still there or not."""

    async def main() -> None:
        for kills in (False, True):
            async with connected(reconnect_seconds=0.2) as (service, stream, client):
                reader = Reader(start(client))
                command = await stream.take("start_run")
                await stream.send(update_of(command, news(1, status=RUNNING)))
                await stream.send(error_to(command, grpc.StatusCode.UNAVAILABLE, "DRAINING", "It stops."))
                if kills:
                    await service.kill()
                error = await refusal(reader.task)
                assert (error.status, error.code, error.message) == (503, "DRAINING", "It stops.")
                assert error.headers["Retry-After"]
                assert reader.sequences == [1]

    run_async(main())


def test_service_that_is_away_is_told(quick: None, caplog: pytest.LogCaptureFixture) -> None:
    """After the time for a reconnect calls fail; only what no service can have seen says that nothing was changed."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with connected(reconnect_seconds=0.2) as (service, stream, client):
            reader = Reader(start(client))
            asking = asyncio.create_task(get(client))
            calls = await stream.take_calls(2)
            await stream.send(update_of(calls["start_run"], news(1, status=RUNNING)))
            await eventually(lambda: reader.news)
            away_since = loop.time()
            await service.kill()
            await eventually(lambda: f"at {service.target} broke" in caplog.text)
            late = asyncio.create_task(get(client))
            errors = await asyncio.gather(refusal(reader.task), refusal(asking), refusal(late))
            assert 0.2 <= loop.time() - away_since < 2
            for error, words in zip(errors, ("may still take", "may still take", "nothing was changed"), strict=True):
                assert (error.status, error.code) == (503, "RUNTIME_UNAVAILABLE")
                assert words in error.message
                assert error.headers["Retry-After"]
            # Once it is back, all is as it was.
            await service.start()
            await settled(service, client)

    run_async(main())


def test_silent_service_is_as_one_that_is_away(quick: None) -> None:
    """A service that takes the stream and says nothing, not even hello, does not keep anybody for longer."""

    async def main() -> None:
        async with fake_service() as service:
            service.limits = None
            async with client_of(service, reconnect_seconds=0.1) as client:
                stream = await service.session()
                error = await refusal(get(client))
                assert (error.status, error.code) == (503, "RUNTIME_UNAVAILABLE")
                assert not stream.requests

    run_async(main())


def test_service_that_breaks_behind_every_hello_is_as_one_that_is_away(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls fail after the time for a reconnect, in which streams are opened ever more slowly; a good one serves."""
    monkeypatch.setattr(session, "_RECONNECT_SECONDS", (0.01, 0.1))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        opened = 0

        async def break_each(service: FakeService) -> None:
            nonlocal opened
            while True:
                (await service.session()).end(grpc.StatusCode.RESOURCE_EXHAUSTED)
                opened += 1

        async with connected(reconnect_seconds=0.5) as (service, stream, client):
            reader, asking = Reader(watch(client)), asyncio.create_task(get(client))
            await stream.take_calls(2)
            breaking = asyncio.create_task(break_each(service))
            broken_since = loop.time()
            stream.end(grpc.StatusCode.UNAVAILABLE)
            for error in await asyncio.gather(refusal(reader.task), refusal(asking)):
                assert (error.status, error.code) == (503, "RUNTIME_UNAVAILABLE")
            assert 0.5 <= loop.time() - broken_since < 2
            breaking.cancel()
            await asyncio.wait([breaking])
            assert 1 < opened <= 10
            await settled(service, client)

    run_async(main())


def test_session_that_fails_by_itself_is_opened_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody has thought of is logged; the call that is under way is asked again."""
    take = session.Session._take

    def fail_once(_: session.Session, __: rpc.SessionResponse) -> None:
        monkeypatch.setattr(session.Session, "_take", take)
        raise ValueError("unthought of")

    async def main() -> None:
        async with connected() as (service, stream, client):
            asking = asyncio.create_task(get(client))
            command = await stream.take("get_run")
            monkeypatch.setattr(session.Session, "_take", fail_once)
            await stream.send(answer_to(command))
            await stream.closed.wait()
            stream = await service.session()
            await stream.send(answer_to(await stream.take("get_run")))
            assert await asking == "run_1"
            assert "ValueError: unthought of" in caplog.text

    run_async(main())


@pytest.mark.parametrize(
    ("code", "document"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, "RUNTIME_REFUSED_GATEWAY"),
        (grpc.StatusCode.PERMISSION_DENIED, "RUNTIME_REFUSED_GATEWAY"),
        (grpc.StatusCode.UNIMPLEMENTED, "RUNTIME_INCOMPATIBLE"),
    ],
)
def test_service_that_refuses_the_gateway_is_told_at_once(code: grpc.StatusCode, document: str) -> None:
    """Calls fail with 502 at once, those under way, too; as soon as another service is there, it is used."""

    async def main() -> None:
        async with connected(reconnect_seconds=1_000) as (service, stream, client):
            under_way = [Reader(start(client)), Reader(watch(client))]
            await stream.take_calls(2)
            service.refuse_with = code
            stream.end(code)
            await stream.closed.wait()
            errors = [await refusal(reader.task) for reader in under_way]
            errors += [await refusal(get(client)) for _ in range(3)]
            assert {(error.status, error.code) for error in errors} == {(502, document)}
            service.refuse_with = None
            await service.kill()
            await service.start()
            await settled(service, client)

    run_async(main())


def test_service_without_sessions_is_told() -> None:
    """A runtime service that is too old to know Session is a 502, until it is replaced."""

    async def main() -> None:
        async with fake_service() as service:
            await service.kill()
            service.knows_session = False
            await service.start()
            async with client_of(service, reconnect_seconds=1_000) as client:
                for _ in range(2):
                    error = await refusal(get(client))
                    assert (error.status, error.code) == (502, "RUNTIME_INCOMPATIBLE")
                await service.kill()
                service.knows_session = True
                await service.start()
                await settled(service, client)

    run_async(main())


def test_stream_that_is_found_invalid_is_not_the_callers_fault() -> None:
    """When the service takes the gateway's messages for wrong, its callers are not told that their requests are."""

    async def main() -> None:
        async with connected(reconnect_seconds=1_000) as (service, stream, client):
            reader = Reader(start(client))
            await stream.take("start_run")
            stream.end(grpc.StatusCode.INVALID_ARGUMENT)
            error = await refusal(reader.task)
            assert (error.status, error.code) == (502, "RUNTIME_INCOMPATIBLE")
            await settled(service, client)

    run_async(main())


# -- Deadlines -----------------------------------------------------------------------------------------


def test_question_without_an_answer_times_out(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that is there and never answers: 504 at the deadline, and the call is stopped; a long poll adds its."""
    monkeypatch.setattr(run_client, "_UNARY_SECONDS", 0.2)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with connected() as (_, stream, client):
            for asking, operation, seconds in (
                (lambda: get(client), "get_run", 0.2),
                (lambda: client.cancel(CALLER, ECHO, "r"), "cancel_run", 0.2),
                (
                    lambda: client.list_events(CALLER, ECHO, "r", after=0, limit=0, wait_seconds=0.3),
                    "list_run_events",
                    0.5,
                ),
                (lambda: start(client, mode=pb.RUN_MODE_ASYNC).next(), "start_run", 0.2),
            ):
                begun = loop.time()
                error = await refusal(asking())
                assert (error.status, error.code) == (504, "DEADLINE_EXCEEDED")
                assert seconds <= loop.time() - begun < seconds + 1
                command = await stream.take(operation)
                assert (await stream.take("stop")).call == command.call
            await probe(stream, client)

    run_async(main())


@pytest.mark.parametrize("call", [start, continue_])
def test_turn_that_is_waited_for_times_out_behind_its_wait(
    call: Callable[..., UpdateStream], quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that does not keep the wait that was asked of it has some more time, then it is a 504."""
    monkeypatch.setattr(run_client, "_MARGIN_SECONDS", 0.2)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with connected() as (_, stream, client):
            begun = loop.time()
            error = await refusal(call(client, wait_ms=300).next())
            assert (error.status, error.code) == (504, "DEADLINE_EXCEEDED")
            assert 0.5 <= loop.time() - begun < 1.5
            await stream.take("start_run" if call is start else "continue_run")
            await stream.take("stop")

    run_async(main())


def test_deadline_is_not_put_off_by_breaks(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that breaks again and again does not hold an answer up for ever."""
    monkeypatch.setattr(run_client, "_UNARY_SECONDS", 0.5)

    async def main() -> None:
        async with connected() as (service, stream, client):
            failing = asyncio.create_task(refusal(get(client)))
            while not failing.done():
                stream.end(grpc.StatusCode.UNAVAILABLE)
                stream = await service.session()
            assert (await failing).code == "DEADLINE_EXCEEDED"

    run_async(main())


def test_followers_have_no_deadline(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who follows live waits as long as it takes, without a word from the service."""
    monkeypatch.setattr(run_client, "_UNARY_SECONDS", 0.1)
    monkeypatch.setattr(run_client, "_MARGIN_SECONDS", 0.1)

    async def main() -> None:
        async with connected() as (_, stream, client):
            readers = [Reader(start(client)), Reader(continue_(client)), Reader(watch(client))]
            calls = await stream.take_calls(3)
            for _ in range(3):
                await refusal(get(client))
                await stream.take("get_run")
                await stream.take("stop")
            for command in calls.values():
                await stream.send(update_of(command, news(1, status=COMPLETED), last=True))
            for reader in readers:
                await reader.task
                assert reader.sequences == [1]

    run_async(main())


def test_every_failure_has_an_error_of_its_own(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception remembers who it went through; one that all had in common would keep them for ever."""
    monkeypatch.setattr(run_client, "_UNARY_SECONDS", 0.05)

    async def main() -> None:
        async with connected(reconnect_seconds=0.05) as (service, _, client):
            timed_out = [await refusal(get(client)) for _ in range(2)]
            await service.kill()
            away = [await refusal(get(client)) for _ in range(2)]
            assert len({id(error) for error in timed_out + away}) == 4

    run_async(main())


# -- Limits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("own", "theirs"), [(3, 1_000), (1_000, 3)])
def test_call_past_the_limit_is_refused_at_once(own: int, theirs: int) -> None:
    """The smaller of the gateway's limit and the service's holds: one more is 503 OVERLOADED, until one has ended."""

    async def main() -> None:
        async with fake_service() as service:
            assert service.limits is not None
            service.limits.max_calls = theirs
            async with client_of(service, max_calls=own) as client:
                stream = await settled(service, client)
                calls = [watch(client, after) for after in range(3)]
                commands = [await stream.take("watch_run") for _ in calls]
                for ask in FOLLOWED.values():
                    with pytest.raises(ApiError) as caught:
                        ask(client)
                    assert (caught.value.status, caught.value.code) == (503, "OVERLOADED")
                    assert "nothing was changed" in caught.value.message
                    assert caught.value.headers["Retry-After"]
                assert (await refusal(get(client))).code == "OVERLOADED"
                # Room again: after an end, after an error, after a stop.
                await stream.send(last_of(commands[0]))
                assert await calls[0].next() is None
                await probe(stream, client)
                await stream.send(error_to(commands[1], grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND"))
                await refusal(calls[1].next())
                calls[2].stop()
                await stream.take("stop")
                again = [watch(client) for _ in calls]
                with pytest.raises(ApiError):
                    watch(client)
                for call in again:
                    call.stop()

    run_async(main())


def test_call_that_is_too_large_is_refused_alone() -> None:
    """A command that the service would not take is a 413 of its call; the stream and its other calls go on."""

    def large(client: RunClient, size: int) -> UpdateStream:
        options = rpc.StreamOptions()
        return client.continue_run(
            CALLER, ECHO, "r", input="x" * size, mode=pb.RUN_MODE_SYNC, metadata=None, stream=options
        )

    async def main() -> None:
        async with fake_service() as service:
            assert service.limits is not None
            service.limits.max_message_bytes = 1 << 20
            async with client_of(service) as client:
                stream = await settled(service, client)
                reader = Reader(watch(client))
                command = await stream.take("watch_run")
                with pytest.raises(ApiError) as caught:
                    large(client, 1 << 20)
                assert (caught.value.status, caught.value.code) == (413, "BODY_TOO_LARGE")
                calls = [large(client, 700_000) for _ in range(3)]
                for _ in calls:
                    await stream.take("continue_run")
                assert max(request.ByteSize() for request in stream.requests) <= 1 << 20
                for call in calls:
                    call.stop()
                    await stream.take("stop")
                await stream.send(update_of(command, news(1, status=COMPLETED), last=True))
                await reader.task
                await probe(stream, client)

    run_async(main())


@pytest.mark.parametrize("theirs", [1 << 20, 1 << 30])
def test_call_that_turns_out_too_large_is_refused_alone(theirs: int) -> None:
    """One that was made before the service said what it takes, or that is too large for gRPC, is a 413, too."""
    size = 2 << 20 if theirs == 1 << 20 else 8 << 20

    async def main() -> None:
        async with fake_service() as service:
            assert service.limits is not None
            service.limits.max_message_bytes = theirs
            async with client_of(service) as client:
                other = Reader(watch(client))

                async def ask() -> None:
                    options = rpc.StreamOptions()
                    text = "x" * size
                    await client.continue_run(
                        CALLER, ECHO, "r", input=text, mode=pb.RUN_MODE_SYNC, metadata=None, stream=options
                    ).next()

                error = await refusal(ask())
                assert (error.status, error.code) == (413, "BODY_TOO_LARGE")
                stream = await service.session()
                await stream.send(update_of(await stream.take("watch_run"), news(1, status=COMPLETED), last=True))
                await other.task
                await probe(stream, client)

    run_async(main())


# -- The end -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["connected", "refused", "away", "silent"])
def test_close_leaves_nothing_behind(state: str) -> None:
    """Whatever the stream is doing, closing ends it, fails what waits, and leaves neither task nor timer."""

    async def main() -> None:
        before = asyncio.all_tasks()
        service = FakeService()
        await service.start()
        if state == "silent":
            service.limits = None
        async with client_of(service) as client:
            stream = await service.session()
            if state == "connected":
                await probe(stream, client)
            readers = [Reader(start(client)), Reader(watch(client))]
            assert [timer for timer in _timers() if "Replicas" in repr(timer)]
            waiting = [*(reader.task for reader in readers), asyncio.ensure_future(get(client))]
            await asyncio.sleep(0)
            if state == "connected":
                await stream.take_calls(3)
            elif state == "refused":
                service.refuse_with = grpc.StatusCode.UNAVAILABLE
                stream.end(grpc.StatusCode.UNAVAILABLE)
                await stream.closed.wait()
            elif state == "away":
                await service.kill()
        for task in waiting:
            error = await refusal(task)
            assert (error.status, error.code) == (503, "RUNTIME_UNAVAILABLE")
        assert not [timer for timer in _timers() if "Replicas" in repr(timer)]
        if state != "away":
            await service.kill()
        await stream.closed.wait()
        await eventually(lambda: asyncio.all_tasks() <= before)

    run_async(main())


def _timers() -> Iterator[asyncio.TimerHandle]:
    """The timers of this loop that are still to come."""
    scheduled: list[asyncio.TimerHandle] = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
    return (timer for timer in scheduled if not timer.cancelled())
