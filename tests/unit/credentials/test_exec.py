"""`exec` with real commands: what it is told, what is taken of its answer, and how it ends."""

import asyncio
import json
import os
import sys
import traceback

import pytest

from broker import clock
from broker.credentials.base import CredentialUnavailable, Occasion
from broker.credentials.exec import ExecSource
from broker.credentials.settings import problems
from broker.policy.snapshot import Agent, CredentialSpec, Endpoint, Operation, Tool
from broker.policy.types import Effect

BOT = Agent("bot", "team", "primary", "a#", {}, spiffe="spiffe://acme.example/bot")
TOOL = Tool("crm", "team", "rest", Endpoint("https", "crm.example", 443), "t#", {})
GOOD = {"credential": "x-SECRET", "expires_in": 600}


def occasion(code, pins=None, **settings):
    spec = CredentialSpec("exec", {"command": [sys.executable, "-c", code], **settings})
    return Occasion(BOT, TOOL, Operation("tickets.get", Effect.READ, "t#"), spec, "run-7", 1800, pins or {})


def fetched(code, now=None, **settings):
    return asyncio.run(ExecSource().fetch(occasion(code, **settings), now or clock.now()))


def refused(code, **settings):
    with pytest.raises(CredentialUnavailable) as caught:
        fetched(code, **settings)
    assert caught.value.advice
    return str(caught.value), "".join(traceback.format_exception(caught.value))


def says(answer):
    return f"print({json.dumps(answer)!r})"


def test_the_command_is_told_who_calls_what_and_how_narrow(tmp_path):
    code = f"import sys; open({str(tmp_path / 'told')!r}, 'w').write(sys.stdin.read()); {says(GOOD | {'scopes': ['read']})}"
    lease = fetched(code, now=1_800_000_000.0, scopes=["read", "list"], ttl=900, pins={"repo": ("web",)})
    assert json.loads((tmp_path / "told").read_text()) == {
        "agent": "bot",
        "spiffe": "spiffe://acme.example/bot",
        "tool": "crm",
        "operation": "tickets.get",
        "scopes": ["read", "list"],
        "ttl": 900,
        "pins": {"repo": ["web"]},
    }
    assert (lease.value.reveal(), lease.scopes, lease.expires) == ("Bearer x-SECRET", ("read",), 1_800_000_600.0)
    assert (lease.handle, [secret.reveal() for secret in lease.secrets]) == (None, ["x-SECRET"])


def test_the_environment_is_path_and_what_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("GIVEN", "1")
    monkeypatch.setenv("UPSTREAM_SECRET", "sk_live_x")
    fetched(f"import os; open({str(tmp_path / 'env')!r}, 'w').write(repr(set(os.environ))); {says(GOOD)}", environment=["GIVEN"])
    assert set(eval((tmp_path / "env").read_text())) - {"LC_CTYPE"} == {"PATH", "GIVEN"}


@pytest.mark.parametrize(
    ("code", "told"),
    [
        pytest.param("import sys; print('x-SECRET'); sys.exit(3)", "ended with 3", id="a failure"),
        pytest.param("import os; os.abort()", "ended with -6", id="a crash"),
        pytest.param("print('x-SECRET')", "without a credential", id="text"),
        pytest.param("print('[\"x-SECRET\"]')", "without a credential", id="a list"),
        pytest.param("pass", "without a credential", id="nothing"),
        pytest.param(says({"credential": "x-SECRET\n", "expires_in": 9}), "without a credential", id="a line break"),
        pytest.param(says({"credential": 7, "expires_in": 9}), "without a credential", id="a number"),
        pytest.param(says({"credential": "x-SECRET"}), "does not say how long", id="no life"),
        pytest.param(says({"credential": "x-SECRET", "expires_in": 0}), "ended already", id="no life left"),
        pytest.param(says(GOOD | {"scopes": ["read", "x-SECRET"]}), "wider", id="a wider scope"),
        pytest.param(says(GOOD | {"scopes": 7}), "can't be read", id="scopes that are none"),
        pytest.param("print('x-SECRET ' * 20_000)", "writes too much", id="one long line"),
        pytest.param("print('x-SECRET\\n' * 20_000)", "writes too much", id="many lines"),
        pytest.param(f"import sys; sys.stderr.write('x' * 200_000); {says(GOOD)}", "writes too much", id="too long complaints"),
    ],
)
def test_from_a_wrong_answer_no_credential_is_made(code, told, caplog):
    message, whole = refused(code, scopes=["read"])
    assert told in message
    assert "SECRET" not in whole.replace(repr(code), "")
    assert "SECRET" not in caplog.text


