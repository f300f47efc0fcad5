"""The words that a catalog entry may write in `protocol:`, and what speaks each."""

from collections.abc import Mapping

from broker.protocols.anthropic import Anthropic
from broker.protocols.base import Adapter
from broker.protocols.mcp import Mcp
from broker.protocols.openai import OpenAI
from broker.protocols.rest import Rest

ADAPTERS: Mapping[str, Adapter] = {adapter.name: adapter for adapter in (Anthropic(), Mcp(), OpenAI(), Rest())}
"""One stateless adapter a protocol, by its word."""
