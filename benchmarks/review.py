"""How long reviewers wait for an answer from a log of a million records: whole processes, as they are typed.

`python -m benchmarks.review [--records 1000000]` writes such a log with the broker's own code into a folder for temporary files
(about 1.1 GB), has it indexed, asks, prints a table and takes the folder away.
"""

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.audit.log import AuditLog
from broker.audit.record import Attempt, Ending, decision_record, outcome_record
from broker.policy.types import ALLOW, Code, Decision, Usage, Violation, deny

TARGET_S = 2.0  # with the index up to date
_MOST = 5_000_000  # records: 6 GB
_BEGAN = 1_767_225_600.0
_AGENTS, _CALLS_OF_RUN, _ROUNDS = 60, 25, 3
_TOOLS = ("github", "stripe", "wiki", "jira", "openai")
_RULE = "manifests/agents/{}.yaml#/spec/tools/{}/operations/records.create/params/path/properties/owner/enum"


def calls(dice: random.Random) -> Iterator[tuple[float, Attempt, Decision]]:
    """Calls of some sixty agents in runs, a tenth of a second apart; of twenty, one is denied."""
    for number in range(sys.maxsize):
        name, tool = f"agent-{(number // 7) % _AGENTS}", dice.choice(_TOOLS)
        run, account = f"run-{number // 7 // _AGENTS // _CALLS_OF_RUN}-{name}", dice.randrange(100_000)
        attempt = Attempt(
            decision_id=f"{dice.getrandbits(80):020x}",
            revision="sha256:53b9c0ffee53b9c0ffee53b9c0ffee53b9c0ffee53b9c0ffee53b9c0ffee53b9",
            agent={"name": name, "spiffe": f"spiffe://acme.example/agents/{name}", "owner": "team", "oncall": "primary"},
            door="proxy",
            method="POST",
            host=f"api.{tool}.example",
            path=f"/repos/acme/web/records/{account}",
            tool=tool,
            operation="records.create",
            effect="write",
            data=("internal",),
            params={
                "path": {"owner": "acme", "id": str(account)},
                "body": {"title": f"Duplicate charge {account}", "amount": 1200},
            },
            run_id=run,
            step=number % _CALLS_OF_RUN,
            limits={"reserved": {"calls": 1, "bytes_out": 300}},
        )
        yield _BEGAN + number / 10, *_decided(attempt, dice)


def _decided(attempt: Attempt, dice: random.Random) -> tuple[Attempt, Decision]:
    name, tool = attempt.agent["name"], attempt.tool
    match dice.randrange(80):
        case 0:
            attempt.tool = attempt.operation = attempt.effect = ""
            attempt.method, attempt.host, attempt.path = "CONNECT", f"host-{dice.randrange(9)}.example:443", ""
            return attempt, deny(
                Code.HOST_NOT_DECLARED, "the manifest names no tool there", rule=f"manifests/agents/{name}.yaml#"
            )
        case 1:
            attempt.operation = f"GET {attempt.path}"
            return attempt, deny(Code.OPERATION_NOT_DECLARED, "no such operation", rule=f"manifests/tools/{tool}.yaml#/spec")
        case 2:
            broken = (Violation("/path/owner", _RULE.format(name, tool), "is none of the values that are allowed"),)
            return attempt, deny(Code.PARAMS_INVALID, "/path/owner is not allowed", rule=broken[0].rule, violations=broken)
        case 3:
            return attempt, deny(Code.RATE_LIMITED, "10/s is spent", rule=f"manifests/agents/{name}.yaml#/spec/limits/rate")
    return attempt, ALLOW


def written(state: Path, records: int) -> str:
    """Write a log of so many records; the ID of a run in its middle."""
    left, middle = records, ""
    with AuditLog(state / "audit", Ed25519PrivateKey.generate(), _BEGAN, 1) as log:
        for now, attempt, decision in calls(random.Random(7)):
            log.append(decision_record(now, round(now * 1e9), attempt, decision))
            left -= 1
            if decision.allowed and left:
                usage = Usage(900, 80, 300) if attempt.tool == "openai" else None
                log.append(
                    outcome_record(now + 0.08, round(now * 1e9), attempt, Ending(200, 1234, 81.25, usage=usage, usd=0.004))
                )
                left -= 1
            if left > records // 2:
                middle = attempt.run_id
            if left <= 0:
                break
    return middle


def answered(words: list[str], state: Path) -> tuple[float, int]:
    """How long the process took, in seconds, and how many lines it printed."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "broker.cli", *words, "--state", str(state)], check=True, capture_output=True)
    return time.perf_counter() - began, done.stdout.count(b"\n")


def measured(records: int) -> Iterator[dict[str, Any]]:
    """`[{what, s, lines}]`, the first of them while nothing is indexed, of the rest the median of three."""
    with tempfile.TemporaryDirectory(prefix="broker-review-") as folder:
        state = Path(folder)
        began = time.perf_counter()
        run = written(state, records)
        size = sum(path.stat().st_size for path in (state / "audit").iterdir())
        yield {"what": f"writing the log ({size / 1e6:,.0f} MB)", "s": time.perf_counter() - began, "lines": records}
        took, lines = answered(["denials"], state)
        size = (state / "review.db").stat().st_size
        yield {"what": f"the first `denials`, which indexes ({size / 1e6:,.0f} MB)", "s": took, "lines": lines}
        asked = (
            ["denials"],
            ["denials", "--json", "--since", "2026-01-01"],
            ["audit", "query", "--agent", "agent-7", "--code", "params_invalid"],
            ["audit", "query", "--verdict", "deny", "--limit", "0"],
            ["audit", "query", "--agent", "agent-7", "--tool", "wiki", "--verdict", "allow"],
            ["audit", "run", run],
        )
        for words in asked:
            rounds = [answered(words, state) for _ in range(_ROUNDS)]
            yield {"what": f"`{' '.join(words)}`", "s": statistics.median(took for took, _ in rounds), "lines": rounds[0][1]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000, help="how many records (default: a million)")
    records = parser.parse_args().records
    if not 0 < records <= _MOST:
        parser.error(f"--records is from 1 to {_MOST}")
    print(f"| {records:,} records | seconds | lines |\n| --- | --- | --- |")
    for each in measured(records):
        print(f"| {each['what']} | {each['s']:.2f} | {each['lines']:,} |", flush=True)


if __name__ == "__main__":
    main()
