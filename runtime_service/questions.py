"""A question of an agent as the log holds it, and who decides it: the server's settings, the caller, the time limit.

Pure; knows neither the store nor whoever waits for the answer.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from runtime_service.agent_events import event_from, size_of, storable
from runtime_service.agents import AgentError, Answer, AnsweredBy, Log, Option, OptionKind
from runtime_service.errors import InvalidRequest
from runtime_service.runs import EventDraft, EventRole, LogLevel, Question, RunEvent, now_ms
from runtime_service.store.base import PERMISSION_REQUEST, PERMISSION_RESPONSE, NewTurn

DECISION = "permission_decision"
"""The type of the entry that tells what was decided without the caller."""

_MAX_OPTIONS = 50
_MAX_OPTION_CHARACTERS = 1_000
_ALLOWING = (OptionKind.ALLOW_ONCE, OptionKind.ALLOW_ALWAYS)
_REJECTING = (OptionKind.REJECT_ONCE, OptionKind.REJECT_ALWAYS)


class QuestionSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table `questions` of a server: what its agent's permissions and questions are decided by.

    `permissions`: whether the caller is asked for a permission. Tools of `allow_tool_kinds` are allowed without
    asking, also under "deny_all". A question that is not answered within `timeout_seconds` ends without an answer; a
    permission as `on_timeout` says. Questions without a permission's options are always put to the caller.
    """

    permissions: Literal["ask", "allow_all", "deny_all"] = "ask"
    allow_tool_kinds: tuple[Annotated[str, msgspec.Meta(min_length=1)], ...] = ()
    timeout_seconds: Annotated[float, msgspec.Meta(gt=0, le=604_800)] = 600
    on_timeout: Literal["deny", "allow"] = "deny"

    def decide(self, options: Sequence[Option], tool_kind: str | None) -> Answer | None:
        """Return what the settings say to a question at once, None when the caller is to be asked."""
        if all(option.kind is None for option in options):
            return None
        if self.permissions == "allow_all" or tool_kind in self.allow_tool_kinds:
            allowed = _first(options, _ALLOWING)
            return None if allowed is None else Answer(AnsweredBy.SETTINGS, allowed)
        if self.permissions == "deny_all":
            return Answer(AnsweredBy.SETTINGS, _first(options, _REJECTING))
        return None

    def time_out(self, options: Sequence[Option]) -> Answer:
        """Return what holds when nobody has answered in time."""
        return Answer(AnsweredBy.TIME_LIMIT, _first(options, _ALLOWING if self.on_timeout == "allow" else _REJECTING))


def _first(options: Sequence[Option], kinds: Sequence[OptionKind]) -> str | None:
    """Return the id of the first option of the first kind of which there is one."""
    return next((option.id for kind in kinds for option in options if option.kind is kind), None)


def choices(options: Sequence[Option]) -> tuple[tuple[str, str], ...]:
    """Return ids and names of options as they are stored, and compared: without blanks around them.

    Raises AgentError for what is too much.
    """
    if len(options) > _MAX_OPTIONS:
        raise AgentError(f"The agent asks with more than {_MAX_OPTIONS} options.", "QUESTION_INVALID")
    stored = tuple([(storable(option.id).strip(), storable(option.name).strip()) for option in options])
    if any(len(text) > _MAX_OPTION_CHARACTERS for option in stored for text in option):
        raise AgentError(
            f"The agent asks with an option of more than {_MAX_OPTION_CHARACTERS} characters.", "QUESTION_INVALID"
        )
    return stored


def question_event(
    question: str,
    options: Sequence[Option],
    tool_kind: str | None,
    metadata: Mapping[str, Any] | None,
    timeout_seconds: float,
) -> EventDraft:
    """Return the event that asks. Raises AgentError for one that cannot be stored."""
    shown = {**(metadata or {}), "options": [_option_document(option) for option in options]}
    if tool_kind is not None:
        shown["toolKind"] = tool_kind
    shown["timeoutSeconds"] = timeout_seconds
    event = event_from(Log(question, type=PERMISSION_REQUEST, metadata=shown))
    size_of(event)
    return event


def _option_document(option: Option) -> dict[str, str]:
    document = {"id": option.id, "name": option.name}
    return document if option.kind is None else document | {"kind": option.kind}


def answer_event(question: Question, new: NewTurn) -> EventDraft:
    """Return the event by which a caller's input answers a question. Raises InvalidRequest when it cannot."""
    option = question.option(new.input)
    if option is None and question.options:
        known = ", ".join(option_id for option_id, _ in question.options)
        raise InvalidRequest("input", f"must be an option of the question that the run asks: {known}")
    document: dict[str, object] = {"question": question.sequence}
    if option is not None:
        document["optionId"] = option
    if new.metadata is not None:
        document["metadata"] = msgspec.Raw(new.metadata)
    return EventDraft(
        EventRole.USER,
        new.input,
        new.created_at_ms,
        log_type=PERMISSION_RESPONSE,
        metadata=msgspec.json.encode(document),
    )


def answer_of(event: RunEvent) -> Answer:
    """Return the answer that an event of `answer_event` holds."""
    option = msgspec.json.decode(event.metadata or b"{}").get("optionId")
    return Answer(AnsweredBy.CALLER, option, event.content if option is None else None)


def answers(event: RunEvent, sequence: int) -> bool:
    """Return whether an event is a caller's answer to the question of `sequence`."""
    return bool(msgspec.json.decode(event.metadata or b"{}").get("question") == sequence)


def decision_log(question: str, options: Sequence[Option], tool_kind: str | None, answer: Answer) -> Log:
    """Return the entry that tells what the settings decided."""
    return Log(
        f"{_outcome(options, answer)} by the server's settings: {question}",
        type=DECISION,
        metadata=_decision(answer, {"toolKind": tool_kind} if tool_kind is not None else {}),
    )


def time_limit_event(sequence: int, options: Sequence[Option], answer: Answer, timeout_seconds: float) -> EventDraft:
    """Return the event that closes a question which nobody answered."""
    outcome = f": {_outcome(options, answer).lower()}" if any(option.kind for option in options) else ""
    content = f"Nobody answered within {timeout_seconds:g} s{outcome}."
    metadata = msgspec.json.encode(_decision(answer, {"question": sequence}))
    return EventDraft(EventRole.EXECUTION_LOG, content, now_ms(), DECISION, LogLevel.WARN, metadata)


def withdrawal_event(sequence: int) -> EventDraft:
    """Return the event that closes a question for whose answer the agent does not wait any more."""
    content = "The agent does not wait for an answer any more."
    metadata = msgspec.json.encode({"question": sequence, "by": "agent"})
    return EventDraft(EventRole.EXECUTION_LOG, content, now_ms(), DECISION, LogLevel.INFO, metadata)


def _outcome(options: Sequence[Option], answer: Answer) -> str:
    chosen = next((option for option in options if option.id == answer.option), None)
    return "Allowed" if chosen is not None and chosen.kind in _ALLOWING else "Denied"


def _decision(answer: Answer, more: dict[str, object]) -> dict[str, object]:
    chosen = {} if answer.option is None else {"optionId": answer.option}
    return {**more, **chosen, "by": answer.by.value}
