"""The command lines, as real processes: started, used, killed, and started again over what they left."""

import json
import os
import re
import signal
import socket
import sqlite3
import stat
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.acceptance.processes import (
    AGENTS,
    LIMIT_SECONDS,
    SERVERS,
    Program,
    Up,
    children,
    command,
    is_alive,
    until,
    up,
)

TOKEN = "the-service-token-of-the-tests"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Both programs, for the tests that leave them as they are."""
    with up(tmp_path_factory.mktemp("up")) as started:
        yield started


def mode_of(path: Path) -> int:
    """Who may do what with a file."""
    return stat.S_IMODE(path.stat().st_mode)


# -- Up ------------------------------------------------------------------------------------------------


def test_ready_file_says_how_to_call(shared: Up) -> None:
    """It holds url, key, gRPC target and process ids, for this user alone; requests and calls are answered by then."""
    assert shared.ready.keys() == {"url", "api_key", "grpc_target", "gateway_pid", "runtime_pid"}
    assert mode_of(shared.ready_file) == 0o600
    assert shared.ready["gateway_pid"] == shared.pid
    assert shared.ready["runtime_pid"] == shared.runtime_pid != shared.pid
    assert shared.start("echo", "hello").status_code == 201
    health = httpx.get(f"{shared.url}/health")
    assert (health.status_code, health.json()) == (200, {"status": "ok", "ready": True})
    with grpc.insecure_channel(shared.ready["grpc_target"]) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=LIMIT_SECONDS)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_banner_says_how_to_call(shared: Up) -> None:
    """Standard output shows the base URL, the key and a curl line."""
    banner = until(lambda: shared.program.stdout)
    assert f"Base URL  {shared.url}\n" in banner
    assert f"API key   {shared.key}\n" in banner
    assert f"curl -s {shared.url}/v1/servers/" in banner
    assert "/SERVER/" not in banner


def test_secrets_are_for_this_user_alone(shared: Up) -> None:
    """Nobody else reads the data directory; the key file holds no key."""
    assert mode_of(shared.data_dir) == 0o700
    for name in ("api-key", "service-token", "keys.json"):
        assert mode_of(shared.data_dir / name) == 0o600
    assert (shared.data_dir / "api-key").read_text() == shared.key
    assert shared.key.split("_")[2] not in (shared.data_dir / "keys.json").read_text()
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in (shared.pid, *children(shared.pid))]
    for secret in (shared.key, (shared.data_dir / "service-token").read_text()):
        assert all(secret.encode() not in line for line in commands)


def test_logs_hold_no_secret_and_no_input(shared: Up) -> None:
    """One JSON object a line, one line a request, with neither keys nor what was said to or by the agent."""
    answer = shared.start("echo", "INPUT-not-for-logs", title="TITLE-not-for-logs", metadata={"m": "META-not-for-logs"})
    failed = shared.start("failing", "INPUT-not-for-logs")
    refused = httpx.get(f"{shared.url}/v1/servers/echo/runs", headers={"X-API-Key": "KEY-not-for-logs"})
    invalid = shared.http.post("/v1/servers/echo/runs?q=QUERY-not-for-logs", content=b'{"FIELD-not-for-logs": ')
    answers = (answer, failed, refused, invalid)
    assert [each.status_code for each in answers] == [201, 201, 401, 415]

    def logged() -> dict[str, dict[str, object]]:
        lines = [json.loads(line) for line in shared.program.stderr.splitlines()]
        return {line["request_id"]: line for line in lines if line["event"] == "request"}

    ids = [each.headers["X-Request-Id"] for each in answers]
    until(lambda: set(ids) <= logged().keys())
    line = logged()[ids[0]]
    assert line["route"] == "/v1/servers/{serverId}/runs"
    assert (line["method"], line["status"], line["organization"], line["server_id"]) == ("POST", 201, "default", "echo")
    assert line["run_id"] == answer.json()["run"]["id"]
    assert line["key_id"] == shared.key.split("_")[1]
    assert logged()[ids[2]]["code"] == "UNAUTHENTICATED"
    assert "not-for-logs" not in shared.program.stderr
    token = (shared.data_dir / "service-token").read_text()
    for secret in (shared.key, shared.key.split("_")[2], token):
        assert secret not in shared.program.stderr


def test_keys_are_made_and_revoked_while_running(shared: Up) -> None:
    """`keys create` prints a key that works within a second, `list` shows it without its secret, `revoke` ends it."""
    option = ("--keys-file", str(shared.data_dir / "keys.json"))
    created = command(shared.folder, "gateway", "keys", "create", "reader", "--scope", "runs:read", *option)
    assert created.returncode == 0
    key = created.stdout.strip()
    assert re.fullmatch(r"acp_[0-9a-f]{12}_[0-9a-f]{64}", key)

    def status() -> int:
        return httpx.get(f"{shared.url}/v1/servers/echo/runs", headers={"Authorization": f"Bearer {key}"}).status_code

    until(lambda: status() == 200)
    refused = httpx.post(f"{shared.url}/v1/servers/echo/runs", headers={"X-API-Key": key}, json={"content": "x"})
    assert (refused.status_code, refused.json()["code"]) == (403, "INSUFFICIENT_SCOPE")

    listed = command(shared.folder, "gateway", "keys", "list", *option).stdout
    assert re.search(rf"^{key.split('_')[1]}  default  runs:read  active  reader$", listed, re.M)
    assert key.split("_")[2] not in listed

    assert command(shared.folder, "gateway", "keys", "revoke", key.split("_")[1], *option).returncode == 0
    until(lambda: status() == 401)
    assert "revoked" in command(shared.folder, "gateway", "keys", "list", *option).stdout
    unknown = command(shared.folder, "gateway", "keys", "revoke", "000000000000", *option)
    assert (unknown.returncode, len(unknown.stderr.splitlines())) == (2, 1)
    assert shared.start("echo", "hello").status_code == 201


def test_second_up_over_the_same_data_is_refused(shared: Up) -> None:
    """It says who holds the data, ends, and leaves the first one as it is, restarts of its runtime included."""
    second = command(
        shared.folder,
        *("gateway", "up", "--port", "0", "--data-dir", str(shared.data_dir)),
        *("--servers", str(shared.folder / "servers.toml")),
    )
    assert second.returncode == 2
    assert "in use by another runtime service" in second.stderr
    assert "Traceback" not in second.stderr
    assert shared.start("echo", "hello").status_code == 201


def test_key_and_runs_survive_a_restart(tmp_path: Path) -> None:
    """The key is made once; runs are there after a restart, and queued ones are executed."""
    with up(tmp_path, "--drain-seconds", "0") as first:
        key, done = first.key, first.start_async("echo", "hello")
        ended = first.until_ended(done)
        open_run = first.start_async("gated", str(tmp_path / "gate"))
        assert first.program.end() == 0
    (tmp_path / "gate").touch()
    with up(tmp_path) as second:
        assert second.key == key
        assert second.get(done) == ended
        assert second.until_ended(open_run)["run"]["output"] == "open"


def test_key_of_the_environment_is_used(tmp_path: Path) -> None:
    """With ACP_API_KEY no key is made; that one is told and works."""
    with up(tmp_path, environment={"ACP_API_KEY": "a-key-of-my-own-choice"}) as started:
        assert started.key == "a-key-of-my-own-choice"
        assert "a-key-of-my-own-choice" in until(lambda: started.program.stdout)
        assert started.start("echo", "hello").status_code == 201
        assert not (started.data_dir / "api-key").exists()
        assert "a-key-of-my-own-choice" not in started.program.stderr


def test_limits_hold_for_both_programs(tmp_path: Path) -> None:
    """A limit that is given to `up` is that of the runtime service, too."""
    options = ("--max-metadata-bytes", "40000", "--max-title-characters", "500", "--max-body-bytes", "3000000")
    with up(tmp_path, *options) as started:
        answer = started.start("echo", "x" * 900_000, title="t" * 500, metadata={"a": "x" * 39_000})
        assert answer.status_code == 201, answer.text
        assert started.start("echo", "x", title="t" * 501).json()["code"] == "VALIDATION_FAILED"
        assert started.start("echo", "x" * 3_000_000).status_code == 413


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_both_processes(number: signal.Signals, tmp_path: Path) -> None:
    """SIGTERM and Ctrl-C end a stream with its last frame, then both processes; the exit code is 0."""
    with up(tmp_path, "--drain-seconds", "0.5") as started:
        pids = [started.pid, *children(started.pid)]
        assert started.runtime_pid in pids
        path = started.start_async("gated", str(tmp_path / "never"))
        with started.http.stream("GET", path + "/events", headers={"Accept": "text/event-stream"}) as answer:
            lines = answer.iter_lines()
            next(line for line in lines if "attempt 1" in line)
            started.program.send(number)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["code"] == "DRAINING"
        assert started.program.process.wait(LIMIT_SECONDS) == 0
        assert not [pid for pid in pids if is_alive(pid)]
        assert "Traceback" not in started.program.stderr


def test_signal_before_it_is_ready_ends_both_processes(tmp_path: Path) -> None:
    """A Ctrl-C while the runtime service is starting leaves nothing behind either."""
    program = Program(tmp_path, "gateway", "up", "--port", "0", "--data-dir", str(tmp_path / "data"))
    try:
        pids = until(lambda: children(program.process.pid))
        assert program.end(signal.SIGINT) == 0
        until(lambda: not any(is_alive(pid) for pid in pids))
    finally:
        program.kill()


# -- Killed --------------------------------------------------------------------------------------------


def test_killed_runtime_is_started_again(tmp_path: Path) -> None:
    """After kill -9 of the runtime every accepted run is finished, and a stream goes on to its end.

    A running turn is done by a second attempt; its draft is kept.
    """
    with up(tmp_path, environment={"ACP_MAX_TURNS": "2"}) as started:
        gate = tmp_path / "gate"
        repeated = started.start_async("typing", str(gate))
        lost = started.start_async("once", str(gate))
        queued = started.start_async("gated", str(gate))
        assert started.get(queued)["run"]["status"] == "queued"
        for path in (repeated, lost):
            started.until_said(path, '"half "')
            until(lambda path=path: _draft(started, path) == "half ")  # type: ignore[misc]
        before = started.runtime_pid
        with started.http.stream("GET", repeated + "/events", headers={"Accept": "text/event-stream"}) as answer:
            lines = answer.iter_lines()
            next(line for line in lines if '"half "' in line)
            os.kill(before, signal.SIGKILL)
            gate.touch()
            frames = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]

        document = started.until_ended(repeated)
        assert document["run"]["status"] == "completed"
        assert [frame["event"] for frame in frames if frame["type"] == "run.event"] == document["events"][1:]
        assert frames[-1] == {"type": "stream.completed", "run": document["run"], "thread": document["thread"]}
        shown = [(event["role"], event["content"], event.get("logType")) for event in document["events"]]
        assert shown[:2] == [("user", str(gate), None), ("assistant", "half ", "incomplete")]
        assert shown[2][::2] == ("execution_log", "attempt")
        assert "2" in shown[2][1]
        assert shown[3:] == [("assistant", "half and half", None)]
        assert [event["sequence"] for event in document["events"]] == [1, 2, 3, 4]

        document = started.until_ended(lost)
        assert (document["run"]["status"], document["run"]["errorCode"]) == ("failed", "RUNTIME_LOST")
        assert document["run"]["output"] == "half "
        assert [event.get("logType") for event in document["events"]] == [None, "incomplete", "runtime_lost"]

        document = started.until_ended(queued)
        assert document["run"]["output"] == "open"
        assert [event["content"] for event in document["events"]][1:] == ["attempt 1", "open"]

        assert started.runtime_pid != before
        assert is_alive(started.runtime_pid)
        assert started.start("echo", "hello").status_code == 201
        assert started.program.end() == 0


def _draft(started: Up, path: str) -> str | None:
    """What the store keeps of the message in the making."""
    database = sqlite3.connect(f"file:{started.data_dir / 'runs.sqlite'}?mode=ro", uri=True)
    try:
        query = "SELECT draft FROM turns JOIN runs USING (run_key) WHERE id = ?"
        draft: str | None = database.execute(query, (path.rpartition("/")[2],)).fetchone()[0]
        return draft
    finally:
        database.close()


def test_killed_runtime_is_not_noticed_by_who_waits(tmp_path: Path) -> None:
    """A sync start that waits over kill -9 of the runtime is answered as always; each kill is survived."""
    with up(tmp_path) as started, ThreadPoolExecutor(1) as pool:
        gate = tmp_path / "gate"
        waiting = pool.submit(started.start, "gated", str(gate))
        path = "/v1/servers/gated/runs"
        with httpx.Client(base_url=started.url, headers=started.http.headers) as other:
            run_ids = until(lambda: [run["id"] for run in other.get(path).json()["runs"]])
        for _ in range(2):
            pid = started.runtime_pid
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: started.runtime_pid != pid)  # type: ignore[misc]
        gate.touch()
        answer = waiting.result(LIMIT_SECONDS)
        assert (answer.status_code, answer.json()["run"]["status"]) == (201, "completed")
        assert answer.json()["run"]["output"] == "open"
        assert [run["id"] for run in started.http.get(path).json()["runs"]] == run_ids == [answer.json()["run"]["id"]]
        assert started.start("echo", "hello").status_code == 201


def test_killed_up_takes_the_runtime_along(tmp_path: Path) -> None:
    """After kill -9 of `up` itself the runtime service ends by itself, and the data can be used again."""
    with up(tmp_path, "--drain-seconds", "0.2") as started:
        path = started.start_async("gated", str(tmp_path / "gate"))
        pids = [started.pid, *children(started.pid)]
        started.program.end(signal.SIGKILL)
        until(lambda: not any(is_alive(pid) for pid in pids), "the runtime's end")
    (tmp_path / "gate").touch()
    with up(tmp_path) as again:
        assert again.until_ended(path)["run"]["status"] == "completed"


# -- Mistakes ------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A command that ends by itself, and the words that it says."""

    arguments: str
    words: str
    environment: tuple[tuple[str, str], ...] = ()
    servers: str | None = None


