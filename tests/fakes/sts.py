"""moto's STS and S3, the real servers of a fake AWS, behind a gate that refuses what AWS refuses of a signature and its time."""

import threading
from contextlib import contextmanager
from email.utils import formatdate
from io import BytesIO

from fakes.aws import refusal
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from broker import clock

ERROR = "<ErrorResponse><Error><Code>{}</Code><Message>no</Message></Error></ErrorResponse>"


class Gate:
    """`keys` as in `fakes.aws`; `instead` answers in AWS's place."""

    def __init__(self):
        self.keys = {"AKIAEXAMPLE": ("wJalr/long-lived", None)}
        self.instead = None
        self.changed = ()
        self.seen = []
        self.hangs = threading.Event()
        self.released = threading.Event()
        self.dated = True
        self.url = ""
        self._moto = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ, start_response):
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        headers = [(name[5:].replace("_", "-"), value) for name, value in environ.items() if name.startswith("HTTP_")]
        headers += [("content-type", environ["CONTENT_TYPE"])] if environ.get("CONTENT_TYPE") else []
        self.seen.append(body.decode())
        if self.hangs.is_set():
            self.released.wait(30)
        why = refusal((environ["REQUEST_METHOD"], environ["REQUEST_URI"], headers, body), keys=self.keys, now=clock.now())
        if self.instead:
            status, more, content = self.instead
            return self._plain(start_response, status, content, more)
        if why:
            return self._plain(start_response, 403, ERROR.format(why).encode())
        environ["wsgi.input"] = BytesIO(body)
        status, content = [], b""

        def started(line, more, _=None):
            status.append(int(line.split()[0]))

        content = b"".join(self._moto(environ, started))
        for old, new in self.changed:
            assert old in content
            content = content.replace(old, new)
        return self._plain(start_response, status[0], content)

    def _plain(self, start_response, status, content, more=()):
        date = formatdate(clock.now(), usegmt=True) if self.dated else "never"
        start_response(f"{status} .", [("date", date), ("content-length", str(len(content))), *dict(more).items()])
        return [content]


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def send_response(self, code, message=None):
        # Without werkzeug's own date and server name.
        self.send_response_only(code, message)

    def log(self, *_):
        pass


@contextmanager
def aws():
    gate = Gate()
    server = make_server("127.0.0.1", 0, gate, threaded=True, request_handler=_Quiet)
    gate.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield gate
    finally:
        gate.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
