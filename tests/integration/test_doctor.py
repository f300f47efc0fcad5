"""`broker doctor`: in an agent's namespace nothing gets out; where there is a way out, it is found, and by the witness too."""

import contextlib
import json
import os
import socket
import subprocess
import threading

import pytest
import stack
from conftest import LOOPBACK, OPERATIONS
from host import WHY_NOT, WORLD4, WORLD6, Host

from broker.confined.probes import Around, Seen, probes
from broker.confined.witness import Witness
from broker.state import State

pytestmark = [pytest.mark.envoy, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]
API = "api.tool.test"


@pytest.fixture(scope="module")
def place():
    folder = stack.short_folder()
    host, ca = Host(folder, API), stack.TestCA()
    upstream = host.inside(lambda: stack.Upstream(ca.issue(folder / "certs", API), port=443))
    manifests = stack.write_manifests(
        folder / "manifests",
        stack.tool("api", f"https://{API}", OPERATIONS, upstream={"ca": "ca.pem", **LOOPBACK}),
        stack.agent("coder", {"api": {"operations": {"items.list": {}}}}),
    )
    (manifests / "ca.pem").write_text(ca.pem)
    broker = stack.Broker(manifests, folder / "state", within=host.within)

    def doctor(*arguments, state=broker.state, **around):
        more = {"BROKER_DOCTOR": json.dumps(around)} if around else {}
        command = [*host.within, *stack.BROKER, "doctor", *arguments, "--manifests", str(manifests), "--state", str(state)]
        return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, env={**os.environ, **more})

    yield doctor, host
    broker.stop()
    upstream.close()
    host.close()


def test_in_a_namespace_nothing_gets_out_and_the_witness_hears_nothing(place):
    doctor, _ = place
    done = doctor("--agent", "coder", "--json")
    rows = json.loads(done.stdout)
    assert [row for row in rows if row["out"]] == [], done.stderr
    assert done.returncode == 0
    assert len({row["probe"] for row in rows}) == len(rows), "no two say the same"
    assert rows[-1] == {"probe": "the witness on this machine", "expected": "nothing", "seen": "0 came", "out": False}
    assert {row["seen"] for row in rows if row["expected"] == "refused by the broker"} == {
        "HTTP 403 of the broker",
        "Name or service not known",
    }
    mismatch = next(row for row in rows if row["probe"].startswith("CONNECT to a declared host"))
    assert mismatch["seen"] == "HTTP 403 of the broker", "the tunnel was opened, and what was sent in it refused"


def test_from_where_there_are_ways_out_each_is_found(place):
    doctor, host = place
    upstream = host.inside(lambda: stack.Upstream(port=80))
    host.listen("a service", WORLD4, 8443)
    try:
        around = {"world": [WORLD4, WORLD6], "sink": 0, "loopback": [80], "paths": [], "declared": "", "proxy": None, "ca": ""}
        done = doctor("--from-here", "--json", **around)
        out = {row["probe"] for row in json.loads(done.stdout) if row["out"]}
        assert done.returncode == 1
        assert {f"TCP to other port 8443, {WORLD4}", "the host's loopback, port 80", "raw socket (ICMP)", "packet socket"} <= out
        table = doctor("--from-here", **around).stdout
        assert f"OUT  TCP to other port 8443, {WORLD4}" in table
    finally:
        upstream.close()


def test_the_witness_counts_who_came_however():
    witness = Witness()
    try:
        witness.checked()
        assert witness.heard == 0
        found = {probe.name: probe.run() for probe in probes(Around(("127.0.0.1",), witness.port))}
        assert found["TCP to the witness, 127.0.0.1"].out
        assert found["UDP to the witness, 127.0.0.1"].out
        stack.until(lambda: witness.heard == 2)
    finally:
        witness.close()


@pytest.mark.parametrize(
    "answer", ["server: envoy\r\n", "server: elsewhere\r\n", ""], ids=["another Envoy", "a server", "nameless"]
)
def test_a_refusal_that_is_not_the_brokers_came_from_outside(answer):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            with contextlib.suppress(OSError):  # it was closed
                while True:
                    made, _ = listener.accept()
                    with made:
                        made.recv(4096)
                        made.sendall(f"HTTP/1.1 403 Forbidden\r\n{answer}content-length: 0\r\n\r\n".encode())

        threading.Thread(target=serve, daemon=True).start()
        around = Around(("192.0.2.1",), proxy=listener.getsockname())
        found = {probe.name: probe for probe in probes(around)}
        for name in ("CONNECT to an undeclared host", "HTTP by the proxy"):
            assert found[name].run() == Seen("HTTP 403", out=True)
        listener.shutdown(socket.SHUT_RDWR)


def test_without_a_broker_it_ends_as_run_does(place):
    held = State.at(stack.short_folder() / "state")
    held.ca.write_text("")
    (held.keys / "tokens.key").touch()
    done = place[0]("--agent", "coder", state=held.root)
    first, second = done.stderr.splitlines()[-2:]
    assert (done.returncode, done.stdout) == (2, "")
    assert first.startswith(f"broker: no broker runs on {held.root}; ")
    assert second.startswith("broker: nothing could be tried in a namespace; see the message above")


@pytest.mark.parametrize("arguments", [(), ("--agent", "coder", "--from-here")], ids=["nowhere", "both"])
def test_it_is_said_from_where(place, arguments):
    done = place[0](*arguments)
    assert (done.returncode, done.stderr) == (2, "broker: say from where; write --agent NAME, or --from-here\n")
