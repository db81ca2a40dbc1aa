"""Idempotency keys under fire: however often a request is repeated, by whichever way, there is one run."""

import asyncio
from pathlib import Path

from tests.acceptance.history import Shown, Task
from tests.acceptance.stage import Figures, Stage, prove, stage

_KEYS_AT_ONCE = 10


async def repeat_in_parallel(folder: Path, seed: int, keys: int, repeats: int, postgres: bool) -> Figures:
    """Start with each key many times at once; a gateway is killed meanwhile."""
    async with stage(folder, seed, postgres=postgres, runtimes=2 if postgres else 1) as played:
        tasks = [Task(f"{seed}-{number}", 2, 0.01) for number in range(keys)]

        async def kill() -> None:
            await played.pause(0.1, 0.5)
            node = played.random.choice(played.cluster.gateways)
            node.kill()
            await node.start()

        async with asyncio.TaskGroup() as group:
            group.create_task(kill())
            for first in range(0, keys, _KEYS_AT_ONCE):
                some = tasks[first : first + _KEYS_AT_ONCE]
                await asyncio.gather(*(_repeat(played, task, repeats) for task in some))
        answers = [each for each in played.history.requests if each.turn is not None]
        replayed = sum(each.replayed for each in answers)
        await played.come_to_rest()
        if len(played.history.runs) != keys:
            played.findings.append(f"{keys} keys have {len(played.history.runs)} runs")
        if replayed < len(answers) - 2 * keys:
            played.findings.append(f"of {len(answers)} answers only {replayed} say that they are replayed")
        notes = f"{keys} keys, {len(answers)} answers, {replayed} replayed"
        return played.figures(f"parallel retries, a gateway killed, {played.store}", 1, notes)


async def _repeat(played: Stage, task: Task, repeats: int) -> None:
    key = played.client().new_key()

    async def start() -> Shown:
        client = played.client()
        way = client.random.randrange(3)
        if way == 0:
            return await client.start_and_follow("steps", task, key=key)
        return await client.start("steps", task, mode="sync" if way == 1 else "async", key=key)

    await asyncio.gather(*(start() for _ in range(repeats)))


def test_parallel_retries_make_one_run(tmp_path: Path) -> None:
    """One run a key, and all but the first answer say that they are replayed."""
    prove(repeat_in_parallel, tmp_path, keys=10, repeats=20, postgres=False)


def test_parallel_retries_at_two_replicas_make_one_run(tmp_path: Path) -> None:
    """Also where two replicas accept at once."""
    prove(repeat_in_parallel, tmp_path, keys=10, repeats=20, postgres=True)
