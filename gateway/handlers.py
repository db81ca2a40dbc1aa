"""One short method an operation: decode, call, encode. What is the same for all is in `app`."""

from collections.abc import AsyncIterator, Iterable
from functools import partial
from typing import get_args

from aiohttp import web

from gateway.answers import JsonAnswer
from gateway.auth import Caller, KeyRing, Scope, require
from gateway.bodies import BodyLimits, ContinueBody, StartBody, decode_cancel, decode_continue, decode_start
from gateway.codec import (
    TERMINAL,
    encode,
    event_document,
    run_document,
    status_name,
    status_number,
    thread_document,
)
from gateway.config import GatewayConfig
from gateway.idempotency import HEADER, REPLAYED, Repetition, repetition
from gateway.metrics import Metrics
from gateway.preferences import Waiting, choice, resume_after, waiting, whole_number
from gateway.request_body import read_body
from gateway.requests import info_of, when_left
from gateway.run_client import CallContext, RunClient, ServerTarget, UpdateStream
from gateway.schema import Envelope, RunList, RunStatus
from gateway.streaming import OpenStreams, StreamForm, stream_form
from protos.acp.runs.v1 import run_pb2 as pb
from protos.acp.runs.v1 import run_service_pb2 as rpc

Answer = web.StreamResponse | JsonAnswer

_DEFAULT_PAGE = 50
_MAX_PAGE = 200


