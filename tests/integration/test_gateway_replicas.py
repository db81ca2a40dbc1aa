"""The gateway before several runtime services that do as the test says: whose turn it is, and who takes over."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from gateway import addresses, channel, health, replicas, run_client, session
from gateway.addresses import Address
from gateway.errors import ApiError
from gateway.replicas import Replicas
from gateway.run_client import RunClient
from protos.acp.runs.v1 import run_pb2 as pb
from protos.acp.runs.v1 import run_service_pb2 as rpc
from tests.integration.session_service import (
    FakeService,
    FakeSession,
    answer_to,
    error_to,
    fake_services,
    last_of,
    news,
    replicas_at,
    update_of,
)
from tests.integration.stack import fronting, runs, until
from tests.integration.test_gateway_events import check_stream, events_of
from tests.integration.test_gateway_session import CALLER, ECHO, FOLLOWED, Reader, continue_, get, refusal, start, watch
from tests.integration.wire import Wire
from tests.support import eventually, run_async

RUNNING, COMPLETED = pb.RUN_STATUS_RUNNING, pb.RUN_STATUS_COMPLETED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks that look often, so that a test waits for a fact and not for the look at it."""
    monkeypatch.setattr(replicas, "_TICK_SECONDS", 0.01)
    monkeypatch.setattr(session, "_RECONNECT_SECONDS", (0.0, 0.01))
    monkeypatch.setattr(health, "_NOT_SERVING_SECONDS", 0.01)
    monkeypatch.setattr(health, "_BROKEN_SECONDS", 0.0)


class Names:
    """What names stand for, as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hosts: tuple[str, ...] = ()
        self.fails = False
        self.asked = 0
        monkeypatch.setattr(addresses, "_ASK_SECONDS", 0.01)
        monkeypatch.setattr(addresses, "resolve", self._resolve)

    async def _resolve(self, name: Address) -> list[Address]:
        assert name.host == "runtimes.example"
        self.asked += 1
        if self.fails:
            raise OSError(-3, "Temporary failure in name resolution")
        return [Address(host, name.port) for host in self.hosts]

    async def until_asked(self) -> None:
        """Return once the answer to a question that was asked from now on has been taken in."""
        before = self.asked
        await eventually(lambda: self.asked > before + 1)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """The names."""
    return Names(monkeypatch)


def targets_of(services: list[FakeService]) -> str:
    """All services, as a list of targets."""
    return ",".join(service.target for service in services)


def ready(known: Replicas) -> int:
    """How many replicas can take calls."""
    return len(known._ready)


@asynccontextmanager
async def connected(
    count: int = 2, **settings: Any
) -> AsyncIterator[tuple[list[FakeService], list[FakeSession], RunClient]]:
    """Services that all serve, the stream of each, and a client of all."""
    async with fake_services(count) as services, replicas_at(targets_of(services), **settings) as known:
        streams = [await service.session() for service in services]
        await eventually(lambda: ready(known) == count)
        yield services, streams, RunClient(known)


async def asked(streams: list[FakeSession], operation: str) -> tuple[FakeSession, rpc.SessionCommand]:
    """The next command of all streams, which is this one, and where it was asked."""
    taking = {asyncio.create_task(stream.take(operation)): stream for stream in streams}
    done, waiting = await asyncio.wait(taking, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert len(done) == 1
    task = done.pop()
    return taking[task], task.result()


async def ask(client: RunClient, streams: list[FakeSession], run_id: str = "run_1") -> FakeSession:
    """Make a call and have it answered; return by whom."""
    asking = asyncio.create_task(get(client, run_id))
    stream, command = await asked(streams, "get_run")
    await stream.send(answer_to(command))
    assert await asking == run_id
    return stream


def other_than(stream: FakeSession, streams: list[FakeSession]) -> FakeSession:
    """The other one of two."""
    return streams[1 - streams.index(stream)]


# -- Whose turn it is ----------------------------------------------------------------------------------


def test_calls_go_round() -> None:
    """Each replica in turn."""

    async def main() -> None:
        async with connected(3) as (_, streams, client):
            order = [streams.index(await ask(client, streams)) for _ in range(9)]
            assert order[:3] == order[3:6] == order[6:]
            assert sorted(order[:3]) == [0, 1, 2]

    run_async(main())


def test_replica_that_does_not_serve_gets_no_new_call() -> None:
    """It keeps what it has to the end; once it serves again it has its turn again."""

    async def main() -> None:
        async with connected() as (services, streams, client):
            readers = [Reader(watch(client)) for _ in streams]
            commands = [await stream.take("watch_run") for stream in streams]
            await services[0].say(serving=False)
            await eventually(lambda: ready(client.replicas) == 1)
            for _ in range(4):
                assert await ask(client, streams) is streams[1]
            for stream, command in zip(streams, commands, strict=True):
                await stream.send(update_of(command, news(1, status=COMPLETED), last=True))
            for reader in readers:
                await reader.task
                assert reader.sequences == [1]
            await services[0].say(serving=True)
            await eventually(lambda: ready(client.replicas) == 2)
            assert {await ask(client, streams), await ask(client, streams)} == set(streams)

    run_async(main())


def test_replica_that_does_not_serve_at_first_is_waited_for() -> None:
    """A stream alone makes nobody ready."""

    async def main() -> None:
        async with connected(1) as (services, streams, client):
            await services[0].say(serving=False)
            await eventually(lambda: not client.replicas.is_serving)
            asking = asyncio.create_task(get(client))
            await asyncio.sleep(0)
            assert not streams[0].requests
            await services[0].say(serving=True)
            command = await streams[0].take("get_run")
            await streams[0].send(answer_to(command))
            assert await asking == "run_1"

    run_async(main())


def test_none_that_serves_is_told() -> None:
    """After the time for one to come back: 503 that says that nothing was changed."""

    async def main() -> None:
        async with connected(reconnect_seconds=0.2) as (services, streams, client):
            for service in services:
                await service.say(serving=False)
            await eventually(lambda: not client.replicas.is_serving)
            error = await refusal(get(client))
            assert (error.status, error.code) == (503, "RUNTIME_UNAVAILABLE")
            assert "nothing was changed" in error.message
            assert error.headers["Retry-After"]
            assert not any(stream.requests for stream in streams)

    run_async(main())


def test_limit_of_calls_holds_over_all() -> None:
    """The gateway's own limit counts the calls of all replicas, and those that wait."""

    async def main() -> None:
        async with connected(max_calls=3) as (services, _, client):
            calls = [watch(client), watch(client), watch(client)]
            with pytest.raises(ApiError) as caught:
                watch(client)
            assert (caught.value.status, caught.value.code) == (503, "OVERLOADED")
            for service in services:
                await service.kill()
            await eventually(lambda: not client.replicas.is_serving)
            with pytest.raises(ApiError):
                watch(client)
            calls[0].stop()
            watch(client).stop()

    run_async(main())


