"""What the compiler works with: one document at a time, the words that the broker knows, and where findings go.

Law: a mistake is reported once, where it was made; what only follows from it is not reported.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from broker.manifest import models
from broker.manifest.findings import Finding, Severity
from broker.manifest.strict_yaml import Document, Pointer


class AdapterWords(Protocol):
    """What the compiler asks of a protocol adapter."""

    locations: frozenset[str]


class IssuerWords(Protocol):
    """What the compiler asks of an issuer."""

    @staticmethod
    def check(settings: Mapping[str, object]) -> list[str]:
        """What is wrong with a catalog entry's settings, each as a sentence with its remedy."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The protocols and issuers that this broker has, by their words."""

    adapters: Mapping[str, AdapterWords]
    issuers: Mapping[str, IssuerWords]


@dataclass(frozen=True, slots=True)
class Source:
    """One document: where it stands, its data in canonical JSON, and the kind that it is.

    `cut` names the parts that are wrong and were left out of `model`, so that the rest can still be checked.
    """

    file: str
    document: Document
    canonical: str
    model: models.Kind
    cut: tuple[Pointer, ...] = ()

    def rule(self, *pointer: str | int) -> str:
        """`file#pointer` (RFC 6901)."""
        return f"{self.file}#" + "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in pointer)


Declared = Mapping[str, frozenset[str]]
"""Tool name → operation names, as written, right or wrong: so that one mistake in the catalog is reported once, not per agent."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one compilation knows and gathers."""

    words: Vocabulary
    read: Callable[[str], bytes]
    declared: Declared
    findings: list[Finding] = field(default_factory=list)
    pems: dict[str, str] = field(default_factory=dict)


# What may only follow from a part below that was left out because it was wrong.
_CONSEQUENCES = frozenset({"credential_invalid", "match_invalid"})


@dataclass(frozen=True, slots=True)
class Scope:
    """One document at work. `why` is what happened and what to do, joined by a semicolon."""

    work: Work
    source: Source

    def error(self, pointer: Pointer, code: str, why: str, *, key: bool = False) -> None:
        """Report what makes the snapshot impossible; `key` points at the key there rather than its value."""
        if code not in _CONSEQUENCES or not any(cut[: len(pointer)] == pointer for cut in self.source.cut):
            self._add(self.source.document.at(pointer, key=key), code, why, "error")

    def warn(self, pointer: Pointer, code: str, why: str) -> None:
        """Report what loads, but not as its author may think."""
        self._add(self.source.document.at(pointer, key=True), code, why, "warning")

    def _add(self, place: tuple[int, int], code: str, why: str, severity: Severity) -> None:
        message, _, advice = why.partition("; ")
        self.work.findings.append(Finding(self.source.file, *place, code, message, advice, severity))
