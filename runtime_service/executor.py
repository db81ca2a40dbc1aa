"""Owns the tasks that execute turns: admit, run, cancel, drain.

A run lives in a task of the executor, never in that of a request. The run table is the queue: a turn is stored as
running when there is room, as queued when there is not, and claimed later. Knows no gRPC.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable
from functools import partial
from typing import Any

import msgspec

from runtime_service.errors import (
    AgentUnavailable,
    CapacityExceeded,
    Draining,
    RunServiceError,
    StoreUnavailable,
)
from runtime_service.event_log import EventLog
from runtime_service.execution import Execution
from runtime_service.registry import Registry, Server
from runtime_service.runs import TERMINAL, LogLevel, Run, RunStatus
from runtime_service.store.base import (
    Change,
    NewRun,
    NewTurn,
    Outcome,
    RunStore,
    TurnKey,
    TurnLost,
    accepted_run,
    log_event,
)

log = logging.getLogger(__name__)

_CLAIM_BATCH = 64
_STORE_RETRY_SECONDS = 1.0
_ADMITTING_SECONDS = 10.0


class ExecutorLimits(msgspec.Struct, frozen=True):
    """`max_turns` run at once, `max_queued` wait. A cancelled agent has `cancel_grace_seconds` to end by itself."""

    max_turns: int = 1_024
    max_queued: int = 10_000
    max_attempts: int = 3
    cancel_grace_seconds: float = 5.0


class Executor:
    """Executes the turns of one store in this process."""

    def __init__(self, store: RunStore, event_log: EventLog, registry: Registry, limits: ExecutorLimits) -> None:
        self._store = store
        self._event_log = event_log
        self._registry = registry
        self._limits = limits
        self._executions: dict[str, Execution] = {}  # the newest of each run
        self._tasks: dict[Execution, asyncio.Task[None]] = {}  # until it has ended, or was given up
        self._occupied = 0  # running turns, and those that are being claimed
        self._queued: Counter[str] = Counter()  # turns that wait, by run
        self._queued_total = 0
        self._ready: set[str] = set()  # runs of which a turn waits for room only
        self._noted = 0  # how often a run became ready
        self._queueing = 0  # turns that are being stored as queued
        self._admitting: set[asyncio.Future[Any]] = set()
        self._claiming: asyncio.Task[None] | None = None
        self._draining = False

    async def start(self) -> None:
        """Settle what an earlier process left behind, then execute what waits."""
        changes = await self._store.recover(self._limits.max_attempts, self._may_repeat)
        lost = sum(1 for change in changes if change.run.status is RunStatus.FAILED)
        if changes:
            log.warning("recovered %d turns: %d queued again, %d failed", len(changes), len(changes) - lost, lost)
        self._queued.update(await self._store.queued_turns())
        self._queued_total = self._queued.total()
        for run_id in self._queued:  # nothing is running yet
            self._note_ready(run_id)
        self._claim_if_room()

    # Requests

    async def start_run(self, new: NewRun, server: Server) -> Change:
        """Accept a run and see to its execution. Raises AgentUnavailable, CapacityExceeded, Draining, RequestIdReused.

        Once accepted it is executed, whatever becomes of the caller's task.
        """
        try:
            claim = self._admit(server)
        except RunServiceError as refusal:
            return await self._requested(new, refusal)
        execution = None
        if claim and server.agent.begins_early:
            # What it writes comes behind the acceptance, often in the same commit.
            execution = self._begin(accepted_run(new, claim=True), server)
        return await self._accepted(self._store.start_run(new, claim=claim), claim, execution)

    async def continue_run(self, new: NewTurn, server: Server) -> Change:
        """Accept the next input of a run. As `start_run`, and raises RunNotFound."""
        try:
            claim = self._admit(server)
        except RunServiceError as refusal:
            return await self._requested(new, refusal)
        return await self._accepted(self._store.continue_run(new, claim=claim), claim)

    async def _requested(self, new: NewRun | NewTurn, refusal: RunServiceError) -> Change:
        """Answer a request that was accepted before; raise `refusal` where it was not."""
        if new.request_id is not None and (known := await self._store.get_requested(new)) is not None:
            return known
        raise refusal

    async def cancel_run(self, organization: str, server_id: str, run_id: str) -> Change:
        """Cancel every open turn of a run; returns once that is written down. Raises RunNotFound."""
        cancel = asyncio.ensure_future(self._cancel(organization, server_id, run_id))
        self._admitting.add(cancel)
        cancel.add_done_callback(self._admitting.discard)
        return await asyncio.shield(cancel)

    async def drain(self, grace_seconds: float) -> None:
        """Take no more work, give running turns the grace period, put the rest back into the queue."""
        self._draining = True
        if self._admitting:
            await asyncio.wait(self._admitting, timeout=_ADMITTING_SECONDS)
        if self._claiming is not None:
            await asyncio.wait([self._claiming])
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=grace_seconds)
        left = dict(self._tasks)
        for task in left.values():
            task.cancel()
        if left:
            await asyncio.wait(left.values(), timeout=self._limits.cancel_grace_seconds)
            log.info("%d turns go back to the queue", len(left))
            await asyncio.gather(*(execution.release() for execution in left))

    # Admission

    def _admit(self, server: Server) -> bool:
        """Return whether the turn is claimed at once; reserves its room if so."""
        if self._draining:
            raise Draining
        if (reason := server.agent.unavailable_reason()) is not None:
            raise AgentUnavailable(reason)
        if self._occupied < self._limits.max_turns and not self._ready:
            self._occupied += 1
            return True
        if self._queued_total + self._queueing >= self._limits.max_queued:
            raise CapacityExceeded(
                f"{self._queued_total} turns are waiting already; try again in a moment.",
                retry_after_seconds=1.0,
            )
        self._queueing += 1
        return False

    async def _accepted(self, write: Awaitable[Change], claim: bool, execution: Execution | None = None) -> Change:
        accepted = asyncio.ensure_future(write)
        self._admitting.add(accepted)
        # The caller waits for another future than the store's: its cancel is not the write's.
        told: asyncio.Future[Change] = asyncio.get_running_loop().create_future()
        accepted.add_done_callback(partial(self._on_accepted, claim, execution, told))
        return await told

    def _on_accepted(
        self,
        claim: bool,
        execution: Execution | None,
        told: asyncio.Future[Change],
        accepted: asyncio.Future[Change],
    ) -> None:
        """A turn was stored now, before, or not; `claim` says that room was reserved, `execution` is its early one."""
        self._admitting.discard(accepted)
        if not claim:
            self._queueing -= 1
        _pass_on(accepted, told)
        if accepted.cancelled() or accepted.exception() is not None or accepted.result().replayed:
            if execution is not None:
                execution.take_rest()
                self._end_agent(execution)
            elif claim:
                self._vacate()
            return
        change = accepted.result()
        if execution is not None:
            self._publish(change)
        elif change.run.status is RunStatus.RUNNING:
            self._launch(change)
        else:
            self._note_queued(change)
            if claim:
                self._vacate()
            else:
                self._claim_if_room()

    def _note_queued(self, change: Change) -> None:
        run = change.run
        self._queued[run.id] += 1
        self._queued_total += 1
        if run.turn.ready:
            self._note_ready(run.id)
        self._publish(change)

    def _note_ready(self, run_id: str) -> None:
        self._ready.add(run_id)
        self._noted += 1

    # Claiming

    def _vacate(self) -> None:
        self._occupied -= 1
        self._claim_if_room()

    def _claim_if_room(self) -> None:
        if self._claiming is None and self._ready and not self._draining:
            self._claiming = asyncio.create_task(self._claim())

    async def _claim(self) -> None:
        """Claim as long as there is room and something waits for it. What comes up meanwhile is seen here, too."""
        try:
            while self._ready and not self._draining:
                room = min(self._limits.max_turns - self._occupied, _CLAIM_BATCH)
                if room <= 0:
                    return
                noted = self._noted
                self._occupied += room
                changes: list[Change] = []
                try:
                    changes = await self._store.claim_turns(room)
                except StoreUnavailable:
                    await asyncio.sleep(_STORE_RETRY_SECONDS)
                    continue
                finally:
                    self._occupied -= room - len(changes)
                for change in changes:
                    self._ready.discard(change.run.id)
                    self._forget_queued(change.run.id, 1)
                    self._launch(change)
                if not changes and noted == self._noted:
                    return  # cancelled meanwhile; the cancel takes it off the list
        finally:
            self._claiming = None

    def _forget_queued(self, run_id: str, count: int) -> None:
        count = min(count, self._queued[run_id])
        self._queued_total -= count
        self._queued[run_id] -= count
        if not self._queued[run_id]:
            del self._queued[run_id]

    # Execution

    def _launch(self, change: Change) -> None:
        run = change.run
        server = self._registry.executor_of(run.server_id)
        if server is not None:
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
        settling = asyncio.ensure_future(execution.settle_outside(outcome))
        self._admitting.add(settling)
        settling.add_done_callback(self._admitting.discard)

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
        self._vacate()

    async def _fail_undeclared(self, change: Change) -> None:
        run = change.run
        error = f"The server {run.server_id!r} is not declared any more."
        outcome = Outcome(RunStatus.FAILED, error=error, error_code="SERVER_NOT_FOUND")
        key = TurnKey(run.id, run.turn.number, run.turn.epoch)
        while not self._draining:
            try:
                events = [log_event("error", LogLevel.ERROR, error)]
                self._publish(await self._store.finish_turn(key, events, outcome))
            except TurnLost:
                return
            except StoreUnavailable:
                await asyncio.sleep(_STORE_RETRY_SECONDS)
            else:
                return

    async def _cancel(self, organization: str, server_id: str, run_id: str) -> Change:
        execution = self._executions.get(run_id)
        if execution is not None and (execution.run.organization, execution.run.server_id) != (
            organization,
            server_id,
        ):
            execution = None
        events, output = execution.hold() if execution is not None else ([], None)
        try:
            change = await self._store.cancel_run(organization, server_id, run_id, events, output)
        except RunServiceError:
            if execution is not None:
                execution.resume()
            raise
        if not change.events:
            if execution is not None:
                execution.resume()
            return change
        self._ready.discard(run_id)
        self._forget_queued(run_id, self._queued[run_id])
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
            self._note_ready(change.run.id)
        self._event_log.publish(change)

    def _may_repeat(self, server_id: str) -> bool:
        server = self._registry.executor_of(server_id)
        return server is not None and server.agent.repeatable


def _pass_on(done: asyncio.Future[Change], told: asyncio.Future[Change]) -> None:
    """Give a result to one who waits for it, if he still does."""
    if told.done():
        return
    if done.cancelled():
        told.cancel()
    elif (error := done.exception()) is not None:
        told.set_exception(error)
    else:
        told.set_result(done.result())
