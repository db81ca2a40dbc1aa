"""The domain's values."""

from dataclasses import FrozenInstanceError

import pytest

from runtime_service.runs import Run, RunMode, RunStatus, Turn, new_run_id, now_ms


def run() -> Run:
    """A run with one turn."""
    turn = Turn(1, RunStatus.QUEUED, RunMode.SYNC, "hello", 1, 5)
    return Run("run_abc", "default", "assistant", 5, 6, 1, 1, 1, turn)


def test_run_shows_its_turn_and_names_its_thread_and_events() -> None:
    """Ids are made of the run's, the same at every reading."""
    assert run().status is RunStatus.QUEUED
    assert run().thread_id == "thread_abc"
    assert run().event_id_prefix == "event_abc_"


def test_values_never_change() -> None:
    """Neither a run nor a turn can be assigned to."""
    with pytest.raises((AttributeError, FrozenInstanceError)):
        run().title = "other"  # type: ignore[misc]
    with pytest.raises((AttributeError, FrozenInstanceError)):
        run().turn.status = RunStatus.FAILED  # type: ignore[misc]


def test_new_run_ids_are_unique_and_sort_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 hex digits, of which the first twelve are the time."""
    ids = [new_run_id() for _ in range(1_000)]
    assert len(set(ids)) == 1_000
    assert all(len(each) == 36 and int(each.removeprefix("run_"), 16) for each in ids)
    later = []
    for moment in (1, 2, 1 << 40):
        monkeypatch.setattr("runtime_service.runs.now_ms", lambda moment=moment: moment)
        later.append(new_run_id())
    assert later == sorted(later)
    assert later[0].startswith("run_000000000001")


def test_now_is_in_milliseconds() -> None:
    """Since the epoch, in UTC: between 2024 and 2100."""
    assert 1_704_067_200_000 < now_ms() < 4_102_444_800_000
