"""One cluster per tool: the one endpoint, its verified TLS, and the addresses that it may have.

Laws: the address is judged after resolution and before connecting. STRICT_DNS, because the upstream RBAC filter sees the address
that is really connected to only there. A tool that fails is left alone for a while, and its failing costs no other tool anything.
"""

from collections.abc import Mapping
from dataclasses import replace

import envoy_data_plane.envoy.config.cluster.v3 as cluster_v3
import envoy_data_plane.envoy.config.core.v3 as core
import envoy_data_plane.envoy.config.rbac.v3 as rbac
import envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 as tls
import envoy_data_plane.envoy.extensions.upstreams.http.v3 as upstream_http
from envoy_data_plane.envoy.extensions.filters.http.upstream_codec.v3 import UpstreamCodec
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.envoy.extensions.rbac.matchers.upstream_ip_port.v3 import UpstreamIpPortMatcher
from envoy_data_plane.envoy.extensions.transport_sockets.internal_upstream.v3 import InternalUpstreamTransport
from envoy_data_plane.envoy.extensions.transport_sockets.raw_buffer.v3 import RawBuffer
from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher
from envoy_data_plane.envoy.type.v3 import Percent
from envoy_data_plane.google.protobuf import Any

from broker.dataplane.filters import http_filter, rbac_filter
from broker.dataplane.proto import endpoints, extension, inline, seconds, socket
from broker.dataplane.routes import tool_cluster
from broker.dataplane.site import PROCESSOR
from broker.policy.agreement import is_address
from broker.policy.snapshot import Tool

# Not globally reachable by the IANA special-purpose registries (RFC 6890), plus every IPv6 prefix whose addresses embed an IPv4
# address, the site-local addresses of old (RFC 3879), and the one by which each of Azure's machines reaches its host.
NOT_PUBLIC = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16", "172.16.0.0/12",
    "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/4", "240.0.0.0/4", "::/96", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/23",
    "2001:db8::/32", "2002::/16", "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
)  # fmt: skip

_H1, _H2 = core.Http1ProtocolOptions(), core.Http2ProtocolOptions()
_EXPLICIT = upstream_http.HttpProtocolOptionsExplicitHttpConfig
_HTTP1 = {"explicit_http_config": _EXPLICIT(http_protocol_options=_H1)}
_BY_ALPN = {"auto_config": upstream_http.HttpProtocolOptionsAutoHttpConfig(http_protocol_options=_H1, http2_protocol_options=_H2)}

OPEN_S = 5.0
"""How long a failing address is left alone at first: agents' first retries come within seconds, and a restart takes as long."""

_BREAKER = cluster_v3.OutlierDetection(
    # In a row, whoever called: one success between them and the tool is not down. Envoy's own number.
    consecutive_gateway_failure=5,
    enforcing_consecutive_gateway_failure=100,
    consecutive_local_origin_failure=5,
    # No connection, a reset, a timeout: counted apart, so that they are not taken for answers of 5xx.
    split_external_local_origin_errors=True,
    # By default any 5xx counts, and the share of them. But an agent that makes a tool answer 500 must not cut off others.
    enforcing_consecutive_5xx=0,
    enforcing_success_rate=0,
    enforcing_local_origin_success_rate=0,
    base_ejection_time=seconds(OPEN_S),
    # Each time in a row it is left alone for longer; but what was away for a day is tried again within the minute.
    max_ejection_time=seconds(60),
    # Only whether the time is over is looked at so seldom: it lasts up to a second longer.
    interval=seconds(1),
    # Most tools have one address.
    max_ejection_percent=100,
)
# Below this share of healthy addresses, Envoy would use the others too.
_NO_PANIC = cluster_v3.ClusterCommonLbConfig(healthy_panic_threshold=Percent(value=0))
# Envoy's defaults, but written down: a tool that never answers holds so many calls open and no more.
_TOOL_BOUNDS = cluster_v3.CircuitBreakersThresholds(
    max_connections=1000,
    max_requests=1000,
    # Those that wait for a connection: more than the processor lets go (2,500/s) while one is made (0.2 s). Beyond, they would
    # only wait behind a tool that is full, for as long as it pleases.
    max_pending_requests=500,
    # Nothing repeats a call but the agent: routes have no retry policy, and if one had, nothing would come of it.
    max_retries=0,
)
# The pings end what is open on a processor that hangs, which could not be cut by it: so it fails closed.
_PINGS = core.KeepaliveSettings(interval=seconds(1), timeout=seconds(2))
_HTTP2_ALIVE = {"explicit_http_config": _EXPLICIT(http2_protocol_options=core.Http2ProtocolOptions(connection_keepalive=_PINGS))}
# Of several processors: each is asked twice a second, by gRPC's own protocol (grpc.health.v1), and what does not answer within
# a second gets no new calls: before the first that it took have timed out (MESSAGE_TIMEOUT_S).
_ALIVE = core.HealthCheck(
    grpc_health_check=core.HealthCheckGrpcHealthCheck(),
    timeout=seconds(1),
    interval=seconds(0.5),
    no_traffic_interval=seconds(0.5),
    unhealthy_threshold=1,
    healthy_threshold=1,
)
# With one of three left, that one: by Envoy's default of half, the dead would get their share. With none, any: it fails closed.
_ANY_THAT_ANSWERS = cluster_v3.ClusterCommonLbConfig(healthy_panic_threshold=Percent(value=1))
# Every open call holds a stream of the processor, and every open tunnel one of the listener within. With Envoy's 1024, whoever
# opens so many would have everyone else denied. What bounds them is memory and file descriptors.
_UNBOUNDED = 1_000_000
_OWN_BOUNDS = cluster_v3.CircuitBreakersThresholds(
    max_connections=_UNBOUNDED, max_requests=_UNBOUNDED, max_pending_requests=_UNBOUNDED, max_retries=0
)


