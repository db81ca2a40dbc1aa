"""What every RunStore promises of questions: asked by the running turn, answered once, gone with the turn."""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from runtime_service.errors import QuestionAnswered, RequestIdReused, RunNotFound
from runtime_service.runs import EventDraft, EventRole, LogLevel, Question, Run, RunEvent, RunStatus, now_ms
from runtime_service.store.base import (
    PERMISSION_REQUEST,
    PERMISSION_RESPONSE,
    Change,
    Outcome,
    QuestionOpen,
    RunStore,
    TurnKey,
    TurnLost,
)
from tests.stores import Stores
from tests.support import (
    OPTIONS,
    ORGANIZATION,
    SERVER,
    answer_to,
    asking,
    cancel_of,
    contents,
    key_of,
    log_of,
    new_run,
    next_turn,
    question,
    run_async,
    running,
    said,
    snapshot,
    with_store,
)

COMPLETED = Outcome(RunStatus.COMPLETED, output="done")


async def read(store: RunStore, run: Run, turn: int | None = None) -> Run:
    """The run as it is stored."""
    return await store.get_run(ORGANIZATION, SERVER, run.id, turn)


# Asking


@pytest.mark.parametrize("options", [OPTIONS, ()])
def test_question_is_shown_with_the_run(stores: Stores, options: tuple[tuple[str, str], ...]) -> None:
    """By whatever way it is read; the turn runs on, and what is written to it meanwhile leaves the question."""

    async def check(store: RunStore) -> None:
        run = await running(store)
        change = await store.ask_question(key_of(run), [*said("first"), question()], options)
        asked = Question(3, options=options)
        assert change.run.question == asked
        assert (change.run.status, change.run.message_count) == (RunStatus.RUNNING, 2)
        assert [(event.sequence, event.content) for event in change.events] == [(2, "first"), (3, "May I?")]
        assert change.events[-1].log_type == PERMISSION_REQUEST
        assert await read(store, run) == change.run
        page = await store.list_runs(ORGANIZATION, SERVER, status=RunStatus.RUNNING, token=None, limit=10)
        assert page.runs == [change.run]
        assert (await store.append_events(key_of(run), said("meanwhile"))).run.question == asked
        await store.save_draft(key_of(run), "so far")
        assert (await read(store, run)).question == asked
        assert contents(await log_of(store, run.id)) == ["hello", "first", "May I?", "meanwhile"]

    with_store(stores, check)


def test_question_of_a_run_that_is_being_written(stores: Stores) -> None:
    """Start, message, question and message within one transaction are as one by one."""

    async def check(store: RunStore) -> None:
        new = new_run()
        key = TurnKey(new.id, 1, 1)
        writes = [
            store.start_run(new, claim=True),
            store.append_events(key, said("a")),
            store.ask_question(key, [question()], OPTIONS),
            store.append_events(key, said("b")),
        ]
        changes = [await write for write in writes]
        assert [change.run.question for change in changes] == [None, None, *[Question(3, options=OPTIONS)] * 2]
        assert await store.get_run(ORGANIZATION, SERVER, new.id) == changes[-1].run
        finished = await store.finish_turn(key, said("c"), COMPLETED)
        assert (finished.run.question, finished.run.last_sequence) == (None, 5)
        assert await store.get_run(ORGANIZATION, SERVER, new.id) == finished.run

    with_store(stores, check)


def test_next_question_takes_the_place_of_the_one_before(stores: Stores) -> None:
    """Whether that was answered or not; an answer to the earlier one comes too late."""

    async def check(store: RunStore) -> None:
        first = await asking(store)
        second = (await store.ask_question(key_of(first), [question("And?")], ())).run
        assert second.question == Question(3)
        with pytest.raises(QuestionAnswered):
            await store.answer_question(answer_to(first))
        await store.answer_question(answer_to(second))
        third = (await store.ask_question(key_of(first), [question("So?")], OPTIONS)).run
        assert third.question == Question(5, options=OPTIONS)
        assert await read(store, first) == third

    with_store(stores, check)


