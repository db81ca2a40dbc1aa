"""The promises of the service, checked over a history: each rule says where it was broken.

Pure: it gets a history in which everything has come to rest and has been read, and gives findings.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import msgspec

from tests.acceptance.history import TERMINAL, Event, History, StoredTurn, task_of


class Rules(msgspec.Struct, frozen=True):
    """What may happen here. `drained`: turns may go back to the queue in order, which counts as no attempt."""

    max_attempts: int = 3
    drained: bool = False
    not_repeatable: tuple[str, ...] = ("once",)


USUAL = Rules()


class Finding(NamedTuple):
    """A broken promise: the rule's name, and where."""

    rule: str
    words: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.words}"


Check = Callable[[History, Rules], Iterator[str]]


def check(history: History, rules: Rules = USUAL) -> list[Finding]:
    """Return all that is wrong with a history; nothing is well only when everything is."""
    return [Finding(name, words) for name, rule in RULES.items() for words in rule(history, rules)]


def _lost(history: History, rules: Rules) -> Iterator[str]:
    """What was accepted is in the store."""
    stored = {turn.shown.name for turn in history.turns}
    for request in history.requests:
        if request.turn is not None and request.turn not in stored:
            yield f"{request.operation} of {request.turn} was answered {request.status} and is not stored"


def _stuck(history: History, rules: Rules) -> Iterator[str]:
    """Every turn has reached an outcome, and has left no draft."""
    for turn in history.turns:
        if turn.shown.status not in TERMINAL:
            yield f"turn {turn.number} of {turn.run_id} is {turn.shown.status} at the end"
        elif turn.draft is not None:
            yield f"turn {turn.number} of {turn.run_id} is {turn.shown.status} and has a draft"


def _outcome(history: History, rules: Rules) -> Iterator[str]:
    """An outcome that was shown once is the one that is stored, and is shown ever after."""
    stored = {turn.shown.name: turn.shown for turn in history.turns}
    ended_by: dict[tuple[str, str], float] = {}
    for reading in history.readings:
        shown = reading.shown
        if shown.status in TERMINAL:
            if shown != stored.get(shown.name):
                yield f"{reading.surface} at {reading.gateway} showed {shown}; stored is {stored.get(shown.name)}"
            ended_by[shown.name] = min(reading.seen_at, ended_by.get(shown.name, reading.seen_at))
    for reading in history.readings:
        shown = reading.shown
        ended_at = ended_by.get(shown.name)
        if shown.status not in TERMINAL and ended_at is not None and ended_at < reading.asked_at:
            yield f"{reading.surface} at {reading.gateway} showed {shown.name} {shown.status} after it had ended"


def _cancelled(history: History, rules: Rules) -> Iterator[str]:
    """After a cancel nothing of the run is open, and its answer says how the run has ended."""
    for reading in history.readings:
        if reading.surface == "cancel" and reading.shown.status not in TERMINAL:
            yield f"the cancel of {reading.shown.run_id} was answered {reading.shown.status}"


def _sequence(history: History, rules: Rules) -> Iterator[str]:
    """Sequences are 1..n in the store, and without gap or duplicate wherever they were shown.

    The answer to a start or continue has the events of its turn, among which those of an earlier one may lie.
    """
    for run in history.runs:
        sequences = [event.sequence for _, event in run.events]
        if sequences != list(range(1, run.last_sequence + 1)):
            yield f"the log of {run.run_id}, which ends with {run.last_sequence}, holds {sequences}"
        messages = sum(event.role in ("user", "assistant") for _, event in run.events)
        if messages != run.message_count:
            yield f"{run.run_id} counts {run.message_count} messages and has {messages}"
        # An input enters the log when it is accepted, whatever else is going on.
        turns = [turn for turn, event in run.events if event.role != "user"]
        if turns != sorted(turns):
            yield f"the turns of {run.run_id} are mixed in its log: {turns}"
    numbers = {turn.shown.name: turn.number for turn in history.turns}
    logs = {run.run_id: run.events for run in history.runs}
    for excerpt in history.excerpts:
        sequences = [event.sequence for event in excerpt.events]
        if excerpt.surface == "answer" and excerpt.turn is not None:
            number = numbers.get((excerpt.run_id, excerpt.turn))
            due = [event.sequence for turn, event in logs.get(excerpt.run_id, ()) if turn == number][: len(sequences)]
        else:
            first = sequences[0] if excerpt.after is None and sequences else (excerpt.after or 0) + 1
            due = list(range(first, first + len(sequences)))
        if sequences != due:
            yield f"{excerpt.surface} of {excerpt.run_id} at {excerpt.gateway} gave {sequences} in place of {due}"


