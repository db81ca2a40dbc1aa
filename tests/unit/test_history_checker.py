"""The checker of histories: one in which all went well has no finding, and each that breaks a promise has its own."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from tests.acceptance.checker import RULES, Rules, check
from tests.acceptance.history import (
    Begun,
    Event,
    Excerpt,
    History,
    Mark,
    Reading,
    Request,
    Sample,
    Shown,
    StoredRun,
    StoredTurn,
    Task,
    event_of,
    ordered,
    shown_of,
)

RUN = "run_1"
FIRST, SECOND = Task("one", 2, 0.0).input, Task("two", 1, 0.0).input
GATEWAY = "http://a"
replace = msgspec.structs.replace


def marked(sequence: int, name: str, attempt: int, step: int, pid: int) -> Event:
    """A message of the tests' agents."""
    mark = ordered(msgspec.structs.asdict(Mark(attempt, pid, step)))
    return Event(sequence, "assistant", f"{name}: {step}", sequence, metadata=mark)


LOG = (
    (1, Event(1, "user", FIRST, 1.0)),
    (1, marked(2, "one", 1, 0, pid=7)),
    (2, Event(3, "user", SECOND, 3.0)),
    (1, Event(4, "assistant", "half", 4.0, "incomplete", "warn")),
    (1, Event(5, "execution_log", "Attempt 2 begins: the one before was broken off.", 5.0, "attempt", "warn")),
    (1, marked(6, "one", 2, 0, pid=8)),
    (1, marked(7, "one", 2, 1, pid=8)),
    (2, marked(8, "two", 1, 0, pid=8)),
)
EVENTS = tuple(event for _, event in LOG)
ENDED = Shown(RUN, FIRST, "completed", "one: 1", completed_at=7.0)
OPEN = Shown(RUN, FIRST, "running")
ENDED_SECOND = Shown(RUN, SECOND, "completed", "two: 0", completed_at=8.0)


def good() -> History:
    """A run of two turns; the process of the first was lost, and a client that had asked twice got its answer."""
    return History(
        requests=[
            Request("start", GATEWAY, 1.0, 1.1, 0, "ServerDisconnectedError", key="k", input=FIRST),
            Request("start", GATEWAY, 1.2, 1.3, 202, key="k", input=FIRST, turn=(RUN, FIRST), replayed=True),
            Request("continue", GATEWAY, 3.0, 8.1, 200, key="l", input=SECOND, turn=(RUN, SECOND)),
        ],
        readings=[
            Reading("answer", GATEWAY, 1.2, 1.3, OPEN),
            Reading("get", GATEWAY, 6.0, 7.5, ENDED),
            Reading("get", GATEWAY, 6.5, 7.6, OPEN),
            Reading("answer", GATEWAY, 3.0, 8.1, ENDED_SECOND),
        ],
        excerpts=[
            Excerpt("answer", GATEWAY, RUN, EVENTS[:1], 0, FIRST),
            Excerpt("answer", GATEWAY, RUN, (EVENTS[2], EVENTS[7]), None, SECOND, ended=True),
            Excerpt("stream", GATEWAY, RUN, EVENTS[:4], 0, FIRST),
            Excerpt(
                "stream", GATEWAY, RUN, EVENTS[4:], 4, SECOND, ended=True, said=((4, "ha"), (6, "one: "), (7, "one"))
            ),
        ],
        samples=[Sample(RUN, 1, "running", 1), Sample(RUN, 1, "queued", 1), Sample(RUN, 1, "completed", 2)],
        begun=[Begun(RUN, 1, 1, 7, 1.0), Begun(RUN, 1, 2, 8, 5.0), Begun(RUN, 2, 1, 8, 7.1)],
        turns=[
            StoredTurn(RUN, "steps", 1, ENDED, 2, 2, None),
            StoredTurn(RUN, "steps", 2, ENDED_SECOND, 1, 1, None),
        ],
        runs=[StoredRun(RUN, 8, 2, 7, LOG)],
    )


