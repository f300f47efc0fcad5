"""How the core spells places and people, and reads a request's head."""

import pytest

from broker.policy.snapshot import EMPTY, Agent, Endpoint, Operation, Tool
from broker.policy.types import Effect, Request


@pytest.mark.parametrize(
    ("endpoint", "authority", "host_port"),
    [
        pytest.param(Endpoint("https", "a.example", 443), "a.example", "a.example:443", id="the default port is not written"),
        pytest.param(Endpoint("http", "a.example", 80), "a.example", "a.example:80", id="nor that of http"),
        pytest.param(Endpoint("http", "a.example", 443), "a.example:443", "a.example:443", id="another scheme's default is"),
        pytest.param(Endpoint("https", "::1", 443), "[::1]", "[::1]:443", id="IPv6 has brackets"),
        pytest.param(Endpoint("https", "::1", 8443), "[::1]:8443", "[::1]:8443", id="also with a port"),
    ],
)
def test_an_endpoint_is_spelled_as_clients_and_connects_spell_it(endpoint, authority, host_port):
    assert (endpoint.authority, endpoint.host_port) == (authority, host_port)


def test_the_largest_body_of_a_tool_is_that_of_its_largest_operation():
    operations = {name: Operation(name, Effect.READ, "", max_body=size) for name, size in (("a", 10), ("b", 30), ("c", 20))}
    endpoint = Endpoint("https", "a.example", 443)
    assert Tool("t", "team", "rest", endpoint, "", operations).max_body == 30
    assert Tool("t", "team", "rest", endpoint, "", {}).max_body == 0


def test_an_agent_is_described_by_who_it_is_and_who_answers_for_it():
    agent = Agent("bot", "team", "primary", "agents/bot.yaml#", {}, spiffe="spiffe://a/bot", token=True)
    assert agent.described == {"name": "bot", "spiffe": "spiffe://a/bot", "owner": "team", "oncall": "primary"}


def test_without_a_configuration_there_is_nobody_and_nothing():
    assert [*EMPTY.agents, *EMPTY.tools, *EMPTY.hosts, *EMPTY.by_spiffe] == []


def test_a_header_is_read_first_or_all():
    request = Request("GET", "/", "", (("a", "1"), ("b", "2"), ("a", "3")))
    assert (request.header("a"), request.header("c")) == ("1", None)
    assert (request.all("a"), request.all("c")) == (["1", "3"], [])


def test_a_header_counts_only_where_it_stands_once():
    request = Request("GET", "/", "", (("a", "1"), ("b", "1"), ("b", "2")))
    assert (request.only("a"), request.only("b"), request.only("c")) == ("1", None, None)
