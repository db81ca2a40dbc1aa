"""Followers of a run over a real store: replay, then live, without gap or duplicate, however slow they are."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
import uvloop

from runtime_service import event_log as event_log_module
from runtime_service.errors import Draining
from runtime_service.event_log import EventLog, FollowOptions
from runtime_service.live_run import Delta, Draft, Update
from runtime_service.runs import EventDraft, EventRole, Run, RunStatus
from runtime_service.store.base import Cancel, Change, Outcome
from runtime_service.store.sqlite import SQLiteStore
from tests.support import (
    ORGANIZATION,
    SERVER,
    contents,
    eventually,
    key_of,
    log_of,
    new_run,
    next_turn,
    run_async,
    said,
)

COMPLETED = Outcome(RunStatus.COMPLETED, output="done")


class Story:
    """A run that is written by the test, each change published as its executor would."""

    def __init__(self, store: SQLiteStore, log: EventLog) -> None:
        self.store = store
        self.log = log
        self.run: Run

    def _publish(self, change: Change) -> Change:
        self.run = change.run
        self.log.publish(change)
        return change

    async def start(self, text: str = "hello") -> Run:
        """Start the run, its turn 1 running."""
        return self._publish(await self.store.start_run(new_run(text), claim=True)).run

    async def resume(self, text: str = "more") -> Run:
        """Open the next turn, queued; goes on writing to the turn before."""
        before = self.run
        change = await self.store.continue_run(next_turn(self.run, text), claim=False)
        self.log.publish(change)
        self.run = before
        return change.run

    async def claim(self) -> Run:
        """Run the next turn."""
        (change,) = await self.store.claim_turns(1)
        return self._publish(change).run

    async def say(self, *texts: str) -> None:
        """Append messages."""
        self._publish(await self.store.append_events(key_of(self.run), said(*texts)))

    async def write(self, events: Sequence[EventDraft]) -> None:
        """Append events."""
        self._publish(await self.store.append_events(key_of(self.run), events))

    async def finish(self, *texts: str) -> None:
        """Complete the turn."""
        self._publish(await self.store.finish_turn(key_of(self.run), said(*texts), COMPLETED))


@asynccontextmanager
async def story(path: Path) -> AsyncIterator[Story]:
    """A story that has not begun; nothing of it is left in memory at the end."""
    store = await SQLiteStore.open(path / "runs.sqlite")
    log = EventLog(store)
    try:
        yield Story(store, log)
        await eventually(lambda: not log._live)
    finally:
        await store.close()


async def follow(log: EventLog, run: Run, after: int = 0, options: FollowOptions | None = None) -> list[Update]:
    """All updates, to the end."""
    async with aclosing(log.follow(run, after, options or FollowOptions())) as updates:
        return [update async for update in updates]


async def collected(log: EventLog, run: Run, wait_seconds: float | None = None) -> list[Update]:
    """All that `collect` gives."""
    updates: list[Update] = []

    async def send(update: Update) -> None:
        updates.append(update)

    await log.collect(run, run.turn.first_sequence - 1, send, wait_seconds)
    return updates


def views_of(log: EventLog, run: Run) -> dict[int, Run]:
    """What is known of a run that somebody follows."""
    live = log._live.get(run.id)
    return {} if live is None else live._views


def sequences(updates: Sequence[Update]) -> list[int]:
    """The sequences of all events, in the order in which they came."""
    return [event.sequence for update in updates for event in update.events]


def texts_by_sequence(updates: Sequence[Update]) -> dict[int, str]:
    """What the deltas add up to; each begins where the one before of its sequence ended, or anew."""
    texts: dict[int, str] = {}
    for update in updates:
        if update.delta is not None:
            sequence, offset, text = update.delta
            assert offset in (0, len(texts.get(sequence, "")))
            texts[sequence] = texts.get(sequence, "")[:offset] + text
    return texts


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("held", [True, False])
def test_followers_that_come_at_any_moment_get_each_event_once(tmp_path: Path, seed: int, held: bool) -> None:
    """Whatever they have had already, whenever they come, however slowly they read, executed here or elsewhere."""
    chance = random.Random(seed)

    async def pause() -> None:
        for _ in range(chance.choice([0, 0, 1, 2, 5, 30])):
            await asyncio.sleep(0)

    async def watch(story: Story, run: Run) -> None:
        await pause()
        after = chance.choice([0, 0, 1, 3, 17])
        got: list[Update] = []
        async with aclosing(story.log.follow(run, after, FollowOptions(deltas=bool(chance.getrandbits(1))))) as updates:
            async for update in updates:
                got.append(update)
                await pause()
        assert sequences(got) == list(range(after + 1, last + 1))
        assert got[0].run is not None
        assert got[-1].run is not None
        assert got[-1].run.status is RunStatus.COMPLETED
        assert got[-1].run.last_turn == 2
        assert got[-1].run.last_sequence == last

    last = 0

    async def main() -> None:
        nonlocal last
        async with story(tmp_path) as tale:
            run = await tale.start()
            if held:
                tale.log.hold(run.id)
            followers = []
            for _ in range(3):
                followers += [asyncio.create_task(watch(tale, run)) for _ in range(4)]
                for n in range(chance.randrange(8)):
                    await tale.say(*[str(n)] * chance.randrange(1, 9))
                    await pause()
            await tale.resume()
            await tale.finish("end of one")
            await tale.claim()
            followers += [asyncio.create_task(watch(tale, run)) for _ in range(4)]
            await pause()
            await tale.say("x", "y")
            # Known before it happens, as the followers may end as soon as it has.
            last = tale.run.last_sequence + 1
            await tale.finish("end of two")
            followers += [asyncio.create_task(watch(tale, run)) for _ in range(2)]
            await asyncio.gather(*followers)
            if held:
                tale.log.let_go(run.id)

    run_async(main())


def test_slow_follower_is_caught_up_from_the_store(tmp_path: Path) -> None:
    """The tail in memory has moved on without it; it misses nothing and costs nobody anything."""

    async def main() -> None:
        async with story(tmp_path) as tale:
            run = await tale.start()
            got: list[Update] = []
            async with aclosing(tale.log.follow(run, 0, FollowOptions())) as updates:
                got.append(await anext(updates))
                for _ in range(30):
                    await tale.say(*["x"] * 100)
                await tale.write([EventDraft(EventRole.ASSISTANT, "y" * 200_000, 1)] * 5)
                (live,) = tale.log._live.values()
                assert live.tail[0].sequence > 1_000
                assert sum(len(event.content) for event in live.tail) <= 400_000
                await tale.finish()
                got += [update async for update in updates]
            assert sequences(got) == list(range(1, 3_007))
            assert all(len(update.events) <= event_log_module._UPDATE_EVENTS for update in got)

    run_async(main())


def test_live_events_come_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower that keeps up reads nothing from the store after its replay."""
    reads = 0
    read_events = SQLiteStore.read_events

    async def counted(self: SQLiteStore, run_id: str, after: int, limit: int, size: int) -> object:
        nonlocal reads
        reads += 1
        return await read_events(self, run_id, after, limit, size)

    monkeypatch.setattr(SQLiteStore, "read_events", counted)

    async def main() -> None:
        async with story(tmp_path) as tale:
            run = await tale.start()
            seen = 0

            async def watch() -> None:
                nonlocal seen
                async with aclosing(tale.log.follow(run, 0, FollowOptions())) as updates:
                    async for update in updates:
                        seen += len(update.events)

            watching = asyncio.create_task(watch())
            await eventually(lambda: seen == 1)
            for n in range(2, 40):
                await tale.say("x")
                await eventually(lambda n=n: seen == n)  # type: ignore[misc]
            await tale.finish()
            await watching
            assert reads == 1

    run_async(main())


