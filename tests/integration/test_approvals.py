"""Calls that wait for people, and runs that may no longer do what their manifest allows: with a real Envoy and real verbs."""

import json
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
import stack

pytestmark = pytest.mark.envoy

LOOPBACK = {"addresses": ["127.0.0.0/8"]}
AMOUNT = {"type": "object", "properties": {"amount": {"type": "integer"}}, "required": ["amount"], "additionalProperties": False}
OPERATIONS = {
    "charges.get": {"match": {"method": "GET", "path": "/charges/{id}"}, "effect": "read", "data": ["pii"]},
    "pages.get": {"match": {"method": "GET", "path": "/pages/{id}"}, "effect": "read", "data": ["untrusted"]},
    "refunds.create": {"match": {"method": "POST", "path": "/refunds"}, "effect": "write", "params": {"body": AMOUNT}},
    "notes.create": {"match": {"method": "POST", "path": "/notes"}, "effect": "write"},
    "mail.send": {"match": {"method": "POST", "path": "/mail"}, "effect": "write"},
}
LARGE = {"body": {"properties": {"amount": {"minimum": 100}}}}
GRANTS = {
    "charges.get": {},
    "pages.get": {},
    "refunds.create": {"approval": {"approvers": 1, "when": LARGE}},
    "notes.create": {"approval": {"approvers": 2}},
}
FLOW = [{"after": ["pii", "untrusted"], "deny": {"effect": "write", "egress": "external"}, "unless": "approval"}]


def granted(*more):
    return {"bank": {"operations": {**GRANTS, **{name: {} for name in more}}}}


def verb(place, *words, check=True):
    command = [*stack.BROKER, *map(str, words), "--state", str(place.broker.state)]
    return subprocess.run(command, capture_output=True, text=True, check=check)


@pytest.fixture(scope="module")
def place():
    folder, bank = stack.short_folder(), stack.Upstream()
    manifests = folder / "manifests"
    stack.write_manifests(
        manifests,
        stack.tool("bank", f"http://127.0.0.1:{bank.port}", OPERATIONS, upstream=LOOPBACK),
        *(stack.agent(name, granted()) for name in ("teller", "clerk", "changing", "many", "cancelled")),
        stack.agent("mailer", granted("mail.send")),
        stack.agent("grouped", {"bank": {"operations": {"notes.create": {"approval": {"groups": ["finance"]}}}}}),
        stack.platform(flow=FLOW),
    )
    broker = stack.Broker(manifests, folder / "state")
    yield SimpleNamespace(broker=broker, bank=bank, manifests=manifests)
    broker.stop()
    bank.close()
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _fresh(place):
    place.bank.seen.clear()


def post(place, agent, path, body, run="r1"):
    headers = {"content-type": "application/json", **({"x-run-id": run} if run else {})}
    with place.broker.direct(agent) as client:
        return client.post(f"/bank{path}", content=body, headers=headers)


def waiting(place, agent):
    shown = json.loads(verb(place, "approvals", "list", "--json").stdout)["approvals"]
    return [each for each in shown if each["agent"] == agent]


def test_a_call_waits_for_a_person_who_sees_exactly_what_will_be_sent_and_then_passes_once(place):
    body = b'{"amount": 100}'
    assert post(place, "teller", "/refunds", b'{"amount":99}').status_code == 200
    refused = post(place, "teller", "/refunds", body)
    problem = refused.json()
    assert (refused.status_code, problem["code"]) == (403, "approval_required")
    approval = problem["approval"]
    assert (approval["status"], approval["approvers"], approval["approved_by"]) == ("waiting", 1, [])
    assert any("exactly this call again" in step for step in problem["next_steps"])
    # Asking again is asking the same.
    assert post(place, "teller", "/refunds", body).json()["approval"]["id"] == approval["id"]

    [shown] = waiting(place, "teller")
    assert shown["id"] == approval["id"]
    assert (shown["operation"], shown["effect"], shown["run_id"], shown["body"]) == (
        "bank/refunds.create",
        "write",
        "r1",
        body.decode(),
    )
    assert shown["url"] == f"http://127.0.0.1:{place.bank.port}/refunds"
    assert shown["params"]["body"] == {"amount": 100}
    text = verb(place, "approvals", "list").stdout
    assert '{"amount": 100}' in text
    assert "teller (team-test)" in text

    done = verb(place, "approvals", "approve", approval["id"], "--as", "ann", "--reason", "called the customer")
    assert done.stdout == f"{approval['id']} is approved\n"
    place.bank.seen.clear()
    for changed in (b'{"amount":100}', b'{"amount": 101}'):
        assert post(place, "teller", "/refunds", changed).json()["code"] == "approval_required", changed
    assert post(place, "teller", "/refunds", body, run="r2").json()["code"] == "approval_required"
    assert post(place, "clerk", "/refunds", body).json()["code"] == "approval_required"
    assert place.bank.seen == []
    assert post(place, "teller", "/refunds", body).status_code == 200
    assert post(place, "teller", "/refunds", body).json()["approval"]["id"] != approval["id"]
    assert [seen.body for seen in place.bank.seen] == [body]

    records = place.broker.records()
    said = [record["detail"] for record in records if record["event"] == "approval"]
    assert said == [f"{approval['id']} approved by ann: called the customer", f"{approval['id']} used"]
    [used] = [r for r in records if r["event"] == "decision" and r["approval"] == approval["id"] and r["verdict"] == "allow"]
    assert used["operation"] == "refunds.create"


