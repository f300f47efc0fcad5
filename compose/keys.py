"""What each container of the stack must find before it starts, laid into the volumes below FOLDER: `keys.py FOLDER`.

Keys, certificates and Redis's password are made once and kept; the agent's token, which lasts an hour, is made each time.

Laws: each volume gets what its container needs and no more; the agent's has a token and no key. All belongs to the one user that
everything here runs as.
"""

import os
import secrets
import sys
from contextlib import suppress
from pathlib import Path

from broker import clock
from broker.demo.tools import certify
from broker.demo.tour import AGENT
from broker.identity import TokenAuthority
from broker.keys import ed25519, write_private
from broker.pki import PlatformCA

USER = 10001
HOSTS = ["payments.acme.example", "wiki.acme.example"]
# What all processors share. The keys of its own record and outbox, each makes itself.
SHARED = ("ca.pem", "keys/ca.key", "keys/jwt.key", "keys/tokens.key", "redis-password")


def lay(volumes: Path, now: float) -> None:
    """Fill the volumes; each is a folder of that name."""
    first, *others = sorted(volumes.glob("processor-*"))
    for processor in (first, *others):
        (processor / "keys").mkdir(mode=0o700, exist_ok=True)
    PlatformCA(first / "keys/ca.key", first / "ca.pem", now)
    ed25519(first / "keys/jwt.key")
    tokens = TokenAuthority(ed25519(first / "keys/tokens.key"))
    password = first / "redis-password"
    if not password.exists():
        write_private(password, secrets.token_urlsafe(32).encode())
    for processor in others:
        for name in SHARED:
            write_private(processor / name, (first / name).read_bytes())
    write_private(volumes / "redis/redis.conf", f"requirepass {password.read_text()}\n".encode())
    certify(volumes / "tools/tools.pem", volumes / "tools-ca/tools.pem", volumes / "tools/ca.key", HOSTS, now)
    write_private(volumes / "agent/ca.pem", (first / "ca.pem").read_bytes())
    write_private(volumes / "agent/token", tokens.mint(AGENT, now).encode())
    for path in volumes.rglob("*"):
        with suppress(FileNotFoundError):  # a processor that runs writes there, by drafts that it renames
            os.chown(path, USER, USER, follow_symlinks=False)


if __name__ == "__main__":
    lay(Path(sys.argv[1]), clock.now())
