"""Each weakening is wider, each strengthening narrower, and nothing that differs goes untold."""
# ruff: noqa: E501 - an edit and what is told of it read best in one row

import copy
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from broker.manifest import meanings, steps
from broker.manifest.diff import Change, Diff, diff
from broker.manifest.load import Reading, load_texts
from broker.manifest.steps import Direction
from broker.policy.approval import Approval
from broker.policy.containment import Alerting, Decoys
from broker.policy.snapshot import Agent, CredentialSpec, Grant, Operation, PolicySnapshot, Tool, Upstream
from broker.review.markdown import MOST, as_markdown

WIDER, NARROWER, CHANGED, EQUAL = Direction
OPPOSITE = {WIDER: NARROWER, NARROWER: WIDER, CHANGED: CHANGED, EQUAL: EQUAL}

WORLD = {
    "platform": {
        "kind": "Platform",
        "spec": {
            "teams": {"team": {"ceilings": {"writes": "500/day"}, "oncall": "us"}},
            "prices": {"openai": {"m": {"input": 1, "output": 2}}},
            "containment": {"probing": {"count": 8, "window": "10m", "action": "alert"}, "honeytoken": {"hosts": ["bait.example"]}},
            "flow": [{"after": ["pii"], "deny": {"effect": "write"}, "unless": "approval"}],
            "alerts": {
                "webhooks": {"ops": {"url": "https://ops.example", "secret": {"file": "secrets/ops"}}},
                "routes": [{"to": "ops"}], "fallback": "ops",
            },
        },
    },
    "shop": {
        "kind": "Tool",
        "spec": {
            "protocol": "rest", "endpoint": "https://shop.example/v1",
            "upstream": {"addresses": ["10.0.0.0/8"]},
            "credential": {"issuer": "jwt", "scopes": ["read", "write"], "ttl": "5m"},
            "operations": {
                "get": {
                    "match": {"method": "GET", "path": "/items/{id}"}, "effect": "read", "data": ["pii"],
                    "params": {"path": {"properties": {"id": {"type": "string"}}}},
                },
                "put": {
                    "match": {"method": "PUT", "path": "/items/{id}"}, "effect": "write", "idempotency": "idempotency-key",
                    "params": {"body": {"type": "object", "properties": {"n": {"type": "integer", "maximum": 50}}, "additionalProperties": False}},
                },
                "unused": {"match": {"method": "GET", "path": "/"}, "effect": "read"},
            },
        },
    },
    "gpt": {
        "kind": "Tool",
        "spec": {"protocol": "openai", "endpoint": "https://gpt.example", "operations": {"responses": {"effect": "read"}}},
    },
    "bot": {
        "kind": "Agent",
        "spec": {
            "identity": {"token": True, "spiffe": "spiffe://acme.example/bot"},
            "limits": {"rate": "10/s", "burst": 20, "calls": "100/hour", "steps_per_run": 40},
            "tools": {
                "shop": {
                    "operations": {
                        "get": {"params": {"path": {"properties": {"id": {"enum": ["a", "b"]}}}}},
                        "put": {
                            "limits": {"calls": "20/hour"},
                            "approval": {"approvers": 2, "groups": ["leads", "ops"], "expires": "1h",
                                         "when": {"body": {"properties": {"n": {"minimum": 10}}}}},
                        },
                    },
                },
                "gpt": {
                    "operations": {
                        "responses": {
                            "params": {"body": {"properties": {"model": {"enum": ["m"]}, "max_output_tokens": {"maximum": 100}}}},
                            "server_tools": ["web_search"],
                        },
                    },
                },
            },
        },
    },
}  # fmt: skip
GONE = object()
PUT = "bot/spec/tools/shop/operations/put"
CATALOG = "shop/spec/operations"
PROBING = "platform/spec/containment/probing"


def changed(*edits):
    world = copy.deepcopy(WORLD)
    for place, value in edits:
        node = world
        *path, last = place.split("/")
        for part in path:
            node = node.setdefault(part, {}) if isinstance(node, dict) else node[int(part)]
        if value is GONE:
            del node[last]
        else:
            node[last] = value
    return world


