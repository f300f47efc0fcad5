"""The detectors, and what their default rules make of the traces in tests/corpora.py."""

import ast
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from broker.containment.detectors import span
from broker.policy import containment
from broker.policy.containment import COUNTED, DEFAULTS, Detector, Rule
from docs.generate.page import MADE, cell
from tests import corpora


def detectors() -> str:
    """What is looked for by default, and what that finds in traces of honest work and of attacks."""
    meanings = _meanings(Path(containment.__file__), Detector.__name__)
    rules = "\n".join(_rule(rule, meanings[rule.detector.name]) for rule in sorted(DEFAULTS, key=_detector_order))
    benign, attacks = [corpora.judged(name) for name in corpora.BENIGN], [corpora.judged(name) for name in corpora.ATTACKS]
    attacked = "\n".join(map(_attack, attacks))
    calls, found = sum(each.calls for each in benign), sum(each.found.total() for each in benign)
    honest = "\n".join(f"| {each.name} | {each.calls:,} | {_found(each.found)} | {each.revokes} |" for each in benign)
    return (
        f"{MADE}# Detectors\n\n"
        "What the broker looks for in an agent's calls and their outcomes. [`containment`](kinds.md#containment) in the platform "
        "policy replaces a detector's rules; `[]` turns it off. What is seen counts for the agent whose identity was proven, on "
        "one broker. A rule of up to 20 events fires at exactly so many; a larger one at nine tenths to all of them.\n\n"
        "## Default rules\n\n"
        "| detector | fires at | what then happens | then quiet for | what is counted |\n| --- | --- | --- | --- | --- |\n"
        f"{rules}\n\n"
        "`tests/corpora.py` plays what follows, the same each time, through these rules.\n\n"
        "## Honest work\n\n"
        f"| trace | calls | findings | of them revoke |\n| --- | --- | --- | --- |\n{honest}\n"
        f"| all | {calls:,} | {found}, one in {calls // found:,} calls | {sum(each.revokes for each in benign)} |\n\n"
        "What alerts here can't be told by its calls from an agent gone wrong. Where it is usual, write a larger `count`.\n\n"
        "## Attacks\n\n"
        "Those with a star stand in the middle of honest work of the same agent. Calls and time are the attack's own, until its "
        "detector fired.\n\n"
        "| trace | detector | after calls | after | all findings | of them revoke |\n| --- | --- | --- | --- | --- | --- |\n"
        f"{attacked}\n\n"
        "Not found is what is slower or more varied than the rules say: a loop of calls that each come less than once in five "
        "seconds, which looks like polling; more than six calls that are repeated at the same time, or with sixteen other calls "
        "between the first two; a new target less than once in 72 minutes; a secret that is encoded or has no known shape.\n"
    )


def _meanings(path: Path, name: str) -> Mapping[str, str]:
    """What is written below each member of an enumeration."""
    body = next(node.body for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef) and node.name == name)
    told = {}
    for member, words in pairwise(body):
        if isinstance(member, ast.Assign) and isinstance(words, ast.Expr) and isinstance(words.value, ast.Constant):
            told[ast.unparse(member.targets[0])] = str(words.value.value)
    return told


def _detector_order(rule: Rule) -> int:
    return list(Detector).index(rule.detector)


def _rule(rule: Rule, meaning: str) -> str:
    within = f" in {span(rule.window)}" if rule.window else ""
    fires = f"{rule.count}{within}" if rule.detector in COUNTED else "the first"
    return f"| `{rule.detector}` | {fires} | `{rule.action}` | {span(rule.cooldown)} | {cell(meaning)} |"


def _attack(judged: corpora.Judged) -> str:
    attack = corpora.ATTACKS[judged.name]
    took = f"{judged.seconds:.1f} s" if judged.seconds < _MINUTES else f"{judged.seconds / 60:,.0f} min"
    star = " \\*" if attack.around else ""
    caught = f"{judged.after:,} | {took}" if judged.after else "not caught | "
    return f"| {judged.name}{star} | `{attack.detector}` | {caught} | {_found(judged.found)} | {judged.revokes} |"


def _found(found: Mapping[Detector, int]) -> str:
    return ", ".join(f"{number} `{detector}`" for detector, number in sorted(found.items())) or "none"


_MINUTES = 120  # seconds: what is longer is told in minutes
