"""A public API's own schemas: the Petstore's OpenAPI document, which jsonschema's package brings along for its benchmarks.

Each of its operations becomes one of a catalog entry, with its schemas as they are written there.
"""

import copy
import json
from importlib.resources import files
from pathlib import Path

import pytest

from broker.manifest.diff import diff
from broker.manifest.load import load_texts
from broker.manifest.steps import Direction
from broker.rehearsal import Call, Rehearsal
from broker.review.edit import edited
from broker.review.propose import proposed

NOW = 1_800_000_000.0
_SHIPPED = files("jsonschema") / "benchmarks" / "issue232" / "issue.json"
if not _SHIPPED.is_file():
    pytest.skip("this version of jsonschema ships no OpenAPI document", allow_module_level=True)
API = json.loads(_SHIPPED.read_text())[0]["tests"][0]["data"]
ORDER = {"id": 7, "petId": 3, "quantity": 1, "status": "placed"}


def _schema(node):
    """Schemas of OpenAPI 2 as JSON Schema 2020-12: its references and what it has beside."""
    if isinstance(node, dict):
        known = {name: _schema(part) for name, part in node.items() if name not in ("xml", "example", "discriminator", "format")}
        return (
            {**known, "$ref": known["$ref"].replace("#/definitions/", "#/$defs/")}
            if isinstance(known.get("$ref"), str)
            else known
        )
    return [_schema(part) for part in node] if isinstance(node, list) else node


def _operation(method, path, written):
    params = {}
    for location in ("path", "query"):
        named = {each["name"]: {"type": each["type"]} for each in written["parameters"] if each["in"] == location}
        required = [each["name"] for each in written["parameters"] if each["in"] == location and each.get("required")]
        params[location] = {"properties": named, "required": required, "additionalProperties": False}
    for each in written["parameters"]:
        if each["in"] == "body":
            params["body"] = {**_schema(each["schema"]), "$defs": _schema(API["definitions"])}
    effect = {"get": "read", "delete": "destructive"}.get(method, "write")
    return {"match": {"method": method.upper(), "path": path}, "effect": effect, "params": params}


OPERATIONS = {
    written["operationId"]: _operation(method, path, written)
    for path, methods in API["paths"].items()
    for method, written in methods.items()
}


def document(kind, name, **spec):
    metadata = {"name": name, "owner": "team", "oncall": "team"}
    return json.dumps({"apiVersion": "broker/v1", "kind": kind, "metadata": metadata, "spec": spec}).encode()


def texts(operations=OPERATIONS, granted=None):
    endpoint = f"https://{API['host']}{API['basePath']}"
    grants = {name: {} for name in operations} if granted is None else granted
    return {
        "tool.yaml": document("Tool", "petstore", protocol="rest", endpoint=endpoint, operations=operations),
        "bot.yaml": document("Agent", "bot", identity={"token": True}, tools={"petstore": {"operations": grants}}),
    }


def loaded(**changed):
    found = load_texts(texts(**changed), Path())
    assert found.snapshot, found.findings
    return found


def order(**changed):
    return Call("POST", f"https://{API['host']}{API['basePath']}/store/order").with_json({**ORDER, **changed})


def test_its_operations_load_and_what_is_open_in_them_is_told():
    found = loaded()
    assert len(found.snapshot.tools["petstore"].operations) == len(OPERATIONS) > 15
    assert {finding.code for finding in found.findings} == {"schema_open"}, "the Petstore's bodies take any further field"


def test_calls_are_judged_by_its_schemas():
    rehearsal = Rehearsal(loaded().snapshot, NOW)
    assert rehearsal.call("bot", order()).passes
    denied = rehearsal.call("bot", order(status="eaten")).record
    assert [each["pointer"] for each in denied["violations"]] == ["/body/status"]


def test_a_schema_is_equal_to_itself_and_a_tighter_one_is_narrower():
    tighter = copy.deepcopy(OPERATIONS)
    tighter["getPetById"]["params"]["path"]["properties"]["petId"]["minimum"] = 1
    base, head = loaded().snapshot, loaded(operations=tighter).snapshot
    assert diff(base, base).changes == ()
    assert [(each.about, each.direction) for each in diff(base, head).changes] == [
        ("petstore/getPetById path", Direction.NARROWER)
    ]
    assert [each.direction for each in diff(head, base).changes] == [Direction.WIDER]


def test_a_changed_definition_is_no_narrower_whoever_refers_to_it():
    tighter = copy.deepcopy(OPERATIONS)
    tighter["placeOrder"]["params"]["body"]["$defs"]["Order"]["properties"]["quantity"]["maximum"] = 9
    changes = diff(loaded().snapshot, loaded(operations=tighter).snapshot).changes
    assert [(each.about, each.direction) for each in changes] == [("petstore/placeOrder body", Direction.CHANGED)]


def test_a_proposal_permits_one_order_and_no_other():
    before = texts(granted={})
    snapshot = load_texts(before, Path()).snapshot
    record = Rehearsal(snapshot, NOW).call("bot", order()).record
    edits, refused = proposed(snapshot, [record], ())
    assert refused == []
    after = load_texts({**before, "bot.yaml": edited(before["bot.yaml"].decode(), edits).encode()}, Path()).snapshot
    rehearsal = Rehearsal(after, NOW)
    assert rehearsal.call("bot", order()).passes
    assert not rehearsal.call("bot", order(quantity=2)).passes
    assert not rehearsal.call("bot", order(further="field")).passes
