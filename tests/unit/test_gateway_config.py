"""Settings of the gateway."""

from pathlib import Path
from typing import Any

import pytest

from gateway.config import GatewayConfig, SettingError, is_loopback

GOOD: dict[str, Any] = {"grpc_target": "127.0.0.1:50051", "service_token": "token", "api_key": "key"}


def test_defaults_are_those_of_the_contract() -> None:
    """Limits as acp-api.md names them, on loopback."""
    config = GatewayConfig(**GOOD)
    assert (config.host, config.port, config.allow_plaintext) == ("127.0.0.1", 8080, False)
    assert config.wait_limit_seconds == 55
    assert config.heartbeat_seconds == 15
    assert config.max_body_bytes == 256 * 1024
    assert config.max_json_depth == 32
    assert config.max_title_characters == 256
    assert config.max_metadata_bytes == 16 * 1024


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"port": -1}, "ACP_PORT"),
        ({"port": 65_536}, "ACP_PORT"),
        ({"host": "0.0.0.0"}, "ACP_HOST"),
        ({"host": "::"}, "ACP_HOST"),
        ({"host": "example.org"}, "ACP_HOST"),
        *(
            ({"grpc_target": target}, "ACP_GRPC_TARGET")
            for target in (
                "",
                "host",
                "host:",
                ":1",
                "host:x",
                "host:65536",
                "a:1,",
                "a:1,b",
                "::1:1",
                "[::1]",
                "a b:1",
                "a..b:1",
                ".:1",
                "a" * 64 + ".b:1",
            )
        ),
        ({"service_token": ""}, "ACP_SERVICE_TOKEN"),
        ({"service_token": "tökèn"}, "ACP_SERVICE_TOKEN"),
        ({"service_token": "a\nb"}, "ACP_SERVICE_TOKEN"),
        ({"api_key": None}, "ACP_API_KEY"),
        *(
            ({name: value}, f"ACP_{name.upper()}")
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
            )
            for value in (0, -1, float("nan"), float("inf"))
        ),
        *(
            ({name: value}, f"ACP_{name.upper()}")
            for name in ("drain_delay_seconds", "drain_seconds")
            for value in (-1, float("nan"), float("inf"))
        ),
    ],
)
def test_setting_that_cannot_be_is_named(settings: dict[str, Any], name: str) -> None:
    """A mistake is found when the settings are built, and says which setting it is."""
    with pytest.raises(SettingError, match=name):
        GatewayConfig(**{**GOOD, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "0.0.0.0", "allow_plaintext": True},
        {"host": "::1"},
        {"host": "localhost"},
        {"host": "127.8.9.10"},
        {"port": 0},
        {"grpc_target": "a.example:50051,b.example:50052, 10.0.0.1:1,[::1]:2"},
        {"api_key": None, "keys_file": Path("keys.json")},
        {"drain_seconds": 0},
    ],
)
def test_setting_that_can_be_is_taken(settings: dict[str, Any]) -> None:
    """Other addresses only when they are asked for by name."""
    GatewayConfig(**{**GOOD, **settings})


@pytest.mark.parametrize(("host", "expected"), [("127.0.0.1", True), ("::1", True), ("10.0.0.1", False), ("x", False)])
def test_loopback_is_this_machine_only(host: str, expected: bool) -> None:
    """Names are not looked up."""
    assert is_loopback(host) is expected
