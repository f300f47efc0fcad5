"""The narrowest schemas: what was seen passes, its neighbours don't."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.policy.schema import ParameterSchema
from broker.review.narrowest import OPEN, admitting, exact, opened, unpinned, widened

SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "a", "b", "[redacted]", "no"])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=6
)
BODIES = st.dictionaries(st.sampled_from(["owner", "repo", "n"]), SCALARS, max_size=3)


def admits(schema, value):
    return not ParameterSchema(schema, "").violations(value, "")


def same(one, other):
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@given(VALUES, VALUES)
def test_exactly_one_value_passes(value, other):
    assert admits(exact(value), value)
    assert admits(exact(value), other) == same(value, other)


@given(st.sampled_from(["query", "body", "arguments"]), st.lists(VALUES, min_size=1, max_size=3), VALUES)
def test_exactly_the_values_that_were_seen_pass(location, values, other):
    schema = admitting(location, values)
    assert all(admits(schema, value) for value in values)
    assert admits(schema, other) == any(same(value, other) for value in values)


PATHS = st.fixed_dictionaries({"owner": st.sampled_from("ab"), "repo": st.sampled_from("xyz"), "n": st.integers(1, 3)})


@given(st.lists(PATHS, min_size=1, max_size=4), PATHS)
def test_exactly_the_paths_that_were_seen_pass(values, other):
    schema = admitting("path", values)
    assert all(admits(schema, value) for value in values)
    assert admits(schema, other) == (other in values)


RULES = st.sampled_from(
    [
        {},
        {"properties": {"owner": {"const": "a"}, "repo": {"enum": ["x", "y"]}}},
        {"properties": {"owner": {"const": "a"}, "repo": {"enum": ["x", "y"]}, "n": {"const": 1}}},
        {"properties": {"owner": {"const": "a"}, "n": {"maximum": 1}}},
        {"properties": {"repo": {"pattern": "^x"}}, "required": ["repo"]},
        {
            "properties": {"owner": {"const": "a"}, "repo": {"enum": ["x"]}, "n": {"const": 1}},
            "required": ["owner", "repo", "n"],
            "additionalProperties": False,
        },
        {"properties": {"owner": {"const": "a"}, "repo": {"enum": ["x", "y"], "not": {"const": "y"}}, "n": {"const": 1}}},
        {"properties": {"owner": {"const": "a"}, "repo": {"const": "x", "enum": ["y"]}, "n": {"const": 1}}},
        {"properties": {"owner": {"const": "a"}, "repo": {"enum": ["x", 5], "type": "string"}, "n": {"const": 1, "minimum": 2}}},
        {"anyOf": [{"required": ["n"]}, {"required": ["repo"]}], "properties": {"owner": {"enum": ["a", "b"]}}},
    ]
)


@given(RULES, st.lists(PATHS, min_size=1, max_size=3), PATHS)
def test_a_widened_rule_for_paths_admits_what_it_did_and_what_was_seen_and_nothing_else(old, values, other):
    schema = widened("path", old, values)
    assert all(admits(schema, value) for value in values)
    assert admits(schema, other) == (admits(old, other) or other in values)


@given(RULES, st.lists(BODIES, min_size=1, max_size=3), BODIES)
def test_a_widened_rule_for_bodies_admits_what_it_did_and_what_was_seen_and_nothing_else(old, values, other):
    schema = widened("body", old, values)
    assert all(admits(schema, value) for value in values)
    assert admits(schema, other) == (admits(old, other) or any(same(other, value) for value in values))


@given(RULES, st.lists(PATHS, min_size=1, max_size=2), st.lists(PATHS, min_size=1, max_size=2), PATHS)
def test_widening_again_is_no_wider(old, first, second, other):
    schema = widened("path", widened("path", old, first), second)
    assert admits(schema, other) == (admits(old, other) or other in first or other in second)


def test_a_list_grows_where_that_says_it_all():
    old = {"properties": {"owner": {"const": "acme"}, "repo": {"enum": ["web", "payments"]}}}
    grown = {"properties": {"owner": {"const": "acme"}, "repo": {"enum": ["web", "payments", "mobile"]}}}
    assert widened("path", old, [{"owner": "acme", "repo": "mobile"}]) == grown
    old["properties"]["repo"]["type"] = "string"
    assert widened("path", old, [{"owner": "acme", "repo": "mobile"}]) == grown


def test_what_stands_beside_a_list_stays():
    old = {"properties": {"owner": {"const": "acme"}, "repo": {"enum": ["web", "vault"], "not": {"const": "vault"}}}}
    schema = widened("path", old, [{"owner": "acme", "repo": "mobile"}])
    assert [admits(schema, {"owner": "acme", "repo": repo}) for repo in ("web", "mobile", "vault")] == [True, True, False]


def test_what_credentials_are_narrowed_by_stays():
    old = {"properties": {"owner": {"const": "acme"}, "repo": {"enum": ["web", "payments"]}}}
    schema = widened("path", old, [{"owner": "evil", "repo": "x"}])
    assert schema["properties"] == {"owner": {"enum": ["acme", "evil"]}, "repo": {"enum": ["web", "payments", "x"]}}
    assert not admits(schema, {"owner": "evil", "repo": "web"}), "the two stay tied to each other"


@pytest.mark.parametrize(
    "mark",
    [
        "[redacted]",
        "[pii 12 chars]",
        "[secret number]",
        f"[300 chars sha256:{'0' * 64}]",
        "[9000 bytes left out]",
        "[3 more, too deep]",
        "[number of 90 bits]",
    ],
)
def test_what_the_record_does_not_hold_is_open_and_told(mark):
    value = opened({"a": [{"b": mark}, "[other]"], "c": 1})
    assert list(unpinned(value, "body")) == ["/body/a/0/b"]
    schema = exact(value)
    assert admits(schema, {"a": [{"b": "anything"}, "[other]"], "c": 1})
    assert not admits(schema, {"a": [{"b": "anything"}, "[other]"], "c": 2})
    assert not admits(schema, {"a": [{"b": "anything"}, "[other]", 3], "c": 1})


def test_an_open_part_of_a_path_is_left_out_of_the_rule():
    assert admitting("path", [{"owner": "acme", "id": OPEN}]) == {"properties": {"owner": {"const": "acme"}}}


@pytest.mark.parametrize(
    "value", [{"[redacted]": 1}, {"a": {"[300 chars sha256:" + "0" * 64 + "]": 1}}, "1e-07", "-2.5e+300"], ids=repr
)
def test_what_the_record_writes_otherwise_is_not_pinned(value):
    """A name that is not in the record, or a number with an exponent, which the record writes as text."""
    assert any(unpinned(opened({"a": value})))


@pytest.mark.parametrize("closed", [{}, {"required": ["n"], "additionalProperties": False}], ids=["open", "closed"])
def test_a_list_that_is_not_all_in_the_record_joins_no_list_of_values(closed):
    value = opened({"n": ["[redacted]"]})
    schema = widened("body", {"properties": {"n": {"const": "a"}}, **closed}, [value])
    assert admits(json.loads(json.dumps(schema)), {"n": ["secret"]})
