"""Writes what can be read off the code: docs/reference/*.md and the golden configurations in envoy/, netpol/ and compose/.

`python -m docs.generate [--check]`, from the repository's root. With `--check` nothing is written: each file that differs is
named on stderr, and the exit code is 1.

Law: whatever a page says of the code, it took from there. Prose that the code doesn't hold (the meaning of a record's field)
stands here in a table, and the script fails when the code has a field that the table lacks, or the reverse.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import orjson
import yaml

from broker.audit.chain import CHECKPOINT
from broker.audit.record import Attempt, Ending, alert_record, config_record, decision_record, notice_record, outcome_record
from broker.cli import options
from broker.cli.main import cli
from broker.cli.render import IMAGE, base, placeholders, rendered
from broker.containment.detectors import span
from broker.credentials import ISSUERS
from broker.dataplane.compile import bootstrap
from broker.dataplane.kubernetes import Cluster
from broker.dataplane.nftables import ruleset
from broker.dataplane.proto import in_json
from broker.dataplane.site import Site
from broker.ledger.base import Balance
from broker.manifest.findings import Finding
from broker.manifest.load import Loaded, load, load_texts
from broker.manifest.models import KINDS
from broker.manifest.strict_yaml import MAX_BYTES
from broker.metrics import Metrics, Standing
from broker.policy import containment
from broker.policy.containment import COUNTED, DEFAULTS, Detector, Rule
from broker.policy.limits import Limit
from broker.policy.snapshot import PolicySnapshot
from broker.policy.types import ALLOW, Code, Usage, deny
from broker.protocols.problem import STATUS, TYPE_PREFIX, WORDS
from tests import corpora

_MADE = "<!-- Made by `python -m docs.generate`. Change the code, not this file. -->\n"


def files() -> Mapping[str, str]:
    """Path, relative to the repository's root → content."""
    made: Mapping[str, Callable[[], str]] = {
        "docs/reference/kinds.md": kinds,
        "docs/reference/issuers.md": issuers,
        "docs/reference/codes.md": codes,
        "docs/reference/cli.md": verbs,
        "docs/reference/audit.md": audit,
        "docs/reference/metrics.md": metrics,
        "docs/reference/detectors.md": detectors,
        "envoy/sample-organisation.yaml": lambda: _golden("manifests"),
        "envoy/minimal.yaml": lambda: _golden("tests/golden/minimal"),
        "envoy/spire.yaml": lambda: _golden("tests/golden/spire"),
        "netpol/nftables.nft": _nftables,
        "compose/envoy.yaml": _compose,
    }
    return {path: make() for path, make in made.items()} | _kubernetes()


def _sample(directory: str = "manifests") -> tuple[Loaded, PolicySnapshot]:
    loaded = load(Path(directory))
    if loaded.snapshot is None:
        raise SystemExit(f"{directory} has errors; run `broker check {directory}`")
    return loaded, loaded.snapshot


def _nftables() -> str:
    _, snapshot = _sample()
    # The defaults of `broker render nftables`: each agent's user is called as the agent.
    return ruleset({name: name for name in snapshot.agents}, (("127.0.0.1", 15001), ("127.0.0.1", 15002)))


def _kubernetes() -> dict[str, str]:
    output, (loaded, snapshot) = Path("netpol/kubernetes"), _sample()
    made = base(snapshot, loaded, Path("manifests"), Cluster(IMAGE), output)
    return {f"{output}/{name}": text for name, text in made.items()}


def _golden(directory: str) -> str:
    _, snapshot = _sample(directory)
    # The defaults of `broker render envoy`.
    run = "/run/broker"
    doors = ("127.0.0.1", 15001), ("127.0.0.1", 15002)
    site = Site(*doors, (f"{run}/processor.sock",), f"{run}/envoy-admin.sock", options.ROOTS[0])
    text: str = yaml.safe_dump(rendered(snapshot, site, placeholders(snapshot)), sort_keys=False, width=120)
    return f"# broker render envoy {directory}\n{text}"