WITH_TOKEN = (("ACP_SERVICE_TOKEN", TOKEN),)
SETTINGS = [
    Case("gateway up --host 0.0.0.0", "--allow-plaintext"),
    Case("gateway up", "--allow-plaintext", (("ACP_HOST", "192.0.2.1"),)),
    Case("gateway up", "16", (("ACP_API_KEY", "short"),)),
    Case("gateway up --log-level loud", "ACP_LOG_LEVEL"),
    Case("gateway up --wait-limit-seconds 0", "ACP_WAIT_LIMIT_SECONDS"),
    Case("gateway up --port 70000", "ACP_PORT"),
    Case("gateway serve", "ACP_SERVICE_TOKEN"),
    Case("gateway serve --service-token-file missing", "missing"),
    Case("gateway serve --host 0.0.0.0", "--allow-plaintext", WITH_TOKEN),
    Case("gateway serve --grpc-target=", "ACP_GRPC_TARGET", WITH_TOKEN),
    Case("gateway keys create x --scope everything", "runs:read"),
    Case("gateway keys create x --organization ünicode", "ASCII"),
    Case("runtime_service serve", "ACP_SERVICE_TOKEN"),
    Case("runtime_service serve --listen 0.0.0.0:0", "--allow-plaintext", WITH_TOKEN),
    Case("runtime_service serve --listen nowhere", "--listen", WITH_TOKEN),
    Case("runtime_service serve --log-level loud", "ACP_LOG_LEVEL", WITH_TOKEN),
]
BAD_SERVERS = [
    Case("runtime_service serve --servers servers.toml", words, WITH_TOKEN, text)
    for words, text in (
        ("servers.toml", "[servers.x\n"),
        ("servers", "servers = 1\n"),
        ("servers.x", '[servers.x]\nkind = "agent_runtime"\n'),
        ("servers.x", '[servers.x]\nkind = "agent_runtime"\nagent = "magic"\n'),
        ("mesages", '[servers.x]\nkind = "agent_runtime"\nagent = "echo"\noptions = { mesages = 2 }\n'),
        ("nowhere", '[servers.x]\nkind = "web_app"\nagent_runtime = "nowhere"\n'),
        ("no_such", '[servers.x]\nkind = "agent_runtime"\nagent = "python"\noptions = { entrypoint = "no_such:f" }\n'),
        ("cannot be read", None),
    )
]
HELP = [
    Case(f"{arguments} --help", words, (("COLUMNS", "200"), ("NO_COLOR", "1")))
    for arguments, words in (
        ("gateway", "up serve keys"),
        ("gateway up", "--port ACP_PORT 8080 --data-dir --servers --ready-file ACP_API_KEY"),
        ("gateway serve", "--grpc-target 127.0.0.1:50051 ACP_SERVICE_TOKEN --keys-file"),
        ("gateway keys", "create list revoke"),
        ("gateway keys create", "--organization --scope --expires-days --keys-file"),
        ("gateway keys list", "--keys-file"),
        ("gateway keys revoke", "--keys-file"),
        ("runtime_service", "serve"),
        ("runtime_service serve", "--listen ACP_MAX_TURNS --data-dir --service-token-file"),
    )
]

