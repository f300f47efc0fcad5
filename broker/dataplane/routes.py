"""Route configurations, one per listener that speaks HTTP.

Law: a route leads to exactly one tool's endpoint, never retries, never follows a redirect, and writes the endpoint's
own authority.
"""

from collections.abc import Iterable
from itertools import groupby

import envoy_data_plane.envoy.config.route.v3 as route_v3
import envoy_data_plane.envoy.type.matcher.v3 as matcher
from envoy_data_plane.envoy.config.core.v3 import DataSource
from envoy_data_plane.envoy.extensions.filters.http.ext_authz.v3 import ExtAuthzPerRoute
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import ExtProcPerRoute
from envoy_data_plane.google.protobuf import Any

from broker.dataplane import site
from broker.dataplane.filters import EXT_PROC
from broker.dataplane.proto import any_of, seconds
from broker.policy.snapshot import PolicySnapshot, Tool

# No call or tunnel outlives the longest token; an answer may be silent this long (MCP servers ping more often).
MAX_STREAM_S = 3600
IDLE_S = 600

# Taken off every request after the processor saw it: what only the broker is meant to read, and hop-by-hop leftovers.
_NEVER_UPSTREAM = ("proxy-authorization", "proxy-connection", site.TOKEN_HEADER, "x-forwarded-proto", "forwarded", "via")


def tool_cluster(tool: Tool) -> str:
    """The name of a tool's cluster."""
    return f"tool/{tool.name}"


def proxy_routes(snapshot: PolicySnapshot) -> route_v3.RouteConfiguration:
    """The explicit proxy: absolute-form requests for `http://` tools, CONNECT for every declared host and port."""
    hosts = [_proxy_host(tools) for tools in _by_place(snapshot.tools.values())]
    return _configuration(site.PROXY, hosts)


def inner_routes(snapshot: PolicySnapshot) -> route_v3.RouteConfiguration:
    """Inside a tunnel: every tool, by authority."""
    hosts = [_host(tools, [_call(site.INNER, tool) for tool in tools]) for tools in _by_place(snapshot.tools.values())]
    return _configuration(site.INNER, hosts)


def base_url_routes(snapshot: PolicySnapshot) -> route_v3.RouteConfiguration:
    """The reverse proxy: `/<tool>/…`, whatever the authority."""
    tools = sorted(snapshot.tools.values(), key=lambda tool: tool.name)
    return _configuration(site.BASE_URL, [], [_base_url_call(tool) for tool in tools])


def _by_place(tools: Iterable[Tool]) -> list[list[Tool]]:
    def place(tool: Tool) -> tuple[str, int]:
        return tool.endpoint.host, tool.endpoint.port

    return [list(group) for _, group in groupby(sorted(tools, key=lambda tool: (place(tool), tool.name)), key=place)]


def _configuration(
    name: str, hosts: list[route_v3.VirtualHost], last: list[route_v3.Route] | None = None
) -> route_v3.RouteConfiguration:
    return route_v3.RouteConfiguration(
        name=name,
        virtual_hosts=[*hosts, route_v3.VirtualHost(name="*", domains=["*"], routes=[*(last or []), *_denied(name)])],
        request_headers_to_remove=list(_NEVER_UPSTREAM),
    )


def _host(tools: list[Tool], routes: list[route_v3.Route]) -> route_v3.VirtualHost:
    endpoint = tools[0].endpoint
    names = sorted({endpoint.host_port, *(tool.endpoint.authority for tool in tools)})
    return route_v3.VirtualHost(
        name=endpoint.host_port, domains=names, routes=[*routes, *_denied(routes[0].name.partition("/")[0])]
    )


