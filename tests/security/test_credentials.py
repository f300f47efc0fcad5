"""Credentials on a whole broker: nobody gets another's, and an issuer that fails takes nobody else down."""

import shutil
import sys
import threading
import time
from types import SimpleNamespace

import jwt
import pytest
import stack

LOOPBACK = {"addresses": ["127.0.0.0/8"]}
LIST = {"items.list": {"match": {"method": "GET", "path": "/items"}, "effect": "read"}}
HANGS = [sys.executable, "-c", "import time; time.sleep(30)"]
FAILS = [sys.executable, "-c", "import sys; print('not json, and hunter2'); sys.exit(0)"]
NEVER_SEEN = "hunter2"

pytestmark = pytest.mark.envoy


@pytest.fixture(scope="module")
def issuing():
    """Tools whose issuers work, hang and fail, in front of one upstream; the agents `one` and `two` hold all of them."""
    folder, upstream = stack.short_folder(), stack.Upstream()
    issuers = {
        "minted": {"issuer": "jwt", "scopes": ["items.read"]},
        "hanging": {"issuer": "exec", "command": HANGS},
        "failing": {"issuer": "exec", "command": FAILS},
        "missing": {"issuer": "static", "secret": {"env": "NOT_THERE"}},
    }
    address = f"http://127.0.0.1:{upstream.port}"
    granted = {name: {"operations": {"items.list": {}}} for name in issuers}
    stack.write_manifests(
        folder / "manifests",
        *(stack.tool(name, f"{address}/{name}", LIST, upstream=LOOPBACK, credential=each) for name, each in issuers.items()),
        stack.agent("one", granted),
        stack.agent("two", granted),
    )
    broker = stack.Broker(folder / "manifests", folder / "state")
    yield SimpleNamespace(broker=broker, upstream=upstream)
    broker.stop()
    upstream.close()
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _fresh(issuing):
    issuing.upstream.seen.clear()


def claims(seen):
    return jwt.decode(seen.header("authorization").removeprefix("Bearer "), options={"verify_signature": False})


def test_an_agent_that_replays_anothers_run_and_connection_gets_a_credential_of_its_own(issuing):
    run = {"x-run-id": "run-of-one", "baggage": "run.id=run-of-one", "mcp-session-id": "session-of-one"}
    with issuing.broker.direct("one") as client:  # one connection, on which both speak
        assert client.get("/minted/items", headers=run).status_code == 200
        as_two = {**run, "x-broker-token": issuing.broker.token("two")}
        assert client.get("/minted/items", headers=as_two).status_code == 200
        assert client.get("/minted/items", headers=run).status_code == 200
    first, second, third = map(claims, issuing.upstream.seen)
    assert (first["sub"], second["sub"], third["sub"]) == ("one", "two", "one")
    assert first["jti"] == third["jti"] != second["jti"]


@pytest.mark.parametrize("tool", ["hanging", "failing", "missing"])
def test_an_issuer_that_gives_nothing_is_a_503_with_what_to_do_and_nothing_is_sent(issuing, tool):
    with issuing.broker.direct("one") as client:
        began = time.monotonic()
        refused = client.get(f"/{tool}/items")
        took = time.monotonic() - began
    problem = refused.json()
    assert (refused.status_code, problem["code"]) == (503, "credential_unavailable")
    assert problem["next_steps"]
    assert took < 5
    assert issuing.upstream.seen == []
    record = issuing.broker.decision(problem["decision_id"])
    assert (record["verdict"], record["code"], record["credential"]) == ("deny", "credential_unavailable", None)
    assert NEVER_SEEN not in issuing.broker.log()


def test_while_one_issuer_hangs_calls_of_others_pass_at_once(issuing):
    with issuing.broker.direct("two") as waiting, issuing.broker.direct("one") as client:
        hung = threading.Thread(target=lambda: waiting.get("/hanging/items"))
        client.get("/minted/items")
        hung.start()
        began = time.monotonic()
        passed = [client.get("/minted/items").status_code for _ in range(5)]
        still_hanging, took = hung.is_alive(), time.monotonic() - began
        hung.join(10)
    assert passed == [200] * 5
    assert still_hanging, f"the hanging call was over after {took} s"


def test_neither_process_may_leave_a_picture_of_its_memory(issuing):
    for child in ("processor", "envoy"):
        with open(f"/proc/{issuing.broker.child(child)}/limits") as limits:  # noqa: PTH123 - a file of the kernel
            [line] = [line for line in limits if line.startswith("Max core file size")]
        assert line.split()[4:6] == ["0", "0"], child
