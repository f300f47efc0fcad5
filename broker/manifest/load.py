"""Reads a manifests folder: every file, every error, in one go.

Law: only a folder that can't be listed raises. Whatever is in it, the answer is a snapshot or errors, never both.
"""

import gc
import json
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from broker import clock
from broker.errors import UsageError
from broker.manifest.admission import Source, Vocabulary, admit
from broker.manifest.compile import Made, compile_policy
from broker.manifest.findings import Finding
from broker.manifest.models import KINDS
from broker.manifest.strict_yaml import MAX_BYTES, Document, Pointer, read
from broker.policy.snapshot import PolicySnapshot
from broker.redaction import redacted


@dataclass(frozen=True, slots=True)
class Loaded:
    """What came of a folder. `snapshot` is None exactly when a finding is an error.

    `files`: all that was read; `sources`: what is in them.
    """

    snapshot: PolicySnapshot | None
    findings: tuple[Finding, ...]
    files: tuple[Path, ...]
    sources: tuple[Source, ...] = ()


def vocabulary() -> Vocabulary:
    """The protocols and issuers that this broker has, and the time."""
    from broker.credentials.registry import ISSUERS  # noqa: PLC0415 - what needs no registry (schemas, `findings`) must not import all
    from broker.credentials.settings import problems  # noqa: PLC0415 - the same
    from broker.protocols.registry import ADAPTERS  # noqa: PLC0415 - the same

    locations = {name: adapter.locations for name, adapter in ADAPTERS.items()}
    return Vocabulary(
        locations, {name: partial(problems, issuer.Settings, name) for name, issuer in ISSUERS.items()}, clock.now()
    )


Progress = Callable[[str, int, int], object]
"""Is told what is done, how much of it, and how much there is; at last that all is."""


def _quiet(_what: str, _done: int, _all: int) -> None:
    """Tells nobody."""


class Reading:
    """How folders are read, and what became of files: what is the same in two folders is made once.

    References to files are made absolute below `anchor`, for else the folders' own places would make a difference. With more than
    one of `processes` YAML is read in forks, so that only a process without threads may ask for them.
    """

    def __init__(self, anchor: Path, progress: Progress = _quiet, processes: int = 1) -> None:
        self.anchor, self.progress, self.processes = anchor, progress, processes
        self.made = Made()
        self._files: dict[tuple[str, bytes], tuple[list[Source], list[Finding]]] = {}

    def sources(self, texts: Mapping[str, bytes]) -> Iterator[tuple[list[Source], list[Finding]]]:
        """Of each file, in order, the documents and what is wrong with them."""
        unknown = [file for file in sorted(texts) if (file, texts[file]) not in self._files]
        for number, (file, found) in enumerate(_documents(unknown, texts, self.processes)):
            self.progress("reading", number, len(unknown))
            self._files[file, texts[file]] = _sources(file, *found)
        return (self._files[file, texts[file]] for file in sorted(texts))


_FORK_FROM = 1000  # files: about two seconds of reading, a hundred times what a fork takes
_Read = tuple[tuple[Document, ...], tuple[Finding, ...]]


def _documents(files: Sequence[str], texts: Mapping[str, bytes], processes: int) -> Iterator[tuple[str, _Read]]:
    contents = (texts[file] for file in files)
    if processes == 1 or len(files) < _FORK_FROM:
        yield from zip(files, map(read, files, contents), strict=True)
        return
    ignore = (signal.SIGINT, signal.SIG_IGN)  # whoever interrupts means this process, which then ends the others
    with ProcessPoolExecutor(processes, get_context("fork"), signal.signal, ignore) as pool:
        yield from zip(files, pool.map(read, files, contents, chunksize=50), strict=True)


def load(directory: Path, words: Vocabulary | None = None, reading: Reading | None = None) -> Loaded:
    """Read `*.yaml` and `*.yml` below the folder, except in `schema/` and what begins with a dot.

    Raises `UsageError` where the folder can't be listed.
    """
    texts: dict[str, bytes] = {}
    paths, problems = _listed(directory)
    for path in paths:
        try:
            texts[path.relative_to(directory).as_posix()] = _bytes(path)
        except OSError as error:
            problems.append((path, f"the file can't be read ({error.strerror or error})", _LET))
    findings = [Finding(path.relative_to(directory).as_posix(), 1, 1, "file_unreadable", *why) for path, *why in problems]
    return load_texts(texts, directory, words, tuple(findings), reading)


_LET = "let the broker read it, or remove it"
_LINKED = "the folder is a link, which is not followed", "have the folder itself there, or remove it"


def _listed(directory: Path) -> tuple[list[Path], list[tuple[Path, str, str]]]:
    """The files, and the folders in which there may be more, each with why that is not known, and what to do."""
    if not directory.is_dir():
        advice = "name the folder that holds platform.yaml, tools/ and agents/"
        raise UsageError(f"there is no folder {str(directory)!r}", advice)
    found: list[Path] = []
    problems: list[tuple[Path, str, str]] = []

    def unlisted(error: OSError) -> None:
        folder = Path(error.filename or directory)
        if folder == directory:
            raise UsageError(f"{str(directory)!r} can't be listed ({error.strerror})", "let the broker read it") from error
        problems.append((folder, f"the folder can't be listed ({error.strerror})", _LET))

    for here, below, names in os.walk(directory, onerror=unlisted, followlinks=True):
        folder = Path(here)
        below[:] = [name for name in below if name[0] != "." and (name != "schema" or folder != directory)]
        linked = [name for name in below if (folder / name).is_symlink() and not _is_mounted(folder / name, directory)]
        problems += [(folder / name, *_LINKED) for name in linked]
        below[:] = [name for name in below if name not in linked]
        found += [folder / name for name in names if name[0] != "." and name.endswith((".yaml", ".yml"))]
    return sorted(found), problems


