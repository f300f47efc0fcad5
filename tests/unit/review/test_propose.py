"""What is proposed for denied calls, end to end but for the command line: real records in, an edited file out.

Each proposal must let exactly those calls pass: they are replayed through the exchange, and so are their neighbours.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from broker.errors import UsageError
from broker.manifest.load import load, load_texts
from broker.rehearsal import Call, Rehearsal, call_of
from broker.review.edit import edited
from broker.review.propose import Edit, proposed, replayed

NOW = 1_800_000_000.0
SAMPLE = Path(__file__).parents[3] / "manifests"
TEXTS = {path.relative_to(SAMPLE).as_posix(): path.read_bytes() for path in SAMPLE.rglob("*.yaml") if "tests" not in path.parts}
SNAPSHOT = load_texts(TEXTS, SAMPLE).snapshot
BEFORE = Rehearsal(SNAPSHOT, NOW)


def get(url):
    return Call("GET", url)


def post(url, body, method="POST"):
    return Call(method, url).with_json(body)


GITHUB = "https://api.github.com/repos"
STRIPE = "https://api.stripe.com/v1"
SLACK = "https://slack.com/api/chat.postMessage"


def mcp(operation, **arguments):
    return call_of(SNAPSHOT.tools["wiki"], operation, arguments)


def chat(model):
    return call_of(SNAPSHOT.tools["openai"], "chat.completions", {"model": model, "store": False, "messages": [{"role": "user"}]})


def propose(agent, calls, **more):
    records = [BEFORE.call(agent, call).record for call in calls]
    assert all(record["verdict"] == "deny" for record in records), records
    return records, *proposed(SNAPSHOT, records, more.get("contained", ()), more.get("attacks", ()))


def applied(edits):
    texts = dict(TEXTS)
    for file in {edit.file for edit in edits}:
        texts[file] = edited(texts[file].decode(), [edit for edit in edits if edit.file == file]).encode()
    loaded = load_texts(texts, SAMPLE)
    assert loaded.snapshot, loaded.findings
    return loaded.snapshot, texts


CASES = {
    "a repository that the list does not have": (
        "refund-bot",
        [get(f"{GITHUB}/acme/mobile/issues")],
        [
            get(f"{GITHUB}/acme/other/issues"),
            get(f"{GITHUB}/evil/mobile/issues"),
            post(f"{GITHUB}/acme/mobile/issues", {"title": "x"}),
        ],
    ),
    "another owner's, which must not open the owner's others": (
        "refund-bot",
        [get(f"{GITHUB}/evil/x/issues")],
        [get(f"{GITHUB}/evil/web/issues"), get(f"{GITHUB}/acme/x/issues")],
    ),
    "two at once, which must not be mixed": (
        "refund-bot",
        [get(f"{GITHUB}/one/x/issues"), get(f"{GITHUB}/two/y/issues")],
        [get(f"{GITHUB}/one/y/issues"), get(f"{GITHUB}/two/x/issues"), get(f"{GITHUB}/one/web/issues")],
    ),
    "an operation that the manifest does not list": (
        "refund-bot",
        [get(f"{GITHUB}/acme/web/issues/7")],
        [get(f"{GITHUB}/acme/web/issues/8"), get(f"{GITHUB}/acme/payments/issues/7"), get(f"{GITHUB}/acme/web/pulls/7")],
    ),
    "an operation with a body": (
        "refund-bot",
        [post(f"{GITHUB}/acme/web/issues/7/comments", {"body": "Done."})],
        [
            post(f"{GITHUB}/acme/web/issues/7/comments", {"body": "Done!"}),
            post(f"{GITHUB}/acme/web/issues/8/comments", {"body": "Done."}),
        ],
    ),
    "a tool that the manifest does not list": (
        "refund-bot",
        [get("https://acme.atlassian.net/rest/api/3/issue/FIN-7")],
        [
            get("https://acme.atlassian.net/rest/api/3/issue/FIN-8"),
            get("https://acme.atlassian.net/rest/api/3/issue/FIN-7?fields=a"),
        ],
    ),
    "a channel, with its text": (
        "campaign-writer",
        [post(SLACK, {"channel": "C04OTHERONE", "text": "Hi"})],
        [post(SLACK, {"channel": "C04OTHERONE", "text": "Ho"}), post(SLACK, {"channel": "C04ANOTHER1", "text": "Hi"})],
    ),
    "a query": (
        "invoice-reconciler",
        [get(f"{STRIPE}/refunds?charge=ch_1")],
        [get(f"{STRIPE}/refunds?charge=ch_2"), get(f"{STRIPE}/refunds?charge=ch_1&limit=3"), get(f"{STRIPE}/refunds")],
    ),
    "a number over the maximum": (
        "refund-bot",
        [post(f"{STRIPE}/refunds", {"charge": "ch_1", "amount": 20001, "reason": "duplicate", "metadata[ticket_id]": "7"})],
        [
            post(f"{STRIPE}/refunds", {"charge": "ch_1", "amount": amount, "reason": "duplicate", "metadata[ticket_id]": "7"})
            for amount in (20002, 20000.5)
        ],
    ),
    "a word that YAML would read as a boolean": (
        "support-triage",
        [mcp("search_pages", query="no", space="off")],
        [mcp("search_pages", query="no", space="on"), mcp("search_pages", query="yes", space="off")],
    ),
    "an MCP tool that the manifest does not list": ("code-reviewer", [mcp("list_spaces")], [mcp("list_spaces", all=True)]),
    "a model": ("refund-bot", [chat("gpt-5")], [chat("gpt-5-pro")]),
}


def outcome(found):
    return found.record["code"] or "allow"


@pytest.mark.parametrize("name", CASES)
def test_a_proposal_lets_exactly_those_calls_pass(name):
    agent, calls, neighbours = CASES[name]
    records, edits, refused = propose(agent, calls)
    assert (refused, bool(edits)) == ([], True)
    assert all(BEFORE.call(agent, each).record["verdict"] == "deny" for each in neighbours), "the neighbours are denied before"
    snapshot, texts = applied(edits)
    after = Rehearsal(snapshot, NOW)
    # What people must approve waits for them as before: it is permitted, and that is all a manifest can say.
    assert {outcome(after.call(agent, each)) for each in calls} <= {"allow", "approval_required"}
    assert {replayed(snapshot, record, NOW) for record in records} <= {True, None}
    assert {outcome(after.call(agent, each)) for each in neighbours} <= {"params_invalid", "operation_not_declared"}
    changed = [file for file, text in texts.items() if text != TEXTS[file]]
    assert changed == [f"agents/{agent}.yaml"]


@pytest.mark.parametrize("name", CASES)
def test_an_edit_leaves_every_other_line_as_it_is(name):
    agent, calls, _ = CASES[name]
    _, edits, _ = propose(agent, calls)
    file = f"agents/{agent}.yaml"
    text = edited(TEXTS[file].decode(), edits)
    # What now stands in a list of alternatives is indented, and the first of it has the list's dash.
    before, after = ([line.strip().removeprefix("- ") for line in each.splitlines()] for each in (TEXTS[file].decode(), text))
    gone = [line for line in before if line not in after]
    assert len(gone) <= len(edits)
    assert [line for line in before if "#" in line] == [line for line in after if "#" in line and line in before]


@pytest.mark.parametrize("indent", [1, 2, 3, 4, 8])
def test_a_file_may_be_indented_as_its_authors_like(indent):
    levels = ["spec:", "tools:", "box:", "operations:", "do:", "params:", "body: {const: 1}  # why"]
    text = "kind: Agent\nmetadata: {name: bot}\n" + "".join(
        f"{' ' * indent * level}{line}\n" for level, line in enumerate(levels)
    )
    more = Edit("bot", "f", ("spec", "tools", "box", "operations", "new"), {"params": {"body": {"const": 2}}}, ())
    other = Edit("bot", "f", ("spec", "tools", "other"), {"operations": {}}, ())
    made = edited(text, [more, other])
    box = {"operations": {"do": {"params": {"body": {"const": 1}}}, "new": {"params": {"body": {"const": 2}}}}}
    assert YAML().load(made)["spec"]["tools"] == {"box": box, "other": {"operations": {}}}
    assert "# why" in made


def test_what_the_record_does_not_hold_is_told_and_left_to_the_catalog():
    records, (edit,), _ = propose("code-reviewer", [get("https://acme.zendesk.com/api/v2/tickets?external_id=someone")])
    note, _ = edit.notes
    assert "/query/external_id" in note
    snapshot, _ = applied([edit])
    assert replayed(snapshot, records[0], NOW) is None
    after = Rehearsal(snapshot, NOW)
    assert after.call("code-reviewer", get("https://acme.zendesk.com/api/v2/tickets?external_id=other")).passes
    assert not after.call("code-reviewer", get("https://acme.zendesk.com/api/v2/tickets?sort=id")).passes


def test_a_text_that_only_looks_like_a_mark_is_pinned():
    call = post(f"{GITHUB}/acme/web/issues/7/comments", {"body": "[redacted]"})
    _, (edit,), _ = propose("refund-bot", [call])
    assert edit.notes == ()
    snapshot, _ = applied([edit])
    other = post(f"{GITHUB}/acme/web/issues/7/comments", {"body": "anything"})
    assert not Rehearsal(snapshot, NOW).call("refund-bot", other).passes


def test_a_refused_tunnel_is_let_through_without_any_operation():
    record = {
        **BEFORE.call("refund-bot", get("https://acme.atlassian.net/rest/api/3/issue/FIN-7")).record,
        "method": "CONNECT", "host": "acme.atlassian.net:443", "tool": None, "operation": None, "args": {},
    }  # fmt: skip
    (edit,), refused = proposed(SNAPSHOT, [record], ())
    assert (edit.place, edit.value, refused) == (("spec", "tools", "jira"), {"operations": {}}, [])
    snapshot, _ = applied([edit])
    assert replayed(snapshot, record, NOW)
    assert (
        outcome(Rehearsal(snapshot, NOW).call("refund-bot", get("https://acme.atlassian.net/rest/api/3/issue/FIN-7"))) != "allow"
    )


def changed(call=None, **fields):
    return {**BEFORE.call("refund-bot", call or get(f"{GITHUB}/acme/mobile/issues")).record, **fields}


@pytest.mark.parametrize(
    ("record", "why"),
    [
        pytest.param(changed(get(f"{GITHUB}/acme/web/issues")), "this is no denied call", id="an allowed call"),
        pytest.param(changed(event="outcome"), "this is no denied call", id="an outcome"),
        pytest.param(changed(code="body_malformed"), "could not be read in exactly one way", id="malformed"),
        pytest.param(changed(code="agent_unknown"), "nobody proved to be an agent", id="identity"),
        pytest.param(changed(code="internal_fault"), "the broker or the tool failed", id="a fault"),
        pytest.param(changed(code="flow_forbidden"), "a flow rule or a person", id="a flow rule"),
        pytest.param(changed(code="approval_rejected"), "a flow rule or a person", id="a person said no"),
        pytest.param(changed(code="agent_revoked"), "the agent was cut off", id="revoked"),
        pytest.param(changed(code="budget_exhausted"), "a limit was reached", id="a limit"),
        pytest.param(changed(agent={"name": "gone"}), "there is no manifest of 'gone'", id="an agent without a manifest"),
        pytest.param(changed(get("https://evil.example/")), "no tool of the catalog is at evil.example", id="a host"),
        pytest.param(changed(get(f"{GITHUB}/acme/web/forks")), "is no operation of 'github'", id="no operation of the catalog"),
        pytest.param(changed(get(f"{STRIPE}/charges/not-an-id")), "the catalog refuses /path/charge", id="the catalog's schema"),
        pytest.param(changed(rule="agents/refund-bot.yaml#/x/expires"), "the grant has lapsed", id="a grant that has lapsed"),
        pytest.param(
            changed(
                post(
                    "https://api.openai.com/v1/chat/completions",
                    {"model": "gpt-5-mini", "store": True, "messages": [{"role": "user"}]},
                )
            ),
            "the record keeps no prompts",
            id="a model call's other fields",
        ),
    ],
)
def test_nothing_is_proposed_for(record, why):
    edits, (refused,) = proposed(SNAPSHOT, [record], ())
    assert edits == []
    assert why in refused.why


@pytest.mark.parametrize(
    ("more", "why"),
    [({"contained": {"refund-bot"}}, "under containment"), ({"attacks": {"rehearsed-1"}}, "labelled it an attack")],
    ids=["an agent under containment", "what a reviewer called an attack"],
)
def test_nothing_is_proposed_while_people_say_otherwise(more, why):
    _, edits, refused = propose("refund-bot", [get(f"{GITHUB}/acme/mobile/issues")], **more)
    assert edits == []
    assert why in refused[0].why


def small(operation, grant=None, **tool):
    """A snapshot with one tool that has the operation `do`, and an agent that is granted it so, or not at all."""
    written = {
        "tools/box.yaml": {"kind": "Tool", "metadata": {"name": "box", "owner": "t"}, "spec": {
            "protocol": "rest", "endpoint": "https://box.example", "operations": {"do": operation}, **tool}},
        "agents/bot.yaml": {"kind": "Agent", "metadata": {"name": "bot", "owner": "t"}, "spec": {
            "identity": {"token": True}, "tools": {} if grant is None else {"box": {"operations": {"do": grant}}}}},
    }  # fmt: skip
    texts = {path: json.dumps({"apiVersion": "broker/v1", **each}).encode() for path, each in written.items()}
    loaded = load_texts(texts, SAMPLE)
    assert loaded.snapshot, loaded.findings
    return loaded.snapshot


def denied(snapshot, call):
    record = Rehearsal(snapshot, NOW).call("bot", call).record
    assert record["verdict"] == "deny"
    return record


PUT = {"match": {"method": "POST", "path": "/x/{id}"}, "effect": "write"}
BOX = "https://box.example/x/7"


def test_nothing_is_proposed_for_an_mcp_method_with_the_name_of_an_operation():
    """It would be granted without bounds: a method that is no `tools/call` has no arguments."""
    snapshot = small({"effect": "destructive"}, protocol="mcp")
    snapshot = replace(snapshot, agents={"bot": replace(snapshot.agents["bot"], tools={"box": {}})})
    message = {"jsonrpc": "2.0", "id": 1, "method": "do", "params": {}}
    call = Call("POST", "https://box.example", (("accept", "application/json, text/event-stream"),)).with_json(message)
    edits, (refused,) = proposed(snapshot, [denied(snapshot, call)], ())
    assert edits == []
    assert "is no operation of 'box'" in refused.why


def test_nothing_is_proposed_for_a_request_that_was_kept_out_of_the_record():
    record = denied(small(PUT), post(BOX, {"a": 1}))
    edits, (refused,) = proposed(small(PUT), [{**record, "args": {}, "path": "[redacted]"}], ())
    assert edits == []
    assert "is not in the record" in refused.why


def test_nothing_is_proposed_for_a_call_that_lacks_what_the_manifest_asks_for():
    snapshot = small(PUT, {"params": {"body": {"required": ["a"]}}})
    edits, (refused,) = proposed(snapshot, [denied(snapshot, Call("POST", BOX))], ())
    assert edits == []
    assert "has no body" in refused.why


@pytest.mark.parametrize("name", ["n" * 300, "ghp_0123456789abcdef"], ids=["too long for the record", "like a secret"])
def test_nothing_is_proposed_where_the_record_does_not_hold_which_parameter_was_refused(name):
    body = {"body": {"type": "object"}}
    snapshot = small(
        {**PUT, "params": body}, {"params": {"body": {"additionalProperties": {"type": "object", "maxProperties": 0}}}}
    )
    edits, (refused,) = proposed(snapshot, [denied(snapshot, post(BOX, {name: {"a": 1}}))], ())
    assert edits == []
    assert "does not hold" in refused.why


@pytest.mark.parametrize("grant", [None, {"params": {"body": {"maxProperties": 3}}}], ids=["not listed", "too narrow"])
def test_a_body_that_is_too_long_for_the_record_is_left_to_the_catalog(grant):
    snapshot = small({**PUT, "params": {"body": {"type": "object"}}}, grant)
    record = denied(snapshot, post(BOX, {f"field-{number}": number for number in range(1000)}))
    assert record["args"]["body"].endswith("bytes left out]")
    (edit,), _ = proposed(snapshot, [record], ())
    assert "/body" in " ".join(edit.notes)
    assert replayed(snapshot, record, NOW) is None


@pytest.mark.parametrize(
    "spec",
    ["spec:\n  tools:\n     box:\n      operations:\n         a: {}\n", "spec:\n  tools:\n  box: {operations: {a: {}}}\n"],
    ids=["whose lines fit nowhere", "whose places are not found"],
)
def test_comments_before_the_first_document_stay_where_a_file_is_written_anew(spec):
    head = "# ours\n\n---\n# the bot\n"
    text = f"{head}kind: Agent\nmetadata:\n    name: bot\n{spec}"
    made = edited(text, [Edit("bot", "f", ("spec", "tools", "box", "operations", "do"), {}, ())])
    assert made.startswith(f"{head}kind: Agent\nmetadata:\n    name: bot\nspec:\n    tools:\n"), "indented as it begins"
    assert edited(made, [Edit("bot", "f", ("spec", "tools", "box", "operations", "do"), {}, ())]) == made


GRANT = """# the bot
kind: Agent
metadata: {name: bot, description: für alle}
spec:
  tools:
    box:
      operations:
        do:
          params:
            path:
              properties:
                repo:
                  enum:
                    - web        # the shop
                    # infra stays out: "it" holds keys
                    - payments
    # ask security before adding a channel
    chat: {operations: {}}