def _compose() -> str:
    services = yaml.safe_load(Path("compose/compose.yaml").read_text(encoding="utf-8"))["services"]
    names, run = [name for name in services if name.startswith("processor-")], "/run/broker"
    doors = ("0.0.0.0", 15001), ("0.0.0.0", 15002)  # noqa: S104 - a container's networks, which compose.yaml draws
    site = Site(*doors, tuple(f"{run}/{name}.sock" for name in names), f"{run}/envoy-admin.sock", options.ROOTS[0])
    text: str = yaml.safe_dump(in_json(bootstrap(site)), sort_keys=False, width=120)
    command = f"broker render envoy --bootstrap {' '.join(f'--processor {name}' for name in names)}"
    return f"# {command}\n{text}"


# -------------------------------------------------------------------------------------------------------------------- kinds


def kinds() -> str:
    """The four kinds, field by field, from their JSON Schemas. A part that several kinds share is shown once."""
    seen: set[str] = set()
    sections = [_kind(name, model.model_json_schema(), seen) for name, model in KINDS.items()]
    intro = (
        "What a manifests folder may hold. A field that is not listed is an error, and so is a value of another type. "
        "`manifests/schema/` has the same as JSON Schemas for editors; `broker check` judges.\n"
    )
    return f"{_MADE}# Kinds\n\n{intro}\n" + "\n".join(sections)


def issuers() -> str:
    """The fields that each issuer has beside those of every credential."""
    sections = [_kind(name, issuer.Settings.model_json_schema(), set()) for name, issuer in sorted(ISSUERS.items())]
    intro = (
        "What a tool's `credential` may say beside `issuer` and `as`, by its issuer. `{env: NAME}` names a variable of the "
        "broker's, `{file: PATH}` a file, relative to the manifests folder; both are read anew each time. How to set each up: "
        "[credentials](../credentials.md).\n"
    )
    return f"{_MADE}# Issuers\n\n{intro}\n" + "\n".join(sections)


def _kind(name: str, schema: dict[str, Any], seen: set[str]) -> str:
    definitions: dict[str, Any] = schema.get("$defs", {})
    text, waiting = f"## {name}\n\n{schema['description']}\n" + _fields(schema, definitions), [*_references(schema["properties"])]
    while waiting:
        part = waiting.pop(0)
        body = definitions[part]
        if part in seen or "properties" not in body:
            continue
        seen.add(part)
        text += f"\n### {part}\n\n{body.get('description', '')}\n" + _fields(body, definitions)
        waiting += _references(body["properties"])
    return text


