"""What the agent may ask of us in the middle of a turn: permissions, forms, files and terminals.

The SDK turns what is raised here into errors of JSON-RPC; params that are wrong it refuses itself. The methods are
called by the SDK, each in a task of its own, and take keyword arguments of which a later protocol may send more.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from acp import RequestError
from acp.schema import (
    AcceptElicitationResponse,
    AllowedOutcome,
    CancelElicitationResponse,
    CreateElicitationResponse,
    CreateTerminalResponse,
    DeclineElicitationResponse,
    DeniedOutcome,
    ElicitationFormRequestMode,
    ElicitationFormSessionMode,
    ElicitationMode,
    ElicitationStringPropertySchema,
    EnvVariable,
    KillTerminalResponse,
    PermissionOption,
    ReadTextFileResponse,
    ReleaseTerminalResponse,
    RequestPermissionResponse,
    TerminalExitStatus,
    TerminalOutputResponse,
    ToolCallUpdate,
    WaitForTerminalExitResponse,
    WriteTextFileResponse,
)

from runtime_service.agents.agent_client_protocol.content import cut
from runtime_service.agents.agent_client_protocol.directory import Refused, WorkingDirectory
from runtime_service.agents.agent_client_protocol.failures import signal_name
from runtime_service.agents.agent_client_protocol.options import AgentClientProtocolOptions
from runtime_service.agents.agent_client_protocol.terminals import Terminal, Terminals
from runtime_service.agents.agent_client_protocol.tool_calls import ToolCall
from runtime_service.agents.base import Answer, Option, OptionKind

_MAX_QUESTION_CHARACTERS = 4_000
_MAX_NAME_CHARACTERS = 500
_MAX_OPTIONS = 50

_T = TypeVar("_T")


class Question:
    """A question to the caller; whoever executes the turn answers it, `cancel` is for one that nobody will."""

    def __init__(self, text: str, options: tuple[Option, ...], kind: str | None, metadata: dict[str, Any]) -> None:
        self.text = text
        self.options = options
        self.tool_kind = kind
        self.metadata = metadata
        self.answered: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()

    def answer(self, answer: Answer) -> None:
        """Give the answer to the agent."""
        if not self.answered.done():
            self.answered.set_result(answer)

    def cancel(self) -> None:
        """Tell the agent that the turn was cancelled."""
        if not self.answered.done():
            self.answered.set_result(None)


class AskingTurn(Protocol):
    """The turn in which the agent asks."""

    def known_tool_call(self, tool_call_id: str) -> ToolCall:
        """Return what is known of a tool call by now, to be added to."""

    def ask(self, question: Question) -> None:
        """Have a question asked."""


class Client:
    """The client's side of one session; `turn` is set while a prompt is being answered, `directory` once it is open."""

    def __init__(self, options: AgentClientProtocolOptions) -> None:
        self._options = options
        self.session_id: str | None = None
        self.directory: WorkingDirectory | None = None
        self.turn: AskingTurn | None = None
        self.terminals = Terminals(options.environment())

    # Questions

    async def request_permission(
        self, session_id: str, tool_call: ToolCallUpdate, options: list[PermissionOption], **_: Any
    ) -> RequestPermissionResponse:
        """Ask the caller; `cancelled` where nobody answers, and outside of a turn."""
        self._check_session(session_id)
        turn = self.turn
        if turn is None:
            return _denied()
        call = turn.known_tool_call(tool_call.tool_call_id)
        call.learn(tool_call)
        choices = tuple(
            Option(option.option_id, cut(option.name, _MAX_NAME_CHARACTERS), OptionKind(option.kind))
            for option in options
        )
        _check_options(choices)
        question = Question(call.title, choices, call.kind, call.metadata(self.terminals.output_of))
        turn.ask(question)
        answer = await question.answered
        if answer is None or answer.option is None:
            return _denied()
        return RequestPermissionResponse(outcome=AllowedOutcome(outcome="selected", option_id=answer.option))

    async def create_elicitation(self, message: str, mode: ElicitationMode, **_: Any) -> CreateElicitationResponse:
        """Ask the caller for one text, or for one of several; a form with anything else is declined."""
        turn = self.turn
        if not isinstance(mode, ElicitationFormSessionMode | ElicitationFormRequestMode):
            return DeclineElicitationResponse(action="decline")
        properties = mode.requested_schema.properties or {}
        name, schema = next(iter(properties.items()), ("", None))
        if len(properties) != 1 or not isinstance(schema, ElicitationStringPropertySchema):
            return DeclineElicitationResponse(action="decline")
        if turn is None:
            return CancelElicitationResponse(action="cancel")
        titled = [(each.const, each.title) for each in schema.one_of or ()]
        choices = tuple(
            Option(value, cut(title, _MAX_NAME_CHARACTERS))
            for value, title in titled or [(each, each) for each in schema.enum or ()]
        )
        if choices:
            _check_options(choices)
        text = cut(message, _MAX_QUESTION_CHARACTERS)
        asked_for = cut(schema.description or schema.title or name, _MAX_NAME_CHARACTERS)
        question = Question(text, choices, None, {"property": cut(name, _MAX_NAME_CHARACTERS), "title": asked_for})
        turn.ask(question)
        answer = await question.answered
        value = None if answer is None else answer.option if choices else answer.text
        if value is None:
            return CancelElicitationResponse(action="cancel")
        return AcceptElicitationResponse(action="accept", content={name: value})

    # Files

    async def read_text_file(
        self, session_id: str, path: str, line: int | None = None, limit: int | None = None, **_: Any
    ) -> ReadTextFileResponse:
        """Read a file of the working directory."""
        directory = self._served(session_id, "files", self._options.files)
        return ReadTextFileResponse(content=await _of_files(path, lambda: directory.read_text(path, line, limit)))

    async def write_text_file(self, session_id: str, path: str, content: str, **_: Any) -> WriteTextFileResponse:
        """Write a file of the working directory."""
        directory = self._served(session_id, "files", self._options.files)
        await _of_files(path, lambda: directory.write_text(path, content))
        return WriteTextFileResponse()

    # Terminals

    async def create_terminal(
        self,
        session_id: str,
        command: str,
        args: list[str] | None = None,
        env: list[EnvVariable] | None = None,
        cwd: str | None = None,
        output_byte_limit: int | None = None,
        **_: Any,
    ) -> CreateTerminalResponse:
        """Run a command in the working directory."""
        directory = self._served(session_id, "terminals", self._options.terminals)
        inside = await _of_files(cwd or "", lambda: directory.inside(cwd or ""))
        with _refusing():
            terminal_id = await self.terminals.start(
                command,
                args or [],
                environment={variable.name: variable.value for variable in env or []},
                cwd=inside,
                output_bytes=output_byte_limit,
            )
        return CreateTerminalResponse(terminal_id=terminal_id)

    async def terminal_output(self, session_id: str, terminal_id: str, **_: Any) -> TerminalOutputResponse:
        """Return what a command has written lately."""
        terminal = self._terminal(session_id, terminal_id)
        status = terminal.exit_status
        shown = None if status is None else TerminalExitStatus(**_exit(status))
        return TerminalOutputResponse(output=terminal.output, truncated=terminal.truncated, exit_status=shown)

    async def wait_for_terminal_exit(self, session_id: str, terminal_id: str, **_: Any) -> WaitForTerminalExitResponse:
        """Wait until a command has ended."""
        return WaitForTerminalExitResponse(**_exit(await self._terminal(session_id, terminal_id).wait()))

    async def kill_terminal(self, session_id: str, terminal_id: str, **_: Any) -> KillTerminalResponse:
        """End a command; its output can still be asked for."""
        await self._terminal(session_id, terminal_id).end()
        return KillTerminalResponse()

    async def release_terminal(self, session_id: str, terminal_id: str, **_: Any) -> ReleaseTerminalResponse:
        """End a command and forget it."""
        self._served(session_id, "terminals", self._options.terminals)
        with _refusing():
            await self.terminals.release(terminal_id)
        return ReleaseTerminalResponse()

    # Nothing of these is known here

    async def session_update(self, session_id: str, update: Any, **_: Any) -> None:
        """Never called: the transport has taken the updates out."""

    async def complete_elicitation(self, elicitation_id: str, **_: Any) -> None:
        """Never called: the transport leaves other notifications out."""

    async def ext_method(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """Refuse an extension of the protocol."""
        raise RequestError.method_not_found(f"_{method}")

    async def ext_notification(self, method: str, params: dict[str, Any]) -> None:
        """Never called, as above."""

    def on_connect(self, conn: Any) -> None:
        """Nothing is to be done."""

    def _check_session(self, session_id: str) -> None:
        if session_id != self.session_id:
            raise RequestError(-32602, f"There is no session {cut(session_id, _MAX_NAME_CHARACTERS)!r}.")

    def _served(self, session_id: str, what: str, access: str) -> WorkingDirectory:
        self._check_session(session_id)
        if access == "refuse" or self.directory is None:
            raise RequestError(-32601, f"The server's settings refuse {what}; use your own.")
        return self.directory

    def _terminal(self, session_id: str, terminal_id: str) -> Terminal:
        self._served(session_id, "terminals", self._options.terminals)
        with _refusing():
            return self.terminals.get(terminal_id)


def _denied() -> RequestPermissionResponse:
    return RequestPermissionResponse(outcome=DeniedOutcome(outcome="cancelled"))


def _check_options(options: tuple[Option, ...]) -> None:
    ids = {option.id for option in options}
    if not 1 <= len(options) <= _MAX_OPTIONS or len(ids) < len(options) or max(map(len, ids)) > _MAX_NAME_CHARACTERS:
        raise RequestError(-32602, f"A question needs 1 to {_MAX_OPTIONS} options, each with a short id of its own.")


async def _of_files(path: str, work: Callable[[], _T]) -> _T:
    """Work with files off the event loop."""
    try:
        with _refusing():
            return await asyncio.to_thread(work)
    except FileNotFoundError as error:
        raise RequestError(-32002, f"There is no file {path}.", {"uri": path}) from error
    except (OSError, UnicodeEncodeError) as error:
        raise RequestError(-32603, f"{path}: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def _refusing() -> Iterator[None]:
    """Answer what may not be had as the protocol does."""
    try:
        yield
    except Refused as error:
        raise RequestError(-32602, str(error)) from error


def _exit(status: int) -> dict[str, Any]:
    if status >= 0:
        return {"exit_code": status, "signal": None}
    return {"exit_code": None, "signal": signal_name(-status)}
