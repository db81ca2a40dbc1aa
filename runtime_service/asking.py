"""The questions of one turn, one after the other: put into the log, and waited for.

Whoever answers does so in the store, in whichever process; this one is told to look, and looks now and then by itself.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from runtime_service.agents import AgentError, Answer, Option
from runtime_service.errors import QuestionAnswered, RunServiceError, StoreUnavailable
from runtime_service.questions import (
    QuestionSettings,
    answer_of,
    answers,
    choices,
    question_event,
    time_limit_event,
    withdrawal_event,
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
        self._asked: Asked | None = None  # the newest
        self._to_store: Asked | None = None
        self._withdrawing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._closed = False

    async def ask(
        self, question: str, options: Sequence[Option], tool_kind: str | None, metadata: Mapping[str, Any] | None
    ) -> Answer:
        """Put a question to the caller; return his answer, or what holds when there is none in time.

        Raises AgentError when the turn ends first. Cancelled, it withdraws the question: nothing is an answer any more.
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
            self._asked = self._to_store = asked
            self._write()
            try:
                sequence = await asked.stored
                answer = await self._wait_for_answer(sequence, options, loop.time() + limit)
            except asyncio.CancelledError:
                if not (self._closed or asked.stored.cancelled()):
                    self._withdraw(asked.stored.result())
                raise
        if answer.option is None:
            return answer
        # The agent's own id, of which the stored one may differ.
        ids = {stored_id: option.id for (stored_id, _), option in zip(stored, options, strict=True)}
        return msgspec.structs.replace(answer, option=ids.get(answer.option, answer.option))

    @property
    def waits_to_be_stored(self) -> bool:
        """Whether `take` gives a question."""
        return self._to_store is not None and not self._to_store.stored.done()

    def take(self) -> Asked | None:
        """Return the question that is to be stored, once; `stored` or `put_back` follows."""
        asked, self._to_store = self._to_store, None
        return None if asked is None or asked.stored.done() else asked

    def stored(self, asked: Asked, sequence: int) -> None:
        """The question is in the log, with this sequence."""
        if asked.stored.done():
            self._withdraw(sequence)
        else:
            asked.stored.set_result(sequence)

    def put_back(self, asked: Asked) -> None:
        """The question was not stored, and is to be, unless nobody waits for it any more."""
        if not asked.stored.done():
            self._to_store = asked

    def look(self) -> None:
        """The question may have been answered."""
        self._changed.set()

    def close(self) -> None:
        """Nobody waits for an answer any more: the turn has ended, for this process."""
        self._closed = True
        self._changed.set()
        if self._asked is not None and not self._asked.stored.done():
            self._asked.stored.set_exception(_ended())

    def _withdraw(self, sequence: int) -> None:
        """Close a question for whose answer nobody waits, while its turn goes on: it would take the caller's input."""
        task = asyncio.create_task(self._close_question(sequence))
        self._withdrawing.add(task)
        task.add_done_callback(self._withdrawing.discard)

    async def _close_question(self, sequence: int) -> None:
        while not self._closed:
            try:
                await self._decide(sequence, withdrawal_event(sequence))
            except StoreUnavailable:
                await asyncio.sleep(RETRY_SECONDS)
            except RunServiceError:
                return  # it is not open: answered, or another one was asked
            else:
                return

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
        answer = self._settings.time_out(options)
        await self._decide(sequence, time_limit_event(sequence, options, answer, self._settings.timeout_seconds))
        return answer

    async def _decide(self, sequence: int, event: EventDraft) -> None:
        """Close the question with an event of this process. Raises QuestionAnswered unless it is open."""
        run = self._run
        answer = NewAnswer(run.organization, run.server_id, run.id, sequence, event)
        self._publish(await self._store.answer_question(answer))


def _ended() -> AgentError:
    return AgentError("The turn has ended; nobody answers its question any more.", "TURN_ENDED")
