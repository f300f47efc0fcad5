"""The platform CA certifies what is declared, and nothing else verifies."""

import ipaddress
import shutil
import subprocess

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from broker.keys import KeyFileError, ed25519
from broker.pki import PlatformCA, _Intermediate
from broker.policy.snapshot import Endpoint, PolicySnapshot, Tool

NOW = 1_800_000_000.0

# OpenSSL itself judges the chains, as most agents do.
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def snapshot(*endpoints):
    tools = {f"t{index}": Tool(f"t{index}", "o", "rest", endpoint, "r#", {}) for index, endpoint in enumerate(endpoints)}
    return PolicySnapshot("1", {}, tools, {}, {})


@pytest.fixture
def ca(tmp_path):
    return PlatformCA(tmp_path / "ca.key", tmp_path / "ca.pem", NOW)


def verified(tmp_path, leaf, *, name=None, ip=None):
    (tmp_path / "chain.pem").write_text(leaf.chain)
    wanted = ["-verify_hostname", name] if name else ["-verify_ip", ip]
    command = [
        "openssl",
        "verify",
        "-x509_strict",
        "-attime",
        str(int(NOW)),
        "-CAfile",
        "ca.pem",
        "-untrusted",
        "chain.pem",
        *wanted,
    ]
    done = subprocess.run([*command, "chain.pem"], cwd=tmp_path, capture_output=True, text=True, check=False)
    return done.returncode == 0, done.stdout + done.stderr


@needs_openssl
def test_declared_https_hosts_get_a_leaf_that_verifies_and_http_hosts_get_none(ca, tmp_path):
    made = ca.certify(
        snapshot(
            Endpoint("https", "api.example", 443), Endpoint("http", "plain.example", 80), Endpoint("https", "10.0.0.1", 443)
        ),
        ["localhost", "127.0.0.1"],
        NOW,
    )
    assert set(made.hosts) == {"api.example"}
    assert verified(tmp_path, made.hosts["api.example"], name="api.example")[0]
    assert verified(tmp_path, made.addresses, ip="10.0.0.1")[0]
    assert verified(tmp_path, made.door, name="localhost")[0]
    assert not verified(tmp_path, made.hosts["api.example"], name="other.example")[0]


@needs_openssl
def test_an_intermediate_certifies_nothing_beyond_its_hosts(ca, tmp_path):
    greedy = _Intermediate(ca._root, ["api.example"], NOW).leaf(["evil.example"])
    ok, why = verified(tmp_path, greedy, name="evil.example")
    assert not ok
    assert "permitted subtree violation" in why


def test_a_chain_for_names_constrains_no_addresses_since_boringssl_rejects_those(ca):
    leaf = ca.certify(snapshot(Endpoint("https", "api.example", 443)), ["localhost"], NOW).hosts["api.example"]
    intermediate = x509.load_pem_x509_certificates(leaf.chain.encode())[1]
    constraints = intermediate.extensions.get_extension_for_class(x509.NameConstraints)
    assert constraints.critical
    assert [type(each) for each in constraints.value.permitted_subtrees] == [x509.DNSName]


def test_an_address_is_constrained_to_itself(ca):
    leaf = ca.certify(snapshot(Endpoint("https", "10.0.0.1", 443)), ["localhost"], NOW).addresses
    intermediate = x509.load_pem_x509_certificates(leaf.chain.encode())[1]
    [only] = intermediate.extensions.get_extension_for_class(x509.NameConstraints).value.permitted_subtrees
    assert only.value == ipaddress.ip_network("10.0.0.1/32")


def test_nothing_declared_means_nothing_certified(ca):
    made = ca.certify(snapshot(), ["localhost"], NOW)
    assert (made.hosts, made.addresses) == ({}, None)


def test_the_root_stays_across_starts_and_its_key_is_for_its_owner_alone(ca, tmp_path):
    again = PlatformCA(tmp_path / "ca.key", tmp_path / "ca.pem", NOW + 1)
    assert again.certificate == ca.certificate
    assert (tmp_path / "ca.key").stat().st_mode & 0o777 == 0o600


def test_a_certificate_that_is_not_the_keys_is_refused(ca, tmp_path):
    (tmp_path / "ca.key").unlink()
    with pytest.raises(KeyFileError, match="is not the certificate of"):
        PlatformCA(tmp_path / "ca.key", tmp_path / "ca.pem", NOW)


def test_a_key_that_others_can_read_is_refused(tmp_path):
    ed25519(tmp_path / "k")
    (tmp_path / "k").chmod(0o640)
    with pytest.raises(KeyFileError, match="can be read by others"):
        ed25519(tmp_path / "k")


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_a_key_file_that_holds_no_key_is_refused(tmp_path, content):
    (tmp_path / "k").touch(0o600)
    (tmp_path / "k").write_bytes(content)
    with pytest.raises(KeyFileError, match="is no private key"):
        ed25519(tmp_path / "k")


def test_a_key_of_another_kind_is_refused(ca, tmp_path):
    with pytest.raises(KeyFileError, match="holds no Ed25519 key"):
        ed25519(tmp_path / "ca.key")


def test_a_leafs_private_key_is_its_own(ca):
    leaf = ca.certify(snapshot(Endpoint("https", "api.example", 443)), ["localhost"], NOW).hosts["api.example"]
    certificate = x509.load_pem_x509_certificate(leaf.chain.encode())
    assert load_pem_private_key(leaf.key.encode(), None).public_key() == certificate.public_key()
    assert leaf.key not in repr(leaf)
