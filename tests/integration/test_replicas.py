"""Several runtime services over one PostgreSQL database: any of them answers any call."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.acp.runs.v1 import run_pb2 as pb
from protos.acp.runs.v1 import run_service_pb2 as rpc
from runtime_service import asking
from runtime_service import peers as peers_module
from runtime_service.executor import ExecutorLimits
from runtime_service.peers import Peers
from runtime_service.store.base import accepted_run
from runtime_service.store.postgres_schema import migrate
from tests.integration.doors import (
    TOKEN,
    Client,
    Service,
    at_gate,
    contents_of,
    continue_request,
    gate,
    in_loop,
    reference,
    refusal,
    start_request,
    watch_request,
)
from tests.postgres import PostgresServer, fresh_database, session_server
from tests.support import LIMIT_SECONDS, ORGANIZATION, eventually, new_run

LIMITS = ExecutorLimits(cancel_grace_seconds=0.05, heartbeat_seconds=0.5, sweep_seconds=0.5)
DELTAS = rpc.StreamOptions(deltas=True)


class Replicas:
    """Services over one database. Their gate is one: that of `doors`."""

    def __init__(self, folder: Path, url: str) -> None:
        self.url = url
        self._service = Service(folder)

    @asynccontextmanager
    async def open(self, limits: ExecutorLimits = LIMITS, **settings: Any) -> AsyncIterator[Client]:
        """One more service, and a caller of it."""
        settings = {"store": self.url, "lease_seconds": 1.5, "executor": limits} | settings
        async with self._service.open(**settings) as client:
            yield client

    def run(self, check: Callable[[Client, Client], Awaitable[None]]) -> None:
        """Run `check` with callers of two services."""

        async def main() -> None:
            async with self.open() as one, self.open() as other:
                await check(one, other)

        in_loop(main())


@pytest.fixture
def replicas(tmp_path: Path) -> Replicas:
    """Services over a database without any run."""
    return Replicas(tmp_path, session_server().url(fresh_database()))


async def until(fact: Callable[[], Awaitable[bool]]) -> None:
    """Return once `fact()` holds; fails after the limit."""
    async with asyncio.timeout(LIMIT_SECONDS):
        while not await fact():  # noqa: ASYNC110 - told by nobody
            await asyncio.sleep(0.02)


async def text_in_the_making(client: Client, run: pb.Run) -> str:
    """What the deltas of a run that is not over add up to when they say "half"."""
    text = ""
    call = client.call("WatchRun", watch_request(run, stream=DELTAS))
    async for response in call:
        if response.update.HasField("delta"):
            text += response.update.delta.text
        if text == "half":
            break
    call.cancel()
    return text


def test_run_is_followed_through_another_service(replicas: Replicas) -> None:
    """Text in the making comes through, then each event once, then the end."""

    async def check(one: Client, other: Client) -> None:
        run = await one.start("hi", "gated")
        assert await text_in_the_making(other, run) == "half"
        watching = asyncio.create_task(other.watch(run, stream=DELTAS))
        gate[-1].set()
        updates = await watching
        assert contents_of(updates) == ["hi", "one", "re: hi"]
        assert updates[-1].run.status == pb.RUN_STATUS_COMPLETED
        assert updates[-1].run == await one.get(run) == await other.get(run)

    replicas.run(check)


def test_cancel_through_another_service_keeps_what_was_said(replicas: Replicas) -> None:
    """The agent is told at once, and the half message is in the log; both show the same outcome."""

    async def check(one: Client, other: Client) -> None:
        run = await one.start("hi", "gated")
        assert await text_in_the_making(one, run) == "half"
        watching = asyncio.create_task(one.watch(run))
        answer = await other.cancel(run)
        assert answer.run.status == pb.RUN_STATUS_CANCELLED
        assert [(event.content, event.log_type) for event in answer.events] == [
            ("half", "incomplete"),
            ("The run was cancelled.", "cancelled"),
        ]
        assert (await watching)[-1].run == await other.get(run) == await one.get(run)

    replicas.run(check)


def test_input_through_another_service_waits_its_turn(replicas: Replicas) -> None:
    """Who follows at the holder sees it at once; it is executed behind the turn that runs."""

    async def check(one: Client, other: Client) -> None:
        run = await one.start("hi", "gated")
        watching = asyncio.create_task(one.watch(run))
        await one.until_said(run, 2)
        resumed = asyncio.create_task(other.updates("ContinueRun", continue_request(run, "more")))
        await one.until_said(run, 3)
        gate[-1].set()
        assert contents_of(await resumed)[-1] == "re: more"
        contents = contents_of(await watching)
        assert contents == contents_of(await other.watch(run))
        assert contents[:3] == ["hi", "one", "more"]
        assert contents[-1] == "re: more"

    replicas.run(check)


def test_question_is_answered_through_another_service(replicas: Replicas) -> None:
    """Both show it; the first answer counts, whichever service takes it; the caller of the answer gets the rest."""

    async def check(one: Client, other: Client) -> None:
        following = asyncio.create_task(other.updates("StartRun", start_request("hi", "asking")))
        (asked,) = await one.updates("StartRun", start_request("hi", "asking", stream=rpc.StreamOptions(collect=True)))
        run = asked.run
        assert contents_of([asked]) == ["hi", "Which way?"]
        for client in (one, other):
            there = await client.state(run)
            assert there.thread.status == pb.THREAD_STATUS_PERMISSION_ASKED
            assert (there.run.status, there.run.question_sequence) == (pb.RUN_STATUS_RUNNING, 2)
        watching = asyncio.create_task(other.watch(run))
        answers = await asyncio.gather(
            *(
                client.updates("ContinueRun", continue_request(run, way, stream=rpc.StreamOptions(collect=True)))
                for client, way in ((one, "left"), (other, "right"))
            ),
            return_exceptions=True,
        )
        (taken,) = [answer for answer in answers if isinstance(answer, list)]
        (refused,) = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
        assert refused.code() == grpc.StatusCode.FAILED_PRECONDITION
        way = contents_of(taken)[0]
        assert contents_of(taken) == [way, f"went {way}"]
        updates = await watching
        assert contents_of(updates)[-2:] == [way, f"went {way}"]
        assert updates[-1].thread.status == pb.THREAD_STATUS_COMPLETED
        following.cancel()

    replicas.run(check)


def test_answer_is_heard_by_the_service_that_asks(replicas: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not when that looks by itself."""
    monkeypatch.setattr(asking, "_LOOK_SECONDS", 10 * LIMIT_SECONDS)

    async def check(one: Client, other: Client) -> None:
        collecting = rpc.StreamOptions(collect=True)
        (asked,) = await one.updates("StartRun", start_request("hi", "asking", stream=collecting))
        answered = await other.updates("ContinueRun", continue_request(asked.run, "left", stream=collecting))
        assert contents_of(answered) == ["left", "went left"]

    replicas.run(check)


