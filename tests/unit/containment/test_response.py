"""What is done about an agent: recorded, told to other brokers, in force, undone. The outside is lists."""

from dataclasses import replace
from itertools import count
from pathlib import Path

import orjson
import pytest

from broker.audit import AuditUnavailable
from broker.audit.record import Attempt, canonical
from broker.containment.approvals import MOST_WAITING, Refusal
from broker.containment.detectors import Finding
from broker.containment.response import Containment, Surroundings
from broker.containment.standing import EVERYONE, MOST_RUNS, Opened
from broker.credentials.scrub import Scrubber
from broker.identity import Person
from broker.manifest.load import load_texts
from broker.policy.approval import Approval
from broker.policy.containment import Action, Detector, Rule, Severity
from broker.policy.types import Code, deny

NOW = 1_800_000_000.0
TEXTS = {
    f"{name}.yaml": orjson.dumps(
        {
            "apiVersion": "broker/v1", "kind": "Agent", "metadata": {"name": name, "owner": "team", "oncall": "night"},
            "spec": {"identity": {"token": True}, "tools": {}},
        }
    )
    for name in ("bot", "other")
}  # fmt: skip
SNAPSHOT = load_texts(TEXTS, Path()).snapshot
BINDING = ("bot", "r", "bank/refund", "hash", SNAPSHOT.revision)
NEED = Approval("r#", 1)
ANN = Person("ann")
REFUSED = deny(Code.APPROVAL_REQUIRED, "it waits", rule="r#")


class Records(list):
    full = False

    def append(self, record):
        if self.full:
            raise AuditUnavailable("the disk is full")
        super().append(orjson.loads(canonical(record)))


class Broker:
    """One broker's containment, and all that it tells."""

    def __init__(self, ids="n", peers=()):
        numbers, self.now, self.records, self.alerts, self.dropped = count(1), NOW, Records(), [], []
        self.shared, self.peers, self.over, self.found = {}, list(peers), [], []
        around = Surroundings(
            self.records, lambda: self.now, lambda: self.now, lambda: 1, lambda: f"{ids}{next(numbers)}",
            send=self.alerts.append, share=self._share, unshare=self.over.extend, drop_leases=self.dropped.append,
        )  # fmt: skip
        self.held = Containment(around, lambda *found: self.found.append(found))
        self.held.apply_policy(SNAPSHOT, ("decoy-0123456789abcdef",))

    def _share(self, id_, document):
        self.shared[id_] = document
        for peer in self.peers:
            peer.held.learn({id_: document})

    def view(self, agent="bot", run="r"):
        return self.held.standing.view(agent, run)

    def restarted(self):
        again = Broker()
        again.held.replay(self.records)
        return again

    def events(self):
        return [(record["event"], record["agent"].get("name"), record["detail"]) for record in self.records]


def finding(action, run="r", *, shadow=False, detector=Detector.DENIED_BURST):
    return Finding(Rule(detector, action, 20, 60, shadow=shadow, rule="p#x"), "bot", run, "20 calls were denied", ("d1", "d2"))


def test_revoking_is_in_force_recorded_told_and_paged_and_undone_by_its_release():
    broker, cut = Broker(), []
    broker.held.open.enter(Opened("bot", None, cut.append))
    done = broker.held.revoke("bot", None, "it lies", "jo")
    assert (broker.view().revoked, cut, broker.dropped) == (done.id, ["it lies (by jo)"], ["bot"])
    assert broker.events() == [
        ("revocation", "bot", "revoke_agent by jo: it lies"),
        ("alert", "bot", "bot is revoked: it lies (by jo)"),
    ]
    [page] = broker.alerts
    assert (page.severity, page.dedup_key, page.agent["oncall"], page.resolves) == (Severity.HIGH, done.id, "night", False)
    assert broker.held.release("bot", None, "mended", "ann") == [done]
    assert not broker.view().revoked
    resolved = broker.alerts[-1]
    assert (resolved.dedup_key, resolved.resolves) == (done.id, True)
    assert broker.events()[2] == ("release", "bot", "released by ann: mended")
    assert broker.held.release("bot", None, "again", "ann") == []


