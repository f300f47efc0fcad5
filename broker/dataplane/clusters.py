"""One cluster per tool: the one endpoint, its verified TLS, and the addresses that it may have.

Law: the address is judged after resolution and before connecting. STRICT_DNS, because the upstream RBAC filter sees the address
that is really connected to only there.
"""

import envoy_data_plane.envoy.config.cluster.v3 as cluster_v3
import envoy_data_plane.envoy.config.core.v3 as core
import envoy_data_plane.envoy.config.rbac.v3 as rbac
import envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 as tls
import envoy_data_plane.envoy.extensions.upstreams.http.v3 as upstream_http
from envoy_data_plane.envoy.extensions.filters.http.rbac.v3 import Rbac as RbacFilter
from envoy_data_plane.envoy.extensions.filters.http.upstream_codec.v3 import UpstreamCodec
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.envoy.extensions.rbac.matchers.upstream_ip_port.v3 import UpstreamIpPortMatcher
from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher
from envoy_data_plane.google.protobuf import Any

from broker.dataplane.proto import any_of, inline, one_endpoint, seconds, socket
from broker.dataplane.routes import is_address, tool_cluster
from broker.policy.snapshot import Tool

# Not globally reachable by the IANA special-purpose registries (RFC 6890), plus every IPv6 form that embeds an IPv4 address.
NOT_PUBLIC = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24",
    "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    "::/96", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "2002::/16", "fc00::/7",
    "fe80::/10", "ff00::/8",
)  # fmt: skip

_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def cluster(tool: Tool, system_roots: str) -> cluster_v3.Cluster:
    """The cluster of one tool."""
    endpoint = tool.endpoint
    return cluster_v3.Cluster(
        name=tool_cluster(tool),
        type=cluster_v3.ClusterDiscoveryType.STRICT_DNS,
        # Each address is a host of its own here: with ALL, half the calls fail where IPv6 resolves but leads nowhere.
        dns_lookup_family=cluster_v3.ClusterDnsLookupFamily.V4_PREFERRED,
        connect_timeout=seconds(5),
        # A name that can't be resolved must not keep the listeners closed.
        wait_for_warm_on_init=False,
        load_assignment=one_endpoint(tool_cluster(tool), socket((endpoint.host, endpoint.port))),
        transport_socket=_tls(tool, system_roots) if endpoint.scheme == "https" else None,
        typed_extension_protocol_options={_HTTP_OPTIONS: _http(tool)},
    )


def _tls(tool: Tool, system_roots: str) -> core.TransportSocket:
    host = tool.endpoint.host
    kind = tls.SubjectAltNameMatcherSanType.IP_ADDRESS if is_address(host) else tls.SubjectAltNameMatcherSanType.DNS
    roots = inline(tool.upstream.ca_pem) if tool.upstream.ca_pem else core.DataSource(filename=system_roots)
    context = tls.UpstreamTlsContext(
        sni="" if is_address(host) else host,
        common_tls_context=tls.CommonTlsContext(
            tls_params=tls.TlsParameters(tls_minimum_protocol_version=tls.TlsParametersTlsProtocol.TLSv1_2),
            alpn_protocols=["h2", "http/1.1"],
            validation_context=tls.CertificateValidationContext(
                trusted_ca=roots,
                match_typed_subject_alt_names=[tls.SubjectAltNameMatcher(san_type=kind, matcher=StringMatcher(exact=host))],
            ),
        ),
    )
    return core.TransportSocket(name="envoy.transport_sockets.tls", typed_config=any_of(context))


def _http(tool: Tool) -> Any:
    filters = [
        HttpFilter(name="envoy.filters.http.upstream_rbac", typed_config=any_of(_addresses(tool.upstream.addresses))),
        HttpFilter(name="envoy.filters.http.upstream_codec", typed_config=any_of(UpstreamCodec())),
    ]
    if tool.endpoint.scheme == "https":
        auto = upstream_http.HttpProtocolOptionsAutoHttpConfig(
            http_protocol_options=core.Http1ProtocolOptions(), http2_protocol_options=core.Http2ProtocolOptions()
        )
        return any_of(upstream_http.HttpProtocolOptions(auto_config=auto, http_filters=filters))
    plain = upstream_http.HttpProtocolOptionsExplicitHttpConfig(http_protocol_options=core.Http1ProtocolOptions())
    return any_of(upstream_http.HttpProtocolOptions(explicit_http_config=plain, http_filters=filters))


def _addresses(allowed: tuple[str, ...]) -> RbacFilter:
    permission = _any_of(NOT_PUBLIC)
    if allowed:
        permission = rbac.Permission(and_rules=rbac.PermissionSet(rules=[permission, rbac.Permission(not_rule=_any_of(allowed))]))
    policy = rbac.Policy(permissions=[permission], principals=[rbac.Principal(any=True)])
    return RbacFilter(rules=rbac.Rbac(action=rbac.RbacAction.DENY, policies={"address_not_public": policy}))


def _any_of(ranges: tuple[str, ...]) -> rbac.Permission:
    return rbac.Permission(or_rules=rbac.PermissionSet(rules=[_in_range(cidr) for cidr in ranges]))


def _in_range(cidr: str) -> rbac.Permission:
    prefix, _, length = cidr.partition("/")
    matcher = UpstreamIpPortMatcher(upstream_ip=core.CidrRange(address_prefix=prefix, prefix_len=int(length)))
    return rbac.Permission(
        matcher=core.TypedExtensionConfig(name="envoy.rbac.matchers.upstream.upstream_ip_port", typed_config=any_of(matcher))
    )
