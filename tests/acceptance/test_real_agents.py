"""Real agents of other makers as their users start them: whole programs, through both of ours.

fast-agent has a model of its own for tests, which obeys `***CALL_TOOL name {json}`; files and commands it asks of us.
OpenCode is driven by the small local model (see `shaped_model`), and works on files by itself.
"""

import json
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from tests.acceptance.processes import Up, children, command, is_alive, until, up
from tests.acceptance.real_agents import FAST_AGENT, OPENCODE, RealAgent
from tests.acceptance.shaped_model import NOTE, ShapedModel, shaped_model

FACT = "The harbour is called Skagen."
"""What a run is told first, to be known by it later."""


_PATIENCE_SECONDS = 50.0


class Play(ABC):
    """An agent behind both programs, and how to make it do things.

    `write` makes it write NOTE, for which it asks; `work` makes it work for minutes. `allow` and `reject` are
    its options.
    """

    agent: ClassVar[RealAgent]
    write: ClassVar[str]
    work: ClassVar[str]
    allow: ClassVar[str]
    reject: ClassVar[str]

    def __init__(self, shared: Up) -> None:
        self.shared = shared
        # An agent needs a moment to start, and the model its time, most of all on a machine that is busy.
        shared.http.timeout = _PATIENCE_SECONDS

    @abstractmethod
    def works(self, path: str) -> object:
        """Whether the run is in the middle of its work."""

    @abstractmethod
    def remembers(self, path: str) -> bool:
        """Continue the run; return whether the agent itself knows FACT from an earlier turn."""

    def start(self, content: str) -> httpx.Response:
        """Start a run."""
        return self.shared.start("agent", content)

    def go_on(self, path: str, content: str) -> httpx.Response:
        """Continue a run, or answer its question."""
        return self.shared.http.post(path + "/input", json={"content": content})

    def start_work(self, path: str) -> None:
        """Continue a run with work, and return in the middle of it."""
        answer = self.shared.http.post(path + "/input", json={"content": self.work, "mode": "async"})
        assert answer.status_code == 202, answer.text
        until(lambda: self.works(path), "the agent at work")

    def processes(self) -> dict[int, str]:
        """What runs in the agents' working directories, with its arguments."""
        found = {}
        for pid in children(self.shared.runtime_pid):
            try:
                folder, arguments = Path(f"/proc/{pid}/cwd").readlink(), Path(f"/proc/{pid}/cmdline").read_text()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if self.work_folder in [folder, *folder.parents]:
                found[pid] = arguments.replace("\0", " ")
        return found

    def agents(self) -> list[int]:
        """The processes of the agent itself."""
        return [pid for pid, arguments in self.processes().items() if str(self.agent.folder) in arguments]

    @property
    def work_folder(self) -> Path:
        """Where the working directories of runs are."""
        return self.shared.folder / ".acp" / "work"

    def note(self, path: str) -> Path:
        """The file that it writes."""
        return self.work_folder / path.rpartition("/")[2] / NOTE


class FastAgent(Play):
    """It asks before it writes; before it runs a command, too, which this server's settings allow."""

    agent = FAST_AGENT
    write = f'***CALL_TOOL write_text_file {{"path": "{NOTE}", "content": "The sea is calm."}}'
    work = '***CALL_TOOL execute {"command": "sleep 300"}'
    allow = "allow_once"
    reject = "reject_once"

    def works(self, path: str) -> object:
        return any(arguments.startswith("sleep 300") for arguments in self.processes().values())

    def remembers(self, path: str) -> bool:
        # Its model answers the first prompt after a tool call that was broken off by saying that it was.
        for prompt in ("Go on.", "/history detail 1"):
            answer = self.go_on(path, prompt)
            assert answer.json()["run"]["status"] == "completed", answer.text
        return FACT in answer.json()["run"]["output"]