def test_what_holds_and_what_was_lifted_come_back_from_the_record():
    broker = Broker()
    broker.held.revoke("bot", None, "one", "jo")
    broker.held.revoke("other", "run-7", "two", "jo")
    broker.held.revoke(EVERYONE, None, "three", "jo")
    broker.held.release(EVERYONE, None, "over", "jo")
    again = broker.restarted()
    assert [each.reason for each in again.held.standing.of("bot")] == ["one"]
    assert again.view().revoked
    assert (bool(again.view("other", "run-7").revoked), again.view("other", "run-8").revoked) == (True, "")
    assert (again.records, again.alerts, again.dropped) == ([], [], []), "a replay sets nothing off"
    assert again.held.notices.keys() == broker.held.notices.keys(), "and others can be told all of it"


def test_other_brokers_do_the_same_record_it_and_tell_nobody_twice():
    second = Broker("s")
    first, cut = Broker("f", [second]), []
    second.held.open.enter(Opened("bot", "r", cut.append))
    first.held.revoke("bot", None, "it lies", "jo")
    assert (second.view(), cut, second.dropped) == (first.view(), ["it lies (by jo)"], ["bot"])
    assert second.events() == [("revocation", "bot", "revoke_agent by jo: it lies, as another broker says")]
    assert (second.alerts, second.shared) == ([], {})
    second.held.learn(dict(first.held.notices))
    assert len(second.records) == 1
    first.held.release("bot", None, "mended", "ann")
    assert not second.view().revoked
    assert second.restarted().view() == first.view()


@pytest.mark.parametrize(
    "document", [b"{", b"[]", b"{}", b'{"kind":"restriction","id":"x"}', b'{"kind":"vote","vote":1}', b'"x"', b"\xff"], ids=str
)
def test_what_another_broker_says_and_nobody_understands_changes_nothing(document, caplog):
    broker = Broker()
    done = broker.held.revoke("bot", None, "it lies", "jo")
    broker.held.learn({"x": document, done.id: b"{}"})
    assert broker.view().revoked
    assert len(broker.records) == 2


def test_with_a_full_disk_it_holds_all_the_same_and_whoever_asked_is_told():
    broker, cut = Broker(), []
    broker.records.full = True
    broker.held.open.enter(Opened("bot", "r", cut.append))
    with pytest.raises(AuditUnavailable):
        broker.held.revoke("bot", None, "it lies", "jo")
    assert (broker.view().revoked, len(cut), len(broker.shared), len(broker.alerts)) == ("r-n1", 1, 1, 1)
    broker.held.act((finding(Action.REVOKE_AGENT),))


@pytest.mark.parametrize(
    ("action", "field", "other_run"),
    [
        pytest.param(Action.READ_ONLY, "read_only", True, id="read-only"),
        pytest.param(Action.HOLD, "hold", True, id="held"),
        pytest.param(Action.REVOKE_RUN, "revoked", False, id="its run revoked"),
        pytest.param(Action.REVOKE_AGENT, "revoked", True, id="revoked"),
    ],
)
def test_a_finding_does_what_its_rule_says_once_and_tells_people_in_one_incident(action, field, other_run):
    broker = Broker()
    broker.held.act((finding(action), finding(action)))
    [held] = broker.held.standing.of("bot")
    assert getattr(broker.view(), field) == held.id
    assert held.why == "20 calls were denied (by detector denied_burst)"
    assert bool(getattr(broker.view(run="another"), field)) is other_run
    assert [event for event, *_ in broker.events()] == ["revocation", "alert"]
    alert, [page] = broker.records[1], broker.alerts
    assert (alert["kind"], alert["action"], alert["rule"]) == ("denied_burst", action, "p#x")
    assert alert["decision_ids"] == ["d1", "d2"]
    assert page.severity is Severity.HIGH
    assert page.dedup_key == held.id
    assert broker.found == [("denied_burst", action)] * 2


@pytest.mark.parametrize(
    ("found", "severity", "action"),
    [
        pytest.param(finding(Action.ALERT), Severity.MEDIUM, "alert", id="a rule that only tells"),
        pytest.param(finding(Action.REVOKE_AGENT, shadow=True), Severity.HIGH, "shadow", id="a rule in shadow mode"),
        pytest.param(
            finding(Action.ALERT, detector=Detector.UNDECLARED_HOST), Severity.LOW, "alert", id="the first sight of a host"
        ),
    ],
)
def test_what_only_tells_changes_nothing(found, severity, action):
    broker = Broker()
    broker.held.act((found,))
    assert (broker.held.standing.all, broker.alerts[0].severity, broker.found[0][1]) == ([], severity, action)


