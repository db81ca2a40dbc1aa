"""What servers.toml wants of a session: MCP servers, a mode, a model; each as far as the agent offers it."""

from collections.abc import Sequence
from typing import Any

from acp.schema import (
    EnvVariable,
    HttpHeader,
    HttpMcpServer,
    InitializeResponse,
    LoadSessionResponse,
    McpServerStdio,
    NewSessionResponse,
    ResumeSessionResponse,
    SessionConfigOptionSelect,
    SessionConfigSelectGroup,
    SseMcpServer,
)

from runtime_service.agents.agent_client_protocol.failures import Failures
from runtime_service.agents.agent_client_protocol.options import AgentClientProtocolOptions, McpServer

Opened = NewSessionResponse | LoadSessionResponse | ResumeSessionResponse


def mcp_servers(
    options: AgentClientProtocolOptions, initialized: InitializeResponse
) -> list[McpServerStdio | HttpMcpServer | SseMcpServer]:
    """Return the MCP servers as the protocol has them. Raises AgentError for one that the agent cannot use."""
    capabilities = initialized.agent_capabilities
    known = None if capabilities is None else capabilities.mcp_capabilities
    for server in options.mcp_servers:
        if server.type != "stdio" and not getattr(known, server.type, False):
            raise Failures(options).no_mcp(server.name, server.type)
    return [_mcp_server(server) for server in options.mcp_servers]


async def configure(connection: Any, session_id: str, opened: Opened, options: AgentClientProtocolOptions) -> None:
    """Set mode and model. Raises AgentError where they are not offered, and what the SDK raises."""
    selects = [each for each in opened.config_options or [] if isinstance(each, SessionConfigOptionSelect)]
    for what, wanted in (("mode", options.mode), ("model", options.model)):
        if wanted is None:
            continue
        if what == "mode" and opened.modes is not None:
            modes = {each.id: each.name for each in opened.modes.available_modes}
            mode_id = _chosen(what, wanted, modes, options)
            if mode_id != opened.modes.current_mode_id:
                await connection.set_session_mode(session_id=session_id, mode_id=mode_id)
            continue
        select = selected(what, selects)
        value = _chosen(what, wanted, {} if select is None else values(select), options)
        if select is not None and value != select.current_value:
            await connection.set_config_option(config_id=select.id, session_id=session_id, value=value)


def selected(what: str, selects: Sequence[SessionConfigOptionSelect]) -> SessionConfigOptionSelect | None:
    """Return the setting that is the mode or the model, by its category, else by its id."""
    by_category = [each for each in selects if each.category == what]
    return next(iter([*by_category, *(each for each in selects if each.id == what)]), None)


def values(select: SessionConfigOptionSelect) -> dict[str, str]:
    """Return the values of a setting, and their names."""
    found: dict[str, str] = {}
    for each in select.options:
        options = each.options if isinstance(each, SessionConfigSelectGroup) else [each]
        found |= {option.value: option.name for option in options}
    return found


def _chosen(what: str, wanted: str, offered: dict[str, str], options: AgentClientProtocolOptions) -> str:
    """Return the id that is wanted, by itself or by its name."""
    if wanted in offered:
        return wanted
    for value, name in offered.items():
        if name.casefold() == wanted.casefold():
            return value
    raise Failures(options).not_offered(what, wanted, list(offered))


def _mcp_server(server: McpServer) -> McpServerStdio | HttpMcpServer | SseMcpServer:
    if server.type == "stdio":
        env = [EnvVariable(name=each.name, value=each.value) for each in server.env]
        return McpServerStdio(name=server.name, command=server.command or "", args=server.args, env=env)
    headers = [HttpHeader(name=each.name, value=each.value) for each in server.headers]
    if server.type == "http":
        return HttpMcpServer(type="http", name=server.name, url=server.url or "", headers=headers)
    return SseMcpServer(type="sse", name=server.name, url=server.url or "", headers=headers)
