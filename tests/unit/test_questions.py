"""Questions as the log holds them, and who decides them."""

import json
from typing import Any

import msgspec
import pytest

from runtime_service.agents import AgentError, Answer, AnsweredBy, Option, OptionKind
from runtime_service.errors import InvalidRequest
from runtime_service.questions import (
    QuestionSettings,
    answer_event,
    answer_of,
    answers,
    choices,
    decision_log,
    question_event,
    time_limit_event,
)
from runtime_service.runs import EventDraft, EventRole, Question, RunEvent, RunMode
from runtime_service.store.base import NewTurn

ALWAYS = Option("always", "Always allow", OptionKind.ALLOW_ALWAYS)
ONCE = Option("once", "Allow", OptionKind.ALLOW_ONCE)
NO = Option("no", "Reject", OptionKind.REJECT_ONCE)
NEVER = Option("never", "Never", OptionKind.REJECT_ALWAYS)
ALL = (ALWAYS, ONCE, NEVER, NO)
BY_SETTINGS, BY_TIME = AnsweredBy.SETTINGS, AnsweredBy.TIME_LIMIT


def input_of(text: str, metadata: bytes | None = None) -> NewTurn:
    """Input to a run."""
    return NewTurn("default", "assistant", "run_1", text, RunMode.SYNC, 17, metadata)


def stored(draft: EventDraft, sequence: int = 9) -> RunEvent:
    """The event in the log."""
    return RunEvent(sequence, 1, draft.role, draft.content, 17, draft.log_type, draft.log_level, draft.metadata)


def document(draft: EventDraft) -> Any:
    """The metadata of an event."""
    return json.loads(draft.metadata or b"null")


@pytest.mark.parametrize(
    ("settings", "kind", "options", "answer"),
    [
        ({}, "edit", ALL, None),
        ({"permissions": "allow_all"}, "edit", ALL, Answer(BY_SETTINGS, "once")),
        ({"permissions": "allow_all"}, None, (ALWAYS, NO), Answer(BY_SETTINGS, "always")),
        ({"permissions": "allow_all"}, "edit", (NO,), None),
        ({"permissions": "deny_all"}, "edit", ALL, Answer(BY_SETTINGS, "no")),
        ({"permissions": "deny_all"}, "edit", (ONCE, NEVER), Answer(BY_SETTINGS, "never")),
        ({"permissions": "deny_all"}, "edit", (ONCE,), Answer(BY_SETTINGS)),
        ({"allow_tool_kinds": ["read", "edit"]}, "edit", ALL, Answer(BY_SETTINGS, "once")),
        ({"allow_tool_kinds": ["read"]}, "edit", ALL, None),
        ({"allow_tool_kinds": ["read"]}, None, ALL, None),
        ({"permissions": "deny_all", "allow_tool_kinds": ["read"]}, "read", ALL, Answer(BY_SETTINGS, "once")),
        ({"permissions": "allow_all"}, "edit", (), None),
        ({"permissions": "deny_all"}, "edit", (Option("a", "A"), Option("b", "B")), None),
    ],
)
def test_settings_decide_permissions_only(
    settings: dict[str, Any], kind: str | None, options: tuple[Option, ...], answer: Answer | None
) -> None:
    """The narrowest option that says it; what is no permission is put to the caller."""
    assert msgspec.convert(settings, QuestionSettings).decide(options, kind) == answer


@pytest.mark.parametrize(
    ("on_timeout", "options", "option"),
    [("deny", ALL, "no"), ("allow", ALL, "once"), ("deny", (ONCE,), None), ("allow", (), None)],
)
def test_time_limit_chooses_as_the_settings_say(on_timeout: Any, options: tuple[Option, ...], option: str) -> None:
    """Without an option that says it, none."""
    assert QuestionSettings(on_timeout=on_timeout).time_out(options) == Answer(BY_TIME, option)


@pytest.mark.parametrize(
    "wrong", [{"permissions": "maybe"}, {"timeout_seconds": 0}, {"allow_tool_kinds": [""]}, {"ask": True}]
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    """When servers.toml is read."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, QuestionSettings)


def test_question_event_carries_the_options() -> None:
    """What the agent says of it besides, the kind of tool, and how long there is."""
    event = question_event("May I?", [ONCE, Option("x", "X")], "edit", {"toolCallId": "t", "options": "lost"}, 60)
    assert (event.role, event.content, event.log_type) == (EventRole.EXECUTION_LOG, "May I?", "permission_request")
    assert document(event) == {
        "toolCallId": "t",
        "options": [{"id": "once", "name": "Allow", "kind": "allow_once"}, {"id": "x", "name": "X"}],
        "toolKind": "edit",
        "timeoutSeconds": 60,
    }


@pytest.mark.parametrize("options", [[Option(str(n), "") for n in range(51)], [Option("a", "x" * 1_001)]])
def test_question_with_too_much_to_choose_from_is_refused(options: list[Option]) -> None:
    """Before anything is stored."""
    with pytest.raises(AgentError) as caught:
        choices(options)
    assert caught.value.code == "QUESTION_INVALID"


@pytest.mark.parametrize("text", ["once", " once\n", "Allow"])
def test_answer_names_an_option_by_id_or_name(text: str) -> None:
    """The event keeps what was said, and the option's id."""
    question = Question(4, options=choices(ALL))
    event = answer_event(question, input_of(text, b'{"n":9007199254740993}'))
    assert (event.role, event.content, event.created_at_ms) == (EventRole.USER, text, 17)
    assert event.metadata == b'{"question":4,"optionId":"once","metadata":{"n":9007199254740993}}'
    assert answers(stored(event), 4)
    assert not answers(stored(event), 5)
    assert answer_of(stored(event)) == Answer(AnsweredBy.CALLER, "once")


@pytest.mark.parametrize("text", [" yes ", "yes", "Allow it", "Allow it "])
def test_option_with_blanks_around_it_can_be_chosen(text: str) -> None:
    """As what is said is compared without them."""
    question = Question(4, options=choices([Option(" yes ", "Allow it "), NO]))
    assert question.option(text) == "yes"


def test_answer_that_names_no_option_is_refused_with_those_that_there_are() -> None:
    """The caller reads what would do."""
    with pytest.raises(InvalidRequest) as caught:
        answer_event(Question(4, options=choices([ONCE, NO])), input_of("perhaps"))
    assert caught.value.field == "input"
    assert caught.value.description == "must be an option of the question that the run asks: once, no"


def test_answer_without_options_is_the_text() -> None:
    """Whatever it is."""
    event = answer_event(Question(4), input_of(" once "))
    assert document(event) == {"question": 4}
    assert answer_of(stored(event)) == Answer(AnsweredBy.CALLER, None, " once ")


def test_decisions_are_told_in_the_log() -> None:
    """Who decided what."""
    log = decision_log("Delete it?", ALL, "delete", Answer(BY_SETTINGS, "once"))
    assert (log.content, log.type) == ("Allowed by the server's settings: Delete it?", "permission_decision")
    assert log.metadata == {"toolKind": "delete", "optionId": "once", "by": "settings"}
    denied = decision_log("Delete it?", ALL, None, Answer(BY_SETTINGS))
    assert (denied.content, denied.metadata) == ("Denied by the server's settings: Delete it?", {"by": "settings"})
    late = time_limit_event(4, ALL, Answer(BY_TIME, "no"), 60)
    assert late.content == "Nobody answered within 60 s: denied."
    assert document(late) == {"question": 4, "optionId": "no", "by": "time_limit"}
    assert time_limit_event(4, (), Answer(BY_TIME), 0.5).content == "Nobody answered within 0.5 s."