def _proxy_host(tools: list[Tool]) -> route_v3.VirtualHost:
    tunnel = route_v3.Route(
        name=f"{site.PROXY}/{tools[0].name}",
        match=route_v3.RouteMatch(connect_matcher=route_v3.RouteMatchConnectMatcher()),
        route=route_v3.RouteAction(
            cluster=inner_listener(tools[0]),
            timeout=seconds(0),
            idle_timeout=seconds(IDLE_S),
            max_stream_duration=route_v3.RouteActionMaxStreamDuration(max_stream_duration=seconds(MAX_STREAM_S)),
            upgrade_configs=[
                route_v3.RouteActionUpgradeConfig(
                    upgrade_type="CONNECT", connect_config=route_v3.RouteActionUpgradeConfigConnectConfig()
                )
            ],
        ),
        typed_per_filter_config={EXT_PROC: any_of(ExtProcPerRoute(disabled=True))},
    )
    calls = [_call(site.PROXY, tool) for tool in tools if tool.endpoint.scheme == "http"]
    return _host(tools, [tunnel, *calls])


def inner_listener(tool: Tool) -> str:
    """The internal listener that a tunnel to this tool leads into: TLS clients send no SNI for IP addresses (RFC 6066)."""
    return site.INNER_ADDRESSES if tool.endpoint.scheme == "https" and is_address(tool.endpoint.host) else site.INNER


def is_address(host: str) -> bool:
    """Whether a host of a checked endpoint is an IP literal: no DNS name has a colon or an all-digit last label."""
    return ":" in host or host.rpartition(".")[2].isdigit()


def _without_ext_authz() -> dict[str, Any]:
    return {site.EXT_AUTHZ: any_of(ExtAuthzPerRoute(disabled=True))}


def _to_tool(tool: Tool, rewrite: matcher.RegexMatchAndSubstitute | None = None) -> route_v3.RouteAction:
    return route_v3.RouteAction(
        cluster=tool_cluster(tool),
        host_rewrite_literal=tool.endpoint.authority,
        regex_rewrite=rewrite,
        timeout=seconds(0),
        idle_timeout=seconds(IDLE_S),
        max_stream_duration=route_v3.RouteActionMaxStreamDuration(max_stream_duration=seconds(MAX_STREAM_S)),
    )


def _call(listener: str, tool: Tool) -> route_v3.Route:
    base = tool.endpoint.base_path
    return route_v3.Route(
        name=f"{listener}/{tool.name}",
        match=route_v3.RouteMatch(path_separated_prefix=base) if base else route_v3.RouteMatch(prefix="/"),
        route=_to_tool(tool),
        request_body_buffer_limit=_body_limit(tool),
        typed_per_filter_config=_without_ext_authz() if listener == site.PROXY else {},
    )


def _base_url_call(tool: Tool) -> route_v3.Route:
    base = tool.endpoint.base_path
    pattern = f"^/{tool.name}(/.*)?$" if base else f"^/{tool.name}/?(.*)$"
    rewrite = matcher.RegexMatchAndSubstitute(
        pattern=matcher.RegexMatcher(regex=pattern), substitution=f"{base}\\1" if base else "/\\1"
    )
    return route_v3.Route(
        name=f"{site.BASE_URL}/{tool.name}",
        match=route_v3.RouteMatch(path_separated_prefix=f"/{tool.name}"),
        route=_to_tool(tool, rewrite),
        request_body_buffer_limit=_body_limit(tool),
    )


def _body_limit(tool: Tool) -> int:
    # One byte more than any operation takes, so that the processor is the one to refuse, with a decision and a reason.
    return tool.max_body + 1


def _denied(listener: str) -> list[route_v3.Route]:
    nobody = route_v3.DirectResponseAction(status=403, body=DataSource(inline_string="not declared\n"))
    rest = route_v3.Route(
        name=f"{listener}/",
        match=route_v3.RouteMatch(prefix="/"),
        direct_response=nobody,
        typed_per_filter_config=_without_ext_authz() if listener == site.PROXY else {},
    )
    tunnel = route_v3.Route(
        name=f"{listener}/",
        match=route_v3.RouteMatch(connect_matcher=route_v3.RouteMatchConnectMatcher()),
        direct_response=nobody,
    )
    return [rest, tunnel]
