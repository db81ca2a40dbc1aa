"""Fixtures of several suites: both doors of RunService, both kinds of stores, a stage for agents that are processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from tests.integration.acp_stage import Check, Play, Stage, agent_processes
from tests.integration.doors import Service
from tests.stores import KINDS, SQLiteStores, Stores
from tests.support import run_async


@pytest.fixture(params=["plain", "session"])
def door(request: pytest.FixtureRequest) -> str:
    """How the clients of a test come in."""
    name: str = request.param
    return name


@pytest.fixture
def service(tmp_path: Path, door: str) -> Service:
    """A runtime service without any run."""
    return Service(tmp_path, door)


@pytest.fixture(params=KINDS)
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Stores:
    """A place of each kind."""
    return KINDS[request.param](tmp_path)


@pytest.fixture
def file(tmp_path: Path) -> SQLiteStores:
    """A SQLite file."""
    return SQLiteStores(tmp_path)


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    """Return a function that runs a check on a stage, on the loop of production."""

    def play(check: Check) -> None:
        async def main() -> None:
            stage = Stage(tmp_path)
            try:
                await check(stage)
            finally:
                await stage.close()

        run_async(main(), loop_factory=uvloop.new_event_loop)

    yield play
    assert not agent_processes()
