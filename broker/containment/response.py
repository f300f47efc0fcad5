"""What is done about an agent: by a finding, by a person, or because another broker says so.

Laws: everything that holds is a notice: a small document with an ID, recorded in the audit log, told to the other brokers, and
applied; whoever learns one from another broker records it too, so that a restart, an emptied store or a lost broker forgets
nothing. Applying a notice twice does nothing. A restriction holds from the moment it is applied, recorded or not: a full disk
must not protect an agent. People hear of it last, and nobody waits for that.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import orjson

from broker.audit import AuditSink, AuditUnavailable
from broker.audit.record import Attempt, Ending, alert_record, notice_record
from broker.containment.alerts import Alert
from broker.containment.approvals import MOST_WAITING, Approvals, Asked, Refusal, Vote
from broker.containment.contents import Contents
from broker.containment.detectors import Detectors, Finding
from broker.containment.notices import Notice, ends, read, recorded
from broker.containment.standing import EVERYONE, MOST_RUNS, OpenCalls, Restriction, Standing
from broker.credentials.scrub import Scrubber
from broker.identity import Person
from broker.policy.approval import Approval
from broker.policy.containment import NO_DECOYS, Action, Detector, Severity
from broker.policy.snapshot import EMPTY, PolicySnapshot
from broker.policy.types import Code, Decision, Json, deny

log = logging.getLogger(__name__)

_INJECTED = 8  # credentials of one agent that are looked for in its requests, the latest; each takes a pass over the body
_KEPT_S = 60.0  # how long a notice is kept after its end, which brokers' clocks may see at different times
_SEVERITY = {Action.ALERT: Severity.MEDIUM, Action.READ_ONLY: Severity.HIGH, Action.HOLD: Severity.HIGH}
_DONE = {
    Action.READ_ONLY: "it may only read until it is released",
    Action.HOLD: "its writes wait for approval until it is released",
    Action.REVOKE_RUN: "this run is revoked",
    Action.REVOKE_AGENT: "it is revoked",
}


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the response reaches beside itself. `later` runs a callable soon, after the current step.

    `share` tells the other brokers a notice, `unshare` that some are over; `send` an alert; `drop_leases` takes an agent's back.
    `now` is in seconds since the epoch, `steady` the same by a clock that nobody sets; `random_id` names things.
    """

    audit: AuditSink
    now: Callable[[], float]
    steady: Callable[[], float]
    mono_ns: Callable[[], int]
    random_id: Callable[[], str]
    later: Callable[[Callable[[], None]], object] = lambda what: what()
    send: Callable[[Alert], None] = lambda _: None
    share: Callable[[str, bytes], None] = lambda _id, _notice: None
    unshare: Callable[[Iterable[str]], None] = lambda _ids: None
    drop_leases: Callable[[str], None] = lambda _: None


@dataclass(slots=True)
class Standards:
    """What a snapshot says of containment."""

    snapshot: PolicySnapshot = EMPTY
    detectors: Detectors = field(default_factory=lambda: Detectors((), NO_DECOYS))
    contents: Contents = field(default_factory=lambda: Contents(()))


