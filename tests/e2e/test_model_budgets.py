"""What calls of models cost: reserved before they leave, settled by what the provider says, with the official clients."""

import threading
from concurrent.futures import ThreadPoolExecutor

import anthropic
import openai
import pytest
from stack import until

QUESTION = [{"role": "user", "content": "Why was I charged twice, and who is to blame?"}]

pytestmark = pytest.mark.envoy


@pytest.fixture(autouse=True)
def _fresh(models):
    for provider in (models.openai, models.anthropic):
        provider.arrived.clear()
        provider.released.clear()
        provider.status = 200
    yield
    models.openai.status = models.anthropic.status = 200


def gpt(models, agent):
    headers = {"x-broker-token": models.broker.token(agent)}
    return openai.OpenAI(api_key="none", base_url=f"{models.broker.base_url}/openai/v1", default_headers=headers, max_retries=0)


def claude(models, agent):
    headers = {"x-broker-token": models.broker.token(agent)}
    base = f"{models.broker.base_url}/anthropic"
    return anthropic.Anthropic(api_key="none", base_url=base, default_headers=headers, max_retries=0)


def chat(client, **options):
    return client.chat.completions.create(model="gpt-5-mini", messages=QUESTION, **options)


def message(client, **options):
    return client.messages.create(model="claude-haiku-4-5", max_tokens=100, messages=QUESTION, **options)


def ended(models, agent, number=-1, count=1):
    """The outcome of one of an agent's calls, the last unless told, once `count` of them are recorded."""

    def outcomes():
        found = [r for r in models.broker.records() if r["event"] == "outcome" and r["agent"]["name"] == agent]
        return found if len(found) >= count else None

    return until(outcomes, why=f"{count} outcomes of {agent}")[number]


def test_a_whole_answer_is_recorded_with_its_tokens_and_cost_and_without_a_word_of_what_was_said(models):
    with gpt(models, "spender-0") as client:
        chat(client)
    outcome = ended(models, "spender-0")
    assert outcome["tokens"] == {"input": 9, "output": 6, "cached": 0, "estimated": False}
    assert outcome["usd"] == pytest.approx((9 * 0.25 + 6 * 2.00) / 1e6)
    assert (outcome["model"], outcome["provider"]) == ("gpt-5-mini", "openai")
    decision = models.broker.decision(outcome["decision_id"])
    assert decision["args"]["body"] == {"model": "gpt-5-mini"}
    assert decision["prompt_hash"].startswith("sha256:")
    assert outcome["completion_hash"].startswith("sha256:")
    assert not [line for line in models.broker.records() if "charged twice" in str(line) or "duplicate" in str(line)]


def test_a_stream_has_the_same_completion_hash_and_its_own_usage(models):
    with claude(models, "spender-0") as client:
        message(client)
        whole = ended(models, "spender-0", count=2)
        with message(client, stream=True) as stream:
            for _ in stream:
                models.anthropic.released.set()
    streamed = ended(models, "spender-0", count=3)
    assert streamed["completion_hash"] == whole["completion_hash"]
    assert streamed["tokens"] == whole["tokens"] == {"input": 9, "output": 6, "cached": 0, "estimated": False}


def test_a_call_without_a_maximum_gets_one_and_that_is_what_it_reserves(models):
    with gpt(models, "spender-1") as client:
        chat(client)
        chat(client, max_completion_tokens=50)
    first, second = (arrived.json()["max_completion_tokens"] for arrived in models.openai.arrived)
    assert (first, second) == (4096, 50)
    bound, stated = (
        r["limits"]["reserved"] for r in models.broker.decisions(verdict="allow") if r["agent"]["name"] == "spender-1"
    )
    assert (bound["output_tokens"], stated["output_tokens"]) == (4096, 50)
    assert bound["tokens"] == bound["input_tokens"] + 4096


def test_settled_calls_make_room_and_open_ones_take_it(models):
    with gpt(models, "spender-2") as client:
        for _ in range(10):
            chat(client)  # reserves five thousand of twelve, uses fifteen
        started = threading.Barrier(3)

        def first_part():
            stream = chat(client, stream=True, stream_options={"include_usage": True})
            part = next(iter(stream)).choices[0].delta.content
            started.wait(10)
            return part, stream

        with ThreadPoolExecutor(2) as pool:
            open_streams = [pool.submit(first_part) for _ in range(2)]
            started.wait(10)
            with pytest.raises(openai.RateLimitError) as caught:
                chat(client)
            assert caught.value.code == "budget_exhausted"
            assert int(caught.value.response.headers["retry-after"]) > 0
            assert caught.value.response.headers["x-should-retry"] == "false"
            models.openai.released.set()
            for part, stream in (each.result(10) for each in open_streams):
                assert part
                for _ in stream:
                    pass
        ended(models, "spender-2", count=12)
        chat(client)


def test_a_stream_that_the_client_leaves_is_estimated_once_and_makes_room_again(models):
    with gpt(models, "spender-3") as client:
        stream = chat(client, stream=True)
        next(iter(stream))
        stream.close()
        left = ended(models, "spender-3")
        assert left["tokens"]["estimated"] is True
        assert left["tokens"]["output"] == 4096  # all that it may have generated; most of the input comes back
        for _ in range(5):
            chat(client)
    assert len([r for r in models.broker.records() if r.get("decision_id") == left["decision_id"]]) == 2


def test_a_providers_error_costs_nothing(models):
    models.openai.status = 500
    with gpt(models, "spender-4") as client:
        for number in range(1, 6):
            with pytest.raises(openai.InternalServerError):
                chat(client)
            assert ended(models, "spender-4", count=number)["tokens"]["input"] == 0


def test_dollars_run_out_before_they_are_spent(models):
    with gpt(models, "spender-5") as client, pytest.raises(openai.RateLimitError) as caught:
        chat(client, max_completion_tokens=60_000)
    assert caught.value.code == "budget_exhausted"
    assert models.openai.arrived == []
    [record] = [r for r in models.broker.decisions(verdict="deny") if r["agent"]["name"] == "spender-5"]
    assert record["limits"]["refused"]["limit"] == "tokens"


def test_a_model_without_a_price_is_denied_where_dollars_are_limited(models):
    with gpt(models, "unpriced") as client, pytest.raises(openai.RateLimitError) as caught:
        client.responses.create(model="gpt-6", input="hello")
    assert caught.value.code == "budget_exhausted"
    assert "prices" in caught.value.body["detail"]
    assert models.openai.arrived == []
