"""Alerts: who hears of what, and that it arrives, once, whatever state the sinks are in. HTTP, files and processes are real."""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest
from cryptography.fernet import Fernet
from fakes.pagerduty import KEY, PagerDuty
from fakes.serving import served
from fakes.webhook import SECRET, Webhook
from hypothesis import given
from hypothesis import strategies as st

from broker.containment import alerts as queue
from broker.containment.alerts import Alert, Alerts, routed
from broker.policy.containment import PAGERDUTY, Alerting, PagerDutySink, Route, Severity, WebhookSink

NOW = 1_800_000_000.0  # a full minute
LOW, MEDIUM, HIGH = Severity
NIGHT_KEY = "N1GHTSH1FTKEY0000000000000000000"
BOT = {"name": "bot", "spiffe": "spiffe://acme.example/bot", "owner": "team-pay", "oncall": "night"}
REVOKED = Alert("honeytoken", HIGH, "The agent bot touched a decoy and is off.", "bot honeytoken", BOT, ("d-1", "d-2"), {"n": 1})
RELEASED = Alert("release", LOW, "Ann released the agent bot.", REVOKED.dedup_key, BOT, resolves=True)


@dataclass
class Clock:
    wall: float = NOW
    steady: float = NOW

    def pass_(self, seconds):
        self.wall += seconds
        self.steady += seconds


class Desk:
    """Two sinks and a queue for them. `tell` is a try of all that is due, as many at once as may be."""

    def __init__(self, folder, pager, hook):
        self.folder, self.pager, self.hook, self.clock = folder / "alerts", pager, hook, Clock()
        self.seal = Fernet(Fernet.generate_key())
        self.sinks = {
            PAGERDUTY: PagerDutySink(pager.enqueue, {"env": "PD_KEY"}, {"night": {"env": "PD_NIGHT"}}),
            "chat": WebhookSink(hook.inbox, {"env": "CHAT_SECRET"}),
        }
        self.alerting = Alerting((Route(PAGERDUTY, HIGH), Route("chat")), self.sinks)
        self.open()

    def open(self):
        self.alerts = Alerts(
            self.folder,
            self.seal,
            lambda: self.alerting,
            source="broker-1",
            now=lambda: self.clock.wall,
            steady=lambda: self.clock.steady,
            jitter=lambda: 0.5,
        )

    def set(self, **changes):
        self.alerting = replace(self.alerting, **changes)

    def send(self, *alerts):
        for alert in alerts:
            self.alerts.send(alert)

    def tell(self, after=0.0):
        self.clock.pass_(after)
        self.pager.now = self.hook.now = self.clock.wall
        tries = -1
        while tries != (tries := self.alerts.delivered.total() + self.alerts.failed.total()):
            asyncio.run(self.alerts.attempt())

    def tell_for(self, seconds, step):
        for _ in range(int(seconds / step)):
            self.tell(after=step)

    @property
    def files(self):
        return sorted(self.folder.iterdir())

    def paged(self, key=NIGHT_KEY, dedup_key=REVOKED.dedup_key):
        """Of the incidents of a dedup key: whether each is open, and how many triggers it had."""
        return [(each.open, len(each.events)) for each in self.pager.of(dedup_key, key)]

    def chatted(self):
        return [(each["type"].rpartition(".")[2], each["data"]["dedup_key"]) for each in self.hook.payloads]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    for name, value in {"PD_KEY": KEY, "PD_NIGHT": NIGHT_KEY, "CHAT_SECRET": SECRET}.items():
        monkeypatch.setenv(name, value)
    with served(PagerDuty(KEY, NIGHT_KEY)) as pager, served(Webhook()) as hook:
        yield Desk(tmp_path, pager, hook)


def low(number=0, **more):
    return Alert("probing", LOW, "The agent bot probes.", f"low-{number}", BOT, **more)


def high(number=0):
    return replace(REVOKED, dedup_key=f"high-{number}")


# Who hears of it.

ROUTES = (
    Route("night", HIGH, oncall="night"),
    Route("pay", MEDIUM, team="team-pay"),
    Route("decoys", kind="honeytoken"),
    Route("bot", agent="bot"),
    Route("severe", HIGH),
)


