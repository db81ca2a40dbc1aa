"""A network between gateways and runtime services that resets, delays, and swallows without closing."""

import asyncio
import time
from pathlib import Path

from tests.acceptance.history import Task
from tests.acceptance.stage import Figures, Stage, prove, stage
from tests.integration.wire import Wire

_SEEN_SECONDS = 20.0
_CALL_SECONDS = 10.0
_OVERDUE_SECONDS = 1.0


async def spoil_wires(folder: Path, seed: int, faults: int) -> Figures:
    """Reset and delay what lies before one of two replicas, under load."""
    async with stage(folder, seed, postgres=True, runtimes=2, gateways=1, wired=True) as played:

        async def spoil() -> None:
            for _ in range(faults):
                await played.pause(0.2, 1.0)
                wire = played.random.choice(played.wires)
                wire.delay_seconds = played.random.choice((0.0, 0.02, 0.1))
                wire.cut()
            for wire in played.wires:
                wire.delay_seconds = 0.0

        await played.under_load(spoil)
        await played.come_to_rest()
        return played.figures("a wire that resets and delays", faults)


async def swallow_on_wires(folder: Path, seed: int, faults: int) -> Figures:
    """Swallow everything before one of two replicas, then before both; nothing is closed."""
    async with stage(folder, seed, postgres=True, runtimes=2, gateways=1, wired=True) as played:
        seen = 0.0
        for number in range(faults):
            seen = max(seen, await _swallow_one(played, played.random.choice(played.wires), number))
        longest = await _swallow_all(played)
        if seen > _SEEN_SECONDS:
            played.findings.append(f"a wire that swallows was seen after {seen:.1f} s")
        if longest > _CALL_SECONDS + _OVERDUE_SECONDS:
            played.findings.append(f"a call of {_CALL_SECONDS:.0f} s lasted {longest:.1f} s")
        await played.come_to_rest()
        notes = f"seen after {seen:.1f} s; calls of {_CALL_SECONDS:.0f} s lasted {longest:.1f} s"
        return played.figures("a wire that swallows", faults + 1, notes)


async def _swallow_one(played: Stage, wire: Wire, number: int) -> float:
    """Return how long it took until all that was under way by this wire had gone on by the other one, in seconds."""
    clients = [played.client() for _ in range(8)]
    async with asyncio.TaskGroup() as group:
        for each, client in enumerate(clients):
            task = Task(f"swallowed-{number}-{each}", 4, 0.25)
            work = client.start_and_follow if each % 2 else client.start_and_wait
            group.create_task(work("steps", task, key=client.new_key()))
        await played.pause(0.2, 0.8)
        began = time.monotonic()
        wire.swallow()
    seconds = time.monotonic() - began
    wire.cut()
    return seconds


async def _swallow_all(played: Stage) -> float:
    """Return how long the longest call lasted, in seconds, while nothing came through."""
    client = played.client()
    shown = await client.start("steps", Task("before", 1, 0.0), mode="sync", key=None)
    for wire in played.wires:
        wire.swallow()
    base = f"{played.cluster.gateways[0].url}/v1/servers/steps/runs/{shown.run_id}"

    async def ask(method: str, path: str) -> float:
        began = time.monotonic()
        async with played.http.request(method, base + path, headers=client.headers) as response:
            document = await response.json()
            if response.status not in (503, 504):
                played.findings.append(f"{method} {path} was answered {response.status} {document}")
        return time.monotonic() - began

    lasted = await asyncio.gather(*(ask("GET", ""), ask("GET", "/events"), ask("POST", "/cancel")))
    for wire in played.wires:
        wire.cut()
    return max(lasted)


def test_broken_wire_is_not_noticed(tmp_path: Path) -> None:
    """Clients see neither gaps nor duplicates, and nothing is done twice."""
    prove(spoil_wires, tmp_path, faults=6)


def test_swallowing_wire_is_seen(tmp_path: Path) -> None:
    """What was under way goes on elsewhere, and no call outlives its deadline."""
    prove(swallow_on_wires, tmp_path, faults=1)
