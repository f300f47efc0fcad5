"""A broker in front of real servers: a wiki over MCP, and a model provider. Each serves in the clear and over TLS."""

import shutil
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import stack
from e2e.wiki import Wiki

LOOPBACK = {"addresses": ["127.0.0.0/8", "::1/128"]}
WORD = {"type": "string", "maxLength": 40}


def _takes(**properties: object) -> dict[str, object]:
    arguments = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"effect": "read", "params": {"arguments": arguments}}


WIKI = {
    "search_pages": _takes(query=WORD),
    "read_page": _takes(page=WORD, region={**WORD, "x-mcp-header": "Region"}),
    "show_logo": _takes(),
    "read_broken_page": _takes(),
    "rebuild_index": _takes(),
    "rename_page": _takes(page=WORD),
    "add_page": _takes(),
    "delete_page": {**_takes(page=WORD), "effect": "destructive"},  # declared, but granted to nobody
    # purge_history is not declared at all
}
GRANTED = [name for name in WIKI if name != "delete_page"]


@pytest.fixture(scope="module")
def wikis() -> Iterator[SimpleNamespace]:
    """The wiki `plain` at an http address, the wiki `secure` at an https one, and a broker; the agent `reader` may use both."""
    folder = stack.short_folder()
    ca = stack.TestCA()
    stack.write_manifests(folder / "manifests")
    (folder / "manifests" / "ca.pem").write_text(ca.pem)
    plain, secure = Wiki(), Wiki(ca.issue(folder / "certs", "localhost"))
    trusted = {"ca": "ca.pem", **LOOPBACK}
    granted = {"operations": {name: {} for name in GRANTED}}
    stack.write_manifests(
        folder / "manifests",
        stack.tool("plain", f"http://127.0.0.1:{plain.port}/mcp", WIKI, protocol="mcp", upstream=LOOPBACK),
        stack.tool("secure", f"https://localhost:{secure.port}/mcp", WIKI, protocol="mcp", upstream=trusted),
        stack.agent("reader", {"plain": granted, "secure": granted}),
    )
    broker = stack.Broker(folder / "manifests", folder / "state")
    yield SimpleNamespace(broker=broker, plain=plain, secure=secure, granted=GRANTED)
    broker.stop()
    plain.close()
    secure.close()
    shutil.rmtree(folder)
