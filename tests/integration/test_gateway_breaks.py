"""Callers of the whole stack while the connection between its two programs breaks, and while one of them restarts."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import count, pairwise
from pathlib import Path

import pytest

from tests.integration.stack import GATES, Frame, Gate, Stack, Stream, runs, serving, until
from tests.integration.test_gateway import sequences
from tests.integration.test_gateway_events import STREAMED, check_stream, events_of, statuses_of
from tests.integration.wire import Wire
from tests.support import eventually, run_async

CUTS = 20


def is_event(sequence: int) -> Callable[[Frame], bool]:
    """Whether a frame is this event."""
    return lambda frame: bool(frame.document.get("event", {}).get("sequence") == sequence)


class Follower:
    """Reads a stream to its end, beside the test."""

    def __init__(self, stream: Stream) -> None:
        self.frames: list[Frame] = []
        self.stream = stream
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for frame in self.stream.frames():
            self.frames.append(frame)

    def has(self, sequence: int) -> bool:
        """Whether the event has come."""
        return any(is_event(sequence)(frame) for frame in self.frames)

    async def check(self, stack: Stack, path: str) -> None:
        """Read to the end: the log as it is stored, each event once, statuses only where they change, one end."""
        await self.task
        check_stream(self.frames)
        log = (await stack.call("GET", path + "/events")).events
        assert events_of(self.frames) == log
        assert sequences(log) == list(range(1, len(log) + 1))
        assert self.frames[-1].type == "stream.completed"
        assert self.frames[-1].document["run"] == (await stack.call("GET", path)).run
        statuses = statuses_of(self.frames)
        assert all(one != other for one, other in pairwise(statuses))


@asynccontextmanager
async def following(stack: Stack, path: str, accept: str = "text/event-stream") -> AsyncIterator[Follower]:
    """Follow the run at `path`."""
    async with stack.stream("GET", path + "/events", accept=accept) as stream:
        yield Follower(stream)


async def is_unready(stack: Stack) -> bool:
    """Whether the gateway knows that the runtime service is away."""
    return (await stack.call("GET", "/health", key="")).status == 503


async def restart(stack: Stack, name: str) -> None:
    """Stop the runtime service and start it again; return once the turn is at its gate again."""
    await GATES[name].reached.wait()
    GATES[name] = Gate()
    await stack.stop_runtime()
    await stack.start_runtime()
    await GATES[name].reached.wait()


# -- The runtime service restarts ----------------------------------------------------------------------


@pytest.mark.parametrize("accept", STREAMED)
def test_follower_sees_no_restart(accept: str, tmp_path: Path) -> None:
    """A stream goes on where it was, over two restarts of the runtime service, and tells the new attempts."""
    name = f"restart {accept}"

    async def main() -> None:
        async with serving(tmp_path) as stack:
            path = await stack.start_async("gated", name)
            async with following(stack, path, accept) as follower:
                await eventually(lambda: follower.has(2))
                for _ in range(2):
                    await restart(stack, name)
                GATES[name].open.set()
                await follower.check(stack, path)
            texts = [event["content"] for event in events_of(follower.frames)]
            assert texts[0] == texts[-1] == name
            assert texts.count("waiting") == 3

    run_async(main())


def test_text_in_the_making_starts_again_after_a_restart(tmp_path: Path) -> None:
    """What was said of a message before a restart is in the log as it was kept; the text of the next one is whole."""
    name = "typing restart"

    async def main() -> None:
        async with serving(tmp_path) as stack:
            path = await stack.start_async("typing", name)
            async with following(stack, path) as follower:
                await eventually(lambda: [frame for frame in follower.frames if frame.type == "run.delta"])
                await restart(stack, name)
                await eventually(lambda: [frame for frame in follower.frames if frame.document.get("sequence", 0) > 2])
                GATES[name].open.set()
                await follower.check(stack, path)
            texts: dict[int, str] = {}
            for frame in follower.frames:
                if frame.type == "run.delta":
                    delta = frame.document
                    texts[delta["sequence"]] = texts.get(delta["sequence"], "")[: delta["offset"]] + delta["text"]
                elif frame.type == "run.event" and frame.document["event"]["role"] == "assistant":
                    event = frame.document["event"]
                    assert event["content"].startswith(texts.get(event["sequence"], ""))
            assert len(texts) > 1
            assert events_of(follower.frames)[-1]["content"] == "öne 𝔱wo three"

    run_async(main())


def test_long_poll_sees_no_restart(tmp_path: Path) -> None:
    """A poll that waits for an event gets the one that the restarted service stores."""
    name = "poll restart"

    async def main() -> None:
        async with serving(tmp_path) as stack:
            path = await stack.start_async("gated", name) + "/events"
            await stack.call("GET", path + "?after=1&wait=20")
            log_before = (await stack.call("GET", path)).events
            polling = asyncio.create_task(stack.call("GET", f"{path}?after={len(log_before)}&wait=20"))
            await GATES[name].reached.wait()
            await restart(stack, name)
            page = await polling
            assert page.status == 200
            assert sequences(page.events)[0] == len(log_before) + 1
            GATES[name].open.set()

    run_async(main())


def test_questions_wait_for_a_restart(tmp_path: Path) -> None:
    """What is asked while the runtime service is away is answered once it is back, for each operation as always."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            started = await stack.start()
            open_run = await stack.start_async("gated", "questions")
            path = started.headers["Location"]
            await stack.stop_runtime()
            asking = [
                asyncio.create_task(stack.call("GET", path)),
                asyncio.create_task(stack.call("GET", path + "/events")),
                asyncio.create_task(stack.call("GET", runs("echo"))),
                asyncio.create_task(stack.call("POST", open_run + "/cancel")),
                asyncio.create_task(stack.call("POST", path + "/input", {"content": "more"})),
                asyncio.create_task(stack.start("echo", "new")),
            ]
            await until(lambda: is_unready(stack))
            assert not any(task.done() for task in asking)
            await stack.start_runtime()
            got, log, page, cancelled, continued, new = await asyncio.gather(*asking)
            assert got.run["id"] == page.json["runs"][-1]["id"] == started.run["id"]
            assert log.events[:2] == started.events
            assert (cancelled.status, cancelled.run["status"]) == (200, "cancelled")
            assert (continued.status, continued.run["output"]) == (200, "more")
            assert (new.status, new.run["output"]) == (201, "new")

    run_async(main())


