"""RunService: protobuf in, protobuf out. Policy is in the executor, rules in `validation`."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
import msgspec

from protos.acp.runs.v1 import run_pb2 as pb
from protos.acp.runs.v1 import run_service_pb2 as rpc
from protos.acp.runs.v1 import run_service_pb2_grpc
from runtime_service.convert import (
    event_message,
    run_message,
    run_mode,
    run_status,
    thread_message,
    update_message,
)
from runtime_service.errors import InvalidRequest
from runtime_service.event_log import BATCH_BYTES, BATCH_EVENTS, EventLog, FollowOptions, Update
from runtime_service.executor import Executor
from runtime_service.registry import Registry, Server
from runtime_service.runs import TERMINAL, Run, RunMode, RunStatus, new_run_id, now_ms
from runtime_service.store.base import Change, NewRun, NewTurn, RunStore
from runtime_service.validation import RequestLimits, checked_input, checked_metadata, checked_title

_MAX_PAGE = 200
_DEFAULT_PAGE = 50

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class RunService(run_service_pb2_grpc.RunServiceServicer):
    """The plain RPCs; see run_service.proto."""

    def __init__(
        self,
        store: RunStore,
        executor: Executor,
        event_log: EventLog,
        registry: Registry,
        limits: RequestLimits,
    ) -> None:
        self._store = store
        self._executor = executor
        self._event_log = event_log
        self._registry = registry
        self._limits = limits

    # The streaming ones write to their context, which costs less than being iterated over.

    async def StartRun(self, request: rpc.StartRunRequest, context: _Context) -> None:  # type: ignore[override]
        """Accept a run; in mode sync follow its first turn."""
        server = self._server(request.server, context)
        new = NewRun(
            id=new_run_id(),
            organization=server.organization,
            server_id=server.id,
            input=checked_input(request.input, self._limits),
            mode=run_mode(request.mode),
            created_at_ms=now_ms(),
            title=checked_title(request.title, self._limits),
            metadata=checked_metadata(request.metadata_json, self._limits),
        )
        options = _turn_options(request.stream)
        with self._event_log.held(new.id):
            change = await self._executor.start_run(new, server)
            updates = self._follow_turn(change, new.mode, options, collect=request.stream.collect)
            await _send(context, rpc.StartRunResponse, change.run, updates, server)

    async def ContinueRun(  # type: ignore[override]
        self, request: rpc.ContinueRunRequest, context: _Context
    ) -> None:
        """Open a run's next turn; in mode sync follow it."""
        server = self._server(request.server, context)
        new = NewTurn(
            organization=server.organization,
            server_id=server.id,
            run_id=request.run_id,
            input=checked_input(request.input, self._limits),
            mode=run_mode(request.mode),
            created_at_ms=now_ms(),
            metadata=checked_metadata(request.metadata_json, self._limits),
        )
        options = _turn_options(request.stream)
        with self._event_log.held(new.run_id):
            change = await self._executor.continue_run(new, server)
            updates = self._follow_turn(change, new.mode, options, collect=request.stream.collect)
            await _send(context, rpc.ContinueRunResponse, change.run, updates, server)

    async def WatchRun(self, request: rpc.WatchRunRequest, context: _Context) -> None:  # type: ignore[override]
        """Replay after a sequence, then follow."""
        server = self._server(request.server, context)
        run = await self._run(server, request.run_id)
        if not 0 <= request.turn <= run.last_turn:
            raise InvalidRequest("turn", f"must be a turn of the run: 1 to {run.last_turn}")
        options = FollowOptions(
            turn=request.turn or None,
            deltas=request.stream.deltas,
            wait_seconds=_wait_seconds(request.stream.wait_ms, "stream.wait_ms"),
        )
        after = _checked_after(request.after_sequence)
        updates = self._event_log.follow(run, after, options)
        await _send(context, rpc.WatchRunResponse, run, updates, server)

    async def GetRun(self, request: rpc.GetRunRequest, context: _Context) -> rpc.GetRunResponse:
        """Return one run."""
        server = self._server(request.server, context)
        run = await self._run(server, request.run_id)
        return rpc.GetRunResponse(run=run_message(run, server.agent.session_protocol), thread=thread_message(run))

    async def ListRuns(self, request: rpc.ListRunsRequest, context: _Context) -> rpc.ListRunsResponse:
        """Return a page of runs, newest first."""
        server = self._server(request.server, context)
        page = await self._store.list_runs(
            server.organization,
            server.id,
            status=_checked_status(request.status),
            token=request.page_token or None,
            limit=_page_size(request.page_size, _DEFAULT_PAGE, _MAX_PAGE),
        )
        return rpc.ListRunsResponse(
            runs=[run_message(run, server.agent.session_protocol) for run in page.runs],
            threads=[thread_message(run) for run in page.runs],
            next_page_token=page.next_token or "",
            agent_runtime_id=server.id,
        )

    async def ListRunEvents(self, request: rpc.ListRunEventsRequest, context: _Context) -> rpc.ListRunEventsResponse:
        """Return a page of a run's log."""
        server = self._server(request.server, context)
        after = _checked_after(request.after_sequence)
        wait_seconds = _wait_seconds(request.wait_ms, "wait_ms")
        limit = _page_size(request.page_size, BATCH_EVENTS, BATCH_EVENTS)
        run = await self._run(server, request.run_id)
        if wait_seconds is not None and after >= run.last_sequence and run.status not in TERMINAL:
            run = await self._wait_for_event(run, after, wait_seconds)
        events = await self._store.read_events(run.id, after, limit, BATCH_BYTES)
        # The page must not show more than the run that it comes with.
        events = [event for event in events if event.sequence <= run.last_sequence]
        return rpc.ListRunEventsResponse(
            run=run_message(run, server.agent.session_protocol),
            thread=thread_message(run),
            events=[event_message(run, event) for event in events],
            has_more=(events[-1].sequence if events else after) < run.last_sequence,
        )

    async def CancelRun(self, request: rpc.CancelRunRequest, context: _Context) -> rpc.CancelRunResponse:
        """Cancel every open turn of a run."""
        server = self._server(request.server, context)
        change = await self._executor.cancel_run(server.organization, server.id, request.run_id)
        return rpc.CancelRunResponse(
            run=run_message(change.run, server.agent.session_protocol),
            thread=thread_message(change.run),
            events=[event_message(change.run, event) for event in change.events],
        )

    def _follow_turn(
        self, change: Change, mode: RunMode, options: FollowOptions, *, collect: bool
    ) -> AsyncGenerator[Update]:
        """Follow the turn that was accepted, from its user event on; in mode async tell of its acceptance only."""
        if mode is RunMode.ASYNC:
            return _accepted(change)
        run = change.run
        if collect:
            return self._event_log.collect(run, options.wait_seconds)
        options = msgspec.structs.replace(options, turn=run.turn.number)
        return self._event_log.follow(run, run.turn.first_sequence - 1, options)

    async def _run(self, server: Server, run_id: str) -> Run:
        return await self._store.get_run(server.organization, server.id, run_id)

    async def _wait_for_event(self, run: Run, after: int, wait_seconds: float) -> Run:
        options = FollowOptions(wait_seconds=wait_seconds)
        async with aclosing(self._event_log.follow(run, after, options)) as updates:
            async for update in updates:
                if update.events:
                    break
        return await self._store.get_run(run.organization, run.server_id, run.id)

    def _server(self, reference: rpc.ServerReference, context: _Context) -> Server:
        return self._registry.resolve(_organization(context), reference.id, connected=reference.connected)


