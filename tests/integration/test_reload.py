"""Manifests change while calls run: in force within a second, never half, never at the cost of a call under way."""

import shutil
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import stack
import traffic

pytestmark = pytest.mark.envoy

ITEMS = {"items.get": {"match": {"method": "GET", "path": "/items/{id}"}, "effect": "read"}}
LOOPBACK = {"addresses": ["127.0.0.0/8", "::1/128"]}
GRANTED = {"operations": {"items.get": {}}}
WITHHELD = {"operations": {"items.get": {"params": {"path": {"properties": {"id": {"const": "nothing"}}}}}}}


@pytest.fixture(scope="module")
def place() -> Iterator[SimpleNamespace]:
    folder = stack.short_folder()
    ca = stack.TestCA()
    manifests = folder / "manifests"
    manifests.mkdir()
    (manifests / "ca.pem").write_text(ca.pem)
    plain = stack.Upstream()
    first = stack.tool("plain", f"http://127.0.0.1:{plain.port}", ITEMS, upstream=LOOPBACK)
    stack.write_manifests(manifests, first, stack.agent("caller", {"plain": GRANTED}))
    broker = stack.Broker(manifests, folder / "state")
    yield SimpleNamespace(folder=folder, manifests=manifests, ca=ca, plain=plain, broker=broker)
    broker.stop()
    plain.close()
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _as_it_was(place: SimpleNamespace) -> Iterator[None]:
    yield
    keep = {"tool-plain.yaml", "agent-caller.yaml"}
    stack.write_manifest(place.manifests, stack.agent("caller", {"plain": GRANTED}))
    for path in place.manifests.glob("*.yaml"):
        if path.name not in keep:
            path.unlink()
    (place.manifests / "ca.pem").write_text(place.ca.pem)
    with place.broker.direct("caller") as client:
        stack.until(lambda: client.get("/plain/items/a").status_code == 200, why="the first rules are back")


def _in_force(broker: stack.Broker) -> list[dict[str, object]]:
    return [r for r in broker.records() if r["event"] == "config" and r["detail"] == "configuration in force"]


def test_a_changed_manifest_is_in_force_within_a_second(place):
    took = []
    with place.broker.direct("caller") as client:
        assert client.get("/plain/items/a").status_code == 200
        for spec, status in ((WITHHELD, 403), (GRANTED, 200)):
            before, changed = len(_in_force(place.broker)), time.time()  # noqa: TID251
            stack.write_manifest(place.manifests, stack.agent("caller", {"plain": spec}))
            stack.until(lambda wanted=status: client.get("/plain/items/a").status_code == wanted, 5, "the change is in force")
            record = _in_force(place.broker)[before]
            took.append(datetime.fromisoformat(str(record["time"])).timestamp() - changed)
            decided = place.broker.decisions()[-1]
            assert decided["revision"] == record["revision"]
            assert httpx.get(f"{place.broker.admin}/readyz").json()["revision"] == record["revision"]
    assert min(took) < 1, "whatever else the machine did meanwhile"


def test_a_bad_change_is_reported_with_its_place_and_the_rules_before_stay_in_force(place):
    revision = _in_force(place.broker)[-1]["revision"]
    bad = stack.agent("caller", {"plain": WITHHELD, "no-such-tool": {"operations": {}}})
    stack.write_manifest(place.manifests, bad)

    def refused() -> list[dict[str, object]]:
        return [
            r
            for r in place.broker.records()
            if r["event"] == "config" and r["detail"].startswith("refused: 1 error in the manifests, the first: agent-call")
        ]

    [record] = stack.until(refused, 10, "the audit log says so")
    assert record["revision"] == revision
    reported = place.broker.log()
    assert "agent-caller.yaml:" in reported
    assert "tool_unknown" in reported
    assert f"revision {revision} stays in force" in reported
    with place.broker.direct("caller") as client:
        assert client.get("/plain/items/a").status_code == 200
    assert place.broker.decisions()[-1]["revision"] == revision
    assert httpx.get(f"{place.broker.admin}/readyz").status_code == 200
    stack.write_manifest(place.manifests, stack.agent("caller", {"plain": WITHHELD}))
    with place.broker.direct("caller") as client:
        stack.until(lambda: client.get("/plain/items/a").status_code == 403, 10, "the corrected change is in force")