def test_an_agent_that_names_new_runs_faster_than_they_can_be_revoked_is_revoked_itself():
    broker = Broker()
    for number in range(MOST_RUNS):
        broker.held.act((finding(Action.REVOKE_RUN, f"r{number}"),))
    assert not broker.view(run="another").revoked
    broker.held.act((finding(Action.REVOKE_RUN, "one too many"),))
    assert broker.view(run="another").revoked
    assert not broker.view("other").revoked


def test_a_request_is_looked_through_for_decoys_secrets_and_what_was_injected():
    broker, about = Broker(), Attempt("d1", "rev", {"name": "bot"})

    def seen(head=b"", body=b""):
        return [each.rule.detector for each in broker.held.inspect(about, head, body)[1]]

    assert seen(b"/items", b"{}") == []
    assert seen(b"x decoy-0123456789abcdef") == [Detector.HONEYTOKEN]
    assert seen(body=b'{"a":"decoy-0123456789abcdef"}') == [], "it is quiet for a while about what it has told"
    assert seen(b"ghp_0123456789abcdefghij") == [], "the agent's own credential in a header is taken off"
    assert seen(body=b"ghp_0123456789abcdefghij") == [Detector.SECRET_IN_REQUEST]
    assert broker.held.injected("bot", scrubber := Scrubber(["injected/value+0123456789"]))
    assert not broker.held.injected("bot", scrubber)
    assert seen(body=b"x=injected%2Fvalue%2B0123456789") == [Detector.CREDENTIAL_IN_REQUEST]
    other = Attempt("d1", "rev", {"name": "other"})
    assert broker.held.inspect(other, b"", b"injected/value+0123456789") == (False, ())
    assert broker.held.inspect(about, b"", b"injected/value+0123456789") == (True, ()), "told once, and never shown"


# Approvals.


def ask(broker, binding=BINDING):
    return broker.held.ask(REFUSED, NEED, binding, {"body": "{}"})


def test_asking_approving_using_and_asking_again():
    broker = Broker()
    waits = ask(broker)
    id_ = waits.approval["id"]
    assert (waits.code, waits.rule, waits.approval["status"], id_ in waits.detail) == (
        Code.APPROVAL_REQUIRED,
        "r#",
        "waiting",
        True,
    )
    assert ask(broker).approval["id"] == id_
    assert broker.held.approved(BINDING, NEED) is None
    assert broker.held.vote(id_, ANN, "fine", approves=True)["status"] == "approved"
    asked = broker.held.approved(BINDING, NEED)
    broker.held.use(asked)
    assert broker.held.approved(BINDING, NEED) is None
    assert ask(broker).approval["id"] != id_
    assert [detail for event, _, detail in broker.events()] == [f"{id_} approved by ann: fine", f"{id_} used"]
    assert [(alert.kind, alert.severity) for alert in broker.alerts] == [("approval", Severity.LOW)] * 2


def test_an_answer_survives_a_restart_and_so_does_its_use_and_what_only_waits_does_not():
    broker = Broker()
    ask(broker, waits := (*BINDING[:3], "other", BINDING[4]))
    id_ = ask(broker).approval["id"]
    broker.held.vote(id_, ANN, "", approves=True)
    assert broker.restarted().held.approved(BINDING, NEED).id == id_
    assert broker.restarted().held.approvals.found(waits, NEED, NOW) is None
    broker.held.use(broker.held.approved(BINDING, NEED))
    assert broker.restarted().held.approved(BINDING, NEED) is None


def test_a_no_is_told_with_its_approval():
    broker = Broker()
    id_ = ask(broker).approval["id"]
    broker.held.vote(id_, ANN, "too much", approves=False)
    refused = ask(broker)
    assert (refused.code, refused.approval["rejected_by"]) == (Code.APPROVAL_REJECTED, ["ann"])


def test_a_vote_on_what_the_manifests_no_longer_say_is_not_taken():
    broker = Broker()
    id_ = ask(broker, (*BINDING[:4], "sha256:old")).approval["id"]
    with pytest.raises(Refusal, match="manifests have changed"):
        broker.held.vote(id_, ANN, "", approves=True)


def test_no_more_of_an_agents_calls_wait_than_people_read():
    broker = Broker()
    for number in range(MOST_WAITING):
        assert ask(broker, (*BINDING[:3], str(number), BINDING[4])).approval
    crowded = ask(broker)
    assert (crowded.code, crowded.approval) == (Code.APPROVAL_REQUIRED, None)
    assert "wait for people already" in crowded.detail
    assert ask(broker, ("other", *BINDING[1:])).approval


