"""Writes that share a transaction leave what the same writes leave one by one."""

import asyncio
import tempfile
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_service.errors import StoreUnavailable
from runtime_service.runs import EventDraft, EventRole, RunMode, RunStatus, new_run_id
from runtime_service.store.base import Cancel, Change, NewAnswer, NewRun, NewTurn, Outcome, RunStore, TurnKey, TurnLost
from runtime_service.store.sqlite import SQLiteStore
from tests.support import ORGANIZATION, SERVER, Disk, contents, key_of, log_of, new_run, question, run_async, said

COMPLETED = Outcome(RunStatus.COMPLETED, "done")
FAILED = Outcome(RunStatus.FAILED, None, "It broke.", "AGENT_FAILED")

WRITES = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "start",
                "queue",
                "append",
                "log",
                "finish",
                "fail",
                "draft",
                "release",
                "continue",
                "cancel",
                "claim",
                "ask",
                "ask with text",
                "answer",
            ]
        ),
        st.integers(0, 1),  # which run
        st.integers(1, 2),  # which turn
        st.integers(1, 2),  # which epoch
    ),
    max_size=12,
)


def ask(store: RunStore, ids: list[str], write: tuple[str, int, int, int]) -> Awaitable[Any]:
    """Ask for one of `WRITES`."""
    how, run, turn, epoch = write
    key = TurnKey(ids[run], turn, epoch)
    match how:
        case "start" | "queue":
            new = NewRun(ids[run], ORGANIZATION, SERVER, how, RunMode.SYNC, run)
            return store.start_run(new, claim=how == "start")
        case "append":
            return store.append_events(key, said("a", "b"))
        case "log":
            return store.append_events(key, [EventDraft(EventRole.EXECUTION_LOG, "l", 1)])
        case "finish":
            return store.finish_turn(key, said("c"), COMPLETED)
        case "fail":
            return store.finish_turn(key, [], FAILED)
        case "draft":
            return store.save_draft(key, "half")
        case "ask" | "ask with text":
            texts = said("d") if how == "ask with text" else []
            return store.ask_question(key, [*texts, question()], (("more", "Go on"),))
        case "answer":
            event = EventDraft(EventRole.USER, "more", 3)
            return store.answer_question(NewAnswer(ORGANIZATION, SERVER, ids[run], 1 + epoch, event))
        case "release":
            return store.release_turn(key, said("r"))
        case "continue":
            new_turn = NewTurn(ORGANIZATION, SERVER, ids[run], "more", RunMode.SYNC, 2)
            return store.continue_run(new_turn, claim=True)
        case "cancel":
            return store.cancel_run(Cancel(ORGANIZATION, SERVER, ids[run]), said("x"), "so far")
    return store.claim_turns(1)


def told(result: object) -> object:
    """What the caller of a write learns, times left out."""
    if isinstance(result, list):
        return [told(each) for each in result]
    if isinstance(result, Change):
        turn = result.run.turn
        return (
            (result.run.last_sequence, result.run.message_count, result.run.last_turn, result.run.title),
            (turn.number, turn.status, turn.output, turn.error, turn.attempt, turn.epoch, turn.ready),
            result.run.question,
            [(event.sequence, event.turn, event.content) for event in result.events],
        )
    return type(result).__name__


def rows(path: Path) -> list[list[tuple[Any, ...]]]:
    """All that the file holds, times left out."""
    connection = apsw.Connection(str(path))
    tables = {
        "runs": "id, message_count, last_sequence, last_turn, status, question",
        "turns": "run_key, number, status, first_sequence, output, error, error_code, attempt, epoch, ready, draft",
        "events": "run_key, sequence, turn, role, content",
    }
    try:
        return [list(connection.execute(f"SELECT {columns} FROM {table}")) for table, columns in tables.items()]
    finally:
        connection.close()


