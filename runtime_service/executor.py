"""Owns the tasks that execute turns: admit, run, cancel, drain.

A run lives in a task of the executor, never in that of a request. The run table is the queue: a turn is stored as
running when there is room, as queued when there is not, and claimed later, by any process of the store. What is
executed here is held by a lease, which is renewed; what others held and lost is settled in a sweep. Knows no gRPC.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import msgspec

from runtime_service.admission import Admission
from runtime_service.errands import PATIENCE_SECONDS, Errands, repeat
from runtime_service.errors import AgentUnavailable, CapacityExceeded, Draining, RunServiceError, StoreUnavailable
from runtime_service.event_log import EventLog
from runtime_service.execution import Execution
from runtime_service.questions import answer_event
from runtime_service.registry import Registry, Server
from runtime_service.runs import TERMINAL, LogLevel, Question, Run, RunStatus
from runtime_service.store.base import (
    RETRY_SECONDS,
    Cancel,
    Change,
    NewAnswer,
    NewRun,
    NewTurn,
    Outcome,
    QuestionOpen,
    RunStore,
    TurnKey,
    TurnLost,
    accepted_run,
    log_event,
)

log = logging.getLogger(__name__)

_ADMITTING_SECONDS = 10.0


class ExecutorLimits(msgspec.Struct, frozen=True):
    """`max_turns` run at once here, about `max_queued` wait. A cancelled agent has `cancel_grace_seconds` to end.

    What is held is renewed every `heartbeat_seconds`, what others have lost is looked for every `sweep_seconds`.
    """

    max_turns: int = 1_024
    max_queued: int = 10_000
    max_attempts: int = 3
    cancel_grace_seconds: float = 5.0
    heartbeat_seconds: float = 10.0
    sweep_seconds: float = 15.0


class Executor:
    """Executes the turns of one store in this process."""

    def __init__(self, store: RunStore, event_log: EventLog, registry: Registry, limits: ExecutorLimits) -> None:
        self._store = store
        self._event_log = event_log
        self._registry = registry
        self._limits = limits
        self._executions: dict[str, Execution] = {}  # the newest of each run
        self._tasks: dict[Execution, asyncio.Task[None]] = {}  # until it has ended, or was given up
        self._admission = Admission(store, limits.max_turns, limits.max_queued, self._launch)
        self._errands = Errands()
        self._keeping: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Settle what is lost, then execute what waits, and go on so until `drain`."""
        self._store.listen(self)
        await self._sweep()
        limits = self._limits
        self._keeping = [
            asyncio.create_task(repeat(seconds, act))
            for seconds, act in (
                (limits.heartbeat_seconds, self._store.renew),
                (limits.sweep_seconds, self._sweep),
                (PATIENCE_SECONDS / 5, self._errands.stop_waiting),
            )
        ]

    async def _sweep(self) -> None:
        changes = await self._store.recover(self._limits.max_attempts, self._may_repeat)
        if changes:
            lost = sum(1 for change in changes if change.run.status is RunStatus.FAILED)
            log.warning("recovered %d turns: %d queued again, %d failed", len(changes), len(changes) - lost, lost)
        for change in changes:
            self._event_log.doubt(change.run.id)
        await self._admission.recount()

    # Requests

    async def start_run(self, new: NewRun, server: Server) -> Change:
        """Accept a run and see to its execution. Raises AgentUnavailable, CapacityExceeded, Draining, RequestIdReused.

        Once accepted it is executed, whatever becomes of the caller's task.
        """
        return await self._accept(new, server, self._store.start_run)

    async def continue_run(self, new: NewTurn, server: Server) -> Change:
        """Accept the next input of a run: its next turn, or the answer to the question that it asks.

        As `start_run`, and raises RunNotFound, QuestionAnswered, and InvalidRequest for what is no answer.
        """
        try:
            return await self._accept(new, server, self._store.continue_run)
        except QuestionOpen as asked:
            return await self._answer(asked.question, new)
        except (AgentUnavailable, CapacityExceeded):
            # An answer needs neither room nor another agent.
            run = await self._store.get_run(new.organization, new.server_id, new.run_id)
            if run.question is None or not run.is_asking:
                raise
            return await self._answer(run.question, new)

    async def _answer(self, question: Question, new: NewTurn) -> Change:
        event = answer_event(question, new)
        answer = NewAnswer(new.organization, new.server_id, new.run_id, question.sequence, event, new.request)
        write = asyncio.ensure_future(self._store.answer_question(answer))
        return await self._errands.told(write, self._on_answered)

    def _on_answered(self, answered: asyncio.Future[Change]) -> None:
        if not answered.cancelled() and answered.exception() is None:
            change = answered.result()
            self._publish(change)
            if (execution := self._executions.get(change.run.id)) is not None:
                execution.look_for_answer()

    async def _accept(self, new: NewRun | NewTurn, server: Server, store: Callable[..., Awaitable[Change]]) -> Change:
        try:
            claim = self._admit(server)
        except RunServiceError as refusal:
            if (known := await self._requested(new, refusal)) is not None:
                return known
            claim = self._admit(server)
        execution = None
        if claim and server.agent.begins_early and isinstance(new, NewRun):
            # What it writes comes behind the acceptance, often in the same commit.
            execution = self._begin(accepted_run(new, claim=True), server)
        write = asyncio.ensure_future(store(new, claim=claim))
        return await self._errands.told(write, partial(self._on_accepted, claim, execution))

    async def _requested(self, new: NewRun | NewTurn, refusal: RunServiceError) -> Change | None:
        """Answer a request that was accepted before; else raise `refusal`, unless there may be room by now."""
        if new.request is not None and (known := await self._store.get_requested(new)) is not None:
            return known
        if not isinstance(refusal, CapacityExceeded) or not await self._admission.count():
            raise refusal
        return None

    def executes(self, run_id: str) -> bool:
        """Return whether a turn of the run is executed here."""
        return run_id in self._executions

    async def cancel_run(self, cancel: Cancel) -> Change:
        """Cancel every open turn of a run; returns once that is written down. Raises RunNotFound, RequestIdReused."""
        return await self._errands.told(asyncio.ensure_future(self._cancel(cancel)))

    async def drain(self, grace_seconds: float) -> None:
        """Take no more work, give running turns the grace period, put the rest back into the queue."""
        self._admission.close()
        for task in self._keeping[1:]:
            task.cancel()
        claiming = self._admission.claiming
        if asked := self._errands.under_way | ({claiming} if claiming is not None else set()):
            await asyncio.wait(asked, timeout=_ADMITTING_SECONDS)
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=grace_seconds)
        left = dict(self._tasks)
        for execution, task in left.items():
            execution.leave_to_others()
            task.cancel()
        if left:
            await asyncio.wait(left.values(), timeout=self._limits.cancel_grace_seconds)
            log.info("%d turns go back to the queue", len(left))
            # A store that is away takes nothing back: who sweeps behind it does.
            releasing = [asyncio.create_task(execution.release()) for execution in left]
            await asyncio.wait(releasing, timeout=PATIENCE_SECONDS)
        for task in self._keeping:
            task.cancel()

    # Admission

    def _admit(self, server: Server) -> bool:
        """Return whether the turn is claimed at once; reserves its room if so."""
        if self._admission.is_closed:
            raise Draining
        if (reason := server.agent.unavailable_reason()) is not None:
            raise AgentUnavailable(reason)
        return self._admission.reserve()

    def _on_accepted(self, claim: bool, execution: Execution | None, accepted: asyncio.Future[Change]) -> None:
        """A turn was stored now, before, or not; `claim` says that room was reserved, `execution` is its early one."""
        if not claim:
            self._admission.leave_queue()
        if accepted.cancelled() or accepted.exception() is not None or accepted.result().replayed:
            if execution is not None:
                execution.take_rest()
                self._end_agent(execution)
            elif claim:
                self._admission.vacate()
            return
        change = accepted.result()
        if execution is not None:
            self._publish(change)
            if execution.is_over:
                # The lease was lost while the turn was being stored. It is held under the next one: by nobody, now.
                self._errands.see_to(self._give_back(execution))
        elif change.run.status is RunStatus.RUNNING:
            self._launch(change)
        else:
            self._admission.note_queued(ready=change.run.turn.ready)
            self._publish(change)
            if claim:
                self._admission.vacate()
            else:
                self._admission.claim_if_room()

    async def _give_back(self, execution: Execution) -> None:
        """Put a turn of which the execution was ended back into the queue."""
        if (task := self._tasks.get(execution)) is not None:
            await asyncio.wait([task], timeout=self._limits.cancel_grace_seconds)
        await execution.release()
        self.turns_wait()

    # What other processes do

    def turns_wait(self) -> None:
        """A turn waits that may be claimed."""
        self._admission.claim_ready()

    def runs_changed(self, run_ids: Sequence[str]) -> None:
        """Another process wrote to these runs; to any, where none is named."""
        if not run_ids:
            self._event_log.doubt_all(but=self._executions)
        for run_id in run_ids:
            self._event_log.doubt(run_id)
            if (execution := self._executions.get(run_id)) is not None:
                self._errands.see_to(self._check(execution))

    async def _check(self, execution: Execution) -> None:
        """Look whether a turn is still to be executed here, and how far its log has grown."""
        run = execution.run
        try:
            now = await self._store.get_run(run.organization, run.server_id, run.id, run.turn.number)
        except RunServiceError:
            return  # whoever took the turn away is known at its next write
        if now.turn.epoch == run.turn.epoch:
            execution.log_grew(now.last_sequence)
            execution.look_for_answer()
        else:
            if now.turn.status not in TERMINAL:
                execution.leave_to_others()
            self._lose(execution)

    def held_lost(self) -> None:
        """What is executed here was not renewed in time: other processes execute it."""
        log.error("the lease was lost: %d turns are left to others", len(self._executions))
        for execution in list(self._executions.values()):
            execution.leave_to_others()
            self._lose(execution)

    def _lose(self, execution: Execution) -> None:
        execution.take_rest()
        self._end_agent(execution)
        self._event_log.doubt(execution.run.id)

    # Execution

    def _launch(self, change: Change) -> None:
        run = change.run
        server = self._registry.executor_of(run.server_id)
        if run.status is not RunStatus.RUNNING:
            # Others have cancelled it before it was known that it is claimed.
            self._publish(change)
            self._admission.vacate()
        elif server is not None:
            self._begin(run, server)
            self._publish(change)
        else:
            self._event_log.hold(run.id)
            self._publish(change)
            failing = asyncio.ensure_future(self._fail_undeclared(change))
            failing.add_done_callback(lambda _: self._free_room(run.id))

    def _begin(self, run: Run, server: Server) -> Execution:
        live = self._event_log.hold(run.id)
        execution = Execution(run, server, self._store, live, self._publish)
        self._executions[run.id] = execution
        task = self._tasks[execution] = asyncio.create_task(execution.execute())
        limit = asyncio.get_running_loop().call_later(server.turn_timeout_seconds, self._on_limit, execution, task)
        task.add_done_callback(partial(self._on_end, execution, limit))
        return execution

    def _on_end(self, execution: Execution, limit: asyncio.TimerHandle, task: asyncio.Task[None]) -> None:
        limit.cancel()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._settle_outside(execution, execution.unexpected(error))
        self._forget(execution)

    def _on_limit(self, execution: Execution, task: asyncio.Task[None]) -> None:
        execution.expire()
        # An agent that its turn's limit does not end loses the turn all the same.
        grace = self._limits.cancel_grace_seconds
        overdue = asyncio.get_running_loop().call_later(grace, self._on_overdue, execution)
        task.add_done_callback(lambda _: overdue.cancel())

    def _on_overdue(self, execution: Execution) -> None:
        self._settle_outside(execution, execution.timed_out())
        self._end_agent(execution)

    def _settle_outside(self, execution: Execution, outcome: Outcome) -> None:
        self._errands.see_to(execution.settle_outside(outcome))

    def _forget(self, execution: Execution) -> None:
        """Free the room of an execution, once: when it has ended or was given up."""
        if self._tasks.pop(execution, None) is None:
            return
        run_id = execution.run.id
        if self._executions.get(run_id) is execution:
            del self._executions[run_id]
        self._free_room(run_id)

    def _free_room(self, run_id: str) -> None:
        self._event_log.let_go(run_id)
        self._admission.vacate()

    async def _fail_undeclared(self, change: Change) -> None:
        run = change.run
        error = f"The server {run.server_id!r} is not declared any more."
        outcome = Outcome(RunStatus.FAILED, error=error, error_code="SERVER_NOT_FOUND")
        key = TurnKey(run.id, run.turn.number, run.turn.epoch)
        while not self._admission.is_closed:
            try:
                events = [log_event("error", LogLevel.ERROR, error)]
                self._publish(await self._store.finish_turn(key, events, outcome))
            except TurnLost:
                return
            except StoreUnavailable:
                await asyncio.sleep(RETRY_SECONDS)
            else:
                return

    async def _cancel(self, cancel: Cancel) -> Change:
        run_id = cancel.run_id
        execution = self._executions.get(run_id)
        if execution is not None and (execution.run.organization, execution.run.server_id) != (
            cancel.organization,
            cancel.server_id,
        ):
            execution = None
        events, output = execution.hold() if execution is not None else ([], None)
        try:
            change = await self._store.cancel_run(cancel, events, output)
        except RunServiceError:
            if execution is not None:
                execution.resume()
            raise
        if not change.events:
            if execution is not None:
                execution.resume()
            return change
        self._admission.forget_count()
        # One that was claimed while the cancel was on its way, too; but not one that came behind it.
        ended = {execution, self._executions.get(run_id)}
        settled = [e for e in ended if e is not None and e.run.turn.number <= change.run.last_turn]
        for execution in settled:
            execution.take_rest()
        self._event_log.publish_settled(change)
        for execution in settled:
            self._end_agent(execution)
        return change

    def _end_agent(self, execution: Execution) -> None:
        """Cancel the agent of a settled turn; when it does not end in time, do without."""
        task = self._tasks.get(execution)
        if task is not None:
            task.cancel()
            grace = self._limits.cancel_grace_seconds
            giving_up = asyncio.get_running_loop().call_later(grace, self._give_up, execution)
            task.add_done_callback(lambda _: giving_up.cancel())

    def _give_up(self, execution: Execution) -> None:
        log.warning("the agent of %s did not end after its cancel; it is left behind", execution.run.id)
        self._forget(execution)

    def _publish(self, change: Change) -> None:
        execution = self._executions.get(change.run.id)
        if execution is not None:
            execution.log_grew(change.run.last_sequence)
        if change.run.status in TERMINAL and change.run.turn.number < change.run.last_turn:
            self._admission.note_ready()
        self._event_log.publish(change)

    def _may_repeat(self, server_id: str) -> bool:
        server = self._registry.executor_of(server_id)
        return server is not None and server.may_repeat
