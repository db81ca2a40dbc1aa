"""servers.toml: agent runtimes, and the resources that are bound to them. Checked whole when it is read."""

import os
import sys
import tomllib
from collections.abc import Mapping
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import msgspec

from runtime_service.agents import Agent
from runtime_service.errors import ServerNotFound, shown
from runtime_service.questions import QuestionSettings

AGENT_RUNTIME = "agent_runtime"
AGENT_KINDS: dict[str, str] = {
    "echo": "runtime_service.agents.echo:EchoAgent",
    "python": "runtime_service.agents.python:PythonAgent",
    "openai": "runtime_service.agents.openai:OpenAIAgent",
    "local": "runtime_service.agents.local:LocalAgent",
    "agent_client_protocol": "runtime_service.agents.agent_client_protocol.agent:AgentClientProtocolAgent",
}
"""Each kind of agent and its class, imported when a server names it."""


class _ServerTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: Annotated[str, msgspec.Meta(min_length=1)]
    organization: Annotated[str, msgspec.Meta(pattern=r"^[!-~]{1,128}$")] = "default"
    agent: str | None = None
    options: dict[str, Any] = {}
    agent_runtime: str | None = None
    turn_timeout_seconds: Annotated[float, msgspec.Meta(gt=0, le=604_800)] = 3_600
    repeatable: bool = True
    questions: QuestionSettings = QuestionSettings()


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    servers: dict[Annotated[str, msgspec.Meta(pattern=r"^[ -~]{1,200}$")], _ServerTable]


class ConfigurationError(Exception):
    """servers.toml does not say what it must; the message names the file, the server and the mend."""


class Server(msgspec.Struct, frozen=True):
    """An agent runtime: `agent` executes its turns, at most `turn_timeout_seconds` each.

    Where it is not `repeatable`, no turn is begun a second time, whatever the agent says of itself. `questions` says
    what becomes of what the agent asks.
    """

    id: str
    organization: str
    agent: Agent
    turn_timeout_seconds: float
    repeatable: bool = True
    questions: QuestionSettings = QuestionSettings()

    @property
    def may_repeat(self) -> bool:
        """Whether a turn may be begun again when its runtime was lost in the middle of it."""
        return self.repeatable and self.agent.repeatable


class Registry:
    """The servers by id, and the bindings of other resources."""

    def __init__(self, servers: Mapping[str, Server], bindings: Mapping[tuple[str, str], str]) -> None:
        self._servers = servers
        self._bindings = bindings

    def resolve(self, organization: str, server_id: str, *, connected: bool) -> Server:
        """Return the agent runtime that a request names; `connected` goes through the binding of a resource.

        Raises ServerNotFound, also for another organization's server.
        """
        bound = self._bindings.get((organization, server_id))
        server = self._servers.get(bound if connected and bound is not None else server_id)
        if server is None or server.organization != organization:
            hint = ""
            if bound is not None:
                hint = f" It is a resource bound to {bound!r}: use /v1/servers/{server_id}/runtime/agent/runs."
            raise ServerNotFound(f"There is no agent runtime {shown(server_id)}.{hint}")
        return server

    def executor_of(self, server_id: str) -> Server | None:
        """Return the server that executes a stored run, or None when it is not declared any more."""
        return self._servers.get(server_id)

    async def close(self) -> None:
        """Close every agent."""
        for server in self._servers.values():
            await server.agent.close()


def load_registry(path: Path | None) -> Registry:
    """Read `path`, or the built-in servers without one. Raises ConfigurationError."""
    name = "the built-in servers" if path is None else str(path)
    try:
        if path is None:
            text = (files("runtime_service") / "servers.toml").read_text("utf-8")
        else:
            text = path.read_text("utf-8")
            # Agents of the `python` kind are found beside the file, too.
            folder = str(path.resolve().parent)
            if folder not in sys.path:
                sys.path.append(folder)
        file = msgspec.convert(tomllib.loads(text), _File)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {os.strerror(error.errno or 0)}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise ConfigurationError(f"{name}: {error}.") from error
    servers: dict[str, Server] = {}
    bindings: dict[tuple[str, str], str] = {}
    for server_id, table in file.servers.items():
        where = f"{name}: servers.{server_id}"
        if table.kind == AGENT_RUNTIME:
            servers[server_id] = _make_server(where, server_id, table)
        elif table.agent_runtime is None or table.agent is not None or table.options:
            raise ConfigurationError(
                f"{where}: a {table.kind!r} is bound to an agent runtime: give `agent_runtime`, "
                "and neither `agent` nor `options`."
            )
        else:
            bindings[table.organization, server_id] = table.agent_runtime
    for (organization, server_id), bound in bindings.items():
        if bound not in servers or servers[bound].organization != organization:
            raise ConfigurationError(
                f"{name}: servers.{server_id}: there is no agent runtime {bound!r} "
                f"in the organization {organization!r}."
            )
    return Registry(servers, bindings)


def _make_server(where: str, server_id: str, table: _ServerTable) -> Server:
    if table.agent not in AGENT_KINDS or table.agent_runtime is not None:
        kinds = ", ".join(sorted(AGENT_KINDS))
        raise ConfigurationError(f"{where}: an agent runtime needs `agent`, one of {kinds}, and no `agent_runtime`.")
    module, _, name = AGENT_KINDS[table.agent].partition(":")
    kind: type[Agent] = getattr(import_module(module), name)
    try:
        # An agent's constructor takes its Options.
        agent: Agent = kind(msgspec.convert(table.options, kind.Options))  # type: ignore[call-arg]
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigurationError(f"{where}: options: {error}.") from error
    return Server(server_id, table.organization, agent, table.turn_timeout_seconds, table.repeatable, table.questions)
