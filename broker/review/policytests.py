"""Policy tests: calls, what went before them, and the decisions they must get, through the real exchange.

Law: a case passes when every word of its expectation is what the broker would have said; what is not written is not compared.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from broker.errors import UsageError
from broker.manifest.admission import Source
from broker.manifest.findings import Finding
from broker.manifest.models import Case, Expectation, PolicyTest, Spent
from broker.policy.limits import Measure
from broker.policy.snapshot import PolicySnapshot
from broker.policy.types import Code
from broker.rehearsal import Before, Call, Rehearsal, call_of


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one case: `wrong` says what differs, empty where it passed. `allowed` names an operation that was allowed."""

    agent: str
    name: str
    file: str
    line: int
    column: int
    wrong: str
    allowed: str = ""

    @property
    def finding(self) -> Finding:
        """The failure, as `check` reports what is wrong."""
        advice = "correct the manifest, or what the case expects"
        return Finding(self.file, self.line, self.column, "test_failed", f"{self.name!r}: {self.wrong}", advice)


def results(snapshot: PolicySnapshot, sources: tuple[Source, ...], now: float) -> Iterator[Result]:
    """One for each case of each test, in the order in which they stand. `now` is in seconds since the epoch."""
    rehearsal = Rehearsal(snapshot, now)
    for source in sources:
        if isinstance(source.model, PolicyTest):
            for index, case in enumerate(source.model.spec.cases):
                place = source.document.at(("spec", "cases", index, "name"))
                yield _result(snapshot, rehearsal, source.model.spec.agent, case, (source.file, *place))


def _result(snapshot: PolicySnapshot, rehearsal: Rehearsal, agent: str, case: Case, place: tuple[str, int, int]) -> Result:
    call = _call(snapshot, case)
    if agent not in snapshot.agents and case.expect.code != Code.AGENT_UNKNOWN:
        # Or each denial that is expected would come, whatever the manifests say.
        call = f"there is no manifest of {agent!r}"
    if isinstance(call, str):
        return Result(agent, case.name, *place, call)
    before = Before(_spent(case.state.spent), case.state.labels, case.state.approvals)
    try:
        found = rehearsal.call(agent, call, before)
    except UsageError as error:
        return Result(agent, case.name, *place, str(error))
    record = found.record
    allowed = f"{record['tool']}/{record['operation']}" if record["verdict"] == "allow" else ""
    return Result(agent, case.name, *place, _differs(case.expect, record), allowed)


def _call(snapshot: PolicySnapshot, case: Case) -> Call | str:
    """The request that is made; or why there is none."""
    spec = case.call
    headers = tuple((name.lower(), value) for name, value in spec.headers.items())
    if spec.tool is None or spec.operation is None:
        sent = Call(spec.method or "", spec.url or "", headers)
        return sent if spec.body is None else sent.with_json(spec.body)
    tool = snapshot.tools.get(spec.tool)
    if tool is None:
        return f"the catalog has no tool {spec.tool!r}"
    made = call_of(tool, spec.operation, spec.arguments if spec.body is None else spec.body, headers)
    return made or f"{spec.tool}/{spec.operation} is not known by its name alone; write method and url"


def _spent(spec: Spent) -> Mapping[Measure, int]:
    return {measure: amount for measure in Measure if (amount := getattr(spec, measure)) is not None}


def _differs(expect: Expectation, record: Mapping[str, Any]) -> str:
    """What is not as expected, and what was said instead; empty where all is."""
    violations = record["violations"]
    got = {
        "verdict": record["verdict"],
        "operation": f"{record['tool']}/{record['operation']}",
        "credential": (record["credential"] or {}).get("issuer"),
        "code": record["code"],
        "pointer": violations[0]["pointer"] if violations else None,
    }
    wanted = {word: str(value) for word, value in expect.model_dump(exclude_none=True).items()}
    wrong = [f"{word} {value}" for word, value in wanted.items() if got[word] != value]
    if not wrong:
        return ""
    said = f"{got['verdict']} {got['code']}: {record['detail']}" if got["code"] else f"{got['verdict']} of {got['operation']}"
    more = ", ".join(f"{word} {got[word]}" for word in wanted if got[word] != wanted[word] and word not in ("verdict", "code"))
    return f"expected {', '.join(wrong)}; got {said}{f' ({more})' if more else ''}"


def coverage(snapshot: PolicySnapshot, found: tuple[Result, ...]) -> Mapping[str, tuple[int, tuple[str, ...]]]:
    """For each agent, how many operations it is granted, and which of them no passing case shows to be allowed."""
    shown = {(result.agent, result.allowed) for result in found if not result.wrong}
    covered = {}
    for name, agent in sorted(snapshot.agents.items()):
        granted = [f"{tool}/{operation}" for tool, grants in agent.tools.items() for operation in grants]
        covered[name] = len(granted), tuple(each for each in granted if (name, each) not in shown)
    return covered
