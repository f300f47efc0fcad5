"""Events come out whole, in order and byte for byte, however the stream was cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.protocols import sse
from broker.protocols.base import ResponseBlocked
from broker.protocols.sse import Events, data_of, with_data

STREAM = (
    b"\xef\xbb\xbf: welcome\r\n\r\n"
    b'id: 1\nevent: message\nretry: 10\ndata: {\ndata: "a": "\xc3\xa9"}\n\n'
    b"data\r\rid: 2\r\n\n\rdata:no space\r\n\r\n"
    b": ping\n\n"
)


@pytest.mark.parametrize(
    ("stream", "data"),
    [
        pytest.param(b"data: a\n\n", [b"a"], id="line feeds"),
        pytest.param(b"data: a\r\n\r\n", [b"a"], id="carriage returns and line feeds"),
        pytest.param(b"data: a\r\r", [b"a"], id="carriage returns"),
        pytest.param(b"data: a\r\n\n", [b"a"], id="a mixture"),
        pytest.param(b"data: a\r\ndata: b\n\ndata:c\n\n", [b"a\nb", b"c"], id="two lines are one datum"),
        pytest.param(b"data\n\n", [b""], id="a field without a value"),
        pytest.param(b"data:  a\n\n", [b" a"], id="one space is syntax, the second is data"),
        pytest.param(b"Data: a\nxdata: b\ndata : c\n\n", [b""], id="other fields"),
        pytest.param(b"\xef\xbb\xbfdata: a\n\n", [b"a"], id="a byte order mark before the first field"),
        pytest.param(b": ping\n\nid: 7\n\n", [b"", b""], id="comments and priming events"),
        pytest.param(b"data: a\n\ndata: unfinished\n", [b"a"], id="the unfinished end is no event"),
    ],
)
def test_reads_events(stream: bytes, data: list[bytes]) -> None:
    assert [data_of(event) for event in Events().feed(stream)] == data


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_no_cut_changes_a_byte_or_a_datum(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    events = Events()
    found = [event for start, end in pairwise(edges) for event in events.feed(STREAM[start:end])]
    assert b"".join(found) == STREAM
    assert [d for e in found if (d := data_of(e))] == [b'{\n"a": "\xc3\xa9"}', b"no space"]


def test_a_finished_event_is_not_held_back() -> None:
    events = Events()
    assert events.feed(b"data: a\r\n\r") == [b"data: a\r\n\r"]
    assert events.feed(b"\ndata: b\n\n") == [b"\ndata: b\n\n"]


def test_an_endless_event_is_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT", 10_000)
    events = Events()
    assert events.feed(b"x" * 10_000) == []
    with pytest.raises(ResponseBlocked, match="longer than 10000 bytes"):
        events.feed(b"x")


def test_a_whole_event_that_is_too_long_is_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT", 10)
    with pytest.raises(ResponseBlocked):
        Events().feed(b"data: " + b"x" * 10 + b"\n\n")


def test_rewriting_keeps_all_but_the_data() -> None:
    event = b"id: 1\r\n: note\r\ndata: a\r\nretry: 5\r\ndata: b\r\n\r\n"
    assert with_data(event, b"{}") == b"id: 1\r\n: note\r\ndata: {}\r\nretry: 5\r\n\r\n"
