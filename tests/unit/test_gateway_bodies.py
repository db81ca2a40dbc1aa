"""Request bodies: what is read from them, and how each thing that can be wrong is told."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.bodies import (
    BodyLimits,
    ContinueBody,
    StartBody,
    decode_cancel,
    decode_continue,
    decode_start,
)
from gateway.errors import ApiError

DECODERS: list[Callable[[bytes], object]] = [decode_start, decode_continue, decode_cancel]


def refusal(body: bytes, decode: Callable[[bytes], object] = decode_start) -> ApiError:
    """The error that a body gets; it can always be sent."""
    with pytest.raises(ApiError) as caught:
        decode(body)
    assert caught.value.status == 400
    json.loads(caught.value.body())
    return caught.value


def refused_fields(body: bytes, decode: Callable[[bytes], object] = decode_start) -> dict[str, str]:
    """The fields that a VALIDATION_FAILED names, with what it says of each."""
    error = refusal(body, decode)
    assert error.code == "VALIDATION_FAILED"
    return {detail["field"]: detail["message"] for detail in error.details or ()}


def test_start_reads_every_field() -> None:
    """All fields of the contract come out, the metadata as the text it was."""
    body = b' {"content":"c", "title":"t","mode":"async" , "metadata" : { "b": 1,  "a":null } }\n'
    assert decode_start(body) == StartBody("c", "t", "async", b'{ "b": 1,  "a":null }', "c", None)


def test_continue_reads_every_field_but_title() -> None:
    """A continue is a start without a title."""
    expected = ContinueBody("p", "sync", b"{}", None, "p")
    assert decode_continue(b'{"prompt":"p","mode":"sync","metadata":{}}') == expected
    assert refused_fields(b'{"prompt":"p","title":"t"}', decode_continue) == {"title": "is not a field of this request"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"content": "c"}, "c"),
        ({"prompt": "p"}, "p"),
        ({"content": "c", "prompt": "p"}, "p\n\nc"),
        ({"content": " \n", "prompt": "p"}, "p"),
        ({"content": "c", "prompt": ""}, "c"),
        ({"content": " c\n", "prompt": None}, " c\n"),
        ({"content": "\U0001f600 ü"}, "\U0001f600 ü"),
    ],
)
def test_input_is_prompt_blank_line_content(fields: dict[str, Any], expected: str) -> None:
    """Only the texts that hold something are said, and exactly as they are."""
    assert decode_start(json.dumps(fields).encode()).input == expected
    assert decode_continue(json.dumps(fields, ensure_ascii=False).encode()).input == expected


@pytest.mark.parametrize("body", [b"{}", b'{"content":""}', b'{"content":" \\n\\t","prompt":null}'])
def test_input_without_text_is_refused(body: bytes) -> None:
    """A run needs something to say."""
    assert refused_fields(body) == {"content": "must hold text, unless prompt does"}


def test_null_is_absent() -> None:
    """JSON null stands for a field that is not there."""
    body = b'{"content":"c","prompt":null,"title":null,"mode":null,"metadata":null}'
    assert decode_start(body) == StartBody("c", None, None, None, "c", None)


@pytest.mark.parametrize(
    "metadata",
    [
        b"{}",
        b'{"n":12345678901234567890123456789,"f":1.10,"e":-1e-7,"z":-0}',
        b'{"z":1,"a":{"b":[null,{},[]]},"":""}',
        b'{"s":"\\u0000 \\ud83d\\ude00 \\/","\\u006bey":"\xc3\xbc"}',
        b'{ "spaced" :\t1 ,\r\n"x":"}\\"{" }',
    ],
)
def test_metadata_is_kept_to_the_byte(metadata: bytes) -> None:
    """Integers beyond 2^53, key order, nested nulls, escapes and blanks survive."""
    for body in (
        b'{"metadata":' + metadata + b',"content":"c"}',
        b'{"content":"c","meta\\u0064ata": ' + metadata + b" }",
    ):
        assert decode_start(body).metadata == metadata


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        (b'{"content":1}', "content", "must be a string"),
        (b'{"content":["a"]}', "content", "must be a string"),
        (b'{"prompt":{}}', "prompt", "must be a string"),
        (b'{"content":"c","title":false}', "title", "must be a string"),
        (b'{"content":"c","mode":"later"}', "mode", 'must be "sync" or "async"'),
        (b'{"content":"c","mode":""}', "mode", 'must be "sync" or "async"'),
        (b'{"content":"c","mode":["sync"]}', "mode", 'must be "sync" or "async"'),
        (b'{"content":"c","metadata":[]}', "metadata", "must be an object"),
        (b'{"content":"c","metadata":"{}"}', "metadata", "must be an object"),
        (b'{"content":"a\\u0000b"}', "content", "must not hold the character U+0000"),
        (b'{"content":"c","prompt":"\\u0000"}', "prompt", "must not hold the character U+0000"),
        (b'{"content":"c","title":"\\u0000"}', "title", "must not hold the character U+0000"),
        (b'{"content":"c","stream":true}', "stream", "is not a field of this request"),
        (b'{"content":"c","Mode":"sync"}', "Mode", "is not a field of this request"),
        (b'{"content":"c","":1}', "", "is not a field of this request"),
    ],
)
def test_a_wrong_field_is_named(body: bytes, field: str, message: str) -> None:
    """The details say which field is wrong, in the words of the contract."""
    assert refused_fields(body) == {field: message}


def test_all_wrong_fields_are_named_at_once() -> None:
    """A caller need not find them one by one; but there is an end to it."""
    assert refused_fields(b'{"content":1,"mode":"x","metadata":3,"extra":0}').keys() == {
        "content",
        "mode",
        "metadata",
        "extra",
    }
    many = json.dumps({f"field{number}": 0 for number in range(1000)}).encode()
    assert len(refused_fields(many)) == 16
    assert len(refusal(b'{"' + b"k" * 100_000 + b'":1}').body()) < 500


def test_the_limits_hold() -> None:
    """A title and metadata of exactly the limit pass; one more does not."""
    limits = BodyLimits(title_characters=3, metadata_bytes=9)
    assert decode_start('{"content":"c","title":"üüü","metadata":{"a":"1"}}'.encode(), limits).title == "üüü"
    assert refused_fields(b'{"content":"c","title":"1234"}', lambda body: decode_start(body, limits)) == {
        "title": "must have at most 3 characters"
    }
    assert refused_fields(b'{"content":"c","metadata":{"a":"12"}}', lambda body: decode_continue(body, limits)) == {
        "metadata": "must have at most 9 bytes"
    }


@pytest.mark.parametrize("arguments", [{"depth": 0}, {"depth": 5000}, {"title_characters": 0}])
def test_limits_that_cannot_hold_are_refused(arguments: dict[str, int]) -> None:
    """Settings are checked when built."""
    with pytest.raises(ValueError, match="limit"):
        BodyLimits(**arguments)


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"{", "line 1, column 2"),
        (b'{"content":"c"} x', "Extra data"),
        (b"{'content':'c'}", "not JSON"),
        (b'{"content":"c",}', "not JSON"),
        (b'{"content":"\x01"}', "control character"),
        (b'{"content":"\\x"}', "escape"),
        (b'{"metadata":{"a":01}}', "not JSON"),
        (b'\xef\xbb\xbf{"content":"c"}', "byte order mark"),
        (b'{"content":"\xff"}', "UTF-8 at byte 12"),
        (b'{"content":"\xed\xa0\x80"}', "UTF-8"),
        (b'{"content":"\xc0\x80"}', "UTF-8"),
        (b'{"content":"c"}'.decode().encode("utf-16"), "UTF-8"),
        (b'{"content":"c","metadata":{"a":NaN}}', "NaN"),
        (b'{"content":"c","metadata":{"a":-Infinity}}', "-Infinity"),
        (b'{"content":Infinity}', "Infinity"),
        (b'{"content":"c","metadata":{"a":1e999}}', "too large"),
        (b'{"content":"c","metadata":{"a":-1.0E+400}}', "too large"),
        (b'{"content":"c","metadata":{"a":' + b"9" * 5000 + b"}}", "too many digits"),
        (b'{"content":"\\ud800"}', "surrogate"),
        (b'{"content":"\\uDC00\\uD800"}', "surrogate"),
        (b'{"content":"c","metadata":{"a":[{"b":"x\\udfffy"}]}}', "surrogate"),
        (b'{"content":"c","metadata":{"\\ud83d":1}}', "surrogate"),
        (b'{"content":"c","\\ud83d":1}', "surrogate"),
        (b'["\\ud800"]', "surrogate"),
    ],
)
def test_what_is_not_json_is_told(body: bytes, part: str) -> None:
    """Malformed text, and what JSON parsers let through but nothing behind can hold."""
    error = refusal(body)
    assert error.code == "INVALID_JSON"
    assert part in error.message


@pytest.mark.parametrize(
    ("body", "key"),
    [
        (b'{"content":"a","content":"b"}', "content"),
        (b'{"content":"a","c\\u006fntent":"b"}', "content"),
        (b'{"content":"a","metadata":{"x":[{"deep":1,"deep":1}]}}', "deep"),
        (b'{"content":"a","metadata":{"\\ud800":1,"\\ud800":1}}', "?"),
        (b'{"' + b"k" * 200 + b'":1,"' + b"k" * 200 + b'":1}', "k" * 64 + "…"),
    ],
)
def test_a_duplicate_key_is_named(body: bytes, key: str) -> None:
    """Two readers of a duplicate key may believe different values, so nobody gets to."""
    error = refusal(body)
    assert error.code == "INVALID_JSON"
    assert error.details == [{"field": key, "message": "appears more than once"}]


@pytest.mark.parametrize("body", [b"null", b"[]", b'"x"', b"1", b"true"])
@pytest.mark.parametrize("decode", DECODERS)
def test_a_body_that_is_no_object_is_refused(body: bytes, decode: Callable[[bytes], object]) -> None:
    """JSON, but not what was asked for."""
    error = refusal(body, decode)
    assert (error.code, error.message) == ("VALIDATION_FAILED", "The body must be a JSON object.")


def nested(levels: int) -> bytes:
    """A start whose body nests this many levels, with brackets in strings that do not count."""
    inner = b"[" * (levels - 2) + b"]" * (levels - 2)
    return b'{"content":"' + b"[{" * 40 + b'\\"[[\\\\","metadata":{"a":' + (inner or b"0") + b"}}"


def test_depth_is_bounded() -> None:
    """The limit is on nesting, not on brackets, and is exact."""
    assert decode_start(nested(32)).metadata is not None
    assert "32 levels" in refusal(nested(33)).message
    assert decode_start(b'{"content":"c","metadata":{"a":[' + b"[]," * 1000 + b"[]]}}").metadata is not None
    assert decode_start(nested(2), BodyLimits(depth=2)).metadata == b'{"a":0}'


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 200_000,
        b'{"a":' * 50_000,
        b"{" * 40 + b'\\"' * 100_000,
        b'"' * 200_001,
        b"]" * 200_000,
        b"{" * 33 + b'"\\',
    ],
)
@pytest.mark.parametrize("decode", DECODERS)
def test_hostile_bodies_are_refused(body: bytes, decode: Callable[[bytes], object]) -> None:
    """Neither a stack nor an afternoon is spent on what was never meant to be read."""
    assert refusal(body, decode).code == "INVALID_JSON"


@pytest.mark.parametrize("body", [b"", b"{}", b" { }\n"])
def test_cancel_takes_nothing(body: bytes) -> None:
    """Official clients send `{}` or no body at all."""
    decode_cancel(body)


def test_cancel_refuses_fields() -> None:
    """A field that would be ignored is a mistake that should be seen."""
    assert refused_fields(b'{"reason":"x"}', decode_cancel) == {"reason": "is not a field of this request"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=20,
)
json_texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@given(
    metadata=st.dictionaries(st.text(), json_values, max_size=5),
    content=json_texts.filter(lambda text: not text.isspace()),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
)
def test_any_valid_start_comes_through(
    metadata: dict[str, Any], content: str, ascii_only: bool, indent: int | None
) -> None:
    """Whatever is sent comes out the same."""
    text = json.dumps(metadata, ensure_ascii=ascii_only, indent=indent)
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        return  # hypothesis may draw a lone surrogate, which has tests of its own
    body = json.dumps({"content": content}).encode()[:-1] + b',"metadata":' + encoded + b"}"
    assert decode_start(body) == StartBody(content, None, None, encoded, content, None)


fragments = st.sampled_from(
    [
        *(
            b"{",
            b"}",
            b"[",
            b"]",
            b'"',
            b":",
            b",",
            b"\\",
            b" ",
            b'"content"',
            b'"metadata"',
            b'"mode"',
            b'"sync"',
        ),
        *(
            b"null",
            b"1",
            b"-",
            b"1e999",
            b"NaN",
            b"\\ud800",
            b"\\u0000",
            b"\xff",
            b"\xed\xa0\x80",
            b"\xef\xbb\xbf",
        ),
    ]
)


@given(body=st.binary() | st.lists(fragments).map(b"".join))
def test_no_bytes_break_a_decoder(body: bytes) -> None:
    """A body is read or refused, and each refusal can be sent; there is no third way."""
    for decode in DECODERS:
        try:
            decode(body)
        except ApiError as error:
            json.loads(error.body())


pieces = st.sampled_from(
    [
        *(b'"content"', b'"prompt"', b'"title"', b'"x"', b'""', b'" "', b'"\n"', b'"\x7f\xc3\xa9"', b'"\xff"'),
        *(b'"', b":", b",", b" ", b"null", b"\\", b"\\n"),
    ]
)
members = st.tuples(pieces, st.just(b":"), pieces).map(b"".join)


@given(inside=st.lists(members).map(b",".join) | st.lists(pieces).map(b"".join))
def test_the_quick_way_reads_what_the_strict_parser_reads(inside: bytes) -> None:
    """An accepted body is what the standard library makes of it, and holds no key twice."""
    body = b"{" + inside + b"}"
    try:
        read = decode_start(body)
    except ApiError:
        return
    pairs: list[tuple[str, Any]] = json.loads(body, object_pairs_hook=list)
    document = dict(pairs)
    assert len(document) == len(pairs)
    assert read.title == (document.get("title") or None)
    assert read.input in (f"{document.get('prompt')}\n\n{document.get('content')}", *document.values())
