"""The verbs as a person meets them: exit codes, one clear line, no traceback."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import click
import pytest
import stack

from broker.cli.main import cli
from broker.errors import BrokerError
from broker.supervisor import checked_version


def broker(*arguments, cwd=None, env=None):
    return subprocess.run(
        [*stack.BROKER, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path.cwd()), **(env or {})},
    )


@pytest.fixture
def manifests(tmp_path):
    operations = {"get": {"match": {"method": "GET", "path": "/a/{id}"}, "effect": "read"}}
    credential = {"issuer": "static", "secret": {"env": "NOT_SET"}}
    api = stack.tool("api", "https://api.example", operations, credential=credential)
    bot = stack.agent("bot", {"api": {"operations": {"get": {"params": {"path": {"properties": {"id": {"const": "1"}}}}}}}})
    return stack.write_manifests(tmp_path / "manifests", api, bot)


@pytest.mark.parametrize(
    ("url", "code", "exit_code"),
    [
        pytest.param("https://api.example/a/1", None, 0, id="allowed"),
        pytest.param("https://api.example/a/2", "params_invalid", 1, id="a parameter out of bounds"),
        pytest.param("https://api.example/b", "operation_not_declared", 1, id="no operation"),
        pytest.param("https://api.example/a/../a/1", "protocol_violation", 1, id="a path with a second reading"),
        pytest.param("https://evil.example/", "host_not_declared", 1, id="an unknown host"),
        pytest.param("http://api.example/a/1", "host_not_declared", 1, id="another scheme"),
    ],
)
def test_explain_gives_the_decision_and_its_exit_code_without_sending(manifests, url, code, exit_code):
    done = broker("explain", "--agent", "bot", "GET", url, "--manifests", str(manifests), "--json")
    assert (done.returncode, json.loads(done.stdout)["code"]) == (exit_code, code)


def test_explain_of_a_name_that_no_manifest_has_says_which_there_are(manifests):
    done = broker("explain", "--agent", "bto", "GET", "https://api.example/a/1", "--manifests", str(manifests))
    assert done.stdout.splitlines() == [
        "deny agent_unknown: no manifest names this agent",
        "  next       Name one of the manifests' agents with --agent: bot.",
    ]


def test_explain_names_the_credential_without_issuing_it(manifests):
    done = broker("explain", "--agent", "bot", "GET", "https://api.example/a/1", "--manifests", str(manifests))
    assert done.stdout.startswith("allow\n")
    assert "credential static, in the header authorization" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        pytest.param(["explain", "--agent", "bot", "GET", "no-url"], 2, "is no http(s) URL", id="no URL"),
        pytest.param(
            ["explain", "--agent", "ghost", "GET", "https://api.example/a/1"], 1, "agent_unknown", id="an unknown agent"
        ),
        pytest.param(["explain", "GET", "https://api.example/"], 2, "--agent", id="a missing option"),
        pytest.param(["token", "bot", "--state", "nowhere"], 2, "is no state folder", id="a token without a broker"),
        pytest.param(["audit", "verify", "--state", "nowhere"], 2, "nowhere", id="a record that is not there"),
        pytest.param(["check", "nowhere"], 2, "there is no folder", id="manifests that are not there"),
        pytest.param(["up", "--manifests", "nowhere"], 2, "there is no folder", id="up without manifests"),
        pytest.param(["up", "--proxy", "nonsense"], 2, "HOST:PORT", id="an address that is none"),
        pytest.param(["up", "--redis", "http://x"], 2, "redis[s]://", id="a ledger that is no Redis"),
        pytest.param(["bogus"], 2, "No such command", id="an unknown verb"),
    ],
)
def test_wrong_usage_is_one_clear_line_and_an_exit_code(manifests, arguments, exit_code, words):
    done = broker(*arguments, cwd=manifests.parent)
    assert done.returncode == exit_code
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_up_refuses_manifests_with_errors_and_shows_them(tmp_path):
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "a.yaml").write_text("kind: [\n")
    done = broker("up", cwd=tmp_path)
    assert done.returncode == 1
    assert "a.yaml:" in done.stderr


@pytest.mark.parametrize("option", ["--proxy", "--base-url", "--admin"])
def test_a_taken_port_is_named_with_the_option_that_chooses_it(manifests, option):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        rest = [each for each in ("--proxy", "--base-url", "--admin") if each != option]
        free = [text for each in rest for text in (each, f"127.0.0.1:{stack.free_port()}")]
        done = broker("up", "--manifests", str(manifests), option, address, *free, cwd=manifests.parent)
    assert done.returncode == 2
    assert f"broker: {address} can't be used (Address already in use); choose another with {option} HOST:PORT" in done.stderr


@pytest.mark.envoy
def test_a_state_that_another_broker_uses_is_refused_at_once_in_one_line(world):
    refused = f"a broker already runs on {world.broker.state}; stop it, or give this one its own folder with --state"
    for port in (lambda name: world.broker.ready[name], lambda _: f"127.0.0.1:{stack.free_port()}"):
        chosen = [text for name in ("proxy", "base_url", "admin") for text in (f"--{name.replace('_', '-')}", port(name))]
        done = broker("up", "--manifests", str(world.broker.manifests), "--state", str(world.broker.state), *chosen)
        errors = [line for line in done.stderr.splitlines() if line.startswith("broker: ")]
        assert (done.returncode, done.stdout, errors) == (2, "", [f"broker: {refused}"])
    assert world.broker.process.poll() is None
    with world.broker.client("reader") as client:
        assert client.get(f"http://127.0.0.1:{world.plain.port}/items").status_code == 200


@pytest.mark.envoy
def test_a_token_is_printed_alone_and_only_for_an_agent_whose_manifest_is_in_force(manifests):
    stack.write_manifest(manifests, stack.agent("certified", {}, identity={"spiffe": "spiffe://acme.example/agents/certified"}))
    running = stack.Broker(manifests, stack.short_folder() / "state")

    def token(*arguments):
        done = broker("token", *arguments, "--state", str(running.state))
        return done.returncode, done.stdout, done.stderr

    refused = "broker: no manifest names an agent {!r}; see `broker agents list`\n"
    try:
        code, printed, said = token("bot")
        assert (code, said) == (0, "")
        assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+\n", printed)
        assert json.loads(token("bot", "--json")[1]).keys() == {"agent", "token", "expires_in"}
        too_long = "broker: an agent's token lives 3600 s at most; write --ttl 3600, or less\n"
        assert token("bot", "--ttl", "7200") == (2, "", too_long)
        for name in ("ghost", "a b", "../bot", "bot?", ""):
            assert token(name) == (2, "", refused.format(name))
        assert token("certified")[0] == 2
        warning = "WARNING not set, so that calls get 503 credential_unavailable: NOT_SET of api\n"
        assert running.log().count(warning) == 1
        (manifests / "agent-bot.yaml").unlink()
        removed = stack.until(lambda: found if (found := token("bot"))[0] else None, why="the change is in force")
        assert removed == (2, "", refused.format("bot"))
    finally:
        running.stop()


# A tour for people; YAML and rules; whatever its command prints.
PRINTS_NO_JSON = {"demo", "render envoy", "render kubernetes", "render nftables", "run"}


def test_every_verb_that_prints_data_takes_json():
    verbs = dict(leaves(cli, ""))
    without = {path for path, command in verbs.items() if not any("--json" in option.opts for option in command.params)}
    assert without == PRINTS_NO_JSON


def leaves(command, path):
    if not isinstance(command, click.Group):
        yield path, command
        return
    for word in command.list_commands(None):
        yield from leaves(command.get_command(None, word), f"{path} {word}".strip())


@pytest.mark.parametrize("parent", [pytest.param("os.getppid()", id="lives"), pytest.param("-1", id="has ended before")])
def test_a_child_goes_on_only_while_its_parent(parent):
    script = f"import os; from broker.lifetimes import die_with; die_with({parent}); print('on')"
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stdout) == ((1, "") if parent == "-1" else (0, "on\n"))


@pytest.mark.parametrize(
    ("printed", "version"),
    [("envoy  version: abc/1.40.0/Clean/RELEASE/BoringSSL", "1.40.0"), ("envoy  version: abc/1.39.1/Clean/RELEASE", "1.39.1")],
)
def test_a_new_enough_envoy_is_taken(printed, version):
    assert checked_version(printed) == version


@pytest.mark.parametrize("printed", ["envoy  version: abc/1.39.0/Clean", "envoy  version: abc/1.9.9/Clean", "no version"])
def test_an_old_or_unreadable_envoy_is_refused(printed):
    with pytest.raises(BrokerError):
        checked_version(printed)


def test_render_prints_both_layers_and_no_private_key(manifests):
    done = broker("render", "envoy", str(manifests))
    assert done.returncode == 0
    for part in ("bootstrap:", "clusters:", "listeners:", "routes:", "envoy.filters.http.ext_proc", "envoy.filters.http.rbac"):
        assert part in done.stdout
    assert "PRIVATE KEY" not in done.stdout
    assert "failureModeAllow" not in done.stdout


@pytest.mark.envoy
def test_the_tour_shows_what_the_tools_really_saw():
    doors = ["--proxy", f"127.0.0.1:{stack.free_port()}", "--base-url", f"127.0.0.1:{stack.free_port()}"]
    done = broker("demo", "--once", *doors)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (
        "authorization: Bearer sk_demo",
        "deny params_invalid",
        "the agent sees '403 Forbidden'",
        "shows ['search_pages']",
    ):
        assert words in done.stdout
    assert ", 0 problems in the chain" in done.stdout


@pytest.mark.envoy
def test_serve_works_with_an_envoy_that_someone_else_runs(manifests, tmp_path):
    from broker.supervisor import envoy_binary  # noqa: PLC0415 - this test alone starts Envoy itself

    folder = stack.short_folder()
    doors = [f"127.0.0.1:{stack.free_port()}" for _ in range(3)]
    options = ["--proxy", doors[0], "--base-url", doors[1]]
    rendered = broker("render", "envoy", str(manifests), *options, "--run", str(folder / "state" / "run")).stdout
    (folder / "bootstrap.yaml").write_text(
        rendered.partition("\nclusters:")[0].partition("bootstrap:\n")[2].replace("\n  ", "\n")[2:]
    )
    serve = [
        *stack.BROKER,
        "serve",
        "--json",
        "--manifests",
        str(manifests),
        "--state",
        str(folder / "state"),
        *options,
        "--admin",
        doors[2],
    ]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        assert json.loads(server.stdout.readline())["event"] == "listening"
        command = [envoy_binary(), "-c", str(folder / "bootstrap.yaml"), "--disable-hot-restart", "--log-level", "error"]
        with subprocess.Popen(command) as envoy:
            assert json.loads(server.stdout.readline())["event"] == "accepted"
            envoy.terminate()
        server.terminate()