def test_a_folder_that_is_gone_for_a_while_is_reported_and_what_comes_in_its_place_is_in_force(place):
    aside, fresh = place.folder / "aside", place.folder / "fresh"
    shutil.copytree(place.manifests, fresh)
    stack.write_manifest(fresh, stack.agent("caller", {"plain": WITHHELD}))
    place.manifests.rename(aside)
    stack.until(lambda: any("can't be read" in str(r.get("detail")) for r in place.broker.records()), 10, "it is reported")
    with place.broker.direct("caller") as client:
        assert client.get("/plain/items/a").status_code == 200
        fresh.rename(place.manifests)
        stack.until(lambda: client.get("/plain/items/a").status_code == 403, 10, "the new folder is in force")


def test_a_rule_flipped_a_hundred_times_under_load_fails_no_call_and_each_decision_has_one_revision(place):
    arrivals = traffic.Arrivals(place.plain)
    start = place.broker.records()[-1]["seq"]
    with traffic.traffic(8 * [traffic.through_base_url(place.broker, "caller", "plain")]) as found:
        found.runs()
        flips = 0
        # On a busy machine several flips may fall into one reload; it is the reloads that are to be under load.
        while flips < 100 or (flips < 600 and _reloads(place.broker) <= 10):
            flips += 1
            spec = WITHHELD if flips % 2 else GRANTED
            stack.write_manifest(place.manifests, stack.agent("caller", {"plain": spec}))
            time.sleep(0.05)
        found.resumes(5)
    assert set(found.answers.values()) == {200, 403}
    traffic.assert_no_fault_let_anything_out(place.broker, found, arrivals)
    lately: list[str] = [str(_in_force(place.broker)[0]["revision"])]
    verdicts: dict[str, set[str]] = {}
    for record in place.broker.records():
        if record["event"] == "config":
            lately.append(record["revision"])
        elif record["event"] == "decision" and record["seq"] > start:
            # A stream that began just before a change sees what was in force when it began.
            assert record["revision"] in lately[-2:]
            verdicts.setdefault(record["revision"], set()).add(record["verdict"])
    assert sorted(map(sorted, verdicts.values())) == [["allow"], ["deny"]]
    assert len(lately) > 10


def _reloads(broker: stack.Broker) -> int:
    return sum(record["event"] == "config" for record in broker.records())


def _second(place: SimpleNamespace, secure: stack.Upstream) -> None:
    tool = stack.tool("late", f"https://localhost:{secure.port}", ITEMS, upstream={"ca": "ca.pem", **LOOPBACK})
    stack.write_manifests(place.manifests, tool, stack.agent("caller", {"plain": GRANTED, "late": GRANTED}))


def _answer(client: httpx.Client, url: str) -> int | str:
    try:
        return client.get(url).status_code
    except httpx.ProxyError as error:
        return str(error)[:3]


def test_a_new_tool_makes_a_new_host_reachable_without_a_restart_and_its_removal_takes_it_away(place):
    secure = stack.Upstream(place.ca.issue(place.folder / "certs", "localhost"))
    url = f"https://localhost:{secure.port}/items/a"
    children = {name: place.broker.child(name) for name in ("envoy", "processor")}
    with place.broker.client("caller") as early, place.broker.direct("caller") as direct:
        assert _answer(early, url) == "403"
        assert direct.get("/late/items/a").status_code == 403
        _second(place, secure)
        stack.until(lambda: _answer(early, url) == 200, 5, "the new host, by a client that was there before")
        stack.until(lambda: direct.get("/late/items/a").status_code == 200, 5, "the same at the base-url door")
        with place.broker.client("caller") as fresh:
            assert fresh.get(url).status_code == 200
        stack.write_manifest(place.manifests, stack.agent("caller", {"plain": GRANTED}))
        (place.manifests / "tool-late.yaml").unlink()
        stack.until(lambda: direct.get("/late/items/a").status_code == 403, 5, "the removed tool")
        seen = len(secure.seen)
        assert early.get(url).status_code == 403  # in a tunnel that is open still
        with place.broker.client("caller") as fresh:
            assert _answer(fresh, url) == "403"
        assert direct.get("/late/items/a").json()["code"] == "tool_not_declared"
        assert len(secure.seen) == seen
    assert {name: place.broker.child(name) for name in children} == children
    secure.close()


def test_a_changed_certificate_file_is_a_change_too(place):
    secure = stack.Upstream(place.ca.issue(place.folder / "certs", "localhost"))
    _second(place, secure)
    with place.broker.direct("caller") as client:
        stack.until(lambda: client.get("/late/items/a").status_code == 200, 5, "the tool is there")
        (place.manifests / "ca.pem").write_text(stack.TestCA().pem)
        refused = stack.until(lambda: _code(client.get("/late/items/a")) == "upstream_untrusted", 5, "its roots are others now")
        assert refused
    secure.close()


