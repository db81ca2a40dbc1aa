"""Settings of the gateway, checked when they are built."""

import ipaddress
import math
from pathlib import Path

import msgspec

from gateway.addresses import parse_targets


class SettingError(ValueError):
    """A setting does not hold what it must; the message names it."""


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How a gateway runs. Times are seconds. Raises SettingError.

    `grpc_target` lists the runtime services, HOST:PORT each, commas between; a name stands for all its addresses.
    `wait_limit_seconds` bounds how long a start or continue waits for the end of its turn. A gateway that stops says so
    for `drain_delay_seconds` before it takes no more connections; then what is under way has `drain_seconds`.
    """

    grpc_target: str
    service_token: str
    keys_file: Path | None = None
    api_key: str | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    allow_plaintext: bool = False
    wait_limit_seconds: float = 55.0
    max_body_bytes: int = 256 * 1024
    max_json_depth: int = 32
    max_title_characters: int = 256
    max_metadata_bytes: int = 16 * 1024
    body_seconds: float = 30.0
    idle_seconds: float = 75.0
    write_seconds: float = 30.0
    heartbeat_seconds: float = 15.0
    max_connections: int = 10_000
    max_calls: int = 4_096
    reconnect_seconds: float = 5.0
    drain_delay_seconds: float = 0.0
    drain_seconds: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise SettingError(f"ACP_PORT must be 0 to 65535, not {self.port}")
        if not self.allow_plaintext and not is_loopback(self.host):
            raise SettingError(
                f"ACP_HOST {self.host} is not a loopback address, and the connection is not encrypted; "
                "say --allow-plaintext if a proxy before the gateway ends TLS or the network is private"
            )
        try:
            parse_targets(self.grpc_target)
        except ValueError as error:
            raise SettingError(
                f"ACP_GRPC_TARGET must list the runtime services, such as 127.0.0.1:50051,[::1]:50052: {error}"
            ) from None
        if not self.service_token or not self.service_token.isascii() or not self.service_token.isprintable():
            raise SettingError("ACP_SERVICE_TOKEN must be the runtime service's token, printable ASCII")
        if self.keys_file is None and self.api_key is None:
            raise SettingError("ACP_KEYS_FILE or ACP_API_KEY must be set, or nobody could call")
        for name in (
            "wait_limit_seconds",
            "max_body_bytes",
            "body_seconds",
            "idle_seconds",
            "write_seconds",
            "heartbeat_seconds",
            "max_connections",
            "max_calls",
            "reconnect_seconds",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingError(f"ACP_{name.upper()} must be more than 0")
        for name in ("drain_delay_seconds", "drain_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingError(f"ACP_{name.upper()} must be 0 or more")


def is_loopback(host: str) -> bool:
    """Return whether a host name or address can be this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
