"""What servers.toml says of an agent that speaks the Agent Client Protocol. Knows no process and no SDK."""

import hashlib
import os
import shutil
import string
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote

import msgspec

_ALWAYS_INHERITED = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TERM",
    "TZ",
    "USER",
    "LOGNAME",
    "SHELL",
    "TMPDIR",
)
_PLACEHOLDERS = ("run_id", "server_id", "thread_id")
_MAX_NAME_CHARACTERS = 200
_MIN_SECRET_CHARACTERS = 6

_Text = Annotated[str, msgspec.Meta(min_length=1)]
_Variable = Annotated[str, msgspec.Meta(pattern=r"^[^=\x00]+$")]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
Access = Literal["working_directory", "refuse"]


class NameAndValue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An environment variable or an HTTP header."""

    name: _Text
    value: str


class McpServer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An MCP server that the agent is to use, in the protocol's own shape: stdio, or http or sse with a URL."""

    name: _Text
    type: Literal["stdio", "http", "sse"] = "stdio"
    command: _Text | None = None
    args: list[str] = []
    env: list[NameAndValue] = []
    url: Annotated[str, msgspec.Meta(pattern=r"^https?://")] | None = None
    headers: list[NameAndValue] = []

    def __post_init__(self) -> None:
        if self.type == "stdio" and (self.command is None or self.url is not None or self.headers):
            raise ValueError(f"the MCP server {self.name!r} of type 'stdio' needs `command`, and no `url` or `headers`")
        if self.type != "stdio" and (self.url is None or self.command is not None or self.args or self.env):
            raise ValueError(
                f"the MCP server {self.name!r} of type {self.type!r} needs `url`, and no `command`, `args` or `env`"
            )


class AgentClientProtocolOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`command` with `args` is the agent; `env` and the variables named in `inherit_env` are all that it gets beside
    PATH, HOME and the like, so that no secret of the runtime service leaks. Those that are not set are left out.

    `working_directory`, seen from where the runtime service runs, may name {run_id}, {server_id} and {thread_id}. With
    `remove_working_directory` it lives as long as the run's process: it is removed when that ends because the run is
    idle or the service stops, if it was made for the run. After a failure or a cancel it stays for the next turn.
    It is not for replicas that share the directory: one where the run is idle does not know that it went on elsewhere.

    `mode` and `model` are ids or names that the agent offers; `login_method` is the id of the protocol's `authenticate`
    method, called before a session is opened, for agents that want that even where they know who uses them.

    A run's process is ended `idle_seconds` after its last turn. `warm_processes` are started ahead, in the part of the
    working directory that is the same for all runs; they need `warm_processes` times the agent's memory.
    `start_seconds`: until the session is there. `silence_seconds`: how long the agent may say nothing in the middle of
    a turn, while no tool runs and nothing is asked. `cancel_seconds`: until a cancelled turn costs the process.

    `files` and `terminals`: whether the agent may read and write files, and run commands, through the runtime service;
    only inside of the working directory. What it does by itself is its own sandbox's matter.
    """

    command: _Text
    args: list[str] = []
    env: dict[_Variable, str] = {}
    inherit_env: list[_Variable] = []
    working_directory: _Text = ".acp/work/{run_id}"
    remove_working_directory: bool = False
    mcp_servers: list[McpServer] = []
    mode: _Text | None = None
    model: _Text | None = None
    login_method: _Text | None = None
    idle_seconds: _Seconds = 300
    warm_processes: Annotated[int, msgspec.Meta(ge=0, le=100)] = 0
    start_seconds: _Seconds = 60
    silence_seconds: _Seconds = 600
    cancel_seconds: Annotated[float, msgspec.Meta(ge=0, le=600)] = 3
    files: Access = "working_directory"
    terminals: Access = "working_directory"

    def __post_init__(self) -> None:
        named = _placeholders(self.working_directory)
        if unknown := [name for name in named if name not in _PLACEHOLDERS]:
            known = ", ".join(f"{{{name}}}" for name in _PLACEHOLDERS)
            raise ValueError(f"working_directory names {{{unknown[0]}}}; it may name {known}")
        if self.remove_working_directory and "run_id" not in named:
            raise ValueError("remove_working_directory needs {run_id} in working_directory: runs would share it")
        if len({server.name for server in self.mcp_servers}) < len(self.mcp_servers):
            raise ValueError("two mcp_servers have the same name")

    @property
    def name(self) -> str:
        """What the agent is called in messages."""
        return Path(self.command).name

    def executable(self) -> str | None:
        """Return the absolute path of the command, None where there is none."""
        command = os.path.expanduser(self.command)
        if os.sep in command:
            command = os.path.abspath(command)
        return shutil.which(command, path=self.env.get("PATH"))

    def environment(self) -> dict[str, str]:
        """Return all that the agent's environment holds."""
        names = dict.fromkeys([*_ALWAYS_INHERITED, *self.inherit_env])
        return {name: os.environ[name] for name in names if name in os.environ} | self.env

    def directory_of(self, *, run_id: str, server_id: str, thread_id: str) -> Path:
        """Return the absolute working directory of a run; ids become names of files that no other id becomes."""
        ids = {"run_id": run_id, "server_id": server_id, "thread_id": thread_id}
        names = {placeholder: _file_name(value) for placeholder, value in ids.items()}
        return Path(os.path.abspath(os.path.expanduser(self.working_directory.format_map(names))))

    def common_directory(self) -> Path:
        """Return the part of the working directory that is the same for all runs."""
        parts = Path(os.path.abspath(os.path.expanduser(self.working_directory))).parts
        return Path(*_until_placeholder(parts))

    def redacted(self, text: str) -> str:
        """Return the text without the values of variables and headers that the options name."""
        secrets = {name: os.environ.get(name, "") for name in self.inherit_env} | dict(self.env)
        for server in self.mcp_servers:
            secrets |= {each.name: each.value for each in (*server.env, *server.headers)}
        for name, value in secrets.items():
            if len(value) >= _MIN_SECRET_CHARACTERS:
                text = text.replace(value, f"[{name}]")
        return text


def _placeholders(template: str) -> list[str]:
    """Return what a template names. Raises ValueError for braces that name nothing."""
    named = []
    for _, field, form, conversion in string.Formatter().parse(template):
        if field is not None:
            if form or conversion:
                raise ValueError(f"working_directory: {{{field}}} takes no format")
            named.append(field)
    return named


def _until_placeholder(parts: tuple[str, ...]) -> list[str]:
    fixed: list[str] = []
    for part in parts:
        if "{" in part:
            break
        fixed.append(part)
    return fixed


def _file_name(value: str) -> str:
    # A ~ at the beginning of a path is somebody's home.
    name = quote(value, safe="").replace("~", "%7E")
    if name.strip(".") == "":
        name = "%2E" * len(name) or "-"
    if len(name) > _MAX_NAME_CHARACTERS:
        name = f"{name[:150]}-{hashlib.sha256(value.encode()).hexdigest()[:32]}"
    return name
