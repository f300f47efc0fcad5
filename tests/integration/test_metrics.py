"""What a running broker tells of itself: /metrics after calls that went well and badly, and `broker agents`."""

import json
import subprocess

import httpx
import pytest
import stack
from prometheus_client.parser import text_string_to_metric_families

from broker.metrics import Metrics, Standing

OPERATIONS = {"get": {"match": {"method": "GET", "path": "/items"}, "effect": "read"}}
LOOPBACK = {"addresses": ["127.0.0.0/8"]}
LIMITS = {"calls": "100/day", "bytes_out": "1MiB/day", "usd": "5/day", "steps_per_run": 40, "concurrency": 8}

pytestmark = pytest.mark.envoy


@pytest.fixture(scope="module")
def place():
    folder = stack.short_folder()
    upstream = stack.Upstream()
    manifests = stack.write_manifests(
        folder / "manifests",
        stack.platform(teams={"team-test": {"oncall": "primary", "ceilings": {"calls": "1000/day"}}}),
        stack.tool("plain", f"http://127.0.0.1:{upstream.port}/v0", OPERATIONS, upstream=LOOPBACK),
        stack.tool("scarce", f"http://127.0.0.1:{upstream.port}/v1", OPERATIONS, upstream=LOOPBACK),
        stack.tool("dead", f"http://127.0.0.1:{stack.free_port()}", OPERATIONS, upstream=LOOPBACK),
        stack.agent(
            "bot",
            {
                "plain": {"operations": {"get": {}}},
                "scarce": {"operations": {"get": {"limits": {"calls": "1/day"}}}},
                "dead": {"operations": {"get": {}}},
            },
            limits=LIMITS,
        ),
        stack.agent("idle", {}),
    )
    broker = stack.Broker(manifests, folder / "state")
    with broker.direct("bot") as client:
        statuses = [client.get("/plain/items").status_code]
        statuses += [client.get("/scarce/items").status_code for _ in range(2)]
        upstream.answer = lambda _: (500, {}, b"")
        statuses += [client.get(f"/{tool}/items").status_code for tool in ("plain", "dead")]
    assert statuses == [200, 200, 429, 500, 503]
    stack.until(lambda: sum(record["event"] == "outcome" for record in broker.records()) == 4)
    yield broker
    broker.stop()
    upstream.close()


def agents(place, *arguments):
    command = [*stack.BROKER, "agents", *arguments, "--state", str(place.state)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_metrics_tell_the_allow_the_denial_and_the_upstreams_errors(place):
    text = httpx.get(f"{place.admin}/metrics").text
    families = list(text_string_to_metric_families(text))
    found = {(sample.name, *sorted(sample.labels.values())): sample.value for family in families for sample in family.samples}
    assert found["broker_decisions_total", "", "allow"] == 4
    assert found["broker_decisions_total", "deny", "rate_limited"] == 1
    assert found["broker_decision_duration_seconds_count", "allow"] == 4
    assert found["broker_upstream_duration_seconds_count", "plain"] == 2
    assert found["broker_upstream_errors_total", "5xx", "plain"] == 1
    assert found["broker_upstream_errors_total", "dead", "unreached"] == 1
    assert ("broker_upstream_errors_total", "5xx", "scarce") not in found
    assert found["broker_budget_spent", "agent/bot", "calls"] == 4
    assert found["broker_budget_limit", "agent/bot", "calls"] == 100
    assert found["broker_budget_spent", "agent/bot/scarce/get", "calls"] == 1
    assert found["broker_budget_spent", "calls", "team/team-test"] == 4
    assert found["broker_configuration_info", place.ready["revision"]] == 1
    healthy = ("configuration_current", "envoy_accepted", "audit_writable", "ledger_up")
    assert [found[(f"broker_{name}",)] for name in healthy] == [1, 1, 1, 1]
    assert found[("broker_ledger_open_calls",)] == 0
    standing = Standing(revision="r", current=True, accepted=True, audit_writable=True, open_calls=0)
    ours = {family.name for family in text_string_to_metric_families(Metrics().exposition(standing).decode())}
    assert {family.name for family in families} == ours


def test_agents_show_tells_each_limit_with_what_is_left_of_it(place):
    done = agents(place, "show", "bot", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert found["agent"] == {"name": "bot", "spiffe": "", "owner": "team-test", "oncall": "test-primary"}
    assert found["tools"] == {"plain": ["get"], "scarce": ["get"], "dead": ["get"]}
    limits = {(limit["scope"], limit["limit"]): limit for limit in found["limits"]}
    calls = limits["agent/bot", "calls"]
    assert {name: calls[name] for name in ("written", "unit", "amount", "spent", "left", "per_run")} == {
        "written": "calls: 100/day", "unit": "calls", "amount": 100, "spent": 4, "left": 96, "per_run": False,
    }  # fmt: skip
    assert calls["renews"].endswith("T00:00:00.000000Z")
    assert 0 < calls["renews_in"] <= 86_400
    assert (limits["agent/bot/scarce/get", "calls"]["left"], limits["team/team-test", "calls"]["left"]) == (0, 996)
    assert (limits["agent/bot", "usd"]["amount"], limits["agent/bot", "usd"]["left"]) == (5, 5)
    assert limits["agent/bot", "steps_per_run"]["per_run"] is True
    assert limits["agent/bot", "steps_per_run"]["spent"] is None


def test_agents_list_names_each_agent_and_what_it_used_today(place):
    assert json.loads(agents(place, "list", "--json").stdout)["agents"] == [
        {"name": "bot", "owner": "team-test", "tools": ["dead", "plain", "scarce"], "standing": [], "tokens": None, "usd": 0.0},
        {"name": "idle", "owner": "team-test", "tools": [], "standing": [], "tokens": None, "usd": None},
    ]
    head = agents(place, "list").stdout.splitlines()[0]
    assert head.split() == ["NAME", "OWNER", "STANDING", "TOKENS", "TODAY", "USD", "TODAY", "TOOLS"]


def test_an_agent_that_no_manifest_names_is_wrong_usage(place):
    done = agents(place, "show", "ghost")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "broker: no manifest names an agent 'ghost'; see `broker agents list`\n"


def test_without_a_running_broker_nothing_is_known_and_nothing_is_made(tmp_path):
    command = [*stack.BROKER, "agents", "list", "--state", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, (tmp_path / "none").exists()) == (2, False)
    (tmp_path / "was" / "keys").mkdir(parents=True)
    (tmp_path / "was" / "keys" / "tokens.key").touch()
    done = subprocess.run([*command[:-1], str(tmp_path / "was")], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr == (
        f"broker: no broker runs on {tmp_path / 'was'}; start it with `broker up`, or name another's folder with --state\n"
    )
