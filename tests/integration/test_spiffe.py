"""Agents by X.509-SVID: whose word counts for which name, while roots rotate, and until when."""

import re
import shutil
import socket
import ssl
from collections.abc import Iterator
from types import SimpleNamespace

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


def _tunnel_status(place, certificate):
    target = f"localhost:{place.secure.port}"
    try:
        with svids.connection(place.broker, certificate) as secure:
            return svids.status(svids.ask(secure, f"CONNECT {target} HTTP/1.1\r\nhost: {target}"))
    except svids.Refused:
        return "refused"
