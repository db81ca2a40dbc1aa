"""Replicas that race for one queue: each turn is claimed by one of them, once."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.acceptance.client import Client
from tests.acceptance.history import Task
from tests.acceptance.stage import Figures, comes_true, prove, stage
from tests.acceptance.stored import count_open

_CLIENTS = 32
# Little and for a moment: so that they come back for more at about the same time, again and again.
_ROOM = "8"
_TURN_SECONDS = 0.02
_LONGEST_SECONDS = 120.0


async def race_for_queue(folder: Path, seed: int, turns: int) -> Figures:
    """Fill the queue behind a replica without room, then let four that have room at it."""
    settings = {"ACP_MAX_TURNS": "1", "ACP_MAX_QUEUED_TURNS": str(turns)}
    async with stage(folder, seed, postgres=True, runtimes=5, started=1, gateways=1, settings=settings) as played:
        client = played.client()
        blocker = await client.start("endless", Task("blocker", 0, 0.0), mode="async", key=None)
        tasks = iter([Task(f"{seed}-{number}", 1, _TURN_SECONDS) for number in range(turns)])
        await asyncio.gather(*(_start(played.client(), tasks) for _ in range(_CLIENTS)))

        async def drained() -> bool:
            return await count_open(played.select) == 1

        racers = played.cluster.runtimes[1:]
        for node in racers:
            node.environment["ACP_MAX_TURNS"] = _ROOM
        await asyncio.gather(*(node.start() for node in racers))
        began = time.monotonic()
        if not await comes_true(drained, _LONGEST_SECONDS):
            played.findings.append("the queue was not drained in time")
        seconds = time.monotonic() - began
        await client.cancel("endless", blocker.run_id, key=None)
        await played.come_to_rest()
        twice = sum(turn.epoch > 1 for turn in played.history.turns if turn.run_id != blocker.run_id)
        shares = Counter(each.pid for each in played.history.begun if each.run_id != blocker.run_id)
        if twice or shares.keys() != {node.pid for node in racers}:
            played.findings.append(f"{twice} turns were claimed twice; by process: {dict(shares)}")
        notes = f"{turns} queued turns, {twice} claimed twice, {turns / seconds:.0f} a second"
        return played.figures("4 replicas race for a queue", len(racers), notes)


async def _start(client: Client, tasks: Iterator[Task]) -> None:
    for task in tasks:
        await client.start("steps", task, mode="async", key=client.new_key())


def test_queue_is_claimed_once(tmp_path: Path) -> None:
    """No turn has a second epoch, and every replica had its part."""
    prove(race_for_queue, tmp_path, turns=600)
