"""AWS's side of a signature, written from its description with nothing of botocore: a request as it arrived, told right or wrong.

https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html
"""

import calendar
import hashlib
import hmac
import re
import time
from urllib.parse import quote, unquote, unquote_plus

_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=(?P<key>\w+)/(?P<day>\d{8})/(?P<region>[\w-]+)/(?P<service>[\w-]+)/aws4_request, "
    r"SignedHeaders=(?P<signed>[a-z0-9;-]+), Signature=(?P<signature>[0-9a-f]{64})"
)
WINDOW_S = 300


def refusal(request, *, keys, now):
    """Why AWS refuses a request (method, target, headers, body), or None.

    `keys` maps an access key ID to its secret key and session token (or None).
    """
    method, target, headers, body = request
    headers = {name.lower(): value for name, value in headers}
    found = _AUTHORIZATION.fullmatch(headers.get("authorization", ""))
    if not found or found["key"] not in keys:
        return "InvalidClientTokenId"
    secret, token = keys[found["key"]]
    if headers.get("x-amz-security-token") != token:
        return "InvalidClientTokenId"
    signed = found["signed"].split(";")
    wanted = {"host", *(name for name in headers if name.startswith("x-amz-") or name == "content-type")}
    if not wanted <= set(signed) or signed != sorted(signed):
        return "HeadersNotSigned"
    stamp = headers.get("x-amz-date", "")
    if not stamp.startswith(found["day"]) or abs(calendar.timegm(time.strptime(stamp, "%Y%m%dT%H%M%SZ")) - now) > WINDOW_S:
        return "RequestTimeTooSkewed"
    digest = hashlib.sha256(body).hexdigest()
    s3 = found["service"] == "s3"
    if s3 and headers.get("x-amz-content-sha256") != digest:
        return "XAmzContentSHA256Mismatch"
    path, _, query = target.partition("?")
    canonical = "\n".join(
        [
            method,
            quote(unquote(path), safe="/-_.~") if s3 else quote(path, safe="/-_.~"),
            "&".join(sorted(_pair(pair) for pair in query.split("&") if pair)),
            *(f"{name}:{' '.join(headers[name].split())}" for name in signed),
            "",
            found["signed"],
            digest,
        ]
    )
    scope = f"{found['day']}/{found['region']}/{found['service']}/aws4_request"
    key = f"AWS4{secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    right = hmac.compare_digest(hmac.new(key, text.encode(), "sha256").hexdigest(), found["signature"])
    return None if right else "SignatureDoesNotMatch"


def _pair(pair):
    name, _, value = pair.partition("=")
    return "=".join(quote(unquote_plus(part), safe="-_.~") for part in (name, value))
