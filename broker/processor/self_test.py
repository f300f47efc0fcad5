"""Once a minute a canary agent is revoked, and what is its own must stop.

Its tunnel, held open over the processor's own socket as Envoy holds it, must be cut, and its calls be refused.

Law: the canary is nobody's agent (no manifest can have its name), may do nothing, and is revoked in memory alone.
"""

import asyncio
from typing import Any

import grpc
from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest
from envoy.service.ext_proc.v3.external_processor_pb2_grpc import ExternalProcessorStub
from google.protobuf.struct_pb2 import Struct

from broker.case import Case
from broker.containment.standing import Restriction
from broker.dataplane import site
from broker.dataplane.filters import EXT_PROC
from broker.events import Services
from broker.identity import Evidence
from broker.policy.containment import Action
from broker.policy.types import Code, Decision, Door

CANARY = ".canary"
CUT_S = 2.0
"""Within this time what is open must be cut."""


class SelfTest:
    """The test, on this broker's own parts and over the processor's own socket."""

    def __init__(self, services: Services, socket: str) -> None:
        self._services, self._socket = services, socket

    async def test(self) -> str:
        """Revoke the canary with a tunnel open; what is wrong, empty for nothing."""
        standing, calls = self._services.containment.standing, self._services.containment.open
        revocation = Restriction(CANARY, Action.REVOKE_AGENT, CANARY, None, "the self-test", "the broker", self._services.now())
        async with grpc.aio.insecure_channel(f"unix:{self._socket}") as channel:
            tunnel = ExternalProcessorStub(channel).Process()
            await tunnel.write(_opened())
            if await tunnel.read() is grpc.aio.EOF:
                return "a tunnel of an agent in good standing is cut"
            try:
                standing.restrict(revocation)
                calls.cut(revocation)
                return await self._stopped(tunnel)
            finally:
                tunnel.cancel()
                standing.forget(revocation)

    async def _stopped(self, tunnel: Any) -> str:
        try:
            async with asyncio.timeout(CUT_S):
                cut = await tunnel.code()
        except TimeoutError:
            return f"what was open was not cut within {CUT_S:.0f} s"
        if cut is not grpc.StatusCode.ABORTED:
            return f"what was open ended with {cut}"
        # As for a call, but for its record: one a minute would be in the way of whoever reads it.
        token = self._services.tokens.mint(CANARY, self._services.now())
        judged = Case(self._services).identify(Evidence(Door.BASE_URL, token=token))
        refused = isinstance(judged, Decision) and judged.code is Code.AGENT_REVOKED
        return "" if refused else "a new call is not refused"


def _opened() -> Any:
    attributes = Struct()
    attributes.update({site.CARRIED[0]: CANARY, "response.code_details": "via_upstream"})
    return ProcessingRequest(response_headers={"headers": {}}, attributes={EXT_PROC: attributes})
