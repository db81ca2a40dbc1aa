"""What lies between the two programs, in the hands of a test: connections that break, or swallow what is sent."""

import asyncio


class Wire:
    """What lies between gateway and runtime service: a TCP proxy whose connections a test can break.

    What comes by waits for `delay_seconds` before it is passed on.
    """

    def __init__(self) -> None:
        self.port = 0
        self.swallowed = 0
        self.delay_seconds = 0.0
        self._swallows: tuple[str, ...] = ()
        self._passing = asyncio.Event()
        self._passing.set()
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._target: tuple[str, int]
        self._server: asyncio.Server

    async def start(self, target: str) -> str:
        """Pass on to HOST:PORT; return where to connect to instead."""
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return f"127.0.0.1:{self.port}"

    async def stop(self) -> None:
        """Break what there is, and take no more."""
        self._server.close()
        self.cut()
        await self._server.wait_closed()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def cut(self) -> None:
        """Break every connection, with what is under way on it; the next ones let everything through."""
        self._swallows = ()
        self.release()
        for connection in self._connections:
            connection.cut()

    def hold(self) -> None:
        """Hold everything back until the release, as a process does that is stopped."""
        self._passing.clear()

    def release(self) -> None:
        """Pass on what was held back."""
        self._passing.set()

    def swallow(self, *, answers_only: bool = False) -> None:
        """Let nothing through any more, or no answers, until the cut; `swallowed` counts bytes."""
        self._swallows = ("down",) if answers_only else ("up", "down")
        for connection in self._connections:
            connection.swallows = self._swallows

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            there = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection((writer, there[1]), self._swallows)
        self._connections.add(connection)
        try:
            await asyncio.gather(
                self._copy(connection, "up", reader, there[1]), self._copy(connection, "down", there[0], writer)
            )
        finally:
            self._connections.discard(connection)

    async def _copy(
        self, connection: "_Connection", way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            while data := await reader.read(1 << 16):
                await self._passing.wait()
                if way in connection.swallows:
                    self.swallowed += len(data)
                else:
                    await asyncio.sleep(self.delay_seconds)
                    writer.write(data)
                    await writer.drain()
        except ConnectionError:
            pass
        finally:
            connection.cut()


class _Connection:
    """One connection through a wire, with both of its ends."""

    def __init__(self, ends: tuple[asyncio.StreamWriter, ...], swallows: tuple[str, ...]) -> None:
        self._ends = ends
        self.swallows = swallows

    def cut(self) -> None:
        for end in self._ends:
            end.transport.abort()
