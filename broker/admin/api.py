"""Health, readiness, metrics and keys for anyone who can reach the port; control for whoever may open the socket."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import orjson
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from broker.errors import BrokerError, UsageError
from broker.identity import Person


def public(
    readiness: Callable[[], tuple[list[str], str]], exposition: Callable[[], Awaitable[bytes]], jwks: Mapping[str, Any]
) -> list[Route]:
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


_LONGEST = 65_536  # bytes of a body

Act = Callable[[Mapping[str, str], Mapping[str, Any], Person], Any]
"""What the path names, what the body says, and who asks → a document, at once or awaited."""


def acting(acts: Mapping[str, Act], person: Callable[[Request, Mapping[str, Any]], Person | None]) -> list[Route]:
    """What changes, or says who there is, for whom `person` makes out; nobody else is told what there is.

    A `UsageError` is answered with 404, a `ValueError` with 409, and another `BrokerError` with 503.
    """

    def route(where: str, act: Act) -> Route:
        async def endpoint(request: Request) -> Response:
            said = await _said(request)
            if not isinstance(said, dict):
                return JSONResponse({"error": f"the body is no JSON object of at most {_LONGEST} bytes"}, 400)
            who = person(request, said)
            if who is None:
                words = {
                    "error": "only operators may ask this; send an operator token (`broker token NAME --operator`) as Bearer"
                }
                return JSONResponse(words, 401, {"www-authenticate": "Bearer"})
            try:
                answered = act(request.path_params, said, who)
                return JSONResponse(await answered if isinstance(answered, Awaitable) else answered)
            except UsageError as error:
                return JSONResponse({"error": str(error)}, 404)
            except ValueError as error:
                return JSONResponse({"error": str(error)}, 409)
            except BrokerError as error:
                return JSONResponse({"error": str(error)}, 503)

        method, path = where.split()
        return Route(path, endpoint, methods=[method])

    return [route(where, act) for where, act in acts.items()]


async def _said(request: Request) -> Any:
    """What the body says, None where it is too long or no JSON. Nobody knows yet who says it."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LONGEST:
            return None
    with contextlib.suppress(ValueError):
        return orjson.loads(body or b"{}")


def _answering(answers: Mapping[str, Callable[[], Any]]) -> list[Route]:
    """Each answers anyone with a response or a document, at once or awaited."""

    def route(where: str, answer: Callable[[], Any]) -> Route:
        async def endpoint(_: Request) -> Response:
            answered = answer()
            answered = await answered if isinstance(answered, Awaitable) else answered
            return answered if isinstance(answered, Response) else JSONResponse(answered)

        method, path = where.split()
        return Route(path, endpoint, methods=[method])

    return [route(where, answer) for where, answer in answers.items()]


@contextlib.asynccontextmanager
async def serving(routes: list[Route], **where: Any) -> AsyncIterator[None]:
    """Serve on `host` and `port`, or on the Unix socket `uds` (mode 0600), for as long as the body of the `async with` runs."""
    sockets = [_private(where.pop("uds"))] if "uds" in where else None
    server = uvicorn.Server(
        uvicorn.Config(Starlette(routes=routes), log_level="warning", access_log=False, lifespan="off", **where)
    )
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
