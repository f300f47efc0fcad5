"""What runs in git: the GitHub Action's steps as GitHub runs them, the pre-commit hooks as pre-commit does, and who must approve.

Git, bash and the verbs are real. GitHub itself is not here: its expressions are filled in, and its files are files.
"""

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
BOT = Path("manifests/agents/refund-bot.yaml")
WIDER = ("repo: {enum: [web, payments]}", "repo: {enum: [web, payments, mobile]}")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "manifests", tmp_path / "repo/manifests")
    monkeypatch.chdir(tmp_path / "repo")
    for name, value in {"GIT_CONFIG_GLOBAL": "/dev/null", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for command in (["init", "-q", "-b", "main"], ["config", "user.email", "a@b"], ["config", "user.name", "a"]):
        subprocess.run(["git", *command], check=True)
    commit("all of it")
    subprocess.run(["git", "checkout", "-q", "-b", "change"], check=True)
    return tmp_path


def commit(message):
    subprocess.run(["git", "add", "-A"], check=True)
    subprocess.run(["git", "commit", "-q", "-m", message], check=True)


def change(*replacement, path=BOT):
    text = path.read_text()
    assert replacement[0] in text
    path.write_text(text.replace(*replacement))
    commit("a change")


def act(folder, **given):
    """Run the action's steps but the first, which installs; (exit code, what was printed, summary, outputs)."""
    inputs = {name: given.get(name.replace("-", "_"), spec["default"]) for name, spec in ACTION["inputs"].items()}
    inputs["base"] = given.get("base", "main")
    files = {name: folder / name.lower() for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for path in files.values():
        path.write_text("")
    printed = ""
    for step in ACTION["runs"]["steps"][1:]:
        if not _holds(step.get("if"), inputs):
            continue
        environment = {name: _filled(text, inputs) for name, text in step.get("env", {}).items()}
        known = {**os.environ, "RUNNER_TEMP": str(folder), **{name: str(path) for name, path in files.items()}, **environment}
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", step["run"]], env=known, capture_output=True, text=True, check=False
        )
        printed += done.stdout + done.stderr
        if done.returncode:
            return done.returncode, printed, files["GITHUB_STEP_SUMMARY"].read_text(), files["GITHUB_OUTPUT"].read_text()
    return 0, printed, files["GITHUB_STEP_SUMMARY"].read_text(), files["GITHUB_OUTPUT"].read_text()


def _filled(text, inputs):
    return re.sub(r"\$\{\{ inputs\.([a-z-]+) \}\}", lambda found: inputs[found[1]], text)


def _holds(condition, inputs):
    return condition is None or (condition == "inputs.base != ''" and inputs["base"] != "")


def test_the_action_shows_what_a_pull_request_lets_agents_do(repository):
    change(*WIDER)
    code, printed, summary, outputs = act(repository)
    assert code == 0
    assert "82 cases, 82 passed, 0 failed" in printed
    assert summary.startswith("**4 wider** for 1 agent\n\n### `refund-bot`\n")
    assert Path(re.search("diff=(.*)", outputs)[1]).read_text() == summary


def test_the_action_fails_where_it_is_asked_to_stop_what_is_wider(repository):
    change(*WIDER)
    code, _, summary, _ = act(repository, fail_on="wider")
    assert (code, summary[:10]) == (1, "**4 wider*"), "and shows it all the same"
    change(*reversed(WIDER))
    assert act(repository, fail_on="wider")[0] == 0


def test_the_action_annotates_what_does_not_load_and_what_fails_its_test(repository):
    change("owner: {const: acme}", "owner: {}")
    code, printed, summary, _ = act(repository)
    assert (code, summary) == (1, "")
    assert "::error file=manifests/tests/refund-bot.yaml,line=" in printed
    change("spec:\n", "spec:\n  tols: {}\n")
    code, printed, _, _ = act(repository)
    assert code == 1
    assert "::error file=manifests/agents/refund-bot.yaml,line=" in printed


def test_the_action_without_a_base_compares_nothing(repository):
    code, _, summary, outputs = act(repository, base="")
    assert (code, summary, outputs) == (0, "", "")


def test_the_actions_base_is_a_branch_of_the_remote_whatever_tags_there_are():
    assert "format('refs/remotes/origin/{0}', github.base_ref)" in ACTION["inputs"]["base"]["default"]


@pytest.mark.parametrize("hostile", ["$(touch pwned)", "`touch pwned`", "; touch pwned", "--help"])
def test_what_is_given_to_the_action_is_never_run(repository, hostile):
    assert act(repository, base=hostile)[0] != 0
    assert act(repository, manifests=hostile)[0] != 0
    assert not Path("pwned").exists()
    assert "${{" not in "".join(step["run"] for step in ACTION["runs"]["steps"]), (
        "inputs reach the shell by its environment alone"
    )


HOOKS = {hook["id"]: hook for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())}


def hook(name, *arguments):
    """As pre-commit runs it, once it has installed it: the entry and the arguments, and no file names."""
    assert not HOOKS[name]["pass_filenames"]
    return subprocess.run([*shlex.split(HOOKS[name]["entry"]), *arguments], capture_output=True, text=True, check=False)


def test_the_hooks_stop_a_commit_that_check_or_test_would(repository):
    assert [hook(name).returncode for name in HOOKS] == [0, 0, 0]
    BOT.write_text(BOT.read_text().replace("owner: {const: acme}", "owner: {}"))
    assert [hook(name).returncode for name in HOOKS] == [0, 1, 0]
    BOT.write_text(BOT.read_text() + "  tols: {}\n")
    assert [hook(name).returncode for name in HOOKS] == [1, 1, 1]


def test_the_hook_shows_what_a_commit_lets_agents_do_and_stops_it_where_asked(repository):
    BOT.write_text(BOT.read_text().replace(*WIDER))
    assert hook("broker-diff").stdout.startswith("**4 wider** for 1 agent")
    assert hook("broker-diff", "--fail-on", "wider").returncode == 1
    assert all(re.match(spec["files"], str(BOT)) for spec in HOOKS.values())


def owners(path):
    """Who owns a file by `.github/CODEOWNERS`: its last line that matches."""
    found = []
    for line in (ROOT / ".github/CODEOWNERS").read_text().splitlines():
        pattern, *named = line.split()
        if pattern != "#" and fnmatch.fnmatch(f"/{path}", pattern + ("*" if pattern.endswith("/") else "")):
            found = named
    return found


@pytest.mark.parametrize("path", [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "manifests").rglob("*.yaml"))])
def test_a_manifest_is_approved_by_the_team_that_it_names(path):
    owner = yaml.safe_load((ROOT / path).read_text())["metadata"]["owner"]
    assert f"@acme/{owner}" in owners(path) or path.startswith("manifests/tests/")
    if path != "manifests/platform.yaml":
        assert "@acme/security" in owners(path)
