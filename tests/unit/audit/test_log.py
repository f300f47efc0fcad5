"""The log on disk: written whole or not at all, continued after every kind of end, and never continued after tampering."""

import base64
import contextlib
import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import threading

import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.audit import AuditTampered, AuditUnavailable
from broker.audit.log import AuditLog
from broker.audit.verify import verify
from broker.errors import UsageError

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
PUBLIC = KEY.public_key()
NOW = 1_700_000_000.0


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "audit"


def opened(folder, **options):
    return AuditLog(folder, KEY, NOW, 1, **options)


def write(folder, count, **options):
    with opened(folder, **options) as log:
        for number in range(count):
            log.append({"event": "decision", "n": number})
        log.sync(NOW)


def lines(folder):
    return [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_bytes().splitlines()]


def assert_whole(folder, count):
    result = verify(folder, PUBLIC)
    assert [str(problem) for problem in result.problems] == []
    assert (result.records, result.end.seq) == (count, count)


def test_a_record_is_on_disk_when_append_returns_and_begins_the_chain(folder):
    with opened(folder) as log:
        entry = log.append({"event": "decision", "seq": 99, "hash": "forged"})
        assert lines(folder) == [orjson.dumps(entry, option=orjson.OPT_SORT_KEYS)]
    assert (entry["seq"], entry["prev_hash"], len(entry["hash"])) == (1, "0" * 64, 64)


def test_the_next_opener_continues_the_chain(folder):
    write(folder, 2)
    write(folder, 3)
    assert_whole(folder, 5)
    assert [orjson.loads(line)["seq"] for line in lines(folder)] == [1, 2, 3, 4, 5]


def test_segments_rotate_and_are_named_by_their_first_record(folder):
    write(folder, 10, segment_bytes=700)
    names = sorted(path.name for path in folder.glob("*.jsonl"))
    assert names[0] == "00000000000000000001.jsonl"
    assert len(names) > 2
    assert all(path.stat().st_size <= 700 for path in folder.glob("*.jsonl"))
    assert_whole(folder, 10)
    write(folder, 1, segment_bytes=700)
    assert_whole(folder, 11)


def test_only_the_owner_can_read_it(folder):
    old = os.umask(0)
    try:
        write(folder, 10, segment_bytes=700)
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_a_second_opener_is_told_which_folder_is_taken(folder):
    with opened(folder), pytest.raises(UsageError, match=f"another broker is writing the audit log in {folder}"):
        opened(folder)
    opened(folder).close()


def test_a_folder_that_cannot_be_made_is_a_fault_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AuditUnavailable, match=r"can't be opened: .*; make the folder writable"):
        opened(tmp_path / "file" / "audit")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        pytest.param({"a": "\ud800"}, "can't be written as JSON", id="text that is not Unicode"),
        pytest.param({"a": "x" * 2**20}, "1048576 is the most", id="a record that is too long"),
    ],
)
def test_a_record_that_cannot_be_written_leaves_the_log_usable(folder, record, reason):
    with opened(folder) as log:
        with pytest.raises(AuditUnavailable, match=reason):
            log.append(record)
        assert log.writable  # the record was at fault, not the log
        log.append({"a": 1})
    assert_whole(folder, 1)


def test_appending_after_close_is_a_fault(folder):
    log = opened(folder)
    log.close()
    with pytest.raises(AuditUnavailable, match="can't be written"):
        log.append({})


