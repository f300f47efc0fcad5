import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from broker.manifest import strict_yaml
from broker.manifest.strict_yaml import MAX_BYTES, MAX_DEPTH, read
from broker.redaction import SHAPE, may_hold

WORDS = ["yes", "no", "on", "off", "y", "n", "Y", "N", "YES", "No", "On", "OFF", "True", "TRUE", "False", "FALSE", "Null", "NULL"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**17), 10**17) | st.text(st.characters(codec="ascii")),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="ascii"), max_size=8), inner, max_size=4)
    ),
    max_leaves=20,
)


def codes(text):
    return [finding.code for finding in read("f.yaml", text.encode())[1]]


def data(text):
    documents, findings = read("f.yaml", text.encode())
    assert findings == ()
    return [document.data for document in documents]


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_give_documents_or_findings_never_an_exception(content):
    documents, findings = read("f.yaml", content)
    assert documents or findings


@given(st.text(alphabet="ab:- {}[]&*!|>'\"\n#?,<0123.~%@", max_size=80))
def test_any_yaml_like_text_means_what_a_safe_loader_reads_or_is_refused(text):
    documents, findings = read("f.yaml", text.encode())
    if not findings:
        assert [document.data for document in documents] == list(yaml.safe_load_all(text))


@given(st.dictionaries(st.text(st.characters(codec="ascii"), max_size=8), JSON, min_size=1))
def test_json_is_read_as_json(value):
    assert data(json.dumps(value)) == [value]


@pytest.mark.parametrize(
    "word",
    ["yes", "no", "on", "off", "y", "n", "Y", "N", "YES", "No", "On", "OFF", "True", "TRUE", "False", "FALSE", "Null", "NULL"],
)
def test_a_word_that_yaml_readers_disagree_on_is_refused_unless_quoted(word):
    assert codes(f"a: {word}") == ["yaml_boolean"]
    assert codes(f"{word}: a") == ["yaml_boolean"]
    assert data(f"a: '{word}'") == [{"a": word}]


NUMBERS = [
    *("1:30", "-1:30", "190:20:30.15", "017", "007", "08", "+5", "0x1F", "0b11", "0o17", "1_000"),
    *("1e3", "1.5e3", ".5", "1.", ".inf", "-.Inf", ".nan", ".NaN", "1234567890123456789"),
]


@pytest.mark.parametrize("text", NUMBERS)
def test_a_number_that_yaml_readers_disagree_on_is_refused_unless_quoted(text):
    assert codes(f"a: {text}") == ["yaml_number"]
    assert data(f'a: "{text}"') == [{"a": text}]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2026-01-31", "2026-01-31"),
        ("2026-01-31T10:00:00Z", "2026-01-31T10:00:00Z"),
        ("1.2.3", "1.2.3"),
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("20/hour", "20/hour"),
        ("0", 0),
        ("-7", -7),
        ("0.25", 0.25),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("-a", "-a"),
    ],
)
def test_plain_scalars_have_one_reading(text, value):
    assert data(f"a: {text}") == [{"a": value}]


def test_timestamps_are_strings_and_several_problems_come_at_once():
    assert codes("a: no\nb: 1:30\na: &x 1\n") == ["yaml_boolean", "yaml_number", "yaml_duplicate_key", "yaml_anchor"]


def test_positions_count_characters_from_one():
    document = read("f.yaml", "é: {b: [1, ü, {c: d}]}\ne:\n  f:\n    g: h\n".encode())[0][0]
    assert document.at(("é", "b", 2, "c")) == (1, 19)
    assert document.at(("é", "b", 1)) == (1, 12)
    assert document.at(("e", "f", "g"), key=True) == (4, 5)
    assert document.at(("e", "f", "missing"), key=True) == (3, 3)
    assert document.at(("nothing", "there")) == (1, 1)


def test_documents_are_separate():
    assert data("a: 1\n---\nb: 2\n") == [{"a": 1}, {"b": 2}]


def test_nesting_has_a_bound():
    def nested(depth):
        return "a: " + "[" * (depth - 1) + "]" * (depth - 1)

    assert codes(nested(MAX_DEPTH)) == []
    assert codes(nested(MAX_DEPTH + 2)) == ["yaml_depth"]
    assert codes("- " * 500_000 + "a") == ["yaml_depth"]


def test_size_has_a_bound():
    assert codes("a: " + "b" * (MAX_BYTES - 3)) == []
    assert codes("a: " + "b" * (MAX_BYTES - 2)) == ["yaml_size"]


@pytest.mark.parametrize("content", [b"\xff\xfea\x00", "a: b".encode("utf-16"), b"\xef\xbb\xbfa: b", b"a: \xed\xa0\x80"])
def test_what_is_not_plain_utf_8_is_refused(content):
    assert [finding.code for finding in read("f.yaml", content)[1]] == ["yaml_encoding"]


@pytest.mark.parametrize("character", ["\0", "\x1b", "\x85", "\u2028", "\u202e", "\u2066", "\ufeff", "\uffff"])
def test_characters_that_a_reviewer_cannot_see_are_refused(character):
    assert codes(f"a: 'b{character}'") == ["yaml_character"]


@pytest.mark.parametrize(
    "text",
    [
        "a: ghp_12345678",
        'a: "gh\\x70_12345678"',
        'a: "ghp_\\\n  12345678"',
        "a: >-\n  -----BEGIN RSA\n  PRIVATE KEY",
        "a: '-----BEGIN RSA\n  PRIVATE KEY'",
        "ghp_12345678: a",
        "a: [b, {c: 'x sk_live_1'}]",
    ],
)
def test_a_credential_is_found_however_it_is_written(text):
    assert codes(text) == ["secret_literal"]


@given(st.from_regex(SHAPE), st.text(max_size=5))
def test_what_holds_a_credential_is_looked_at(secret, text):
    assert may_hold(text + secret)


@pytest.mark.parametrize("end", ["", "---\na: [\n"], ids=["whole", "broken off"])
def test_where_things_stand_in_a_file_is_found_out_once_for_all_its_documents(monkeypatch, end):
    made = []

    def loader(text, make=strict_yaml._Loader):
        made.append(text)
        return make(text)

    monkeypatch.setattr(strict_yaml, "_Loader", loader)
    documents, _ = read("f.yaml", ("a: 1\n---\nb:\n  c: 2\n---\nx\n---\nd: 3\n" + end).encode())
    assert [document.at(pointer) for document, pointer in zip(documents, [("a",), ("b", "c"), ("d",)], strict=True)] == [
        (1, 4),
        (4, 6),
        (8, 4),
    ]
    assert len(made) == 2, "once for the data, and once for the places"