@pytest.mark.parametrize(
    ("changes", "sinks"),
    [
        pytest.param({}, ("night",), id="the first route that fits counts"),
        pytest.param({"severity": MEDIUM}, ("pay",), id="a route takes what is as severe as it says"),
        pytest.param({"severity": LOW}, ("decoys",), id="a route takes nothing less severe"),
        pytest.param({"severity": LOW, "kind": "probing"}, ("bot",), id="a kind is another's"),
        pytest.param({"agent": BOT | {"oncall": "day"}}, ("pay",), id="an on-call contact is another's"),
        pytest.param({"agent": BOT | {"owner": "team-x", "oncall": ""}, "kind": "x"}, ("bot",), id="a team is another's"),
        pytest.param({"agent": {}, "kind": "ledger"}, ("severe",), id="an alert about no agent passes routes about some"),
        pytest.param({"agent": {}, "kind": "ledger", "severity": LOW}, (), id="without a route nobody is told"),
        pytest.param(
            {"resolves": True, "severity": LOW, "kind": "release"},
            ("night", "pay", "decoys", "bot", "severe"),
            id="the end of an incident goes wherever it may be open",
        ),
        pytest.param(
            {"resolves": True, "agent": BOT | {"owner": "team-x", "oncall": "day"}},
            ("decoys", "bot", "severe"),
            id="but to nobody who hears of other agents",
        ),
    ],
)
def test_routes(changes, sinks):
    assert routed(replace(REVOKED, **changes), Alerting(ROUTES)) == sinks


words = st.sampled_from(["", "a", "b"])
routes = st.builds(Route, st.sampled_from(["x", "y", "z"]), st.sampled_from(Severity), words, words, words, words)
agents = st.fixed_dictionaries({"name": words, "owner": words, "oncall": words})
alerts = st.builds(Alert, words, st.sampled_from(Severity), st.just("s"), st.just("k"), agents)


@given(st.lists(routes, max_size=5), alerts, alerts)
def test_who_heard_of_an_incident_hears_of_its_end_and_more_routes_never_take_an_alert_away(given_routes, alert, other):
    heard = routed(alert, Alerting(tuple(given_routes)))
    assert len(heard) <= 1
    assert set(heard) <= {each.to for each in given_routes}
    end = replace(other, agent=alert.agent, resolves=True)
    assert set(heard) <= set(routed(end, Alerting(tuple(given_routes))))
    assert routed(alert, Alerting((*given_routes, Route("last")))) == (heard or ("last",))


def test_what_no_route_fits_leaves_nothing_behind(desk):
    desk.set(routes=(Route(PAGERDUTY, HIGH),))
    desk.send(low())
    assert (len(desk.alerts), desk.files) == (0, [])


# What they are told.


def test_pagerduty_is_told_all_that_is_known(desk):
    desk.send(REVOKED)
    desk.tell()
    assert desk.pager.accepted == [
        {
            "routing_key": NIGHT_KEY,
            "event_action": "trigger",
            "dedup_key": "bot honeytoken",
            "client": "Envoy tool broker",
            "payload": {
                "summary": REVOKED.summary,
                "source": "broker-1",
                "severity": "critical",
                "timestamp": "2027-01-15T08:00:00+00:00",
                "component": "bot",
                "group": "team-pay",
                "class": "honeytoken",
                "custom_details": {"agent": BOT, "decision_ids": ["d-1", "d-2"], "n": 1},
            },
        }
    ]
    assert (len(desk.alerts), desk.files, desk.alerts.delivered) == (0, [], {PAGERDUTY: 1})


def test_a_release_resolves_the_incident_with_the_key_that_opened_it(desk):
    desk.send(REVOKED)
    desk.tell()
    desk.send(RELEASED)
    desk.tell()
    assert desk.pager.accepted[1] == {"routing_key": NIGHT_KEY, "event_action": "resolve", "dedup_key": "bot honeytoken"}
    assert desk.paged() == [(False, 1)]


@pytest.mark.parametrize(("severity", "word"), [(LOW, "info"), (MEDIUM, "warning"), (HIGH, "critical")])
def test_severities_in_pagerdutys_words(desk, severity, word):
    desk.set(routes=(Route(PAGERDUTY),))
    desk.send(replace(REVOKED, severity=severity))
    desk.tell()
    assert desk.pager.accepted[0]["payload"]["severity"] == word


def test_an_agent_whose_on_call_contact_has_no_key_of_its_own_pages_with_the_default(desk):
    desk.send(replace(REVOKED, agent=BOT | {"oncall": "day"}), replace(high(), agent={}))
    desk.tell()
    assert {event["routing_key"] for event in desk.pager.accepted} == {KEY}