def test_run_comes_first_last_and_when_its_status_changed(tmp_path: Path) -> None:
    """And not with every batch of events."""

    async def main() -> None:
        async with story(tmp_path) as tale:
            run = await tale.start()
            got: list[Update] = []

            async def watch() -> None:
                async with aclosing(tale.log.follow(run, 0, FollowOptions())) as updates:
                    async for update in updates:
                        got.append(update)  # noqa: PERF401 - watched while it grows

            def seen(last_sequence: int) -> bool:
                return sequences(got)[-1:] == [last_sequence]

            watching = asyncio.create_task(watch())
            await eventually(lambda: seen(1))
            await tale.say("a")
            await eventually(lambda: seen(2))
            await tale.resume()
            await eventually(lambda: seen(3))
            await tale.finish()
            claimed = await tale.claim()
            await eventually(lambda: got[-1].run == claimed)
            await tale.say("b")
            await eventually(lambda: seen(4))
            await tale.finish("c")
            await watching
            shown = [(u.run.turn.number, u.run.status) if u.run else None for u in got]
            queued, running = RunStatus.QUEUED, RunStatus.RUNNING
            assert shown == [(1, running), None, (2, queued), (2, running), None, (2, RunStatus.COMPLETED)]

    run_async(main())


@pytest.mark.parametrize("after", [0, 2, 3, 99])
def test_follower_of_a_settled_run_replays_and_ends(tmp_path: Path, after: int) -> None:
    """Its last update shows the run as it is, also when there is nothing after its sequence."""

    async def main() -> None:
        async with story(tmp_path) as tale:
            run = await tale.start()
            await tale.say("a")
            await tale.finish("b")
            got = await follow(tale.log, run, after)
            assert sequences(got) == list(range(after + 1, 4))
            assert got[-1].run == tale.run
            assert len(got) == 1

    run_async(main())


