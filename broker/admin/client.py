"""HTTP over a Unix socket, for verbs that speak to a running broker and for Envoy's own admin API."""

import http.client
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from broker.errors import BrokerError, UsageError

_TIMEOUT_S = 5.0


def fetch(path: Path, method: str, target: str, body: bytes = b"") -> tuple[int, bytes]:
    """One request to the Unix socket at `path`; status and body. Raises `OSError` also for an answer that is no HTTP."""
    connection = http.client.HTTPConnection("localhost", timeout=_TIMEOUT_S)
    connection.sock = socket.socket(socket.AF_UNIX)
    try:
        connection.sock.settimeout(_TIMEOUT_S)
        connection.sock.connect(str(path))
        connection.request(method, target, body or None)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except http.client.HTTPException as error:
        raise OSError(str(error)) from error
    finally:
        connection.close()


class Refused(BrokerError):
    """The broker understood what was asked, and does not do it."""

    exit_code = 1


def ask(control_socket: Path, method: str, target: str, said: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The document that the broker with this socket answers, None when none runs; `target` is not yet percent-encoded.

    `said` goes along as JSON. Raises `UsageError` for what there is not, `Refused` for what can't be done now, and `BrokerError`
    when the broker could not do what was asked.
    """
    try:
        status, body = fetch(control_socket, method, quote(target), json.dumps(said).encode() if said else b"")
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except OSError as error:
        raise BrokerError(f"the broker does not answer on {control_socket} ({error})", "see its log") from error
    document: dict[str, Any] = json.loads(body)
    if status in _KINDS:
        raise _KINDS[status](document["error"])
    if status >= http.client.BAD_REQUEST:
        raise BrokerError(f"the broker could not do it: {document.get('error', status)}", "see its log")
    return document


_KINDS = {http.client.BAD_REQUEST: UsageError, http.client.NOT_FOUND: UsageError, http.client.CONFLICT: Refused}
