"""What every RunStore promises, of whatever kind."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from runtime_service.errors import InvalidRequest, RequestIdReused, RunNotFound, RunServiceError, StoreUnavailable
from runtime_service.runs import EventDraft, EventRole, LogLevel, RunMode, RunStatus
from runtime_service.store.base import ATTEMPT_BEGINS, Cancel, Change, Outcome, RunStore, TurnKey, TurnLost
from tests.stores import Stores
from tests.support import (
    ALL,
    ORGANIZATION,
    SERVER,
    cancel_of,
    contents,
    key_of,
    log_of,
    new_run,
    next_turn,
    run_async,
    running,
    said,
    snapshot,
    with_store,
)

COMPLETED = Outcome(RunStatus.COMPLETED, output="done")
OUTCOMES = [
    COMPLETED,
    Outcome(RunStatus.COMPLETED),
    Outcome(RunStatus.FAILED, output="so far", error="It broke.", error_code="AGENT_FAILED"),
]


def never(_: str) -> bool:
    """No agent may be begun again."""
    return False


def always(_: str) -> bool:
    """Every agent may be begun again."""
    return True


# Accepting


@pytest.mark.parametrize("wait", [True, False])
def test_start_with_a_known_request_id_starts_nothing(stores: Stores, wait: bool) -> None:
    """It shows the run as it has become, also when both come within one transaction."""

    async def check(store: RunStore) -> None:
        first, second = new_run("hi", request_id="once"), new_run("hi", request_id="once")
        writes = [store.start_run(first, claim=True)]
        if wait:
            await writes[0]
        writes.append(store.start_run(second, claim=True))
        done, again = [await write for write in writes]
        assert (done.replayed, again.replayed, again.events) == (False, True, ())
        assert again.run == done.run
        await store.finish_turn(key_of(done.run), said("one"), COMPLETED)
        latest = await store.get_run(ORGANIZATION, SERVER, first.id)
        assert await store.start_run(second, claim=False) == Change(latest, (), replayed=True)
        assert await store.get_requested(second) == Change(latest, (), replayed=True)
        runs = await store.list_runs(ORGANIZATION, SERVER, status=None, token=None, limit=ALL)
        assert [run.id for run in runs.runs] == [first.id]

    with_store(stores, check)


def test_start_that_comes_again_leaves_its_turn_running(stores: Stores) -> None:
    """Also the very same one, run id and all: who executes the turn goes on."""

    async def check(store: RunStore) -> None:
        new = new_run("hi", request_id="once")
        started = (await store.start_run(new, claim=True)).run
        assert (await store.start_run(new, claim=True)).replayed
        assert contents((await store.append_events(key_of(started), said("one"))).events) == ["one"]

    with_store(stores, check)


def test_request_that_is_being_written_is_known(stores: Stores) -> None:
    """Who asks for it in the moment of its write learns what it gave, and a stranger of its id is refused."""

    async def check(store: RunStore) -> None:
        first = new_run("hi", request_id="once")
        writing = store.start_run(first, claim=True)
        same, other = store.get_requested(first), store.get_requested(new_run(server_id="else", request_id="once"))
        assert await same == Change((await writing).run, (), replayed=True)
        with pytest.raises(RequestIdReused):
            await other
        turn = next_turn(first, request_id="twice")
        resuming, found = store.continue_run(turn, claim=True), store.get_requested(turn)
        assert await found == Change((await resuming).run, (), replayed=True)

    with_store(stores, check)


def test_continue_with_a_known_request_id_opens_nothing(stores: Stores) -> None:
    """It shows the turn that the first one opened, not a later one."""

    async def check(store: RunStore) -> None:
        run = await running(store)
        asked = next_turn(run, "again", request_id="once")
        first = await store.continue_run(asked, claim=True)
        later = await store.continue_run(next_turn(run, "later"), claim=True)
        assert (first.run.turn.number, later.run.turn.number) == (2, 3)
        again = await store.continue_run(asked, claim=True)
        assert again == Change(await store.get_run(ORGANIZATION, SERVER, run.id, 2), (), replayed=True)
        assert contents(await log_of(store, run.id)) == ["hello", "again", "later"]

    with_store(stores, check)


def test_request_id_belongs_to_one_organization_and_one_request(stores: Stores) -> None:
    """Another organization's is another id; one that asks for anything else is refused, and changes nothing."""

    async def check(store: RunStore) -> None:
        started = (await store.start_run(new_run(request_id="start"), claim=True)).run
        other = await store.start_run(new_run(organization="other", request_id="start"), claim=True)
        assert not other.replayed
        assert other.run.id != started.id
        await store.continue_run(next_turn(started, request_id="continue"), claim=True)
        elsewhere = await running(store)
        ended = await running(store)
        await store.cancel_run(cancel_of(ended, request_id="cancel"), [], None)
        before = [await snapshot(store, run) for run in (started, elsewhere, ended)]
        for refused in (
            store.start_run(new_run("other text", request_id="start"), claim=True),
            store.start_run(new_run(metadata=b"{}", request_id="start"), claim=True),
            store.start_run(new_run(server_id="else", request_id="start"), claim=True),
            store.start_run(new_run(request_id="continue"), claim=True),
            store.continue_run(next_turn(started, request_id="start"), claim=True),
            store.continue_run(next_turn(started, "other text", request_id="continue"), claim=True),
            store.continue_run(next_turn(elsewhere, request_id="continue"), claim=True),
            store.continue_run(next_turn(ended, request_id="cancel"), claim=True),
            store.cancel_run(cancel_of(started, request_id="start"), said("x"), "x"),
            store.cancel_run(cancel_of(elsewhere, request_id="cancel"), said("x"), "x"),
            store.get_requested(new_run("other text", request_id="start")),
        ):
            with pytest.raises(RequestIdReused):
                await refused
        assert await store.get_requested(new_run(request_id="unknown")) is None
        assert await store.get_requested(new_run(organization="third", request_id="start")) is None
        assert await store.get_requested(new_run()) is None
        assert [await snapshot(store, run) for run in (started, elsewhere, ended)] == before

    with_store(stores, check)


