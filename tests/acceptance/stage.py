"""Where a scenario plays: a cluster, its clients, the history that they write, and at the end the figures of it all."""

import asyncio
import os
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import msgspec

from tests.acceptance.checker import USUAL, Finding, Rules, check
from tests.acceptance.client import Client
from tests.acceptance.cluster import Cluster, cluster
from tests.acceptance.history import History
from tests.acceptance.load import Worker
from tests.acceptance.stored import Select, count_open, read_runs, read_turns, sample_turns, sqlite_select

_SETTLE_SECONDS = 90.0
_READ_AGAIN = 100
_POLL_SECONDS = 0.01


class Figures(msgspec.Struct, frozen=True):
    """What came of a scenario. `notes` are further figures; `findings` is empty when every promise was kept."""

    scenario: str
    seed: int
    faults: int
    runs: int
    lost: int
    stuck: int
    longest_rescue_seconds: float
    seconds: float
    findings: tuple[Finding | str, ...]
    notes: str = ""


class Stage:
    """A running cluster under one history. `select` reads its store."""

    def __init__(self, seed: int, running: Cluster, http: aiohttp.ClientSession, select: Select, rules: Rules) -> None:
        self.random = Random(seed)
        self.cluster = running
        self.select = select
        self.history = History()
        self.rules = rules
        self._seed = seed
        self._http = http
        self._began = time.monotonic()

    def client(self) -> Client:
        """A new client of all gateways."""
        urls = [gateway.url for gateway in self.cluster.gateways]
        return Client(self._http, urls, self.history, Random(self.random.getrandbits(64)))

    async def under_load(
        self,
        faults: Callable[[], Awaitable[None]],
        *,
        workers: int = 8,
        longest_seconds: float = 0.6,
        cancels: bool = True,
    ) -> None:
        """Let clients work while the faults go on, and end what they have begun."""
        crowd = [
            Worker(f"{self._seed}-{number}", self.client(), longest_seconds=longest_seconds, cancels=cancels)
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

    async def settle(self) -> None:
        """Return once no turn is open, or after the limit: the checker tells of those that are."""

        async def settled() -> bool:
            return not await count_open(self.select)

        await comes_true(settled, _SETTLE_SECONDS)

    async def figures(self, scenario: str, faults: int, notes: str = "") -> Figures:
        """Wait for rest, read everything once more by every way, check it, and count."""
        await self.settle()
        history = self.history
        history.turns = await read_turns(self.select)
        client = self.client()
        servers = {turn.run_id: turn.server_id for turn in history.turns}
        for run_id in self.random.sample(sorted(servers), min(_READ_AGAIN, len(servers))):
            shown = [await client.read_log(servers[run_id], run_id, each.url) for each in self.cluster.gateways]
            if all(each.status in ("completed", "failed", "cancelled") for each in shown):
                await client.follow(servers[run_id], run_id)
        history.runs = await read_runs(self.select)
        history.begun = self.cluster.begun()
        findings = check(history, self.rules)
        count = Counter(finding.rule for finding in findings)
        return Figures(
            scenario,
            self._seed,
            faults,
            len(history.runs),
            count["lost"],
            count["stuck"],
            max(self.rescues(), default=0.0),
            time.monotonic() - self._began,
            (*findings, *self.cluster.complaints()),
            notes,
        )

    def rescues(self) -> list[float]:
        """How long after the death of its holder each orphaned turn ran again or was given up, in seconds."""
        deaths = self.cluster.deaths()
        begun = {(each.run_id, each.turn, each.attempt): each for each in self.history.begun}
        ended = {
            (turn.run_id, turn.number): turn.shown.completed_at
            for turn in self.history.turns
            if turn.shown.error_code == "RUNTIME_LOST"
        }
        rescues = []
        for each in begun.values():
            died_at = deaths.get(each.pid)
            following = begun.get((each.run_id, each.turn, each.attempt + 1))
            again_at = following.at if following else ended.get((each.run_id, each.turn))
            if died_at is not None and again_at is not None:
                rescues.append(again_at - died_at)
        return rescues


@asynccontextmanager
async def stage(
    folder: Path,
    seed: int,
    *,
    runtimes: int = 1,
    gateways: int = 2,
    settings: Mapping[str, str] = {},
    rules: Rules = USUAL,
) -> AsyncIterator[Stage]:
    """Set the stage over a SQLite file."""
    async with cluster(folder, runtimes=runtimes, gateways=gateways, settings=settings) as running, _http() as http:
        yield Stage(seed, running, http, sqlite_select(folder / "data" / "runs.sqlite"), rules)


def _http() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), read_bufsize=1 << 20)


async def comes_true(fact: Callable[[], Awaitable[bool]], limit_seconds: float) -> bool:
    """Wait for a fact; return whether it came within the limit."""
    deadline = time.monotonic() + limit_seconds
    while not (true := await fact()) and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_SECONDS)
    return true


def prove(scenario: Callable[..., Coroutine[Any, Any, Figures]], folder: Path, **sizes: Any) -> None:
    """Play a scenario by the seed that TESTS_SEED says, or a new one; a failure names it."""
    seed = int(os.environ.get("TESTS_SEED") or secrets.randbelow(1 << 32))
    try:
        figures = asyncio.run(scenario(folder, seed, **sizes))
        findings = "\n".join(map(str, figures.findings[:20]))
        assert not findings, f"{len(figures.findings)} findings:\n{findings}"
        assert figures.runs, "a scenario without runs shows nothing"
    except BaseException as error:
        error.add_note(f"TESTS_SEED={seed}")
        raise