def test_replica_without_room_is_passed_over() -> None:
    """As long as another one has room."""

    async def main() -> None:
        async with fake_services(2) as services:
            for service, limit in zip(services, (1, 3), strict=True):
                assert service.limits is not None
                service.limits.max_calls = limit
            async with replicas_at(targets_of(services)) as known:
                streams = [await service.session() for service in services]
                await eventually(lambda: ready(known) == 2)
                client = RunClient(known)
                calls = [watch(client) for _ in range(4)]
                with pytest.raises(ApiError) as caught:
                    watch(client)
                assert caught.value.code == "OVERLOADED"
                await streams[0].take("watch_run")
                for _ in range(3):
                    await streams[1].take("watch_run")
                for call in calls:
                    call.stop()

    run_async(main())


# -- Who takes over ------------------------------------------------------------------------------------


async def drained(service: FakeService, stream: FakeSession, commands: list[rpc.SessionCommand]) -> None:
    """Stop as the runtime service does: say so, refuse what is under way, end the stream."""
    await service.say(serving=False)
    await stream.send(*(error_to(command, UNAVAILABLE, "DRAINING") for command in commands))
    stream.end()


async def refused_first(_: FakeService, stream: FakeSession, commands: list[rpc.SessionCommand]) -> None:
    """Refuse what is under way before anything else is said."""
    await stream.send(*(error_to(command, UNAVAILABLE, "DRAINING") for command in commands))


async def broken(_: FakeService, stream: FakeSession, __: list[rpc.SessionCommand]) -> None:
    """Break the stream."""
    stream.end(UNAVAILABLE)