def _references(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield _last(node["$ref"])
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


def _last(reference: str) -> str:
    return reference.rpartition("/")[2]


def _fields(body: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    required = body.get("required", [])
    rows = [
        f"| `{field}` | {_type(spec, definitions)} | {_default(field, spec, required)} | {_meaning(spec, definitions)} |"
        for field, spec in body["properties"].items()
    ]
    return "\n| field | type | default | meaning |\n| --- | --- | --- | --- |\n" + "\n".join(rows) + "\n"


def _meaning(spec: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    # A field that is a part of its own says nothing where the part says the same.
    part = definitions.get(_last(spec.get("$ref", "")), {})
    branches = (branch.get("description", "") for branch in spec.get("anyOf", ()))
    return _cell(spec.get("description") or part.get("description", "") or next(filter(None, branches), ""))


def _type(spec: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "$ref" in spec:
        return _named(_last(spec["$ref"]), definitions)
    if "anyOf" in spec:
        return " or ".join(_type(each, definitions) for each in spec["anyOf"] if each.get("type") != "null")
    if "const" in spec:
        return f"`{spec['const']}`"
    if "enum" in spec:
        return _cell(" | ".join(f"`{word}`" for word in spec["enum"]))
    kind = spec.get("type", "any")
    if kind == "array":
        return f"list of {_type(spec['items'], definitions)}"
    if kind == "object":
        inside = spec.get("additionalProperties") or next(iter(spec.get("patternProperties", {}).values()), None)
        keys = spec.get("propertyNames", {})
        words = " or ".join(f"`{word}`" for word in ([keys["const"]] if "const" in keys else keys.get("enum", [])))
        of = f" of {words}" if words else ""
        return f"map{of} to {_type(inside, definitions)}" if isinstance(inside, dict) else "map"
    return f"{kind} `{_cell(spec['pattern'])}`" if "pattern" in spec else str(kind)


def _named(name: str, definitions: Mapping[str, Any]) -> str:
    if name == "JsonValue":
        return "any JSON"
    if name == "Code":
        return "[a code](codes.md)"
    body = definitions[name]
    return f"[{name}](#{name.lower()})" if "properties" in body else _type(body, definitions)


def _default(field: str, spec: Mapping[str, Any], required: Iterable[str]) -> str:
    if field in required:
        return "required"
    value = spec.get("default")
    return "" if value in (None, "", [], {}) or isinstance(value, dict) else f"`{orjson.dumps(value).decode()}`"


def _cell(text: str) -> str:
    # GitHub splits cells at a bar, also between backticks.
    return text.replace("|", "\\|")


# -------------------------------------------------------------------------------------------------------------------- codes


def codes() -> str:
    """Codes of denials, then codes of findings."""
    unused = _unused()
    rows = "\n".join(_denial(code) for code in Code if code not in unused)
    later = ", ".join(f"`{code}`" for code in unused)
    reserved = f"Reserved for parts that are not built yet; no call gets them today: {later}.\n\n" if unused else ""
    found = "\n".join(_finding(example) for _, example in sorted(_findings().items()))
    return (
        f"{_MADE}# Codes\n\n"
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
    return f"| `{code}` | {STATUS[code]} | {title} | {_cell(' '.join(steps))} |"


def _unused() -> tuple[Code, ...]:
    """The codes that no module decides on."""
    ours = {Path("broker/policy/types.py"), Path("broker/protocols/problem.py")}
    text = "".join(path.read_text() for path in Path("broker").rglob("*.py") if path not in ours)
    named = {code for code in Code if f"Code.{code.name}" in text}
    return tuple(code for code in Code if code not in named)


def _finding(example: Finding) -> str:
    return f"| `{example.code}` | {example.severity} | {_cell(f'{example.message}; {example.advice}')} |"


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


# -------------------------------------------------------------------------------------------------------------------- verbs


def verbs() -> str:
    """The help of every verb, as it is printed 100 columns wide."""
    parts = "\n".join(f"## {path}\n\n```text\n{text}\n```\n" for path, text in _helps(cli, "broker", None))
    return (
        f"{_MADE}# Command line\n\n"
        "Exit codes: 0 yes, 1 findings or a denial, 2 wrong usage or unreadable input, 3 the broker is at fault.\n\n"
        f"{parts}"
    )


def _helps(command: click.Command, path: str, parent: click.Context | None) -> Iterator[tuple[str, str]]:
    name = path.rpartition(" ")[2]
    settings: dict[str, Any] = {"terminal_width": 100, "max_content_width": 100} if parent is None else {}
    context = click.Context(command, info_name=name, parent=parent, help_option_names=["-h", "--help"], **settings)
    yield path, command.get_help(context)
    if isinstance(command, click.Group):
        for word in command.list_commands(context):
            verb = command.get_command(context, word)
            if verb is not None:
                yield from _helps(verb, f"{path} {word}", context)


# ------------------------------------------------------------------------------------------------------------------- record

_MEANING: Mapping[str, str] = {
    "schema": "Always `broker.audit/v1`.",
    "seq": "Number of the record, from 1, without gaps.",
    "time": "When it was written, RFC 3339, UTC, microseconds.",
    "mono_ns": "The monotonic clock in nanoseconds: orders records within one run of the broker when the wall clock jumps.",
    "event": "`decision`, `outcome`, `config`, `revocation`, `release`, `approval` or `alert`.",
    "prev_hash": "`hash` of the record before; 64 zeros for the first.",
    "hash": "SHA-256 of this record in canonical JSON without `hash`, lower-case hex.",
    "decision_id": "Names the decision; also in the header `x-broker-decision-id` of a denial, and in the outcome.",
    "agent": "`name`, `spiffe`, `owner`, `oncall`, from the manifest; empty where none was proven, `name` alone in a revocation.",
    "run_id": "The run that the agent named (`x-run-id`, or W3C baggage `run.id`). It groups; it proves nothing.",
    "step": "Number of the call in its run; 0 where nothing was reserved for it.",
    "trace_id": "The trace ID of the request's `traceparent`.",
    "tool": "The tool's name in the catalog.",
    "operation": "The operation's name, or what was tried where none matched.",
    "revision": "The configuration that decided; in a `config` record, the one in force now.",
    "door": "`proxy` or `base-url`; null where Envoy refused the request below HTTP.",
    "effect": "`read`, `write` or `destructive`, from the catalog.",
    "data": "The operation's data classes.",
    "method": "The HTTP method; `CONNECT` for a tunnel.",
    "host": "The authority as sent; the declared one where a tool was found.",
    "path": "The raw path without query; parameters of an operation with the data class `pii` or `secret` are masked.",
    "args": "The parameters by location, redacted, at most 16 KiB.",
    "args_hash": "`sha256:` over the canonical JSON of all parameters, unredacted.",
    "limits": "`reserved`: the most that the call may spend, by measure. `refused`: the limit that had no room, its `scope`, "
    "`amount`, and what was `spent` and `needed`. Dollars in dollars; null where neither is the case. `degraded`: the shared "
    "ledger was away, and this broker counted for itself.",
    "verdict": "`allow` or `deny`.",
    "code": "Why it was denied, or why the broker ended an allowed call. See [codes](codes.md).",
    "rule": "Where the decisive rule stands, `file#pointer`.",
    "detail": "One sentence for people.",
    "violations": "Each with `pointer`, `rule`, `message`; at most 32. A message never quotes the value.",
    "credential": "`issuer`, `scopes`, `lease_id`, `expires` of what was injected; never the credential. Null where none was.",
    "upstream": "`status` (0 where no answer came; `detail` says why), `bytes` as far as known, `duration_ms` of the call.",
    "response_hash": "Reserved: null.",
    "masked": "The answer's headers, or `body`, that showed the injected credential, which was taken out.",
    "model": "The model that was asked for; in the decision too.",
    "provider": "Whose prices count: the tool's name, or else its protocol; in the decision too.",
    "prompt_hash": "`sha256:` over the canonical JSON of what was said to the model, which is not recorded; in the decision too.",
    "tokens": "`input`, of which `cached` and `cache_write`, and `output`; `estimated` where the provider did not tell all.",
    "usd": "What that cost, by the platform's prices; null without a price.",
    "completion_hash": "`sha256:` over the text that was generated, which is not recorded; the same whole or as a stream.",
    "notice": (
        "What was done or said, whole, for replay; as all brokers that share a Redis know it. `kind` is `restriction` (`action`, "
        "`run_id`, `reason`, `by`, `at`), `tokens`, `release` (`of`: the restrictions that it lifts), `vote` (`asked`, `vote`), "
        "`used` or `expired` (`of`: the approval)."
    ),
    "approval": "The approval that the call waits for, or that it used.",
    "kind": "A detector's name, `revocation`, `release`, `credential_shown`, `ledger` or `self_test`.",
    "severity": "`low`, `medium` or `high`.",
    "decision_ids": "The decisions that it rests on, the latest few.",
    "action": "What was done: `alert`, `read_only`, `hold`, `revoke_run` or `revoke_agent`.",
    "shadow": "Whether the rule only says what it would have done.",
}
_NOW = 1_767_225_600.0


def audit() -> str:
    """The record's fields, by event, and one whole example."""
    samples = _samples()
    every = [name for name in _MEANING if all(name in record for record in samples.values())]
    sections = [_record_fields("In every record", every)]
    for event, record in samples.items():
        rest = [name for name in _MEANING if name in record and name not in every]
        sections.append(_record_fields(f"`{event}`", rest))
    asked = Attempt("", "", {}, model="gpt-5-mini", provider="openai", prompt_hash="sha256:…")
    model = outcome_record(_NOW, 812_345_678, asked, Ending(usage=Usage(), usd=0.0, completion_hash="sha256:…"))
    more = {name: model for name in model if name not in samples["outcome"]}
    sections.append(_record_fields("Of a call of a model, beside these", [name for name in _MEANING if name in more]))
    samples = {**samples, "of models": more}
    unknown = {name for record in samples.values() for name in record} ^ set(_MEANING)
    if unknown:
        raise SystemExit(f"docs/generate.py and broker/audit/record.py disagree on: {', '.join(sorted(unknown))}")
    example = orjson.dumps(samples["decision"], option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2).decode()
    return (
        f"{_MADE}# The audit record\n\n"
        "`STATE/audit/*.jsonl`: one canonical JSON object a line (UTF-8, keys sorted, no whitespace), in files of at most "
        f"64 MiB that are named by their first `seq`. `{CHECKPOINT}` holds the signed end of the chain. An allow is written "
        "before the call leaves; its outcome after it ended, however it ended.\n"
        f"{''.join(sections)}\n## A decision\n\nShown indented; `hash` and `prev_hash` shortened.\n\n```json\n{example}\n```\n"
    )


def _record_fields(title: str, names: Iterable[str]) -> str:
    rows = "\n".join(f"| `{name}` | {_MEANING[name]} |" for name in names)
    return f"\n## {title}\n\n| field | meaning |\n| --- | --- |\n{rows}\n" if rows else ""


def _samples() -> Mapping[str, Mapping[str, Any]]:
    agent = {
        "name": "refund-bot",
        "spiffe": "spiffe://acme.example/agents/refund-bot",
        "owner": "team-payments",
        "oncall": "payments-primary",
    }
    attempt = Attempt(
        decision_id="5f1c0c6c1f9f4c0e9a3d",
        revision="sha256:53b9…",
        agent=agent,
        door="proxy",
        method="POST",
        host="api.stripe.com",
        path="/v1/refunds",
        tool="stripe",
        operation="refunds.create",
        effect="write",
        data=("financial",),
        params={"path": {}, "query": {}, "body": {"charge": "ch_1", "amount": 1200}},
        run_id="run-7",
    )
    credential: dict[str, Any] = {"issuer": "static", "scopes": [], "lease_id": "static-0f3a…", "expires": None}
    link = {"seq": 42, "prev_hash": "9a0b…", "hash": "c71d…"}
    allowed = decision_record(_NOW, 812_345_678, attempt, ALLOW, credential)
    denied = decision_record(_NOW, 812_345_678, attempt, deny(Code.PARAMS_INVALID, ""))
    if set(allowed) != set(denied):
        raise SystemExit("an allow and a denial have different fields; say so in the reference")
    notice = partial(notice_record, now=_NOW, mono_ns=812_345_678, agent={"name": "refund-bot"}, detail="by jo", notice={})
    found = {"agent": agent, "kind": "probing", "severity": "medium", "action": "alert", "rule": "default", "run_id": "run-7"}
    return {
        "decision": allowed | link,
        "outcome": outcome_record(_NOW, 812_345_678, attempt, Ending(status=200)) | link,
        "config": config_record(_NOW, 812_345_678, "configuration in force") | link,
        **{event: notice(event=event) | link for event in ("revocation", "release", "approval")},
        "alert": alert_record(_NOW, 812_345_678, "8 hosts", found | {"shadow": False}, ["5f1c0c6c1f9f4c0e9a3d"]) | link,
    }


# ------------------------------------------------------------------------------------------------------------------ metrics


def metrics() -> str:
    """Every metric with its type and labels, from what a broker shows once everything has happened in it."""
    families = [family for family in _shown_metrics().registry.collect() if family.name.startswith("broker_")]
    rows = "\n".join(_metric(family) for family in sorted(families, key=lambda family: family.name))
    return (
        f"{_MADE}# Metrics\n\n"
        "`GET /metrics` on the admin port, in Prometheus' text format. A label's value is a name from the manifests, "
        "[a code](codes.md) or a word that stands here, never what an agent says. Counters begin at 0 with each start of a "
        "broker. Beside these there are the Python client's `process_…`. [A dashboard](../../compose/grafana/README.md) shows "
        f"them.\n\n| metric | type | labels | meaning |\n| --- | --- | --- | --- |\n{rows}\n\n"
        "`scope` is `agent/NAME`, `agent/NAME/TOOL`, `agent/NAME/TOOL/OPERATION`, `team/NAME` or `environment/NAME`, and `limit` "
        "the word in the manifest: `tokens`, `usd`, `calls`, … Only limits by the window are shown; "
        "`broker agents show NAME` tells all of them.\n"
    )


def _metric(family: Any) -> str:
    if not family.samples:
        raise SystemExit(f"docs/generate.py lets nothing happen that {family.name} would count")
    labels = dict.fromkeys(label for sample in family.samples for label in sample.labels if label != "le")
    name = f"{family.name}_total" if family.type == "counter" else family.name
    return f"| `{name}` | {family.type} | {', '.join(f'`{label}`' for label in labels)} | {_cell(family.documentation)} |"


def _shown_metrics() -> Metrics:
    shown = Metrics()
    shown.decided("allow", "", 120_000)
    shown.waited_for_ledger(900_000)
    shown.ended("refund-bot", "openai", "gpt-5-mini", Ending(status=500, usage=Usage(9, 6, 3), usd=0.01), "5xx")
    balance = Balance(Limit("tokens", "agent/refund-bot", 2_000_000, "", per=86_400), 15, _NOW)
    shown.found("probing", "alert")
    now = Standing("sha256:53b9…", current=True, accepted=True, audit_writable=True, open_calls=0, balances=[balance])
    shown.exposition(replace(now, restrictions={"revoke_agent": 1}, alerts={("pagerduty", "delivered"): 1}))
    return shown


# ---------------------------------------------------------------------------------------------------------------- detectors


def detectors() -> str:
    """What is looked for by default, and what that finds in traces of honest work and of attacks."""
    meanings = _meanings(Path(containment.__file__), Detector.__name__)
    rules = "\n".join(_rule(rule, meanings[rule.detector.name]) for rule in sorted(DEFAULTS, key=_detector_order))
    benign, attacks = [corpora.judged(name) for name in corpora.BENIGN], [corpora.judged(name) for name in corpora.ATTACKS]
    attacked = "\n".join(map(_attack, attacks))
    calls, found = sum(each.calls for each in benign), sum(each.found.total() for each in benign)
    honest = "\n".join(f"| {each.name} | {each.calls:,} | {_found(each.found)} | {each.revokes} |" for each in benign)
    return (
        f"{_MADE}# Detectors\n\n"
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
    return f"| `{rule.detector}` | {fires} | `{rule.action}` | {span(rule.cooldown)} | {_cell(meaning)} |"


def _attack(judged: corpora.Judged) -> str:
    attack = corpora.ATTACKS[judged.name]
    took = f"{judged.seconds:.1f} s" if judged.seconds < _MINUTES else f"{judged.seconds / 60:,.0f} min"
    star = " \\*" if attack.around else ""
    caught = f"{judged.after:,} | {took}" if judged.after else "not caught | "
    return f"| {judged.name}{star} | `{attack.detector}` | {caught} | {_found(judged.found)} | {judged.revokes} |"


def _found(found: Mapping[Detector, int]) -> str:
    return ", ".join(f"{number} `{detector}`" for detector, number in sorted(found.items())) or "none"


_MINUTES = 120  # seconds: what is longer is told in minutes


# ---------------------------------------------------------------------------------------------------------------------------


def main(arguments: list[str], root: Path = Path()) -> int:
    """Write or compare below `root`; 1 where a file is missing or differs."""
    made = files()
    stale = [path for path, text in made.items() if not _is(root / path, text)]
    if "--check" in arguments:
        sys.stderr.writelines(f"{path} differs from what the code says; run python -m docs.generate\n" for path in stale)
        return 1 if stale else 0
    for path in stale:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(made[path], encoding="utf-8")
    return 0


def _is(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
