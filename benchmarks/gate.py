"""An agent of the benchmarks: a turn that holds its room until a gate is opened, all of them at once.

The input is the path of a file; when that is there, the gate is open.
"""

import asyncio
from collections.abc import AsyncGenerator
from functools import cache
from pathlib import Path
from typing import Final

from runtime_service.agents import Message, TurnContext

_LOOK_SECONDS: Final = 0.01


async def gate(turn: TurnContext) -> AsyncGenerator[Message]:
    """Wait until the gate is open."""
    await asyncio.shield(_opened(turn.input))
    yield Message("open")


@cache
def _opened(path: str) -> asyncio.Future[None]:
    """One future for all turns at the same gate; the agents' loop looks for the file now and then."""
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[None] = loop.create_future()

    def look() -> None:
        if Path(path).exists():
            opened.set_result(None)
        else:
            loop.call_later(_LOOK_SECONDS, look)

    look()
    return opened
