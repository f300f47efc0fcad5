"""The picture of the ledger saves a restart its time, and nothing else: whatever becomes of it, what was spent stays spent."""

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.audit.log import AuditLog
from broker.audit.record import Attempt, canonical, decision_record
from broker.ledger import checkpoint
from broker.ledger.base import Granted, Spend
from broker.ledger.memory import MemoryLedger
from broker.ledger.spending import reserved
from broker.manifest.load import load_texts
from broker.policy.limits import called
from broker.policy.types import ALLOW

NOW = 1_700_000_000.0
DAY = 86_400.0
KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
LIMITS = {"calls": "50/day", "rate": "100/day", "burst": 1000, "steps_per_run": 50, "time_per_run": "3d", "concurrency": 20}


def _document(kind: str, name: str, **spec: Any) -> bytes:
    metadata = {"name": name, "owner": "team", **({"oncall": "team"} if kind == "Agent" else {})}
    return json.dumps({"apiVersion": "broker/v1", "kind": kind, "metadata": metadata, "spec": spec}).encode()


def _snapshot(**limits: Any) -> Any:
    operations = {"get": {"match": {"method": "GET", "path": "/"}, "effect": "read"}}
    tools = {"t": {"operations": {"get": {}}}}
    texts = {
        "t.yaml": _document("Tool", "t", protocol="rest", endpoint="https://t.example", operations=operations),
        "a.yaml": _document("Agent", "one", identity={"token": True}, tools=tools, limits=limits),
    }
    loaded = load_texts(texts, Path())
    assert loaded.snapshot is not None, loaded.findings
    return loaded.snapshot


SNAPSHOT = _snapshot(**LIMITS)


class Place:
    """A state folder with a live ledger, its log and, once it was taken, its picture."""

    def __init__(self, folder: Path, *, segment_bytes: int = 1 << 20) -> None:
        self.audit, self.picture = folder / "audit", folder / "ledger.json"
        self.log = AuditLog(self.audit, KEY, NOW, 0, segment_bytes=segment_bytes)
        self.ledger, self.now = MemoryLedger(), NOW

    def calls(self, count: int, run: str = "r") -> None:
        agent = SNAPSHOT.agents["one"]
        for _ in range(count):
            attempt = Attempt(f"d{self.log.head.seq}", "r", agent.described, tool="t", operation="get", effect="read", run_id=run)
            attempt.args_hash = "sha256:0"
            spend = Spend(attempt.decision_id, "one", agent.tools["t"]["get"].limits, called(3), run, "t/get/sha256:0")
            answer = self.ledger.reserve(spend, self.now)
            assert isinstance(answer, Granted), answer
            attempt.step, attempt.limits = answer.step, reserved(called(3), degraded=False)
            self.log.append(decision_record(self.now, 0, attempt, ALLOW))

    def take(self) -> None:
        self.picture.write_bytes(checkpoint.take(self.ledger, self.log.head))

    def rebuilt(self, now: float | None = None) -> MemoryLedger:
        ledger = MemoryLedger()
        checkpoint.rebuild(ledger, self.picture, self.audit, SNAPSHOT, now or self.now)
        return ledger


@pytest.fixture
def place(tmp_path):
    found = Place(tmp_path)
    yield found
    found.log.close()


def spent(ledger: MemoryLedger) -> tuple[int, int]:
    """Calls of the day, and those of the run."""
    return ledger.windows["agent/one:calls:window:86400"][1], ledger.runs["one", "r"].counts["agent/one:calls:run:0"]


def test_a_picture_and_what_came_after_it_give_the_ledger(place):
    place.calls(3)
    place.take()
    place.calls(4)
    found = place.rebuilt()
    assert spent(found) == spent(place.ledger) == (7, 7)
    assert (found.windows, found.full_at, found.now) == (place.ledger.windows, pytest.approx(place.ledger.full_at), NOW)
    assert found.runs == place.ledger.runs
    assert (found.open, found.grants) == ({}, {})


def test_what_a_picture_has_is_not_read_from_the_log_again(place, monkeypatch):
    place.calls(3)
    place.take()
    read = []
    monkeypatch.setattr(checkpoint, "replay", lambda _, records, __: read.extend(records))
    assert spent(place.rebuilt()) == (3, 3)
    assert read == []
    place.calls(2)
    place.rebuilt()
    assert [record["decision_id"] for record in read] == ["d3", "d4"]


def test_a_picture_in_the_middle_of_many_segments_is_found_there(tmp_path):
    place = Place(tmp_path, segment_bytes=2_200)
    place.calls(5)
    place.take()
    place.calls(6)
    assert len(list(place.audit.glob("*.jsonl"))) == 4
    assert spent(place.rebuilt()) == (11, 11)
    place.log.close()


def _forged(**changed: Any) -> Any:
    """A picture that is whole in itself, with other content."""

    def change(place: Place) -> None:
        ledger = {**orjson.loads(place.picture.read_bytes())["ledger"], **changed}
        digest = hashlib.sha256(canonical(ledger)).hexdigest()
        place.picture.write_bytes(orjson.dumps({"hash": digest, "ledger": ledger}))

    return change


def _replaced(old: bytes, new: bytes) -> Any:
    def change(place: Place) -> None:
        content = place.picture.read_bytes()
        assert content.count(old) == 1
        place.picture.write_bytes(content.replace(old, new))

    return change


