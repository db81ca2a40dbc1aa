"""Commands that an agent lets run through the runtime service, in the working directory. Knows no protocol."""

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

from runtime_service.agents.agent_client_protocol.directory import Refused
from runtime_service.agents.child_process import ChildProcess

_MAX_OUTPUT_BYTES = 128 << 10
_MAX_LINE_BYTES = 1 << 16
_MAX_TERMINALS = 8
_MAX_REMEMBERED = 8
_REMEMBERED_CHARACTERS = 8_192
_END_SECONDS = 1.0


class Terminal:
    """A running command, and the end of what it writes to stdout and stderr."""

    def __init__(self, child: ChildProcess, output_bytes: int) -> None:
        self._child = child
        self._output_bytes = output_bytes
        self._output = bytearray()
        self.truncated = False
        self._reading = asyncio.create_task(self._read())

    @property
    def output(self) -> str:
        """The newest of the output, without half a character at its beginning."""
        data = bytes(self._output)
        if self.truncated:
            # A continuation byte of UTF-8 is 10xxxxxx.
            data = data[next((n for n in range(min(4, len(data))) if data[n] & 0xC0 != 0x80), 0) :]
        return data.decode("utf-8", "replace")

    @property
    def exit_status(self) -> int | None:
        """As that of a ChildProcess; None also while there is output to be read."""
        return self._child.exit_status if self._reading.done() else None

    async def wait(self) -> int:
        """Wait for its exit and the end of its output."""
        await asyncio.wait([self._reading])
        return await self._child.wait()

    async def end(self) -> None:
        """End it and all that it has started; what it has written stays."""
        await self._child.end(_END_SECONDS)
        await asyncio.wait([self._reading])

    async def _read(self) -> None:
        while data := await self._child.read():
            self._output += data
            if (excess := len(self._output) - self._output_bytes) > 0:
                self.truncated = True
                del self._output[:excess]


class Terminals:
    """The terminals of one session, by id."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._terminals: dict[str, Terminal] = {}
        self._starting = 0
        self._remembered: dict[str, str] = {}
        self._numbers = count(1)
        self._closed = False

    async def start(
        self,
        command: str,
        args: Sequence[str],
        *,
        environment: Mapping[str, str],
        cwd: Path,
        output_bytes: int | None,
    ) -> str:
        """Start a command and return the id of its terminal. Raises Refused."""
        if len(self._terminals) + self._starting >= _MAX_TERMINALS:
            raise Refused(f"There are {_MAX_TERMINALS} terminals already; release one first.")
        environment = {**self._environment, **environment}
        if any("\0" in text for text in (command, *args, *environment, *environment.values())):
            raise Refused("The command or its environment has a NUL character.")
        if any(not name or "=" in name for name in environment):
            raise Refused("A variable of the environment has a name that is empty or has a '='.")
        self._starting += 1
        try:
            child = await ChildProcess.start(
                _in_shell(command, args, environment.get("PATH")),
                env=environment,
                cwd=cwd,
                max_line_bytes=_MAX_LINE_BYTES,
            )
        except OSError as error:
            raise Refused(f"The command cannot be started: {error}") from error
        finally:
            self._starting -= 1
        if self._closed:
            await child.end(0)
            raise Refused("The session has ended.")
        terminal_id = f"terminal-{next(self._numbers)}"
        limit = _MAX_OUTPUT_BYTES if output_bytes is None else min(output_bytes, _MAX_OUTPUT_BYTES)
        self._terminals[terminal_id] = Terminal(child, limit)
        return terminal_id

    def get(self, terminal_id: str) -> Terminal:
        """Return a terminal. Raises Refused when there is none."""
        if (terminal := self._terminals.get(terminal_id)) is None:
            raise Refused(f"There is no terminal {terminal_id!r}.")
        return terminal

    async def release(self, terminal_id: str) -> None:
        """End a terminal and forget it, but for the end of its output. Raises Refused when there is none."""
        terminal = self.get(terminal_id)
        del self._terminals[terminal_id]
        await terminal.end()
        self._remembered[terminal_id] = terminal.output[-_REMEMBERED_CHARACTERS:]
        if len(self._remembered) > _MAX_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]

    @property
    def ids(self) -> set[str]:
        """The terminals that are there."""
        return set(self._terminals)

    async def release_all_but(self, kept: set[str]) -> None:
        """End and forget the terminals that the agent has left, but for some."""
        left = [self.release(terminal_id) for terminal_id in self._terminals if terminal_id not in kept]
        # The agent may release one at the same time.
        await asyncio.gather(*left, return_exceptions=True)

    def output_of(self, terminal_id: str) -> str | None:
        """Return the end of what a terminal has written, also of one that was released lately."""
        if (terminal := self._terminals.get(terminal_id)) is not None:
            return terminal.output[-_REMEMBERED_CHARACTERS:]
        return self._remembered.get(terminal_id)

    async def close(self) -> None:
        """End them all."""
        self._closed = True
        terminals, self._terminals = list(self._terminals.values()), {}
        await asyncio.gather(*(terminal.end() for terminal in terminals))


def _in_shell(command: str, args: Sequence[str], path: str | None) -> list[str]:
    """Return a command that writes its errors to stdout, too, and reads nothing.

    One without arguments that is no program is a line for the shell, which is what many agents send.
    """
    if args or shutil.which(command, path=path) or (os.sep in command and " " not in command):
        return ["/bin/sh", "-c", 'exec "$@" 2>&1 </dev/null', "sh", command, *args]
    return ["/bin/sh", "-c", 'exec 2>&1 </dev/null\neval "$1"', "sh", command]
