"""`broker test` as people and CI run it."""

import json
import shutil
from pathlib import Path

import pytest

from broker.cli.main import main

SAMPLE = Path(__file__).parents[3] / "manifests"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    shutil.copytree(SAMPLE, tmp_path / "manifests")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["test", *arguments])
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


def test_the_sample_organisation_keeps_what_its_tests_say(run):
    code, out, err = run()
    assert code == 0
    assert "refund-bot: 12 of 12 operations shown to be allowed\n" in out
    assert err.endswith(" 0 failed\n")


def test_a_manifest_that_was_widened_fails_its_test_where_the_case_stands(run):
    path = Path("manifests/agents/refund-bot.yaml")
    path.write_text(path.read_text().replace("owner: {const: acme}, repo: {enum: [web, payments]}", "owner: {}, repo: {}"))
    code, out, err = run()
    assert code == 1
    assert out.startswith("manifests/tests/refund-bot.yaml:")
    assert (
        ': test_failed: "not in someone else\'s": expected verdict deny, code params_invalid, pointer /path/owner; got allow'
        in out
    )
    assert err.endswith(" 1 failed\n")
    _, github, _ = run("--format", "github")
    assert github.startswith("::error file=manifests/tests/refund-bot.yaml,line=")
    _, document, _ = run("--json")
    cases = json.loads(document)["cases"]
    assert [case["name"] for case in cases if not case["passed"]] == ["not in someone else's"]


def test_manifests_with_errors_end_with_1_and_a_folder_that_is_not_there_with_2(run):
    Path("manifests/agents/refund-bot.yaml").write_text("apiVersion: broker/v1\nkind: [")
    code, out, err = run()
    assert (code, out) == (1, "")
    assert "manifests/agents" not in out
    assert "agents/refund-bot.yaml:3:1: yaml_syntax: " in err
    assert run("none")[0] == 2


def test_explain_judges_the_bytes_that_it_was_given(run, capsys):
    """What is not UTF-8 reaches us as half characters."""
    url = "https://api.github.com/repos/acme/web/issues"
    with pytest.raises(SystemExit) as ended:
        main(["explain", "--agent", "refund-bot", "POST", url, "--data", "\udcff"])
    assert ended.value.code == 1
    assert capsys.readouterr().out.startswith("deny body_malformed: ")