def _of_another_log(place: Place) -> None:
    other = Place(place.picture.parent / "other")
    other.calls(1, "another")
    place.picture.write_bytes(checkpoint.take(MemoryLedger(), other.log.head))
    other.log.close()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda place: place.picture.unlink(), id="gone"),
        pytest.param(lambda place: place.picture.write_bytes(b""), id="empty"),
        pytest.param(lambda place: place.picture.write_bytes(place.picture.read_bytes()[:-9]), id="torn"),
        pytest.param(lambda place: place.picture.write_bytes(b"\0" * 500), id="zeros"),
        pytest.param(lambda place: place.picture.write_bytes(b"[]"), id="a list"),
        pytest.param(lambda place: place.picture.write_bytes(b'{"hash":1,"ledger":{}}'), id="other JSON"),
        pytest.param(lambda place: place.picture.write_bytes(b"[" * 5000), id="a nest"),
        pytest.param(lambda place: (place.picture.unlink(), place.picture.mkdir()), id="a folder"),
        pytest.param(lambda place: (place.picture.unlink(), place.picture.symlink_to("nowhere")), id="a link to nowhere"),
        pytest.param(_replaced(b'calls:window:86400":[19675,5]', b'calls:window:86400":[19675,0]'), id="less spent"),
        pytest.param(_replaced(b'"seq":5', b'"seq":8'), id="another place in the log"),
        pytest.param(_of_another_log, id="of another log"),
        pytest.param(_forged(after="0" * 64), id="after a record that never was"),
        pytest.param(_forged(seq=999), id="after a record that is not there yet"),
        pytest.param(_forged(seq=0), id="from before the first record"),
        pytest.param(_forged(seq="x"), id="after no number"),
    ],
)  # fmt: skip
def test_a_damaged_picture_counts_for_nothing_and_the_log_for_everything(place, damage):
    place.calls(5)
    place.take()
    place.calls(3)
    damage(place)
    assert spent(place.rebuilt()) == (8, 8)


def test_a_picture_from_before_a_log_that_was_started_afresh_counts_for_nothing(place, tmp_path):
    place.calls(5)
    place.take()
    fresh = Place(tmp_path / "fresh")
    fresh.picture = place.picture
    fresh.now = NOW + 1
    fresh.calls(6)
    assert spent(fresh.rebuilt()) == (6, 6)
    fresh.log.close()


def test_a_line_that_was_torn_by_the_crash_is_left_out(place):
    place.calls(2)
    *_, segment = sorted(place.audit.glob("*.jsonl"))
    with segment.open("ab") as file:
        file.write(b'{"event":"decision","verd')
    assert spent(place.rebuilt()) == (2, 2)


def test_an_empty_log_is_an_empty_ledger(place):
    assert place.rebuilt().windows == {}


def test_without_a_picture_only_what_can_still_matter_is_read(place):
    place.calls(3)
    [segment] = place.audit.glob("*.jsonl")
    long_ago = NOW - 5 * DAY
    os.utime(segment, (long_ago, long_ago))
    found = MemoryLedger()
    checkpoint.rebuild(found, place.picture, place.audit, _snapshot(calls="50/day"), NOW)
    assert found.windows == {}
    os.utime(segment, (NOW - DAY + 60, NOW - DAY + 60))
    checkpoint.rebuild(found, place.picture, place.audit, _snapshot(calls="50/day"), NOW)
    assert found.windows["agent/one:calls:window:86400"][1] == 3


@pytest.mark.parametrize(
    ("limits", "days"),
    [
        pytest.param({"rate": "10/day", "burst": 30}, 2.9, id="a bucket that takes three days to refill"),
        pytest.param({"time_per_run": "4d"}, 3.9, id="a run of four days"),
        pytest.param({"rate": "0/day", "burst": 9}, 0.9, id="none at all, and what else counts a day"),
    ],
)
def test_what_matters_for_longer_than_a_day_is_read_for_longer(place, limits, days):
    place.calls(3)
    [segment] = place.audit.glob("*.jsonl")
    os.utime(segment, (NOW, NOW))
    for later, runs in ((days, 1), (days + 0.2, 0)):
        found = MemoryLedger()
        checkpoint.rebuild(found, place.picture, place.audit, _snapshot(**limits), NOW + later * DAY)
        assert len(found.runs) == runs


def test_calls_that_are_open_when_the_picture_is_taken_have_spent_what_they_reserved_and_hold_no_place(place):
    place.calls(20)
    place.take()
    found = place.rebuilt()
    assert spent(found) == (20, 20)
    limits = SNAPSHOT.agents["one"].tools["t"]["get"].limits
    assert isinstance(found.reserve(Spend("next", "one", limits, called(1), "r", "f"), NOW), Granted)


def test_two_pictures_of_the_same_moment_are_the_same_bytes(place):
    place.calls(2)
    assert checkpoint.take(place.ledger, place.log.head) == checkpoint.take(place.rebuilt(), place.log.head)


def test_the_hash_is_of_the_ledgers_part_as_it_stands_there(place):
    place.calls(2)
    place.take()
    picture = SimpleNamespace(**orjson.loads(place.picture.read_bytes()))
    assert picture.hash == hashlib.sha256(canonical(picture.ledger)).hexdigest()
    assert (picture.ledger["seq"], picture.ledger["after"]) == (place.log.head.seq, place.log.head.hash)
