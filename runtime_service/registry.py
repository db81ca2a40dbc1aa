"""servers.toml: agent runtimes, and the resources that are bound to them. Checked whole when it is read.

Kinds of agents are those built in and those of other packages, which offer them as entry points.
"""

import asyncio
import logging
import os
import sys
import tomllib
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, EntryPoints, distributions
from importlib.resources import files
from inspect import isabstract
from pathlib import Path
from typing import Annotated, Any

import msgspec

from runtime_service.agents import Agent
from runtime_service.errors import ServerNotFound, shown
from runtime_service.questions import QuestionSettings

log = logging.getLogger(__name__)

AGENT_RUNTIME = "agent_runtime"
AGENT_KINDS: dict[str, str] = {
    "echo": "runtime_service.agents.echo:EchoAgent",
    "python": "runtime_service.agents.python:PythonAgent",
    "openai": "runtime_service.agents.openai:OpenAIAgent",
    "local": "runtime_service.agents.local:LocalAgent",
    "agent_client_protocol": "runtime_service.agents.agent_client_protocol.agent:AgentClientProtocolAgent",
    "a2a": "runtime_service.agents.a2a.agent:A2AAgent",
}
"""Each kind of agent that is built in, and its class, imported when a server names it."""

PLUGINS = "acp_gateway.agents"
"""The group of entry points by which other packages offer kinds: the name is the kind, the value its class."""


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

    @property
    def servers(self) -> Mapping[str, Server]:
        """The agent runtimes by id, as they are declared."""
        return self._servers

    @property
    def bindings(self) -> Mapping[tuple[str, str], str]:
        """The agent runtime of each other resource, by its organization and id."""
        return self._bindings

    def executor_of(self, server_id: str) -> Server | None:
        """Return the server that executes a stored run, or None when it is not declared any more."""
        return self._servers.get(server_id)

    async def close(self) -> None:
        """Close every agent."""
        await asyncio.gather(*(server.agent.close() for server in self._servers.values()))


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
    plugins = _read_plugins()
    servers: dict[str, Server] = {}
    bindings: dict[tuple[str, str], str] = {}
    for server_id, table in file.servers.items():
        where = f"{name}: servers.{server_id}"
        if table.kind == AGENT_RUNTIME:
            servers[server_id] = _make_server(where, server_id, table, plugins)
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


def _read_plugins() -> EntryPoints:
    """Return what the installed packages offer; of a package that is found twice the first, as it is imported."""
    offered: dict[str, EntryPoints] = {}
    for package in distributions():
        try:
            if found := package.entry_points.select(group=PLUGINS):
                offered.setdefault(package.name or "", found)
        except Exception as error:  # noqa: BLE001 - whatever a broken package raises: perhaps no server needs it
            log.warning("a package in %s offers what cannot be read: %r", package.locate_file(""), error)
    return EntryPoints(each for found in offered.values() for each in found)


def _make_server(where: str, server_id: str, table: _ServerTable, plugins: EntryPoints) -> Server:
    names = {*AGENT_KINDS, *plugins.names}
    if table.agent not in names or table.agent_runtime is not None:
        kinds = ", ".join(sorted(names))
        raise ConfigurationError(f"{where}: an agent runtime needs `agent`, one of {kinds}, and no `agent_runtime`.")
    kind = _load_kind(where, table.agent, list(plugins.select(name=table.agent)))
    try:
        # An agent's constructor takes its Options.
        agent: Agent = kind(msgspec.convert(table.options, kind.Options))  # type: ignore[call-arg]
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigurationError(f"{where}: options: {error}.") from error
    except Exception as error:  # the constructor of a kind may be code of others
        raise ConfigurationError(
            f"{where}: the agent {table.agent!r} cannot be made: it raised {type(error).__name__}: {error}."
        ) from error
    return Server(server_id, table.organization, agent, table.turn_timeout_seconds, table.repeatable, table.questions)


def _load_kind(where: str, name: str, plugins: list[EntryPoint]) -> type[Agent]:
    """Import the class of a kind, of this one alone. Raises ConfigurationError."""
    if name in AGENT_KINDS:
        if plugins:
            raise ConfigurationError(
                f"{where}: the agent {name!r} is built in, and {_told(plugins)} offers one of that name: "
                "uninstall it, or let it take another name."
            )
        module, _, attribute = AGENT_KINDS[name].partition(":")
        built_in: type[Agent] = getattr(import_module(module), attribute)
        return built_in
    if len(plugins) > 1:
        raise ConfigurationError(f"{where}: the agent {name!r} is offered twice: {_told(plugins)}; uninstall one.")
    try:
        kind = plugins[0].load()
    except (Exception, SystemExit) as error:  # importing it runs code of others
        raise ConfigurationError(
            f"{where}: the agent {name!r} cannot be imported: {_told(plugins)} raised {type(error).__name__}: {error}."
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Agent)) or isabstract(kind):
        raise ConfigurationError(
            f"{where}: the agent {name!r} is unusable: {_told(plugins)} is no subclass of "
            "runtime_service.agents.Agent with a `run`."
        )
    options = getattr(kind, "Options", None)
    if not (isinstance(options, type) and issubclass(options, msgspec.Struct)):
        raise ConfigurationError(
            f"{where}: the agent {name!r} is unusable: {_told(plugins)} has no `Options`, a msgspec.Struct."
        )
    return kind


def _told(plugins: list[EntryPoint]) -> str:
    """Name the entry points, with the packages that they come from."""
    return ", ".join(
        f"the entry point {each.value!r} of the package {(each.dist and each.dist.name) or '?'}" for each in plugins
    )
