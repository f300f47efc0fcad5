"""What a limit is called, whom it counts, what it says when it refuses, and what calls of models cost."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.policy.limits import NANO, TOKENS, WORDS, Kind, Limit, Measure, Price, bound, called, label, once, unpriced, used
from broker.policy.snapshot import EMPTY, Endpoint, PolicySnapshot, Tool
from broker.policy.types import Code, Effect, ModelCall, Usage, Verdict

RULE = "agents/a.yaml#/spec/limits/x"


def limit(word: str, amount: int = 10, per: int = 0, scope: str = "agent/a", burst: int = 0) -> Limit:
    return Limit(word, scope, amount, RULE, per, burst)


@pytest.mark.parametrize(
    ("word", "code"),
    [
        *[(word, Code.RATE_LIMITED) for word in ("rate", "calls", "writes", "destructive", "runs")],
        ("concurrency", Code.CONCURRENCY_LIMITED),
        *[(word, Code.STEPS_EXHAUSTED) for word in ("steps_per_run", "time_per_run", "identical_per_run")],
        *[(str(word), Code.BUDGET_EXHAUSTED) for word in (*TOKENS, "usd", "bytes_out", "tokens_per_run", "usd_per_run")],
    ],
)
def test_a_limit_is_refused_with_the_code_of_its_kind(word, code):
    refused = limit(word, per=3600).refusal(10, 1, 0.2)
    assert (refused.verdict, refused.code, refused.rule, refused.retry_after) == (Verdict.DENY, code, RULE, 1)


def test_every_word_has_a_code_of_its_own_in_the_table_above():
    # Three words are the broker's own: an approval's one use, a run's labels and flow rules.
    assert len(WORDS) == 17 + 3


def test_the_brokers_own_words_are_refused_by_what_they_are():
    assert once("a-1", RULE).refusal(1, 1, 0).code is Code.APPROVAL_REQUIRED
    assert label("pii") is label("pii")
    assert (label("pii").kind, label("pii").key) == (Kind.RUN, "label/pii:calls:run:0")
    rule = Limit("flow", "flow/0", 0, RULE, after=("pii", "untrusted"))
    refused = rule.refusal(1, 0, 0, "pii by crm/get (decision d1)")
    assert (refused.code, refused.rule, refused.retry_after) == (Code.FLOW_FORBIDDEN, RULE, 0)
    assert refused.detail.endswith("after it touched pii and untrusted: pii by crm/get (decision d1)")


def test_a_key_names_whose_it_is_and_what_it_counts_and_not_how_much():
    assert limit("calls", 10, 3600).key == limit("calls", 99, 3600).key == "agent/a:calls:window:3600"
    assert limit("rate", 10, 60, burst=1).key == limit("rate", 20, 60, burst=9).key
    words = [limit(word, per=60).key for word in WORDS if word not in ("approval", "label")]  # whose scopes are their own
    assert len(set(words)) == len(words), "two words never share a counter"
    assert limit("calls", per=60).key != limit("calls", per=3600).key
    assert limit("calls", per=60).key != limit("calls", per=60, scope="agent/a/t").key


@pytest.mark.parametrize(
    ("on", "detail"),
    [
        pytest.param(limit("calls", 20, 3600), "no room under calls: 20/hour of agent/a: 20 spent", id="calls"),
        pytest.param(limit("writes", 20_000, 86400), "no room under writes: 20,000/day of agent/a: 20 spent", id="thousands"),
        pytest.param(limit("rate", 5, 1, burst=9), "no room under rate: 5/s of agent/a: 20 spent", id="a rate"),
        pytest.param(limit("calls", 5, 60), "no room under calls: 5/minute of agent/a: 20 spent", id="a minute"),
        pytest.param(limit("calls", 5, 90), "no room under calls: 5/90 s of agent/a: 20 spent", id="another time"),
        pytest.param(limit("concurrency", 5), "no room under concurrency: 5 of agent/a: 20 spent", id="no time"),
        pytest.param(limit("time_per_run", 60), "no room under time_per_run: 60 s of agent/a: 20 s spent", id="seconds"),
    ],
)
def test_a_refusal_says_which_limit_of_whom_and_how_it_stands(on, detail):
    assert on.refusal(20, 1, 0).detail == detail


@pytest.mark.parametrize(
    ("word", "amount", "said"),
    [
        ("calls", 1_234_567, "1,234,567"), ("usd", 50 * NANO, "50 USD"), ("usd", NANO // 4, "0.25 USD"), ("usd", 0, "0 USD"),
        ("usd_per_run", 100 * NANO, "100 USD"), ("bytes_out", 50 << 20, "50MiB"), ("bytes_out", 3 << 30, "3GiB"),
        ("bytes_out", 1024, "1KiB"), ("bytes_out", 1025, "1,025"), ("bytes_out", 0, "0"), ("tokens", 5000, "5,000"),
    ],
)  # fmt: skip
def test_an_amount_is_said_in_what_is_counted(word, amount, said):
    assert limit(word).said(amount) == said


def test_a_refusal_says_what_the_call_may_need_where_that_is_more_than_one():
    refused = limit("tokens", 5000, 86400).refusal(4000, 1500, 12.1)
    assert refused.detail.endswith(": 4,000 spent, and this call may need 1,500")
    assert refused.retry_after == 13


# (does it bear on reads, writes, what destroys, a protocol's own traffic)
EVERY, WRITING, DESTROYING, CALLED = (1, 1, 1, 1), (0, 1, 1, 0), (0, 0, 1, 0), (1, 1, 1, 0)


@pytest.mark.parametrize(
    ("word", "plain", "model"),
    [
        ("rate", EVERY, EVERY), ("bytes_out", EVERY, EVERY), ("calls", CALLED, CALLED), ("concurrency", CALLED, CALLED),
        ("runs", CALLED, CALLED), ("steps_per_run", CALLED, CALLED), ("time_per_run", CALLED, CALLED),
        ("identical_per_run", CALLED, CALLED), ("writes", WRITING, WRITING), ("destructive", DESTROYING, DESTROYING),
        *[(str(word), (0, 0, 0, 0), CALLED) for word in (*sorted(TOKENS), "usd", "tokens_per_run", "usd_per_run")],
    ],
)  # fmt: skip
def test_a_limit_counts_the_calls_that_spend_of_it(word, plain, model):
    effects = (Effect.READ, Effect.WRITE, Effect.DESTRUCTIVE, None)
    for told, expected in ((False, plain), (True, model)):
        assert tuple(int(limit(word).bears_on(effect, model=told)) for effect in effects) == expected


def test_every_call_spends_one_call_and_what_it_sends():
    assert called(7) == {Measure.CALLS: 1, Measure.WRITES: 1, Measure.DESTRUCTIVE: 1, Measure.BYTES_OUT: 7}


PRICE = Price(input=3 * NANO, output=15 * NANO, cached=NANO // 10 * 3, cache_write=6 * NANO)


@pytest.mark.parametrize(
    ("usage", "cost"),
    [
        pytest.param(Usage(1_000_000), 3 * NANO, id="input"),
        pytest.param(Usage(0, 1_000_000), 15 * NANO, id="output"),
        pytest.param(Usage(1_000_000, cached=1_000_000), NANO // 10 * 3, id="input from the cache"),
        pytest.param(Usage(1_000_000, cache_write=1_000_000), 6 * NANO, id="input to the cache"),
        pytest.param(Usage(10, 2, 4, 3), 3 * 3000 + 4 * 300 + 3 * 6000 + 2 * 15000, id="some of each"),
        pytest.param(Usage(), 0, id="nothing"),
    ],
)
def test_a_call_costs_each_part_at_its_price(usage, cost):
    assert PRICE.of(usage) == cost


def test_part_of_a_billionth_is_a_whole_one():
    assert Price(1, 1, 1, 1).of(Usage(1)) == 1
    assert Price(1, 1, 1, 1).of(Usage(1_000_001)) == 2


def test_what_was_used_is_counted_by_measure_and_costs_only_where_there_is_a_price():
    counted = {Measure.TOKENS: 12, Measure.INPUT_TOKENS: 10, Measure.OUTPUT_TOKENS: 2, Measure.CACHED_TOKENS: 4}
    assert used(Usage(10, 2, 4), None) == counted
    assert used(Usage(10, 2, 4), PRICE) == {**counted, Measure.USD: 6 * 3000 + 4 * 300 + 2 * 15000}


def test_the_most_that_a_call_may_spend_has_every_answer_whole_and_all_input_as_if_cached():
    asked = ModelCall("m", 100, "sha256:0", max_output=50, choices=3)
    counted = {Measure.TOKENS: 250, Measure.INPUT_TOKENS: 100, Measure.OUTPUT_TOKENS: 150, Measure.CACHED_TOKENS: 100}
    assert bound(asked, None) == counted
    assert bound(ModelCall("m", 100, "sha256:0"), None)[Measure.OUTPUT_TOKENS] == 0


_TOKENS = st.integers(0, 10_000)


@given(_TOKENS, _TOKENS, st.integers(1, 4), st.data())
def test_no_usage_within_its_bounds_costs_more_than_was_reserved(inputs, outputs, choices, data):
    cached = data.draw(st.integers(0, inputs))
    usage = Usage(inputs, data.draw(st.integers(0, outputs * choices)), cached, data.draw(st.integers(0, inputs - cached)))
    price = Price(*data.draw(st.tuples(*4 * [st.integers(0, 100 * NANO)])))
    most = bound(ModelCall("m", inputs, "sha256:0", max_output=outputs, choices=choices), price)
    assert all(most[measure] >= spent for measure, spent in used(usage, price).items())


def test_a_model_without_a_price_is_denied_where_dollars_are_limited():
    dollars = limit("usd_per_run", NANO)
    refused = unpriced([limit("calls"), dollars], "m-1")
    assert (refused.code, refused.rule, refused.retry_after) == (Code.BUDGET_EXHAUSTED, RULE, 0)
    assert "'m-1'" in refused.detail
    assert "usd_per_run of agent/a" in refused.detail
    assert unpriced([limit("calls"), limit("tokens")], "m-1") is None


def test_a_price_is_the_tools_own_or_that_of_its_protocol():
    tool = Tool("azure", "team", "openai", Endpoint("https", "a.example", 443), "", {})
    other = Price(1, 1, 1, 1)
    prices = {("azure", "m"): PRICE, ("openai", "m"): other, ("openai", "n"): other}
    snapshot = PolicySnapshot("r", {}, {}, {}, {}, prices=prices)
    assert [snapshot.price(tool, name) for name in ("m", "n", "o")] == [("azure", PRICE), ("openai", other), ("openai", None)]
    assert EMPTY.price(tool, "m") == ("openai", None)


def test_a_wait_is_rounded_up_to_whole_seconds():
    assert [limit("calls").refusal(1, 1, wait).retry_after for wait in (0, 0.001, 1, math.nextafter(1, 2))] == [0, 1, 1, 2]


def test_kinds_are_those_that_words_have():
    assert {kind for kind, _ in WORDS.values()} == set(Kind)