def _is_mounted(link: Path, directory: Path) -> bool:
    """Whether Kubernetes made this link: to a folder of the ConfigMap that is mounted here."""
    return link.parent == directory and link.readlink().parts[0] == "..data"


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise OSError("it is no regular file")  # a pipe would be waited on for ever
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


@contextmanager
def _growing() -> Iterator[None]:
    """Hold up the search for unreachable cycles: nearly all that is made here stays, and each search would look at all of it."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@_growing()
def load_texts(
    texts: Mapping[str, bytes],
    base: Path,
    words: Vocabulary | None = None,
    before: tuple[Finding, ...] = (),
    reading: Reading | None = None,
) -> Loaded:
    """The same from contents at hand, by file name; `base` is where files that they name (certificates) are looked for.

    `before` are findings that are known already.
    """
    reading = reading or Reading(base)
    findings = list(before)
    sources: list[Source] = []
    for typed, problems in reading.sources(texts):
        sources += typed
        findings += problems
    if not texts and not before:
        advice = "write platform.yaml, tools/*.yaml and agents/*.yaml"
        findings.append(Finding(".", 1, 1, "manifests_missing", "there is no manifest here", advice))
    more, pems = admit(sources, words or vocabulary(), lambda name: _bytes(base / name))
    findings = sorted({replace(finding, message=redacted(finding.message)) for finding in (*findings, *more)})
    failed = any(finding.severity == "error" for finding in findings)
    files = tuple(base / name for name in (*sorted(texts), *pems))
    told = partial(reading.progress, "compiling")
    snapshot = None if failed else compile_policy(sources, pems, reading.anchor, reading.made, told)
    told(1, 1)
    return Loaded(snapshot, tuple(findings), files, tuple(sources))


def _sources(file: str, documents: Iterable[Document], problems: Iterable[Finding]) -> tuple[list[Source], list[Finding]]:
    """The documents of one file as their kinds, and all that is wrong with them."""
    sources, findings = [], list(problems)
    seen = {(problem.line, problem.column) for problem in findings}  # what YAML made of it is told already
    for document in documents:
        source, more = _typed(file, document)
        findings += [finding for finding in more if (finding.line, finding.column) not in seen]
        sources += [source] if source else []
    return sources, findings


def _typed(file: str, document: Document) -> tuple[Source | None, list[Finding]]:
    """The document as its kind, and what is wrong with it.

    What is wrong is cut out until the rest is right, so that mistakes don't hide what other rules say of the rest.
    """
    kind = document.data.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        code = "kind_unknown" if "kind" in document.data else "field_missing"
        advice = f"write one of: {', '.join(KINDS)}"
        return None, [Finding(file, *document.at(("kind",)), code, "kind says what a document is", advice)]
    canonical = rest = json.dumps(document.data, sort_keys=True, separators=(",", ":"))
    findings: list[Finding] = []
    cut: list[Pointer] = []
    while True:
        try:
            return Source(file, document, canonical, KINDS[kind].model_validate_json(rest), tuple(cut)), findings
        except ValidationError as invalid:
            errors = invalid.errors(include_url=False, include_input=False)
        findings = findings or [_finding(file, document, error) for error in errors]
        data = json.loads(rest)
        if not sum(_cut(data, error, cut) for error in reversed(errors)):  # the last first, so that no index shifts
            return None, findings
        rest = json.dumps(data)


def _finding(file: str, document: Document, error: ErrorDetails) -> Finding:
    ctx: dict[str, Any] = error.get("ctx", {})
    pointer = _pointer(error)
    for text in ctx.get("pointer", "").split("/")[1:]:
        part = text.replace("~1", "/").replace("~0", "~")
        pointer.append(int(part) if part.isdigit() and (*pointer, part) not in document.values else part)
    name = ".".join(str(part) for part in error["loc"] if part in pointer or part == "[key]") or "the document"
    key = error["loc"][-1:] == ("[key]",)
    sentence = re.sub(r"^(Input|String|Value) should", "it should", error["msg"])
    code, why = error["type"], sentence
    if code in _FIELDS:
        key = True
        code, why = _FIELDS[code]
        why = why.format(name)
    elif code == "field_invalid" or "why" not in ctx:
        code, why = "field_invalid", f"{name} is not right: {sentence}"
    message, _, advice = why.partition("; ")
    return Finding(file, *document.at(tuple(pointer), key=key), code, message, advice or "see the reference of this kind")


def _pointer(error: ErrorDetails) -> list[str | int]:
    """Where in the document. The validator's own words on the way (`[key]`, `[one]`) stand in brackets; no field's name does."""
    return [part for part in error["loc"] if not (isinstance(part, str) and part.startswith("["))]


_FIELDS = {
    "extra_forbidden": ("field_unknown", "there is no field {}; correct its name, or take it out"),
    "missing": ("field_missing", "{} is missing; add it"),
}


def _cut(data: Any, error: ErrorDetails, cut: list[Pointer]) -> bool:
    """Take the wrong value out, or what lacks a field; False where there is nothing to take."""
    pointer = tuple(_pointer(error))
    pointer = pointer[:-1] if error["type"] == "missing" else pointer
    try:
        for part in pointer[:-1]:
            data = data[part]
        del data[pointer[-1]]
    except (LookupError, TypeError):  # what held it is gone already
        return False
    cut.append(pointer)
    return True
