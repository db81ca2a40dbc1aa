"""Cancels that race the end of a turn: one outcome, the same for every reader, and the answer tells it."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.acceptance.client import Client
from tests.acceptance.history import Task
from tests.acceptance.stage import Figures, Stage, prove, stage

_CLIENTS = 12
_LONGEST_DELAY_SECONDS = 0.02


class Pace:
    """How long turns take: longer when they win the race, shorter when the cancels do, whatever the machine."""

    def __init__(self) -> None:
        self._longest_seconds = 0.05

    def turn_seconds(self, of: float) -> float:
        """The length of a turn, `of` the longest, from 0 to 1."""
        return of * self._longest_seconds

    def note(self, status: str) -> None:
        """A race ended so."""
        factor = 1.02 if status == "completed" else 1 / 1.02
        self._longest_seconds = min(1.0, max(0.005, self._longest_seconds * factor))


async def race_to_the_end(folder: Path, seed: int, races: int, postgres: bool) -> Figures:
    """Cancel runs about when they end, with a follower at each, and read them at every gateway."""
    async with stage(folder, seed, postgres=postgres, runtimes=2 if postgres else 1) as played:
        numbers, pace = iter(range(races)), Pace()
        await asyncio.gather(*(_race(played, f"{seed}", numbers, pace) for _ in range(_CLIENTS)))
        await played.come_to_rest()
        count = Counter(turn.shown.status for turn in played.history.turns)
        if min(count["completed"], count["cancelled"]) < races / 20:
            played.findings.append(f"that was no race: {dict(count)}")
        notes = f"{count['completed']} completed, {count['cancelled']} cancelled"
        return played.figures(f"cancel against completion, {played.store}", races, notes)


async def _race(played: Stage, name: str, numbers: Iterator[int], pace: Pace) -> None:
    client, follower = played.client(), played.client()
    for number in numbers:
        task = Task(f"{name}-{number}", 1, pace.turn_seconds(client.random.random()))
        run_id = (await client.start("steps", task, mode="async", key=None)).run_id
        async with asyncio.TaskGroup() as group:
            group.create_task(follower.follow("steps", run_id))
            group.create_task(_cancel(client, run_id, pace))


async def _cancel(client: Client, run_id: str, pace: Pace) -> None:
    await asyncio.sleep(client.random.random() * _LONGEST_DELAY_SECONDS)
    pace.note((await client.cancel("steps", run_id, key=client.new_key())).status)
    for gateway in client.gateways:
        await client.read_log("steps", run_id, gateway)


def test_cancel_and_completion_have_one_outcome(tmp_path: Path) -> None:
    """Answer, stream, log and store agree."""
    prove(race_to_the_end, tmp_path, races=200, postgres=False)


def test_cancel_and_completion_at_two_replicas_have_one_outcome(tmp_path: Path) -> None:
    """Also where the cancel comes to the one that does not hold the run."""
    prove(race_to_the_end, tmp_path, races=200, postgres=True)