def test_two_different_people_must_approve_where_the_manifest_says_two_and_one_no_is_a_no(place):
    approval = post(place, "clerk", "/notes", b"{}").json()["approval"]["id"]
    assert verb(place, "approvals", "approve", approval, "--as", "ann").stdout == f"{approval} is waiting for 1 more\n"
    again = verb(place, "approvals", "approve", approval, "--as", "ann", check=False)
    assert (again.returncode, "another person" in again.stderr) == (1, True)
    assert post(place, "clerk", "/notes", b"{}").json()["code"] == "approval_required"
    verb(place, "approvals", "approve", approval, "--as", "bob")
    verb(place, "approvals", "reject", approval, "--as", "eve", "--reason", "wait")
    refused = post(place, "clerk", "/notes", b"{}")
    assert (refused.status_code, refused.json()["code"]) == (403, "approval_rejected")
    late = verb(place, "approvals", "approve", approval, "--as", "dan", check=False)
    assert (late.returncode, "rejected already" in late.stderr) == (1, True)
    assert verb(place, "approvals", "approve", "a-nothing", check=False).returncode == 1
    assert place.bank.seen == []


def test_where_the_manifest_names_a_group_only_a_token_that_says_so_may_approve_and_no_agent_ever(place):
    broker = place.broker
    approval = post(place, "grouped", "/notes", b"{}").json()["approval"]["id"]
    refused = verb(place, "approvals", "approve", approval, check=False)
    assert (refused.returncode, "only people in finance" in refused.stderr) == (1, True)

    def approve(token):
        return httpx.post(f"{broker.admin}/approvals/{approval}/approve", headers={"authorization": f"Bearer {token}"})

    def operator(*groups):
        options = [word for group in groups for word in ("--group", group)]
        return verb(place, "token", "ann", "--operator", *options).stdout.strip()

    kept = verb(place, "token", "ann", "--operator", "--revoke", check=False)
    assert (kept.returncode, kept.stdout, "can't be taken back" in kept.stderr) == (2, "", True)
    assert approve(broker.token("grouped")).status_code == 401
    assert httpx.get(f"{broker.admin}/approvals").status_code == 401
    assert approve(operator("dev")).status_code == 409
    done = approve(operator("dev", "finance"))
    assert (done.status_code, done.json()["status"], done.json()["approved_by"]) == (200, "approved", ["ann"])
    assert post(place, "grouped", "/notes", b"{}").status_code == 200


def test_of_fifty_parallel_calls_with_one_approval_one_reaches_the_tool(place):
    body = b'{"amount": 500}'
    approval = post(place, "many", "/refunds", body).json()["approval"]["id"]
    verb(place, "approvals", "approve", approval)
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: post(place, "many", "/refunds", body), range(50)))
    assert Counter(answer.status_code for answer in answers) == {200: 1, 403: 49}
    assert {answer.json()["code"] for answer in answers if answer.status_code == 403} == {"approval_required"}
    assert len(place.bank.seen) == 1


def test_a_changed_manifest_needs_a_new_approval(place):
    body = b'{"amount": 700}'
    approval = post(place, "changing", "/refunds", body).json()["approval"]["id"]
    verb(place, "approvals", "approve", approval)
    before = httpx.get(f"{place.broker.admin}/readyz").json()["revision"]
    stack.write_manifest(place.manifests, stack.agent("changing", granted(), limits={"rate": "50/s"}))
    stack.until(lambda: httpx.get(f"{place.broker.admin}/readyz").json()["revision"] != before)
    refused = post(place, "changing", "/refunds", body).json()
    assert (refused["code"], refused["approval"]["id"] != approval) == ("approval_required", True)
    assert place.bank.seen == []


