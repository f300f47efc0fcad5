"""Private keys on disk: made at first need, mode 0600, in a folder of mode 0700.

Law: a key file that others can read is refused, not repaired: someone may have read it already.
"""

import os
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.errors import BrokerError

_OTHERS = 0o077


class KeyFileError(BrokerError):
    """A key file can't be used as it is."""


def write_private(path: Path, content: bytes) -> None:
    """Write a file of mode 0600 in one step: readers see the old content or the new one, never a part."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    draft.rename(path)


def ed25519(path: Path) -> Ed25519PrivateKey:
    """The Ed25519 key at `path`, made if it is missing. Raises `KeyFileError`."""
    key: Ed25519PrivateKey = _loaded(path, Ed25519PrivateKey, "Ed25519") or _written(path, Ed25519PrivateKey.generate())
    return key


def p256(path: Path) -> EllipticCurvePrivateKey:
    """The P-256 key at `path`, made if it is missing. Raises `KeyFileError`."""
    key: EllipticCurvePrivateKey = _loaded(path, EllipticCurvePrivateKey, "P-256") or _written(path, fresh_p256())
    return key


def fernet(path: Path) -> Fernet:
    """What seals with the key at `path`, made if it is missing. Raises `KeyFileError`."""
    if not path.exists():
        write_private(path, Fernet.generate_key())
    try:
        return Fernet(_private(path))
    except ValueError as error:
        raise KeyFileError(f"{path} holds no Fernet key", "move it away to have a new one made") from error


def fresh_p256() -> EllipticCurvePrivateKey:
    """A new P-256 key, in memory alone."""
    return generate_private_key(SECP256R1())


def pem(key: Ed25519PrivateKey | EllipticCurvePrivateKey) -> bytes:
    """PKCS 8, unencrypted: the file's mode protects it."""
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def public_pem(key: Ed25519PrivateKey) -> bytes:
    """SubjectPublicKeyInfo."""
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _written(path: Path, key: Any) -> Any:
    write_private(path, pem(key))
    return key


def _loaded(path: Path, kind: type, name: str) -> Any:
    if not path.exists():
        return None
    content = _private(path)
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except ValueError as error:
        raise KeyFileError(f"{path} is no private key ({error})", "move it away to have a new one made") from error
    if not isinstance(key, kind):
        raise KeyFileError(f"{path} holds no {name} key", "move it away to have a new one made")
    return key


def _private(path: Path) -> bytes:
    if path.stat().st_mode & _OTHERS:
        raise KeyFileError(f"{path} can be read by others", "replace the key, or chmod 600 it if you know nobody read it")
    return path.read_bytes()