async def killed(service: FakeService, _: FakeSession, __: list[rpc.SessionCommand]) -> None:
    """Die."""
    await service.kill()


each_loss = pytest.mark.parametrize("lose", [drained, refused_first, broken, killed])


@each_loss
@pytest.mark.parametrize("operation", FOLLOWED)
def test_follower_is_carried_over(operation: str, lose: Callable[..., Any]) -> None:
    """What a replica cannot carry on goes on through another at once: each event once, each status once, one end."""

    async def main() -> None:
        async with connected() as (services, streams, client):
            reader = Reader(FOLLOWED[operation](client))
            stream, first = await asked(streams, operation)
            await stream.send(update_of(first, news(1, 2, status=RUNNING)))
            await eventually(lambda: reader.has(2))
            await lose(services[streams.index(stream)], stream, [first])
            successor = other_than(stream, streams)
            command = await successor.take(operation)
            if operation == "watch_run":
                assert command.watch_run.after_sequence == 2
                known: tuple[int, ...] = ()
            else:
                assert getattr(command, operation).request_id == getattr(first, operation).request_id
                known = (1, 2)
            await successor.send(
                update_of(command, news(*known, status=RUNNING)),
                update_of(command, news(3, status=COMPLETED), last=True),
            )
            await reader.task
            assert (reader.sequences, reader.statuses) == ([1, 2, 3], [RUNNING, COMPLETED])

    run_async(main())


@each_loss
def test_question_is_asked_of_another(lose: Callable[..., Any]) -> None:
    """Cancels with their request id, the rest as it was; all of them at once."""

    async def main() -> None:
        async with connected() as (services, streams, client):
            stream = await ask(client, streams)
            other = await ask(client, streams)
            # Every second one is for the first replica.
            asking = [asyncio.create_task(client.cancel(CALLER, ECHO, "run_2"))]
            await asyncio.sleep(0)
            asking_other = asyncio.create_task(get(client, "run_3"))
            first = await stream.take("cancel_run")
            await other.send(answer_to(await other.take("get_run")))
            await asking_other
            await lose(services[streams.index(stream)], stream, [first])
            command = await other.take("cancel_run")
            assert command.cancel_run == first.cancel_run
            assert command.cancel_run.request_id
            await other.send(answer_to(command))
            assert (await asking[0]).run.id == "run_2"

    run_async(main())


def test_call_moves_as_often_as_it_must() -> None:
    """From one to the other and back, under a number that the stream has not had yet."""

    async def main() -> None:
        async with connected() as (_, streams, client):
            reader = Reader(watch(client))
            stream, command = await asked(streams, "watch_run")
            numbers: dict[int, set[int]] = {0: set(), 1: set()}
            for sequence in range(1, 7):
                where = streams.index(stream)
                assert command.call not in numbers[where]
                numbers[where].add(command.call)
                assert command.watch_run.after_sequence == sequence - 1
                await stream.send(update_of(command, news(sequence)))
                await eventually(lambda sequence=sequence: reader.has(sequence))  # type: ignore[misc]
                await stream.send(error_to(command, UNAVAILABLE, "STORE_UNAVAILABLE"))
                stream = other_than(stream, streams)
                command = await stream.take("watch_run")
            await stream.send(last_of(command))
            await reader.task
            assert reader.sequences == [1, 2, 3, 4, 5, 6]

    run_async(main())


@pytest.mark.parametrize(
    ("reason", "code"), [("STORE_UNAVAILABLE", UNAVAILABLE), ("SESSION_FULL", grpc.StatusCode.RESOURCE_EXHAUSTED)]
)
def test_what_is_true_of_one_replica_is_asked_of_each(reason: str, code: grpc.StatusCode) -> None:
    """Another one may have its store, or room; when all say so that is the answer, and at once."""

    async def main() -> None:
        async with connected(3, reconnect_seconds=1_000) as (_, streams, client):
            asking = asyncio.create_task(get(client))
            left = list(streams)
            for _ in range(2):
                stream, command = await asked(left, "get_run")
                left.remove(stream)
                await stream.send(error_to(command, code, reason))
            stream, command = await asked(left, "get_run")
            await stream.send(answer_to(command))
            assert await asking == "run_1"

            failing = asyncio.create_task(refusal(get(client)))
            left = list(streams)
            while left:
                stream, command = await asked(left, "get_run")
                left.remove(stream)
                await stream.send(error_to(command, code, reason))
            error = await failing
            assert error.status == 503
            assert error.code == ("OVERLOADED" if reason == "SESSION_FULL" else reason)
            assert error.headers["Retry-After"]

    run_async(main())


