"""What every verb does alike: its sentence in the help, and one line of a state that may not be read."""

import os

import pytest
import stack
from click.testing import CliRunner

from broker.cli.main import _run, cli
from broker.state import State

NOBODY = 65534
VERBS = [
    ["agents", "list"],
    ["agents", "revoke", "bot", "--reason", "drill"],
    ["approvals", "list"],
    ["audit", "query"],
    ["audit", "tail"],
    ["audit", "verify"],
    ["denials"],
    ["token", "bot"],
]


@pytest.fixture
def of_another():
    """A state folder whose inner folders this user may not read, as those of another user's broker."""
    state = State.at(stack.short_folder() / "state")
    for path in (state.keys, state.audit):
        path.chmod(0)
    state.root.parent.chmod(0o755)
    for name in cli.list_commands(None):  # nobody may not read where Python lies, perhaps
        cli.get_command(None, name)
    as_root = os.geteuid() == 0
    if as_root:
        os.seteuid(NOBODY)
    yield state.root
    if as_root:
        os.seteuid(0)
    for path in (state.keys, state.audit):
        path.chmod(0o700)


@pytest.mark.parametrize("verb", [pytest.param(verb, id=" ".join(verb[:2])) for verb in VERBS])
def test_the_state_of_another_user_is_one_line_of_wrong_usage(of_another, capsys, verb):
    code = _run([*verb, "--state", str(of_another)])
    printed, said = capsys.readouterr()
    assert (code, printed, len(said.splitlines())) == (2, "", 1)
    assert "ermission denied" in said or "unable to open" in said
    assert "run this as " in said or "make the state folder writable for you" in said


def test_a_state_folder_that_is_made_is_nothing_to_commit(tmp_path):
    ignored = State.at(tmp_path / "state").root / ".gitignore"
    assert (ignored.read_text(), ignored.stat().st_mode & 0o777) == ("*\n", 0o600)
    (tmp_path / "own").mkdir()
    assert not (State.at(tmp_path / "own").root / ".gitignore").exists()


@pytest.mark.parametrize("words", [[], ["agents"], ["approvals"], ["audit"], ["denials"], ["render"]], ids=" ".join)
def test_the_sentence_of_each_verb_fits_a_terminal(words):
    shown = CliRunner().invoke(cli, [*words, "--help"], terminal_width=80).stdout
    assert [line for line in shown.partition("Commands:")[2].splitlines() if line.endswith("...")] == []