@contextlib.contextmanager
def file_size_limit(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_does_not_fit_is_taken_back_and_the_next_one_passes_once_it_fits(folder):
    with opened(folder) as log:
        log.append({"a": 1})
        size = next(folder.glob("*.jsonl")).stat().st_size
        with file_size_limit(size + 50):
            for _ in range(3):
                with pytest.raises(AuditUnavailable, match=r"can't be written: .*; free space"):
                    log.append({"b": 2})
            assert not log.writable
            assert next(folder.glob("*.jsonl")).stat().st_size == size
            assert verify(folder, PUBLIC).problems == []
        assert log.append({"c": 3})["seq"] == 2
        assert log.writable
        log.sync(NOW)
    assert_whole(folder, 2)


def test_a_checkpoint_that_can_not_be_written_makes_the_log_unwritable_until_one_can(folder):
    with opened(folder) as log:
        log.append({"a": 1})
        with file_size_limit(10), pytest.raises(AuditUnavailable, match="can't be put on the disk"):
            log.sync(NOW)
        assert not log.writable
        log.sync(NOW)
        assert log.writable


def test_a_rollback_that_fails_too_is_made_up_for_before_the_next_record(folder, monkeypatch):
    with opened(folder) as log:
        log.append({"a": 1})

        def broken(*_):
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch, file_size_limit(next(folder.glob("*.jsonl")).stat().st_size + 50):
            patch.setattr(os, "ftruncate", broken)
            for _ in range(2):
                with pytest.raises(AuditUnavailable):
                    log.append({"b": 2})
        log.append({"c": 3})
    assert_whole(folder, 2)


def test_a_rotation_that_fails_denies_and_the_next_one_passes(folder, monkeypatch):
    with opened(folder, segment_bytes=300) as log:
        log.append({"a": "x" * 100})
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
            with pytest.raises(AuditUnavailable, match="can't be written: Input/output error"):
                log.append({"b": "x" * 100})
        assert log.append({"c": "x" * 100})["seq"] == 2
        log.sync(NOW)
    assert_whole(folder, 2)


def test_a_full_disk_denies_and_recovers_by_itself(folder):
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(folder)], check=False, capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"a small tmpfs can't be mounted here: {mount.stderr.strip()}")
    try:
        (folder / "ballast").write_bytes(b"x" * 900_000)
        with opened(folder) as log:
            written = 0
            with pytest.raises(AuditUnavailable, match="No space left on device"):  # noqa: PT012 - when it is full is the kernel's business
                for _ in range(10_000):
                    log.append({"text": "y" * 1000})
                    written += 1
            assert written > 10
            with pytest.raises(AuditUnavailable, match="No space left on device"):
                log.sync(NOW)
            assert verify(folder, PUBLIC).problems == []
            (folder / "ballast").unlink()
            log.append({"text": "again"})
            log.sync(NOW)
            assert_whole(folder, written + 1)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_log_that_is_deleted_or_edited_under_the_broker_denies(folder):
    with opened(folder) as log:
        log.append({})
        path = next(folder.glob("*.jsonl"))
        with path.open("ab") as file:
            file.write(b"x")
        with pytest.raises(AuditUnavailable, match="deleted or changed by something else"):
            log.append({})
        assert not log.writable
        path.unlink()
        with pytest.raises(AuditUnavailable, match="deleted or changed by something else"):
            log.append({})


@pytest.mark.parametrize("records", [0, 3])
@pytest.mark.parametrize("torn", [b'{"torn":', b"\x00" * 3_000_000], ids=["half a line", "three megabytes of zeros"])
def test_a_torn_last_line_is_set_aside_and_noted(folder, records, torn):
    write(folder, records)
    path = next(folder.glob("*.jsonl"))
    with path.open("ab") as file:
        file.write(torn)
    opened(folder).close()
    assert path.with_name(path.name + ".torn").read_bytes() == torn
    note = orjson.loads(lines(folder)[-1])
    assert (note["event"], note["seq"]) == ("config", records + 1)
    assert f"{len(torn)} bytes were moved to {path.name}.torn" in note["detail"]
    assert_whole(folder, records + 1)


def test_an_empty_last_segment_is_continued(folder):
    write(folder, 2)
    (folder / "00000000000000000003.jsonl").touch()
    write(folder, 1)
    assert orjson.loads((folder / "00000000000000000003.jsonl").read_bytes())["seq"] == 3
    assert_whole(folder, 3)


WRITER = """
import sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from broker.audit.log import AuditLog
log = AuditLog(Path(sys.argv[1]), Ed25519PrivateKey.from_private_bytes(b"k" * 32), 1.7e9, 1, segment_bytes=20_000)
while True:
    entry = log.append({"text": "x" * 500})
    if entry["seq"] % 50 == 0:
        log.sync(1.7e9)
    print(entry["seq"], flush=True)
"""


