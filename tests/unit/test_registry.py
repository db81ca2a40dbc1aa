"""servers.toml: what it may say, and how each mistake is told: the file, the server, and the mend."""

import re
import sys
from pathlib import Path

import pytest

from runtime_service.agents.echo import EchoAgent
from runtime_service.agents.python import PythonAgent
from runtime_service.errors import ServerNotFound
from runtime_service.registry import AGENT_KINDS, ConfigurationError, Registry, Server, load_registry
from tests.support import eventually, run_async

GOOD = """
[servers.echo]
kind = "agent_runtime"
agent = "echo"
turn_timeout_seconds = 5
repeatable = false
options = { messages = 3 }

[servers."runtime/one"]
kind = "agent_runtime"
agent = "echo"
organization = "other"

[servers.storefront]
kind = "web_app"
agent_runtime = "echo"

[servers.theirs]
kind = "function"
organization = "other"
agent_runtime = "runtime/one"
"""


@pytest.fixture(autouse=True)
def restored_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a file puts its folder on the path."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def load(folder: Path, text: str) -> Registry:
    """Read servers.toml with this text."""
    path = folder / "servers.toml"
    path.write_text(text)
    return load_registry(path)


def refusal(folder: Path, text: str) -> str:
    """What is said of a file, which is named."""
    with pytest.raises(ConfigurationError) as caught:
        load(folder, text)
    message = str(caught.value)
    assert message.startswith(str(folder / "servers.toml"))
    assert message.endswith(".")
    return message


def test_registry_resolves_agent_runtimes_and_bindings(tmp_path: Path) -> None:
    """By their own ids, and, when connected, through the resource that is bound to them."""
    registry = load(tmp_path, GOOD)
    echo = registry.resolve("default", "echo", connected=False)
    assert (echo.id, echo.organization, echo.turn_timeout_seconds) == ("echo", "default", 5)
    assert isinstance(echo.agent, EchoAgent)
    # Whatever the agent says; where the server says nothing, the agent is asked.
    assert echo.agent.repeatable
    assert not echo.may_repeat
    assert registry.resolve("other", "runtime/one", connected=False).may_repeat
    assert registry.resolve("default", "storefront", connected=True) is echo
    assert registry.resolve("default", "echo", connected=True) is echo
    assert registry.resolve("other", "theirs", connected=True).id == "runtime/one"
    assert registry.executor_of("echo") is echo
    assert registry.executor_of("gone") is None
    run_async(registry.close())


@pytest.mark.parametrize("connected", [True, False])
@pytest.mark.parametrize(("organization", "server_id"), [("other", "echo"), ("default", "runtime/one"), ("x", "x")])
def test_registry_tells_another_organization_what_it_tells_of_nothing(
    tmp_path: Path, organization: str, server_id: str, connected: bool
) -> None:
    """The same words, and no hint."""
    registry = load(tmp_path, GOOD)
    with pytest.raises(ServerNotFound) as caught:
        registry.resolve(organization, server_id, connected=connected)
    assert caught.value.message == f"There is no agent runtime {server_id!r}."


def test_registry_hints_at_the_family_of_a_bound_resource(tmp_path: Path) -> None:
    """To its own organization only."""
    registry = load(tmp_path, GOOD)
    with pytest.raises(ServerNotFound, match="bound to 'echo': use /v1/servers/storefront/runtime/agent/runs"):
        registry.resolve("default", "storefront", connected=False)
    for connected in (True, False):
        with pytest.raises(ServerNotFound) as caught:
            registry.resolve("other", "storefront", connected=connected)
        assert "bound" not in caught.value.message


def test_registry_without_a_file_has_the_built_in_servers() -> None:
    """`assistant`, `echo`, and a web app bound to `assistant`; each kind of agent can be made."""
    registry = load_registry(None)
    assert registry.resolve("default", "echo", connected=False).id == "echo"
    assert registry.resolve("default", "storefront", connected=True).id == "assistant"
    run_async(registry.close())
    assert set(AGENT_KINDS) == {"echo", "python", "openai", "local", "agent_client_protocol", "a2a"}


def test_registry_finds_python_agents_beside_the_file(tmp_path: Path) -> None:
    """The folder of servers.toml is searched, after everything else."""
    (tmp_path / "agents_beside_the_file.py").write_text("async def reviewer(turn):\n    yield turn.input\n")
    text = """
[servers.mine]
kind = "agent_runtime"
agent = "python"
options = { entrypoint = "agents_beside_the_file:reviewer" }
"""
    registry = load(tmp_path, text)
    assert isinstance(registry.resolve("default", "mine", connected=False).agent, PythonAgent)
    assert sys.path[-1] == str(tmp_path)
    sys.modules.pop("agents_beside_the_file")


