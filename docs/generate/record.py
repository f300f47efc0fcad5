"""The audit record. What a field means stands here: one that the code has and this lacks, or the reverse, is an error."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import orjson

from broker.audit.chain import CHECKPOINT
from broker.audit.record import Attempt, Ending, alert_record, config_record, decision_record, notice_record, outcome_record
from broker.policy.types import ALLOW, Code, Usage, deny
from docs.generate.page import MADE, NOW

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


def audit() -> str:
    """The record's fields, by event, and one whole example."""
    samples = _samples()
    every = [name for name in _MEANING if all(name in record for record in samples.values())]
    sections = [_record_fields("In every record", every)]
    for event, record in samples.items():
        rest = [name for name in _MEANING if name in record and name not in every]
        sections.append(_record_fields(f"`{event}`", rest))
    asked = Attempt("", "", {}, model="gpt-5-mini", provider="openai", prompt_hash="sha256:…")
    model = outcome_record(NOW, 812_345_678, asked, Ending(usage=Usage(), usd=0.0, completion_hash="sha256:…"))
    more = {name: model for name in model if name not in samples["outcome"]}
    sections.append(_record_fields("Of a call of a model, beside these", [name for name in _MEANING if name in more]))
    samples = {**samples, "of models": more}
    unknown = {name for record in samples.values() for name in record} ^ set(_MEANING)
    if unknown:
        raise SystemExit(f"docs/generate/record.py and broker/audit/record.py disagree on: {', '.join(sorted(unknown))}")
    example = orjson.dumps(samples["decision"], option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2).decode()
    return (
        f"{MADE}# The audit record\n\n"
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
    allowed = decision_record(NOW, 812_345_678, attempt, ALLOW, credential)
    denied = decision_record(NOW, 812_345_678, attempt, deny(Code.PARAMS_INVALID, ""))
    if set(allowed) != set(denied):
        raise SystemExit("an allow and a denial have different fields; say so in the reference")
    notice = partial(notice_record, now=NOW, mono_ns=812_345_678, agent={"name": "refund-bot"}, detail="by jo", notice={})
    found = {"agent": agent, "kind": "probing", "severity": "medium", "action": "alert", "rule": "default", "run_id": "run-7"}
    return {
        "decision": allowed | link,
        "outcome": outcome_record(NOW, 812_345_678, attempt, Ending(status=200)) | link,
        "config": config_record(NOW, 812_345_678, "configuration in force") | link,
        **{event: notice(event=event) | link for event in ("revocation", "release", "approval")},
        "alert": alert_record(NOW, 812_345_678, "8 hosts", found | {"shadow": False}, ["5f1c0c6c1f9f4c0e9a3d"]) | link,
    }
