"""How often the runtime service is started again."""

import asyncio
from pathlib import Path

import pytest

from gateway import supervisor
from gateway.supervisor import RuntimeFailed, RuntimeProcess
from tests.support import run_async


class Ended:
    """A process that has ended; the next one takes its place."""

    pid = 1
    returncode = -9

    async def wait(self) -> int:
        """What it ended with."""
        return self.returncode


def test_start_that_fails_is_soon_repeated_however_often_it_was_started_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pause grows from one failure to the next; a start that succeeds is none, and makes it short again."""
    monkeypatch.setattr(supervisor, "_MAX_BACKOFF_SECONDS", 1_000.0)
    succeeds = [True, *[True] * 12, False, True]
    all_started = asyncio.Event()

    class Runtime(RuntimeProcess):
        async def _spawn(self) -> Ended:  # type: ignore[override]
            if not succeeds:
                all_started.set()
                await asyncio.Event().wait()
            return Ended()

        async def _wait_until_ready(self, process: object) -> None:
            if not succeeds.pop(0):
                raise RuntimeFailed("as the test says")

    async def main() -> None:
        async with Runtime(Path(), None, 0, {}):
            await all_started.wait()

    run_async(main())
