"""What a remote agent answers, as what the runtime's agents say. Pure: no network, no clock.

A stream has one `Message`, or a `Task` with updates of its status and its artifacts. A snapshot of the task may come
again at any time, when its stream is taken up again or it is polled: what was said of it is not said twice.
Imports the library: import this only where it is needed.
"""

from collections.abc import Mapping
from typing import Any

from a2a.types import Artifact, StreamResponse, TaskState, TaskStatus
from a2a.types import Message as RemoteMessage
from a2a.types import Part as RemotePart

from runtime_service.agents.a2a.options import A2AOptions
from runtime_service.agents.a2a.parts import (
    MAX_NAME_CHARACTERS,
    described,
    other_than_text,
    plain,
    said_of,
    text_of,
)
from runtime_service.agents.base import AgentError, AgentOutput, Delta, Log, Message
from runtime_service.runs import LogLevel

TASK_LOG = "a2a_task"
"""The log type of what is to be known of a task after a restart."""

_MAX_MESSAGE_CHARACTERS = 180_000
"""Of up to four bytes each, and metadata beside: an event of the runtime holds that."""
_MAX_STATUS_CHARACTERS = 16_000
_MAX_ARTIFACTS = 1_000

_WORDS = {
    TaskState.TASK_STATE_SUBMITTED: "submitted",
    TaskState.TASK_STATE_WORKING: "working",
    TaskState.TASK_STATE_COMPLETED: "completed",
    TaskState.TASK_STATE_FAILED: "failed",
    TaskState.TASK_STATE_CANCELED: "canceled",
    TaskState.TASK_STATE_INPUT_REQUIRED: "input-required",
    TaskState.TASK_STATE_REJECTED: "rejected",
    TaskState.TASK_STATE_AUTH_REQUIRED: "auth-required",
}
_ENDED = {
    TaskState.TASK_STATE_COMPLETED,
    TaskState.TASK_STATE_FAILED,
    TaskState.TASK_STATE_CANCELED,
    TaskState.TASK_STATE_REJECTED,
}


class TaskCanceled(AgentError):
    """The task was cancelled, and not by this turn."""