class Containment:
    """One broker's. The exchange asks and tells it what happens; operators and other brokers tell it what to do.

    `found` hears of each finding, by detector and action.
    """

    def __init__(self, around: Surroundings, found: Callable[[str, str], None] = lambda _detector, _action: None) -> None:
        self._around, self._found = around, found
        self.standing, self.open, self.approvals = Standing(), OpenCalls(), Approvals()
        self._standards = Standards()
        self._notices: dict[str, bytes] = {}
        self._unrecorded: list[tuple[Notice, str]] = []
        self._injected: dict[str, list[Scrubber]] = {}

    def apply_policy(self, snapshot: PolicySnapshot, decoys: tuple[str, ...]) -> None:
        """A snapshot counts from now on; `decoys` are the values of its planted credentials. Changed rules count from zero."""
        old = self._standards
        same = (old.snapshot.rules, old.snapshot.decoys) == (snapshot.rules, snapshot.decoys)
        self._standards = Standards(
            snapshot,
            old.detectors if same and old.snapshot is not EMPTY else Detectors(snapshot.rules, snapshot.decoys),
            Contents(decoys),
        )

    # What the exchange tells.

    def decided(self, about: Attempt, decision: Decision) -> None:
        """A decision was recorded."""
        if about.agent.get("name"):
            self._soon(self._standards.detectors.decided(about, decision, self._around.steady()))

    def ended(self, about: Attempt, ending: Ending, error: str) -> None:
        """An allowed call ended; `error` is a word for what failed upstream, empty for nothing."""
        self._soon(self._standards.detectors.ended(about, ending, error, self._around.steady()))

    def injected(self, agent: str, credential: Scrubber) -> bool:
        """What this finds leaves with a call of the agent's, which must never send it itself; whether that is new."""
        known = self._injected.setdefault(agent, [])
        if new := credential not in known:
            self._injected[agent] = [credential, *known[: _INJECTED - 1]]
        return new

    def inspect(self, about: Attempt, head: bytes, body: bytes) -> tuple[bool, tuple[Finding, ...]]:
        """What a request holds that it should not, in its `head` (path, query, headers) or `body`.

        Whether that is a decoy or what was injected, which no record may show, whoever is told of it and how often; and findings.
        """
        for where, text in (("its path, query or headers", head), ("its body", body)):
            seen = self._holds(about, text)
            # A head often holds a credential of the agent's own, which is taken off.
            if seen and (text is body or seen is not Detector.SECRET_IN_REQUEST):
                findings = self._standards.detectors.content(about, seen, where, self._around.steady())
                return seen is not Detector.SECRET_IN_REQUEST, findings
        return False, ()

    def must_not_show(self, about: Attempt, text: bytes) -> bool:
        """Whether a text holds a decoy or what was injected into the agent's calls."""
        return self._holds(about, text) in {Detector.HONEYTOKEN, Detector.CREDENTIAL_IN_REQUEST}

    def _holds(self, about: Attempt, text: bytes) -> Detector | None:
        ours = self._injected.get(about.agent.get("name", ""), ())
        shown = any(each.shown(text) for each in ours)
        return Detector.CREDENTIAL_IN_REQUEST if shown else self._standards.contents.seen((text,))

    def _soon(self, findings: tuple[Finding, ...]) -> None:
        # After the step in which it was found: the answer to the call that showed it goes out as it was decided.
        if findings:
            self._around.later(partial(self.act, findings))

    # What is done.

    def act(self, findings: tuple[Finding, ...]) -> None:
        """Do what their rules say."""
        for finding in findings:
            try:
                self._act(finding)
            except AuditUnavailable as error:
                log.error("%s: what was done about it is not in the record: %s", finding.what, error)  # noqa: TRY400

    def _act(self, finding: Finding) -> None:
        rule, action = finding.rule, finding.rule.action
        run = finding.run_id if action is Action.REVOKE_RUN else None
        if run is not None and self._runs_away(finding.agent):
            action, run = Action.REVOKE_AGENT, None
        self._found(rule.detector, "shadow" if rule.shadow else action)
        if action is Action.ALERT or rule.shadow:
            would = f"; this rule is in shadow mode, or {_DONE[action]}" if rule.shadow and action in _DONE else ""
            self._tell(finding, f"{finding.what}{would}", f"{finding.agent}/{rule.detector}")
            return
        if any(each.action is action and each.run_id == run for each in self.standing.of(finding.agent)):
            return
        new = self._restriction(action, finding.agent, run, finding.what, f"detector {rule.detector}")
        try:
            self.publish(new.notice)
        finally:
            self._tell(finding, f"{finding.what}; {_DONE[action]}", new.id)

    def _runs_away(self, agent: str) -> bool:
        return sum(each.action is Action.REVOKE_RUN for each in self.standing.of(agent)) >= MOST_RUNS

    def _restriction(self, action: Action, agent: str, run_id: str | None, reason: str, by: str) -> Restriction:
        return Restriction(f"r-{self._around.random_id()}", action, agent, run_id, reason, by, self._around.now())

    def _tell(self, finding: Finding, what: str, key: str) -> None:
        rule = finding.rule
        severity = Severity.LOW if rule.detector is Detector.UNDECLARED_HOST else _SEVERITY.get(rule.action, Severity.HIGH)
        details: dict[str, Json] = {
            "action": str(rule.action),
            "rule": rule.rule or "default",
            "run_id": finding.run_id,
            "shadow": rule.shadow,
        }
        # Each host is an incident of its own; of all else, one of a kind and agent.
        key = f"{key}/{finding.decision_ids[-1]}" if rule.detector is Detector.UNDECLARED_HOST else key
        who = self._who(finding.agent)
        self.alert(Alert(str(rule.detector), severity, f"{finding.agent}: {what}", key, who, finding.decision_ids, details))

    def alert(self, alert: Alert) -> None:
        """Record it, and tell whoever is to hear of it."""
        about = {"agent": dict(alert.agent), "kind": alert.kind, "severity": str(alert.severity), **alert.details}
        record = alert_record(self._around.now(), self._around.mono_ns(), alert.summary, about, alert.decision_ids)
        quiet = alert.resolves or alert.severity is Severity.LOW
        log.log(logging.INFO if quiet else logging.WARNING, "%s: %s", alert.kind, alert.summary)
        try:
            self._around.audit.append(record)
        except AuditUnavailable as error:
            log.error("an alert is not in the record: %s", error)  # noqa: TRY400 - it says all there is
        self._around.send(alert)

    def _who(self, agent: str) -> dict[str, str]:
        known = self._standards.snapshot.agents.get(agent)
        return known.described if known else {"name": agent}

    # Notices.

    def publish(self, notice: Notice) -> None:
        """Apply it, record it, and tell the other brokers. Raises `AuditUnavailable` where it holds but is not recorded."""
        document = orjson.dumps(notice)
        self._apply(notice, document)
        try:
            self._enforce(notice)
        finally:
            self._around.share(notice["id"], document)
            self._record(notice)

    def learn(self, documents: Mapping[str, bytes]) -> None:
        """What other brokers say; what is known already does nothing."""
        for notice_id in documents.keys() - self._notices.keys():
            try:
                notice = read(notice_id, documents[notice_id])
                self._apply(notice, documents[notice_id])
                self._enforce(notice)
                self._record(notice, ", as another broker says")
            except AuditUnavailable as error:
                log.error("a notice of another broker is not in the record: %s", error)  # noqa: TRY400
            except Exception:  # whatever is wrong with this one, the others hold
                log.exception("the notice %r of another broker can't be followed", notice_id)

    def replay(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Apply the notices in an audit log, in order, but for those that are over."""
        now = self._around.now()
        for record in records:
            if (notice := record.get("notice")) and ends(document := orjson.dumps(notice)) > now:
                self._apply(notice, document)

    @property
    def notices(self) -> Mapping[str, bytes]:
        """All that other brokers must know."""
        return self._notices

    def _apply(self, notice: Notice, document: bytes) -> None:
        match notice["kind"]:
            case "restriction":
                restriction = Restriction.read(notice)
                self.standing.restrict(restriction)
                if restriction.action is Action.REVOKE_AGENT:
                    self.approvals.cancel(restriction.agent, restriction.at)
            case "release":
                self.standing.lift(notice["of"])
            case "tokens":
                self.standing.revoke_tokens(notice["agent"], notice["at"])
            case "asked":
                self.approvals.ask(Asked.read(notice["asked"]))
            case "vote":
                vote = {**notice["vote"], "groups": tuple(notice["vote"]["groups"])}
                self.approvals.hear(Asked.read(notice["asked"]), Vote(**vote))
            case "used":
                self.approvals.use(notice["of"])
            case _:  # an end, which each broker sees for itself
                return
        self._notices[notice["id"]] = document

    def _enforce(self, notice: Notice) -> None:
        """What follows for what is open and at hand; a replay has nothing of that."""
        match notice:
            case {"kind": "restriction"} if (new := Restriction.read(notice)) in self.standing.of(new.agent):
                if new.action in (Action.REVOKE_AGENT, Action.REVOKE_RUN):
                    self.open.cut(new)
                if new.action is Action.REVOKE_AGENT:
                    self._disarm(new.agent)
            case {"kind": "tokens", "agent": agent}:
                self._disarm(agent)
            case {"kind": "release", "agent": agent}:
                self._standards.detectors.forget(agent)

    def _disarm(self, agent: str) -> None:
        """Its credentials are dropped, and taken back where their issuers do that. Their looks stay known: they may leak."""
        for name in self._standards.snapshot.agents if agent == EVERYONE else (agent,):
            self._around.drop_leases(name)

    def _record(self, notice: Notice, more: str = "") -> None:
        words = recorded(notice)
        if words is None:
            return
        event, agent, what = words
        record = notice_record(event, self._around.now(), self._around.mono_ns(), self._who(agent), f"{what}{more}", notice)
        try:
            self._around.audit.append(record)
        except AuditUnavailable:
            self._unrecorded.append((notice, more))
            raise

    def _catch_up(self) -> None:
        """Record what could not be recorded when it was done, or a restart would undo it."""
        owed, self._unrecorded = self._unrecorded, []
        for notice, more in owed:
            with suppress(AuditUnavailable):
                self._record(notice, more)

    # What people do.

    def revoke(self, agent: str, run_id: str | None, reason: str, by: str) -> Restriction:
        """Revoke an agent, one of its runs, or (`EVERYONE`) all agents."""
        action = Action.REVOKE_AGENT if run_id is None else Action.REVOKE_RUN
        new = self._restriction(action, agent, run_id, reason, by)
        try:
            self.publish(new.notice)
        finally:
            who = "all agents are" if agent == EVERYONE else f"{agent} is" if run_id is None else f"run {run_id!r} of {agent} is"
            self.alert(Alert("revocation", Severity.HIGH, f"{who} revoked: {reason} (by {by})", new.id, self._who(agent)))
        return new

    def release(self, agent: str, run_id: str | None, reason: str, by: str) -> list[Restriction]:
        """Lift what holds for an agent (or one of its runs), by its name; what that was."""
        gone = [each for each in self.standing.of(agent) if run_id in (None, each.run_id)]
        if gone:
            ids = [each.id for each in gone]
            known = {"id": f"l-{self._around.random_id()}", "kind": "release", "agent": agent, "of": ids}
            self.publish({**known, "reason": reason, "by": by, "at": self._around.now()})
        for each in gone:
            what = f"{agent} is released: {reason} (by {by})"
            self.alert(Alert("release", Severity.LOW, what, each.id, self._who(agent), resolves=True))
        return gone

    def revoke_tokens(self, agent: str, by: str) -> None:
        """Take back every token of an agent that was issued until now."""
        now = self._around.now()
        self.publish({"id": f"t-{self._around.random_id()}", "kind": "tokens", "agent": agent, "by": by, "at": now})

    def vote(self, approval_id: str, who: Person, reason: str, *, approves: bool) -> dict[str, Any]:
        """A person's word on a call that waits; how it then stands. Raises `Refusal`."""
        now = self._around.now()
        vote = Vote(approval_id, who.name, who.groups, approves, reason, now)
        asked = self.approvals.judge(approval_id, vote, now)
        if asked.binding[-1] != self._standards.snapshot.revision:
            raise Refusal("the manifests have changed since it was asked; the agent must call again")
        bound = {**asdict(asked), "shown": {}}
        self.publish({"id": f"v-{self._around.random_id()}", "kind": "vote", "asked": bound, "vote": asdict(vote)})
        return self.approvals.described(asked, now)

    def listed(self) -> list[dict[str, Any]]:
        """The calls that wait, and those that were answered and not yet forgotten, with all that people are to judge."""
        return [*self.approvals.listed(self._around.now())]

    # Approvals of calls.

    def approved(self, binding: tuple[str, ...], need: Approval) -> Asked | None:
        """The approval by which this call may pass what needs it, once."""
        found = self.approvals.found(binding, need, self._around.now())
        return found[0] if found and found[1] == "approved" else None

    def use(self, asked: Asked) -> None:
        """The approval is consumed: written down before the call is. Raises `AuditUnavailable`."""
        self.publish({"id": f"u-{asked.id}", "kind": "used", "of": asked.id, "agent": asked.agent, "expires": asked.expires})

    def ask(self, refused: Decision, need: Approval, binding: tuple[str, ...], shown: Mapping[str, Any]) -> Decision:
        """Ask people about a call; the denial that it gets meanwhile, or since they said no."""
        now = self._around.now()
        asked, status = self.approvals.found(binding, need, now) or (None, "")
        if asked and status == "rejected":
            told = self.approvals.described(asked, now)
            return deny(Code.APPROVAL_REJECTED, f"people were asked ({asked.id}) and said no", rule=need.rule, approval=told)
        if asked is None:
            if self.approvals.waiting(binding[0], now) >= MOST_WAITING:
                return deny(refused.code or Code.APPROVAL_REQUIRED, f"{refused.detail}; {_CROWDED}", rule=refused.rule)
            asked = Asked.about(need, binding, refused.detail, shown, now, f"a-{self._around.random_id()}")
            self._put(asked)
            people = "person" if asked.approvers == 1 else f"{asked.approvers} people"
            what = f"{binding[0]} waits for {people} to approve {binding[2]} ({asked.id}): {refused.detail}"
            self._around.send(Alert("approval", Severity.LOW, what, asked.id, self._who(binding[0])))
        elif not asked.shown:
            self._put(replace(asked, shown=shown))
        told = self.approvals.described(asked, now)
        code = refused.code or Code.APPROVAL_REQUIRED
        return deny(code, f"{refused.detail}; approval {asked.id}", rule=refused.rule, approval=told)

    def _put(self, asked: Asked) -> None:
        self.publish({"id": asked.id, "kind": "asked", "asked": asdict(asked), "expires": asked.expires})

    def sweep(self) -> None:
        """Let go of what is over, and record what nobody answered or used, and what could not be recorded before."""
        self._catch_up()
        now = self._around.now()
        for asked in self.approvals.forget(now):
            self._end(asked, "expired")
        over = [notice_id for notice_id, document in self._notices.items() if ends(document) + _KEPT_S <= now]
        for notice_id in over:
            del self._notices[notice_id]
        self._around.unshare(over)

    def _end(self, asked: Asked, how: str) -> None:
        notice = {"id": f"e-{asked.id}", "kind": how, "of": asked.id, "agent": asked.agent, "asked": {"binding": asked.binding}}
        try:
            self._record(notice)
        except AuditUnavailable as error:
            log.error("the end of approval %s is not in the record: %s", asked.id, error)  # noqa: TRY400


_CROWDED = f"{MOST_WAITING} of its calls wait for people already, so nobody is asked about this one"