def test_events_of_a_running_turn_come_while_the_next_one_waits(tmp_path: Path) -> None:
    """A follower of the run, which shows the waiting turn, gets what the running one says at once."""

    async def main() -> None:
        async with story(tmp_path) as tale:
            run = await tale.start()
            async with aclosing(tale.log.follow(run, 0, FollowOptions())) as updates:
                assert sequences([await anext(updates)]) == [1]
                await tale.resume("waits")
                assert sequences([await anext(updates)]) == [2]
                for sequence in (3, 4, 5):
                    await tale.say("x")
                    assert sequences([await anext(updates)]) == [sequence]

    run_async(main())


@pytest.mark.parametrize("turn", [None, 1])
def test_end_that_comes_while_the_run_is_being_read_is_not_overlooked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turn: int | None
) -> None:
    """What was read before a change does not take the place of the change."""
    get_run = SQLiteStore.get_run
    reading, go = asyncio.Event(), asyncio.Event()

    async def slow(self: SQLiteStore, organization: str, server_id: str, run_id: str, turn: int | None = None) -> Run:
        run = await get_run(self, organization, server_id, run_id, turn)
        reading.set()
        await go.wait()
        return run

    async def main() -> None:
        async with story(tmp_path) as tale:
            run = await tale.start()
            monkeypatch.setattr(SQLiteStore, "get_run", slow)
            following = [asyncio.create_task(follow(tale.log, run, 0, FollowOptions(turn=turn))) for _ in range(2)]
            await reading.wait()
            await tale.say("a")
            await tale.finish("b")
            go.set()
            for updates in await asyncio.gather(*following):
                assert sequences(updates) == [1, 2, 3]
                assert updates[-1].run == tale.run

    run_async(main())


