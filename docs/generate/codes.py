"""The codes of denials and of findings; the latter with examples that `broker check` made."""

import ast
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from broker.manifest.findings import Finding
from broker.manifest.load import load_texts
from broker.manifest.strict_yaml import MAX_BYTES
from broker.policy.types import Code
from broker.protocols.problem import STATUS, TYPE_PREFIX, WORDS
from docs.generate.page import MADE, cell


def codes() -> str:
    """Codes of denials, then codes of findings."""
    unused = _unused()
    rows = "\n".join(_denial(code) for code in Code if code not in unused)
    later = ", ".join(f"`{code}`" for code in unused)
    reserved = f"Reserved for parts that are not built yet; no call gets them today: {later}.\n\n" if unused else ""
    found = "\n".join(_finding(example) for _, example in sorted(_findings().items()))
    return (
        f"{MADE}# Codes\n\n"
        "Both lists are stable: programs, dashboards and policy tests match on these words.\n\n"
        "## Denials\n\n"
        f"`code` in a problem body (its `type` is `{TYPE_PREFIX}` and the code), in the audit record, and as a label of the "
        "metric `broker_decisions_total`. At the proxy door `agent_unknown` answers 407.\n\n"
        f"| code | HTTP | title | next steps, as the agent reads them |\n| --- | --- | --- | --- |\n{rows}\n\n"
        f"{reserved}"
        "## Findings of `broker check`\n\n"
        "Each with an example: the message, and after the first semicolon what to do. Warnings don't change the exit code.\n\n"
        f"| code | severity | example |\n| --- | --- | --- |\n{found}\n"
    )


def _denial(code: Code) -> str:
    title, steps = WORDS[code]
    return f"| `{code}` | {STATUS[code]} | {title} | {cell(' '.join(steps))} |"


def _unused() -> tuple[Code, ...]:
    """The codes that no module decides on."""
    ours = {Path("broker/policy/types.py"), Path("broker/protocols/problem.py")}
    text = "".join(path.read_text() for path in Path("broker").rglob("*.py") if path not in ours)
    named = {code for code in Code if f"Code.{code.name}" in text}
    return tuple(code for code in Code if code not in named)


def _finding(example: Finding) -> str:
    return f"| `{example.code}` | {example.severity} | {cell(f'{example.message}; {example.advice}')} |"


_PLAINTEXT = b"""{apiVersion: broker/v1, kind: Tool, metadata: {name: shop, owner: web},
spec: {protocol: rest, endpoint: "http://shop.example", unsafe_plaintext: true, operations: {}}}"""
_PLATFORM = b"""{apiVersion: broker/v1, kind: Platform, metadata: {name: acme, owner: platform},
spec: {ledger: {unsafe_reads_without_redis: true}}}"""

_ENDING = b"""
- {apiVersion: broker/v1, kind: Tool, metadata: {name: shop, owner: web}, spec: {protocol: rest, endpoint: "https://shop.example",
   operations: {list: {match: {method: GET, path: /}, effect: read}}}}
- {apiVersion: broker/v1, kind: Agent, metadata: {name: bot, owner: web}, spec: {identity: {token: true},
   tools: {shop: {operations: {list: {expires: SOON}}}}}}
""".replace(b"\n-", b"\n---\n")


def _findings() -> Mapping[str, Finding]:
    """Each code with a finding of it, from tests/bad_manifests and what is too large, empty or allowed to stand there."""
    examples: dict[str, Finding] = {}
    folder = Path("tests/bad_manifests")
    bad = [{path.name: path.read_bytes()} for path in sorted(folder.glob("*.yaml"))]
    more: list[dict[str, bytes]] = [
        {},
        {"large.yaml": b"#" * (MAX_BYTES + 1)},
        {"shop.yaml": _PLAINTEXT},
        {"acme.yaml": _PLATFORM},
        {"bot.yaml": _ENDING.replace(b"SOON", (datetime.now(UTC) + timedelta(days=7)).date().isoformat().encode())},
    ]
    for texts in (*bad, *more):
        for finding in load_texts(texts, folder).findings:
            examples.setdefault(finding.code, finding)
    named = {code for path in Path("broker/manifest").glob("*.py") for code in _named_codes(ast.parse(path.read_text()))}
    if missing := named - set(examples):
        raise SystemExit(f"no example shows these codes of findings: {', '.join(sorted(missing))}; add a file to {folder}")
    return examples


_CODE = re.compile(r"[a-z]+(_[a-z]+)+\Z")


def _named_codes(tree: ast.AST) -> Iterator[str]:
    """Words of a code's form that stand before something else in a tuple (a problem) or in a call that makes a finding."""
    for node in ast.walk(tree):
        for part in _parts(node)[:-1]:
            if isinstance(part, ast.Constant) and isinstance(part.value, str) and _CODE.match(part.value):
                yield part.value


def _parts(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Tuple):
        is_place = any(isinstance(part, ast.Constant) and part.value == "spec" for part in node.elts[:1])
        return [] if is_place else node.elts
    makes = isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("note", "Finding"))
    return node.args if isinstance(node, ast.Call) and makes else []
