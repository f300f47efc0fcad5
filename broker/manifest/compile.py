"""From admitted documents to the frozen snapshot.

Law: whoever calls this has found no error, so nothing is checked here and nothing can fail.
"""

import hashlib
import ipaddress
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from broker.manifest import models, platform, words
from broker.manifest.admission import Source, named_models
from broker.manifest.containment import alerting, decoys, rules
from broker.manifest.limits import bearing, limits, prices
from broker.policy.approval import Approval
from broker.policy.limits import Limit, label
from broker.policy.providers import MAX_OUTPUT, PROVIDERS, api_at
from broker.policy.schema import ParameterSchema, json_pointer
from broker.policy.snapshot import DEFAULT_SVID, Agent, CredentialSpec, Grant, Operation, PolicySnapshot, Spire, Tool, Upstream
from broker.policy.types import Effect

_Kind = TypeVar("_Kind", bound=words.Kind)
_Part = TypeVar("_Part")


class Made:
    """What parts of documents were compiled to, and from what: one that is compiled anew from the same is what it was before."""

    def __init__(self) -> None:
        self._made: dict[tuple[Source, str], tuple[object, Any]] = {}

    def of(self, source: Source, part: str, given: object, make: Callable[[], _Part]) -> _Part:
        """What `make` gave for this part of a document and `given` the last time, or gives now."""
        known = self._made.get((source, part))
        if known is None or known[0] != given:
            known = self._made[source, part] = given, make()
        made: _Part = known[1]
        return made


class _Under(NamedTuple):
    """What an agent is compiled under: the tools that it names, the limits above its own, and the flow rules.

    `exposed` is what it may use of the catalog in shadow mode, `oncall` its team's.
    """

    catalog: Mapping[str, Tool]
    limits: tuple[Limit, ...]
    flows: "tuple[_Flow, ...]"
    exposed: Mapping[str, Tool]
    oncall: str = ""


class _Held(NamedTuple):
    """One tool of an agent: its grants, what limits the protocol's own traffic and answers to the tool, and all these limits."""

    grants: Mapping[str, Grant]
    housekeeping: tuple[Limit, ...]
    answers: tuple[Limit, ...]
    limits: tuple[Limit, ...]


def compile_policy(
    sources: Sequence[Source],
    pems: Mapping[str, str],
    base: Path,
    made: Made | None = None,
    progress: Callable[[int, int], object] = lambda _done, _all: None,
) -> PolicySnapshot:
    """The snapshot of these documents; `base` is the manifests folder, `pems` the certificates by the file that is named.

    `made` remembers what documents became, for whoever compiles some of them again; `progress` is told how many of all are done.
    """
    made = made or Made()
    tools = {
        model.metadata.name: made.of(source, "", (base, pems), partial(_tool, source, model, pems, base))
        for source, model in _of(sources, models.Tool)
    }
    hosts: dict[tuple[str, str, int], tuple[Tool, ...]] = {}
    for tool in tools.values():
        place = (tool.endpoint.scheme, tool.endpoint.host, tool.endpoint.port)
        hosts[place] = (*hosts.get(place, ()), tool)
    policy = next(_of(sources, platform.Platform), None)
    written = policy[1].spec if policy else platform.PlatformSpec.model_construct()
    above = _ceilings(*policy) if policy else {}
    flows = _flows(*policy) if policy else ()
    spared = decoys(written.containment, partial(_anchored, base=base))
    approved = written.admission.tools if written.admission else None
    shown = {name: tool for name, tool in tools.items() if name not in spared.tools and (approved is None or name in approved)}
    agents = {}
    for number, (source, agent) in enumerate(_of(sources, models.Agent)):
        progress(number, len(sources))
        limited = above.get(agent.metadata.owner, above.get("", ()))
        exposed = shown if agent.spec.mode == "shadow" else {}
        team = written.teams.get(agent.metadata.owner)
        under = _Under({name: tools[name] for name in agent.spec.tools}, limited, flows, exposed, team.oncall if team else "")
        agents[agent.metadata.name] = made.of(source, "", under, partial(_agent, source, agent, under, made))
    bundles = {name: pems[part["file"]] for name, part in written.identity.trust_bundles.items()}
    spire, anchored = written.identity.spire, partial(_anchored, base=base)
    content = [sorted(source.canonical for source in sources), sorted(pems.items())]
    return PolicySnapshot(
        revision="sha256:" + hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        agents=MappingProxyType(agents),
        tools=MappingProxyType(tools),
        hosts=MappingProxyType(hosts),
        by_spiffe=MappingProxyType({agent.spiffe: agent for agent in agents.values() if agent.spiffe}),
        trust_bundles=MappingProxyType(bundles),
        spire=Spire(spire.socket, spire.svid or DEFAULT_SVID) if spire else None,
        max_ttl=written.credentials.max_ttl,
        refuse_own=written.credentials.own == "refuse",
        environment=written.environment,
        prices=prices(written),
        unsafe_reads=written.ledger.get("unsafe_reads_without_redis", False),
        rules=rules(policy[0] if policy else None, written.containment),
        decoys=spared,
        alerting=alerting(written.alerts, anchored),
        admission=_admission(approved) if written.admission else "",
    )


