"""A whole broker for tests: real Envoy, real sockets, and upstreams that keep what reached them.

Everything listens on loopback, on ports that the system chose. Nothing here fakes a part of the broker.
"""

import atexit
import base64
import json
import os
import select
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.x509.oid import NameOID

BROKER = [sys.executable, "-m", "broker.cli"]
START_S = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(what: Callable[[], Any], seconds: float = 10, why: str = "") -> Any:
    """Wait for `what` to become true, and give it."""
    end = time.monotonic() + seconds
    while True:
        if found := what():
            return found
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {why or what}")
        time.sleep(0.02)


# Certificates for upstreams and for agents with a SPIFFE ID.


@dataclass
class TestCA:
    __test__ = False
    key: EllipticCurvePrivateKey = field(default_factory=lambda: generate_private_key(SECP256R1()))

    def __post_init__(self) -> None:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
        self.certificate = (
            _builder(name, name, self.key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            # Without it, of two roots of one name only the first is tried (RFC 5280 section 4.2.1.2 wants it).
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    def issue(self, folder: Path, *names: str, uri: str = "") -> tuple[Path, Path]:
        """Certificate and key files for host names, addresses, or a SPIFFE ID."""
        key = generate_private_key(SECP256R1())
        general: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri)] if uri else []
        general += [
            x509.IPAddress(ip_address(name)) if name[0].isdigit() or ":" in name else x509.DNSName(name) for name in names
        ]
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, (names or ("agent",))[0])])
        certificate = (
            _builder(subject, self.certificate.subject, key)
            .add_extension(x509.SubjectAlternativeName(general), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"leaf-{os.urandom(4).hex()}"
        crt, pem = folder / f"{stem}.crt", folder / f"{stem}.key"
        crt.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pem.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        return crt, pem


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _builder(subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=2))
    )


# Upstreams.


