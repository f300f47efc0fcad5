"""SigV4: AWS's signature over one request, by botocore's signer.

Laws: the time is given, so signing is a pure function. Signed is what nobody changes on the way: method, path, query, host,
content-type, the body's hash, and what is added here. A query is signed as the policy read it (`+` is a space): an upstream that
reads it otherwise refuses the call.
"""

import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import parse_qsl, quote, unquote_to_bytes

from botocore.auth import SIGV4_TIMESTAMP, S3SigV4Auth, SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from broker.credentials.base import Outgoing, Secret

# At DEBUG, botocore writes out what it signs and what STS answers.
logging.getLogger("botocore").setLevel(logging.INFO)


class _Timed(SigV4Auth):  # type: ignore[misc]  # botocore has no types
    """As botocore's own, but at the time in the request's context: botocore reads the clock."""

    def add_auth(self, request: AWSRequest) -> None:
        self._modify_request_before_signing(request)
        text = self.string_to_sign(request, self.canonical_request(request))
        self._inject_signature_to_request(request, self.signature(text, request))


class _TimedS3(_Timed, S3SigV4Auth):  # type: ignore[misc]
    """S3's variant: the path as it is, and the body's hash in a header of its own."""


_KINDS = {"s3": _TimedS3, "s3-outposts": _TimedS3, "s3-object-lambda": _TimedS3}


@dataclass(frozen=True, slots=True)
class Signer:
    """One set of keys for one service in one region. `ahead` is how many seconds AWS's clock is ahead of ours.

    Called with a request and our time, it gives the headers to set on it.
    """

    access_key: str
    secret_key: Secret
    token: Secret | None
    service: str
    region: str
    ahead: float = field(default=0.0)

    def __call__(self, outgoing: Outgoing, now: float) -> tuple[tuple[str, Secret], ...]:
        """`authorization`, `x-amz-date`, `x-amz-security-token` for a session, and `x-amz-content-sha256` for S3."""
        keys = Credentials(self.access_key, self.secret_key.reveal(), self.token.reveal() if self.token else None)
        url, _, query = outgoing.url.partition("?")
        # AWS signs what a path means, so each octet in one spelling, however it was sent ("+" and "%2B" are the same object).
        scheme, _, rest = url.partition("://")
        host, slash, path = rest.partition("/")
        segments = (quote(unquote_to_bytes(part), safe="-_.~") for part in path.split("/"))
        url = f"{scheme}://{host}{slash}{'/'.join(segments)}"
        sent = {name: value for name, value in outgoing.headers if name == "content-type"}
        pairs = parse_qsl(query, keep_blank_values=True)
        request = AWSRequest(outgoing.method, url, headers=dict(sent), data=outgoing.body, params=pairs)
        request.context["timestamp"] = datetime.fromtimestamp(now + self.ahead, UTC).strftime(SIGV4_TIMESTAMP)
        _KINDS.get(self.service, _Timed)(keys, self.service, self.region).add_auth(request)
        return tuple((name.lower(), Secret(value)) for name, value in request.headers.items() if name not in sent)
