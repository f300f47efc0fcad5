"""Listeners: the doors that agents reach, and the internal ones that tunnels lead into.

Law: an undeclared name is never certified. TLS inside a tunnel is ended only by a filter chain that names the declared hosts;
what matches none is closed and recorded from the listener's access log.
"""

from collections.abc import Iterable, Mapping, Sequence

import envoy_data_plane.envoy.config.accesslog.v3 as accesslog
import envoy_data_plane.envoy.config.core.v3 as core
import envoy_data_plane.envoy.config.listener.v3 as listener_v3
import envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 as hcm
import envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 as tls
from envoy_data_plane.envoy.extensions.filters.listener.tls_inspector.v3 import TlsInspector

from broker.dataplane import site
from broker.dataplane.filters import call_filters, connection_access_log, http_access_log, proxy_filters
from broker.dataplane.proto import ADS, extension, inline, sds, seconds, socket
from broker.dataplane.routes import IDLE_S, INNER_OF
from broker.dataplane.site import Certificates, Leaf, Namespace, Site
from broker.policy.snapshot import PolicySnapshot, Spire

# Memory a peer can make Envoy hold per connection; a route raises it to what its tool's operations take.
BUFFER_BYTES = 65_536

PLAIN, TLS = "raw_buffer", "tls"
_H1 = ["http/1.1"]
# SPIRE's own bundle and the federated ones, each for its domain only. Under its other names (`ROOTCA`, a domain's) an agent with
# `disable_spiffe_cert_validation` gives a plain list, which lets a root vouch for any name; under this one it then gives nothing.
_ALL_BUNDLES = "ALL"


def proxy(snapshot: PolicySnapshot, place: Site, certificates: Certificates) -> listener_v3.Listener:
    """The explicit proxy: plain for agents with a token, TLS with a client certificate where SPIRE or trust bundles are named."""
    chains = [chain("plain", site.PROXY)]
    if snapshot.spire or snapshot.trust_bundles:
        common = _from_spire(snapshot.spire) if snapshot.spire else _own(snapshot.trust_bundles, certificates.door)
        mutual = chain("mtls", site.PROXY, _server_tls(common, mutual=True))
        chains = [on(PLAIN, chains[0]), on(TLS, mutual)]
    return listener(site.PROXY, chains, socket(place.proxy))


def base_url(place: Site) -> listener_v3.Listener:
    """The reverse proxy."""
    return listener(site.BASE_URL, [chain("plain", site.BASE_URL)], socket(place.base_url))


def inner(certificates: Certificates, door: str = site.PROXY) -> list[listener_v3.Listener]:
    """Where the tunnels of an explicit proxy end: by name, and, only if the catalog has any, by address."""
    name, name_by_address = INNER_OF[door]
    named, alpn = sorted(certificates.hosts), ["h2", "http/1.1"]
    chains = [on(PLAIN, chain("plain", name))]
    if named:
        leaves = [certificates.hosts[host] for host in named]
        chains.append(on(TLS, chain("tls", name, _server_tls(_shown(leaves, alpn))), named))
    listeners = [listener(name, chains)]
    if certificates.addresses:
        by_address = chain("tls", name, _server_tls(_shown([certificates.addresses], alpn)))
        listeners.append(listener(name_by_address, [on(TLS, by_address)]))
    return listeners


def listener(
    name: str, chains: list[listener_v3.FilterChain], address: core.Address | None = None, *more: core.Address
) -> listener_v3.Listener:
    """A door at these addresses; without one, an internal listener."""
    inspected = any(each.filter_chain_match for each in chains)
    inspector = extension(listener_v3.ListenerFilter, "envoy.filters.listener.tls_inspector", TlsInspector())
    return listener_v3.Listener(
        name=name,
        address=address,
        additional_addresses=[listener_v3.AdditionalAddress(address=each) for each in more],
        internal_listener=None if address else listener_v3.ListenerInternalListenerConfig(),
        # Two Envoys must never share a door silently.
        enable_reuse_port=False if address else None,
        per_connection_buffer_limit_bytes=BUFFER_BYTES,
        listener_filters=[inspector] if inspected else [],
        listener_filters_timeout=seconds(5),
        filter_chains=chains,
        access_log=[connection_access_log()],
    )


def on(transport: str, made: listener_v3.FilterChain, names: Sequence[str] = ()) -> listener_v3.FilterChain:
    """The chain, for `PLAIN` or `TLS` connections alone, and of these only for such names."""
    made.filter_chain_match = listener_v3.FilterChainMatch(transport_protocol=transport, server_names=list(names))
    return made


