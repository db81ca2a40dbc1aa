"""Turns that meet in an awkward moment, and agents that do not keep to the rules."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from runtime_service.agents import AgentOutput, Log, Message, TurnContext
from runtime_service.executor import ExecutorLimits
from runtime_service.runs import EventRole, LogLevel, RunStatus
from runtime_service.store.sqlite import SQLiteStore
from tests.support import (
    LIMIT_SECONDS,
    Disk,
    Runtime,
    ScriptedAgent,
    contents,
    eventually,
    log_of,
    run_async,
    runtime,
)

QUEUED, RUNNING, CANCELLED = RunStatus.QUEUED, RunStatus.RUNNING, RunStatus.CANCELLED
COMPLETED, FAILED = RunStatus.COMPLETED, RunStatus.FAILED


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the store is."""
    return tmp_path / "runs.sqlite"


async def _forever(_: TurnContext) -> AsyncGenerator[AgentOutput]:
    await asyncio.Event().wait()
    yield Message("never")


def test_start_behind_a_waiting_input_is_claimed_at_once(path: Path) -> None:
    """An input that waits for its run's turn keeps no other run from the room that there is."""

    async def main() -> None:
        async with runtime(path, ScriptedAgent(_forever)) as rt:
            busy = await rt.start("busy")
            waiting = await rt.resume(busy, "waits")
            other = await rt.start("other")
            assert other.status is RUNNING
            assert (await rt.get(waiting)).status is QUEUED

    run_async(main())


def test_turn_that_is_noted_while_others_are_claimed_is_claimed_too(path: Path) -> None:
    """However starts, continues and claims fall together in one commit, nothing is left waiting beside free room."""

    async def main() -> None:
        limits = ExecutorLimits(max_turns=2, cancel_grace_seconds=0.05)

        async def script(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
            yield Message(turn.input)

        async with runtime(path, ScriptedAgent(script), limits) as rt:
            first = await asyncio.gather(*(rt.start(str(n)) for n in range(20)))
            again = await asyncio.gather(*(rt.resume(run) for run in first for _ in range(3)))
            for run in again:
                await rt.until_status(run, COMPLETED, turn=run.turn.number)
            await eventually(lambda: rt.executor._admission.occupied == 0)

    run_async(main())


def test_cancel_of_a_turn_that_is_being_claimed_ends_its_agent(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancel that is asked for while the turn's claim is being stored still reaches the agent."""

    async def main() -> None:
        disk = Disk(monkeypatch)
        agent = ScriptedAgent(_forever)
        async with runtime(path, agent) as rt:
            run = await rt.start("first")
            await rt.cancel(run)
            await eventually(lambda: rt.executor._admission.occupied == 0)
            with disk.held():
                continuing = asyncio.create_task(rt.resume(run))
                await eventually(lambda: disk.holding)
                cancelling = asyncio.create_task(rt.cancel(run))
                await asyncio.sleep(0)
            await asyncio.gather(continuing, cancelling)
            await rt.until_status(run, CANCELLED)
            await eventually(lambda: agent.running == 0 and rt.executor._admission.occupied == 0)

    run_async(main())


def test_lease_is_renewed_while_turns_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong with one heartbeat, and in the grace period of a drain as well."""

    async def main() -> None:
        beats = 0

        async def renew(_: SQLiteStore) -> None:
            nonlocal beats
            beats += 1
            if beats == 1:
                raise RuntimeError("a surprise")

        monkeypatch.setattr(SQLiteStore, "renew", renew)
        agent = ScriptedAgent(_forever)
        limits = ExecutorLimits(cancel_grace_seconds=0.05, heartbeat_seconds=0.01)
        async with runtime(path, agent, limits) as rt:
            await rt.start()
            await eventually(lambda: beats >= 2 and agent.running)
            draining = asyncio.create_task(rt.executor.drain(LIMIT_SECONDS))
            await asyncio.sleep(0)
            so_far = beats
            await eventually(lambda: beats >= so_far + 2)
            draining.cancel()

    run_async(main())


def test_drain_fails_what_may_not_be_repeated(path: Path) -> None:
    """A turn that may not be begun again is not, after a stop in order either."""

    async def main() -> None:
        agent = ScriptedAgent(_forever, repeatable=False)
        async with runtime(path, agent) as rt:
            run = await rt.start()
            await eventually(lambda: agent.running)
            await rt.executor.drain(0)
            lost = await rt.get(run)
            assert (lost.status, lost.turn.error_code) == (FAILED, "RUNTIME_LOST")
        async with runtime(path, agent) as rt:
            assert (await rt.get(run)).status is FAILED
            assert agent.inputs == ["hello"]

    run_async(main())


@pytest.mark.parametrize(
    "output",
    [Log("x", level="debug"), Message("x", role="bot")],  # type: ignore[arg-type]
    ids=["level", "role"],
)
def test_word_that_is_not_known_fails_the_turn_and_not_the_log(path: Path, output: AgentOutput) -> None:
    """A level or role that does not exist is the agent's failure; the log stays readable."""

    async def script(_: TurnContext) -> AsyncGenerator[AgentOutput]:
        yield output

    async def main() -> None:
        async with runtime(path, ScriptedAgent(script)) as rt:
            run = await rt.until_status(await rt.start(), FAILED)
            assert run.turn.error_code == "AGENT_OUTPUT_INVALID"
            assert len(await log_of(rt.store, run.id)) == 2

    run_async(main())


def test_level_and_role_may_be_given_as_text(path: Path) -> None:
    """Agents may say "warn" for LogLevel.WARN."""

    async def script(_: TurnContext) -> AsyncGenerator[AgentOutput]:
        yield Log("careful", level="warn")  # type: ignore[arg-type]
        yield Message("done", role="assistant")  # type: ignore[arg-type]

    async def main() -> None:
        async with runtime(path, ScriptedAgent(script)) as rt:
            run = await rt.until_status(await rt.start(), COMPLETED)
            _, log, message = await log_of(rt.store, run.id)
            assert (log.log_level, message.role) == (LogLevel.WARN, EventRole.ASSISTANT)

    run_async(main())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), GeneratorExit()], ids=lambda e: type(e).__name__)