# -- The connection is cut -----------------------------------------------------------------------------


@pytest.mark.parametrize("accept", STREAMED)
def test_followers_see_no_cuts(accept: str, tmp_path: Path) -> None:
    """However often the connection is cut while an agent talks, followers get its log once and whole."""
    name = f"cut follower {accept}"
    wire = Wire()

    async def main() -> None:
        async with serving(tmp_path, wire=wire) as stack:
            words = " ".join(f"word{number}" for number in range(150))
            paths = [await stack.start_async("slow", words), await stack.start_async("gated", name)]
            flood = (await stack.start("flood", "3000")).headers["Location"]
            async with (
                following(stack, paths[0], accept) as talking,
                following(stack, paths[1], accept) as waiting,
                following(stack, flood, accept) as replaying,
            ):
                for number in range(CUTS):
                    came = len(talking.frames)
                    if number % 2:
                        before = wire.swallowed
                        wire.swallow()
                        await eventually(lambda before=before: wire.swallowed > before or talking.task.done())  # type: ignore[misc]
                    wire.cut()
                    await eventually(lambda came=came: len(talking.frames) > came or talking.task.done())  # type: ignore[misc]
                GATES[name].open.set()
                for follower, path in ((talking, paths[0]), (waiting, paths[1]), (replaying, flood)):
                    await follower.check(stack, path)
            assert events_of(waiting.frames)[-1]["content"] == name

    run_async(main())


