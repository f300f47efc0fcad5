"""Reads a manifests folder: every file, every error, in one go.

Law: only a folder that can't be listed raises. Whatever is in it, the answer is a snapshot or errors, never both.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from broker.errors import UsageError
from broker.manifest.compile import compile_policy
from broker.manifest.fields import CUSTOM_CODES, REMEDY, redacted
from broker.manifest.findings import Finding
from broker.manifest.models import KINDS, Kind
from broker.manifest.scope import Declared, Source, Vocabulary
from broker.manifest.strict_yaml import MAX_BYTES, Document, Pointer, read
from broker.policy.snapshot import PolicySnapshot
from broker.policy.types import Json


@dataclass(frozen=True, slots=True)
class Loaded:
    """What came of a folder. `snapshot` is None exactly when a finding is an error. `files`: all that was read."""

    snapshot: PolicySnapshot | None
    findings: tuple[Finding, ...]
    files: tuple[Path, ...]


def vocabulary() -> Vocabulary:
    """The protocols and issuers that this broker has."""
    from broker.credentials import ISSUERS  # noqa: PLC0415 - what needs no registry (schemas, `findings`) must not import all
    from broker.protocols.registry import ADAPTERS  # noqa: PLC0415 - the same

    return Vocabulary(ADAPTERS, ISSUERS)


def load(directory: Path, words: Vocabulary | None = None) -> Loaded:
    """Read `*.yaml` and `*.yml` below the folder, except in `schema/` and what begins with a dot.

    Raises `UsageError` where the folder can't be listed.
    """
    texts: dict[str, bytes] = {}
    findings: list[Finding] = []
    for path in _listed(directory):
        name = path.relative_to(directory).as_posix()
        try:
            texts[name] = _bytes(path)
        except OSError as error:
            message = f"the file can't be read ({error.strerror or error})"
            findings.append(
                Finding(name, 1, 1, "file_unreadable", message, "make it a file that the broker may read, or remove it")
            )
    return load_texts(texts, directory, words, tuple(findings))


def _listed(directory: Path) -> list[Path]:
    if not directory.is_dir():
        advice = "name the folder that holds platform.yaml, tools/ and agents/"
        raise UsageError(f"there is no folder {str(directory)!r}", advice)
    try:
        found = [path for pattern in ("*.yaml", "*.yml") for path in directory.rglob(pattern) if not path.is_dir()]
    except OSError as error:
        raise UsageError(f"{str(directory)!r} can't be listed ({error.strerror})", "let the broker read it") from error
    return sorted(path for path in found if _wanted(path.relative_to(directory).parts))


def _wanted(parts: tuple[str, ...]) -> bool:
    return parts[0] != "schema" and not any(part.startswith(".") for part in parts)


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise OSError("it is no regular file")  # a pipe would be waited on for ever
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def load_texts(
    texts: Mapping[str, bytes], base: Path, words: Vocabulary | None = None, before: tuple[Finding, ...] = ()
) -> Loaded:
    """The same from contents at hand, by file name; `base` is where files that they name (certificates) are looked for.

    `before` are findings that are known already.
    """
    findings = list(before)
    sources: list[Source] = []
    declared: dict[str, frozenset[str]] = {}
    for file in sorted(texts):
        documents, problems = read(file, texts[file])
        findings += problems
        for document in documents:
            declared |= _declared(document.data)
            source, more = _typed(file, document, {(problem.line, problem.column) for problem in problems})
            findings += more
            sources += [source] if source else []
    if not texts and not before:
        advice = "write platform.yaml, tools/*.yaml and agents/*.yaml"
        findings.append(Finding(".", 1, 1, "manifests_missing", "there is no manifest here", advice))
    snapshot, problems, references = compile_policy(sources, words or vocabulary(), lambda name: _bytes(base / name), declared)
    findings = sorted({replace(finding, message=redacted(finding.message)) for finding in (*findings, *problems)})
    failed = any(finding.severity == "error" for finding in findings)
    files = tuple(base / name for name in (*sorted(texts), *references))
    return Loaded(None if failed else snapshot, tuple(findings), files)


def _declared(data: Mapping[str, Any]) -> Declared:
    metadata, spec = data.get("metadata"), data.get("spec")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    operations = spec.get("operations") if isinstance(spec, dict) else None
    if data.get("kind") != "Tool" or not isinstance(name, str):
        return {}
    return {name: frozenset(operations if isinstance(operations, dict) else ())}


# --------------------------------------------------------------------------------------------------------- data to kinds

_ROUNDS = 4
"""How often what is wrong is left out before a document is given up: deeper mistakes don't hide others."""


