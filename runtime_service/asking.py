"""The questions of one turn, one after the other: put into the log, and waited for.

Whoever answers does so in the store, in whichever process; this one is told to look, and looks now and then by itself.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from runtime_service.agents import AgentError, Answer, Option
from runtime_service.errors import QuestionAnswered, StoreUnavailable
from runtime_service.questions import (
    QuestionSettings,
    answer_of,
    answers,
    choices,
    question_event,
    time_limit_event,
)
from runtime_service.runs import EventDraft, Run
from runtime_service.store.base import PERMISSION_RESPONSE, RETRY_SECONDS, Change, NewAnswer, RunStore

_LOOK_SECONDS = 5.0


class Asked(msgspec.Struct, frozen=True, eq=False):
    """A question that is to be stored; `stored` gets the sequence of its event."""

    event: EventDraft
    choices: tuple[tuple[str, str], ...]
    stored: asyncio.Future[int]


class Asking:
    """Asks for the turn that `run` shows. `write` is called when a question is to be stored, which `take` gives."""

    def __init__(
        self,
        run: Run,
        settings: QuestionSettings,
        store: RunStore,
        write: Callable[[], None],
        publish: Callable[[Change], None],
    ) -> None:
        self._run = run
        self._settings = settings
        self._store = store
        self._write = write
        self._publish = publish
        self._one_by_one = asyncio.Lock()
        self._to_store: Asked | None = None
        self._changed = asyncio.Event()
        self._closed = False

    async def ask(
        self, question: str, options: Sequence[Option], tool_kind: str | None, metadata: Mapping[str, Any] | None
    ) -> Answer:
        """Put a question to the caller; return his answer, or what holds when there is none in time.

        Raises AgentError when the turn ends first.
        """
        limit = self._settings.timeout_seconds
        stored = choices(options)
        async with self._one_by_one:
            if self._closed:
                raise _ended()
            loop = asyncio.get_running_loop()
            event = question_event(question, options, tool_kind, metadata, limit)
            asked = Asked(event, stored, loop.create_future())
            self._changed.clear()
            self._to_store = asked
            self._write()
            sequence = await asked.stored
            answer = await self._wait_for_answer(sequence, options, loop.time() + limit)
        if answer.option is None:
            return answer
        # The agent's own id, of which the stored one may differ.
        ids = {stored_id: option.id for (stored_id, _), option in zip(stored, options, strict=True)}
        return msgspec.structs.replace(answer, option=ids.get(answer.option, answer.option))

    @property
    def waits_to_be_stored(self) -> bool:
        """Whether `take` gives a question."""
        return self._to_store is not None

    def take(self) -> Asked | None:
        """Return the question that is to be stored, once; `put_back` undoes it."""
        asked, self._to_store = self._to_store, None
        return None if asked is None or asked.stored.done() else asked

    def put_back(self, asked: Asked) -> None:
        """The question was not stored, and is to be."""
        self._to_store = asked

    def look(self) -> None:
        """The question may have been answered."""
        self._changed.set()

    def close(self) -> None:
        """Nobody waits for an answer any more: the turn has ended, for this process."""
        self._closed = True
        self._changed.set()
        if self._to_store is not None and not self._to_store.stored.done():
            self._to_store.stored.set_exception(_ended())

    async def _wait_for_answer(self, sequence: int, options: Sequence[Option], deadline: float) -> Answer:
        loop = asyncio.get_running_loop()
        while True:
            left = deadline - loop.time()
            try:
                async with asyncio.timeout(min(left, _LOOK_SECONDS) if left > 0 else RETRY_SECONDS):
                    await self._changed.wait()
            except TimeoutError:
                pass
            if self._closed:
                raise _ended()
            self._changed.clear()
            try:
                answer = await self._read_answer(sequence)
                if answer is None and loop.time() >= deadline:
                    answer = await self._time_out(sequence, options)
            except (StoreUnavailable, QuestionAnswered):
                continue
            if answer is not None:
                return answer

    async def _read_answer(self, sequence: int) -> Answer | None:
        event = await self._store.read_latest_log(self._run.id, PERMISSION_RESPONSE, sequence)
        return answer_of(event) if event is not None and answers(event, sequence) else None

    async def _time_out(self, sequence: int, options: Sequence[Option]) -> Answer:
        """Close the question. Raises QuestionAnswered when the caller was first."""
        run, settings = self._run, self._settings
        answer = settings.time_out(options)
        event = time_limit_event(sequence, options, answer, settings.timeout_seconds)
        self._publish(
            await self._store.answer_question(NewAnswer(run.organization, run.server_id, run.id, sequence, event))
        )
        return answer


def _ended() -> AgentError:
    return AgentError("The turn has ended; nobody answers its question any more.", "TURN_ENDED")
