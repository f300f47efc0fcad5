"""`broker audit tail` and `verify`, as a person runs them."""

import orjson
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from broker.audit import chain
from broker.audit.log import AuditLog
from broker.audit.record import Attempt, Ending, config_record, decision_record, outcome_record
from broker.cli.audit import _new_lines, audit, render
from broker.errors import UsageError
from broker.manifest.findings import printable
from broker.policy.types import ALLOW, Code, deny

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
NOW = 1_700_000_000.0
CALL = Attempt("d-1", "sha256:r", {"name": "refund-bot"}, method="GET", host="api.github.com", path="/x")
KNOWN = Attempt("d-2", "sha256:r", {"name": "refund-bot"}, tool="github", operation="issues.list")


def public_pem(key):
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.fixture
def state(tmp_path):
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "audit.pub.pem").write_bytes(public_pem(KEY))
    with AuditLog(tmp_path / "audit", KEY, NOW, 1, segment_bytes=2_000) as log:
        log.append(config_record(NOW, 1, "first configuration", "sha256:r"))
        log.append(decision_record(NOW, 2, CALL, deny(Code.HOST_NOT_DECLARED, "no")))
        log.append(decision_record(NOW, 3, KNOWN, ALLOW))
        log.append(outcome_record(NOW, 4, KNOWN, Ending(status=200)))
        log.append(outcome_record(NOW, 5, KNOWN, Ending(code="response_blocked")))
        log.sync(NOW)
    return tmp_path


def run(*words):
    return CliRunner().invoke(audit, [str(word) for word in words], standalone_mode=False)


TIME = "2023-11-14T22:13:20.000000Z"


def test_tail_prints_a_line_a_record_for_people(state):
    assert run("tail", "--state", state).stdout.splitlines() == [
        f"{TIME}  config      first configuration  sha256:r",
        f"{TIME}  deny        host_not_declared  refund-bot  GET api.github.com/x  d-1  no",
        f"{TIME}  allow       refund-bot  github/issues.list  d-2",
        f"{TIME}  outcome     refund-bot  github/issues.list  d-2  upstream 200",
        f"{TIME}  outcome     response_blocked  refund-bot  github/issues.list  d-2  upstream did not answer",
    ]


def test_tail_takes_the_last_lines_across_segments(state):
    assert len(list((state / "audit").glob("*.jsonl"))) > 1
    assert [orjson.loads(line)["seq"] for line in run("tail", "--state", state, "-n", 4, "--json").stdout.splitlines()] == [
        2,
        3,
        4,
        5,
    ]
    assert run("tail", "--state", state, "-n", 0).stdout == ""


def test_tail_json_is_the_lines_as_they_are(state):
    written = b"".join(path.read_bytes() for path in sorted((state / "audit").glob("*.jsonl")))
    assert run("tail", "--state", state, "--json").stdout_bytes == written


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        pytest.param("plain Grüße 東京", "plain Grüße 東京", id="text stays"),
        pytest.param("a\x1b[2Jb", "a\\x1b[2Jb", id="an escape sequence"),
        pytest.param("a\r\nb", "a\\r\\nb", id="line ends"),
        pytest.param("\x9b2J\x7f", "\\x9b2J\\x7f", id="C1 controls and DEL"),
        pytest.param("\u202egnp.exe", "\\u202egnp.exe", id="a direction override"),
    ],
)
def test_nothing_that_a_terminal_acts_on_is_printed(text, shown):
    assert printable(text) == shown
    line = orjson.dumps({"time": TIME, "verdict": "deny", "host": text, "method": "GET"})
    assert render(line) == f"{TIME}  deny        GET {shown}"


@pytest.mark.parametrize("line", [b"\xff\x1b", b"[]", b'{"agent":"x"}', b'{"upstream":7}'])
def test_a_line_that_is_no_record_is_shown_as_such(line):
    assert render(line).startswith("(not a record) ")
    assert render(line).isprintable()


def test_verify_says_ok_with_what_it_checked(state):
    result = run("verify", "--state", state)
    last = orjson.loads(run("tail", "--state", state, "-n", 1, "--json").stdout)["hash"]
    assert result.stdout == f"ok: 5 records, chain unbroken to {last}, checkpoint signed at {TIME}\n"
    assert result.return_value == 0


def test_verify_without_a_key_says_so(state):
    (state / "keys" / "audit.pub.pem").unlink()
    result = run("verify", "--state", state)
    assert "checkpoint not checked: no key" in result.stdout
    assert result.return_value == 0


def test_verify_prints_problems_and_exits_1(state):
    path = min((state / "audit").glob("*.jsonl"))
    path.write_bytes(path.read_bytes().replace(b"first", b"other"))
    result = run("verify", "--state", state)
    assert result.stdout.startswith(f"{path}:1: record 1 does not have the hash it states: it was edited; keep the folder")
    assert result.return_value == 1
    as_json = run("verify", "--state", state, "--json")
    assert (orjson.loads(as_json.stdout)["ok"], orjson.loads(as_json.stdout)["problems"][0]["line"]) == (False, 1)
    assert as_json.return_value == 1


@pytest.mark.parametrize("verb", ["tail", "verify"])
def test_a_missing_log_is_wrong_usage(tmp_path, verb):
    error = run(verb, "--state", tmp_path).exception
    assert isinstance(error, UsageError)
    assert error.exit_code == 2
    assert "there is no audit log in" in str(error)


@pytest.mark.parametrize(
    ("pem", "reason"),
    [
        pytest.param(b"nonsense", "can't be read", id="not PEM"),
        pytest.param(public_pem(generate_private_key(SECP256R1())), "not an Ed25519 key", id="another algorithm"),
    ],
)
def test_a_key_that_is_no_key_is_wrong_usage(state, pem, reason):
    (state / "keys" / "audit.pub.pem").write_bytes(pem)
    error = run("verify", "--state", state).exception
    assert isinstance(error, UsageError)
    assert reason in str(error)


def test_following_gives_each_whole_line_once_also_across_segments(tmp_path):
    first, second = tmp_path / chain.segment_name(1), tmp_path / chain.segment_name(3)
    first.write_bytes(b"old\none\ntor")
    followed = _new_lines(tmp_path, first, len(b"old\n"))
    assert next(followed) == b"one"
    with first.open("ab") as file:
        file.write(b"n\n")
    assert next(followed) == b"torn"
    second.write_bytes(b"two\n")
    assert next(followed) == b"two"