@pytest.mark.parametrize("message", [True, False])
def test_question_leaves_the_draft_unless_a_message_comes_with_it(stores: Stores, message: bool) -> None:
    """What was said is not kept twice, what was not yet is not lost."""

    async def check(store: RunStore) -> None:
        run = await running(store)
        await store.save_draft(key_of(run), "so far")
        await store.ask_question(key_of(run), [*(said("so far, and on") if message else []), question()], ())
        await store.cancel_run(cancel_of(run), [], None)
        kept = [event.content for event in await log_of(store, run.id) if event.log_type == "incomplete"]
        assert kept == ([] if message else ["so far"])

    with_store(stores, check)


def test_draft_from_before_a_question_is_replaced_by_its_message(stores: Stores) -> None:
    """Neither the question nor its answer makes anybody forget that there is one."""

    async def check(store: RunStore) -> None:
        run = await running(store)
        await store.save_draft(key_of(run), "so far")
        asked = (await store.ask_question(key_of(run), [question()], ())).run
        await store.answer_question(answer_to(asked))
        await store.append_events(key_of(run), said("so far, and on"))
        await store.cancel_run(cancel_of(run), [], None)
        assert "incomplete" not in [event.log_type for event in await log_of(store, run.id)]

    with_store(stores, check)


@pytest.mark.parametrize("why", ["finished", "cancelled", "released", "claimed again", "unknown"])
def test_only_who_executes_the_turn_may_ask(stores: Stores, why: str) -> None:
    """Otherwise TurnLost, and nothing is written."""

    async def check(store: RunStore) -> None:
        run = await running(store)
        key = key_of(run)
        if why == "unknown":
            key = TurnKey(new_run().id, 1, 1)
        else:
            await ENDS[why](store, run)
        before = await snapshot(store, run)
        with pytest.raises(TurnLost):
            await store.ask_question(key, [question()], OPTIONS)
        assert await snapshot(store, run) == before

    with_store(stores, check)


# Answering


def test_answer_closes_the_question(stores: Stores) -> None:
    """Its event belongs to the turn that asked, also where input waits behind that; the next answer is too late."""

    async def check(store: RunStore) -> None:
        run = await running(store)
        await store.continue_run(next_turn(run), claim=True)
        asked = (await store.ask_question(key_of(run), [question()], OPTIONS)).run
        assert (asked.turn.number, asked.last_turn) == (1, 2)
        assert (await read(store, run)).question == asked.question  # the latest turn, which waits
        await store.append_events(key_of(run), said("Well?"))
        change = await store.answer_question(answer_to(asked))
        (event,) = change.events
        assert (event.sequence, event.turn, event.role, event.content) == (5, 1, EventRole.USER, "yes")
        assert event.log_type == PERMISSION_RESPONSE
        assert change.run.question == Question(3, is_open=False, options=OPTIONS)
        assert (change.run.turn, change.run.last_turn, change.run.message_count) == (asked.turn, 2, 4)
        assert change.run == await read(store, run, 1)
        assert (await read(store, run)).status is RunStatus.QUEUED
        before = await snapshot(store, run)
        with pytest.raises(QuestionAnswered):
            await store.answer_question(answer_to(asked, "no"))
        assert await snapshot(store, run) == before
        assert (await store.append_events(key_of(run), [])).run.last_sequence == 5
        appended = await store.append_events(key_of(run), said("Thanks."))
        assert appended.run.question == change.run.question
        assert contents(await log_of(store, run.id))[2:] == ["May I?", "Well?", "yes", "Thanks."]

    with_store(stores, check)


def test_answer_needs_the_question_that_it_is_for(stores: Stores) -> None:
    """Not another sequence, not a run that never asked, not one of another organization or server."""

    async def check(store: RunStore) -> None:
        asked = await asking(store)
        quiet = await running(store)
        answer = answer_to(asked)
        before = await snapshot(store, asked), await snapshot(store, quiet)
        for sequence in (1, 3):
            with pytest.raises(QuestionAnswered):
                await store.answer_question(msgspec.structs.replace(answer, sequence=sequence))
        with pytest.raises(QuestionAnswered):
            await store.answer_question(msgspec.structs.replace(answer, run_id=quiet.id))
        for field in ("organization", "server_id", "run_id"):
            with pytest.raises(RunNotFound):
                await store.answer_question(msgspec.structs.replace(answer, **{field: "other"}))
        assert (await snapshot(store, asked), await snapshot(store, quiet)) == before

    with_store(stores, check)


