"""Brokers in front of real servers: wikis that speak MCP, and model providers under the sample organisation's catalog."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import stack
import yaml
from e2e import providers
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
        stack.agent("asking", {"plain": {"operations": {"search_pages": {"approval": {"approvers": 1}}, "read_page": {}}}}),
    )
    broker = stack.Broker(folder / "manifests", folder / "state")
    yield SimpleNamespace(broker=broker, plain=plain, secure=secure, granted=GRANTED)
    broker.stop()
    plain.close()
    secure.close()
    shutil.rmtree(folder)


SAMPLES = Path(__file__).parents[2] / "manifests" / "tools"
KEYS = {"OPENAI_API_KEY": "upstream-key-of-openai-0123456789", "ANTHROPIC_API_KEY": "upstream-key-of-anthropic-0123456789"}


def sample(name: str, **spec: Any) -> dict[str, Any]:
    """The sample organisation's catalog entry, for a provider on loopback."""
    document: dict[str, Any] = yaml.safe_load((SAMPLES / f"{name}.yaml").read_text())
    document["spec"] |= {"upstream": {"ca": "ca.pem", **LOOPBACK}, **spec}
    return document


def of_model(name: str, *server_tools: str) -> dict[str, Any]:
    return {"params": {"body": {"properties": {"model": {"const": name}}}}, "server_tools": list(server_tools)}


PRICES = {
    "openai": {
        "gpt-5-mini": {"input": 0.25, "output": 2.00, "cached": 0.025},
        "text-embedding-3-small": {"input": 0.02, "output": 0},
    },
    "anthropic": {"claude-haiku-4-5": {"input": 1.00, "output": 5.00, "cached": 0.10}},
}
# Two calls may be under way, each of which reserves some five thousand; a hundred fit one after the other.
SPENDER = {"tokens": "12k/day", "usd": "0.10/day"}


@pytest.fixture(scope="module")
def models() -> Iterator[SimpleNamespace]:
    """Two providers, and a broker that holds their keys; `writer` may use one model of each, `finder` one with web search."""
    folder = stack.short_folder()
    ca = stack.TestCA()
    certificate = ca.issue(folder / "certs", "localhost")
    openai, anthropic = providers.openai(certificate), providers.anthropic(certificate)
    gpt = {"operations": {name: of_model("gpt-5-mini") for name in ("chat.completions", "responses")}}
    gpt["operations"]["embeddings"] = of_model("text-embedding-3-small")
    found = {"operations": {"responses": of_model("gpt-5-mini", "web_search")}}
    claude = {"operations": {"messages": of_model("claude-haiku-4-5")}}
    stack.write_manifests(
        folder / "manifests",
        sample("openai", endpoint=f"https://localhost:{openai.port}"),
        sample("anthropic", endpoint=f"https://localhost:{anthropic.port}"),
        stack.agent("writer", {"openai": gpt, "anthropic": claude}),
        stack.agent("finder", {"openai": found}),
        *(stack.agent(f"spender-{number}", {"openai": gpt, "anthropic": claude}, limits=SPENDER) for number in range(8)),
        stack.agent("unpriced", {"openai": {"operations": {"responses": of_model("gpt-6")}}}, limits={"usd": "1/day"}),
        stack.platform(prices=PRICES),
    )
    (folder / "manifests" / "ca.pem").write_text(ca.pem)
    broker = stack.Broker(folder / "manifests", folder / "state", KEYS)
    yield SimpleNamespace(broker=broker, openai=openai, anthropic=anthropic, keys=KEYS)
    broker.stop()
    openai.close()
    anthropic.close()
    shutil.rmtree(folder)
