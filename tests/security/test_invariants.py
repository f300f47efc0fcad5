"""The ten invariants of the design, one test each. Each docstring is the invariant's sentence."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import stack

from broker.admin.client import fetch
from broker.audit.record import args_hash
from broker.manifest.load import load_texts

pytestmark = pytest.mark.envoy

ITEMS = {
    "items.get": {"match": {"method": "GET", "path": "/items/{id}"}, "effect": "read"},
    "items.create": {"match": {"method": "POST", "path": "/items"}, "effect": "write"},
}
LOOPBACK = {"addresses": ["127.0.0.0/8", "::1/128"]}
GRANTED = {"operations": {"items.get": {}, "items.create": {}}}


@pytest.fixture(scope="module")
def place() -> Iterator[SimpleNamespace]:
    """A broker of this module's own, for what would disturb other tests: faults, reloads, revocations, restarts."""
    folder = stack.short_folder()
    ca = stack.TestCA()
    manifests = folder / "manifests"
    manifests.mkdir()
    (manifests / "ca.pem").write_text(ca.pem)
    plain, secure = stack.Upstream(), stack.Upstream(ca.issue(folder / "certs", "localhost"))
    stack.write_manifests(
        manifests,
        stack.tool("plain", f"http://127.0.0.1:{plain.port}", ITEMS, upstream=LOOPBACK),
        stack.tool("secure", f"https://localhost:{secure.port}", ITEMS, upstream={"ca": "ca.pem", **LOOPBACK}),
        stack.agent("caller", {"plain": GRANTED, "secure": GRANTED}),
        stack.agent("limited", {"plain": GRANTED, "secure": GRANTED}, limits={"calls": "20/day"}),
    )
    broker = stack.Broker(manifests, folder / "state")
    yield SimpleNamespace(manifests=manifests, plain=plain, secure=secure, broker=broker)
    broker.stop()
    plain.close()
    secure.close()
    shutil.rmtree(folder)


def test_invariant_01_no_byte_leaves_without_a_recorded_allow_for_exactly_these_bytes(world):
    """No byte of a request reaches an upstream unless an `allow` (in shadow mode a `would_deny`) for exactly these bytes was
    recorded first.
    """
    recorded: list[str] = []
    answer = world.secure.answer

    def judged(seen: stack.Seen) -> tuple[int, dict[str, str], bytes]:
        # Before the upstream answers: does the log hold an allow for these very bytes by now?
        sent = args_hash({"path": {}, "query": {}, "body": json.loads(seen.body)})
        here = {"tool": "secure", "method": seen.method, "path": seen.path}
        verdicts = [each["verdict"] for each in world.broker.decisions(**here) if each["args_hash"] == sent]
        recorded.append(verdicts[-1])
        return answer(seen)

    world.secure.answer = judged
    try:
        with world.broker.client("writer") as client:
            for title in ("first", "second", "x" * 21, "third"):
                client.post(f"https://localhost:{world.secure.port}/items", json={"title": title})
        with world.broker.client("trainee") as client:
            client.post(f"https://localhost:{world.secure.port}/items", json={"title": "in shadow"})
    finally:
        world.secure.answer = answer
    assert [json.loads(seen.body)["title"] for seen in world.secure.seen] == ["first", "second", "third", "in shadow"]
    assert recorded == ["allow", "allow", "allow", "would_deny"]


