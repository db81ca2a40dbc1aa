"""The rules that a request must hold to, whichever door it came through. Pure."""

import json

import msgspec

from runtime_service.errors import InvalidRequest

_REQUEST_ID_CHARACTERS = 255


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


def checked_request_id(request_id: str) -> str | None:
    """Return the id, None when it is empty. Raises InvalidRequest unless it is printable ASCII and fits."""
    if len(request_id) > _REQUEST_ID_CHARACTERS or not (request_id.isascii() and request_id.isprintable()):
        raise InvalidRequest("request_id", f"must be at most {_REQUEST_ID_CHARACTERS} printable ASCII characters")
    return request_id or None


def _refuse(constant: str) -> None:
    raise ValueError(constant)