def test_registry_closes_its_agents_beside_each_other() -> None:
    """One that takes its time does not take that of the others."""

    class Patient(EchoAgent):
        waiting = 0

        async def close(self) -> None:
            Patient.waiting += 1
            await eventually(lambda: Patient.waiting == 2)

    agents = {name: Server(name, "default", Patient(EchoAgent.Options()), 60) for name in ("one", "two")}
    run_async(Registry(agents, {}).close())


def server(fields: str, name: str = "mine") -> str:
    """A file with one server."""
    return f"[servers.{name}]\n{fields}"


MISTAKES = [
    # file, what the message must name
    ("not toml", "Expected '='"),
    ('[servers.mine]\nkind = "a"\nkind = "b"', "Cannot overwrite a value"),
    ("", "missing required field `servers`"),
    ("servers = 7", "Expected `object`"),
    ("[server.mine]\nkind = 'x'", "unknown field `server`"),
    ("[servers]\nmine = 7", "$.servers[...]"),
    (server(""), "missing required field `kind`"),
    (server('kind = ""'), "kind"),
    (server("kind = 7"), "$.servers[...].kind"),
    (
        server('kind = "agent_runtime"'),
        r"servers.mine: an agent runtime needs `agent`, one of a2a, agent_client_protocol, echo, local, openai, python",
    ),
    (server('kind = "agent_runtime"\nagent = "ecko"'), r"servers.mine: an agent runtime needs `agent`, one of a2a"),
    (server('kind = "agent_runtime"\nagent = "echo"\nagent_runtime = "x"'), "servers.mine: .* no `agent_runtime`"),
    (server('kind = "agent_runtime"\nagent = "echo"\nagnet = "x"'), "unknown field `agnet`"),
    (server('kind = "agent_runtime"\nagent = "echo"\nturn_timeout_seconds = 0'), "turn_timeout_seconds"),
    (server('kind = "agent_runtime"\nagent = "echo"\nturn_timeout_seconds = "5"'), "turn_timeout_seconds"),
    (server('kind = "agent_runtime"\nagent = "echo"\norganization = ""'), "organization"),
    (server('kind = "agent_runtime"\nagent = "echo"\norganization = "a b"'), "organization"),
    (server('kind = "agent_runtime"\nagent = "echo"', '"a\\u0007"'), "servers"),
    (server('kind = "agent_runtime"\nagent = "echo"\noptions = 7'), "options"),
    (server('kind = "agent_runtime"\nagent = "echo"\noptions = { messages = 0 }'), "servers.mine: options: .*messages"),
    (server('kind = "agent_runtime"\nagent = "echo"\noptions = { message = 1 }'), "servers.mine: options: .*`message`"),
    (server('kind = "agent_runtime"\nagent = "python"'), "servers.mine: options: .*`entrypoint`"),
    (server('kind = "agent_runtime"\nagent = "python"\noptions = { entrypoint = "x" }'), "servers.mine: options: "),
    (
        server('kind = "agent_runtime"\nagent = "python"\noptions = { entrypoint = "no_such_module:f" }'),
        "servers.mine: options: .*no_such_module",
    ),
    (
        server('kind = "agent_runtime"\nagent = "python"\noptions = { entrypoint = "json:no_such_function" }'),
        "servers.mine: options: .*no_such_function",
    ),
    (server('kind = "agent_runtime"\nagent = "openai"'), "servers.mine: options: "),
    (server('kind = "web_app"'), "servers.mine: a 'web_app' is bound to an agent runtime: give `agent_runtime`"),
    (server('kind = "web_app"\nagent = "echo"'), "servers.mine: a 'web_app' is bound to an agent runtime"),
    (server('kind = "web_app"\nagent_runtime = "x"\nagent = "echo"'), "neither `agent` nor `options`"),
    (server('kind = "web_app"\nagent_runtime = "x"\noptions = { a = 1 }'), "neither `agent` nor `options`"),
    (
        server('kind = "web_app"\nagent_runtime = "x"'),
        "servers.mine: there is no agent runtime 'x' in the organization",
    ),
    (server('kind = "web_app"\nagent_runtime = "mine"'), "servers.mine: there is no agent runtime 'mine'"),
    (
        GOOD + server('kind = "web_app"\nagent_runtime = "runtime/one"'),
        "servers.mine: there is no agent runtime 'runtime/one' in the organization 'default'",
    ),
]


@pytest.mark.parametrize(("text", "named"), MISTAKES, ids=[named for _, named in MISTAKES])
def test_mistake_in_the_file_is_told_so_that_it_can_be_mended(tmp_path: Path, text: str, named: str) -> None:
    """The file, where in it, and what is wrong."""
    message = refusal(tmp_path, text)
    assert named in message or re.search(named, message), message


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """With the system's reason."""
    with pytest.raises(ConfigurationError, match=r"missing\.toml cannot be read: No such file or directory\.$"):
        load_registry(tmp_path / "missing.toml")
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        load_registry(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    with pytest.raises(ConfigurationError, match=r"latin\.toml: "):
        load_registry(tmp_path / "latin.toml")