def test_agent_that_raises_past_exceptions_fails_its_turn_only(path: Path, error: BaseException) -> None:
    """What is no Exception does not end the service, nor leave the turn running."""

    async def script(_: TurnContext) -> AsyncGenerator[AgentOutput]:
        yield Message("so far")
        raise error

    async def main() -> None:
        async with runtime(path, ScriptedAgent(script)) as rt:
            run = await rt.until_status(await rt.start(), FAILED)
            assert (run.turn.error_code, run.turn.output) == ("AGENT_FAILED", "so far")
            await eventually(lambda: rt.executor._admission.occupied == 0)

    run_async(main())


def test_turn_of_an_agent_that_ignores_its_limit_ends_all_the_same(path: Path) -> None:
    """An agent that swallows its cancellation loses its turn when the limit and the grace period are over."""
    release = asyncio.Event()

    async def script(_: TurnContext) -> AsyncGenerator[AgentOutput]:
        yield Message("one")
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    async def main() -> None:
        async with runtime(path, ScriptedAgent(script), turn_timeout_seconds=0.05) as rt:
            run = await rt.until_status(await rt.start(), FAILED)
            assert (run.turn.error_code, run.turn.output) == ("TURN_TIMEOUT", "one")
            await eventually(lambda: rt.executor._admission.occupied == 0)
            assert contents(await log_of(rt.store, run.id))[:2] == ["hello", "one"]
            release.set()

    run_async(main())


def test_inputs_that_wait_do_not_slow_other_runs(path: Path) -> None:
    """A thousand inputs behind one turn are looked at when it is their turn, not at every start."""

    async def main() -> None:
        limits = ExecutorLimits(cancel_grace_seconds=0.05)
        async with runtime(path, ScriptedAgent(_forever), limits) as rt:
            busy = await rt.start("busy")
            for _ in range(10):
                await asyncio.gather(*(rt.resume(busy) for _ in range(100)))
            steps = await _statements_of(rt)
            assert steps < 5_000

    async def _statements_of(rt: Runtime) -> int:
        """Count the virtual machine's steps that claiming takes."""
        connection = rt.store._writer._connection  # type: ignore[attr-defined]
        count = 0

        def step() -> bool:
            nonlocal count
            count += 1
            return False

        connection.set_progress_handler(step, 1)
        try:
            async with asyncio.timeout(LIMIT_SECONDS):
                assert await rt.store.claim_turns(10) == []
        finally:
            connection.set_progress_handler(None)
        return count

    run_async(main())


def test_files_of_the_store_are_for_their_owner_alone(tmp_path: Path) -> None:
    """In a folder that others may enter, too, what runs hold cannot be read by them."""
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)

    async def main() -> None:
        async with runtime(folder / "runs.sqlite", ScriptedAgent(_forever)) as rt:
            await rt.start()
            modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
            assert set(modes.values()) == {0o600}, modes

    run_async(main())
