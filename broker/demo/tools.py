"""Two tools that keep what reaches them: a payments API over HTTPS and a wiki that speaks MCP.

The demo has them on loopback, the wiki over HTTP. `python -m broker.demo.tools CERTIFICATE` serves both over HTTPS to a network,
for containers (compose/), and prints what reaches them; the file holds a certificate chain and its key.
"""

import json
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from mcp.server.mcpserver import MCPServer
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from broker.keys import write_private
from broker.pki import PlatformCA
from broker.policy.snapshot import EMPTY


@dataclass(frozen=True, slots=True)
class Seen:
    """What a tool received: a line about the request, and the authorization header it came with."""

    request: str
    authorization: str


@dataclass(frozen=True, slots=True)
class At:
    """Where a tool listens, on a free port if 0. `certificate` is a file with a chain and its key; without one it speaks HTTP."""

    host: str = "127.0.0.1"
    port: int = 0
    certificate: Path | None = None


class Tool:
    """An application on a port of its own. `line` says what to keep of a request (scope, body); of an empty line, nothing.

    What is kept stands in `seen`, and `told` gets it too.
    """

    def __init__(
        self, app: ASGIApp, line: Callable[[Scope, str], str], at: At, told: Callable[[Seen], None] = lambda _: None
    ) -> None:
        self.seen: list[Seen] = []
        self._app, self._line, self._told = app, line, told
        listening = socket.create_server((at.host, at.port))
        self.port: int = listening.getsockname()[1]
        server = uvicorn.Server(
            uvicorn.Config(self._watched, interface="asgi3", log_level="error", log_config=None, ssl_certfile=at.certificate)
        )
        threading.Thread(target=server.run, args=([listening],), daemon=True).start()

    async def _watched(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""

        async def noted() -> Message:
            nonlocal body
            message = await receive()
            body += message.get("body", b"")
            if message["type"] == "http.request" and not message.get("more_body") and (line := self._line(scope, body.decode())):
                self.seen.append(seen := Seen(line, dict(scope["headers"]).get(b"authorization", b"none").decode()))
                self._told(seen)
            return message

        await self._app(scope, noted if scope["type"] == "http" else receive, send)


def payments(folder: Path, now: float) -> Tool:
    """The demo's payments API. Its certificate is its own authority's, which its catalog entry names; both lie in `folder`."""
    certify(folder / "payments.pem", folder / "payments-ca.pem", folder / "payments-ca.key", ["localhost"], now)
    return _payments(At(certificate=folder / "payments.pem"))


def wiki() -> Tool:
    """The demo's wiki."""
    return _wiki(At())


def certify(path: Path, ca: Path, key: Path, hosts: list[str], now: float) -> None:
    """Write a tool's new certificate, with its key; the authority that signs it is made if it is missing."""
    leaf = PlatformCA(key, ca, now).certify(EMPTY, hosts, now).door
    write_private(path, (leaf.chain + leaf.key).encode())


def _payments(at: At, told: Callable[[Seen], None] = lambda _: None) -> Tool:
    async def refund(request: Request) -> JSONResponse:
        await request.body()
        return JSONResponse({"object": "refund", "status": "succeeded"})

    app = Starlette(routes=[Route("/{path:path}", refund, methods=["GET", "POST", "DELETE"])])
    return Tool(app, lambda scope, body: f"{scope['method']} {scope['path']} {body}".strip(), at, told)


def _wiki(at: At, told: Callable[[Seen], None] = lambda _: None, *, sessions: bool = True) -> Tool:
    """Two MCP tools, served by the official SDK; without sessions, a call is one request. Keeps calls of tools alone."""
    server = MCPServer("wiki", log_level="ERROR")

    @server.tool()
    def search_pages(query: str) -> str:
        """Find pages."""
        return f"1 page about {query}: 'How refunds work'"

    @server.tool()
    def delete_page(page: str) -> str:
        """Delete a page for good."""
        return f"{page} is gone"

    def line(_: Scope, body: str) -> str:
        message = json.loads(body or "{}")
        return f"tools/call {message['params']['name']}" if message.get("method") == "tools/call" else ""

    app = server.streamable_http_app(host=at.host, stateless_http=not sessions, json_response=not sessions)
    return Tool(app, line, at, told)


PAYMENTS_PORT, WIKI_PORT = 8443, 8444


def main(certificate: Path) -> None:
    """Serve both until SIGTERM."""

    def told(seen: Seen) -> None:
        sys.stdout.write(f"{seen.request}  authorization: {seen.authorization[:24]}…\n")
        sys.stdout.flush()

    ends = {signal.SIGINT, signal.SIGTERM}
    # Before there are other threads: in a container, as process 1, a signal that one of them could take is lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    _payments(At("0.0.0.0", PAYMENTS_PORT, certificate), told)  # noqa: S104 - a container's network, which compose.yaml draws
    _wiki(At("0.0.0.0", WIKI_PORT, certificate), told, sessions=False)  # noqa: S104 - the same
    signal.sigwait(ends)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
