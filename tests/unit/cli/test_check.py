import json
from types import SimpleNamespace

import pytest
from fakes import oauth as fake

from broker.cli.main import main

GOOD = "apiVersion: broker/v1\nkind: Agent\nmetadata: {name: bot, owner: team}\nspec: {identity: {token: true}, tools: {}}\n"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests/bot.yaml").write_text(GOOD)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["check", *arguments])
        printed = capsys.readouterr()
        return SimpleNamespace(exit_code=ended.value.code, stdout=printed.out, stderr=printed.err)

    return run


def test_a_right_folder_ends_with_0_and_its_revision(run):
    result = run()
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.startswith("0 errors, 0 warnings in 1 file; revision sha256:")


def test_a_warning_does_not_change_the_exit_code(run, tmp_path):
    (tmp_path / "manifests/bot.yaml").write_text(GOOD.replace("tools: {}", "tools: {}, mode: shadow, shadow_until: 2099-01-31"))
    result = run()
    assert result.exit_code == 0
    assert ": shadow: " in result.stdout
    assert "0 errors, 1 warning in 1 file" in result.stderr


def test_an_error_ends_with_1_and_names_the_path_as_seen_from_here(run, tmp_path):
    (tmp_path / "manifests/bot.yaml").write_text(GOOD.replace("Agent", "Agend"))
    result = run("manifests")
    assert (result.exit_code, result.stderr) == (1, "1 error, 0 warnings in 1 file\n")
    assert result.stdout.startswith("manifests/bot.yaml:2:7: kind_unknown: ")


@pytest.mark.parametrize("arguments", [("--json",), ("--format", "json")])
def test_json_is_an_array_also_when_it_is_empty(run, arguments):
    assert json.loads(run(*arguments).stdout) == []


def test_a_folder_that_is_not_there_ends_with_2(run):
    result = run("none")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "there is no folder 'none'; name the folder" in result.stderr


TOOL = """
---
apiVersion: broker/v1
kind: Tool
metadata: {{name: crm, owner: team}}
spec:
  protocol: rest
  endpoint: https://crm.example
  credential: {{issuer: oauth, token_url: "{url}/token", revocation_url: "{url}/revoke", client_id: us, ttl: 10m,
    secret: {{env: CRM_SECRET}}, scopes: {{read: [read], write: [write]}}}}
  operations:
    get: {{match: {{method: GET, path: /a}}, effect: read}}
    list: {{match: {{method: GET, path: /}}, effect: read}}
    put: {{match: {{method: DELETE, path: /a}}, effect: write}}
"""


@pytest.fixture
def server(tmp_path, run, monkeypatch):  # `run` makes the folder
    monkeypatch.setenv("CRM_SECRET", "hunter2hunter2")
    with fake.serving() as server:
        server.clients["us"] = fake.Client("us", "read write", secret="hunter2hunter2")
        granted = "tools: {crm: {operations: {get: {}, list: {}, put: {}}}}"
        text = GOOD.replace("tools: {}", granted) + TOOL.format(url=server.url)
        (tmp_path / "manifests/bot.yaml").write_text(text)
        yield server


def test_issuers_are_proven_for_each_narrowing_that_an_agent_gets_and_all_is_taken_back(run, server, tmp_path):
    result = run("--issuers")
    assert (result.exit_code, result.stdout) == (0, "")
    said = [line for line in result.stderr.splitlines() if line.startswith("crm")]
    where = "for 600 s, in the header authorization"
    assert said == [f"crm for bot: oauth, scopes read, {where}", f"crm for bot: oauth, scopes write, {where}"]
    assert [(issued.scope, issued.revoked) for issued in server.issued] == [("read", True), ("write", True)]
    assert not any(issued.token in result.stdout + result.stderr for issued in server.issued)
    held = [path.read_bytes() for path in (tmp_path / ".broker").rglob("*") if path.is_file()]
    assert not any(issued.token.encode() in content for issued in server.issued for content in held)


def test_an_issuer_that_cannot_issue_is_a_finding_that_says_what_to_do(run, server, monkeypatch):
    monkeypatch.setenv("CRM_SECRET", "wrong-wrong")
    result = run("--issuers", "--json")
    [finding] = json.loads(result.stdout)
    assert (result.exit_code, finding["code"], finding["file"]) == (1, "issuer_failed", "manifests/bot.yaml")
    assert finding["message"] == "crm, as for bot: the token endpoint of 'crm' answered 401 invalid_client"
    assert finding["advice"] == "check client_id, its secret or key, and this machine's clock"
    assert "wrong-wrong" not in result.stdout + result.stderr


def test_a_tool_that_nobody_holds_is_not_asked_for(run, server, tmp_path):
    (tmp_path / "manifests/bot.yaml").write_text(GOOD + TOOL.format(url=server.url))
    assert "crm: no agent holds it, so nothing was asked for" in run("--issuers").stderr
    assert server.heard == []


def test_without_the_option_no_issuer_is_asked(run, server):
    assert run().exit_code == 0
    assert server.heard == []


def test_explain_names_the_credential_with_its_scopes_life_and_place_and_asks_nobody(run, server, capsys):
    with pytest.raises(SystemExit):
        main(["explain", "--agent", "bot", "DELETE", "https://crm.example/a"])
    assert "credential oauth, scopes write, for at most 600 s, in the header authorization" in capsys.readouterr().out
    assert server.heard == []


def test_explain_says_that_there_would_be_none_where_the_scopes_name_no_such_operation(run, server, tmp_path, capsys, caplog):
    path = tmp_path / "manifests/bot.yaml"
    path.write_text(path.read_text().replace("{read: [read], write: [write]}", "{read: [read]}"))
    with pytest.raises(SystemExit):
        main(["explain", "--agent", "bot", "DELETE", "https://crm.example/a"])
    assert capsys.readouterr().out.startswith("deny credential_unavailable: ")
    assert "no credential: the scopes of 'crm' name neither" in caplog.text