class Updates:
    """What the agent says in one turn. Feed it responses; stop when it is `settled`.

    Then the turn has ended, with a `failure` or without, or there is a `question`: the next responses are to its
    answer. `task_id` and `context_id` are the agent's. `remembered` is the metadata of the newest `TASK_LOG`.
    """

    def __init__(self, options: A2AOptions, turn: int, remembered: Mapping[str, Any]) -> None:
        self._options = options
        self._agent = f"The agent at {options.host}"
        self._turn = turn
        self._logged = remembered
        self.context_id: str | None = remembered.get("contextId")
        self.task_id: str | None = None
        self.question: str | None = None
        self.question_metadata: dict[str, Any] = {}
        self.failure: AgentError | None = None
        self.settled = False
        self.task_is_open = False
        self._last_status: TaskStatus | None = None
        self._told: dict[str, tuple[int, int]] = {}  # by artifact: characters of text, other parts
        self._making: dict[str, Any] | None = None  # metadata of the message in the making
        self._texts: list[str] = []
        self._characters = 0
        self._last_message = ""

    def take_up(self, task_id: str) -> None:
        """Expect the responses of a task that there is already."""
        self.task_id = task_id
        self.task_is_open = True

    def begin_again(self) -> None:
        """Expect the responses of a new task: the one that there was is gone."""
        self.failure = None
        self.settled = False
        self.task_id = None
        self.task_is_open = False
        self._last_status = None
        self._told.clear()

    def answered(self) -> None:
        """The question was answered: what comes next are the responses to that."""
        self.question = None
        self.settled = False

    def add(self, response: StreamResponse) -> tuple[AgentOutput, ...]:
        """Take a response; return what it says. Raises AgentError for one that says nothing."""
        outputs: list[AgentOutput] = []
        match response.WhichOneof("payload"):
            case "message":
                message = response.message
                self._remember(message.task_id or self.task_id, message.context_id, outputs)
                self._finish(outputs)
                self._say_message(message, outputs)
                self.settled = True
                self.task_is_open = False
            case "task":
                task = response.task
                self._remember(task.id, task.context_id, outputs)
                # What a cancelled task has left is half of something that is begun again, or was said before.
                if task.status.state != TaskState.TASK_STATE_CANCELED:
                    for artifact in task.artifacts:
                        self._say_snapshot(artifact, task.status.state in _ENDED, outputs)
                self._take_status(task.status, outputs)
            case "status_update":
                update = response.status_update
                self._remember(update.task_id, update.context_id, outputs)
                if update.status.state == TaskState.TASK_STATE_INPUT_REQUIRED:
                    self._last_status = None  # it is no snapshot, but asks again, perhaps in the same words
                self._take_status(update.status, outputs)
            case "artifact_update":
                chunk = response.artifact_update
                self._remember(chunk.task_id, chunk.context_id, outputs)
                self._say_chunk(chunk.artifact, chunk.append, chunk.last_chunk, outputs)
            case _:
                raise self._garbled()
        return tuple(outputs)

    # Task and context

    def _remember(self, task_id: str | None, context_id: str, outputs: list[AgentOutput]) -> None:
        if max(len(task_id or ""), len(context_id)) > MAX_NAME_CHARACTERS:
            raise self._garbled()
        if task_id and task_id != self.task_id:
            # What another one has said is nothing that this one has.
            self.task_id = task_id
            self._last_status = None
            self._told.clear()
        self.context_id = context_id or self.context_id
        self.task_is_open = self.task_is_open or self.task_id is not None
        to_know = {"taskId": self.task_id, "contextId": self.context_id, "turn": self._turn, "url": self._options.url}
        if self.task_id is None and self.context_id == self._logged.get("contextId"):
            return
        if self._logged != to_know:
            self._logged = to_know
            what = f"task {self.task_id}" if self.task_id else f"context {self.context_id}"
            outputs.append(Log(f"{self._agent}: {what}", type=TASK_LOG, metadata=to_know))

    def _garbled(self) -> AgentError:
        return AgentError(
            f"What the agent at {self._options.host} sent is not of the A2A protocol.", "AGENT_PROTOCOL_ERROR"
        )

    # Status

    def _take_status(self, status: TaskStatus, outputs: list[AgentOutput]) -> None:
        if status == self._last_status:
            return  # a snapshot; perhaps one from before the question was answered
        told = self._last_status is not None and status.message == self._last_status.message
        self._last_status = status
        state = status.state
        self.task_is_open = state not in _ENDED
        word = _WORDS.get(state, "unknown")
        message = status.message
        text = text_of(message.parts, "\n").strip()
        others = other_than_text(message.parts)
        self.failure = self._failure_of(state, text)
        self.settled = self.failure is not None
        match state:
            case TaskState.TASK_STATE_COMPLETED:
                self._finish(outputs)
                # Some agents say their last artifact again as they end.
                if others or (text and text != self._last_message.strip()):
                    self._say_message(message, outputs)
                self.settled = True
            case TaskState.TASK_STATE_INPUT_REQUIRED:
                self._finish(outputs)
                self.question = text[:_MAX_STATUS_CHARACTERS] or "The agent asks for input."
                self.question_metadata = self._about(message)
                self.settled = True
            case _ if self.failure is None and (text or others) and not told:
                self._log_status(word, text, message, outputs)

    def _failure_of(self, state: int, text: str) -> AgentError | None:
        """Return how the turn fails with a task in this state."""
        why = f": {self._options.quoted(text)}." if text else ", and does not say why."
        match state:
            case TaskState.TASK_STATE_AUTH_REQUIRED:
                advice = "Authenticate there, or check api_key_env and headers_env; then continue the run."
                return AgentError(f"{self._agent} wants an authentication{why} {advice}", "AGENT_LOGIN_REQUIRED")
            case TaskState.TASK_STATE_FAILED:
                return AgentError(f"{self._agent} failed{why} Try again.", "AGENT_TASK_FAILED")
            case TaskState.TASK_STATE_REJECTED:
                return AgentError(f"{self._agent} refused the task{why} Say it differently.", "AGENT_REFUSED")
            case TaskState.TASK_STATE_CANCELED:
                return TaskCanceled(f"{self._agent} cancelled the task{why} Try again.", "AGENT_CANCELLED")
        return None

    def _log_status(self, word: str, text: str, message: RemoteMessage, outputs: list[AgentOutput]) -> None:
        metadata = {"state": word} | self._about(message)
        if len(text) > _MAX_STATUS_CHARACTERS:
            metadata["cut"] = True
        said = text[:_MAX_STATUS_CHARACTERS] or said_of(metadata["parts"])
        outputs.append(Log(said, type="status", metadata=metadata))

    # Messages and artifacts

    def _say_message(self, message: RemoteMessage, outputs: list[AgentOutput]) -> None:
        """Say a message that is there whole."""
        metadata = self._about(message)
        text = text_of(message.parts, "\n") or said_of(metadata.get("parts", ()))
        self._say_text(text, metadata, outputs, whole=True)

    def _say_chunk(self, artifact: Artifact, append: bool, last: bool, outputs: list[AgentOutput]) -> None:
        """Say a piece of an artifact, or a new artifact in place of what had its id."""
        characters, others = self._told_of(artifact) if append else (0, 0)
        if not append:
            self._finish(outputs)
        text = text_of(artifact.parts)
        other = other_than_text(artifact.parts)
        self._note_told(artifact.artifact_id, characters + len(text), others + len(other))
        self._say_artifact(artifact, text, other, outputs, whole=last)

    def _say_snapshot(self, artifact: Artifact, ended: bool, outputs: list[AgentOutput]) -> None:
        """Say of an artifact what was not said yet."""
        text = text_of(artifact.parts)
        other = other_than_text(artifact.parts)
        characters, others = self._told_of(artifact)
        if characters > len(text) or others > len(other):
            characters = others = 0  # it is another one by now
        self._note_told(artifact.artifact_id, len(text), len(other))
        self._say_artifact(artifact, text[characters:], other[others:], outputs, whole=ended)

    def _say_artifact(
        self, artifact: Artifact, text: str, other: list[RemotePart], outputs: list[AgentOutput], *, whole: bool
    ) -> None:
        metadata: dict[str, Any] = {"taskId": self.task_id} if self.task_id else {}
        metadata["artifactId"] = artifact.artifact_id[:MAX_NAME_CHARACTERS]
        if artifact.name:
            metadata["name"] = artifact.name[:MAX_NAME_CHARACTERS]
        if artifact.description:
            metadata["description"] = artifact.description[:MAX_NAME_CHARACTERS]
        if artifact.HasField("metadata"):
            metadata["metadata"] = plain(artifact.metadata)
        if text or (whole and self._is_making(metadata)):
            self._say_text(text, metadata, outputs, whole=whole)
        if other:
            if not self._is_making(metadata):
                self._finish(outputs)
            parts = described(other)
            name = metadata.get("name", "artifact")
            outputs.append(Log(f"{name}: {said_of(parts)}", LogLevel.INFO, "artifact", metadata | {"parts": parts}))

    def _told_of(self, artifact: Artifact) -> tuple[int, int]:
        return self._told.get(artifact.artifact_id[:MAX_NAME_CHARACTERS], (0, 0))

    def _note_told(self, artifact_id: str, characters: int, others: int) -> None:
        artifact_id = artifact_id[:MAX_NAME_CHARACTERS]
        self._told.pop(artifact_id, None)
        self._told[artifact_id] = (characters, others)
        if len(self._told) > _MAX_ARTIFACTS:
            del self._told[next(iter(self._told))]

    def _about(self, message: RemoteMessage) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        if self.task_id:
            metadata["taskId"] = self.task_id
        if message.message_id:
            metadata["messageId"] = message.message_id[:MAX_NAME_CHARACTERS]
        if parts := described(other_than_text(message.parts)):
            metadata["parts"] = parts
        if message.HasField("metadata"):
            metadata["metadata"] = plain(message.metadata)
        return metadata

    # The message in the making

    def _is_making(self, metadata: dict[str, Any]) -> bool:
        return self._making is not None and self._making.get("artifactId") == metadata.get("artifactId")

    def _say_text(self, text: str, metadata: dict[str, Any], outputs: list[AgentOutput], *, whole: bool) -> None:
        """Go on with the message in the making where that is the same artifact, else begin one; `whole` ends it."""
        if not self._is_making(metadata):
            self._finish(outputs)
        # What is there whole at once needs no deltas.
        at_once = whole and self._making is None
        while True:
            if self._making is None:
                self._making = metadata
            room = _MAX_MESSAGE_CHARACTERS - self._characters
            piece, text = text[:room], text[room:]
            if piece:
                self._texts.append(piece)
                self._characters += len(piece)
                if not at_once:
                    outputs.append(Delta(piece))
            if not text:
                break
            self._finish(outputs)
            metadata = metadata | {"continued": True}
        if whole:
            self._finish(outputs)

    def _finish(self, outputs: list[AgentOutput]) -> None:
        """End the message in the making, if there is one."""
        if self._making is not None and self._texts:
            self._last_message = "".join(self._texts)
            outputs.append(Message(self._last_message, self._making))
        self._making = None
        self._texts = []
        self._characters = 0
