"""What typed documents must keep beyond the shape of each field: the broker's words, other documents, files, and what is built.

Law: a mistake is reported once, where it was made; what only follows from it is not reported. Each rule yields `Problem`s and
decides nothing.
"""

import ipaddress
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from broker.manifest.findings import Finding
from broker.manifest.lint import lint_grants, lint_tool
from broker.manifest.models import Agent, Match, OperationSpec, Tool, ToolSpec
from broker.manifest.platform import Alerts, Containment, Honeytoken, Platform
from broker.manifest.rules import ADMISSION, Problem, lapses, rules
from broker.manifest.strict_yaml import Document, Pointer
from broker.manifest.words import Kind, Params
from broker.policy.match import PathTemplate
from broker.policy.providers import PROVIDERS, api_at
from broker.policy.schema import json_pointer
from broker.policy.strip import is_stripped
from broker.policy.types import Effect


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What this broker has: the parameter locations of each protocol, and each issuer's check of its settings.

    `now` is the time by which grants lapse, in seconds since the epoch.
    """

    locations: Mapping[str, frozenset[str]]
    issuers: Mapping[str, Callable[[Mapping[str, object]], list[str]]]
    now: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """One document: where it stands, its data in canonical JSON, and the kind that it is.

    `cut` names the parts that are wrong and were left out of `model`, so that the rest can still be checked.
    """

    file: str
    document: Document
    canonical: str
    model: Kind
    cut: tuple[Pointer, ...] = ()

    def rule(self, *place: str | int) -> str:
        """`file#pointer` (RFC 6901)."""
        return f"{self.file}#{json_pointer(*place)}"


_WARNINGS = frozenset(
    {
        "lapsed", "lapses_soon", "model_not_named", "schema_open", "shadow", "unsafe_never", "unsafe_plaintext",
        "unsafe_reads_without_redis",
    }
)  # fmt: skip
# These are about a value; all others are about the key that names the place.
_AT_VALUE = frozenset(
    {
        "name_duplicate", "platform_duplicate", "spiffe_duplicate", "namespace_duplicate", "protocol_unknown", "issuer_unknown",
        "endpoint_plaintext", "endpoint_overlap", "file_unreadable", "pem_invalid", "sink_unknown", "decoy_in_use",
    }
)  # fmt: skip
# What may only follow from a part below that was left out because it was wrong.
_CONSEQUENCES = frozenset({"credential_invalid", "match_invalid"})


def admit(sources: Sequence[Source], words: Vocabulary, read: Callable[[str], bytes]) -> tuple[list[Finding], Mapping[str, str]]:
    """Every problem of every source, and the certificates in the files that are named (PEM, by name).

    `read` gives a file's bytes by its name relative to the manifests folder, or raises `OSError`.
    """
    catalog = {tool.metadata.name: (tool.spec, source.document) for source in sources if isinstance(tool := source.model, Tool)}
    policy = next((source.model for source in sources if isinstance(source.model, Platform)), None)
    warned = _WARNINGS if policy and policy.spec.admission else _WARNINGS | ADMISSION
    taken: dict[object, tuple[Source, Pointer]] = {}
    near: dict[object, list[Tool]] = {}
    pems: dict[str, str] = {}
    findings = []
    for source in sources:
        problems = [*_claims(source, taken), *_not_built(source), *_files(source, read, pems)]
        if isinstance(source.model, Tool):
            problems += [*_tool(source.model.spec, words), *_neighbours(source.model, near), *lint_tool(source.model.spec)]
        if isinstance(source.model, Agent):
            problems += [*_grants(source.model, catalog, words), *lint_grants(source.model, catalog)]
            problems += [*rules(source.model, policy, catalog, words.now), *lapses(source.model, words.now)]
        if isinstance(source.model, Platform):
            problems += [*_sinks(source.model.spec.alerts), *_decoys(source.model.spec.containment, sources)]
        findings += [_finding(source, *problem, warned) for problem in problems if not _follows(source, *problem)]
    return findings, pems


def _follows(source: Source, pointer: Pointer, code: str, _: str) -> bool:
    return code in _CONSEQUENCES and any(cut[: len(pointer)] == pointer for cut in source.cut)


def _finding(source: Source, pointer: Pointer, code: str, why: str, warned: frozenset[str]) -> Finding:
    message, _, advice = why.partition("; ")
    place = source.document.at(pointer, key=code not in _AT_VALUE)
    return Finding(source.file, *place, code, message, advice, "warning" if code in warned else "error")


def _claims(source: Source, taken: dict[object, tuple[Source, Pointer]]) -> Iterator[Problem]:
    """What only one place may say; `taken` holds what was said so far, and where."""
    for claim, pointer, code, what in _said(source):
        other, place = taken.setdefault(claim, (source, pointer))
        if (other, place) != (source, pointer):
            line, column = other.document.at(place)
            yield pointer, code, f"{other.file}:{line}:{column} already has {what}; make them one, or make them differ"


def _said(source: Source) -> Iterator[tuple[object, Pointer, str, str]]:
    model, kind = source.model, type(source.model).__name__
    yield (kind, model.metadata.name), ("metadata", "name"), "name_duplicate", f"a {kind} named {model.metadata.name!r}"
    if isinstance(model, Platform):
        yield kind, ("kind",), "platform_duplicate", "a platform policy"
    if isinstance(model, Agent):
        for word, value in (("spiffe", model.spec.identity.spiffe), ("namespace", model.spec.identity.namespace)):
            if value:
                yield (word, value), ("spec", "identity", word), f"{word}_duplicate", f"this {word}, and a call has one principal"
    if isinstance(model, Tool):
        for name in model.spec.operations:
            calls = _matched(model.spec.protocol, name, model.spec.match(name))
            here: Pointer = ("spec", "operations", name)
            if calls:
                yield (source, calls), here, "operation_ambiguous", "an operation that matches these calls"


def _matched(protocol: str, name: str, match: Match) -> object:
    if protocol == "mcp":
        return match.tool or name
    return match.path and (match.method, tuple((variable is None, text) for variable, text in match.path.parts))


def _not_built(source: Source) -> Iterator[Problem]:
    """What is written and loads, but not as its author may think."""
    for kind, pointer, found in _NOT_BUILT:
        if isinstance(source.model, kind) and _is_written(source.document.data, pointer):
            yield pointer, *found
    if isinstance(source.model, Platform) and source.model.spec.ledger.get("unsafe_reads_without_redis"):
        why = "while Redis is away, each broker lets reads pass on limits of its own; take it out to have them denied"
        yield ("spec", "ledger", "unsafe_reads_without_redis"), "unsafe_reads_without_redis", why


_NOT_BUILT: Sequence[tuple[type[Kind], Pointer, tuple[str, str]]] = [
    (Agent, ("spec", "callers"), ("callers_not_built", "calls between agents are not built yet; take callers out"))
]


def _is_written(data: object, pointer: Pointer) -> bool:
    for part in pointer:
        if not isinstance(data, dict) or part not in data:
            return False
        data = data[part]
    return True


def _files(source: Source, read: Callable[[str], bytes], pems: dict[str, str]) -> Iterator[Problem]:
    for pointer, name in _named(source.model):
        try:
            certificates = _certificates(read(name))
        except OSError as error:
            why = f"{name} can't be read ({error.strerror or error}); name a readable file, relative to the manifests folder"
            yield pointer, "file_unreadable", why
        except ValueError:
            yield pointer, "pem_invalid", f"{name} holds no certificates; put X.509 certificates in PEM there"
        else:
            # Written anew, so that only certificates enter the snapshot: not a comment, nor a key that lies in the same file.
            pems[name] = "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in certificates)


def _certificates(text: bytes) -> list[x509.Certificate]:
    found = x509.load_pem_x509_certificates(text)
    # The parser passes over one that breaks off: half of a file that is being written would drop a root.
    if len(found) != text.count(b"-----BEGIN CERTIFICATE-----"):
        raise ValueError("a certificate has no end")
    return found


def _named(model: Kind) -> Iterator[tuple[Pointer, str]]:
    if isinstance(model, Tool) and model.spec.upstream.ca:
        yield ("spec", "upstream", "ca"), model.spec.upstream.ca
    if isinstance(model, Platform):
        for domain, bundle in model.spec.identity.trust_bundles.items():
            yield ("spec", "identity", "trust_bundles", domain, "file"), bundle["file"]


def _tool(spec: ToolSpec, words: Vocabulary) -> Iterator[Problem]:
    if spec.protocol not in words.locations:
        why = f"no adapter speaks {spec.protocol!r}; write one of: {', '.join(sorted(words.locations))}"
        yield ("spec", "protocol"), "protocol_unknown", why
    if spec.credential:
        here = ("spec", "credential")
        if check := words.issuers.get(spec.credential.issuer):
            yield from ((here, "credential_invalid", problem) for problem in check(spec.credential.settings))
        else:
            why = f"this broker has no issuer {spec.credential.issuer!r}; write one of: {', '.join(sorted(words.issuers))}"
            yield (*here, "issuer"), "issuer_unknown", why
        if bool(spec.credential.placement.sigv4) != (spec.credential.issuer == "aws-sts"):
            yield here, "credential_invalid", _SIGNED
    loopback = [ipaddress.ip_network(address).is_loopback for address in spec.upstream.addresses]
    if spec.endpoint.scheme == "http" and not (loopback and all(loopback)):
        if spec.unsafe_plaintext:
            yield ("spec", "unsafe_plaintext"), "unsafe_plaintext", _UNSAFE_PLAINTEXT
        else:
            yield ("spec", "endpoint"), "endpoint_plaintext", _ENDPOINT_PLAINTEXT
    for name, operation in spec.operations.items():
        place: Pointer = ("spec", "operations", name)
        match = spec.match(name)
        yield from _match((*place, "match"), spec.protocol, match)
        yield from _params((*place, "params"), operation.params, spec.protocol, match.path, words)
        yield from _behaviour(place, spec, operation)


def _behaviour(place: Pointer, spec: ToolSpec, operation: OperationSpec) -> Iterator[Problem]:
    if operation.idempotency and (why := _no_key(spec, operation, operation.idempotency)):
        yield (*place, "idempotency"), "idempotency_invalid", why
    if operation.scrub == "unsafe_never":
        yield (*place, "scrub"), "unsafe_never", "a tool that repeats its request shows the agent its credential; write auto"


def _no_key(spec: ToolSpec, operation: OperationSpec, header: str) -> str:
    """Why the operation can't have a header for its retries; empty where it can."""
    if operation.effect is Effect.READ:
        return "a read does nothing that must not happen twice; take it out, or write the effect that the operation has"
    if spec.protocol == "mcp":
        # What a server would give back is the first answer, with the first call's JSON-RPC ID.
        return "MCP has no such header: the answer to a call names that call, and none before it; take it out"
    placed = spec.credential.placement.header if spec.credential else ""
    if is_stripped(header) or header.replace("_", "-") == placed.replace("_", "-"):
        return "agents can't send this header, for it carries a credential or an identity; name the one that the tool documents"
    return ""


