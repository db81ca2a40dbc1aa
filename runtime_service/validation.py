"""The rules that a request must hold to, whichever door it came through. Pure."""

import json
from hashlib import sha256

import msgspec

from runtime_service.errors import InvalidRequest
from runtime_service.store.base import Request

_REQUEST_ID_CHARACTERS = 255
_REQUEST_DIGEST_BYTES = 64


class RequestLimits(msgspec.Struct, frozen=True):
    """Sizes: title in characters, the others in bytes of UTF-8."""

    title_characters: int = 256
    metadata_bytes: int = 16 * 1024
    input_bytes: int = 1 << 20


def checked_input(text: str, limits: RequestLimits) -> str:
    """Return the input. Raises InvalidRequest unless it holds text, no NUL, and fits."""
    if not text or text.isspace():
        raise InvalidRequest("input", "must hold text")
    if "\0" in text:
        raise InvalidRequest("input", "must not hold the character U+0000")
    if len(text) * 4 > limits.input_bytes and len(text.encode()) > limits.input_bytes:
        raise InvalidRequest("input", f"must be at most {limits.input_bytes} bytes")
    return text


def checked_title(title: str, limits: RequestLimits) -> str | None:
    """Return the title, None when it is empty. Raises InvalidRequest when it is too long."""
    if len(title) > limits.title_characters:
        raise InvalidRequest("title", f"must be at most {limits.title_characters} characters")
    if "\0" in title:
        raise InvalidRequest("title", "must not hold the character U+0000")
    return title or None


def checked_metadata(text: bytes, limits: RequestLimits) -> bytes | None:
    """Return the JSON text, None when it is empty. Raises InvalidRequest unless it is an object and fits."""
    if not text:
        return None
    if len(text) > limits.metadata_bytes:
        raise InvalidRequest("metadata_json", f"must be at most {limits.metadata_bytes} bytes")
    try:
        # Decoded here: json.loads takes UTF-16, UTF-32 and encoded surrogates, too.
        value = json.loads(text.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidRequest("metadata_json", "must be a JSON object")
    return text


def checked_request(request_id: str, digest: bytes, *asked: str | bytes | None) -> Request | None:
    """Return by what the request is known when it comes again, None where it has no id.

    `asked` is all that it asks for, its operation included. Raises InvalidRequest unless the id is printable ASCII and
    both fit.
    """
    if len(request_id) > _REQUEST_ID_CHARACTERS or not (request_id.isascii() and request_id.isprintable()):
        raise InvalidRequest("request_id", f"must be at most {_REQUEST_ID_CHARACTERS} printable ASCII characters")
    if len(digest) > _REQUEST_DIGEST_BYTES:
        raise InvalidRequest("request_digest", f"must be at most {_REQUEST_DIGEST_BYTES} bytes")
    if not request_id:
        return None
    parts = [part.encode() if isinstance(part, str) else part or b"" for part in asked]
    # The lengths keep what moves from one part to the next from being the same.
    text = b"%b %b" % (b",".join([b"%d" % len(part) for part in parts]), b"".join(parts))
    return Request(request_id, sha256(text + digest).digest())


def _refuse(constant: str) -> None:
    raise ValueError(constant)
