"""The platform CA: what agents trust, and what Envoy shows them for the declared hosts. See docs/adr/0004.

Law: only declared names are certified. The root signs nothing but intermediates; an intermediate lives in memory, is constrained
to the hosts of one snapshot (RFC 5280 section 4.2.1.10, critical), and signs the leaves. The root's key never leaves its file.
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker.dataplane.routes import is_address
from broker.dataplane.site import Certificates, Leaf
from broker.keys import KeyFileError, p256, pem
from broker.policy.snapshot import PolicySnapshot

_ROOT_DAYS = 3650
LEAF_DAYS = 7
# Clocks of agents may be behind ours.
_BACKDATE = timedelta(hours=1)


class PlatformCA:
    """The root: its key (mode 0600) and its certificate, made at first use. `now` is seconds since the epoch."""

    def __init__(self, key: Path, certificate: Path, now: float) -> None:
        self._key = p256(key)
        if not certificate.exists():
            certificate.write_bytes(_root(self._key, now).public_bytes(serialization.Encoding.PEM))
        self._root = x509.load_pem_x509_certificate(certificate.read_bytes())
        if self._root.public_key() != self._key.public_key():
            raise KeyFileError(f"{certificate} is not the certificate of {key}", "move both away to have new ones made")

    def certify(self, snapshot: PolicySnapshot, door_hosts: Iterable[str], now: float) -> Certificates:
        """Leaves for every declared HTTPS host, under a fresh intermediate that can certify nothing else."""
        declared = {tool.endpoint.host for tool in snapshot.tools.values() if tool.endpoint.scheme == "https"}
        addresses = sorted(host for host in declared if is_address(host))
        names = sorted(declared - set(addresses))
        doors = sorted(set(door_hosts))
        # One for names and one for addresses: BoringSSL (gRPC's clients, say) rejects any chain that constrains addresses.
        by_name = _Intermediate(self._key, self._root, names, now) if names else None
        return Certificates(
            hosts={name: by_name.leaf([name]) for name in names} if by_name else {},
            addresses=_Intermediate(self._key, self._root, addresses, now).leaf(addresses) if addresses else None,
            door=_Intermediate(self._key, self._root, doors, now).leaf(doors),
        )


class _Intermediate:
    def __init__(self, root_key: EllipticCurvePrivateKey, root: x509.Certificate, hosts: list[str], now: float) -> None:
        self._key = generate_private_key(SECP256R1())
        self._leaf_key = generate_private_key(SECP256R1())
        self._leaf_pem = pem(self._leaf_key).decode()
        self._now = datetime.fromtimestamp(now, UTC)
        builder = _builder(_name("Envoy tool broker, declared hosts"), root.subject, self._key, self._now, LEAF_DAYS)
        self.certificate = (
            builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_ca_usage(), critical=True)
            .add_extension(_constraints(hosts), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
            .sign(root_key, hashes.SHA256())
        )

    def leaf(self, hosts: list[str]) -> Leaf:
        # No subject, so the names stand in a critical SAN (RFC 5280 section 4.2.1.6), and no common name meets the constraints.
        builder = _builder(x509.Name([]), self.certificate.subject, self._leaf_key, self._now, LEAF_DAYS)
        certificate = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        chain = b"".join(each.public_bytes(serialization.Encoding.PEM) for each in (certificate, self.certificate))
        return Leaf(chain.decode(), self._leaf_pem)


def _root(key: EllipticCurvePrivateKey, now: float) -> x509.Certificate:
    subject = _name("Envoy tool broker CA")
    builder = _builder(subject, subject, key, datetime.fromtimestamp(now, UTC), _ROOT_DAYS)
    return (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(_ca_usage(), critical=True)
        .sign(key, hashes.SHA256())
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _ca_usage() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    return x509.IPAddress(ip_address(host)) if is_address(host) else x509.DNSName(host)


def _constraints(hosts: list[str]) -> x509.NameConstraints:
    permitted = [
        x509.IPAddress(ip_network(host)) if is_address(host) else x509.DNSName(host)  # /32 or /128
        for host in hosts
    ]
    return x509.NameConstraints(permitted_subtrees=permitted, excluded_subtrees=None)
