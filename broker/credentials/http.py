"""HTTP to issuers: TLS by the system's roots or a file's, one answer of bounded size, and nothing else.

Laws: no redirect is followed and no proxy is used, so that what goes out goes to the URL that is written. What an issuer says is
not repeated but for its error's code, for it could hold what it was sent.
"""

import asyncio
import math
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx2
from pydantic import Field

from broker.credentials.base import CredentialUnavailable
from broker.credentials.settings import MAX_ANSWER, document
from broker.manifest.words import PemFile

_TIMEOUT_S = 10.0
_REDIRECTS = range(300, 400)


Roots = Annotated[PemFile, Field(description="{file: PATH}: a PEM file of trust roots, in place of the system's.")]


@dataclass(frozen=True, slots=True)
class Answer:
    """What an issuer answered. `document` is empty where the body is no JSON object; `date` is its clock, in seconds."""

    status: int
    document: Mapping[str, Any] = field(repr=False)
    date: float | None = None
    content: bytes = field(default=b"", repr=False)

    @property
    def ok(self) -> bool:
        """Whether the issuer did what it was asked."""
        return 200 <= self.status < 300  # noqa: PLR2004 - RFC 9110 section 15.3

    def left(self, ends: Any) -> float:
        """The seconds to a time (RFC 3339) by the issuer's own clock. Raises `CredentialUnavailable`."""
        try:
            return (datetime.fromisoformat(ends) - datetime.fromtimestamp(self.date or math.inf, UTC)).total_seconds()
        except (TypeError, ValueError, OverflowError):
            what = "the answer does not say when the credential ends, or what time it is there"
            raise CredentialUnavailable(what, "see whether the URL is the issuer's") from None


async def ask(  # noqa: PLR0913 - a request has as many parts
    method: str,
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    form: Mapping[str, Any] | None = None,
    body: Any = None,
    content: bytes | None = None,
    ca: Roots | None = None,
) -> Answer:
    """The answer to one request with a form, a JSON `body` or other `content`. Raises `CredentialUnavailable`."""
    where, file = urlsplit(url).netloc, ca["file"] if ca else None
    try:
        context = await asyncio.to_thread(_context, file)
    except (OSError, ValueError) as error:
        what = f"the trust roots for {where} can't be read ({type(error).__name__})"
        raise CredentialUnavailable(what, f"see {file}") from None
    sent = {"accept": "application/json", "accept-encoding": "identity", **(headers or {})}
    client = httpx2.AsyncClient(verify=context, trust_env=False, follow_redirects=False, timeout=_TIMEOUT_S)
    try:
        async with client, client.stream(method, url, headers=sent, data=form, json=body, content=content) as response:
            received = b""
            async for part in response.aiter_raw():  # undecoded: a small answer can't grow
                received += part
                if len(received) > MAX_ANSWER:
                    raise CredentialUnavailable(f"{where} answers too much", "see whether the URL is right")
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        # Of these, the text of a failed connection alone can't hold what was to be sent.
        why = f"{type(error).__name__}{f': {error}' if isinstance(error, httpx2.ConnectError) else ''}"
        what = f"{where} can't be reached ({why})"
        raise CredentialUnavailable(what, "see whether it is up, and its certificate trusted") from None
    if response.status_code in _REDIRECTS:
        raise CredentialUnavailable(f"{where} redirects, which is not followed", "write the URL that it leads to")
    return Answer(response.status_code, document(received), _date(response.headers.get("date", "")), received)


def _context(ca: str | None) -> ssl.SSLContext:
    return _read(ca, Path(ca).stat().st_mtime_ns if ca else 0)


@lru_cache(maxsize=64)
def _read(ca: str | None, _: int) -> ssl.SSLContext:
    # Reading the system's roots takes tens of milliseconds; a file's time of change is part of the key.
    return ssl.create_default_context(cafile=ca)


def _date(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None