async def _accepted(change: Change) -> AsyncGenerator[Update]:
    # As it was accepted, queued or running, also when it has ended since.
    yield Update(change.run, change.events)


async def _send(
    context: _Context, response: Callable[..., Any], run: Run, updates: AsyncGenerator[Update], server: Server
) -> None:
    """Write the updates of a run, each in a `response`."""
    async with aclosing(updates):
        async for update in updates:
            message = update_message(run, update, server.agent.session_protocol)
            await context.write(response(update=message))


def _turn_options(stream: rpc.StreamOptions) -> FollowOptions:
    return FollowOptions(
        deltas=stream.deltas,
        wait_seconds=_wait_seconds(stream.wait_ms, "stream.wait_ms"),
    )


def _organization(context: _Context) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == "x-acp-organization":
            return value if isinstance(value, str) else value.decode("ascii", "replace")
    raise InvalidRequest("x-acp-organization", "must be set in the metadata of the call")


def _page_size(asked: int, default: int, most: int) -> int:
    if asked < 0:
        raise InvalidRequest("page_size", "must not be negative")
    return min(asked or default, most)


def _checked_status(status: "pb.RunStatus.ValueType") -> RunStatus | None:
    known = run_status(status)
    if known is None and status != pb.RUN_STATUS_UNSPECIFIED:
        raise InvalidRequest("status", "is not a status that is known here")
    return known


def _checked_after(sequence: int) -> int:
    if sequence < 0:
        raise InvalidRequest("after_sequence", "must not be negative")
    return sequence


def _wait_seconds(wait_ms: int, field: str) -> float | None:
    if wait_ms < 0:
        raise InvalidRequest(field, "must not be negative")
    return wait_ms / 1000 if wait_ms else None
