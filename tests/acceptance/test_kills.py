"""Processes that are killed at random points of mixed work: nothing accepted is lost, nothing is done twice."""

import asyncio
from pathlib import Path

from tests.acceptance.cluster import Node
from tests.acceptance.history import Task
from tests.acceptance.stage import LONGEST_RESCUE_SECONDS, QUICK, Figures, Stage, comes_true, prove, stage
from tests.acceptance.stored import is_stored


async def kill_runtime_over_sqlite(folder: Path, seed: int, faults: int) -> Figures:
    """Kill the one runtime service, and start it again over its file."""
    async with stage(folder, seed) as played:
        await played.under_load(lambda: _kill(played, played.cluster.runtimes, faults))
        await played.come_to_rest()
        return played.figures("kill -9 of the runtime, SQLite", faults)


async def kill_replicas(folder: Path, seed: int, faults: int) -> Figures:
    """Kill one of two runtime services over PostgreSQL, and start it again beside the other."""
    async with stage(folder, seed, postgres=True, runtimes=2, settings=QUICK) as played:
        await played.under_load(lambda: _kill(played, played.cluster.runtimes, faults))
        await played.come_to_rest()
        return played.figures("kill -9 of a replica, PostgreSQL", faults)


async def kill_replicas_by_default(folder: Path, seed: int, faults: int) -> Figures:
    """Kill one of two runtime services by the lease, heartbeat and sweep as they are; it comes back much later."""
    async with stage(folder, seed, postgres=True, runtimes=2) as played:

        async def kill() -> None:
            for _ in range(faults):
                await played.pause(1.0, 3.0)
                node = played.random.choice(played.cluster.runtimes)
                node.kill()
                await played.pause(LONGEST_RESCUE_SECONDS, LONGEST_RESCUE_SECONDS + 1)
                await node.start()

        await played.under_load(kill, longest_seconds=3.0)
        await played.come_to_rest()
        return played.figures("kill -9 of a replica, lease 30 s", faults)


async def kill_gateways(folder: Path, seed: int, faults: int) -> Figures:
    """Kill gateways under load; then all of them between a commit and its answer."""
    async with stage(folder, seed) as played:
        await played.under_load(lambda: _kill(played, played.cluster.gateways, faults // 2))
        for number in range(faults - faults // 2):
            await _kill_between_commit_and_answer(played, number)
        await played.come_to_rest()
        return played.figures("kill -9 of gateways, also before the answer", faults)


async def _kill(played: Stage, nodes: list[Node], faults: int) -> None:
    for _ in range(faults):
        await played.pause(0.1, 1.0)
        node = played.random.choice(nodes)
        await played.sample()
        node.kill()
        await played.sample()
        await played.pause(0.0, 0.5)
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
    await waiting


def test_killed_runtime_over_sqlite_loses_nothing(tmp_path: Path) -> None:
    """Whatever was accepted ends once, and everybody sees the same of it."""
    prove(kill_runtime_over_sqlite, tmp_path, faults=4)


def test_killed_replica_loses_nothing(tmp_path: Path) -> None:
    """The other one goes on with what it held."""
    prove(kill_replicas, tmp_path, faults=4)


def test_killed_gateways_lose_nothing(tmp_path: Path) -> None:
    """Clients go on through another gateway, under the same keys."""
    prove(kill_gateways, tmp_path, faults=4)
