"""A processor that Envoy may choose says whether it should be."""

import asyncio

from grpc_health.v1.health_pb2 import HealthCheckResponse

from broker.processor.health import Health

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING


class Asked:
    """A health service whose clock and faults the test sets."""

    def __init__(self):
        self.now, self.faults = 100.0, []
        self._health = Health(lambda: self.faults, lambda: self.now)

    def __call__(self, after=0.5):
        self.now += after
        return asyncio.run(self._health.Check(None, None)).status


def test_it_serves_while_nothing_is_wrong():
    ask = Asked()
    assert [ask(), ask(), ask()] == [SERVING] * 3


def test_the_first_question_may_come_late():
    assert Asked()(after=60) == SERVING


def test_with_a_fault_another_should_have_the_calls():
    ask = Asked()
    ask.faults = ["the shared ledger: not yet connected"]
    assert ask() == NOT_SERVING
    ask.faults = []
    assert ask() == SERVING


def test_after_it_stood_still_it_says_no_once():
    ask = Asked()
    assert [ask(), ask(after=5), ask()] == [SERVING, NOT_SERVING, SERVING]