_SIGNED = "only keys of the issuer aws-sts sign, and they do nothing else; write as: {sigv4: {service, region}} there alone"
_UNSAFE_PLAINTEXT = "calls and credentials of this tool travel in plain text; use https as soon as the tool can"
_ENDPOINT_PLAINTEXT = (
    "calls and credentials would travel in plain text; use https, or list only loopback ranges in upstream.addresses"
)


def _match(here: Pointer, protocol: str, match: Match) -> Iterator[Problem]:
    by_path, why = match.method and match.path and not match.tool, ""
    if protocol == "mcp" and (match.method or match.path):
        why = "method and path mean nothing to MCP; write match: {tool: NAME}, or leave match out"
    if protocol in PROVIDERS and not by_path:
        names = " or ".join(PROVIDERS[protocol])
        why = f"only {names} is known by its name alone; write match: {{method: GET, path: /…}}, or one of these names"
    if protocol == "rest" and not by_path:
        why = "a REST operation is known by its method and path, and nothing else; write match: {method: GET, path: /…}"
    if why:
        yield here, "match_invalid", why


def _params(here: Pointer, params: Params, protocol: str, template: PathTemplate | None, words: Vocabulary) -> Iterator[Problem]:
    known = words.locations.get(protocol, params)
    for location in params:
        if location not in known:
            why = f"{protocol} has no {location!r} parameters; write one of: {', '.join(sorted(known))}"
            yield (*here, location), "location_unknown", why
    if template and "path" in params:
        variables = {name for name, _ in template.parts}
        for word in ("properties", "required"):
            for index, name in enumerate(params["path"].source.get(word, ())):
                if name not in variables:
                    why = f"the path {template.text} has no variable {name!r}; correct the name here or in match.path"
                    yield (*here, "path", word, name if word == "properties" else index), "schema_param_unknown", why


