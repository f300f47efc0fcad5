"""One broker with a few tools and agents, shared by the tests that only send calls."""

import shutil
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import stack
from redis_server import RedisServer

# A shell that starts the tests in the background makes them ignore SIGINT, and with them all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

_ended: list[object] = []


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    """Remember a process of tests (pytest-xdist) that ended before its last test."""
    if error:
        _ended.append(node)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tests that nobody ran are not only failures: `make test` tries no failure again then."""
    if _ended:
        session.exitstatus = pytest.ExitCode.INTERRUPTED


SECRET = "sk_live_upstream-secret-0123456789"

TITLE = {"type": "string", "maxLength": 20}
OPERATIONS = {
    "items.list": {"match": {"method": "GET", "path": "/items"}, "effect": "read"},
    "items.get": {"match": {"method": "GET", "path": "/items/{id}"}, "effect": "read"},
    "items.create": {
        "match": {"method": "POST", "path": "/items"},
        "effect": "write",
        "params": {
            "body": {"type": "object", "required": ["title"], "properties": {"title": TITLE}, "additionalProperties": False}
        },
    },
    "items.delete": {"match": {"method": "DELETE", "path": "/items/{id}"}, "effect": "destructive"},
    "items.upload": {"match": {"method": "PUT", "path": "/items/{id}"}, "effect": "write", "max_body": 1000},
}
QUERY = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"], "additionalProperties": False}
PAGES = {"search_pages": {"effect": "read", "params": {"arguments": QUERY}}, "delete_page": {"effect": "destructive"}}
LOOPBACK = {"addresses": ["127.0.0.0/8", "::1/128"]}
STATIC = {"issuer": "static", "secret": {"env": "UPSTREAM_SECRET"}}


@pytest.fixture(scope="session")
def world() -> Iterator[SimpleNamespace]:
    folder = stack.short_folder()
    ca = stack.TestCA()
    (folder / "manifests").mkdir()
    (folder / "manifests" / "ca.pem").write_text(ca.pem)
    spiffe = stack.TestCA()
    (folder / "manifests" / "spiffe.pem").write_text(spiffe.pem)
    plain = stack.Upstream()
    secure = stack.Upstream(ca.issue(folder / "certs", "localhost"))
    other = stack.Upstream(ca.issue(folder / "certs", "127.0.0.1"))
    wiki = stack.Upstream()
    inward = stack.Upstream(ca.issue(folder / "certs", "localhost"))
    foreign = stack.Upstream(stack.TestCA().issue(folder / "certs", "localhost"))
    misnamed = stack.Upstream(ca.issue(folder / "certs", "elsewhere.example"))
    upstreams = (plain, secure, other, wiki, inward, foreign, misnamed)
    trusted = {"ca": "ca.pem", **LOOPBACK}
    granted = {"items.list": {}, "items.get": {"params": {"path": {"properties": {"id": {"pattern": "^[a-z0-9]+$"}}}}}}
    writer = {**granted, "items.create": {}, "items.upload": {}}
    stack.write_manifests(
        folder / "manifests",
        stack.platform(identity={"trust_bundles": {"acme.example": {"file": "spiffe.pem"}}}),
        stack.tool("plain", f"http://127.0.0.1:{plain.port}", OPERATIONS, upstream=LOOPBACK, credential=STATIC),
        stack.tool("secure", f"https://localhost:{secure.port}", OPERATIONS, upstream=trusted, credential=STATIC),
        stack.tool("other", f"https://127.0.0.1:{other.port}/v1", OPERATIONS, upstream=trusted),
        stack.tool("wiki", f"http://127.0.0.1:{wiki.port}/mcp", PAGES, protocol="mcp", upstream=LOOPBACK),
        stack.tool("inward", f"https://localhost:{inward.port}", OPERATIONS, upstream={"ca": "ca.pem"}, credential=STATIC),
        stack.tool("foreign", f"https://localhost:{foreign.port}", OPERATIONS, upstream=trusted, credential=STATIC),
        stack.tool("misnamed", f"https://localhost:{misnamed.port}", OPERATIONS, upstream=trusted, credential=STATIC),
        stack.tool("far", "https://far.test:8443", OPERATIONS, credential=STATIC),
        stack.agent("reader", {name: {"operations": granted} for name in ("plain", "secure")}),
        stack.agent(
            "writer",
            {
                **{name: {"operations": writer} for name in ("plain", "secure", "other", "far", "inward", "foreign", "misnamed")},
                "wiki": {"operations": {"search_pages": {}}},
            },
        ),
        stack.agent("nobody", {}),
        stack.agent("dropout", {}, mode="shadow", shadow_until="2099-01-31"),
        stack.agent("trainee", {"plain": {"operations": granted}}, mode="shadow", shadow_until="2099-01-31"),
        stack.agent("mutual", {"secure": {"operations": granted}}, identity={"spiffe": "spiffe://acme.example/agents/mutual"}),
    )
    broker = stack.Broker(folder / "manifests", folder / "state", {"UPSTREAM_SECRET": SECRET})
    certificate = spiffe.issue(folder / "certs", uri="spiffe://acme.example/agents/mutual")
    stranger = spiffe.issue(folder / "certs", uri="spiffe://acme.example/agents/stranger")
    forged = stack.TestCA().issue(folder / "certs", uri="spiffe://acme.example/agents/mutual")
    yield SimpleNamespace(
        broker=broker,
        plain=plain,
        secure=secure,
        other=other,
        wiki=wiki,
        inward=inward,
        foreign=foreign,
        misnamed=misnamed,
        upstreams=upstreams,
        folder=folder,
        ca=ca,
        svid=certificate,
        stranger=stranger,
        forged=forged,
        secret=SECRET,
    )
    broker.stop()
    for upstream in upstreams:
        upstream.close()
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> None:
    if "world" in request.fixturenames:
        found = request.getfixturevalue("world")
        for upstream in found.upstreams:
            upstream.seen.clear()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.close()