def test_what_is_over_is_recorded_let_go_and_taken_out_of_what_others_are_told():
    broker = Broker()
    id_ = ask(broker).approval["id"]
    broker.held.revoke("other", None, "stays", "jo")
    broker.now += 3600
    broker.held.sweep()
    assert broker.events()[-1] == ("approval", "bot", f"{id_} expired")
    assert id_ in broker.held.notices
    assert f"e-{id_}" not in broker.restarted().held.notices, "each broker sees that for itself"
    broker.now += 86_400
    broker.held.sweep()
    assert (broker.over, list(broker.held.notices)) == ([id_], [broker.held.standing.of("other")[0].id])


# What was tried against it.


def test_a_revocation_that_a_full_disk_did_not_take_is_recorded_when_there_is_room_and_survives_a_restart():
    broker = Broker()
    broker.records.full = True
    with pytest.raises(AuditUnavailable):
        broker.held.revoke("bot", None, "it lies", "jo")
    broker.held.sweep()
    broker.records.full = False
    broker.held.sweep()
    broker.held.sweep()
    assert [event for event, *_ in broker.events()] == ["revocation"]
    assert broker.restarted().view().revoked == "r-n1"


def test_an_issuer_that_can_not_drop_a_lease_keeps_no_revocation_from_the_record_nor_from_other_brokers():
    peer = Broker("p")
    broker = Broker(peers=[peer])
    broker.held._around = replace(broker.held._around, drop_leases=lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        broker.held.revoke("bot", None, "it lies", "jo")
    assert peer.view().revoked == broker.restarted().view().revoked == "r-n1"


ASKED = {"id": "a-9", "binding": ["bot"], "approvers": 1, "groups": [], "at": NOW, "expires": NOW + 9, "why": "", "shown": {}}


@pytest.mark.parametrize(
    "malformed",
    [
        pytest.param({"kind": "release", "of": 5}, id="a release of nothing"),
        pytest.param({"kind": "asked", "asked": {**ASKED, "expires": "soon"}}, id="a question without an end"),
        pytest.param({"kind": "asked", "asked": {**ASKED, "approvers": "all"}}, id="a question to nobody knows how many"),
        pytest.param({"kind": "used", "of": "a-9", "expires": "soon"}, id="an end that is no time"),
        pytest.param({"kind": "vote", "asked": {**ASKED, "binding": []}, "vote": {}}, id="a vote without a call"),
        pytest.param({"kind": "tokens", "agent": ["bot"], "at": NOW}, id="an agent that is none"),
        pytest.param({"kind": "restriction", "id": "r-2"}, id="half a restriction"),
        pytest.param({"kind": "tokens", "agent": "q", "at": 0, "id": "r-n1", "by": ""}, id="one in another's place"),
    ],
)
def test_what_another_broker_says_in_a_wrong_form_changes_nothing_and_holds_up_nothing(malformed):
    broker, teller = Broker(), Broker("p")
    broker.held.revoke("bot", None, "it lies", "jo")
    before = dict(broker.held.notices)
    teller.held.revoke("other", None, "it lies too", "al")
    documents = {"x": orjson.dumps({"id": "x", **malformed}), "list": b"[]", **teller.held.notices}
    broker.held.learn(documents)
    assert (broker.view().revoked, broker.view("other").revoked) == ("r-n1", "r-p1")
    assert broker.held.notices == {**before, **teller.held.notices}
    ask(broker)
    broker.now += 10**6
    broker.held.sweep()


def test_questions_that_are_over_do_not_pile_up_however_fast_they_end():
    broker, need = Broker(), Approval("r#", expires=60)
    for minute in range(60):
        for number in range(MOST_WAITING):
            broker.held.ask(REFUSED, need, (*BINDING[:3], f"{minute}/{number}", BINDING[4]), {"body": "x" * 65_536})
        broker.now += 60
        broker.held.sweep()
    assert len(broker.held.notices) <= 3 * MOST_WAITING


def test_what_is_over_before_a_restart_is_neither_told_nor_recorded_again():
    broker = Broker()
    broker.held.vote(ask(broker).approval["id"], ANN, "", approves=True)
    broker.now += 3600
    broker.held.sweep()
    again = Broker()
    again.now = broker.now
    again.held.replay(broker.records)
    again.held.sweep()
    assert (again.held.notices, again.records) == ({}, [])
