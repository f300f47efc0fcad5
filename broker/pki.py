"""The platform CA: what agents trust, and what Envoy shows them for the declared hosts. See docs/adr/0004.

Law: only declared names are certified. The root signs nothing but intermediates; an intermediate lives in memory, is constrained
to the hosts of one snapshot (RFC 5280 section 4.2.1.10, critical), and signs the leaves. The root's key never leaves its file.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker.dataplane.site import Certificates, Leaf
from broker.keys import KeyFileError, fresh_p256, p256, pem
from broker.policy.agreement import is_address
from broker.policy.snapshot import PolicySnapshot

_ROOT_DAYS = 3650
LEAF_DAYS = 7
# Clocks of agents may be behind ours.
_BACKDATE = timedelta(hours=1)

_NOT_OURS = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only")
_SIGNS = x509.KeyUsage(digital_signature=True, key_cert_sign=True, crl_sign=True, **dict.fromkeys(_NOT_OURS, False))
# What a client must understand or reject; the rest only describes.
_CRITICAL = (x509.BasicConstraints, x509.KeyUsage, x509.NameConstraints, x509.SubjectAlternativeName)


def declared_hosts(snapshot: PolicySnapshot) -> tuple[list[str], list[str]]:
    """The hosts of declared HTTPS endpoints, sorted: names, and IP addresses."""
    hosts = sorted({tool.endpoint.host for tool in snapshot.tools.values() if tool.endpoint.scheme == "https"})
    return [host for host in hosts if not is_address(host)], [host for host in hosts if is_address(host)]


@dataclass(frozen=True, slots=True)
class _Authority:
    name: x509.Name
    key: EllipticCurvePrivateKey

    def sign(
        self, name: x509.Name, key: EllipticCurvePrivateKey, now: float, days: int, *what: x509.ExtensionType
    ) -> x509.Certificate:
        since = datetime.fromtimestamp(now, UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(since - _BACKDATE)
            .not_valid_after(since + timedelta(days=days))
        )
        subject = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        for extension in (*what, subject, issuer):
            builder = builder.add_extension(extension, critical=isinstance(extension, _CRITICAL))
        return builder.sign(self.key, hashes.SHA256())


class PlatformCA:
    """The root: its key (mode 0600) and its certificate, made at first use. `now` is seconds since the epoch."""

    def __init__(self, key: Path, certificate: Path, now: float) -> None:
        self._root = _Authority(_name("Envoy tool broker CA"), p256(key))
        if not certificate.exists():
            signs = x509.BasicConstraints(ca=True, path_length=1)
            made = self._root.sign(self._root.name, self._root.key, now, _ROOT_DAYS, signs, _SIGNS)
            certificate.write_bytes(_pem(made))
        self.certificate = x509.load_pem_x509_certificate(certificate.read_bytes())
        if self.certificate.public_key() != self._root.key.public_key():
            raise KeyFileError(f"{certificate} is not the certificate of {key}", "move both away to have new ones made")

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the certificate, in hex."""
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    def certify(self, snapshot: PolicySnapshot, door_hosts: Iterable[str], now: float) -> Certificates:
        """Leaves for every declared HTTPS host, under a fresh intermediate that can certify nothing else."""
        names, addresses = declared_hosts(snapshot)
        doors = sorted(set(door_hosts))
        # One for names and one for addresses: BoringSSL (gRPC's clients, say) rejects any chain that constrains addresses.
        by_name = _Intermediate(self._root, names, now) if names else None
        return Certificates(
            hosts={name: by_name.leaf([name]) for name in names} if by_name else {},
            addresses=_Intermediate(self._root, addresses, now).leaf(addresses) if addresses else None,
            door=_Intermediate(self._root, doors, now).leaf(doors),
        )


class _Intermediate:
    def __init__(self, root: _Authority, hosts: list[str], now: float) -> None:
        self._authority = _Authority(_name("Envoy tool broker, declared hosts"), fresh_p256())
        self._leaf_key, self._now = fresh_p256(), now
        only = x509.NameConstraints([_general_name(host, ip_network) for host in hosts], excluded_subtrees=None)  # /32 or /128
        signs = x509.BasicConstraints(ca=True, path_length=0)
        self._certificate = root.sign(self._authority.name, self._authority.key, now, LEAF_DAYS, signs, _SIGNS, only)

    def leaf(self, hosts: list[str]) -> Leaf:
        # No subject, so the names stand in a critical SAN (RFC 5280 section 4.2.1.6), and no common name meets the constraints.
        names = x509.SubjectAlternativeName([_general_name(host, ip_address) for host in hosts])
        serves = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        no_authority = x509.BasicConstraints(ca=False, path_length=None)
        leaf = self._authority.sign(x509.Name([]), self._leaf_key, self._now, LEAF_DAYS, no_authority, names, serves)
        return Leaf((_pem(leaf) + _pem(self._certificate)).decode(), pem(self._leaf_key).decode())


def _general_name(host: str, read: Callable[[str], Any]) -> x509.GeneralName:
    return x509.IPAddress(read(host)) if is_address(host) else x509.DNSName(host)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