def _same(history: History, rules: Rules) -> Iterator[str]:
    """Stored = streamed = answered."""
    stored = {run.run_id: {event.sequence: event for _, event in run.events} for run in history.runs}
    for excerpt in history.excerpts:
        log = stored.get(excerpt.run_id, {})
        for event in excerpt.events:
            if log.get(event.sequence) != event:
                where = f"{excerpt.surface} of {excerpt.run_id} at {excerpt.gateway}"
                yield f"{where} gave {event}; stored is {log.get(event.sequence)}"


def _text(history: History, rules: Rules) -> Iterator[str]:
    """The text of a message in the making is that with which the message begins. It may have got another sequence."""
    stored = {(run.run_id, event.sequence): event for run in history.runs for _, event in run.events}
    for excerpt in history.excerpts:
        for sequence, text in excerpt.said:
            event = stored.get((excerpt.run_id, sequence))
            if event is not None and event.mark is not None and not event.content.startswith(text):
                where = f"{excerpt.surface} of {excerpt.run_id} at {excerpt.gateway}"
                yield f"{where} said {text!r} before {sequence}, which is {event.content!r}"


def _whole(history: History, rules: Rules) -> Iterator[str]:
    """What says that it goes to the end does, and what shows a turn from its beginning shows its input."""
    numbers = {turn.shown.name: turn.number for turn in history.turns}
    ends: dict[tuple[str, int], int] = {}
    for run in history.runs:
        ends.update({(run.run_id, turn): event.sequence for turn, event in run.events})
    for excerpt in history.excerpts:
        if excerpt.turn is None:
            continue
        if excerpt.after is None and [(each.role, each.content) for each in excerpt.events[:1]] != [
            ("user", excerpt.turn)
        ]:
            yield f"{excerpt.surface} of {excerpt.turn} at {excerpt.gateway} begins with {excerpt.events[:1]}"
        if not excerpt.ended:
            continue
        number = numbers.get((excerpt.run_id, excerpt.turn))
        end = None if number is None else ends.get((excerpt.run_id, number))
        last = excerpt.events[-1].sequence if excerpt.events else excerpt.after
        if last != end:
            yield f"{excerpt.surface} of {excerpt.run_id} at {excerpt.gateway} ended with {last}, the turn with {end}"


def _once(history: History, rules: Rules) -> Iterator[str]:
    """A key has one turn, a request at most one, and the log has its input once."""
    turns = Counter(turn.shown.input for turn in history.turns)
    said = Counter(event.content for run in history.runs for _, event in run.events if event.role == "user")
    for text in {*turns, *said}:
        if (turns[text], said[text]) != (1, 1):
            yield f"{text} has {turns[text]} turns and {said[text]} user messages"
    by_key: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)
    for request in history.requests:
        if request.key is not None and request.turn is not None:
            by_key[request.key].add(request.turn)
    for key, found in by_key.items():
        if len(found) > 1:
            yield f"the key {key} was answered with {sorted(found)}"


