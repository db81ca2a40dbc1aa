"""A PostgreSQL server under measurement: the tests' own, durable, and what all of its processes spend."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from benchmarks.processes import Server
from benchmarks.product import product
from tests.postgres import PostgresServer


class Database:
    """A PostgreSQL server that the product may use as its store."""

    def __init__(self, server: PostgresServer) -> None:
        self._process = psutil.Process(server.pid)
        self.environment = {"ACP_STORE": server.url()}

    def cpu_seconds(self) -> float:
        """User and system time that its processes have used so far, ended ones included."""
        seconds = sum(self._process.cpu_times()[:4])
        for child in self._process.children():
            with suppress(psutil.NoSuchProcess):
                seconds += sum(child.cpu_times()[:2])
        return float(seconds)


@contextmanager
def database(directory: Path) -> Iterator[Database]:
    """A server with its data in `directory`; each commit is on the disk before it is reported."""
    server = PostgresServer(directory / "postgresql").start()
    try:
        yield Database(server)
    finally:
        server.stop()


@contextmanager
def both_stores(directory: Path) -> Iterator[tuple[Server, Server, Database]]:
    """The product over SQLite, the product over PostgreSQL, and that database."""
    with database(directory) as postgres:
        environment = postgres.environment
        migrate = [sys.executable, "-m", "runtime_service", "migrate", "--store", environment["ACP_STORE"]]
        subprocess.run(migrate, check=True, capture_output=True)
        with (
            product(directory, name="sqlite") as embedded,
            product(directory, name="replicated", environment=environment) as replicated,
        ):
            yield embedded, replicated, postgres
