"""What a session shows of its agent before the first prompt, in words for the one who sets it up. Pure."""

from collections.abc import Mapping

from acp.schema import InitializeResponse, SessionConfigOptionSelect

from runtime_service.agents.agent_client_protocol.settings import Opened, selected, values
from runtime_service.agents.base import Finding

_MOST_SHOWN = 20


def session_findings(agent: Mapping[str, str], initialized: InitializeResponse, opened: Opened) -> list[Finding]:
    """Return who the agent is, whether it can take up an earlier session, and the modes and models that it offers."""
    name = " ".join(filter(None, [agent.get("title") or agent["name"], agent.get("version")]))
    found = [
        f"It speaks version {initialized.protocol_version} of the Agent Client Protocol, and opens a session: {name}"
    ]
    capabilities = initialized.agent_capabilities
    sessions = None if capabilities is None else capabilities.session_capabilities
    if capabilities is not None and capabilities.load_session:
        found.append("It loads earlier sessions: a run goes on in them after a restart.")
    elif sessions is not None and sessions.resume is not None:
        found.append("It resumes earlier sessions: a run goes on in them after a restart.")
    else:
        found.append("It takes up no earlier session: after a restart it is given the conversation as context.")
    selects = [each for each in opened.config_options or [] if isinstance(each, SessionConfigOptionSelect)]
    if opened.modes is not None:
        modes = [each.id for each in opened.modes.available_modes]
        found.append(_offer("modes", modes, opened.modes.current_mode_id))
    elif (select := selected("mode", selects)) is not None:
        found.append(_offer("modes", list(values(select)), select.current_value))
    if (select := selected("model", selects)) is not None:
        found.append(_offer("models", list(values(select)), select.current_value))
    return [Finding(text) for text in found]


def _offer(what: str, ids: list[str], now: str) -> str:
    more = f" and {len(ids) - _MOST_SHOWN} more" if len(ids) > _MOST_SHOWN else ""
    return f"It offers the {what} {', '.join(ids[:_MOST_SHOWN])}{more}; by itself it takes {now}."
