"""Changes in a manifest's text: what is to stand where, and nothing else moves.

Laws: comments, order and every line that the change does not need stay as they are; where that can't be done, the file is written
anew by the same library, with its comments and order. The text is whole or there is none.
"""

import difflib
import io
from collections.abc import Iterable
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from broker.review.propose import Edit

_WIDE = 1 << 16  # characters; no line is broken that its author did not break
_SCHEMA = 7  # keys from the root to a schema of a grant's parameters


def edited(text: str, edits: Iterable[Edit]) -> str:
    """The file's text with these edits in the document of each one's agent."""
    yaml = YAML()
    yaml.width, yaml.preserve_quotes, yaml.brace_single_entry_mapping_in_flow_sequence = _WIDE, True, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    documents = list(yaml.load_all(text))
    before = _written(yaml, documents)
    for edit in edits:
        _put(next(each for each in documents if each["kind"] == "Agent" and each["metadata"]["name"] == edit.agent), edit)
    after = _written(yaml, documents)
    return _moved(text, before, after)


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
    node[last] = _styled(edit.value, flow=bool(node.fa.flow_style()), blocks=_SCHEMA - len(edit.place))


def _styled(value: Any, *, flow: bool, blocks: int = 1) -> Any:
    """The value for the emitter: its outer levels a key a line, schemas in one line each."""
    if isinstance(value, dict):
        flow = flow or blocks <= 0
        made = CommentedMap({name: _styled(part, flow=flow or not part, blocks=blocks - 1) for name, part in value.items()})
    elif isinstance(value, list):
        made = CommentedSeq([_styled(part, flow=True) for part in value])
    else:
        return value
    (made.fa.set_flow_style if flow else made.fa.set_block_style)()
    return made


def _moved(text: str, before: str, after: str) -> str:
    """The lines that differ between `before` and `after`, in the text that `before` says the same as."""
    lines, old, new = (each.splitlines(keepends=True) for each in (text, before, after))
    places: dict[int, int] = {}
    for start, other, size in difflib.SequenceMatcher(None, old, lines, autojunk=False).get_matching_blocks():
        places |= {start + step: other + step for step in range(size + 1)}
    made, at = list[str](), 0
    for tag, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        if i not in places or j not in places or places[j] - places[i] != j - i:
            return after
        made += lines[at : places[i]] + new[k:m]
        at = places[j]
    return "".join(made + lines[at:])
