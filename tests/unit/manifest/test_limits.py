"""From written limits and prices to those that a ledger counts: what they mean, whose they are, in which order, and where."""

import json
from pathlib import Path
from typing import Any

import pytest

from broker.manifest.load import load_texts
from broker.policy.limits import NANO, WORDS, Kind, Limit, Price
from broker.policy.snapshot import PolicySnapshot

OPERATIONS = {
    "get": {"match": {"method": "GET", "path": "/"}, "effect": "read"},
    "put": {"match": {"method": "PUT", "path": "/"}, "effect": "write"},
    "drop/all": {"match": {"method": "DELETE", "path": "/"}, "effect": "destructive"},
}
MODELS = {"responses": {"effect": "read"}}
NAMED = {"params": {"body": {"properties": {"model": {"const": "m"}}}}}


def document(kind: str, name: str, spec: dict[str, Any], owner: str = "team-a") -> bytes:
    metadata = {"name": name, "owner": owner, **({"oncall": "x"} if kind == "Agent" else {})}
    return json.dumps({"apiVersion": "broker/v1", "kind": kind, "metadata": metadata, "spec": spec}).encode()


def compiled(
    limits: Any = None, tool: Any = None, operation: Any = None, platform: Any = None, owner: str = "team-a"
) -> PolicySnapshot:
    """An agent with a REST tool, an MCP server and a model provider; `operation` bounds `drop/all` and `responses`."""
    own = {"limits": operation} if operation else {}
    shared = {"limits": tool} if tool else {}
    tools = {
        "rest": {"operations": {"get": {}, "put": {}, "drop/all": own}, **shared},
        "gpt": {"operations": {"responses": {**NAMED, **own}}, **shared},
    }
    agent = {"identity": {"token": True}, "tools": tools, **({"limits": limits} if limits else {})}
    texts = {
        "t.yaml": document("Tool", "rest", {"protocol": "rest", "endpoint": "https://r.example", "operations": OPERATIONS}),
        "g.yaml": document("Tool", "gpt", {"protocol": "openai", "endpoint": "https://g.example", "operations": MODELS}),
        "p.yaml": document("Platform", "p", platform or {}),
        "a.yaml": document("Agent", "bot", agent, owner),
    }
    loaded = load_texts(texts, Path())
    assert loaded.snapshot is not None, loaded.findings
    return loaded.snapshot


def only(written: dict[str, Any]) -> Limit:
    """The one limit that this compiles to; of what stands beside it, nothing."""
    [limit] = compiled(limits=written).agents["bot"].limits
    return limit