"""
GROWN = Edit(
    "bot", "f", ("spec", "tools", "box", "operations", "do", "params", "path", "properties", "repo"),
    {"enum": ["web", "payments", "mobile"]}, (),
)  # fmt: skip
CONST = GRANT.replace("enum:\n", "const: web # the one\n").replace("                    - web        # the shop\n", "")


def wider(text, by):
    """The text with every indentation so many times as wide."""
    return "".join(f"{' ' * (by - 1) * (len(line) - len(line.lstrip(' ')))}{line}" for line in text.splitlines(keepends=True))


@pytest.mark.parametrize(
    ("text", "added", "taken"),
    [
        (GRANT, ["                    - mobile"], []),
        (GRANT.replace("\n", "\r\n"), ["                    - mobile\r"], []),
        (wider(GRANT, 2), [f"{' ' * 40}- mobile"], []),
        (GRANT.replace("                    ", "                  "), ["                  - mobile"], []),
        (f"# ours\n%YAML 1.2\n---\n{GRANT}", ["                    - mobile"], []),
        (
            CONST.replace("                    - payments\n", ""),
            [
                "                  # the one",
                "                  enum:",
                *(f"{' ' * 20}- {each}" for each in ("web", "payments", "mobile")),
            ],
            ["                  const: web # the one"],
        ),
    ],
    ids=["a list", "CRLF", "four spaces", "dashes below their key", "a directive", "a value that becomes a list"],
)
def test_a_change_touches_no_other_line_and_no_comment(text, added, taken):
    before, after = text.split("\n"), edited(text, [GROWN]).split("\n")
    assert [line for line in after if line not in before] == added
    assert [line for line in before if line not in after] == taken
    at = after.index(added[-1])
    assert "ask security" in after[at + 1], "what stands above the next tool stays there"


def test_a_comment_that_can_not_be_kept_is_named_and_nothing_is_made():
    text = GRANT.replace("enum:\n                    - web        # the shop\n", "enum: [web,  # the shop\n").replace(
        "- payments", "payments]"
    )
    with pytest.raises(UsageError, match="would take a comment out of the manifest of 'bot': # "):
        edited(text, [GROWN])


def test_what_can_not_be_seen_is_written_as_an_escape_and_the_rest_as_it_is():
    hidden = replace(GROWN, value={"enum": ["web\u202e"]})
    assert "\\u202e" in edited(GRANT, [hidden]).lower()
    mixed = GRANT.replace("metadata: {name: bot, description: für alle}", "metadata:\n    name: bot\n    description: für alle")
    assert "für alle" in edited(mixed, [GROWN])


@pytest.mark.parametrize(
    ("rule", "grown"),
    [
        ({"enum": ["gpt-a", 5]}, {"enum": ["gpt-a", "gpt-b"]}),
        (True, {"enum": ["gpt-b"]}),
        (
            {"enum": ["gpt-a", "gpt-x"], "not": {"const": "gpt-x"}},
            {
                "enum": ["gpt-a", "gpt-b", "gpt-x"],
                "anyOf": [{"enum": ["gpt-a", "gpt-x"], "not": {"const": "gpt-x"}}, {"enum": ["gpt-b"]}],
            },
        ),
    ],
    ids=["a number in the list", "no list", "more than a list"],
)
def test_a_model_joins_the_list_whatever_its_rule_is(rule, grown):
    operation = {"match": {"method": "POST", "path": "/v1/chat/completions"}, "effect": "read"}
    snapshot = small(operation, {"params": {"body": {"properties": {"model": rule}}}}, protocol="openai")
    body = {"model": "gpt-b", "store": False, "messages": [{"role": "user"}]}
    record = denied(snapshot, post("https://box.example/v1/chat/completions", body))
    (edit,), _ = proposed(snapshot, [record], ())
    assert edit.value == {"properties": {"model": grown}}


def test_a_body_that_nothing_judges_is_told():
    snapshot = small(PUT)
    (edit,), _ = proposed(snapshot, [denied(snapshot, Call("POST", BOX, (("content-type", "text/csv"),), b"a,b"))], ())
    assert any("any body passes" in note for note in edit.notes)
    (edit,), _ = proposed(snapshot, [denied(snapshot, post(BOX, {"a": 1}))], ())
    assert edit.notes == (), "JSON is pinned"
    for method in ("GET", "DELETE"):
        snapshot = small({"match": {"method": method, "path": "/x/{id}"}, "effect": "read"})
        (edit,), _ = proposed(snapshot, [denied(snapshot, Call(method, BOX))], ())
        assert any("any body passes" in note for note in edit.notes)


def test_that_what_is_granted_may_be_mixed_with_what_was_seen_is_told():
    body = {"body": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    grant = {"params": {"path": {"properties": {"id": {"const": "6"}}}, "body": {"properties": {"a": {"const": 1}}}}}
    snapshot = small({**PUT, "params": body}, grant)
    edits, _ = proposed(snapshot, [denied(snapshot, post(BOX, {"a": 2}))], ())
    assert len(edits) == 2
    assert all("also with what is granted already" in edit.notes[0] for edit in edits)


def test_that_what_is_granted_may_be_mixed_is_told_also_of_a_call_that_named_none_of_it():
    _, (edit,), _ = propose("refund-bot", [get(f"{GITHUB}/acme/mobile/issues")])
    assert "also with what is granted already" in edit.notes[0], "every query that is granted, of the new repository as well"


def test_what_the_catalog_refuses_is_named_also_where_the_agent_lists_no_such_operation():
    _, edits, (refused,) = propose("refund-bot", [get(f"{GITHUB}/acme/web/pulls/0")])
    assert edits == []
    assert refused.why.startswith(
        "the catalog refuses /path/pull_number (tools/github.yaml#/spec/operations/pulls.get/params/path"
    )


def test_nothing_is_proposed_for_a_decoy():
    platform = json.dumps(
        {
            "apiVersion": "broker/v1", "kind": "Platform", "metadata": {"name": "p", "owner": "p"},
            "spec": {"containment": {"honeytoken": {"tools": ["trap"]}}},
        }
    ).encode()  # fmt: skip
    tool = TEXTS["tools/jira.yaml"].replace(b"name: jira", b"name: trap").replace(b"acme.atlassian.net", b"trap.example")
    snapshot = load_texts({**TEXTS, "platform.yaml": platform, "tools/trap.yaml": tool}, SAMPLE).snapshot
    record = Rehearsal(snapshot, NOW).call("refund-bot", get("https://trap.example/rest/api/3/issue/FIN-7")).record
    edits, (refused,) = proposed(snapshot, [record], ())
    assert (edits, refused.why) == ([], "this tool is a decoy, which no honest call touches")


def test_several_calls_of_several_operations_make_one_change_of_one_file():
    calls = [
        get(f"{GITHUB}/acme/mobile/issues"),
        get(f"{GITHUB}/acme/web/issues/7"),
        get("https://acme.atlassian.net/rest/api/3/issue/FIN-7"),
        get("https://acme.atlassian.net/rest/api/3/issue/FIN-9"),
    ]
    _, edits, refused = propose("refund-bot", calls)
    assert (len(edits), refused) == (3, [])
    snapshot, _ = applied(edits)
    after = Rehearsal(snapshot, NOW)
    assert [outcome(after.call("refund-bot", call)) for call in calls] == ["allow"] * 4


def test_the_sample_is_what_the_folder_holds():
    assert load(SAMPLE).snapshot.revision == load_texts(
        {path.relative_to(SAMPLE).as_posix(): path.read_bytes() for path in SAMPLE.rglob("*.yaml")}, SAMPLE
    ).snapshot.revision  # fmt: skip
