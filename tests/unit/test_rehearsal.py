"""Rehearsals: the exchange with other surroundings. What it says is what the broker would do, and nothing is sent or kept."""

import json
from pathlib import Path

import pytest

from broker.manifest.load import load
from broker.policy.limits import Measure
from broker.rehearsal import Before, Call, Rehearsal, call_of

NOW = 1_800_000_000.0
SNAPSHOT = load(Path(__file__).parents[2] / "manifests").snapshot
SECRET_PROMPT = "the customer's name is Ada Lovelace"


def chat(**more):
    messages = [{"role": "user", "content": SECRET_PROMPT}]
    return call_of(
        SNAPSHOT.tools["openai"], "chat.completions", {"model": "gpt-5-mini", "store": False, "messages": messages, **more}
    )


@pytest.mark.parametrize(
    ("call", "code"),
    [
        pytest.param(chat(), None, id="allowed"),
        pytest.param(chat(model="gpt-5"), "params_invalid", id="another model"),
        pytest.param(chat(store=True), "params_invalid", id="another parameter"),
        pytest.param(chat(web_search_options={}), "params_invalid", id="what the provider would run"),
    ],
)
def test_a_models_prompt_is_in_no_record_also_of_a_denied_call(call, code):
    record = Rehearsal(SNAPSHOT, NOW).call("refund-bot", call).record
    assert record["code"] == code
    assert record["prompt_hash"].startswith("sha256:")
    assert SECRET_PROMPT not in json.dumps(record)


def test_the_credential_is_named_and_narrowed_and_never_made(monkeypatch):
    monkeypatch.delenv("STRIPE_KEY", raising=False)
    found = Rehearsal(SNAPSHOT, NOW).call("refund-bot", Call("GET", "https://api.github.com/repos/acme/web/issues"))
    assert found.passes
    assert found.record["credential"]["issuer"] == "github-app"
    assert "repo=web" in found.record["credential"]["scopes"]


def test_what_is_taken_off_a_request_is_told():
    call = Call("GET", "https://api.github.com/repos/acme/web/issues", (("authorization", "Bearer mine"), ("cookie", "a=b")))
    assert set(Rehearsal(SNAPSHOT, NOW).call("refund-bot", call).stripped) == {"authorization", "cookie"}


def test_calls_do_not_see_each_other():
    rehearsal, before = Rehearsal(SNAPSHOT, NOW), Before({Measure.CALLS: 19})
    call = Call("POST", "https://api.github.com/repos/acme/web/issues").with_json({"title": "x"})
    assert [rehearsal.call("refund-bot", call, before).record["code"] for _ in range(3)] == [None] * 3
    assert rehearsal.call("refund-bot", call, Before({Measure.CALLS: 20})).record["code"] == "rate_limited"


def test_an_unknown_agent_is_denied():
    found = Rehearsal(SNAPSHOT, NOW).call("ghost", Call("GET", "https://api.github.com/"))
    assert (found.passes, found.record["code"]) == (False, "agent_unknown")


def test_a_body_over_its_bound_is_denied():
    call = Call("POST", "https://api.stripe.com/v1/refunds").with_json({"charge": "x" * 20_000})
    assert Rehearsal(SNAPSHOT, NOW).call("refund-bot", call).record["code"] == "body_too_large"
