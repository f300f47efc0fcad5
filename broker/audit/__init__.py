"""Evidence: what was decided, before it happened, and how it ended.

Law: a call whose decision is not in the log does not leave. So whoever decides holds an `AuditSink`, and its failure is a denial.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from broker.errors import BrokerError


class AuditUnavailable(BrokerError):
    """The record could not be written. The call it belongs to is denied; the next one may try again."""


class AuditTampered(BrokerError):
    """The log on disk is not the one that was signed. It is kept as it is, and no broker goes on writing to it."""


class AuditSink(Protocol):
    """Where records go. The exchange sees no more of the audit log than this."""

    def append(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """Write one record durably against a crash of this process; the record as written. Raises `AuditUnavailable`."""
