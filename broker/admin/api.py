"""Health, readiness, metrics and keys for anyone who can reach the port; control for whoever may open the socket."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from broker.errors import BrokerError


def public(
    readiness: Callable[[], tuple[list[str], str]], exposition: Callable[[], Awaitable[bytes]], jwks: Mapping[str, Any]
) -> Starlette:
    """What reads. `readiness` gives each reason not to be ready (none when ready), and the revision in force."""

    async def metrics() -> Response:
        return Response(await exposition(), media_type=CONTENT_TYPE_LATEST)

    def readyz() -> Response:
        reasons, revision = readiness()
        return JSONResponse({"ready": not reasons, "reasons": reasons, "revision": revision}, 503 if reasons else 200)

    return _answering(
        {
            "GET /healthz": lambda: {"status": "ok"},
            "GET /readyz": readyz,
            "GET /metrics": metrics,
            "GET /jwks.json": lambda: JSONResponse(jwks, headers={"cache-control": "max-age=300"}),
        }
    )


Document = Awaitable[Mapping[str, Any]]


def control(agents: Callable[[], Document], agent: Callable[[str], Document], revoke_tokens: Callable[[str], None]) -> Starlette:
    """What changes, or says who there is. A `BrokerError` that a callable raises is answered with 503."""

    def revoke(name: str) -> dict[str, str]:
        revoke_tokens(name)
        return {"agent": name, "revoked": "tokens"}

    return _answering({"GET /agents": agents, "GET /agents/{name:path}": agent, "POST /agents/{name:path}/tokens/revoke": revoke})


def _answering(answers: Mapping[str, Callable[..., Any]]) -> Starlette:
    """Each answers with a response or a document, at once or awaited."""

    def route(where: str, answer: Callable[..., Any]) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                answered = answer(*request.path_params.values())
                answered = await answered if isinstance(answered, Awaitable) else answered
            except BrokerError as error:
                return JSONResponse({"error": str(error)}, 503)
            return answered if isinstance(answered, Response) else JSONResponse(answered)

        method, path = where.split()
        return Route(path, endpoint, methods=[method])

    return Starlette(routes=[route(where, answer) for where, answer in answers.items()])


@contextlib.asynccontextmanager
async def serving(app: Starlette, **where: Any) -> AsyncIterator[None]:
    """Serve on `host` and `port`, or on the Unix socket `uds` (mode 0600), for as long as the body of the `async with` runs."""
    sockets = [_private(where.pop("uds"))] if "uds" in where else None
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", **where))
    # Signals are the composition root's: it stops what serves calls first.
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment, method-assign]
    task = asyncio.create_task(server.serve(sockets))
    yield
    server.should_exit = True
    await task


def _private(path: str) -> socket.socket:
    """A listening Unix socket that its owner alone can open; uvicorn would make it 0666."""
    Path(path).unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        listening.bind(path)
    finally:
        os.umask(mask)
    return listening