def _of(sources: Sequence[Source], kind: type[_Kind]) -> Iterator[tuple[Source, _Kind]]:
    return ((source, source.model) for source in sources if isinstance(source.model, kind))


def _ceilings(source: Source, model: platform.Platform) -> Mapping[str, tuple[Limit, ...]]:
    """What bounds the agents of each team, and those of none (under an empty name)."""
    spec = model.spec
    everyone = limits(source, spec.ceilings, f"environment/{spec.environment}", "spec", "ceilings")
    teams = {
        name: limits(source, team.ceilings, f"team/{name}", "spec", "teams", name, "ceilings")
        for name, team in spec.teams.items()
    }
    return {"": everyone, **{name: (*own, *everyone) for name, own in teams.items()}}


def _admission(approved: Collection[str] | None) -> str:
    return "any tool" if approved is None else ", ".join(sorted(approved)) or "no tool"


def _tool(source: Source, model: models.Tool, pems: Mapping[str, str], base: Path) -> Tool:
    spec = model.spec
    operations = {
        name: Operation(
            name=name,
            effect=written.effect,
            rule=source.rule("spec", "operations", name),
            data=written.data,
            method=spec.match(name).method or "",
            template=spec.match(name).path,
            alias=(written.match.tool or name) if spec.protocol == "mcp" else "",
            schemas=_placed(written.params, source.rule("spec", "operations", name, "params")),
            max_body=written.max_body,
            scrub=written.scrub,
            idempotency=written.idempotency or "",
        )
        for name, written in spec.operations.items()
    }
    upstream = Upstream(pems[spec.upstream.ca] if spec.upstream.ca else "", spec.upstream.addresses)
    return Tool(
        model.metadata.name,
        model.metadata.owner,
        spec.protocol,
        spec.endpoint,
        source.rule(),
        MappingProxyType(operations),
        upstream,
        _credential(spec.credential, base) if spec.credential else None,
        external=_is_external(spec),
    )


def _is_external(spec: models.ToolSpec) -> bool:
    ranges = [ipaddress.ip_network(cidr) for cidr in spec.upstream.addresses]
    inside = bool(ranges) and not any(each.is_loopback for each in ranges)
    return spec.egress == "external" if spec.egress else not inside


def _credential(spec: models.Credential, base: Path) -> CredentialSpec:
    settings, where = {name: _anchored(value, base) for name, value in spec.settings.items()}, spec.placement
    sigv4 = (where.sigv4.service, where.sigv4.region) if where.sigv4 else None
    return CredentialSpec(spec.issuer, MappingProxyType(settings), where.header, where.template, where.basic, sigv4)


def _anchored(value: Any, base: Path) -> Any:
    """The value with each `{file: PATH}` in it made absolute: it is relative to the manifests folder."""
    if isinstance(value, dict):
        alone = value.keys() == {"file"} and isinstance(value["file"], str)
        return {name: str((base / part).absolute()) if alone else _anchored(part, base) for name, part in value.items()}
    return [_anchored(part, base) for part in value] if isinstance(value, list) else value


def _placed(params: words.Params, rule: str) -> Mapping[str, ParameterSchema]:
    return MappingProxyType({name: schema.at(f"{rule}/{name}") for name, schema in params.items()})


_Flow = tuple[platform.FlowDeny, Limit]


