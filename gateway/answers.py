"""Answers that are one JSON document: known as a whole before their first byte, and so written in one piece.

aiohttp's own response is made for everything: it is built, prepared and written in a dozen steps, which cost
a run's answer more than all that is in it. `http_connection` writes these instead. Knows how HTTP/1.1 reads.
"""

from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from time import time
from typing import Final

from aiohttp import web
from aiohttp.http import SERVER_SOFTWARE

_REASONS: Final = {status.value: status.phrase for status in HTTPStatus}


class JsonAnswer:
    """A whole answer in JSON. Handlers may return it where aiohttp wants a response.

    The values of `headers` are text without line breaks. `Connection: close` among them closes the connection.
    """

    __slots__ = ("body", "headers", "keep_alive", "status")

    # As aiohttp's responses have it; for who has to tell them from those that are under way.
    prepared: Final = False

    def __init__(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.body = body
        self.status = status
        self.headers = {} if headers is None else headers
        self.keep_alive = self.headers.get("Connection") != "close"

    def to_bytes(self) -> bytes:
        """The answer on a connection of HTTP/1.1 that stays open. Raises ValueError for a header that breaks lines."""
        lines = [f"HTTP/1.1 {self.status} {_REASONS.get(self.status, '')}"]
        for name, value in self.headers.items():
            if "\n" in value or "\r" in value:
                raise ValueError(f"The header {name} has a line break.")
            lines.append(f"{name}: {value}")
        lines.append(
            f"Content-Type: application/json\r\nContent-Length: {len(self.body)}\r\n{_common_headers(int(time()))}"
        )
        return "\r\n".join(lines).encode() + self.body

    def to_response(self) -> web.Response:
        """The same as a response of aiohttp's."""
        response = web.Response(
            body=self.body, status=self.status, headers=self.headers, content_type="application/json"
        )
        if not self.keep_alive:
            response.force_close()
        return response


@lru_cache(maxsize=1)
def _common_headers(now: int) -> str:
    """What ends every head; the same for a second."""
    return f"Date: {formatdate(now, usegmt=True)}\r\nServer: {SERVER_SOFTWARE}\r\n\r\n"
