"""What a request asks for beside its body: the query, `Prefer` (RFC 7240), `Last-Event-ID`. Pure."""

import re
from collections.abc import Mapping

import msgspec

from gateway.bodies import Mode
from gateway.errors import ApiError

_MAX_SEQUENCE = 2**53 - 1
_WAIT = re.compile(r'wait\s*=\s*"?(\d{1,9})"?')


class Waiting(msgspec.Struct, frozen=True):
    """How long a start or continue waits for the end of the turn (0: not at all), and which preference said so."""

    seconds: float
    applied: str | None = None


def waiting(mode: Mode | None, prefer: list[str], limit_seconds: float) -> Waiting:
    """Decide how long to wait. A `mode` in the body counts more than the header, which may only shorten a wait."""
    if not prefer:
        return Waiting(0 if mode == "async" else limit_seconds)
    respond_async, wait = False, None
    for preference in ",".join(prefer).split(","):
        token = preference.split(";")[0].strip().lower()
        if token == "respond-async":
            respond_async = True
        elif (match := _WAIT.fullmatch(token)) is not None and wait is None:
            wait = int(match[1])
    if mode == "async":
        return Waiting(0, "respond-async" if respond_async else None)
    if wait is not None and wait <= limit_seconds:
        # RFC 7240, 4.3: together they say how long to wait before the answer is asynchronous.
        applied = f"respond-async, wait={wait}" if respond_async else f"wait={wait}"
        return Waiting(wait, applied)
    if respond_async and wait is None and mode is None:
        return Waiting(0, "respond-async")
    return Waiting(limit_seconds)


def whole_number(query: Mapping[str, str], name: str, default: int, most: int = _MAX_SEQUENCE, least: int = 0) -> int:
    """Return a number of the query. Raises ApiError 400 naming it unless it is a whole number of at least `least`.

    A larger one than `most` is taken as `most`.
    """
    text = query.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,19}", text) or int(text) < least:
        raise _invalid(name, f"must be a whole number of at least {least}")
    return min(int(text), most)


def resume_after(query: Mapping[str, str], last_event_id: str | None) -> int:
    """Return the sequence to go on from: `Last-Event-ID`, which a client that reconnects sends, else `?after=`."""
    if last_event_id is None or not last_event_id.strip():
        return whole_number(query, "after", 0)
    if not re.fullmatch(r"[0-9]{1,15}", last_event_id.strip()):
        raise _invalid("Last-Event-ID", "must be the id of an event of this run, a whole number")
    return int(last_event_id)


def choice(query: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str | None:
    """Return a word of the query, None when it is not there. Raises ApiError 400 unless it is one of `choices`."""
    text = query.get(name)
    if text is not None and text not in choices:
        raise _invalid(name, "must be " + " or ".join(f'"{word}"' for word in choices))
    return text


def _invalid(field: str, message: str) -> ApiError:
    return ApiError(400, "VALIDATION_FAILED", f"{field} {message}.", details=[{"field": field, "message": message}])
