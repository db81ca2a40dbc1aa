"""The operations of RunService for one caller's organization, whichever door they come through.

Requests are the contract's messages, answers too; what a run goes through is sent as `RunNews`, which a door
puts into its own messages. Policy is in the executor, rules in `validation`. Knows no gRPC call.
"""

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import NamedTuple, TypeAlias

from msgspec.structs import replace

from protos.acp.runs.v1 import run_pb2 as pb
from protos.acp.runs.v1 import run_service_pb2 as rpc
from runtime_service.convert import add_events, fill_run, fill_state, fill_thread, fill_update, run_mode, run_status
from runtime_service.errors import InvalidRequest
from runtime_service.event_log import EventLog, FollowOptions
from runtime_service.executor import Executor
from runtime_service.live_run import Update
from runtime_service.peers import Peers
from runtime_service.registry import Registry, Server
from runtime_service.runs import TERMINAL, Run, RunMode, RunStatus, new_run_id, now_ms
from runtime_service.store.base import PERMISSION_RESPONSE, Cancel, Change, NewRun, NewTurn, RunStore
from runtime_service.validation import RequestLimits, checked_input, checked_metadata, checked_request, checked_title

_MAX_PAGE = 200
_DEFAULT_PAGE = 50
_PAGE_EVENTS = 1_000
_PAGE_BYTES = 1 << 20


class RunNews(NamedTuple):
    """An update of a run; `run` names the run, in whatever state it was read."""

    run: Run
    update: Update
    session_protocol: str
    replayed: bool = False

    def fill(self, message: rpc.RunUpdate) -> None:
        """Put it into a message, in place: a message that is put into another is copied."""
        fill_update(message, self.run, self.update, self.session_protocol)
        if self.replayed:
            message.replayed = True


# Takes what a run goes through; returns once the next may come.
Send: TypeAlias = Callable[[RunNews], Awaitable[None]]


