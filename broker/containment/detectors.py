"""What looks anomalous in the decisions and outcomes of agents. Read `Detectors.decided` top to bottom.

Laws: pure; `now` is an argument. What is seen counts for the proven agent and for nobody else, and without one for nobody. What
is kept of an agent has one size, whatever it does (see `broker/containment/counters.py`, and there how exact counts are).

    event                                                detectors
    ─────────────────────────────────────────────────    ───────────────────────────────────────────────────
    any decision about a decoy host or tool              honeytoken
    …_not_declared                                       probing, undeclared_host
    a denial that is the agent's own doing (`DENIED`)    denied_burst
    a spent budget (`SPENT`)                             budget_exhausted
    a whole call that was weighed against its limits     identical_calls
    a call let go that writes or destroys                write_spike, destructive_spike
    an outcome                                           upstream_failures
    something in a request (`content`)                   honeytoken, secret_in_request, credential_in_request
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from broker.audit.record import Attempt, Ending
from broker.containment.counters import MOST, Agents, Counter, Kept, Layout, hashed
from broker.policy.containment import COUNTED, MOST_TARGETS, Action, Decoys, Detector, Rule
from broker.policy.denials import by_canary
from broker.policy.types import Code, Decision, Effect, Verdict
from broker.redaction import redacted

DENIED = frozenset(
    {
        Code.HOST_NOT_DECLARED, Code.AUTHORITY_MISMATCH, Code.TOOL_NOT_DECLARED, Code.OPERATION_NOT_DECLARED, Code.PARAMS_INVALID,
        Code.BODY_MALFORMED, Code.BODY_TOO_LARGE, Code.ENCODING_NOT_ALLOWED, Code.PROTOCOL_VIOLATION, Code.FLOW_FORBIDDEN,
        Code.APPROVAL_REJECTED,
    }
)  # fmt: skip
"""What an agent is denied for by what it asks: no fault of ours, no limit, no wait for people, not that it is cut off already."""
SPENT = frozenset({Code.BUDGET_EXHAUSTED, Code.STEPS_EXHAUSTED})
"""What an agent is denied for that has no budget left."""
UNDECLARED = frozenset({Code.HOST_NOT_DECLARED, Code.TOOL_NOT_DECLARED, Code.OPERATION_NOT_DECLARED})
"""What an agent is denied for that tries what is not declared for it."""
# Who is not served through no doing of its own calls again, and rightly so.
_NOT_SERVED = frozenset(
    {
        Code.CREDENTIAL_UNAVAILABLE, Code.AUDIT_UNAVAILABLE, Code.LEDGER_UNAVAILABLE, Code.INTERNAL_FAULT, Code.AGENT_REVOKED,
        Code.AGENT_READ_ONLY, Code.APPROVAL_REQUIRED, Code.UPSTREAM_UNAVAILABLE,
    }
)  # fmt: skip

_LOOPS, _SIGHTS = 6, 16  # calls whose repetitions are counted; calls before them that are known to have been seen once
_TOOLS = 6  # tools that fail at the same time; with more, those that failed least make room
_SETS, _WAYS = 4096, 16  # sights of hosts, over all agents: 256 KiB
_SHOWN = 80  # characters of what an agent chose

_WORDS = {
    Detector.DENIED_BURST: "{n} calls were denied within {within}; the last: {last}",
    Detector.PROBING: "{n} different hosts, tools or operations that are not declared within {within}; the last: {last}",
    Detector.UPSTREAM_FAILURES: "{n} calls failed one after the other at {last}",
    Detector.IDENTICAL_CALLS: "{n} identical calls within {within}: {last}",
    Detector.BUDGET_EXHAUSTED: "a budget has no room left: {last}",
    Detector.WRITE_SPIKE: "{n} calls that write or destroy within {within}; the last: {last}",
    Detector.DESTRUCTIVE_SPIKE: "{n} calls that destroy within {within}; the last: {last}",
    Detector.UNDECLARED_HOST: "a host that is not declared was tried for the first time: {last}",
    Detector.HONEYTOKEN: "a decoy was touched, which no honest call does: {last}",
    Detector.SECRET_IN_REQUEST: "a request held what has the shape of a secret: {last}",
    Detector.CREDENTIAL_IN_REQUEST: "a request held a credential that the broker injects, so it has leaked: {last}",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that fired: about whom, in which run (empty for the implicit one), and what was seen, as one sentence for people.

    `decision_ids` are the latest few that it rests on, newest last.
    """

    rule: Rule
    agent: str
    run_id: str
    what: str
    decision_ids: tuple[str, ...]


