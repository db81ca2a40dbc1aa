"""Real processes of both programs: started as a user starts them, killed by their ids, with what they said kept."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 30.0
TERMINAL = ("completed", "failed", "cancelled")

SERVERS = """
[servers.echo]
kind = "agent_runtime"
agent = "echo"

[servers.slow]
kind = "agent_runtime"
agent = "echo"
options = { word_delay_seconds = 0.02 }

[servers."runtime/one"]
kind = "agent_runtime"
agent = "echo"

[servers.gated]
kind = "agent_runtime"
agent = "python"
options = { entrypoint = "agents_of_the_tests:gated" }

[servers.typing]
kind = "agent_runtime"
agent = "python"
options = { entrypoint = "agents_of_the_tests:typing" }

[servers.once]
kind = "agent_runtime"
agent = "python"
options = { entrypoint = "agents_of_the_tests:typing", repeatable = false }

[servers.failing]
kind = "agent_runtime"
agent = "python"
options = { entrypoint = "agents_of_the_tests:failing" }

[servers.asking]
kind = "agent_runtime"
agent = "python"
options = { entrypoint = "agents_of_the_tests:asking" }

[servers.storefront]
kind = "web_app"
agent_runtime = "echo"

[servers.gatehouse]
kind = "function"
agent_runtime = "gated"
"""

# Between processes a gate is a file: the input names it.
AGENTS = """
import asyncio
from pathlib import Path

from runtime_service.agents import AgentError, Delta, Log, Message, Option, OptionKind


async def opened(gate):
    while not Path(gate).exists():
        await asyncio.sleep(0.01)


async def gated(turn):
    yield Log(f"attempt {turn.attempt}")
    await opened(turn.input)
    yield Message("open")


async def typing(turn):
    yield Delta("half ")
    await opened(turn.input)
    yield Delta("and half")


def asking(turn):
    options = [Option("allow", "Allow", OptionKind.ALLOW_ONCE), Option("reject", "Reject", OptionKind.REJECT_ONCE)]
    answer = turn.blocking_ask(f"Delete {turn.input}?", options)
    yield f"{answer.option}: {turn.input}"


async def failing(turn):
    raise AgentError("The disk is full.", "DISK_FULL")
"""

_T = TypeVar("_T")


def until(fact: Callable[[], _T], what: str = "") -> _T:
    """Return the first true value of `fact()`; fails after the limit."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (value := fact()):
        assert time.monotonic() < deadline, f"in vain: {what or fact}"
        time.sleep(0.01)
    return value


def is_alive(pid: int) -> bool:
    """Whether the process is there, and not only its exit code."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def children(pid: int) -> list[int]:
    """The ids of all processes that descend from this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == pid:
                found += [int(entry.name), *children(int(entry.name))]
    return found


class Program:
    """A running command. `folder` is where it runs and where its words go."""

    def __init__(
        self, folder: Path, *arguments: str, name: str = "program", environment: Mapping[str, str] = {}
    ) -> None:
        self.arguments = arguments
        self._stdout = folder / f"{name}.stdout"
        self._stderr = folder / f"{name}.stderr"
        with self._stdout.open("ab") as stdout, self._stderr.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=folder,
                env=clean_environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    @property
    def stdout(self) -> str:
        """What it has said so far."""
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        """What it and its children have logged so far."""
        return self._stderr.read_text()

    def ready(self, ready_file: Path) -> dict[str, Any]:
        """What the ready file holds, once it is there."""

        def is_ready() -> bool:
            assert self.process.poll() is None, f"it ended: {self.stderr}"
            return ready_file.exists()

        until(is_ready, "the ready file")
        content: dict[str, Any] = json.loads(ready_file.read_text())
        return content

    def send(self, number: signal.Signals) -> None:
        """Send a signal to this process alone."""
        self.process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal; return the exit code once it has ended."""
        self.send(number)
        return self.process.wait(LIMIT_SECONDS)

    def kill(self) -> None:
        """Leave nothing behind, however the test ended."""
        pids = [self.process.pid, *children(self.process.pid)] if self.process.poll() is None else []
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(LIMIT_SECONDS)


def clean_environment(more: Mapping[str, str] = {}) -> dict[str, str]:
    """This process's environment without settings of either program, and `more`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACP_")}
    paths = [str(ROOT), environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else [str(ROOT)]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths), **more}