class OpenCode(Play):
    """It asks before it writes, as its configuration says."""

    agent = OPENCODE
    write = "Write a note about the sea."
    work = "Write a long story of a ship."
    allow = "once"
    reject = "reject"

    def __init__(self, shared: Up, model: ShapedModel) -> None:
        super().__init__(shared)
        self._model = model

    def works(self, path: str) -> object:
        self.shared.until_said(path, "run.delta")
        return True

    def remembers(self, path: str) -> bool:
        question = "What is the harbour called?"
        answer = self.go_on(path, question)
        assert answer.json()["run"]["status"] == "completed", answer.text
        asked = self._model.asked[-1]
        # Not by our telling it the history in front of the question.
        assert _texts(asked)[-1] == question
        return FACT in _texts(asked)


def _texts(messages: list[dict[str, Any]]) -> list[str]:
    return [message["content"] for message in messages]


def _servers(program: str, arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    # JSON's strings and lists of them are TOML's, too.
    variables = "\n".join(f"{name} = {json.dumps(value)}" for name, value in environment.items())
    return f"""
[servers.agent]
kind = "agent_runtime"
agent = "agent_client_protocol"
repeatable = false
questions = {{ allow_tool_kinds = ["execute"] }}

[servers.agent.options]
command = {json.dumps(program)}
args = {json.dumps(arguments)}

[servers.agent.options.env]
{variables}
"""


@contextmanager
def play_fast_agent(folder: Path) -> Iterator[Play]:
    """Serve fast-agent. Its sessions are in the run's working directory."""
    program = FAST_AGENT.require()
    servers = _servers(program, ["acp", "--model", "passthrough", "--shell"], {"HOME": str(folder)})
    with up(folder, servers=servers) as shared:
        yield FastAgent(shared)


@contextmanager
def play_opencode(folder: Path) -> Iterator[Play]:
    """Serve OpenCode. Its sessions are in its HOME, which all runs share."""
    program = OPENCODE.require()
    with shaped_model() as model:
        environment = {
            "HOME": str(folder),
            "OPENCODE_CONFIG_CONTENT": json.dumps(_opencode_configuration(model.url)),
            "OPENCODE_DISABLE_MODELS_FETCH": "1",
            # It fetches what its plug-ins could need at each start; there are none.
            "npm_config_registry": "http://127.0.0.1:9",
        }
        with up(folder, servers=_servers(program, ["acp", "--pure"], environment)) as shared:
            yield OpenCode(shared, model)


def _opencode_configuration(model_url: str) -> dict[str, Any]:
    return {
        "autoupdate": False,
        "share": "disabled",
        "model": "local/smollm2",
        "small_model": "local/smollm2",
        "enabled_providers": ["local"],
        "provider": {
            "local": {
                "npm": "@ai-sdk/openai-compatible",
                "options": {"baseURL": model_url, "apiKey": "none"},
                "models": {"smollm2": {"limit": {"context": 4096, "output": 512}}},
            }
        },
        # A title costs the small model more than the answer.
        "agent": {"title": {"disable": True}},
        "permission": {"edit": "ask", "bash": "ask"},
    }


@pytest.fixture(scope="module", params=[play_fast_agent, play_opencode])
def play(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Play]:
    """Each of the agents."""
    with request.param(tmp_path_factory.mktemp("agent")) as played:
        yield played


@pytest.fixture(scope="module")
def known(play: Play) -> str:
    """The path of a run that was told FACT, and has been left idle by every test."""
    answer = play.start(FACT)
    assert (answer.status_code, answer.json()["run"]["status"]) == (201, "completed"), answer.text
    return answer.headers["Location"]


def logs(document: dict[str, Any], log_type: str) -> list[dict[str, Any]]:
    """The entries of the execution log of this type."""
    return [event for event in document["events"] if event.get("logType") == log_type]


def test_agent_streams_its_answer_and_is_continued(play: Play) -> None:
    """Deltas, then the message that holds them; the next turn is the next prompt of the same process and session."""
    documents = list(play.shared.documents("/v1/servers/agent/runs", {"content": FACT}))
    assert documents[-1]["type"] == "stream.completed"
    run = documents[-1]["run"]
    assert (run["status"], run["sessionProtocol"]) == ("completed", "agent-client-protocol"), run
    text = "".join(document["text"] for document in documents if document["type"] == "run.delta")
    assert text
    assert run["output"].startswith(text)
    path = f"/v1/servers/agent/runs/{run['id']}"
    processes = play.processes()
    assert processes
    assert play.remembers(path)
    assert play.processes() == processes
    last = play.shared.get(path)["events"][-1]
    assert last["role"] == "assistant"
    assert last["content"].strip()


def test_agent_asks_before_it_writes(play: Play) -> None:
    """Its permission is a question of the run, answered by the caller: no file by one answer, a file by the other."""
    asked = play.start(play.write)
    path = asked.headers["Location"]
    for given in (play.reject, play.allow):
        assert (asked.status_code, asked.json()["run"]["threadStatus"]) == (202, "permission_asked"), asked.text
        question = logs(asked.json(), "permission_request")[-1]
        assert question["metadata"]["toolKind"] == "edit"
        assert {play.allow, play.reject} <= {option["id"] for option in question["metadata"]["options"]}
        assert not play.note(path).exists()
        answered = play.go_on(path, given)
        assert answered.status_code == 200, answered.text
        assert answered.json()["run"]["status"] == "completed", answered.text
        call = logs(answered.json(), "tool_call")[-1]
        assert call["metadata"]["kind"] == "edit"
        assert call["metadata"]["status"] == ("completed" if given == play.allow else "failed"), call
        if given == play.reject:
            asked = play.go_on(path, play.write)
    assert play.note(path).read_text() in json.dumps(call["metadata"])


def test_agent_is_cancelled_and_goes_on(play: Play, known: str) -> None:
    """A cancel ends what it does, not its process: the next turn knows the ones before."""
    play.start_work(known)
    agents = play.agents()
    cancelled = play.shared.http.post(known + "/cancel", json={}).json()
    assert cancelled["run"]["status"] == "cancelled"
    assert play.remembers(known)
    assert play.agents() == agents
    assert list(play.processes()) == agents


def test_agent_that_is_killed_is_a_failed_turn(play: Play, known: str) -> None:
    """kill -9 of the agent fails the turn, which says so; the next one loads the session in a new process."""
    play.start_work(known)
    agents = play.agents()
    for pid in agents:
        os.kill(pid, signal.SIGKILL)
    run = play.shared.until_ended(known)["run"]
    assert run["status"] == "failed", run
    assert "was ended by the signal SIGKILL" in run["error"], run
    until(lambda: not play.processes(), "the end of all that the agent ran")
    assert play.remembers(known)
    assert play.agents()
    assert logs(play.shared.get(known), "session")[-1]["metadata"]["opened"] == "load"


def test_no_agent_outlives_a_runtime_that_is_killed(play: Play, known: str) -> None:
    """kill -9 of the runtime in the middle of a turn leaves no process; the next runtime loads the session again."""
    play.start_work(known)
    processes = play.processes()
    assert processes
    killed = play.shared.runtime_pid
    os.kill(killed, signal.SIGKILL)
    until(lambda: not any(is_alive(pid) for pid in processes), "the end of all that the agents ran")
    run = play.shared.until_ended(known)["run"]
    assert run["status"] == "failed", run
    assert play.remembers(known)
    assert logs(play.shared.get(known), "session")[-1]["metadata"]["opened"] == "load"
    assert play.shared.runtime_pid != killed


@pytest.mark.parametrize("play", [play_fast_agent], indirect=True)
def test_check_tells_what_the_agent_can(play: Play) -> None:
    """`agents check` starts it, and says that it answers and loads its sessions."""
    folder = play.shared.folder
    check = ("gateway", "agents", "check", "agent", "--servers", str(folder / "servers.toml"))
    ended = command(folder, *check, limit_seconds=_PATIENCE_SECONDS)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert play.agent.version in ended.stdout
    assert "It loads earlier sessions" in ended.stdout