def compiled(world, folder="/somewhere", reading=None):
    texts = {}
    for name, written in world.items():
        if "owner" not in (metadata := dict(written.get("metadata", {}))):
            metadata["owner"] = "team"
        texts[f"{name}.yaml"] = json.dumps({"apiVersion": "broker/v1", "metadata": {"name": name, **metadata}, **{
            key: part for key, part in written.items() if key != "metadata"}}).encode()  # fmt: skip
    loaded = load_texts(texts, Path(folder), reading=reading)
    assert loaded.snapshot, loaded.findings
    return loaded.snapshot


def told(before, after):
    return [(each.agent, each.kind, each.about, each.direction) for each in diff(before, after).changes]


BASE = compiled(WORLD)

WEAKENED = [
    # what was weakened, the edits, and what is told: kind, about
    ("an operation more", [("bot/spec/tools/shop/operations/unused", {})], "operation", "shop/unused"),
    ("a limit raised", [("bot/spec/limits/calls", "200/hour")], "limit", "agent/bot"),
    ("a limit taken out", [("bot/spec/limits/steps_per_run", GONE)], "limit", "agent/bot"),
    ("a limit for a shorter window", [("bot/spec/limits/calls", "100/minute")], "limit", "agent/bot"),
    ("a rate's larger bucket", [("bot/spec/limits/burst", 30)], "limit", "agent/bot"),
    ("an operation's limit raised", [(f"{PUT}/limits/calls", "21/hour")], "limit", "agent/bot/shop/put"),
    ("the team's ceiling raised", [("platform/spec/teams/team/ceilings/writes", "501/day")], "limit", "team/team"),
    ("no approval", [(f"{PUT}/approval", GONE)], "approval", "shop/put"),
    ("fewer approvers", [(f"{PUT}/approval/approvers", 1)], "approval", "shop/put"),
    ("one more group may approve", [(f"{PUT}/approval/groups", ["leads", "ops", "all"])], "approval", "shop/put"),
    ("anybody may approve", [(f"{PUT}/approval/groups", GONE)], "approval", "shop/put"),
    ("an approval is good for longer", [(f"{PUT}/approval/expires", "2h")], "approval", "shop/put"),
    ("fewer calls need approval", [(f"{PUT}/approval/when/body/properties/n/minimum", 20)], "approval", "shop/put"),
    ("of fewer, by their path too", [(f"{PUT}/approval/when/path", {"properties": {"id": {"const": "a"}}})], "approval", "shop/put"),
    ("a value more", [("bot/spec/tools/shop/operations/get/params/path/properties/id/enum", ["a", "b", "c"])], "parameters", "shop/get path"),
    ("a model more", [("bot/spec/tools/gpt/operations/responses/params/body/properties/model/enum", ["m", "n"])], "model", "gpt/responses"),
    ("more output", [("bot/spec/tools/gpt/operations/responses/params/body/properties/max_output_tokens/maximum", 200)], "max_output", "gpt/responses"),
    ("a server tool more", [("bot/spec/tools/gpt/operations/responses/server_tools", ["web_search", "url"])], "server_tools", "gpt/responses"),
    ("one more way to be the agent", [("bot/spec/identity/namespace", "bot")], "identity", "agent"),
    # the catalog, told for the agent that it bears on
    ("the catalog's schema", [(f"{CATALOG}/put/params/body/properties/n/maximum", 60)], "parameters", "shop/put body"),
    ("a larger body", [(f"{CATALOG}/put/max_body", "2MiB")], "max_body", "shop/put"),
    ("answers are not scrubbed", [(f"{CATALOG}/put/scrub", "unsafe_never")], "scrub", "shop/put"),
    ("a label less, so that a flow rule sees less", [(f"{CATALOG}/get/data", [])], "data", "shop/get"),
    ("retries are not told apart", [(f"{CATALOG}/put/idempotency", GONE)], "idempotency", "shop/put"),
    ("other private ranges", [("shop/spec/upstream/addresses", ["10.0.0.0/8", "172.16.0.0/12"])], "upstream", "shop"),
    ("a scope more", [("shop/spec/credential/scopes", ["read", "write", "admin"])], "credential", "shop scopes"),
    ("a credential", [("gpt/spec/credential", {"issuer": "jwt"})], "credential", "gpt"),
    # the platform
    ("longer credentials", [("platform/spec/credentials", {"max_ttl": "2h"})], "credential", "platform"),
    ("later", [(f"{PROBING}/count", 9)], "containment", "probing"),
    ("within less time", [(f"{PROBING}/window", "5m")], "containment", "probing"),
    ("quiet for longer", [(f"{PROBING}/cooldown", "1h")], "containment", "probing"),
    ("only in shadow", [(f"{PROBING}/shadow", True)], "containment", "probing"),
    ("not looked for", [(PROBING, [])], "containment", "probing"),
    ("a decoy less", [("platform/spec/containment/honeytoken/hosts", [])], "decoy", "platform"),
    ("a flow rule less", [("platform/spec/flow", [])], "flow", "after pii"),
    ("a cheaper price", [("platform/spec/prices/openai/m/output", 1)], "price", "openai/m"),
    ("a price, where none let no call pass", [("platform/spec/prices/openai/n", {"input": 1, "output": 2})], "price", "openai/n"),
    ("fewer alerts", [("platform/spec/alerts/per_minute", 10)], "alerts", "platform"),
    ("nobody hears of the rest", [("platform/spec/alerts/fallback", GONE)], "alerts", "platform"),
]  # fmt: skip


