"""What a snapshot's parts say of themselves."""

import pytest

from broker.policy.limits import label
from broker.policy.snapshot import Agent, CredentialSpec, Grant
from broker.policy.types import ToolCall


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({}, "the header authorization"),
        ({"header": "x-api-key", "template": "{}"}, "the header x-api-key"),
        ({"basic": ""}, "Basic authentication of ''"),
        ({"sigv4": ("s3", "eu-west-1")}, "an AWS signature for s3 in eu-west-1"),
    ],
    ids=["a bearer", "a header", "a password", "a signature"],
)
def test_where_a_credential_goes_is_told_in_words(where, words):
    assert CredentialSpec("static", {}, **where).placed == words


def test_specs_are_keys_that_differ_by_their_settings():
    assert len({CredentialSpec("oauth", {"scopes": [scope]}) for scope in "aab"}) == 2


@pytest.mark.parametrize(
    ("call", "bound"),
    [
        (ToolCall("wiki", "search"), "of the operation"),
        (ToolCall("wiki", None, housekeeping=True), "of its own traffic"),
        (ToolCall("wiki", None, housekeeping=True, answers=True), "of answers"),
    ],
    ids=["a call", "what keeps the protocol alive", "an answer to the tool"],
)
def test_what_bounds_a_call_depends_on_what_it_is(call, bound):
    own, answers = ({"wiki": (label(name),)} for name in ("of its own traffic", "of answers"))
    grant = Grant("a#", {}, limits=(label("of the operation"),))
    agent = Agent("bot", "team", "night", "a#", {"wiki": {"search": grant}}, housekeeping=own, answers=answers)
    assert agent.bounds(call) == (label(bound),)