def test_turn_follower_ends_with_its_turn(tmp_path: Path) -> None:
    """The next turn, queued by then, is none of it; a follower of the run goes on to that one's end."""

    async def main() -> None:
        async with story(tmp_path) as tale:
            run = await tale.start()
            of_turn = asyncio.create_task(follow(tale.log, run, 0, FollowOptions(turn=1)))
            of_run = asyncio.create_task(follow(tale.log, run, 0, FollowOptions()))
            await tale.say("a")
            await tale.resume("next")
            await tale.say("b")
            await tale.finish("c")
            updates = await of_turn
            last = updates[-1].run
            assert last is not None
            assert (last.turn.number, last.status, last.last_turn) == (1, RunStatus.COMPLETED, 2)
            assert sequences(updates) == [1, 2, 3, 4, 5]
            assert not of_run.done()
            second = await tale.claim()
            of_second = asyncio.create_task(follow(tale.log, second, 2, FollowOptions(turn=2)))
            await tale.finish("d")
            assert sequences(await of_run) == [1, 2, 3, 4, 5, 6]
            assert sequences(await of_second) == [3, 4, 5, 6]
            # Both are found again later, from the store alone.
            assert sequences(await follow(tale.log, run, 0, FollowOptions(turn=1)))[:5] == [1, 2, 3, 4, 5]

    run_async(main())


def test_collect_says_nothing_before_the_end_and_then_the_turn_only(tmp_path: Path) -> None:
    """One update with the events of the turn and the run as it is at the end."""

    async def main() -> None:
        async with story(tmp_path) as tale:
            run = await tale.start()
            await tale.finish("one")
            second = await tale.resume("second")
            await tale.claim()
            updates: list[Update] = []

            async def send(update: Update) -> None:
                updates.append(update)

            collecting = asyncio.ensure_future(tale.log.collect(second, second.turn.first_sequence - 1, send))
            await tale.say("a")
            await tale.resume("third")
            await tale.say("b")
            for _ in range(20):
                await asyncio.sleep(0)
            assert updates == []
            await tale.finish("c")
            await collecting
            [update] = updates
            assert contents(update.events) == ["second", "a", "b", "c"]
            assert update.run is not None
            assert (update.run.turn.number, update.run.status) == (2, RunStatus.COMPLETED)
            assert (await log_of(tale.store, run.id))[4].content == "third"

    run_async(main())


def test_collect_of_a_long_turn_comes_in_pieces(tmp_path: Path) -> None:
    """Bounded in number and size each; only the last shows the end."""

    async def main() -> None:
        async with story(tmp_path) as tale:
            run = await tale.start()
            for _ in range(25):
                await tale.say(*["x"] * 100)
            await tale.write([EventDraft(EventRole.ASSISTANT, "y" * 400_000, 1)] * 6)
            await tale.finish("end")
            got = await collected(tale.log, run)
            assert sequences(got) == list(range(1, 2_509))
            followed = await follow(tale.log, run, 0, FollowOptions(turn=1))
            assert len(followed) > len(got)
            for updates, events, size in (
                (got, event_log_module._COLLECTED_EVENTS, event_log_module._COLLECTED_SIZE),
                (followed, event_log_module._UPDATE_EVENTS, event_log_module._UPDATE_SIZE),
            ):
                assert sequences(updates) == list(range(1, 2_509))
                assert all(len(update.events) <= events for update in updates)
                for update in updates:
                    assert len(update.events) == 1 or sum(len(event.content) for event in update.events) <= size
                assert updates[-1].run == tale.run

    run_async(main())


@pytest.mark.parametrize("collect", [True, False])
@pytest.mark.parametrize("wait_seconds", [0, 0.05])
def test_wait_seconds_ends_with_what_there_is(tmp_path: Path, collect: bool, wait_seconds: float) -> None:
    """A run that goes on is shown as it is then, with its events so far."""

    async def main() -> None:
        async with story(tmp_path) as tale:
            run = await tale.start()
            await tale.say("a")
            loop = asyncio.get_running_loop()
            began = loop.time()
            if collect:
                got = await collected(tale.log, run, wait_seconds)
            else:
                got = await follow(tale.log, run, 0, FollowOptions(turn=1, wait_seconds=wait_seconds))
            assert loop.time() - began >= wait_seconds - 0.002
            assert sequences(got) == [1, 2]
            assert got[-1].run is not None
            assert got[-1].run.status is RunStatus.RUNNING
            await tale.finish()

    run_async(main())


