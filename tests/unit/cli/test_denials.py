"""`broker denials` as a reviewer runs it."""

import json
import re
import sqlite3

import orjson
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from broker import clock
from broker.audit import index
from broker.audit.index import FILE
from broker.audit.log import AuditLog
from broker.audit.record import Attempt, Ending, decision_record, outcome_record
from broker.cli import denials as verb
from broker.cli import main, options
from broker.cli.audit import render
from broker.cli.denials import denials
from broker.errors import UsageError
from broker.policy.types import ALLOW, Code, Decision, Verdict, Violation, deny

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
NOW = 1_700_000_000.0
SEARCH = {"tool": "wiki", "operation": "search", "method": "POST", "host": "wiki.example", "path": "/mcp"}
WHY = (Violation("/arguments/query", "manifests/tools/wiki.yaml#/q", "is too long"),)
INVALID = deny(Code.PARAMS_INVALID, "too long", rule=WHY[0].rule, violations=WHY)
UNKNOWN_HOST = deny(Code.HOST_NOT_DECLARED, "the manifest names no tool there")


def append(state, *calls, began=NOW):
    with AuditLog(state / "audit", KEY, NOW, 1) as log:
        for number, (decision, known) in enumerate(calls, 1):
            known = {"agent": "bot", **known}  # noqa: PLW2901
            attempt = Attempt(f"d-{number}", "sha256:r", {"name": known.pop("agent")}, **known)
            log.append(decision_record(began + number, 1, attempt, decision))
            if decision is ALLOW:
                log.append(outcome_record(began + number, 1, attempt, Ending(status=200)))
        log.sync(NOW)


@pytest.fixture(autouse=True)
def fixed(monkeypatch):
    monkeypatch.setattr(clock, "now", lambda: NOW + 100)
    monkeypatch.setattr(options, "me", lambda: "jo")


@pytest.fixture
def state(tmp_path):
    append(
        tmp_path,
        (UNKNOWN_HOST, {"method": "CONNECT", "host": "evil.example:443"}),
        (INVALID, {**SEARCH, "params": {"arguments": {"query": "x"}, "path": {}}}),
        (INVALID, {**SEARCH, "params": {"arguments": {"query": "y"}, "path": {}}}),
        (ALLOW, SEARCH),
        (deny(Code.RATE_LIMITED, "10/s is spent", rule="manifests/agents/bot.yaml#/spec/limits/rate"), SEARCH),
        (Decision(Verdict.WOULD_DENY, Code.HOST_NOT_DECLARED, "no"), {"agent": "", "method": "CONNECT", "host": "a.example"}),
    )
    return tmp_path


def run(*words):
    return CliRunner().invoke(denials, [str(word) for word in words], standalone_mode=False)


def as_json(state, *words):
    return json.loads(run("--state", state, "--json", *words).stdout)


def test_denials_are_read_in_clusters_permissions_first(state):
    ids = [each["id"] for each in as_json(state)]
    assert run("--state", state).stdout.splitlines() == [
        "Not granted by the manifests (4 calls)",
        f"  {ids[0]}      2x  bot  wiki/search  params_invalid",
        "      2023-11-14T22:13:22Z to 2023-11-14T22:13:23Z, allowed at other times; manifests/tools/wiki.yaml#/q",
        '      POST wiki.example/mcp  {"arguments":{"query":"y"}}  /arguments/query: is too long  d-3',
        f"  {ids[1]}      1x  (no agent)  a.example  host_not_declared  shadow: passed",
        "      2023-11-14T22:13:26Z, never allowed",
        "      CONNECT a.example  no  d-6",
        f"  {ids[2]}      1x  bot  evil.example:443  host_not_declared",
        "      2023-11-14T22:13:21Z, never allowed",
        "      CONNECT evil.example:443  the manifest names no tool there  d-1",
        "",
        "Over a limit (1 call)",
        f"  {ids[3]}      1x  bot  wiki/search  rate_limited",
        "      2023-11-14T22:13:25Z, allowed at other times; manifests/agents/bot.yaml#/spec/limits/rate",
        "      POST wiki.example/mcp  10/s is spent  d-5",
    ]


def test_json_is_an_array_with_stable_keys(state):
    first = as_json(state)[0]
    assert list(first) == [
        "id", "kind", "agent", "what", "tool", "operation", "host", "code", "rule", "shadow", "count", "first", "last",
        "ever_allowed", "label", "example", "decision_ids",
    ]  # fmt: skip
    assert (first["kind"], first["count"], first["first"]) == ("permission", 2, "2023-11-14T22:13:22.000000Z")
    assert (first["label"], first["decision_ids"]) == (None, ["d-3", "d-2"])


