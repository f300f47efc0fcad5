"""What is counted, under which labels, and that no agent can add one. The dashboard names only what there is."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from envoy.data.accesslog.v3.accesslog_pb2 import HTTPAccessLogEntry
from prometheus_client.parser import text_string_to_metric_families
from unit.test_exchange import BODY, JSON_TYPE, OK, POST, Records, _document, head, play, services

from broker.audit.record import Ending
from broker.events import Cut, Reserve, Reserved, ResponseChunk, ResponseHead, WantBody
from broker.exchange import Exchange
from broker.identity import Evidence
from broker.ledger.base import Balance, Granted
from broker.ledger.memory import MemoryLedger
from broker.manifest.load import load_texts
from broker.metrics import Metrics, Standing, windows
from broker.policy.limits import Limit
from broker.policy.types import Usage
from broker.processor.access_log import AccessLog
from broker.protocols.base import ResponseBlocked
from broker.protocols.mcp import Mcp
from broker.protocols.registry import ADAPTERS
from broker.protocols.rest import Rest

ROOT = Path(__file__).parents[2]
TOKENS = Limit("tokens", "agent/caller", 2_000_000, "", per=86_400)
USD = Limit("usd", "team/web", 5_000_000_000, "", per=86_400)
WELL = Standing("sha256:1", current=True, accepted=True, audit_writable=True, open_calls=2)


def samples(metrics, standing=WELL):
    """Each sample by its name and its labels' values, these sorted."""
    families = text_string_to_metric_families(metrics.exposition(standing).decode())
    return {(sample.name, *sorted(sample.labels.values())): sample.value for family in families for sample in family.samples}


def a_busy_broker():
    """One in which everything that is counted has happened."""
    metrics = Metrics()
    metrics.decided("allow", "", 120_000)
    metrics.waited_for_ledger(900_000)
    metrics.ended("caller", "openai", "gpt-5-mini", Ending(status=500, duration_ms=30, usage=Usage(9, 6, 3), usd=0.25), "5xx")
    metrics.found("probing", "alert")
    held = {"restrictions": {"hold": 1}, "alerts": {("pagerduty", "delivered"): 2}, "alerts_waiting": 3, "self_test": False}
    return metrics, replace(WELL, balances=[Balance(TOKENS, 15, 0), Balance(USD, 250_000_000, 0)], **held)


def test_a_model_call_counts_its_tokens_by_agent_model_and_type_and_its_dollars():
    found = samples(*a_busy_broker())
    kinds = ("input", "output", "cached")
    tokens = {kind: found["broker_tokens_total", *sorted(("caller", "gpt-5-mini", kind))] for kind in kinds}
    assert tokens == {"input": 9, "output": 6, "cached": 3}
    assert found["broker_cost_usd_total", "caller", "gpt-5-mini"] == 0.25


def test_what_is_found_what_holds_and_who_was_told_are_shown():
    found = samples(*a_busy_broker())
    assert found["broker_findings_total", "alert", "probing"] == 1
    assert found["broker_restrictions", "hold"] == 1
    assert found["broker_alerts_total", "delivered", "pagerduty"] == 2
    assert (found["broker_alerts_waiting",], found["broker_self_test_passed",]) == (3, 0)


def test_budgets_are_shown_in_their_own_unit_dollars_in_dollars():
    found = samples(*a_busy_broker())
    tokens = [found[f"broker_budget_{name}", "agent/caller", "tokens"] for name in ("spent", "limit")]
    dollars = [found[f"broker_budget_{name}", "team/web", "usd"] for name in ("spent", "limit")]
    assert (tokens, dollars) == ([15, 2_000_000], [0.25, 5])


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        pytest.param({"current": False}, "broker_configuration_current", id="the manifests are not in force"),
        pytest.param({"accepted": False}, "broker_envoy_accepted", id="Envoy has refused"),
        pytest.param({"audit_writable": False}, "broker_audit_writable", id="the disk is full"),
    ],
)
def test_each_part_of_the_health_is_a_gauge_of_its_own(changed, name):
    healthy = {"broker_configuration_current", "broker_envoy_accepted", "broker_audit_writable", "broker_ledger_up"}
    found = samples(Metrics(), replace(WELL, **changed))
    assert {each for each in healthy if found[(each,)] == 0} == {name}
    assert found[("broker_ledger_open_calls",)] == 2