def test_answer_with_a_known_request_id_changes_nothing(stores: Stores) -> None:
    """It shows the turn that asked, as that is now, also when the run has gone on; another request is refused."""

    async def check(store: RunStore) -> None:
        asked = await asking(store)
        answer = answer_to(asked, request_id="once")
        await store.answer_question(answer)
        assert await store.answer_question(answer) == Change(await read(store, asked), replayed=True)
        await store.finish_turn(key_of(asked), [], COMPLETED)
        await store.continue_run(next_turn(asked), claim=True)
        assert await store.answer_question(answer) == Change(await read(store, asked, 1), replayed=True)
        with pytest.raises(RequestIdReused):
            await store.answer_question(answer_to(asked, "no", request_id="once"))
        with pytest.raises(RequestIdReused):
            await store.start_run(new_run(request_id="once"), claim=True)
        assert contents(await log_of(store, asked.id)) == ["hello", "May I?", "yes", "more"]

    with_store(stores, check)


def test_answer_that_was_refused_is_not_known(stores: Stores) -> None:
    """Its id may be used for the answer to the next question."""

    async def check(store: RunStore) -> None:
        first = await asking(store)
        await store.answer_question(answer_to(first))
        with pytest.raises(QuestionAnswered):
            await store.answer_question(answer_to(first, request_id="once"))
        second = (await store.ask_question(key_of(first), [question()], ())).run
        assert not (await store.answer_question(answer_to(second, "any", request_id="once"))).replayed

    with_store(stores, check)


def test_first_of_many_answers_counts(stores: Stores) -> None:
    """The others are told so, however close they come."""

    async def check(store: RunStore) -> None:
        asked = await asking(store)
        writes = [store.answer_question(answer_to(asked, text)) for text in "abc"]
        first, *others = await asyncio.gather(*writes, return_exceptions=True)
        assert isinstance(first, Change)
        assert [type(other) for other in others] == [QuestionAnswered] * 2
        assert contents(await log_of(store, asked.id)) == ["hello", "May I?", "a"]

    with_store(stores, check)


# Input to a run that has asked


def test_input_to_a_run_that_asks_is_refused(stores: Stores) -> None:
    """With the question, as it may be the answer; nothing is written, and its request id is not used up."""

    async def check(store: RunStore) -> None:
        asked = await asking(store)
        before = await snapshot(store, asked)
        new = next_turn(asked, "yes", request_id="once")
        with pytest.raises(QuestionOpen) as caught:
            await store.continue_run(new, claim=True)
        assert caught.value.question == asked.question
        assert await snapshot(store, asked) == before
        assert await store.get_requested(new) is None
        assert not (await store.answer_question(answer_to(asked, request_id="once"))).replayed

    with_store(stores, check)


@pytest.mark.parametrize("text", ["yes", "no", " \n\u2003yes\u00a0\t", "Allow it", "Not at all\n"])
def test_input_that_names_an_option_of_a_closed_question_is_refused(stores: Stores, text: str) -> None:
    """It is an answer that came too late, and not to be taken for the next input; its request id is not used up."""

    async def check(store: RunStore) -> None:
        asked = await asking(store)
        await store.answer_question(answer_to(asked))
        before = await snapshot(store, asked)
        with pytest.raises(QuestionAnswered):
            await store.continue_run(next_turn(asked, text, request_id="once"), claim=True)
        assert await snapshot(store, asked) == before
        await store.finish_turn(key_of(asked), [], COMPLETED)
        change = await store.continue_run(next_turn(asked, text, request_id="once"), claim=True)
        assert (change.run.status, change.events[0].content, change.replayed) == (RunStatus.RUNNING, text, False)

    with_store(stores, check)