def test_last_refusal_does_not_deny_what_may_have_happened() -> None:
    """Who refuses last knows nothing of who was asked before: that may have lost its store while it wrote."""

    async def main() -> None:
        async with connected(reconnect_seconds=1_000) as (_, streams, client):
            calls: dict[str, Callable[[], Awaitable[object]]] = {
                "start_run": lambda: start(client).next(),
                "continue_run": lambda: continue_(client).next(),
                "cancel_run": lambda: client.cancel(CALLER, ECHO, "run_1"),
            }
            for operation, call in calls.items():
                failing = asyncio.create_task(refusal(call()))
                stream, command = await asked(streams, operation)
                await stream.send(error_to(command, UNAVAILABLE, "STORE_UNAVAILABLE", "It may have taken effect."))
                stream = other_than(stream, streams)
                command = await stream.take(operation)
                await stream.send(error_to(command, UNAVAILABLE, "STORE_UNAVAILABLE", "Nothing was changed."))
                error = await failing
                assert (error.status, error.code) == (503, "STORE_UNAVAILABLE")
                assert "may have taken effect" in error.message
                assert error.headers["Retry-After"]

    run_async(main())


def test_call_that_was_refused_and_waits_holds_up_nobody() -> None:
    """Whoever comes back is asked again, by it and by those behind it."""

    async def main() -> None:
        async with connected(reconnect_seconds=1_000) as (services, streams, client):
            known = client.replicas
            first = asyncio.create_task(get(client, "first"))
            stream, command = await asked(streams, "get_run")
            other = other_than(stream, streams)
            service, other_service = (services[streams.index(each)] for each in (stream, other))
            await stream.send(error_to(command, UNAVAILABLE, "STORE_UNAVAILABLE"))
            await other.take("get_run")
            await service.say(serving=False)
            await eventually(lambda: ready(known) == 1)
            await other_service.kill()
            await eventually(lambda: ready(known) == 0)
            second = asyncio.create_task(get(client, "second"))
            await service.say(serving=True)
            for run_id in ("first", "second"):
                command = await stream.take("get_run")
                assert command.get_run.run_id == run_id
                await stream.send(answer_to(command))
            assert (await first, await second) == ("first", "second")

    run_async(main())


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("AGENT_UNAVAILABLE", UNAVAILABLE),
        ("CAPACITY_EXCEEDED", grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("RUN_NOT_FOUND", grpc.StatusCode.NOT_FOUND),
    ],
)
def test_what_is_true_of_all_is_an_answer(reason: str, code: grpc.StatusCode) -> None:
    """Nobody else is asked."""

    async def main() -> None:
        async with connected() as (_, streams, client):
            failing = asyncio.create_task(refusal(get(client)))
            stream, command = await asked(streams, "get_run")
            await stream.send(error_to(command, code, reason))
            assert (await failing).code == reason
            assert not other_than(stream, streams).requests

    run_async(main())


def test_replica_that_refuses_the_gateway_is_done_without() -> None:
    """As long as another one takes it; when none does that is the answer, at once."""

    async def main() -> None:
        async with connected(reconnect_seconds=1_000) as (services, streams, client):
            services[0].refuse_with = grpc.StatusCode.UNAUTHENTICATED
            reader = Reader(watch(client))
            watching = Reader(watch(client))
            await streams[0].take("watch_run")
            await streams[1].take("watch_run")
            streams[0].end(grpc.StatusCode.UNAUTHENTICATED)
            await streams[1].take("watch_run")
            for _ in range(3):
                assert await ask(client, streams[1:]) is streams[1]
            services[1].refuse_with = grpc.StatusCode.UNAUTHENTICATED
            streams[1].end(grpc.StatusCode.UNAUTHENTICATED)
            for each in (reader, watching):
                error = await refusal(each.task)
                assert (error.status, error.code) == (502, "RUNTIME_REFUSED_GATEWAY")

    run_async(main())