def test_wait_seconds_ends_also_by_a_timer_that_is_early(tmp_path: Path) -> None:
    """uvloop rounds timers to milliseconds: some come before their time by the clock."""

    async def main() -> None:
        async with story(tmp_path) as tale:
            run = await tale.start()
            waits = [0.1 + n / 10_000 for n in range(100)]
            options = [FollowOptions(turn=1, wait_seconds=seconds) for seconds in waits]
            for got in await asyncio.gather(*(follow(tale.log, run, 0, option) for option in options)):
                assert sequences(got) == [1]
            await tale.finish()

    run_async(main(), loop_factory=uvloop.new_event_loop)


def test_wait_seconds_does_not_hold_up_an_earlier_end(tmp_path: Path) -> None:
    """The end of the turn is the end of the wait."""

    async def main() -> None:
        async with story(tmp_path) as tale:
            run = await tale.start()
            waiting = asyncio.create_task(collected(tale.log, run, 3_600))
            await tale.finish("a")
            assert sequences(await waiting) == [1, 2]

    run_async(main())


# Deltas


def draft_of(sequence: int, *parts: str) -> Draft:
    """A draft at a place."""
    draft = Draft()
    draft.sequence = sequence
    draft.parts += parts
    return draft


def test_deltas_add_up_and_the_event_takes_their_place(tmp_path: Path) -> None:
    """Each goes on where the last ended; who asked for none gets none."""

    async def main() -> None:
        async with story(tmp_path) as tale:
            run = await tale.start()
            live = tale.log.hold(run.id)
            plain = asyncio.create_task(follow(tale.log, run))
            async with aclosing(tale.log.follow(run, 0, FollowOptions(deltas=True))) as updates:
                assert sequences([await anext(updates)]) == [1]
                draft = draft_of(2, "Grüß ")
                live.show_draft(draft)
                assert (await anext(updates)).delta == Delta(2, 0, "Grüß ")
                draft.parts += ["\U0001f600", "!"]
                live.show_draft(draft)
                assert (await anext(updates)).delta == Delta(2, 5, "\U0001f600!")
                live.show_draft(None)
                await tale.say("Grüß \U0001f600!")
                assert sequences([await anext(updates)]) == [2]
                live.show_draft(draft_of(3, "a"))
                assert (await anext(updates)).delta == Delta(3, 0, "a")
                live.show_draft(None)
                await tale.finish()
                assert [update async for update in updates][-1].run == tale.run
            assert texts_by_sequence(await plain) == {}
            tale.log.let_go(run.id)

    run_async(main())


def test_delta_restarts_when_its_sequence_was_taken(tmp_path: Path) -> None:
    """A user's input comes between: the text begins again at offset 0 under the next sequence, after that event."""

    async def main() -> None:
        async with story(tmp_path) as tale:
            run = await tale.start()
            live = tale.log.hold(run.id)
            async with aclosing(tale.log.follow(run, 0, FollowOptions(deltas=True))) as updates:
                await anext(updates)
                draft = draft_of(2, "ab")
                live.show_draft(draft)
                assert (await anext(updates)).delta == Delta(2, 0, "ab")
                draft.sequence = 3
                await tale.resume("input")
                update = await anext(updates)
                assert contents(update.events) == ["input"]
                assert (await anext(updates)).delta == Delta(3, 0, "ab")
                draft.parts.append("c")
                live.show_draft(draft)
                assert (await anext(updates)).delta == Delta(3, 2, "c")
            live.show_draft(None)
            tale.log.let_go(run.id)

    run_async(main())