def _sinks(spec: Alerts) -> Iterator[Problem]:
    """Names of sinks that there are not."""
    here: Pointer = ("spec", "alerts")
    named: list[tuple[Pointer, str]] = [((*here, "routes", index, "to"), route.to) for index, route in enumerate(spec.routes)]
    for pointer, name in (*named, ((*here, "fallback"), spec.fallback)):
        if name and name not in spec.sinks:
            why = f"alerts can't go to {name!r}; write one of: {', '.join(sorted(spec.sinks)) or 'pagerduty, once it is set up'}"
            yield pointer, "sink_unknown", why


def _decoys(spec: Containment, sources: Iterable[Source]) -> Iterator[Problem]:
    """Decoys that an honest call could touch, and those that are not there to be touched."""
    here: Pointer = ("spec", "containment", "honeytoken")
    found = spec.honeytoken or Honeytoken.model_construct()
    every = [source.model for source in sources]
    hosts = {tool.spec.endpoint.host for tool in every if isinstance(tool, Tool)}
    listed = {name for agent in every if isinstance(agent, Agent) for name in agent.spec.tools}
    catalog = {tool.metadata.name for tool in every if isinstance(tool, Tool)}
    for index, host in enumerate(found.hosts):
        if host in hosts:
            yield (*here, "hosts", index), "decoy_in_use", f"{host!r} is a tool's host; name a host that no tool has"
    for index, name in enumerate(found.tools):
        if name not in catalog:
            yield (*here, "tools", index), "tool_unknown", f"the catalog has no tool {name!r}; correct the name, or add the decoy"
        if name in listed:
            yield (*here, "tools", index), "decoy_in_use", f"a manifest lists {name!r}; take it out there, or here"


