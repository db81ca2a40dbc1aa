"""`agents check` as a real process: what it prints, its exit codes, and that it ends whatever an agent does."""

import os
import pty
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.acceptance.processes import LIMIT_SECONDS, clean_environment, command

SERVERS = """
[servers.echo]
kind = "agent_runtime"
agent = "echo"

[servers.storefront]
kind = "web_app"
agent_runtime = "echo"

[servers.away]
kind = "agent_runtime"
agent = "local"
options = { model_path = "no-such-file.gguf" }

[servers.blocking]
kind = "agent_runtime"
agent = "python"
options = { entrypoint = "checked_agents:blocking" }

[servers.stubborn]
kind = "agent_runtime"
agent = "python"
options = { entrypoint = "checked_agents:stubborn" }

[servers.shouting]
kind = "agent_runtime"
agent = "python"
options = { entrypoint = "checked_agents:shouting" }
"""

AGENTS = """
import asyncio
import time


async def blocking(turn):
    time.sleep(3600)
    yield "never"


async def stubborn(turn):
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            continue
        yield "never"


def shouting(turn):
    print("printed by the agent")
    return "hello"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a servers.toml and its agents."""
    (tmp_path / "servers.toml").write_text(SERVERS)
    (tmp_path / "checked_agents.py").write_text(AGENTS)
    return tmp_path


def check(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Check agents of the folder's servers.toml."""
    return command(folder, "gateway", "agents", "check", "--servers", "servers.toml", *arguments)


def test_check_of_the_built_in_servers_finds_that_they_work(tmp_path: Path) -> None:
    """The model on this machine's CPU answers, too; a resource is shown with what it is bound to. Nothing is stored."""
    done = command(tmp_path, "gateway", "agents", "check")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "assistant"
    assert lines[1].startswith("  works    It answers within ")
    assert "echo" in lines
    assert lines[-2:] == ["storefront is bound to assistant.", "All agents work."]
    assert "\x1b" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program", [("gateway", "agents", "check"), ("runtime_service", "check-agents")])
def test_check_of_one_server_says_what_is_missing(folder: Path, program: tuple[str, ...]) -> None:
    """In words, with exit code 1; from either program, and from the environment's servers.toml."""
    done = command(folder, *program, "away", environment={"ACP_SERVERS": "servers.toml"})
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines() == [
        "away",
        "  missing  The file no-such-file.gguf, which model_path names, is not on this machine.",
        "1 of 1 agents: something is missing: away.",
    ]


def test_check_of_a_resource_is_that_of_its_agent_runtime(folder: Path) -> None:
    """And says how they belong together."""
    done = check(folder, "storefront")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] == "echo"
    assert lines[-2:] == ["storefront is bound to echo.", "echo works."]


def test_check_tells_a_mistake_as_the_service_does(folder: Path) -> None:
    """In one line, with exit code 2: in the file, in the name of the server, and in its agents."""
    unknown = check(folder, "ecko")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr.startswith("runtime_service: there is no server 'ecko' among those that are declared: echo, ")
    (folder / "servers.toml").write_text('[servers.mine]\nkind = "agent_runtime"\nagent = "ecko"\n')
    wrong = check(folder)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    served = command(
        folder,
        "runtime_service",
        "serve",
        "--servers",
        "servers.toml",
        "--listen",
        "127.0.0.1:0",
        environment={"ACP_SERVICE_TOKEN": "-" * 16},
    )
    assert wrong.stderr in served.stderr
    assert "servers.mine: an agent runtime needs `agent`, one of" in wrong.stderr


def test_check_ends_though_an_agent_does_not_let_it(folder: Path) -> None:
    """One that ignores its cancellation is left behind, one that holds up the event loop ends the check; it says so."""
    began = time.monotonic()
    with ThreadPoolExecutor() as at_once:
        stubborn, blocking = at_once.map(
            lambda name: check(folder, name, "--limit-seconds", "0.2"), ("stubborn", "blocking")
        )
    assert time.monotonic() - began < LIMIT_SECONDS
    assert (stubborn.returncode, blocking.returncode) == (1, 1)
    assert "  missing  It has not come to an end after 0.2 s.\n" in stubborn.stdout
    assert "  missing  It goes on, 5 s after it was cancelled.\n" in stubborn.stdout
    assert blocking.stdout.splitlines() == ["blocking", "  missing  It holds up the event loop: no check can go on."]


def test_check_at_a_terminal_is_coloured(folder: Path) -> None:
    """What works is green there; an agent that prints does so in between."""
    reader, writer = pty.openpty()
    arguments = [sys.executable, "-m", "gateway", "agents", "check", "shouting", "--servers", "servers.toml"]
    environment = clean_environment({"TERM": "xterm"})
    environment.pop("NO_COLOR", None)
    done = subprocess.run(
        arguments,
        cwd=folder,
        env=environment,
        stdin=writer,
        stdout=writer,
        stderr=writer,
        check=False,
        timeout=LIMIT_SECONDS,
    )
    os.close(writer)
    shown = os.read(reader, 65_536).decode()
    os.close(reader)
    assert done.returncode == 0
    assert "\x1b[32mworks" in shown
    assert "printed by the agent" in shown
