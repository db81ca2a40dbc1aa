"""Request bodies: the JSON that callers send, checked to the last character, as plain values.

Knows the contract of `acp-api.md` and nothing of HTTP or gRPC. Everything that is wrong with a body is an
`ApiError` 400. Two parsers, because neither does all: the standard library's sees duplicate keys, absurd
numbers and lone surrogates; msgspec, ten times as fast, reads the bodies that can hold none of these, and
hands out the exact text of `metadata`.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final, Literal, NoReturn

import msgspec

from gateway.errors import ApiError

Mode = Literal["sync", "async"]


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Bounds on what a body may hold; its size as a whole is bounded where it is read."""

    depth: int = 32
    title_characters: int = 256
    metadata_bytes: int = 16 * 1024

    def __post_init__(self) -> None:
        # The parsers recurse; far below their own limits, which differ, ours is the only one that counts.
        if not 1 <= self.depth <= 100:
            raise ValueError(f"The depth of a body is limited to something in 1…100, not {self.depth}.")
        if self.title_characters < 1 or self.metadata_bytes < 2:
            raise ValueError("The limits on title and metadata must leave room for one.")


DEFAULT_LIMITS: Final = BodyLimits()


class StartBody(msgspec.Struct, frozen=True, gc=False):
    """What a start asks for. `input` holds text, of `content` and `prompt`; `metadata` is exactly as it was sent."""

    input: str
    title: str | None
    mode: Mode | None
    metadata: bytes | None
    content: str | None
    prompt: str | None


class ContinueBody(msgspec.Struct, frozen=True, gc=False):
    """What a continue asks for; fields as in `StartBody`."""

    input: str
    mode: Mode | None
    metadata: bytes | None
    content: str | None
    prompt: str | None


def decode_start(body: bytes, limits: BodyLimits = DEFAULT_LIMITS) -> StartBody:
    """Reads the body of a start. Raises ApiError 400: INVALID_JSON, or VALIDATION_FAILED with details."""
    document = _decode_object(body, limits)
    if not document.keys() <= _START_FIELDS or not _well_typed(document, limits):
        _refuse_fields(document, _START_FIELDS, limits)
    return StartBody(
        _input(document),
        document.get("title") or None,
        document.get("mode"),
        _metadata(document, body, limits),
        document.get("content"),
        document.get("prompt"),
    )


def decode_continue(body: bytes, limits: BodyLimits = DEFAULT_LIMITS) -> ContinueBody:
    """Reads the body of a continue. Raises as `decode_start`."""
    document = _decode_object(body, limits)
    if not document.keys() <= _CONTINUE_FIELDS or not _well_typed(document, limits):
        _refuse_fields(document, _CONTINUE_FIELDS, limits)
    return ContinueBody(
        _input(document),
        document.get("mode"),
        _metadata(document, body, limits),
        document.get("content"),
        document.get("prompt"),
    )


def decode_cancel(body: bytes) -> None:
    """Checks the body of a cancel: nothing, or an object without fields. Raises as `decode_start`."""
    if not body or body == b"{}":
        return
    document = _decode_object(body, DEFAULT_LIMITS)
    if document:
        _refuse_fields(document, frozenset(), DEFAULT_LIMITS)


# -- JSON ----------------------------------------------------------------------------------------------


class _NotJson(ValueError):
    """Found by a hook of the JSON parser; the message is for the caller."""

    def __init__(self, message: str, details: list[dict[str, str]] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _NotJson(
                    f'The key "{_shown(key)}" appears more than once in one object.',
                    [{"field": _shown(key), "message": "appears more than once"}],
                )
            seen.add(key)
    return document


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _NotJson("A number is too large for a 64-bit floating-point number.")
    return value


def _constant(name: str) -> NoReturn:
    raise _NotJson(f"{name} is not JSON.")


_parse: Final[Callable[[str], Any]] = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_float, parse_constant=_constant
).decode

# A string, closed or not: it must never fail, or an unclosed one costs quadratic time.
_STRING: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)

# Brackets as signed bytes, one up or one down, and every other byte.
_STEPS: Final = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b"[{]}"))

_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


_plain: Final = msgspec.json.Decoder(dict[str, str]).decode


