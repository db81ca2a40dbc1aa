"""One turn being executed: what its agent says is stored, and its end becomes an outcome.

Whatever the agent says while a commit is under way goes into the next one; its draft is kept every second.

Knows agents, the store and the event log; not who started it.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec

from runtime_service.agent_events import storable
from runtime_service.agents import AgentError, AgentOutput, AgentSays, Answer, Delta, Message, Option, TurnContext
from runtime_service.asking import Asked, Asking
from runtime_service.errors import StoreUnavailable
from runtime_service.live_run import LiveRun
from runtime_service.registry import Server
from runtime_service.runs import EventDraft, LogLevel, Run, RunStatus
from runtime_service.speech import Speech
from runtime_service.store.base import RETRY_SECONDS, Change, Outcome, RunStore, TurnKey, TurnLost, log_event
from runtime_service.surroundings import TurnSurroundings

log = logging.getLogger(__name__)

_MAX_ERROR_CHARACTERS = 10_000
_MAX_UNSTORED_OUTPUTS = 500
_MAX_PENDING_BYTES = 1 << 20
_YIELD_SECONDS = 0.001
_DRAFT_SECONDS = 1.0


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
        self._publish = publish
        self._loop = asyncio.get_running_loop()
        self._live = live
        self._speech = Speech(live, run.last_sequence)
        self._asking: Asking | None = None  # once the agent has asked: few do
        self._step_planned = False
        self._held = 0
        self._unheld: asyncio.Future[None] | None = None
        self._task: asyncio.Task[Any] | None = None  # while the agent runs
        self._context: TurnContext | None = None
        self._expired = False
        self._settling = False
        self._flushing: asyncio.Task[None] | None = None
        self._draft_timer: asyncio.TimerHandle | None = None
        self._draft_saving: asyncio.Task[None] | None = None
        self._lost = False

    # What the executor calls

    async def execute(self) -> None:
        """Run the agent to its end and settle the turn. Cancelled, it leaves the turn as it is in the store."""
        try:
            outcome = await self._run_agent()
            await self._settle(outcome)
        except TurnLost:
            self._live.doubt()
            log.info("turn %s of %s was settled or claimed elsewhere", self.run.turn.number, self.run.id)
        finally:
            self._lost = True
            self._stop_asking()
            if self._draft_timer is not None:
                self._draft_timer.cancel()

    @property
    def is_over(self) -> bool:
        """Whether the agent is not listened to any more."""
        return self._lost

    def log_grew(self, last_sequence: int) -> None:
        """Learn the newest sequence of the run's log."""
        self._speech.log_grew(last_sequence)

    def look_for_answer(self) -> None:
        """Learn that the question that this turn asks may have been answered."""
        if self._asking is not None:
            self._asking.look()

    def leave_to_others(self) -> None:
        """Learn that the turn is about to be cancelled here, to be executed by whoever is next."""
        if self._context is not None:
            self._context.goes_on = self._server.may_repeat

    def hold(self) -> tuple[list[EventDraft], str | None]:
        """Begin no write until `resume` or `take_rest`; return what is not stored yet, and the output so far."""
        self._held += 1
        self._read_pieces()
        return self._speech.rest()

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
        self._stop_asking()
        self._wake_held()
        return self._speech.take_all()

    async def release(self) -> None:
        """Put the turn back into the queue, or fail it where it may not be repeated; its task has ended.

        Without a store it is left to the next recovery.
        """
        self._settling = True
        if self._flushing is not None:
            await asyncio.wait([self._flushing])
        try:
            if self._server.may_repeat:
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
                await asyncio.sleep(RETRY_SECONDS)
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
        context = self._context = TurnContext(
            input=run.turn.input,
            metadata=json.loads(run.turn.metadata) if run.turn.metadata else {},
            run_id=run.id,
            thread_id=run.thread_id,
            server_id=run.server_id,
            turn=run.turn.number,
            attempt=run.turn.attempt,
            surroundings=TurnSurroundings(run, self._store, server.questions, self._add, self._ask),
        )
        self._task = asyncio.current_task()
        try:
            await self._listen(server.agent.run(context))
        except AgentError as error:
            message = storable(str(error.message))[:_MAX_ERROR_CHARACTERS]
            return Outcome(RunStatus.FAILED, error=message, error_code=storable(str(error.code)))
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
            self._task = self._context = None
        return Outcome(RunStatus.COMPLETED)

    async def _listen(self, agent: AsyncGenerator[AgentSays]) -> None:
        """Take what the agent says, to its end."""
        speech = self._speech
        pieces = speech.pieces
        left = _MAX_UNSTORED_OUTPUTS
        try:
            async for outputs in agent:
                if not isinstance(outputs, tuple):
                    outputs = (outputs,)
                for output in outputs:
                    # Behind another piece of this step, a piece needs no look: all are read at the step's end.
                    if pieces and output.__class__ is Delta:
                        pieces.append(output)
                    else:
                        self._add(output)
                        if speech.pending_bytes >= _MAX_PENDING_BYTES:
                            left = 1
                    left -= 1
                    if not left:
                        # Also keeps an agent that never awaits from keeping the others from running.
                        left = _MAX_UNSTORED_OUTPUTS
                        await self._drain()
        finally:
            await agent.aclose()
        self._read_pieces()
        if speech.refused is not None:
            raise speech.refused
        if speech.draft is not None:
            # An agent that only streams: the end of the turn is the end of its message.
            self._add(Message(speech.draft.text))

    async def _ask(
        self, question: str, options: Sequence[Option], tool_kind: str | None, metadata: Mapping[str, Any] | None
    ) -> Answer:
        if self._asking is None:
            settings = self._server.questions
            self._asking = Asking(self.run, settings, self._store, self._begin_flush, self._publish)
            if self._lost:
                self._asking.close()
        return await self._asking.ask(question, options, tool_kind, metadata)

    def _stop_asking(self) -> None:
        if self._asking is not None:
            self._asking.close()

    def _add(self, output: AgentOutput) -> None:
        if self._lost:
            raise TurnLost
        if not self._step_planned:
            # Not at once: what the agent says without awaiting shares a commit, its end included.
            self._step_planned = True
            self._loop.call_soon(self._end_step)
        self._speech.add(output)

    def _end_step(self) -> None:
        """See to what the agent has said until it awaited something."""
        self._step_planned = False
        self._read_pieces()
        self._begin_flush()

    def _read_pieces(self) -> None:
        speech = self._speech
        if speech.pieces:
            speech.read_pieces()
            if speech.draft is not None and self._draft_timer is None:
                self._draft_timer = self._loop.call_later(_DRAFT_SECONDS, self._save_draft)

    # The store

    def _save_draft(self) -> None:
        speech = self._speech
        draft = speech.draft
        # A message that is stored takes the place of the draft: those that came before this one go first.
        busy = bool(speech.pending or speech.in_flight)
        again_seconds = _DRAFT_SECONDS / 10 if busy and draft is not None else _DRAFT_SECONDS
        self._draft_timer = self._loop.call_later(again_seconds, self._save_draft)
        idle = not busy and (self._draft_saving is None or self._draft_saving.done())
        if draft is not None and len(draft.parts) > speech.saved_parts and idle:
            speech.saved_parts = len(draft.parts)
            self._draft_saving = self._loop.create_task(self._write_draft(draft.text))

    async def _write_draft(self, text: str) -> None:
        try:
            await self._store.save_draft(self._key, text)
        except StoreUnavailable:
            self._speech.saved_parts = 0

    def _begin_flush(self) -> None:
        if self._is_to_store and self._flushing is None and self._may_flush():
            self._flushing = asyncio.create_task(self._flush())

    @property
    def _is_to_store(self) -> bool:
        return bool(self._speech.pending) or (self._asking is not None and self._asking.waits_to_be_stored)

    def _may_flush(self) -> bool:
        return not (self._lost or self._held or self._settling)

    async def _flush(self) -> None:
        """Store what is pending until nothing is; one commit is under way at a time."""
        speech = self._speech
        try:
            while self._is_to_store and self._may_flush():
                self._read_pieces()
                events = speech.send_pending()
                asking = self._asking
                asked = None if asking is None else asking.take()
                try:
                    change = await self._write(events, asked)
                except StoreUnavailable:
                    speech.not_stored(events)
                    if asking is not None and asked is not None:
                        asking.put_back(asked)
                    await asyncio.sleep(RETRY_SECONDS)
                    continue
                speech.stored()
                self._publish(change)
                if asking is not None and asked is not None:
                    asking.stored(asked, change.events[-1].sequence)
        except TurnLost:
            if not self._lost:
                # Another process has taken the turn: the agent need not be at work until it says more.
                self._lost = True
                self._stop_asking()
                self._live.doubt()
                if self._task is not None:
                    self._task.cancel()
        finally:
            self._flushing = None

    def _write(self, events: list[EventDraft], asked: Asked | None) -> Awaitable[Change]:
        if asked is None:
            return self._store.append_events(self._key, events)
        return self._store.ask_question(self._key, [*events, asked.event], asked.choices)

    async def _drain(self) -> None:
        """Wait until what was pending is stored; let others run."""
        self._read_pieces()
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
            if self._unheld is None or self._unheld.done():  # who waited for it was cancelled
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
        if self._flushing is not None and self._speech.in_flight:
            await asyncio.wait([self._flushing])
        events, last = self._speech.take_all()
        if outcome.error is not None:
            events.append(log_event("error", LogLevel.ERROR, outcome.error))
        outcome = msgspec.structs.replace(outcome, output=last)
        while True:
            await self._until_unheld()
            try:
                change = await self._store.finish_turn(self._key, events, outcome)
                break
            except StoreUnavailable:
                await asyncio.sleep(RETRY_SECONDS)
        self._publish(change)
