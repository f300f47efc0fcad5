"""What the platform asks of manifests, what lapses, and what is odd about schemas: each with the fix that it names."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from broker.manifest.admission import Vocabulary
from broker.manifest.load import load_texts

NOW = datetime(2027, 1, 31, tzinfo=UTC)
WORDS = Vocabulary({"rest": frozenset({"path", "query", "body"}), "mcp": frozenset({"arguments"})}, {}, NOW.timestamp())
CLOSED = {"body": {"type": "object", "properties": {"title": {"type": "string", "maxLength": 9}}, "additionalProperties": False}}


def document(kind, name, spec, **metadata):
    known = {"name": name, "owner": "team-a", **{word: text for word, text in metadata.items() if text}}
    return json.dumps({"apiVersion": "broker/v1", "kind": kind, "metadata": known, "spec": spec}).encode()


def found(*, platform=None, agent=None, grants=None, operations=None, oncall="primary", owner="team-a"):  # noqa: PLR0913 - all that a rule looks at
    """The findings about one agent and one tool."""
    operations = operations or {
        "drop": {"match": {"method": "DELETE", "path": "/repos/{repo}"}, "effect": "destructive"},
        "make": {"match": {"method": "POST", "path": "/repos"}, "effect": "write", "params": CLOSED},
        "read": {"match": {"method": "GET", "path": "/repos"}, "effect": "read"},
    }
    tools = {"git": {"operations": {"read": {}} if grants is None else grants}}
    texts = {
        "tool.yaml": document("Tool", "git", {"protocol": "rest", "endpoint": "https://git.example", "operations": operations}),
        "bot.yaml": document(
            "Agent", "bot", {"identity": {"token": True}, "tools": tools, **(agent or {})}, oncall=oncall, owner=owner
        ),
    }
    if platform is not None:
        texts["platform.yaml"] = document("Platform", "acme", platform)
    return load_texts(texts, Path(), WORDS).findings


def codes(findings):
    return [f"{finding.code}{'' if finding.severity == 'error' else ' (warning)'}" for finding in findings]


TEAM = {"teams": {"team-a": {"oncall": "primary"}}}
STRICT = {**TEAM, "admission": {}}
DROP = {"drop": {}}


@pytest.mark.parametrize(
    ("platform", "manifest", "expected"),
    [
        pytest.param(None, {"oncall": "", "grants": DROP}, [], id="without a platform policy nobody asks"),
        pytest.param(
            {}, {"oncall": "", "grants": DROP}, ["oncall_missing (warning)", "destructive_unbounded (warning)"], id="warned"
        ),
        pytest.param(STRICT, {}, [], id="all is well"),
        pytest.param({"admission": {}}, {}, ["owner_unknown"], id="an owner that is no team"),
        pytest.param(STRICT, {"owner": "team-b"}, ["owner_unknown"], id="an owner that is another"),
        pytest.param({"teams": {"team-a": {}}, "admission": {}}, {"oncall": ""}, ["oncall_missing"], id="nobody on call"),
        pytest.param(STRICT, {"oncall": ""}, [], id="the team's on-call"),
        pytest.param({**TEAM, "admission": {"tools": []}}, {}, ["tool_not_approved"], id="a tool that is not approved"),
        pytest.param({**TEAM, "admission": {"tools": ["git"]}}, {}, [], id="one that is"),
        pytest.param(STRICT, {"grants": DROP}, ["destructive_unbounded"], id="destroys whatever it likes"),
        pytest.param(
            STRICT, {"grants": {"drop": {"params": {"path": {"properties": {"repo": {"const": "web"}}}}}}}, [], id="pinned"
        ),
        pytest.param(
            STRICT,
            {"grants": {"drop": {"params": {"query": {"properties": {"force": {"const": True}}}}}}},
            ["destructive_unbounded"],
            id="a pin that names no resource",
        ),
        pytest.param(STRICT, {"grants": {"drop": {"approval": {}}}}, [], id="asks each time"),
        pytest.param(
            STRICT,
            {"grants": {"drop": {"approval": {"when": {"path": {"properties": {"repo": {"const": "web"}}}}}}}},
            ["destructive_unbounded"],
            id="asks only sometimes",
        ),
        pytest.param(
            STRICT,
            {"grants": {"drop": {"params": {"path": {"properties": {"repo": {"const": "web"}}}}, "shadow_until": "2027-02-01"}}},
            ["destructive_unbounded", "shadow (warning)"],
            id="pinned, but shadow mode enforces no pins",
        ),
    ],
)
def test_what_the_platform_asks(platform, manifest, expected):
    findings = found(platform=platform, **manifest)
    assert codes(findings) == expected
    assert all(finding.advice for finding in findings)


DELETE_PAGE = {"type": "object", "required": ["page"], "properties": {"page": {"type": "string"}, "why": {"type": "string"}}}
OBJECT = {"type": "object"}
INNER = {"required": ["id"], "properties": {"id": {"const": 1}}}
ID = {"path": {"properties": {"repo": {"type": "integer"}}}}


@pytest.mark.parametrize(
    ("where", "declared", "schema", "bounded"),
    [
        *(
            ("path", {}, {"properties": {"repo": {"pattern": pattern}}}, bounded)
            for patterns, bounded in (
                (("^acme-", "^acme-.*$", "^acme-(a|[|])+$", r"^\.x$", "^acme-?$", r"^a\$"), True),
                ((".*", "^[A-Za-z0-9_.-]+$", ".{5,}", "[a-z]", "^.{4,}$", "^[^W]*$", "acme-.*$", "^a?b", "^acme-|x"), False),
                (("^a*$", "^a?.*$", "^a{0}.*$", "^a|.*$", "^a(b)|c$", r"^\w+$", "^a(b|(c)))|.$"), False),
            )
            for pattern in patterns
        ),
        ("path", ID, {"properties": {"repo": {"pattern": "^7$"}}}, False),
        ("path", ID, {"properties": {"repo": {"enum": [7, 8]}}}, True),
        ("query", {}, {"required": ["page"], "properties": {"page": {"const": "a"}}}, True),
        ("body", {"body": DELETE_PAGE}, {"properties": {"page": {"const": "a"}}}, True),
        ("body", {"body": DELETE_PAGE}, {"properties": {"page": {"pattern": "^draft-.*$"}}}, True),
        ("body", {"body": DELETE_PAGE}, {"properties": {"why": {"const": "a"}}}, False),
        ("body", {"body": DELETE_PAGE}, {"required": ["why"], "properties": {"why": {"const": "a"}}}, True),
        ("body", {}, {"required": ["id"], "properties": {"id": {"const": "a"}}}, False),
        ("body", {}, {**OBJECT, "required": ["id"], "properties": {"id": {"const": "a"}}}, True),
        ("body", {}, {**OBJECT, "required": ["id"], "properties": {"id": {"pattern": "^draft-.*$"}}}, False),
        ("body", {}, {**OBJECT, "required": ["id"], "properties": {"id": {"type": "string", "pattern": "^draft-.*$"}}}, True),
        ("body", {}, {**OBJECT, "required": ["sure"], "properties": {"sure": {"enum": [True, False]}}}, False),
        ("body", {}, {**OBJECT, "required": ["o"], "properties": {"o": INNER}}, False),
        ("body", {}, {**OBJECT, "required": ["o"], "properties": {"o": {**OBJECT, **INNER}}}, True),
        ("body", {}, {**OBJECT, "required": ["o"], "properties": {"o": {**OBJECT, "properties": {"id": {"const": 1}}}}}, False),
    ],
)
def test_what_is_destroyed_is_pinned_by_a_parameter_that_every_call_has(where, declared, schema, bounded):
    path = "/repos/{repo}" if where == "path" else "/repos"
    drop = {"match": {"method": "POST", "path": path}, "effect": "destructive", "params": declared}
    findings = found(platform=STRICT, operations={"drop": drop}, grants={"drop": {"params": {where: schema}}})
    assert ("destructive_unbounded" in codes(findings)) is not bounded


@pytest.mark.parametrize(
    ("ceilings", "limits", "refused"),
    [
        pytest.param({"usd": "200/day"}, {"usd": "200/day"}, False, id="as much as the team"),
        pytest.param({"usd": "200/day"}, {"usd": "201/day"}, True, id="a dollar more"),
        pytest.param({"tokens": "10M/day"}, {"tokens": "1M/hour"}, False, id="a tenth of it in an hour"),
        pytest.param({"tokens": "10M/day"}, {"tokens": "11M/hour"}, True, id="more than it in an hour"),
        pytest.param({"writes": "10/hour"}, {"writes": "1000/day"}, True, id="more than all its hours"),
        pytest.param({"writes": "10/hour"}, {"writes": "240/day"}, False, id="as much as all its hours"),
        pytest.param({"rate": "10/s"}, {"rate": "11/s"}, True, id="faster"),
        pytest.param({"concurrency": 4}, {"concurrency": 5}, True, id="more at once"),
        pytest.param({"usd": "200/day"}, {"tokens": "900M/day"}, False, id="another measure"),
        pytest.param({"rate": "10/s", "burst": 1}, {"rate": "1/s", "burst": 9}, False, id="a bucket's size is no ceiling"),
    ],
)
@pytest.mark.parametrize("where", ["agent", "operation", "environment"])
def test_no_manifest_asks_for_more_than_its_team_may_have(ceilings, limits, refused, where):
    platform = {"ceilings": ceilings} if where == "environment" else {"teams": {"team-a": {"ceilings": ceilings}}}
    parts = {"grants": {"read": {"limits": limits}}} if where == "operation" else {"agent": {"limits": limits}}
    assert codes(found(platform=platform, **parts)) == ["ceiling_exceeded"] * refused


@pytest.mark.parametrize(
    ("days", "expected"), [(-1, ["lapsed (warning)"]), (13, ["lapses_soon (warning)"]), (15, [])], ids=["over", "soon", "not yet"]
)
def test_a_grant_that_lapses_is_told_of_before(days, expected):
    assert codes(found(grants={"read": {"expires": (NOW + timedelta(days)).isoformat()}})) == expected


@pytest.mark.parametrize(("days", "expected"), [(-1, ["lapsed (warning)"]), (99, ["shadow (warning)"])], ids=["over", "on"])
@pytest.mark.parametrize("whole", [True, False], ids=["of the agent", "of an operation"])
def test_shadow_mode_is_told_of(days, expected, whole):
    until = {"shadow_until": (NOW + timedelta(days)).date().isoformat()}
    parts = {"agent": {"mode": "shadow", **until}} if whole else {"grants": {"read": until}}
    assert codes(found(**parts)) == expected


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        pytest.param({"body": {"properties": {"title": {"const": "x"}}}}, [], id="a rule that can be kept"),
        pytest.param(
            {"body": {"properties": {"title": {"enum": [7, "toolongforit"]}}}}, ["unsatisfiable"], id="no value listed fits"
        ),
        pytest.param({"body": {"properties": {"title": {"enum": [7, "fits"]}}}}, [], id="one of them does"),
        pytest.param(
            {"body": {"properties": {"title": {"minLength": 10}}}}, ["unsatisfiable"], id="longer than the catalog takes"
        ),
        pytest.param({"body": {"properties": {"title": {"minLength": 9}}}}, [], id="as long"),
        pytest.param({"body": {"properties": {"titel": {"const": "x"}}}}, ["unreachable"], id="a name that is misspelt"),
        pytest.param({"body": {"required": ["titel"]}}, ["unsatisfiable"], id="a name that nobody may send"),
        pytest.param({"body": {"type": "string", "const": 7}}, ["unsatisfiable"], id="a constant of another type"),
        pytest.param({"body": {"properties": {"title": {"enum": []}}}}, ["unsatisfiable"], id="an empty list"),
        pytest.param({"body": {"not": {}}}, ["unsatisfiable"], id="nothing at all"),
        pytest.param({"body": {"required": ["title"], "properties": {"title": {"not": {}}}}}, ["unsatisfiable"], id="nor below"),
        pytest.param({"body": {"properties": {"title": {"type": "integer"}}}}, ["unsatisfiable"], id="another type"),
        pytest.param(
            {"query": {"properties": {"n": {"type": "integer", "minimum": 5, "maximum": 4}}}},
            ["unsatisfiable"],
            id="crossed bounds",
        ),
        pytest.param(
            {"query": {"properties": {"n": {"type": "number", "minimum": 5, "exclusiveMaximum": 5}}}},
            ["unsatisfiable"],
            id="bounds that touch, of which one is excluded",
        ),
        pytest.param(
            {"query": {"additionalProperties": False, "properties": {"a": {}}, "required": ["b"]}},
            ["unsatisfiable"],
            id="its own",
        ),
        pytest.param(
            {"query": {"properties": {"l": {"items": {"type": "integer", "minimum": 2, "maximum": 1}}}}},
            ["unsatisfiable"],
            id="in a list",
        ),
        pytest.param({"query": {"$ref": "#/$defs/a", "$defs": {"a": {}}, "const": {}}}, [], id="what refers to its whole"),
    ],
)
def test_a_schema_that_can_not_be_meant(params, expected):
    wanted = [f"schema_{code}" for code in expected]
    assert codes(found(grants={"make": {"params": params}})) == wanted
    assert codes(found(grants={"make": {"approval": {"when": params}}})) == wanted, "of an approval too"


REFERRED, DEFINED = {"$ref": "#/$defs/b"}, {"$defs": {"b": CLOSED["body"]}}
BASE = {"type": "object", "properties": {"kind": {"$ref": "#/$defs/kind"}}, "$defs": {"kind": {"type": "string"}}}
ODD = {
    "a name that a pattern fits": (
        {"patternProperties": {"^x-": {"type": "string"}}, "additionalProperties": {"type": "integer"}},
        {"properties": {"x-a": {"const": "s"}}},
    ),
    "a name that a pattern forbids to nobody": (
        {"patternProperties": {"^x-": {}}, "additionalProperties": False},
        {"properties": {"x-a": {"const": 1}}, "required": ["x-a"]},
    ),
    "a list whose first places have schemas of their own": (
        {"prefixItems": [{"type": "string"}], "items": {"type": "integer"}}, {"items": {"enum": ["s"]}}
    ),
    "the catalog's references": (BASE, {"properties": {"kind": {"const": "a"}}}),
    "its own": (BASE, {"properties": {"kind": {"$ref": "#/$defs/k"}}, "$defs": {"k": {"enum": ["a"]}}}),
    "what may be null": ({"properties": {"n": {"type": ["integer", "null"]}}}, {"properties": {"n": {"const": None}}}),
    "alternatives": ({"oneOf": [CLOSED["body"], {"type": "null"}]}, {"properties": {"title": {"const": "x"}}}),
    "conjunctions": ({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, {"required": ["a", "b"]}),
    "a closed object in another": (
        {"properties": {"o": CLOSED["body"]}, "additionalProperties": False}, {"properties": {"o": {"properties": {"title": {}}}}}
    ),
    "bounds of either of two types": ({"minLength": 5}, {"maximum": 3}),
    "bounds of numbers, where texts pass": ({"properties": {"n": {"minimum": 100}}}, {"properties": {"n": {"maximum": 5}}}),
    "bounds of numbers that are none any more": (
        {"properties": {"n": {"type": ["string", "integer"], "minimum": 9}}},
        {"properties": {"n": {"type": "string", "maximum": 5}}},
    ),
    "bounds that touch": ({"type": "integer", "minimum": 5}, {"type": "number", "maximum": 5}),
    "a name that must not be sent, and isn't": (CLOSED["body"], {"properties": {"legacy": False, "old": {"not": {}}}}),
    "a name that must not be sent, though it may": (CLOSED["body"], {"properties": {"title": {"not": {}}}}),
    "a list that must not be sent": (
        {"properties": {"l": {"type": "array", "minItems": 1}}}, {"properties": {"l": {"maxItems": 0}}}
    ),
    "a name that an object must have, where nothing may be sent too": (
        {"type": ["object", "null"], "additionalProperties": False}, {"required": ["zz"]}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_reasonable_schema_is_not_found_odd(name):
    declared, own = ODD[name]
    make = {"match": {"method": "POST", "path": "/repos"}, "effect": "read", "params": {"body": declared}}
    assert codes(found(operations={"make": make}, grants={"make": {"params": {"body": own}}})) == []


@pytest.mark.parametrize(
    ("effect", "method", "params", "expected"),
    [
        pytest.param("write", "POST", {}, True, id="no schema at all"),
        pytest.param("write", "PUT", {"body": {"type": "object"}}, True, id="any fields"),
        pytest.param("write", "POST", CLOSED, False, id="a list of fields"),
        pytest.param("write", "POST", {"body": {"oneOf": [CLOSED["body"]]}}, False, id="closed by its alternatives"),
        pytest.param(
            "write",
            "POST",
            {"body": {"properties": {}, "additionalProperties": False}},
            True,
            id="a list, since no type is named",
        ),
        pytest.param("write", "POST", {"body": {"anyOf": [CLOSED["body"], OBJECT]}}, True, id="one alternative is open"),
        pytest.param("write", "POST", {"body": {"oneOf": [CLOSED["body"], {"type": "null"}]}}, False, id="or nothing"),
        pytest.param("write", "POST", {"body": {"anyOf": [REFERRED, REFERRED], **DEFINED}}, False, id="closed by references"),
        pytest.param(
            "write",
            "POST",
            {"body": {**OBJECT, "allOf": [{"additionalProperties": False}, {"minProperties": 1}]}},
            False,
            id="both",
        ),
        pytest.param(
            "write",
            "POST",
            {"body": {**CLOSED["body"], "patternProperties": {".*": {}}}},
            True,
            id="fields of any name, by a pattern",
        ),
        pytest.param("write", "POST", {"body": {**CLOSED["body"], "patternProperties": {"^x-": {}}}}, False, id="of some names"),
        pytest.param(
            "write", "POST", {"body": {"$ref": "#/$defs/b", "$defs": {"b": {"$ref": "#/$defs/b"}}}}, True, id="itself, over again"
        ),
        pytest.param("write", "POST", {"body": {"const": {}}}, False, id="one body only"),
        pytest.param("write", "POST", {"body": {"$ref": "#/$defs/b", "$defs": {"b": CLOSED["body"]}}}, False, id="by reference"),
        pytest.param("write", "POST", {"body": {"$ref": "#/$defs/b", "$defs": {"b": {}}}}, True, id="open, by reference"),
        pytest.param("write", "POST", {"body": {"$ref": "#", "$defs": {}}}, True, id="open, and a reference to itself"),
        pytest.param("read", "POST", {}, False, id="it only reads"),
        pytest.param("destructive", "DELETE", {}, False, id="it has no body"),
    ],
)
def test_an_operation_that_changes_something_is_closed(effect, method, params, expected):
    operation = {"match": {"method": method, "path": "/x"}, "effect": effect, "params": params}
    assert codes(found(operations={"read": operation})) == ["schema_open (warning)"] * expected


def test_a_finding_stands_where_the_mistake_is():
    text = document("Agent", "bot", {"identity": {"token": True}, "tools": {}, "limits": {"usd": "9/day"}}, oncall="x")
    platform = document("Platform", "acme", {"ceilings": {"usd": "8/day"}})
    (finding,) = load_texts({"bot.yaml": text, "p.yaml": platform}, Path(), WORDS).findings
    assert text[finding.column - 1 :].startswith(b'"usd"')
    assert finding.sentence.startswith("this is more than the whole environment may have; write at most its ceiling")


@pytest.mark.parametrize(
    "end",
    ["2027-02-30", "tomorrow", "2027-01-31T12:00:00", "12:00", ""],
    ids=["no day", "a word", "no zone", "no date", "nothing"],
)
def test_an_end_that_is_none(end):
    assert codes(found(grants={"read": {"expires": end}})) == ["field_invalid"]


@pytest.mark.parametrize(
    ("agent", "code"),
    [({"mode": "shadow"}, "shadow_without_end"), ({"shadow_until": "2027-02-01"}, "field_invalid")],
    ids=["shadow mode without an end", "an end without shadow mode"],
)
def test_shadow_mode_and_its_end_stand_together(agent, code):
    assert codes(found(agent=agent)) == [code]