def test_a_command_that_cannot_be_started_is_told():
    spec = CredentialSpec("exec", {"command": ["/nowhere/at/all"]})
    with pytest.raises(CredentialUnavailable, match="can't be started"):
        asyncio.run(ExecSource().fetch(Occasion(BOT, TOOL, None, spec, "", 1800), clock.now()))


@pytest.mark.parametrize("ends", ["at its deadline", "when nobody waits any more"])
def test_a_command_that_hangs_is_killed_with_all_that_it_started(tmp_path, ends):
    code = (
        "import subprocess, os, time; child = subprocess.Popen(['sleep', '60']);"
        f"open({str(tmp_path / 'draft')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}');"
        f"os.rename({str(tmp_path / 'draft')!r}, {str(tmp_path / 'pids')!r}); time.sleep(60)"
    )

    async def scenario():
        settings = {"timeout": "1s"} if ends == "at its deadline" else {}
        work = asyncio.create_task(ExecSource().fetch(occasion(code, **settings), clock.now()))
        if settings:
            with pytest.raises(CredentialUnavailable, match="took longer than 1 s"):
                await work
            return
        await asyncio.to_thread(wait_for, tmp_path / "pids")
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(scenario())
    for pid in (tmp_path / "pids").read_text().split():
        wait_for(lambda pid=pid: gone(int(pid)))


def wait_for(what):
    from stack import until  # noqa: PLC0415

    until(what.exists if hasattr(what, "exists") else what)


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{pid}/stat") as status:  # noqa: PTH123
        return status.read().split()[2] == "Z"


def test_what_it_says_on_stderr_is_logged_without_its_credential_and_on_one_line(caplog):
    fetched(f"import sys; sys.stderr.write('made x-SECRET\\n\\x1b[2J from ghp_0123456789abcdef'); {says(GOOD)}")
    [record] = caplog.records
    assert record.getMessage() == "the command of 'crm' says: 'made [redacted]\\n\\x1b[2J from [redacted]'"


def test_a_command_need_not_read_what_it_is_told():
    assert fetched(f"import sys; sys.stdin.close(); {says(GOOD)}").secrets


def test_calls_that_differ_in_what_the_command_is_told_share_no_lease():
    calls = [occasion(""), occasion("", pins={"repo": ("web",)}), occasion("", scopes=["read"])]
    assert len({ExecSource().narrowed(each) for each in calls}) == 3


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "needs command; add it"),
        ({"command": "issue"}, "command"),
        ({"command": []}, "write the whole path"),
        ({"command": ["issue"]}, "write the whole path"),
        ({"command": ["/bin/issue", "a\0b"]}, "command"),
        ({"command": ["/bin/issue"], "timeout": 5}, "timeout"),
        ({"command": ["/bin/issue"], "shell": True}, "no field shell"),
    ],
    ids=["none", "text", "empty", "no path", "a NUL", "a bare number", "a field that is none"],
)
def test_settings_that_are_wrong_are_told_by_field(settings, told):
    [problem, *_] = problems(ExecSource.Settings, "exec", settings)
    assert told in problem
    assert "; " in problem


def test_what_a_command_leaves_behind_in_a_session_of_its_own_holds_nobody_up(tmp_path):
    code = (
        "import subprocess; child = subprocess.Popen(['sleep', '30'], start_new_session=True);"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); {says(GOOD)}"
    )
    message, _ = refused(code, timeout="1s")
    assert "took longer than 1 s" in message
    os.kill(int((tmp_path / "pid").read_text()), 9)
