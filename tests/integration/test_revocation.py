"""Cutting an agent off, with a real Envoy: what is open ends, what is new is denied, and others go on."""

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack
from types import SimpleNamespace

import httpx
import pytest
import stack
from streams import Events, Listener, base_url_stream

pytestmark = pytest.mark.envoy

LOOPBACK = {"addresses": ["127.0.0.0/8", "::1/128"]}
OPERATIONS = {
    "items.list": {"match": {"method": "GET", "path": "/items/{+rest}"}, "effect": "read"},
    "items.create": {"match": {"method": "POST", "path": "/items"}, "effect": "write"},
}
GRANTED = {"operations": {"items.list": {}, "items.create": {}}}
CUT_S = 2.0


def verb(broker, *words, check=True):
    command = [*stack.BROKER, *map(str, words), "--state", str(broker.state)]
    return subprocess.run(command, capture_output=True, text=True, check=check)


@pytest.fixture(scope="module")
def place():
    folder, ca = stack.short_folder(), stack.TestCA()
    plain, secure = Events(), Events(ca.issue(folder / "certs", "localhost"))
    manifests = folder / "manifests"
    tools = {"plain": GRANTED, "secure": GRANTED}
    stack.write_manifests(
        manifests,
        stack.tool("plain", f"http://127.0.0.1:{plain.port}", OPERATIONS, upstream=LOOPBACK),
        stack.tool("secure", f"https://localhost:{secure.port}", OPERATIONS, upstream={"ca": "ca.pem", **LOOPBACK}),
        *(stack.agent(name, tools) for name in ("rogue", "other", "runner", "restarted")),
    )
    (manifests / "ca.pem").write_text(ca.pem)
    broker = stack.Broker(manifests, folder / "state")
    yield SimpleNamespace(broker=broker, plain=plain, secure=secure, folder=folder)
    broker.stop()
    plain.close()
    secure.close()
    shutil.rmtree(folder)


def inside_tunnel(stack_, place, agent, path):
    target = f"localhost:{place.secure.port}"
    connection, answer = stack_.enter_context(stack.tunnel(place.broker, target, agent))
    assert answer.startswith(b"HTTP/1.1 200"), answer
    inside = stack_.enter_context(stack.tls(connection, place.broker, "localhost"))
    return Listener(inside, f"GET {path} HTTP/1.1\r\nhost: {target}\r\n\r\n".encode())


def idle_tunnel(stack_, place, agent):
    target = f"localhost:{place.secure.port}"
    connection, answer = stack_.enter_context(stack.tunnel(place.broker, target, agent))
    assert answer.startswith(b"HTTP/1.1 200"), answer
    return Listener(connection, b"")


def opened(stack_, place, agent):
    """One of each kind of thing that can be open."""
    streams = {
        "an idle stream": base_url_stream(place.broker, agent, "/plain/items/idle"),
        "a busy stream": base_url_stream(place.broker, agent, "/plain/items/busy"),
        "an idle stream in a tunnel": inside_tunnel(stack_, place, agent, "/items/idle"),
        "a busy stream in a tunnel": inside_tunnel(stack_, place, agent, "/items/busy"),
    }
    for what, each in streams.items():
        assert each.began.wait(10), what
        assert not each.ended.is_set(), (what, each.answer)
        stack_.callback(each.close)
    return {**streams, "an idle tunnel": idle_tunnel(stack_, place, agent)}


def test_revoking_cuts_what_is_open_at_once_also_when_idle_and_nothing_new_passes_and_others_go_on(place):
    broker = place.broker
    with ExitStack() as held:
        rogue, other = opened(held, place, "rogue"), opened(held, place, "other")
        done = verb(broker, "agents", "revoke", "rogue", "--reason", "it lies", "--as", "jo", "--json")
        revoked = time.monotonic()
        assert json.loads(done.stdout)["revoked"]["reason"] == "it lies"
        for what, each in rogue.items():
            assert each.ended.wait(CUT_S), f"{what} is still open"
            assert each.ended_at - revoked < CUT_S, what
        assert not [what for what, each in other.items() if each.ended.is_set()]
    with broker.direct("rogue") as client:
        refused = client.get("/plain/items/x")
        assert (refused.status_code, refused.json()["code"]) == (403, "agent_revoked")
        assert "it lies" not in refused.text, "why is for people"
    with stack.tunnel(broker, f"localhost:{place.secure.port}", "rogue") as (_, answer):
        assert answer.startswith(b"HTTP/1.1 403")
    ended = [r for r in broker.records() if r["event"] == "outcome" and r["agent"]["name"] == "rogue"]
    assert {record["code"] for record in ended} == {"agent_revoked"}
    assert len(ended) == 4
    [record] = [r for r in broker.records() if r["event"] == "revocation"]
    assert (record["agent"]["name"], record["notice"]["by"], record["notice"]["reason"]) == ("rogue", "jo", "it lies")


