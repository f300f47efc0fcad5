"""A tool that knows writes again by a header sees one key for one write, however often it is tried. With a real Envoy."""

import shutil
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import stack

pytestmark = pytest.mark.envoy

OPERATIONS = {
    "refunds.create": {
        "match": {"method": "POST", "path": "/refunds"},
        "effect": "write",
        "idempotency": "idempotency-key",
        "params": {"body": {"type": "object", "properties": {"charge": {"type": "string"}, "amount": {"type": "integer"}}}},
    },
    "refunds.list": {"match": {"method": "GET", "path": "/refunds"}, "effect": "read"},
}


@pytest.fixture(scope="module")
def place() -> Iterator[SimpleNamespace]:
    folder, upstream = stack.short_folder(), stack.Upstream()
    endpoint, granted = f"http://127.0.0.1:{upstream.port}", {"pay": {"operations": {name: {} for name in OPERATIONS}}}
    manifests = stack.write_manifests(
        folder / "manifests",
        stack.tool("pay", endpoint, OPERATIONS, upstream={"addresses": ["127.0.0.0/8"]}),
        *(stack.agent(name, granted) for name in ("one", "other")),
    )
    broker = stack.Broker(manifests, folder / "state")
    yield SimpleNamespace(broker=broker, upstream=upstream, url=f"{endpoint}/refunds")
    broker.stop()
    upstream.close()
    shutil.rmtree(folder)


def _key(place: SimpleNamespace, agent: str = "one", run: str = "r-1", status: int = 200, amount: int = 5, **headers: str) -> str:
    """The key that the tool saw of a refund."""
    place.upstream.answer = lambda _: (status, {}, b"{}")
    named = {"x-run-id": run} if run else {}
    with place.broker.client(agent) as client:
        answer = client.post(place.url, json={"charge": "ch_1", "amount": amount}, headers={**named, **headers})
    assert answer.status_code == status
    keys = [value for name, value in place.upstream.seen[-1].headers if name.lower() == "idempotency-key"]
    assert len(keys) == 1
    return keys[0]


def test_a_write_that_is_tried_again_has_the_same_key_and_any_other_another(place):
    key = _key(place, status=503)
    assert _key(place) == key
    others = [_key(place, amount=6), _key(place, run="r-2"), _key(place, agent="other"), _key(place, run="")]
    assert len({key, *others}) == 5
    assert _key(place, run="") == others[-1]
    place.broker.stop()
    place.broker.start()
    assert _key(place) == key


def test_the_agents_own_key_is_what_the_tool_sees(place):
    assert _key(place, **{"Idempotency-Key": "mine"}) == "mine"


def test_a_read_has_none(place):
    with place.broker.client("one") as client:
        assert client.get(place.url).status_code == 200
    assert place.upstream.seen[-1].header("idempotency-key") is None