def test_invariant_02_an_agent_never_sees_a_credential(world):
    """An agent never sees a credential: not in a response, an error, a redirect, a log or a metric."""
    answers: list[httpx.Response] = []
    whole = world.plain.answer
    with world.broker.client("writer") as client, world.broker.direct("writer") as direct:
        for status, headers in ((200, {}), (500, {}), (302, {"location": f"https://localhost:{world.secure.port}/items"})):
            world.plain.answer = lambda _, status=status, headers=headers: (status, headers, b"")
            answers += [client.get(f"http://127.0.0.1:{world.plain.port}/items"), direct.get("/plain/items")]
        world.plain.answer = whole
        answers += [
            client.get(f"https://localhost:{world.secure.port}/items"),
            client.post(f"https://localhost:{world.secure.port}/items", json={"title": 1}),
            client.request("TRACE", f"http://127.0.0.1:{world.plain.port}/items"),
            direct.get("/foreign/items"),
            direct.get("/inward/items"),
            direct.get("/secure/nowhere"),
            *(httpx.get(world.broker.admin + path) for path in ("/metrics", "/readyz", "/jwks.json")),
        ]
    used = [seen for upstream in (world.plain, world.secure) for seen in upstream.seen]
    assert len([seen for seen in used if seen.header("authorization") == f"Bearer {world.secret}"]) == 7, "it was injected at all"
    for answer in answers:
        assert world.secret not in f"{answer.headers}{answer.text}{answer.history}"
    admin = world.broker.state / "run" / "envoy-admin.sock"
    shown = [
        world.broker.log().encode(),
        *(path.read_bytes() for path in sorted(world.broker.state.rglob("*")) if path.is_file()),
        *(fetch(admin, "GET", path)[1] for path in ("/config_dump", "/stats", "/clusters")),
        _verb("audit", "tail", "-n", "1000", "--state", world.broker.state),
        *(Path(f"/proc/{world.broker.child(name)}/cmdline").read_bytes() for name in ("envoy", "processor")),
    ]
    assert len(shown) > 10
    assert not any(world.secret.encode() in text for text in shown)


def _base_url(broker: stack.Broker) -> tuple[str, int]:
    host, _, port = broker.ready["base_url"].rpartition(":")
    return host, int(port)


def _verb(*arguments: object) -> bytes:
    command = [*stack.BROKER, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=True).stdout


def test_invariant_03_a_credential_goes_only_to_its_endpoint_over_verified_tls(world):
    """A credential goes only to the endpoint that its catalog entry names, over verified TLS; an `http://` endpoint is accepted
    only where every `upstream.addresses` entry is loopback, or with `unsafe_plaintext: true`.
    """
    answer = world.plain.answer
    world.plain.answer = lambda _: (307, {"location": f"https://127.0.0.1:{world.other.port}/v1/items"}, b"")
    try:
        with world.broker.direct("writer") as client:
            assert client.get("/plain/items").status_code == 307
            for untrusted in ("foreign", "misnamed", "inward"):  # another root, another name, a private address
                refused = client.get(f"/{untrusted}/items")
                assert (refused.status_code, refused.json()["code"]) == (403, "upstream_untrusted")
            assert client.get("/other/items").status_code == 200
            spoofed = client.get(
                "/plain/items", headers={"host": f"127.0.0.1:{world.other.port}", "x-forwarded-host": "evil.example"}
            )
            assert spoofed.status_code == 307
    finally:
        world.plain.answer = answer
    assert [each.seen for each in (world.foreign, world.misnamed, world.inward)] == [[], [], []]
    assert [seen.header("authorization") for seen in world.other.seen] == [None]
    assert {seen.header("host") for seen in world.plain.seen} == {f"127.0.0.1:{world.plain.port}"}

    assert _codes("http://tool.example", addresses=["10.0.0.0/8"]) == {"endpoint_plaintext"}
    assert _codes("http://tool.example", addresses=["127.0.0.0/8", "10.0.0.0/8"]) == {"endpoint_plaintext"}
    assert _codes("http://tool.example") == {"endpoint_plaintext"}
    assert _codes("http://tool.example", unsafe_plaintext=True) == {"unsafe_plaintext"}
    assert _codes("http://tool.example", addresses=["127.0.0.0/8", "::1/128"]) == set()
    assert _codes("https://tool.example") == set()


def _codes(endpoint: str, addresses: list[str] | None = None, **spec: Any) -> set[str]:
    upstream = {"upstream": {"addresses": addresses}} if addresses else {}
    document = stack.tool("tool", endpoint, ITEMS, **upstream, **spec)
    findings = load_texts({"tool.yaml": json.dumps(document).encode()}, Path()).findings
    return {finding.code for finding in findings if finding.code != "schema_open"}


