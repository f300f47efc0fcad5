"""From typed documents to the frozen snapshot.

Law: whatever a field means beyond its own shape is checked here, and everything that fails is reported. Files are read by
the function that the caller passes, and what was read is part of the revision.
"""

import hashlib
import ipaddress
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from broker.manifest import models
from broker.manifest.addresses import AddressError, check_spiffe, check_trust_domain, parse_endpoint
from broker.manifest.fields import Schema
from broker.manifest.findings import Finding
from broker.manifest.scope import Declared, Scope, Source, Vocabulary, Work
from broker.manifest.strict_yaml import Document, Pointer
from broker.policy.match import PathTemplate, TemplateError
from broker.policy.schema import ParameterSchema, SchemaError
from broker.policy.snapshot import Agent, CredentialSpec, Endpoint, Grant, Operation, PolicySnapshot, Tool, Upstream


def compile_policy(
    sources: Sequence[Source], words: Vocabulary, read: Callable[[str], bytes], declared: Declared
) -> tuple[PolicySnapshot, tuple[Finding, ...], tuple[str, ...]]:
    """The snapshot (to be used only if no finding is an error), what is wrong, and the referenced files that were read.

    `read` gives a file's bytes by its name relative to the manifests folder, or raises `OSError`.
    """
    work = Work(words, read, declared)
    scopes = [Scope(work, source) for source in sources]
    _names(scopes)
    tools: dict[str, Tool] = {}
    hosts: dict[tuple[str, str, int], tuple[Tool, ...]] = {}
    for scope in scopes:
        model = scope.source.model
        if isinstance(model, models.Tool) and (tool := _tool(scope, model.metadata, model.spec)):
            tools[tool.name] = tool
            _settle(scope, tool, hosts)
    agents: dict[str, Agent] = {}
    taken: dict[tuple[str, str], str] = {}
    for scope in scopes:
        model = scope.source.model
        if isinstance(model, models.Agent):
            _identity(scope, model.metadata.name, model.spec.identity, taken)
            agents[model.metadata.name] = _agent(scope, model.metadata, model.spec, tools)
    platform, bundles = _platform(scopes)
    snapshot = PolicySnapshot(
        revision=_revision(sources, work.pems),
        agents=MappingProxyType(agents),
        tools=MappingProxyType(tools),
        hosts=MappingProxyType(hosts),
        by_spiffe=MappingProxyType({agent.spiffe: agent for agent in agents.values() if agent.spiffe}),
        trust_bundles=MappingProxyType(bundles),
        max_ttl=platform.credentials.max_ttl,
        environment=platform.environment,
    )
    return snapshot, tuple(work.findings), tuple(work.pems)


def _revision(sources: Iterable[Source], pems: Mapping[str, str]) -> str:
    content = [sorted(source.canonical for source in sources), sorted(pems.items())]
    return "sha256:" + hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _names(scopes: Iterable[Scope]) -> None:
    first: dict[tuple[str, str], Source] = {}
    for scope in scopes:
        kind, name = type(scope.source.model).__name__, scope.source.model.metadata.name
        other = first.setdefault((kind, name), scope.source)
        if other is not scope.source:
            why = f"{other.file} already has a {kind} named {name!r}; rename one of the two"
            scope.error(("metadata", "name"), "name_duplicate", why)


# ------------------------------------------------------------------------------------------------------------------- catalog


def _tool(scope: Scope, meta: models.Metadata, spec: models.ToolSpec) -> Tool | None:
    if spec.protocol not in scope.work.words.adapters:
        why = f"no adapter speaks {spec.protocol!r}; write one of: {', '.join(sorted(scope.work.words.adapters))}"
        scope.error(("spec", "protocol"), "protocol_unknown", why)
    operations = _operations(scope, spec, _credential(scope, spec.credential))
    upstream = Upstream(_pem(scope, ("spec", "upstream", "ca"), spec.upstream.ca), spec.upstream.addresses)
    try:
        endpoint = parse_endpoint(spec.endpoint)
    except AddressError as error:
        scope.error(("spec", "endpoint"), "endpoint_invalid", str(error))
        return None
    if endpoint.scheme == "http":
        _plaintext(scope, spec)
    return Tool(meta.name, meta.owner, spec.protocol, endpoint, scope.source.rule(), MappingProxyType(operations), upstream)