def test_replica_that_refuses_the_gateway_is_told_of_where_others_are_away() -> None:
    """`localhost` may have two addresses, and nobody at one of them: that hides no wrong token at the other."""

    async def main() -> None:
        async with fake_services(2) as services:
            services[0].refuse_with = grpc.StatusCode.UNAUTHENTICATED
            await services[1].kill()
            async with replicas_at(targets_of(services), reconnect_seconds=0.3) as known:
                await eventually(lambda: any(each.session.hopeless for each in known._replicas.values()))
                error = await refusal(asyncio.create_task(get(RunClient(known))))
                assert (error.status, error.code) == (502, "RUNTIME_REFUSED_GATEWAY")

    run_async(main())


# -- Who is there --------------------------------------------------------------------------------------


def test_new_process_at_an_address_is_used() -> None:
    """A replica that died and came back has its turn again."""

    async def main() -> None:
        async with connected() as (services, streams, client):
            await services[0].kill()
            await eventually(lambda: ready(client.replicas) == 1)
            for _ in range(3):
                assert await ask(client, streams) is streams[1]
            await services[0].start()
            streams[0] = await services[0].session()
            await eventually(lambda: ready(client.replicas) == 2)
            assert {await ask(client, streams), await ask(client, streams)} == set(streams)

    run_async(main())


def test_name_stands_for_all_its_addresses(names: Names) -> None:
    """What appears behind the name is used; what goes is left: never a new call, and its calls end in peace."""

    async def main() -> None:
        async with fake_services(3) as services:
            names.hosts = (services[0].host,)
            async with replicas_at(f"runtimes.example:{services[0].port}") as known:
                client = RunClient(known)
                streams = [await services[0].session()]
                assert await ask(client, streams) is streams[0]
                names.hosts = tuple(service.host for service in services)
                streams += [await service.session() for service in services[1:]]
                await eventually(lambda: ready(known) == 3)
                readers = [Reader(watch(client)) for _ in streams]
                commands = [await stream.take("watch_run") for stream in streams]
                names.hosts = (services[2].host,)
                await eventually(lambda: ready(known) == 1)
                for _ in range(3):
                    assert await ask(client, streams) is streams[2]
                # One ends, one breaks.
                await streams[0].send(update_of(commands[0], news(1, status=COMPLETED), last=True))
                streams[1].end(UNAVAILABLE)
                command = await streams[2].take("watch_run")
                for each in (command, commands[2]):
                    await streams[2].send(update_of(each, news(1, status=COMPLETED), last=True))
                for reader in readers:
                    await reader.task
                    assert reader.sequences == [1]
                await streams[0].closed.wait()
                await eventually(lambda: len(known._replicas) == 1)

    run_async(main())


def test_name_that_cannot_be_asked_for_stands_for_what_it_stood_for(
    names: Names, caplog: pytest.LogCaptureFixture
) -> None:
    """A name server that is away takes no replica away; it is told once."""

    async def main() -> None:
        async with fake_services(1) as services:
            names.hosts = (services[0].host,)
            async with replicas_at(f"runtimes.example:{services[0].port}") as known:
                stream = await services[0].session()
                names.fails = True
                await names.until_asked()
                await names.until_asked()
                assert await ask(RunClient(known), [stream]) is stream
            assert caplog.text.count("cannot be resolved: Temporary failure") == 1

    run_async(main())


def test_name_without_an_address_is_waited_for(names: Names) -> None:
    """A gateway may be there before the first runtime service is."""

    async def main() -> None:
        async with fake_services(1) as services:
            names.fails = True
            async with replicas_at(f"runtimes.example:{services[0].port}") as known:
                asking = asyncio.create_task(get(RunClient(known)))
                await names.until_asked()
                assert not known.is_serving
                names.hosts, names.fails = (services[0].host,), False
                stream = await services[0].session()
                await stream.send(answer_to(await stream.take("get_run")))
                assert await asking == "run_1"

    run_async(main())