def chain(
    name: str, routes: str, transport: core.TransportSocket | None = None, within: Namespace | None = None
) -> listener_v3.FilterChain:
    """HTTP, led by these routes; `within` a namespace, whoever comes is its agent."""
    connect = routes in INNER_OF
    codec = hcm.HttpConnectionManagerCodecType.AUTO if transport and not connect else hcm.HttpConnectionManagerCodecType.HTTP1
    manager = hcm.HttpConnectionManager(
        codec_type=codec,
        stat_prefix=f"{routes}-{name}",
        rds=hcm.Rds(config_source=ADS, route_config_name=routes),
        http_filters=proxy_filters(within) if connect else call_filters(),
        access_log=[http_access_log()],
        common_http_protocol_options=core.HttpProtocolOptions(idle_timeout=seconds(IDLE_S), max_headers_count=100),
        # Python before 3.12 (urllib, requests) sends its CONNECT as HTTP/1.0; any other such request is refused by the exchange.
        http_protocol_options=core.Http1ProtocolOptions(accept_http_10=connect),
        http2_protocol_options=core.Http2ProtocolOptions(max_concurrent_streams=128),
        max_request_headers_kb=60,
        stream_idle_timeout=seconds(IDLE_S),
        request_headers_timeout=seconds(10),
        request_timeout=seconds(60),
        # How long Envoy waits for the agent to hang up after a reset; bounds how long a cut stream seems open.
        delayed_close_timeout=seconds(0.25),
        use_remote_address=False,
        skip_xff_append=True,
        generate_request_id=False,
        preserve_external_request_id=True,
        forward_client_cert_details=hcm.HttpConnectionManagerForwardClientCertDetails.SANITIZE,
        server_header_transformation=hcm.HttpConnectionManagerServerHeaderTransformation.PASS_THROUGH,
        # Refuse, don't repair: the processor sees the path as sent and denies what has a second reading (policy/match.py).
        normalize_path=False,
        merge_slashes=False,
        path_with_escaped_slashes_action=hcm.HttpConnectionManagerPathWithEscapedSlashesAction.KEEP_UNCHANGED,
        local_reply_config=hcm.LocalReplyConfig(mappers=[_hung_processor()]),
        upgrade_configs=[hcm.HttpConnectionManagerUpgradeConfig(upgrade_type="CONNECT")] if connect else [],
    )
    return listener_v3.FilterChain(
        name=name,
        filters=[extension(listener_v3.Filter, "envoy.filters.network.http_connection_manager", manager)],
        transport_socket=transport,
        transport_socket_connect_timeout=seconds(10),
    )


def _server_tls(common: tls.CommonTlsContext, *, mutual: bool = False) -> core.TransportSocket:
    context = tls.DownstreamTlsContext(
        common_tls_context=common,
        require_client_certificate=True if mutual else None,
        # A resumed session must not outlive a change of the declared hosts, or of the trust bundles.
        disable_stateless_session_resumption=True,
        disable_stateful_session_resumption=True,
    )
    return extension(core.TransportSocket, "envoy.transport_sockets.tls", context)


def _shown(leaves: Iterable[Leaf], alpn: list[str]) -> tls.CommonTlsContext:
    shown = [tls.TlsCertificate(certificate_chain=inline(leaf.chain), private_key=inline(leaf.key)) for leaf in leaves]
    return tls.CommonTlsContext(alpn_protocols=alpn, tls_certificates=shown)


def _own(trust: Mapping[str, str], door: Leaf) -> tls.CommonTlsContext:
    domain = tls.SpiffeCertValidatorConfigTrustDomain
    # Never a plain list of authorities: any of them could then vouch for the names of every domain.
    config = tls.SpiffeCertValidatorConfig(
        trust_domains=[domain(name=name, trust_bundle=inline(pem)) for name, pem in sorted(trust.items())]
    )
    validator = extension(core.TypedExtensionConfig, "envoy.tls.cert_validator.spiffe", config)
    context = _shown([door], _H1)
    context.validation_context = tls.CertificateValidationContext(custom_validator_config=validator)
    return context


def _from_spire(spire: Spire) -> tls.CommonTlsContext:
    source = sds(spire.socket)
    return tls.CommonTlsContext(
        alpn_protocols=_H1,
        tls_certificate_sds_secret_configs=[tls.SdsSecretConfig(name=spire.svid, sds_config=source)],
        validation_context_sds_secret_config=tls.SdsSecretConfig(name=_ALL_BUNDLES, sds_config=source),
    )


def _hung_processor() -> hcm.ResponseMapper:
    """A processor that does not answer in time is the broker's fault: 503, where Envoy says 504. Bodies stay as they are."""
    timeout = accesslog.ComparisonFilter(
        op=accesslog.ComparisonFilterOp.EQ, value=core.RuntimeUInt32(default_value=504, runtime_key="broker.hung")
    )
    late = accesslog.AccessLogFilter(status_code_filter=accesslog.StatusCodeFilter(comparison=timeout))
    return hcm.ResponseMapper(filter=late, status_code=503)