def _typed(file: str, document: Document, seen: set[tuple[int, int]]) -> tuple[Source | None, list[Finding]]:
    """The document as its kind, and what is wrong with it, except at the places `seen`, which have their finding already."""
    findings = [_secret(file, document, pointer) for pointer in _secrets(document.data, ())]
    seen |= {(finding.line, finding.column) for finding in findings}
    kind = document.data.get("kind")
    if "kind" not in document.data or not isinstance(kind, str) or kind not in KINDS:
        code = "kind_unknown" if "kind" in document.data else "field_missing"
        words = ", ".join(KINDS)
        findings.append(Finding(file, *document.at(("kind",)), code, "kind says what a document is", f"write one of: {words}"))
        return None, findings
    canonical = json.dumps(document.data, sort_keys=True, separators=(",", ":"))
    model, errors = _validated(KINDS[kind], canonical)
    findings += [
        found for found in (_invalid(file, document, error) for error in errors) if (found.line, found.column) not in seen
    ]
    rest, cut = canonical, []
    for _ in range(_ROUNDS):
        if model:
            break
        cut += [_cut(error) for error in errors]
        rest = _without(rest, [_cut(error) for error in errors])
        model, errors = _validated(KINDS[kind], rest)
    return (Source(file, document, canonical, model, tuple(cut)) if model else None), findings


def _validated(kind: type[Kind], text: str) -> tuple[Kind | None, list[ErrorDetails]]:
    try:
        return kind.model_validate_json(text), []
    except ValidationError as error:
        return None, error.errors(include_url=False, include_input=False)


def _pointer(error: ErrorDetails) -> tuple[Pointer, bool]:
    """Where in the document, and whether it is about the key there rather than its value."""
    location = error["loc"]
    if location[-1:] == ("[key]",):
        return location[:-1], True
    return location, error["type"] in ("extra_forbidden", "missing")


def _invalid(file: str, document: Document, error: ErrorDetails) -> Finding:
    pointer, key = _pointer(error)
    name = ".".join(str(part) for part in pointer) or "the document"
    place = document.at(pointer, key=key)
    if error["type"] == "extra_forbidden":
        return Finding(file, *place, "field_unknown", f"there is no field {name}", "correct its name, or take it out")
    if error["type"] == "missing":
        return Finding(file, *place, "field_missing", f"{name} is missing", "add it")
    if error["type"] == "secret_literal":
        return Finding(file, *place, "secret_literal", error["msg"], REMEDY)
    code = error["type"] if error["type"] in CUSTOM_CODES else "field_invalid"
    sentence, _, advice = re.sub(r"^(Input|String|Value) should", "it should", error["msg"]).partition("; ")
    return Finding(file, *place, code, f"{name} is not right: {sentence}", advice or "see the reference of this kind")


def _cut(error: ErrorDetails) -> Pointer:
    """What to leave out: the wrong value, or what lacks a field."""
    pointer, _ = _pointer(error)
    return pointer[:-1] if error["type"] == "missing" else pointer


def _without(text: str, pointers: Iterable[Pointer]) -> str:
    data = json.loads(text)
    # The last first, so that no index shifts before its turn.
    for pointer in sorted(set(pointers), key=lambda parts: [(isinstance(part, str), part) for part in parts], reverse=True):
        _delete(data, pointer)
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def _delete(data: Any, pointer: Pointer) -> None:
    with suppress(LookupError, TypeError):  # what held it may be gone already
        for part in pointer[:-1]:
            data = data[part]
        del data[pointer[-1]]


def _secrets(data: Json, pointer: Pointer) -> Iterator[Pointer]:
    if isinstance(data, str):
        if redacted(data) != data:
            yield pointer
    elif isinstance(data, dict):
        for key, value in data.items():
            yield from _secrets(value, (*pointer, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _secrets(value, (*pointer, index))


def _secret(file: str, document: Document, pointer: Pointer) -> Finding:
    return Finding(file, *document.at(pointer), "secret_literal", "this holds a credential of a well-known form", REMEDY)