class Detectors:
    """Watches agents by the platform's rules. Each method gives what fired by the event that it is told of.

    Raises `ValueError` for a rule about probing that counts more than can be told apart, which no manifest may write.
    """

    def __init__(self, rules: tuple[Rule, ...], decoys: Decoys) -> None:
        layout = Layout(max((length for rule in rules for length in (rule.window, rule.cooldown)), default=0))
        self._counters = {
            each: tuple(_counter(rule, layout) for rule in rules if rule.detector is each and rule.count) for each in Detector
        }
        probing, loops, streaks = (
            self._counters[each] for each in (Detector.PROBING, Detector.IDENTICAL_CALLS, Detector.UPSTREAM_FAILURES)
        )
        self._ids = {each: layout.id(_SLOTS.get(each, 1)) for each in Detector if each in COUNTED and self._counters[each]}
        self._most = max((each.count for each in probing), default=0)
        if self._most > MOST_TARGETS:
            raise ValueError(f"a rule about probing counts at most {MOST_TARGETS} different targets")
        self._targets, self._target_times = layout.word(self._most), layout.time(self._most)
        if loops:
            self._loops, self._loop_counts, self._loop_times = layout.word(_LOOPS), layout.word(_LOOPS), layout.time(_LOOPS)
            self._sights, self._sight_times, self._next_sight = layout.word(_SIGHTS), layout.time(_SIGHTS), layout.word()
            self._longest_loop = max(each.window for each in loops)
        if streaks:
            self._tools, self._streaks = layout.word(_TOOLS), layout.word(_TOOLS)
        self._decoy_hosts = frozenset(host.lower().strip("[]").removesuffix(".") for host in decoys.hosts)
        self._decoy_tools = decoys.tools
        self._hosts = array("I", bytes(4 * _SETS * _WAYS) if self._counters[Detector.UNDECLARED_HOST] else b"")
        self._agents = Agents(layout)

    def decided(self, about: Attempt, decision: Decision, now: float) -> tuple[Finding, ...]:
        """A call was decided on. `now` in seconds, by a clock that nobody sets."""
        agent, code = about.agent.get("name", ""), decision.code
        if not agent or by_canary(about.host, code):
            return ()
        kept, found = self._agents.at(agent, now), list[Finding]()
        if (self._decoy_hosts or self._decoy_tools) and (decoy := self._decoy(about)):
            found += self._at_once(kept, about, Detector.HONEYTOKEN, decoy)
        if code in UNDECLARED:
            found += self._undeclared(kept, about, code)
        if code in DENIED and decision.verdict is Verdict.DENY:
            found += self._counted(kept, about, Detector.DENIED_BURST, code or "")
        elif code in SPENT:
            found += self._at_once(kept, about, Detector.BUDGET_EXHAUSTED, decision.detail)
        if about.args_hash and about.effect and code not in _NOT_SERVED:
            found += self._repeated(kept, about)
        if decision.allowed and about.effect in {Effect.WRITE, Effect.DESTRUCTIVE}:
            found += self._counted(kept, about, Detector.WRITE_SPIKE, _call(about))
            if about.effect == Effect.DESTRUCTIVE:
                found += self._counted(kept, about, Detector.DESTRUCTIVE_SPIKE, _call(about))
        return tuple(found)

    def ended(self, about: Attempt, ending: Ending, error: str, now: float) -> tuple[Finding, ...]:
        """A call that was let go has ended. `error` is the upstream's failure as a word of the metrics, empty for none.

        Any answer without an error ends a streak; no answer (the agent went away) says nothing about the tool.
        """
        agent, counters = about.agent.get("name", ""), self._counters[Detector.UPSTREAM_FAILURES]
        if not agent or not counters or not (error or ending.status):
            return ()
        if not error:
            if (kept := self._agents.get(agent)) and (slot := kept.find(hashed(about.tool), self._tools, _TOOLS)) >= 0:
                kept.numbers[self._tools + slot] = kept.numbers[self._streaks + slot] = 0
            return ()
        kept = self._agents.at(agent, now)
        slot, streak = self._failed(kept, about.tool)
        place, found = self._ids[Detector.UPSTREAM_FAILURES] + slot, list[Finding]()
        for each in counters:
            if streak >= each.count and each.fires(kept.numbers, about.run_id):
                found.append(_finding(each, about, kept.prior(place, streak - 1), f"{about.tool} ({error})", str(streak)))
                if each.rule.action is Action.REVOKE_RUN:  # the next run's streak is its own
                    kept.numbers[self._streaks + slot] = 0
        kept.remember(place, about.decision_id)
        return tuple(found)

    def content(self, about: Attempt, detector: Detector, what: str, now: float) -> tuple[Finding, ...]:
        """Something was seen in a request: a decoy, a secret, or what the broker injected. `what` says where, never the value."""
        agent = about.agent.get("name", "")
        return tuple(self._at_once(self._agents.at(agent, now), about, detector, what)) if agent else ()

    def forget(self, agent: str) -> None:
        """Begin anew with an agent, so that what it did before its release does not count once more."""
        self._agents.forget(agent)

    def _at_once(self, kept: Kept, about: Attempt, detector: Detector, last: str) -> Iterator[Finding]:
        for each in self._counters[detector]:
            if each.fires(kept.numbers, about.run_id):
                yield _finding(each, about, (), last)

    def _counted(self, kept: Kept, about: Attempt, detector: Detector, last: str, slot: int = 0) -> Iterator[Finding]:
        if not (counters := self._counters[detector]):
            return
        numbers, now, place = kept.numbers, kept.now, self._ids[detector] + slot
        for each in counters:
            known = each.counted(numbers, now, slot)
            if known and each.fires(numbers, about.run_id):
                shown = str(known) if each.every == 1 else f"at least {known}"
                yield _finding(each, about, kept.prior(place, known - 1), last, shown)
        kept.remember(place, about.decision_id)

    def _decoy(self, about: Attempt) -> str:
        if about.tool in self._decoy_tools:
            return f"the tool {about.tool}"
        if self._decoy_hosts and (host := _host(about.host)) in self._decoy_hosts:
            return f"the host {host}"
        return ""

    # Probing: the latest different targets, each with the time of its last sight.

    def _undeclared(self, kept: Kept, about: Attempt, code: Code | None) -> Iterator[Finding]:
        is_told = code is Code.HOST_NOT_DECLARED and self._counters[Detector.UNDECLARED_HOST]
        if is_told and (host := _host(about.host)) and self._is_new(hash((about.agent["name"], host))):
            yield from self._at_once(kept, about, Detector.UNDECLARED_HOST, host)
        if self._most:
            yield from self._probed(kept, about, _target(about, code))

    def _probed(self, kept: Kept, about: Attempt, target: tuple[str, ...]) -> Iterator[Finding]:
        numbers, first, end = kept.numbers, self._target_times, self._target_times + self._most
        word, place = hashed(target), self._ids[Detector.PROBING]
        slot = kept.find(word, self._targets, self._most)
        is_new = slot < 0
        if is_new:
            slot = numbers.index(min(numbers[first:end]), first) - first
            numbers[self._targets + slot] = word
        numbers[first + slot] = kept.now
        times = sorted(numbers[first:end])
        for each in self._counters[Detector.PROBING]:
            since = each.since(numbers)
            if times[-each.count] > since and each.fires(numbers, about.run_id):
                different = sum(time > since for time in times)
                yield _finding(each, about, kept.prior(place, different - 1), " ".join(target), str(different))
        if is_new:
            kept.remember(place, about.decision_id)

    def _is_new(self, sight: int) -> bool:
        """Whether it is the first sight that is remembered: of those that share a set, the latest sixteen are."""
        first, word = (sight >> 32) % _SETS * _WAYS, sight & 0xFFFF_FFFF or 1
        known = self._hosts[first : first + _WAYS]
        if word in known:
            return False
        self._hosts[first + 1 : first + _WAYS] = known[:-1]
        self._hosts[first] = word
        return True

    # Identical calls: a few are counted, each from its second sight on, so that calls which come once don't push them out.

    def _repeated(self, kept: Kept, about: Attempt) -> Iterable[Finding]:
        if not self._counters[Detector.IDENTICAL_CALLS]:
            return ()
        word = hashed((about.tool, about.operation, about.args_hash, about.run_id))
        slot = kept.find(word, self._loops, _LOOPS)
        if slot < 0 and (slot := self._second_sight(kept, word)) < 0:
            return ()
        numbers = kept.numbers
        numbers[self._loop_times + slot] = kept.now
        numbers[self._loop_counts + slot] = min(numbers[self._loop_counts + slot] + 1, MOST)
        return self._counted(kept, about, Detector.IDENTICAL_CALLS, _call(about), slot)

    def _second_sight(self, kept: Kept, word: int) -> int:
        """Where it is counted from now on; -1 for a first sight, which is noted."""
        numbers = kept.numbers
        sight = kept.find(word, self._sights, _SIGHTS)
        if sight < 0:
            at = numbers[self._next_sight]
            numbers[self._sights + at], numbers[self._sight_times + at] = word, kept.now
            numbers[self._next_sight] = (at + 1) % _SIGHTS
            return -1
        slot = self._least_loop(kept)
        numbers[self._loops + slot], numbers[self._loop_counts + slot], numbers[self._sights + sight] = word, 1, 0
        for each in self._counters[Detector.IDENTICAL_CALLS]:
            each.clear(numbers, slot)
            each.counted(numbers, numbers[self._sight_times + sight], slot)
        kept.forget_ids(self._ids[Detector.IDENTICAL_CALLS] + slot)
        return slot

    def _least_loop(self, kept: Kept) -> int:
        """The one to give up: which no window holds any more, or else which came the fewest times, or else the longest ago."""
        numbers, now = kept.numbers, kept.now

        def worth(slot: int) -> tuple[bool, int, int]:
            seen = numbers[self._loop_times + slot]
            return bool(seen) and now - seen < self._longest_loop, numbers[self._loop_counts + slot], seen

        return min(range(_LOOPS), key=worth)

    # Upstream failures: a streak for each of the tools that fail.

    def _failed(self, kept: Kept, tool: str) -> tuple[int, int]:
        """One more failure of the tool: which streak that is, and how long."""
        numbers, word = kept.numbers, hashed(tool)
        slot = kept.find(word, self._tools, _TOOLS)
        if slot < 0:
            slot = min(range(_TOOLS), key=lambda each: numbers[self._streaks + each])
            numbers[self._tools + slot], numbers[self._streaks + slot] = word, 0
            kept.forget_ids(self._ids[Detector.UPSTREAM_FAILURES] + slot)
        streak = numbers[self._streaks + slot] = min(numbers[self._streaks + slot] + 1, MOST)
        return slot, streak


