"""Every kind of tampering is found, and said to be where it is."""

import hashlib

import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.audit.log import AuditLog
from broker.audit.verify import verify
from broker.errors import UsageError

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
NOW = 1_700_000_000.0
FIRST = "00000000000000000001.jsonl"


@pytest.fixture
def folder(tmp_path):
    with AuditLog(tmp_path / "audit", KEY, NOW, 1) as log:
        for number in range(9):
            log.append({"event": "decision", "n": number})
        log.sync(NOW)
    return tmp_path / "audit"


def found(folder, key=KEY):
    problems = verify(folder, key.public_key()).problems
    return [(problem.file.rpartition("/")[2], problem.line, problem.what) for problem in problems]


def recomputed(records):
    before, lines = "0" * 64, []
    for seq, record in enumerate(records, 1):
        entry = {**record, "seq": seq, "prev_hash": before}
        entry.pop("hash")
        before = entry["hash"] = hashlib.sha256(orjson.dumps(entry, option=orjson.OPT_SORT_KEYS)).hexdigest()
        lines.append(orjson.dumps(entry, option=orjson.OPT_SORT_KEYS))
    return lines


def edit_a_byte(lines):
    lines[3] = lines[3].replace(b'"n":3', b'"n":4')


def edit_the_hash(lines):
    lines[3] = lines[3].replace(b'"hash":"', b'"hash":"0')


def delete_a_line(lines):
    del lines[3]


def delete_the_first(lines):
    del lines[0]


def swap_two(lines):
    lines[3], lines[4] = lines[4], lines[3]


def insert_a_copy(lines):
    lines.insert(4, lines[3])


def insert_another(lines):
    lines.insert(4, b'{"event":"decision"}')


def insert_nonsense(lines):
    lines.insert(4, b"\xff\x00")


def respell(lines):
    lines[3] = lines[3].replace(b'"n":3', b'"n": 3')


def double_a_key(lines):
    lines[3] = lines[3].replace(b'"n":3', b'"n":3,"n":3')


def replace_with_its_own_hash(lines):
    forged = {**orjson.loads(lines[3]), "n": 77}
    forged.pop("hash")
    forged["hash"] = hashlib.sha256(orjson.dumps(forged, option=orjson.OPT_SORT_KEYS)).hexdigest()
    lines[3] = orjson.dumps(forged, option=orjson.OPT_SORT_KEYS)


def cut_the_tail(lines):
    del lines[7:]


def cut_everything(lines):
    lines.clear()


def rewrite_all(lines):
    lines[:] = recomputed([{**orjson.loads(line), "agent": "someone-else"} for line in lines])


def rewrite_from_the_middle(lines):
    records = [orjson.loads(line) for line in lines]
    del records[4]
    lines[:] = recomputed([*records, {**records[-1], "n": 9}])


@pytest.mark.parametrize(
    ("tamper", "file", "line", "what"),
    [
        pytest.param(edit_a_byte, FIRST, 4, "it was edited", id="a byte was edited"),
        pytest.param(edit_the_hash, FIRST, 4, "it was edited", id="a hash was edited"),
        pytest.param(delete_a_line, FIRST, 4, "record 5 stands where 4 belongs", id="a line was deleted"),
        pytest.param(delete_the_first, FIRST, 1, "record 2 stands where 1 belongs", id="the first line was deleted"),
        pytest.param(swap_two, FIRST, 4, "record 5 stands where 4 belongs", id="two lines were swapped"),
        pytest.param(insert_a_copy, FIRST, 5, "record 4 stands where 5 belongs", id="a line was doubled"),
        pytest.param(insert_another, FIRST, 5, "not an audit record", id="a line was inserted"),
        pytest.param(insert_nonsense, FIRST, 5, "not JSON", id="bytes were inserted"),
        pytest.param(respell, FIRST, 4, "not canonical", id="a line was spelled otherwise"),
        pytest.param(double_a_key, FIRST, 4, "not canonical", id="a key was doubled"),
        pytest.param(replace_with_its_own_hash, FIRST, 5, "does not follow", id="a line was replaced and rehashed"),
        pytest.param(
            cut_the_tail, "checkpoint.jwt", 1, "the log ends with record 7: its tail was cut off", id="the tail was cut"
        ),
        pytest.param(cut_everything, "checkpoint.jwt", 1, "the log ends with record 0", id="everything was cut"),
        pytest.param(rewrite_all, FIRST, 9, "not the one that was signed", id="all was rewritten and rehashed"),
        pytest.param(rewrite_from_the_middle, FIRST, 9, "not the one that was signed", id="the rest was rewritten and rehashed"),
    ],
)
def test_tampering_is_found_where_it_is(folder, tamper, file, line, what):
    lines = (folder / FIRST).read_bytes().splitlines()
    tamper(lines)
    (folder / FIRST).write_bytes(b"".join(line + b"\n" for line in lines))
    problems = found(folder)
    assert problems[0][:2] == (file, line)
    assert what in problems[0][2]


