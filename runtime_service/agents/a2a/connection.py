"""One remote agent: its card, and the calls to it. All that it raises is an `AgentError`.

Knows nothing of turns, and does not look into what the agent says. Imports the library: import this only where it is
needed.
"""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, TypeVar

import httpx
from a2a.client import A2ACardResolver, Client, ClientConfig, ClientFactory
from a2a.types import (
    AgentCard,
    CancelTaskRequest,
    GetTaskRequest,
    Message,
    Part,
    Role,
    SendMessageConfiguration,
    SendMessageRequest,
    StreamResponse,
    SubscribeToTaskRequest,
    Task,
)

from runtime_service.agents.a2a.failures import StreamCut, TaskUnknown, TooLarge, cut, failure_of, silent
from runtime_service.agents.a2a.options import A2AOptions
from runtime_service.agents.base import AgentError

log = logging.getLogger(__name__)
# It would log each card whole, however large that is.
logging.getLogger("a2a.client.card_resolver").setLevel(logging.WARNING)

_CONNECT_SECONDS = 10.0
_CALL_SECONDS = 30.0
_CARD_SECONDS = 300.0
_FIRST_POLL_SECONDS = 0.2
_LAST_POLL_SECONDS = 5.0
_MAX_RECEIVED_BYTES = 16 << 20
"""Of one answer, or of one event of a stream."""
_MAX_RECEIVED_VALUES = 1 << 18
"""Of JSON, in the same: reading so many holds up the event loop, and with it all other runs, for a second or two."""
_BINDINGS = ["JSONRPC", "HTTP+JSON"]

_T = TypeVar("_T")


