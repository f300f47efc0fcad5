"""The state folder: what a broker keeps on disk, and where.

    STATE/ca.pem              the platform CA's certificate; agents read it
    STATE/keys/               private keys, each 0600
    STATE/audit/              the record
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
from broker.keys import private_folder

_SOCKET_BYTES = 107
_LONGEST = "envoy-admin.sock"


@dataclass(frozen=True, slots=True)
class State:
    """One state folder; `root` is absolute."""

    root: Path

    @classmethod
    def at(cls, folder: Path) -> "State":
        """The folder, made if it is missing. Raises `BrokerError`."""
        root = folder.resolve()
        state = cls(root)
        try:
            root.mkdir(parents=True, exist_ok=True)
            for path in (state.keys, state.audit, state.run):
                private_folder(path)
        except OSError as error:
            raise BrokerError(f"the state folder {root} can't be used ({error.strerror})", "name another with --state") from error
        if state.run.stat().st_uid != os.getuid():
            raise BrokerError(f"{state.run} belongs to another user", "remove it, or name another --state")
        return state

    @property
    def ca(self) -> Path:
        """The CA certificate."""
        return self.root / "ca.pem"

    @property
    def keys(self) -> Path:
        """Private keys."""
        return self.root / "keys"

    @property
    def audit(self) -> Path:
        """The audit log."""
        return self.root / "audit"

    @property
    def run(self) -> Path:
        """Sockets."""
        near = self.root / "run"
        if len(os.fsencode(near / _LONGEST)) <= _SOCKET_BYTES:
            return near
        digest = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"broker-{os.getuid()}-{digest}"

    @property
    def processor_socket(self) -> Path:
        """ext_proc, ext_authz, ADS and access logs."""
        return self.run / "processor.sock"

    @property
    def control_socket(self) -> Path:
        """The admin API's changing half."""
        return self.run / "control.sock"

    @property
    def envoy_admin_socket(self) -> Path:
        """Envoy's own admin API."""
        return self.run / _LONGEST
