"""A proposal as people get it: the changed files as a patch, and the words of the pull request.

Law: what agents and files say is shown as code, so that nothing in it is markup, a link or a mention.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from broker.manifest.diff import Diff
from broker.manifest.findings import printable
from broker.redaction import redacted
from broker.review.clusters import named
from broker.review.markdown import as_markdown, code
from broker.review.propose import Edit, Record

_SHOWN = 50  # calls in the table


@dataclass(frozen=True, slots=True)
class Proposal:
    """What to change: the edits, each changed file's text before and after (by its path for people), and what that lets pass."""

    edits: tuple[Edit, ...]
    texts: Mapping[str, tuple[str, str]]
    effect: Diff

    @property
    def title(self) -> str:
        """One line for the pull request."""
        agents = sorted({edit.agent for edit in self.edits})
        what = sorted({f"{edit.place[2]}/{edit.place[4]}" if len(edit.place) > 4 else edit.place[2] for edit in self.edits})  # noqa: PLR2004 - the tool, and its operation
        more = f" and {len(what) - 3} more" if len(what) > 3 else ""  # noqa: PLR2004 - as many as a title holds
        return f"Let {', '.join(agents)} call {', '.join(what[:3])}{more}"

    @property
    def patch(self) -> str:
        """A unified diff, as `git apply` takes it."""
        return "".join(line for path, texts in sorted(self.texts.items()) for line in _patch(path, *texts))

    @property
    def markdown(self) -> str:
        """The pull request's text."""
        calls = {record["decision_id"]: record for edit in self.edits for record in edit.calls}
        notes = dict.fromkeys(note for edit in self.edits for note in edit.notes)
        patch = printable_lines(self.patch)
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", patch)), default=0))
        parts = [
            f"# {self.title}",
            "Why: _say what the agent needs this for._",
            f"## Evidence\n\n{_listed(list(calls.values()))}",
            *(["## Mind\n\n" + "\n".join(f"- {code(note)}" for note in notes)] if notes else []),
            f"## The change\n\n{fence}diff\n{patch}{fence}",
            f"## What it lets pass\n\n{as_markdown(self.effect)}",
        ]
        return "\n\n".join(parts)


def printable_lines(text: str) -> str:
    """The text, line for line, as a terminal may show it."""
    return "".join(f"{printable(line)}\n" for line in text.splitlines())


def _patch(path: str, before: str, after: str) -> Iterator[str]:
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    for line in difflib.unified_diff(old, new, f"a/{path}", f"b/{path}"):
        yield line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"


def _listed(calls: Sequence[Record]) -> str:
    # No table: a pipe behind a backslash would end one of its cells, in code too.
    ordered = sorted(calls, key=lambda each: str(each["time"]))
    lines = [f"- {', '.join(map(code, map(redacted, _said(record))))}" for record in ordered[:_SHOWN]]
    rest = len(calls) - _SHOWN
    return "\n".join([*lines, *([f"\n… and {rest} more"] if rest > 0 else [])])


def _said(record: Record) -> Iterator[str]:
    what = named(record["tool"] or "", record["operation"] or "", record["host"])
    why = "; ".join(f"{each['pointer']}: {each['message']}" for each in record["violations"][:3]) or record["detail"] or ""
    shadow = " in shadow mode" if record["verdict"] == "would_deny" else ""
    yield f"{record['time'][:19]}Z"
    yield record["decision_id"]
    yield f"{what}: {record['method']} {record['host']}{record['path']}"
    yield f"{record['code']}{shadow}: {why}"
