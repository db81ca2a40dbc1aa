"""A hundred runs at once, each with an agent process of its own: started, streamed, ended; and what they cost."""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from tests.acceptance.processes import ROOT, Up, children, is_alive, until, up

RUNS = 100
MIB = 1 << 20
AGENT = ROOT / "tests" / "acp_agents" / "light.py"


def servers(gate: Path) -> str:
    """The declaration of the light agent, whose processes do not outlive the gate for long."""
    return f"""
[servers.light]
kind = "agent_runtime"
agent = "agent_client_protocol"
[servers.light.options]
command = "{sys.executable}"
args = ["-I", "-S", "{AGENT}", "{gate}"]
idle_seconds = 0.5
"""


def own_bytes(started: Up) -> int:
    """The memory of both programs; the guard of child processes is one, whatever the number of runs."""
    programs = [psutil.Process(started.pid), psutil.Process(started.runtime_pid)]
    return sum(process.memory_info().rss for process in programs)


def agents_of(started: Up) -> list[int]:
    """The processes of the agents."""
    found = []
    for pid in children(started.runtime_pid):
        with suppress(FileNotFoundError, ProcessLookupError):
            if str(AGENT) in Path(f"/proc/{pid}/cmdline").read_text() and is_alive(pid):
                found.append(pid)
    return found


def streamed(started: Up, number: int) -> list[str]:
    """Start a run and follow it to its end; return the types of the frames."""
    body = {"content": f"run {number}"}
    url = f"{started.url}/v1/servers/light/runs"
    headers = {"Authorization": f"Bearer {started.key}", "Accept": "application/x-ndjson"}
    with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as answer:
        return [line.split('"', 4)[3] for line in answer.iter_lines() if line]


def test_hundred_runs_have_a_process_each(tmp_path: Path) -> None:
    """All at work at the same time; each costs the programs less than a MiB; in the end no process is left."""
    gate = tmp_path / "gate"
    with up(tmp_path, servers=servers(gate)) as started, ThreadPoolExecutor(RUNS) as threads:
        # What the first ones cost is what the kind itself costs.
        gate.touch()
        first = [threads.submit(streamed, started, number) for number in range(4)]
        assert all(each.result()[-1] == "stream.completed" for each in first)
        until(lambda: not agents_of(started), "the end of the first agents")
        gate.unlink()
        before = own_bytes(started)

        following = [threads.submit(streamed, started, number) for number in range(RUNS)]

        def all_at_work() -> bool:
            runs = started.http.get("/v1/servers/light/runs", params={"status": "running", "limit": 200}).json()["runs"]
            return len(runs) == RUNS == len(agents_of(started))

        until(all_at_work, "a hundred processes")
        pids = agents_of(started)
        cost = (own_bytes(started) - before) / RUNS
        gate.touch()
        frames = [each.result() for each in following]
        assert all(each[-1] == "stream.completed" and "run.delta" in each for each in frames)
        runs = started.http.get("/v1/servers/light/runs", params={"limit": 200}).json()["runs"]
        assert {(run["status"], run["output"]) for run in runs} == {("completed", "one two three")}
        assert {run["sessionProtocol"] for run in runs} == {"agent-client-protocol"}
        assert cost < MIB, f"{cost / MIB:.2f} MiB a run"
        until(lambda: not any(is_alive(pid) for pid in pids), "the end of all agents")
