"""A run whose agent is a process, among replicas that share their store and its working directory."""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.acceptance.cluster import KEY, TOKEN, free_ports
from tests.acceptance.processes import LIMIT_SECONDS, ROOT, TERMINAL, Program, children, is_alive, until
from tests.acceptance.stage import QUICK
from tests.postgres import fresh_database, session_server

SERVERS = f"""
[servers.coder]
kind = "agent_runtime"
agent = "agent_client_protocol"
[servers.coder.options]
command = {json.dumps(sys.executable)}
args = {json.dumps([str(ROOT / "tests" / "acp_agents" / "obedient.py"), "--load"])}
"""

RECALL = json.dumps([{"do": "tell", "what": "said"}])
"""What the agent says to it are the prompts of its session so far, this one too."""


class Replica:
    """A runtime service with a gateway of its own before it."""

    def __init__(self, name: str, folder: Path, store_url: str) -> None:
        self._name = name
        self._folder = folder
        self._port, self._gateway_port = free_ports(2)
        self._environment = {"ACP_SERVICE_TOKEN": TOKEN, "ACP_API_KEY": KEY, "ACP_STORE": store_url, **QUICK}
        url = f"http://127.0.0.1:{self._gateway_port}"
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=LIMIT_SECONDS)
        self._gateway: Program | None = None
        self.start()
        self._gateway = self._run(
            "gateway", "serve", "--port", str(self._gateway_port), "--grpc-target", f"127.0.0.1:{self._port}"
        )

    def start(self) -> None:
        """Start the runtime service, or start it again."""
        self.runtime = self._run(
            *("runtime_service", "serve", "--listen", f"127.0.0.1:{self._port}"),
            *("--data-dir", str(self._folder / self._name), "--servers", str(self._folder / "servers.toml")),
        )

    def _run(self, *arguments: str) -> Program:
        ready = self._folder / f"{self._name}.{arguments[0]}.ready.json"
        ready.unlink(missing_ok=True)
        name = f"{self._name}.{arguments[0]}"
        program = Program(
            self._folder, *arguments, "--ready-file", str(ready), name=name, environment=self._environment
        )
        program.ready(ready)
        return program

    def descendants(self) -> list[int]:
        """What the runtime service has started."""
        return children(self.runtime.process.pid)

    def go_on(self, path: str, content: str, mode: str = "sync") -> dict[str, Any]:
        """Continue a run; return the run."""
        answer = self.http.post(path + "/input", json={"content": content, "mode": mode})
        run: dict[str, Any] = answer.raise_for_status().json()["run"]
        return run

    def recalled(self, path: str) -> list[str]:
        """The prompts of the session by which this replica goes on with the run."""
        run = self.go_on(path, RECALL)
        assert run["status"] == "completed", run
        prompts: list[str] = json.loads(run["output"])
        return prompts

    def openings(self, path: str) -> list[str]:
        """How the sessions of a run were opened, the oldest first."""
        events = self.http.get(path, params={"include": "events"}).raise_for_status().json()["events"]
        return [event["metadata"]["opened"] for event in events if event.get("logType") == "session"]

    def until_ended(self, path: str) -> dict[str, Any]:
        """The run once it has ended."""

        def ended() -> dict[str, Any] | None:
            run: dict[str, Any] = self.http.get(path).raise_for_status().json()["run"]
            return run if run["status"] in TERMINAL else None

        found = until(ended, f"the end of {path}")
        assert found is not None
        return found

    def close(self) -> None:
        """Leave nothing of it."""
        self.http.close()
        for program in (self._gateway, self.runtime):
            if program is not None:
                program.kill()


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[tuple[Replica, Replica]]:
    """Two over one PostgreSQL, in one folder."""
    (tmp_path / "servers.toml").write_text(SERVERS)
    store_url = session_server().url(fresh_database())
    with (
        closing(Replica("first", tmp_path, store_url)) as first,
        closing(Replica("second", tmp_path, store_url)) as second,
    ):
        yield first, second


def test_run_goes_on_through_another_replica(replicas: tuple[Replica, Replica], tmp_path: Path) -> None:
    """kill -9 of one in the middle of a turn: none of its processes is left, and the other loads the session.

    What is idle at a replica is not used when the run has had turns elsewhere since.
    """
    first, second = replicas
    gate, at_gate = tmp_path / "gate", tmp_path / "at gate"
    started = first.http.post("/v1/servers/coder/runs", json={"content": "one", "mode": "sync"}).raise_for_status()
    path = started.headers["Location"]
    assert started.json()["run"]["output"] == "one"

    command = f"echo x >> '{at_gate}'; until test -e '{gate}'; do sleep 0.05; done"
    wait = json.dumps([{"do": "terminal", "command": command}])
    first.go_on(path, wait, "async")
    until(at_gate.exists, "the command of the agent")
    left = first.descendants()
    first.runtime.end(signal.SIGKILL)
    until(lambda: not any(is_alive(pid) for pid in left), "the end of all that the dead one has started")
    until(lambda: at_gate.read_text() == "x\nx\n", "the turn that is begun again")
    gate.touch()
    assert second.until_ended(path)["status"] == "completed"
    assert second.openings(path) == ["new", "load"]
    prompts = ["one", wait, wait]
    assert second.recalled(path) == [*prompts, RECALL]
    assert second.openings(path) == ["new", "load"]

    idle = second.descendants()
    first.start()
    assert first.recalled(path) == [*prompts, RECALL, RECALL]
    assert all(is_alive(pid) for pid in idle)
    assert second.recalled(path) == [*prompts, RECALL, RECALL, RECALL]
    assert second.openings(path) == ["new", "load", "load", "load"]
