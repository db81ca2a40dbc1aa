"""What a request asks for beside its body: waiting, numbers and words of the query, where to resume."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.bodies import Mode
from gateway.errors import ApiError
from gateway.preferences import Waiting, choice, resume_after, waiting, whole_number

LIMIT = 55.0


def refused(call: Callable[[], object]) -> tuple[str, str]:
    """The field that a refusal names, and what it says of it."""
    with pytest.raises(ApiError) as caught:
        call()
    error = caught.value
    assert (error.status, error.code) == (400, "VALIDATION_FAILED")
    assert error.details is not None
    (detail,) = error.details
    assert error.message == f"{detail['field']} {detail['message']}."
    return detail["field"], detail["message"]


@pytest.mark.parametrize(
    ("mode", "prefer", "expected"),
    [
        (None, [], Waiting(LIMIT)),
        ("sync", [], Waiting(LIMIT)),
        ("async", [], Waiting(0)),
        (None, ["respond-async"], Waiting(0, "respond-async")),
        (None, ["RESPOND-ASYNC ; a=b"], Waiting(0, "respond-async")),
        (None, ["return=minimal, respond-async"], Waiting(0, "respond-async")),
        (None, ["wait=5"], Waiting(5, "wait=5")),
        (None, ['wait = "5"'], Waiting(5, "wait=5")),
        (None, ["wait=0"], Waiting(0, "wait=0")),
        (None, ["wait=55"], Waiting(55, "wait=55")),
        (None, ["wait=56"], Waiting(LIMIT)),
        (None, ["wait=999999999999"], Waiting(LIMIT)),
        (None, ["wait=5, wait=9"], Waiting(5, "wait=5")),
        (None, ["wait=-1"], Waiting(LIMIT)),
        (None, ["wait=1.5"], Waiting(LIMIT)),
        (None, ["wait"], Waiting(LIMIT)),
        (None, ["respond-async, wait=5"], Waiting(5, "respond-async, wait=5")),
        (None, ["wait=5", "respond-async"], Waiting(5, "respond-async, wait=5")),
        ("sync", ["respond-async"], Waiting(LIMIT)),
        ("sync", ["wait=5"], Waiting(5, "wait=5")),
        ("async", ["respond-async"], Waiting(0, "respond-async")),
        ("async", ["wait=5"], Waiting(0)),
        ("async", ["respond-async, wait=5"], Waiting(0, "respond-async")),
        (None, [""], Waiting(LIMIT)),
        (None, [",;,=,"], Waiting(LIMIT)),
    ],
)
def test_waiting_follows_mode_and_prefer(mode: Mode | None, prefer: list[str], expected: Waiting) -> None:
    """An explicit mode wins; Prefer decides the rest, and only what was applied is told."""
    assert waiting(mode, prefer, LIMIT) == expected


@given(st.sampled_from([None, "sync", "async"]), st.lists(st.text()))
def test_waiting_is_never_past_the_limit(mode: Mode | None, prefer: list[str]) -> None:
    """No header makes a wait longer than the limit, or fails."""
    assert 0 <= waiting(mode, prefer, LIMIT).seconds <= LIMIT


@pytest.mark.parametrize(
    ("text", "expected"), [("1", 1), ("007", 7), ("200", 200), ("201", 200), ("9" * 19, 200), ("0", 0)]
)
def test_number_is_read_up_to_the_most(text: str, expected: int) -> None:
    """Larger ones than the most are taken as that."""
    assert whole_number({"limit": text}, "limit", 50, most=200) == expected


def test_number_that_is_not_there_is_the_default() -> None:
    """Without one, the default."""
    assert whole_number({}, "limit", 50) == 50


@pytest.mark.parametrize("text", ["", " 1", "-1", "+1", "1.0", "1e3", "0x1", "abc", "１", "1_000", "9" * 20, "0"])
def test_number_that_is_none_is_refused(text: str) -> None:
    """The field is named, with what it must be."""
    assert refused(lambda: whole_number({"limit": text}, "limit", 50, least=1)) == (
        "limit",
        "must be a whole number of at least 1",
    )


@pytest.mark.parametrize(
    ("query", "header", "expected"),
    [
        ({}, None, 0),
        ({"after": "5"}, None, 5),
        ({}, "7", 7),
        ({}, " 7 ", 7),
        ({"after": "5"}, "7", 7),
        ({"after": "5"}, "", 5),
        ({"after": "5"}, " ", 5),
        ({"after": "x"}, "7", 7),
        ({"after": "9" * 19}, None, 2**53 - 1),
    ],
)
def test_resume_prefers_what_was_seen_last(query: dict[str, str], header: str | None, expected: int) -> None:
    """Last-Event-ID, which a client that reconnects sends by itself, counts more than the URL it first asked for."""
    assert resume_after(query, header) == expected


def test_resume_refuses_what_is_no_id() -> None:
    """Each by its own name."""
    assert refused(lambda: resume_after({}, "x"))[0] == "Last-Event-ID"
    assert refused(lambda: resume_after({}, "-1"))[0] == "Last-Event-ID"
    assert refused(lambda: resume_after({"after": "-1"}, None))[0] == "after"


def test_choice_is_one_of_the_words() -> None:
    """Nothing, or one of them; else they are named."""
    assert choice({}, "include", ("events",)) is None
    assert choice({"include": "events"}, "include", ("events",)) == "events"
    assert refused(lambda: choice({"status": "x"}, "status", ("queued", "running"))) == (
        "status",
        'must be "queued" or "running"',
    )
    assert refused(lambda: choice({"status": ""}, "status", ("queued",)))[0] == "status"