@pytest.mark.parametrize(("edits", "kind", "about"), [pytest.param(*each[1:], id=each[0]) for each in WEAKENED])
def test_a_weakening_is_wider_and_the_reverse_narrower(edits, kind, about):
    after = compiled(changed(*edits))
    there, back = told(BASE, after), told(after, BASE)
    assert (kind, about, WIDER) in [each[1:] for each in there]
    assert (kind, about, NARROWER) in [each[1:] for each in back]
    assert NARROWER not in [each[3] for each in there]
    assert WIDER not in [each[3] for each in back]


@pytest.mark.parametrize(
    ("edits", "kind", "about"),
    [
        pytest.param([("bot/spec/limits/calls", "1000/day")], "limit", "agent/bot", id="more in a longer window"),
        pytest.param([(f"{PUT}/approval/groups", ["leads", "others"])], "approval", "shop/put", id="other groups"),
        pytest.param([(f"{PUT}/approval/when/body/properties/n", {"multipleOf": 3})], "approval", "shop/put", id="other calls"),
        pytest.param([(f"{CATALOG}/get/effect", "destructive")], "effect", "shop/get", id="another effect"),
        pytest.param([(f"{CATALOG}/put/match/path", "/things/{id}")], "match", "shop/put", id="another path"),
        pytest.param([("shop/spec/credential/as", {"header": "x-key", "template": "{}"})], "credential", "shop", id="placed"),
        pytest.param([("shop/spec/credential/ttl", "1m")], "credential", "shop ttl", id="another setting"),
        pytest.param([("shop/spec/credential/scopes", [])], "credential", "shop scopes", id="no scopes: the server's own"),
        pytest.param([("shop/spec/endpoint", "https://shop.example/v2")], "endpoint", "shop", id="another base path"),
        pytest.param([("bot/metadata/owner", "others")], "owner", "agent", id="another owner"),
        pytest.param([("platform/spec/environment", "test")], "environment", "platform", id="another environment"),
        pytest.param([("platform/spec/alerts/routes/0/match", {"severity": "high"})], "alerts", "platform", id="other routes"),
        pytest.param([("platform/spec/identity", {"spire": {"socket": "/run/s"}})], "identity", "platform", id="SPIRE"),
        pytest.param([("platform/spec/containment/probing/action", "hold"), (f"{PROBING}/count", 9)], "containment", "probing",
                     id="more, but later"),
        pytest.param([("platform/spec/prices/openai/m", {"input": 2, "output": 1})], "price", "openai/m", id="dearer and cheaper"),
        pytest.param([(f"{CATALOG}/get/params/path/properties/id/type", "integer"),
                      ("bot/spec/tools/shop/operations/get/params/path/properties/id/enum", [7])], "parameters", "shop/get path",
                     id="a text that is now read as a number"),
    ],
)  # fmt: skip
def test_what_is_neither_is_changed(edits, kind, about):
    after = compiled(changed(*edits))
    assert (kind, about, CHANGED) in [each[1:] for each in told(BASE, after)]
    assert diff(BASE, after).widens


