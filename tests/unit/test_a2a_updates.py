"""What a remote agent's answers become: snapshots that come again, old statuses, artifacts that are replaced."""

from collections.abc import Sequence

import pytest
from a2a.types import (
    Artifact,
    Part,
    StreamResponse,
    Task,
    TaskArtifactUpdateEvent,
    TaskState,
    TaskStatus,
    TaskStatusUpdateEvent,
)
from a2a.types import Message as RemoteMessage

from runtime_service.agents import AgentOutput, Delta, Log, Message
from runtime_service.agents.a2a.options import A2AOptions
from runtime_service.agents.a2a.updates import Updates

URL = "http://a.example"
WORKING, ASKING = TaskState.TASK_STATE_WORKING, TaskState.TASK_STATE_INPUT_REQUIRED


def updates(remembered: dict[str, object] | None = None, turn: int = 1) -> Updates:
    """What takes responses in; knows the task and the context already unless told otherwise."""
    known = {"taskId": "t", "contextId": "c", "turn": 1, "url": URL} if remembered is None else remembered
    return Updates(A2AOptions(URL), turn, known)


def status(state: TaskState, text: str = "", message_id: str = "m") -> TaskStatus:
    """A status, with a message where there is a text."""
    message = RemoteMessage(message_id=message_id, parts=[Part(text=text)]) if text else None
    return TaskStatus(state=state, message=message)


def status_update(state: TaskState, text: str = "", message_id: str = "m") -> StreamResponse:
    """The task has this status now."""
    update = TaskStatusUpdateEvent(task_id="t", context_id="c", status=status(state, text, message_id))
    return StreamResponse(status_update=update)


def snapshot(*texts: str, now: TaskStatus | None = None, artifact_id: str = "a") -> StreamResponse:
    """The task as it is, with one artifact of these parts."""
    artifacts = [Artifact(artifact_id=artifact_id, parts=[Part(text=text) for text in texts])] if texts else []
    return StreamResponse(task=Task(id="t", context_id="c", status=now or status(WORKING), artifacts=artifacts))


def chunk(text: str, artifact_id: str = "a", *, append: bool = True) -> StreamResponse:
    """A piece of an artifact."""
    artifact = Artifact(artifact_id=artifact_id, parts=[Part(text=text)])
    update = TaskArtifactUpdateEvent(task_id="t", context_id="c", artifact=artifact, append=append)
    return StreamResponse(artifact_update=update)


def said(taking: Updates, *responses: StreamResponse) -> list[AgentOutput]:
    """What all these responses say."""
    return [output for response in responses for output in taking.add(response)]


def texts_of(outputs: Sequence[AgentOutput]) -> list[str]:
    """The texts of deltas and messages."""
    spoken = [each for each in outputs if isinstance(each, Delta | Message)]
    return [each.text if isinstance(each, Delta) else each.content for each in spoken]


def test_updates_say_of_a_snapshot_only_what_is_new() -> None:
    """Whether it came in pieces or in snapshots before."""
    assert texts_of(said(updates(), chunk("one "), snapshot("one ", "two "), snapshot("one ", "two "), chunk("3"))) == [
        "one ",
        "two ",
        "3",
    ]


def test_updates_say_a_snapshot_whole_that_is_another_one() -> None:
    """An artifact that is shorter than it was has been replaced."""
    assert texts_of(said(updates(), snapshot("a long one"), snapshot("short"))) == ["a long one", "short"]


def test_updates_say_an_artifact_again_in_another_task() -> None:
    """Artifacts of a task that is begun again may have the ids of those that are gone."""
    taking = updates()
    said(taking, snapshot("one"))
    taking.begin_again()
    assert texts_of(said(taking, snapshot("one", "two"))) == ["onetwo"]


def test_updates_expect_nothing_of_another_task() -> None:
    """An agent may answer with a new task: its artifacts and its question are new, whatever the old ones were."""
    taking = updates()
    said(taking, snapshot("one", now=status(ASKING)))
    taking.answered()
    other = snapshot("one", "two", now=status(ASKING))
    other.task.id = "u"
    assert texts_of(said(taking, other)) == ["onetwo", "onetwo"]
    assert taking.question is not None
    assert taking.task_id == "u"


def test_updates_forget_the_oldest_artifacts() -> None:
    """What is kept of artifacts does not grow with their number."""
    taking = updates()
    for number in range(3_000):
        said(taking, chunk("x", str(number), append=False))
    assert len(taking._told) == 1_000


@pytest.mark.parametrize("text", ["Which?", ""])
def test_updates_take_a_question_that_was_answered_for_old(text: str) -> None:
    """The first snapshot after an answer may be from before it; only another status asks again."""
    taking = updates()
    said(taking, status_update(ASKING, text))
    assert taking.question == (text or "The agent asks for input.")
    taking.answered()
    said(taking, snapshot(now=status(ASKING, text)))
    assert not taking.settled
    said(taking, status_update(WORKING), status_update(ASKING, text))
    assert taking.settled
    assert taking.question is not None


def test_updates_take_a_question_in_the_same_words_for_new() -> None:
    """An update says what is now: after an answer it is no question from before, though it has neither time nor id."""
    taking = updates()
    said(taking, status_update(ASKING, "Which?"))
    taking.answered()
    said(taking, status_update(ASKING, "Which?"))
    assert taking.question == "Which?"
    assert taking.settled


def test_updates_say_a_status_message_once() -> None:
    """A new time of the same status says nothing new; a new message with the same words does."""
    taking = updates()
    later = status(WORKING, "busy")
    later.timestamp.seconds = 5
    outputs = said(taking, status_update(WORKING, "busy"), snapshot(now=later), status_update(WORKING, "busy", "other"))
    assert [output.content for output in outputs if isinstance(output, Log)] == ["busy", "busy"]


def test_updates_log_a_context_once_in_a_run() -> None:
    """An agent that makes no tasks need not say in each turn what is known."""
    hello = StreamResponse(message=RemoteMessage(message_id="m", context_id="c", parts=[Part(text="hello")]))
    first, message = said(updates({}), hello)
    assert isinstance(first, Log)
    assert first.metadata == {"taskId": None, "contextId": "c", "turn": 1, "url": URL}
    assert said(updates(dict(first.metadata), turn=2), hello) == [message]
    assert isinstance(message, Message)
