"""`broker explain`: the decision on a call and how it came about. Nothing is sent, nothing is spent."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import click
import orjson

from broker.cli import options
from broker.errors import UsageError
from broker.manifest.findings import FORMATS, printable
from broker.manifest.load import load
from broker.policy.agreement import Wire, destination
from broker.policy.evaluate import View, admit, evaluate
from broker.policy.snapshot import CredentialSpec, PolicySnapshot
from broker.policy.strip import strip
from broker.policy.types import Decision, Door, Refusal, Request, deny
from broker.protocols.problem import problem
from broker.protocols.registry import ADAPTERS


@dataclass(frozen=True, slots=True)
class Explained:
    """The decision, and what each step on the way to it found."""

    decision: Decision
    steps: Mapping[str, str]


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
    loaded = load(manifests)
    if loaded.snapshot is None:
        click.echo(FORMATS["text"](loaded.findings), err=True, nl=False)
        raise UsageError("the manifests have errors", f"correct them; `broker check {manifests}` shows them again")
    explained = explain_call(loaded.snapshot, agent, request_of(method, url, data, headers), url, data.encode())
    _print(explained, agent, as_json=as_json)
    return 0 if explained.decision.allowed else 1


def request_of(method: str, url: str, data: str, headers: tuple[str, ...]) -> Request:
    """The request as a client would send it."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UsageError(f"{url!r} is no URL", "write it whole, such as https://api.github.com/repos/acme/web/issues")
    pairs = [(name.strip().lower(), value.strip()) for name, _, value in (header.partition(":") for header in headers)]
    if data and not any(name == "content-type" for name, _ in pairs):
        pairs.append(("content-type", "application/json"))
    if data:
        pairs.append(("content-length", str(len(data.encode()))))
    return Request(method.upper(), parts.path or "/", parts.query, tuple(pairs))


def explain_call(snapshot: PolicySnapshot, name: str, request: Request, url: str, body: bytes) -> Explained:
    """Decide on a call as the broker would, by the same functions, and keep what each found."""
    agent = admit(snapshot, name, View())
    if isinstance(agent, Decision):
        return Explained(agent, {})
    steps = {"agent": f"{agent.name}, {agent.rule}"}
    parts = urlsplit(url)
    found = destination(snapshot, Wire(Door.PROXY, parts.scheme, parts.netloc, request.path, "", "", route_tool=None))
    if isinstance(found, Decision):
        return Explained(found, steps)
    tool, path = found
    steps["tool"] = f"{tool.name} ({tool.protocol}), {tool.rule}"
    clean = strip(tool, request, path)
    if clean.removed or clean.query_changed:
        steps["stripped"] = ", ".join(clean.removed) or "credential-like query parameters"
    adapter = ADAPTERS[tool.protocol]
    limit = adapter.body_limit(tool, clean.request)
    call = limit if isinstance(limit, Refusal) and body else adapter.recognise(tool, clean.request, body)
    if isinstance(call, Refusal):
        return Explained(deny(call.code, call.detail, violations=call.violations), steps)
    decision = evaluate(snapshot, agent, call)
    operation = tool.operations.get(call.operation or "")
    steps["operation"] = f"{operation.name} ({operation.effect}), {operation.rule}" if operation else call.label
    if decision.allowed and tool.credential:
        steps["credential"] = _credential(tool.credential)
    return Explained(decision, steps)


def _credential(spec: CredentialSpec) -> str:
    scopes = spec.settings.get("scopes")
    return f"{spec.issuer} in the header {spec.header}" + (f", scopes {scopes}" if scopes else "")


def _print(explained: Explained, agent: str, *, as_json: bool) -> None:
    decision = explained.decision
    document = {
        "verdict": decision.verdict,
        "code": decision.code,
        "detail": decision.detail,
        "rule": decision.rule,
        "agent": agent,
        "steps": explained.steps,
        "violations": [asdict(violation) for violation in decision.violations],
        "next_steps": problem("", agent, "", "", decision)["next_steps"] if decision.code else [],
    }
    if as_json:
        click.echo(orjson.dumps(document))
        return
    click.echo(printable(f"{decision.verdict}{f' {decision.code}: {decision.detail}' if decision.code else ''}"))
    for step, what in explained.steps.items():
        click.echo(printable(f"  {step:<11}{what}"))
    for violation in decision.violations:
        click.echo(printable(f"  {'violation':<11}{violation.pointer}: {violation.message} ({violation.rule})"))
    if decision.rule and not decision.violations:
        click.echo(f"  {'rule':<11}{decision.rule}")