def test_questions_see_no_cuts(tmp_path: Path) -> None:
    """Reads, long polls and cancels are answered as ever while the connection is cut again and again."""
    wire = Wire()

    async def main() -> None:
        async with serving(tmp_path, wire=wire) as stack:
            started = await stack.start()
            path = started.headers["Location"]
            open_runs = [await stack.start_async("gated", f"cut cancel {number}") for number in range(CUTS)]
            polls = [asyncio.create_task(stack.call("GET", f"{each}/events?after=2&wait=20")) for each in open_runs]
            for number in range(CUTS):
                asking = [
                    asyncio.create_task(stack.call("GET", path)),
                    asyncio.create_task(stack.call("GET", path + "/events")),
                    asyncio.create_task(stack.call("GET", runs("echo"))),
                    asyncio.create_task(stack.call("POST", open_runs[number] + "/cancel")),
                ]
                await asyncio.sleep(0)
                before = wire.swallowed
                wire.swallow(answers_only=number % 2 == 0)
                await eventually(lambda before=before: wire.swallowed > before)  # type: ignore[misc]
                wire.cut()
                got, log, page, cancelled = await asyncio.gather(*asking)
                assert (got.status, got.run) == (200, started.run)
                assert (log.status, log.events) == (200, started.events)
                assert [run["id"] for run in page.json["runs"]] == [started.run["id"]]
                assert (cancelled.status, cancelled.run["status"]) == (200, "cancelled")
            for poll in await asyncio.gather(*polls):
                assert (poll.status, poll.run["status"]) == (200, "cancelled")
                assert [event["logType"] for event in poll.events] == ["cancelled"]

    run_async(main())


# -- Turns that are asked for again are opened once ----------------------------------------------------


async def ids_of(stack: Stack, server: str) -> list[str]:
    """The ids of all runs of a server."""
    found: list[str] = []
    token = ""
    while True:
        page = (await stack.call("GET", f"{runs(server)}?limit=200{token}")).json
        found += [run["id"] for run in page["runs"]]
        if "nextPageToken" not in page:
            return found
        token = f"&pageToken={page['nextPageToken']}"


@pytest.mark.parametrize("accept", STREAMED)
def test_streamed_start_and_continue_see_no_restart(accept: str, tmp_path: Path) -> None:
    """Who starts or continues a run and streams its turn gets that turn to its end, over a restart of the runtime."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            where, path, first = runs("gated"), "", 1
            for name in (f"start restart {accept}", f"continue restart {accept}"):
                async with stack.stream("POST", where, {"content": name}, accept=accept) as stream:
                    follower = Follower(stream)
                    await eventually(partial(follower.has, first + 1))
                    path = stream.response.headers["Location"]
                    await restart(stack, name)
                    GATES[name].open.set()
                    await follower.task
                check_stream(follower.frames)
                log = (await stack.call("GET", f"{path}/events?after={first - 1}")).events
                assert events_of(follower.frames) == log
                assert log[0]["content"] == log[-1]["content"] == name
                assert follower.frames[-1].type == "stream.completed"
                first = log[-1]["sequence"] + 1
                where = path + "/input"
            assert await ids_of(stack, "gated") == [path.rpartition("/")[2]]

    run_async(main())


def test_sync_start_and_continue_see_no_restart(tmp_path: Path) -> None:
    """Who waits for a turn gets its end and its whole log, over a restart of the runtime service."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            starting = asyncio.create_task(stack.start("gated", "sync start restart"))
            await restart(stack, "sync start restart")
            GATES["sync start restart"].open.set()
            started = await starting
            assert (started.status, started.run["output"]) == (201, "sync start restart")
            path = started.headers["Location"]
            assert started.events == (await stack.call("GET", path + "/events")).events
            continuing = asyncio.create_task(stack.call("POST", path + "/input", {"content": "sync continue restart"}))
            await restart(stack, "sync continue restart")
            GATES["sync continue restart"].open.set()
            continued = await continuing
            assert (continued.status, continued.run["output"]) == (200, "sync continue restart")
            log = (await stack.call("GET", path + "/events")).events
            assert started.events + continued.events == log
            assert await ids_of(stack, "gated") == [started.run["id"]]

    run_async(main())


def test_turn_whose_answer_was_lost_is_opened_once(tmp_path: Path) -> None:
    """When a turn was accepted and nobody was told, asking again gives that turn: start, continue, sync, async."""
    wire = Wire()

    async def main() -> None:
        async with serving(tmp_path, wire=wire) as stack:
            where, turns = runs("gated"), 0
            for mode in ("sync", "async"):
                name = f"lost answer {mode}"
                started, continued = f"{name} start", f"{name} continue"
                where = runs("gated")
                for text in (started, continued):
                    await stack.call("GET", where.removesuffix("/input"))
                    wire.swallow(answers_only=True)
                    asking = asyncio.create_task(stack.call("POST", where, {"content": text, "mode": mode}))
                    await GATES[text].reached.wait()
                    wire.cut()
                    GATES[text].open.set()
                    answer = await asking
                    assert answer.status == (202 if mode == "async" else 201 if text == started else 200)
                    path = answer.headers["Location"]
                    assert (await stack.until_status(path))["output"] == text
                    where = path + "/input"
                    turns += 1
                log = (await stack.call("GET", path + "/events")).events
                words = [event["content"] for event in log]
                assert words == [started, "waiting", started, continued, "waiting", continued]
            assert len(await ids_of(stack, "gated")) == turns / 2

    run_async(main())