def test_a_released_agent_needs_a_new_token_and_goes_on(place):
    broker, old = place.broker, place.broker.token("rogue")
    assert verb(broker, "agents", "release", "rogue", check=False).returncode == 2
    assert verb(broker, "agents", "release", "rogue", "--reason", "mended", "--as", "jo").returncode == 0
    assert verb(broker, "agents", "release", "rogue", "--reason", "again", check=False).returncode == 1
    with broker.direct("rogue") as client:
        assert client.post("/plain/items").json()["code"] == "agent_unknown"
    del broker._tokens["rogue"]
    assert broker.token("rogue") != old
    listener = base_url_stream(broker, "rogue", "/plain/items/idle")
    assert listener.began.wait(10)
    assert listener.answer.startswith(b"HTTP/1.1 200")
    listener.close()


def test_revoking_a_run_leaves_the_agents_other_runs_alone(place):
    broker = place.broker
    mine, others = (base_url_stream(broker, "runner", "/plain/items/idle", run) for run in ("r1", "r2"))
    assert mine.began.wait(10)
    assert others.began.wait(10)
    verb(broker, "agents", "revoke", "runner", "--run", "r1", "--reason", "loops")
    assert mine.ended.wait(CUT_S)
    assert not others.ended.is_set()
    with broker.direct("runner") as client:
        answers = {run: client.post("/plain/items", headers={"x-run-id": run}) for run in ("r1", "r2")}
    assert answers["r1"].json()["code"] == "agent_revoked"
    assert answers["r2"].status_code == 501  # the stream's server takes no POST: the call went through
    mine.close()
    others.close()


def test_a_revocation_survives_a_kill_and_one_made_while_no_broker_runs_holds_from_the_next_start(place):
    broker = place.broker
    verb(broker, "agents", "revoke", "restarted", "--reason", "before the kill")
    broker.process.kill()
    broker.stop()
    assert verb(broker, "agents", "revoke", "other", "--reason", "at night", "--manifests", broker.manifests).returncode == 0
    broker.start()
    for name, reason in (("restarted", "before the kill"), ("other", "at night")):
        with broker.direct(name) as client:
            assert client.post("/plain/items").json()["code"] == "agent_revoked"
        assert f"standing  revoke_agent: {reason} (by " in verb(broker, "agents", "show", name).stdout
    assert verb(broker, "agents", "release", "other", "--reason", "morning").returncode == 0
    with broker.direct("other") as client:
        assert client.post("/plain/items").status_code == 501


def test_all_agents_are_revoked_at_once_and_released_at_once(place):
    broker = place.broker
    with ExitStack() as held:
        streams = opened(held, place, "other")
        verb(broker, "agents", "revoke", "--all", "--reason", "break glass")
        assert all(each.ended.wait(CUT_S) for each in streams.values())
    for name in ("other", "runner"):
        with broker.direct(name) as client:
            assert client.post("/plain/items").json()["code"] == "agent_revoked"
    verb(broker, "agents", "release", "--all", "--reason", "over")
    for name in ("other", "runner"):
        del broker._tokens[name]
        with broker.direct(name) as client:
            assert client.post("/plain/items").status_code == 501


def test_who_holds_an_operators_token_acts_over_tcp_by_the_name_in_it_and_nobody_else_does(place):
    broker = place.broker
    operator = verb(broker, "token", "ann", "--operator", "--group", "secops").stdout.strip()
    target = f"{broker.admin}/agents/rogue/revoke"
    for token in ("none", broker.token("rogue"), "nonsense"):
        refused = httpx.post(target, json={"reason": "x"}, headers={"authorization": f"Bearer {token}"})
        assert refused.status_code == 401
        assert httpx.get(f"{broker.admin}/agents", headers={"authorization": f"Bearer {token}"}).status_code == 401
    headers = {"authorization": f"Bearer {operator}"}
    assert httpx.post(target, json={}, headers=headers).status_code == 409
    assert httpx.post(f"{broker.admin}/agents/nobody/revoke", json={"reason": "x"}, headers=headers).status_code == 404
    done = httpx.post(target, json={"reason": "by phone", "by": "someone else"}, headers=headers)
    assert done.json()["revoked"]["by"] == "ann"
    with broker.direct("rogue") as client:
        assert client.post("/plain/items").json()["code"] == "agent_revoked"
    listed = {each["name"]: each["standing"] for each in httpx.get(f"{broker.admin}/agents", headers=headers).json()["agents"]}
    assert listed["rogue"] == ["revoke_agent"]
    assert httpx.post(f"{broker.admin}/agents/rogue/release", json={"reason": "ok"}, headers=headers).status_code == 200
    # An operator's token is no agent's.
    assert httpx.post(f"{broker.base_url}/plain/items", headers={"x-broker-token": operator}).status_code == 401


def test_what_is_open_ends_while_the_processor_hangs_which_could_not_cut_it(place):
    broker = place.broker
    with ExitStack() as held:
        streams = opened(held, place, "runner")
        del streams["an idle tunnel"]  # no call of its own: each that comes through is asked about
        processor = broker.child("processor")
        os.kill(processor, signal.SIGSTOP)
        try:
            assert all(each.ended.wait(20) for each in streams.values())
        finally:
            os.kill(processor, signal.SIGCONT)
    with broker.direct("runner") as client:
        stack.until(lambda: client.post("/plain/items").status_code == 501, 20, "calls are served again")
    assert broker.child("processor") == processor
