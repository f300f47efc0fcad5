"""Route configurations, one per listener that speaks HTTP.

Law: a route leads to exactly one tool's endpoint, never retries, never follows a redirect, and writes the endpoint's
own authority.
"""

from collections.abc import Iterable
from itertools import groupby

import envoy_data_plane.envoy.config.route.v3 as route_v3
from envoy_data_plane.envoy.config.route.v3 import Route, RouteAction, RouteConfiguration, RouteMatch, VirtualHost
from envoy_data_plane.envoy.extensions.filters.http.ext_authz.v3 import ExtAuthzPerRoute
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import ExtProcOverrides, ExtProcPerRoute
from envoy_data_plane.envoy.type.matcher.v3 import RegexMatchAndSubstitute, RegexMatcher
from envoy_data_plane.google.protobuf import Any

from broker.dataplane import site
from broker.dataplane.filters import EXT_PROC, TUNNEL
from broker.dataplane.proto import inline, seconds
from broker.policy.agreement import is_address
from broker.policy.snapshot import PolicySnapshot, Tool

# No call or tunnel outlives the longest token; an answer may be silent this long (MCP servers ping more often).
MAX_STREAM_S = 3600
IDLE_S = 600

# Taken off every request after the processor saw it: what only the broker is meant to read, and hop-by-hop leftovers.
_NEVER_UPSTREAM = ("proxy-authorization", "proxy-connection", site.TOKEN_HEADER, "x-forwarded-proto", "forwarded", "via")

INNER_OF = {site.PROXY: (site.INNER, site.INNER_ADDRESSES), site.NAMESPACE_PROXY: (site.NAMESPACE, site.NAMESPACE_ADDRESSES)}
"""The explicit proxies, and the internal listeners that their tunnels lead into: by name, and by address."""

_CONNECT, _ANY = RouteMatch(connect_matcher=route_v3.RouteMatchConnectMatcher()), RouteMatch(prefix="/")


def tool_cluster(tool: Tool) -> str:
    """The name of a tool's cluster."""
    return f"tool/{tool.name}"


def proxy(snapshot: PolicySnapshot, listener: str = site.PROXY) -> RouteConfiguration:
    """An explicit proxy: absolute-form requests for `http://` tools, CONNECT for every declared host and port."""
    hosts = []
    for tools in _by_place(snapshot.tools.values()):
        plain = [_call(listener, tool) for tool in tools if tool.endpoint.scheme == "http"]
        hosts.append(_host(listener, tools, [_tunnel(listener, tools[0]), *plain]))
    return _configuration(listener, hosts)


def inner(snapshot: PolicySnapshot, listener: str = site.INNER) -> RouteConfiguration:
    """Inside a tunnel: every tool, by authority."""
    places = _by_place(snapshot.tools.values())
    return _configuration(listener, [_host(listener, tools, [_call(listener, tool) for tool in tools]) for tools in places])


def base_url(snapshot: PolicySnapshot) -> RouteConfiguration:
    """The reverse proxy: `/<tool>/…`, whatever the authority."""
    return _configuration(site.BASE_URL, [], [_base_url_call(tool) for _, tool in sorted(snapshot.tools.items())])


def _by_place(tools: Iterable[Tool]) -> list[list[Tool]]:
    def place(tool: Tool) -> tuple[str, int]:
        return tool.endpoint.host, tool.endpoint.port

    return [list(group) for _, group in groupby(sorted(tools, key=lambda tool: (place(tool), tool.name)), key=place)]


def _configuration(listener: str, hosts: list[VirtualHost], last: Iterable[Route] = ()) -> RouteConfiguration:
    rest = VirtualHost(name="*", domains=["*"], routes=[*last, *_denied(listener)])
    return RouteConfiguration(name=listener, virtual_hosts=[*hosts, rest], request_headers_to_remove=list(_NEVER_UPSTREAM))


def _host(listener: str, tools: list[Tool], routes: list[Route]) -> VirtualHost:
    name = tools[0].endpoint.host_port
    names = sorted({name, *(tool.endpoint.authority for tool in tools)})
    return VirtualHost(name=name, domains=names, routes=[*routes, *_denied(listener)])


def inner_listener(listener: str, tool: Tool) -> str:
    """The internal listener that a tunnel to this tool leads into: TLS clients send no SNI for IP addresses (RFC 6066)."""
    named, by_address = INNER_OF[listener]
    return by_address if tool.endpoint.scheme == "https" and is_address(tool.endpoint.host) else named


def _to(cluster: str) -> RouteAction:
    lifetime = route_v3.RouteActionMaxStreamDuration(max_stream_duration=seconds(MAX_STREAM_S))
    return RouteAction(cluster=cluster, timeout=seconds(0), idle_timeout=seconds(IDLE_S), max_stream_duration=lifetime)


def _tunnel(listener: str, tool: Tool) -> Route:
    action = _to(inner_listener(listener, tool))
    ended_here = route_v3.RouteActionUpgradeConfigConnectConfig()
    action.upgrade_configs = [route_v3.RouteActionUpgradeConfig(upgrade_type="CONNECT", connect_config=ended_here)]
    judged_inside = {EXT_PROC: Any.pack(ExtProcPerRoute(overrides=ExtProcOverrides(processing_mode=TUNNEL)))}
    return Route(name=f"{listener}/{tool.name}", match=_CONNECT, route=action, typed_per_filter_config=judged_inside)


def _call(listener: str, tool: Tool, prefix: str | None = None, rewrite: RegexMatchAndSubstitute | None = None) -> Route:
    prefix = tool.endpoint.base_path if prefix is None else prefix
    action = _to(tool_cluster(tool))
    action.host_rewrite_literal, action.regex_rewrite = tool.endpoint.authority, rewrite
    return Route(
        name=f"{listener}/{tool.name}",
        match=RouteMatch(path_separated_prefix=prefix) if prefix else _ANY,
        route=action,
        # One byte more than any operation takes, so that the processor is the one to refuse, with a decision and a reason.
        request_body_buffer_limit=tool.max_body + 1,
        typed_per_filter_config=_no_tunnel(listener),
    )


def _base_url_call(tool: Tool) -> Route:
    base = tool.endpoint.base_path
    pattern, path = (f"^/{tool.name}(/.*)?$", f"{base}\\1") if base else (f"^/{tool.name}/?(.*)$", "/\\1")
    rewrite = RegexMatchAndSubstitute(pattern=RegexMatcher(regex=pattern), substitution=path)
    return _call(site.BASE_URL, tool, f"/{tool.name}", rewrite)


def _denied(listener: str) -> list[Route]:
    nobody = route_v3.DirectResponseAction(status=403, body=inline("not declared\n"))
    rest = Route(name=f"{listener}/", match=_ANY, direct_response=nobody, typed_per_filter_config=_no_tunnel(listener))
    return [rest, Route(name=f"{listener}/", match=_CONNECT, direct_response=nobody)]


def _no_tunnel(listener: str) -> dict[str, Any]:
    # ext_authz judges CONNECT alone, and only a proxy's filters have it.
    return {site.EXT_AUTHZ: Any.pack(ExtAuthzPerRoute(disabled=True))} if listener in INNER_OF else {}