def _plaintext(scope: Scope, spec: models.ToolSpec) -> None:
    addresses = spec.upstream.addresses
    if addresses and all(ipaddress.ip_network(address).is_loopback for address in addresses):
        return
    if spec.unsafe_plaintext:
        why = "calls and credentials of this tool travel in plain text; use https as soon as the tool can"
        scope.warn(("spec", "unsafe_plaintext"), "unsafe_plaintext", why)
    else:
        why = (
            "an http endpoint beyond this machine would show calls and credentials to anyone on the way; "
            "use https, or list only loopback ranges in upstream.addresses (unsafe_plaintext: true accepts the danger)"
        )
        scope.error(("spec", "endpoint"), "endpoint_plaintext", why)


def _credential(scope: Scope, spec: models.Credential | None) -> CredentialSpec | None:
    if spec is None:
        return None
    here = ("spec", "credential")
    settings = spec.model_dump(exclude={"issuer", "placement"}, exclude_unset=True)
    issuer = scope.work.words.issuers.get(spec.issuer)
    if issuer is None:
        why = f"this broker has no issuer {spec.issuer!r}; write one of: {', '.join(sorted(scope.work.words.issuers))}"
        scope.error((*here, "issuer"), "issuer_unknown", why)
    for problem in issuer.check(settings) if issuer else ():
        scope.error(here, "credential_invalid", problem, key=True)
    return CredentialSpec(spec.issuer, MappingProxyType(settings), spec.placement.header, spec.placement.template)


def _pem(scope: Scope, pointer: Pointer, name: str | None) -> str:
    if name is None:
        return ""
    try:
        certificates = x509.load_pem_x509_certificates(scope.work.read(name))
    except OSError as error:
        why = f"{name} can't be read ({error.strerror or error}); name a readable file, relative to the manifests folder"
        scope.error(pointer, "file_unreadable", why)
        return ""
    except ValueError:
        scope.error(pointer, "pem_invalid", f"{name} holds no certificates; put X.509 certificates in PEM there")
        return ""
    # Written anew, so that only certificates enter the snapshot: not a comment, nor a key that lies in the same file.
    pem = "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in certificates)
    return scope.work.pems.setdefault(name, pem)


def _operations(scope: Scope, spec: models.ToolSpec, credential: CredentialSpec | None) -> dict[str, Operation]:
    found: dict[str, Operation] = {}
    taken: dict[object, str] = {}
    for name, written in spec.operations.items():
        here: Pointer = ("spec", "operations", name)
        alias, template = "", None
        if spec.protocol == "mcp":
            alias = _mcp_alias(scope, here, written.match)
        else:
            template = _rest_template(scope, here, written.match)
        if other := _taken(taken, name, alias or (template and (written.match.method, _shape(template)))):
            why = f"{other!r} already matches the same calls; merge the two, or make them differ"
            scope.error(here, "operation_ambiguous", why, key=True)
        found[name] = Operation(
            name=name,
            effect=written.effect,
            rule=scope.source.rule(*here),
            data=written.data,
            method=written.match.method or "",
            template=template,
            alias=alias,
            schemas=_schemas(scope, (*here, "params"), written.params, spec.protocol, template),
            max_body=written.max_body,
            credential=credential,
        )
    return found


def _taken(taken: dict[object, str], name: str, same: object) -> str:
    other = taken.setdefault(same, name) if same else name
    return "" if other == name else other


def _shape(template: PathTemplate) -> tuple[tuple[bool, str], ...]:
    return tuple((name is None, kind) for name, kind in template.parts)