@dataclass(frozen=True)
class Seen:
    """A request as an upstream received it."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name), None)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, *args: object) -> None:
        pass


def served(
    handler: type[BaseHTTPRequestHandler], port: int = 0, certificate: tuple[Path, Path] | None = None, host: str = "127.0.0.1"
) -> ThreadingHTTPServer:
    """A server on loopback that has begun; with a certificate and its key, over TLS."""
    server = _Server((host, port), handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server


class Upstream:
    """An HTTP(S) server that keeps every request and answers with `answer(seen)` → (status, headers, body)."""

    def __init__(self, certificate: tuple[Path, Path] | None = None, port: int = 0) -> None:
        self.seen: list[Seen] = []
        self.connections = 0
        self.answer: Callable[[Seen], tuple[int, dict[str, str], bytes]] = lambda seen: (
            200,
            {"content-type": "application/json"},
            json.dumps({"path": seen.path}).encode(),
        )
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                upstream.connections += 1
                super().setup()

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:
                    self.close_connection = True

            def _any(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                if self.headers.get("transfer-encoding", "") == "chunked":
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                seen = Seen(self.command, self.path, tuple(self.headers.items()), body)
                upstream.seen.append(seen)
                status, headers, content = upstream.answer(seen)
                self.send_response_only(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = _any  # noqa: N815 - the library's names

            def log_message(self, *args: object) -> None:
                pass

        self._server = served(Handler, port, certificate)
        self.port = self._server.server_address[1]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


# Manifests.


def tool(name: str, endpoint: str, operations: dict[str, Any], **spec: Any) -> dict[str, Any]:
    body = {"protocol": "rest", "endpoint": endpoint, "operations": operations, **spec}
    return {"apiVersion": "broker/v1", "kind": "Tool", "metadata": {"name": name, "owner": "team-test"}, "spec": body}


def agent(name: str, tools: dict[str, Any], **spec: Any) -> dict[str, Any]:
    body = {"identity": {"token": True}, "mode": "enforce", "tools": tools, **spec}
    metadata = {"name": name, "owner": "team-test", "oncall": "test-primary"}
    return {"apiVersion": "broker/v1", "kind": "Agent", "metadata": metadata, "spec": body}


def platform(**spec: Any) -> dict[str, Any]:
    return {"apiVersion": "broker/v1", "kind": "Platform", "metadata": {"name": "test", "owner": "platform"}, "spec": spec}


def write_manifests(folder: Path, *documents: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for document in documents:
        write_manifest(folder, document)
    return folder


def write_manifest(folder: Path, document: dict[str, Any]) -> None:
    """Put one document in place in one step, as an editor or a deployment does."""
    name = f"{document['kind'].lower()}-{document['metadata']['name']}.yaml"
    draft = folder / f".{name}"
    draft.write_text(json.dumps(document, indent=1))  # JSON is YAML, without anchors
    draft.rename(folder / name)


# The broker.

# Where threads share a client, httpcore 1.0 may close a connection above its limit of idle ones that it has just given to a
# call, which then hears nothing until its timeout (httpcore's issue 1110). Without that limit it closes none.
_ALL_KEPT = httpx.Limits(max_keepalive_connections=None)


class Broker:
    """A running `broker up`."""

    def __init__(self, manifests: Path, state: Path, env: dict[str, str] | None = None, within: tuple[str, ...] = ()) -> None:
        """`within` is what starts the command, `nsenter` for one."""
        self.manifests, self.state, self._within = manifests, state, within
        self._env = {**os.environ, **(env or {})}
        self.log_path = state.parent / f"{state.name}.log"
        self.start()

    def start(self) -> None:
        ports = {name: f"127.0.0.1:{free_port()}" for name in ("--proxy", "--base-url", "--admin")}
        options = [text for pair in ports.items() for text in pair]
        self._log = self.log_path.open("ab")
        self.process = subprocess.Popen(
            [*self._within, *BROKER, "up", "--json", "--manifests", str(self.manifests), "--state", str(self.state), *options],
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=self._env,
        )
        self._log.close()
        self.ready = self._ready_line()
        self.proxy = _address(self.ready["proxy"])
        self.base_url = f"http://{self.ready['base_url']}"
        self.admin = f"http://{self.ready['admin']}"
        self.ca = self.ready["ca"]
        self._tokens: dict[str, str] = {}

    def _ready_line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], START_S)
        line = self.process.stdout.readline() if readable else b""
        if not line:
            self.stop()
            raise AssertionError(f"the broker did not start:\n{self.log()}")
        return json.loads(line)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        code = self.process.wait(30)
        if self.process.stdout:
            self.process.stdout.close()
        return code

    def child(self, name: str) -> int:
        """The process ID of `envoy` or `processor`."""
        mark = b"serve" if name == "processor" else b"envoy.json"
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in children:
            if mark in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
        raise LookupError(name)

    def token(self, name: str) -> str:
        if name not in self._tokens:
            command = [*BROKER, "token", name, "--state", str(self.state)]
            self._tokens[name] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return self._tokens[name]

    def proxy_url(self, name: str) -> str:
        return f"http://{name}:{self.token(name)}@{self.proxy[0]}:{self.proxy[1]}"

    def client(self, name: str, **options: Any) -> httpx.Client:
        """An unchanged HTTP client that was told the proxy and the CA, as by environment variables."""
        context = ssl.create_default_context(cafile=self.ca)
        return httpx.Client(proxy=self.proxy_url(name), verify=context, timeout=10, limits=_ALL_KEPT, **options)

    def direct(self, name: str) -> httpx.Client:
        """A client at the base-url door, which is plain HTTP: no trust roots are read."""
        headers = {"x-broker-token": self.token(name)}
        return httpx.Client(base_url=self.base_url, headers=headers, timeout=10, limits=_ALL_KEPT, verify=False)

    def records(self, *, canary: bool = False) -> list[dict[str, Any]]:
        """What is in the log, but for what the broker itself tries every few minutes."""
        lines: list[dict[str, Any]] = []
        for path in sorted((self.state / "audit").glob("*.jsonl")):
            lines.extend(json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n"))
        return [record for record in lines if canary or "must-deny.invalid" not in (record.get("host") or "")]

    def decision(self, decision_id: str) -> dict[str, Any]:
        return next(r for r in self.records() if r["event"] == "decision" and r["decision_id"] == decision_id)

    def outcome(self, decision_id: str) -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            return next((r for r in self.records() if r["event"] == "outcome" and r["decision_id"] == decision_id), None)

        return until(found, why=f"an outcome of {decision_id}")

    def decisions(self, **wanted: Any) -> list[dict[str, Any]]:
        return [
            r for r in self.records() if r["event"] == "decision" and all(r.get(key) == value for key, value in wanted.items())
        ]


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


# Bytes on the wire, for what no well-behaved client sends.


def basic(name: str, token: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{token}".encode()).decode()


def exchange_bytes(connection: socket.socket, data: bytes, seconds: float = 5) -> bytes:
    """Send bytes and read until the peer closes, or one whole answer with a content length is here."""
    connection.settimeout(seconds)
    try:
        connection.sendall(data)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
            if is_whole(answer):
                break
    except (TimeoutError, ConnectionError, ssl.SSLError):
        pass
    return answer


def is_whole(answer: bytes) -> bool:
    head, gap, body = answer.partition(b"\r\n\r\n")
    if not gap:
        return False
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(body) >= int(line.partition(b":")[2])
        if line == b"transfer-encoding: chunked":
            return body.endswith(b"0\r\n\r\n")
    return head.startswith(b"HTTP/1.1 200") and b"transfer-encoding" not in head.lower()


@contextmanager
def tunnel(broker: Broker, target: str, name: str, *, extra: bytes = b"") -> Iterator[tuple[socket.socket, bytes]]:
    """A CONNECT: the socket, and what the proxy answered."""
    with socket.create_connection(broker.proxy, timeout=5) as connection:
        authorization = basic(name, broker.token(name))
        head = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nProxy-Authorization: {authorization}\r\n\r\n"
        yield connection, exchange_bytes(connection, head.encode() + extra)


def tls(connection: socket.socket, broker: Broker, sni: str | None, *, alpn: list[str] | None = None) -> ssl.SSLSocket:
    """TLS inside a tunnel, with any SNI, verified against the broker's CA but not against the name."""
    context = ssl.create_default_context(cafile=broker.ca)
    context.check_hostname = False
    context.set_alpn_protocols(alpn or ["http/1.1"])
    return context.wrap_socket(connection, server_hostname=sni)


def short_folder() -> Path:
    """A folder with a short path, since Unix sockets have short names; gone when the tests are over."""
    folder = tempfile.mkdtemp(prefix="bt-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
