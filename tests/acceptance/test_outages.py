"""PostgreSQL that goes away and comes back under load: 503 meanwhile, and nothing of what was accepted is lost."""

import asyncio
import time
from pathlib import Path

import asyncpg

from tests.acceptance.history import Task
from tests.acceptance.stage import QUICK, Figures, Stage, prove, stage

_BACK_SECONDS = 10.0
_STATEMENT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"


async def take_postgres_away(folder: Path, seed: int, faults: int) -> Figures:
    """Kill the server and start it again, and cut its connections, in turns."""
    async with stage(folder, seed, postgres=True, runtimes=2, settings=QUICK) as played:
        longest = 0.0

        async def outages() -> None:
            nonlocal longest
            for number in range(faults):
                await played.pause(0.5, 1.5)
                if number % 2:
                    await _cut_connections(played)
                else:
                    await asyncio.to_thread(played.server.kill)
                    await played.pause(1.0, 3.0)
                    await asyncio.to_thread(played.server.start)
                longest = max(longest, await _until_back(played, number))
            await played.pause(0.5, 1.5)

        await played.under_load(outages)
        if longest > _BACK_SECONDS:
            played.findings.append(f"it took {longest:.1f} s to come back")
        requests = played.history.requests
        failed = [each for each in requests if each.status not in (200, 201, 202, 503)]
        played.findings.extend(f"not refused with 503: {each}" for each in failed)
        refused = sum(each.status == 503 for each in requests)
        await played.come_to_rest()
        notes = f"{refused} answers of 503, back after {longest:.1f} s"
        return played.figures("PostgreSQL killed, its connections cut", faults, notes)


async def _cut_connections(played: Stage) -> None:
    connection = await asyncpg.connect(played.server.url("postgres"))
    try:
        await connection.execute(_STATEMENT)
    finally:
        await connection.close()


async def _until_back(played: Stage, number: int) -> float:
    """Return how many seconds it took until a run was started and ended through every gateway."""
    began = time.monotonic()
    for gateway in played.cluster.gateways:
        client = played.client(gateway)
        task = Task(f"back-{number}-{gateway.name}", 1, 0.0)
        await client.start("steps", task, mode="sync", key=client.new_key())
    return time.monotonic() - began


def test_postgres_outage_is_survived(tmp_path: Path) -> None:
    """503 while it is away, back within seconds, nothing lost."""
    prove(take_postgres_away, tmp_path, faults=2)
