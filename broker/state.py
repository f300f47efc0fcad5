"""The state folder: what a broker keeps on disk, and where.

    STATE/ca.pem              the platform CA's certificate; agents read it
    STATE/keys/               private keys, each 0600
    STATE/audit/              the record
    STATE/review.db           an index of the record, and reviewers' labels; made again from the record where it is missing
    STATE/ledger.json         what was spent, as of a moment ago; made again from the record where it is missing
    STATE/outbox              credentials that are to be taken back at their issuers, sealed
    STATE/run/                sockets and Envoy's bootstrap, gone with the broker

Law: the folders are 0700. A Unix socket's path must fit 107 bytes (unix(7)); where STATE is too deep, `run` lies in the system's
folder for temporary files, under a name that only this STATE has.
"""

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from broker.errors import BrokerError

_SOCKET_BYTES = 107


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
    def at(cls, folder: Path) -> "State":
        """The folder, made if it is missing. Raises `BrokerError`."""
        root = folder.resolve()
        run = root / "run"
        if len(os.fsencode(run / "envoy-admin.sock")) > _SOCKET_BYTES:
            digest = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
            run = Path(tempfile.gettempdir()) / f"broker-{os.getuid()}-{digest}"
        sockets = (run / "processor.sock", run / "control.sock", run / "envoy-admin.sock")
        keys, audit, ledger, outbox, alerts = (root / name for name in ("keys", "audit", "ledger.json", "outbox", "alerts"))
        state = cls(root, root / "ca.pem", keys, audit, ledger, outbox, alerts, run, *sockets)
        try:
            root.mkdir(parents=True, exist_ok=True)
            for path in (state.keys, state.audit, run):
                path.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise BrokerError(f"the state folder {root} can't be used ({error.strerror})", "name another with --state") from error
        if run.stat().st_uid != os.getuid():
            raise BrokerError(f"{run} belongs to another user", "remove it, or name another --state")
        return state