def test_good_history_has_no_finding() -> None:
    """A lost process, a repeated request and a cut stream are nothing to complain of."""
    assert check(good()) == []


def turn_with(number: int = 1, **fields: Any) -> Callable[[History], None]:
    """Give a stored turn other fields."""

    def change(history: History) -> None:
        history.turns[number - 1] = replace(history.turns[number - 1], **fields)

    return change


def log_with(*log: tuple[int, Event], **fields: Any) -> Callable[[History], None]:
    """Store another log, which was shown nowhere."""

    def change(history: History) -> None:
        history.excerpts.clear()
        messages = sum(event.role in ("user", "assistant") for _, event in log)
        run = StoredRun(RUN, len(log), 2, messages, log)
        history.runs = [replace(run, **fields)]

    return change


def renumbered(*log: tuple[int, Event]) -> tuple[tuple[int, Event], ...]:
    """The same entries with the sequences that they have now."""
    return tuple((turn, replace(event, sequence=number)) for number, (turn, event) in enumerate(log, 1))


def seeing(surface: Any, shown: Shown, asked_at: float = 9.0) -> Callable[[History], None]:
    """Show a turn once more."""
    return lambda history: history.readings.append(Reading(surface, "http://b", asked_at, asked_at + 0.1, shown))


def excerpt_with(*events: Event, **fields: Any) -> Callable[[History], None]:
    """Show events once more."""
    return lambda history: history.excerpts.append(Excerpt("stream", "http://b", RUN, events, **fields))


def answer_with(*events: Event, **fields: Any) -> Callable[[History], None]:
    """Answer a start or continue once more."""
    return lambda history: history.excerpts.append(Excerpt("answer", "http://b", RUN, events, **fields))


def both(*changes: Callable[[History], None]) -> Callable[[History], None]:
    """One change after the other."""

    def change(history: History) -> None:
        for each in changes:
            each(history)

    return change


def without_turns(history: History) -> None:
    """The store has nothing of what was accepted."""
    history.turns.clear()
    history.runs.clear()
    history.readings.clear()
    history.excerpts.clear()


def another_run(history: History) -> None:
    """The first request was accepted as well, unknown to its client."""
    shown = replace(ENDED, run_id="run_2")
    history.turns.append(StoredTurn("run_2", "steps", 1, shown, 2, 2, None))
    history.runs.append(StoredRun("run_2", 7, 1, 5, renumbered(*(each for each in LOG if each[0] == 1))))
    history.runs[-1] = replace(history.runs[-1], last_sequence=6)


def another_answer(history: History) -> None:
    """The key of the first turn was answered with the second."""
    history.requests.append(replace(history.requests[2], key="k"))


def lost_turn(attempt: int) -> Callable[[History], None]:
    """The first turn was given up after so many attempts."""
    failed = replace(ENDED, status="failed", error="lost", error_code="RUNTIME_LOST")
    return both(
        lambda history: history.readings.clear(),
        turn_with(shown=failed, attempt=attempt, epoch=attempt),
        lambda history: history.samples.clear(),
    )


def ending(output: str) -> Callable[[History], None]:
    """The first turn has another output, which was shown nowhere."""
    return both(turn_with(shown=replace(ENDED, output=output)), lambda history: history.readings.clear())


BACKWARDS = renumbered(
    *LOG[:3],
    LOG[4],
    (1, replace(LOG[4][1], content="Attempt 1 begins: the one before was broken off.")),
    (1, marked(6, "one", 1, 0, pid=8)),
    (1, marked(7, "one", 1, 1, pid=8)),
    LOG[7],
)

