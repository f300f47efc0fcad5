"""Changes in a manifest's text: what is to stand where, and nothing else moves.

Laws: comments, order and every line that the change does not need stay as they are; where that can't be done, the file is written
anew by the same library, with its comments and order. No comment is lost. The text is whole or there is none.
"""

import difflib
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from broker.errors import UsageError
from broker.manifest.findings import printable
from broker.manifest.strict_yaml import RESERVED
from broker.review.propose import Edit

_WIDE = 1 << 16  # characters; no line is broken that its author did not break
_WORD = re.compile(r"[A-Za-z$][A-Za-z0-9_.-]*")
_SCHEMA = 7  # keys from the root to a schema of a grant's parameters


def edited(text: str, edits: Sequence[Edit]) -> str:
    """The file's text with these edits in the document of each one's agent. Raises `UsageError` where a comment would be lost."""
    if 0 < text.count("\n") == text.count("\r\n"):
        return edited(text.replace("\r\n", "\n"), edits).replace("\n", "\r\n")
    yaml = YAML()
    yaml.width, yaml.preserve_quotes, yaml.brace_single_entry_mapping_in_flow_sequence = _WIDE, True, True
    said = json.dumps([edit.value for edit in edits], ensure_ascii=False)
    yaml.allow_unicode = printable(said) == said  # what can't be seen is written as an escape
    mapping, offset = _indents(text)
    yaml.indent(mapping=mapping, sequence=offset + 2, offset=offset)
    documents = list(yaml.load_all(text))
    before = _written(yaml, documents)
    for edit in edits:
        _put(next(each for each in documents if each["kind"] == "Agent" and each["metadata"]["name"] == edit.agent), edit)
    after = _written(yaml, documents)
    made = _moved(text, before, after)
    if not made or not _says(yaml, made, documents):
        made = _headed(text, _moved(before, before, after))
    if lost := _comments(text) - _comments(made):
        what = f"the change would take a comment out of the manifest of {edits[0].agent!r}: {printable(min(lost))}"
        raise UsageError(what, "put it on a line of its own above the grant, or make the change by hand")
    return made


_OPENS = re.compile(r" *[^\s#-][^#]*:[ \t]*(?:#.*)?")
_COMMENT = re.compile(r"(?:^|[ \t])#.*")


