"""Health, readiness, metrics and keys for anyone who can reach the port; control for whoever may open the socket."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from broker.errors import BrokerError


@dataclass(frozen=True, slots=True)
class Facts:
    """What the API shows. `readiness` gives each reason not to be ready, empty when ready."""

    readiness: Callable[[], list[str]]
    revision: Callable[[], str]
    registry: CollectorRegistry
    jwks: Mapping[str, Any]


def public(facts: Facts) -> Starlette:
    """`/healthz`, `/readyz`, `/metrics`, `/jwks.json`."""

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(_: Request) -> Response:
        reasons = facts.readiness()
        return JSONResponse({"ready": not reasons, "reasons": reasons, "revision": facts.revision()}, 503 if reasons else 200)

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(facts.registry), media_type=CONTENT_TYPE_LATEST)

    async def jwks(_: Request) -> Response:
        return JSONResponse(dict(facts.jwks), headers={"cache-control": "max-age=300"})

    endpoints = {"/healthz": healthz, "/readyz": readyz, "/metrics": metrics, "/jwks.json": jwks}
    return Starlette(routes=[Route(path, endpoint) for path, endpoint in endpoints.items()])


def control(agent: Callable[[str], Mapping[str, Any]], revoke_tokens: Callable[[str], None]) -> Starlette:
    """`GET /agents/{name}`, `POST /agents/{name}/tokens/revoke`. What the callables raise is answered with 503."""

    async def show(request: Request) -> Response:
        return JSONResponse(dict(agent(request.path_params["name"])))

    async def revoke(request: Request) -> Response:
        name = request.path_params["name"]
        revoke_tokens(name)
        return JSONResponse({"agent": name, "revoked": "tokens"})

    async def failed(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, 503)

    routes = [Route("/agents/{name}", show), Route("/agents/{name}/tokens/revoke", revoke, methods=["POST"])]
    return Starlette(routes=routes, exception_handlers={BrokerError: failed})


class _Quiet(uvicorn.Server):
    """uvicorn without its own signal handling: the composition root stops it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(
    app: Starlette, *, address: tuple[str, int] | None = None, socket: str | None = None
) -> tuple[_Quiet, asyncio.Task[None]]:
    """Serve on a TCP address or a Unix socket. Set `should_exit` on the server and await the task to stop."""
    where: dict[str, Any] = {"uds": socket} if socket else {"host": address[0], "port": address[1]} if address else {}
    server = _Quiet(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", **where))
    return server, asyncio.create_task(server.serve())
