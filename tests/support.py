"""What several tests of the runtime service share: patience, a disk that can fail, agents that do as a test says."""

import asyncio
import gc
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import apsw
import msgspec
import pytest

from runtime_service.agents import Agent, AgentSays, Answer, AnsweredBy, HistoryMessage, Log, Option, TurnContext
from runtime_service.event_log import EventLog
from runtime_service.executor import Executor, ExecutorLimits
from runtime_service.questions import QuestionSettings
from runtime_service.registry import Registry, Server
from runtime_service.runs import (
    TERMINAL,
    EventDraft,
    EventRole,
    LogLevel,
    Run,
    RunEvent,
    RunMode,
    RunStatus,
    new_run_id,
    now_ms,
)
from runtime_service.store.base import (
    PERMISSION_REQUEST,
    PERMISSION_RESPONSE,
    Cancel,
    NewAnswer,
    NewRun,
    NewTurn,
    RunStore,
    TurnKey,
    log_event,
)
from runtime_service.store.group_commit import GroupCommitWriter
from runtime_service.store.sqlite import SQLiteStore
from runtime_service.validation import checked_request
from tests.stores import Stores

LIMIT_SECONDS = 20.0
ORGANIZATION = "default"
SERVER = "assistant"
ALL = 1 << 30

_T = TypeVar("_T")
LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def run_async(main: Coroutine[Any, Any, _T], *, loop_factory: LoopFactory | None = None) -> _T:
    """Run `main` within the limit; what a task or callback failed with unseen fails the test, too."""
    unseen: list[str] = []

    async def limited() -> _T:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: unseen.append(f"{context['message']}: {context.get('exception')!r}")
        )
        async with asyncio.timeout(LIMIT_SECONDS):
            result = await main
        # An exception that nobody looked at is told when its future goes.
        gc.collect()
        return result

    # What there is by now need not be looked at again then; it is most of what there will be.
    gc.freeze()
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        result = runner.run(limited())
    gc.collect()
    assert not unseen, unseen
    return result


class GivenSurroundings:
    """What an agent finds around its turn when there is no runtime: this history, these logs, and these answers.

    `asked` are the questions with their options. A question for which no answer is left is not answered in time.
    """

    def __init__(
        self,
        history: Sequence[HistoryMessage] | None = None,
        logs: Mapping[str, Log] | None = None,
        answers: Sequence[Answer] = (),
    ) -> None:
        self._history = list(history or ())
        self._logs = dict(logs or {})
        self._answers = list(answers)
        self.asked: list[tuple[str, tuple[Option, ...], str | None, Mapping[str, Any] | None]] = []

    async def history(self) -> list[HistoryMessage]:
        """The history given."""
        return self._history

    async def latest_log(self, log_type: str) -> Log | None:
        """The log given for the type."""
        return self._logs.get(log_type)

    async def ask(
        self, question: str, options: Sequence[Option], tool_kind: str | None, metadata: Mapping[str, Any] | None
    ) -> Answer:
        """The next of the answers."""
        self.asked.append((question, tuple(options), tool_kind, metadata))
        return self._answers.pop(0) if self._answers else Answer(AnsweredBy.TIME_LIMIT)


def with_store(stores: Stores, check: Callable[[RunStore], Awaitable[object]]) -> None:
    """Run `check` with an open store."""

    async def main() -> None:
        async with stores.open() as store:
            await check(store)

    run_async(main())


async def eventually(fact: Callable[[], object]) -> None:
    """Return once `fact()` holds; fails after the limit."""
    async with asyncio.timeout(LIMIT_SECONDS):
        while not fact():  # noqa: ASYNC110 - facts of any kind, told by nobody
            await asyncio.sleep(0.002)


