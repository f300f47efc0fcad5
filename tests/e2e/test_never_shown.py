"""An upstream that gives back all that it gets: through a real Envoy, the agent sees nothing of the credential."""

import shutil
from types import SimpleNamespace
from urllib.parse import quote

import pytest
import stack
from e2e.serving import Served
from fakes import echo

SECRET = "tok-en/with+every=sort&of:mark~0123456789"
LOOPBACK = {"addresses": ["127.0.0.0/8"]}

pytestmark = pytest.mark.envoy


@pytest.fixture(scope="module")
def echoing():
    folder, upstream = stack.short_folder(), Served(echo.app)
    credential = {"issuer": "static", "secret": {"env": "ECHO_KEY"}}
    any_path = {"match": {"method": "GET", "path": "/{+rest}"}, "effect": "read"}
    stack.write_manifests(
        folder / "manifests",
        stack.tool("echo", f"http://127.0.0.1:{upstream.port}", {"get": any_path}, upstream=LOOPBACK, credential=credential),
        stack.agent("reader", {"echo": {"operations": {"get": {}}}}),
    )
    broker = stack.Broker(folder / "manifests", folder / "state", {"ECHO_KEY": SECRET})
    yield SimpleNamespace(broker=broker, upstream=upstream, state=folder / "state")
    broker.stop()
    upstream.close()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def reader(echoing):
    with echoing.broker.direct("reader") as client:
        yield client


@pytest.mark.parametrize("encoding", echo.ENCODINGS)
def test_no_answer_shows_the_credential(echoing, reader, encoding):
    for form in ("body", "error", "headers", "redirect", "events"):
        answer = reader.get(f"/echo/{form}/{quote(encoding, '')}")
        told = b"\n".join([*(name + b": " + value for name, value in answer.headers.raw), answer.content])
        assert echoing.upstream.arrived[-1].headers["authorization"] == f"Bearer {SECRET}"
        assert echo.shown(told, SECRET) == [], form
        assert b"[credential removed]" in told, form


def test_what_was_taken_out_is_recorded_and_alerted(echoing, reader):
    reader.get("/echo/headers/plain")
    decision = echoing.broker.decisions(verdict="allow")[-1]
    outcome = echoing.broker.outcome(decision["decision_id"])
    assert "x-echo-authorization" in outcome["masked"]
    alerts = [record for record in echoing.broker.records() if record["event"] == "alert"]
    assert alerts[-1]["decision_id"] == decision["decision_id"]
    assert "credential" in alerts[-1]["detail"]


def test_no_credential_lies_in_any_file_or_log(echoing, reader):
    reader.get("/echo/body/plain")
    for path in (*echoing.state.rglob("*"), echoing.broker.log_path):
        if path.is_file():
            assert echo.shown(path.read_bytes(), SECRET) == [], path