def _indents(text: str) -> tuple[int, int]:
    """How far the text indents mappings, and its sequences' dashes."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found: dict[bool, int] = {}
    for line, inner in pairwise(lines):
        if _OPENS.fullmatch(line):
            by, dashed = _indent(inner) - _indent(line), inner.lstrip().startswith("- ")
            if by > 0 or dashed:
                found.setdefault(dashed, by)
    return found.get(False, 2), max(found.get(True, 2), 0)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _comments(text: str) -> Counter[str]:
    """The comments, and what looks like one within a text: that no change takes out either."""
    return Counter(found[0].strip() for line in text.splitlines() if (found := _COMMENT.search(line)))


_HEAD = re.compile(r"(?:[ \t]*(?:#[^\n]*)?\n)*---[ \t]*\n")


def _headed(text: str, made: str) -> str:
    """What was made anew, with what stood before the first document, which the library does not write again."""
    head = _HEAD.match(text)
    return made if head is None or made.startswith(head[0]) else head[0] + made.removeprefix("---\n")


def _says(yaml: YAML, text: str, documents: list[Any]) -> bool:
    """Whether the text says this: a file that is indented otherwise than we write takes no line of ours."""
    try:
        return list(yaml.load_all(text)) == documents
    except YAMLError:
        return False


def _written(yaml: YAML, documents: list[Any]) -> str:
    stream = io.StringIO()
    yaml.dump_all(documents, stream)
    return stream.getvalue()


def _put(document: Any, edit: Edit) -> None:
    *way, last = edit.place
    node = document
    for key in way:
        if not node.get(key):  # missing, empty, or null
            node[key] = _styled({}, flow=bool(node.fa.flow_style()))
        node = node[key]
    node[last] = _changed(node.get(last), edit.value, flow=bool(node.fa.flow_style()), blocks=_SCHEMA - len(edit.place))


def _changed(known: Any, value: Any, *, flow: bool, blocks: int) -> Any:
    """The node that says `value`, made of the one that is there as far as that goes on saying the same."""
    if not (isinstance(known, CommentedMap) and isinstance(value, dict) and known):
        return known if known == value else _styled(value, flow=flow, blocks=blocks)
    flow = bool(known.fa.flow_style())
    if known in value.get("anyOf", ()):
        made = _styled({**value, "anyOf": []}, flow=flow)
        made["anyOf"] = CommentedSeq([known if part == known else _styled(part, flow=True) for part in value["anyOf"]])
        (made["anyOf"].fa.set_flow_style if flow else made["anyOf"].fa.set_block_style)()
        return made
    for name in [name for name in known if name not in value]:
        del known[name]
    for name, part in value.items():
        known[_text(name)] = _changed(known.get(name), part, flow=flow, blocks=blocks - 1)
    return known


def _styled(value: Any, *, flow: bool, blocks: int = 1) -> Any:
    """The value for the emitter: its outer levels a key a line, schemas in one line each."""
    made: Any
    if isinstance(value, dict):
        flow = flow or blocks <= 0
        parts = {_text(name): _styled(part, flow=flow or not part, blocks=blocks - 1) for name, part in value.items()}
        made = CommentedMap(parts)
    elif isinstance(value, list):
        made = CommentedSeq([_styled(part, flow=True) for part in value])
    else:
        return _text(value) if isinstance(value, str) else value
    (made.fa.set_flow_style if flow else made.fa.set_block_style)()
    return made


def _text(value: str) -> str:
    """Text as every YAML reader takes it for text: in quotes, unless it is a plain word."""
    plain = _WORD.fullmatch(value) and value.lower() not in RESERVED
    return value if plain else DoubleQuotedScalarString(value)


def _moved(text: str, before: str, after: str) -> str:
    """The lines that differ between `before` and `after`, in a text that says what `before` says; empty where they don't fit."""
    lines, old, new = (each.splitlines(keepends=True) for each in (text, before, after))
    places: dict[int, int] = {}
    for start, other, size in difflib.SequenceMatcher(None, old, lines, autojunk=False).get_matching_blocks():
        places |= {start + step: other + step for step in range(size + 1)}
    made, at = list[str](), 0
    for tag, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        if i not in places or j not in places or places[j] - places[i] != j - i:
            return ""
        made += lines[at : places[i]] + _commented(lines[places[i] : places[j]], new[k:m])
        at = places[j]
    return "".join(made + lines[at:])


def _commented(old: list[str], new: list[str]) -> list[str]:
    """The new lines with the comments of the old ones: at what still stands there, else on lines of their own."""
    made, rest, after = list[str](), list(new), list[str]()
    for line in old:
        body, comment = _parted(line)
        same = next((index for index, each in enumerate(rest) if each.rstrip() == body.rstrip()), None) if body.strip() else None
        if same is not None:
            made += [*rest[:same], line]
            rest = rest[same + 1 :]
        elif comment:
            # One that is less indented than what is written belongs to what follows.
            alone = f"{' ' * _indent(line)}{comment}\n"
            (after if rest and _indent(line) < _indent(rest[0]) else made).append(alone)
    return [*made, *rest, *after]


def _parted(line: str) -> tuple[str, str]:
    """A line before its comment, and that; a sign between quotes begins none."""
    for found in re.finditer(r"(?:^|[ \t])#", line):
        body = line[: found.start()]
        if body.count('"') % 2 == body.count("'") % 2 == 0:
            return body, line[found.start() :].strip()
    return line, ""
