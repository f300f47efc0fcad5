"""The APIs of model providers: where each is called, and where its body says how much may be generated."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Api:
    """One API by which a model is called: `POST …path`. `outputs` are the body's fields that bound the output, the best first."""

    path: str
    outputs: tuple[str, ...] = ()


PROVIDERS: Mapping[str, Mapping[str, Api]] = {
    "openai": {
        "chat.completions": Api("/chat/completions", ("max_completion_tokens", "max_tokens")),
        "responses": Api("/responses", ("max_output_tokens",)),
        "embeddings": Api("/embeddings"),
    },
    "anthropic": {"messages": Api("/messages", ("max_tokens",))},
}
"""The APIs of each model protocol, by the operation's name that needs no `match`."""

MAX_OUTPUT = 4096
"""Tokens that a call may generate which names no maximum, where no schema does."""


def api_at(protocol: str, method: str, path: str) -> str | None:
    """The API that a request calls, or None. `path` is decoded; servers disagree on case and on a slash at the end."""
    ends = path.rstrip("/").lower()
    apis = PROVIDERS.get(protocol, {}).items() if method == "POST" else ()
    return next((name for name, api in apis if ends.endswith(api.path)), None)
