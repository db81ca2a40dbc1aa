"""Fixtures of several suites: both doors of RunService, both kinds of stores."""

from pathlib import Path

import pytest

from tests.integration.doors import Service
from tests.stores import KINDS, SQLiteStores, Stores


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
