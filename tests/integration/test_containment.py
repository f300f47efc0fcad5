"""Agents that turn anomalous, with a real Envoy: what is seen, what is done about it by itself, and who is told."""

import json
import shutil
import subprocess
import time
from types import SimpleNamespace

import httpx
import pytest
import stack
from fakes.pagerduty import KEY, PagerDuty
from fakes.serving import served
from fakes.webhook import SECRET, Webhook
from streams import Events, base_url_stream

from broker import clock

pytestmark = pytest.mark.envoy

LOOPBACK = {"addresses": ["127.0.0.0/8", "::1/128"]}
NOTE = {"type": "object", "properties": {"text": {"type": "string", "maxLength": 2000}}, "additionalProperties": False}
OPERATIONS = {
    "items.get": {"match": {"method": "GET", "path": "/items/{id}"}, "effect": "read"},
    "notes.create": {"match": {"method": "POST", "path": "/notes"}, "effect": "write", "params": {"body": NOTE}},
    "items.delete": {"match": {"method": "DELETE", "path": "/items/{id}"}, "effect": "destructive"},
}
ALL = {"operations": {name: {} for name in OPERATIONS}}
INJECTED, DECOY = "injected-credential-0123456789abcdef", "planted-decoy-9876543210fedcba"
NAMES = ("burst", "imitated", "imitator", "decoyed", "header", "touched", "leaky", "deleter", "quiet", "unheard", "lone")
CONTAINMENT = {
    "denied_burst": {"count": 5, "window": "1m", "action": "revoke_agent"},
    "destructive_spike": {"count": 3, "window": "1m", "action": "read_only"},
    "probing": {"count": 4, "window": "1m", "action": "revoke_run", "shadow": True},
    "write_spike": {"count": 4, "window": "1m", "action": "hold"},
    "honeytoken": {"hosts": ["vault-backup.internal.example"], "tools": ["payroll"], "credentials": [{"env": "DECOY_KEY"}]},
}


@pytest.fixture(scope="module")
def place():
    folder, pager, hook = stack.short_folder(), PagerDuty(), Webhook()
    api, payroll, events = stack.Upstream(), stack.Upstream(), Events()
    with served(pager), served(hook):
        pager.now = hook.now = clock.now()
        alerts = {
            "routes": [{"match": {"severity": "high"}, "to": "pagerduty"}, {"to": "chat"}],
            "pagerduty": {"routing_key": {"env": "PD_KEY"}, "url": pager.enqueue},
            "webhooks": {"chat": {"url": hook.inbox, "secret": {"env": "CHAT_SECRET"}}},
            "fallback": "chat",
        }
        static = {"issuer": "static", "secret": {"env": "API_KEY"}}
        stack.write_manifests(
            folder / "manifests",
            stack.tool("api", f"http://127.0.0.1:{api.port}", OPERATIONS, upstream=LOOPBACK, credential=static),
            stack.tool("payroll", f"http://127.0.0.1:{payroll.port}", OPERATIONS, upstream=LOOPBACK),
            stack.tool(
                "events",
                f"http://127.0.0.1:{events.port}",
                {"items.list": {"match": {"method": "GET", "path": "/items/{+rest}"}, "effect": "read"}},
                upstream=LOOPBACK,
            ),
            *(stack.agent(name, {"api": ALL, "events": {"operations": {"items.list": {}}}}) for name in NAMES),
            stack.platform(containment=CONTAINMENT, alerts=alerts),
        )
        secrets = {"API_KEY": INJECTED, "DECOY_KEY": DECOY, "PD_KEY": KEY, "CHAT_SECRET": SECRET}
        broker = stack.Broker(folder / "manifests", folder / "state", secrets)
        yield SimpleNamespace(broker=broker, api=api, payroll=payroll, pager=pager, hook=hook, events=events)
        broker.stop()
        for server in (api, payroll, events):
            server.close()
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _fresh(place):
    place.api.seen.clear()
    place.pager.now = place.hook.now = clock.now()


