"""Questions while several stores share one PostgreSQL database: who answers, who hears of it, who may still ask."""

import asyncio
from collections import Counter

import pytest

from runtime_service.errors import QuestionAnswered
from runtime_service.runs import RunStatus
from runtime_service.store import postgres_listener
from runtime_service.store.base import Change, Outcome, QuestionOpen, TurnLost
from runtime_service.store.postgres_writes import continue_run
from tests.integration.test_postgres_replicas import Heard, expire, replicas
from tests.stores import PostgresStores
from tests.support import (
    LIMIT_SECONDS,
    OPTIONS,
    ORGANIZATION,
    SERVER,
    answer_to,
    asking,
    contents,
    eventually,
    key_of,
    log_of,
    next_turn,
    question,
    run_async,
    running,
    said,
    snapshot,
)

COMPLETED = Outcome(RunStatus.COMPLETED, "done")
ADDRESS = "127.0.0.1:1001"  # of the first of some replicas


@pytest.fixture
def stores() -> PostgresStores:
    """A database."""
    return PostgresStores()


def test_answer_is_heard_where_the_turn_is_executed(stores: PostgresStores, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks tells those who follow itself; an answer that comes elsewhere the others have to be told of."""
    monkeypatch.setattr(postgres_listener, "_POLL_SECONDS", 10 * LIMIT_SECONDS)  # what is heard is not what is polled

    async def main() -> None:
        async with replicas(stores) as (one, other):
            heard, heard_elsewhere = Heard(one), Heard(other)
            await eventually(lambda: not (one._others.is_deaf or other._others.is_deaf))
            run = await running(one)
            await one.append_events(key_of(run), said("a"))
            asked = (await one.ask_question(key_of(run), [question()], OPTIONS)).run
            seen = await other.get_run(ORGANIZATION, SERVER, run.id)
            assert (seen.question, seen.holder) == (asked.question, ADDRESS)
            with pytest.raises(QuestionOpen):
                await other.continue_run(next_turn(run), claim=True)
            change = await other.answer_question(answer_to(seen))
            assert change.run.holder == ADDRESS
            await eventually(lambda: heard.runs == [run.id])
            # The question was not worth a word, nor was the refusal: they would have come before this one.
            queued = await one.continue_run(next_turn(run), claim=True)
            assert queued.run.question == change.run.question
            await eventually(lambda: heard_elsewhere.runs == [run.id])
            # What the holder knew of its turn is not what it says of the question.
            appended = await one.append_events(key_of(run), said("b"))
            assert appended.run.question == change.run.question
            assert contents(await log_of(other, run.id)) == ["hello", "a", "May I?", "yes", "more", "b"]
            finished = await one.finish_turn(key_of(run), [], COMPLETED)
            assert finished.run == await one.get_run(ORGANIZATION, SERVER, run.id, 1)
            assert finished.run.question is None

    run_async(main())


def test_one_of_many_answers_counts(stores: PostgresStores) -> None:
    """Wherever they come in; each of the others is told that it was too late."""

    async def main() -> None:
        async with replicas(stores, 4) as opened:
            for n in range(20):
                asked = await asking(opened[n % 4])
                writes = [store.answer_question(answer_to(asked, str(place))) for place, store in enumerate(opened * 2)]
                told = await asyncio.gather(*writes, return_exceptions=True)
                (taken,) = [change for change in told if isinstance(change, Change)]
                assert [type(other) for other in told if other is not taken] == [QuestionAnswered] * 7
                assert contents(await log_of(opened[0], asked.id))[2:] == contents(taken.events)

    run_async(main())


def test_one_of_many_same_answers_is_done(stores: PostgresStores) -> None:
    """The others are answered with it."""

    async def main() -> None:
        async with replicas(stores, 4) as opened:
            for n in range(10):
                asked = await asking(opened[n % 4])
                writes = [store.answer_question(answer_to(asked, request_id=asked.id)) for store in opened]
                told = await asyncio.gather(*writes)
                assert sorted(change.replayed for change in told) == [False, True, True, True]
                assert {change.run.question for change in told} == {told[0].run.question}
                assert contents(await log_of(opened[0], asked.id))[2:] == ["yes"]

    run_async(main())


def test_answer_and_completion_race_to_one_order(stores: PostgresStores) -> None:
    """The answer is in the log before the end of its turn, or nowhere."""

    async def main() -> None:
        async with replicas(stores) as (one, other):
            told: Counter[bool] = Counter()
            for n in range(60):
                asked = await asking(one)
                if n % 2:
                    finish = asyncio.ensure_future(one.finish_turn(key_of(asked), said("end"), COMPLETED))
                    answer = asyncio.ensure_future(other.answer_question(answer_to(asked)))
                else:
                    answer = asyncio.ensure_future(other.answer_question(answer_to(asked)))
                    await asyncio.sleep(0)
                    finish = asyncio.ensure_future(one.finish_turn(key_of(asked), said("end"), COMPLETED))
                answered, finished = await asyncio.gather(answer, finish, return_exceptions=True)
                assert isinstance(finished, Change)
                is_answered = isinstance(answered, Change)
                assert is_answered or isinstance(answered, QuestionAnswered)
                assert contents(await log_of(one, asked.id))[2:] == ["yes", "end"][not is_answered :]
                stored = await other.get_run(ORGANIZATION, SERVER, asked.id)
                assert (stored.status, stored.question) == (RunStatus.COMPLETED, None)
                told[is_answered] += 1
            assert told.total() == 60

    run_async(main())


def test_process_of_the_version_before_queues_what_comes(stores: PostgresStores) -> None:
    """It does not say what of the input might be an answer, and would not understand that it is refused."""

    async def main() -> None:
        async with replicas(stores) as (one, other):
            asked = await asking(one)
            for text in ("yes", "other"):
                resuming = continue_run(next_turn(asked, text), claim=True)
                del resuming.arguments["blanks"], resuming.arguments["characters"]
                change = await other._writer.submit(resuming)
                assert (change.run.status, contents(change.events)) == (RunStatus.QUEUED, [text])
                if asked.is_asking:
                    asked = (await one.answer_question(answer_to(asked))).run

    run_async(main())


def test_replica_whose_lease_ran_out_asks_nothing(stores: PostgresStores) -> None:
    """What it asked before stands until its turn is recovered, and can be answered elsewhere until then."""

    async def main() -> None:
        async with replicas(stores) as (one, other):
            asked, quiet = await asking(one), await running(one)
            expire(stores, ADDRESS)
            with pytest.raises(TurnLost):
                await one.ask_question(key_of(quiet), [question()], OPTIONS)
            answered = await other.answer_question(answer_to(asked))
            assert answered.run.status is RunStatus.RUNNING
            changes = await other.recover(3, lambda _: True)
            assert {change.run.id for change in changes} == {asked.id, quiet.id}
            before = await snapshot(other, asked)
            with pytest.raises(TurnLost):
                await one.ask_question(key_of(asked), [question()], OPTIONS)
            with pytest.raises(QuestionAnswered):
                await one.answer_question(answer_to(asked))
            assert await snapshot(other, asked) == before
            assert (await other.get_run(ORGANIZATION, SERVER, asked.id)).question is None

    run_async(main())
