"""Two tools on loopback that keep what reaches them: a payments API over HTTPS and a wiki that speaks MCP."""

import json
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import uvicorn
from mcp.server.mcpserver import MCPServer
from starlette.types import ASGIApp, Receive, Scope, Send

from broker.keys import write_private
from broker.pki import PlatformCA
from broker.policy.snapshot import EMPTY


@dataclass(frozen=True, slots=True)
class Seen:
    """What a tool received: a line about the request, and the authorization header it came with."""

    request: str
    authorization: str


class Payments:
    """The payments API. Its certificate is its own authority's, which the demo's catalog entry names."""

    def __init__(self, folder: Path, now: float) -> None:
        self.seen: list[Seen] = []
        authority = PlatformCA(folder / "payments-ca.key", folder / "payments-ca.pem", now)
        leaf = authority.certify(EMPTY, ["localhost"], now).door
        write_private(folder / "payments.pem", (leaf.chain + leaf.key).encode())
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self.seen))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "payments.pem")
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()


def _handler(seen: list[Seen]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0)).decode()
            seen.append(Seen(f"{self.command} {self.path} {body}".strip(), self.headers.get("authorization", "none")))
            content = json.dumps({"object": "refund", "status": "succeeded"}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = _answer  # noqa: N815 - the standard library's names

        def log_message(self, *_: Any) -> None:
            """Say nothing: the tour speaks."""

    return Handler


class Wiki:
    """The wiki: two MCP tools, served by the official SDK."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        server = MCPServer("wiki", log_level="ERROR")

        @server.tool()
        def search_pages(query: str) -> str:
            """Find pages."""
            return f"1 page about {query}: 'How refunds work'"

        @server.tool()
        def delete_page(page: str) -> str:
            """Delete a page for good."""
            return f"{page} is gone"

        config = uvicorn.Config(
            _watched(server.streamable_http_app(), self.seen.append), port=0, log_level="error", log_config=None
        )
        self._server = uvicorn.Server(config)
        threading.Thread(target=self._server.run, daemon=True).start()

    @property
    def port(self) -> int | None:
        """The port, or None while it starts."""
        servers = getattr(self._server, "servers", [])
        return int(servers[0].sockets[0].getsockname()[1]) if self._server.started and servers else None


def _watched(app: ASGIApp, keep: Callable[[Seen], None]) -> ASGIApp:
    async def watched(scope: Scope, receive: Receive, send: Send) -> None:
        async def noted() -> Any:
            message = await receive()
            if message["type"] == "http.request" and message.get("body"):
                headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
                keep(Seen(message["body"].decode(), headers.get("authorization", "none")))
            return message

        await app(scope, noted if scope["type"] == "http" else receive, send)

    return watched