def _decode_plain(body: bytes) -> dict[str, Any] | None:
    """The body where it is as most are: an object of strings without escapes, no key twice. None is no verdict.

    Each key and each string has two quotation marks, so a key that came twice shows in their number.
    """
    if b"\\" in body:
        return None
    try:
        document = _plain(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return document if body.count(b'"') == 4 * len(document) else None


def _decode_object(body: bytes, limits: BodyLimits) -> dict[str, Any]:
    """The body as an object without duplicate keys, lone surrogates, or numbers that nothing can hold."""
    plain = _decode_plain(body)
    if plain is not None:
        return plain
    # There is no nesting without brackets, so most bodies need no closer look.
    if body.count(b"{") + body.count(b"[") > limits.depth and _depth(body) > limits.depth:
        raise _invalid_json(f"The body is nested more than {limits.depth} levels deep.")
    try:
        text = body.decode()
        document = _parse(text)
    except UnicodeDecodeError as error:
        raise _invalid_json(f"The body is not UTF-8 at byte {error.start}.") from None
    except json.JSONDecodeError as error:
        raise _invalid_json(_what_is_malformed(body, error)) from None
    except _NotJson as error:
        raise _invalid_json(error.message, error.details) from None
    except ValueError:
        # int() refuses to spend quadratic time on thousands of digits.
        raise _invalid_json("A number has too many digits.") from None
    # UTF-8 itself cannot carry a surrogate; only an escape can.
    if _SURROGATE.search(body) is not None and _has_lone_surrogate(document):
        raise _invalid_json("A string holds half of a surrogate pair, which is no character.")
    if type(document) is not dict:
        raise ApiError(400, "VALIDATION_FAILED", "The body must be a JSON object.")
    return document


def _depth(body: bytes) -> int:
    """How deep the brackets of a body nest, whether or not it is JSON."""
    steps = _STRING.sub(b"", body).translate(_STEPS, _NO_BRACKETS)
    return max(accumulate(memoryview(steps).cast("b")), default=0)


def _what_is_malformed(body: bytes, error: json.JSONDecodeError) -> str:
    if not body or body.isspace():
        return "The body is empty; it must be a JSON object."
    if body.startswith(b"\xef\xbb\xbf"):
        return "The body begins with a byte order mark, which JSON does not allow."
    what = error.msg.removesuffix(" at")
    return f"The body is not JSON: {what} at line {error.lineno}, column {error.colno}."


def _has_lone_surrogate(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _invalid_json(message: str, details: list[dict[str, str]] | None = None) -> ApiError:
    return ApiError(400, "INVALID_JSON", message, details=details)


# -- Fields --------------------------------------------------------------------------------------------

_CONTINUE_FIELDS: Final = frozenset({"content", "prompt", "mode", "metadata"})
_START_FIELDS: Final = _CONTINUE_FIELDS | {"title"}
_TEXTS: Final = ("content", "prompt", "title")

# A body can hold thousands of unknown fields; naming this many is help enough.
_PROBLEMS_NAMED: Final = 16
_NAME_CHARACTERS: Final = 64

_NO_TEXT: Final = "must hold text, unless prompt does"


class _WithMetadata(msgspec.Struct, gc=False):
    metadata: msgspec.Raw


_with_metadata: Final = msgspec.json.Decoder(_WithMetadata).decode


def _well_typed(document: dict[str, Any], limits: BodyLimits) -> bool:
    """Whether every known field may hold what it holds; the quick answer, without saying why not."""
    for name in _TEXTS:
        text = document.get(name)
        if text is not None and (type(text) is not str or "\0" in text):
            return False
    title = document.get("title")
    if title is not None and len(title) > limits.title_characters:
        return False
    if document.get("mode") not in (None, "sync", "async"):
        return False
    metadata = document.get("metadata")
    return metadata is None or type(metadata) is dict


def _refuse_fields(document: dict[str, Any], known: frozenset[str], limits: BodyLimits) -> NoReturn:
    """Says of each field what is wrong with it."""
    problems: list[dict[str, str]] = []
    for name, value in document.items():
        message = _problem(name, value, limits) if name in known else "is not a field of this request"
        if message is not None:
            problems.append({"field": _shown(name), "message": message})
            if len(problems) == _PROBLEMS_NAMED:
                break
    raise _validation_failed(*problems)


def _problem(name: str, value: object, limits: BodyLimits) -> str | None:
    if value is None:
        return None
    if name == "mode":
        return None if value in ("sync", "async") else 'must be "sync" or "async"'
    if name == "metadata":
        return None if type(value) is dict else "must be an object"
    if type(value) is not str:
        return "must be a string"
    if "\0" in value:
        # No store holds text with it.
        return "must not hold the character U+0000"
    if name == "title" and len(value) > limits.title_characters:
        return f"must have at most {limits.title_characters} characters"
    return None


def _input(document: dict[str, Any]) -> str:
    """What is said to the agent: the prompt, a blank line, the content; or the one that holds text."""
    content: str | None = document.get("content")
    prompt: str | None = document.get("prompt")
    if content is None or content.isspace() or not content:
        content = None
    if prompt is None or prompt.isspace() or not prompt:
        if content is None:
            raise _validation_failed({"field": "content", "message": _NO_TEXT})
        return content
    return prompt if content is None else f"{prompt}\n\n{content}"


def _metadata(document: dict[str, Any], body: bytes, limits: BodyLimits) -> bytes | None:
    """The text of `metadata` as it stands in the body: numbers, key order and escapes untouched."""
    if document.get("metadata") is None:
        return None
    try:
        metadata = bytes(_with_metadata(body).metadata)
    except msgspec.DecodeError:
        # Both parsers read the same JSON; should they ever differ, the stricter one is right.
        raise _invalid_json("The body is not JSON.") from None
    if len(metadata) > limits.metadata_bytes:
        raise _validation_failed({"field": "metadata", "message": f"must have at most {limits.metadata_bytes} bytes"})
    return metadata


def _validation_failed(*problems: dict[str, str]) -> ApiError:
    message = "; ".join(f"{problem['field']} {problem['message']}" for problem in problems)
    return ApiError(400, "VALIDATION_FAILED", message, details=list(problems))


def _shown(name: str) -> str:
    """A key of the caller's, short and fit for an answer."""
    if len(name) > _NAME_CHARACTERS:
        name = name[:_NAME_CHARACTERS] + "…"
    return name.encode("utf-8", "replace").decode()
