"""Where a scenario plays: a cluster, its clients, the history that they write, and at the end the figures of it all."""

import asyncio
import os
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import msgspec

from tests.acceptance.checker import Finding, Rules, check
from tests.acceptance.client import Client
from tests.acceptance.cluster import Cluster, Node, cluster
from tests.acceptance.history import TERMINAL, History
from tests.acceptance.load import Worker
from tests.acceptance.stored import (
    Select,
    count_open,
    postgres_select,
    read_runs,
    read_turns,
    sample_turns,
    sqlite_select,
)
from tests.integration.wire import Wire
from tests.postgres import PostgresServer

LONGEST_RESCUE_SECONDS = 45.0
"""So long after the death of its holder a turn runs again or has failed, by the settings as they are."""

_SETTLE_SECONDS = 90.0
_READ_AGAIN = 100
_POLL_SECONDS = 0.01

QUICK = {"ACP_LEASE_SECONDS": "2", "ACP_LEASE_HEARTBEAT_SECONDS": "0.5", "ACP_SWEEP_SECONDS": "0.5"}
"""Settings by which a lost process is found within seconds."""


class Figures(msgspec.Struct, frozen=True):
    """What came of a scenario. `notes` are further figures; `findings` is empty when every promise was kept."""

    scenario: str
    faults: int
    runs: int
    lost: int
    stuck: int
    longest_rescue_seconds: float
    seconds: float
    findings: tuple[Finding | str, ...]
    notes: str = ""


class Stage:
    """A running cluster under one history. `select` reads its store; `findings` are those of the scenario itself.

    `server` is the PostgreSQL under it, `wires` lie between the gateways and each runtime, where there are such.
    """

    def __init__(
        self,
        seed: int,
        running: Cluster,
        http: aiohttp.ClientSession,
        select: Select,
        rules: Rules,
        *,
        server: PostgresServer | None,
        wires: list[Wire],
    ) -> None:
        self.random = Random(seed)
        self.cluster = running
        self.http = http
        self.select = select
        self.rules = rules
        self.history = History()
        self.findings: list[str] = []
        self.wires = wires
        self._seed = seed
        self._server = server
        self._began = time.monotonic()

    @property
    def store(self) -> str:
        """The name of the kind of store."""
        return "SQLite" if self._server is None else "PostgreSQL"

    @property
    def server(self) -> PostgresServer:
        """The PostgreSQL under it."""
        assert self._server is not None, "this scenario plays over SQLite"
        return self._server

    def client(self, gateway: Node | None = None) -> Client:
        """A new client of all gateways, or of one."""
        urls = [each.url for each in (self.cluster.gateways if gateway is None else [gateway])]
        return Client(self.http, urls, self.history, Random(self.random.getrandbits(64)))

    async def under_load(
        self,
        faults: Callable[[], Awaitable[None]],
        *,
        workers: int = 8,
        longest_seconds: float = 0.6,
    ) -> None:
        """Let clients work while the faults go on, and end what they have begun."""
        crowd = [
            Worker(f"{self._seed}-{number}", self.client(), longest_seconds=longest_seconds)
            for number in range(workers)
        ]
        async with asyncio.TaskGroup() as group:
            for worker in crowd:
                group.create_task(worker.work())
            await faults()
            for worker in crowd:
                worker.stopping = True

    async def pause(self, least: float, most: float) -> None:
        """Let the work go on for some seconds."""
        await asyncio.sleep(self.random.uniform(least, most))

    async def sample(self) -> None:
        """Look at the turns in the store."""
        self.history.samples.extend(await sample_turns(self.select))

    async def come_to_rest(self) -> None:
        """Wait until no turn is open, or for the limit; then read everything once more by every way."""

        async def settled() -> bool:
            return not await count_open(self.select)

        await comes_true(settled, _SETTLE_SECONDS)
        history = self.history
        history.turns = await read_turns(self.select)
        await self._read_again({turn.run_id: turn.server_id for turn in history.turns})
        history.runs = await read_runs(self.select)
        history.begun = self.cluster.begun()

    def figures(self, scenario: str, faults: int, notes: str = "") -> Figures:
        """Check the history, which has come to rest, and count."""
        findings = check(self.history, self.rules)
        count = Counter(finding.rule for finding in findings)
        longest_rescue = max(self.rescues(), default=0.0)
        if longest_rescue > LONGEST_RESCUE_SECONDS:
            self.findings.append(f"a rescue took {longest_rescue:.1f} s")
        return Figures(
            scenario,
            faults,
            len(self.history.runs),
            count["lost"],
            count["stuck"],
            longest_rescue,
            time.monotonic() - self._began,
            (*findings, *self.findings, *self.cluster.complaints()),
            notes,
        )

    async def _read_again(self, servers: Mapping[str, str]) -> None:
        client = self.client()
        for run_id in self.random.sample(sorted(servers), min(_READ_AGAIN, len(servers))):
            for gateway in self.cluster.gateways:
                shown = await client.read_log(servers[run_id], run_id, gateway.url)
            if shown.status in TERMINAL:
                await client.follow(servers[run_id], run_id)

    def rescues(self) -> list[float]:
        """How long after the death of its holder each orphaned turn ran again or was given up, in seconds."""
        deaths = self.cluster.deaths()
        begun = {(each.run_id, each.turn, each.attempt): each for each in self.history.begun}
        given_up = {
            (turn.run_id, turn.number): turn.shown.completed_at
            for turn in self.history.turns
            if turn.shown.error_code == "RUNTIME_LOST"
        }
        rescues = []
        for (run_id, number, attempt), each in begun.items():
            died_at = deaths.get(each.pid)
            following = begun.get((run_id, number, attempt + 1))
            again_at = following.at if following else given_up.get((run_id, number))
            if died_at is not None and again_at is not None:
                rescues.append(again_at - died_at)
        return rescues