def tool(entry: Tool, system_roots: str) -> cluster_v3.Cluster:
    """The cluster of one tool."""
    endpoint, name = entry.endpoint, tool_cluster(entry)
    secure = endpoint.scheme == "https"
    filters = [_addresses(entry.upstream.addresses), http_filter("upstream_codec", UpstreamCodec())]
    return cluster_v3.Cluster(
        name=name,
        type=cluster_v3.ClusterDiscoveryType.STRICT_DNS,
        # Each address is a host of its own here: with ALL, half the calls fail where IPv6 resolves but leads nowhere.
        dns_lookup_family=cluster_v3.ClusterDnsLookupFamily.V4_PREFERRED,
        connect_timeout=seconds(5),
        # A name that can't be resolved must not keep the listeners closed.
        wait_for_warm_on_init=False,
        load_assignment=endpoints(name, socket((endpoint.host, endpoint.port))),
        transport_socket=_tls(entry, system_roots) if secure else None,
        typed_extension_protocol_options=_http(_BY_ALPN if secure else _HTTP1, filters),
        outlier_detection=_BREAKER,
        common_lb_config=_NO_PANIC,
        circuit_breakers=cluster_v3.CircuitBreakers(thresholds=[_TOOL_BOUNDS]),
    )


def processor(paths: tuple[str, ...]) -> cluster_v3.Cluster:
    """The processors' sockets. Of several, each call goes to one that answers and has the fewest open."""
    made = _static(PROCESSOR, *(core.Address(pipe=core.Pipe(path=path)) for path in paths))
    made.typed_extension_protocol_options = _http(_HTTP2_ALIVE, [])
    made.circuit_breakers = cluster_v3.CircuitBreakers(thresholds=[replace(_OWN_BOUNDS, max_retries=_UNBOUNDED)])
    if len(paths) > 1:
        made.lb_policy = cluster_v3.ClusterLbPolicy.LEAST_REQUEST
        made.common_lb_config = _ANY_THAT_ANSWERS
        made.health_checks = [_ALIVE]
    return made


def internal(listener: str) -> cluster_v3.Cluster:
    """The way of a tunnel into an internal listener of the same name."""
    made = _static(listener, core.Address(envoy_internal_address=core.EnvoyInternalAddress(server_listener_name=listener)))
    raw = extension(core.TransportSocket, "envoy.transport_sockets.raw_buffer", RawBuffer())
    passed = InternalUpstreamTransport(transport_socket=raw)
    made.transport_socket = extension(core.TransportSocket, "envoy.transport_sockets.internal_upstream", passed)
    return made


def _static(name: str, *addresses: core.Address) -> cluster_v3.Cluster:
    return cluster_v3.Cluster(
        name=name,
        type=cluster_v3.ClusterDiscoveryType.STATIC,
        connect_timeout=seconds(1),
        load_assignment=endpoints(name, *addresses),
        circuit_breakers=cluster_v3.CircuitBreakers(thresholds=[_OWN_BOUNDS]),
    )


def _tls(entry: Tool, system_roots: str) -> core.TransportSocket:
    host = entry.endpoint.host
    kind = tls.SubjectAltNameMatcherSanType.IP_ADDRESS if is_address(host) else tls.SubjectAltNameMatcherSanType.DNS
    context = tls.UpstreamTlsContext(
        sni="" if is_address(host) else host,
        common_tls_context=tls.CommonTlsContext(
            tls_params=tls.TlsParameters(tls_minimum_protocol_version=tls.TlsParametersTlsProtocol.TLSv1_2),
            alpn_protocols=["h2", "http/1.1"],
            validation_context=tls.CertificateValidationContext(
                trusted_ca=inline(entry.upstream.ca_pem) if entry.upstream.ca_pem else core.DataSource(filename=system_roots),
                match_typed_subject_alt_names=[tls.SubjectAltNameMatcher(san_type=kind, matcher=StringMatcher(exact=host))],
            ),
        ),
    )
    return extension(core.TransportSocket, "envoy.transport_sockets.tls", context)


def _http(version: Mapping[str, object], filters: list[HttpFilter]) -> dict[str, Any]:
    options = upstream_http.HttpProtocolOptions(http_filters=filters, **version)  # type: ignore[arg-type]  # one of the three
    return {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": Any.pack(options)}


def _addresses(allowed: tuple[str, ...]) -> HttpFilter:
    refused = _any_of(NOT_PUBLIC)
    if allowed:
        refused = rbac.Permission(and_rules=rbac.PermissionSet(rules=[refused, rbac.Permission(not_rule=_any_of(allowed))]))
    anyone = [rbac.Principal(any=True)]
    return rbac_filter(rbac.RbacAction.DENY, "address_not_public", refused, anyone, upstream=True)


def _any_of(ranges: tuple[str, ...]) -> rbac.Permission:
    return rbac.Permission(or_rules=rbac.PermissionSet(rules=[_in_range(cidr) for cidr in ranges]))


def _in_range(cidr: str) -> rbac.Permission:
    prefix, _, length = cidr.partition("/")
    within = UpstreamIpPortMatcher(upstream_ip=core.CidrRange(address_prefix=prefix, prefix_len=int(length)))
    name = "envoy.rbac.matchers.upstream.upstream_ip_port"
    return rbac.Permission(matcher=extension(core.TypedExtensionConfig, name, within))
