"""Fixtures of the suites that go through both doors of RunService."""

from pathlib import Path

import pytest

from tests.integration.doors import Service


@pytest.fixture(params=["plain", "session"])
def door(request: pytest.FixtureRequest) -> str:
    """How the clients of a test come in."""
    name: str = request.param
    return name


@pytest.fixture
def service(tmp_path: Path, door: str) -> Service:
    """A runtime service without any run."""
    return Service(tmp_path, door)
