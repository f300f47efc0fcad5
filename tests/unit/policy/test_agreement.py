"""Everything that names the destination names the same one, in one spelling: verdict and reason, place by place."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.policy.agreement import Wire, connect_target, destination, split_authority
from broker.policy.snapshot import Endpoint, PolicySnapshot, Tool
from broker.policy.types import Code, Decision, Door

TOOLS = {
    name: Tool(name, "team", "rest", endpoint, f"tools/{name}.yaml#", {})
    for name, endpoint in {
        "api": Endpoint("https", "api.example", 443),
        "alt": Endpoint("https", "api.example", 8443),
        "v1": Endpoint("https", "both.example", 443, "/v1"),
        "v2": Endpoint("https", "both.example", 443, "/v2/x"),
        "plain": Endpoint("http", "127.0.0.1", 8080),
        "four": Endpoint("https", "10.0.0.7", 443),
        "six": Endpoint("https", "2001:db8::7", 443),
    }.items()
}


def by_place():
    places = {}
    for tool in TOOLS.values():
        endpoint = tool.endpoint
        places.setdefault((endpoint.scheme, endpoint.host, endpoint.port), []).append(tool)
    return {place: tuple(tools) for place, tools in places.items()}


SNAPSHOT = PolicySnapshot("sha256:1", {}, TOOLS, by_place(), {})


def wire(authority, path="/x", **given_):
    parts = {"door": Door.PROXY, "scheme": "https", "sni": "", "connect": "", "route": None} | given_
    return Wire(
        parts["door"], parts["scheme"], authority, path, parts["sni"], connect_host=parts["connect"], route_tool=parts["route"]
    )


def tunnel(authority, connect, sni, **given_):
    return wire(authority, sni=sni, connect=connect, **given_)


@pytest.mark.parametrize(
    ("request_", "tool", "path"),
    [
        pytest.param(wire("/", "/api", door=Door.BASE_URL), "api", "/", id="base-url: a tool alone is its root"),
        pytest.param(wire("any", "/api/", door=Door.BASE_URL), "api", "/", id="base-url: with a slash, too"),
        pytest.param(
            wire("any", "/api/a/b", door=Door.BASE_URL, route="api"), "api", "/a/b", id="base-url: the rest is the path"
        ),
        pytest.param(tunnel("api.example", "api.example:443", "api.example"), "api", "/x", id="all three agree"),
        pytest.param(tunnel("api.example:443", "api.example:443", "api.example"), "api", "/x", id="the default port may be said"),
        pytest.param(
            tunnel("api.example:8443", "api.example:8443", "api.example"), "alt", "/x", id="another port is another tool"
        ),
        pytest.param(tunnel("10.0.0.7", "10.0.0.7:443", ""), "four", "/x", id="no SNI for an IPv4 address"),
        pytest.param(tunnel("[2001:db8::7]", "[2001:db8::7]:443", ""), "six", "/x", id="no SNI for an IPv6 address"),
        pytest.param(
            tunnel("127.0.0.1:8080", "127.0.0.1:8080", "", scheme="http"), "plain", "/x", id="plain HTTP in a tunnel has no SNI"
        ),
        pytest.param(wire("127.0.0.1:8080", scheme="http", route="plain"), "plain", "/x", id="absolute-form, outside a tunnel"),
        pytest.param(wire("both.example", "/v1/a"), "v1", "/a", id="the base path is taken off"),
        pytest.param(wire("both.example", "/v1"), "v1", "/", id="the base path alone is the root"),
        pytest.param(wire("both.example", "/v2/x/a"), "v2", "/a", id="tools at one host are told apart by base path"),
    ],
)
def test_what_agrees_leads_to_one_tool_and_the_path_below_it(request_, tool, path):
    assert destination(SNAPSHOT, request_) == (TOOLS[tool], path)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        pytest.param(wire("a,b", "/api/x", door=Door.BASE_URL), Code.PROTOCOL_VIOLATION, id="two hosts, at the base-url door"),
        pytest.param(
            tunnel("api.example,b", "api.example:443", "api.example"),
            Code.PROTOCOL_VIOLATION,
            id="two hosts come before mismatch",
        ),
        pytest.param(wire("any", "/nobody/x", door=Door.BASE_URL), Code.TOOL_NOT_DECLARED, id="base-url: no such tool"),
        pytest.param(wire("any", "/", door=Door.BASE_URL), Code.TOOL_NOT_DECLARED, id="base-url: no tool at all"),
        pytest.param(wire("any", "/API/x", door=Door.BASE_URL), Code.TOOL_NOT_DECLARED, id="base-url: another case"),
        pytest.param(wire("any", "//api/x", door=Door.BASE_URL), Code.TOOL_NOT_DECLARED, id="base-url: an empty segment first"),
        pytest.param(
            wire("any", "/api/x", door=Door.BASE_URL, route="alt"), Code.AUTHORITY_MISMATCH, id="base-url: routed to another tool"
        ),
        pytest.param(wire("evil.example"), Code.HOST_NOT_DECLARED, id="an undeclared host"),
        pytest.param(wire(""), Code.HOST_NOT_DECLARED, id="no host"),
        pytest.param(wire("api.example", scheme="http"), Code.HOST_NOT_DECLARED, id="another scheme"),
        pytest.param(wire("api.example", scheme=""), Code.HOST_NOT_DECLARED, id="no scheme"),
        pytest.param(wire("API.example"), Code.HOST_NOT_DECLARED, id="another case"),
        pytest.param(wire("api.example."), Code.HOST_NOT_DECLARED, id="a trailing dot"),
        pytest.param(wire("u@api.example"), Code.HOST_NOT_DECLARED, id="user information"),
        pytest.param(wire("api.example:0443"), Code.HOST_NOT_DECLARED, id="a port with a leading zero"),
        pytest.param(wire("api.example:"), Code.HOST_NOT_DECLARED, id="an empty port"),
        pytest.param(wire("api.example:\u0664\u0664\u0663"), Code.HOST_NOT_DECLARED, id="a port in other digits"),
        pytest.param(wire("api.example:100443"), Code.HOST_NOT_DECLARED, id="a port that wraps"),
        pytest.param(wire("[api.example]"), Code.HOST_NOT_DECLARED, id="a name in brackets"),
        pytest.param(wire("[10.0.0.7]:443"), Code.HOST_NOT_DECLARED, id="an IPv4 address in brackets"),
        pytest.param(wire("2001:db8::7:443"), Code.HOST_NOT_DECLARED, id="an IPv6 address without brackets"),
        pytest.param(
            tunnel("api.example", "alt.example:443", "api.example"), Code.AUTHORITY_MISMATCH, id="the tunnel leads elsewhere"
        ),
        pytest.param(
            tunnel("api.example", "api.example:8443", "api.example"), Code.AUTHORITY_MISMATCH, id="the tunnel has another port"
        ),
        pytest.param(
            tunnel("evil.example", "api.example:443", "api.example"), Code.AUTHORITY_MISMATCH, id="an undeclared host in a tunnel"
        ),
        pytest.param(tunnel("api.example", "api.example:443", "both.example"), Code.AUTHORITY_MISMATCH, id="SNI names another"),
        pytest.param(
            tunnel("127.0.0.1:8080", "127.0.0.1:8080", "api.example", scheme="http"),
            Code.AUTHORITY_MISMATCH,
            id="SNI names another, and the request says that it is plain",
        ),
        pytest.param(tunnel("api.example", "api.example:443", ""), Code.AUTHORITY_MISMATCH, id="no SNI where a name has one"),
        pytest.param(tunnel("10.0.0.7", "10.0.0.7:443", "api.example"), Code.AUTHORITY_MISMATCH, id="SNI to an address"),
        pytest.param(
            tunnel("10.9.9.9", "10.9.9.9:443", ""), Code.AUTHORITY_MISMATCH, id="no SNI to an address that nobody declared"
        ),
        pytest.param(
            tunnel("api.example:443", "api.example:443", "", scheme="http"),
            Code.HOST_NOT_DECLARED,
            id="no TLS in a tunnel to https",
        ),
        pytest.param(wire("both.example", "/v1x"), Code.OPERATION_NOT_DECLARED, id="beside the base path"),
        pytest.param(wire("both.example", "/"), Code.OPERATION_NOT_DECLARED, id="above the base paths"),
        pytest.param(wire("api.example", route="alt"), Code.AUTHORITY_MISMATCH, id="Envoy routed it to another tool"),
        pytest.param(wire("api.example", route=""), Code.AUTHORITY_MISMATCH, id="Envoy routed it nowhere"),
    ],
)
def test_what_disagrees_is_refused_with_its_reason(request_, code):
    found = destination(SNAPSHOT, request_)
    assert isinstance(found, Decision)
    assert (found.allowed, found.code) == (False, code)
    assert found.detail


@pytest.mark.parametrize(
    ("target", "names"),
    [
        pytest.param("api.example:443", ["api"], id="declared"),
        pytest.param("both.example:443", ["v1", "v2"], id="two tools at one place"),
        pytest.param("[2001:db8::7]:443", ["six"], id="IPv6"),
        pytest.param("127.0.0.1:8080", ["plain"], id="plain HTTP"),
        pytest.param("api.example", [], id="no port"),
        pytest.param("api.example:80", [], id="another port"),
        pytest.param("Api.example:443", [], id="another case"),
        pytest.param("api.example.:443", [], id="a trailing dot"),
        pytest.param("2001:db8::7:443", [], id="IPv6 without brackets"),
        pytest.param("api.example:0443", [], id="a port with a zero before it"),
        pytest.param("[api.example]:443", [], id="a name in brackets"),
        pytest.param("", [], id="nothing"),
    ],
)
def test_a_connect_reaches_the_tools_at_exactly_that_place(target, names):
    assert [tool.name for tool in connect_target(SNAPSHOT, target)] == names


def test_a_connect_is_looked_up_not_searched_for():
    class Hosts(dict):
        def items(self):
            raise AssertionError("all hosts were looked at")

        __iter__ = keys = values = items

    snapshot = replace(SNAPSHOT, hosts=Hosts(SNAPSHOT.hosts))
    assert [tool.name for tool in connect_target(snapshot, "api.example:443")] == ["api"]


@pytest.mark.parametrize(
    ("scheme", "authority", "place"),
    [
        pytest.param("https", "a.example", ("a.example", 443), id="the default port of https"),
        pytest.param("http", "a.example", ("a.example", 80), id="the default port of http"),
        pytest.param("ftp", "a.example", ("a.example", -1), id="no default port"),
        pytest.param("https", "[::1]", ("::1", 443), id="IPv6 without a port"),
        pytest.param("https", "[::1]:1", ("::1", 1), id="IPv6 with a port"),
        pytest.param("https", "a.example:+1", ("a.example", -1), id="a signed port"),
    ],
)
def test_an_authority_is_split_without_repair(scheme, authority, place):
    assert split_authority(scheme, authority) == place


WIRES = st.builds(
    Wire,
    door=st.sampled_from(Door),
    scheme=st.sampled_from(["http", "https", ""]),
    authority=st.text(max_size=20),
    path=st.text(max_size=20).map("/".__add__),
    sni=st.text(max_size=20),
    connect_host=st.text(max_size=20),
    route_tool=st.none() | st.sampled_from(sorted(TOOLS)),
)


@given(WIRES)
def test_whatever_comes_is_a_tool_or_a_denial(found):
    verdict = destination(SNAPSHOT, found)
    assert isinstance(verdict, tuple) or verdict.code
