"""Findings: what is wrong in the files, where, and what to do; and the four ways to print that.

Law: a finding is safe to print. It never quotes a value that could be a secret, and whatever a file or its name smuggles in
(terminal control, bidirectional overrides, workflow commands) comes out escaped, on one line.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One thing to know about one place. `line` and `column` count from 1; `code` is stable; `advice` begins with a verb.

    `file` is relative to the manifests folder, with `/`.
    """

    file: str
    line: int
    column: int
    code: str
    message: str
    advice: str
    severity: Severity = "error"


# C0, C1, line separators, bidirectional controls, and the surrogates by which Python carries file names that are not UTF-8.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with every character that a terminal would act on written as an escape."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def as_text(findings: Iterable[Finding]) -> str:
    """`file:line:column: code: message, and what to do`, one line each; a warning says so after its code."""
    return "".join(printable(f"{_place(finding)}: {_label(finding)}: {_sentence(finding)}") + "\n" for finding in findings)


def _place(finding: Finding) -> str:
    return f"{finding.file}:{finding.line}:{finding.column}"


def _label(finding: Finding) -> str:
    return finding.code if finding.severity == "error" else f"{finding.code} (warning)"


def _sentence(finding: Finding) -> str:
    return f"{finding.message}; {finding.advice}" if finding.advice else finding.message


def as_json(findings: Iterable[Finding]) -> str:
    """A JSON array of objects with the fields of `Finding`, ASCII only."""
    return json.dumps([asdict(finding) for finding in findings], indent=1) + "\n"


def as_github(findings: Iterable[Finding]) -> str:
    """GitHub's workflow commands, which become annotations on the pull request."""
    return "".join(
        f"::{finding.severity} file={_property(finding.file)},line={finding.line},col={finding.column}"
        f",title={_property(finding.code)}::{_data(_sentence(finding))}\n"
        for finding in findings
    )


def _data(text: str) -> str:
    # `%` is the escape character of workflow commands; CR and LF would end one and begin the next.
    return printable(text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A"))


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def as_sarif(findings: Iterable[Finding]) -> str:
    """SARIF 2.1.0 (OASIS), the least that code-scanning services take."""
    found = tuple(findings)
    rules = [{"id": code} for code in sorted({finding.code for finding in found})]
    run = {
        "tool": {"driver": {"name": "broker check", "rules": rules}},
        "columnKind": "unicodeCodePoints",
        "results": [_result(finding) for finding in found],
    }
    log = {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=1) + "\n"


def _result(finding: Finding) -> Mapping[str, object]:
    place = {
        "artifactLocation": {"uri": finding.file},
        "region": {"startLine": finding.line, "startColumn": finding.column},
    }
    return {
        "ruleId": finding.code,
        "level": finding.severity,
        "message": {"text": printable(_sentence(finding))},
        "locations": [{"physicalLocation": place}],
    }


FORMATS: Mapping[str, Callable[[Iterable[Finding]], str]] = MappingProxyType(
    {"text": as_text, "json": as_json, "github": as_github, "sarif": as_sarif}
)
"""What `--format` may name."""
