"""What the tests of all issuers that ask a server share: who asks, for what, and the ways in which a server fails them."""

import asyncio
import traceback

import pytest

from broker.credentials.base import CredentialUnavailable, Occasion
from broker.credentials.settings import problems
from broker.policy.snapshot import Agent, CredentialSpec, Endpoint, Operation, Tool
from broker.policy.types import Effect

PATIENCE_S = 1
NOW = 1_800_000_000.0
BOT = Agent("bot", "team payments & co", "primary", "a#", {}, spiffe="spiffe://acme.example/bot")


def occasion(settings, operation="items.list", effect=Effect.READ, *, pins=None, max_ttl=3600, run="run-7", **placed):  # noqa: PLR0913 - an occasion has as many parts
    """A call of an operation; no operation for housekeeping. `placed` is where the credential goes."""
    spec = CredentialSpec("issuer", settings, **placed)
    tool = Tool("api", "team", "rest", Endpoint("https", "api.example", 443), "t#", {})
    return Occasion(BOT, tool, operation and Operation(operation, effect, "t#"), spec, run, max_ttl, pins or {})


def done(kind, work):
    """What `work` gives, of a source of that kind, within the time that its leases would give it."""

    async def run():
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await work(kind())
        except TimeoutError:
            raise CredentialUnavailable("no answer in time", "wait") from None

    return asyncio.run(run())


def problems_of(kind, settings):
    return problems(kind.Settings, kind.name, settings)


def fetched(kind, asked, now=NOW):
    return done(kind, lambda source: source.fetch(asked, now))


def refused(kind, asked, now=NOW):
    """Why there is no credential: the message, and all that a log could show of it."""
    with pytest.raises(CredentialUnavailable) as caught:
        fetched(kind, asked, now)
    assert caught.value.advice
    return str(caught.value), "".join(traceback.format_exception(caught.value))


def _instead(status, body=b"", **headers):
    def fail(server):
        server.instead = (status, {name.replace("_", "-"): value for name, value in headers.items()}, body)

    return fail


FAULTS = [
    pytest.param(lambda server: server.hangs.set(), id="is slow"),
    pytest.param(_instead(500, b"{}"), id="fails"),
    pytest.param(_instead(503, b"<html>", retry_after="3"), id="is down for maintenance"),
    pytest.param(_instead(302, location="http://127.0.0.1:9/"), id="sends elsewhere"),
    pytest.param(_instead(200, b"\x00garbage" * 100), id="answers garbage"),
    pytest.param(_instead(201, b'["token"]'), id="answers another shape"),
    pytest.param(_instead(200, b"{}"), id="answers nothing"),
    pytest.param(_instead(200, b""), id="answers without a body"),
    pytest.param(_instead(201, b" " * (2 << 20)), id="answers without an end in sight"),
    pytest.param(_instead(200, b"x", content_encoding="gzip"), id="answers what can't be unpacked"),
    pytest.param(_instead(401, b'{"message": "SECRET-ECHO"}'), id="says 401"),
    pytest.param(_instead(403, b'{"message": "SECRET-ECHO"}'), id="says 403"),
    pytest.param(_instead(404, b'{"message": "SECRET-ECHO"}'), id="says 404"),
    pytest.param(_instead(422, b'{"message": "SECRET-ECHO"}'), id="says 422"),
    pytest.param(_instead(429, b'{"message": "SECRET-ECHO"}'), id="says 429"),
]
