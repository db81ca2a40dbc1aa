"""Many processes over one store: runtime services and gateways that are killed, paused and started again in place."""

import asyncio
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from tests.acceptance.agents import JOURNAL
from tests.acceptance.history import Begun
from tests.acceptance.processes import Program, command

TOKEN = "the-service-token-of-the-tests"
KEY = "a-key-of-the-tests-own-choice"

SERVERS = """
[servers.steps]
kind = "agent_runtime"
agent = "python"
options = { entrypoint = "tests.acceptance.agents:steps" }

[servers.once]
kind = "agent_runtime"
agent = "python"
options = { entrypoint = "tests.acceptance.agents:steps", repeatable = false }

[servers.endless]
kind = "agent_runtime"
agent = "python"
options = { entrypoint = "tests.acceptance.agents:endless" }
"""


class Node:
    """One of the processes. It keeps its name and its port when it is started again, by its `environment` of then."""

    def __init__(
        self, name: str, folder: Path, arguments: Sequence[str], environment: Mapping[str, str], port: int
    ) -> None:
        self.name = name
        self.port = port
        self.deaths: dict[int, float] = {}
        self._folder = folder
        self._ready_file = folder / f"{name}.ready.json"
        self._arguments = (*arguments, "--ready-file", str(self._ready_file))
        self.environment = dict(environment)
        self._program: Program | None = None

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """Where it listens, for HTTP."""
        return f"http://{self.address}"

    @property
    def pid(self) -> int:
        """The process that was started last."""
        return self.program.process.pid

    @property
    def program(self) -> Program:
        """The command that was started last."""
        assert self._program is not None, f"{self.name} was never started"
        return self._program

    async def start(self) -> None:
        """Start it; it answers calls when this returns."""
        self._ready_file.unlink(missing_ok=True)
        self._program = Program(self._folder, *self._arguments, name=self.name, environment=self.environment)
        await asyncio.to_thread(self._program.ready, self._ready_file)

    def kill(self) -> None:
        """End it as loss of power does."""
        if self._program is not None:
            self.deaths.setdefault(self.pid, time.time())
            self._program.kill()

    def pause(self) -> None:
        """Stop it where it stands."""
        self.program.send(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self.program.send(signal.SIGCONT)

    async def end(self) -> int:
        """End it as an operator does; return its exit code."""
        return await asyncio.to_thread(self.program.end)


class Cluster:
    """Runtime services over one store, and gateways before them."""

    def __init__(self, folder: Path, runtimes: list[Node], gateways: list[Node]) -> None:
        self.folder = folder
        self.runtimes = runtimes
        self.gateways = gateways

    @property
    def nodes(self) -> list[Node]:
        """Every process."""
        return [*self.runtimes, *self.gateways]

    def begun(self) -> list[Begun]:
        """What the agents have noted."""
        journal = self.folder / "journal"
        lines = journal.read_bytes().splitlines() if journal.exists() else []
        return [msgspec.json.decode(line, type=Begun) for line in lines]

    def deaths(self) -> dict[int, float]:
        """When which process was killed."""
        return {pid: at for node in self.nodes for pid, at in node.deaths.items()}

    def complaints(self) -> list[str]:
        """Lines of their logs that tell of a defect."""
        logs = [(node.name, node.program.stderr.splitlines()) for node in self.nodes]
        return [f"{name}: {line}" for name, lines in logs for line in lines if "Traceback" in line]


@asynccontextmanager
async def cluster(
    folder: Path,
    *,
    runtimes: int,
    gateways: int,
    store_url: str | None = None,
    settings: Mapping[str, str] = {},
    gateway_settings: Mapping[str, str] = {},
    between: Callable[[str], Awaitable[str]] | None = None,
    started: int | None = None,
) -> AsyncIterator[Cluster]:
    """Start that many of both; nothing is left of them at the end.

    Without a store's URL it is the SQLite file `folder/data/runs.sqlite`, of one runtime. `settings` are those of the
    runtimes. `between` may put something between the gateways and a runtime: it gives the address to call instead.
    Only the first `started` runtimes are started, where that is said.
    """
    servers = folder / "servers.toml"
    servers.write_text(SERVERS)
    environment = {
        "ACP_SERVICE_TOKEN": TOKEN,
        "ACP_API_KEY": KEY,
        JOURNAL: str(folder / "journal"),
        **({} if store_url is None else {"ACP_STORE": store_url}),
    }
    if store_url is not None:
        migrated = await asyncio.to_thread(command, folder, "runtime_service", "migrate", environment=environment)
        assert migrated.returncode == 0, migrated.stderr
    ports = free_ports(runtimes + gateways)
    services = [
        Node(
            f"runtime-{number}",
            folder,
            (
                *("runtime_service", "serve", "--listen", f"127.0.0.1:{port}"),
                *("--data-dir", str(folder / "data"), "--servers", str(servers)),
            ),
            {**environment, **settings},
            port,
        )
        for number, port in enumerate(ports[:runtimes])
    ]
    target = ",".join([await between(each.address) if between else each.address for each in services])
    doors = [
        Node(
            f"gateway-{number}",
            folder,
            ("gateway", "serve", "--port", str(port), "--grpc-target", target),
            {**environment, **gateway_settings},
            port,
        )
        for number, port in enumerate(ports[runtimes:])
    ]
    running = Cluster(folder, services, doors)
    try:
        await asyncio.gather(*(node.start() for node in services[:started]))
        await asyncio.gather(*(node.start() for node in doors))
        yield running
    finally:
        for node in running.nodes:
            node.kill()


def free_ports(count: int) -> list[int]:
    """Ports of this machine on which nobody listens now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
