"""`broker propose` as an agent's team runs it: on the log that a broker wrote, in the folder that it will commit."""

import importlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker import clock
from broker.audit.log import AuditLog
from broker.cli import options
from broker.cli.main import main
from broker.containment.response import Containment, Surroundings
from broker.manifest.load import load
from broker.rehearsal import Call, Rehearsal
from broker.review import draft as module

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
NOW = 1_800_000_000.0
SAMPLE = Path(__file__).parents[3] / "manifests"
GITHUB = "https://api.github.com/repos"
SECRET = "sk_live_0123456789abcdef"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    shutil.copytree(SAMPLE, tmp_path / "manifests")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clock, "now", lambda: NOW)
    monkeypatch.setattr(options, "me", lambda: "jo")

    def run(verb, *arguments):
        with pytest.raises(SystemExit) as ended:
            main([verb, *arguments])
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


def happened(*calls, agent="refund-bot", shadow=False):
    """These calls were made and are in the record of `.broker`; their decision IDs are d-1, d-2, …"""
    if shadow:
        path = Path(f"manifests/agents/{agent}.yaml")
        path.write_text(path.read_text().replace("mode: enforce", "mode: shadow\n  shadow_until: 2099-01-31"))
    rehearsal = Rehearsal(load(Path("manifests")).snapshot, NOW)
    with AuditLog(Path(".broker/audit"), KEY, NOW, 1) as log:
        for number, call in enumerate(calls, 1):
            log.append({**rehearsal.call(agent, call).record, "decision_id": f"d-{number}"})
        log.sync(NOW)


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / ".broker/audit").mkdir(parents=True)


def get(path):
    return Call("GET", f"{GITHUB}{path}")


def test_a_decision_becomes_a_pull_request_with_evidence_patch_and_effect(run):
    happened(get("/acme/mobile/issues"))
    code, out, err = run("propose", "d-1")
    assert (code, err) == (0, "")
    assert out.startswith("# Let refund-bot call github/issues.list\n")
    evidence = (
        "- `2027-01-15T08:00:00Z`, `d-1`, `github/issues.list: GET api.github.com/repos/acme/mobile/issues`, `params_invalid: "
    )
    assert evidence in out
    assert "+          params: {path: {properties: {owner: {const: acme}, repo: {enum: [web, payments, mobile]}}}}\n" in out
    assert "**2 wider** for 1 agent" in out, "the parameters, and what the credential is narrowed to"
    assert "mobile" not in Path("manifests/agents/refund-bot.yaml").read_text(), "nothing is written unasked"


def test_write_applies_what_git_would_and_the_call_is_then_permitted(run):
    happened(get("/acme/mobile/issues"))
    _, document, _ = run("propose", "d-1", "--json")
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(["git", "add", "manifests"], check=True)
    code, _, err = run("propose", "d-1", "--write")
    assert (code, err) == (0, "manifests/agents/refund-bot.yaml is changed; review it with git diff\n")
    written = Path("manifests/agents/refund-bot.yaml").read_text()
    subprocess.run(["git", "checkout", "-q", "manifests"], check=True)
    subprocess.run(["git", "apply"], input=json.loads(document)["patch"].encode(), check=True)
    assert Path("manifests/agents/refund-bot.yaml").read_text() == written
    assert run("check")[0] == 0
    assert run("explain", "--agent", "refund-bot", "GET", f"{GITHUB}/acme/mobile/issues")[0] == 0
    code, _, err = run("propose", "d-1")
    assert (code, "d-1: the manifests permit it by now" in err) == (1, True)


def test_a_files_name_ends_no_line(run):
    """A line that begins with :: is a command to GitHub's runner."""
    Path("manifests/agents/refund-bot.yaml").rename("manifests/agents/a\n::error::b.yaml")
    happened(get("/acme/mobile/issues"))
    code, _, err = run("propose", "d-1", "--write")
    assert (code, err) == (0, "manifests/agents/a\\n::error::b.yaml is changed; review it with git diff\n")


