"""`broker audit`, as a person runs it."""

import orjson
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from broker.audit import chain
from broker.audit.log import AuditLog
from broker.audit.record import Attempt, Ending, alert_record, config_record, decision_record, outcome_record
from broker.cli import audit as verb
from broker.cli.audit import _new_lines, audit, render
from broker.errors import UsageError
from broker.manifest.findings import printable
from broker.policy.types import ALLOW, Code, deny

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
NOW = 1_700_000_000.0
CALL = Attempt("d-1", "sha256:r", {"name": "refund-bot"}, method="GET", host="api.github.com", path="/x")
SECRET = "sk_live_abcdef0123456789"
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


@pytest.mark.parametrize("line", [b"\xff\x1b", b"[]", b'{"agent":"x"}', b'{"upstream":7}', b'{"upstream":{"x":1}}'])
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


@pytest.mark.parametrize("words", [("tail",), ("verify",), ("query",), ("run", "r")])
def test_a_missing_log_is_wrong_usage(tmp_path, words):
    error = run(*words, "--state", tmp_path).exception
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


# What an index finds.


@pytest.mark.parametrize(
    ("words", "seqs"),
    [
        pytest.param((), [1, 2, 3, 4, 5], id="all"),
        pytest.param(("--agent", "refund-bot", "--code", "host_not_declared"), [2], id="of an agent and a code"),
        pytest.param(("--tool", "github", "--operation", "issues.list"), [3, 4, 5], id="of an operation"),
        pytest.param(("--verdict", "allow"), [3], id="of a verdict"),
        pytest.param(("--run", "r", "--effect", "read", "--data", "pii"), [], id="of what there is none"),
        pytest.param(("--since", "2023-11-14", "--until", "2023-11-15"), [1, 2, 3, 4, 5], id="within a day"),
        pytest.param(("--since", "1d"), [], id="since yesterday"),
        pytest.param(("--until", TIME), [], id="before the first"),
    ],
)
def test_query_prints_the_records_that_fit(state, words, seqs):
    as_json = run("query", "--state", state, *words, "--json").stdout
    assert [orjson.loads(line)["seq"] for line in as_json.splitlines()] == seqs
    written = b"".join(path.read_bytes() for path in sorted((state / "audit").glob("*.jsonl"))).decode().splitlines()
    assert as_json.splitlines() == [written[seq - 1] for seq in seqs]
    assert run("query", "--state", state, *words).stdout.splitlines() == [render(written[seq - 1].encode()) for seq in seqs]


def test_query_says_when_there_is_more(state):
    some = run("query", "--state", state, "--limit", 2, "--json")
    assert [orjson.loads(line)["seq"] for line in some.stdout.splitlines()] == [4, 5]
    assert some.stderr == "these are the last 2, and there are more; --limit 0 prints all\n"
    for limit in (0, 5):
        whole = run("query", "--state", state, "--limit", limit)
        assert (len(whole.stdout.splitlines()), whole.stderr) == (5, "")


def test_query_says_when_there_is_nothing(state):
    none = ("query", "--state", state, "--agent", "nobody")
    assert (run(*none).stdout, run(*none).stderr) == ("", "no record fits all of this\n")
    assert run(*none, "--json").output == ""


@pytest.mark.parametrize("words", [("--effect", "paint"), ("--code", "nonsense"), ("--verdict", "maybe"), ("--since", "soon")])
def test_query_knows_its_words(state, words):
    assert run("query", "--state", state, *words).exception.exit_code == 2


