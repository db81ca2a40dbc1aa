"""What goes wrong with an agent process, as an AgentError whose words say what to do. Knows no process."""

import signal

from acp import RequestError
from acp.schema import EnvVarAuthMethod, InitializeResponse, TerminalAuthMethod

from runtime_service.agents.agent_client_protocol.content import cut
from runtime_service.agents.agent_client_protocol.options import AgentClientProtocolOptions
from runtime_service.agents.base import AgentError

_AUTH_REQUIRED = -32000
_MAX_QUOTED_CHARACTERS = 300


class Failures:
    """The failures of one server's agent."""

    def __init__(self, options: AgentClientProtocolOptions) -> None:
        self._options = options
        self._agent = f"The agent {options.name!r}"

    def not_found(self) -> AgentError:
        """The command is not there."""
        message = (
            f"The command {self._options.command!r} of the agent is not on this machine, or not on its PATH. "
            "Install the agent, or give the whole path as `command`."
        )
        return AgentError(message, "AGENT_NOT_FOUND")

    def not_started(self, error: OSError) -> AgentError:
        """The system does not start the process."""
        return AgentError(f"{self._agent} cannot be started: {error}", "AGENT_NOT_FOUND")

    def no_directory(self, error: OSError) -> AgentError:
        """There is no working directory."""
        why = error.strerror or error
        message = (
            f"The working directory of the agent {self._options.name!r} cannot be made: {why}. Check working_directory."
        )
        return AgentError(message, "AGENT_WORKING_DIRECTORY")

    def crashed(self, exit_status: int | None, last_errors: str) -> AgentError:
        """The process ended, or closed its output."""
        if exit_status is None:
            how = "closed its output but goes on; it was ended"
        elif exit_status >= 0:
            how = f"ended with the exit status {exit_status}"
        else:
            how = f"was ended by the signal {signal_name(-exit_status)}"
        lines = [line.strip() for line in last_errors.splitlines() if line.strip()]
        said = f": {self._quoted(lines[-1])}" if lines else ""
        message = f"{self._agent} {how}{said}. Try again; if it goes on, run its command by hand."
        return AgentError(message, "AGENT_CRASHED")

    def broke_protocol(self, why: str) -> AgentError:
        """What the agent sends is not of the protocol."""
        message = (
            f"{self._agent} does not speak the Agent Client Protocol: {self._quoted(why)}. "
            "Check its command and arguments, and its version."
        )
        return AgentError(message, "AGENT_PROTOCOL_ERROR")

    def does_not_read(self) -> AgentError:
        """What is sent to the agent does not arrive."""
        return AgentError(f"{self._agent} does not read what is sent to it; it was ended. Try again.", "AGENT_SILENT")

    def silent(self) -> AgentError:
        """The agent says nothing in the middle of a turn."""
        seconds = self._options.silence_seconds
        message = f"{self._agent} was silent for {seconds:g} s (silence_seconds) and was ended. Try again."
        return AgentError(message, "AGENT_SILENT")

    def start_timeout(self) -> AgentError:
        """The session is not there in time."""
        seconds = self._options.start_seconds
        message = f"{self._agent} did not open a session within {seconds:g} s (start_seconds). Try again."
        return AgentError(message, "AGENT_START_TIMEOUT")

    def answered_error(self, error: RequestError, initialized: InitializeResponse | None) -> AgentError:
        """The agent answers a request with an error."""
        if error.code == _AUTH_REQUIRED:
            return self._login_required(initialized)
        said = str(error)
        detail = error.data.get("details") or error.data.get("message") if isinstance(error.data, dict) else error.data
        if isinstance(detail, str) and detail and detail not in said:
            said = f"{said}: {detail}"
        return AgentError(f"{self._agent} failed: {self._quoted(said)} ({error.code}). Try again.", "AGENT_ERROR")

    def stopped(self, reason: str) -> AgentError:
        """The agent ended the turn for another reason than being done."""
        match reason:
            case "max_tokens":
                message = f"{self._agent} reached its limit of tokens. Continue the run to let it go on."
                return AgentError(message, "AGENT_MAX_TOKENS")
            case "max_turn_requests":
                message = f"{self._agent} reached its limit of requests in a turn. Continue the run to let it go on."
                return AgentError(message, "AGENT_MAX_TURN_REQUESTS")
            case "refusal":
                return AgentError(f"{self._agent} refused. Put it in other words.", "AGENT_REFUSED")
            case _:
                return AgentError(f"{self._agent} cancelled the turn by itself. Try again.", "AGENT_CANCELLED")

    def not_offered(self, what: str, wanted: str, offered: list[str]) -> AgentError:
        """The agent has no such mode or model."""
        known = cut(", ".join(offered), 2_000) if offered else "none"
        message = f"{self._agent} offers no {what} {wanted!r}. It offers: {known}. Change `{what}` of the server."
        return AgentError(message, f"AGENT_{what.upper()}_NOT_OFFERED")

    def no_mcp(self, name: str, transport: str) -> AgentError:
        """The agent cannot use an MCP server."""
        message = f"{self._agent} cannot use the MCP server {name!r}: it does not speak MCP over {transport}."
        return AgentError(message, "AGENT_MCP_NOT_SUPPORTED")

    def _login_required(self, initialized: InitializeResponse | None) -> AgentError:
        options = self._options
        ways: list[str] = []
        for method in (initialized.auth_methods if initialized is not None else None) or []:
            name = f"{cut(method.name, 100)} (login_method = {cut(method.id, 100)!r})"
            if isinstance(method, EnvVarAuthMethod):
                variables = ", ".join(cut(variable.name, 100) for variable in method.vars[:10])
                name += f", with {variables} in `env` or `inherit_env`"
            elif isinstance(method, TerminalAuthMethod):
                name += ", by running " + cut(" ".join([options.command, *(method.args or [])]), 200)
            ways.append(name)
        known = f" It knows these ways: {'; '.join(ways[:10])}." if ways else ""
        command = self._quoted(" ".join([options.command, *options.args]))
        message = (
            f"{self._agent} wants a login.{known} Log in on the machine of the runtime service as its user, "
            f"by the agent's own command (it is started as: {command}), then try again."
        )
        return AgentError(message, "AGENT_LOGIN_REQUIRED")

    def _quoted(self, text: str) -> str:
        return cut(self._options.redacted(" ".join(text.split())), _MAX_QUOTED_CHARACTERS).rstrip(".")


def signal_name(number: int) -> str:
    """Return the name of a signal; the number of one that has none, as most of the real-time ones."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
