"""Executors over PostgreSQL while leases, connections and the server are lost: no turn is nobody's, no stop hangs."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from runtime_service import executor as executor_module
from runtime_service.agents import AgentOutput, Message, TurnContext
from runtime_service.runs import RunStatus
from runtime_service.store import postgres_writer
from runtime_service.store.postgres import PostgresStore
from runtime_service.store.postgres_schema import migrate
from tests.postgres import PostgresServer
from tests.stores import PostgresStores, Stores
from tests.support import ScriptedAgent, cancel_of, eventually, new_run, run_async, runtime

COMPLETED, CANCELLED = RunStatus.COMPLETED, RunStatus.CANCELLED


class EarlyAgent(ScriptedAgent):
    """One whose turns may begin while their run is still being stored."""

    begins_early = True


class ServerStores(Stores):
    """A server of the test's own."""

    def __init__(self, server: PostgresServer) -> None:
        self._url = server.url()

    async def connect(self) -> PostgresStore:
        """Open its database."""
        return await PostgresStore.open(self._url, address="127.0.0.1:1")


@pytest.fixture
def stores() -> PostgresStores:
    """A database."""
    return PostgresStores()


def test_start_while_the_lease_is_lost_is_executed(stores: PostgresStores) -> None:
    """Also where the agent began early and was ended with all others: what is stored as running is somebody's."""
    go = asyncio.Event()

    async def script(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
        await go.wait()
        yield Message(turn.input)

    async def main() -> None:
        agent = EarlyAgent(script)
        async with runtime(stores, agent) as rt:
            stores.execute("UPDATE acp.replicas SET lease = '0', lease_until = '-infinity'")
            run = await rt.start()
            go.set()
            assert (await rt.until_status(run, COMPLETED)).turn.output == "hello"
            await eventually(lambda: rt.executor._admission.occupied == 0)

    run_async(main())


def test_turn_that_was_cancelled_before_its_claim_was_known_is_not_executed(
    stores: PostgresStores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim was committed, its answer lost; another process cancelled the turn before the answer came again."""

    async def script(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
        yield Message(turn.input)

    async def main() -> None:
        agent = ScriptedAgent(script)
        async with stores.open() as other, runtime(stores, agent) as rt:
            assert isinstance(rt.store, PostgresStore)
            waiting = new_run()
            is_lost = asyncio.Event()
            fetch = rt.store._database.fetch

            async def lose_the_answer(connection: object, query: str, *arguments: object) -> list[object]:
                rows = await fetch(connection, query, *arguments)
                if "claim_turns" in str(arguments) and waiting.id in str(rows) and not is_lost.is_set():
                    is_lost.set()
                    await other.cancel_run(cancel_of(waiting), [], None)
                    raise ConnectionResetError
                return list(rows)

            monkeypatch.setattr(rt.store._database, "fetch", lose_the_answer)
            await other.start_run(waiting, claim=False)
            rt.executor.turns_wait()
            await is_lost.wait()
            await eventually(lambda: rt.executor._admission.claiming is None)
            assert (await other.get_run(waiting.organization, waiting.server_id, waiting.id)).status is CANCELLED
            assert (agent.inputs, rt.executor._admission.occupied) == ([], 0)

    run_async(main())


@pytest.mark.parametrize("busy", ["with a turn", "with a claim"])
def test_drain_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: str) -> None:
    """A service whose database is away stops all the same; others find its turns once the database is back."""
    monkeypatch.setattr(executor_module, "_ADMITTING_SECONDS", 0.1)
    monkeypatch.setattr(executor_module, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(postgres_writer, "_CLOSE_SECONDS", 0.1)
    server = PostgresServer(tmp_path / "server", durable=False).start()

    async def script(_: TurnContext) -> AsyncGenerator[AgentOutput]:
        yield Message("said")
        await asyncio.Event().wait()

    async def main() -> None:
        agent = ScriptedAgent(script)
        await migrate(server.url())
        async with runtime(ServerStores(server), agent) as rt:
            if busy == "with a turn":
                await rt.start()
                await eventually(lambda: agent.running)
            server.kill()
            if busy == "with a claim":
                rt.executor.turns_wait()
            await eventually(lambda: not rt.store.is_available)

    try:
        run_async(main())
    finally:
        server.stop()