class Operations:
    """See run_service.proto. Every method may raise RunServiceError; those of turns end when all is sent."""

    def __init__(
        self,
        store: RunStore,
        executor: Executor,
        event_log: EventLog,
        registry: Registry,
        peers: Peers,
        limits: RequestLimits,
    ) -> None:
        self._store = store
        self._executor = executor
        self._event_log = event_log
        self._registry = registry
        self._peers = peers
        self._limits = limits

    async def start_run(self, organization: str, request: rpc.StartRunRequest, send: Send) -> None:
        """Accept a run; in mode sync follow its first turn."""
        server = self._server(organization, request.server)
        text = checked_input(request.input, self._limits)
        title = checked_title(request.title, self._limits)
        metadata = checked_metadata(request.metadata_json, self._limits)
        new = NewRun(
            id=new_run_id(),
            organization=server.organization,
            server_id=server.id,
            input=text,
            mode=run_mode(request.mode),
            created_at_ms=now_ms(),
            title=title,
            metadata=metadata,
            request=checked_request(
                request.request_id, request.request_digest, "start", server.id, text, title, metadata
            ),
        )
        wait_seconds = _wait_seconds(request.stream.wait_ms, "stream.wait_ms")
        with self._event_log.held(new.id):
            change = await self._executor.start_run(new, server)
            await self._follow_turn(change, server, new.mode, request.stream, wait_seconds, send)

    async def continue_run(self, organization: str, request: rpc.ContinueRunRequest, send: Send) -> None:
        """Open a run's next turn, or answer the question that the run asks; in mode sync follow the turn."""
        server = self._server(organization, request.server)
        run_id = request.run_id
        text = checked_input(request.input, self._limits)
        metadata = checked_metadata(request.metadata_json, self._limits)
        new = NewTurn(
            organization=server.organization,
            server_id=server.id,
            run_id=run_id,
            input=text,
            mode=run_mode(request.mode),
            created_at_ms=now_ms(),
            metadata=metadata,
            request=checked_request(
                request.request_id, request.request_digest, "continue", server.id, run_id, text, metadata
            ),
        )
        wait_seconds = _wait_seconds(request.stream.wait_ms, "stream.wait_ms")
        with self._event_log.held(new.run_id):
            change = await self._executor.continue_run(new, server)
            if change.replayed and change.run.turn.input != text:
                change = await self._replayed_answer(change, text)
            await self._follow_turn(change, server, new.mode, request.stream, wait_seconds, send)

    async def watch_run(
        self, organization: str, request: rpc.WatchRunRequest, send: Send, *, relayed: bool = False
    ) -> None:
        """Replay after a sequence, then follow; `relayed` to another runtime service, only what is known here."""
        server = self._server(organization, request.server)
        run = await self._run(server, request.run_id)
        if not 0 <= request.turn <= run.last_turn:
            raise InvalidRequest("turn", f"must be a turn of the run: 1 to {run.last_turn}")
        options = FollowOptions(
            turn=request.turn or None,
            deltas=request.stream.deltas,
            wait_seconds=_wait_seconds(request.stream.wait_ms, "stream.wait_ms"),
            relayed=relayed,
        )
        after = _checked_after(request.after_sequence)
        await self._follow(run, server, after, options, send)

    async def get_run(self, organization: str, request: rpc.GetRunRequest) -> rpc.GetRunResponse:
        """Return one run."""
        server = self._server(organization, request.server)
        run = await self._run(server, request.run_id)
        answer = rpc.GetRunResponse()
        fill_state(answer, run, server.agent.session_protocol)
        return answer

    async def list_runs(self, organization: str, request: rpc.ListRunsRequest) -> rpc.ListRunsResponse:
        """Return a page of runs, newest first."""
        server = self._server(organization, request.server)
        page = await self._store.list_runs(
            server.organization,
            server.id,
            status=_checked_status(request.status),
            token=request.page_token or None,
            limit=_page_size(request.page_size, _DEFAULT_PAGE, _MAX_PAGE),
        )
        answer = rpc.ListRunsResponse(next_page_token=page.next_token or "", agent_runtime_id=server.id)
        for run in page.runs:
            fill_run(answer.runs.add(), run, server.agent.session_protocol)
            fill_thread(answer.threads.add(), run)
        return answer

    async def list_run_events(self, organization: str, request: rpc.ListRunEventsRequest) -> rpc.ListRunEventsResponse:
        """Return a page of a run's log."""
        server = self._server(organization, request.server)
        after = _checked_after(request.after_sequence)
        wait_seconds = _wait_seconds(request.wait_ms, "wait_ms")
        limit = _page_size(request.page_size, _PAGE_EVENTS, _PAGE_EVENTS)
        run = await self._run(server, request.run_id)
        if wait_seconds is not None and after >= run.last_sequence and run.status not in TERMINAL:
            run = await self._wait_for_event(run, after, wait_seconds)
        events = await self._store.read_events(run.id, after, limit, _PAGE_BYTES)
        # The page must not show more than the run that it comes with.
        events = [event for event in events if event.sequence <= run.last_sequence]
        reached = events[-1].sequence if events else after
        answer = rpc.ListRunEventsResponse(has_more=reached < run.last_sequence)
        fill_state(answer, run, server.agent.session_protocol)
        add_events(answer.events, run, events)
        return answer

    async def cancel_run(
        self, organization: str, request: rpc.CancelRunRequest, *, relayed: bool = False
    ) -> rpc.CancelRunResponse:
        """Cancel every open turn of a run; `relayed` by another runtime service, it is done here."""
        server = self._server(organization, request.server)
        run_id = request.run_id
        asked = checked_request(request.request_id, request.request_digest, "cancel", server.id, run_id)
        if not relayed and not self._executor.executes(run_id):
            holder = (await self._run(server, run_id)).holder
            # What the agent has said and not stored is known to who executes the run. Without him it is cancelled, too.
            if holder is not None and (told := await self._peers.cancel(holder, organization, request)) is not None:
                return told
        change = await self._executor.cancel_run(Cancel(server.organization, server.id, run_id, asked))
        answer = rpc.CancelRunResponse(replayed=change.replayed)
        fill_state(answer, change.run, server.agent.session_protocol)
        add_events(answer.events, change.run, change.events)
        return answer

    async def _follow_turn(
        self,
        change: Change,
        server: Server,
        mode: RunMode,
        stream: rpc.StreamOptions,
        wait_seconds: float | None,
        send: Send,
    ) -> None:
        """Follow the turn that was accepted, from its user event on; in mode async tell of its acceptance only."""
        run = change.run
        protocol = server.agent.session_protocol
        if change.replayed:
            send = _marking_replay(send)
        if mode is RunMode.ASYNC:
            if not change.replayed:
                # As it was accepted, queued or running, also when it has ended since.
                await send(RunNews(run, Update(run, change.events), protocol))
                return
            wait_seconds = 0.0  # what there is by now
        # An answer is told what comes behind it, other input all of its turn.
        after = (change.events[0].sequence if change.events else run.turn.first_sequence) - 1
        if stream.collect:
            await self._event_log.collect(run, after, lambda update: send(RunNews(run, update, protocol)), wait_seconds)
        else:
            options = FollowOptions(run.turn.number, stream.deltas, wait_seconds)
            await self._follow(run, server, after, options, send)

    async def _replayed_answer(self, change: Change, text: str) -> Change:
        """Give the event of an answer, the first of such words in its turn, to the change that shows it again."""
        run = change.run
        after = run.turn.first_sequence
        while events := await self._store.read_events(run.id, after, _PAGE_EVENTS, _PAGE_BYTES):
            for event in events:
                if (event.turn, event.log_type, event.content) == (run.turn.number, PERMISSION_RESPONSE, text):
                    return replace(change, events=(event,))
            after = events[-1].sequence
        return change

    async def _follow(self, run: Run, server: Server, after: int, options: FollowOptions, send: Send) -> None:
        async with aclosing(self._event_log.follow(run, after, options)) as updates:
            async for update in updates:
                await send(RunNews(run, update, server.agent.session_protocol))

    async def _run(self, server: Server, run_id: str) -> Run:
        return await self._store.get_run(server.organization, server.id, run_id)

    async def _wait_for_event(self, run: Run, after: int, wait_seconds: float) -> Run:
        options = FollowOptions(wait_seconds=wait_seconds)
        async with aclosing(self._event_log.follow(run, after, options)) as updates:
            async for update in updates:
                if update.events:
                    break
        return await self._store.get_run(run.organization, run.server_id, run.id)

    def _server(self, organization: str, reference: rpc.ServerReference) -> Server:
        return self._registry.resolve(organization, reference.id, connected=reference.connected)


def _marking_replay(send: Send) -> Send:
    """Return what sends as `send` does, and says with the first of the news that nothing was accepted."""
    first = True

    async def mark(news: RunNews) -> None:
        nonlocal first
        news, first = news._replace(replayed=first), False
        await send(news)

    return mark


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
