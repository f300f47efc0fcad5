"""The index finds what the log holds: incrementally and built anew, however the log is cut, broken or replaced."""

import os
import sqlite3
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.audit import chain, index
from broker.audit.index import FILE, Index, Label, Wanted, tried
from broker.audit.log import AuditLog
from broker.audit.record import Attempt, Ending, alert_record, canonical, decision_record, notice_record, outcome_record
from broker.errors import UsageError
from broker.policy.types import ALLOW, Code, Decision, Verdict, deny

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
NOW = 1_700_000_000.0
NO = deny(Code.OPERATION_NOT_DECLARED, "no", rule="t.yaml#/x")


def call(number, agent="refund-bot", **known):
    return Attempt(f"d-{number}", "sha256:r", {"name": agent}, **known)


def write(state, *records, began=NOW, segment_bytes=1_000_000):
    """Append records, a second apart."""
    (state / "audit").mkdir(exist_ok=True)
    with AuditLog(state / "audit", KEY, NOW, 1, segment_bytes=segment_bytes) as log:
        for number, build in enumerate(records):
            log.append(build(began + number))
        log.sync(NOW)


def decided(attempt, decision=NO):
    return lambda now: decision_record(now, 1, attempt, decision)


def ended(attempt, **how):
    return lambda now: outcome_record(now, 1, attempt, Ending(**how))


SEARCH = {"tool": "wiki", "operation": "search", "effect": "read", "data": ("internal", "pii"), "host": "wiki.example"}
RECORDS = (
    decided(call(1, tool="shop", operation="GET /items/7", run_id="r1")),
    decided(call(2, **SEARCH, run_id="r1"), ALLOW),
    ended(call(2, **SEARCH, run_id="r1"), status=200),
    decided(call(3, "other-bot", **SEARCH), Decision(Verdict.WOULD_DENY, Code.PARAMS_INVALID, "no")),
    decided(call(4, host="evil.example"), deny(Code.HOST_NOT_DECLARED, "no")),
)


def paths(state):
    return [path for path, _ in chain.segments(state / "audit")]


def whole(state):
    return b"".join(path.read_bytes() for path in paths(state)).splitlines()


def found(state, **wanted):
    with Index(state) as opened:
        opened.update()
        return [record["seq"] for record in opened.records(opened.find(Wanted(**wanted)))]


@pytest.mark.parametrize(
    ("wanted", "seqs"),
    [
        pytest.param({}, [1, 2, 3, 4, 5], id="everything, in the log's order"),
        pytest.param({"agent": "refund-bot"}, [1, 2, 3, 5], id="of an agent"),
        pytest.param({"agent": "refund"}, [], id="an agent's name is a whole one"),
        pytest.param({"run": "r1"}, [1, 2, 3], id="of a run"),
        pytest.param({"tool": "wiki"}, [2, 3, 4], id="of a tool"),
        pytest.param({"operation": "search"}, [2, 3, 4], id="of an operation"),
        pytest.param({"operation": "GET /items/8"}, [1], id="of what was tried, whatever the number"),
        pytest.param({"effect": "read"}, [2, 4], id="decisions on calls with an effect"),
        pytest.param({"data": "pii"}, [2, 4], id="a data class among several"),
        pytest.param({"data": "inter"}, [], id="a part of a data class is none"),
        pytest.param({"code": "params_invalid"}, [4], id="of a code"),
        pytest.param({"verdict": "deny"}, [1, 5], id="of a verdict"),
        pytest.param({"since": NOW + 2}, [3, 4, 5], id="since, inclusive"),
        pytest.param({"until": NOW + 2}, [1, 2], id="until, exclusive"),
        pytest.param({"agent": "refund-bot", "tool": "wiki", "since": NOW + 2}, [3], id="all of it at once"),
    ],
)
def test_what_is_wanted_is_found(tmp_path, wanted, seqs):
    write(tmp_path, *RECORDS)
    assert found(tmp_path, **wanted) == seqs


def test_an_answer_is_the_logs_own_lines(tmp_path):
    write(tmp_path, *RECORDS, segment_bytes=1_500)
    assert len(paths(tmp_path)) > 1
    with Index(tmp_path) as opened:
        opened.update()
        assert [line for line, _ in opened.read(opened.find(Wanted()))] == whole(tmp_path)
        assert [record["seq"] for record in opened.records(opened.find(Wanted(), 2))] == [4, 5]