class RunHandlers:
    """The six operations. `connected` says that the server in the path is a resource bound to an agent runtime."""

    def __init__(
        self,
        config: GatewayConfig,
        client: RunClient,
        keys: KeyRing,
        streams: OpenStreams,
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._client = client
        self._keys = keys
        self._streams = streams
        self._metrics = metrics
        self._body_limits = BodyLimits(config.max_json_depth, config.max_title_characters, config.max_metadata_bytes)

    async def start(self, request: web.Request, connected: bool) -> Answer:
        """POST …/runs"""
        context, target = self._enter(request, "execute", connected)
        body = decode_start(await self._body(request), self._body_limits)
        form = _form(request)
        wait = self._waiting(request, body.mode)
        updates = self._client.start_run(
            context,
            target,
            input=body.input,
            title=body.title,
            mode=_mode(wait, form),
            metadata=body.metadata,
            stream=_stream_options(wait, form),
            repetition=_repetition(request, body),
        )
        return await self._answer_turn(request, target, updates, form, wait, finished_status=201)

    async def continue_(self, request: web.Request, connected: bool) -> Answer:
        """POST …/runs/{runId}/input"""
        context, target = self._enter(request, "execute", connected)
        body = decode_continue(await self._body(request), self._body_limits)
        form = _form(request)
        wait = self._waiting(request, body.mode)
        updates = self._client.continue_run(
            context,
            target,
            request.match_info["runId"],
            input=body.input,
            mode=_mode(wait, form),
            metadata=body.metadata,
            stream=_stream_options(wait, form),
            repetition=_repetition(request, body),
        )
        return await self._answer_turn(request, target, updates, form, wait, finished_status=200)

    async def list(self, request: web.Request, connected: bool) -> Answer:
        """GET …/runs"""
        context, target = self._enter(request, "runs:read", connected)
        status = choice(request.query, "status", get_args(RunStatus))
        page = await self._client.list(
            context,
            target,
            limit=whole_number(request.query, "limit", _DEFAULT_PAGE, most=_MAX_PAGE, least=1),
            page_token=request.query.get("pageToken", ""),
            status=status_number(status),
        )
        runs = [run_document(run, thread) for run, thread in zip(page.runs, page.threads, strict=True)]
        document = RunList(
            serverId=target.id,
            object="list",
            data=runs,
            runs=runs,
            has_more=bool(page.next_page_token),
            agentRuntimeId=page.agent_runtime_id if target.connected else None,
            nextPageToken=page.next_page_token or None,
        )
        return JsonAnswer(encode(document))

    async def get(self, request: web.Request, connected: bool) -> Answer:
        """GET …/runs/{runId}"""
        context, target = self._enter(request, "runs:read", connected)
        run_id = request.match_info["runId"]
        if choice(request.query, "include", ("events",)) is not None:
            return await self._answer_log(request, context, target, run_id, after=0, limit=0)
        answer = await self._client.get(context, target, run_id)
        return JsonAnswer(_envelope(target, answer.run, answer.thread))

    async def events(self, request: web.Request, connected: bool) -> Answer:
        """GET …/runs/{runId}/events"""
        context, target = self._enter(request, "runs:read", connected)
        run_id = request.match_info["runId"]
        form = _form(request)
        if form is not None:
            after = resume_after(request.query, request.headers.get("Last-Event-ID"))
            updates = self._client.watch(context, target, run_id, after)
            return await self._streams.relay(request, updates, form, lambda _: (200, info_of(request).headers))
        return await self._answer_log(
            request,
            context,
            target,
            run_id,
            after=whole_number(request.query, "after", 0),
            limit=whole_number(request.query, "limit", 0, least=1),
            wait_seconds=whole_number(request.query, "wait", 0, most=int(self._config.wait_limit_seconds)),
        )

    async def cancel(self, request: web.Request, connected: bool) -> Answer:
        """POST …/runs/{runId}/cancel"""
        context, target = self._enter(request, "execute", connected)
        decode_cancel(await self._body(request, may_be_empty=True))
        answer = await self._client.cancel(context, target, request.match_info["runId"], _repetition(request, None))
        self._metrics.run_answered("cancel", status_name(answer.run.status))
        headers = dict(REPLAYED) if answer.replayed else None
        return JsonAnswer(_envelope(target, answer.run, answer.thread, answer.events), headers=headers)

    # What operations share

    def _enter(self, request: web.Request, scope: Scope, connected: bool) -> tuple[CallContext, ServerTarget]:
        """Return on whose behalf and about what the request is. Raises ApiError 401, 403."""
        info = info_of(request)
        caller: Caller = self._keys.authenticate(request.headers)
        info.caller = caller
        require(caller, scope)
        context = CallContext(caller.organization, caller.key_id, info.request_id, info.traceparent)
        return context, ServerTarget(request.match_info["serverId"], connected)

    async def _body(self, request: web.Request, *, may_be_empty: bool = False) -> bytes:
        return await read_body(
            request, self._config.max_body_bytes, self._config.body_seconds, may_be_empty=may_be_empty
        )

    def _waiting(self, request: web.Request, mode: object) -> Waiting:
        prefer = request.headers.getall("Prefer", ())
        return waiting(mode, list(prefer), self._config.wait_limit_seconds)  # type: ignore[arg-type]

    async def _answer_turn(
        self,
        request: web.Request,
        target: ServerTarget,
        updates: UpdateStream,
        form: StreamForm | None,
        wait: Waiting,
        finished_status: int,
    ) -> Answer:
        """Answer a start or continue: as it happens, or once the turn has ended or the wait is over."""
        info = info_of(request)
        operation = "start" if finished_status == 201 else "continue"

        def begin(first: rpc.RunUpdate) -> tuple[int, dict[str, str]]:
            run = first.run
            info.run_id = run.id
            self._metrics.run_answered(operation, status_name(run.status))
            headers = {**info.headers, "Location": _run_path(request, run, operation)}
            if first.replayed:
                headers.update(REPLAYED)
            return finished_status, headers

        if form is not None:
            return await self._streams.relay(request, updates, form, begin)
        try:
            if wait.seconds:
                when_left(request, updates.hurry)
            first = await updates.next()
            assert first is not None, "a turn has at least one update"
            run = first.run
            _, headers = begin(first)
            status = finished_status if run.status in TERMINAL and wait.seconds else 202
            if wait.applied is not None:
                headers["Preference-Applied"] = wait.applied
            second = await updates.next()
            if second is None:
                return JsonAnswer(_envelope(target, run, first.thread, first.events), status, headers)

            async def rest() -> AsyncIterator[Iterable[pb.RunEvent]]:
                yield first.events
                update: rpc.RunUpdate | None = second
                while update is not None:
                    yield update.events
                    update = await updates.next()

            head = _envelope(target, run, first.thread)
            return await self._write_pieces(request, status, headers, head, rest(), b"]}")
        finally:
            updates.stop()

    async def _answer_log(
        self,
        request: web.Request,
        context: CallContext,
        target: ServerTarget,
        run_id: str,
        *,
        after: int,
        limit: int,
        wait_seconds: float = 0,
    ) -> Answer:
        """Answer with a run's log, written out page by page as it was when the first page was read."""
        on_asked = partial(when_left, request) if wait_seconds else None
        first = await self._client.list_events(
            context, target, run_id, after=after, limit=limit, wait_seconds=wait_seconds, on_asked=on_asked
        )
        end = min(first.run.last_sequence, after + limit if limit else first.run.last_sequence)
        has_more = end < first.run.last_sequence
        info = info_of(request)
        info.run_id = run_id
        reached = first.events[-1].sequence if first.events else end
        if reached >= end:
            return JsonAnswer(_envelope(target, first.run, first.thread, first.events, has_more))

        async def pages() -> AsyncIterator[Iterable[pb.RunEvent]]:
            page, last = first, reached
            while True:
                yield page.events
                if last >= end or not page.events:
                    return
                page = await self._client.list_events(context, target, run_id, after=last, limit=min(end - last, 1_000))
                last = page.events[-1].sequence if page.events else end

        head = _envelope(target, first.run, first.thread)
        return await self._write_pieces(
            request, 200, info.headers, head, pages(), b'],"has_more":%b}' % encode(has_more)
        )

    async def _write_pieces(
        self,
        request: web.Request,
        status: int,
        headers: dict[str, str],
        head: bytes,
        pages: AsyncIterator[Iterable[pb.RunEvent]],
        tail: bytes,
    ) -> web.StreamResponse:
        """Write an envelope without holding it: `head`, which is whole, then events in the place of its last brace.

        A failure in the middle cuts the connection: JSON has no other way.
        """
        response = web.StreamResponse(status=status, headers={**headers, "Content-Type": "application/json"})
        await response.prepare(request)
        separator = head[:-1] + b',"events":['
        try:
            async for events in pages:
                # Without the brackets of the list; there is nothing to write of an empty one.
                if piece := encode([event_document(event) for event in events])[1:-1]:
                    await response.write(separator + piece)
                    separator = b","
            await response.write((separator if separator != b"," else b"") + tail)
            await response.write_eof()
        except Exception as error:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("the answer was cut") from error
        return response


def _envelope(
    target: ServerTarget,
    run: pb.Run,
    thread: pb.Thread,
    events: Iterable[pb.RunEvent] | None = None,
    has_more: bool | None = None,
) -> bytes:
    return encode(
        Envelope(
            serverId=target.id,
            agentRuntimeId=run.server_id if target.connected else None,
            run=run_document(run, thread),
            thread=thread_document(thread),
            events=None if events is None else [event_document(event) for event in events],
            has_more=has_more,
        )
    )


def _repetition(request: web.Request, body: StartBody | ContinueBody | None) -> Repetition | None:
    return repetition(request.headers.getall(HEADER, ()), body)


def _form(request: web.Request) -> StreamForm | None:
    # A header of several lines is one list (RFC 9110, 5.3).
    return stream_form(",".join(request.headers.getall("Accept", ())))


def _mode(wait: Waiting, form: StreamForm | None) -> "pb.RunMode.ValueType":
    return pb.RUN_MODE_SYNC if wait.seconds or form is not None else pb.RUN_MODE_ASYNC


def _stream_options(wait: Waiting, form: StreamForm | None) -> rpc.StreamOptions:
    if form is not None:
        return rpc.StreamOptions(deltas=True)
    return rpc.StreamOptions(collect=True, wait_ms=int(wait.seconds * 1000))


def _run_path(request: web.Request, run: pb.Run, operation: str) -> str:
    """Return the path of the run in the family by which it was asked for."""
    path = request.rel_url.raw_path
    return f"{path}/{run.id}" if operation == "start" else path.removesuffix("/input")