def test_that_rules_for_manifests_only_warn_is_wider():
    any_tool, listed, none = (
        compiled(changed(("platform/spec/admission", rules), *more))
        for rules, more in (({}, ()), ({"tools": ["gpt", "shop"]}, ()), ({"tools": []}, [("bot/spec/tools", {})]))
    )
    assert told(any_tool, BASE) == [("", "admission", "platform", WIDER)]
    assert told(BASE, any_tool) == [("", "admission", "platform", NARROWER)]
    assert [(each.direction, each.after) for each in diff(any_tool, listed).changes] == [(CHANGED, "gpt, shop")]
    assert none.admission == "no tool"


def test_true_in_a_policy_is_not_1():
    aws = {
        "issuer": "aws-sts",
        "role": "arn:aws:iam::123456789012:role/x",
        "as": {"sigv4": {"service": "s3", "region": "eu-west-1"}},
    }
    base, head = (compiled(changed(("shop/spec/credential", {**aws, "scopes": {"policy": {"n": n}}}))) for n in (1, True))
    assert told(base, head) == [("bot", "credential", "shop scopes", CHANGED)]


def test_who_is_on_call_for_a_team_is_told_for_its_agents():
    after = compiled(changed(("platform/spec/teams/team/oncall", GONE)))
    [change] = diff(BASE, after).changes
    assert (change.agent, change.kind, change.direction, change.before, change.after) == ("bot", "oncall", EQUAL, "us", "")
    own = ("bot/metadata", {"oncall": "me"})
    assert told(compiled(changed(own)), compiled(changed(own, ("platform/spec/teams/team/oncall", GONE)))) == []


def test_a_number_that_was_a_text_is_not_called_narrower():
    """`7` in a path was the string "7", which the list of numbers refused; typed, it passes."""
    loose = changed(
        (f"{CATALOG}/get/params/path/properties/id", {"enum": [7]}), ("bot/spec/tools/shop/operations/get/params", {})
    )
    strict = copy.deepcopy(loose)
    strict["shop"]["spec"]["operations"]["get"]["params"]["path"]["properties"]["id"]["type"] = "integer"
    assert ("bot", "parameters", "shop/get path", CHANGED) in told(compiled(loose), compiled(strict))


def test_a_text_that_becomes_a_list_is_not_called_narrower():
    """`?n=b` was the text "b", which the pattern refused; as the list ["b"] it passes, since patterns bind texts alone."""
    loose = changed((f"{CATALOG}/get/params/query", {"properties": {"n": {"pattern": "^a$"}}}))
    strict = copy.deepcopy(loose)
    strict["shop"]["spec"]["operations"]["get"]["params"]["query"]["properties"]["n"]["type"] = "array"
    assert ("bot", "parameters", "shop/get query", CHANGED) in told(compiled(loose), compiled(strict))


def test_a_price_of_its_own_that_is_taken_out_leaves_the_providers():
    """What the tool's models cost is then what its protocol's do, and that may be less."""
    dear = {"input": 100, "output": 200}
    own = compiled(changed(("platform/spec/prices/gpt", {"m": dear})))
    assert ("", "price", "gpt/m", CHANGED) in told(own, BASE)


SHADOW = [("bot/spec/mode", "shadow"), ("bot/spec/shadow_until", "2099-01-01"), ("bot/spec/tools", {})]


@pytest.mark.parametrize(
    ("edit", "kind", "direction"),
    [
        (("bot/spec/limits/calls", GONE), "limit", WIDER),
        (("platform/spec/teams/team/ceilings/writes", "501/day"), "limit", WIDER),
        (("shop/spec/endpoint", "https://other.example/v1"), "endpoint", CHANGED),
        ((f"{CATALOG}/unused/max_body", "2MiB"), "max_body", WIDER),
    ],
    ids=["its own limit", "its team's", "where a tool is", "what an operation takes"],
)
def test_what_bears_on_an_agent_in_shadow_mode_only_is_told(edit, kind, direction):
    before, after = compiled(changed(*SHADOW)), compiled(changed(*SHADOW, edit))
    assert (kind, direction) in [(each[1], each[3]) for each in told(before, after)]