@pytest.mark.parametrize(
    ("operation", "shown"),
    [
        pytest.param("issues.create2", "issues.create2", id="a name is kept"),
        pytest.param("GET /v1/accounts/123/items", "GET /*/accounts/*/items", id="segments with a digit"),
        pytest.param("tools/call page2", "tools/call page2", id="what is no path has no segments"),
        pytest.param("GET /keys/sk_live_abc", "GET /keys/[redacted]", id="a credential from a log of an older broker"),
        pytest.param("", "", id="nothing"),
    ],
)
def test_what_was_tried_is_the_same_for_every_number(operation, shown):
    assert tried(operation) == shown


def test_only_what_was_appended_is_read(tmp_path, monkeypatch):
    write(tmp_path, *RECORDS)
    with Index(tmp_path) as opened:
        assert opened.update() == 5
        assert opened.update() == 0
        write(tmp_path, decided(call(6)), began=NOW + 9)
        assert opened.update() == 1
        assert len([*opened.find(Wanted())]) == 6


def test_a_line_is_no_record_before_its_newline(tmp_path):
    write(tmp_path, *RECORDS)
    (path,) = paths(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert found(tmp_path) == [1, 2, 3, 4]
    path.write_bytes(content)
    assert found(tmp_path) == [1, 2, 3, 4, 5]


GOOD = {"agent": {"name": "a"}, "event": "decision", "time": "2026-01-01T00:00:00Z"}


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"\xff\x00", id="not UTF-8"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"{}", id="an empty object"),
        pytest.param(b'{"seq":1,"time":7}', id="a time that is none"),
        pytest.param(b'{"time":"2026-01-01T00:00:00"}', id="a time without a zone"),
        pytest.param(canonical({**GOOD, "agent": "x"}), id="an agent that is text"),
        pytest.param(canonical({**GOOD, "data": 7}), id="data classes that are a number"),
        pytest.param(canonical({**GOOD, "notice": {"asked": {"binding": []}}}), id="a notice without its run"),
        pytest.param(b"x" * (chain.MAX_LINE + 10), id="longer than any record"),
    ],
)
def test_a_broken_line_is_passed_over(tmp_path, line):
    write(tmp_path, *RECORDS)
    (path,) = paths(tmp_path)
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(first + b"\n" + line + b"\n" + rest)
    assert found(tmp_path) == [1, 2, 3, 4, 5]


def test_words_of_another_type_than_a_broker_writes_find_nothing_and_break_nothing(tmp_path):
    (tmp_path / "audit").mkdir()
    odd = {**GOOD, "seq": 1, "code": ["x"], "run_id": 7, "decision_id": {}, "tool": 1, "operation": None}
    (tmp_path / "audit" / chain.segment_name(1)).write_bytes(canonical(odd) + b"\n")
    assert found(tmp_path) == [1]
    assert found(tmp_path, run="7") == []


def replaced(state):
    for path in paths(state):
        path.unlink()
    (state / "audit" / chain.CHECKPOINT).unlink()
    write(state, *reversed(RECORDS), decided(call(7, tool="other")))


def shrunk(state):
    path = paths(state)[0]
    path.write_bytes(path.read_bytes().partition(b"\n")[0] + b"\n")


def same_length(state):
    path = paths(state)[-1]
    path.write_bytes(path.read_bytes().replace(b"evil.example", b"good.example"))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(replaced, id="another log"),
        pytest.param(shrunk, id="a segment that shrank"),
        pytest.param(same_length, id="another last line of the same length"),
        pytest.param(lambda state: paths(state)[0].unlink(), id="a segment that vanished"),
        pytest.param(
            lambda state: paths(state)[0].write_bytes(b"x\n" + paths(state)[0].read_bytes()), id="an old segment that grew"
        ),
        pytest.param(
            lambda state: (state / "audit" / chain.segment_name(0)).write_bytes(b"\n"), id="an older segment that appeared"
        ),
    ],
)
def test_an_index_of_another_log_is_made_anew_and_labels_stay(tmp_path, change):
    write(tmp_path, *RECORDS, segment_bytes=1_500)
    label = Label("attack", "", "jo", NOW, None)
    with Index(tmp_path) as opened:
        opened.update()
        opened.label("c1", label)
    change(tmp_path)
    with Index(tmp_path) as opened:
        opened.update()
        lines = [line for line, _ in opened.read(opened.find(Wanted()))]
        assert lines == [line for line in whole(tmp_path) if line.startswith(b"{")]
        assert opened.labels(NOW) == {"c1": label}
    seqs = found(tmp_path)
    (tmp_path / FILE).unlink()
    assert found(tmp_path) == seqs


def test_an_index_of_another_version_is_made_anew(tmp_path):
    write(tmp_path, *RECORDS)
    found(tmp_path)
    with sqlite3.connect(tmp_path / FILE) as raw:
        raw.execute("PRAGMA user_version=99")
        raw.execute("DROP TABLE shape")
    raw.close()
    assert found(tmp_path) == [1, 2, 3, 4, 5]


