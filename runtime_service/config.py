"""Settings of the runtime service, checked when they are built."""

import ipaddress
from pathlib import Path

import msgspec

from runtime_service.executor import ExecutorLimits
from runtime_service.session import SessionLimits
from runtime_service.validation import RequestLimits


class SettingError(ValueError):
    """A setting does not hold what it must; the message names it."""


class RuntimeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How the runtime service runs.

    `listen` is HOST:PORT (port 0 picks one); `drain_seconds` is how long running turns may go on after SIGTERM.
    Raises SettingError.
    """

    data_dir: Path
    service_token: str
    listen: str = "127.0.0.1:50051"
    servers: Path | None = None
    allow_plaintext: bool = False
    drain_seconds: float = 10.0
    executor: ExecutorLimits = ExecutorLimits()
    requests: RequestLimits = RequestLimits()
    sessions: SessionLimits = SessionLimits()

    def __post_init__(self) -> None:
        host, separator, port = self.listen.rpartition(":")
        if not separator or not host or not port.isdigit() or int(port) > 65_535:
            raise SettingError(f"--listen is HOST:PORT, such as 127.0.0.1:50051; not {self.listen!r}")
        if not self.allow_plaintext and not is_loopback(host.strip("[]")):
            raise SettingError(
                f"--listen {self.listen} is not a loopback address, and the connection is not encrypted; "
                "say --allow-plaintext if the network is private"
            )
        if len(self.service_token) < 16 or not self.service_token.isascii() or not self.service_token.isprintable():
            raise SettingError("ACP_SERVICE_TOKEN must be at least 16 printable ASCII characters")

    @property
    def store_path(self) -> Path:
        """The SQLite file."""
        return self.data_dir / "runs.sqlite"


def is_loopback(host: str) -> bool:
    """Return whether a host name or address can be this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
