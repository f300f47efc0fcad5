"""`broker diff` over folders and over real git repositories."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import stack

from broker.cli.main import main
from broker.cli.progress import told

BOT = """apiVersion: broker/v1
kind: Agent
metadata: {{name: bot, owner: team}}
spec: {{identity: {{token: true}}, tools: {{shop: {{operations: {{{operations}}}}}}}}}
"""
SHOP = """apiVersion: broker/v1
kind: Tool
metadata: {name: shop, owner: team}
spec:
  protocol: rest
  endpoint: https://shop.example
  upstream: {ca: certs/ca.pem}
  credential: {issuer: jwt}
  operations:
    get: {match: {method: GET, path: /a}, effect: read}
    put: {match: {method: PUT, path: /a}, effect: write}
"""
CA = stack.TestCA().pem


@pytest.fixture
def git(tmp_path):
    here = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    names = {f"GIT_{who}_{what}": "x@example" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

    def git(*arguments):
        subprocess.run(["git", *arguments], cwd=tmp_path, env={**here, **names}, check=True, capture_output=True)

    return git


def write(folder, operations="get: {}", shop=SHOP, pem=CA):
    for part in ("tools", "agents", "certs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "tools/shop.yaml").write_text(shop)
    (folder / "agents/bot.yaml").write_text(BOT.format(operations=operations))
    (folder / "certs/ca.pem").write_text(pem)


@pytest.fixture
def repository(tmp_path, git):
    """`main` grants one operation, `wider` two; the working tree has none of it."""
    git("init", "-q", "-b", "main")
    write(tmp_path / "manifests")
    git("add", "-A")
    git("commit", "-qm", "one")
    git("checkout", "-qb", "wider")
    write(tmp_path / "manifests", "get: {}, put: {}")
    git("commit", "-qam", "two")
    return tmp_path


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["diff", *arguments])
        printed = capsys.readouterr()
        return SimpleNamespace(exit_code=ended.value.code, stdout=printed.out, stderr=printed.err)

    return run


def test_two_refs_are_compared(repository, run):
    result = run("main", "wider")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (
        "**1 wider** for 1 agent\n\n### `bot`\n\n"
        "- **wider** operation `shop/put`: nothing → `write` (`agents/bot.yaml#/spec/tools/shop/operations/put`)\n"
    )
    assert run("wider", "HEAD~1").stdout.startswith("**1 narrower** for 1 agent\n")


def test_a_ref_and_a_folder_are_compared_and_their_places_are_no_difference(repository, run):
    write(repository / "manifests", shop=SHOP.replace("jwt", "static, secret: {file: secrets/key}"))
    subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@e", "commit", "-qam", "three"], cwd=repository, check=True)
    assert run("HEAD", "manifests").stdout == "**Nothing changes** in what agents may do.\n"
    assert run("manifests", "HEAD").stdout == "**Nothing changes** in what agents may do.\n"


def test_certificates_are_those_of_the_ref(repository, run):
    write(repository / "manifests", "get: {}, put: {}", pem=stack.TestCA().pem)
    assert "**1 changed (treat as wider)** for 1 agent" in run("wider", "manifests").stdout
    (repository / "manifests/certs/ca.pem").unlink()
    assert run("main", "wider").exit_code == 0


def test_json_lists_every_change(repository, run):
    found = json.loads(run("main", "wider", "--json").stdout)
    assert found["base"].startswith("sha256:")
    assert found["head"] != found["base"]
    assert (found["wider"], found["narrower"], found["changed"], found["equal-effect"]) == (1, 0, 0, 0)
    assert found["changes"] == [
        {
            "agent": "bot", "about": "shop/put", "kind": "operation", "direction": "wider", "before": "", "after": "write",
            "rules": ["agents/bot.yaml#/spec/tools/shop/operations/put"],
        }
    ]  # fmt: skip


@pytest.mark.parametrize(("base", "head", "exit_code"), [("main", "wider", 1), ("wider", "main", 0), ("main", "main", 0)])
def test_it_can_fail_on_wider(repository, run, base, head, exit_code):
    assert run(base, head, "--fail-on", "wider").exit_code == exit_code


def test_it_reads_what_git_stored_whatever_its_attributes_say(repository, run, git):
    (repository / ".gitattributes").write_text("manifests/agents/bot.yaml export-ignore\n")
    git("add", "-A")
    git("commit", "-qm", "hidden from archives")
    assert "operation `shop/put`" in run("main", "HEAD").stdout


def test_a_folder_below_another_is_named_from_where_the_person_stands(repository, run, monkeypatch, git):
    git("mv", "manifests", "policy")
    git("commit", "-qm", "moved")
    (repository / "deep").mkdir()
    monkeypatch.chdir(repository / "deep")
    assert run("HEAD", "HEAD", "--manifests", "../policy").stdout == "**Nothing changes** in what agents may do.\n"


def test_a_folder_that_is_gone_from_the_working_tree_is_read_from_the_ref(repository, run):
    (repository / "manifests").rename(repository / "elsewhere")
    assert run("main", "wider").stdout.startswith("**1 wider**")


def test_a_head_that_does_not_load_ends_with_1_and_its_findings(repository, run, git):
    (repository / "manifests/agents/bot.yaml").write_text("kind: Agend\n")
    git("commit", "-qam", "broken")
    result = run("main", "HEAD")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("HEAD:manifests/agents/bot.yaml:1:7: kind_unknown: ")
    assert result.stderr.endswith("broker: the manifests of the head, HEAD, have errors; correct them\n")


def test_a_base_that_does_not_load_ends_with_2(repository, run, git):
    (repository / "manifests/agents/bot.yaml").write_text("kind: Agend\n")
    git("commit", "-qam", "broken")
    result = run("HEAD", "main")
    assert result.exit_code == 2
    assert "the manifests of the base, HEAD, have errors; name a base whose manifests have none" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("nowhere", "main"), "'nowhere' is no folder, and git knows no such ref; name a folder, or a branch, tag or commit"),
        (("main", "--", "-x"), "'-x' is no folder and no git ref; name a folder of manifests, a branch, a tag or a commit"),
        (("--", "--output=x", "main"), "'--output=x' is no folder and no git ref; "),
        (("main:manifests", "main"), "'main:manifests' is no folder, and git knows no such ref; "),
        (
            ("main", "wider", "--manifests", "policy"),
            "wider has no folder 'policy'; name the folder that it has with --manifests",
        ),
        (("a" * 5000, "main"), f"'{'a' * 5000}' is no folder, and git knows no such ref; name a folder"),
    ],
)
def test_what_can_not_be_read_is_one_line(repository, run, arguments, line):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"broker: {line}")
    assert result.stderr.count("\n") == 1


def test_the_commit_that_brings_the_manifests_is_compared_with_none(tmp_path, run, git):
    """Or the hook would stop it."""
    write(tmp_path / "manifests")
    git("init", "-q", "-b", "main")
    first = run("HEAD", "./manifests")
    assert (first.exit_code, first.stderr) == (0, "there is no commit yet, so all of ./manifests is new\n")
    git("commit", "-qm", "empty", "--allow-empty")
    second = run("HEAD", "./manifests")
    assert (second.exit_code, second.stderr) == (0, "HEAD has no folder 'manifests', so all of ./manifests is new\n")
    assert "- **wider** operation `shop/get`: nothing → `read`" in second.stdout
    assert first.stdout == second.stdout
    assert run("HEAD", "./manifests", "--fail-on", "wider").exit_code == 1
    assert run("./manifests", "HEAD").stderr.startswith("broker: HEAD has no folder 'manifests'; ")


def test_a_folder_with_the_name_of_a_ref_is_not_taken_for_it(repository, run):
    """Or a pull request that brings a folder named as its base would be compared with that."""
    write(repository / "main", "get: {}, put: {}")
    result = run("main", "./manifests", "--fail-on", "wider")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("broker: 'main' is a folder and a git ref; write ./main for the folder")
    assert run("./main", "wider").stdout.startswith("**Nothing changes**")
    assert run("refs/heads/main", "./manifests", "--fail-on", "wider").exit_code == 1


@pytest.mark.parametrize("form", ["{}", "{}~0"])
def test_a_name_of_several_refs_is_refused(repository, run, git, form):
    """Or whoever may push tags chooses what a pull request is compared with."""
    git("update-ref", "refs/remotes/origin/main", "main")
    git("config", "core.warnAmbiguousRefs", "false")
    git("tag", "origin/main", "wider")
    result = run(form.format("origin/main"), "wider", "--fail-on", "wider")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"broker: {form.format('origin/main')!r} is more than one git ref; write a commit's hash")
    assert run("refs/remotes/origin/main", "wider", "--fail-on", "wider").exit_code == 1


def test_without_a_repository_only_folders_are_compared(tmp_path, run):
    write(tmp_path / "a")
    write(tmp_path / "b", "put: {}")
    assert run("a", "b").stdout.startswith("**1 wider, 1 narrower** for 1 agent\n")
    result = run("main", "b")
    assert result.exit_code == 2
    assert result.stderr.startswith("broker: 'main' is no folder, and 'manifests' is in no git repository (")


def test_without_git_only_folders_are_compared(tmp_path, run, monkeypatch):
    write(tmp_path / "a")
    monkeypatch.setenv("PATH", "")
    assert run("a", "a").exit_code == 0
    assert run("main", "a").stderr == "broker: git can't be started; install git, or compare folders\n"


def test_a_link_in_a_ref_is_not_followed(repository, run, git):
    (repository / "manifests/agents/other.yaml").symlink_to("/etc/passwd")
    git("add", "-A")
    git("commit", "-qm", "link")
    result = run("main", "HEAD")
    assert result.exit_code == 2
    assert "HEAD:manifests/agents/other.yaml is no plain file; have the file itself there, or compare folders" in result.stderr


def test_a_files_name_ends_no_line_of_an_error(repository, run, git):
    """A line that begins with :: is a command to GitHub's runner."""
    (repository / "manifests/a\n::error::b.yaml").symlink_to("/etc/passwd")
    git("add", "-A")
    git("commit", "-qm", "link")
    assert run("main", "HEAD").stderr == (
        "broker: HEAD:manifests/a\\n::error::b.yaml is no plain file; have the file itself there, or compare folders\n"
    )


