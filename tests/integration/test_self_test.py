"""The self-test of revocation, over a real gRPC server: it passes where revocation works, and says so where it does not."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest
import stack
from envoy.service.ext_proc.v3.external_processor_pb2_grpc import add_ExternalProcessorServicer_to_server
from unit.test_exchange import services

from broker.containment.standing import OpenCalls, Restriction, Standing
from broker.policy.containment import Action
from broker.policy.evaluate import View
from broker.processor import ext_proc, self_test
from broker.processor.ext_proc import ExtProc
from broker.processor.self_test import CANARY, SelfTest
from broker.watch import Watch


@asynccontextmanager
async def served(outside):
    server, path = grpc.aio.server(), stack.short_folder() / "p.sock"
    add_ExternalProcessorServicer_to_server(ExtProc(outside), server)
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    yield SelfTest(outside, str(path))
    await server.stop(None)


def outcome(outside):
    async def run():
        async with served(outside) as test:
            return await test.test()

    return asyncio.run(run())


def test_it_passes_and_leaves_nothing_behind():
    outside = services()
    assert outcome(outside) == ""
    assert outside.containment.standing.view(CANARY, None) == View()
    assert outside.audit == []
    assert outcome(outside) == ""


def test_what_is_revoked_while_a_message_to_it_is_on_its_way_is_cut(monkeypatch):
    outside, answered = services(), ext_proc.response_of
    revocation = Restriction(CANARY, Action.REVOKE_AGENT, CANARY, None, "a test", "jo", 0)

    def revoked_meanwhile(*of):
        asyncio.get_running_loop().call_soon(outside.containment.open.cut, revocation)  # the write waits for gRPC by then
        return answered(*of)

    monkeypatch.setattr(ext_proc, "response_of", revoked_meanwhile)
    assert [outcome(outside) for _ in range(10)] == [""] * 10


class Deaf(OpenCalls):
    def cut(self, _):
        return 0


class Blind(Standing):
    def view(self, *_):
        return View()


@pytest.mark.parametrize(
    ("part", "broken", "why"),
    [
        pytest.param("open", Deaf, "what was open was not cut within", id="nothing is cut"),
        pytest.param("standing", Blind, "a new call is not refused", id="nobody looks how an agent stands"),
    ],
)
def test_it_says_what_is_wrong(part, broken, why, monkeypatch):
    monkeypatch.setattr(self_test, "CUT_S", 0.2)
    outside = services()
    setattr(outside.containment, part, broken())
    assert why in outcome(outside)


def test_a_change_of_its_result_is_told_once():
    async def run():
        outside = services()
        heard = []
        async with served(outside) as test:
            watch = Watch("the self-test", test.test, heard.append, every_s=0.01)
            outside.containment.standing.restrict = None
            running = asyncio.create_task(watch.run())
            while not watch.failure:  # noqa: ASYNC110 - what an event would say is what is tested
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            del outside.containment.standing.restrict
            while watch.failure:  # noqa: ASYNC110 - the same
                await asyncio.sleep(0.01)
            running.cancel()
            return heard

    assert asyncio.run(run()) == ["it could not be made (TypeError)", ""]