class Callers:
    """Callers of all kinds who go on until they are told to stop, and look at each answer as if nothing could break."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._stopping = False
        self.answered = 0
        self.made: dict[str, set[str]] = {"echo": set(), "slow": set(), "gated": set()}
        kinds = (self._start, self._start_streamed, self._continue, self._cancel, self._follow)
        self._tasks = [asyncio.create_task(self._go_on(kind)) for kind in kinds for _ in range(3)]

    async def stop(self) -> None:
        """Let everyone end what they have begun."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    @property
    def failed(self) -> bool:
        """Whether there is no need to wait for more."""
        return any(task.done() for task in self._tasks)

    async def _go_on(self, kind: Callable[[str], Awaitable[None]]) -> None:
        numbers = count(1)
        me = f"{kind.__name__} {id(asyncio.current_task())}"
        while not self._stopping:
            await kind(f"{me} {next(numbers)}")
            self.answered += 1

    def _note(self, server: str, run_id: str) -> None:
        assert run_id not in self.made[server]
        self.made[server].add(run_id)

    async def _start(self, name: str) -> None:
        answer = await self._stack.start("echo", name)
        assert (answer.status, answer.run["output"]) == (201, name)
        assert sequences(answer.events) == [1, 2]
        self._note("echo", answer.run["id"])

    async def _start_streamed(self, name: str) -> None:
        async with self._stack.stream("POST", runs("slow"), {"content": f"{name} and more words"}) as stream:
            frames = await stream.rest()
            path = stream.response.headers["Location"]
        check_stream(frames)
        assert events_of(frames) == (await self._stack.call("GET", path + "/events")).events
        assert (len(events_of(frames)), frames[-1].type) == (2, "stream.completed")
        self._note("slow", path.rpartition("/")[2])

    async def _continue(self, name: str) -> None:
        path = await self._stack.start_async("echo", name)
        self._note("echo", path.rpartition("/")[2])
        for turn in (2, 3):
            text = f"{name} {turn}"
            answer = await self._stack.call("POST", path + "/input", {"content": text})
            assert (answer.status, answer.run["output"]) == (200, text)
        log = (await self._stack.call("GET", path + "/events")).events
        assert [event["content"] for event in log] == [text for text in (name, f"{name} 2", f"{name} 3") for _ in "ab"]

    async def _cancel(self, name: str) -> None:
        path = await self._stack.start_async("gated", name)
        self._note("gated", path.rpartition("/")[2])
        answer = await self._stack.call("POST", path + "/cancel")
        assert (answer.status, answer.run["status"]) == (200, "cancelled")

    async def _follow(self, name: str) -> None:
        path = await self._stack.start_async("gated", name)
        self._note("gated", path.rpartition("/")[2])
        async with following(self._stack, path) as follower:
            await eventually(partial(follower.has, 2))
            GATES[name].open.set()
            await follower.check(self._stack, path)
        assert len(events_of(follower.frames)) == 3


def test_nobody_sees_cuts(tmp_path: Path) -> None:
    """While the connection is cut again and again every request is answered as ever, and every turn is opened once."""
    wire = Wire()

    async def main() -> None:
        async with serving(tmp_path, wire=wire) as stack:
            callers = Callers(stack)
            for number in range(CUTS):
                before, lost = callers.answered, wire.swallowed
                await eventually(lambda before=before: callers.answered > before + 5 or callers.failed)  # type: ignore[misc]
                if number % 2:
                    wire.swallow(answers_only=number % 4 == 1)
                    await eventually(lambda lost=lost: wire.swallowed > lost or callers.failed)  # type: ignore[misc]
                wire.cut()
            await callers.stop()
            for server, made in callers.made.items():
                listed = await ids_of(stack, server)
                assert len(listed) == len(made)
                assert set(listed) == made

    run_async(main())