BROKEN: list[tuple[str, str, Callable[[History], None]]] = [
    ("lost", "what was accepted is gone", without_turns),
    ("stuck", "a turn is open", both(turn_with(shown=OPEN), lambda h: h.readings.clear(), lambda h: h.samples.clear())),
    ("stuck", "a draft is left", turn_with(draft="half")),
    ("outcome", "another outcome", seeing("get", replace(ENDED, status="cancelled"))),
    ("outcome", "another output", seeing("stream", replace(ENDED, output="other"))),
    ("outcome", "another end", seeing("get", replace(ENDED, completed_at=7.5))),
    ("outcome", "an outcome that nobody stored", seeing("get", replace(ENDED, input="other"))),
    ("outcome", "an outcome is taken back", seeing("get", OPEN)),
    ("cancelled", "a cancel leaves it open", seeing("cancel", OPEN, asked_at=2.0)),
    ("sequence", "a gap in the store", log_with(*LOG[:3], *LOG[4:], last_sequence=8)),
    ("sequence", "a duplicate in the store", log_with(*LOG, LOG[-1])),
    ("sequence", "an event beyond the last sequence", log_with(*LOG, last_sequence=7)),
    ("sequence", "too few messages counted", log_with(*LOG, message_count=6)),
    ("sequence", "turns that are mixed", log_with(*renumbered(*LOG[:5], LOG[7], LOG[5], LOG[6]))),
    ("sequence", "a gap in a stream", excerpt_with(EVENTS[0], EVENTS[2], after=0)),
    ("sequence", "a duplicate in a stream", excerpt_with(EVENTS[0], EVENTS[0], after=0)),
    ("sequence", "a stream that resumes too late", excerpt_with(EVENTS[2], after=1)),
    ("sequence", "a stream that resumes too early", excerpt_with(EVENTS[0], EVENTS[1], after=1)),
    ("sequence", "a gap in an answer", answer_with(EVENTS[0], EVENTS[4], after=0, turn=FIRST)),
    ("sequence", "another turn in an answer", answer_with(*EVENTS[:3], after=0, turn=FIRST)),
    ("same", "another content", excerpt_with(replace(EVENTS[0], content="other"), after=0)),
    ("same", "another time", excerpt_with(replace(EVENTS[0], created_at=1.5), after=0)),
    ("same", "an event that is not stored", excerpt_with(replace(EVENTS[7], sequence=9), after=8)),
    ("whole", "an end too early", excerpt_with(*EVENTS[:6], after=0, turn=FIRST, ended=True)),
    ("whole", "an end too late", excerpt_with(*EVENTS, after=0, turn=FIRST, ended=True)),
    ("whole", "no event to the end", excerpt_with(after=6, turn=FIRST, ended=True)),
    ("whole", "a turn without its input", excerpt_with(EVENTS[1], turn=FIRST)),
    ("whole", "a turn that is empty", excerpt_with(turn=FIRST)),
    ("once", "an input with two runs", another_run),
    ("once", "a key with two answers", another_answer),
    ("once", "a user message said twice", log_with(*renumbered(LOG[0], *LOG))),
    ("once", "a user message of no turn", log_with(*LOG, (1, Event(9, "user", "other", 9.0)))),
    ("once", "a turn stored twice", lambda history: history.turns.append(replace(history.turns[0], number=3))),
    ("once", "a user message that is missing", log_with(*renumbered(*LOG[1:]))),
    ("attempts", "too many of them", lost_turn(4)),
    ("attempts", "given up too early", lost_turn(2)),
    ("attempts", "one that may not be repeated", turn_with(server_id="once")),
    ("attempts", "begun twice", lambda history: history.begun.append(Begun(RUN, 1, 2, 9, 5.5))),
    ("epochs", "one that goes back", lambda history: history.samples.insert(0, Sample(RUN, 1, "running", 3))),
    ("epochs", "an end that does not last", lambda history: history.samples.insert(0, Sample(RUN, 1, "failed", 1))),
    ("epochs", "a settled turn that is claimed", lambda h: h.samples.insert(0, Sample(RUN, 1, "completed", 1))),
    ("epochs", "a settled turn in another epoch", lambda h: h.samples.append(Sample(RUN, 1, "completed", 1))),
    ("epochs", "an attempt without an epoch", turn_with(2, epoch=0)),
    ("fenced", "a late writer", log_with(*renumbered(*LOG[:6], LOG[1], *LOG[6:]))),
    ("fenced", "two processes", log_with(*LOG[:6], (1, marked(7, "one", 2, 1, pid=9)), *LOG[7:])),
    ("fenced", "a step that is missing", log_with(*renumbered(*LOG[:5], *LOG[6:]))),
    ("fenced", "a step said twice", log_with(*renumbered(*LOG[:6], *LOG[5:]))),
    ("fenced", "an attempt that is not announced", log_with(*renumbered(*LOG[:4], *LOG[5:]))),
    ("fenced", "an attempt announced twice", log_with(*renumbered(*LOG[:5], *LOG[4:]))),
    ("fenced", "an attempt announced after a later one", both(log_with(*BACKWARDS), turn_with(attempt=1))),
    ("fenced", "another attempt's message", log_with(*LOG[:5], (1, marked(6, "one", 1, 0, pid=8)), *LOG[6:])),
    (
        "fenced",
        "steps that changed places",
        both(log_with(*renumbered(*LOG[:5], LOG[6], LOG[5], LOG[7])), ending("one: 0")),
    ),
    ("fenced", "a step too few", both(log_with(*renumbered(*LOG[:6], LOG[7])), ending("one: 0"))),
    ("fenced", "an attempt that nobody knows of", turn_with(2, attempt=2, epoch=2)),
    ("fenced", "completed too early", log_with(*renumbered(*LOG[:6], *LOG[7:]))),
    ("fenced", "an output that was not said", ending("x")),
    ("text", "another text in the making", excerpt_with(after=5, said=((6, "two"),))),
    ("text", "more text than there is in the end", excerpt_with(after=5, said=((6, "one: 0 "),))),
]