def everything(state):
    with Index(state) as opened:
        opened.update()
        rows = [*opened.find(Wanted())]
        known = [(row.time, row.decision_id, row.segment, row.start, row.length) for row in rows]
        shapes = sorted((shape.agent, shape.code, shape.operation, shape.count, shape.first) for shape in opened.denied(Wanted()))
        return known, shapes


@given(
    cuts=st.lists(st.integers(0, 10_000), max_size=6),
    segments=st.sampled_from([900, 2_500, 1_000_000]),
    junk=st.lists(st.tuples(st.integers(0, 4), st.sampled_from([b"\n", b"junk\n", b'{"time":1}\n', b"torn"])), max_size=3),
)
@settings(max_examples=40, deadline=None)
def test_the_answer_is_the_same_incrementally_and_anew_however_the_log_is_cut(tmp_path_factory, cuts, segments, junk):
    source, grown = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("grown")
    write(source, *RECORDS, segment_bytes=segments)
    (grown / "audit").mkdir()
    files = [[path.name, path.read_bytes()] for path in paths(source)]
    for where, what in junk:
        files[where % len(files)][1] += what
    size = sum(len(content) for _, content in files)
    for end in [*sorted(cut % (size + 1) for cut in cuts), size]:
        left = end
        for name, content in files:
            if left > 0:
                (grown / "audit" / name).write_bytes(content[:left])
            left -= len(content)
        incrementally = everything(grown)
    (grown / FILE).unlink()
    assert everything(grown) == incrementally


def test_batches_add_up_and_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "_BATCH", 2)
    write(tmp_path, *RECORDS, segment_bytes=1_500)
    told = []
    with Index(tmp_path) as opened:
        assert opened.update(lambda read, size: told.append((read, size))) == 5
        assert len([*opened.find(Wanted())]) == 5
    assert [size for _, size in told] == [len(b"\n".join([*whole(tmp_path), b""]))] * 2
    assert told[0][0] < told[1][0] < told[0][1]


def test_two_readers_at_once_index_each_record_once(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "_BATCH", 3)
    write(tmp_path, *RECORDS * 12, segment_bytes=5_000)
    together, answers = threading.Barrier(2), []

    def read():
        together.wait()
        answers.append(found(tmp_path))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(30)
    assert answers == [list(range(1, 61))] * 2


def test_readers_that_come_at_once_where_no_index_is_all_find_one(tmp_path):
    def look(state):
        together.wait()
        with Index(state) as opened:
            return opened.update()

    together = threading.Barrier(4)
    with ThreadPoolExecutor(4) as readers:
        for number in range(60):
            state = tmp_path / str(number)
            state.mkdir()
            write(state, *RECORDS)
            assert sum(readers.map(look, [state] * 4)) == len(RECORDS)
            # SQLite's own two may stay where the last readers close at once; nothing of ours does.
            assert {path.name for path in state.glob("review.db*")} <= {"review.db", "review.db-wal", "review.db-shm"}


def test_an_open_answer_holds_up_no_other_reader(tmp_path):
    write(tmp_path, *RECORDS)
    with Index(tmp_path) as slow, Index(tmp_path) as other:
        slow.update()
        rows = slow.latest([shape.id for shape in slow.denied(Wanted())])
        next(rows)
        write(tmp_path, decided(call(6)), began=NOW + 9)
        assert other.update() == 1
        assert len([*slow.find(Wanted())]) == 5
        assert len([*rows]) == 2


def test_runs_are_named_by_calls_alerts_revocations_and_approvals(tmp_path):
    agent = {"name": "refund-bot"}
    asked = {"kind": "vote", "asked": {"binding": ["refund-bot", "r1", "t/o", "h", "r"]}}
    write(
        tmp_path,
        lambda now: alert_record(now, 1, "x", {"agent": agent, "run_id": "r1"}),
        lambda now: notice_record("revocation", now, 1, agent, "x", {"kind": "restriction", "run_id": "r1"}),
        lambda now: notice_record("approval", now, 1, agent, "x", asked),
        lambda now: notice_record("approval", now, 1, agent, "x", {"kind": "used", "of": "a"}),
        lambda now: notice_record("revocation", now, 1, agent, "x", {"kind": "restriction", "run_id": ""}),
    )
    assert found(tmp_path, run="r1") == [1, 2, 3]


