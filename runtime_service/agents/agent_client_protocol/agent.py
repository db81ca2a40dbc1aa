"""The `agent_client_protocol` agent: which run has which process, and when a process begins and ends."""

import asyncio
import logging
import os
import secrets
import sys
from collections.abc import AsyncGenerator, Coroutine, Iterable, Mapping
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

from runtime_service.agents.agent_client_protocol.client import Question
from runtime_service.agents.agent_client_protocol.directory import WorkingDirectory
from runtime_service.agents.agent_client_protocol.failures import Failures
from runtime_service.agents.agent_client_protocol.options import AgentClientProtocolOptions
from runtime_service.agents.agent_client_protocol.session import Session
from runtime_service.agents.base import Agent, AgentError, AgentSays, Finding, HistoryMessage, Log, TurnContext
from runtime_service.runs import EventRole, LogLevel

log = logging.getLogger(__name__)

_SESSION_LOG = "session"
_MAX_HISTORY_CHARACTERS = 100_000
_STARTS_AT_ONCE = 8 * (os.cpu_count() or 1)
"""So many processes of a server start beside each other; more would slow down each of them beyond its time."""


class AgentClientProtocolAgent(Agent):
    """A run is a session in a process of its own, which waits for the next turn until the run has been idle too long.

    Where the process is gone, or another replica has gone on with the run, the session is loaded again if the agent
    can, else a new one gets the thread's history as context. What there is to know for that is the log entry `session`.
    """

    Options = AgentClientProtocolOptions
    session_protocol = "agent-client-protocol"

    def __init__(self, options: AgentClientProtocolOptions) -> None:
        self._options = options
        self._failures = Failures(options)
        self._found = False
        self._runs: dict[str, _Run] = {}
        self._warm: list[asyncio.Task[Session | None]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._starts = asyncio.Semaphore(_STARTS_AT_ONCE)
        self._closed = False

    def unavailable_reason(self) -> str | None:
        """Say so when the command is not there, or no process can be started that is never left behind."""
        if sys.platform != "linux":
            return "Agents that are processes need Linux where the runtime service runs."
        self._found = self._found or self._options.executable() is not None
        return None if self._found else self._failures.not_found().message

    async def check(self) -> AsyncGenerator[Finding]:
        """Open a session, and say what it shows; its working directory is removed again if it was made for it."""
        session = await self.open_session(run_id="check", server_id="check", thread_id="check")
        try:
            for finding in session.findings():
                yield finding
        finally:
            await session.end()
            if session.directory is not None:
                await asyncio.to_thread(session.directory.remove)

    async def run(self, turn: TurnContext) -> AsyncGenerator[AgentSays]:
        """Prompt the run's session. Raises AgentError."""
        if (reason := self.unavailable_reason()) is not None:
            raise AgentError(reason, "AGENT_NOT_FOUND")
        run_id = turn.run_id or secrets.token_hex(8)
        run = self._runs.setdefault(run_id, _Run())
        run.begin()
        try:
            await run.settled()
            texts, news = await self._session_for(run, turn)
            session = run.session
            assert session is not None
            if news is not None:
                yield news
            async with aclosing(session.prompt(texts)) as said:
                async for each in said:
                    if isinstance(each, Question):
                        asked = turn.ask(each.text, each.options, tool_kind=each.tool_kind, metadata=each.metadata)
                        if (answer := await session.unless_ended(asked)) is not None:
                            each.answer(answer)
                    else:
                        yield each
        finally:
            self._leave(run_id, run)

    async def open_session(self, *, run_id: str, server_id: str, thread_id: str) -> Session:
        """Start a process and open a session outside of any run; who calls ends it. Raises AgentError."""
        path = self._options.directory_of(run_id=run_id, server_id=server_id, thread_id=thread_id)
        run = _Run()
        try:
            await self._open(run, path, {})
        except BaseException:
            await asyncio.wait([self._spawn(self._discard(run))])
            raise
        session, run.session = run.session, None
        assert session is not None
        return session

    async def close(self) -> None:
        """End every process, and remove the working directories that are to be removed."""
        self._closed = True
        runs, self._runs = self._runs, {}
        for run in runs.values():
            run.begin()
            self._spawn(self._retire(run, run.settling))
        warm, self._warm = self._warm, []
        for task in warm:
            self._spawn(_end_warm(task))
        while self._tasks:
            await asyncio.wait(self._tasks)

    # The session of a turn

    async def _session_for(self, run: "_Run", turn: TurnContext) -> tuple[list[str], Log | None]:
        """See to it that the run has an open session; return what it is to be told, and the log entry on it."""
        # Also in what seems to be the first attempt: one of a service that was stopped in order is not counted.
        known = await turn.latest_log(_SESSION_LOG)
        metadata = dict(known.metadata or {}) if known is not None else {}
        if run.session is not None:
            is_newest = run.connection and metadata.get("connection", run.connection) == run.connection
            if run.session.is_alive and is_newest:
                return [turn.input], None
            # It has ended, or another process has had turns that this one knows nothing of; or it was told nothing yet.
            run.settling = self._spawn(self._end(run))
            await run.settled()
        path = self._options.directory_of(run_id=turn.run_id, server_id=turn.server_id, thread_id=turn.thread_id)
        run.connection = ""
        how = await self._open(run, path, metadata)
        texts = [turn.input]
        if how == "new" and (history := await turn.history()):
            how = "history"
            texts = [history_text(history), turn.input]
        run.connection = secrets.token_hex(8)
        return texts, self._news(run, how)

    async def _open(self, run: "_Run", path: Path, known: Mapping[str, Any]) -> str:
        """Give the run a process with an open session, an earlier one where it is known; return how it was opened."""
        # Not while one of the starts at once is taken: what is being started ahead may wait for one, too.
        await self._take_warm(run)
        try:
            async with self._starts, asyncio.timeout(self._options.start_seconds):
                directory = run.directory = await self._directory(path)
                if known.get("createdWorkingDirectory") is True and known.get("workingDirectory") == str(path):
                    directory.created = True
                session = await self._launched(run, path)
                session_id, how = known.get("sessionId"), None
                if isinstance(session_id, str) and session_id != run.lost_session:
                    # Where it is not opened, by whatever, it is not tried twice: the history does instead.
                    run.lost_session = session_id
                    how = await self._reopened(run, session, directory, session_id)
                if how is None:
                    await session.open(directory)
                session.on_lost = partial(self._lost, run, session)
        except TimeoutError:
            raise self._failures.start_timeout() from None
        return how or "new"

    async def _reopened(
        self, run: "_Run", session: Session, directory: WorkingDirectory, session_id: str
    ) -> str | None:
        try:
            how = await session.reopen(directory, session_id)
        except AgentError as error:
            if error.code == "AGENT_LOGIN_REQUIRED":
                run.lost_session = ""
            raise
        run.lost_session = ""
        return how

    def _news(self, run: "_Run", how: str) -> Log:
        session, directory = run.session, run.directory
        assert session is not None
        assert directory is not None
        name = session.agent.get("title") or session.agent["name"]
        words = {
            "new": f"A session with {name} was opened.",
            "load": f"The session with {name} was loaded in a new process.",
            "resume": f"The session with {name} was resumed in a new process.",
            "history": f"A new session with {name} was opened; the conversation so far was given to it as context.",
        }
        metadata = {
            "sessionId": session.id,
            "connection": run.connection,
            "agent": session.agent,
            "workingDirectory": str(directory.path),
            "createdWorkingDirectory": directory.created,
            "opened": how,
        }
        level = LogLevel.WARNING if how == "history" else LogLevel.INFO
        return Log(words[how], level, _SESSION_LOG, metadata)

    async def _take_warm(self, run: "_Run") -> None:
        """Give the run a warm process where there is one, and see to the next one."""
        if self._warm:
            warm = self._warm.pop(0)
            try:
                run.session = await asyncio.shield(warm)
            except asyncio.CancelledError:
                self._spawn(_end_warm(warm))
                raise
        self._warm_up()

    async def _launched(self, run: "_Run", path: Path) -> Session:
        """Return the run's process, which is initialized: the warm one if it lives, else a new one."""
        if (warm := run.session) is not None:
            if warm.is_alive:
                return warm
            self._spawn(warm.end())
        run.session = session = await Session.launch(self._options, path)
        await session.initialize()
        return session

    async def _directory(self, path: Path) -> WorkingDirectory:
        try:
            return await asyncio.to_thread(WorkingDirectory.make, path)
        except OSError as error:
            raise self._failures.no_directory(error) from error

    def _warm_up(self) -> None:
        while len(self._warm) < self._options.warm_processes and not self._closed:
            self._warm.append(asyncio.create_task(self._start_warm()))

    async def _start_warm(self) -> Session | None:
        """Return an initialized process, None where that fails: the turn that needs one will tell why."""
        session = None
        try:
            async with self._starts, asyncio.timeout(self._options.start_seconds):
                cwd = (await self._directory(self._options.common_directory())).path
                session = await Session.launch(self._options, cwd)
                await session.initialize()
        except (AgentError, TimeoutError, asyncio.CancelledError) as error:
            if session is not None:
                self._spawn(session.end())
            if isinstance(error, asyncio.CancelledError):
                raise
            log.warning("no process of the agent %s could be started ahead: %s", self._options.name, error)
            return None
        session.on_lost = partial(self._lost_warm, session)
        return session

    def _lost_warm(self, session: Session) -> None:
        self._spawn(session.end())

    # Ends

    def _leave(self, run_id: str, run: "_Run") -> None:
        """A turn has ended, in whatever way: what is left to be done goes on by itself, and the next turn waits."""
        run.busy = False
        session = run.session
        if session is not None and (not session.is_open or not session.is_alive or self._closed):
            run.session = None
            run.settling = self._spawn(session.end())
        elif session is not None and session.is_prompting:
            run.settling = self._spawn(self._cancel(run, session))
        if not self._closed:
            loop = asyncio.get_running_loop()
            run.idle = loop.call_later(self._options.idle_seconds, self._on_idle, run_id, run)

    def _lost(self, run: "_Run", session: Session) -> None:
        """A process has ended by itself: between two turns nobody else sees to what it may have left."""
        if not run.busy and run.session is session:
            run.session = None
            run.settling = self._spawn(session.end())

    async def _cancel(self, run: "_Run", session: Session) -> None:
        if not await session.cancel():
            run.session = None
            await session.end()

    def _on_idle(self, run_id: str, run: "_Run") -> None:
        run.idle = None
        run.settling = self._spawn(self._retire(run, run.settling))
        run.settling.add_done_callback(lambda _: self._forget(run_id, run))

    def _forget(self, run_id: str, run: "_Run") -> None:
        # Neither where a turn has come meanwhile, nor where one has come and gone.
        if not run.busy and run.idle is None and self._runs.get(run_id) is run:
            del self._runs[run_id]

    async def _retire(self, run: "_Run", before: "asyncio.Task[None] | None") -> None:
        """End the run's process and remove its working directory, if it is to be removed."""
        if before is not None:
            await asyncio.wait([before])
        await self._end(run)
        if run.directory is not None and self._options.remove_working_directory:
            await asyncio.to_thread(run.directory.remove)

    async def _discard(self, run: "_Run") -> None:
        """Leave nothing of a session that is no run's."""
        await self._end(run)
        if run.directory is not None:
            await asyncio.to_thread(run.directory.remove)

    async def _end(self, run: "_Run") -> None:
        session, run.session = run.session, None
        if session is not None:
            await session.end()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Run:
    """A run of which something is here."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.directory: WorkingDirectory | None = None
        self.connection = ""
        """Which opening of its session this process has; the newest in the log is the one that knows all turns."""
        self.lost_session = ""
        """The id of a session by whose opening a process broke, or was too slow."""
        self.idle: asyncio.TimerHandle | None = None
        self.settling: asyncio.Task[None] | None = None
        self.busy = False

    def begin(self) -> None:
        """A turn begins, or the end."""
        if self.idle is not None:
            self.idle.cancel()
            self.idle = None
        self.busy = True

    async def settled(self) -> None:
        """Wait for what the last turn has left to be done."""
        if self.settling is not None:
            await asyncio.wait([self.settling])
            self.settling = None


def history_text(history: Iterable[HistoryMessage]) -> str:
    """Return the conversation so far as context for an agent that does not know it, the oldest left out if long."""
    names = {EventRole.USER: "User", EventRole.ASSISTANT: "Assistant"}
    parts: list[str] = []
    room = _MAX_HISTORY_CHARACTERS
    for said in reversed(list(history)):
        part = f"{names.get(said.role, said.role.value)}: {said.content}"
        if len(part) > room:
            parts.append("[what came before is left out]")
            break
        room -= len(part)
        parts.append(part)
    conversation = "\n\n".join(reversed(parts))
    return f"This is the conversation so far, as context. The user's next message follows it.\n\n{conversation}"


async def _end_warm(task: "asyncio.Task[Session | None]") -> None:
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled() and (session := task.result()) is not None:
        await session.end()