@pytest.mark.parametrize(
    "alert",
    [
        pytest.param(replace(REVOKED, summary="s" * 2000), id="a long summary"),
        pytest.param(replace(REVOKED, summary=""), id="no summary"),
        pytest.param(replace(REVOKED, dedup_key="k" * 300), id="a long dedup key"),
        pytest.param(replace(REVOKED, details={"much": "x" * 1_000_000}, decision_ids=("d",) * 10_000), id="more than fits"),
        pytest.param(replace(REVOKED, summary="\ud800", details={"\ud800": ["\udfff"]}), id="what is no Unicode"),
        pytest.param(replace(REVOKED, details={"n": float("nan"), "i": 1 << 70, ("a",): 1, "set": {1}}), id="what is no JSON"),
        pytest.param(replace(REVOKED, agent={}), id="no agent"),
    ],
)
def test_whatever_an_alert_holds_both_sinks_take_it(desk, alert):
    desk.send(alert)
    desk.set(routes=(Route("chat"),))
    desk.send(alert)
    desk.tell()
    assert desk.alerts.delivered == {PAGERDUTY: 1, "chat": 1}
    assert len(desk.pager.accepted[0]["payload"]["custom_details"]["decision_ids"]) <= 100


def test_a_long_dedup_key_is_the_same_incident_every_time(desk):
    long, end = (replace(each, dedup_key="k" * 300) for each in (REVOKED, RELEASED))
    desk.send(long, end)
    desk.tell()
    desk.tell()
    assert [[each.open for each in incidents] for incidents in desk.pager.incidents.values()] == [[False]]


def test_a_webhook_is_told_all_that_is_known_signed(desk):
    desk.send(low(details={"hosts": ["a", "b"]}, decision_ids=("d-1",)))
    desk.tell()
    assert desk.hook.payloads == [
        {
            "type": "broker.alert.triggered",
            "timestamp": "2027-01-15T08:00:00+00:00",
            "data": {
                "kind": "probing",
                "severity": "low",
                "dedup_key": "low-0",
                "summary": "The agent bot probes.",
                "source": "broker-1",
                "agent": BOT,
                "decision_ids": ["d-1"],
                "details": {"hosts": ["a", "b"]},
            },
        }
    ]


def test_a_webhook_is_signed_anew_for_each_try_under_one_id(desk):
    heads = []
    answer = desk.hook.answer
    desk.hook.answer = lambda method, path, headers, body: heads.append(headers) or answer(method, path, headers, body)
    desk.send(low())
    desk.clock.wall += 1000  # the clock was set: the receiver finds it too far off
    asyncio.run(desk.alerts.attempt())
    desk.clock.wall -= 1000
    desk.tell(after=1)
    assert len(desk.hook.payloads) == 1
    assert len({head["webhook-id"] for head in heads}) == 1
    assert len({head["webhook-timestamp"] for head in heads}) == 2


# That it arrives, once.


def instead(status, **headers):
    return lambda desk, _: setattr(desk.pager, "instead", (status, headers, b"{}"))


def refused_port(desk, _):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        move(desk, f"http://127.0.0.1:{free.getsockname()[1]}/v2/enqueue")


