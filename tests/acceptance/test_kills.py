"""Processes that are killed at random points of mixed work: nothing accepted is lost, nothing is done twice."""

import asyncio
from pathlib import Path

from tests.acceptance.cluster import Node
from tests.acceptance.history import Task
from tests.acceptance.stage import Figures, Stage, comes_true, prove, stage
from tests.acceptance.stored import is_stored


async def kill_runtime_over_sqlite(folder: Path, seed: int, faults: int) -> Figures:
    """Kill the one runtime service, and start it again over its file."""
    async with stage(folder, seed) as played:
        await played.under_load(lambda: _kill(played, played.cluster.runtimes, faults))
        return await played.figures("kill -9 of the runtime, SQLite", faults)


async def kill_gateways(folder: Path, seed: int, faults: int) -> Figures:
    """Kill gateways under load; then one after the other between a commit and its answer."""
    async with stage(folder, seed) as played:
        await played.under_load(lambda: _kill(played, played.cluster.gateways, faults // 2))
        for number in range(faults - faults // 2):
            await _kill_between_commit_and_answer(played, number)
        return await played.figures("kill -9 of gateways", faults)


async def _kill(played: Stage, nodes: list[Node], faults: int) -> None:
    for _ in range(faults):
        await played.pause(0.1, 1.0)
        node = played.random.choice(nodes)
        await played.sample()
        node.kill()
        await played.sample()
        await node.start()
    await played.pause(0.1, 1.0)


async def _kill_between_commit_and_answer(played: Stage, number: int) -> None:
    task = Task(f"commit-{number}", 2, 0.1)
    client = played.client()
    waiting = asyncio.create_task(client.start("steps", task, mode="sync", key=client.new_key()))
    assert await comes_true(lambda: is_stored(played.select, task.input), 10.0)
    for node in played.cluster.gateways:
        node.kill()
    await asyncio.gather(*(node.start() for node in played.cluster.gateways))
    shown = await waiting
    assert shown.input == task.input


def test_killed_runtime_over_sqlite_loses_nothing(tmp_path: Path) -> None:
    """Whatever was accepted ends once, and everybody sees the same of it."""
    prove(kill_runtime_over_sqlite, tmp_path, faults=6)


def test_killed_gateways_lose_nothing(tmp_path: Path) -> None:
    """Clients go on through another gateway, under the same keys."""
    prove(kill_gateways, tmp_path, faults=6)
