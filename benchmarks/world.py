"""One agent, two tools and three calls, the same for everything that is measured.

The tools' entries are as long as real ones; the calls are what an agent's HTTP client sends, with 1,024 bytes of body or none.
"""

import json
from pathlib import Path
from typing import Any

from tests import stack

AGENT = "coder"
SECRET = "upstream-secret-of-usual-length-0123456789"
BODY_BYTES = 1024
ANSWER = json.dumps({"id": 1347, "state": "open", "title": "Duplicate charge", "url": "https://localhost/issues/1347"})
LIST, CREATE = "/repos/acme/web/issues?state=open&per_page=50", "/repos/acme/web/issues"

_TEXT = {"type": "string", "maxLength": 4096}
_ISSUE = {
    "type": "object",
    "required": ["title"],
    "properties": {
        "title": {"type": "string", "maxLength": 256},
        "body": _TEXT,
        "labels": {"type": "array", "items": {"type": "string"}, "maxItems": 20},
        "assignees": {"type": "array", "items": {"type": "string"}},
        "milestone": {"type": "integer"},
    },
    "additionalProperties": False,
}
_PLACE = {"properties": {"owner": {"type": "string"}, "repo": {"type": "string"}}}
_LIST = {"state": {"enum": ["open", "closed", "all"]}, "per_page": {"type": "integer", "maximum": 100}}
_REST = {
    "issues.create": {
        "match": {"method": "POST", "path": "/repos/{owner}/{repo}/issues"},
        "effect": "write",
        "data": ["source-code"],
        "params": {"path": _PLACE, "body": _ISSUE},
    },
    "issues.list": {
        "match": {"method": "GET", "path": "/repos/{owner}/{repo}/issues"},
        "effect": "read",
        "params": {"path": _PLACE, "query": {"properties": _LIST, "additionalProperties": False}},
    },
    "issues.get": {"match": {"method": "GET", "path": "/repos/{owner}/{repo}/issues/{number}"}, "effect": "read"},
    "pulls.list": {"match": {"method": "GET", "path": "/repos/{owner}/{repo}/pulls"}, "effect": "read"},
}
_SEARCH = {
    "type": "object",
    "required": ["query"],
    "properties": {"query": _TEXT, "space": {"type": "string"}, "limit": {"type": "integer", "maximum": 100}},
    "additionalProperties": False,
}
_MCP = {
    "search_pages": {"effect": "read", "data": ["internal"], "params": {"arguments": _SEARCH}},
    "delete_page": {"effect": "destructive"},
}
_OURS = {"params": {"path": {"properties": {"owner": {"const": "acme"}, "repo": {"enum": ["web", "payments"]}}}}}
_LOOPBACK = {"addresses": ["127.0.0.0/8", "::1/128"]}
_STATIC = {"issuer": "static", "secret": {"env": "BENCH_SECRET"}}


def _padded(document: dict[str, Any], inner: dict[str, Any], key: str) -> bytes:
    inner[key] = ""
    inner[key] = ("The customer was charged twice for one order. " * 30)[: BODY_BYTES - len(json.dumps(document))]
    return json.dumps(document).encode()


_fields: dict[str, Any] = {"title": "Duplicate charge on order 4711", "labels": ["bug", "payments"], "milestone": 7}
ISSUE = _padded(_fields, _fields, "body")
_arguments: dict[str, Any] = {"space": "payments", "limit": 20}
_message = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "search_pages", "arguments": _arguments}}
SEARCH = _padded(_message, _arguments, "query")


# Eight that bear on each write, and that no run reaches: a bucket, windows, open calls and a run; of the operation's team, too.
_MUCH = "999M/day"
_LIMITS = {
    "rate": "999M/s", "concurrency": 100_000, "writes": _MUCH, "bytes_out": "999999GiB/day", "steps_per_run": 10**9,
    "identical_per_run": 10**9,
}  # fmt: skip
_TEAM = {"teams": {"team-test": {"ceilings": {"calls": _MUCH}}}}


def documents(http: int, https: int, ca: str, *, limits: bool = False) -> list[dict[str, Any]]:
    """The manifests, for upstreams at these ports; `ca` is a file beside them, empty for none. Nobody listens for the wiki.

    With `limits`, eight bear on each call that writes.
    """
    trusted = {"ca": ca, **_LOOPBACK} if ca else _LOOPBACK
    bounds = {"limits": _LIMITS} if limits else {}
    shared = {"limits": {"calls": _MUCH}} if limits else {}
    return [
        stack.platform(**(_TEAM if limits else {})),
        stack.tool("plain", f"http://127.0.0.1:{http}", _REST, upstream=_LOOPBACK, credential=_STATIC),
        stack.tool("secure", f"https://localhost:{https}", _REST, upstream=trusted, credential=_STATIC),
        stack.tool("wiki", "http://127.0.0.1:9/mcp", _MCP, protocol="mcp", upstream=_LOOPBACK),
        stack.agent(
            AGENT,
            {
                **{
                    name: {"operations": {"issues.create": _OURS, "issues.list": _OURS}, **shared} for name in ("plain", "secure")
                },
                "wiki": {"operations": {"search_pages": {}}, **shared},
            },
            **bounds,
        ),
    ]


def headers(host: str, body: bytes) -> list[tuple[str, str]]:
    """What the official clients send, by and large."""
    found = [
        ("host", host),
        ("accept", "application/vnd.github+json"),
        ("accept-encoding", "gzip, deflate"),
        ("user-agent", "agent/2.4 python-httpx/0.28.1"),
        ("x-run-id", "nightly-2026-11-20"),
        ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
    ]
    return [*found, ("content-type", "application/json"), ("content-length", str(len(body)))] if body else found


def request(method: str, target: str, host: str, body: bytes, *extra: tuple[str, str]) -> str:
    """A whole HTTP/1.1 request, as Latin-1 text."""
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in (*headers(host, body), *extra))]
    return "\r\n".join(lines) + "\r\n\r\n" + body.decode("latin-1")


def write(folder: Path, http: int, https: int, ca_pem: str, *, limits: bool = False) -> Path:
    """The manifests as files."""
    found = stack.write_manifests(folder, *documents(http, https, "ca.pem", limits=limits))
    (found / "ca.pem").write_text(ca_pem)
    return found