_SLOTS = {Detector.IDENTICAL_CALLS: _LOOPS, Detector.UPSTREAM_FAILURES: _TOOLS}


def _counter(rule: Rule, layout: Layout) -> Counter:
    if rule.detector in {Detector.PROBING, Detector.UPSTREAM_FAILURES} or rule.detector not in COUNTED:
        return Counter(rule, rule.count, 0, layout)
    # A call is identical to another, so there are two.
    least = 2 if rule.detector is Detector.IDENTICAL_CALLS else 1
    return Counter(rule, max(least, rule.count), _SLOTS.get(rule.detector, 1), layout)


def _finding(counter: Counter, about: Attempt, prior: Iterable[str], last: str, shown: str = "") -> Finding:
    rule = counter.rule
    what = _WORDS[rule.detector].format(n=shown, within=span(rule.window), last=_bounded(last))
    return Finding(rule, about.agent["name"], about.run_id, what, (*prior, about.decision_id))


def _host(authority: str) -> str:
    """The host of an authority with or without a port, or of an absolute URI: in lower case, without a last dot."""
    text = authority.partition("://")[2] or authority
    text = text.partition("/")[0].rpartition("@")[2].lower()
    host = text.partition("]")[0].removeprefix("[") if text.startswith("[") else text.partition(":")[0]
    return host.removesuffix(".")


def _target(about: Attempt, code: Code | None) -> tuple[str, ...]:
    """What was tried, as precisely as it is known. At the base-URL door a tool's name begins the path."""
    host = about.host.lower()
    if code is Code.HOST_NOT_DECLARED:
        return ("host", host)
    if code is Code.TOOL_NOT_DECLARED:
        return ("tool", about.tool) if about.tool else ("tool", host, about.path.removeprefix("/").partition("/")[0])
    return ("operation", about.tool or host, about.operation or f"{about.method} {about.path}")


def _call(about: Attempt) -> str:
    return f"{about.tool}/{about.operation}"


def _bounded(text: str) -> str:
    """What an agent may have chosen, as people may be shown it: short, printable, without secrets."""
    text = redacted(text[: 4 * _SHOWN])
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def span(seconds: int) -> str:
    """A length of time for people, such as `10 min`."""
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds and not seconds % size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
