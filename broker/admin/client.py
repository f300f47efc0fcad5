"""HTTP over a Unix socket, for verbs that speak to a running broker and for Envoy's own admin API."""

import http.client
import json
import socket
from pathlib import Path
from typing import Any

from broker.errors import BrokerError

_TIMEOUT_S = 5.0


class UnixConnection(http.client.HTTPConnection):
    """An HTTP connection to a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        """Open the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(str(self._path))


def fetch(path: Path, method: str, target: str) -> tuple[int, bytes]:
    """One request; status and body. Raises `OSError` also for an answer that is no HTTP."""
    connection = UnixConnection(path)
    try:
        connection.request(method, target)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except http.client.HTTPException as error:
        raise OSError(str(error)) from error
    finally:
        connection.close()


class Control:
    """The control socket of the broker that has this state, if one runs."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def ask(self, method: str, target: str) -> dict[str, Any] | None:
        """The answer's document; None when no broker runs here. Raises `BrokerError` when it could not do what was asked."""
        try:
            status, body = fetch(self._path, method, target)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except OSError as error:
            raise BrokerError(f"the broker does not answer on {self._path} ({error})", "see its log") from error
        document: dict[str, Any] = json.loads(body or b"{}")
        if status >= http.client.INTERNAL_SERVER_ERROR:
            raise BrokerError(f"the broker could not do it: {document.get('error', status)}", "see its log")
        return document
