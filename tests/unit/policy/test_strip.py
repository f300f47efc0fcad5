"""What an agent brings of its own comes off before anyone judges it, and what the tool declares stays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.policy.schema import ParameterSchema
from broker.policy.snapshot import CredentialSpec, Endpoint, Operation, Tool
from broker.policy.strip import is_stripped, strip
from broker.policy.types import Effect, Request

PAGED = ParameterSchema({"type": "object", "properties": {"key": {"type": "string"}}}, "tools/t.yaml#/query")
ANY = ParameterSchema({"type": "object"}, "tools/t.yaml#/query")
OPERATIONS = {
    "plain": Operation("plain", Effect.READ, "tools/t.yaml#/plain"),
    "any": Operation("any", Effect.READ, "tools/t.yaml#/any", schemas={"query": ANY}),
}
TOOL = Tool("t", "team", "rest", Endpoint("https", "t.example", 443), "tools/t.yaml#", OPERATIONS)
KEYED = Tool(
    "k", "team", "rest", Endpoint("https", "k.example", 443), "tools/k.yaml#",
    {**OPERATIONS, "find": Operation("find", Effect.READ, "tools/k.yaml#/find", schemas={"query": PAGED})},
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "authorization", "proxy-authorization", "cookie", "x-api-key", "x-agent-id", "x-forwarded-client-cert", "x-forwarded-for",
        "x-broker-decision", "x-broker-token", "x-envoy-original-path", "forwarded", "via", "x-http-method-override",
        "x_broker_decision", "x_api_key", "x-api_key", "x_forwarded_for", "x_envoy_retry_on", "x_http_method_override",
    ],
)  # fmt: skip
def test_a_claim_or_credential_is_stripped_however_it_is_spelled(name):
    assert is_stripped(name)


@pytest.mark.parametrize("name", ["accept", "content-type", "x-request-id", "xbroker", "idempotency-key", "mcp-session-id", ""])
def test_what_says_nothing_of_the_agent_stays(name):
    assert not is_stripped(name)


def test_every_occurrence_goes_and_the_rest_keeps_its_order():
    sent = (("b", "1"), ("cookie", "x"), ("a", "2"), ("x_agent_id", "me"), ("cookie", "y"), ("b", "3"))
    found = strip(TOOL, Request("GET", "/base/x", "", sent), "/x")
    assert found.request == Request("GET", "/x", "", (("b", "1"), ("a", "2"), ("b", "3")))
    assert (found.removed, found.query_changed) == (("cookie", "x_agent_id"), False)


@pytest.mark.parametrize("name", ["x-crm-secret", "x_crm_secret", "x-crm_secret"])
def test_what_stands_where_the_tools_own_credential_goes_is_the_agents_credential_however_it_is_spelled(name):
    tool = Tool("t", "team", "rest", TOOL.endpoint, "r#", OPERATIONS, credential=CredentialSpec("static", {}, "x-crm-secret"))
    found = strip(tool, Request("GET", "/x", "", ((name, "mine"), ("a", "1"))), "/x")
    assert (found.request.headers, found.removed, found.credential) == ((("a", "1"),), (name,), name)


def test_nothing_to_strip_changes_nothing():
    sent = (("accept", "*/*"),)
    found = strip(TOOL, Request("GET", "/x", "page=2&q=", sent), "/x")
    assert (found.request.headers, found.removed, found.request.query, found.query_changed) == (sent, (), "page=2&q=", False)


@pytest.mark.parametrize(
    ("tool", "query", "kept"),
    [
        pytest.param(TOOL, "access_token=mine", "", id="alone"),
        pytest.param(TOOL, "page=2&access_token=mine&q=1", "page=2&q=1", id="among others"),
        pytest.param(TOOL, "access_token=a&page=2&access_token=b", "page=2", id="every occurrence"),
        pytest.param(TOOL, "ACCESS_TOKEN=mine&page=2", "page=2", id="in another case"),
        pytest.param(TOOL, "access%5Ftoken=mine&page=2", "page=2", id="percent-encoded"),
        pytest.param(TOOL, "api_key&page=2", "page=2", id="without a value"),
        pytest.param(TOOL, "key=mine", "", id="a word that no operation declares"),
        pytest.param(KEYED, "key=mine", "key=mine", id="a word that an operation declares stays"),
        pytest.param(KEYED, "Key=mine", "", id="but not in another case"),
        pytest.param(KEYED, "key=mine&token=x", "key=mine", id="and no other word with it"),
        pytest.param(TOOL, "q=access_token%3Dmine", "q=access_token%3Dmine", id="a value is no name"),
        pytest.param(TOOL, "q=%zz", "q=%zz", id="what can't be decoded is left to be refused"),
    ],
)
def test_a_credential_in_the_query_goes_unless_an_operation_declares_it(tool, query, kept):
    found = strip(tool, Request("GET", "/x", query, ()), "/x")
    assert (found.request.query, found.query_changed) == (kept, kept != query)


@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=4)), max_size=5), st.text(max_size=30))
def test_stripping_twice_is_stripping_once(headers, query):
    once = strip(TOOL, Request("GET", "/x", query, tuple(headers)), "/x").request
    assert strip(TOOL, once, "/x").request == once
    assert not any(is_stripped(name) for name, _ in once.headers)


SIGNED = Tool(
    "s3", "team", "rest", Endpoint("https", "s3.example", 443), "tools/s3.yaml#", OPERATIONS,
    credential=CredentialSpec("aws-sts", {}, sigv4=("s3", "eu-central-1")),
)  # fmt: skip


def test_of_a_signed_request_nothing_is_the_agents_that_the_signature_would_vouch_for():
    sent = (("accept", "*/*"), ("x-amz-copy-source", "/other/object"), ("amz-sdk-request", "1"), ("x_amz_acl", "public-read"))
    assert strip(SIGNED, Request("GET", "/", "", sent), "/").request.headers == (("accept", "*/*"),)
    assert strip(TOOL, Request("GET", "/", "", sent), "/").request.headers == sent


@pytest.mark.parametrize("query", ["X-Amz-Signature=1", "x-amz-credential=1", "AWSAccessKeyId=1", "Signature=1"])
def test_a_presigned_query_loses_its_signature(query):
    assert strip(TOOL, Request("GET", "/", f"a=1&{query}", ()), "/").request.query == "a=1"


@pytest.mark.parametrize(
    ("headers", "query", "found"),
    [
        pytest.param((("authorization", "x"),), "", "authorization", id="a header"),
        pytest.param((("x_api_key", "x"),), "", "x_api_key", id="a header, spelled otherwise"),
        pytest.param((), "token=x", "the query", id="the query"),
        pytest.param((("x-forwarded-for", "x"), ("proxy-authorization", "x")), "", "", id="claims, and what is for the broker"),
        pytest.param((), "a=1", "", id="nothing"),
    ],
)
def test_where_an_agent_sent_a_credential_of_its_own_is_told(headers, query, found):
    assert strip(TOOL, Request("GET", "/", query, headers), "/").credential == found
