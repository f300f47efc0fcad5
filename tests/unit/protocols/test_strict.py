"""Bytes are read in exactly one way, or refused with the reason."""

import json
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.policy.types import Code, Refusal, Request
from broker.protocols import strict
from broker.protocols.strict import Unreadable


def _refusal(read: Callable[[Any], object], what: object) -> Refusal:
    with pytest.raises(Unreadable) as caught:
        read(what)
    return caught.value.refusal


REFUSED = [
    pytest.param(b"", "Expecting value", id="an empty body"),
    pytest.param(b"\xef\xbb\xbf{}", "Expecting value", id="a byte order mark"),
    pytest.param('{"a":1}'.encode("utf-16"), "codec", id="UTF-16 with its mark"),
    pytest.param('{"a":1}'.encode("utf-16-le"), "Expecting", id="UTF-16 without a mark"),
    pytest.param('{"a":1}'.encode("utf-32-be"), "Expecting", id="UTF-32"),
    pytest.param(b'"\xff"', "codec", id="bytes that are no UTF-8"),
    pytest.param(b'"\xed\xa0\x80"', "codec", id="a raw surrogate"),
    pytest.param(b'{"a":NaN}', "NaN", id="NaN"),
    pytest.param(b"[Infinity]", "NaN", id="Infinity"),
    pytest.param(b"-Infinity", "NaN", id="minus Infinity"),
    pytest.param(b"1e999", "double", id="a number that overflows to infinity"),
    pytest.param(b"-1e999", "double", id="a number that overflows to minus infinity"),
    pytest.param(b"18446744073709551616", "64-bit range", id="an integer of 65 bits"),
    pytest.param(b"9" * 100_000, "4300 digits", id="an integer of absurd length"),
    pytest.param(b'{"a":1,"a":2}', "twice", id="a key twice"),
    pytest.param(b'{"x":{"a":1,"\\u0061":2}}', "twice", id="a key twice, once escaped, below the top"),
    pytest.param(b'{"a":"\\ud800"}', "surrogate", id="a lone high surrogate"),
    pytest.param(b'{"a":"\\uDC00\\uD800"}', "surrogate", id="surrogates the wrong way round"),
    pytest.param(b'{"\\udfff":1}', "surrogate", id="a lone surrogate in a key"),
    pytest.param(b"{} {}", "Extra data", id="a second document"),
    pytest.param(b"{}\x00", "Extra data", id="trailing garbage"),
    pytest.param(b'{"a":1,}', "property name", id="a trailing comma"),
    pytest.param(b"{'a':1}", "property name", id="single quotes"),
    pytest.param(b'"a\nb"', "control character", id="a raw line end in a string"),
    pytest.param(b"[" * 255 + b"]" * 255, "Recursion", id="255 levels"),
    pytest.param(b"[" * 100_000, "recursion", id="100,000 levels of lists, never closed"),
    pytest.param(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "recursion", id="100,000 levels of objects"),
]


@pytest.mark.parametrize(("body", "reason"), REFUSED)
def test_refuses_json(body: bytes, reason: str) -> None:
    refusal = _refusal(strict.json_value, body)
    assert refusal.code is Code.BODY_MALFORMED
    assert reason in refusal.detail
    assert "sys." not in refusal.detail


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b' {"a": [1, -0.5, true, null, "x"]}\n', id="an ordinary document"),
        pytest.param(b'"\\ud83d\\ude00"', id="a proper surrogate pair"),
        pytest.param(b'"\\\\ud800"', id="a backslash and the letters ud800"),
        pytest.param(b"18446744073709551615", id="the largest 64-bit integer"),
        pytest.param(b"-9223372036854775808", id="the smallest 64-bit integer"),
        pytest.param(b"[" * 254 + b"]" * 254, id="254 levels"),
        pytest.param(b"[" + b"[]," * 100 + b"[]]", id="many lists side by side"),
        pytest.param(b'["' + b"[{" * 200 + b'"]', id="brackets in a string"),
    ],
)
def test_reads_json_as_the_standard_library_does(body: bytes) -> None:
    assert strict.json_value(body) == json.loads(body)


