"""`Idempotency-Key`: which keys are taken, and which bodies are the same one."""

from itertools import combinations

import pytest

from gateway.bodies import decode_continue, decode_start
from gateway.errors import ApiError
from gateway.idempotency import Repetition, repetition

BODY = decode_start(b'{"content":"c"}')


@pytest.mark.parametrize("key", ["k", "x" * 255, " a key: with; every, kind of 'character' ~!", '"quoted"'])
def test_printable_ascii_is_a_key(key: str) -> None:
    """What a caller may send comes out as it was, for a body and without one."""
    found = repetition([key], BODY)
    assert found is not None
    assert found.key == key
    assert len(found.digest) == 32
    assert repetition([key], None) == Repetition(key, b"")


def test_request_without_a_key_is_not_repeated() -> None:
    """No header, no key."""
    assert repetition([], BODY) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([""], "printable"),
        (["x" * 256], "1 to 255"),
        (["tab\tin it"], "printable"),
        (["ü"], "printable"),
        (["\x7f"], "printable"),
        (["\udc80"], "printable"),
        (["a", "b"], "once"),
        (["a", "a"], "once"),
    ],
)
def test_other_keys_are_refused(values: list[str], message: str) -> None:
    """400 VALIDATION_FAILED, whose details name the header."""
    with pytest.raises(ApiError) as caught:
        repetition(values, BODY)
    error = caught.value
    assert (error.status, error.code) == (400, "VALIDATION_FAILED")
    assert error.details is not None
    assert [detail["field"] for detail in error.details] == ["Idempotency-Key"]
    assert message in error.details[0]["message"]


def test_digest_tells_bodies_apart_that_lead_to_one_input() -> None:
    """How an input was put, and whether a mode was said, is part of what a caller repeats."""
    bodies = [
        b'{"content":"c"}',
        b'{"prompt":"c"}',
        b'{"content":"c","prompt":" "}',
        b'{"content":"c","mode":"sync"}',
        b'{"content":"c","mode":"async"}',
    ]
    for one, other in combinations(bodies, 2):
        assert repetition(["k"], decode_start(one)) != repetition(["k"], decode_start(other))
        assert repetition(["k"], decode_continue(one)) != repetition(["k"], decode_continue(other))


def test_digest_is_the_same_for_the_same_body() -> None:
    """Spaces, the order of fields, and a null for what is left out make no other body."""
    bodies = [b'{"content":"c","mode":"sync"}', b' { "mode" : "sync",\n"prompt":null, "content":"\\u0063"}']
    assert len({repetition(["k"], decode_start(body)) for body in bodies}) == 1