def command(
    folder: Path, *arguments: str, environment: Mapping[str, str] = {}, limit_seconds: float = LIMIT_SECONDS
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env=clean_environment(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit_seconds,
        check=False,
    )


class Up:
    """`acp-gateway up` over a data directory in `folder`: what is in its ready file, and a client with its key."""

    def __init__(
        self, folder: Path, *arguments: str, servers: str | None = SERVERS, environment: Mapping[str, str] = {}
    ) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.ready_file = folder / "ready.json"
        self.ready_file.unlink(missing_ok=True)
        files = []
        if servers is not None:
            (folder / "servers.toml").write_text(servers)
            (folder / "agents_of_the_tests.py").write_text(AGENTS)
            files = ["--servers", str(folder / "servers.toml")]
        self.program = Program(
            folder,
            *("gateway", "up", "--port", "0", "--data-dir", str(self.data_dir), "--ready-file", str(self.ready_file)),
            *files,
            *arguments,
            environment=environment,
        )
        try:
            self.ready = self.program.ready(self.ready_file)
        except BaseException:
            self.program.kill()
            raise
        self.url: str = self.ready["url"]
        self.key: str = self.ready["api_key"]
        self.http = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=LIMIT_SECONDS
        )

    @property
    def pid(self) -> int:
        """The gateway's process."""
        return self.program.process.pid

    @property
    def runtime_pid(self) -> int:
        """The process of the runtime service, which is another one after it was started again."""
        pid: int = json.loads(until(self._runtime_ready, "the runtime's ready file"))["pid"]
        return pid

    def _runtime_ready(self) -> str:
        try:
            return (self.data_dir / "runtime.ready.json").read_text()
        except FileNotFoundError:
            return ""

    def start(self, server: str, content: str, mode: str = "sync", **fields: object) -> httpx.Response:
        """Start a run."""
        return self.http.post(f"/v1/servers/{server}/runs", json={"content": content, "mode": mode, **fields})

    def start_async(self, server: str, content: str) -> str:
        """Start a run in mode async; return its path."""
        answer = self.start(server, content, "async")
        assert answer.status_code == 202, answer.text
        return answer.headers["Location"]

    def get(self, path: str) -> dict[str, Any]:
        """What a GET answers, with a run's events."""
        answer = self.http.get(path, params={"include": "events"})
        document: dict[str, Any] = answer.raise_for_status().json()
        return document

    def until_ended(self, path: str) -> dict[str, Any]:
        """The envelope of a run once it has ended; while the runtime is away the question is asked again."""

        def ended() -> dict[str, Any] | None:
            answer = self.http.get(path, params={"include": "events"})
            if answer.status_code == 503:
                return None
            document: dict[str, Any] = answer.raise_for_status().json()
            return document if document["run"]["status"] in TERMINAL else None

        found = until(ended, f"the end of {path}")
        assert found is not None
        return found

    def documents(self, path: str, body: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        """What a stream says, as it comes; it is posted to where there is a body."""
        method = "GET" if body is None else "POST"
        with self.http.stream(method, path, json=body, headers={"Accept": "text/event-stream"}) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    def until_said(self, path: str, text: str) -> None:
        """Return once the run's log, or the text in the making, says this."""
        with self.http.stream("GET", path + "/events", headers={"Accept": "text/event-stream"}) as answer:
            for line in answer.iter_lines():
                if text in line:
                    return
        raise AssertionError(f"the stream ended before {text!r}")

    def close(self) -> None:
        """Kill what is left."""
        self.http.close()
        self.program.kill()


@contextmanager
def up(
    folder: Path, *arguments: str, servers: str | None = SERVERS, environment: Mapping[str, str] = {}
) -> Iterator[Up]:
    """Start everything; at the end nothing is left of it."""
    started = Up(folder, *arguments, servers=servers, environment=environment)
    try:
        yield started
    finally:
        started.close()
