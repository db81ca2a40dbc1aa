"""What surrounds the agent of one turn: the run's history and log, and its caller, who can be asked."""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from runtime_service.agent_events import storable
from runtime_service.agents import AgentOutput, Answer, HistoryMessage, Log, Option
from runtime_service.questions import QuestionSettings, decision_log
from runtime_service.runs import LogLevel, Run
from runtime_service.store.base import RunStore

_HISTORY_MESSAGES = 1_000


class TurnSurroundings:
    """Those of the turn that `run` shows; see `Surroundings`.

    What the settings decide is said by `say`, what they do not is put to the caller by `ask`.
    """

    __slots__ = ("_ask", "_run", "_say", "_settings", "_store")

    def __init__(
        self,
        run: Run,
        store: RunStore,
        settings: QuestionSettings,
        say: Callable[[AgentOutput], None],
        ask: Callable[[str, Sequence[Option], str | None, Mapping[str, Any] | None], Awaitable[Answer]],
    ) -> None:
        self._run = run
        self._store = store
        self._settings = settings
        self._say = say
        self._ask = ask

    async def history(self) -> list[HistoryMessage]:
        """Return the messages of the earlier turns."""
        number = self._run.turn.number
        if number == 1:
            return []
        messages = await self._store.read_messages(self._run.id, number, _HISTORY_MESSAGES)
        return [HistoryMessage(role, content) for role, content in messages]

    async def latest_log(self, log_type: str) -> Log | None:
        """Return the newest log entry of a type, as far as it is stored."""
        event = await self._store.read_latest_log(self._run.id, storable(log_type))
        if event is None:
            return None
        metadata = None if event.metadata is None else json.loads(event.metadata)
        return Log(event.content, event.log_level or LogLevel.INFO, event.log_type, metadata)

    async def ask(
        self, question: str, options: Sequence[Option], tool_kind: str | None, metadata: Mapping[str, Any] | None
    ) -> Answer:
        """Ask the caller, unless the server's settings decide."""
        if (decided := self._settings.decide(options, tool_kind)) is not None:
            self._say(decision_log(question, options, tool_kind, decided))
            return decided
        return await self._ask(question, options, tool_kind, metadata)
