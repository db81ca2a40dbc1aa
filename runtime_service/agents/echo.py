"""The `echo` agent: says the input back word by word, then whole. For wiring and benchmarks."""

import asyncio
import re
from collections.abc import AsyncGenerator
from typing import Annotated

import msgspec

from runtime_service.agents.base import Agent, AgentOutput, AgentSays, Delta, Message, TurnContext

_WORD = re.compile(r"\s*\S+\s*")


class EchoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`messages`: how often the input is said; `word_delay_seconds`: the pause before each word."""

    messages: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1
    word_delay_seconds: Annotated[float, msgspec.Meta(ge=0, le=60)] = 0


class EchoAgent(Agent):
    """Deltas of one word each, then the whole message; `messages` times over."""

    Options = EchoOptions
    begins_early = True

    def __init__(self, options: EchoOptions) -> None:
        self._options = options

    async def run(self, turn: TurnContext) -> AsyncGenerator[AgentSays]:
        """Say the input back."""
        words = [Delta(word) for word in _WORD.findall(turn.input)]
        message = Message(turn.input)
        delay = self._options.word_delay_seconds
        at_once: tuple[AgentOutput, ...] = (*words, message)
        for _ in range(self._options.messages):
            if not delay:
                yield at_once
                continue
            for word in words:
                await asyncio.sleep(delay)
                yield word
            yield message