def unresolvable(desk, monkeypatch):
    look_up = socket.getaddrinfo

    def fail(host, *others, **more):
        if host in ("nowhere.test", b"nowhere.test"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(host, *others, **more)

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    move(desk, "http://nowhere.test/v2/enqueue")


def hanging(desk, monkeypatch):
    monkeypatch.setattr(queue, "_TIMEOUT_S", 0.2)
    desk.pager.hangs.set()


def unset(desk, monkeypatch):
    monkeypatch.delenv("PD_NIGHT")


def move(desk, url):
    desk.set(sinks={**desk.sinks, PAGERDUTY: replace(desk.sinks[PAGERDUTY], url=url)})


FAULTS = [
    pytest.param(instead(500), id="answers 500"),
    pytest.param(instead(503), id="is down for maintenance"),
    pytest.param(instead(429), id="has had enough"),
    pytest.param(instead(408), id="is slow to read"),
    pytest.param(instead(200), id="is somebody else, who answers 200"),
    pytest.param(instead(302, location="http://127.0.0.1:9/"), id="sends elsewhere"),
    pytest.param(refused_port, id="refuses connections"),
    pytest.param(unresolvable, id="has a name that nobody knows"),
    pytest.param(hanging, id="hangs"),
    pytest.param(unset, id="has no key in the environment"),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_an_alert_waits_while_pagerduty(desk, monkeypatch, caplog, fault):
    with monkeypatch.context() as patched:
        fault(desk, patched)
        desk.send(REVOKED)
        desk.send(low())
        desk.tell()
        assert (desk.paged(), desk.chatted()) == ([], [("triggered", "low-0")])
        assert (len(desk.alerts), desk.alerts.failed) == (1, {PAGERDUTY: 1})
        desk.pager.instead = None
        desk.pager.hangs.clear()
    desk.set(sinks=desk.sinks)
    desk.tell(after=0.9)
    assert desk.paged() == []
    desk.tell(after=0.1)
    desk.tell(after=400)
    assert (desk.paged(), len(desk.alerts), desk.files) == ([(True, 1)], 0, [])
    assert "pagerduty is not told yet, and tried again: " in caplog.text


def test_sending_waits_for_nothing(desk):
    desk.pager.hangs.set()
    took = []
    for number in range(50):
        began = time.perf_counter()
        desk.send(high(number))
        took.append(time.perf_counter() - began)
    assert sorted(took)[25] < 0.005
    assert len(desk.files) == 50


@asynccontextmanager
async def running(desk):
    background = asyncio.create_task(desk.alerts.run())
    try:
        yield
    finally:
        background.cancel()
        await asyncio.gather(background, return_exceptions=True)


async def until(condition, what):
    async with asyncio.timeout(8):
        while not condition():  # noqa: ASYNC110 - the servers are threads
            await asyncio.sleep(0.01)
    assert condition(), what


def test_that_a_sink_is_away_is_logged_once_until_it_is_told_again(desk, monkeypatch, caplog):
    unset(desk, monkeypatch)
    for number in range(3):
        desk.send(high(number))
        desk.tell()
    assert caplog.text.count("pagerduty is not told yet") == 1


def test_a_sink_that_hangs_holds_up_no_other(desk, monkeypatch):
    desk.pager.hangs.set()

    async def scenario():
        async with running(desk):
            for number in range(10):
                desk.send(high(number), low(number))
                await until(lambda sent=number + 1: desk.alerts.delivered["chat"] == sent, "chat is told at once")
        assert len(desk.hook.payloads) == 10
        assert desk.alerts.delivered == {"chat": 10}

    asyncio.run(scenario())
    assert len(desk.alerts) == 10


def test_a_name_server_that_hangs_holds_up_no_other_sink(desk, monkeypatch):
    held, look_up = threading.Event(), socket.getaddrinfo

    def hang(host, *others, **more):
        if host in ("nowhere.test", b"nowhere.test"):
            held.wait(30)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return look_up(host, *others, **more)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(queue, "_TIMEOUT_S", 0.1)
    move(desk, "http://nowhere.test/v2/enqueue")

    async def scenario():
        async with running(desk):
            for number in range(30):
                desk.send(high(number))
            await until(lambda: desk.alerts.failed[PAGERDUTY] > 3, "it is tried")
            desk.send(low())
            await until(desk.chatted, "chat is told meanwhile")
            held.set()

    asyncio.run(scenario())


def test_one_alert_that_always_fails_holds_up_no_other_of_its_sink(desk):
    answer = desk.pager.answer

    def poisoned(method, path, headers, body):
        if b"poison" in body:
            return 500, {}
        return answer(method, path, headers, body)

    desk.pager.answer = poisoned
    desk.send(replace(REVOKED, dedup_key="poison"), *map(high, range(10)))
    desk.tell_for(seconds=30, step=1)
    assert len(desk.pager.incidents) == 10
    assert len(desk.alerts) == 1


def test_pauses_double_to_five_minutes(desk):
    desk.pager.instead = (500, {}, b"")
    desk.send(REVOKED)
    tried = []
    for second in range(2000):
        before = desk.alerts.failed[PAGERDUTY]
        desk.tell() if second == 0 else desk.tell(after=1)
        tried += [second] if desk.alerts.failed[PAGERDUTY] > before else []
    assert tried == [0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 811, 1111, 1411, 1711]


def test_when_a_sink_is_back_all_that_waits_for_it_is_told_at_once(desk):
    desk.pager.instead = (500, {}, b"")
    desk.send(*map(high, range(4)))
    desk.tell_for(seconds=500, step=1)
    desk.pager.instead = None
    desk.send(REVOKED)
    desk.tell()
    desk.tell()
    desk.tell()
    assert len(desk.pager.incidents) == 5


def test_a_restart_tells_what_waits_once_and_in_order(desk):
    desk.pager.instead = desk.hook.instead = (503, {}, b"")
    desk.send(REVOKED, RELEASED, REVOKED)
    desk.tell()
    desk.pager.instead = desk.hook.instead = None
    desk.open()
    assert len(desk.alerts) == 4  # chat hears of the release
    for _ in range(3):
        desk.tell()
    assert (desk.paged(), desk.chatted()) == ([(False, 1), (True, 1)], [("resolved", REVOKED.dedup_key)])
    desk.open()
    desk.send(REVOKED)
    assert (len(desk.alerts), len(desk.files)) == (1, 1)


KILLED = """
import os, sys, signal
from pathlib import Path
from cryptography.fernet import Fernet
from broker.containment.alerts import Alert, Alerts
from broker.policy.containment import Alerting, Route, Severity
box = Alerts(Path(sys.argv[1]), Fernet(sys.argv[2]), lambda: Alerting((Route("pagerduty"),)))
for number in range(20):
    box.send(Alert("honeytoken", Severity.HIGH, "s", f"high-{number}"))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_sent_survives_kill_9(desk):
    key = Fernet.generate_key()
    died = subprocess.run([sys.executable, "-c", KILLED, str(desk.folder), key.decode()], check=False)
    assert died.returncode == -signal.SIGKILL
    desk.seal = Fernet(key)
    desk.clock.wall = desk.clock.steady = time.time()  # noqa: TID251 - the other process had no other clock
    desk.open()
    for _ in range(5):
        desk.tell()
    assert sorted(key for _, key in desk.pager.incidents) == sorted(f"high-{number}" for number in range(20))


def test_the_background_tells_as_soon_as_something_is_sent(desk):
    async def scenario():
        async with running(desk):
            await asyncio.sleep(0)
            desk.send(REVOKED)
            await until(lambda: desk.paged() == [(True, 1)], "it is paged")
            await until(lambda: len(desk.alerts) == 0, "and done")

    asyncio.run(scenario())


def test_a_sink_that_is_taken_out_of_the_policy_keeps_its_alerts_until_it_is_back(desk, caplog):
    desk.send(REVOKED)
    desk.set(sinks={})
    desk.tell()
    assert "the platform policy has no sink 'pagerduty'; add it" in caplog.text
    desk.set(sinks=desk.sinks)
    desk.tell(after=1)
    assert desk.paged() == [(True, 1)]


# What can't be delivered.


def test_an_alert_that_is_refused_for_good_goes_to_the_fallback_and_is_not_tried_again(desk, monkeypatch, caplog):
    monkeypatch.setenv("PD_NIGHT", "wrong")
    desk.set(fallback="chat")
    desk.send(REVOKED)
    desk.tell()
    desk.tell()
    assert (desk.chatted(), len(desk.alerts)) == ([("triggered", REVOKED.dedup_key)], 0)
    assert desk.hook.payloads[0]["data"]["details"] == {"n": 1, "not_delivered_to": PAGERDUTY}
    assert "is not taken: pagerduty answers 400; see" in caplog.text
    desk.tell_for(seconds=1000, step=10)
    assert (len(desk.pager.seen), len(desk.hook.seen)) == (1, 1)


@pytest.mark.parametrize(
    ("status", "retried"),
    [(400, False), (401, False), (404, False), (410, False), (408, True), (425, True), (429, True), (500, True)],
)
def test_which_statuses_of_a_webhook_are_final(desk, status, retried):
    desk.set(fallback=PAGERDUTY)
    desk.hook.instead = (status, {}, b"")
    desk.send(low())
    desk.tell()
    desk.tell()
    assert (len(desk.alerts), bool(desk.pager.incidents)) == ((1, False) if retried else (0, True))


@pytest.mark.parametrize("fallback", ["", PAGERDUTY], ids=["no fallback", "itself as fallback"])
def test_with_no_other_sink_what_is_refused_is_tried_on_until_it_is_taken(desk, monkeypatch, fallback):
    monkeypatch.setenv("PD_NIGHT", "wrong")
    desk.set(fallback=fallback)
    desk.send(REVOKED)
    desk.tell_for(seconds=1000, step=10)
    assert len(desk.alerts) == 1
    monkeypatch.setenv("PD_NIGHT", NIGHT_KEY)
    desk.tell(after=300)
    assert (desk.paged(), len(desk.alerts)) == ([(True, 1)], 0)


def test_after_five_minutes_the_fallback_hears_of_it_once_and_the_sink_when_it_is_back(desk):
    desk.pager.instead = (500, {}, b"")
    desk.set(fallback="chat")
    desk.send(REVOKED, REVOKED)
    desk.tell_for(seconds=299, step=1)
    assert desk.chatted() == []
    desk.tell_for(seconds=2, step=1)
    assert desk.chatted() == [("triggered", REVOKED.dedup_key)]
    assert desk.hook.payloads[0]["data"]["repeated"] == 1
    desk.open()
    desk.tell_for(seconds=1000, step=10)
    desk.pager.instead = None
    desk.tell_for(seconds=600, step=10)
    assert (desk.paged(), len(desk.chatted()), len(desk.alerts)) == ([(True, 1)], 1, 0)


def test_a_fallback_that_fails_too_is_tried_until_it_is_back_and_passes_nothing_on(desk):
    desk.pager.instead = desk.hook.instead = (500, {}, b"")
    desk.set(fallback="chat", routes=(Route(PAGERDUTY),))
    desk.send(REVOKED)
    desk.tell_for(seconds=2000, step=10)
    assert len(desk.alerts) == 2
    desk.set(fallback=PAGERDUTY)
    desk.tell_for(seconds=1000, step=10)
    assert len(desk.alerts) == 2
    desk.pager.instead = desk.hook.instead = None
    desk.tell_for(seconds=600, step=10)
    assert (desk.paged(), len(desk.chatted())) == ([(True, 1)], 1)


def test_who_heard_of_an_incident_as_fallback_hears_of_its_end(desk):
    desk.pager.instead = (500, {}, b"")
    desk.set(fallback="chat", routes=(Route(PAGERDUTY),))
    desk.send(REVOKED)
    desk.tell_for(seconds=310, step=10)
    desk.open()
    desk.pager.instead = None
    desk.tell_for(seconds=600, step=10)
    desk.send(RELEASED)
    desk.tell()
    desk.tell()
    assert (desk.paged(), [word for word, _ in desk.chatted()]) == ([(False, 1)], ["triggered", "resolved"])


def test_a_fallback_that_was_not_needed_hears_nothing(desk):
    desk.set(fallback="chat", routes=(Route(PAGERDUTY),))
    desk.send(REVOKED, RELEASED)
    desk.tell()
    desk.tell()
    assert (desk.paged(), desk.chatted(), len(desk.alerts)) == ([(False, 1)], [], 0)


def test_after_a_day_it_is_given_up_and_that_is_told(desk, caplog):
    desk.pager.instead = (500, {}, b"")
    desk.send(REVOKED)
    desk.tell_for(seconds=86_000, step=1000)
    assert len(desk.alerts) == 1
    desk.tell(after=1000)
    assert (len(desk.alerts), desk.files, desk.alerts.dropped) == (0, [], {PAGERDUTY: 1})
    assert "pagerduty is not told of an alert of the kind honeytoken: it was tried for a day" in caplog.text


# Once, and not too much.


def test_an_alert_that_waits_is_not_queued_twice_and_says_how_often_it_came(desk):
    desk.send(*[low()] * 7)
    assert (len(desk.alerts), len(desk.files), desk.alerts.suppressed) == (1, 1, {"chat": 6})
    desk.tell()
    assert [each["data"]["repeated"] for each in desk.hook.payloads] == [6]
    desk.send(low())
    desk.tell()
    assert len(desk.hook.payloads) == 2


def test_what_comes_again_more_severe_is_told_as_that(desk):
    desk.set(routes=(Route(PAGERDUTY),))
    desk.send(replace(REVOKED, severity=LOW), REVOKED, replace(REVOKED, severity=LOW))
    desk.open()
    desk.tell()
    assert [each["payload"]["severity"] for each in desk.pager.accepted] == ["critical"]


def test_a_release_while_the_alert_waits_comes_after_it(desk):
    desk.set(routes=(Route(PAGERDUTY),))
    desk.pager.instead = (500, {}, b"")
    desk.send(REVOKED, RELEASED, RELEASED, REVOKED)
    assert len(desk.alerts) == 3
    desk.tell()
    assert desk.alerts.failed == {PAGERDUTY: 1}  # the first alone was tried
    desk.pager.instead = None
    for _ in range(3):
        desk.tell(after=1)
    assert [each["event_action"] for each in desk.pager.accepted] == ["trigger", "resolve", "trigger"]
    assert desk.paged() == [(False, 1), (True, 1)]


def test_of_a_storm_the_sink_gets_its_limit_and_then_one_number(desk):
    desk.set(per_minute=5)
    desk.send(*map(low, range(100)), replace(low(100), severity=MEDIUM))
    for _ in range(3):
        desk.tell(after=10)
    assert sorted(desk.chatted()) == [("triggered", f"low-{number}") for number in range(5)]
    desk.tell(after=30)
    told = desk.hook.payloads[5:]
    assert [each["data"]["kind"] for each in told] == ["storm"]
    assert told[0]["data"]["summary"] == "96 more alerts in the last minute, too many to tell each: see the audit record"
    assert told[0]["data"]["severity"] == "medium"
    assert desk.alerts.suppressed == {"chat": 96}
    desk.tell(after=60)
    assert (len(desk.hook.payloads), len(desk.alerts)) == (6, 0)


def test_a_storm_of_low_alerts_leaves_room_for_high_ones(desk):
    desk.set(per_minute=5, routes=(Route("chat"),))
    desk.send(*map(low, range(100)), *map(high, range(100)))
    for _ in range(4):
        desk.tell()
    assert [key.split("-")[0] for _, key in desk.chatted()].count("high") == 5
    desk.tell(after=60)
    storm = next(each["data"] for each in desk.hook.payloads if each["data"]["kind"] == "storm")
    assert (storm["severity"], storm["repeated"]) == ("high", 95 + 95 - 1)


def test_the_number_of_a_storm_survives_a_restart_at_least_by_half(desk):
    desk.set(per_minute=1)
    desk.send(*map(low, range(1001)))
    desk.open()
    desk.tell()
    desk.tell(after=60)
    assert 500 <= desk.hook.payloads[-1]["data"]["repeated"] < 1000


def test_after_an_outage_a_sink_gets_no_more_than_its_limit_in_a_minute_the_most_severe_first(desk):
    desk.set(per_minute=5, routes=(Route("chat"),))
    desk.hook.instead = (500, {}, b"")
    for minute in range(4):
        desk.send(*map(low, range(minute * 5, minute * 5 + 5)))
        desk.tell(after=60)
    desk.send(high())
    desk.hook.instead = None
    desk.clock.pass_(-desk.clock.steady % 60 + 300)
    for _ in range(20):
        desk.tell()
    keys = [key for _, key in desk.chatted()]
    assert (len(keys), keys[0]) == (5, "high-0")
    for _ in range(4):
        desk.tell(after=60)
        for _ in range(4):
            desk.tell()
    assert len(desk.chatted()) == 21


def test_resolves_and_other_sinks_are_not_held_up_by_a_storm(desk):
    desk.set(per_minute=1)
    desk.send(*map(low, range(100)), REVOKED, RELEASED)
    desk.tell()
    desk.tell()
    assert desk.paged() == [(False, 1)]
    assert sorted(desk.chatted()) == [("resolved", REVOKED.dedup_key), ("triggered", "low-0")]


@pytest.mark.parametrize("limit", [30, 1_000_000], ids=["with a limit", "without one"])
def test_ten_thousand_alerts_while_a_sink_is_down_stay_few_and_quick(desk, limit, caplog):
    caplog.set_level(logging.CRITICAL)
    desk.set(per_minute=limit)
    began = time.process_time()
    desk.send(*map(low, range(10_000)))
    assert time.process_time() - began < 15
    assert len(desk.alerts) == len(desk.files) == min(limit + 1, 4096)


def test_of_too_many_the_oldest_of_the_least_severe_are_dropped_and_that_is_told(desk, monkeypatch, caplog):
    monkeypatch.setattr(queue, "_MAX", 3)
    desk.set(routes=(Route("chat"),))
    desk.send(high(1), low(1), low(2), high(2), high(3), high(4))
    assert (len(desk.files), desk.alerts.dropped) == (3, {"chat": 3})
    assert caplog.text.count("chat is not told of an alert of the kind probing: too many are waiting") == 2
    desk.tell()
    assert sorted(key for _, key in desk.chatted()) == ["high-2", "high-3", "high-4"]


# What must not be seen, and what must not break.


def test_neither_files_nor_logs_nor_what_is_printed_show_a_secret_or_an_agent(desk, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    desk.pager.instead = desk.hook.instead = (500, {}, f"{KEY} {SECRET}".encode())
    desk.send(REVOKED, low())
    desk.tell()
    desk.pager.instead = desk.hook.instead = (401, {}, b"")
    desk.tell(after=1)
    monkeypatch.setenv("CHAT_SECRET", "whsec_not-base64-but-secret")
    desk.tell(after=10)
    shown = caplog.text + repr(desk.alerts) + repr(list(desk.alerts._waiting.values()))
    assert not [each for each in (KEY, NIGHT_KEY, SECRET, SECRET[6:], "not-base64-but-secret") if each in shown]
    assert len(desk.files) == 2
    for path in desk.files:
        assert path.stat().st_mode & 0o077 == 0
        content = path.read_bytes()
        assert not [each for each in (KEY, NIGHT_KEY, SECRET, "bot", "honeytoken") if each.encode() in content]
        assert not [each for each in (KEY, NIGHT_KEY, SECRET) if each.encode() in desk.seal.decrypt(content)]
    assert desk.folder.stat().st_mode & 0o077 == 0


def test_a_summary_shows_no_credential_of_a_known_form(desk):
    desk.send(replace(REVOKED, summary="The agent bot sent sk_live_0123456789abcdef to example.com."))
    desk.tell()
    assert desk.pager.accepted[0]["payload"]["summary"] == "The agent bot sent [redacted] to example.com."


@pytest.mark.parametrize(
    ("secret", "advice"),
    [
        pytest.param(None, "start the broker with CHAT_SECRET set", id="not set"),
        pytest.param("", "start the broker with CHAT_SECRET set", id="empty"),
        pytest.param("plain", "set it to whsec_ and the base64 of 24 to 64 random bytes", id="of another form"),
        pytest.param("SECRET" + SECRET[6:], "set it to whsec_ and the base64 of 24 to 64 random bytes", id="of another prefix"),
        pytest.param("whsec_!!!!", "set it to whsec_ and the base64 of 24 to 64 random bytes", id="no base64"),
        pytest.param("whsec_c2hvcnQ=", "set it to whsec_ and the base64 of 24 to 64 random bytes", id="too short"),
    ],
)
def test_a_webhooks_secret_that_is(desk, monkeypatch, caplog, secret, advice):
    monkeypatch.delenv("CHAT_SECRET") if secret is None else monkeypatch.setenv("CHAT_SECRET", secret)
    desk.send(low())
    desk.tell()
    assert (len(desk.alerts), len(desk.hook.seen)) == (1, 0)
    assert advice in caplog.text
    monkeypatch.setenv("CHAT_SECRET", SECRET.rstrip("="))
    desk.tell(after=1)
    assert len(desk.hook.payloads) == 1


def test_files_of_another_key_are_told_and_not_believed(desk, caplog):
    (desk.folder / "000000000001-00").write_bytes(Fernet(Fernet.generate_key()).encrypt(b"{}"))
    (desk.folder / "000000000002-00").write_bytes(desk.seal.encrypt(b'{"alert": {}}'))
    (desk.folder / "000000000003-00").write_bytes(b"")
    desk.open()
    assert len(desk.alerts) == 0
    assert caplog.text.count("an alert is not told") == 3


def test_sending_never_raises(desk, caplog, monkeypatch):
    loop = {}
    loop["self"] = loop
    desk.send(replace(REVOKED, details=loop))
    desk.set(routes=None)
    desk.send(REVOKED)
    assert caplog.text.count("an alert of the kind honeytoken can't be told: ") == 2
    assert len(desk.alerts) == 0


def test_a_disk_that_is_full_loses_nothing_but_the_restart(desk, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(queue, "write_private", full)
    desk.send(REVOKED)
    desk.tell()
    assert desk.paged() == [(True, 1)]
    assert "an alert can't be saved (No space left on device)" in caplog.text


def test_a_clock_that_was_set_back_before_a_restart_delays_nothing_for_long(desk):
    desk.pager.instead = (500, {}, b"")
    desk.send(REVOKED)
    desk.pager.instead = None
    desk.clock.pass_(-10_000_000)
    desk.open()
    desk.tell(after=60)
    assert desk.paged() == [(True, 1)]
