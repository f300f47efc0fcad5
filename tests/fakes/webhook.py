"""A receiver of webhooks that believes nothing: signature, time, ID and payload, by Standard Webhooks 1.0.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import base64
import hashlib
import hmac
import json
import re

from fakes.serving import Refused, Server

KEY = b"standard-webhooks-key-of-32-byte"
SECRET = "whsec_" + base64.b64encode(KEY).decode()
TOLERANCE_S = 300


class Webhook(Server):
    """`accepted` maps an ID to its payload: what comes again under its ID is taken once, and must be the same."""

    def __init__(self, key=KEY):
        super().__init__()
        self.key = key
        self.accepted = {}

    @property
    def inbox(self):
        return f"{self.url}/alerts"

    @property
    def payloads(self):
        return list(self.accepted.values())

    def answer(self, method, path, headers, body):
        identity, time = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
        if (method, path) != ("POST", "/alerts"):
            raise Refused(404, None)
        if headers.get("content-type") != "application/json":
            raise Refused(415, None)
        if not identity or "." in identity or not time.isdecimal() or abs(int(time) - self.now) > TOLERANCE_S:
            raise Refused(400, {"error": "no ID, or not now"})
        mac = hmac.new(self.key, f"{identity}.{time}.".encode() + body, hashlib.sha256).digest()
        given = [text.partition(",") for text in headers.get("webhook-signature", "").split(" ")]
        if not any(version == "v1" and hmac.compare_digest(base64.b64decode(text), mac) for version, _, text in given):
            raise Refused(401, {"error": "not signed with the key"})
        payload = json.loads(body)
        if set(payload) != {"type", "timestamp", "data"} or not re.fullmatch(r"[a-zA-Z0-9_]+(\.[a-zA-Z0-9_]+)+", payload["type"]):
            raise Refused(422, {"error": "not of the payload structure"})
        if self.accepted.setdefault(identity, payload) != payload:
            raise Refused(409, {"error": "another payload under a known ID"})
        return 204, None