def test_late_follower_gets_the_draft_so_far(tmp_path: Path) -> None:
    """Whole and at offset 0, after the events before it."""

    async def main() -> None:
        async with story(tmp_path) as tale:
            run = await tale.start()
            live = tale.log.hold(run.id)
            await tale.say("a")
            live.show_draft(draft_of(3, "one ", "two ", "three"))
            async with aclosing(tale.log.follow(run, 0, FollowOptions(deltas=True))) as updates:
                assert sequences([await anext(updates)]) == [1, 2]
                assert (await anext(updates)).delta == Delta(3, 0, "one two three")
            async with aclosing(tale.log.follow(run, 2, FollowOptions(deltas=True))) as updates:
                got = [await anext(updates), await anext(updates)]
                assert texts_by_sequence(got) == {3: "one two three"}
            live.show_draft(None)
            tale.log.let_go(run.id)

    run_async(main())


# Ends


def test_close_ends_every_follower_with_draining(tmp_path: Path) -> None:
    """Those that wait and those that come; the process is stopping, the run is not over."""

    async def main() -> None:
        async with story(tmp_path) as tale:
            run = await tale.start()
            options = [FollowOptions(), FollowOptions(turn=1), FollowOptions(wait_seconds=3_600)]
            waiting = [asyncio.create_task(follow(tale.log, run, 0, option)) for option in options]
            waiting.append(asyncio.create_task(collected(tale.log, run)))
            await eventually(lambda: views_of(tale.log, run))
            tale.log.close()
            for task in waiting:
                with pytest.raises(Draining):
                    await task
            with pytest.raises(Draining):
                await follow(tale.log, run)

    run_async(main())


def test_follower_that_goes_away_leaves_nothing(tmp_path: Path) -> None:
    """Cancelled while it waits, closed in the middle, or given up before it began."""

    async def main() -> None:
        async with story(tmp_path) as tale:
            run = await tale.start()
            cancelled = asyncio.create_task(follow(tale.log, run))
            await eventually(lambda: run.id in tale.log._live)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            assert tale.log._live == {}
            updates = tale.log.follow(run, 0, FollowOptions(deltas=True, wait_seconds=60))
            await anext(updates)
            await updates.aclose()
            assert tale.log._live == {}
            await tale.log.follow(run, 0, FollowOptions()).aclose()
            with tale.log.held(run.id):
                assert run.id in tale.log._live
            assert tale.log._live == {}

    run_async(main())


def test_cancel_of_several_turns_ends_the_followers_of_each(tmp_path: Path) -> None:
    """Turns that were settled along with the one shown are seen as settled."""

    async def main() -> None:
        async with story(tmp_path) as tale:
            run = await tale.start()
            second = await tale.resume()
            third = await tale.resume()
            followers = [
                asyncio.create_task(follow(tale.log, of, 0, FollowOptions(turn=of.turn.number)))
                for of in (run, second, third)
            ]
            whole = asyncio.create_task(follow(tale.log, run))
            await eventually(lambda: len(views_of(tale.log, run)) == 4)
            change = await tale.store.cancel_run(Cancel(ORGANIZATION, SERVER, run.id), said("rest"), "rest")
            tale.log.publish_settled(change)
            for number, updates in enumerate(await asyncio.gather(*followers), 1):
                last = updates[-1].run
                assert last is not None
                assert (last.turn.number, last.status) == (number, RunStatus.CANCELLED)
                assert last.turn.output == ("rest" if number == 1 else None)
                assert sequences(updates) == [1, 2, 3, 4, 5]
            assert sequences(await whole) == [1, 2, 3, 4, 5]

    run_async(main())


def test_log_remembers_only_so_much_of_a_long_run(tmp_path: Path) -> None:
    """Hundreds of turns and thousands of events of a run that is executed here leave a bounded tail and few views."""

    async def main() -> None:
        async with story(tmp_path) as tale:
            run = await tale.start()
            live = tale.log.hold(run.id)
            for _ in range(60):
                await tale.finish(*["x"] * 50)
                await tale.resume()
                await tale.claim()
            assert len(live.tail) <= 1_000
            assert len(live._views) <= 32
            await tale.finish()
            assert sequences(await follow(tale.log, run)) == list(range(1, 60 * 51 + 2))
            tale.log.let_go(run.id)

    run_async(main())