def _flows(source: Source, model: platform.Platform) -> tuple[_Flow, ...]:
    """The flow rules, each as which calls it denies and as a limit of their run."""
    found = []
    for index, each in enumerate(model.spec.flow):
        rule = source.rule("spec", "flow", index)
        lifted = words.Approvers.model_construct() if each.unless == "approval" else each.unless
        unless = approval(f"{rule}/unless", lifted) if lifted else None
        found.append((each.deny, Limit("flow", f"flow/{index}", 0, rule, after=each.after, unless=unless)))
    return tuple(found)


def _flowing(flows: tuple[_Flow, ...], tool: Tool, effect: Effect | None) -> Iterator[Limit]:
    """The flow rules that bear on calls with this effect (None: housekeeping)."""
    for denied, limit in flows:
        effects = {Effect.WRITE, Effect.DESTRUCTIVE} if denied.effect is Effect.WRITE else {denied.effect}
        where = "external" if tool.external else "internal"
        if (not denied.effect or effect in effects) and denied.egress in (None, where):
            yield limit


def _own_traffic(flows: tuple[_Flow, ...], tool: Tool, effect: Effect | None, shared: tuple[Limit, ...]) -> tuple[Limit, ...]:
    """What limits a protocol's own traffic; nobody is asked to approve any of it."""
    return (*(replace(limit, unless=None) for limit in _flowing(flows, tool, effect)), *bearing(shared, None, tool.protocol))


def _labels(flows: tuple[_Flow, ...], data: tuple[str, ...]) -> Iterator[Limit]:
    """The labels that the calls of an operation that touches this data give their run."""
    asked = {name for _, limit in flows for name in limit.after}
    yield from (label(name) for name in data if name in asked)


def _usual(
    flows: tuple[_Flow, ...], tool: Tool, shared: tuple[Limit, ...]
) -> Callable[[Operation, tuple[Limit, ...]], tuple[Limit, ...]]:
    """All that bears on an operation's calls, `own` limits of it among them; few operations of a tool differ in it."""

    @cache
    def bearing_on(effect: Effect, data: tuple[str, ...], own: tuple[Limit, ...]) -> tuple[Limit, ...]:
        return (*_flowing(flows, tool, effect), *_labels(flows, data), *bearing((*own, *shared), effect, tool.protocol))

    return lambda operation, own: bearing_on(operation.effect, operation.data, own)


def _agent(source: Source, model: models.Agent, under: _Under, made: Made) -> Agent:
    spec, name = model.spec, model.metadata.name
    common = (*limits(source, spec.limits, f"agent/{name}", "spec", "limits"), *under.limits)
    held = {}
    for tool in spec.tools:
        bounds = under._replace(catalog={tool: under.catalog[tool]}, limits=common, exposed={}, oncall="")
        held[tool] = made.of(source, tool, bounds, partial(_held, source, model, tool, bounds))
    mode, flows, exposed = source.rule("spec", "mode"), under.flows, under.exposed
    housekeeping = {tool: _own_traffic(flows, each, None, common) for tool, each in exposed.items()}
    answers = {tool: _own_traffic(flows, each, Effect.WRITE, common) for tool, each in exposed.items()}
    shared = {
        tool: (*limits(source, spec.tools[tool].limits, f"agent/{name}/{tool}", "spec", "tools", tool, "limits"), *common)
        for tool in exposed
        if tool in spec.tools
    }
    return Agent(
        name=name,
        owner=model.metadata.owner,
        oncall=model.metadata.oncall or under.oncall,
        rule=source.rule(),
        tools=MappingProxyType({tool: each.grants for tool, each in held.items()}),
        spiffe=spec.identity.spiffe or "",
        token=spec.identity.token,
        namespace=spec.identity.namespace or "",
        housekeeping=MappingProxyType(housekeeping | {tool: each.housekeeping for tool, each in held.items()}),
        answers=MappingProxyType(answers | {tool: each.answers for tool, each in held.items()}),
        limits=tuple(dict.fromkeys((*common, *(limit for each in held.values() for limit in each.limits)))),
        shadow=MappingProxyType(
            {name: _in_shadow(mode, flows, tool, shared.get(name, common)) for name, tool in exposed.items()}
        ),
        shadow_until=spec.shadow_until or 0.0,
    )