def test_a_run_is_printed_as_a_timeline(state):
    call = Attempt("d-9", "", {"name": "refund-bot"}, tool="github", operation="issues.list", run_id="run-7", step=1)
    other = Attempt("d-8", "", {"name": "other-bot"}, tool="github", operation="issues.list", run_id="run-7", step=1)
    with AuditLog(state / "audit", KEY, NOW, 1) as log:
        log.append(decision_record(NOW, 1, call, ALLOW))
        log.append(decision_record(NOW, 1, other, deny(Code.AGENT_REVOKED, "no")))
        log.append(outcome_record(NOW + 1, 1, call, Ending(200, 12, 1000.0)))
        log.append(alert_record(NOW + 2, 1, "look", {"agent": {"name": "refund-bot"}, "kind": "probing", "run_id": "run-7"}))
        log.sync(NOW)
    first = [
        "agent   refund-bot",
        "run     run-7",
        f"began   {TIME}, took 2.000 s",
        "calls   1, 0 denied",
        "    +0.000 s    1  allow       github/issues.list  → 200, 1000 ms, 12 bytes  d-9",
        "    +2.000 s       alert  probing  look",
    ]
    lines = run("run", "run-7", "--state", state).stdout.splitlines()
    assert lines[:6] == first
    assert lines[6:8] == ["", "agent   other-bot"]
    assert run("run", "run-7", "--agent", "refund-bot", "--state", state).stdout.splitlines() == first
    document = orjson.loads(run("run", "run-7", "--state", state, "--json").stdout)
    assert [(each["agent"], each["calls"], each["denied"]) for each in document] == [("refund-bot", 1, 0), ("other-bot", 1, 1)]
    assert [entry["event"] for entry in document[0]["entries"]] == ["decision", "alert"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(("run-x\x1b",), "the log names no run 'run-x\\x1b'; ", id="never seen"),
        pytest.param(("r1", "--agent", "other"), "the log names no run 'r1' of other; ", id="not of this agent"),
    ],
)
def test_a_run_that_is_not_in_the_log_is_one_line_and_exit_1(state, words, said):
    result = run("run", *words, "--state", state)
    assert (result.return_value, result.stdout) == (1, "")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_of_an_endless_run_the_beginning_is_told(state, monkeypatch):
    monkeypatch.setattr(verb, "_MOST_OF_RUN", 2)
    with AuditLog(state / "audit", KEY, NOW, 1) as log:
        for number in range(3):
            log.append(
                decision_record(NOW, 1, Attempt(f"d-{number}", "", {}, host="x", run_id="r"), deny(Code.HOST_NOT_DECLARED, ""))
            )
        log.sync(NOW)
    result = run("run", "r", "--state", state)
    assert "calls   2, 2 denied" in result.stdout
    assert result.stderr == "these are its first 2 records; `broker audit query --run` prints all\n"


def test_query_escapes_the_one_character_of_ascii_that_json_does_not(tmp_path):
    known = {"host": "x", "params": {"body": "a\x7fb"}}
    with AuditLog(tmp_path / "audit", KEY, NOW, 1) as log:
        log.append(decision_record(NOW, 1, Attempt("d-1", "", {"name": "a"}, **known), deny(Code.PARAMS_INVALID, "")))
        log.sync(NOW)
    shown = run("query", "--json", "--state", tmp_path).stdout
    assert "a\\u007fb" in shown


ODD = "\x1b[2J\x9b31m\x7f\u202egpj\r\nok"
ARGUMENT = {"params": {"body": {ODD: f"x {SECRET} y", SECRET: ODD}}}


@pytest.mark.parametrize("text", [pytest.param(SECRET, id="a secret"), pytest.param(ODD, id="what terminals act on")])
@pytest.mark.parametrize("where", ["host", "path", "operation", "method", "run_id", "trace_id", "tool"])
@pytest.mark.parametrize(
    "older", [pytest.param(False, id="recorded today"), pytest.param(True, id="recorded by an older broker")]
)
def test_neither_query_nor_run_shows_a_secret_or_what_a_terminal_obeys(tmp_path, where, text, older):
    run_id = text if where == "run_id" else "r"
    known = {"host": "x", "run_id": "r", **ARGUMENT, where: text}
    record = decision_record(NOW, 1, Attempt("d-1", "", {"name": "a"}, **known), deny(Code.PARAMS_INVALID, text))
    with AuditLog(tmp_path / "audit", KEY, NOW, 1) as log:
        log.append({**record, **({where: text, "args": known["params"]} if older else {})})
        log.sync(NOW)
    recorded = orjson.loads(run("query", "--state", tmp_path, "--json").stdout)
    run_id = text if older and where == "run_id" else recorded["run_id"]
    for words in (("query",), ("query", "--json"), ("run", run_id), ("run", run_id, "--json")):
        shown = run(*words, "--state", tmp_path)
        assert shown.exception is None
        assert shown.stdout != ""
        assert "abcdef0123456789" not in shown.stdout
        assert all(line.isprintable() for line in shown.stdout.splitlines())
        assert "--json" not in words or shown.stdout.isascii()
