"""The rules of a request, each with what holds to it and what does not."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime_service.errors import InvalidRequest
from runtime_service.validation import (
    RequestLimits,
    checked_input,
    checked_metadata,
    checked_request,
    checked_title,
)

LIMITS = RequestLimits(title_characters=8, metadata_bytes=64, input_bytes=16)


def refused(check: object, field: str) -> str:
    """What a check says of the field that it refuses."""
    assert isinstance(check, InvalidRequest)
    assert check.field == field
    assert check.message == f"{field} {check.description}"
    return check.description


@pytest.mark.parametrize("text", ["x", " x\n", "x" * 16, "é" * 8, "\U0001f600" * 4, "\u200b", "a\tb", "\ufffd"])
def test_input_that_holds_text_comes_back_as_it_is(text: str) -> None:
    """Up to the limit, in bytes of UTF-8; nothing is trimmed."""
    assert checked_input(text, LIMITS) is text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must hold text"),
        (" \n\t\u3000\x1f", "must hold text"),
        ("a\0b", "must not hold the character U+0000"),
        ("\0", "must not hold the character U+0000"),
        ("x" * 17, "must be at most 16 bytes"),
        ("é" * 9, "must be at most 16 bytes"),
        ("\U0001f600" * 5, "must be at most 16 bytes"),
    ],
)
def test_input_without_text_or_too_large_is_refused(text: str, reason: str) -> None:
    """The reason is for a person."""
    with pytest.raises(InvalidRequest) as caught:
        checked_input(text, LIMITS)
    assert refused(caught.value, "input") == reason


def test_title_is_counted_in_characters() -> None:
    """An empty one is none."""
    assert checked_title("", LIMITS) is None
    assert checked_title("é\U0001f600" * 4, LIMITS) == "é\U0001f600" * 4
    for title, reason in (("x" * 9, "must be at most 8 characters"), ("\0", "must not hold the character U+0000")):
        with pytest.raises(InvalidRequest) as caught:
            checked_title(title, LIMITS)
        assert refused(caught.value, "title") == reason


@pytest.mark.parametrize(
    "text",
    [
        b"{}",
        b' {"b": 1,  "a":null}\n',
        b'{"n":123456789012345678901234567890}',
        '{"é":"\U0001f600"}'.encode(),
        b'{"a":"\\ud83d\\ude00"}',
        b'{"a":{"a":{"a":[[[]]]}}}',
        b'{"a":"' + b"x" * 56 + b'"}',
    ],
)
def test_metadata_that_is_an_object_comes_back_byte_for_byte(text: bytes) -> None:
    """It is read to be checked, never written anew."""
    assert checked_metadata(text, LIMITS) is text


def test_metadata_that_is_empty_is_none() -> None:
    """No bytes are no metadata; an empty object is one."""
    assert checked_metadata(b"", LIMITS) is None


@pytest.mark.parametrize(
    "text",
    [
        b"null",
        b"[]",
        b"7",
        b'"a"',
        b"{",
        b"{}{}",
        b"{'a':1}",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":-Infinity}',
        b'{"a":01}',
        b'{"a":"\n"}',
        b"\xff",
        b'{"a":"\xff"}',
        b'{"a":"\xed\xa0\x80"}',  # a surrogate, encoded
        b"\xef\xbb\xbf{}",
        '{"a":1}'.encode("utf-16"),
        '{"a":1}'.encode("utf-16-le"),
        '{"a":1}'.encode("utf-32"),
        b"[" * 64,
        b"\0",
    ],
)
def test_metadata_that_is_no_json_object_in_utf8_is_refused(text: bytes) -> None:
    """Whatever else Python's parser would take."""
    with pytest.raises(InvalidRequest) as caught:
        checked_metadata(text, LIMITS)
    assert refused(caught.value, "metadata_json") == "must be a JSON object"


def test_metadata_that_is_too_large_is_refused_unread() -> None:
    """By its bytes, however little they say."""
    with pytest.raises(InvalidRequest) as caught:
        checked_metadata(b" " * 65, LIMITS)
    assert refused(caught.value, "metadata_json") == "must be at most 64 bytes"


