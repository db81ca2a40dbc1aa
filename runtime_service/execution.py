"""One turn being executed: what its agent says becomes events, and its end an outcome.

Everything that the agent has said and the store has not yet is `pending`; whatever becomes ready while a commit
is under way goes into the next one. Nobody sees what an agent says before it awaits something, so pieces of a
message are looked at then: a message that is complete by that time was never a draft.

Knows agents, the store and the event log; not who started it.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from enum import StrEnum
from typing import Any, TypeVar, assert_never

import msgspec

from runtime_service.agents import (
    AgentError,
    AgentOutput,
    AgentSays,
    Delta,
    HistoryMessage,
    Log,
    Message,
    ToolCall,
    ToolResult,
    TurnContext,
)
from runtime_service.errors import StoreUnavailable
from runtime_service.event_log import Draft, LiveRun
from runtime_service.registry import Server
from runtime_service.runs import EventDraft, EventRole, LogLevel, Run, RunStatus, now_ms
from runtime_service.store.base import (
    Change,
    Outcome,
    RunStore,
    TurnKey,
    TurnLost,
    incomplete_event,
    log_event,
)

log = logging.getLogger(__name__)

_Word = TypeVar("_Word", bound=StrEnum)

_ASSISTANT = EventRole.ASSISTANT  # named once: in Python 3.11 the name of an enumeration's member is a call

MAX_EVENT_BYTES = 1 << 20
_MAX_ERROR_CHARACTERS = 10_000
_MAX_UNSTORED_OUTPUTS = 500
_MAX_PENDING_BYTES = 1 << 20
_YIELD_SECONDS = 0.001
_DRAFT_SECONDS = 1.0
_HISTORY_MESSAGES = 1_000
_STORE_RETRY_SECONDS = 1.0


class Execution:
    """A claimed turn, from its agent's first word to its settled outcome."""

    def __init__(
        self,
        run: Run,
        server: Server,
        store: RunStore,
        live: LiveRun,
        publish: Callable[[Change], None],
    ) -> None:
        self.run = run
        self._key = TurnKey(run.id, run.turn.number, run.turn.epoch)
        self._server = server
        self._store = store
        self._live = live
        self._publish = publish
        self._loop = asyncio.get_running_loop()
        self._last_sequence = run.last_sequence
        self._pending: list[EventDraft] = []
        self._pending_bytes = 0
        self._in_flight = 0
        self._said: list[Delta] = []  # pieces that nobody could see yet; always the same list
        self._refused: Exception | None = None  # why the agent is not to say more
        self._step_planned = False
        self._held = 0
        self._unheld: asyncio.Future[None] | None = None
        self._task: asyncio.Task[Any] | None = None  # while the agent runs
        self._expired = False
        self._settling = False
        self._flushing: asyncio.Task[None] | None = None
        self._draft: Draft | None = None
        self._draft_saved = 0
        self._draft_timer: asyncio.TimerHandle | None = None
        self._draft_saving: asyncio.Task[None] | None = None
        self._output: str | None = None
        self._lost = False

    # What the executor calls

    async def execute(self) -> None:
        """Run the agent to its end and settle the turn. Cancelled, it leaves the turn as it is in the store."""
        try:
            outcome = await self._run_agent()
            await self._settle(outcome)
        except TurnLost:
            log.info("turn %s of %s was settled or claimed elsewhere", self.run.turn.number, self.run.id)
        finally:
            self._lost = True
            if self._draft_timer is not None:
                self._draft_timer.cancel()

    def log_grew(self, last_sequence: int) -> None:
        """Learn the newest sequence of the run's log."""
        self._last_sequence = max(self._last_sequence, last_sequence)
        if self._draft is not None:
            self._place_draft(self._draft)

    def hold(self) -> tuple[list[EventDraft], str | None]:
        """Begin no write until `resume` or `take_rest`; return what is not stored yet, and the output so far."""
        self._held += 1
        return self._rest()

    def resume(self) -> None:
        """Undo `hold`: what was to follow it did not happen."""
        self._held -= 1
        self._wake_held()
        self._begin_flush()

    def take_rest(self) -> list[EventDraft]:
        """Stop listening to the agent; return what is not stored yet."""
        return self._stop_listening()[0]

    def _stop_listening(self) -> tuple[list[EventDraft], str | None]:
        self._lost = True
        self._wake_held()
        return self._take_all()

    async def release(self) -> None:
        """Put the turn back into the queue, or fail it where it may not be repeated; its task has ended.

        Without a store it is left to the next recovery.
        """
        self._settling = True
        if self._flushing is not None:
            await asyncio.wait([self._flushing])
        try:
            if self._server.agent.repeatable:
                self._publish(await self._store.release_turn(self._key, self.take_rest()))
            else:
                error = "The runtime stopped while it executed this turn, and the turn is not begun again."
                outcome = Outcome(RunStatus.FAILED, error=error, error_code="RUNTIME_LOST")
                self._publish(await self._store.finish_turn(self._key, *self._failing(outcome)))
        except TurnLost:
            return
        except StoreUnavailable:
            log.warning("turn %s of %s is left as running", self.run.turn.number, self.run.id)

    async def settle_outside(self, outcome: Outcome) -> None:
        """Fail the turn for an agent that cannot do it any more; nothing happens when it is settled already."""
        events, outcome = self._failing(outcome)
        while True:
            try:
                self._publish(await self._store.finish_turn(self._key, events, outcome))
            except TurnLost:
                return
            except StoreUnavailable:
                await asyncio.sleep(_STORE_RETRY_SECONDS)
            else:
                return

    def _failing(self, outcome: Outcome) -> tuple[list[EventDraft], Outcome]:
        """Stop listening to the agent; return the last events of a turn that fails, and its outcome."""
        events, output = self._stop_listening()
        events.append(log_event("error", LogLevel.ERROR, outcome.error or ""))
        return events, msgspec.structs.replace(outcome, output=output)

    def expire(self) -> None:
        """End the agent, if it still runs: the turn has taken as long as its server allows."""
        if self._task is not None:
            self._expired = True
            self._task.cancel()

    def timed_out(self) -> Outcome:
        """Return the outcome of a turn that took longer than its server allows."""
        seconds = self._server.turn_timeout_seconds
        message = f"The turn took longer than the {seconds:g} s that the server {self._server.id!r} allows."
        return Outcome(RunStatus.FAILED, error=message, error_code="TURN_TIMEOUT")

    def unexpected(self, error: BaseException) -> Outcome:
        """Return the outcome of a turn whose agent raised something that is not for the caller's eyes."""
        log.error("the agent of %s failed in run %s", self.run.server_id, self.run.id, exc_info=error)
        message = f"The agent raised {type(error).__name__}; the log of the runtime service has the details."
        return Outcome(RunStatus.FAILED, error=message, error_code="AGENT_FAILED")

    # The agent

    async def _run_agent(self) -> Outcome:
        run, server = self.run, self._server
        context = TurnContext(
            input=run.turn.input,
            metadata=json.loads(run.turn.metadata) if run.turn.metadata else {},
            run_id=run.id,
            thread_id=run.thread_id,
            server_id=run.server_id,
            turn=run.turn.number,
            attempt=run.turn.attempt,
            read_history=self._read_history,
        )
        self._task = asyncio.current_task()
        try:
            await self._listen(server.agent.run(context))
        except AgentError as error:
            message = _storable(str(error.message))[:_MAX_ERROR_CHARACTERS]
            return Outcome(RunStatus.FAILED, error=message, error_code=_storable(str(error.code)))
        except TurnLost:
            raise
        except asyncio.CancelledError as error:
            task = self._task
            if self._expired and task is not None and not task.uncancel():
                return self.timed_out()
            if task is None or task.cancelling():
                raise
            # Nobody cancelled the turn: something that the agent waited for was.
            return self.unexpected(error)
        except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001 - whatever an agent raises is data
            return self.unexpected(error)
        finally:
            self._task = None
        return Outcome(RunStatus.COMPLETED)

    async def _listen(self, agent: AsyncGenerator[AgentSays]) -> None:
        """Take what the agent says, to its end."""
        said = self._said
        left = _MAX_UNSTORED_OUTPUTS
        try:
            async for outputs in agent:
                if not isinstance(outputs, tuple):
                    outputs = (outputs,)
                for output in outputs:
                    # Behind another piece of this step, a piece needs no look: all are read at the step's end.
                    if said and output.__class__ is Delta:
                        said.append(output)
                    else:
                        self._add(output)
                        if self._pending_bytes >= _MAX_PENDING_BYTES:
                            left = 1
                    left -= 1
                    if not left:
                        # Also keeps an agent that never awaits from keeping the others from running.
                        left = _MAX_UNSTORED_OUTPUTS
                        await self._drain()
        finally:
            await agent.aclose()
        self._read_said()
        if self._refused is not None:
            raise self._refused
        if self._draft is not None:
            # An agent that only streams: the end of the turn is the end of its message.
            self._add(Message(self._draft.text))

    async def _read_history(self) -> list[HistoryMessage]:
        number = self.run.turn.number
        if number == 1:
            return []
        messages = await self._store.read_messages(self.run.id, number, _HISTORY_MESSAGES)
        return [HistoryMessage(role, content) for role, content in messages]

    def _add(self, output: AgentOutput) -> None:
        if self._lost:
            raise TurnLost
        if self._refused is not None:
            raise self._refused
        if not self._step_planned:
            # Not at once: what the agent says without awaiting shares a commit, its end included.
            self._step_planned = True
            self._loop.call_soon(self._end_step)
        if isinstance(output, Delta):
            self._said.append(output)
            return
        event = _event_from(output)
        size = len(event.content) + len(event.metadata or b"")
        if size > MAX_EVENT_BYTES // 4 and _utf8_bytes(event) > MAX_EVENT_BYTES:
            raise _too_large()
        self._pending.append(event)
        self._pending_bytes += size
        if isinstance(output, Message):
            self._drop_draft()
            if event.role is _ASSISTANT:
                self._output = event.content
        elif self._draft is not None:
            self._place_draft(self._draft)

    def _end_step(self) -> None:
        """See to what the agent has said until it awaited something."""
        self._step_planned = False
        self._read_said()
        self._begin_flush()

    def _read_said(self) -> None:
        """Make the pieces that came since the last time part of the draft."""
        if not self._said:
            return
        try:
            text = _storable("".join([delta.text for delta in self._said if delta.text]))
        except Exception as error:  # noqa: BLE001 - whatever an agent says is data
            self._refused, text = error, ""
        self._said.clear()
        if text:
            draft = self._begin_draft() if self._draft is None else self._draft
            draft.size += len(text) if text.isascii() else len(text.encode())
            if draft.size > MAX_EVENT_BYTES:
                self._refused = _too_large()
            else:
                draft.parts.append(text)
                self._live.show_draft(draft)

    # The draft

    def _begin_draft(self) -> Draft:
        draft = self._draft = Draft()
        self._draft_saved = 0
        self._place_draft(draft)
        if self._draft_timer is None:
            self._draft_timer = self._loop.call_later(_DRAFT_SECONDS, self._save_draft)
        return draft

    def _drop_draft(self) -> None:
        self._said.clear()
        if self._draft is not None:
            self._draft = None
            self._live.show_draft(None)

    def _place_draft(self, draft: Draft) -> None:
        draft.sequence = self._last_sequence + self._in_flight + len(self._pending) + 1

    def _save_draft(self) -> None:
        draft = self._draft
        # A message that is stored takes the place of the draft: those that came before this one go first.
        busy = bool(self._pending or self._in_flight)
        again_seconds = _DRAFT_SECONDS / 10 if busy and draft is not None else _DRAFT_SECONDS
        self._draft_timer = self._loop.call_later(again_seconds, self._save_draft)
        idle = not busy and (self._draft_saving is None or self._draft_saving.done())
        if draft is not None and len(draft.parts) > self._draft_saved and idle:
            self._draft_saved = len(draft.parts)
            self._draft_saving = self._loop.create_task(self._write_draft(draft.text))

    async def _write_draft(self, text: str) -> None:
        try:
            await self._store.save_draft(self._key, text)
        except StoreUnavailable:
            self._draft_saved = 0

    # The store

    def _begin_flush(self) -> None:
        if self._pending and self._flushing is None and self._may_flush():
            self._flushing = asyncio.create_task(self._flush())

    def _may_flush(self) -> bool:
        return not (self._lost or self._held or self._settling)

    async def _flush(self) -> None:
        """Store what is pending until nothing is; one commit is under way at a time."""
        try:
            while self._pending and self._may_flush():
                events = self._take_pending()
                self._in_flight = len(events)
                try:
                    change = await self._store.append_events(self._key, events)
                except StoreUnavailable:
                    self._pending[:0] = events
                    self._in_flight = 0
                    await asyncio.sleep(_STORE_RETRY_SECONDS)
                    continue
                self._in_flight = 0
                self._publish(change)
        except TurnLost:
            self._lost = True
        finally:
            self._flushing = None

    async def _drain(self) -> None:
        """Wait until what was pending is stored; let others run."""
        self._read_said()
        await self._until_unheld()
        self._begin_flush()
        if self._flushing is None:
            # Not zero: the threads of the store get a chance, too.
            await asyncio.sleep(_YIELD_SECONDS)
        while self._flushing is not None:
            await asyncio.wait([self._flushing])
        await self._until_unheld()

    async def _until_unheld(self) -> None:
        while self._held and not self._lost:
            if self._unheld is None:
                self._unheld = self._loop.create_future()
            await self._unheld
        if self._lost:
            raise TurnLost

    def _wake_held(self) -> None:
        if self._unheld is not None and not self._unheld.done():
            self._unheld.set_result(None)
        self._unheld = None

    async def _settle(self, outcome: Outcome) -> None:
        # A commit that is under way must end first; what is pending then goes with the outcome.
        self._settling = True
        if self._flushing is not None and self._in_flight:
            await asyncio.wait([self._flushing])
        events, last = self._take_all()
        if outcome.error is not None:
            events.append(log_event("error", LogLevel.ERROR, outcome.error))
        outcome = msgspec.structs.replace(outcome, output=last)
        while True:
            await self._until_unheld()
            try:
                change = await self._store.finish_turn(self._key, events, outcome)
                break
            except StoreUnavailable:
                await asyncio.sleep(_STORE_RETRY_SECONDS)
        self._publish(change)

    def _rest(self) -> tuple[list[EventDraft], str | None]:
        """Return what the agent has said and the store has not, a half message included, and the turn's output."""
        self._read_said()
        if self._draft is None:
            return list(self._pending), self._output
        text = self._draft.text
        return [*self._pending, incomplete_event(text)], text

    def _take_all(self) -> tuple[list[EventDraft], str | None]:
        """Return what `_rest` does, and keep nothing of it."""
        events, output = self._rest()
        self._take_pending()
        self._drop_draft()
        return events, output

    def _take_pending(self) -> list[EventDraft]:
        events, self._pending = self._pending, []
        self._pending_bytes = 0
        return events


