"""An agent of the benchmarks: one event a second, by the clock, so that runs can be spread over the second.

The input is the fraction of the second that its events come at. Like `echo` it says each message as a delta first.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator

from runtime_service.agents import Delta, Message, TurnContext


async def ticker(turn: TurnContext) -> AsyncGenerator[Delta | Message]:
    """Tick until the run ends."""
    phase = float(turn.input)
    due = math.ceil(time.time() - phase) + phase
    while True:
        await asyncio.sleep(max(0.0, due - time.time()))
        yield Delta("tick")
        yield Message("tick")
        due += 1