def test_kill_9_loses_nothing_that_was_acknowledged(folder):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE)
    acknowledged = [int(writer.stdout.readline()) for _ in range(500)]
    assert verify(folder, PUBLIC).problems == []  # live
    writer.send_signal(signal.SIGKILL)
    acknowledged += [int(line) for line in writer.stdout.read().split()]
    writer.stdout.close()
    writer.wait()
    result = verify(folder, PUBLIC)
    assert result.problems == []
    assert result.end.seq >= acknowledged[-1]
    write(folder, 1)
    assert_whole(folder, result.end.seq + 1)


def test_threads_may_append_sync_and_verify_at_once(folder):
    with opened(folder, segment_bytes=5_000) as log:
        writers = [threading.Thread(target=lambda: [log.append({"x": 1}) for _ in range(300)]) for _ in range(3)]
        for writer in writers:
            writer.start()
        while any(writer.is_alive() for writer in writers):
            log.sync(NOW)
            assert verify(folder, PUBLIC).problems == []
        log.sync(NOW)
    assert_whole(folder, 900)


def test_nothing_new_is_not_signed_again(folder):
    with opened(folder) as log:
        before = (folder / "checkpoint.jwt").read_bytes()
        log.sync(NOW + 60)
        assert (folder / "checkpoint.jwt").read_bytes() == before
        log.append({})
        log.sync(NOW + 60)
        assert (folder / "checkpoint.jwt").read_bytes() != before


def cut(folder):
    path = next(folder.glob("*.jsonl"))
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def edit_last(folder):
    path = next(folder.glob("*.jsonl"))
    path.write_bytes(path.read_bytes().replace(b'"n":4', b'"n":7'))


def forget_checkpoint(folder):
    (folder / "checkpoint.jwt").unlink()


def forge_checkpoint(folder):
    path = folder / "checkpoint.jwt"
    head, payload, signature = path.read_text().split(".")
    claims = base64.urlsafe_b64decode(payload + "==").replace(b'"seq":5', b'"seq":4')
    path.write_text(f"{head}.{base64.urlsafe_b64encode(claims).decode().rstrip('=')}.{signature}")


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        pytest.param(cut, "record 5 was signed, but the log ends with record 4", id="its tail was cut off"),
        pytest.param(edit_last, "it was edited", id="its tail was edited"),
        pytest.param(forget_checkpoint, "there is no checkpoint", id="its checkpoint is gone"),
        pytest.param(forge_checkpoint, "the checkpoint is not signed by", id="its checkpoint was edited"),
    ],
)
def test_a_log_that_was_tampered_with_while_the_broker_was_away_is_not_continued(folder, tamper, reason):
    write(folder, 5)
    tamper(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(AuditTampered, match=f"{reason}.*move the folder away as evidence"):
        opened(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_another_key_does_not_continue_the_log(folder):
    write(folder, 1)
    with pytest.raises(AuditTampered, match="not signed by this broker's key"):
        AuditLog(folder, Ed25519PrivateKey.generate(), NOW, 1)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(records=st.lists(st.dictionaries(st.text(), json_values), max_size=5))
def test_any_json_record_comes_back_and_verifies(tmp_path_factory, records):
    folder = tmp_path_factory.mktemp("any")
    with opened(folder, segment_bytes=300) as log:
        written = [log.append(record) for record in records]
        log.sync(NOW)
    canonical = [orjson.dumps(entry, option=orjson.OPT_SORT_KEYS) for entry in written]
    assert lines(folder) == canonical
    assert_whole(folder, len(records))


def test_a_record_missing_after_the_checkpoint_is_noticed_too(folder):
    with opened(folder) as log:
        for number in range(5):
            log.append({"n": number})
    path = next(folder.glob("*.jsonl"))
    kept = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(kept[:3] + kept[4:]))
    with pytest.raises(AuditTampered, match="record 5 stands where 4 belongs"):
        opened(folder)


def test_a_deleted_log_denies(folder):
    with opened(folder) as log:
        log.append({})
        next(folder.glob("*.jsonl")).unlink()
        with pytest.raises(AuditUnavailable, match="deleted or changed by something else"):
            log.append({})


def test_a_folder_that_others_could_read_is_closed_to_them(folder):
    folder.mkdir(mode=0o755)
    opened(folder).close()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