def _in_shadow(rule: str, flows: tuple[_Flow, ...], tool: Tool, limits: tuple[Limit, ...]) -> Mapping[str, Grant]:
    """What shadow mode lets pass of a tool: what is listed nowhere is held to what bounds the tool and the agent as a whole."""
    # What a provider's unknown API would spend nobody could count; elsewhere, the unknown counts as the worst.
    unknown = {} if tool.protocol in PROVIDERS else {"": Operation("", Effect.DESTRUCTIVE, tool.rule)}
    nothing, usual = models.GrantSpec.model_construct(), _usual(flows, tool, limits)
    return MappingProxyType(
        {
            name: _grant(rule, nothing, usual(each, ()), tool.protocol, each)
            for name, each in {**tool.operations, **unknown}.items()
        }
    )


def _held(source: Source, model: models.Agent, name: str, under: _Under) -> _Held:
    """What an agent has of the tool with this name."""
    tool, flows, part = under.catalog[name], under.flows, model.spec.tools[name]
    here, scope = ("spec", "tools", name), f"agent/{model.metadata.name}/{name}"
    shared = (*limits(source, part.limits, scope, *here, "limits"), *under.limits)
    grants: dict[str, Grant] = {}
    usual, rule = _usual(flows, tool, shared), source.rule(*here, "operations")
    every: dict[Limit, None] = {}
    for operation, grant in part.operations.items():
        own = limits(source, grant.limits, f"{scope}/{operation}", *here, "operations", operation, "limits")
        every |= dict.fromkeys(own if grants else (*own, *shared))
        declared = tool.operations[operation]
        grants[operation] = _grant(rule + json_pointer(operation), grant, usual(declared, own), tool.protocol, declared)
    housekeeping, answers = (_own_traffic(flows, tool, effect, shared) for effect in (None, Effect.WRITE))
    return _Held(MappingProxyType(grants), housekeeping, answers, tuple(every))


def _grant(rule: str, spec: models.GrantSpec, bounds: tuple[Limit, ...], protocol: str, declared: Operation) -> Grant:
    schemas = _placed(spec.params, f"{rule}/params")
    return Grant(
        rule,
        schemas,
        approval=approval(f"{rule}/approval", spec.approval) if spec.approval else None,
        limits=bounds,
        models=named_models(spec.params),
        server_tools=frozenset(spec.server_tools),
        max_output=min(_maxima(protocol, declared, schemas), default=MAX_OUTPUT),
        pins=_pins(declared, schemas),
        expires=math.inf if spec.expires is None else spec.expires,
        shadow_until=spec.shadow_until or 0.0,
    )


def approval(rule: str, spec: words.Approvers) -> Approval:
    """Who must say yes, as written at `rule`."""
    when = _placed(spec.when, f"{rule}/when") if isinstance(spec, models.Approval) and spec.when else {}
    return Approval(rule, spec.approvers, frozenset(spec.groups), spec.expires, when)


def _maxima(protocol: str, declared: Operation, granted: Mapping[str, ParameterSchema]) -> Iterator[int]:
    """What schemas allow of the fields by which a model call bounds its output."""
    if protocol not in PROVIDERS:
        return
    api = api_at(protocol, declared.method, declared.template.text if declared.template else "")
    for field in PROVIDERS[protocol][api].outputs if api else ():
        for schema in (each["body"].source for each in (declared.schemas, granted) if "body" in each):
            of_field = schema.get("properties", {}).get(field)
            if isinstance(of_field, dict) and "maximum" in of_field:
                yield int(of_field["maximum"])


_NO_PINS: Mapping[str, tuple[str, ...]] = MappingProxyType({})


def _pins(declared: Operation, own: Mapping[str, ParameterSchema]) -> Mapping[str, tuple[str, ...]]:
    """The parameters that may have only certain texts; the manifest's schemas come after the catalog's."""
    pins: dict[str, tuple[str, ...]] = {}
    for location, schema in (*declared.schemas.items(), *own.items()):
        if schema.pinned:
            # What the path names is pinned by the path alone, not by a field of the body that has the same name.
            variables = {name for name, _ in declared.template.parts} if declared.template and location != "path" else set()
            pins |= {name: texts for name, texts in schema.pinned.items() if name not in variables}
    return MappingProxyType(pins) if pins else _NO_PINS