ACTIONS = ["alert", "hold", "read_only", "revoke_run", "revoke_agent"]
STRONGER = {("alert", each) for each in ACTIONS[1:]} | {(each, "revoke_agent") for each in ACTIONS[:-1]} | {("hold", "read_only")}


@pytest.mark.parametrize("before", ACTIONS)
@pytest.mark.parametrize("after", ACTIONS)
def test_actions_are_weighed(before, after):
    base, head = (compiled(changed((f"{PROBING}/action", action))) for action in (before, after))
    expected = NARROWER if (before, after) in STRONGER else WIDER if (after, before) in STRONGER else CHANGED
    assert told(base, head) == ([("", "containment", "probing", expected)] if before != after else [])


def test_certificates_are_told_by_their_hashes():
    ours, theirs = "-----BEGIN A", "-----BEGIN B"
    base = replace(BASE, trust_bundles={"a.example": ours, "b.example": ours})
    head = replace(BASE, trust_bundles={"a.example": theirs, "c.example": ours})
    found = {each.about: (each.direction, each.before[:12], each.after[:12]) for each in diff(base, head).changes}
    assert found == {
        "a.example": (CHANGED, "certificates", "certificates"),
        "b.example": (NARROWER, "certificates", ""),
        "c.example": (WIDER, "", "certificates"),
    }
    [step] = steps.compared(meanings.UPSTREAM, Upstream(), Upstream(ca_pem=ours))
    assert (step.kind, step.direction, step.before, step.after[:12]) == ("upstream", CHANGED, "", "certificates")
    assert ours not in step.after


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""), (True, "true"), (7, "7"), ("a", "a"), ({("a", "b"): 1}, """{"('a', 'b')": 1}"""), (frozenset({"b", "a"}), '["a", "b"]'),
        (Upstream(addresses=("10.0.0.0/8",)), '{"addresses": ["10.0.0.0/8"], "ca_pem": ""}'), ([Direction], """["<enum 'Direction'>"]"""),
    ],
)  # fmt: skip
def test_any_value_can_be_said(value, text):
    assert steps.said(value) == text


def test_a_flow_rule_that_nothing_lifts_is_narrower():
    after = compiled(changed(("platform/spec/flow/0/unless", GONE)))
    assert ("bot", "flow", "after pii", NARROWER) in told(BASE, after)
    assert ("bot", "flow", "after pii", WIDER) in told(after, BASE)


def test_a_flow_rule_that_more_people_must_lift_is_narrower():
    after = compiled(changed(("platform/spec/flow/0/unless", {"approvers": 2})))
    assert ("bot", "flow", "after pii", NARROWER) in told(BASE, after)


def test_a_flow_rule_before_another_only_shifts_its_number():
    more = {"after": ["secret"], "deny": {"effect": "destructive"}}
    after = compiled(changed(("platform/spec/flow", [more, *WORLD["platform"]["spec"]["flow"]])))
    assert told(BASE, after) == []


def test_an_agent_more_is_told_with_all_that_it_reaches():
    world = changed()
    del world["bot"]
    assert sorted(told(compiled(world), BASE)) == [
        ("bot", "agent", "agent", WIDER),
        ("bot", "credential", "shop", WIDER),
        ("bot", "host", "https://gpt.example:443", WIDER),
        ("bot", "host", "https://shop.example:443", WIDER),
        ("bot", "operation", "gpt/responses", WIDER),
        ("bot", "operation", "shop/get", WIDER),
        ("bot", "operation", "shop/put", WIDER),
        ("bot", "tool", "gpt", WIDER),
        ("bot", "tool", "shop", WIDER),
    ]
    assert {each[3] for each in told(BASE, compiled(world))} == {NARROWER}