class Connection:
    """Shared by all turns with the agent. The card is read when it is needed, again after five minutes or a failure."""

    def __init__(self, options: A2AOptions) -> None:
        self._options = options
        seconds = options.timeout_seconds
        self._http = _BoundedClient(
            headers=options.headers() | {"Accept-Encoding": "identity"},
            # All runs share the client: what one is given is not to be shown by the others.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
            timeout=httpx.Timeout(seconds, connect=min(_CONNECT_SECONDS, seconds)),
            # A turn holds a connection as long as it lasts: how many there may be is the runtime's to say.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
        )
        self._reading: asyncio.Task[Client] | None = None
        self._client: Client | None = None
        self._streams = False
        self._described = ""
        self._card_read_at = 0.0

    async def describe(self) -> str:
        """Return what the agent's card says of it, in a sentence."""
        await self._open_client()
        return self._described

    async def send(
        self, text: str, *, message_id: str, context_id: str | None, task_id: str | None
    ) -> AsyncGenerator[StreamResponse]:
        """Say something to the agent; give what it answers, until the caller has heard enough.

        Raises StreamCut when the agent ends before that.
        """
        client = await self._open_client()
        streams = self._streams
        request = SendMessageRequest(
            message=Message(
                role=Role.ROLE_USER,
                message_id=message_id,
                context_id=context_id or "",
                task_id=task_id or "",
                parts=[Part(text=text)],
            ),
            configuration=SendMessageConfiguration(return_immediately=not streams, history_length=0),
        )
        begun: Task | None = None
        async with aclosing(self._responses(client.send_message(request))) as responses:
            async for response in responses:
                yield response
                if response.HasField("task"):
                    begun = response.task
        if streams or begun is None:
            raise cut(self._options)
        async with aclosing(self._poll(client, begun)) as responses:
            async for response in responses:
                yield response

    async def resume(self, task_id: str) -> AsyncGenerator[StreamResponse]:
        """Give the task as it is now, and what follows, until the caller has heard enough. Raises TaskUnknown."""
        client = await self._open_client()
        if self._streams:
            try:
                subscription = client.subscribe(SubscribeToTaskRequest(id=task_id))
                async with aclosing(self._responses(subscription)) as responses:
                    async for response in responses:
                        yield response
                raise cut(self._options)
            except (StreamCut, TaskUnknown):
                raise
            except AgentError as error:
                # The task has ended, or the agent streams only what it is asked at the time.
                if error.code not in ("AGENT_REQUEST_INVALID", "AGENT_PROTOCOL_ERROR", "AGENT_NOT_FOUND"):
                    raise
        async with aclosing(self._poll(client, Task(id=task_id))) as responses:
            async for response in responses:
                yield response

    async def cancel(self, task_id: str) -> None:
        """Ask the agent to end the task."""
        client = await self._open_client()
        await self._called(client.cancel_task(CancelTaskRequest(id=task_id)))

    async def close(self) -> None:
        """Close the connections."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
        await self._http.aclose()

    async def _poll(self, client: Client, last: Task) -> AsyncGenerator[StreamResponse]:
        """Give the task whenever it is another than it was last."""
        loop = asyncio.get_running_loop()
        changed_at = loop.time()
        pause = _FIRST_POLL_SECONDS
        while True:
            await asyncio.sleep(pause)
            task = await self._called(client.get_task(GetTaskRequest(id=last.id, history_length=0)), begun=True)
            if task != last:
                last = task
                yield StreamResponse(task=task)
                changed_at = loop.time()
                pause = _FIRST_POLL_SECONDS
            elif loop.time() - changed_at > self._options.timeout_seconds:
                raise silent(self._options, self._options.timeout_seconds)
            else:
                pause = min(2 * pause, _LAST_POLL_SECONDS)

    async def _responses(self, stream: AsyncIterator[StreamResponse]) -> AsyncGenerator[StreamResponse]:
        """Hand on the stream; each response in its time."""
        begun = False
        seconds = self._options.timeout_seconds
        # The library declares less than it gives.
        assert isinstance(stream, AsyncGenerator)
        async with aclosing(stream):
            while True:
                try:
                    async with asyncio.timeout(seconds):
                        response = await anext(stream, None)
                except Exception as error:  # the library does not say what it raises
                    raise self._failed(error, seconds, begun=begun) from error
                if response is None:
                    return
                begun = True
                yield response

    async def _called(self, call: Awaitable[_T], *, begun: bool = False) -> _T:
        seconds = min(_CALL_SECONDS, self._options.timeout_seconds)
        try:
            async with asyncio.timeout(seconds):
                return await call
        except Exception as error:  # the library does not say what it raises
            raise self._failed(error, seconds, begun=begun) from error

    async def _open_client(self) -> Client:
        now = asyncio.get_running_loop().time()
        if self._client is not None and now - self._card_read_at <= _CARD_SECONDS:
            return self._client
        # One for all who wait: where the agent hangs they are not to wait for each other's time limits.
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read_card())
            # Perhaps nobody waits any more when it fails.
            self._reading.add_done_callback(lambda reading: reading.cancelled() or reading.exception())
        return await asyncio.shield(self._reading)

    async def _read_card(self) -> Client:
        resolver = A2ACardResolver(self._http, self._options.url)
        card = await self._called(resolver.get_agent_card(self._options.card_path))
        self._client = client = self._client_of(card)
        self._streams = self._options.streaming and card.capabilities.streaming
        self._card_read_at = asyncio.get_running_loop().time()
        # The card has only those ways left that may be taken.
        ways = ", ".join(f"{way.protocol_binding} {way.protocol_version}".strip() for way in card.supported_interfaces)
        manner = "streams" if self._streams else "is asked for its tasks again and again"
        name, version = self._options.quoted(card.name), self._options.quoted(card.version)
        self._described = f"{name!r}, version {version!r}, by {self._options.quoted(ways)}; {manner}."
        return client

    def _client_of(self, card: AgentCard) -> Client:
        options = self._options
        bindings = _BINDINGS if options.protocol_binding is None else [options.protocol_binding]
        usable = [
            interface
            for interface in card.supported_interfaces
            if interface.protocol_binding in bindings and interface.url.startswith(("http://", "https://"))
        ]
        if not usable:
            ways = {f"{way.protocol_binding} at {way.url}" for way in card.supported_interfaces}
            there = options.quoted(", ".join(sorted(ways))) or "no way to speak to it"
            message = (
                f"The card of the agent at {options.host} offers {there}; "
                f"spoken here: {', '.join(bindings)}, over http and https."
            )
            raise AgentError(message, "AGENT_CARD_INVALID")
        allowed = [each for each in usable if not options.headers() or options.may_see_secrets(each.url)]
        if not allowed:
            message = (
                f"The card of the agent at {options.host} sends its callers to {options.quoted(usable[0].url)!r}, "
                "which is not to see their credentials. If it may, name its host in secrets_hosts; "
                "by http only where url is."
            )
            raise AgentError(message, "AGENT_CARD_INVALID")
        del card.supported_interfaces[:]
        card.supported_interfaces.extend(allowed)
        config = ClientConfig(
            streaming=options.streaming, httpx_client=self._http, supported_protocol_bindings=list(bindings)
        )
        try:
            return ClientFactory(config).create(card)
        except Exception as error:  # the library does not say what it raises
            message = f"The card of the agent at {options.host} cannot be used."
            raise AgentError(message, "AGENT_CARD_INVALID") from error

    def _failed(self, error: Exception, seconds: float, *, begun: bool) -> AgentError:
        """Translate; the card is read again next time."""
        self._client = None
        kind, said = type(error).__name__, self._options.quoted(str(error))
        log.warning("the agent at %s failed: %s: %s", self._options.host, kind, said)
        return failure_of(error, self._options, seconds=seconds, begun=begun)


class _BoundedClient(httpx.AsyncClient):
    """Takes no more than `_MAX_RECEIVED_BYTES` at once: the library reads answers and lines of any length."""

    async def send(self, request: httpx.Request, *, stream: bool = False, **options: Any) -> httpx.Response:
        response = await super().send(request, stream=True, **options)
        try:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise TooLarge("it is packed, and nobody asked for that", request=request)
            assert isinstance(response.stream, httpx.AsyncByteStream)
            events = "text/event-stream" in response.headers.get("Content-Type", "")
            response.stream = _BoundedStream(response.stream, request, events=events)
            if not stream:
                await response.aread()
        except BaseException:
            await response.aclose()
            raise
        return response


class _BoundedStream(httpx.AsyncByteStream):
    """Counts bytes and values: of a stream of events those since the last empty line, which ends an event.

    Of a stream of events it also escapes what is part of a line, and taken for the end of one by the library.
    """

    def __init__(self, stream: httpx.AsyncByteStream, request: httpx.Request, *, events: bool) -> None:
        self._stream = stream
        self._request = request
        self._events = events
        self._ends = (b"\n\n", b"\r\n\r\n", b"\r\r") if events else ()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        received = values = 0
        tail = begun = b""
        async for chunk in self._stream:
            seen = tail + chunk
            end = max((seen.rfind(line) for line in self._ends), default=-1)
            received = len(seen) - end if end >= 0 else received + len(chunk)
            values = _values_in(seen[end:]) if end >= 0 else values + _values_in(chunk)
            if received > _MAX_RECEIVED_BYTES:
                raise TooLarge(f"more than {_MAX_RECEIVED_BYTES} bytes", request=self._request)
            if values > _MAX_RECEIVED_VALUES:
                raise TooLarge(f"more than {_MAX_RECEIVED_VALUES} values", request=self._request)
            tail = seen[-3:]
            if self._events:
                chunk, begun = _escaped(begun + chunk)
            if chunk:
                yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


def _values_in(chunk: bytes) -> int:
    """Return at least how many values the JSON has, with those commas and brackets that are text."""
    return chunk.count(b",") + chunk.count(b"[") + chunk.count(b"{")


_FALSE_LINE_END = re.compile(rb"\xc2\x85|\xe2\x80[\xa8\xa9]")
_BEGUN_LINE_END = re.compile(rb"(?:\xc2|\xe2\x80?)\Z")


def _escaped(chunk: bytes) -> tuple[bytes, bytes]:
    """Write U+0085, U+2028 and U+2029 as JSON can, too; return what of one is begun at the end apart."""
    begun = _BEGUN_LINE_END.search(chunk)
    whole, rest = (chunk, b"") if begun is None else (chunk[: begun.start()], begun[0])
    return _FALSE_LINE_END.sub(lambda found: b"\\u%04x" % ord(found[0].decode()), whole), rest
