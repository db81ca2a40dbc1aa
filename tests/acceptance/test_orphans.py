"""What becomes of single turns whose runtime service is lost, and of a service that has no room."""

import asyncio
from pathlib import Path

from tests.acceptance.history import Task
from tests.acceptance.stage import QUICK, Figures, Stage, comes_true, prove, stage

_LIMIT_SECONDS = 30.0


async def lose_holder(folder: Path, seed: int) -> Figures:
    """Kill the runtime service that executes a turn which may not be repeated, and one in the middle of a message."""
    async with stage(folder, seed, postgres=True, runtimes=2, settings=QUICK) as played:
        client = played.client()
        once = await client.start("once", Task("once", 2, 600.0), mode="async", key=None)
        endless = await client.start("endless", Task("endless", 1, 0.0), mode="async", key=None)
        await _until_said(played, endless.run_id, "half ", "draft")
        await _until_said(played, once.run_id, "once: ", "draft")
        for node in played.cluster.runtimes:
            node.kill()
        await asyncio.gather(*(node.start() for node in played.cluster.runtimes))
        lost = await client.until_ended("once", once.run_id)
        if (lost.status, lost.error_code, lost.output) != ("failed", "RUNTIME_LOST", "once: "):
            played.findings.append(f"it may not be repeated and ended as {lost}")
        await _until_said(played, endless.run_id, "Attempt 2", "log")
        await client.cancel("endless", endless.run_id, key=None)
        await played.come_to_rest()
        log = next(run.events for run in played.history.runs if run.run_id == endless.run_id)
        told = [(event.role, event.log_type, event.content) for _, event in log][1:3]
        if told[0] != ("assistant", "incomplete", "half ") or told[1][:2] != ("execution_log", "attempt"):
            played.findings.append(f"what was said before is not kept: {told}")
        return played.figures("single turns whose holder is lost", 2)


async def _until_said(played: Stage, run_id: str, text: str, where: str) -> None:
    column, table = ("draft", "{turns}") if where == "draft" else ("content", "{events}")

    async def said() -> bool:
        rows = await played.select(
            f"SELECT x.{column} FROM {table} x JOIN {{runs}} r ON r.run_key = x.run_key WHERE r.id = '{run_id}'"
        )
        return any(text in content for (content,) in rows if content)

    assert await comes_true(said, _LIMIT_SECONDS), f"in vain: {text!r} in the {where} of {run_id}"


async def fill_queue(folder: Path, seed: int) -> Figures:
    """Ask for more than there is room for."""
    settings = {"ACP_MAX_TURNS": "1", "ACP_MAX_QUEUED_TURNS": "2"}
    async with stage(folder, seed, settings=settings) as played:
        client = played.client()
        blocker = await client.start("endless", Task("blocker", 1, 0.0), mode="async", key=None)
        for number in range(2):
            await client.start("steps", Task(f"queued-{number}", 1, 0.0), mode="async", key=None)
        base = f"{played.cluster.gateways[0].url}/v1/servers/steps/runs"
        body = {"content": Task("too-many", 1, 0.0).input}
        async with played.http.post(base, json=body, headers=client.headers) as response:
            refused = (response.status, (await response.json())["code"], int(response.headers["Retry-After"]) > 0)
        if refused != (429, "CAPACITY_EXCEEDED", True):
            played.findings.append(f"the full queue answered {refused}")
        waiting = asyncio.create_task(client.start("steps", Task("patient", 1, 0.0), mode="sync", key=None))
        await played.client().cancel("endless", blocker.run_id, key=None)
        await waiting
        await played.come_to_rest()
        return played.figures("a full queue", 1)


def test_lost_turn_is_given_up_or_begun_again(tmp_path: Path) -> None:
    """One that may not be repeated fails as RUNTIME_LOST; what was said of a message is kept as incomplete."""
    prove(lose_holder, tmp_path)


def test_full_queue_asks_for_patience(tmp_path: Path) -> None:
    """429 with Retry-After, and room again once there is."""
    prove(fill_queue, tmp_path)