@settings(max_examples=150, deadline=None)
@given(writes=WRITES)
def test_writes_in_one_transaction_leave_what_they_leave_one_by_one(
    writes: list[tuple[str, int, int, int]],
) -> None:
    """The same rows and the same answers, refusals included; a write of an id that is taken fails alone."""

    async def main(folder: Path) -> None:
        ids = [new_run_id(), new_run_id()]
        together = await SQLiteStore.open(folder / "together.sqlite")
        alone = await SQLiteStore.open(folder / "alone.sqlite")
        shared = await asyncio.gather(*(ask(together, ids, write) for write in writes), return_exceptions=True)
        single: list[object] = []
        for write in writes:
            single += await asyncio.gather(ask(alone, ids, write), return_exceptions=True)
        assert [told(result) for result in shared] == [told(result) for result in single]
        await together.close()
        await alone.close()
        assert rows(folder / "together.sqlite") == rows(folder / "alone.sqlite")

    with tempfile.TemporaryDirectory() as folder:
        run_async(main(Path(folder)))


def test_a_short_run_takes_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepted, extended and settled at once: each answer is of its own write."""
    disk = Disk(monkeypatch)

    async def main() -> None:
        store = await SQLiteStore.open(tmp_path / "runs.sqlite")
        before = disk.commits
        new = new_run()
        key = TurnKey(new.id, 1, 1)
        started, extended, finished = await asyncio.gather(
            store.start_run(new, claim=True),
            store.append_events(key, said("a")),
            store.finish_turn(key, said("b"), COMPLETED),
        )
        assert disk.commits - before == 1
        assert [change.run.status for change in (started, extended, finished)] == ["running", "running", "completed"]
        assert [change.run.last_sequence for change in (started, extended, finished)] == [1, 2, 3]
        assert await store.get_run(ORGANIZATION, SERVER, new.id) == finished.run
        assert contents(await log_of(store, new.id)) == ["hello", "a", "b"]
        with pytest.raises(TurnLost):
            await store.append_events(key, said("late"))
        await store.close()

    run_async(main())


def test_a_commit_that_fails_is_made_up_for_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was known in memory of a transaction that is rolled back is forgotten with it."""
    disk = Disk(monkeypatch)

    async def main() -> None:
        store = await SQLiteStore.open(tmp_path / "runs.sqlite")
        other = (await store.start_run(new_run(), claim=True)).run
        disk.refuse = 3  # the shared commit, and the first two of those that follow
        new = new_run()
        key = TurnKey(new.id, 1, 1)
        results = await asyncio.gather(
            store.append_events(key_of(other), said("lost")),
            store.start_run(new, claim=True),
            store.finish_turn(key, said("b"), COMPLETED),
            store.append_events(key_of(other), said("kept")),
            return_exceptions=True,
        )
        assert [type(result) for result in results] == [StoreUnavailable, StoreUnavailable, TurnLost, Change]
        assert contents(await log_of(store, other.id)) == ["hello", "kept"]
        assert contents(await log_of(store, new.id)) == []
        await store.close()

    run_async(main())


def test_what_cannot_be_stored_does_not_hurt_a_turn_that_is_looked_up(tmp_path: Path) -> None:
    """The one write fails; another, whose turn was not known yet, and one behind it do not."""

    async def main() -> None:
        store = await SQLiteStore.open(tmp_path / "runs.sqlite")
        runs = [(await store.start_run(new_run(), claim=True)).run for _ in range(2)]
        await store.close()
        store = await SQLiteStore.open(tmp_path / "runs.sqlite")
        results = await asyncio.gather(
            store.append_events(key_of(runs[0]), said("\ud800")),
            store.append_events(key_of(runs[1]), said("a")),
            store.append_events(key_of(runs[0]), said("b")),
            return_exceptions=True,
        )
        assert [type(result) for result in results] == [UnicodeEncodeError, Change, Change]
        assert [contents(await log_of(store, run.id)) for run in runs] == [["hello", "b"], ["hello", "a"]]
        await store.close()

    run_async(main())
