"""No credential in an answer: in no usual encoding, across no cut, and at nobody else's cost."""

import base64
import copy
import json
import pickle
import re
import traceback
from functools import partial
from itertools import pairwise

import pytest
from fakes.echo import ENCODINGS, events, shown
from hypothesis import assume, example, given
from hypothesis import strategies as st

from broker.credentials.scrub import MARKER, SHORTEST, Scrubber, scrubber_of, spellings

TOKEN = "ghs_16C7e42F292c6912E7710c838347Ae178B4a"
AWKWARD = "a\"b'c/d\\e&f<g>h i+j=k~l%m`n€oé?>~"
PASSWORDS = [TOKEN, AWKWARD, "pässwörter", "~~~???>>>", '""""""""', "\\\\\\\\\\\\\\\\", "%41%42%43%", "€€€€€€€€"]
MARK = MARKER.encode()

# Characters of a surrounding that no encoding of a value (which has none of them) writes.
OUTSIDE = "|\n\tЖ字"
PRINTABLE = st.characters(min_codepoint=32, max_codepoint=126, exclude_characters=OUTSIDE)
LETTERS = st.characters(max_codepoint=0x2FFF, categories=["L", "M", "S"], exclude_characters=OUTSIDE)
secrets = st.text(PRINTABLE, min_size=SHORTEST, max_size=200) | st.text(PRINTABLE | LETTERS, min_size=SHORTEST, max_size=60)
secrets = secrets.filter(lambda value: value not in MARKER)
surroundings = st.text(OUTSIDE, max_size=30).map(str.encode)
encodings = st.sampled_from(list(ENCODINGS))
cuts = st.lists(st.integers(0, 2000), max_size=12)