@pytest.mark.parametrize("position", range(0, 1500, 7))
def test_no_byte_can_change_unseen(folder, position):
    content = bytearray((folder / FIRST).read_bytes())
    content[position] ^= 0x01
    (folder / FIRST).write_bytes(bytes(content))
    assert found(folder) != []


@pytest.mark.parametrize("tamper", [edit_a_byte, replace_with_its_own_hash, insert_another, delete_a_line])
def test_one_change_is_one_problem(folder, tamper):
    lines = (folder / FIRST).read_bytes().splitlines()
    tamper(lines)
    (folder / FIRST).write_bytes(b"".join(line + b"\n" for line in lines))
    assert len(found(folder)) == 1


def test_a_checkpoint_of_another_key_is_found(folder):
    other = Ed25519PrivateKey.generate()
    assert [what for _, _, what in found(folder, other)] == [found(folder, other)[0][2]]
    assert "not signed by" in found(folder, other)[0][2]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        pytest.param(None, "there is no checkpoint", id="no file"),
        pytest.param(b"[]", "can't be read", id="another shape"),
        pytest.param(b"{", "can't be read", id="not JSON"),
    ],
)
def test_a_checkpoint_that_is_gone_or_broken_is_found(folder, content, what):
    path = folder / "checkpoint.jwt"
    path.unlink() if content is None else path.write_bytes(content)
    assert [(file, what in said) for file, _, said in found(folder)] == [("checkpoint.jwt", True)]


def test_a_renamed_segment_is_found(folder):
    (folder / FIRST).rename(folder / "00000000000000000002.jsonl")
    assert found(folder) == [
        ("00000000000000000002.jsonl", 1, "record 1 begins a file that is named otherwise: files were renamed or added")
    ]


def test_a_line_without_an_end_does_not_fill_the_memory(folder):
    with (folder / FIRST).open("ab") as file:
        file.truncate(1 << 30)
    assert found(folder) == [(FIRST, 10, "the line is incomplete")]


def test_a_live_log_may_be_in_the_middle_of_a_line(folder):
    with AuditLog(folder, KEY, NOW, 1):
        with (folder / FIRST).open("ab") as file:
            file.write(b'{"event":')
        assert found(folder) == []


def test_without_a_key_the_chain_is_checked_but_not_the_signature(folder):
    result = verify(folder, None)
    assert (result.problems, result.signed_at, result.records, result.end.seq) == ([], "", 9, 9)


def test_problems_are_bounded(folder):
    (folder / FIRST).write_bytes(b"x\n" * 10_000)
    assert len(found(folder)) == 100


def test_a_problem_says_what_to_do(folder):
    (folder / "checkpoint.jwt").unlink()
    assert str(verify(folder, None).problems[0]) == (
        f"{folder}/checkpoint.jwt:1: there is no checkpoint, so nothing shows where the log must end; "
        "keep the folder as evidence and compare it with a copy"
    )


def test_a_folder_that_is_not_there_is_wrong_usage(tmp_path):
    with pytest.raises(UsageError, match="there is no audit log in"):
        verify(tmp_path / "audit", None)
