"""The chain on disk: segments of lines, each tied to the one before, and the signed checkpoint that holds its end.

Laws: a line is the canonical record and a newline; `hash` is the SHA-256 of the record without it, `prev_hash` the one before
(64 zeros for the first). The chain finds every change but a rewrite from some point to its end; against that stands the
checkpoint, signed with a key that whoever rewrites the log must not have. What was appended after the last checkpoint (a second's
worth) can be cut off unseen, and so can the whole folder: who needs more keeps a copy of the checkpoint elsewhere.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jwt
import orjson
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from broker.audit.record import canonical

ZERO = "0" * 64
MAX_LINE = 1_048_576  # bytes; sixty times what a record with full args takes, so a longer line is damage
CHECKPOINT = "checkpoint.jwt"


@dataclass(frozen=True, slots=True)
class Link:
    """What ties one record into the chain."""

    seq: int
    prev_hash: str
    hash: str


START = Link(0, ZERO, ZERO)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """That the chain had the record `seq`, with this hash, at this time (RFC 3339)."""

    seq: int
    hash: str
    time: str

    def sign(self, key: Ed25519PrivateKey) -> str:
        """The file's content: a JWT (RFC 7519; EdDSA, RFC 8037)."""
        return jwt.encode(asdict(self), key, algorithm="EdDSA")

    @classmethod
    def read(cls, directory: Path, key: Ed25519PublicKey | None) -> "Checkpoint | None":
        """The folder's checkpoint, None where there is none; its signature is checked if there is a key. Raises `ValueError`."""
        try:
            text = (directory / CHECKPOINT).read_bytes()
            # Without a key there is nothing to check with, and whoever asks is told so.
            value = jwt.decode(text, key or "", algorithms=["EdDSA"], options={"verify_signature": key is not None})
            return cls(int(value["seq"]), str(value["hash"]), str(value["time"]))
        except FileNotFoundError:
            return None
        except jwt.InvalidSignatureError:
            raise ValueError("the checkpoint is not signed by this broker's key") from None
        except (jwt.PyJWTError, ValueError, TypeError, KeyError, OverflowError) as error:
            raise ValueError(f"the checkpoint can't be read ({error!r})") from None


def record_hash(record: Mapping[str, Any]) -> str:
    """Lower-case hex SHA-256 over the canonical record without `hash`."""
    return hashlib.sha256(canonical({key: value for key, value in record.items() if key != "hash"})).hexdigest()


def read_link(line: bytes) -> tuple[Link | None, str]:
    """What a line says of itself, if anything, and what is wrong with the line, if anything."""
    if not line.endswith(b"\n"):
        return None, "the line is incomplete"
    try:
        record = orjson.loads(line)
        same = canonical(record) == line[:-1]
    except (ValueError, TypeError):
        return None, "the line is not JSON"
    if not isinstance(record, dict) or type(record.get("seq")) is not int or not isinstance(record.get("prev_hash"), str):
        return None, "the line is not an audit record"
    link = Link(record["seq"], record["prev_hash"], str(record.get("hash")))
    if not same:
        return link, "the line is not canonical JSON, so the broker did not write it"
    if link.hash != record_hash(record):
        return link, f"record {link.seq} does not have the hash it states: it was edited"
    return link, ""


def segment_name(first_seq: int) -> str:
    """The file that begins with this record; names sort as the records do."""
    return f"{first_seq:020}.jsonl"


def segments(directory: Path) -> list[tuple[Path, int]]:
    """The segments in order, each with its size in bytes at this moment. Raises `OSError`."""
    os.scandir(directory).close()  # `glob` finds nothing where it may not read, and that must not look like an empty record
    return [(path, path.stat().st_size) for path in sorted(directory.glob("*.jsonl"))]


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a segment, each with its newline; what has none is the last, and damage or not yet whole."""
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE):
            yield line
            if not line.endswith(b"\n"):
                return


def notices(directory: Path) -> Iterator[dict[str, Any]]:
    """The records that hold a notice, oldest first: what was done about agents, and said of calls that wait."""
    found = (line for path, _ in segments(directory) for line in lines(path))
    return (orjson.loads(line) for line in found if b'"notice":{' in line and line.endswith(b"\n"))


def backwards(found: Sequence[tuple[Path, int]]) -> Iterator[bytes]:
    """Whole lines of these segments from the last one on, without their newlines."""
    for path, _ in reversed(found):
        yield from reversed([line[:-1] for line in lines(path) if line.endswith(b"\n")])
