"""How many rows PostgreSQL looks at for an answer, in tables that it knows nothing of: they were empty a moment ago."""

import asyncio
import json
from collections.abc import Iterator, Mapping
from typing import Any

import asyncpg
import pytest

from runtime_service.runs import RunStatus
from runtime_service.store.base import Outcome
from runtime_service.store.postgres_rows import LIST_RUNS
from tests.stores import PostgresStores
from tests.support import ORGANIZATION, SERVER, key_of, new_run, run_async

SETTLED = 500


def rows_of(plan: Mapping[str, Any]) -> Iterator[float]:
    """The rows that came out of each step of a plan, all in all."""
    yield plan["Actual Rows"] * plan["Actual Loops"]
    for step in plan.get("Plans", ()):
        yield from rows_of(step)


@pytest.mark.parametrize("status", [RunStatus.QUEUED, RunStatus.RUNNING, RunStatus.CANCELLED, RunStatus.FAILED])
def test_runs_by_status_are_found_without_the_completed_ones(status: RunStatus) -> None:
    """A page of the few that did not complete costs as much with a long history as without."""
    stores = PostgresStores()

    async def main() -> float:
        async with stores.open() as store:
            started = await asyncio.gather(*(store.start_run(new_run(), claim=True) for _ in range(SETTLED)))
            completed = Outcome(RunStatus.COMPLETED, "done")
            await asyncio.gather(*(store.finish_turn(key_of(change.run), [], completed) for change in started))
            await store.start_run(new_run("waits"), claim=False)
        connection = await asyncpg.connect(stores.url)
        try:
            explain = f"EXPLAIN (ANALYZE, FORMAT JSON) {LIST_RUNS[status]}"
            plan = await connection.fetchval(explain, ORGANIZATION, SERVER, 2**63 - 1, 50, 1 << 20)
        finally:
            await connection.close()
        return max(rows_of(json.loads(plan)[0]["Plan"]))

    assert run_async(main()) <= 1