def test_who_leaves_is_asked_until_another_serves(names: Names) -> None:
    """A name may stand for new addresses before anybody serves there: until then those from before are not gone."""

    async def main() -> None:
        async with fake_services(2) as services:
            names.hosts = (services[0].host,)
            await services[1].say(serving=False)
            async with replicas_at(f"runtimes.example:{services[0].port}") as known:
                old = await services[0].session()
                assert await ask(RunClient(known), [old]) is old
                names.hosts = (services[1].host,)
                new = await services[1].session()
                await names.until_asked()
                for _ in range(3):
                    assert await ask(RunClient(known), [old, new]) is old
                await services[1].say(serving=True)
                await old.closed.wait()
                assert await ask(RunClient(known), [new]) is new

    run_async(main())


def test_name_is_looked_up_with_all_addresses() -> None:
    """This machine's own name, by the system's resolver."""

    async def main() -> None:
        found = set(await addresses.resolve(Address("localhost", 7)))
        assert Address("127.0.0.1", 7) in found
        assert found <= {Address("127.0.0.1", 7), Address("::1", 7)}

    run_async(main())


# -- Who hangs -----------------------------------------------------------------------------------------


@asynccontextmanager
async def behind_wires(count: int) -> AsyncIterator[tuple[list[Wire], list[FakeSession], RunClient]]:
    """Services that are reached through wires, the stream of each, and a client of all."""
    wires = [Wire() for _ in range(count)]
    async with fake_services(count) as services:
        targets = [await wire.start(service.target) for wire, service in zip(wires, services, strict=True)]
        try:
            async with replicas_at(",".join(targets)) as known:
                streams = [await service.session() for service in services]
                await eventually(lambda: ready(known) == count)
                yield wires, streams, RunClient(known)
        finally:
            for wire in wires:
                await wire.stop()


@pytest.fixture
def watchful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas are asked often whether they are there; connections are not."""
    options = [option for option in channel._OPTIONS if option[0] != "grpc.keepalive_time_ms"]
    monkeypatch.setattr(channel, "_OPTIONS", options)
    monkeypatch.setattr(health, "_ASK_SECONDS", 0.05)
    monkeypatch.setattr(health, "_ANSWER_SECONDS", 0.3)


def test_replica_that_hangs_is_done_without(watchful: None) -> None:
    """It gets no new call, and what it has goes on elsewhere, long before the connection is given up; once it answers
    it has its turn again."""

    async def main() -> None:
        async with behind_wires(2) as (wires, streams, client):
            readers = [Reader(watch(client)), Reader(start(client)), Reader(watch(client)), Reader(start(client))]
            first = [await stream.take_next() for stream in streams for _ in range(2)]
            wires[0].hold()
            again = [await streams[1].take_next() for _ in range(2)]
            await eventually(lambda: ready(client.replicas) == 1)
            assert await ask(client, streams[1:]) is streams[1]
            for command in (*first[2:], *again):
                await streams[1].send(update_of(command, news(1, status=COMPLETED), last=True))
            for reader in readers:
                await reader.task
                assert (reader.sequences, reader.statuses) == ([1], [COMPLETED])
            wires[0].release()
            await eventually(lambda: ready(client.replicas) == 2)

    run_async(main())


def test_replica_that_hangs_alone_keeps_its_calls(watchful: None) -> None:
    """Nobody could take them over; so they are not asked again of one that may have too much to do. No new ones."""

    async def main() -> None:
        async with behind_wires(1) as (wires, streams, client):
            reader = Reader(watch(client))
            command = await streams[0].take("watch_run")
            wires[0].hold()
            await eventually(lambda: not client.replicas.is_serving)
            asking = asyncio.create_task(get(client))
            await asyncio.sleep(0)
            assert not streams[0].closed.is_set()
            wires[0].release()
            await streams[0].send(update_of(command, news(1, status=COMPLETED), last=True))
            await reader.task
            await streams[0].send(answer_to(await streams[0].take("get_run")))
            assert await asking == "run_1"

    run_async(main())


def test_replica_that_begins_no_session_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However well its health is; that is told. One that is not there has all the time that it takes, in silence."""
    monkeypatch.setattr(session, "_HELLO_SECONDS", 0.1)

    async def main() -> None:
        async with fake_services(1) as services:
            (service,) = services
            await service.kill()
            limits, service.limits = service.limits, None
            async with replicas_at(service.target) as known:
                asking = asyncio.create_task(get(RunClient(known)))
                await asyncio.wait([asking], timeout=0.3)
                assert "begins no session" not in caplog.text
                await service.start()
                mute = await service.session()
                await mute.closed.wait()
                service.limits = limits
                await eventually(lambda: known.is_serving)
                stream = await service.session()
                while stream.closed.is_set():
                    stream = await service.session()
                await stream.send(answer_to(await stream.take("get_run")))
                assert await asking == "run_1"
                assert f"the runtime service at {service.target} begins no session" in caplog.text

    run_async(main())


