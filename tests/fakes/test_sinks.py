"""The stand-ins for sinks of alerts refuse what PagerDuty and a careful receiver of webhooks refuse."""

import base64
import hashlib
import hmac
import json

import pytest
from fakes import pagerduty, webhook
from fakes.serving import Refused

PAYLOAD = {"summary": "s", "source": "host", "severity": "critical", "timestamp": "2015-07-17T08:42:58.315+0000"}
EVENT = {"routing_key": pagerduty.KEY, "event_action": "trigger", "dedup_key": "k", "payload": PAYLOAD}
JSON = {"content-type": "application/json"}


def enqueue(event, headers=JSON, fake=None):
    body = event if isinstance(event, bytes) else json.dumps(event).encode()
    return (fake or pagerduty.PagerDuty()).answer("POST", "/v2/enqueue", headers, body)


def test_pagerduty_takes_the_events_of_its_documentation_and_keeps_incidents():
    fake = pagerduty.PagerDuty()
    assert enqueue(EVENT, fake=fake) == (202, {"status": "success", "message": "Event processed", "dedup_key": "k"})
    enqueue(EVENT, fake=fake)
    assert [(each.open, len(each.events)) for each in fake.of("k")] == [(True, 2)]
    end = {"routing_key": pagerduty.KEY, "event_action": "resolve", "dedup_key": "k"}
    enqueue(end, fake=fake)
    enqueue(end, fake=fake)
    assert ([each.open for each in fake.of("k")], fake.dropped["k"]) == ([False], 1)
    enqueue(EVENT, fake=fake)
    assert [each.open for each in fake.of("k")] == [False, True]


@pytest.mark.parametrize(
    "event",
    [
        pytest.param(b"{", id="no JSON"),
        pytest.param({**EVENT, "routing_key": "short"}, id="a routing key of another length"),
        pytest.param({**EVENT, "routing_key": "x" * 32}, id="a routing key of nobody"),
        pytest.param({**EVENT, "event_action": "open"}, id="an unknown action"),
        pytest.param({**EVENT, "dedup_key": "k" * 256}, id="a long dedup key"),
        pytest.param({**EVENT, "dedup_key": 7}, id="a dedup key that is no text"),
        pytest.param({**EVENT, "severity": "critical"}, id="an unknown field"),
        pytest.param({**EVENT, "payload": {**PAYLOAD, "host": "h"}}, id="an unknown field of the payload"),
        pytest.param({**EVENT, "payload": {**PAYLOAD, "severity": "high"}}, id="another scale of severity"),
        pytest.param({**EVENT, "payload": {**PAYLOAD, "summary": "s" * 1025}}, id="a long summary"),
        pytest.param({**EVENT, "payload": {**PAYLOAD, "timestamp": "yesterday"}}, id="a time that is none"),
        pytest.param({**EVENT, "payload": {**PAYLOAD, "custom_details": ["d"]}}, id="details that are no object"),
        pytest.param({name: EVENT[name] for name in EVENT if name != "payload"}, id="a trigger without a payload"),
        pytest.param({"routing_key": pagerduty.KEY, "event_action": "resolve"}, id="a resolve of nothing"),
    ],
)
def test_pagerduty_refuses(event):
    with pytest.raises(Refused) as refused:
        enqueue(event)
    assert (refused.value.status, refused.value.body["status"]) == (400, "invalid event")
    assert refused.value.body["errors"]


def signed(fake, body, identity="msg-1", at=None, key=webhook.KEY):
    time = str(int(fake.now if at is None else at))
    mac = base64.b64encode(hmac.new(key, f"{identity}.{time}.".encode() + body, hashlib.sha256).digest()).decode()
    return {**JSON, "webhook-id": identity, "webhook-timestamp": time, "webhook-signature": f"v1,{mac}"}


BODY = b'{"type": "broker.alert.triggered", "timestamp": "2026-01-01T00:00:00Z", "data": {}}'


def test_a_receiver_takes_what_is_signed_once():
    fake = webhook.Webhook()
    for _ in range(2):
        assert fake.answer("POST", "/alerts", signed(fake, BODY), BODY) == (204, None)
    assert len(fake.payloads) == 1


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(lambda fake: signed(fake, BODY, key=b"another"), id="signed with another key"),
        pytest.param(lambda fake: signed(fake, BODY + b" "), id="signed for another body"),
        pytest.param(lambda fake: signed(fake, BODY) | {"webhook-id": "msg-2"}, id="signed for another ID"),
        pytest.param(lambda fake: signed(fake, BODY, at=fake.now - 301), id="signed long ago"),
        pytest.param(lambda fake: signed(fake, BODY) | {"webhook-timestamp": ""}, id="without a time"),
        pytest.param(lambda fake: signed(fake, BODY, identity="a.b"), id="with a full stop in the ID"),
        pytest.param(lambda _: JSON, id="without a signature"),
    ],
)
def test_a_receiver_refuses_what_is(headers):
    fake = webhook.Webhook()
    with pytest.raises(Refused):
        fake.answer("POST", "/alerts", headers(fake), BODY)
