"""Agents by X.509-SVID: whose word counts for which name, while roots rotate, and until when."""

import re
import shutil
import ssl
import time
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import pytest
import stack
import svids

pytestmark = pytest.mark.envoy

ITEMS = {"items.get": {"match": {"method": "GET", "path": "/items/{id}"}, "effect": "read"}}
LOOPBACK = {"addresses": ["127.0.0.0/8", "::1/128"]}
GRANTED = {name: {"operations": {"items.get": {}}} for name in ("plain", "secure")}
BOT, GUEST = "spiffe://acme.example/agents/bot", "spiffe://guest.example/agents/guest"


@pytest.fixture(scope="module")
def place() -> Iterator[SimpleNamespace]:
    folder = stack.short_folder()
    acme, guest, ca = stack.TestCA(), stack.TestCA(), stack.TestCA()
    plain, secure = stack.Upstream(), stack.Upstream(ca.issue(folder / "certs", "localhost"))
    manifests = stack.write_manifests(
        folder / "manifests",
        stack.tool("plain", f"http://127.0.0.1:{plain.port}", ITEMS, upstream=LOOPBACK),
        stack.tool("secure", f"https://localhost:{secure.port}", ITEMS, upstream={"ca": "ca.pem", **LOOPBACK}),
        stack.agent("bot", GRANTED, identity={"spiffe": BOT}),
        stack.agent("guest", GRANTED, identity={"spiffe": GUEST}),
        stack.platform(identity={"trust_bundles": {d: {"file": f"{d}.pem"} for d in ("acme.example", "guest.example")}}),
    )
    for name, text in (("ca", ca.pem), ("acme.example", acme.pem), ("guest.example", guest.pem)):
        (manifests / f"{name}.pem").write_text(text)
    broker = stack.Broker(manifests, folder / "state")
    url = f"http://127.0.0.1:{plain.port}/items/a"
    yield SimpleNamespace(
        folder=folder, manifests=manifests, broker=broker, acme=acme, guest=guest, plain=plain, secure=secure, url=url
    )
    broker.stop()
    for upstream in (plain, secure):
        upstream.close()
    shutil.rmtree(folder)


def _svid(place, authority, *uris, **how):
    return svids.files(place.folder / "certs", svids.svid(authority, *uris, **how))


@pytest.mark.parametrize(
    ("signer", "uris", "how", "answer"),
    [
        pytest.param("acme", [BOT], {}, 200, id="a name of its own domain passes"),
        pytest.param("guest", [GUEST], {}, 200, id="so does one of the other domain"),
        pytest.param("guest", [BOT], {}, "refused", id="a domain's root vouches for no name of another domain"),
        pytest.param("acme", [GUEST], {}, "refused", id="nor the other way round"),
        pytest.param("acme", ["spiffe://third.example/agents/bot"], {}, "refused", id="a domain without a bundle is unknown"),
        pytest.param("acme", ["spiffe://acme.example/agents/other"], {}, 407, id="a name that no manifest has is nobody's"),
        pytest.param("acme", [BOT], {"lasts": -5}, "refused", id="an SVID that has ended"),
        pytest.param("acme", [BOT], {"began": 600}, "refused", id="an SVID that has not begun"),
        pytest.param("acme", [], {}, "refused", id="no name at all"),
        pytest.param("acme", [], {"dns": ("bot.acme.example",)}, "refused", id="a DNS name alone"),
        pytest.param("acme", ["https://acme.example/agents/bot"], {}, "refused", id="a URI that is no SPIFFE ID"),
        pytest.param("acme", [BOT], {"authority_itself": True, "signs": True}, "refused", id="an authority is no workload"),
        pytest.param("acme", [BOT], {"authority_itself": True}, "refused", id="nor one that may not sign"),
        pytest.param("acme", [BOT], {"signs": True}, "refused", id="a leaf that may sign certificates"),
        pytest.param("acme", [BOT, "spiffe://acme.example/agents/other"], {}, 200, id="of several names the first counts"),
        pytest.param("acme", ["spiffe://acme.example/agents/other", BOT], {}, 407, id="and only the first"),
        pytest.param("guest", [BOT, GUEST], {}, "refused", id="a foreign name is not carried in by one of its own after it"),
        pytest.param("guest", [GUEST, BOT], {}, 200, id="nor before it, which is who it is then"),
    ],
)
def test_each_bundle_vouches_for_its_own_domain_and_for_workloads_only(place, signer, uris, how, answer):
    certificate = _svid(place, getattr(place, signer), *uris, **how)
    assert svids.call(place.broker, certificate, place.url) == answer
    if answer == 200:
        assert place.broker.decisions(verdict="allow")[-1]["agent"]["spiffe"] == uris[0]
    assert _tunnel_status(place, certificate) == answer