def test_health_is_followed_whatever_befalls_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A failure that nobody has thought of is told, and is not the end of a replica."""
    hear = health.HealthWatch._hear
    failures = [RuntimeError("as the test says")]

    def fail_once(self: health.HealthWatch, answer: object) -> None:
        if failures:
            raise failures.pop()
        hear(self, answer)

    monkeypatch.setattr(health.HealthWatch, "_hear", fail_once)

    async def main() -> None:
        async with connected(1) as (_, opened, client):
            assert await ask(client, opened) is opened[0]
            assert "the health of the runtime service" in caplog.text

    run_async(main())


@pytest.mark.parametrize("swallows", ["all", "answers"])
def test_deadline_holds_whatever_is_swallowed(swallows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call ends within a second of its deadline behind a wire that swallows without closing."""
    monkeypatch.setattr(run_client, "_UNARY_SECONDS", 0.3)
    monkeypatch.setattr(run_client, "_MARGIN_SECONDS", 0.2)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with behind_wires(1) as (wires, _, client):
            wires[0].swallow(answers_only=swallows == "answers")
            begun = loop.time()
            waits = [
                (0.3, refusal(get(client))),
                (0.3, refusal(client.cancel(CALLER, ECHO, "r"))),
                (0.3, refusal(start(client, mode=pb.RUN_MODE_ASYNC).next())),
                (0.5, refusal(start(client, wait_ms=300).next())),
                (0.5, refusal(continue_(client, wait_ms=300).next())),
            ]
            for (seconds, _), waiting in zip(waits, [asyncio.create_task(each) for _, each in waits], strict=True):
                assert (await waiting).code == "DEADLINE_EXCEEDED"
                assert seconds <= loop.time() - begun < seconds + 1

    run_async(main())


# -- The whole gateway ---------------------------------------------------------------------------------


def test_readiness_is_that_of_any_replica(tmp_path: Path) -> None:
    """`/health` is 200 as long as one serves."""

    async def main() -> None:
        async with fake_services(2) as services, fronting(tmp_path, targets_of(services)) as front:
            for service in services:
                await service.session()

            async def is_ready() -> bool:
                return (await front.call("GET", "/health", key="")).status == 200

            async def is_unready() -> bool:
                return not await is_ready()

            assert await is_ready()
            await services[0].say(serving=False)
            await until(is_ready)
            await services[1].say(serving=False)
            await until(is_unready)
            await services[0].say(serving=True)
            await until(is_ready)

    run_async(main())


@each_loss
@pytest.mark.parametrize("accept", ["text/event-stream", "application/x-ndjson"])
def test_stream_is_carried_over_unseen(accept: str, lose: Callable[..., Any], tmp_path: Path) -> None:
    """A client that streams a turn sees neither gap nor duplicate nor a second user message, and one end."""

    async def main() -> None:
        async with fake_services(2) as services, fronting(tmp_path, targets_of(services)) as front:
            streams = [await service.session() for service in services]

            async def serve() -> None:
                stream, first = await asked(streams, "start_run")
                await stream.send(update_of(first, news(1, 2, status=RUNNING)))
                await lose(services[streams.index(stream)], stream, [first])
                successor = other_than(stream, streams)
                command = await successor.take("start_run")
                assert command.start_run == first.start_run
                await successor.send(
                    update_of(command, news(1, 2, status=RUNNING)),
                    update_of(command, news(3, status=COMPLETED), last=True),
                )

            serving = asyncio.create_task(serve())
            async with front.stream("POST", runs("echo"), {"content": "hello"}, accept=accept) as answer:
                frames = await answer.rest()
            await serving
            check_stream(frames)
            assert [event["sequence"] for event in events_of(frames)] == [1, 2, 3]
            assert frames[-1].type == "stream.completed"
            assert answer.response.status == 201

    run_async(main())
