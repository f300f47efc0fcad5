"""`broker explain`: the decision on a call and how it came about. Nothing is sent, nothing is spent."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import orjson
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.cli import options
from broker.credentials import issuers
from broker.credentials.base import CredentialUnavailable, Occasion
from broker.credentials.leases import Leases
from broker.errors import UsageError
from broker.manifest.findings import printable
from broker.policy.agreement import Wire, destination
from broker.policy.evaluate import View, admit, approval_for, evaluate
from broker.policy.snapshot import PolicySnapshot
from broker.policy.strip import strip
from broker.policy.types import Code, Decision, Door, Refusal, Request, deny
from broker.protocols.problem import problem
from broker.protocols.registry import ADAPTERS


@click.command()
@click.option("--agent", required=True, help="The agent's name.")
@click.argument("method")
@click.argument("url")
@click.option("--data", default="", help="The request's body; JSON unless a content-type header says otherwise.")
@click.option("--header", "headers", multiple=True, metavar="NAME: VALUE", help="A request header; may be given again.")
@options.manifests
@options.as_json
def explain(*, agent: str, method: str, url: str, data: str, headers: tuple[str, ...], manifests: Path, as_json: bool) -> int:
    """Say what would happen to the call METHOD URL, and why. Ends with 0 for an allow, 1 for a denial."""
    steps: dict[str, str] = {}
    wire, request = request_of(method, url, data, headers)
    decision = decided(options.snapshot(manifests), agent, wire, request, data.encode(), steps=steps)
    document = _document(decision, agent, steps)
    if as_json:
        click.echo(orjson.dumps(document))
    else:
        for line in _lines(decision, steps, document["next_steps"]):
            click.echo(printable(line))
    return 0 if decision.allowed else 1


def request_of(method: str, url: str, data: str, headers: tuple[str, ...]) -> tuple[Wire, Request]:
    """The request as a client would send it through the proxy."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UsageError(f"{url!r} is no URL", "write it whole, such as https://api.github.com/repos/acme/web/issues")
    if bad := next((header for header in headers if not header.partition(":")[0].strip() or ":" not in header), None):
        raise UsageError(f"{bad!r} is no header", "write it as in 'x-run-id: 7'")
    pairs = [(name.strip().lower(), value.strip()) for name, _, value in (header.partition(":") for header in headers)]
    if data and not any(name == "content-type" for name, _ in pairs):
        pairs.append(("content-type", "application/json"))
    if data:
        pairs.append(("content-length", str(len(data.encode()))))
    request = Request(method, parts.path or "/", parts.query, tuple(pairs))
    return Wire(Door.PROXY, parts.scheme, parts.netloc, request.path, "", "", route_tool=None), request


def decided(snapshot: PolicySnapshot, name: str, wire: Wire, request: Request, body: bytes, *, steps: dict[str, str]) -> Decision:
    """The decision that the broker would make, by the same functions; `steps` gets what each found on the way."""
    agent = admit(snapshot, name, View())
    if isinstance(agent, Decision):
        return agent
    steps["agent"] = f"{agent.name}, {agent.rule}"
    found = destination(snapshot, wire)
    if isinstance(found, Decision):
        return found
    tool, path = found
    steps["tool"] = f"{tool.name} ({tool.protocol}), {tool.rule}"
    clean = strip(tool, request, path)
    if clean.removed or clean.query_changed:
        steps["stripped"] = ", ".join(clean.removed) or "credential-like query parameters"
    adapter = ADAPTERS[tool.protocol]
    limit = adapter.body_limit(tool, clean.request)
    if isinstance(limit, int) and len(body) > limit:
        return deny(Code.BODY_TOO_LARGE, f"the body is larger than the {limit} bytes that this operation takes")
    call = limit if isinstance(limit, Refusal) and body else adapter.recognise(tool, clean.request, body)
    if isinstance(call, Refusal):
        return deny(call.code, call.detail, violations=call.violations)
    operation = tool.operations.get(call.operation or "")
    decision = evaluate(snapshot, agent, call)
    if decision.allowed and (need := approval_for(agent, call, operation.effect if operation else None)):
        people = "a person" if need.approvers == 1 else f"{need.approvers} people"
        decision = deny(Code.APPROVAL_REQUIRED, f"{tool.name}/{call.operation} waits for {people} to approve it", rule=need.rule)
    steps["operation"] = f"{operation.name} ({operation.effect}), {operation.rule}" if operation else call.label
    if decision.allowed and tool.credential:
        pins = agent.tools[tool.name][operation.name].pins if operation else {}
        steps["credential"] = _credential(Occasion(agent, tool, operation, tool.credential, "", snapshot.max_ttl, pins))
    return decision


def _credential(occasion: Occasion) -> str:
    """The credential that the call would get, which nobody is asked for."""
    spec = occasion.spec
    issuer = issuers(Ed25519PrivateKey.generate(), lambda _: None)[spec.issuer]
    try:
        scopes = issuer.source.narrowed(occasion) if isinstance(issuer, Leases) else spec.settings.get("scopes", ())
    except CredentialUnavailable as error:
        return f"none can be had from {spec.issuer}: {error}"
    ttl = min(spec.settings.get("ttl") or occasion.max_ttl, occasion.max_ttl)
    life = "" if spec.issuer == "static" else f", for at most {ttl} s"
    return f"{spec.issuer}{', scopes ' if scopes else ''}{' '.join(scopes)}{life}, in {spec.placed}"


def _document(decision: Decision, agent: str, steps: Mapping[str, str]) -> dict[str, Any]:
    return {
        "verdict": decision.verdict,
        "code": decision.code,
        "detail": decision.detail,
        "rule": decision.rule,
        "agent": agent,
        "steps": steps,
        "violations": [asdict(violation) for violation in decision.violations],
        "next_steps": problem("", agent, "", "", decision)["next_steps"] if decision.code else [],
    }


def _lines(decision: Decision, steps: Mapping[str, str], next_steps: Sequence[str]) -> Iterator[str]:
    yield f"{decision.verdict} {decision.code}: {decision.detail}" if decision.code else decision.verdict
    for step, what in steps.items():
        yield f"  {step:<11}{what}"
    for violation in decision.violations:
        yield f"  {'violation':<11}{violation.pointer}: {violation.message} ({violation.rule})"
    if decision.rule and not decision.violations:
        yield f"  {'rule':<11}{decision.rule}"
    for step in next_steps:
        yield f"  {'next':<11}{step}"
