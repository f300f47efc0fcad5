"""From admitted documents to the frozen snapshot.

Law: whoever calls this has found no error, so nothing is checked here and nothing can fail.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from broker.manifest import models
from broker.manifest.admission import Source, named_models
from broker.policy.providers import MAX_OUTPUT, PROVIDERS, api_at
from broker.policy.schema import ParameterSchema
from broker.policy.snapshot import Agent, CredentialSpec, Grant, Operation, PolicySnapshot, Tool, Upstream


def compile_policy(sources: Sequence[Source], pems: Mapping[str, str], base: Path) -> PolicySnapshot:
    """The snapshot of these documents; `base` is the manifests folder, `pems` the certificates by the file that is named."""
    tools: dict[str, Tool] = {}
    agents: dict[str, Agent] = {}
    hosts: dict[tuple[str, str, int], tuple[Tool, ...]] = {}
    platform = models.PlatformSpec.model_construct()
    catalog = {model.metadata.name: model.spec for source in sources if isinstance(model := source.model, models.Tool)}
    for source in sources:
        model = source.model
        if isinstance(model, models.Tool):
            tool = tools[model.metadata.name] = _tool(source, model, pems, base)
            place = (tool.endpoint.scheme, tool.endpoint.host, tool.endpoint.port)
            hosts[place] = (*hosts.get(place, ()), tool)
        elif isinstance(model, models.Agent):
            agents[model.metadata.name] = _agent(source, model, catalog)
        elif isinstance(model, models.Platform):
            platform = model.spec
    bundles = {name: pems[part["file"]] for name, part in platform.identity.get("trust_bundles", {}).items()}
    content = [sorted(source.canonical for source in sources), sorted(pems.items())]
    return PolicySnapshot(
        revision="sha256:" + hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        agents=MappingProxyType(agents),
        tools=MappingProxyType(tools),
        hosts=MappingProxyType(hosts),
        by_spiffe=MappingProxyType({agent.spiffe: agent for agent in agents.values() if agent.spiffe}),
        trust_bundles=MappingProxyType(bundles),
        max_ttl=platform.credentials.get("max_ttl", 3600),
        environment=platform.environment,
    )


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
    )


def _credential(spec: models.Credential, base: Path) -> CredentialSpec:
    settings = spec.settings
    if spec.secret and "file" in spec.secret:
        settings["secret"] = {"file": str((base / spec.secret["file"]).absolute())}
    return CredentialSpec(spec.issuer, MappingProxyType(settings), spec.placement.header, spec.placement.template)


def _placed(params: models.Params, rule: str) -> Mapping[str, ParameterSchema]:
    return MappingProxyType({name: ParameterSchema(schema.source, f"{rule}/{name}") for name, schema in params.items()})


def _agent(source: Source, model: models.Agent, catalog: Mapping[str, models.ToolSpec]) -> Agent:
    spec = model.spec
    tools = {
        tool: MappingProxyType(
            {name: _grant(source, tool, name, grant, catalog[tool]) for name, grant in part.operations.items()}
        )
        for tool, part in spec.tools.items()
    }
    return Agent(
        name=model.metadata.name,
        owner=model.metadata.owner,
        oncall=model.metadata.oncall,
        rule=source.rule(),
        tools=MappingProxyType(tools),
        spiffe=spec.identity.spiffe or "",
        token=spec.identity.token,
        namespace=spec.identity.namespace or "",
    )


def _grant(source: Source, tool: str, operation: str, spec: models.GrantSpec, declared: models.ToolSpec) -> Grant:
    rule = source.rule("spec", "tools", tool, "operations", operation)
    asked = (declared.operations[operation].params, spec.params)
    return Grant(
        rule,
        _placed(spec.params, f"{rule}/params"),
        approval=spec.approval is not None,
        models=named_models(spec.params),
        server_tools=frozenset(spec.server_tools),
        max_output=min(_maxima(declared.protocol, declared.match(operation), asked), default=MAX_OUTPUT),
    )


def _maxima(protocol: str, match: models.Match, params: Iterable[models.Params]) -> Iterator[int]:
    """What schemas allow of the fields by which a model call bounds its output."""
    api = api_at(protocol, match.method or "", match.path.text if match.path else "")
    for field in PROVIDERS[protocol][api].outputs if api else ():
        for schema in params:
            of_field = schema["body"].source.get("properties", {}).get(field) if "body" in schema else None
            if isinstance(of_field, dict) and "maximum" in of_field:
                yield int(of_field["maximum"])