def _too_large() -> AgentError:
    return AgentError(
        f"The agent made an event of more than {MAX_EVENT_BYTES} bytes; say it in pieces.", "EVENT_TOO_LARGE"
    )


def _known(kind: type[_Word], word: str) -> _Word:
    """Return the enumeration's member; an agent may give it as text."""
    if isinstance(word, kind):
        return word
    try:
        return kind(word)
    except ValueError:
        words = ", ".join(member.value for member in kind)
        raise AgentError(f"The agent gave {word!r} where one of {words} belongs.", "AGENT_OUTPUT_INVALID") from None


def _event_from(output: Message | Log | ToolCall | ToolResult) -> EventDraft:
    at = now_ms()
    if isinstance(output, Message):
        return EventDraft(
            _known(EventRole, output.role), _storable(output.content), at, None, None, _json(output.metadata)
        )
    match output:
        case Log(content, level, log_type, metadata):
            log_type = None if log_type is None else _storable(log_type)
            level = _known(LogLevel, level)
            return EventDraft(EventRole.EXECUTION_LOG, _storable(content), at, log_type, level, _json(metadata))
        case ToolCall(name, arguments, call_id):
            name = _storable(name)
            metadata = {"name": name, "arguments": arguments} | ({"id": call_id} if call_id else {})
            return EventDraft(EventRole.EXECUTION_LOG, name, at, "tool_call", LogLevel.INFO, _json(metadata))
        case ToolResult(name, content, call_id, failed):
            metadata = {"name": _storable(name)} | ({"id": call_id} if call_id else {})
            level = LogLevel.ERROR if failed else LogLevel.SUCCESS
            return EventDraft(EventRole.EXECUTION_LOG, _storable(content), at, "tool_result", level, _json(metadata))
    assert_never(output)


def _storable(text: str) -> str:
    """Return the text with what UTF-8 or a database cannot hold (lone surrogates, NUL) as U+FFFD."""
    if text.isascii():
        return text.replace("\0", "\ufffd") if "\0" in text else text
    return text.replace("\0", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _json(metadata: Mapping[str, Any] | None) -> bytes | None:
    if metadata is None:
        return None
    try:
        return msgspec.json.encode(dict(metadata))
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        raise AgentError(f"The agent made an event whose metadata is no JSON object: {error}.") from error


def _utf8_bytes(event: EventDraft) -> int:
    return len(event.content.encode()) + len(event.metadata or b"")
