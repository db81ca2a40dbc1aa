"""A client of several gateways: it asks again elsewhere, under the same key, and writes down all that it sees."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from random import Random
from typing import Any, Literal, NamedTuple
from uuid import UUID

import aiohttp

from tests.acceptance.cluster import KEY
from tests.acceptance.history import (
    TERMINAL,
    Event,
    Excerpt,
    History,
    Operation,
    Reading,
    Request,
    Shown,
    Surface,
    Task,
    event_of,
    shown_of,
)

PATIENCE_SECONDS = 90.0
_TRY_AGAIN = (429, 503, 504)
_GO_ON_AFTER = ("DRAINING", "RUNTIME_UNAVAILABLE", "STORE_UNAVAILABLE", "SESSION_FULL")
_BETWEEN_TRIES_SECONDS = 0.1
_CONNECT_SECONDS = 5.0
_SILENCE_SECONDS = 20.0
_SURFACES: dict[Operation, Surface] = {
    "start": "answer",
    "continue": "answer",
    "cancel": "cancel",
    "get": "get",
    "events": "log",
}

Document = dict[str, Any]
Mode = Literal["sync", "async"]


class GaveUp(Exception):
    """A request without a key broke: nobody can say whether it was accepted."""


class Wish(NamedTuple):
    """What is asked for, however often. `text` is the input of the turn that it opens.

    Who is `patient` waits for the end of that; a body does not say so here, for a key stands for one body.
    """

    operation: Operation
    path: str
    body: Document | None = None
    key: str | None = None
    text: str | None = None
    gateway: str | None = None
    patient: bool = True

    @property
    def may_repeat(self) -> bool:
        """Whether it does no harm to ask again after an unknown end."""
        return self.key is not None or self.body is None or self.operation == "cancel"


class Client:
    """Asks the gateways in turn, until it is answered. One at a time may use it."""

    def __init__(self, http: aiohttp.ClientSession, gateways: list[str], history: History, random: Random) -> None:
        self.history = history
        self.random = random
        self.headers = {"Authorization": f"Bearer {KEY}"}
        self._http = http
        self.gateways = gateways
        self._next = random.randrange(len(gateways))

    def new_key(self) -> str:
        """Return a key that nobody else has."""
        return str(UUID(int=self.random.getrandbits(128), version=4))

    async def start(self, server: str, task: Task, *, mode: Mode, key: str | None) -> Shown:
        """Start a run; return it as it was answered. Raises GaveUp, as all that opens a turn."""
        return await self._ask(_start(server, task, key, mode))

    async def resume(self, server: str, run_id: str, task: Task, *, mode: Mode, key: str | None) -> Shown:
        """Continue a run; return the turn as it was answered."""
        return await self._ask(_resume(server, run_id, task, key, mode))

    async def cancel(self, server: str, run_id: str, *, key: str | None) -> Shown:
        """Cancel a run; return it as it was answered."""
        return await self._ask(Wish("cancel", f"{_runs(server)}/{run_id}/cancel", {}, key))

    async def get(self, server: str, run_id: str, gateway: str | None = None) -> Shown:
        """Read a run, at one gateway if that is said."""
        return await self._ask(Wish("get", f"{_runs(server)}/{run_id}", gateway=gateway))

    async def read_log(self, server: str, run_id: str, gateway: str | None = None) -> Shown:
        """Read a run with its whole log, likewise."""
        return await self._ask(Wish("events", f"{_runs(server)}/{run_id}?include=events", gateway=gateway))

    async def until_ended(self, server: str, run_id: str) -> Shown:
        """Ask for a run until its latest turn has ended."""
        deadline = time.time() + PATIENCE_SECONDS
        while (shown := await self.get(server, run_id)).status not in TERMINAL:
            assert time.time() < deadline, f"in vain: the end of {shown}"
            await asyncio.sleep(_BETWEEN_TRIES_SECONDS)
        return shown

    async def start_and_wait(self, server: str, task: Task, *, key: str | None) -> Shown:
        """Start a run and wait for its end, in one answer if that is early enough."""
        shown = await self.start(server, task, mode="sync", key=key)
        return shown if shown.status in TERMINAL else await self.until_ended(server, shown.run_id)

    async def start_and_follow(self, server: str, task: Task, *, key: str | None) -> Shown:
        """Start a run and read its stream to the end, over as many connections as that takes."""
        return await self._follow(server, _start(server, task, key))

    async def resume_and_follow(self, server: str, run_id: str, task: Task, *, key: str | None) -> Shown:
        """Continue a run and read its stream likewise."""
        return await self._follow(server, _resume(server, run_id, task, key))

    async def follow(self, server: str, run_id: str, after: int = 0) -> Shown:
        """Read a run's stream from behind a sequence to the end of its latest turn, likewise."""
        return await self._follow(server, _watch(server, run_id), after)

    async def _ask(self, wish: Wish) -> Shown:
        async for base in self._places(wish):
            attempt = _Attempt(self.history, wish, base)
            try:
                async with self._send(wish, base) as response:
                    document = await attempt.read(response)
            except (aiohttp.ClientError, TimeoutError) as error:
                attempt.broken(error)
                continue
            if document is not None:
                return attempt.answered(response, document)
        raise AssertionError("never: asking ends with an answer or an error")

    async def _follow(self, server: str, wish: Wish, after: int | None = None) -> Shown:
        if wish.operation == "start":
            after = 0
        async for base in self._places(wish):
            attempt = _Attempt(self.history, wish, base)
            stream = _Stream(attempt, after)
            try:
                async with self._send(wish, base, after) as response:
                    if response.status in _TRY_AGAIN:
                        await attempt.read(response)
                        continue
                    assert response.content_type == "text/event-stream", f"{wish}: {await response.text()}"
                    await stream.read(response)
            except (aiohttp.ClientError, TimeoutError) as error:
                if stream.shown is None:
                    attempt.broken(error)
                else:
                    attempt.cut(type(error).__name__)
            finally:
                stream.write_down()
            if stream.shown is not None:
                if stream.ended:
                    return stream.shown
                wish, after = _watch(server, stream.shown.run_id), stream.last
        raise AssertionError("never: as above")

    async def _places(self, wish: Wish) -> AsyncIterator[str]:
        """Yield where to ask, after a pause each but the first; fails after the limit."""
        deadline = time.time() + PATIENCE_SECONDS
        while True:
            self._next = (self._next + 1) % len(self.gateways)
            yield wish.gateway or self.gateways[self._next]
            assert time.time() < deadline, f"in vain: {wish}"
            await asyncio.sleep(_BETWEEN_TRIES_SECONDS * (0.5 + self.random.random()))

    def _send(self, wish: Wish, base: str, after: int | bool | None = False) -> "aiohttp.client._RequestContextManager":
        """Send a request; one for a stream says behind which sequence, or None."""
        headers = dict(self.headers)
        if wish.key is not None:
            headers["Idempotency-Key"] = wish.key
        if not wish.patient:
            headers["Prefer"] = "respond-async"
        timeout = aiohttp.ClientTimeout(PATIENCE_SECONDS, sock_connect=_CONNECT_SECONDS)
        if after is not False:
            headers["Accept"] = "text/event-stream"
            timeout = aiohttp.ClientTimeout(None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
            if after and wish.operation == "events":
                headers["Last-Event-ID"] = str(after)
        method = "GET" if wish.body is None else "POST"
        return self._http.request(method, base + wish.path, json=wish.body, headers=headers, timeout=timeout)


class _Attempt:
    """One HTTP request, written down with what became of it."""

    def __init__(self, history: History, wish: Wish, base: str) -> None:
        self.history = history
        self.wish = wish
        self.base = base
        self.asked_at = time.time()

    async def read(self, response: aiohttp.ClientResponse) -> Document | None:
        """Return the document of an answer, None of one that asks for patience. Raises GaveUp."""
        document: Document = await response.json()
        if response.status not in _TRY_AGAIN:
            assert response.status in (200, 201, 202), f"{self.wish}: {response.status} {document}"
            return document
        self._write_down(response.status, document["code"])
        if response.status != 429 and not self.wish.may_repeat:
            raise GaveUp(document["message"])
        return None

    def broken(self, error: Exception) -> None:
        """There was no answer. Raises GaveUp."""
        refused = isinstance(error, aiohttp.ClientConnectorError)
        self._write_down(0, type(error).__name__, refused=refused)
        if not refused and not self.wish.may_repeat:
            raise GaveUp(str(error)) from error

    def cut(self, code: str) -> None:
        """The answer broke off."""
        self._write_down(0, code)

    def accepted(self, response: aiohttp.ClientResponse, shown: Shown) -> None:
        """There was an answer."""
        replayed = response.headers.get("Idempotency-Replayed") == "true"
        self._write_down(response.status, turn=None if self.wish.text is None else shown.name, replayed=replayed)

    def answered(self, response: aiohttp.ClientResponse, document: Document) -> Shown:
        """There was an answer that is whole; return the run that it shows."""
        operation = self.wish.operation
        shown = shown_of(document["run"])
        self.accepted(response, shown)
        self.see(shown, _SURFACES[operation])
        if "events" in document:
            events = [event_of(event) for event in document["events"]]
            ended = response.status != 202 and operation != "cancel"
            turn = None if operation == "cancel" else shown.input
            after = 0 if operation in ("start", "events") else None
            self.show(_SURFACES[operation], shown.run_id, events, after, turn, ended=ended)
        return shown

    def see(self, shown: Shown, surface: Surface) -> None:
        """A turn was shown."""
        self.history.readings.append(Reading(surface, self.base, self.asked_at, time.time(), shown))

    def show(
        self,
        surface: Surface,
        run_id: str,
        events: list[Event],
        after: int | None,
        turn: str | None,
        *,
        ended: bool,
        said: Sequence[tuple[int, str]] = (),
    ) -> None:
        """Events were shown."""
        excerpt = Excerpt(surface, self.base, run_id, tuple(events), after, turn, ended, tuple(said))
        self.history.excerpts.append(excerpt)

    def _write_down(
        self,
        status: int,
        code: str = "",
        *,
        refused: bool = False,
        turn: tuple[str, str] | None = None,
        replayed: bool = False,
    ) -> None:
        wish = self.wish
        times = (self.asked_at, time.time())
        request = Request(wish.operation, self.base, *times, status, code, refused, wish.key, wish.text, turn, replayed)
        self.history.requests.append(request)


class _Stream:
    """One connection of a stream, asked for from behind sequence `after`, where that is known."""

    def __init__(self, attempt: _Attempt, after: int | None) -> None:
        self.shown: Shown | None = None
        self.ended = False
        self._attempt = attempt
        self._after = after
        self._events: list[Event] = []
        self._said: list[tuple[int, str]] = []

    @property
    def last(self) -> int:
        """The last sequence that came."""
        return self._events[-1].sequence if self._events else self._after or 0

    async def read(self, response: aiohttp.ClientResponse) -> None:
        """Read to the end, or until it breaks off; `ended` says whether that was the end of the turn."""
        number = None
        async for line in response.content:
            if line.startswith(b"id: "):
                number = int(line[4:])
            elif line.startswith(b"data: "):
                document = json.loads(line[6:])
                if "run" in document:
                    self._show(response, shown_of(document["run"]))
                if document["type"] == "run.event":
                    event = event_of(document["event"])
                    assert event.sequence == number, f"the frame {number} holds {event}"
                    self._events.append(event)
                elif document["type"] == "run.delta":
                    self._grow(document["sequence"], document["offset"], document["text"])
                elif document["type"] == "stream.completed":
                    self.ended = True
                    return
                elif document["type"] == "stream.error":
                    assert document["code"] in _GO_ON_AFTER, f"the stream ended with {document}"
                    return
        self._attempt.cut("no last frame")

    def write_down(self) -> None:
        """The connection is over."""
        if self.shown is not None:
            run_id, turn = self.shown.name
            self._attempt.show("stream", run_id, self._events, self._after, turn, ended=self.ended, said=self._said)

    def _grow(self, sequence: int, offset: int, text: str) -> None:
        """A text has grown, or is said from its beginning."""
        assert sequence > self.last, f"a text in the making of {sequence} behind {self.last}"
        if not offset:
            self._said.append((sequence, text))
            return
        known, so_far = self._said.pop()
        assert (sequence, offset) == (known, len(so_far)), f"{text!r} of {sequence} at {offset} behind {so_far!r}"
        self._said.append((sequence, so_far + text))

    def _show(self, response: aiohttp.ClientResponse, shown: Shown) -> None:
        if self.shown is None:
            self._attempt.accepted(response, shown)
        self.shown = shown
        self._attempt.see(shown, "stream")


def _runs(server: str) -> str:
    return f"/v1/servers/{server}/runs"


def _start(server: str, task: Task, key: str | None, mode: Mode = "sync") -> Wish:
    return Wish("start", _runs(server), {"content": task.input}, key, task.input, patient=mode == "sync")


def _resume(server: str, run_id: str, task: Task, key: str | None, mode: Mode = "sync") -> Wish:
    path = f"{_runs(server)}/{run_id}/input"
    return Wish("continue", path, {"content": task.input}, key, task.input, patient=mode == "sync")


def _watch(server: str, run_id: str) -> Wish:
    return Wish("events", f"{_runs(server)}/{run_id}/events")