Ended: TypeAlias = "subprocess.CompletedProcess[str]"


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Case, Ended]]:
    """All these commands at their end; each ran in a folder of its own, as many at once as there are processors."""

    def run(case: Case) -> Ended:
        folder = tmp_path_factory.mktemp("command")
        if case.servers is not None:
            (folder / "servers.toml").write_text(case.servers)
        return command(folder, *case.arguments.split(" "), environment=dict(case.environment))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        cases = [*SETTINGS, *BAD_SERVERS, *HELP]
        yield dict(zip(cases, pool.map(run, cases), strict=True))


def complaint(ended: Ended) -> str:
    """The one line on standard error of a command that refused to start with exit code 2."""
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("case", SETTINGS, ids=lambda case: case.arguments)
def test_bad_settings_are_told(case: Case, ended: dict[Case, Ended]) -> None:
    """A setting that cannot be is one line that names it, exit code 2."""
    assert case.words in complaint(ended[case])


@pytest.mark.parametrize("case", BAD_SERVERS, ids=lambda case: case.words)
def test_bad_servers_file_is_told(case: Case, ended: dict[Case, Ended]) -> None:
    """What is wrong with servers.toml, and where, is said in words."""
    assert case.words in complaint(ended[case])


@pytest.mark.parametrize("case", HELP, ids=lambda case: case.arguments)
def test_help_names_every_option(case: Case, ended: dict[Case, Ended]) -> None:
    """`--help` of each command says what there is to set, by option and by environment."""
    shown = ended[case]
    assert (shown.returncode, shown.stderr) == (0, "")
    for word in case.words.split(" "):
        assert word in shown.stdout