@pytest.mark.parametrize(
    ("words", "counts"),
    [
        pytest.param((), [2, 1, 1, 1], id="all"),
        pytest.param(("--agent", "bot"), [2, 1, 1], id="of an agent"),
        pytest.param(("--since", "97s"), [1, 1, 1], id="since so long ago"),
        pytest.param(("--since", "2023-11-14T22:13:26Z"), [1], id="since a time"),
        pytest.param(("--agent", "nobody"), [], id="of nobody"),
    ],
)
def test_only_what_was_asked_for_is_counted(state, words, counts):
    assert [each["count"] for each in as_json(state, *words)] == counts


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param((), "nothing was denied", id="ever"),
        pytest.param(
            ("--agent", "b\x1b", "--since", "1d"), "nothing was denied to b\\x1b since 2023-11-13T22:15:00.000000Z", id="since"
        ),
    ],
)
def test_without_denials_there_is_one_sentence(tmp_path, words, said):
    append(tmp_path, (ALLOW, SEARCH))
    result = run("--state", tmp_path, *words)
    assert result.stdout == f"{said}\n"
    assert json.loads(run("--state", tmp_path, "--json", *words).stdout) == []


def test_more_clusters_than_anyone_reads_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(verb, "_MOST", 2)
    append(tmp_path, *((UNKNOWN_HOST, {"host": f"{name}.example"}) for name in "abcd"))
    lines = run("--state", tmp_path).stdout.splitlines()
    assert len(lines) == 1 + 2 * 3 + 1
    assert lines[-1] == "  … and 2 clusters more; see them with --json, or fewer with --agent and --since"
    assert len(as_json(tmp_path)) == 4


# Labels.


def test_a_label_is_shown_to_other_reviewers_and_can_be_taken_off(state):
    cluster = as_json(state)[0]["id"]
    labelled = run("label", cluster, "expected", "--note", "ticket 7", "--expires", "30d", "--state", state)
    assert labelled.stdout == f"{cluster} is labelled expected\n"
    assert run("--state", state).stdout.splitlines()[4] == "      expected until 2023-12-14T22:15:00Z, says jo: ticket 7"
    assert as_json(state)[0]["label"] == {
        "label": "expected",
        "note": "ticket 7",
        "by": "jo",
        "at": "2023-11-14T22:15:00.000000Z",
        "expires": "2023-12-14T22:15:00.000000Z",
    }
    assert run("label", cluster, "none", "--state", state).stdout == f"{cluster} has no label\n"
    assert as_json(state)[0]["label"] is None


def test_the_state_may_stand_before_the_word_label(state):
    cluster = as_json(state)[0]["id"]
    assert run("--state", state, "label", cluster, "attack").stdout == f"{cluster} is labelled attack\n"
    assert as_json(state)[0]["label"] == {
        "label": "attack", "note": "", "by": "jo", "at": "2023-11-14T22:15:00.000000Z", "expires": None,
    }  # fmt: skip
    assert run("--state", state).stdout.splitlines()[4] == "      attack, says jo"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(
            ("0" * 12, "attack"), "the log holds no denials of a cluster '000000000000'; `broker denials` shows", id="unknown"
        ),
        pytest.param(("x\x1b sk_live_abc", "attack"), "a cluster 'x\\x1b [redacted]", id="an ID that is an attack"),
        pytest.param(("CLUSTER", "attack", "--expires", "2023-11-14"), "is over; name a time to come", id="expired already"),
    ],
)
def test_what_can_t_be_labelled_is_wrong_usage(state, words, said):
    cluster = as_json(state)[0]["id"]
    error = run("label", *(cluster if word == "CLUSTER" else word for word in words), "--state", state).exception
    assert isinstance(error, UsageError)
    assert said in str(error)
    assert [each["label"] for each in as_json(state)] == [None] * 4


# Following.


class StoppedError(Exception):
    """What ends a test's endless loop."""


def followed(state, monkeypatch, *happenings, words=()):
    """What is printed when this happens, one after the other, each time that there is nothing new."""
    left = list(happenings)

    def sleep(_seconds):
        if not left:
            raise KeyboardInterrupt
        left.pop(0)()

    monkeypatch.setattr(verb.time, "sleep", sleep)
    return CliRunner().invoke(denials, ["--state", str(state), "--follow", *words], standalone_mode=False)


def test_following_prints_a_cluster_again_when_it_grew_and_new_ones(state, monkeypatch):
    grown = lambda: append(state, (INVALID, SEARCH), (ALLOW, SEARCH), began=NOW + 50)  # noqa: E731
    fresh = lambda: append(state, (UNKNOWN_HOST, {"host": "new.example"}), began=NOW + 60)  # noqa: E731
    quiet = lambda: append(state, (ALLOW, SEARCH), began=NOW + 70)  # noqa: E731
    result = followed(state, monkeypatch, grown, fresh, quiet)
    heads = [line.split()[1:4] for line in result.stdout.splitlines() if line.startswith("  ") and line[2] != " "]
    assert heads == [
        ["2x", "bot", "wiki/search"],
        ["1x", "(no", "agent)"],
        ["1x", "bot", "evil.example:443"],
        ["1x", "bot", "wiki/search"],
        ["3x", "bot", "wiki/search"],
        ["1x", "bot", "new.example"],
    ]