def test_a_revocation_cancels_what_waits_and_what_was_approved(place):
    body = b'{"amount": 900}'
    approval = post(place, "cancelled", "/refunds", body).json()["approval"]["id"]
    verb(place, "approvals", "approve", approval)
    verb(place, "agents", "revoke", "cancelled", "--reason", "odd")
    assert waiting(place, "cancelled") == []
    verb(place, "agents", "release", "cancelled", "--reason", "fine")
    del place.broker._tokens["cancelled"]
    refused = post(place, "cancelled", "/refunds", body).json()
    assert (refused["code"], refused["approval"]["id"] != approval) == ("approval_required", True)
    assert place.bank.seen == []


def test_an_approval_survives_a_kill_and_stays_used_after_one(place):
    broker, first, second = place.broker, b'{"amount": 1000}', b'{"amount": 2000}'
    for body in (first, second):
        verb(place, "approvals", "approve", post(place, "many", "/refunds", body).json()["approval"]["id"])
    assert post(place, "many", "/refunds", first).status_code == 200
    broker.process.kill()
    broker.stop()
    broker.start()
    assert post(place, "many", "/refunds", first).json()["code"] == "approval_required"
    assert post(place, "many", "/refunds", second).status_code == 200
    assert [seen.body for seen in place.bank.seen] == [first, second]


def test_a_second_person_judges_after_a_restart_only_what_the_agent_has_shown_anew(place):
    broker = place.broker
    approval = post(place, "clerk", "/notes", b'{"n": 9}', "again").json()["approval"]["id"]
    verb(place, "approvals", "approve", approval, "--as", "ann")
    broker.stop()
    broker.start()
    text = verb(place, "approvals", "list").stdout
    assert (approval in text, "not known since the broker was restarted" in text) == (True, True)
    blind = verb(place, "approvals", "approve", approval, "--as", "bob", check=False)
    assert (blind.returncode, "make the call again" in blind.stderr) == (1, True)
    assert post(place, "clerk", "/notes", b'{"n": 9}', "again").json()["approval"]["approved_by"] == ["ann"]
    assert '{"n": 9}' in verb(place, "approvals", "list").stdout
    assert verb(place, "approvals", "approve", approval, "--as", "bob").stdout == f"{approval} is approved\n"
    assert post(place, "clerk", "/notes", b'{"n": 9}', "again").status_code == 200


def test_a_run_that_read_a_strangers_text_and_personal_data_may_not_write_outside_and_is_told_by_which_calls(place):
    with place.broker.direct("mailer") as client:

        def read(path, run):
            assert client.get(f"/bank{path}", headers={"x-run-id": run}).status_code == 200

        read("/charges/1", "f1")
        assert post(place, "mailer", "/mail", b"{}", "f1").status_code == 200
        read("/pages/1", "f1")
        refused = post(place, "mailer", "/mail", b"{}", "f1")
        problem = refused.json()
        assert (refused.status_code, problem["code"]) == (403, "flow_forbidden")
        assert "pii by bank/charges.get (decision " in problem["detail"]
        assert "untrusted by bank/pages.get (decision " in problem["detail"]
        # Another run has read nothing, and reading goes on in this one.
        assert post(place, "mailer", "/mail", b"{}", "f2").status_code == 200
        read("/charges/2", "f1")
        [shown] = [each for each in waiting(place, "mailer") if each["id"] == problem["approval"]["id"]]
        assert shown["why"].startswith("this run may not do that after it touched pii and untrusted")
        verb(place, "approvals", "approve", problem["approval"]["id"])
        place.bank.seen.clear()
        assert post(place, "mailer", "/mail", b"{}", "f1").status_code == 200
        assert post(place, "mailer", "/mail", b"{}", "f1").json()["code"] == "flow_forbidden"
        assert len(place.bank.seen) == 1
    record = place.broker.decision(problem["decision_id"])
    assert (record["code"], record["rule"].endswith("#/spec/flow/0")) == ("flow_forbidden", True)


def test_what_a_run_has_read_is_known_after_a_kill(place):
    broker = place.broker
    with broker.direct("mailer") as client:
        for path in ("/charges/1", "/pages/1"):
            assert client.get(f"/bank{path}", headers={"x-run-id": "f3"}).status_code == 200
    broker.process.kill()
    broker.stop()
    broker.start()
    refused = post(place, "mailer", "/mail", b"{}", "f3").json()
    assert refused["code"] == "flow_forbidden"
    assert "pii by bank/charges.get (decision " in refused["detail"]
