"""`broker render kubernetes` and `nftables`: what may be asked for, and how a folder is written."""

import shutil
from pathlib import Path

import pytest
import yaml

from broker.cli import render
from broker.cli.main import _run
from tests.stack import TestCA

ROOT = Path(__file__).parents[3]
MANIFESTS = str(ROOT / "manifests")


def _rendered(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = _run(["render", *arguments])
    found = capsys.readouterr()
    return code, found.out, found.err


WRONG = [
    pytest.param(["--user", "stranger=1000"], "names no agent", id="a user for an agent that is not there"),
    pytest.param(["--user", "refund-bot"], "can't be the user", id="no user"),
    pytest.param(["--user", "refund-bot=0"], "can't be the user", id="root"),
    pytest.param(["--user", "refund-bot=03001"], "can't be the user", id="a number that nft would read as octal"),
    pytest.param(["--user", "refund-bot=root"], "can't be the user", id="root by name"),
    pytest.param(["--user", 'refund-bot="; drop'], "can't be the user", id="a user that would be a rule"),
    pytest.param(["--user", "refund-bot=77", "--user", "code-reviewer=77"], "share the user 77", id="two agents with one user"),
    pytest.param(["--proxy", "0.0.0.0:15001"], "no address that agents could call", id="a door on every address"),
    pytest.param(["--base-url", "localhost:15002"], "is no IP address", id="a door by name"),
]


@pytest.mark.parametrize(("options", "why"), WRONG)
def test_what_can_not_be_rules_is_refused(capsys, options, why):
    code, out, err = _rendered(capsys, "nftables", MANIFESTS, *options)
    assert (code, out) == (2, "")
    assert why in err
    assert "; " in err


def test_users_and_doors_are_as_they_were_named(capsys):
    doors = ["--proxy", "[2001:db8::7]:415", "--base-url", "10.0.0.7:416"]
    code, out, _ = _rendered(capsys, "nftables", MANIFESTS, "--user", "refund-bot=3001", *doors)
    assert code == 0
    assert "            3001 : goto agent-refund-bot" in out
    assert '"code-reviewer" : goto agent-code-reviewer' in out
    assert 'oifname "lo" ip6 daddr 2001:db8::7 tcp dport 415 counter' in out
    assert 'oifname "lo" ip daddr 10.0.0.7 tcp dport 416 counter' in out


@pytest.mark.parametrize(
    ("options", "why"),
    [
        pytest.param(["--proxy", "15003"], "can't have one port", id="a door at the admin port"),
        pytest.param(["--proxy", "15002"], "can't have one port", id="two doors at one port"),
        pytest.param(["--proxy", "443"], "1024", id="a port that needs root"),
        pytest.param(["--namespace", "agents"], "name two namespaces", id="agents beside the broker"),
        pytest.param(["--replicas", "0"], "x>=1", id="no replica"),
    ],
)
def test_what_can_not_be_a_cluster_is_refused(capsys, options, why):
    code, out, err = _rendered(capsys, "kubernetes", MANIFESTS, *options)
    assert (code, out) == (2, "")
    assert why in err


def _manifests(folder: Path, name: str = "bot", more: str = "") -> Path:
    folder.mkdir()
    head = f"apiVersion: broker/v1, kind: Agent, metadata: {{name: {name}, owner: web}}"
    agent = f"{{{head}, spec: {{identity: {{token: true}}, tools: {{}}}}}}"
    (folder / "all.yaml").write_text(f"{agent}\n{more}")
    return folder


def test_a_name_that_can_be_no_label_is_refused(capsys, tmp_path):
    code, out, err = _rendered(capsys, "kubernetes", str(_manifests(tmp_path / "manifests", "bot-")))
    assert (code, out) == (2, "")
    assert "rename the agent" in err


def test_a_certificate_outside_the_folder_is_refused(capsys, tmp_path):
    bundle = 'spec: {identity: {trust_bundles: {acme.example: {file: "../spiffe.pem"}}}}'
    platform = f"---\n{{apiVersion: broker/v1, kind: Platform, metadata: {{name: acme, owner: platform}},\n{bundle}}}"
    (tmp_path / "spiffe.pem").write_text(TestCA().pem)
    code, out, err = _rendered(capsys, "kubernetes", str(_manifests(tmp_path / "manifests", more=platform)))
    assert (code, out) == (2, "")
    assert "outside their folder" in err


# The folder.


def test_a_base_is_written_and_written_again(capsys, tmp_path):
    manifests, output = _manifests(tmp_path / "manifests"), tmp_path / "deep" / "base"
    code, out, err = _rendered(capsys, "kubernetes", str(manifests), "--output", str(output))
    assert (code, out) == (0, "")
    assert str(output) in err
    kustomization = yaml.safe_load((output / "kustomization.yaml").read_text())
    assert {*kustomization["resources"], "kustomization.yaml"} == {path.name for path in output.iterdir()}
    (generated,) = kustomization["configMapGenerator"]
    assert generated["files"] == ["all.yaml=../../manifests/all.yaml"]
    assert (output / generated["files"][0].partition("=")[2]).samefile(manifests / "all.yaml")
    before = (output / "agents.yaml").read_text()
    (manifests / "all.yaml").write_text((manifests / "all.yaml").read_text().replace("bot", "clerk"))
    assert _rendered(capsys, "kubernetes", str(manifests), "--output", str(output))[0] == 0
    assert (output / "agents.yaml").read_text() == before.replace("bot", "clerk")
    assert [path.name for path in output.parent.iterdir()] == ["base"]


@pytest.mark.parametrize("stranger", [["notes.txt"], ["kustomization.yaml", "patch.yaml"]], ids=["of notes", "of an overlay"])
def test_a_folder_of_someone_elses_is_left_alone(capsys, tmp_path, stranger):
    output = tmp_path / "base"
    output.mkdir()
    for name in stranger:
        (output / name).write_text("mine")
    code, _, err = _rendered(capsys, "kubernetes", MANIFESTS, "--output", str(output))
    assert code == 2
    assert "not rendered" in err
    assert {path.name: path.read_text() for path in output.iterdir()} == dict.fromkeys(stranger, "mine")


@pytest.mark.parametrize("failing", ["write_text", "rename"])
@pytest.mark.parametrize("there", [True, False])
def test_a_fault_leaves_the_old_folder_or_none(capsys, tmp_path, monkeypatch, failing, there):
    output = tmp_path / "base"
    if there:
        assert _rendered(capsys, "kubernetes", MANIFESTS, "--output", str(output))[0] == 0
    before = {path.name: path.read_text() for path in output.iterdir()} if there else None
    real, calls = getattr(Path, failing), []

    def fails(path: Path, *arguments: object) -> object:
        calls.append(path)
        # The last file of a base, or the step that puts the new folder in its place.
        if path.name in ("kustomization.yaml", "fresh"):
            raise OSError(28, "No space left on device")
        return real(path, *arguments)

    monkeypatch.setattr(render.Path, failing, fails)
    code, _, err = _rendered(capsys, "kubernetes", MANIFESTS, "--output", str(output), "--replicas", "3")
    monkeypatch.undo()
    assert code == 2
    assert calls
    assert "No space left on device); name another folder" in err
    assert ({path.name: path.read_text() for path in output.iterdir()} if there else None) == before
    assert output.exists() is there
    assert [path.name for path in tmp_path.iterdir()] == (["base"] if there else [])


def test_nothing_is_rendered_into_the_manifests_which_would_be_read_there(capsys, tmp_path):
    shutil.copytree(MANIFESTS, tmp_path / "manifests")
    code, _, err = _rendered(capsys, "kubernetes", str(tmp_path / "manifests"), "--output", str(tmp_path / "manifests/base"))
    assert (code, (tmp_path / "manifests/base").exists()) == (2, False)
    assert "is in the manifests folder, where it would be read as manifests; name one beside it" in err