def test_a_submodule_below_the_manifests_is_refused_for_its_files_are_not_there_to_compare(repository, run, git):
    """Reading a folder takes them for manifests, so without them a wider grant would be none."""
    inner = repository / "manifests/more"
    inner.mkdir()
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        git("-C", str(inner), *command)
    git("add", "-A")
    git("commit", "-qm", "submodule")
    result = run("main", "HEAD", "--fail-on", "wider")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("broker: HEAD:manifests/more is a submodule, which git has no files of; have the file itself")


def test_in_a_hook_of_a_linked_worktree_the_base_is_the_manifests_folder_alone(repository, run, git, monkeypatch):
    (repository / "compose.yaml").write_text("services: {}\n")
    git("add", "-A")
    git("commit", "-qm", "no manifest")
    git("worktree", "add", "-q", "linked", "-b", "linked")
    monkeypatch.chdir(repository / "linked")
    monkeypatch.setenv("GIT_DIR", str(repository / ".git/worktrees/linked"))  # as git does for hooks, and no GIT_WORK_TREE
    assert run("HEAD", "./manifests").stdout == "**Nothing changes** in what agents may do.\n"


def test_the_folder_may_be_the_repository_itself_and_hold_other_links(tmp_path, run, git):
    write(tmp_path)
    (tmp_path / "README").symlink_to("/etc/passwd")
    git("init", "-q", "-b", "main")
    git("add", "-A")
    git("commit", "-qm", "one")
    write(tmp_path, "put: {}")
    assert run("main", ".", "--manifests", ".").stdout.startswith("**1 wider, 1 narrower** for 1 agent\n")


def test_progress_is_written_to_a_terminal_only_and_after_a_while(monkeypatch, capsys):
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr("broker.clock.steady", lambda: now.time)
    for terminal, expected in ((True, "\rreading the base: 50 %\x1b[K\r\x1b[K"), (False, "")):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
        now.time = 100.0
        tell = told("the base")
        for time, done in ((100.1, 1), (101.4, 3), (102.0, 5), (102.1, 6), (102.2, 10)):
            now.time = time
            tell("reading", done, 10)
        assert capsys.readouterr().err == expected


def test_the_working_tree_is_left_alone(repository, run):
    before = sorted(Path(repository).rglob("*"))
    run("main", "wider")
    assert [path for path in sorted(Path(repository).rglob("*")) if ".git" not in path.parts] == [
        path for path in before if ".git" not in path.parts
    ]
