"""A proposal tried on the manifests before anybody sees it: what they would then be, and which calls it is no help for.

Law: nothing is written, and nothing read but the files that manifests name (certificates).
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from broker.manifest.load import Loaded, load_texts
from broker.policy.snapshot import PolicySnapshot
from broker.review.edit import edited
from broker.review.propose import Edit, Record, Refused, proposed, replayed

_OPERATION = 5  # keys from the root to an operation's grant


@dataclass(frozen=True, slots=True)
class Draft:
    """The manifests with the edits in them, compiled; of each changed file, by its name, the text before and after."""

    edits: tuple[Edit, ...]
    texts: Mapping[str, tuple[str, str]]
    after: Loaded

    def lost(self, now: float) -> list[Record]:
        """The calls that would be denied all the same; none where it does not compile."""
        after = self.after.snapshot
        return [each for edit in self.edits for each in edit.calls if after and replayed(after, each, now) is False]


def drafted(edits: Collection[Edit], files: Mapping[str, bytes], base: Path) -> Draft:
    """The edits, made in `files`: the manifests by their names in the folder `base`."""
    changed = {
        file: edited(files[file].decode(), [edit for edit in edits if edit.file == file])
        for file in sorted({edit.file for edit in edits})
    }
    after = load_texts({**files, **{file: text.encode() for file, text in changed.items()}}, base)
    return Draft(tuple(edits), {file: (files[file].decode(), text) for file, text in changed.items()}, after)


def different(records: Iterable[Record]) -> list[Record]:
    """Of calls that are alike the latest."""
    return list(
        {tuple(each[name] for name in ("tool", "operation", "host", "code", "args_hash")): each for each in records}.values()
    )


def wanted(
    snapshot: PolicySnapshot, records: Iterable[Record], contained: Collection[str], attacks: Collection[str], now: float
) -> tuple[list[Edit], list[Refused]]:
    """As `proposed`, for calls that the manifests may permit by now: nothing is proposed for those."""
    permitted, others = list[Record](), list[Record]()
    for record in records:
        (permitted if _is_permitted(snapshot, record, now) else others).append(record)
    edits, refused = proposed(snapshot, others, contained, attacks)
    return edits, [*refused, *(Refused(each, "the manifests permit it by now") for each in permitted)]


def _is_permitted(snapshot: PolicySnapshot, record: Record, now: float) -> bool:
    named = (record.get("agent") or {}).get("name") in snapshot.agents
    known = record["method"] == "CONNECT" or record["tool"] in snapshot.tools
    return bool(named and known and replayed(snapshot, record, now))


def spoiling(edits: Collection[Edit], files: Mapping[str, bytes], base: Path, now: float) -> Mapping[str, Refused]:
    """By decision ID the calls that would spoil a draft: no change allows them, or none that passes `broker check`.

    The latter are found by trying the edits of each operation alone.
    """
    draft = drafted(edits, files, base)
    if draft.after.snapshot is not None:
        why = "no change of the manifest allows it; write it by hand"
        return {each["decision_id"]: Refused(each, why) for each in draft.lost(now)}
    groups: dict[tuple[str, ...], list[Edit]] = {}
    for edit in edits:
        groups.setdefault((edit.agent, *edit.place[:_OPERATION]), []).append(edit)
    unsound = [group for group in groups.values() if drafted(group, files, base).after.snapshot is None]
    why = "what would allow it does not pass `broker check`; write the change by hand, or ask the platform team"
    return {each["decision_id"]: Refused(each, why) for group in unsound for edit in group for each in edit.calls}