def test_invariant_04_every_fault_denies(place):
    """Every fault denies: crash, hang, timeout, clean end of stream, missing cluster, ledger down, audit disk full, no
    configuration.
    """
    # The hang and the crash; `test_faults.py` has each of them under load. `test_shared_ledger.py` has the ledger.
    pid = place.broker.child("processor")
    with place.broker.direct("caller") as client, place.broker.client("caller") as tunnelled:
        os.kill(pid, signal.SIGSTOP)
        assert client.get("/plain/items/hang").status_code >= 500
        with pytest.raises(httpx.ProxyError, match=r"50[34]"):
            tunnelled.get(f"https://localhost:{place.secure.port}/items/hang")
        os.kill(pid, signal.SIGKILL)
        assert client.get("/plain/items/crash").status_code == 503
        assert (place.plain.seen, place.secure.seen) == ([], [])
        stack.until(lambda: client.get("/plain/items/back").status_code == 200, 20, "it is back by itself")


def test_invariant_05_one_exchange_sees_one_snapshot_and_a_bad_configuration_changes_nothing(place):
    """One exchange sees one snapshot. A bad new configuration leaves the old one in force."""
    wide = httpx.get(f"{place.broker.admin}/readyz").json()["revision"]
    with socket.create_connection(_base_url(place.broker), timeout=5) as connection:
        # The head is judged under one revision, and the body arrives when another is in force.
        token = place.broker.token("caller")
        body = b'{"title":"x"}'
        head = f"POST /plain/items HTTP/1.1\r\nhost: x\r\nx-broker-token: {token}\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[:5])
        time.sleep(0.3)  # until the processor has the head: nothing shows it from outside
        stack.write_manifest(place.manifests, stack.agent("caller", {"secure": GRANTED}))
        stack.until(
            lambda: httpx.get(f"{place.broker.admin}/readyz").json()["revision"] != wide, why="the narrow one is in force"
        )
        answer = stack.exchange_bytes(connection, body[5:])
    assert answer.startswith(b"HTTP/1.1 200")
    decided = place.broker.decisions(method="POST")[-1]
    assert (decided["verdict"], decided["revision"]) == ("allow", wide)
    with place.broker.direct("caller") as client:
        assert client.post("/plain/items", json={"title": "x"}).json()["code"] == "tool_not_declared"
        stack.write_manifest(place.manifests, stack.agent("caller", {"plain": GRANTED, "secure": GRANTED}))
        stack.until(lambda: client.get("/plain/items/a").status_code == 200, why="the wide one is back")
        (place.manifests / "bad.yaml").write_text("kind: [")
        stack.until(lambda: "bad.yaml:" in place.broker.log(), why="it is reported")
        assert client.get("/plain/items/a").status_code == 200
        assert place.broker.decisions()[-1]["revision"] == wide
        (place.manifests / "bad.yaml").unlink()


def test_invariant_06_after_a_revocation_nothing_new_passes_and_what_is_open_is_cut(place):
    """After a revocation nothing new passes, and what is open is cut within 2 s, on every replica, also when idle; it survives
    restarts.
    """
    # `test_fleet_containment.py` has the replicas, and a hundred streams; `test_revocation.py` every kind of what may be open.
    broker, old = place.broker, place.broker.token("caller")
    target = f"localhost:{place.secure.port}"
    request = f"GET /items/a HTTP/1.1\r\nhost: {target}\r\n\r\n".encode()
    with stack.tunnel(broker, target, "caller") as (connection, _), stack.tls(connection, broker, "localhost") as inside:
        assert stack.exchange_bytes(inside, request).startswith(b"HTTP/1.1 200")
        place.plain.seen.clear()
        place.secure.seen.clear()
        _verb("agents", "revoke", "caller", "--reason", "a drill", "--state", broker.state)
        revoked = time.monotonic()
        inside.settimeout(10)
        with contextlib.suppress(OSError):
            assert inside.recv(1) == b"", "the idle tunnel ends"
        assert time.monotonic() - revoked < 2
    with stack.tunnel(broker, target, "caller") as (_, answer):
        assert answer.startswith(b"HTTP/1.1 403")
    headers = {"x-broker-token": old}
    assert httpx.get(f"{broker.base_url}/plain/items/a", headers=headers).json()["code"] == "agent_revoked"
    os.kill(broker.process.pid, signal.SIGKILL)
    broker.stop()
    broker.start()
    assert httpx.get(f"{broker.base_url}/plain/items/a", headers=headers).json()["code"] == "agent_revoked"
    assert (place.plain.seen, place.secure.seen) == ([], [])
    _verb("agents", "release", "caller", "--reason", "the drill is over", "--state", broker.state)
    assert httpx.get(f"{broker.base_url}/plain/items/a", headers=headers).json()["code"] == "agent_unknown", "an old token"
    with broker.direct("caller") as client:
        assert client.get("/plain/items/a").status_code == 200


