"""One agent process with one session of the Agent Client Protocol. Knows no runs; failures come as AgentError."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from acp import PROTOCOL_VERSION, RequestError
from acp.client import ClientSideConnection
from acp.schema import (
    ClientCapabilities,
    ElicitationCapabilities,
    ElicitationFormCapabilities,
    FileSystemCapabilities,
    Implementation,
    InitializeResponse,
    NewSessionResponse,
    TextContentBlock,
)
from pydantic import ValidationError

from runtime_service.agents.agent_client_protocol.client import Client, Question
from runtime_service.agents.agent_client_protocol.directory import WorkingDirectory
from runtime_service.agents.agent_client_protocol.failures import Failures
from runtime_service.agents.agent_client_protocol.findings import session_findings
from runtime_service.agents.agent_client_protocol.inbox import Inbox
from runtime_service.agents.agent_client_protocol.options import AgentClientProtocolOptions
from runtime_service.agents.agent_client_protocol.settings import configure, mcp_servers
from runtime_service.agents.agent_client_protocol.transport import MAX_LINE_BYTES, ChildTransport
from runtime_service.agents.agent_client_protocol.updates import UPDATES, Said, Transcript, merged
from runtime_service.agents.base import AgentError, Finding
from runtime_service.agents.child_process import ChildProcess

_EXIT_SECONDS = 1.0
_END_SECONDS = 2.0
_DISTRIBUTION = "acp-gateway"

_T = TypeVar("_T")


class Session:
    """`start`, then `open` or `reopen`, then one `prompt` after the other, at last `end`.

    Where something raised an AgentError and `is_broken`, the process is of no more use and is to be ended.
    """

    def __init__(self, options: AgentClientProtocolOptions, child: ChildProcess) -> None:
        self._options = options
        self._failures = Failures(options)
        self._child = child
        self._transport = ChildTransport(child, self._on_update, self._on_end)
        self._client = Client(options)
        self._connection: Any = ClientSideConnection(self._client, self._transport, use_unstable_protocol=True)
        self._initialized: InitializeResponse | None = None
        self._opened: NewSessionResponse | None = None
        self._turn: Inbox | None = None
        self._prompting: asyncio.Task[Any] | None = None
        self._terminals_before: set[str] = set()
        self.is_broken = False
        self.is_open = False
        self.on_lost: Callable[[], None] | None = None
        """Called when nothing more comes from the process."""

    @classmethod
    async def launch(cls, options: AgentClientProtocolOptions, cwd: Path) -> "Session":
        """Start the process, which is then to be initialized. Raises AgentError."""
        if (executable := options.executable()) is None:
            raise Failures(options).not_found()
        try:
            child = await ChildProcess.start(
                [executable, *options.args], env=options.environment(), cwd=cwd, max_line_bytes=MAX_LINE_BYTES
            )
        except OSError as error:
            raise Failures(options).not_started(error) from error
        return cls(options, child)

    @property
    def pid(self) -> int:
        """The process."""
        return self._child.pid

    @property
    def id(self) -> str | None:
        """The session's id; None before it is open."""
        return self._client.session_id

    @property
    def directory(self) -> WorkingDirectory | None:
        """The working directory; None before it is open."""
        return self._client.directory

    @property
    def is_alive(self) -> bool:
        """Whether the process is there and understood."""
        return not self.is_broken and self._child.exit_status is None and not self._transport.is_at_end

    @property
    def is_prompting(self) -> bool:
        """Whether the agent is at work on a prompt, also one that nobody listens to any more."""
        return self._prompting is not None and not self._prompting.done()

    @property
    def agent(self) -> dict[str, str]:
        """What the agent says of itself: name, title, version."""
        info = None if self._initialized is None else self._initialized.agent_info
        if info is None:
            return {"name": self._options.name}
        said = {"name": info.name, "title": info.title, "version": info.version}
        return {key: value[:200] for key, value in said.items() if value}

    def findings(self) -> list[Finding]:
        """Return what the session, which is open, shows of the agent."""
        assert self._opened is not None, "open() was called"
        return session_findings(self.agent, self._known(), self._opened)

    async def initialize(self) -> None:
        """Agree on what both sides can do. Raises AgentError."""
        options = self._options
        files = options.files == "working_directory"
        capabilities = ClientCapabilities(
            fs=FileSystemCapabilities(read_text_file=files, write_text_file=files),
            terminal=options.terminals == "working_directory",
            elicitation=ElicitationCapabilities(form=ElicitationFormCapabilities()),
        )
        try:
            self._initialized = initialized = await self._connection.initialize(
                PROTOCOL_VERSION,
                capabilities,
                Implementation(name=_DISTRIBUTION, title="ACP gateway", version=_own_version()),
            )
            if initialized.protocol_version != PROTOCOL_VERSION:
                self.is_broken = True
                versions = f"it speaks version {initialized.protocol_version}, not {PROTOCOL_VERSION}"
                raise self._failures.broke_protocol(versions)
            if options.login_method is not None:
                await self._connection.authenticate(options.login_method)
        except (RequestError, ValidationError, ConnectionError) as error:
            raise await self._failure(error) from error

    async def open(self, directory: WorkingDirectory) -> None:
        """Open a new session, in the mode and with the model that the options name. Raises AgentError."""
        self._client.directory = directory
        servers = mcp_servers(self._options, self._known())
        try:
            opened = await self._connection.new_session(cwd=str(directory.path), mcp_servers=servers)
            self._client.session_id = opened.session_id
            self._opened = opened
            await configure(self._connection, opened.session_id, opened, self._options)
        except (RequestError, ValidationError, ConnectionError) as error:
            raise await self._failure(error) from error
        self.is_open = True

    async def reopen(self, directory: WorkingDirectory, session_id: str) -> str | None:
        """Open an earlier session; what the agent says of its past is left out.

        Returns the protocol's word for how, `load` or `resume`; None where the agent cannot, or does not know the
        session. Raises AgentError.
        """
        initialized = self._known()
        capabilities = initialized.agent_capabilities
        sessions = None if capabilities is None else capabilities.session_capabilities
        if capabilities is not None and capabilities.load_session:
            how, call = "load", self._connection.load_session
        elif sessions is not None and sessions.resume is not None:
            how, call = "resume", self._connection.resume_session
        else:
            return None
        servers = mcp_servers(self._options, initialized)
        self._client.directory, self._client.session_id = directory, session_id
        try:
            try:
                opened = await call(cwd=str(directory.path), session_id=session_id, mcp_servers=servers)
            except RequestError as error:
                failure = self._failures.answered_error(error, initialized)
                if failure.code == "AGENT_LOGIN_REQUIRED":
                    raise failure from error
                self._client.session_id = None
                return None
            await configure(self._connection, session_id, opened, self._options)
        except (RequestError, ValidationError, ConnectionError) as error:
            raise await self._failure(error) from error
        self.is_open = True
        return how

    async def prompt(self, texts: Sequence[str]) -> AsyncGenerator[tuple[Said, ...] | Question]:
        """Say something to the agent, and yield what it says, and what it asks: nothing comes until that is answered.

        The agent is held up while nobody takes what it has said. Raises AgentError, after all that was said. Closed
        or cancelled before its end, the prompt goes on: see `cancel`.
        """
        turn = self._turn = self._client.turn = Inbox(Transcript(self._client.terminals.output_of))
        blocks = [TextContentBlock(type="text", text=text) for text in texts]
        prompting = asyncio.create_task(self._connection.prompt(session_id=self.id, prompt=blocks))
        self._prompting = prompting
        self._terminals_before = self._client.terminals.ids
        prompting.add_done_callback(turn.wake)
        failure: AgentError | None = None
        try:
            while True:
                if outputs := turn.take():
                    yield merged(outputs)
                elif prompting.done():
                    failure = await self._outcome(prompting)
                    break
                elif question := turn.next_question():
                    if outputs := turn.transcript.pause():
                        yield merged(outputs)
                    yield question
                elif await self._hears(turn):
                    continue
                else:
                    self.is_broken = True
                    failure = self._failures.silent()
                    break
                turn.quiet_since = time.monotonic()
            if failure is not None:
                last = turn.transcript.break_off()
            else:
                response = prompting.result()
                last = turn.transcript.end(response.stop_reason, response.usage)
                if response.stop_reason != "end_turn":
                    failure = self._failures.stopped(response.stop_reason)
            if last:
                yield merged(last)
            if failure is not None:
                raise failure
        finally:
            self._turn = self._client.turn = None
            turn.leave()

    async def unless_ended(self, asked: Coroutine[Any, Any, _T]) -> _T | None:
        """Return what comes of `asked` while a prompt is under way; None where that ends first, as by a crash."""
        assert self._prompting is not None, "a prompt asks"
        asking = asyncio.create_task(asked)
        try:
            await asyncio.wait([asking, self._prompting], return_when=asyncio.FIRST_COMPLETED)
            return asking.result() if asking.done() else None
        finally:
            asking.cancel()

    async def cancel(self) -> bool:
        """Tell the agent to stop; return whether it did in time, and can go on with another prompt."""
        prompting = self._prompting
        if prompting is None or prompting.done():
            return self.is_alive
        try:
            async with asyncio.timeout(self._options.cancel_seconds):
                await self._connection.cancel(session_id=self.id)
                await asyncio.wait([prompting])
                # Not every agent ends the command that it was waiting for.
                await self._client.terminals.release_all_but(self._terminals_before)
        except (TimeoutError, ConnectionError):
            return False
        return self.is_alive and prompting.exception() is None

    async def end(self) -> None:
        """End the process and all that it or its terminals have started."""
        self.is_broken = True
        await self._connection.close()
        await asyncio.gather(self._client.terminals.close(), self._child.end(_END_SECONDS))
        if self._prompting is not None:
            await asyncio.wait([self._prompting])
            # Looked at, so that nobody complains that it was not.
            if not self._prompting.cancelled():
                self._prompting.exception()

    def _known(self) -> InitializeResponse:
        assert self._initialized is not None, "initialize() was called"
        return self._initialized

    # What comes from the agent

    async def _on_update(self, params: Any) -> None:
        turn = self._turn
        if turn is None:
            return
        try:
            if params["sessionId"] != self.id:
                return
            word = params["update"]["sessionUpdate"]
            # A later protocol has more of them.
            if (kind := UPDATES.get(word)) is None:
                return
            update = kind.model_validate(params["update"])
        except (ValidationError, KeyError, TypeError):
            turn.add_strange()
            await asyncio.sleep(0)  # others have their turn, however many of these there are
        else:
            turn.add(turn.transcript.add(update))
        await turn.room()

    def _on_end(self) -> None:
        if self.on_lost is not None:
            self.on_lost()

    async def _hears(self, turn: Inbox) -> bool:
        """Wait for something to happen; False when the agent has been silent for too long."""
        if turn.transcript.has_open_tool_call or self._transport.has_open_request:
            turn.quiet_since = time.monotonic()
        silence = self._options.silence_seconds
        until = max(turn.quiet_since, self._transport.heard_at) + silence
        try:
            async with asyncio.timeout(until - time.monotonic()):
                await turn.ready()
        except TimeoutError:
            busy = turn.transcript.has_open_tool_call or self._transport.has_open_request
            return busy or max(turn.quiet_since, self._transport.heard_at) + silence > time.monotonic()
        return True

    async def _outcome(self, prompting: asyncio.Task[Any]) -> AgentError | None:
        error = ConnectionError("closed") if prompting.cancelled() else prompting.exception()
        if error is None:
            return None
        if isinstance(error, RequestError | ValidationError | ConnectionError):
            return await self._failure(error)
        raise error

    async def _failure(self, error: RequestError | ValidationError | ConnectionError) -> AgentError:
        """Translate what the SDK or the transport raised."""
        if isinstance(error, RequestError):
            return self._failures.answered_error(error, self._initialized)
        self.is_broken = True
        if isinstance(error, ValidationError):
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            return self._failures.broke_protocol(f"in {error.title}, {where}: {first['msg']}")
        if self._transport.broken is not None:
            return self._failures.broke_protocol(self._transport.broken)
        if self._transport.is_not_read:
            return self._failures.does_not_read()
        # The end of its output is seen a moment before that of the process.
        with suppress(TimeoutError):
            async with asyncio.timeout(_EXIT_SECONDS):
                await self._child.wait()
        return self._failures.crashed(self._child.exit_status, self._child.last_errors)


def _own_version() -> str:
    try:
        return metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:  # run from its sources
        return "unknown"