def _neighbours(tool: Tool, near: dict[object, list[Tool]]) -> Iterator[Problem]:
    """Of the tools that were seen before at the same place (`near`), those whose calls could not be told from this one's."""
    mine = tool.spec.endpoint
    here = near.setdefault((mine.scheme, mine.host, mine.port), [])
    for other in here:
        outer, inner = sorted((f"{mine.base_path}/", f"{other.spec.endpoint.base_path}/"))
        if inner.startswith(outer) and other.metadata.name != tool.metadata.name:
            why = f"{other.metadata.name!r} is at the same host and their base paths nest; make them one tool, or move one"
            yield ("spec", "endpoint"), "endpoint_overlap", why
    here.append(tool)


def _grants(model: Agent, catalog: Mapping[str, tuple[ToolSpec, Document]], words: Vocabulary) -> Iterator[Problem]:
    for name, part in model.spec.tools.items():
        here: Pointer = ("spec", "tools", name)
        if name not in catalog:
            yield here, "tool_unknown", f"the catalog has no tool {name!r}; correct the name, or ask for the tool to be added"
            continue
        spec, written = catalog[name]
        for operation, grant in part.operations.items():
            place = (*here, "operations", operation)
            # As written, right or wrong: a mistake in the catalog is reported there, and not once more for every agent.
            if ("spec", "operations", operation) not in written.keys:
                why = f"the tool {name!r} has no operation {operation!r}; correct the name, or ask for it to be added"
                yield place, "operation_unknown", why
            match = spec.match(operation) if operation in spec.operations else Match.model_construct()
            yield from _params((*place, "params"), grant.params, spec.protocol, match.path, words)
            path = match.path.text if match.path else ""
            if spec.protocol in PROVIDERS and api_at(spec.protocol, match.method or "", path) and not named_models(grant.params):
                yield place, "model_not_named", _MODEL_NOT_NAMED


_MODEL_NOT_NAMED = (
    "the grant names no model, so every call will be denied; write params: {body: {properties: {model: {enum: [NAME]}}}}"
)


def named_models(params: Params) -> frozenset[str]:
    """The models that a grant names: the `const` or `enum` of its schema for the body's `model`."""
    model = params["body"].source.get("properties", {}).get("model") if "body" in params else None
    named = model.get("enum", [model.get("const")]) if isinstance(model, dict) else []
    return frozenset(name for name in named if isinstance(name, str))