def test_request_that_was_refused_is_not_known(stores: Stores) -> None:
    """Its id is free for the next one, also for another request."""

    async def check(store: RunStore) -> None:
        for refused in (
            store.continue_run(next_turn(new_run(), request_id="once"), claim=True),
            store.cancel_run(cancel_of(new_run(), request_id="once"), [], None),
        ):
            with pytest.raises(RunNotFound):
                await refused
        assert not (await store.start_run(new_run(request_id="once"), claim=True)).replayed

    with_store(stores, check)


def test_requests_are_known_after_a_crash(stores: Stores) -> None:
    """Those that started, continued and cancelled, each with its own answer."""

    async def main() -> None:
        start = new_run(request_id="start")
        resume, cancel = next_turn(start, request_id="continue"), cancel_of(start, request_id="cancel")
        async with stores.open() as store:
            await store.start_run(start, claim=True)
            await store.continue_run(resume, claim=True)
            await store.cancel_run(cancel, [], None)
        async with stores.open() as store:
            again = [
                await store.start_run(start, claim=True),
                await store.continue_run(resume, claim=True),
                await store.cancel_run(cancel, [], None),
            ]
            assert [(change.replayed, change.run.turn.number) for change in again] == [(True, 1), (True, 2), (True, 2)]

    run_async(main())


@pytest.mark.parametrize("claim", [True, False])
def test_start_run_answers_with_what_is_stored(stores: Stores, claim: bool) -> None:
    """The change shows turn 1 and the user event, as every later read does."""

    async def check(store: RunStore) -> None:
        new = new_run("hi", title="A title", metadata=b'{"a":1}', mode=RunMode.ASYNC)
        change = await store.start_run(new, claim=claim)
        run = change.run
        assert run.status is (RunStatus.RUNNING if claim else RunStatus.QUEUED)
        assert (run.turn.attempt, run.turn.epoch) == (int(claim), int(claim))
        assert (run.id, run.title, run.turn.input, run.turn.mode) == (new.id, "A title", "hi", RunMode.ASYNC)
        assert (run.turn.metadata, run.thread_metadata) == (b'{"a":1}', b'{"a":1}')
        assert (run.message_count, run.last_sequence, run.last_turn, run.turn.first_sequence) == (1, 1, 1, 1)
        (event,) = change.events
        assert (event.sequence, event.turn, event.role, event.content) == (1, 1, EventRole.USER, "hi")
        assert event.metadata == b'{"a":1}'
        assert await store.get_run(ORGANIZATION, SERVER, new.id) == run
        assert await log_of(store, new.id) == [event]

    with_store(stores, check)


def test_continue_run_after_the_end_opens_a_running_turn(stores: Stores) -> None:
    """With claim, the next turn of a settled run runs at once and its events go on where the log ended."""

    async def check(store: RunStore) -> None:
        run = await running(store)
        await store.finish_turn(key_of(run), said("one"), COMPLETED)
        change = await store.continue_run(next_turn(run, "again"), claim=True)
        assert change.run.status is RunStatus.RUNNING
        assert (change.run.turn.number, change.run.turn.first_sequence, change.run.turn.epoch) == (2, 3, 1)
        assert contents(change.events) == ["again"]
        await store.append_events(key_of(change.run), said("two"))
        events = await log_of(store, run.id)
        assert contents(events) == ["hello", "one", "again", "two"]
        assert [event.turn for event in events] == [1, 1, 2, 2]
        assert (await store.get_run(ORGANIZATION, SERVER, run.id)).message_count == 4

    with_store(stores, check)