_LEAVES = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
_DOCUMENTS = st.recursive(_LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=30)


@given(_DOCUMENTS, st.booleans())
def test_every_valid_document_is_read(document: object, ascii_only: bool) -> None:  # noqa: FBT001
    assert strict.json_value(json.dumps(document, ensure_ascii=ascii_only).encode()) == document


@given(st.binary() | st.lists(st.sampled_from(list('[]{}"\\:,u1eEdD8-. ')), max_size=60).map(lambda s: "".join(s).encode()))
def test_no_bytes_raise_and_what_is_accepted_is_json(body: bytes) -> None:
    with suppress(Unreadable):
        assert strict.json_value(body) == json.loads(body)
    with suppress(Unreadable):
        strict.form(body)
    with suppress(Unreadable):
        strict.query(body.decode("latin-1"))


@pytest.mark.parametrize(
    ("raw", "pairs"),
    [
        pytest.param("", {}, id="nothing"),
        pytest.param("a=1&b=2", {"a": ["1"], "b": ["2"]}, id="two pairs"),
        pytest.param("a=1&b=3&a=2", {"a": ["1", "2"], "b": ["3"]}, id="a repeated key"),
        pytest.param("a&b=&=c", {"a": [""], "b": [""], "": ["c"]}, id="empty values and keys"),
        pytest.param("&a=1&&", {"a": ["1"]}, id="empty pairs"),
        pytest.param("expand[]=x&created[gte]=5", {"expand[]": ["x"], "created[gte]": ["5"]}, id="brackets stay in the key"),
        pytest.param("a=b+c%2Bd%3De", {"a": ["b c+d=e"]}, id="plus and escapes"),
        pytest.param("a=%2541", {"a": ["%41"]}, id="decoded once only"),
        pytest.param("a=%3Bb", {"a": [";b"]}, id="an escaped semicolon"),
        pytest.param("%C3%A9=%F0%9F%98%80", {"é": ["😀"]}, id="UTF-8"),
        pytest.param("a=b=c", {"a": ["b=c"]}, id="a second equals sign"),
    ],
)
def test_reads_pairs(raw: str, pairs: dict[str, list[str]]) -> None:
    assert strict.query(raw) == pairs
    assert strict.form(raw.encode()) == pairs


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        pytest.param("a=1;b=2", "must be escaped", id="a semicolon"),
        pytest.param("a=%", "%-escape", id="a lone percent sign"),
        pytest.param("a=%4", "%-escape", id="half an escape"),
        pytest.param("a=%zz", "%-escape", id="an escape of no hex digits"),
        pytest.param("a=%u0041", "%-escape", id="a JavaScript escape"),
        pytest.param("a=b c", "must be escaped", id="a raw space"),
        pytest.param("a=\x00", "must be escaped", id="a raw NUL"),
        pytest.param("a=é", "must be escaped", id="raw non-ASCII"),
        pytest.param("a=1#b", "must be escaped", id="a fragment"),
        pytest.param("a=1\n", "must be escaped", id="a raw line end"),
        pytest.param("a=%ff", "not UTF-8", id="an escaped byte that is no UTF-8"),
        pytest.param("a=%ed%a0%80", "not UTF-8", id="an escaped surrogate"),
        pytest.param("a=%00", "control", id="an escaped NUL"),
        pytest.param("a%1b=1", "control", id="an escaped escape character in a key"),
    ],
)
def test_refuses_pairs(raw: str, reason: str) -> None:
    asked, sent = _refusal(strict.query, raw), _refusal(strict.form, raw.encode())
    assert (asked.code, sent.code) == (Code.PROTOCOL_VIOLATION, Code.BODY_MALFORMED)
    assert reason in asked.detail
    assert reason in sent.detail


def test_a_form_may_hold_lines_but_a_query_may_not() -> None:
    assert strict.form(b"text=a%0D%0Ab%09c") == {"text": ["a\r\nb\tc"]}
    assert "control" in _refusal(strict.query, "text=a%0Ab").detail


