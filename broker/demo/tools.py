"""Two tools on loopback that keep what reaches them: a payments API over HTTPS and a wiki that speaks MCP."""

import json
import socket
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


class Tool:
    """An application on a port of its own. `line` says what to keep of a request (scope, body); of an empty line, nothing."""

    def __init__(self, app: ASGIApp, line: Callable[[Scope, str], str], certificate: Path | None = None) -> None:
        self.seen: list[Seen] = []
        self._app, self._line = app, line
        listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = listening.getsockname()[1]
        server = uvicorn.Server(
            uvicorn.Config(self._watched, interface="asgi3", log_level="error", log_config=None, ssl_certfile=certificate)
        )
        threading.Thread(target=server.run, args=([listening],), daemon=True).start()

    async def _watched(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""

        async def noted() -> Message:
            nonlocal body
            message = await receive()
            body += message.get("body", b"")
            if message["type"] == "http.request" and not message.get("more_body") and (line := self._line(scope, body.decode())):
                self.seen.append(Seen(line, dict(scope["headers"]).get(b"authorization", b"none").decode()))
            return message

        await self._app(scope, noted if scope["type"] == "http" else receive, send)


def payments(folder: Path, now: float) -> Tool:
    """The payments API. Its certificate is its own authority's, which the demo's catalog entry names; both lie in `folder`."""
    authority = PlatformCA(folder / "payments-ca.key", folder / "payments-ca.pem", now)
    leaf = authority.certify(EMPTY, ["localhost"], now).door
    write_private(folder / "payments.pem", (leaf.chain + leaf.key).encode())

    async def refund(request: Request) -> JSONResponse:
        await request.body()
        return JSONResponse({"object": "refund", "status": "succeeded"})

    app = Starlette(routes=[Route("/{path:path}", refund, methods=["GET", "POST", "DELETE"])])
    return Tool(app, lambda scope, body: f"{scope['method']} {scope['path']} {body}".strip(), folder / "payments.pem")


def wiki() -> Tool:
    """The wiki: two MCP tools, served by the official SDK. Keeps calls of tools alone."""
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

    return Tool(server.streamable_http_app(), line)