def test_continue_run_of_a_running_turn_waits_and_leaves_no_gap(stores: Stores) -> None:
    """Even with claim the input is queued; the events of both turns share one sequence."""

    async def check(store: RunStore) -> None:
        run = await running(store)
        await store.append_events(key_of(run), said("a"))
        second = (await store.continue_run(next_turn(run, "wait"), claim=True)).run
        assert second.status is RunStatus.QUEUED
        await store.append_events(key_of(run), said("b"))
        assert await store.claim_turns(10) == []
        finished = await store.finish_turn(key_of(run), said("c"), COMPLETED)
        assert (finished.run.turn.number, finished.run.status) == (1, RunStatus.COMPLETED)
        assert (await store.get_run(ORGANIZATION, SERVER, run.id)).status is RunStatus.QUEUED
        (claimed,) = await store.claim_turns(10)
        assert (claimed.run.turn.number, claimed.run.turn.input, claimed.run.turn.epoch) == (2, "wait", 1)
        await store.finish_turn(key_of(claimed.run), said("d"), COMPLETED)
        events = await log_of(store, run.id)
        assert contents(events) == ["hello", "a", "wait", "b", "c", "d"]
        assert [event.turn for event in events] == [1, 1, 2, 1, 1, 2]
        assert (await store.get_run(ORGANIZATION, SERVER, run.id)).status is RunStatus.COMPLETED

    with_store(stores, check)


def test_continue_run_keeps_the_metadata_unless_it_brings_its_own(stores: Stores) -> None:
    """The thread keeps the start's metadata in any case."""

    async def check(store: RunStore) -> None:
        run = (await store.start_run(new_run(metadata=b'{"n": 1}'), claim=False)).run
        kept = (await store.continue_run(next_turn(run), claim=False)).run
        own = (await store.continue_run(next_turn(run, metadata=b"{}"), claim=False)).run
        assert (kept.turn.metadata, own.turn.metadata) == (b'{"n": 1}', b"{}")
        assert own.thread_metadata == b'{"n": 1}'
        assert [event.metadata for event in await log_of(store, run.id)] == [b'{"n": 1}', None, b"{}"]

    with_store(stores, check)


@pytest.mark.parametrize(
    "metadata",
    [b"{}", b' {"b": 1,  "a":null}\n', b'{"n":123456789012345678901234567890}', '{"é":"日本\U0001f600"}'.encode()],
)
def test_metadata_comes_back_byte_for_byte(stores: Stores, metadata: bytes) -> None:
    """Of the run, of the turn, of the user event and of an agent's event."""

    async def check(store: RunStore) -> None:
        run = (await store.start_run(new_run(metadata=metadata), claim=True)).run
        draft = EventDraft(EventRole.ASSISTANT, "x", 1, metadata=metadata)
        await store.finish_turn(key_of(run), [draft], COMPLETED)
        run = await store.get_run(ORGANIZATION, SERVER, run.id)
        assert (run.turn.metadata, run.thread_metadata) == (metadata, metadata)
        assert [event.metadata for event in await log_of(store, run.id)] == [metadata, metadata]

    with_store(stores, check)


def test_events_come_back_as_they_were_appended(stores: Stores) -> None:
    """Every field of an event, and any text that is valid Unicode."""

    async def check(store: RunStore) -> None:
        run = await running(store)
        drafts = [
            EventDraft(EventRole.EXECUTION_LOG, "", 7, "tool_call", LogLevel.SUCCESS, b'{"a":[]}'),
            EventDraft(EventRole.SYSTEM, "日本\u202e\U0001f600\r\n", 8, None, LogLevel.WARNING),
            EventDraft(EventRole.ASSISTANT, "x" * 100_000, 9),
        ]
        change = await store.append_events(key_of(run), drafts)
        assert change.run.status is RunStatus.RUNNING
        stored = (await log_of(store, run.id))[1:]
        assert tuple(stored) == change.events
        for draft, event in zip(drafts, stored, strict=True):
            for name in draft.__struct_fields__:
                assert getattr(event, name) == getattr(draft, name)

    with_store(stores, check)


# Settling


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_finish_turn_stores_the_last_events_and_the_outcome(stores: Stores, outcome: Outcome) -> None:
    """The run shows the outcome whole, with the time of its end."""

    async def check(store: RunStore) -> None:
        run = await running(store)
        change = await store.finish_turn(key_of(run), said("bye"), outcome)
        turn = change.run.turn
        assert (turn.status, turn.output, turn.error, turn.error_code) == (
            outcome.status,
            outcome.output,
            outcome.error,
            outcome.error_code,
        )
        assert turn.completed_at_ms is not None
        assert turn.completed_at_ms >= run.created_at_ms
        assert contents(change.events) == ["bye"]
        assert await store.get_run(ORGANIZATION, SERVER, run.id) == change.run

    with_store(stores, check)


