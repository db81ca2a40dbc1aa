"""Settings of the runtime service, checked when they are built."""

import ipaddress
import socket
from pathlib import Path

import msgspec

from runtime_service.executor import ExecutorLimits
from runtime_service.retention import RetentionLimits
from runtime_service.session import SessionLimits
from runtime_service.validation import RequestLimits

_POSTGRESQL = ("postgresql://", "postgres://")
_EVERY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104 - compared with, not listened on


class SettingError(ValueError):
    """A setting does not hold what it must; the message names it."""


class RuntimeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How the runtime service runs.

    `listen` is HOST:PORT (port 0 picks one); `drain_seconds` is how long running turns may go on after SIGTERM.
    `store` is the URL of a PostgreSQL database; without one, runs are in a SQLite file of the data directory. Other
    runtime services over the same database reach this one at `advertise`, HOST:PORT; without, at this machine's name.
    What another one has not renewed for `lease_seconds` it has lost. Raises SettingError.
    """

    data_dir: Path
    service_token: str
    store: str | None = None
    advertise: str | None = None
    lease_seconds: float = 30.0
    listen: str = "127.0.0.1:50051"
    servers: Path | None = None
    allow_plaintext: bool = False
    drain_seconds: float = 10.0
    executor: ExecutorLimits = ExecutorLimits()
    requests: RequestLimits = RequestLimits()
    sessions: SessionLimits = SessionLimits()
    retention: RetentionLimits = RetentionLimits()

    def __post_init__(self) -> None:
        host = _host_of("--listen", self.listen)
        if self.advertise is not None:
            _host_of("--advertise", self.advertise)
        if not self.allow_plaintext and not is_loopback(host.strip("[]")):
            raise SettingError(
                f"--listen {self.listen} is not a loopback address, and the connection is not encrypted; "
                "say --allow-plaintext if the network is private"
            )
        if len(self.service_token) < 16 or not self.service_token.isascii() or not self.service_token.isprintable():
            raise SettingError("ACP_SERVICE_TOKEN must be at least 16 printable ASCII characters")
        if self.store is not None and not self.store.startswith(_POSTGRESQL):
            raise SettingError("ACP_STORE must be a URL such as postgresql://user@host:5432/database")
        if self.lease_seconds < 2 * self.executor.heartbeat_seconds:
            raise SettingError(
                f"ACP_LEASE_SECONDS must be at least twice ACP_LEASE_HEARTBEAT_SECONDS "
                f"({self.executor.heartbeat_seconds:g}), not {self.lease_seconds:g}: one late renewal is none lost"
            )

    def address(self, port: int) -> str:
        """Return where other runtime services reach this one, which listens at `port`."""
        if self.advertise is not None:
            return self.advertise
        host = self.listen.rpartition(":")[0]
        return f"{socket.gethostname() if host.strip('[]') in _EVERY_ADDRESS else host}:{port}"

    @property
    def store_path(self) -> Path:
        """The SQLite file."""
        return self.data_dir / "runs.sqlite"


def _host_of(name: str, address: str) -> str:
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65_535:
        raise SettingError(f"{name} is HOST:PORT, such as 127.0.0.1:50051; not {address!r}")
    return host


def is_loopback(host: str) -> bool:
    """Return whether a host name or address can be this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