def test_full_service_leaves_a_turn_to_another(replicas: Replicas) -> None:
    """Its caller gets the whole all the same."""

    async def main() -> None:
        async with replicas.open(msgspec.structs.replace(LIMITS, max_turns=1)) as full:
            await full.start("hi", "gated")
            waiting = asyncio.create_task(
                full.updates("StartRun", start_request("a b", stream=rpc.StreamOptions(collect=True)))
            )
            async with replicas.open():
                (update,) = await waiting
                assert update.run.status == pb.RUN_STATUS_COMPLETED
                assert contents_of([update]) == ["a b", "a b"]
                gate[-1].set()

    in_loop(main())


def test_stopped_service_leaves_its_turns_to_another(replicas: Replicas) -> None:
    """They are begun again there, without counting as an attempt; who follows there sees one log without a gap."""

    async def main() -> None:
        async with AsyncExitStack() as stack:
            one = await stack.enter_async_context(replicas.open())
            async with replicas.open() as other:
                run = await one.start("hi", "gated")
                assert await text_in_the_making(other, run) == "half"
                watching = asyncio.create_task(other.watch(run))
                await stack.aclose()
                gate[-1].set()
                updates = await watching
                assert contents_of(updates) == [
                    "hi",
                    "one",
                    "half",
                    "Attempt 1 begins: the one before was broken off.",
                    "one",
                    "re: hi",
                ]
                events = [event for update in updates for event in update.events]
                assert [event.sequence for event in events] == [1, 2, 3, 4, 5, 6]
                assert updates[-1].run.status == pb.RUN_STATUS_COMPLETED

    in_loop(main())


def test_service_that_lost_its_lease_ends_its_agents(replicas: Replicas) -> None:
    """Another one begins the turn again, and the log says so; both show what came of it there."""

    async def main() -> None:
        database = replicas.url.rpartition("/")[2]
        async with replicas.open(advertise="127.0.0.1:9") as one, replicas.open() as other:
            run = await one.start("hi", "gated")

            async def draft_is_kept() -> bool:
                return session_server().execute("SELECT draft FROM acp.turns", database) == "half"

            await until(draft_is_kept)
            session_server().execute("DELETE FROM acp.replicas WHERE address = '127.0.0.1:9'", database)
            await other.until_said(run, 4)
            await eventually(lambda: at_gate == [2])  # the first one has nothing to say, and is ended all the same
            gate[-1].set()
            updates = await other.watch(run)
            assert contents_of(updates) == [
                "hi",
                "one",
                "half",
                "Attempt 2 begins: the one before was broken off.",
                "one",
                "re: hi",
            ]
            assert updates[-1].run == (await one.watch(run))[-1].run

    in_loop(main())