def test_only_its_owner_may_read_it_also_what_sqlite_puts_beside_it(tmp_path):
    write(tmp_path, *RECORDS)
    before = os.umask(0)
    try:
        with Index(tmp_path) as opened:
            opened.update()
            made = sorted(tmp_path.glob(f"{FILE}*"))
            assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o600}
            assert len(made) == 3
    finally:
        os.umask(before)


def test_the_log_and_its_folder_are_only_read(tmp_path):
    write(tmp_path, *RECORDS)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "audit").iterdir()}
    folder = (tmp_path / "audit").stat().st_mtime_ns
    found(tmp_path)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "audit").iterdir()} == before
    assert (tmp_path / "audit").stat().st_mtime_ns == folder


def no_log(state):
    for path in (state / "audit").iterdir():
        path.unlink()
    (state / "audit").rmdir()


def foreign_tables(state):
    with sqlite3.connect(state / FILE) as raw:
        raw.execute("CREATE TABLE segment (x)")
        raw.execute(f"PRAGMA user_version={index._VERSION}")
    raw.close()


def segment_is_a_folder(state):
    (state / "audit" / chain.segment_name(9)).mkdir()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        pytest.param(no_log, "name the broker's state folder with --state", id="no log"),
        pytest.param(
            lambda state: (state / FILE).write_bytes(b"garbage" * 999), f"{FILE} is no index of the broker's", id="garbage"
        ),
        pytest.param(foreign_tables, "if this file is damaged, delete it", id="a database of something else"),
        pytest.param(lambda state: (state / FILE).mkdir(), f"{FILE} can't be used", id="a folder in its place"),
        pytest.param(lambda state: (state / FILE).symlink_to("/etc/hosts"), f"{FILE} can't be used", id="a link in its place"),
        pytest.param(segment_is_a_folder, "can't be used: Is a directory", id="a segment that can't be read"),
    ],
)
def test_what_can_t_be_used_is_one_clear_usage_error(tmp_path, spoil, said):
    write(tmp_path, *RECORDS)
    spoil(tmp_path)
    with pytest.raises(UsageError) as raised:
        found(tmp_path)
    assert said in str(raised.value)
    assert raised.value.advice


def test_a_folder_that_can_t_be_listed_is_not_a_log_without_records(tmp_path):
    write(tmp_path, *RECORDS)
    with Index(tmp_path) as opened:
        no_log(tmp_path)
        with pytest.raises(UsageError, match="can't be used: No such file"):
            opened.update()


def test_a_folder_that_may_not_be_written_is_wrong_usage(tmp_path):
    write(tmp_path, *RECORDS)
    found(tmp_path)
    with Index(tmp_path) as opened:
        opened._db.execute("PRAGMA query_only=1")  # as root every folder is writable
        with pytest.raises(
            UsageError, match=r"can't be used: attempt to write a readonly database; make the state folder writable"
        ):
            opened.label("c", None)


def test_an_argument_that_is_no_text_is_wrong_usage(tmp_path):
    write(tmp_path, *RECORDS)
    with pytest.raises(UsageError, match="not UTF-8"):
        found(tmp_path, agent="\udcff")


def test_a_fault_in_the_middle_of_a_batch_leaves_the_index_as_it_was(tmp_path, monkeypatch):
    write(tmp_path, *RECORDS)
    with Index(tmp_path) as opened, monkeypatch.context() as patch:
        patch.setattr(index._Batch, "_known", lambda _self, _line: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            opened.update()
    assert found(tmp_path) == [1, 2, 3, 4, 5]


def test_a_label_holds_until_it_expires_is_replaced_or_taken_off(tmp_path):
    write(tmp_path, *RECORDS)
    with Index(tmp_path) as opened:
        opened.update()
        short, other = Label("expected", "why", "jo", NOW, NOW + 10), Label("attack", "", "jo", NOW, None)
        opened.label("c1", short)
        opened.label("c2", other)
        assert opened.labels(NOW + 9) == {"c1": short, "c2": other}
        assert opened.labels(NOW + 10) == {"c2": other}
        opened.label("c2", short)
        assert opened.labels(NOW) == {"c1": short, "c2": short}
        opened.label("c2", None)
        assert opened.labels(NOW) == {"c1": short}


def test_a_line_that_changed_after_it_was_found_is_left_out(tmp_path):
    write(tmp_path, *RECORDS)
    (path,) = paths(tmp_path)
    with Index(tmp_path) as opened:
        opened.update()
        rows = [*opened.find(Wanted())]
        path.write_bytes(b"#" + path.read_bytes()[1:])
        assert [record["seq"] for record in opened.records(rows)] == [2, 3, 4, 5]
        assert orjson.loads(whole(tmp_path)[1])["seq"] == 2
