"""The product under measurement: `acp-gateway up` with echo servers, everything on, on a port of its own."""

import http.client
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import urlsplit

from benchmarks.environment import EVENTS
from benchmarks.load import http_request
from benchmarks.processes import Server, read_when_written, running

ECHO: Final = "echo"
IDLE: Final = "idle"
FLOOD: Final = "flood"
TICKER: Final = "ticker"
GATE: Final = "gate"
LONG_LOGS: Final = (1_000, 10_000, 100_000)


def echo(messages: int) -> str:
    """The server whose runs hold `messages` events of the agent."""
    return ECHO if messages == EVENTS else f"{ECHO}-{messages}"


def runs_path(server_id: str) -> str:
    """Where runs of a server are started and listed."""
    return f"/v1/servers/{server_id}/runs"


@contextmanager
def product(
    directory: Path,
    *,
    name: str = "product",
    data_dir: Path | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Server]:
    """Gateway and runtime service, ready; logs, and the store unless `data_dir` is given, in `directory`."""
    with starting_product(directory, name=name, data_dir=data_dir, environment=environment) as ready:
        yield ready()


@contextmanager
def starting_product(
    directory: Path,
    *,
    name: str = "product",
    data_dir: Path | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
    port: int = 0,
) -> Iterator[Callable[[], Server]]:
    """Like `product`, but the block begins with the start of the process; what it gets waits until it is ready."""
    servers, ready, log = (directory / f"{name}.{suffix}" for suffix in ("toml", "json", "log"))
    servers.write_text(_servers_toml())
    ready.unlink(missing_ok=True)
    arguments = ["-m", "gateway", "up", "--host", "127.0.0.1", "--port", str(port), "--drain-seconds", "0"]
    arguments += ["--data-dir", str(data_dir or directory / name), "--servers", str(servers)]
    pids: tuple[int, ...] = ()
    try:
        with running([*arguments, "--ready-file", str(ready)], log=log, environment=environment) as process:

            def when_ready() -> Server:
                nonlocal pids
                facts = read_when_written(ready, process, log)
                pids = (facts["gateway_pid"], facts["runtime_pid"])
                url = urlsplit(facts["url"])
                assert url.hostname
                assert url.port
                return Server(url.hostname, url.port, pids, facts["api_key"], facts["grpc_target"])

            yield when_ready
    finally:
        for pid in pids:  # gone by now, unless `up` itself had to be killed
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def start_request(server: Server, server_id: str, text: str, *, accept: str = "application/json") -> str:
    """The POST that starts a run, as text."""
    headers = server.headers | {"Accept": accept}
    return http_request("POST", runs_path(server_id), headers, json.dumps({"content": text}))


def events_request(server: Server, server_id: str, run_id: str) -> str:
    """The GET that replays a run as SSE and then follows it, as text."""
    headers = server.headers | {"Accept": "text/event-stream"}
    return http_request("GET", f"{runs_path(server_id)}/{run_id}/events", headers)


def has_runs(server: Server, server_id: str, status: str) -> bool:
    """Whether any run of a server has a status."""
    return bool(_call(server, "GET", f"{runs_path(server_id)}?status={status}&limit=1")["runs"])


def start_run(server: Server, server_id: str, text: str) -> str:
    """Start a run in mode async; its id."""
    answer = _call(server, "POST", runs_path(server_id), {"content": text, "mode": "async"})
    return str(answer["run"]["id"])


def ticking_runs(server: Server, phases: Iterable[float]) -> list[str]:
    """Start a run that ticks at each fraction of the second; the requests to follow them."""
    return [events_request(server, TICKER, start_run(server, TICKER, str(phase))) for phase in phases]


def finished_run(server: Server, server_id: str, text: str, seconds: float = 300.0) -> str:
    """Start a run and wait until it has completed; its id."""
    run_id = start_run(server, server_id, text)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        status = _call(server, "GET", f"{runs_path(server_id)}/{run_id}")["run"]["status"]
        if status == "completed":
            return run_id
        if status not in ("queued", "running"):
            break
        time.sleep(0.1)
    raise RuntimeError(f"a run of {server_id} did not complete")


def _call(server: Server, method: str, path: str, body: object = None) -> Any:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    try:
        headers = server.headers | {"Content-Type": "application/json"}
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        response = connection.getresponse()
        document = response.read()
        if response.status >= 300:
            raise RuntimeError(f"{method} {path} answered {response.status}: {document[:500]!r}")
        return json.loads(document)
    finally:
        connection.close()


def _servers_toml() -> str:
    options = {echo(messages): f"messages = {messages}" for messages in (EVENTS, *LONG_LOGS)}
    options[IDLE] = "word_delay_seconds = 60"
    options[FLOOD] = f"messages = {LONG_LOGS[-1]}, word_delay_seconds = 0.001"
    agents = {name: ("echo", option) for name, option in options.items()}
    for name in (TICKER, GATE):
        agents[name] = ("python", f'entrypoint = "benchmarks.{name}:{name}"')
    return "\n".join(
        f'[servers.{name}]\nkind = "agent_runtime"\nagent = "{agent}"\noptions = {{ {option} }}\n'
        for name, (agent, option) in agents.items()
    )
