"""Agreement: everything that names the destination must name the same one.

Law: CONNECT host, SNI, `:authority`, scheme and the route that Envoy chose must all point at one catalog entry, in one spelling.
Otherwise a declared host could be used to reach another (host fronting). Nothing is normalised: a trailing dot, other case,
userinfo or another port is another host, and another host is not declared.
"""

from dataclasses import dataclass

from broker.policy.snapshot import PolicySnapshot, Tool
from broker.policy.types import Code, Decision, Door, deny


@dataclass(frozen=True, slots=True)
class Wire:
    """What Envoy saw of a request's destination.

    `authority` is the Host header or `:authority` as sent. `path` is raw, without query. `sni` is empty without TLS (and for IP
    literals, which TLS clients do not send). `connect_host` is the CONNECT target (`host:port`) of the tunnel that the request
    came through, empty outside one. `route_tool` is the tool of the route that Envoy chose, empty for the catch-all, None without
    an Envoy.
    """

    door: Door
    scheme: str
    authority: str
    path: str
    sni: str
    connect_host: str
    route_tool: str | None


def destination(snapshot: PolicySnapshot, wire: Wire) -> tuple[Tool, str] | Decision:
    """The tool that a request is for and the path relative to its base, or the denial.

    First that applies:

    1. more than one Host → `protocol_violation` (RFC 9112 section 3.2; Envoy joins the values by a comma)
    2. base-url: the first path segment is the tool's name.
    3. the authority is not a declared endpoint for this scheme → `host_not_declared`
    4. in a tunnel: CONNECT host or SNI names another host → `authority_mismatch`
    5. no tool at that host has this path below its base path → `operation_not_declared`
    6. Envoy routes it to another tool than this one → `authority_mismatch`
    """
    if "," in wire.authority:
        return deny(Code.PROTOCOL_VIOLATION, "the request names more than one host")
    if wire.door is Door.BASE_URL:
        return _by_name(snapshot, wire)
    tools = snapshot.hosts.get((wire.scheme, *split_authority(wire.scheme, wire.authority)), ())
    if wire.connect_host and (mismatch := _tunnel_mismatch(wire, tools)):
        return mismatch
    if not tools:
        return deny(Code.HOST_NOT_DECLARED, f"no tool in the catalog is at {wire.scheme}://{wire.authority}")
    for tool in tools:
        relative = _below(wire.path, tool.endpoint.base_path)
        if relative is not None:
            return _agreed(wire, tool, relative)
    return deny(Code.OPERATION_NOT_DECLARED, f"{wire.authority} is declared, but no tool there has this path")


_PORT_DIGITS = 5
_PORTS = {"http": "80", "https": "443"}


def connect_target(snapshot: PolicySnapshot, target: str) -> tuple[Tool, ...]:
    """The tools that a CONNECT to `host:port` could be for, exactly as spelled; empty when it is not declared."""
    place = split_authority("", target)
    return tuple(tool for scheme in _PORTS for tool in snapshot.hosts.get((scheme, *place), ()))


def split_authority(scheme: str, authority: str) -> tuple[str, int]:
    """`(host, port)`; the port is the scheme's default where none is written, and -1 where it is not a plain number."""
    host, colon, port = authority.rpartition(":")
    if not colon or authority.endswith("]"):
        host, port = authority, _PORTS.get(scheme, "")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if bracketed != (":" in host):  # brackets are IPv6's, and IPv6 has brackets (RFC 3986 section 3.2.2)
        return host, -1
    if not (port.isascii() and port.isdigit()) or len(port) > _PORT_DIGITS or port[0] == "0":
        return host, -1
    return host, int(port)


def _tunnel_mismatch(wire: Wire, tools: tuple[Tool, ...]) -> Decision | None:
    host, port = split_authority(wire.scheme, wire.authority)
    shown = f"[{host}]" if ":" in host else host
    if wire.connect_host != f"{shown}:{port}":
        what = f"the request names {wire.authority!r}, but its tunnel was opened to {wire.connect_host!r}"
        return deny(Code.AUTHORITY_MISMATCH, what)
    nameless = wire.sni == "" and (wire.scheme != "https" or (tools and is_address(host)))
    if wire.sni != host and not nameless:
        return deny(Code.AUTHORITY_MISMATCH, f"the request names {wire.authority!r}, but TLS was opened to {wire.sni!r}")
    return None


def is_address(host: str) -> bool:
    """Whether a host is an IP literal: a DNS name has no colon, and its last label is never all digits.

    TLS clients send no SNI for one (RFC 6066 section 3).
    """
    return ":" in host or host.rpartition(".")[2].isdigit()


def _below(path: str, base: str) -> str | None:
    if not base:
        return path
    if path == base:
        return "/"
    return path[len(base) :] if path.startswith(base + "/") else None


def _by_name(snapshot: PolicySnapshot, wire: Wire) -> tuple[Tool, str] | Decision:
    name, slash, rest = wire.path.removeprefix("/").partition("/")
    tool = snapshot.tools.get(name)
    if tool is None:
        return deny(Code.TOOL_NOT_DECLARED, f"the catalog has no tool named {name!r}")
    return _agreed(wire, tool, slash + rest or "/")


def _agreed(wire: Wire, tool: Tool, relative: str) -> tuple[Tool, str] | Decision:
    if wire.route_tool is not None and wire.route_tool != tool.name:
        what = f"this is a request for {tool.name!r}, but its route leads to {wire.route_tool or 'nowhere'!r}"
        return deny(Code.AUTHORITY_MISMATCH, what)
    return tool, relative
