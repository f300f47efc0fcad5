"""Findings: what is wrong in the files, where, and what to do; and the four ways to print that.

Law: a finding is safe to print. It never quotes a value that could be a secret, and whatever a file or its name smuggles in
(terminal control, bidirectional overrides, workflow commands) comes out escaped, on one line.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One thing to know about one place. `line` and `column` count from 1; `code` is stable; `advice` begins with a verb.

    `file` is relative to the manifests folder, with `/`. `severity` is `error` or `warning`.
    """

    file: str
    line: int
    column: int
    code: str
    message: str
    advice: str
    severity: str = "error"

    @property
    def sentence(self) -> str:
        """What is wrong, and what to do."""
        return f"{self.message}; {self.advice}" if self.advice else self.message


def printable(text: str) -> str:
    """The text with every character that a terminal would act on, or that can't be seen, written as an escape."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text)


def as_text(findings: Iterable[Finding]) -> str:
    """`file:line:column: code: message, and what to do`, one line each; a warning says so at the end."""
    mark = {"error": "", "warning": " (warning)"}
    lines = (f"{f.file}:{f.line}:{f.column}: {f.code}: {f.sentence}{mark[f.severity]}" for f in findings)
    return "".join(printable(line) + "\n" for line in lines)


def as_json(findings: Iterable[Finding]) -> str:
    """A JSON array of objects with the fields of `Finding`, ASCII only."""
    return json.dumps([asdict(finding) for finding in findings], indent=1) + "\n"


def as_github(findings: Iterable[Finding]) -> str:
    """GitHub's workflow commands, which become annotations on the pull request."""

    def escaped(text: str, more: str = "") -> str:
        # `%` is the escape character of workflow commands; CR and LF would end one and begin the next.
        return printable("".join(f"%{ord(char):02X}" if char in f"%\r\n{more}" else char for char in text))

    return "".join(
        f"::{f.severity} file={escaped(f.file, ':,')},line={f.line},col={f.column},title={f.code}::{escaped(f.sentence)}\n"
        for f in findings
    )


def as_sarif(findings: Iterable[Finding]) -> str:
    """SARIF 2.1.0 (OASIS), the least that code-scanning services take."""
    found = tuple(findings)
    driver = {"name": "broker check", "rules": [{"id": code} for code in sorted({finding.code for finding in found})]}
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": [_result(finding) for finding in found]}
    log = {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=1) + "\n"


def _result(finding: Finding) -> dict[str, Any]:
    region = {"startLine": finding.line, "startColumn": finding.column}
    place = {"artifactLocation": {"uri": finding.file}, "region": region}
    message = {"text": printable(finding.sentence)}
    return {"ruleId": finding.code, "level": finding.severity, "message": message, "locations": [{"physicalLocation": place}]}


FORMATS: Mapping[str, Callable[[Iterable[Finding]], str]] = MappingProxyType(
    {"text": as_text, "json": as_json, "github": as_github, "sarif": as_sarif}
)
"""What `--format` may name."""