def test_port_in_use_is_told(tmp_path: Path) -> None:
    """One line says which address cannot be listened on, and what to do; nothing is left running."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = complaint(command(tmp_path, "gateway", "up", "--port", port, "--data-dir", "data"))
    assert f"127.0.0.1:{port}" in line
    assert "--port" in line
    assert not Path(f"/proc/{json.loads((tmp_path / 'data/runtime.ready.json').read_text())['pid']}").exists()


def test_bad_servers_file_ends_up(tmp_path: Path) -> None:
    """`up` says what the runtime service said, and ends, too."""
    (tmp_path / "servers.toml").write_text('[servers.x]\nkind = "agent_runtime"\n')
    options = ("--data-dir", "data", "--servers", "servers.toml")
    ended = command(tmp_path, "gateway", "up", "--port", "0", *options)
    assert ended.returncode == 2
    assert "servers.x: an agent runtime needs `agent`" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_broken_key_file_is_told(tmp_path: Path) -> None:
    """A key file that is none is named, and not overwritten."""
    (tmp_path / "keys.json").write_text("{")
    for arguments in (("keys", "create", "x"), ("serve",)):
        options = ("--keys-file", "keys.json")
        assert "keys.json" in complaint(
            command(tmp_path, "gateway", *arguments, *options, environment=dict(WITH_TOKEN))
        )
    assert (tmp_path / "keys.json").read_text() == "{"


# -- Each program alone --------------------------------------------------------------------------------


def test_programs_run_separately(tmp_path: Path) -> None:
    """`runtime_service serve` and `gateway serve` work as two commands, with token and keys in files."""
    (tmp_path / "servers.toml").write_text(SERVERS)
    (tmp_path / "agents_of_the_tests.py").write_text(AGENTS)
    (tmp_path / "token").write_text(TOKEN + "\n")
    token = ("--service-token-file", "token")
    key = command(tmp_path, "gateway", "keys", "create", "x", "--keys-file", "keys.json").stdout.strip()
    listen = ("--listen", "127.0.0.1:0", "--ready-file", "runtime.json")
    runtime = Program(
        tmp_path, "runtime_service", "serve", *listen, "--servers", "servers.toml", *token, name="runtime"
    )
    gateway = None
    try:
        target = runtime.ready(tmp_path / "runtime.json")["grpc_target"]
        options = ("--grpc-target", target, "--keys-file", "keys.json", "--port", "0", "--ready-file", "gateway.json")
        gateway = Program(tmp_path, "gateway", "serve", *options, *token, name="gateway")
        ready = gateway.ready(tmp_path / "gateway.json")
        assert ready["grpc_target"] == target
        assert ready["url"] in until(lambda: gateway.stdout)
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.post(f"{ready['url']}/v1/servers/echo/runs", json={"content": "hello"}, headers=headers)
        assert (answer.status_code, answer.json()["run"]["output"]) == (201, "hello")

        # The gateway outlives the runtime service.
        assert runtime.end() == 0
        health = httpx.get(f"{ready['url']}/health")
        assert (health.status_code, health.json()["ready"]) == (503, False)
        assert httpx.get(f"{ready['url']}/health/live").status_code == 200
        assert gateway.end() == 0
    finally:
        runtime.kill()
        if gateway is not None:
            gateway.kill()


def test_wrong_service_token_is_not_the_callers_fault(tmp_path: Path) -> None:
    """A gateway that the runtime service does not accept answers 502, not 401."""
    runtime = Program(
        tmp_path,
        *("runtime_service", "serve", "--listen", "127.0.0.1:0", "--ready-file", "runtime.json"),
        name="runtime",
        environment={"ACP_SERVICE_TOKEN": TOKEN},
    )
    gateway = None
    try:
        target = runtime.ready(tmp_path / "runtime.json")["grpc_target"]
        gateway = Program(
            tmp_path,
            *("gateway", "serve", "--grpc-target", target, "--port", "0", "--ready-file", "gateway.json"),
            name="gateway",
            environment={"ACP_SERVICE_TOKEN": "another-service-token", "ACP_API_KEY": "a-key-of-my-own-choice"},
        )
        url = gateway.ready(tmp_path / "gateway.json")["url"]
        headers = {"X-API-Key": "a-key-of-my-own-choice"}
        answer = httpx.post(f"{url}/v1/servers/echo/runs", json={"content": "hello"}, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (502, "RUNTIME_REFUSED_GATEWAY")
        assert httpx.get(f"{url}/v1/servers/echo/runs", headers=headers).status_code == 502
    finally:
        runtime.kill()
        if gateway is not None:
            gateway.kill()