@pytest.mark.parametrize(
    ("signer", "how", "why"),
    [
        pytest.param("acme", {"lasts": -5}, "certificate has expired", id="it has ended"),
        pytest.param("guest", {}, "unable to get local issuer certificate", id="another domain's root"),
        pytest.param(None, {}, "PEER_DID_NOT_RETURN_A_CERTIFICATE", id="none"),
    ],
)
def test_a_refused_certificate_is_recorded_with_the_reason(place, signer, how, why):
    certificate = _svid(place, getattr(place, signer), BOT, **how) if signer else None
    before = len(place.broker.records())
    assert svids.call(place.broker, certificate, place.url) == "refused"

    def recorded():
        return [r for r in place.broker.records()[before:] if why in (r["detail"] or "")]

    [record] = stack.until(recorded, 5, "a record")
    assert (record["event"], record["verdict"], record["code"]) == ("decision", "deny", "agent_unknown")
    assert record["detail"].startswith("no connection by certificate: ")


def _tunnel_status(place, certificate):
    target = f"localhost:{place.secure.port}"
    try:
        with svids.connection(place.broker, certificate) as secure:
            return svids.status(svids.ask(secure, f"CONNECT {target} HTTP/1.1\r\nhost: {target}"))
    except svids.Refused:
        return "refused"


@pytest.fixture
def rotating(place) -> Iterator[SimpleNamespace]:
    """A bundle that a test may replace, in one step as deployments do; it is what it was afterwards."""
    path = place.manifests / "acme.example.pem"
    new = stack.TestCA()
    by_old, by_new = _svid(place, place.acme, BOT), _svid(place, new, BOT)

    def replace(text: str) -> None:
        (place.folder / "draft.pem").write_text(text)
        (place.folder / "draft.pem").rename(path)

    def answers() -> tuple[int | str, int | str]:
        return svids.call(place.broker, by_old, place.url), svids.call(place.broker, by_new, place.url)

    yield SimpleNamespace(new=new, by_old=by_old, by_new=by_new, replace=replace, answers=answers, path=path)
    replace(place.acme.pem)
    stack.until(lambda: answers() == (200, "refused"), 5, "the first root is back")


def test_a_bundle_rotates_under_open_connections_which_go_on(place, rotating):
    assert rotating.answers() == (200, "refused")
    children = {name: place.broker.child(name) for name in ("envoy", "processor")}
    took = []
    with _client(place, rotating.by_old) as before:
        assert _inside(place, before) == 200
        for bundle, expected in ((place.acme.pem + rotating.new.pem, (200, 200)), (rotating.new.pem, ("refused", 200))):
            rotating.replace(bundle)
            since = time.monotonic()
            stack.until(lambda wanted=expected: rotating.answers() == wanted, 5, f"{expected}")
            took.append(time.monotonic() - since)
            assert _inside(place, before) == 200
    assert min(took) < 1.5, "whatever else the machine did meanwhile"
    assert {name: place.broker.child(name) for name in children} == children


@pytest.mark.parametrize(
    ("content", "code"),
    [
        pytest.param(lambda _: "not a certificate", "pem_invalid", id="garbage"),
        pytest.param(lambda _: "", "pem_invalid", id="nothing"),
        pytest.param(lambda new: new.pem + new.pem[:200], "pem_invalid", id="the second half is not written yet"),
        pytest.param(lambda new: new.pem + new.pem.replace("M", "!", 9), "pem_invalid", id="one good, one broken"),
        pytest.param(None, "file_unreadable", id="it is gone"),
    ],
)
def test_a_broken_bundle_leaves_the_one_before_in_force_and_is_reported(place, rotating, content, code):
    before = len(place.broker.log())
    if content:
        rotating.replace(content(rotating.new))
    else:
        rotating.path.unlink()
    stack.until(lambda: "stays in force" in place.broker.log()[before:], 10, "it is reported")
    assert re.search(rf"platform-test.yaml:\d+:\d+: .*{code}.*acme.example.pem", place.broker.log()[before:])
    assert rotating.answers() == (200, "refused")
    refused = [r["detail"] for r in place.broker.records() if r["event"] == "config"][-1]
    assert refused.startswith("refused: 1 error in the manifests, the first: platform-test.yaml")


def test_what_is_open_under_an_svid_passes_nothing_once_that_has_ended(place):
    certificate = _svid(place, place.acme, BOT, lasts=4)
    ends = time.monotonic() + 4
    with _client(place, certificate) as client:
        assert (_inside(place, client), client.get(place.url).status_code) == (200, 200)
        stack.until(lambda: time.monotonic() > ends, 10)
        assert (_inside(place, client), client.get(place.url).status_code) == (401, 407)
    denied = place.broker.decisions(verdict="deny")[-2:]
    assert [(r["code"], "has ended" in r["detail"]) for r in denied] == [("agent_unknown", True)] * 2
    assert svids.call(place.broker, certificate, place.url) == "refused"


def _client(place, certificate):
    """An unchanged client; what it opened it keeps, and a tunnel that was cut it would have to open again."""
    context = ssl.create_default_context(cafile=place.broker.ca)
    outer = ssl.create_default_context(cafile=place.broker.ca)
    outer.load_cert_chain(*certificate)
    proxy = httpx.Proxy(f"https://localhost:{place.broker.proxy[1]}", ssl_context=outer)
    return httpx.Client(proxy=proxy, verify=context, timeout=10)


def _inside(place, client):
    return client.get(f"https://localhost:{place.secure.port}/items/a").status_code