def verb(place, *words):
    command = [*stack.BROKER, *map(str, words), "--state", str(place.broker.state)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def code(answer):
    return answer.json().get("code", "ok") if answer.status_code != 200 else "ok"


def note(place, agent, text, **headers):
    with place.broker.direct(agent) as client:
        return code(client.post("/api/notes", json={"text": text}, headers=headers))


def findings(place, agent):
    return [r for r in place.broker.records() if r["event"] == "alert" and r["agent"].get("name") == agent]


def incidents(place, agent):
    return [each for known in place.pager.incidents.values() for each in known if agent in json.dumps(each.events)]


def test_a_burst_of_denials_revokes_by_itself_cuts_what_is_open_pages_the_owner_and_its_release_resolves_that(place):
    stream = base_url_stream(place.broker, "burst", "/events/items/idle")
    assert stream.began.wait(10)
    with place.broker.direct("burst") as client:
        denied = [client.put("/api/items/1") for _ in range(5)]
        assert [code(answer) for answer in denied] == ["operation_not_declared"] * 5
        assert stream.ended.wait(2)
        assert code(client.get("/api/items/1")) == "agent_revoked"
    stream.close()
    [alert] = findings(place, "burst")
    assert (alert["kind"], alert["severity"], alert["action"]) == ("denied_burst", "high", "revoke_agent")
    assert alert["decision_ids"][-1] == denied[-1].headers["x-broker-decision-id"]
    assert alert["rule"].endswith("platform-test.yaml#/spec/containment/denied_burst")
    [incident] = stack.until(lambda: incidents(place, "burst"), 10)
    assert incident.open
    assert denied[-1].headers["x-broker-decision-id"] in json.dumps(incident.events)
    verb(place, "agents", "release", "burst", "--reason", "schema mended", "--as", "jo")
    stack.until(lambda: not incidents(place, "burst")[0].open, 10)
    # What was counted before counts no more.
    del place.broker._tokens["burst"]
    with place.broker.direct("burst") as client:
        assert [code(client.put("/api/items/1")) for _ in range(4)] == ["operation_not_declared"] * 4
        assert code(client.get("/api/items/1")) == "ok"


def test_what_is_done_in_an_agents_name_without_its_proof_counts_for_nobody_and_an_imitators_own_proof_for_itself(place):
    broker, claims = place.broker, {"x-agent-id": "imitated", "x-broker-agent": "imitated", "x-forwarded-user": "imitated"}
    for _ in range(12):
        assert httpx.put(f"{broker.base_url}/api/items/1", headers={**claims, "x-broker-token": "forged"}).status_code == 401
        proxied = httpx.Client(proxy=f"http://imitated:forged@{broker.proxy[0]}:{broker.proxy[1]}")
        with proxied:
            assert proxied.get(f"http://127.0.0.1:{place.api.port}/nothing").status_code == 407
    # One agent's token under another's name is nobody's.
    mixed = httpx.Client(proxy=f"http://imitated:{broker.token('imitator')}@{broker.proxy[0]}:{broker.proxy[1]}")
    with mixed:
        assert mixed.get(f"http://127.0.0.1:{place.api.port}/items/1").status_code == 407
    with broker.direct("imitator") as client:
        for _ in range(5):
            client.put("/api/items/1", headers=claims)
        assert code(client.get("/api/items/1", headers=claims)) == "agent_revoked"
    with broker.direct("imitated") as client:
        assert code(client.get("/api/items/1")) == "ok"
    assert findings(place, "imitated") == []


@pytest.mark.parametrize(
    ("agent", "send"),
    [
        pytest.param("decoyed", lambda place, agent: note(place, agent, f"my key is {DECOY}"), id="in a body"),
        pytest.param(
            "header", lambda place, agent: note(place, agent, "x", authorization=f"Bearer {DECOY}"), id="as its own credential"
        ),
    ],
)
def test_a_decoy_credential_revokes_before_the_call_that_shows_it_leaves(place, agent, send):
    assert send(place, agent) == "agent_revoked"
    assert place.api.seen == []
    [alert] = findings(place, agent)
    assert (alert["kind"], alert["action"]) == ("honeytoken", "revoke_agent")
    assert DECOY not in json.dumps(place.broker.records())


def test_a_decoy_tool_or_host_revokes_whoever_touches_it_by_any_door(place):
    broker = place.broker
    with broker.direct("touched") as client:
        assert code(client.get("/payroll/items/1")) == "tool_not_declared"
        stack.until(lambda: code(client.get("/api/items/1")) == "agent_revoked")
    for attempt in range(2):
        verb(place, "agents", "release", "touched", "--reason", "a drill")
        del broker._tokens["touched"]
        target = ["vault-backup.internal.example:443", f"127.0.0.1:{place.payroll.port}"][attempt]
        with stack.tunnel(broker, target, "touched") as (_, answer):
            assert answer.startswith(b"HTTP/1.1 403")
        with broker.direct("touched") as client:
            stack.until(lambda client=client: code(client.get("/api/items/1")) == "agent_revoked", 10, target)
    assert place.payroll.seen == []


def test_a_credential_that_the_broker_injected_revokes_whoever_sends_it_also_with_the_first_call(place):
    assert note(place, "leaky", f"look: {INJECTED}") == "agent_revoked"
    assert place.api.seen == []
    [alert] = findings(place, "leaky")
    assert alert["kind"] == "credential_in_request"
    assert INJECTED not in json.dumps(place.broker.records())
    assert INJECTED not in place.broker.log()


def test_a_spike_of_deletions_leaves_reading_and_one_of_writes_waits_for_people(place):
    with place.broker.direct("deleter") as client:
        assert [code(client.delete(f"/api/items/{n}")) for n in range(3)] == ["ok"] * 3
        stack.until(lambda: code(client.delete("/api/items/9")) == "agent_read_only")
        assert code(client.get("/api/items/1")) == "ok"
    with place.broker.direct("quiet") as client:
        assert [code(client.post("/api/notes", json={"text": str(n)})) for n in range(4)] == ["ok"] * 4
        stack.until(lambda: code(client.post("/api/notes", json={"text": "x"})) == "approval_required")
        held = client.post("/api/notes", json={"text": "x"}).json()
        assert "held: " in held["detail"]
        assert code(client.get("/api/items/1")) == "ok"
    verb(place, "approvals", "approve", held["approval"]["id"])
    assert note(place, "quiet", "x") == "ok"


def test_a_rule_in_shadow_mode_tells_what_it_would_have_done(place):
    with place.broker.client("lone") as client:
        for number in range(4):
            client.get(f"http://probe-{number}.example/")
    told = stack.until(lambda: [each for each in findings(place, "lone") if each["kind"] == "probing"], 5)
    assert (told[0]["shadow"], told[0]["action"]) == (True, "revoke_run")
    assert "in shadow mode" in told[0]["detail"]
    hosts = [each["detail"] for each in findings(place, "lone") if each["kind"] == "undeclared_host"]
    assert len(hosts) == 4
    with place.broker.direct("lone") as client:
        assert code(client.get("/api/items/1")) == "ok"
    stack.until(lambda: [each for each in place.hook.payloads if "probe-3" in json.dumps(each)], 10)


@pytest.mark.parametrize("fault", ["answers 500", "hangs"])
def test_a_pager_that_fails_holds_no_revocation_up_and_hears_of_it_once_it_is_well(place, fault):
    agent = "unheard"
    if fault == "hangs":
        place.pager.hangs.set()
    else:
        place.pager.instead = (500, {}, b"")
    try:
        began = time.monotonic()
        verb(place, "agents", "revoke", agent, "--reason", f"the pager {fault}")
        with place.broker.direct(agent) as client:
            assert code(client.get("/api/items/1")) == "agent_revoked"
        assert time.monotonic() - began < 5
    finally:
        place.pager.instead = None
        place.pager.hangs.clear()
        place.pager.released.set()
    heard = stack.until(lambda: [each for each in incidents(place, agent) if fault in json.dumps(each.events)], 30)
    verb(place, "agents", "release", agent, "--reason", "well again")
    stack.until(lambda: not heard[0].open, 20)
    assert [len(each.events) for each in incidents(place, agent) if fault in json.dumps(each.events)] == [1]
    place.pager.released.clear()
    place.broker._tokens.pop(agent, None)


def test_the_brokers_own_numbers_show_it(place):
    shown = httpx.get(f"{place.broker.admin}/metrics").text
    assert 'broker_findings_total{action="revoke_agent",detector="denied_burst"} ' in shown
    assert 'broker_restrictions{action="revoke_agent"} ' in shown
    assert 'broker_alerts_total{result="delivered",sink="pagerduty"} ' in shown
    assert "broker_self_test_passed 1.0" in shown