@pytest.mark.parametrize("depth", [10_000, 100_000])
def test_metadata_that_is_too_deep_is_refused(depth: int) -> None:
    """It neither crashes nor overflows the stack."""
    text = b'{"a":' * depth + b"1" + b"}" * depth
    with pytest.raises(InvalidRequest):
        checked_metadata(text, RequestLimits(metadata_bytes=1 << 20))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4), st.booleans())
def test_metadata_takes_every_json_object(value: dict[str, object], escaped: bool) -> None:
    """As anybody's encoder writes it; what cannot be UTF-8 is refused."""
    limits = RequestLimits(metadata_bytes=1 << 20)
    text = json.dumps(value, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    try:
        text.decode()
    except UnicodeDecodeError:
        with pytest.raises(InvalidRequest):
            checked_metadata(text, limits)
    else:
        assert checked_metadata(text, limits) is text


@given(st.binary(max_size=60))
def test_metadata_of_any_bytes_is_taken_or_refused(text: bytes) -> None:
    """Nothing else comes out of it."""
    with suppress(InvalidRequest):
        assert checked_metadata(text, LIMITS) in (None, text)


@pytest.mark.parametrize("request_id", ["x", " ", "~" * 255, "9f8b6c1e-0d5a-4d4f-8f0b-2f5d1f6f7a11"])
def test_request_is_known_by_its_id_and_all_that_it_asks_for(request_id: str) -> None:
    """The same request has the same fingerprint, which is short and does not show what was asked for."""
    request = checked_request(request_id, b"", "start", "server", "text" * 1_000, None, b"{}")
    assert request == checked_request(request_id, b"", "start", "server", "text" * 1_000, None, b"{}")
    assert request is not None
    assert request.id == request_id
    assert len(request.fingerprint) == 32


def test_request_without_an_id_is_not_known() -> None:
    """Whatever it asks for and whatever digest it brings, as long as that fits."""
    assert checked_request("", b"", "start") is None
    assert checked_request("", b"x" * 64, "start") is None


@pytest.mark.parametrize("request_id", ["x" * 256, "é", "a\n", "\x7f", "\0", "\t"])
def test_request_id_that_is_not_printable_ascii_is_refused(request_id: str) -> None:
    """Nor one that is too long."""
    with pytest.raises(InvalidRequest) as caught:
        checked_request(request_id, b"", "start")
    assert refused(caught.value, "request_id") == "must be at most 255 printable ASCII characters"


@pytest.mark.parametrize("request_id", ["", "x"])
def test_request_digest_that_is_too_large_is_refused(request_id: str) -> None:
    """Also beside no id."""
    with pytest.raises(InvalidRequest) as caught:
        checked_request(request_id, b"x" * 65, "start")
    assert refused(caught.value, "request_digest") == "must be at most 64 bytes"


PARTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=3), min_size=3, max_size=3)


@given(PARTS, PARTS, st.binary(max_size=3), st.binary(max_size=3))
def test_requests_that_ask_for_different_things_differ(
    asked: list[str], others: list[str], digest: bytes, other_digest: bytes
) -> None:
    """Also where the one's parts and digest, one behind the other, are the other's."""
    one, other = checked_request("id", digest, *asked), checked_request("id", other_digest, *others)
    assert (one == other) == (asked == others and digest == other_digest)


@pytest.mark.parametrize(
    ("digest", "asked"),
    [
        (b"", ("a", "bc")),
        (b"", ("abc", None)),
        (b"", (None, "abc")),
        (b"", ("abc",)),
        (b"c", ("ab", None)),
        (b"abc", (None, None)),
        (b"b1,2 c", ("a", None)),
    ],
)
def test_request_is_another_when_its_text_moves_to_another_part(digest: bytes, asked: tuple[str | None, ...]) -> None:
    """Text that leaves one part for the next, or for the digest, is another request."""
    assert checked_request("id", digest, *asked) != checked_request("id", b"", "ab", "c")
