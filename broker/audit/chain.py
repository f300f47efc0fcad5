"""The chain on disk: segments of lines, each tied to the one before, and the signed checkpoint that holds its end.

Laws: a line is the canonical record and a newline; `hash` is the SHA-256 of the record without it, `prev_hash` the one before
(64 zeros for the first). The chain finds every change but a rewrite from some point to its end; against that stands the
checkpoint, signed with a key that whoever rewrites the log must not have. What was appended after the last checkpoint (a second's
worth) can be cut off unseen, and so can the whole folder: who needs more keeps a copy of the checkpoint elsewhere.
"""

import base64
import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import orjson
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from broker.audit.record import canonical, timestamp

ZERO = "0" * 64
MAX_LINE = 1_048_576  # bytes; sixty times what a record with full args takes, so a longer line is damage
CHECKPOINT = "checkpoint.json"
LOCK = ".lock"
_CHECKPOINT_SCHEMA = "broker.audit.checkpoint/v1"


@dataclass(frozen=True, slots=True)
class Link:
    """What ties one record into the chain."""

    seq: int
    prev_hash: str
    hash: str


START = Link(0, ZERO, ZERO)


def record_hash(record: Mapping[str, Any]) -> str:
    """Lower-case hex SHA-256 over the canonical record without `hash`."""
    return hashlib.sha256(canonical({key: value for key, value in record.items() if key != "hash"})).hexdigest()


def read_link(line: bytes) -> Link:
    """The link of one line (without its newline). Raises `ValueError` saying what is wrong with the line."""
    try:
        record = orjson.loads(line)
        same = canonical(record) == line
    except (ValueError, TypeError):
        raise ValueError("the line is not JSON") from None
    if not isinstance(record, dict) or type(record.get("seq")) is not int or not isinstance(record.get("prev_hash"), str):
        raise ValueError("the line is not an audit record")
    if not same:
        raise ValueError("the line is not canonical JSON, so the broker did not write it")
    found = record_hash(record)
    if record.get("hash") != found:
        raise ValueError(f"record {record['seq']} does not have the hash it states: it was edited")
    return Link(record["seq"], record["prev_hash"], found)


def claimed_link(line: bytes) -> Link | None:
    """What a line says of itself, true or not; None where it says nothing."""
    try:
        record = orjson.loads(line)
        return Link(int(record["seq"]), str(record["prev_hash"]), str(record["hash"]))
    except (ValueError, TypeError, KeyError):
        return None


def segment_name(first_seq: int) -> str:
    """The file that begins with this record; names sort as the records do."""
    return f"{first_seq:020}.jsonl"


def segments(directory: Path) -> list[tuple[Path, int]]:
    """The segments in order, each with its size in bytes at this moment."""
    return [(path, path.stat().st_size) for path in sorted(directory.glob("*.jsonl"))]


def whole_lines(path: Path, size: int) -> int:
    """The offset behind the last newline among the first `size` bytes. Touches the end of the file only."""
    if not size:
        return 0
    with path.open("rb") as file, mmap(file.fileno(), size, access=ACCESS_READ) as view:
        return view.rfind(b"\n") + 1


def backwards(found: Sequence[tuple[Path, int]]) -> Iterator[bytes]:
    """Whole lines from the last one on, without their newlines, as lazily as they are asked for."""
    for path, size in reversed(found):
        if not size:
            continue
        with path.open("rb") as file, mmap(file.fileno(), size, access=ACCESS_READ) as view:
            end = view.rfind(b"\n")
            while end >= 0:
                start = view.rfind(b"\n", 0, end) + 1
                yield view[start:end]
                end = start - 1


def is_live(directory: Path) -> bool:
    """Whether a broker has this log open."""
    try:
        lock = os.open(directory / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """That the chain had this record, with this hash, at this time."""

    seq: int
    hash: str
    time: str
    key_id: str
    signature: bytes

    @classmethod
    def sign(cls, head: Link, now: float, key: Ed25519PrivateKey) -> "Checkpoint":
        """The checkpoint of a chain that ends with `head`."""
        bare = cls(head.seq, head.hash, timestamp(now), key_id(key.public_key()), b"")
        return cls(bare.seq, bare.hash, bare.time, bare.key_id, key.sign(bare.signed_bytes()))

    @classmethod
    def read(cls, directory: Path) -> "Checkpoint | None":
        """The folder's checkpoint; None where there is no such file. Raises `ValueError` where it is not a checkpoint."""
        try:
            value = orjson.loads((directory / CHECKPOINT).read_bytes())
            signature = base64.b64decode(value["signature"], validate=True)
            return cls(int(value["seq"]), str(value["hash"]), str(value["time"]), str(value["key_id"]), signature)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"the checkpoint can't be read ({error!r})") from None

    def check(self, key: Ed25519PublicKey) -> None:
        """Raises `ValueError` unless this key signed it (RFC 8032)."""
        try:
            key.verify(self.signature, self.signed_bytes())
        except InvalidSignature:
            other = f", but by {self.key_id}" if self.key_id != key_id(key) else ""
            raise ValueError(f"the checkpoint is not signed by the key {key_id(key)}{other}") from None

    def signed_bytes(self) -> bytes:
        """What the signature is over: all else, canonical; the schema in it keeps it from being taken for anything else."""
        return canonical(self._fields())

    def to_json(self) -> bytes:
        """The file's content."""
        return canonical({**self._fields(), "signature": base64.b64encode(self.signature).decode()}) + b"\n"

    def _fields(self) -> dict[str, Any]:
        return {"schema": _CHECKPOINT_SCHEMA, "seq": self.seq, "hash": self.hash, "time": self.time, "key_id": self.key_id}


def key_id(key: Ed25519PublicKey) -> str:
    """A short name of a public key: the first 16 hex digits of the SHA-256 of its SubjectPublicKeyInfo."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()[:16]