def test_a_cluster_becomes_one_proposal(run):
    happened(get("/acme/mobile/issues"), get("/acme/ios/issues"), get("/acme/mobile/issues"))
    _, listed, _ = run("denials", "--json")
    (cluster,) = json.loads(listed)
    code, out, _ = run("propose", "--cluster", cluster["id"])
    assert code == 0
    assert "repo: {enum: [web, payments, mobile, ios]}" in out or "repo: {enum: [web, payments, ios, mobile]}" in out
    run("denials", "label", cluster["id"], "attack", "--note", "not ours")
    code, out, err = run("propose", "--cluster", cluster["id"])
    assert (code, out) == (1, "")
    assert "a reviewer labelled it an attack" in err
    path = Path("manifests/agents/refund-bot.yaml")
    path.write_text(path.read_text().replace("enum: [web, payments]", "const: web"))
    happened(get("/acme/mobile/issues"))
    code, _, err = run("propose", "d-1")
    assert (code, "a reviewer labelled it an attack" in err) == (1, True), "also when another rule stops it"


def test_shadow_traffic_becomes_a_draft_and_what_can_not_be_is_named(run):
    happened(get("/acme/mobile/issues"), get("/acme/web/issues/7"), get("/acme/web/forks"), agent="refund-bot", shadow=True)
    code, out, err = run("propose", "--shadow", "--agent", "refund-bot")
    assert code == 0
    assert "issues.get:" in out
    assert "in shadow mode" in out
    assert err.startswith("1 warning in the manifests")
    assert "d-3: GET /repos/acme/web/forks is no operation of 'github'; ask team-devex to add it to the catalog\n" in err


def test_a_call_of_which_nothing_can_come_spoils_no_draft(run, monkeypatch):
    refused = Call("POST", f"{GITHUB}/acme/web/issues/7/comments").with_json({"body": 5})
    unapproved = Call("GET", "https://acme.atlassian.net/rest/api/3/issue/FIN-7")
    happened(get("/acme/web/issues/7"), refused, unapproved, get("/acme/web/pulls/8"), shadow=True)
    replayed = module.replayed
    monkeypatch.setattr(module, "replayed", lambda *given: given[1]["decision_id"] != "d-4" and replayed(*given))
    path = Path("manifests/platform.yaml")
    approved = "spec:\n  admission: {tools: [stripe, zendesk, github, slack, wiki, openai, anthropic]}\n"
    path.write_text(path.read_text().replace("spec:\n", approved, 1))
    for name in ("campaign-writer", "invoice-reconciler", "support-triage"):
        Path(f"manifests/agents/{name}.yaml").unlink()
    code, out, err = run("propose", "--shadow", "--agent", "refund-bot")
    assert code == 0
    assert out.startswith("# Let refund-bot call github/issues.get\n")
    rule = "tools/github.yaml#/spec/operations/issues.comment/params/body/properties/body/type"
    assert err.splitlines()[1:] == [
        f"d-2: the catalog refuses /body/body ({rule}); ask the tool's owner",
        "d-3: what would allow it does not pass `broker check`; write the change by hand, or ask the platform team",
        "d-4: no change of the manifest allows it; write it by hand",
    ]


def test_more_values_than_a_person_would_list_are_left_to_the_catalog(run):
    happened(*(get(f"/acme/web/issues/{number}") for number in range(1, 23)), shadow=True)
    code, out, _ = run("propose", "--shadow", "--agent", "refund-bot")
    assert code == 0
    assert "path: {properties: {owner: {const: acme}, repo: {const: web}}}" in out
    assert "over 20 different values were seen of /path/issue_number" in out


def test_nothing_is_proposed_for_an_agent_under_containment(run):
    happened(get("/acme/mobile/issues"))
    with AuditLog(Path(".broker/audit"), KEY, NOW, 1) as log:
        held = Containment(Surroundings(log, lambda: NOW, lambda: NOW, lambda: 1, lambda: "r-1"))
        held.revoke("refund-bot", None, "odd", "jo")
        log.sync(NOW)
    code, out, err = run("propose", "d-1")
    assert (code, out) == (1, "")
    assert "d-1: agent 'refund-bot' is under containment" in err