@pytest.mark.parametrize(
    ("written", "amount", "per"),
    [
        ({"calls": "20/hour"}, 20, 3600), ({"calls": "20/h"}, 20, 3600), ({"calls": "1/s"}, 1, 1), ({"calls": "5/min"}, 5, 60),
        ({"calls": "5/minute"}, 5, 60), ({"calls": "5/d"}, 5, 86400), ({"calls": "0/day"}, 0, 86400),
        ({"writes": "1.5k/day"}, 1500, 86400), ({"destructive": "1/day"}, 1, 86400), ({"runs": "30/hour"}, 30, 3600),
        ({"tokens": "2M/day"}, 2_000_000, 86400), ({"input_tokens": "0.5G/day"}, 500_000_000, 86400),
        ({"output_tokens": "0.25k/s"}, 250, 1), ({"cached_tokens": "7/h"}, 7, 3600),
        ({"bytes_out": "50MiB/day"}, 50 << 20, 86400), ({"bytes_out": "1.5KiB/h"}, 1536, 3600), ({"bytes_out": "9/s"}, 9, 1),
        ({"usd": "50/day"}, 50 * NANO, 86400), ({"usd": "0.000000001/day"}, 1, 86400), ({"usd": "2.50/h"}, 5 * NANO // 2, 3600),
        ({"concurrency": 8}, 8, 0), ({"steps_per_run": 40}, 40, 0), ({"identical_per_run": 3}, 3, 0),
        ({"time_per_run": "30m"}, 1800, 0), ({"tokens_per_run": "200k"}, 200_000, 0), ({"tokens_per_run": 7}, 7, 0),
        ({"usd_per_run": 2.5}, 5 * NANO // 2, 0), ({"usd_per_run": "0.10"}, NANO // 10, 0), ({"usd_per_run": 3}, 3 * NANO, 0),
    ],
    ids=str,
)  # fmt: skip
def test_a_written_amount_is_a_whole_number_in_the_unit_of_what_is_counted(written, amount, per):
    limit = only(written)
    [word] = written
    assert (limit.word, limit.amount, limit.per, limit.burst) == (word, amount, per, 0)
    assert (limit.kind, limit.measure) == WORDS[word]
    assert (limit.scope, limit.rule) == ("agent/bot", f"a.yaml#/spec/limits/{word}")


@pytest.mark.parametrize(
    ("written", "amount", "burst"),
    [({"rate": "10/s"}, 10, 10), ({"rate": "10/s", "burst": 50}, 10, 50), ({"rate": "10/s", "burst": 1}, 10, 1)],
    ids=["its own amount", "more", "less"],
)
def test_a_rates_bucket_holds_its_burst_and_without_one_its_amount(written, amount, burst):
    limit = only(written)
    assert (limit.kind, limit.amount, limit.burst) == (Kind.RATE, amount, burst)


def test_every_word_can_be_written():
    rates = {word: "1/h" for word, (kind, _) in WORDS.items() if kind in (Kind.WINDOW, Kind.RATE) and word != "approval"}
    rest = {
        "concurrency": 1,
        "steps_per_run": 1,
        "identical_per_run": 1,
        "time_per_run": "1s",
        "tokens_per_run": 1,
        "usd_per_run": 1,
    }
    assert [limit.word for limit in compiled(limits={**rest, **rates}).agents["bot"].limits] == [
        word for word in WORDS if word not in ("approval", "label", "flow")
    ]


PLATFORM = {
    "environment": "production",
    "ceilings": {"calls": "5/h", "tokens": "5/h", "writes": "5/h"},
    "teams": {"team-a": {"ceilings": {"calls": "4/h"}}, "team-b": {"ceilings": {"calls": "9/h"}}},
}
FULL = {"limits": {"calls": "3/h", "bytes_out": "3/h", "rate": "3/h"}, "tool": {"calls": "2/h"}, "operation": {"calls": "1/h"}}


def test_a_call_is_bound_by_its_operations_limits_then_the_tools_the_agents_the_teams_and_the_environments():
    grants = compiled(**FULL, platform=PLATFORM).agents["bot"].tools["rest"]
    assert [(limit.scope, limit.word, limit.rule) for limit in grants["drop/all"].limits] == [
        ("agent/bot/rest/drop/all", "calls", "a.yaml#/spec/tools/rest/operations/drop~1all/limits/calls"),
        ("agent/bot/rest", "calls", "a.yaml#/spec/tools/rest/limits/calls"),
        ("agent/bot", "rate", "a.yaml#/spec/limits/rate"),
        ("agent/bot", "calls", "a.yaml#/spec/limits/calls"),
        ("agent/bot", "bytes_out", "a.yaml#/spec/limits/bytes_out"),
        ("team/team-a", "calls", "p.yaml#/spec/teams/team-a/ceilings/calls"),
        ("environment/production", "calls", "p.yaml#/spec/ceilings/calls"),
        ("environment/production", "writes", "p.yaml#/spec/ceilings/writes"),
    ]


@pytest.mark.parametrize(
    ("tool", "operation", "on"),
    [
        pytest.param("rest", "get", {("agent/bot/rest", "calls")}, id="a read is no write, and has no tokens"),
        pytest.param("rest", "put", {("agent/bot/rest", "calls"), ("environment/production", "writes")}, id="a write"),
        pytest.param(
            "gpt", "responses", {("agent/bot/gpt/responses", "calls"), ("environment/production", "tokens")}, id="a model"
        ),
    ],
)
def test_a_call_is_bound_by_what_it_spends_and_no_more(tool, operation, on):
    found = {
        (limit.scope, limit.word) for limit in compiled(**FULL, platform=PLATFORM).agents["bot"].tools[tool][operation].limits
    }
    every = {("environment/production", "writes"), ("environment/production", "tokens"), ("agent/bot/gpt/responses", "calls")}
    assert on <= found
    assert not (every - on) & found


def test_a_protocols_own_traffic_is_bound_by_rates_and_bytes_alone():
    agent = compiled(**FULL, platform=PLATFORM).agents["bot"]
    assert [(limit.scope, limit.word) for limit in agent.housekeeping["rest"]] == [
        ("agent/bot", "rate"),
        ("agent/bot", "bytes_out"),
    ]


@pytest.mark.parametrize(
    ("denied", "of"),
    [
        pytest.param({"egress": "external"}, {"housekeeping", "answers"}, id="whatever goes out"),
        pytest.param({"effect": "write", "egress": "external"}, {"answers"}, id="what an answer to a tool's question does"),
        pytest.param({"effect": "read"}, set(), id="neither is a read"),
        pytest.param({"egress": "internal"}, set(), id="where the tool is not"),
    ],
)
def test_a_protocols_own_traffic_is_under_flow_rules_that_nobody_lifts(denied, of):
    flow = [{"after": ["pii"], "deny": denied, "unless": "approval"}]
    agent = compiled(**FULL, platform={**PLATFORM, "flow": flow}).agents["bot"]
    found = {name: [each for each in getattr(agent, name)["rest"] if each.word == "flow"] for name in ("housekeeping", "answers")}
    assert {name for name, bounds in found.items() if bounds} == of
    assert all(each.unless is None for bounds in found.values() for each in bounds)


def test_an_agent_knows_all_of_its_limits_each_once():
    limits = compiled(**FULL, platform=PLATFORM).agents["bot"].limits
    assert len(limits) == len(set(limits)) == 3 + 2 + 2 + 1 + 3
    assert {limit.scope for limit in limits} == {
        "agent/bot", "agent/bot/rest", "agent/bot/rest/drop/all", "agent/bot/gpt", "agent/bot/gpt/responses", "team/team-a",
        "environment/production",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("owner", "scopes"),
    [
        pytest.param("team-b", ["team/team-b", "environment/production"], id="its own team's"),
        pytest.param("team-c", ["environment/production"], id="no team's"),
    ],
)
def test_an_agent_is_bound_by_the_ceilings_of_the_team_that_owns_it(owner, scopes):
    grant = compiled(platform=PLATFORM, owner=owner).agents["bot"].tools["rest"]["get"]
    assert [limit.scope for limit in grant.limits] == scopes


def test_without_a_platform_policy_there_are_no_ceilings():
    assert compiled().agents["bot"].limits == ()


def test_another_amount_is_another_revision_under_the_same_key():
    before, after = compiled(limits={"calls": "20/hour"}), compiled(limits={"calls": "30/hour"})
    assert before.revision != after.revision
    assert before.agents["bot"].limits[0].key == after.agents["bot"].limits[0].key


@pytest.mark.parametrize(
    ("written", "price"),
    [
        pytest.param({"input": 0.25, "output": 2, "cached": 0.025, "cache_write": 0.3}, (0.25, 2, 0.025, 0.3), id="all of it"),
        pytest.param({"input": 0.25, "output": "2.00"}, (0.25, 2, 0.25, 0.5), id="the cache as input, and twice it to write"),
        pytest.param({"input": 0, "output": 0}, (0, 0, 0, 0), id="nothing"),
    ],
)
def test_a_price_is_in_billionths_for_a_million_tokens(written, price):
    snapshot = compiled(platform={"prices": {"openai": {"m": written}}})
    assert snapshot.prices == {("openai", "m"): Price(*(round(part * NANO) for part in price))}


def test_reads_pass_without_redis_only_where_the_platform_says_so():
    assert compiled().unsafe_reads is False
    assert compiled(platform={"ledger": {"unsafe_reads_without_redis": False}}).unsafe_reads is False
    assert compiled(platform={"ledger": {"unsafe_reads_without_redis": True}}).unsafe_reads is True
