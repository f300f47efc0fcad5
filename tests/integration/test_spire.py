"""With SPIRE: Envoy takes its own SVID and the bundles from the agent's socket, and without them nobody enters by certificate."""

import shutil
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import stack
import svids
from fakes.sds import SpireAgent

pytestmark = pytest.mark.envoy

ITEMS = {"items.get": {"match": {"method": "GET", "path": "/items/{id}"}, "effect": "read"}}
LOOPBACK = {"addresses": ["127.0.0.0/8", "::1/128"]}
GRANTED = {"plain": {"operations": {"items.get": {}}}}
BOT, GUEST = "spiffe://acme.example/agents/bot", "spiffe://guest.example/agents/guest"
DOOR, OTHER = "spiffe://acme.example/broker", "spiffe://acme.example/other"


@pytest.fixture
def place(request) -> Iterator[SimpleNamespace]:
    """A broker beside a SPIRE agent that is not there yet."""
    folder = stack.short_folder()
    acme, guest = stack.TestCA(), stack.TestCA()
    plain = stack.Upstream()
    agent = SpireAgent(
        folder / "agent.sock",
        {name: svids.svid(acme, name, dns=("localhost",)) for name in (OTHER, DOOR)},
        {"acme.example": acme.pem, "guest.example": guest.pem},
    )
    spire = {"socket": str(agent.socket), "svid": DOOR, **getattr(request, "param", {})}
    manifests = stack.write_manifests(
        folder / "manifests",
        stack.tool("plain", f"http://127.0.0.1:{plain.port}", ITEMS, upstream=LOOPBACK),
        stack.agent("bot", GRANTED, identity={"spiffe": BOT}),
        stack.agent("guest", GRANTED, identity={"spiffe": GUEST}),
        stack.agent("tokens", GRANTED),
        stack.platform(identity={"spire": {key: value for key, value in spire.items() if value}}),
    )
    found = SimpleNamespace(folder=folder, manifests=manifests, acme=acme, guest=guest, plain=plain, spire=agent)
    found.url = f"http://127.0.0.1:{plain.port}/items/a"
    found.call = lambda certificate, roots=acme: svids.call(found.broker, certificate, found.url, roots.pem)
    found.svid = lambda authority, *uris, **how: svids.files(folder / "certs", svids.svid(authority, *uris, **how))
    found.start = lambda: setattr(found, "broker", stack.Broker(manifests, folder / "state"))
    yield found
    found.broker.stop()
    agent.stop()
    plain.close()
    assert agent.faults == []
    shutil.rmtree(folder)


_AWAY = "no connection by certificate: TLS error: Secret is not supplied by SDS"


def _shown(place):
    """The certificate that the door shows, or None where it does not get that far."""
    try:
        with svids.connection(place.broker, place.svid(place.acme, BOT), place.acme.pem) as secure:
            return secure.getpeercert()
    except svids.Refused:
        return None


@pytest.mark.parametrize(
    ("place", "name"),
    [pytest.param({}, DOOR, id="by its SPIFFE ID"), pytest.param({"svid": None}, OTHER, id="the first that SPIRE has")],
    indirect=["place"],
)
def test_envoy_shows_its_own_svid_and_knows_agents_by_theirs(place, name):
    place.spire.start()
    place.start()
    assert ("URI", name) in _shown(place)["subjectAltName"]
    assert place.call(place.svid(place.acme, BOT)) == 200
    assert place.broker.decisions()[-1]["agent"] == {"name": "bot", "spiffe": BOT, "owner": "team-test", "oncall": "test-primary"}
    assert place.call(place.svid(place.guest, GUEST)) == 200
    assert place.call(place.svid(place.guest, BOT)) == "refused"
    assert place.call(place.svid(place.acme, GUEST)) == "refused"
    assert place.call(None) == "refused"
    assert set(place.spire.requested) == {DOOR if name == DOOR else "default", "ALL"}


