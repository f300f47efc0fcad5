"""Answers without an end, for tests of what is cut: a server that streams events, and clients that notice when that stops."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from tests import stack


class Events:
    """A server whose `/items…` answers are event streams: one event at once, and then one each `every` seconds, or (0) none."""

    def __init__(
        self, certificate: tuple[Path, Path] | None = None, every: float = 0.0, host: str = "127.0.0.1", port: int = 0
    ) -> None:
        self.every, self.seen, self.closing = every, [], threading.Event()
        events = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                events.seen.append(self.path)
                self.send_response_only(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                every = 0.1 if self.path.endswith("busy") else 0.0
                try:
                    self._event()
                    while not events.closing.wait(every or 3600):
                        self._event()
                except OSError:  # the stream was cut
                    self.close_connection = True

            def _event(self) -> None:
                self.wfile.write(b"9\r\ndata: x\n\n\r\n")
                self.wfile.flush()

            def log_message(self, *args: object) -> None:
                pass

        self._server = stack.served(Handler, port, certificate, host)
        self.port = self._server.server_address[1]

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class Listener:
    """One connection that reads until it ends: `began` is set with the first event, `ended` when nothing more will come."""

    def __init__(self, connection: socket.socket, request: bytes) -> None:
        self.began, self.ended = threading.Event(), threading.Event()
        self.ended_at, self.answer = 0.0, b""
        self._connection = connection
        connection.settimeout(60)
        connection.sendall(request)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while data := self._connection.recv(65536):
                self.answer = (self.answer + data)[-65536:]
                if b"data: x" in self.answer or (b"\r\n\r\n" in self.answer and b"200" not in self.answer[:15]):
                    self.began.set()
        except OSError:
            pass
        self.ended_at = time.monotonic()
        self.began.set()
        self.ended.set()

    def close(self) -> None:
        self._connection.close()


def base_url_stream(broker: stack.Broker, agent: str, path: str, run: str = "") -> Listener:
    """A stream at the base-url door."""
    host, _, port = broker.ready["base_url"].rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    named = f"x-run-id: {run}\r\n" if run else ""
    head = f"GET {path} HTTP/1.1\r\nhost: x\r\nx-broker-token: {broker.token(agent)}\r\n{named}\r\n"
    return Listener(connection, head.encode())
