"""gRPC's own health protocol (grpc.health.v1), by which an Envoy with several processors chooses among them."""

from collections.abc import Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthServicer

# Envoy asks twice a second.
_STOPPED_S = 2.0


class Health(HealthServicer):  # type: ignore[misc]  # generated without types
    """Serving while `faults()` is empty: else another processor judges better than this one, which would deny.

    Whoever was not asked for long was stopped, and may not know yet what it lacks: it says so once. `steady` is in seconds.
    """

    def __init__(self, faults: Callable[[], Sequence[str]], steady: Callable[[], float]) -> None:
        self._faults, self._steady = faults, steady
        self._asked: float | None = None

    async def Check(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: ARG002, N802
        """Whether new calls should come here."""
        now, before = self._steady(), self._asked
        self._asked = now
        stopped = before is not None and now - before > _STOPPED_S
        return HealthCheckResponse(status="NOT_SERVING" if stopped or self._faults() else "SERVING")
