"""What a snapshot's parts say of themselves."""

import pytest

from broker.policy.snapshot import CredentialSpec


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
