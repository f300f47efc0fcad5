"""X.509-SVIDs as they should be, and as they should not: a trust domain's authorities, and calls under what they sign."""

import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import stack
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.x509.oid import NameOID


def svid(  # noqa: PLR0913 - each a way to be wrong
    authority: stack.TestCA,
    *uris: str,
    dns: tuple[str, ...] = (),
    authority_itself: bool = False,
    signs: bool = False,
    lasts: float = 3600,
    began: float = -60,
) -> tuple[str, str]:
    """Chain and key (PEM) of a certificate with these URI SANs, in this order; it begins and `lasts` so many seconds from now."""
    key, now = generate_private_key(SECP256R1()), datetime.now(UTC)
    names = [*map(x509.UniformResourceIdentifier, uris), *map(x509.DNSName, dns)]
    bits = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only")
    usage = x509.KeyUsage(digital_signature=True, key_cert_sign=signs, crl_sign=False, **dict.fromkeys(bits, False))
    builder = (
        x509.CertificateBuilder()
        .subject_name(
            x509.Name([x509.NameAttribute(NameOID.COUNTRY_NAME, "US"), x509.NameAttribute(NameOID.COMMON_NAME, "SPIRE")])
        )
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(seconds=began))
        .not_valid_after(now + timedelta(seconds=lasts))
        .add_extension(x509.BasicConstraints(ca=authority_itself, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    chain = builder.sign(authority.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return chain.decode(), key.private_bytes(*form).decode()


def files(folder: Path, pair: tuple[str, str]) -> tuple[Path, Path]:
    """The same as two files."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = os.urandom(4).hex()
    paths = folder / f"{stem}.crt", folder / f"{stem}.key"
    for path, text in zip(paths, pair, strict=True):
        path.write_text(text)
    return paths


class Refused(Exception):
    """The door did not let the connection in; the reason is TLS's."""


@contextmanager
def connection(broker: stack.Broker, certificate: tuple[Path, Path] | None, roots: str | None = None) -> Iterator[ssl.SSLSocket]:
    """TLS to the proxy door. Raises `Refused` at the latest when something is sent and nothing comes back.

    `roots` (PEM) are what the door's own certificate must come from, in place of the platform CA.
    """
    context = ssl.create_default_context(cafile=None if roots else broker.ca, cadata=roots)
    context.check_hostname = roots is None
    if certificate:
        context.load_cert_chain(*certificate)
    try:
        with (
            socket.create_connection(broker.proxy, timeout=5) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            yield secure
    except (ssl.SSLError, ConnectionError) as error:
        raise Refused(str(error)) from None


def ask(secure: ssl.SSLSocket, head: str) -> bytes:
    """Send a request's head; the answer, which is whole when it has a content length."""
    secure.settimeout(5)
    secure.sendall(f"{head}\r\n\r\n".encode())
    answer = b""
    while chunk := secure.recv(65536):
        answer += chunk
        if stack.is_whole(answer):
            return answer
    if not answer:
        raise ConnectionResetError("closed without an answer")
    return answer


def status(answer: bytes) -> int:
    """The status of an answer."""
    return int(answer.split(b" ", 2)[1])


def call(broker: stack.Broker, certificate: tuple[Path, Path] | None, url: str, roots: str | None = None) -> int | str:
    """The status of a call in absolute form on a connection of its own, or `refused`."""
    host = url.split("/")[2]
    try:
        with connection(broker, certificate, roots) as secure:
            return status(ask(secure, f"GET {url} HTTP/1.1\r\nhost: {host}\r\nconnection: close"))
    except Refused:
        return "refused"