@pytest.mark.parametrize("text", ["Yes", "yes, please", "", "ye", "allow it", "Allow  it", "Not at all\u200b"])
def test_other_input_to_a_run_that_has_asked_waits_its_turn(stores: Stores, text: str) -> None:
    """The closed question stays, and is gone with the turn that asked it."""

    async def check(store: RunStore) -> None:
        asked = await asking(store)
        closed = (await store.answer_question(answer_to(asked))).run.question
        change = await store.continue_run(next_turn(asked, text), claim=True)
        assert (change.run.status, change.run.question) == (RunStatus.QUEUED, closed)
        finished = await store.finish_turn(key_of(asked), [], COMPLETED)
        assert finished.run.question is None
        (claimed,) = await store.claim_turns(1)
        assert claimed.run.question is None

    with_store(stores, check)


def test_known_request_is_answered_while_the_run_asks(stores: Stores) -> None:
    """What was accepted before the question is known, whatever the run waits for now."""

    async def check(store: RunStore) -> None:
        run = await running(store)
        new = next_turn(run, "yes", request_id="once")
        await store.continue_run(new, claim=True)
        asked = (await store.ask_question(key_of(run), [question()], OPTIONS)).run
        for _ in range(2):
            again = await store.continue_run(new, claim=True)
            assert again == Change(await read(store, run), replayed=True)
            with pytest.raises(RequestIdReused):
                await store.continue_run(next_turn(run, "no", request_id="once"), claim=True)
            if asked.is_asking:
                asked = (await store.answer_question(answer_to(asked))).run
        assert not asked.is_asking

    with_store(stores, check)


# Its end


async def finish(store: RunStore, run: Run) -> None:
    """The turn is completed."""
    await store.finish_turn(key_of(run), said("end"), COMPLETED)


async def cancel(store: RunStore, run: Run) -> None:
    """The run is cancelled."""
    await store.cancel_run(cancel_of(run), [], None)


async def release(store: RunStore, run: Run) -> None:
    """The turn waits again."""
    await store.release_turn(key_of(run), [])


async def claim_again(store: RunStore, run: Run) -> None:
    """The turn runs once more."""
    await store.release_turn(key_of(run), [])
    assert len(await store.claim_turns(1)) == 1


End = Callable[[RunStore, Run], Awaitable[None]]
ENDS: dict[str, End] = {"finished": finish, "cancelled": cancel, "released": release, "claimed again": claim_again}


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("behind", [True, False], ids=["input behind", "latest"])
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_question_is_gone_with_its_turn(stores: Stores, end: End, behind: bool, is_open: bool) -> None:
    """Nobody can answer it then, and input is input again."""

    async def check(store: RunStore) -> None:
        run = await running(store)
        if behind:
            await store.continue_run(next_turn(run), claim=True)
        asked = (await store.ask_question(key_of(run), [question()], OPTIONS)).run
        if not is_open:
            await store.answer_question(answer_to(asked))
        await end(store, run)
        latest = await read(store, run)
        assert latest.question is None
        assert (await read(store, run, 1)).question is None
        with pytest.raises(QuestionAnswered):
            await store.answer_question(answer_to(asked))
        assert await read(store, run) == latest
        assert (await store.continue_run(next_turn(run, "yes"), claim=False)).events[0].content == "yes"

    with_store(stores, check)


@pytest.mark.parametrize("may_repeat", [True, False])
@pytest.mark.parametrize("is_open", [True, False])
def test_question_is_gone_with_the_process_that_asked(stores: Stores, may_repeat: bool, is_open: bool) -> None:
    """It is there until the turn is recovered, then not any more, whether the turn begins again or fails."""

    async def main() -> None:
        async with stores.open() as store:
            asked = await asking(store)
            if not is_open:
                asked = (await store.answer_question(answer_to(asked))).run
        async with stores.open() as store:
            assert (await read(store, asked)).question == asked.question
            (change,) = await store.recover(3, lambda _: may_repeat)
            assert change.run.question is None
            assert (await read(store, asked)).question is None
            with pytest.raises(QuestionAnswered):
                await store.answer_question(answer_to(asked))

    run_async(main())


