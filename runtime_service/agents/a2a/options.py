"""What servers.toml says of an `a2a` agent, and the secrets that it names, which are in the environment alone.

Knows nothing of the protocol.
"""

import os
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec

_MAX_QUOTED_CHARACTERS = 300
_MAX_READ_CHARACTERS = 10_000

_Variable = Annotated[str, msgspec.Meta(min_length=1)]
_HeaderName = Annotated[str, msgspec.Meta(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")]


class A2AOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`url` is where the agent's card is found, at `card_path`; the card says where and how the agent is spoken to.

    `api_key_env` names the environment variable whose value is sent as a bearer token, `headers_env` those whose values
    are sent as these headers. They go to the host of `url` and to `secrets_hosts`, whatever the card says.
    `protocol_binding`: without it, the first of the card's that is known here. `streaming = false` asks for the task
    again and again also where the agent could stream. `timeout_seconds`: how long the agent may say nothing.
    """

    url: Annotated[str, msgspec.Meta(pattern=r"^https?://[^\s@?#]+$")]
    card_path: Annotated[str, msgspec.Meta(pattern=r"^/[!-~]+$")] = "/.well-known/agent-card.json"
    api_key_env: _Variable | None = None
    headers_env: dict[_HeaderName, _Variable] = {}
    secrets_hosts: tuple[Annotated[str, msgspec.Meta(min_length=1)], ...] = ()
    protocol_binding: Literal["JSONRPC", "HTTP+JSON"] | None = None
    streaming: bool = True
    timeout_seconds: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 600

    def __post_init__(self) -> None:
        try:
            host, _ = urlsplit(self.url).hostname, urlsplit(self.url).port
        except ValueError as error:
            raise ValueError(f"url is no address: {error}") from error
        if not host:
            raise ValueError("url names no host")
        if self.api_key_env is not None and any(name.lower() == "authorization" for name in self.headers_env):
            raise ValueError("api_key_env and headers_env both give the header Authorization")

    @property
    def host(self) -> str:
        """The host of `url`, for messages."""
        return urlsplit(self.url).hostname or ""

    def unusable_variable(self) -> str | None:
        """Return the first environment variable that is named here and holds nothing that a header can carry."""
        for name in self._variables():
            secret = _secret(name)
            if not secret or not secret.isascii() or not secret.isprintable():
                return name
        return None

    def headers(self) -> dict[str, str]:
        """Return the headers that carry the secrets."""
        headers = {header: _secret(name) for header, name in self.headers_env.items()}
        if self.api_key_env is not None:
            headers["Authorization"] = f"Bearer {_secret(self.api_key_env)}"
        return headers

    def may_see_secrets(self, url: str) -> bool:
        """Whether the headers may be sent there: a known host, and not in the clear where the card came encrypted."""
        try:
            there = urlsplit(url)
            host = there.hostname
        except ValueError:
            return False
        known = {name.lower() for name in (self.host, *self.secrets_hosts)}
        return host in known and (there.scheme == "https" or self.url.startswith("http:"))

    def quoted(self, text: str) -> str:
        """Return what others say on one short line, without the full stop and the secrets."""
        text = text[:_MAX_READ_CHARACTERS]
        for name in self._variables():
            if secret := _secret(name):
                text = text.replace(secret, "[secret]")
        return " ".join(text.split())[:_MAX_QUOTED_CHARACTERS].rstrip(".")

    def _variables(self) -> list[str]:
        return [*([] if self.api_key_env is None else [self.api_key_env]), *self.headers_env.values()]


def _secret(variable: str) -> str:
    return os.environ.get(variable, "").strip()
