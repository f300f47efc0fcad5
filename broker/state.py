"""The state folder: what a broker keeps on disk, and where.

    STATE/ca.pem              the platform CA's certificate; agents read it
    STATE/keys/               private keys, each 0600
    STATE/audit/              the record
    STATE/review.db           an index of the record, and reviewers' labels; made again from the record where it is missing
    STATE/ledger.json         what was spent, as of a moment ago; made again from the record where it is missing
    STATE/outbox              credentials that are to be taken back at their issuers, sealed
    STATE/hung.txt            where a processor was that hung, and was ended
    STATE/run/                sockets and Envoy's bootstrap, gone with the broker

Law: the folders are 0700. A Unix socket's path must fit 107 bytes (unix(7)); where STATE is too deep, `run` lies in the system's
folder for temporary files, under a name that only this STATE has.
"""

import contextlib
import hashlib
import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

from broker.errors import BrokerError, UsageError
from broker.keys import write_private

_SOCKET_BYTES = 107
_PROBE_S = 1.0


@dataclass(frozen=True, slots=True)
class State:
    """One state folder. All paths are absolute."""

    root: Path
    ca: Path
    keys: Path
    audit: Path
    ledger: Path
    outbox: Path
    alerts: Path
    run: Path
    processor_socket: Path  # ext_proc, ext_authz, ADS and access logs
    control_socket: Path  # the admin API's changing half
    envoy_admin_socket: Path  # Envoy's own admin API

    @classmethod
    def at(cls, folder: Path, shared: Path | None = None, processor: str = "processor") -> "State":
        """The folder, made if it is missing. Raises `BrokerError`.

        `shared` is where the sockets between Envoy and its processors lie, if not in `run`; `processor` is this one's name there.
        """
        root = folder.resolve()
        run = root / "run"
        if len(os.fsencode(run / "envoy-admin.sock")) > _SOCKET_BYTES:
            digest = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
            run = Path(tempfile.gettempdir()) / f"broker-{os.getuid()}-{digest}"
        between = (shared or run).resolve()
        sockets = (between / f"{processor}.sock", run / "control.sock", between / "envoy-admin.sock")
        keys, audit, ledger, outbox, alerts = (root / name for name in ("keys", "audit", "ledger.json", "outbox", "alerts"))
        state = cls(root, root / "ca.pem", keys, audit, ledger, outbox, alerts, run, *sockets)
        try:
            if not root.exists():
                root.mkdir(parents=True)
                write_private(root / ".gitignore", b"*\n")  # keys and the record are nothing to commit
            for path in (state.keys, state.audit, run, between):
                path.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise BrokerError(f"the state folder {root} can't be used ({error.strerror})", "name another with --state") from error
        for path in (run, between):
            if path.stat().st_uid != os.getuid():
                raise BrokerError(f"{path} belongs to another user", "remove it, or name another")
        if too_long := next((path for path in sockets if len(os.fsencode(path)) > _SOCKET_BYTES), None):
            raise BrokerError(f"{too_long} is too long for a socket, by its {_SOCKET_BYTES} bytes", "name a folder less deep")
        return state

    @property
    def in_use(self) -> bool:
        """Whether a broker runs on this folder."""
        return _served(self.control_socket)

    def join(self, keys: str, own: str) -> None:
        """Take this processor's place among those behind one Envoy.

        `keys` names the keys that all of them must have, `own` the one of its record, which no other may have. Raises
        `UsageError` where another serves in its place, or those beside it have other keys, or its own.
        """
        if _served(self.processor_socket):
            raise UsageError(f"another processor serves at {self.processor_socket}", "name each by --processor")
        folder, told = self.processor_socket.parent, self.processor_socket.with_name("keys")
        beside = [path for path in folder.glob("*.sock") if path != self.envoy_admin_socket and _served(path)]
        if beside and _read(told) not in ("", keys):
            what = "ca.pem and keys/ca.key, keys/jwt.key and keys/tokens.key"
            raise UsageError(f"this processor has other keys than {beside[0].stem}, which serves beside it", f"copy its {what}")
        if twin := next((path for path in beside if _read(path.with_suffix(".id")) == own), None):
            advice = "give each a keys/audit.key of its own: it makes one where there is none"
            raise UsageError(f"this processor has the record's key of {twin.stem}, which serves beside it", advice)
        write_private(told, keys.encode())
        write_private(self.processor_socket.with_suffix(".id"), own.encode())


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""


def _served(path: Path) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_S)
        probe.connect(str(path))
        return True
    return False