def _mcp_alias(scope: Scope, here: Pointer, match: models.Match) -> str:
    if match.method or match.path:
        why = "method and path mean nothing to MCP; write match: {tool: NAME}, or leave match out"
        scope.error((*here, "match"), "match_invalid", why, key=True)
    return match.tool or str(here[-1])


def _rest_template(scope: Scope, here: Pointer, match: models.Match) -> PathTemplate | None:
    if not match.method or match.path is None or match.tool:
        why = "a REST operation is known by its method and path, and nothing else; write match: {method: GET, path: /…}"
        scope.error((*here, "match"), "match_invalid", why, key=True)
        return None
    try:
        return PathTemplate.parse(match.path)
    except TemplateError as error:
        scope.error((*here, "match", "path"), "match_invalid", f"{error}; write a path such as /repos/{{owner}}")
        return None


def _schemas(
    scope: Scope, here: Pointer, params: Mapping[str, Schema], protocol: str, template: PathTemplate | None
) -> Mapping[str, ParameterSchema]:
    adapter = scope.work.words.adapters.get(protocol)
    found: dict[str, ParameterSchema] = {}
    for location, schema in params.items():
        place = (*here, location)
        if adapter and location not in adapter.locations:
            why = f"{protocol} has no {location!r} parameters; write one of: {', '.join(sorted(adapter.locations))}"
            scope.error(place, "location_unknown", why, key=True)
        try:
            found[location] = ParameterSchema(schema, scope.source.rule(*place))
        except SchemaError as error:
            why = f"{error.message[:300]}; write JSON Schema 2020-12"
            scope.error(_resolved(scope.source.document, place, error.pointer), "schema_invalid", why)
        if location == "path" and template:
            _path_variables(scope, place, schema, template)
    return MappingProxyType(found)


def _resolved(document: Document, base: Pointer, pointer: str) -> Pointer:
    for text in pointer.split("/")[1:]:
        name = text.replace("~1", "/").replace("~0", "~")
        base = (*base, int(name)) if name.isdigit() and (*base, name) not in document.values else (*base, name)
    return base


def _path_variables(scope: Scope, here: Pointer, schema: Mapping[str, Any], template: PathTemplate) -> None:
    names = {name for name, _ in template.parts}
    for word in ("properties", "required"):
        part = schema.get(word)
        for index, name in enumerate(part if isinstance(part, dict | list) else ()):
            if isinstance(name, str) and name not in names:
                why = f"the path {template.text} has no variable {name!r}; correct the name here or in match.path"
                pointer = (*here, word, name if isinstance(part, dict) else index)
                scope.error(pointer, "schema_param_unknown", why, key=isinstance(part, dict))


def _settle(scope: Scope, tool: Tool, hosts: dict[tuple[str, str, int], tuple[Tool, ...]]) -> None:
    place = (tool.endpoint.scheme, tool.endpoint.host, tool.endpoint.port)
    neighbours = hosts.get(place, ())
    for other in neighbours:
        nest = _nested(tool.endpoint, other.endpoint) or _nested(other.endpoint, tool.endpoint)
        if nest and other.name != tool.name:
            why = f"{other.name!r} is at the same host and their base paths nest; make them one tool, or move one base path"
            scope.error(("spec", "endpoint"), "endpoint_overlap", why)
    hosts[place] = (*neighbours, tool)


def _nested(inner: Endpoint, outer: Endpoint) -> bool:
    return f"{inner.base_path}/".startswith(f"{outer.base_path}/")


# -------------------------------------------------------------------------------------------------------------------- agents


def _identity(scope: Scope, name: str, identity: models.Identity, taken: dict[tuple[str, str], str]) -> None:
    try:
        check_spiffe(identity.spiffe)
    except AddressError as error:
        scope.error(("spec", "identity", "spiffe"), "spiffe_invalid", str(error))
    for word, value in (("spiffe", identity.spiffe), ("namespace", identity.namespace)):
        if value and (other := taken.setdefault((word, value), name)) != name:
            why = f"agent {other!r} already has this {word}; give each agent its own, so that a call has one principal"
            scope.error(("spec", "identity", word), f"{word}_duplicate", why)