@pytest.mark.parametrize("notice", [{"asked": {}}, {"kind": "restriction"}])
def test_nothing_is_proposed_where_who_is_under_containment_is_not_known(run, notice):
    happened(get("/acme/mobile/issues"))
    with AuditLog(Path(".broker/audit"), KEY, NOW, 1) as log:
        log.append({"event": "alert", "time": "2027-01-15T08:00:00Z", "agent": {"name": "x"}, "run_id": "r", "notice": notice})
        log.sync(NOW)
    code, out, err = run("propose", "d-1")
    assert (code, out) == (2, "")
    assert err.startswith("broker: a notice in the audit log is not as this broker writes it")


def test_a_cluster_of_more_calls_than_a_manifest_should_list_is_cut_and_that_is_told(run):
    happened(*(get(f"/acme/r{number}/issues") for number in range(201)))
    (cluster,) = json.loads(run("denials", "--json")[1])
    code, out, _ = run("propose", "--cluster", cluster["id"])
    assert code == 0
    assert "the cluster has over 200 different calls; this is for the latest 200 of them alone" in out


def test_one_refusal_of_those_named_stops_all(run):
    happened(get("/acme/mobile/issues"), Call("GET", "https://evil.example/"))
    code, out, err = run("propose", "d-1", "d-2", "--write")
    assert (code, out) == (1, "")
    assert "d-2: no tool of the catalog is at evil.example" in err
    assert "mobile" not in Path("manifests/agents/refund-bot.yaml").read_text()


def test_what_does_not_pass_check_is_not_proposed(run):
    path = Path("manifests/platform.yaml")
    text = path.read_text().replace(
        "spec:\n", "spec:\n  admission: {tools: [stripe, zendesk, github, slack, wiki, openai, anthropic]}\n", 1
    )
    path.write_text(text)
    for name in ("campaign-writer", "invoice-reconciler", "support-triage"):
        Path(f"manifests/agents/{name}.yaml").unlink()
    happened(Call("GET", "https://acme.atlassian.net/rest/api/3/issue/FIN-7"))
    code, out, err = run("propose", "d-1", "--write")
    assert (code, out) == (1, "")
    assert "tool_not_approved" in err
    assert "does not pass `broker check`" in err


HOSTILE = "| </details> @acme/security `` ` \x1b[2J \u202e ```\n# Approved"


