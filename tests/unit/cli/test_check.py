import json
from types import SimpleNamespace

import pytest

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
    (tmp_path / "manifests/bot.yaml").write_text(GOOD.replace("tools: {}", "tools: {}, mode: shadow"))
    result = run()
    assert result.exit_code == 0
    assert ": not_enforced: " in result.stdout
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