def _agent(scope: Scope, meta: models.Metadata, spec: models.AgentSpec, tools: Mapping[str, Tool]) -> Agent:
    if spec.callers is not None:
        scope.error(
            ("spec", "callers"), "callers_not_built", "calls between agents are not built yet; take callers out", key=True
        )
    if spec.mode == "shadow":
        why = "shadow mode is not built yet and denials are enforced; write mode: enforce"
        scope.warn(("spec", "mode"), "not_enforced", why)
    _limits(scope, ("spec", "limits"), spec.limits)
    return Agent(
        name=meta.name,
        owner=meta.owner,
        oncall=meta.oncall,
        rule=scope.source.rule(),
        tools=MappingProxyType({name: _grants(scope, name, part, tools.get(name)) for name, part in spec.tools.items()}),
        spiffe=spec.identity.spiffe or "",
        token=spec.identity.token,
        namespace=spec.identity.namespace or "",
    )


def _limits(scope: Scope, here: Pointer, limits: models.Limits | None) -> None:
    if limits is not None:
        scope.warn(here, "not_enforced", "limits are not enforced yet; don't rely on them")


def _grants(scope: Scope, name: str, part: models.AgentTool, tool: Tool | None) -> Mapping[str, Grant]:
    here: Pointer = ("spec", "tools", name)
    declared = scope.work.declared.get(name)
    if declared is None:
        why = f"the catalog has no tool {name!r}; correct the name, or ask for the tool to be added"
        scope.error(here, "tool_unknown", why, key=True)
    _limits(scope, (*here, "limits"), part.limits)
    grants: dict[str, Grant] = {}
    for operation, spec in part.operations.items():
        place = (*here, "operations", operation)
        if declared is not None and operation not in declared:
            why = f"the tool {name!r} has no operation {operation!r}; correct the name, or ask for it to be added"
            scope.error(place, "operation_unknown", why, key=True)
        grants[operation] = _grant(scope, place, spec, tool)
    return MappingProxyType(grants)


def _grant(scope: Scope, here: Pointer, spec: models.GrantSpec, tool: Tool | None) -> Grant:
    operation = tool.operations.get(str(here[-1])) if tool else None
    _limits(scope, (*here, "limits"), spec.limits)
    if spec.approval is not None:
        why = (
            "approvals are not built yet and this operation is always denied, whatever `when` says; take approval out to allow it"
        )
        scope.warn((*here, "approval"), "not_enforced", why)
    template = operation.template if operation else None
    schemas = _schemas(scope, (*here, "params"), spec.params, tool.protocol if tool else "", template)
    return Grant(scope.source.rule(*here), schemas, approval=spec.approval is not None)


# ------------------------------------------------------------------------------------------------------------------ platform


def _platform(scopes: Iterable[Scope]) -> tuple[models.PlatformSpec, dict[str, str]]:
    found: list[tuple[models.PlatformSpec, dict[str, str]]] = []
    for scope in scopes:
        if isinstance(scope.source.model, models.Platform):
            if found:
                scope.error(("kind",), "platform_duplicate", "there is a platform policy already; make them one")
            found.append((scope.source.model.spec, _bundles(scope, scope.source.model.spec)))
    return found[0] if found else (models.PlatformSpec.model_construct(), {})


def _bundles(scope: Scope, spec: models.PlatformSpec) -> dict[str, str]:
    for part in ("teams", "prices", "containment", "flow", "alerts"):
        if getattr(spec, part) is not None:
            scope.warn(("spec", part), "not_enforced", f"{part} is not enforced yet; don't rely on it")
    bundles: dict[str, str] = {}
    for domain, bundle in spec.identity.trust_bundles.items():
        here = ("spec", "identity", "trust_bundles", domain)
        try:
            check_trust_domain(domain)
        except AddressError as error:
            scope.error(here, "spiffe_invalid", str(error), key=True)
        bundles[domain] = _pem(scope, (*here, "file"), bundle.file)
    return bundles