def test_cancel_by_another_service_ends_the_agent(replicas: Replicas) -> None:
    """Who executes the run hears of it also where he cannot be reached, and of an agent that says nothing."""

    async def main() -> None:
        async with replicas.open(advertise="127.0.0.1:9") as one, replicas.open() as other:
            run = await one.start("hi", "gated")
            await eventually(lambda: at_gate == [1])
            cancelled = await other.call("CancelRun", rpc.CancelRunRequest(server=reference("gated"), run_id=run.id))
            assert cancelled.run.status == pb.RUN_STATUS_CANCELLED
            await eventually(lambda: not at_gate)
            assert (await one.watch(run))[-1].run == cancelled.run

    in_loop(main())


def test_request_is_known_at_every_service(replicas: Replicas) -> None:
    """A start, a continue and a cancel that are repeated elsewhere do nothing, and say so."""

    async def check(one: Client, other: Client) -> None:
        start = start_request("hi", "gated", mode=pb.RUN_MODE_ASYNC, request_id="a start")
        first, again = [(await client.updates("StartRun", start))[0] for client in (one, other)]
        assert (first.replayed, again.replayed) == (False, True)
        assert first.run.id == again.run.id
        cancel = rpc.CancelRunRequest(server=reference("gated"), run_id=first.run.id, request_id="a cancel")
        assert not (await other.call("CancelRun", cancel)).replayed
        resume = continue_request(first.run, mode=pb.RUN_MODE_ASYNC, request_id="a continue")
        assert [(await client.updates("ContinueRun", resume))[0].replayed for client in (other, one)] == [False, True]
        repeated = await one.call("CancelRun", cancel)
        assert repeated.replayed
        assert (repeated.run.turn, repeated.run.status) == (1, pb.RUN_STATUS_CANCELLED)
        gate[-1].set()
        assert (await one.watch(first.run))[-1].run.status == pb.RUN_STATUS_COMPLETED
        other_text = start_request("else", "gated", mode=pb.RUN_MODE_ASYNC, request_id="a start")
        assert (await refusal(other.call("StartRun", other_text))).reason == "IDEMPOTENCY_KEY_REUSED"

    replicas.run(check)


def test_service_without_its_database_refuses_and_comes_back(tmp_path: Path) -> None:
    """It says that it is not ready, and goes on with what it executes once the database is back."""

    async def main() -> None:
        server = PostgresServer(tmp_path / "server").start()
        try:
            url = server.url()
            await migrate(url)
            async with Replicas(tmp_path, url).open(lease_seconds=15) as client:
                run = await client.start("hi", "gated")
                await client.until_said(run, 2)
                server.kill()

                async def is_serving() -> bool:
                    stub: Any = health_pb2_grpc.HealthStub(client.channel)
                    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=LIMIT_SECONDS)
                    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

                async def is_not_serving() -> bool:
                    return not await is_serving()

                await until(is_not_serving)
                for call in (
                    client.call("StartRun", start_request()),
                    client.call("GetRun", rpc.GetRunRequest(server=reference("gated"), run_id=run.id)),
                ):
                    refused = await refusal(call)
                    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
                gate[-1].set()
                server.start()
                await until(is_serving)
                assert contents_of(await client.watch(run)) == ["hi", "one", "re: hi"]
        finally:
            server.stop()

    in_loop(main())


def test_service_does_not_ask_itself(replicas: Replicas) -> None:
    """A lost one may have been at the same address: to wait for its word would be to hear none, as from the store."""
    database = replicas.url.rpartition("/")[2]

    async def main() -> None:
        async with replicas.open() as client:
            run = await client.start("hi", "gated")
            address = session_server().execute("SELECT address FROM acp.replicas", database)
            held = msgspec.structs.replace(accepted_run(new_run(server_id="gated"), claim=True), id=run.id)
            cancel = rpc.CancelRunRequest(server=reference("gated"), run_id=run.id)
            for own in (address, "127.0.0.1:9"):
                peers = Peers(own, TOKEN, ())
                async with aclosing(peers.follow(address, held, 0)) as updates:
                    assert (await anext(updates, None) is None) is (own == address)
                assert (await peers.cancel(address, ORGANIZATION, cancel) is None) is (own == address)
                await peers.close()

    in_loop(main())


def test_followers_stay_when_other_services_are_asked(replicas: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel too many is closed behind those who use it."""
    monkeypatch.setattr(peers_module, "_MAX_CHANNELS", 1)
    database = replicas.url.rpartition("/")[2]

    async def main() -> None:
        async with replicas.open() as client:
            run = await client.start("hi", "gated")
            address = session_server().execute("SELECT address FROM acp.replicas", database)
            held = msgspec.structs.replace(accepted_run(new_run(server_id="gated"), claim=True), id=run.id)
            peers = Peers("127.0.0.1:9", TOKEN, ())
            async with aclosing(peers.follow(address, held, 0)) as updates:
                await anext(updates)
                assert await peers.cancel("127.0.0.1:8", ORGANIZATION, rpc.CancelRunRequest(run_id=run.id)) is None
                gate[-1].set()
                assert [event.content async for update in updates for event in update.events][-1] == "re: hi"
            async with aclosing(peers.follow(address, held, 0)) as updates:
                await anext(updates)
                await peers.close()

    in_loop(main())
