"""Listeners: the doors that agents reach, and the internal ones that tunnels lead into.

Law: an undeclared name is never certified. TLS inside a tunnel is ended only by a filter chain that names the declared hosts;
what matches none is closed and recorded from the listener's access log.
"""

import envoy_data_plane.envoy.config.core.v3 as core
import envoy_data_plane.envoy.config.listener.v3 as listener_v3
import envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 as hcm
import envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 as tls
from envoy_data_plane.envoy.extensions.filters.listener.tls_inspector.v3 import TlsInspector

from broker.dataplane import site
from broker.dataplane.filters import call_filters, connection_access_log, http_access_log, proxy_filters
from broker.dataplane.proto import ADS, any_of, inline, seconds, socket
from broker.dataplane.routes import IDLE_S
from broker.dataplane.site import Certificates, Leaf, Site
from broker.policy.snapshot import PolicySnapshot

# Memory a peer can make Envoy hold per connection; a route raises it to what its tool's operations take.
BUFFER_BYTES = 65_536

_CODEC = hcm.HttpConnectionManagerCodecType


def proxy_listener(snapshot: PolicySnapshot, place: Site, certificates: Certificates) -> listener_v3.Listener:
    """The explicit proxy: plain for agents with a token, TLS with a client certificate where trust bundles are configured."""
    plain = _chain("plain", site.PROXY, proxy_filters(), _CODEC.HTTP1, connect=True)
    chains, inspectors = [plain], []
    if snapshot.trust_bundles:
        plain.filter_chain_match = listener_v3.FilterChainMatch(transport_protocol="raw_buffer")
        mutual = _chain("mtls", site.PROXY, proxy_filters(), _CODEC.HTTP1, connect=True)
        mutual.filter_chain_match = listener_v3.FilterChainMatch(transport_protocol="tls")
        mutual.transport_socket = _mutual_tls(snapshot, certificates.door)
        chains, inspectors = [plain, mutual], [_tls_inspector()]
    return _door(site.PROXY, place.proxy, chains, inspectors)


def base_url_listener(place: Site) -> listener_v3.Listener:
    """The reverse proxy."""
    return _door(site.BASE_URL, place.base_url, [_chain("plain", site.BASE_URL, call_filters(), _CODEC.HTTP1)], [])


def inner_listeners(certificates: Certificates) -> list[listener_v3.Listener]:
    """Where tunnels end: by name, and, only if the catalog has any, by address."""
    plain = _chain("plain", site.INNER, call_filters(), _CODEC.HTTP1)
    plain.filter_chain_match = listener_v3.FilterChainMatch(transport_protocol="raw_buffer")
    chains = [plain]
    if certificates.hosts:
        named = _chain("tls", site.INNER, call_filters(), _CODEC.AUTO)
        named.filter_chain_match = listener_v3.FilterChainMatch(transport_protocol="tls", server_names=sorted(certificates.hosts))
        named.transport_socket = _server_tls([certificates.hosts[host] for host in sorted(certificates.hosts)])
        chains.append(named)
    listeners = [_internal(site.INNER, chains)]
    if certificates.addresses:
        by_address = _chain("tls", site.INNER, call_filters(), _CODEC.AUTO)
        by_address.filter_chain_match = listener_v3.FilterChainMatch(transport_protocol="tls")
        by_address.transport_socket = _server_tls([certificates.addresses])
        listeners.append(_internal(site.INNER_ADDRESSES, [by_address]))
    return listeners


def _door(
    name: str, address: tuple[str, int], chains: list[listener_v3.FilterChain], inspectors: list[listener_v3.ListenerFilter]
) -> listener_v3.Listener:
    return listener_v3.Listener(
        name=name,
        address=socket(address),
        # Two Envoys must never share a door silently.
        enable_reuse_port=False,
        per_connection_buffer_limit_bytes=BUFFER_BYTES,
        listener_filters=inspectors,
        listener_filters_timeout=seconds(5),
        filter_chains=chains,
        access_log=[connection_access_log()],
    )


def _internal(name: str, chains: list[listener_v3.FilterChain]) -> listener_v3.Listener:
    return listener_v3.Listener(
        name=name,
        internal_listener=listener_v3.ListenerInternalListenerConfig(),
        per_connection_buffer_limit_bytes=BUFFER_BYTES,
        listener_filters=[_tls_inspector()],
        listener_filters_timeout=seconds(5),
        filter_chains=chains,
        access_log=[connection_access_log()],
    )


def _tls_inspector() -> listener_v3.ListenerFilter:
    return listener_v3.ListenerFilter(name="envoy.filters.listener.tls_inspector", typed_config=any_of(TlsInspector()))


def _chain(
    name: str, routes: str, filters: list[hcm.HttpFilter], codec: hcm.HttpConnectionManagerCodecType, *, connect: bool = False
) -> listener_v3.FilterChain:
    manager = hcm.HttpConnectionManager(
        codec_type=codec,
        stat_prefix=f"{routes}-{name}",
        rds=hcm.Rds(config_source=ADS, route_config_name=routes),
        http_filters=filters,
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
        upgrade_configs=[hcm.HttpConnectionManagerUpgradeConfig(upgrade_type="CONNECT")] if connect else [],
    )
    return listener_v3.FilterChain(
        name=name,
        filters=[listener_v3.Filter(name="envoy.filters.network.http_connection_manager", typed_config=any_of(manager))],
        transport_socket_connect_timeout=seconds(10),
    )


def _certificate(leaf: Leaf) -> tls.TlsCertificate:
    return tls.TlsCertificate(certificate_chain=inline(leaf.chain), private_key=inline(leaf.key))


def _tls_socket(context: tls.DownstreamTlsContext) -> core.TransportSocket:
    return core.TransportSocket(name="envoy.transport_sockets.tls", typed_config=any_of(context))


def _server_tls(leaves: list[Leaf]) -> core.TransportSocket:
    return _tls_socket(
        tls.DownstreamTlsContext(
            common_tls_context=tls.CommonTlsContext(
                alpn_protocols=["h2", "http/1.1"], tls_certificates=[_certificate(leaf) for leaf in leaves]
            ),
            # A resumed session must not outlive a change of the declared hosts.
            disable_stateless_session_resumption=True,
            disable_stateful_session_resumption=True,
        )
    )


def _mutual_tls(snapshot: PolicySnapshot, door: Leaf) -> core.TransportSocket:
    domains = [
        tls.SpiffeCertValidatorConfigTrustDomain(name=name, trust_bundle=inline(pem))
        for name, pem in sorted(snapshot.trust_bundles.items())
    ]
    validator = core.TypedExtensionConfig(
        name="envoy.tls.cert_validator.spiffe", typed_config=any_of(tls.SpiffeCertValidatorConfig(trust_domains=domains))
    )
    return _tls_socket(
        tls.DownstreamTlsContext(
            common_tls_context=tls.CommonTlsContext(
                alpn_protocols=["http/1.1"],
                tls_certificates=[_certificate(door)],
                validation_context=tls.CertificateValidationContext(custom_validator_config=validator),
            ),
            require_client_certificate=True,
            disable_stateless_session_resumption=True,
            disable_stateful_session_resumption=True,
        )
    )