@asynccontextmanager
async def stage(
    folder: Path,
    seed: int,
    *,
    postgres: bool = False,
    runtimes: int = 1,
    started: int | None = None,
    gateways: int = 2,
    settings: Mapping[str, str] = {},
    gateway_settings: Mapping[str, str] = {},
    wired: bool = False,
    drained: bool = False,
) -> AsyncIterator[Stage]:
    """Set the stage over a SQLite file, or a PostgreSQL of its own; wires lie behind the gateways if so asked.

    `drained`: runtimes are stopped in order here.
    """
    async with AsyncExitStack() as left:
        server, select = None, sqlite_select(folder / "data" / "runs.sqlite")
        if postgres:
            server = PostgresServer(folder / "postgres", durable=False)
            left.push_async_callback(asyncio.to_thread, server.stop)
            await asyncio.to_thread(server.start)
            select = postgres_select(server.url("postgres"))
        wires: list[Wire] = []

        async def between(target: str) -> str:
            wires.append(wire := Wire())
            left.push_async_callback(wire.stop)
            return await wire.start(target)

        running = await left.enter_async_context(
            cluster(
                folder,
                runtimes=runtimes,
                started=started,
                gateways=gateways,
                store_url=None if server is None else server.url("postgres"),
                settings=settings,
                gateway_settings=gateway_settings,
                between=between if wired else None,
            )
        )
        connector = aiohttp.TCPConnector(limit=0)
        http = await left.enter_async_context(aiohttp.ClientSession(connector=connector, read_bufsize=1 << 20))
        yield Stage(seed, running, http, select, Rules(drained=drained), server=server, wires=wires)


async def comes_true(fact: Callable[[], Awaitable[bool]], limit_seconds: float) -> bool:
    """Wait for a fact; return whether it came within the limit."""
    deadline = time.monotonic() + limit_seconds
    while not (true := await fact()) and time.monotonic() < deadline:  # noqa: ASYNC110 - told by nobody
        await asyncio.sleep(_POLL_SECONDS)
    return true


def prove(scenario: Callable[..., Coroutine[Any, Any, Figures]], folder: Path, **sizes: Any) -> None:
    """Play a scenario by the seed that TESTS_SEED says, or a new one. A failure names it."""
    seed = int(os.environ.get("TESTS_SEED") or secrets.randbelow(1 << 32))
    try:
        figures = asyncio.run(scenario(folder, seed, **sizes))
        findings = "\n".join(map(str, figures.findings[:20]))
        assert not findings, f"{len(figures.findings)} findings:\n{findings}"
        assert figures.runs, "a scenario without runs shows nothing"
    except BaseException as error:
        error.add_note(f"TESTS_SEED={seed}")
        raise
