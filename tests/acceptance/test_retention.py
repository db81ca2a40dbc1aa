"""The command that deletes old runs: it says what it did, and leaves alone what is open."""

import asyncio
from pathlib import Path

import pytest

from tests.acceptance.history import Task
from tests.acceptance.processes import command
from tests.acceptance.stage import comes_true, stage
from tests.acceptance.stored import count_open


async def delete_what_has_ended(folder: Path, postgres: bool) -> None:
    """Delete everything that is older than this moment, while one run is open."""
    async with stage(folder, 0, postgres=postgres) as played:
        client = played.client()
        for number in range(5):
            shown = await client.start("steps", Task(f"old-{number}", 3, 0.0), mode="sync", key=client.new_key())
            await client.resume("steps", shown.run_id, Task(f"older-{number}", 1, 0.0), mode="sync", key=None)
        open_run = await client.start("endless", Task("open", 1, 0.0), mode="async", key=None)
        [runtime] = played.cluster.runtimes
        if not postgres:
            # Nobody else may have the file open.
            runtime.kill()
        options = ("--older-than-days", "0", "--data-dir", str(folder / "data"))
        deleted = await asyncio.to_thread(
            command, folder, "runtime_service", "delete-runs", *options, environment=runtime.environment
        )
        assert deleted.returncode == 0, deleted.stderr
        assert deleted.stdout.splitlines()[-1] == "deleted 5 runs, with 10 turns and 30 events"
        assert await played.select("SELECT id FROM {runs}") == [(open_run.run_id,)]
        assert await played.select("SELECT count(*) FROM {turns}") == [(1,)]
        assert await played.select("SELECT DISTINCT run_key FROM {events}") == await played.select(
            "SELECT run_key FROM {runs}"
        )

        if not postgres:
            await runtime.start()
        url = f"{played.cluster.gateways[0].url}/v1/servers/steps/runs/{shown.run_id}"
        async with played.http.get(url, headers=client.headers) as response:
            assert (response.status, (await response.json())["code"]) == (404, "RUN_NOT_FOUND")
        await client.cancel("endless", open_run.run_id, key=None)

        async def ended() -> bool:
            return not await count_open(played.select)

        assert await comes_true(ended, 10.0)


@pytest.mark.parametrize("postgres", [False, True], ids=["sqlite", "postgresql"])
def test_delete_runs_deletes_and_counts(postgres: bool, tmp_path: Path) -> None:
    """What has ended is gone, with its turns and events, and each of them is counted."""
    asyncio.run(delete_what_has_ended(tmp_path, postgres))