def _code(answer: httpx.Response) -> str:
    return str(answer.json().get("code", "")) if answer.headers.get("content-type") == "application/problem+json" else ""


class Streaming:
    """An upstream whose answer is an event stream that goes on as long as the test feeds it."""

    def __init__(self, certificate: tuple[Path, Path]) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._context = context
        self._open: list[ssl.SSLSocket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                accepted, _ = self._listener.accept()
                with suppress(OSError):  # who asked is gone
                    self._begin(accepted)

    def _begin(self, accepted: socket.socket) -> None:
        with ExitStack() as unless_open:
            connection = self._context.wrap_socket(accepted, server_side=True)
            unless_open.callback(connection.close)
            heard = b""
            while not heard.endswith(b"\r\n\r\n"):
                if not (part := connection.recv(65536)):
                    return
                heard += part
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            unless_open.pop_all()
            self._open.append(connection)

    def push(self, text: str) -> None:
        for connection in self._open:
            data = f"data: {text}\n\n".encode()
            connection.sendall(b"%x\r\n%s\r\n" % (len(data), data))

    def end(self) -> None:
        for connection in self._open:
            connection.sendall(b"0\r\n\r\n")
            connection.close()
        self._listener.shutdown(socket.SHUT_RDWR)  # so that nobody waits at it
        self._listener.close()


@contextmanager
def _stream(client: httpx.Client, url: str) -> Iterator[Iterator[str]]:
    with client.stream("GET", url) as answer:
        assert answer.status_code == 200
        yield (line for line in answer.iter_lines() if line)


def test_an_answer_that_streams_goes_on_through_a_reload_that_changes_every_listener(place):
    source = Streaming(place.ca.issue(place.folder / "certs", "localhost"))
    other = stack.Upstream(place.ca.issue(place.folder / "certs", "127.0.0.1"))
    live = stack.tool("live", f"https://localhost:{source.port}", ITEMS, upstream={"ca": "ca.pem", **LOOPBACK})
    stack.write_manifests(place.manifests, live, stack.agent("caller", {"plain": GRANTED, "live": GRANTED}))
    url = f"https://localhost:{source.port}/items/a"
    with place.broker.direct("caller") as direct, place.broker.client("caller") as client:
        stack.until(lambda: "live" in _envoys_clusters(place), 5, "the stream's tool is there")
        stack.until(lambda: _tunnel_opens(place, source.port), 5, "and its host")
        with _stream(direct, "/live/items/a") as by_url, _stream(client, url) as by_tunnel:
            source.push("before")
            assert [next(by_url), next(by_tunnel)] == ["data: before"] * 2
            late = stack.tool("late", f"https://127.0.0.1:{other.port}", ITEMS, upstream={"ca": "ca.pem", **LOOPBACK})
            tools = {"plain": GRANTED, "live": GRANTED, "late": GRANTED}
            stack.write_manifests(place.manifests, late, stack.agent("caller", tools))
            with place.broker.direct("caller") as second, place.broker.client("caller") as third:
                stack.until(lambda: second.get("/late/items/a").status_code == 200, 5, "a new tool")
                stack.until(lambda: _answer(third, f"https://127.0.0.1:{other.port}/items/a") == 200, 5, "with a new certificate")
            source.push("after")
            assert [next(by_url), next(by_tunnel)] == ["data: after"] * 2
            source.end()
            assert [list(by_url), list(by_tunnel)] == [[], []]
    ended = stack.until(lambda: [r for r in place.broker.records() if r["event"] == "outcome" and r["tool"] == "live"][1:])
    assert [record["code"] for record in ended] == [None]
    other.close()


def _tunnel_opens(place: SimpleNamespace, port: int) -> bool:
    with stack.tunnel(place.broker, f"localhost:{port}", "caller") as (_, answer):
        return b" 200 " in answer.partition(b"\r\n")[0]


def _envoys_clusters(place: SimpleNamespace) -> set[str]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(place.broker.state / "run" / "envoy-admin.sock"))
        connection.sendall(b"GET /clusters?format=json HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        text = b""
        while part := connection.recv(65536):
            text += part
    return {name for name in ("plain", "late", "live") if f"tool/{name}".encode() in text}