def test_invariant_07_what_an_agent_says_of_itself_is_stripped_and_never_believed(world):
    """What an agent says of itself (identity, authorization, x-broker-*, x-forwarded-*, x-envoy-*) is stripped, never
    believed.
    """
    claims = {
        "authorization": "Bearer mine", "cookie": "session=mine", "x-api-key": "mine", "x-agent-id": "writer",
        "x_agent_id": "writer", "x-broker-agent": "writer", "x-broker-decision": "allow", "x-broker-decision-id": "mine",
        "x-forwarded-for": "10.0.0.1", "x-forwarded-client-cert": "URI=spiffe://acme.example/agents/writer",
        "x-forwarded-host": "evil.example", "via": "1.1 mine", "forwarded": "for=mine", "x-envoy-original-path": "/mine",
        "x-envoy-retry-on": "5xx", "x-envoy-upstream-alt-stat-name": "mine",
    }  # fmt: skip
    host = f"127.0.0.1:{world.plain.port}"
    lines = "".join(f"{name}: {value}\r\n" for name, value in claims.items())
    proxied = f"GET http://{host}/items HTTP/1.1\r\nhost: {host}\r\n"
    based = f"GET /plain/items HTTP/1.1\r\nhost: x\r\nx-broker-token: {world.broker.token('reader')}\r\n"
    authorization = stack.basic("reader", world.broker.token("reader"))
    with socket.create_connection(world.broker.proxy, timeout=5) as connection:
        answer = stack.exchange_bytes(connection, f"{proxied}proxy-authorization: {authorization}\r\n{lines}\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 200")
    with socket.create_connection(_base_url(world.broker), timeout=5) as connection:
        assert stack.exchange_bytes(connection, f"{based}{lines}\r\n".encode()).startswith(b"HTTP/1.1 200")
    assert len(world.plain.seen) == 2
    for seen in world.plain.seen:
        arrived = {name.lower(): value for name, value in seen.headers}
        assert arrived.pop("authorization") == f"Bearer {world.secret}"
        assert arrived.keys() & {*claims, "proxy-authorization", "x-broker-token"} == set()
    assert [record["agent"]["name"] for record in world.broker.decisions(verdict="allow")[-2:]] == ["reader"] * 2
    # Nor do claims alone make anyone known.
    assert httpx.get(f"{world.broker.base_url}/plain/items", headers=claims).status_code == 401


def test_invariant_08_a_limit_is_never_exceeded(place):
    """A limit of N admits at most N, whatever the concurrency and however many replicas."""
    # By every door at once, and across a crash; `test_shared_ledger.py` has the replicas.
    broker = place.broker
    urls = ["/plain/items/n", f"http://127.0.0.1:{place.plain.port}/items/n", f"https://localhost:{place.secure.port}/items/n"]
    with broker.direct("limited") as direct, broker.client("limited") as proxied, ThreadPoolExecutor(15) as pool:

        def statuses(calls: int) -> list[int]:
            sent = (urls[number % len(urls)] for number in range(calls))
            return list(pool.map(lambda url: (direct if url.startswith("/") else proxied).get(url).status_code, sent))

        assert sorted(statuses(60)) == [200] * 20 + [429] * 40
        os.kill(broker.child("processor"), signal.SIGKILL)
        stack.until(lambda: direct.get("/plain/items/n").status_code == 429, 20, "it is back by itself")
        assert statuses(6) == [429] * 6
    arrived = [seen for upstream in (place.plain, place.secure) for seen in upstream.seen if seen.path == "/items/n"]
    assert len(arrived) == 20


