"""The runtime service as a process of its own: started, watched, started again, and ended.

Knows its command line only; it is never imported.
"""

import asyncio
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

log = logging.getLogger(__name__)

_START_SECONDS = 60.0
_POLL_SECONDS = 0.01
_MIN_BACKOFF_SECONDS = 0.1
_MAX_BACKOFF_SECONDS = 5.0
_STOP_MARGIN_SECONDS = 10.0


def runtime_command(*arguments: str) -> list[str]:
    """Return the command line that runs a command of the runtime service."""
    return [sys.executable, "-m", "runtime_service", *arguments]


class RuntimeFailed(Exception):
    """The runtime service did not start; its own words are on standard error."""


class RuntimeProcess:
    """A supervised runtime service; an async context manager. `target` is its HOST:PORT, `pid` its process.

    `environment` goes on top of this process's own; it must hold ACP_SERVICE_TOKEN. The service stops by itself
    when this process dies, by whatever signal: its standard input ends then.
    """

    def __init__(
        self, data_dir: Path, servers: Path | None, drain_seconds: float, environment: Mapping[str, str]
    ) -> None:
        self._ready_file = data_dir / "runtime.ready.json"
        self._environment = {**os.environ, **environment}
        # The token that is given here counts, not one that was meant for programs started alone.
        self._environment.pop("ACP_SERVICE_TOKEN_FILE", None)
        self._arguments = [
            "--data-dir",
            str(data_dir),
            "--drain-seconds",
            str(drain_seconds),
            "--stop-with-stdin",
        ]
        if servers is not None:
            self._arguments += ["--servers", str(servers)]
        self._stop_seconds = drain_seconds + _STOP_MARGIN_SECONDS
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self.target = "127.0.0.1:0"

    @property
    def pid(self) -> int:
        """The process that runs now, or ran last."""
        assert self._process is not None, "entered"
        return self._process.pid

    async def __aenter__(self) -> "RuntimeProcess":
        """Start it and wait until it answers. Raises RuntimeFailed."""
        self._process = await self._spawn()
        try:
            await self._wait_until_ready(self._process)
        except BaseException:
            await self._end()
            raise
        self._watch = asyncio.create_task(self._supervise())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watch is not None:
            self._watch.cancel()
        await self._end()

    async def _spawn(self) -> asyncio.subprocess.Process:
        self._ready_file.unlink(missing_ok=True)
        return await asyncio.create_subprocess_exec(
            *runtime_command("serve", "--listen", self.target, "--ready-file", str(self._ready_file), *self._arguments),
            env=self._environment,
            stdin=asyncio.subprocess.PIPE,
            # A Ctrl-C at the terminal is for this process alone, which then ends the other in order.
            start_new_session=True,
        )

    async def _wait_until_ready(self, process: asyncio.subprocess.Process) -> None:
        try:
            async with asyncio.timeout(_START_SECONDS):
                while not self._ready_file.exists():
                    if process.returncode is not None:
                        raise RuntimeFailed(f"The runtime service ended with exit code {process.returncode}.")
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            raise RuntimeFailed(f"The runtime service was not ready after {_START_SECONDS:g} s.") from None
        self.target = json.loads(self._ready_file.read_text())["grpc_target"]

    async def _supervise(self) -> None:
        """Start the process again whenever it ends, at the same address, later each time that it fails."""
        backoff = _MIN_BACKOFF_SECONDS
        while True:
            assert self._process is not None
            code = await self._process.wait()
            log.error("the runtime service ended with exit code %s; starting it again", code)
            try:
                self._process = await self._spawn()
                await self._wait_until_ready(self._process)
                log.info("the runtime service is back, process %d", self._process.pid)
                backoff = _MIN_BACKOFF_SECONDS
            except (RuntimeFailed, OSError) as error:
                log.error("%s", error)
                if self._process.returncode is None:
                    self._process.kill()  # it hangs
                await asyncio.sleep(backoff)
                backoff = min(backoff * 2, _MAX_BACKOFF_SECONDS)

    async def _end(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(self._stop_seconds):
                await process.wait()
        except TimeoutError:
            log.error("the runtime service did not end in %g s; killing it", self._stop_seconds)
            process.kill()
            await process.wait()
