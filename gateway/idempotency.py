"""`Idempotency-Key`: the caller's own id of a request, by which it may be repeated. Pure.

The RunService holds to it (`request_id` in run_service.proto); here it is read, and what it stands for is made known.
"""

from collections.abc import Sequence
from hashlib import sha256

import msgspec

from gateway.bodies import ContinueBody, StartBody
from gateway.errors import ApiError

HEADER = "Idempotency-Key"
REPLAYED = {"Idempotency-Replayed": "true"}
_MAX_CHARACTERS = 255

_encode = msgspec.json.Encoder().encode


class Repetition(msgspec.Struct, frozen=True):
    """By what a request may be repeated: the caller's key, and a digest of what the RunService does not compare itself.

    That is how the input was put: two bodies that lead to one input are two bodies.
    """

    key: str
    digest: bytes = b""


def repetition(values: Sequence[str], body: StartBody | ContinueBody | None) -> Repetition | None:
    """Return what the header's values and the body say, None without the header. Raises ApiError 400."""
    if not values:
        return None
    key = values[0]
    if len(values) > 1:
        raise _invalid("must be given once")
    if not (1 <= len(key) <= _MAX_CHARACTERS and key.isascii() and key.isprintable()):
        raise _invalid(f"must be 1 to {_MAX_CHARACTERS} printable ASCII characters")
    if body is None:
        return Repetition(key)
    return Repetition(key, sha256(_encode((body.content, body.prompt, body.mode))).digest())


def _invalid(message: str) -> ApiError:
    details = [{"field": HEADER, "message": message}]
    return ApiError(400, "VALIDATION_FAILED", f"{HEADER} {message}.", details=details)