def test_another_host_of_a_tool_is_a_host_more_and_one_less():
    found = told(BASE, compiled(changed(("shop/spec/endpoint", "https://other.example/v1"))))
    assert ("bot", "host", "https://other.example:443", WIDER) in found
    assert ("bot", "host", "https://shop.example:443", NARROWER) in found
    assert ("bot", "endpoint", "shop", CHANGED) in found


def test_a_limit_that_stops_bearing_on_an_operation_is_wider():
    found = told(BASE, compiled(changed((f"{CATALOG}/put/effect", "read"), (f"{CATALOG}/put/idempotency", GONE))))
    assert ("bot", "limit", "team/team", WIDER) in found
    assert ("bot", "flow", "shop/put", WIDER) in found  # it bears on answers to the tool still


def test_what_bears_on_nobody_is_told_without_effect():
    assert told(BASE, compiled(changed((f"{CATALOG}/unused/max_body", "2MiB")))) == [("", "max_body", "shop/unused", EQUAL)]
    assert told(BASE, compiled(changed((f"{CATALOG}/unused", GONE)))) == [("", "operation", "shop/unused", EQUAL)]
    world = changed(("new", {"kind": "Tool", "spec": {"protocol": "rest", "endpoint": "https://n.example", "operations": {}}}))
    assert told(BASE, compiled(world)) == [("", "catalog", "new", EQUAL)]
    renamed = changed(("shop/metadata", {"owner": "others"}))
    assert told(BASE, compiled(renamed)) == [("bot", "owner", "shop", EQUAL)]


@pytest.mark.parametrize(
    ("path", "other", "falls"),
    [
        ("/items/admin", None, True),
        ("/items/admin", "/admin", True),
        ("/{+rest}", None, True),
        ("/items", None, False),
        ("/other/admin", None, False),
        ("/items/admin/x", None, False),
        ("/items/admin", "/items/admin", False),
    ],
)
def test_calls_that_fall_to_another_operation_widen_it(path, other, falls):
    """What nobody was granted was refused; without it in the catalog, its calls are recognised as what is granted."""
    special = {"match": {"method": "GET", "path": path}, "effect": "read"}
    base = compiled(changed((f"{CATALOG}/special", special)))
    head = compiled(changed((f"{CATALOG}/special", {**special, "match": {"method": "GET", "path": other}}))) if other else BASE
    assert (("bot", "match", "shop/get", WIDER) in told(base, head)) is falls
    assert (("bot", "match", "shop/get", NARROWER) in told(head, base)) is falls


def test_a_limit_that_bears_on_nothing_is_without_effect():
    assert told(BASE, compiled(changed(("bot/spec/limits/destructive", "1/day")))) == [("bot", "limit", "agent/bot", EQUAL)]


def test_what_comes_and_goes_with_an_operation_is_told_with_the_operation():
    world = changed(("bot/spec/tools/shop/operations/unused", {"limits": {"calls": "1/day"}}))
    assert told(BASE, compiled(world)) == [("bot", "operation", "shop/unused", WIDER)]


def test_a_tool_less_is_told_with_its_credential():
    found = told(BASE, compiled(changed(("bot/spec/tools/shop", GONE))))
    assert ("bot", "credential", "shop", NARROWER) in found
    assert ("bot", "host", "https://shop.example:443", NARROWER) in found
    assert {each[3] for each in found} == {NARROWER}


def test_a_tool_without_operations_at_a_host_that_is_reached_already_is_told():
    """What its protocol sends by itself passes."""
    wiki = {
        "kind": "Tool",
        "spec": {"protocol": "mcp", "endpoint": "https://shop.example/mcp", "operations": {"s": {"effect": "read"}}},
    }
    base = changed(("wiki", wiki))
    head = changed(("wiki", wiki), ("bot/spec/tools/wiki", {"operations": {}}))
    [change] = diff(compiled(base), compiled(head)).changes
    assert (change.kind, change.about, change.direction, change.after) == ("tool", "wiki", WIDER, "mcp")
    assert change.rules == ("bot.yaml#/spec/tools/wiki",)
    assert told(compiled(head), compiled(base)) == [("bot", "tool", "wiki", NARROWER)]
    lapsed = changed(("wiki", wiki), ("bot/spec/tools/wiki", {"operations": {"s": {"expires": "2020-01-01"}}}))
    assert ("bot", "expires", "wiki", WIDER) in told(compiled(lapsed), compiled(head)), "which had ended with its last grant"
    lasting = changed(("wiki", wiki), ("bot/spec/tools/wiki", {"operations": {"s": {}}}))
    assert told(compiled(lasting), compiled(head)) == [("bot", "operation", "wiki/s", NARROWER)]