class Disk:
    """Stands between the store's writing connection and its file; made before the store is opened.

    `commits` counts; the next `refuse` commits fail, as they do on a disk that is full. `holding` says that a
    commit is being held up. Every commit is made in the writer's thread, unless `choose` leaves that to the writer.
    `threads` has the thread of each, also of one that failed; each takes `seconds` longer than it does anyway.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, choose: bool = False) -> None:
        self.commits = 0
        self.refuse = 0
        self.seconds = 0.0
        self.threads: list[int] = []
        self.holding = False
        self._let = threading.Event()
        self._let.set()
        self.connections: list[apsw.Connection] = []
        if not choose:
            # A commit that is held up is not to hold up the loop of the test.
            monkeypatch.setattr(GroupCommitWriter, "_may_commit_here", lambda _: False)
        monkeypatch.setattr(apsw, "connection_hooks", [self._attach])

    @property
    def writer(self) -> apsw.Connection:
        """The connection of the store opened last that writes."""
        return next(c for c in reversed(self.connections) if c.open_flags & apsw.SQLITE_OPEN_READWRITE)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold up every commit, as a slow disk does."""
        self._let.clear()
        try:
            yield
        finally:
            self._let.set()

    def _attach(self, connection: apsw.Connection) -> None:
        self.connections.append(connection)
        connection.set_commit_hook(self._on_commit)

    def _on_commit(self) -> bool:
        self.threads.append(threading.get_ident())
        time.sleep(self.seconds)
        self.holding = not self._let.is_set()
        self._let.wait(LIMIT_SECONDS)
        self.holding = False
        if self.refuse:
            self.refuse -= 1
            return True
        self.commits += 1
        return False


@contextmanager
def write_lock(path: Path) -> Iterator[None]:
    """Keep everybody else from writing to the SQLite file."""
    connection = apsw.Connection(str(path))
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


def new_run(
    text: str = "hello",
    *,
    organization: str = ORGANIZATION,
    server_id: str = SERVER,
    mode: RunMode = RunMode.SYNC,
    title: str | None = None,
    metadata: bytes | None = None,
    request_id: str | None = None,
) -> NewRun:
    """A run to be accepted."""
    request = checked_request(request_id or "", b"", "start", server_id, text, title, metadata)
    return NewRun(new_run_id(), organization, server_id, text, mode, now_ms(), title, metadata, request)


def next_turn(
    run: Run | NewRun, text: str = "more", *, metadata: bytes | None = None, request_id: str | None = None
) -> NewTurn:
    """The next input of a run."""
    request = checked_request(request_id or "", b"", "continue", run.server_id, run.id, text, metadata)
    return NewTurn(run.organization, run.server_id, run.id, text, RunMode.SYNC, now_ms(), metadata, request)


def cancel_of(run: Run | NewRun, *, request_id: str | None = None) -> Cancel:
    """The cancel of a run."""
    request = checked_request(request_id or "", b"", "cancel", run.server_id, run.id)
    return Cancel(run.organization, run.server_id, run.id, request)


async def running(store: RunStore, text: str = "hello") -> Run:
    """A run whose turn 1 is running."""
    return (await store.start_run(new_run(text), claim=True)).run


def key_of(run: Run) -> TurnKey:
    """The key under which the turn shown may be written to."""
    return TurnKey(run.id, run.turn.number, run.turn.epoch)


def said(*texts: str) -> list[EventDraft]:
    """Messages of an agent."""
    return [EventDraft(EventRole.ASSISTANT, text, now_ms()) for text in texts]


OPTIONS = (("yes", "Allow it"), ("no", "Not at all"))
"""Of a question: ids and names."""


def question(text: str = "May I?") -> EventDraft:
    """What asks."""
    return log_event(PERMISSION_REQUEST, LogLevel.INFO, text)


async def asking(store: RunStore, options: Sequence[tuple[str, str]] = OPTIONS) -> Run:
    """A run whose turn 1 is running and has asked, by event 2."""
    return (await store.ask_question(key_of(await running(store)), [question()], options)).run


def answer_to(run: Run, text: str = "yes", *, request_id: str | None = None) -> NewAnswer:
    """The answer to what a run asks."""
    assert run.question is not None
    event = EventDraft(EventRole.USER, text, now_ms(), log_type=PERMISSION_RESPONSE)
    request = checked_request(request_id or "", b"", "answer", run.server_id, run.id, text)
    return NewAnswer(run.organization, run.server_id, run.id, run.question.sequence, event, request)


async def log_of(store: RunStore, run_id: str) -> list[RunEvent]:
    """The whole log of a run, which has no gap."""
    events = await store.read_events(run_id, 0, ALL, ALL)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    return events


async def flood(store: RunStore, run: Run) -> None:
    """Append 2,500 messages at once; all are told, and the log has them whole and in order."""
    done = 0

    async def append(n: int) -> None:
        nonlocal done
        await store.append_events(key_of(run), said(str(n)))
        done += 1

    tasks = [asyncio.create_task(append(n)) for n in range(2_500)]
    await eventually(lambda: done == len(tasks))
    assert contents(await log_of(store, run.id))[1:] == [str(n) for n in range(2_500)]


