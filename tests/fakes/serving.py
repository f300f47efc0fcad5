"""A stand-in for an issuer's server: real HTTP on loopback, its own clock, and every way in which such a server fails."""

import json
import threading
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Refused(Exception):
    """What the server answers in place of a success."""

    def __init__(self, status, body):
        super().__init__(status)
        self.status, self.body = status, body


class Server:
    """`answer(method, path, headers, body)` gives a status and a JSON value or None, or raises `Refused`; `now` is its clock.

    `instead` answers in its place: (status, headers, bytes). While `hangs` is set nothing is answered.
    """

    def __init__(self):
        self.now = 1_800_000_000.0
        self.seen = []
        self.instead = None
        self.dated = True
        self.hangs = threading.Event()
        self.released = threading.Event()
        self.url = ""

    def answer(self, method, path, headers, body):
        raise NotImplementedError

    def respond(self, method, path, headers, body):
        self.seen.append((method, path))
        if self.hangs.is_set():
            self.released.wait(30)
        if self.instead:
            return self.instead
        try:
            status, value = self.answer(method, path, headers, body)
        except Refused as refused:
            status, value = refused.status, refused.body
        return status, {"content-type": "application/json"}, b"" if value is None else json.dumps(value).encode()


@contextmanager
def served(server):
    """The server, at `url`, until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self):
            try:
                super().handle_one_request()
            except OSError:  # the client gave up
                self.close_connection = True

        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, more, content = server.respond(self.command, self.path, headers, body)
            self.send_response_only(status)
            if server.dated:
                self.send_header("date", formatdate(server.now, usegmt=True))
            for name, value in more.items():
                self.send_header(name, value)
            if status != 204:
                self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 - http.server's names

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    server.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        httpd.shutdown()
        httpd.server_close()
        thread.join()