@pytest.mark.parametrize(
    ("tool", "body", "headers"),
    [
        pytest.param("secure/items", b'{"title":"a","title":"b"}', {}, id="duplicate keys"),
        pytest.param("secure/items", b'{"title":"a","t\\u0069tle":"b"}', {}, id="duplicate keys, one of them escaped"),
        pytest.param("secure/items", b'\xef\xbb\xbf{"title":"a"}', {}, id="a byte order mark"),
        pytest.param("secure/items", '{"title":"a"}'.encode("utf-16"), {}, id="UTF-16"),
        pytest.param("secure/items", b'{"title":"\xff"}', {}, id="not UTF-8"),
        pytest.param("secure/items", b'{"title":"\\ud800"}', {}, id="half a character"),
        pytest.param("secure/items", b'{"title":NaN}', {}, id="NaN"),
        pytest.param("secure/items", b'{"title":"a"} {}', {}, id="two values"),
        pytest.param("secure/items", b"[" * 100_000, {}, id="a nest"),
        pytest.param("secure/items", b'{"title":"a"}', {"content-encoding": "gzip"}, id="an encoding"),
        pytest.param("secure/items", b'{"title":"a"}', {"content-type": "application/json; charset=utf-7"}, id="a charset"),
        pytest.param("wiki", b'[{"jsonrpc":"2.0","id":1,"method":"tools/list"}]', {}, id="a batch"),
        pytest.param("wiki", b'{"jsonrpc":"2.0","id":1,"method":"tools/list","Method":"tools/call"}', {}, id="a case-folded key"),
        pytest.param("wiki", b'{"jsonrpc":"2.0","id":1,"method":"tools/list","method":"ping"}', {}, id="two methods"),
    ],
)
def test_invariant_09_what_can_not_be_parsed_in_exactly_one_way_is_refused(world, tool, body, headers):
    """What can't be parsed in exactly one way is refused: duplicate or case-folded keys in protocol envelopes, batches,
    encodings, BOMs, NaN.
    """
    usual = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
    with world.broker.direct("writer") as client:
        answer = client.post(f"/{tool}", content=body, headers={**usual, **headers})
    assert answer.status_code in (400, 403, 415)
    record = world.broker.decision(answer.headers["x-broker-decision-id"])
    assert record["code"] in ("body_malformed", "protocol_violation", "encoding_not_allowed")
    assert (world.secure.seen, world.wiki.seen) == ([], [])


def test_invariant_10_nothing_undeclared_is_resolved_connected_to_or_certified(world):
    """Nothing undeclared is resolved, connected to or certified."""
    undeclared = stack.Upstream()
    admin = world.broker.state / "run" / "envoy-admin.sock"
    clusters = _clusters(admin)
    try:
        for target in (f"127.0.0.1:{undeclared.port}", f"localhost:{undeclared.port}", "nowhere.invalid:443"):
            with stack.tunnel(world.broker, target, "writer") as (_, answer):
                assert answer.startswith(b"HTTP/1.1 403")
            with world.broker.client("writer") as client:
                assert client.get(f"http://{target}/items").json()["code"] == "host_not_declared"
        for name in ("nowhere.invalid", "127.0.0.1.nip.invalid", "evil.localhost"):
            declared = stack.tunnel(world.broker, f"localhost:{world.secure.port}", "writer")
            with declared as (connection, answer), contextlib.suppress(OSError):
                assert answer.startswith(b"HTTP/1.1 200")
                with stack.tls(connection, world.broker, name) as inside:
                    pytest.fail(f"{name} was certified: {inside.getpeercert()}")
        assert undeclared.connections == 0
        # Envoy resolves the names of its clusters and no others, and those are the catalog's.
        assert _clusters(admin) == clusters
        catalog = (path.stem.removeprefix("tool-") for path in world.broker.manifests.glob("tool-*.yaml"))
        assert {name for name in clusters if name.startswith("tool/")} == {f"tool/{name}" for name in catalog}
        assert fetch(admin, "GET", "/stats?filter=dns_cache")[1] == b""
    finally:
        undeclared.close()


def _clusters(admin: Path) -> set[str]:
    return {each["name"] for each in json.loads(fetch(admin, "GET", "/clusters?format=json")[1])["cluster_statuses"]}