_PRINTED = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]))


@given(st.dictionaries(_PRINTED.filter(bool), st.lists(_PRINTED, min_size=1)))
def test_reads_what_the_standard_library_encodes(pairs: dict[str, list[str]]) -> None:
    assert strict.form(urlencode(pairs, doseq=True, quote_via=quote).encode()) == pairs
    assert strict.query(urlencode(pairs, doseq=True)) == pairs


def _request(*headers: tuple[str, str], method: str = "POST") -> Request:
    return Request(method, "/", "", headers)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        pytest.param(_request(("content-type", "a/b"), ("content-type", "a/b")), Code.PROTOCOL_VIOLATION, id="two content types"),
        pytest.param(_request(("content-length", "1"), ("content-length", "1")), Code.PROTOCOL_VIOLATION, id="two lengths"),
        pytest.param(
            _request(("transfer-encoding", "x"), ("transfer-encoding", "x")), Code.PROTOCOL_VIOLATION, id="two transfer encodings"
        ),
        pytest.param(_request(("upgrade", "websocket")), Code.PROTOCOL_VIOLATION, id="a WebSocket upgrade"),
        pytest.param(_request(("connection", "keep-alive, Upgrade")), Code.PROTOCOL_VIOLATION, id="a connection upgrade"),
        pytest.param(_request(("upgrade", "h2c"), ("connection", "upgrade, http2-settings")), Code.PROTOCOL_VIOLATION, id="h2c"),
        pytest.param(_request(method="TRACE"), Code.PROTOCOL_VIOLATION, id="TRACE"),
        pytest.param(_request(method="CONNECT"), Code.PROTOCOL_VIOLATION, id="CONNECT"),
        pytest.param(_request(method="GE T"), Code.PROTOCOL_VIOLATION, id="a method that is no token"),
        pytest.param(_request(method=""), Code.PROTOCOL_VIOLATION, id="no method"),
        *(
            pytest.param(_request(("content-encoding", coding)), Code.ENCODING_NOT_ALLOWED, id=f"a body in {coding}")
            for coding in ("gzip", "br", "zstd", "deflate", "GZIP", "identity, gzip")
        ),
    ],
)
def test_refuses_a_head(request_: Request, code: Code) -> None:
    assert _refusal(strict.head, request_).code is code


def test_a_plain_head_passes() -> None:
    strict.head(_request(("content-type", "a/b"), ("content-encoding", "identity"), ("connection", "keep-alive")))


@pytest.mark.parametrize(
    ("value", "media"),
    [
        pytest.param("application/json", "application/json", id="plain"),
        pytest.param("Application/JSON; Charset=UTF-8", "application/json", id="other case"),
        pytest.param('application/json;charset="utf-8"', "application/json", id="a quoted charset"),
        pytest.param("multipart/form-data; boundary=x", "multipart/form-data", id="another parameter"),
        pytest.param('a/b; x="y; charset=z" ;', "a/b", id="a charset inside a quoted parameter"),
        pytest.param("", "", id="none"),
    ],
)
def test_reads_media_types(value: str, media: str) -> None:
    assert strict.media_type(value) == media


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("application/json; charset=utf-16", id="UTF-16"),
        pytest.param("application/json; charset=utf-8; charset=latin1", id="a second charset"),
        pytest.param("application/json, text/plain", id="two types in one"),
        pytest.param("json", id="no subtype"),
        pytest.param("application/json; charset=utf-8x", id="a charset that begins like UTF-8"),
        pytest.param('application/json; charset="utf-8', id="an open quote"),
        pytest.param("application/json; CHARSET=latin1", id="another charset, in capitals"),
    ],
)
def test_refuses_media_types(value: str) -> None:
    assert _refusal(strict.media_type, value).code is Code.ENCODING_NOT_ALLOWED


def test_numbers_keep_their_value() -> None:
    value = strict.json_value(b"[1e308, 0.1, 1E2]")
    assert value == [1e308, 0.1, 100.0]
    assert all(math.isfinite(number) for number in value if isinstance(number, float))