@pytest.mark.parametrize(("rule", "words", "change"), BROKEN, ids=[f"{rule}: {words}" for rule, words, _ in BROKEN])
def test_broken_promise_is_found(rule: str, words: str, change: Callable[[History], None]) -> None:
    """The rule that it breaks says so."""
    history = good()
    change(history)
    assert rule in {finding.rule for finding in check(history)}, words


def test_every_rule_can_be_broken() -> None:
    """A rule that no history breaks would show nothing."""
    assert {rule for rule, _, _ in BROKEN} == RULES.keys()


def test_drained_turn_may_be_begun_again() -> None:
    """Where runtimes are drained, an attempt that went back to the queue is announced and begun once more."""
    history = good()
    history.begun.append(Begun(RUN, 1, 2, 9, 5.5))
    log_with(*renumbered(*LOG[:6], *LOG[4:]))(history)
    assert {finding.rule for finding in check(history)} == {"attempts", "fenced"}
    assert check(history, Rules(drained=True)) == []


def test_lost_turn_is_well_after_the_last_attempt() -> None:
    """A turn may be given up after the last attempt, and after the first where it may not be repeated."""
    history = good()
    lost_turn(2)(history)
    assert [finding.rule for finding in check(history)] == ["attempts"]
    assert check(history, Rules(max_attempts=2)) == []


def test_documents_are_read_as_rows_are() -> None:
    """What JSON says of an event and a run is what the store's rows say."""
    event = event_of(
        {
            "id": "event_1_2",
            "sequence": 2,
            "role": "assistant",
            "content": "x",
            "createdAt": "2026-01-02T03:04:05.678Z",
            "metadata": {"step": 0, "attempt": 1, "pid": 7},
        }
    )
    assert event == Event(2, "assistant", "x", 1767323045.678, metadata='{"attempt":1,"pid":7,"step":0}')
    assert event.mark == Mark(1, 7, 0)
    shown = shown_of({"id": RUN, "input": FIRST, "status": "failed", "errorCode": "X", "error": "y", "mode": "sync"})
    assert shown == Shown(RUN, FIRST, "failed", None, "y", "X")
