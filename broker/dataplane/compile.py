"""The whole of Envoy's configuration for one snapshot, and the bootstrap that leads Envoy to it."""

from collections.abc import Sequence
from dataclasses import dataclass

import betterproto2
import envoy_data_plane.envoy.config.bootstrap.v3 as bootstrap_v3
import envoy_data_plane.envoy.config.cluster.v3 as cluster_v3
import envoy_data_plane.envoy.config.core.v3 as core
import envoy_data_plane.envoy.extensions.upstreams.http.v3 as upstream_http
from envoy_data_plane.envoy.extensions.bootstrap.internal_listener.v3 import InternalListener
from envoy_data_plane.envoy.extensions.transport_sockets.internal_upstream.v3 import InternalUpstreamTransport
from envoy_data_plane.envoy.extensions.transport_sockets.raw_buffer.v3 import RawBuffer

from broker.dataplane import site
from broker.dataplane.clusters import cluster
from broker.dataplane.listeners import base_url_listener, inner_listeners, proxy_listener
from broker.dataplane.proto import ADS, any_of, one_endpoint, seconds
from broker.dataplane.routes import base_url_routes, inner_routes, proxy_routes
from broker.dataplane.site import Certificates, Site
from broker.policy.snapshot import PolicySnapshot

_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


@dataclass(frozen=True, slots=True)
class Resources:
    """What ADS serves, in the order in which Envoy must learn it: what is pointed at before what points."""

    clusters: Sequence[betterproto2.Message]
    listeners: Sequence[betterproto2.Message]
    routes: Sequence[betterproto2.Message]


def resources(snapshot: PolicySnapshot, place: Site, certificates: Certificates) -> Resources:
    """Envoy's configuration for one snapshot."""
    tools = sorted(snapshot.tools.values(), key=lambda tool: tool.name)
    return Resources(
        clusters=[
            *(_internal_cluster(name) for name in (site.INNER, site.INNER_ADDRESSES)),
            *(cluster(t, place.system_roots) for t in tools),
        ],
        listeners=[*inner_listeners(certificates), proxy_listener(snapshot, place, certificates), base_url_listener(place)],
        routes=[proxy_routes(snapshot), inner_routes(snapshot), base_url_routes(snapshot)],
    )


def bootstrap(place: Site) -> bootstrap_v3.Bootstrap:
    """What Envoy starts with: the processor's socket, and the word that all else comes from there."""
    retry = core.RetryPolicy(retry_back_off=core.BackoffStrategy(base_interval=seconds(0.05), max_interval=seconds(0.25)))
    ads = core.ApiConfigSource(
        api_type=core.ApiConfigSourceApiType.GRPC,
        transport_api_version=core.ApiVersion.V3,
        grpc_services=[core.GrpcService(envoy_grpc=core.GrpcServiceEnvoyGrpc(cluster_name=site.PROCESSOR, retry_policy=retry))],
        set_node_on_first_message_only=True,
    )
    return bootstrap_v3.Bootstrap(
        node=core.Node(id="broker", cluster="broker"),
        admin=bootstrap_v3.Admin(address=core.Address(pipe=core.Pipe(path=place.admin_socket, mode=0o600))),
        static_resources=bootstrap_v3.BootstrapStaticResources(clusters=[_processor(place.processor_socket)]),
        dynamic_resources=bootstrap_v3.BootstrapDynamicResources(ads_config=ads, cds_config=ADS, lds_config=ADS),
        bootstrap_extensions=[
            core.TypedExtensionConfig(name="envoy.bootstrap.internal_listener", typed_config=any_of(InternalListener()))
        ],
    )


def _processor(path: str) -> cluster_v3.Cluster:
    options = upstream_http.HttpProtocolOptions(
        explicit_http_config=upstream_http.HttpProtocolOptionsExplicitHttpConfig(
            http2_protocol_options=core.Http2ProtocolOptions()
        )
    )
    return cluster_v3.Cluster(
        name=site.PROCESSOR,
        type=cluster_v3.ClusterDiscoveryType.STATIC,
        connect_timeout=seconds(1),
        load_assignment=one_endpoint(site.PROCESSOR, core.Address(pipe=core.Pipe(path=path))),
        typed_extension_protocol_options={_HTTP_OPTIONS: any_of(options)},
    )


def _internal_cluster(listener: str) -> cluster_v3.Cluster:
    raw = core.TransportSocket(name="envoy.transport_sockets.raw_buffer", typed_config=any_of(RawBuffer()))
    return cluster_v3.Cluster(
        name=listener,
        type=cluster_v3.ClusterDiscoveryType.STATIC,
        connect_timeout=seconds(1),
        load_assignment=one_endpoint(
            listener, core.Address(envoy_internal_address=core.EnvoyInternalAddress(server_listener_name=listener))
        ),
        transport_socket=core.TransportSocket(
            name="envoy.transport_sockets.internal_upstream", typed_config=any_of(InternalUpstreamTransport(transport_socket=raw))
        ),
    )
