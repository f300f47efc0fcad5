"""What an agent says of itself, and what it brings along, is taken off before anyone judges or sends the request.

Law: removal looks at the name as a lenient server would: case is gone already, and `_` reads as `-` (CGI and WSGI fold both).
"""

from dataclasses import dataclass
from urllib.parse import unquote_plus

from broker.policy.snapshot import Tool
from broker.policy.types import Request

_CREDENTIALS = frozenset(
    {
        "authorization", "cookie", "api-key", "apikey", "x-api-key", "x-goog-api-key", "x-auth-token", "x-access-token",
        "x-amz-security-token", "private-token", "job-token", "x-vault-token",
    }
)  # fmt: skip
# Identity claims, and headers by which a server takes another method or path than the one judged.
_HEADERS = _CREDENTIALS | frozenset(
    {
        "proxy-authorization", "x-agent-id", "x-run-id", "x-real-ip", "x-client-ip", "true-client-ip", "forwarded", "via",
        "x-http-method", "x-http-method-override", "x-method-override", "x-amz-date", "x-amz-content-sha256",
        "x-original-url", "x-original-host", "x-rewrite-url", "proxy-connection",
    }
)  # fmt: skip
_PREFIXES = ("x-broker-", "x-forwarded-", "x-envoy-")

_QUERY = frozenset(
    {
        "access_token", "api_key", "apikey", "api-key", "x-api-key", "auth_token", "authtoken", "authorization", "client_secret",
        "oauth_token", "private_token", "token", "key", "password", "secret", "awsaccesskeyid", "signature",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stripped:
    """The request as it may be judged. `removed` names the headers to take off, as they were sent."""

    request: Request
    removed: tuple[str, ...]
    query_changed: bool
    placed: str = ""
    """The header in which the tool's own credential goes."""

    @property
    def credential(self) -> str:
        """The header, or `the query`, in which the agent sent a credential of its own; empty where there was none."""
        own = _CREDENTIALS | {self.placed}
        found = next((name for name in self.removed if name.replace("_", "-") in own), "")
        return found or ("the query" if self.query_changed else "")


def strip(tool: Tool, request: Request, path: str) -> Stripped:
    """The request without the agent's own credentials and claims; `path` is the path relative to the tool.

    A credential-like query parameter stays only where an operation of the tool declares a query parameter of that name.
    """
    signs = tool.credential is not None and tool.credential.sigv4 is not None
    placed = tool.credential.header.replace("_", "-") if tool.credential else ""
    found = {name for name, _ in request.headers if is_stripped(name) or name.replace("_", "-") == placed}
    removed = tuple(sorted(found | {name for name, _ in request.headers if signs and _is_amazons(name)}))
    headers = tuple(pair for pair in request.headers if pair[0] not in removed) if removed else request.headers
    query = _without_credentials(tool, request.query) if request.query else ""
    clean = Request(request.method, path, query, headers)
    return Stripped(clean, removed, query_changed=query != request.query, placed=placed)


def is_stripped(name: str) -> bool:
    """Whether a header (lower-case name) never goes upstream as the agent sent it."""
    plain = name.replace("_", "-")
    return plain in _HEADERS or plain.startswith(_PREFIXES)


def _is_amazons(name: str) -> bool:
    # Some of them name another action, object or account than the one judged, and the signature would vouch for that.
    return name.replace("_", "-").startswith(("x-amz-", "amz-sdk-"))


def _without_credentials(tool: Tool, query: str) -> str:
    return "&".join(pair for pair in query.split("&") if not _is_credential(tool, pair))


def _is_credential(tool: Tool, pair: str) -> bool:
    name = unquote_plus(pair.partition("=")[0])
    if name.lower() not in _QUERY and not name.lower().startswith("x-amz-"):
        return False
    schemas = (operation.schemas.get("query") for operation in tool.operations.values())
    return not any(schema and name in schema.source.get("properties", {}) for schema in schemas)