Write = Callable[[RunStore, TurnKey], Awaitable[object]]
WRITES: dict[str, Write] = {
    "append": lambda store, key: store.append_events(key, said("late")),
    "append nothing": lambda store, key: store.append_events(key, []),
    "finish": lambda store, key: store.finish_turn(key, said("late"), OUTCOMES[2]),
    "release": lambda store, key: store.release_turn(key, said("late")),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("end", ["completed", "failed", "cancelled", "requeued", "claimed again", "queued", "unknown"])
def test_a_turn_that_is_not_the_writers_takes_nothing(stores: Stores, write: Write, end: str) -> None:
    """A settled turn, another epoch, a turn or run that there is not: TurnLost, and all stays as it was."""

    async def check(store: RunStore) -> None:
        run = await running(store)
        key = key_of(run)
        match end:
            case "completed":
                await store.finish_turn(key, said("end"), COMPLETED)
            case "failed":
                await store.finish_turn(key, said("end"), OUTCOMES[2])
            case "cancelled":
                await store.cancel_run(cancel_of(run), [], None)
            case "requeued":
                await store.release_turn(key, [])
            case "claimed again":
                await store.release_turn(key, [])
                assert len(await store.claim_turns(1)) == 1
            case "queued":
                await store.continue_run(next_turn(run), claim=False)
                key = TurnKey(run.id, 2, 0)
            case "unknown":
                key = TurnKey(new_run().id, 1, 1)
        before = await snapshot(store, run)
        with pytest.raises(TurnLost):
            await write(store, key)
        assert await snapshot(store, run) == before

    with_store(stores, check)


def test_an_outcome_never_changes(stores: Stores) -> None:
    """Neither by another finish, nor by a cancel, a recovery, or a later turn."""

    async def check(store: RunStore) -> None:
        run = await running(store)
        settled = (await store.finish_turn(key_of(run), [], OUTCOMES[2])).run.turn
        cancelled = await store.cancel_run(cancel_of(run), said("late"), "late")
        assert cancelled.events == ()
        assert cancelled.run.turn == settled
        await store.save_draft(key_of(run), "late")
        assert await store.recover(3, always) == []
        await store.continue_run(next_turn(run), claim=True)
        await store.cancel_run(cancel_of(run), [], "other")
        assert (await store.get_run(ORGANIZATION, SERVER, run.id, 1)).turn == settled

    with_store(stores, check)


def test_release_turn_gives_the_attempt_back(stores: Stores) -> None:
    """The turn waits again, what was said stays; the next claim is the same attempt in a new epoch, and says so."""

    async def check(store: RunStore) -> None:
        run = await running(store)
        released = await store.release_turn(key_of(run), said("so far"))
        assert (released.run.status, released.run.turn.attempt) == (RunStatus.QUEUED, 0)
        assert await store.count_queued() == 1
        (claimed,) = await store.claim_turns(1)
        assert claimed.run.turn.attempt == 1
        assert claimed.run.turn.epoch > run.turn.epoch
        again = ATTEMPT_BEGINS.format(attempt=1)
        assert contents(claimed.events) == [again]
        assert contents(await log_of(store, run.id)) == ["hello", "so far", again]

    with_store(stores, check)


# Cancelling


def test_cancel_run_settles_every_open_turn(stores: Stores) -> None:
    """The rest of the log belongs to the earliest open turn, the run shows the latest."""

    async def check(store: RunStore) -> None:
        run = await running(store)
        await store.finish_turn(key_of(run), said("one"), COMPLETED)
        second = (await store.continue_run(next_turn(run), claim=True)).run
        await store.continue_run(next_turn(run, "third"), claim=False)
        change = await store.cancel_run(cancel_of(run), said("rest"), "rest")
        assert (change.run.turn.number, change.run.status) == (3, RunStatus.CANCELLED)
        assert [(event.content, event.turn) for event in change.events][:1] == [("rest", 2)]
        assert [event.log_type for event in change.events] == [None, "cancelled"]
        turns = [(await store.get_run(ORGANIZATION, SERVER, run.id, number)).turn for number in (1, 2, 3)]
        assert [turn.status for turn in turns] == [RunStatus.COMPLETED, RunStatus.CANCELLED, RunStatus.CANCELLED]
        assert [turn.output for turn in turns] == ["done", "rest", None]
        with pytest.raises(TurnLost):
            await store.append_events(key_of(second), said("late"))
        assert await store.count_queued() == 0
        again = await store.cancel_run(cancel_of(run), said("again"), "again")
        assert (again.run, again.events) == (change.run, ())
        await log_of(store, run.id)

    with_store(stores, check)


def test_cancel_with_a_known_request_id_changes_nothing(stores: Stores) -> None:
    """It shows the turn that was the latest then; one that was opened since goes on."""

    async def check(store: RunStore) -> None:
        run = await running(store)
        waiting = (await store.continue_run(next_turn(run), claim=False)).run
        cancel = cancel_of(run, request_id="once")
        first = await store.cancel_run(cancel, said("rest"), "rest")
        assert (first.replayed, first.run.turn.number, len(first.events)) == (False, 2, 2)
        again = await store.cancel_run(cancel, said("again"), "again")
        assert again == Change(first.run, (), replayed=True)
        later = await store.continue_run(next_turn(run, "later"), claim=True)
        before = await snapshot(store, run)
        again = await store.cancel_run(cancel, said("again"), "again")
        latest = await store.get_run(ORGANIZATION, SERVER, run.id, waiting.turn.number)
        assert again == Change(latest, (), replayed=True)
        assert await snapshot(store, run) == before
        await store.append_events(key_of(later.run), said("goes on"))
        assert not (await store.cancel_run(cancel_of(run, request_id="other"), [], None)).replayed
        assert (await store.get_run(ORGANIZATION, SERVER, run.id)).status is RunStatus.CANCELLED

    with_store(stores, check)


def test_cancel_that_found_nothing_to_cancel_is_known(stores: Stores) -> None:
    """Its repetition does not cancel what came later either."""

    async def check(store: RunStore) -> None:
        run = await running(store)
        settled = (await store.finish_turn(key_of(run), said("one"), COMPLETED)).run
        cancel = cancel_of(run, request_id="once")
        assert await store.cancel_run(cancel, said("x"), "x") == Change(settled, ())
        await store.continue_run(next_turn(run), claim=True)
        again = await store.cancel_run(cancel, said("x"), "x")
        assert (again.replayed, again.run.turn, again.events) == (True, settled.turn, ())
        assert (await store.get_run(ORGANIZATION, SERVER, run.id)).status is RunStatus.RUNNING

    with_store(stores, check)


def test_cancel_without_events_keeps_the_draft_that_is_stored(stores: Stores) -> None:
    """As an incomplete event and as the output, once; who brings what the agent had said is believed."""

    async def check(store: RunStore) -> None:
        for events, kept in (([], "half"), (said("half a sentence"), "half a sentence")):
            run = await running(store)
            await store.continue_run(next_turn(run), claim=False)
            await store.save_draft(key_of(run), "half")
            change = await store.cancel_run(cancel_of(run), events, kept if events else None)
            assert [(event.turn, event.content) for event in change.events][:1] == [(1, kept)]
            assert [event.log_type for event in change.events] == [None if events else "incomplete", "cancelled"]
            outputs = [(await store.get_run(ORGANIZATION, SERVER, run.id, n)).turn.output for n in (1, 2)]
            assert outputs == [kept, None]
            assert contents(await log_of(store, run.id)) == ["hello", "more", kept, "The run was cancelled."]

    with_store(stores, check)


# Claiming


def test_claim_turns_takes_the_oldest_first_once_each(stores: Stores) -> None:
    """A queue in the order of acceptance, of which no turn is given to two."""

    async def check(store: RunStore) -> None:
        ids = [(await store.start_run(new_run(str(n)), claim=False)).run.id for n in range(5)]
        first, rest = await asyncio.gather(store.claim_turns(2), store.claim_turns(10))
        assert [change.run.id for change in first] == ids[:2]
        assert [change.run.id for change in rest] == ids[2:]
        for change in first + rest:
            assert (change.run.status, change.run.turn.attempt, change.run.turn.epoch) == (RunStatus.RUNNING, 1, 1)
        assert await store.claim_turns(10) == []

    with_store(stores, check)


def test_claim_turns_takes_one_turn_of_a_run_at_a_time(stores: Stores) -> None:
    """Inputs of one run are executed in order; each of them is counted as one that waits."""

    async def check(store: RunStore) -> None:
        run = (await store.start_run(new_run("1"), claim=False)).run
        await store.start_run(new_run("other"), claim=False)
        for text in ("2", "3"):
            await store.continue_run(next_turn(run, text), claim=False)
        assert await store.count_queued() == 4
        for number in (1, 2, 3):
            mine = [c.run for c in await store.claim_turns(10) if c.run.id == run.id]
            assert [r.turn.number for r in mine] == [number]
            latest = await store.get_run(ORGANIZATION, SERVER, run.id)
            assert latest.status is (RunStatus.RUNNING if number == 3 else RunStatus.QUEUED)
            await store.finish_turn(key_of(mine[0]), [], COMPLETED)
        assert await store.count_queued() == 0

    with_store(stores, check)


# Recovering


def test_recover_queues_again_up_to_the_attempts_then_fails(stores: Stores) -> None:
    """Each new attempt is told in the log; past the last the turn fails as RUNTIME_LOST."""

    async def main() -> None:
        async with stores.open() as store:
            run = await running(store)
        for attempt in (2, 3):
            async with stores.open() as store:
                (change,) = await store.recover(3, always)
                assert change.run.status is RunStatus.QUEUED
                (claimed,) = await store.claim_turns(1)
                assert claimed.run.turn.attempt == attempt
                assert claimed.run.turn.epoch > run.turn.epoch
                assert [event.log_type for event in claimed.events] == ["attempt"]
                with pytest.raises(TurnLost):
                    await store.append_events(key_of(run), said("late"))
                run = claimed.run
        async with stores.open() as store:
            (change,) = await store.recover(3, always)
            assert change.run.turn.error_code == "RUNTIME_LOST"
            assert "attempt 3" in (change.run.turn.error or "")
            assert await store.claim_turns(1) == []
            assert await store.recover(3, always) == []
            log_types = [event.log_type for event in await log_of(store, run.id)]
            assert log_types == [None, "attempt", "attempt", "runtime_lost"]
            assert await store.get_run(ORGANIZATION, SERVER, run.id) == change.run

    run_async(main())


def test_recover_fails_at_once_what_may_not_be_repeated(stores: Stores) -> None:
    """The agent decides, by its server; queued turns are none of it, and are executed."""

    async def main() -> None:
        async with stores.open() as store:
            run = await running(store)
            await store.continue_run(next_turn(run, "waits"), claim=False)
            other = (await store.start_run(new_run(server_id="other"), claim=True)).run
        async with stores.open() as store:
            changes = await store.recover(3, lambda server_id: server_id == "other")
            assert {change.run.id: change.run.status for change in changes} == {
                run.id: RunStatus.FAILED,
                other.id: RunStatus.QUEUED,
            }
            assert (await store.get_run(ORGANIZATION, SERVER, run.id)).status is RunStatus.QUEUED
            claimed = {change.run.id: change.run.turn.number for change in await store.claim_turns(10)}
            assert claimed == {run.id: 2, other.id: 1}

    run_async(main())


def test_recover_leaves_a_run_the_status_of_its_latest_turn(stores: Stores) -> None:
    """Input that waits behind a turn that was lost makes it a run that waits; so it is listed, and not deleted."""

    async def main() -> None:
        async with stores.open() as store:
            run = await running(store)
            await store.continue_run(next_turn(run), claim=False)
        async with stores.open() as store:
            (change,) = await store.recover(3, never)
            assert change.run.status is RunStatus.FAILED
            listed = {
                status: (await store.list_runs(ORGANIZATION, SERVER, status=status, token=None, limit=9)).runs
                for status in RunStatus
            }
            assert [status for status, runs in listed.items() if runs] == [RunStatus.QUEUED]
            assert not any(await store.delete_runs(1 << 50, 9))

    run_async(main())


def test_recover_leaves_alone_what_this_process_holds(stores: Stores) -> None:
    """However often it is asked, and whatever an earlier process had left."""

    async def main() -> None:
        async with stores.open() as store:
            left = [await running(store, text) for text in ("cancelled", "lost")]
        async with stores.open() as store:
            mine = await running(store)
            await store.cancel_run(cancel_of(left[0]), [], None)
            (change,) = await store.recover(3, always)
            assert change.run.id == left[1].id
            (claimed,) = await store.claim_turns(10)
            assert await store.recover(3, always) == []
            for run in (mine, claimed.run):
                await store.append_events(key_of(run), said("goes on"))
                await store.finish_turn(key_of(run), [], COMPLETED)

    run_async(main())


@pytest.mark.parametrize("may_repeat", [always, never])
def test_recover_keeps_the_draft_as_incomplete(stores: Stores, may_repeat: Callable[[str], bool]) -> None:
    """What the agent had said of its message is an event, once; the failed turn has it as its output."""

    async def main() -> None:
        async with stores.open() as store:
            run = await running(store)
            await store.save_draft(key_of(run), "half a sen")
            await store.save_draft(key_of(run), "half a sentence")
            assert len(await log_of(store, run.id)) == 1
        async with stores.open() as store:
            (change,) = await store.recover(3, may_repeat)
            incomplete = [event for event in await log_of(store, run.id) if event.log_type == "incomplete"]
            assert [(event.role, event.content) for event in incomplete] == [(EventRole.ASSISTANT, "half a sentence")]
            assert change.run.turn.output == (None if may_repeat is always else "half a sentence")
            await store.claim_turns(1)
        async with stores.open() as store:
            await store.recover(3, may_repeat)
            assert sum(event.log_type == "incomplete" for event in await log_of(store, run.id)) == 1

    run_async(main())


def test_recover_does_not_repeat_a_message_that_was_stored_whole(stores: Stores) -> None:
    """The message that ends a draft takes its place; the log does not hold its text twice."""

    async def main() -> None:
        async with stores.open() as store:
            run = await running(store)
            await store.save_draft(key_of(run), "half")
            await store.append_events(key_of(run), said("half and half"))
        async with stores.open() as store:
            await store.recover(3, always)
            assert contents(await log_of(store, run.id)) == ["hello", "half and half"]

    run_async(main())


def test_recover_keeps_the_draft_behind_an_entry_of_the_execution_log(stores: Stores) -> None:
    """A log line does not end the message in the making."""

    async def main() -> None:
        async with stores.open() as store:
            run = await running(store)
            await store.save_draft(key_of(run), "half")
            await store.append_events(key_of(run), [EventDraft(EventRole.EXECUTION_LOG, "a line", 1)])
        async with stores.open() as store:
            await store.recover(3, always)
            assert contents(await log_of(store, run.id)) == ["hello", "a line", "half"]

    run_async(main())


def test_save_draft_of_a_lost_turn_does_nothing(stores: Stores) -> None:
    """A draft under an old epoch does not become anybody's text."""

    async def main() -> None:
        async with stores.open() as store:
            run = await running(store)
            await store.release_turn(key_of(run), [])
            await store.claim_turns(1)
            await store.save_draft(key_of(run), "late")
        async with stores.open() as store:
            await store.recover(3, always)
            assert contents(await log_of(store, run.id)) == ["hello", ATTEMPT_BEGINS.format(attempt=1)]

    run_async(main())


# Reading


def test_another_organizations_run_is_not_found(stores: Stores) -> None:
    """Nor another server's; it answers exactly as a run that does not exist, and nothing is written."""

    async def check(store: RunStore) -> None:
        run = await running(store)
        before = await snapshot(store, run)
        missing = new_run().id
        for organization, server_id, run_id in [
            ("other", SERVER, run.id),
            (ORGANIZATION, "other", run.id),
            (ORGANIZATION, SERVER, missing),
        ]:
            asked = new_run(organization=organization, server_id=server_id)
            stranger = next_turn(asked)
            attempts: list[Awaitable[object]] = [
                store.get_run(organization, server_id, run_id),
                store.cancel_run(Cancel(organization, server_id, run_id), said("x"), "x"),
                store.continue_run(
                    type(stranger)(organization, server_id, run_id, "x", RunMode.SYNC, 1),
                    claim=True,
                ),
            ]
            for attempt in attempts:
                with pytest.raises(RunNotFound) as caught:
                    await attempt
                assert caught.value.message == RunNotFound(run_id).message
        assert await snapshot(store, run) == before
        assert (await store.list_runs("other", SERVER, status=None, token=None, limit=9)).runs == []

    with_store(stores, check)


def test_list_runs_pages_from_the_newest(stores: Stores) -> None:
    """Every run once, newest first, also while new ones come; the last page has no token."""

    async def check(store: RunStore) -> None:
        ids = [(await store.start_run(new_run(), claim=False)).run.id for _ in range(5)]
        await store.start_run(new_run(server_id="other"), claim=False)
        await store.start_run(new_run(organization="other"), claim=False)
        seen: list[str] = []
        token = None
        sizes = []
        while True:
            page = await store.list_runs(ORGANIZATION, SERVER, status=None, token=token, limit=2)
            seen += [run.id for run in page.runs]
            sizes.append(len(page.runs))
            token = page.next_token
            if token is None:
                break
            await store.start_run(new_run(), claim=False)
        assert seen == ids[::-1]
        assert sizes == [2, 2, 1]
        page = await store.list_runs(ORGANIZATION, SERVER, status=None, token=None, limit=7)
        assert (len(page.runs), page.next_token) == (7, None)

    with_store(stores, check)


def test_list_runs_by_status_goes_by_the_latest_turn(stores: Stores) -> None:
    """Each run is listed under exactly one status, the one that it shows."""

    async def check(store: RunStore) -> None:
        queued = (await store.start_run(new_run(), claim=False)).run
        run = await running(store)
        completed, failed, cancelled, resumed = [await running(store) for _ in range(4)]
        await store.finish_turn(key_of(completed), [], COMPLETED)
        await store.finish_turn(key_of(failed), [], OUTCOMES[2])
        await store.cancel_run(cancel_of(cancelled), [], None)
        await store.finish_turn(key_of(resumed), [], COMPLETED)
        await store.continue_run(next_turn(resumed), claim=False)
        expected = {
            RunStatus.QUEUED: [resumed.id, queued.id],
            RunStatus.RUNNING: [run.id],
            RunStatus.COMPLETED: [completed.id],
            RunStatus.FAILED: [failed.id],
            RunStatus.CANCELLED: [cancelled.id],
        }
        for status, ids in expected.items():
            page = await store.list_runs(ORGANIZATION, SERVER, status=status, token=None, limit=9)
            assert [run.id for run in page.runs] == ids
            assert {run.status for run in page.runs} == {status}
        page = await store.list_runs(ORGANIZATION, SERVER, status=RunStatus.QUEUED, token=None, limit=1)
        assert page.next_token is not None
        page = await store.list_runs(ORGANIZATION, SERVER, status=RunStatus.QUEUED, token=page.next_token, limit=1)
        assert ([run.id for run in page.runs], page.next_token) == ([queued.id], None)

    with_store(stores, check)


@pytest.mark.parametrize("token", ["", "x", "run_" + "0" * 32, "é\U0001f600", "' OR 1=1 --"])
def test_list_runs_refuses_a_token_that_is_not_ours(stores: Stores, token: str) -> None:
    """InvalidRequest names the field; a token of another organization is not ours either."""

    async def check(store: RunStore) -> None:
        foreign = (await store.start_run(new_run(organization="other"), claim=False)).run.id
        for bad in (token, foreign):
            with pytest.raises(InvalidRequest) as caught:
                await store.list_runs(ORGANIZATION, SERVER, status=None, token=bad, limit=9)
            assert caught.value.field == "page_token"

    with_store(stores, check)


def test_page_of_runs_ends_by_size(stores: Stores) -> None:
    """A page stops before what its runs hold is too much, and the next one goes on behind it."""

    async def main() -> None:
        async with stores.open() as store:
            started = [await store.start_run(new_run("x" * 1_000), claim=True) for _ in range(5)]
            seen: list[str] = []
            token = None
            while True:
                page = await store.list_runs(
                    ORGANIZATION, SERVER, status=None, token=token, limit=50, limit_characters=2_500
                )
                assert 1 <= len(page.runs) <= 2
                seen += [run.id for run in page.runs]
                token = page.next_token
                if token is None:
                    break
            assert seen == [change.run.id for change in reversed(started)]

    run_async(main())


def test_read_events_stops_at_the_limits(stores: Stores) -> None:
    """By number and by bytes of UTF-8, but never without an event where there is one."""

    async def check(store: RunStore) -> None:
        run = await running(store, "u" * 10)
        await store.append_events(key_of(run), said("a" * 10, "é" * 10, "\U0001f600" * 10, "b" * 10))

        async def sequences(after: int, limit: int = ALL, limit_bytes: int = ALL) -> list[int]:
            return [event.sequence for event in await store.read_events(run.id, after, limit, limit_bytes)]

        assert await sequences(0) == [1, 2, 3, 4, 5]
        assert await sequences(2, limit=2) == [3, 4]
        assert await sequences(0, limit_bytes=1) == [1]
        assert await sequences(0, limit_bytes=20) == [1, 2]
        assert await sequences(0, limit_bytes=39) == [1, 2]
        assert await sequences(0, limit_bytes=40) == [1, 2, 3]
        assert await sequences(3, limit_bytes=1) == [4]
        assert await sequences(5) == []
        assert await sequences(1 << 60) == []
        assert await store.read_events("run_none", 0, 10, 10) == []

    with_store(stores, check)


def test_read_messages_tells_the_thread_turn_by_turn(stores: Stores) -> None:
    """User and assistant messages of the turns before, oldest first, without log lines and half messages."""

    async def check(store: RunStore) -> None:
        run = await running(store, "u1")
        await store.append_events(key_of(run), said("a1"))
        await store.continue_run(next_turn(run, "u2"), claim=False)
        rest = [
            EventDraft(EventRole.EXECUTION_LOG, "log", 1),
            EventDraft(EventRole.ASSISTANT, "half", 1, log_type="incomplete"),
            EventDraft(EventRole.SYSTEM, "system", 1),
        ]
        await store.finish_turn(key_of(run), [*rest, *said("b1")], COMPLETED)
        await store.continue_run(next_turn(run, "u3"), claim=False)
        user, assistant = EventRole.USER, EventRole.ASSISTANT
        whole = [(user, "u1"), (assistant, "a1"), (assistant, "b1"), (user, "u2")]
        assert await store.read_messages(run.id, 3, 100) == whole
        assert await store.read_messages(run.id, 3, 2) == whole[2:]
        assert await store.read_messages(run.id, 2, 100) == whole[:3]
        assert await store.read_messages(run.id, 1, 100) == []

    with_store(stores, check)


# Durability


def test_a_reopened_store_shows_the_same(stores: Stores) -> None:
    """Everything that was acknowledged is there afterwards, as it was."""

    async def main() -> None:
        async with stores.open() as store:
            run = await running(store)
            await store.append_events(key_of(run), said("one", "two"))
            other = await running(store)
            await store.finish_turn(key_of(other), said("end"), OUTCOMES[2])
            await store.continue_run(next_turn(other), claim=False)
            before = [await snapshot(store, run), await snapshot(store, other), await store.count_queued()]
        async with stores.open() as store:
            assert [await snapshot(store, run), await snapshot(store, other), await store.count_queued()] == before
            assert (await store.continue_run(next_turn(run), claim=False)).events[0].sequence == 4

    run_async(main())


def test_close_finishes_what_was_asked_for(stores: Stores) -> None:
    """Writes under way are committed and told; later ones are refused."""

    async def main() -> None:
        store = await stores.connect()
        news = [new_run() for _ in range(20)]
        writes = [asyncio.ensure_future(store.start_run(new, claim=False)) for new in news]
        await store.close()
        assert [(await write).run.id for write in writes] == [new.id for new in news]
        with pytest.raises(StoreUnavailable):
            await store.start_run(new_run(), claim=False)
        await store.close()
        async with stores.open() as again:
            assert await again.count_queued() == 20

    run_async(main())


def test_every_refusal_of_a_store_is_a_domain_error() -> None:
    """Callers need to know no database to handle what a store raises."""
    for kind in (InvalidRequest, RunNotFound, StoreUnavailable):
        assert issubclass(kind, RunServiceError)