async def snapshot(store: RunStore, run: Run) -> object:
    """All that can be read of a run."""
    latest = await store.get_run(run.organization, run.server_id, run.id)
    turns = [
        await store.get_run(run.organization, run.server_id, run.id, number)
        for number in range(1, latest.last_turn + 1)
    ]
    return latest, turns, await log_of(store, run.id)


def contents(events: list[RunEvent] | tuple[RunEvent, ...]) -> list[str]:
    """What the events say."""
    return [event.content for event in events]


Script = Callable[[TurnContext], AsyncGenerator[AgentSays]]


class ScriptedAgent(Agent):
    """Does in each turn what its script says, and remembers who ran."""

    Options = msgspec.Struct

    def __init__(self, script: Script, *, repeatable: bool = True) -> None:
        self._script = script
        self.repeatable = repeatable
        self.reason: str | None = None
        self.inputs: list[str] = []
        self.running = 0
        self.most_running = 0

    def unavailable_reason(self) -> str | None:
        """Return what the test has set."""
        return self.reason

    async def run(self, turn: TurnContext) -> AsyncGenerator[AgentSays]:
        """Follow the script."""
        self.inputs.append(turn.input)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            async for output in self._script(turn):
                yield output
        finally:
            self.running -= 1


class Runtime:
    """Store, event log and executor of one process, without gRPC."""

    def __init__(self, store: RunStore, event_log: EventLog, executor: Executor, servers: Mapping[str, Server]) -> None:
        self.store = store
        self.event_log = event_log
        self.executor = executor
        self.servers = servers

    async def start(self, text: str = "hello", *, server_id: str = SERVER, metadata: bytes | None = None) -> Run:
        """Start a run."""
        new = new_run(text, server_id=server_id, metadata=metadata)
        return (await self.executor.start_run(new, self.servers[server_id])).run

    async def resume(self, run: Run, text: str = "more") -> Run:
        """Continue a run."""
        return (await self.executor.continue_run(next_turn(run, text), self.servers[run.server_id])).run

    async def cancel(self, run: Run) -> Run:
        """Cancel a run."""
        return (await self.executor.cancel_run(Cancel(run.organization, run.server_id, run.id))).run

    async def get(self, run: Run, turn: int | None = None) -> Run:
        """Read a run."""
        return await self.store.get_run(run.organization, run.server_id, run.id, turn)

    async def until(self, fact: Callable[[], Awaitable[bool]]) -> None:
        """Return once `fact()` holds; fails after the limit."""
        async with asyncio.timeout(LIMIT_SECONDS):
            while not await fact():  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.002)

    async def until_status(self, run: Run, *statuses: RunStatus, turn: int | None = None) -> Run:
        """Return the run once its turn has one of these statuses."""
        found: list[Run] = []

        async def reached() -> bool:
            found[:] = [await self.get(run, turn)]
            status = found[0].status
            assert status in statuses or status not in TERMINAL, f"it is {status}: {found[0].turn}"
            return status in statuses

        await self.until(reached)
        return found[0]


def _opened(place: Path | Stores) -> Awaitable[RunStore]:
    return place.connect() if isinstance(place, Stores) else SQLiteStore.open(place)


@asynccontextmanager
async def runtime(
    place: Path | Stores,
    agents: Mapping[str, Agent] | Agent,
    limits: ExecutorLimits | None = None,
    *,
    turn_timeout_seconds: float = 3_600,
    drain_seconds: float = 0,
    questions: QuestionSettings | None = None,
) -> AsyncIterator[Runtime]:
    """A runtime over a place that holds runs, such as the SQLite file at a path; drained at the end."""
    by_id = {SERVER: agents} if isinstance(agents, Agent) else agents
    asked = questions or QuestionSettings()
    servers = {
        name: Server(name, ORGANIZATION, agent, turn_timeout_seconds, questions=asked) for name, agent in by_id.items()
    }
    store = await _opened(place)
    event_log = EventLog(store)
    limits = limits or ExecutorLimits(cancel_grace_seconds=0.05)
    executor = Executor(store, event_log, Registry(servers, {}), limits)
    await executor.start()
    try:
        yield Runtime(store, event_log, executor, servers)
    finally:
        await executor.drain(drain_seconds)
        event_log.close()
        await store.close()
