"""An ASGI application on loopback, served as in production by uvicorn, in a thread of its own."""

import json
import socket
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

Scope = dict[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]


@dataclass(frozen=True)
class Arrived:
    """A request as the application received it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Served:
    """Listens from the first moment: what comes before uvicorn has started waits in the socket."""

    def __init__(
        self, app: App, certificate: tuple[Path, Path] | None = None, address: tuple[str, int] = ("127.0.0.1", 0)
    ) -> None:
        self.arrived: list[Arrived] = []
        self.listened_to = threading.Event()  # a GET is being answered
        self._app = app
        self._listener = socket.create_server(address)
        self.port: int = self._listener.getsockname()[1]
        tls = {"ssl_certfile": certificate[0], "ssl_keyfile": certificate[1]} if certificate else {}
        options: dict[str, Any] = {
            "interface": "asgi3",
            "log_level": "error",
            "ws": "none",
            "timeout_graceful_shutdown": 1,
            **tls,
        }
        self._server = uvicorn.Server(uvicorn.Config(self._noted, **options))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True)
        self._thread.start()

    async def _noted(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        self.arrived.append(Arrived(scope["method"], scope["path"], headers, body))
        whole = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return whole.pop() if whole else await receive()

        async def watched(message: Any) -> None:
            await send(message)
            if scope["method"] == "GET" and message["type"] == "http.response.start":
                self.listened_to.set()

        await self._app(scope, again, watched)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive(), "uvicorn did not stop"
        self._listener.close()