def test_following_as_json_is_an_object_a_line(state, monkeypatch):
    grown = lambda: append(state, (INVALID, SEARCH), began=NOW + 50)  # noqa: E731
    result = followed(state, monkeypatch, grown, words=["--json", "--agent", "bot"])
    assert [json.loads(line)["count"] for line in result.stdout.splitlines()] == [2, 1, 1, 3]


def test_ctrl_c_ends_following_with_130(state, monkeypatch):
    def interrupted(_seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(verb.time, "sleep", interrupted)
    assert main._run(["denials", "--state", str(state), "--follow"]) == 130


# Attacks.

SECRET = "sk_live_abcdef0123456789"
ODD = "\x1b]0;pwned\x07\x1b[2J\x9b31m\x7f\u202egpj\u2066\r\nagent  ok"


@pytest.mark.parametrize("text", [pytest.param(SECRET, id="a secret"), pytest.param(ODD, id="what terminals act on")])
@pytest.mark.parametrize(
    "carried",
    [
        pytest.param(lambda text: {"host": f"{text}.example", "tool": ""}, id="host"),
        pytest.param(lambda text: {"path": f"/x/{text}"}, id="path"),
        pytest.param(lambda text: {"operation": f"GET /x/{text}"}, id="what was tried"),
        pytest.param(lambda text: {"operation": f"tools/call {text}"}, id="an MCP tool"),
        pytest.param(lambda text: {"method": text}, id="method"),
        pytest.param(lambda text: {"run_id": text}, id="run ID"),
        pytest.param(lambda text: {"params": {"body": {text: [f"x {text} y"]}}}, id="arguments"),
        pytest.param(lambda text: {"agent": text}, id="agent"),
        pytest.param(
            lambda text: {"decision": deny(Code.PARAMS_INVALID, text, violations=(Violation(text, "r", text),))}, id="words"
        ),
    ],
)
def test_nothing_that_a_call_carried_is_obeyed_or_told(tmp_path, carried, text):
    call = {"decision": INVALID, **SEARCH, **carried(text)}
    append(tmp_path, (call.pop("decision"), call))
    cluster = as_json(tmp_path)[0]["id"]
    run("label", cluster, "attack", "--note", text, "--state", tmp_path)
    for words in ((), ("--json",)):
        shown = run("--state", tmp_path, *words).stdout
        assert all(line.isprintable() for line in shown.splitlines())
        assert len(shown.splitlines()) == (1 if words else 5)
        assert "abcdef0123456789" not in shown
    assert run("--state", tmp_path, "--json").stdout.isascii()


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.sampled_from(["pointer", "status"]), inner, max_size=3)
    ),
)


@given(st.fixed_dictionaries(dict.fromkeys(("method", "host", "path", "args", "violations", "detail", "decision_id"), anything)))
def test_whatever_stands_where_something_else_belongs_an_example_is_a_text(example):
    assert isinstance(verb._example(example), str)


@given(
    st.dictionaries(st.sampled_from(["time", "verdict", "agent", "tool", "operation", "host", "revision", "upstream"]), anything)
)
def test_and_a_record_is_one_line(record):
    assert render(orjson.dumps(record)).isprintable()


def test_records_that_somebody_spoiled_do_not_break_it(tmp_path):
    spoiled = {"violations": 7, "args": [1], "detail": {}, "method": 1, "decision_id": [], "rule": None, "path": {"x": 1}}
    with AuditLog(tmp_path / "audit", KEY, NOW, 1) as log:
        record = decision_record(NOW, 1, Attempt("d-1", "", {}, **SEARCH), INVALID)
        log.append({**record, **spoiled})
        log.append({**record, "violations": [7, {}]})
    result = run("--state", tmp_path)
    assert result.exception is None
    assert "(no agent)  wiki/search  params_invalid" in result.stdout
    assert "None: None" in result.stdout


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        pytest.param(
            lambda state: (state / FILE).write_bytes(b"x" * 5000), "is no index of the broker's", id="garbage for an index"
        ),
        pytest.param(lambda state: (state / "audit").rename(state / "gone"), "there is no audit log in", id="no log"),
    ],
)
def test_broken_input_is_one_clear_line_and_exit_2(state, capsys, spoil, said):
    spoil(state)
    assert main._run(["denials", "--state", str(state)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_terminal_is_told_how_far_the_indexing_is_and_nothing_else_is(state, monkeypatch, capsys):
    monkeypatch.setattr(index, "_BATCH", 3)
    for terminal in (False, True):
        monkeypatch.setattr(options.sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with options.index(state):
            pass
        (state / FILE).unlink()
        told = re.sub(r"\d+ %", "N %", capsys.readouterr().err)
        assert told == ("indexing the audit log, once: N %\r" * 2 + "\r\x1b[K" if terminal else "")


def test_labels_survive_an_index_that_is_made_anew(state):
    cluster = as_json(state)[0]["id"]
    run("label", cluster, "attack", "--state", state)
    with sqlite3.connect(state / FILE) as raw:
        raw.execute("UPDATE segment SET digest = 'other'")
    raw.close()
    assert as_json(state)[0]["label"]["label"] == "attack"