def test_question_can_be_answered_until_its_process_is_known_to_be_lost(stores: Stores) -> None:
    """The answer is in the log, and the turn is recovered as ever."""

    async def main() -> None:
        async with stores.open() as store:
            asked = await asking(store)
        async with stores.open() as store:
            await store.answer_question(answer_to(asked))
            (change,) = await store.recover(3, lambda _: True)
            assert (change.run.status, change.run.question) == (RunStatus.QUEUED, None)
            assert contents(await log_of(store, asked.id)) == ["hello", "May I?", "yes"]

    run_async(main())


@pytest.mark.parametrize("answer_first", [True, False])
@pytest.mark.parametrize("end", ["finished", "cancelled", "released"])
def test_answer_and_end_of_the_turn_come_one_behind_the_other(stores: Stores, end: str, answer_first: bool) -> None:
    """Whichever is taken first: no answer is behind the end of its turn."""

    async def check(store: RunStore) -> None:
        asked = await asking(store)

        async def answer() -> bool:
            try:
                await store.answer_question(answer_to(asked))
            except QuestionAnswered:
                return False
            return True

        writes = [answer(), ENDS[end](store, asked)]
        told = await asyncio.gather(*(writes if answer_first else writes[::-1]))
        answered = told[0 if answer_first else 1]
        log = [event for event in await log_of(store, asked.id) if event.sequence > 2]
        assert [event.content for event in log if event.log_type == PERMISSION_RESPONSE] == ["yes"] * bool(answered)
        assert not answered or log[0].log_type == PERMISSION_RESPONSE
        assert (await read(store, asked)).question is None

    with_store(stores, check)


def test_question_is_there_after_a_restart(stores: Stores) -> None:
    """As it was asked, with its options byte for byte."""

    async def main() -> None:
        options = (("α\n", '"quoted"'), ("", "\u2028"))
        async with stores.open() as store:
            asked = await asking(store, options)
        async with stores.open() as store:
            found = await read(store, asked)
            assert found.question == Question(2, options=options)

    run_async(main())


# What is read for those who ask


def test_read_messages_leaves_answers_out(stores: Stores) -> None:
    """They would stand there alone: what they answer is in the execution log."""

    async def check(store: RunStore) -> None:
        asked = await asking(store)
        await store.append_events(key_of(asked), said("Hm."))
        await store.answer_question(answer_to(asked))
        await store.finish_turn(key_of(asked), said("Done."), COMPLETED)
        await store.continue_run(next_turn(asked), claim=True)
        assert await store.read_messages(asked.id, 2, 10) == [
            (EventRole.USER, "hello"),
            (EventRole.ASSISTANT, "Hm."),
            (EventRole.ASSISTANT, "Done."),
        ]

    with_store(stores, check)


def test_read_latest_log_finds_the_newest_of_its_type(stores: Stores) -> None:
    """In whatever turn, of this run alone, whole, whoever said it."""

    async def check(store: RunStore) -> None:
        run, other = await running(store), await running(store)

        def entry(content: str, log_type: str, role: EventRole = EventRole.EXECUTION_LOG) -> EventDraft:
            return EventDraft(role, content, now_ms(), log_type, LogLevel.INFO, b'{"id":1.50}')

        async def latest(log_type: str, run_id: str = run.id) -> RunEvent | None:
            return await store.read_latest_log(run_id, log_type)

        await store.append_events(key_of(other), [entry("elsewhere", "session")])
        assert await latest("session") is None
        await store.append_events(key_of(run), [entry("one", "session"), entry("plan", "plan")])
        change = await store.finish_turn(
            key_of(run), [entry("two", "session"), entry("three", "session", EventRole.ASSISTANT)], COMPLETED
        )
        resumed = (await store.continue_run(next_turn(run), claim=True)).run
        assert await latest("session") == change.events[1]
        await store.append_events(key_of(resumed), [entry("four", "session")])
        found = await latest("session")
        assert found is not None
        assert (found.content, found.turn, found.metadata) == ("four", 2, b'{"id":1.50}')
        assert await store.read_latest_log(run.id, "session", found.sequence - 1) == found
        assert await store.read_latest_log(run.id, "session", found.sequence) is None
        assert (await latest("plan"), await latest("none"), await latest("session", "run_none")) == (
            (await log_of(store, run.id))[2],
            None,
            None,
        )

    with_store(stores, check)