def pieces(data, places):
    edges = [0, *sorted({min(place, len(data)) for place in places}), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


def scrubbed(values, chunks):
    """What came out, whole; and how many were found."""
    stream = Scrubber(values).stream()
    out = b"".join(stream.feed(chunk, last=place == len(chunks) - 1) for place, chunk in enumerate(chunks))
    return out, stream.found


def octets(data):
    return [data[place : place + 1] for place in range(len(data))]


# What is found.


@pytest.mark.parametrize("value", PASSWORDS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_value_is_found_as_it_is_usually_written(encoding, value):
    before, own, after = ENCODINGS[encoding](value)
    text = b"|" + before + own + after + b"|"
    assert encoding in shown(text, value)
    expected = (b"|" + before + MARK + after + b"|", 1)
    assert scrubbed([value], [text]) == expected == scrubbed([value], octets(text))


@given(secrets, encodings, surroundings, surroundings, cuts)
def test_whatever_the_value_its_surrounding_and_the_chunks_only_the_value_goes(value, encoding, left, right, places):
    before, own, after = ENCODINGS[encoding](value)
    assume(not (before or after) or own not in (own + after)[1:])
    out, found = scrubbed([value], pieces(left + before + own + after + right, places))
    assert not shown(out.replace(MARK, b"\0"), value)
    assert (out, found) == (left + before + MARK + after + right, 1)


@given(secrets, st.data(), cuts)
def test_among_pieces_of_itself_a_value_is_found_too_and_nothing_else_is_lost(value, data, places):
    written = [part for write in ENCODINGS.values() for part in (write(value)[1], write(value)[1][: len(value) // 2])]
    parts = data.draw(st.lists(st.sampled_from(written) | st.binary(max_size=5), max_size=8))
    text = b"".join(parts)
    assume(MARK not in text)
    out, found = scrubbed([value], pieces(text, places))
    assert not shown(out.replace(MARK, b"\0"), value)
    between = b"(?:" + b"|".join(re.escape(each) for each in sorted(spellings(value), key=len, reverse=True)) + b")"
    assert re.fullmatch(between.join(re.escape(kept) for kept in out.split(MARK)), text)
    assert out.count(MARK) == found


@given(secrets, st.data(), cuts)
def test_what_comes_out_does_not_depend_on_the_chunks(value, data, places):
    written = [part for write in ENCODINGS.values() for part in (write(value)[1], write(value)[1][:5])]
    text = b"".join(data.draw(st.lists(st.sampled_from(written) | st.binary(max_size=5), max_size=8)))
    assert scrubbed([value], pieces(text, places)) == scrubbed([value], [text])


@pytest.mark.parametrize("before", range(6))
@pytest.mark.parametrize("after", range(4))
def test_basic_credentials_in_longer_base64_show_no_password(before, after):
    text = base64.b64encode(b"x" * before + b"robot:" + TOKEN.encode() + b"z" * after)
    out, found = scrubbed([TOKEN], octets(text))
    assert found == 1
    rest = len(text) - len(out) + len(MARK)  # characters removed: all but those that hold bits of a neighbour, too
    assert len(TOKEN) * 8 // 6 - 1 <= rest <= len(TOKEN) * 8 / 6
    assert not shown(out, TOKEN)


def test_a_header_with_the_value_in_it_is_cleaned_and_counted():
    target = f"https://elsewhere.example/?a={TOKEN}&b={TOKEN.encode().hex()}"
    assert Scrubber([TOKEN]).header(target) == (f"https://elsewhere.example/?a={MARKER}&b={MARKER}", 2)


def test_a_header_that_is_no_ascii_is_found_as_the_latin_1_that_it_left_as():
    sent = "Bearer pässwörter".encode("latin-1")
    assert Scrubber(["pässwörter"]).header(sent.decode("latin-1")) == (f"Bearer {MARKER}", 1)


def test_a_header_without_it_is_the_same_object():
    value = "text/html; charset=utf-8"
    assert Scrubber([TOKEN]).header(value)[0] is value


# Several, again and again, one in another.


@pytest.mark.parametrize(
    ("known", "text", "expected"),
    [
        pytest.param([TOKEN], f"{TOKEN}{TOKEN} {TOKEN}", f"{MARKER}{MARKER} {MARKER}", id="one after the other"),
        pytest.param(["abcabcabc"], "abcabcabcabc.", f"{MARKER}abc.", id="overlapping with itself"),
        pytest.param(["01234567", "56789abc"], "0123456789abc", f"{MARKER}89abc", id="overlapping with another"),
        pytest.param(["01234567", "zyxwvuts"], "01234567zyxwvuts", f"{MARKER}{MARKER}", id="two values"),
        pytest.param(["01234567", "0123456789abcdefg"], "0123456789abcdefg", MARKER, id="the longer of two that begin alike"),
        pytest.param(["01234567", "0123456789abcdefg"], "0123456789abcdef.", f"{MARKER}89abcdef.", id="the shorter of them"),
        pytest.param(["9abcdefg", "0123456789abcdefg"], "0123456789abcdefg", MARKER, id="one that ends with another"),
        pytest.param([f"Bearer {TOKEN}", TOKEN], f"Bearer {TOKEN}", f"Bearer {MARKER}", id="a scheme before it is no secret"),
        pytest.param([f"Bearer {TOKEN}"], f"Bearer {TOKEN}", MARKER, id="a header's value alone"),
        pytest.param([TOKEN], TOKEN[:-1], TOKEN[:-1], id="all but the end of it"),
        pytest.param([TOKEN], TOKEN[:-1] + TOKEN, TOKEN[:-1] + MARKER, id="all but the end of it, and then all of it"),
        pytest.param([], TOKEN, TOKEN, id="no value"),
        pytest.param(["hunter2"], "hunter2", "hunter2", id="a value that is too short"),
        pytest.param(["hunter2", TOKEN], f"hunter2 {TOKEN}", f"hunter2 {MARKER}", id="beside a value that is too short"),
        pytest.param(["hunter22"], "hunter22", MARKER, id="the shortest value"),
    ],
)
def test_several_values(known, text, expected):
    assert scrubbed(known, [text.encode()])[0].decode() == expected == scrubbed(known, octets(text.encode()))[0].decode()


# What is not touched, and what waits.


@given(st.text(max_size=300).map(str.encode), cuts)
@example(f"{TOKEN[:20]} ghs_ {TOKEN[:-1]}".encode(), [3, 21, 40])
def test_what_shows_no_value_passes_unchanged(text, places):
    assert scrubbed([TOKEN], pieces(text, places)) == (text, 0)


@pytest.mark.parametrize(
    "event", [b": ping\n\n", b'data: {"text":"' + TOKEN[:-1].encode() + b'"}\n\n', "data: Ж\r\n\r\n".encode()]
)
def test_an_event_that_shows_no_value_passes_at_once_and_is_not_even_copied(event):
    assert Scrubber([TOKEN]).stream().feed(event, last=False) is event


@given(secrets, encodings, cuts)
def test_only_what_may_be_the_beginning_of_a_value_waits(value, encoding, places):
    stream, known = Scrubber([value]).stream(), spellings(value)
    sent = passed = b""
    for chunk in pieces(b"|".join([b"".join(ENCODINGS[encoding](value))] * 2), places):
        out = stream.feed(chunk, last=False)
        sent, passed = sent + chunk, passed + out
        waiting = stream._held
        assert sent.endswith(waiting)
        assert not waiting or any(each.startswith(waiting) and each != waiting for each in known)


def test_what_waits_goes_on_as_soon_as_it_cannot_be_a_value():
    stream = Scrubber([TOKEN]).stream()
    assert stream.feed(b"x" + TOKEN[:30].encode(), last=False) == b"x"
    assert stream.feed(b"-", last=False) == TOKEN[:30].encode() + b"-"


def test_what_waits_at_the_end_goes_on_then():
    stream = Scrubber([TOKEN]).stream()
    assert stream.feed(TOKEN[:30].encode(), last=False) == b""
    assert stream.feed(b"", last=True) == TOKEN[:30].encode()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_event_cut_anywhere_in_the_value_shows_none_of_it(encoding):
    stream = Scrubber([TOKEN]).stream()
    sent = list(events(f"Bearer {TOKEN}", encoding))
    out = b"".join(stream.feed(piece, last=False) for event in sent for piece in event)
    assert stream.found == len(sent)
    assert not shown(out, TOKEN)
    cut = [piece for event in sent for piece in event]
    assert any(TOKEN[:9].encode() in piece for piece in cut) or encoding != "plain"


# What a scrubber itself shows.


@pytest.mark.parametrize("make", [Scrubber, lambda values: Scrubber(values).stream(), lambda values: scrubber_of(tuple(values))])
def test_a_scrubber_never_shows_what_it_looks_for(make):
    holder = make([TOKEN, AWKWARD])
    try:
        raise ValueError(holder)  # noqa: TRY301 - for its traceback
    except ValueError as error:
        told = "".join(traceback.format_exception(error))
    text = f"{holder} {holder!r} {[holder]} {told} {getattr(holder, '_suspicion', '')!r}".encode()
    assert not shown(text, TOKEN)
    assert not shown(text, AWKWARD)


@pytest.mark.parametrize("carry", [pickle.dumps, copy.deepcopy, json.dumps])
def test_a_scrubber_is_not_carried_off(carry):
    with pytest.raises(TypeError):
        carry(Scrubber([TOKEN]))


@pytest.mark.parametrize(
    "wrong",
    [
        partial(Scrubber, [TOKEN, None]),
        lambda: Scrubber([TOKEN]).stream().feed(TOKEN, last=True),
        lambda: Scrubber([TOKEN]).header(None),
    ],
    ids=["a value that is no text", "a chunk of text", "a header that is none"],
)
def test_what_goes_wrong_names_no_value(wrong):
    with pytest.raises((TypeError, AttributeError)) as caught:
        wrong()
    assert not shown(str(caught.value).encode(), TOKEN)


@pytest.mark.parametrize("value", ["\udc80 from the environment", "�" * 8])
def test_a_value_that_has_no_encoding_breaks_nothing(value):
    assert scrubbed([value], [b"text"]) == (b"text", 0)


def test_a_scrubber_is_made_once_for_the_same_values():
    assert scrubber_of((TOKEN,)) is scrubber_of((TOKEN,))