def test_what_an_agent_says_is_no_markup_no_terminal_control_and_no_secret(run):
    body = {"body": HOSTILE + SECRET[:0]}
    happened(
        Call("POST", f"{GITHUB}/acme/web/issues/7/comments").with_json(body),
        Call("POST", f"{GITHUB}/acme/web/issues/7/comments").with_json({"body": SECRET}),
    )
    code, out, _ = run("propose", "d-1", "d-2")
    assert code == 0
    assert not {"\x1b", "\u202e"} & set(out)
    assert SECRET not in out
    assert "\n# Approved" not in out
    assert "````diff\n" in out, "a longer fence than any run of backticks in the patch"
    _, document, _ = run("propose", "d-1", "d-2", "--json")
    assert document.isascii()
    assert SECRET not in document
    assert run("propose", "d-1", "--write")[0] == 0
    assert run("check")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "name what to propose for"),
        (["d-1", "--cluster", "x"], "name what to propose for"),
        (["--shadow"], "name what to propose for"),
        (["--agent", "bot", "d-1"], "name what to propose for"),
        (["d-9"], "the log does not hold the decision 'd-9'"),
        (["--cluster", "0" * 12], "the log does not hold a cluster"),
        (["d-1", "--state", "none"], "there is no audit log in none/audit"),
        (["d-1", "--manifests", "none"], "there is no folder 'none'"),
    ],
)
def test_wrong_usage_is_one_clear_line(run, arguments, told):
    happened(get("/acme/mobile/issues"))
    code, out, err = run("propose", *arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1


def test_a_file_that_can_not_be_written_is_left_as_it_is(run, monkeypatch):
    happened(get("/acme/mobile/issues"))
    before = Path("manifests/agents/refund-bot.yaml").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    code, _, err = run("propose", "d-1", "--write")
    assert code == 2
    assert err.startswith("broker: manifests/agents/refund-bot.yaml can't be written: No space left on device")
    assert Path("manifests/agents/refund-bot.yaml").read_bytes() == before
    assert [path.name for path in Path("manifests/agents").iterdir() if path.name.startswith(".")] == []


def test_a_manifest_that_is_a_link_stays_one(run):
    path = Path("manifests/agents/refund-bot.yaml")
    path.rename("shared.yaml")
    path.symlink_to("../../shared.yaml")
    happened(get("/acme/mobile/issues"))
    assert run("propose", "d-1", "--write")[0] == 0
    assert path.is_symlink()
    assert "mobile" in Path("shared.yaml").read_text()


def test_what_is_written_is_utf_8_whatever_the_locale(run, monkeypatch):
    path = Path("manifests/agents/refund-bot.yaml")
    path.write_text(f"# Zuständig: 支払い\n{path.read_text()}", encoding="utf-8")
    happened(get("/acme/mobile/issues"))
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    code, _, _ = run("propose", "d-1", "--write")
    assert code == 0
    assert path.read_text(encoding="utf-8").startswith("# Zuständig: 支払い\n")


JUNK = [None, 7, "x\x1b[31m", [], {}, [1], True, [None], [{"pointer": 1}]]


@pytest.mark.parametrize(
    "name", ["agent", "args", "args_hash", "code", "detail", "method", "operation", "rule", "tool", "violations"]
)
def test_a_record_that_somebody_changed_is_refused_in_one_line(run, name):
    record = Rehearsal(load(Path("manifests")).snapshot, NOW).call("refund-bot", get("/acme/mobile/issues")).record
    gone = {field: value for field, value in record.items() if field != name}
    with AuditLog(Path(".broker/audit"), KEY, NOW, 1) as log:
        for number, each in enumerate([gone, *({**record, name: value} for value in JUNK)]):
            log.append({**each, "decision_id": f"d-{number}"})
        log.sync(NOW)
    for number in range(len(JUNK) + 1):
        code, _, err = run("propose", f"d-{number}")
        assert code in (0, 1, 2), err
        assert "\x1b" not in err


def test_a_shadow_record_that_somebody_changed_is_left_out(run):
    happened(get("/acme/mobile/issues"), shadow=True)
    record = Rehearsal(load(Path("manifests")).snapshot, NOW).call("refund-bot", get("/acme/mobile/issues")).record
    with AuditLog(Path(".broker/audit"), KEY, NOW, 1) as log:
        log.append({**record, "decision_id": "d-2", "args_hash": []})
        log.sync(NOW)
    code, out, err = run("propose", "--shadow", "--agent", "refund-bot")
    assert code == 0
    assert out.startswith("# Let refund-bot call github/issues.list\n")
    assert "d-2: this is no record as this broker writes it" in err


def test_what_another_wrote_meanwhile_is_not_overwritten(run, monkeypatch):
    happened(get("/acme/mobile/issues"))
    propose = importlib.import_module("broker.cli.propose")
    path, drafted = Path("manifests/agents/refund-bot.yaml"), propose.drafted

    def slow(*given):
        made = drafted(*given)
        path.write_text(path.read_text() + "# another's\n")
        return made

    monkeypatch.setattr(propose, "drafted", slow)
    code, _, err = run("propose", "d-1", "--write")
    assert (code, "was changed meanwhile, and is left as it is; run this again" in err) == (2, True), err
    assert path.read_text().endswith("# another's\n")
    assert "mobile" not in path.read_text()
