"""Settings of the runtime service: checked when they are built, each refusal naming the setting."""

from pathlib import Path
from typing import Any

import pytest

from runtime_service.config import RuntimeConfig, SettingError, is_loopback

TOKEN = "t" * 16


def config(**settings: Any) -> RuntimeConfig:
    """Settings with these changed."""
    defaults: dict[str, Any] = {"data_dir": Path("data"), "service_token": TOKEN}
    return RuntimeConfig(**defaults | settings)


def test_defaults_are_safe() -> None:
    """Loopback, with a store inside the data directory."""
    assert config().listen == "127.0.0.1:50051"
    assert not config().allow_plaintext
    assert config().store_path == Path("data/runs.sqlite")


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "127.255.0.9:65535", "localhost:1", "[::1]:50051"])
def test_listen_takes_a_loopback_address(listen: str) -> None:
    """Port 0 picks one."""
    assert config(listen=listen).listen == listen


@pytest.mark.parametrize("listen", ["", ":", "127.0.0.1", "127.0.0.1:", ":50051", "127.0.0.1:x", "127.0.0.1:-1"])
@pytest.mark.parametrize("port", ["", "65536"])
def test_listen_is_host_and_port(listen: str, port: str) -> None:
    """Anything else is refused in words that show how it is written."""
    with pytest.raises(SettingError, match="--listen is HOST:PORT, such as"):
        config(listen=f"127.0.0.1:{port}" if port else listen)


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1", "192.168.0.7:1", "example.com:1", "[2001:db8::1]:1"])
def test_plaintext_off_loopback_must_be_asked_for(listen: str) -> None:
    """The message names the option that does."""
    with pytest.raises(SettingError, match="--allow-plaintext") as caught:
        config(listen=listen)
    assert listen in str(caught.value)
    assert config(listen=listen, allow_plaintext=True).listen == listen


@pytest.mark.parametrize(
    "token", ["", "short", "t" * 15, "t" * 16 + "\n", "é" * 16, "t" * 16 + "\0", "t" * 20 + "\x7f"]
)
def test_token_must_be_long_and_printable(token: str) -> None:
    """It is named, never shown."""
    with pytest.raises(SettingError, match="ACP_SERVICE_TOKEN") as caught:
        config(service_token=token)
    assert not token or token not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.com", False),
        ("", False),
    ],
)
def test_loopback_is_this_machine_only(host: str, expected: bool) -> None:
    """By address; by name only `localhost`."""
    assert is_loopback(host) is expected