def test_a_parameter_that_is_no_longer_pinned_widens_the_credential():
    found = told(BASE, compiled(changed(("bot/spec/tools/shop/operations/get/params", GONE))))
    assert ("bot", "credential", "shop/get id", WIDER) in found
    assert ("bot", "parameters", "shop/get path", WIDER) in found
    bare = changed(("shop/spec/credential", GONE))
    loose = copy.deepcopy(bare)
    del loose["bot"]["spec"]["tools"]["shop"]["operations"]["get"]["params"]
    assert told(compiled(bare), compiled(loose)) == [("bot", "parameters", "shop/get path", WIDER)]


def test_two_flow_rules_after_the_same_data_are_two():
    more = {"after": ["pii"], "deny": {"egress": "internal"}}
    after = compiled(changed(("platform/spec/flow", [*WORLD["platform"]["spec"]["flow"], more])))
    assert {each[3] for each in told(BASE, after)} == {NARROWER}
    assert {each[3] for each in told(after, BASE)} == {WIDER}


def test_a_schema_written_otherwise_is_without_effect():
    found = told(BASE, compiled(changed((f"{CATALOG}/put/params/body/title", "An item"))))
    assert found == [("bot", "parameters", "shop/put body", EQUAL)]


def test_another_folder_and_another_order_of_files_are_no_change():
    reading = Reading(Path("/anchor"))
    base, head = (compiled(WORLD, folder, reading) for folder in ("/one", "/two"))
    assert diff(base, head).changes == ()
    assert diff(base, head).widens is False
    assert base.agents["bot"] is head.agents["bot"]


def test_a_changed_catalog_entry_is_told_for_each_agent_that_it_bears_on():
    world = changed(("other", copy.deepcopy(WORLD["bot"])), ("third", copy.deepcopy(WORLD["bot"])))
    for name in ("other", "third"):
        world[name]["spec"]["identity"] = {"token": True}
    del world["third"]["spec"]["tools"]["shop"]
    wider = copy.deepcopy(world)
    wider["shop"]["spec"]["operations"]["put"]["max_body"] = "2MiB"
    wider["shop"]["spec"]["operations"]["put"]["params"]["body"]["properties"]["n"]["maximum"] = 60
    wider["shop"]["spec"]["egress"] = "external"
    for reading in (None, Reading(Path("/somewhere"))):
        assert told(compiled(world, reading=reading), compiled(wider, reading=reading)) == [
            ("bot", "egress", "shop", NARROWER),
            ("bot", "max_body", "shop/put", WIDER),
            ("bot", "parameters", "shop/put body", WIDER),
            ("other", "egress", "shop", NARROWER),
            ("other", "max_body", "shop/put", WIDER),
            ("other", "parameters", "shop/put body", WIDER),
        ]


def test_what_only_moved_is_no_change():
    moved = {f"x-{name}" if name == "platform" else name: each for name, each in changed().items()}
    moved["x-platform"]["metadata"] = {"name": "platform"}
    assert told(BASE, compiled(moved)) == []


def test_a_second_load_gives_what_a_first_gives():
    world = changed((f"{CATALOG}/put/max_body", "2MiB"), ("bot/spec/limits/calls", "7/hour"))
    reading = Reading(Path("/somewhere"))
    assert compiled(WORLD, reading=reading).revision == BASE.revision
    again = compiled(world, reading=reading)
    assert diff(again, compiled(world)).changes == ()
    assert again.tools["shop"].operations["put"].max_body == 2 << 20