def test_before_any_configuration_no_revision_is_shown():
    assert ("broker_configuration_info", "sha256:1") in samples(Metrics())
    assert not any(name == "broker_configuration_info" for name, *_ in samples(Metrics(), replace(WELL, revision="")))


def test_a_ledger_that_is_away_is_seen():
    metrics = Metrics()
    metrics.ledger_up = False
    assert samples(metrics)[("broker_ledger_up",)] == 0


def test_the_wait_for_a_body_is_no_part_of_a_decisions_time():
    now = [0]
    outside = services(mono_ns=lambda: now[0])
    exchange = Exchange(outside)
    assert exchange.handle(POST) == WantBody()
    now[0] += 30_000_000_000
    exchange.handle(BODY)
    exchange.close()
    found = samples(outside.metrics)
    assert found["broker_decision_duration_seconds_count", "allow"] == 1
    assert found["broker_decision_duration_seconds_sum", "allow"] == 0


def test_the_wait_for_a_shared_ledger_is_a_part_of_a_decisions_time_and_shown_by_itself():
    class Shared(MemoryLedger):
        def reserve(self, *_):
            return object()

    now = [0]
    outside = services(mono_ns=lambda: now[0], ledger=Shared())
    exchange = Exchange(outside)
    assert isinstance(exchange.handle(head()), Reserve)
    now[0] += 4_000_000
    exchange.handle(Reserved(Granted()))
    exchange.close()
    found = samples(outside.metrics)
    assert found["broker_decision_duration_seconds_sum", "allow"] == 0.004
    assert found[("broker_ledger_reserve_duration_seconds_sum",)] == 0.004


def test_what_envoy_refused_by_itself_is_counted_but_took_no_time_of_ours():
    outside = services()
    AccessLog(outside)._http(HTTPAccessLogEntry(response={"response_code_details": "http1.codec_error"}))
    found = samples(outside.metrics)
    assert found["broker_decisions_total", "deny", "protocol_violation"] == 1
    assert not any(name.startswith("broker_decision_duration") for name, *_ in found)


def own_answer(details):
    return ResponseHead(503, ((":status", "503"),), details, has_body=True)


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        pytest.param(OK, None, id="a good answer"),
        pytest.param(replace(OK, status=404), None, id="the agent's own mistake"),
        pytest.param(replace(OK, status=502), "5xx", id="the upstream failed"),
        pytest.param(
            own_answer("upstream_reset_before_response_started{remote_connection_failure}"), "unreached", id="no one there"
        ),
        pytest.param(own_answer("no_healthy_upstream"), "unreached", id="it is left alone"),
        pytest.param(own_answer("upstream_reset_before_response_started{overflow}"), "unreached", id="it holds too many calls"),
        pytest.param(own_answer("upstream_reset_before_response_started{connection_termination}"), "reset", id="it hung up"),
        pytest.param(own_answer("upstream_response_timeout"), "timeout", id="it said nothing"),
        pytest.param(own_answer("TLS_error:CERTIFICATE_VERIFY_FAILED"), "untrusted", id="it could not prove its name"),
        pytest.param(own_answer("something_new"), "other", id="a word that Envoy has not used before"),
    ],
)
def test_an_upstreams_error_is_counted_by_its_tool_and_type(answer, word):
    outside = services()
    play(outside, head(), answer)
    errors = {key: value for key, value in samples(outside.metrics).items() if key[0] == "broker_upstream_errors_total"}
    assert errors == ({("broker_upstream_errors_total", *sorted(("plain", word))): 1} if word else {})


def test_an_answer_that_the_broker_cuts_is_an_error_of_type_blocked():
    class Blocking(Rest):
        def response_filter(self, *_):
            def feed(*_, **__):
                raise ResponseBlocked("a rule")

            return SimpleNamespace(feed=feed)

    outside = services(adapters={"rest": Blocking(), "mcp": Mcp()})
    *_, cut = play(outside, head(), OK, ResponseChunk(b"x", last=True))
    assert cut == Cut()
    assert samples(outside.metrics)["broker_upstream_errors_total", "blocked", "plain"] == 1