def _attempts(history: History, rules: Rules) -> Iterator[str]:
    """Attempts stay within the limit, are begun once each, and a turn is given up only when there may be no other."""
    for turn in history.turns:
        where = f"turn {turn.number} of {turn.run_id}"
        if turn.attempt > rules.max_attempts:
            yield f"{where} had {turn.attempt} attempts"
        may_repeat = turn.server_id not in rules.not_repeatable
        if may_repeat and turn.shown.error_code == "RUNTIME_LOST" and turn.attempt < rules.max_attempts:
            yield f"{where} was given up after {turn.attempt} attempts"
        if not may_repeat and turn.attempt > 1:
            yield f"{where} was begun {turn.attempt} times and may not be repeated"
    begun = Counter((each.run_id, each.turn, each.attempt) for each in history.begun)
    for (run_id, number, attempt), count in begun.items():
        if count > 1 and not rules.drained:
            yield f"attempt {attempt} of turn {number} of {run_id} was begun {count} times"


def _epochs(history: History, rules: Rules) -> Iterator[str]:
    """An epoch never goes back; what has ended stays as it is."""
    by_turn: defaultdict[tuple[str, int], list[tuple[int, str]]] = defaultdict(list)
    for sample in history.samples:
        by_turn[sample.run_id, sample.number].append((sample.epoch, sample.status))
    for turn in history.turns:
        by_turn[turn.run_id, turn.number].append((turn.epoch, turn.shown.status))
        if turn.attempt > turn.epoch:
            yield f"turn {turn.number} of {turn.run_id} had {turn.attempt} attempts in {turn.epoch} epochs"
    for (run_id, number), seen in by_turn.items():
        for (epoch, status), (later_epoch, later_status) in pairwise(seen):
            if later_epoch < epoch or (status in TERMINAL and (epoch, status) != (later_epoch, later_status)):
                yield f"turn {number} of {run_id} went from {status} in {epoch} to {later_status} in {later_epoch}"


def _fenced(history: History, rules: Rules) -> Iterator[str]:
    """The log tells one attempt after another, each announced, made by one process, and whole as far as it goes."""
    logs: defaultdict[tuple[str, int], list[Event]] = defaultdict(list)
    for run in history.runs:
        for number, event in run.events:
            logs[run.run_id, number].append(event)
    for turn in history.turns:
        for words in _broken_attempts(turn, logs[turn.run_id, turn.number], rules):
            yield f"turn {turn.number} of {turn.run_id}: {words}"


def _broken_attempts(turn: StoredTurn, events: list[Event], rules: Rules) -> Iterator[str]:
    attempt, step, pid = 1, 0, 0
    for event in events:
        if event.log_type == "attempt":
            announced = int(event.content.split()[1])
            if announced < attempt or (announced == attempt and not rules.drained):
                yield f"{event.sequence} announces attempt {announced} after {attempt}"
            attempt, step, pid = announced, 0, 0
        elif (mark := event.mark) is not None:
            pid = pid or mark.pid
            if (mark.attempt, mark.step, mark.pid) != (attempt, step, pid):
                yield f"{event.sequence} is {mark}, where step {step} of attempt {attempt} by {pid} was to come"
                return
            step += 1
    if attempt != turn.attempt and not rules.drained and turn.attempt:
        yield f"it had {turn.attempt} attempts, and the log tells of {attempt}"
    messages = [event.content for event in events if event.role == "assistant"]
    if turn.shown.status == "completed":
        if step != task_of(turn.shown.input).steps:
            yield f"it completed with {step} steps"
        if turn.shown.output != (messages[-1] if messages else None):
            yield f"its output is {turn.shown.output!r} and its last message {messages[-1:]}"


RULES: dict[str, Check] = {
    "lost": _lost,
    "stuck": _stuck,
    "outcome": _outcome,
    "cancelled": _cancelled,
    "sequence": _sequence,
    "same": _same,
    "text": _text,
    "whole": _whole,
    "once": _once,
    "attempts": _attempts,
    "epochs": _epochs,
    "fenced": _fenced,
}
