"""Two tools on loopback for the tutorial: a payments API over HTTPS, and a model behind OpenAI's chat API. Both want a key.

`python tools.py FOLDER` writes the certificate of the payments API into FOLDER and prints each request that arrives.
"""

import json
import ssl
import sys
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

PAYMENTS_PORT, MODEL_PORT = 18443, 18080
KEYS = {PAYMENTS_PORT: "payments-key-1", MODEL_PORT: "model-key-1"}
ANSWERS = {
    PAYMENTS_PORT: {"object": "refund", "status": "succeeded"},
    MODEL_PORT: {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": "gpt-5-mini",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "It was charged twice."}}],
    },
}


class Tool(BaseHTTPRequestHandler):
    """Answers whoever brings the key, and says what it saw."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Print the request; 200 with the key, 401 without."""
        port = self.server.server_address[1]
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        key = self.headers.get("authorization", "no key")
        print(f"port {port}: POST {self.path} {body}\n  authorization: {key}", flush=True)
        known = key == f"Bearer {KEYS[port]}"
        content = json.dumps(ANSWERS[port] if known else {"error": "who are you?"}).encode()
        self.send_response(200 if known else 401)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing more."""


def certificate(folder: Path) -> Path:
    """A certificate for localhost that is its own authority; its private key stays beside this script."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "payments")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    public = made.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "payments-ca.pem").write_bytes(public)
    both = Path("payments.pem")
    both.touch(mode=0o600)
    both.write_bytes(public + private)
    return both


def serve(port: int, pem: Path | None = None) -> None:
    """Serve on loopback in the background."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Tool)
    if pem:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever).start()


if __name__ == "__main__":
    serve(PAYMENTS_PORT, certificate(Path(sys.argv[1])))
    serve(MODEL_PORT)
    print(f"payments at https://localhost:{PAYMENTS_PORT}, model at http://127.0.0.1:{MODEL_PORT}/v1", flush=True)
