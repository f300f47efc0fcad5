"""The kinds of manifests and what each issuer adds, from their JSON Schemas."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import orjson

from broker.credentials.registry import ISSUERS
from broker.manifest.models import KINDS
from docs.generate.page import MADE, cell


def kinds() -> str:
    """The four kinds, field by field, from their JSON Schemas. A part that several kinds share is shown once."""
    seen: set[str] = set()
    sections = [_kind(name, model.model_json_schema(), seen) for name, model in KINDS.items()]
    intro = (
        "What a manifests folder may hold. A field that is not listed is an error, and so is a value of another type. "
        "`manifests/schema/` has the same as JSON Schemas for editors; `broker check` judges.\n"
    )
    return f"{MADE}# Kinds\n\n{intro}\n" + "\n".join(sections)


def issuers() -> str:
    """The fields that each issuer has beside those of every credential."""
    sections = [_kind(name, issuer.Settings.model_json_schema(), set()) for name, issuer in sorted(ISSUERS.items())]
    intro = (
        "What a tool's `credential` may say beside `issuer` and `as`, by its issuer. `{env: NAME}` names a variable of the "
        "broker's, `{file: PATH}` a file, relative to the manifests folder; both are read anew each time. How to set each up: "
        "[credentials](../credentials.md).\n"
    )
    return f"{MADE}# Issuers\n\n{intro}\n" + "\n".join(sections)


def _kind(name: str, schema: dict[str, Any], seen: set[str]) -> str:
    definitions: dict[str, Any] = schema.get("$defs", {})
    text, waiting = f"## {name}\n\n{schema['description']}\n" + _fields(schema, definitions), [*_references(schema["properties"])]
    while waiting:
        part = waiting.pop(0)
        body = definitions[part]
        if part in seen or "properties" not in body:
            continue
        seen.add(part)
        text += f"\n### {part}\n\n{body.get('description', '')}\n" + _fields(body, definitions)
        waiting += _references(body["properties"])
    return text


def _references(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield _last(node["$ref"])
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


def _last(reference: str) -> str:
    return reference.rpartition("/")[2]


def _fields(body: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    required = body.get("required", [])
    rows = [
        f"| `{field}` | {_type(spec, definitions)} | {_default(field, spec, required)} | {_meaning(spec, definitions)} |"
        for field, spec in body["properties"].items()
    ]
    return "\n| field | type | default | meaning |\n| --- | --- | --- | --- |\n" + "\n".join(rows) + "\n"


def _meaning(spec: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    # A field that is a part of its own says nothing where the part says the same.
    part = definitions.get(_last(spec.get("$ref", "")), {})
    branches = (branch.get("description", "") for branch in spec.get("anyOf", ()))
    return cell(spec.get("description") or part.get("description", "") or next(filter(None, branches), ""))


def _type(spec: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "$ref" in spec:
        return _named(_last(spec["$ref"]), definitions)
    if "anyOf" in spec:
        return " or ".join(_type(each, definitions) for each in spec["anyOf"] if each.get("type") != "null")
    if "const" in spec:
        return f"`{spec['const']}`"
    if "enum" in spec:
        return cell(" | ".join(f"`{word}`" for word in spec["enum"]))
    kind = spec.get("type", "any")
    if kind == "array":
        return f"list of {_type(spec['items'], definitions)}"
    if kind == "object":
        inside = spec.get("additionalProperties") or next(iter(spec.get("patternProperties", {}).values()), None)
        keys = spec.get("propertyNames", {})
        words = " or ".join(f"`{word}`" for word in ([keys["const"]] if "const" in keys else keys.get("enum", [])))
        of = f" of {words}" if words else ""
        return f"map{of} to {_type(inside, definitions)}" if isinstance(inside, dict) else "map"
    return f"{kind} `{cell(spec['pattern'])}`" if "pattern" in spec else str(kind)


def _named(name: str, definitions: Mapping[str, Any]) -> str:
    if name == "JsonValue":
        return "any JSON"
    if name == "Code":
        return "[a code](codes.md)"
    body = definitions[name]
    return f"[{name}](#{name.lower()})" if "properties" in body else _type(body, definitions)


def _default(field: str, spec: Mapping[str, Any], required: Iterable[str]) -> str:
    if field in required:
        return "required"
    value = spec.get("default")
    return "" if value in (None, "", [], {}) or isinstance(value, dict) else f"`{orjson.dumps(value).decode()}`"