def test_svid_and_bundles_rotate_without_a_restart_under_connections_which_go_on(place):
    place.spire.start()
    place.start()
    envoy = place.broker.child("envoy")
    new = stack.TestCA()
    by_old, by_new = place.svid(place.acme, BOT), place.svid(new, BOT)
    head = f"GET {place.url} HTTP/1.1\r\nhost: x"
    with svids.connection(place.broker, by_old, place.acme.pem) as before:
        assert svids.status(svids.ask(before, head)) == 200
        assert (place.call(by_old), place.call(by_new)) == (200, "refused")
        place.spire.bundles["acme.example"] = place.acme.pem + new.pem
        place.spire.rotate()
        stack.until(lambda: (place.call(by_old), place.call(by_new)) == (200, 200), 5, "both")
        place.spire.bundles["acme.example"] = new.pem
        place.spire.identities[DOOR] = svids.svid(new, DOOR, dns=("localhost",))
        place.spire.rotate()
        stack.until(lambda: (place.call(by_old, new), place.call(by_new, new)) == ("refused", 200), 5, "the new alone")
        assert place.call(by_new, place.acme) == "refused"  # by the agent: the door shows what the new root signed
        assert svids.status(svids.ask(before, head)) == 200
    assert place.broker.child("envoy") == envoy


@pytest.mark.parametrize(
    "absent",
    [
        pytest.param(lambda _: None, id="nobody listens at the socket"),
        pytest.param(lambda spire: (spire.identities.clear(), spire.start()), id="SPIRE has no entry for Envoy"),
        pytest.param(lambda spire: (spire.identities.pop(DOOR), spire.start()), id="SPIRE has another SVID only"),
        pytest.param(
            lambda spire: (setattr(spire, "plain_bundles", True), spire.start()), id="bundles come without their domains"
        ),
    ],
)
def test_without_secrets_the_door_is_closed_and_the_other_ways_in_are_open_until_they_come(place, absent):
    identities = dict(place.spire.identities)
    absent(place.spire)
    place.start()
    certificate = place.svid(place.acme, BOT)
    assert place.call(certificate) == "refused"
    with place.broker.direct("tokens") as client:
        assert client.get("/plain/items/a").status_code == 200
    [record] = stack.until(lambda: place.broker.decisions(verdict="deny"), 5, "a record")
    assert (record["code"], record["detail"]) == ("agent_unknown", _AWAY)
    place.spire.stop()
    place.spire.plain_bundles = False
    place.spire.identities.update(identities)
    place.spire.start()
    stack.until(lambda: place.call(certificate) == 200, 35, "SPIRE is there")


def test_when_spire_goes_away_what_it_gave_stays_in_force_also_through_a_reload(place):
    place.spire.start()
    place.start()
    certificate = place.svid(place.acme, BOT)
    assert place.call(certificate) == 200
    place.spire.stop()
    late = stack.Upstream(place.acme.issue(place.folder / "certs", "localhost"))
    stack.write_manifest(place.manifests, stack.tool("late", f"https://localhost:{late.port}", ITEMS))
    stack.until(lambda: len(_in_force(place)) == 2, 5, "the change is in force")
    assert place.call(certificate) == 200
    assert place.call(place.svid(place.guest, BOT)) == "refused"
    late.close()


def _in_force(place):
    return [r for r in place.broker.records() if r["event"] == "config" and r["detail"] == "configuration in force"]


def test_the_socket_may_be_named_while_the_broker_runs(place):
    place.spire.start()
    stack.write_manifest(place.manifests, stack.platform())
    place.start()
    certificate = place.svid(place.acme, BOT)
    assert place.call(certificate) == "refused"
    assert place.spire.requested == []
    stack.write_manifest(place.manifests, stack.platform(identity={"spire": {"socket": str(place.spire.socket)}}))
    stack.until(lambda: place.call(certificate) == 200, 5, "the socket is in force")


def test_what_spire_gives_stands_in_no_file_of_the_broker(place):
    place.spire.start()
    place.start()
    assert place.call(place.svid(place.acme, BOT)) == 200
    secret = "".join(place.spire.identities[DOOR][1].split("\n")[1:-2])[30:].encode()
    kept = [path for path in place.broker.state.rglob("*") if path.is_file()]
    assert kept
    assert not [path for path in kept if secret in path.read_bytes().replace(b"\\n", b"").replace(b"\n", b"")]