TABLES = {
    PolicySnapshot: meanings.PLATFORM, Agent: meanings.AGENT, Grant: meanings.GRANT, Tool: meanings.TOOL, Operation: meanings.OPERATION,
    Approval: meanings.APPROVAL, CredentialSpec: meanings.CREDENTIAL, Upstream: meanings.UPSTREAM, Decoys: meanings.DECOYS,
    Alerting: meanings.ALERTING,
}  # fmt: skip


@pytest.mark.parametrize("part", TABLES, ids=lambda part: part.__name__)
def test_a_table_names_every_field(part):
    assert {field.name for field in fields(part)} == set(TABLES[part])


def test_a_field_that_no_table_knows_is_told_as_changed():
    table = {name: rule for name, rule in meanings.OPERATION.items() if name != "max_body"}
    operation = BASE.tools["shop"].operations["get"]
    [step] = steps.compared(table, operation, replace(operation, max_body=7))
    assert (step.kind, step.direction, step.before, step.after) == ("max_body", CHANGED, "1048576", "7")


# -------------------------------------------------------------------------------------------------------------------- for people


def test_the_comment_begins_with_what_was_widened():
    after = compiled(changed((f"{CATALOG}/put/max_body", "2MiB"), ("bot/spec/limits/calls", "7/hour"), (PROBING, [])))
    text = as_markdown(diff(BASE, after))
    assert text.startswith("**2 wider, 1 narrower** for 1 agent and everybody\n")
    assert text.index("**wider** max_body `shop/put`: `1048576` → `2097152` (`shop.yaml#/spec/operations/put`)") < text.index(
        "**narrower** limit `agent/bot`: `calls: 100/hour` → `calls: 7/hour`"
    )
    assert as_markdown(Diff(())) == "**Nothing changes** in what agents may do.\n"


def change(agent="bot", before="", after="", direction=WIDER, about="x/y"):
    return Change(agent, about, "operation", direction, before, after, ("a.yaml#/x",))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a | b", "`a | b`"),
        ("<img src=x> @team #1", "`<img src=x> @team #1`"),
        ("`code`", "`` `code` ``"),
        ("``", "``` `` ```"),
        ("one\n## two\r", "`one\\n## two\\r`"),
        ("\u202e", "`\\u202e`"),
        ("", "nothing"),
        (" ", "`   `"),
        ("x" * 500, f"`{'x' * 240}…`"),
    ],
)
def test_what_comes_from_files_is_shown_as_code(value, shown):
    assert f"operation `x/y`: nothing → {shown} (`a.yaml#/x`)\n" in as_markdown(Diff((change(after=value),)))


def test_of_long_values_the_difference_is_shown():
    text = as_markdown(Diff((change(before=f"{'a' * 900}1{'b' * 900}", after=f"{'a' * 900}2{'b' * 900}"),)))
    assert f"`…{'a' * 60}1bbb" in text
    assert f"`…{'a' * 60}2bbb" in text
    assert "`short 1` → `short 2`" in as_markdown(Diff((change(before="short 1", after="short 2"),)))


def test_agents_with_the_same_change_stand_together():
    text = as_markdown(Diff(tuple(change(f"bot{number:04}") for number in range(2000))))
    assert text.startswith("**1 wider** for 2,000 agents\n")
    assert "### `bot0000`, `bot0001`, `bot0002` and 1,997 more\n" in text
    assert text.count("- **wider**") == 1


def test_a_comment_that_is_too_long_leaves_out_what_is_not_wider():
    padding = (change("aaa", about=f"limit {number}", direction=NARROWER, after="x" * 100) for number in range(2000))
    text = as_markdown(Diff((change("aaa"), *padding, change("zzz", about="more"))))
    assert text.count("- **wider**") == 2


def test_a_comment_fits_and_counts_what_is_left_out():
    changes = tuple(change(f"bot{number}", after=f"é{'`x' * 60}{number}") for number in range(3000))
    text = as_markdown(Diff(changes))
    assert len(text.encode()) <= MOST < 65_536
    shown = text.count("- **wider**")
    assert 100 < shown < 3000
    assert text.endswith(f"\n{3000 - shown} more changes left out here; `broker diff --json` lists every one.\n")