def test_nothing_that_an_agent_says_becomes_a_label():
    outside = services(audit=Records())
    mark = "zq{}-said-by-the-agent"
    for number in range(50):
        said = mark.format(number)
        headers = (("x-run-id", said), ("baggage", f"run.id={said}"), ("traceparent", said), ("user-agent", said))
        play(outside, head("GET", f"/plain/items?page={said}", *headers), replace(OK, details=said))
        play(outside, head("GET", f"/plain/{said}", *headers))
        play(outside, head(said, "/plain/items"))
        play(outside, head("GET", f"/{said}/items"))
        play(outside, head(token=said))
        play(outside, replace(head(), evidence=Evidence(POST.wire.door, peer_uri=f"spiffe://{said}/")))
        play(outside, head("POST", "/plain/items", JSON_TYPE, body=True), replace(BODY, body=b'{"%s":1}' % said.encode()))
    text = outside.metrics.exposition(WELL).decode()
    assert len(outside.audit) > 300
    assert "zq" in str(outside.audit)
    assert "zq" not in text
    assert len(text.splitlines()) < 200


def test_a_model_that_the_manifest_does_not_name_becomes_no_label():
    body = {"properties": {"model": {"enum": ["small"]}}}
    operations = {"chat.completions": {"effect": "read"}}
    texts = {
        "t.yaml": _document("Tool", "plain", protocol="openai", endpoint="https://m.example", operations=operations),
        "a.yaml": _document(
            "Agent", "caller", identity={"token": True}, mode="enforce",
            tools={"plain": {"operations": {"chat.completions": {"params": {"body": body}}}}},
        ),
    }  # fmt: skip
    loaded = load_texts(texts, Path())
    assert loaded.snapshot is not None, loaded.findings
    outside = services(snapshot=lambda: loaded.snapshot, adapters=ADAPTERS)
    asked = head("POST", "/plain/v1/chat/completions", JSON_TYPE, body=True)
    for model in ("small", *(f"model-{number}" for number in range(20))):
        said = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 5}
        play(outside, asked, replace(BODY, body=json.dumps(said).encode()), OK)
    used = [key for key in samples(outside.metrics) if key[0] == "broker_tokens_total"]
    assert {label for _, *labels in used for label in labels} == {"caller", "small", "input", "output", "cached"}


def test_a_limit_that_several_agents_share_is_one_budget():
    snapshot = services().snapshot()
    agents = {name: replace(snapshot.agents["caller"], name=name, limits=(USD, TOKENS)) for name in ("a", "b")}
    per_run = Limit("tokens_per_run", "agent/a", 5, "")
    agents["a"] = replace(agents["a"], limits=(USD, TOKENS, per_run))
    assert windows(replace(snapshot, agents=agents)) == {USD.key: USD, TOKENS.key: TOKENS}


# The dashboard.

DASHBOARD = json.loads((ROOT / "compose/grafana/dashboard.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
QUERIES += [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"]
LEGENDS = [(target["expr"], target["legendFormat"]) for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
SCRAPED = {"instance", "job"}  # Prometheus' own labels


def _exposed():
    """Each series' name, with its labels, as a real exposition has them."""
    exposed = {}
    metrics, standing = a_busy_broker()
    for family in text_string_to_metric_families(metrics.exposition(standing).decode()):
        for sample in family.samples:
            exposed.setdefault(sample.name, set()).update(sample.labels)
    return exposed


def _named(query):
    return set(re.findall(r"\b(?:broker|process)_\w+", query))


def _labels(query):
    matched = re.findall(r"(\w+)(?:=~|!~|!=|=)\"", query)
    grouped = [word for group in re.findall(r"(?:by|on) \(([^)]*)\)", query) for word in group.split(", ")]
    return {*matched, *grouped, *re.findall(r"label_values\(\w+, (\w+)\)", query)}


def test_the_dashboard_asks_for_nothing_that_a_broker_does_not_show():
    exposed = _exposed()
    for query in QUERIES:
        assert _named(query), query
        assert _named(query) <= set(exposed), query
        for name in _named(query):
            assert _labels(query) <= exposed[name] | SCRAPED, query
    for query, legend in LEGENDS:
        kept = _labels(query) | (SCRAPED if " by " not in query else set())
        assert set(re.findall(r"{{(\w+)}}", legend)) <= kept, legend


def test_every_metric_is_on_the_dashboard_or_said_not_to_be():
    asked = set().union(*map(_named, QUERIES))
    without = (ROOT / "compose/grafana/README.md").read_text().partition("## Not shown")[2]
    shown = {re.sub("_(bucket|count|sum)$", "", name) for name in asked} | set(re.findall(r"`(\w+)`", without))
    assert {re.sub("_(bucket|count|sum)$", "", name) for name in _exposed()} == shown


def test_the_dashboards_panels_have_their_own_numbers_and_do_not_overlap():
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
