"""The whole of Envoy's configuration for one snapshot, and the bootstrap that leads Envoy to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import betterproto2
import envoy_data_plane.envoy.config.bootstrap.v3 as bootstrap_v3
import envoy_data_plane.envoy.config.core.v3 as core
import envoy_data_plane.envoy.config.overload.v3 as overload
from envoy_data_plane.envoy.extensions.bootstrap.internal_listener.v3 import InternalListener
from envoy_data_plane.envoy.extensions.resource_monitors.downstream_connections.v3 import DownstreamConnectionsConfig

from broker.dataplane import clusters, listeners, namespaces, routes, site
from broker.dataplane.proto import ADS, ads_from_processor, extension
from broker.dataplane.site import Certificates, Namespace, Site
from broker.policy.snapshot import PolicySnapshot


@dataclass(frozen=True, slots=True)
class Resources:
    """What ADS serves, in the order in which Envoy must learn it: what is pointed at before what points."""

    clusters: Sequence[betterproto2.Message]
    listeners: Sequence[betterproto2.Message]
    routes: Sequence[betterproto2.Message]


@dataclass(frozen=True, slots=True)
class Written:
    """The same in Envoy's own form: what stays as it is need not be written again."""

    clusters: Sequence[bytes]
    listeners: Sequence[bytes]
    routes: Sequence[bytes]

    @classmethod
    def of(cls, made: Resources) -> "Written":
        """The resources, written."""
        return cls(*(tuple(map(bytes, part)) for part in (made.clusters, made.listeners, made.routes)))

    @classmethod
    def all(cls, *parts: "Written") -> "Written":
        """All of these together."""
        return cls(
            tuple(chain.from_iterable(each.clusters for each in parts)),
            tuple(chain.from_iterable(each.listeners for each in parts)),
            tuple(chain.from_iterable(each.routes for each in parts)),
        )


def resources(snapshot: PolicySnapshot, place: Site, certificates: Certificates) -> Resources:
    """Envoy's configuration for one snapshot."""
    tools = [clusters.tool(tool, place.system_roots) for _, tool in sorted(snapshot.tools.items())]
    return Resources(
        [clusters.internal(site.INNER), clusters.internal(site.INNER_ADDRESSES), *tools],
        [*listeners.inner(certificates), listeners.proxy(snapshot, place, certificates), listeners.base_url(place)],
        [routes.proxy(snapshot), routes.inner(snapshot), routes.base_url(snapshot)],
    )


def shared_by_namespaces(snapshot: PolicySnapshot, certificates: Certificates) -> Resources:
    """What is there beside these, once there are namespaces: where their doors lead."""
    inner, by_address = routes.INNER_OF[site.NAMESPACE_PROXY]
    return Resources(
        [clusters.internal(inner), clusters.internal(by_address)],
        listeners.inner(certificates, site.NAMESPACE_PROXY),
        [routes.proxy(snapshot, site.NAMESPACE_PROXY), routes.inner(snapshot, inner)],
    )


def doors_of(snapshot: PolicySnapshot, namespace: Namespace) -> Resources:
    """The doors inside one namespace."""
    return Resources([], [namespaces.doors(namespace), namespaces.dns(snapshot, namespace)], [])


def bootstrap(place: Site) -> bootstrap_v3.Bootstrap:
    """What Envoy starts with: the processors' sockets, and the word that all else comes from there."""
    ads = core.ApiConfigSource(
        api_type=core.ApiConfigSourceApiType.GRPC,
        transport_api_version=core.ApiVersion.V3,
        grpc_services=[ads_from_processor()],
        set_node_on_first_message_only=True,
    )
    internal = extension(core.TypedExtensionConfig, "envoy.bootstrap.internal_listener", InternalListener())
    most = DownstreamConnectionsConfig(max_active_downstream_connections=place.connections)
    flooded = extension(overload.ResourceMonitor, "envoy.resource_monitors.global_downstream_max_connections", most)
    admin = core.Address(pipe=core.Pipe(path=place.admin_socket, mode=0o600))
    return bootstrap_v3.Bootstrap(
        node=core.Node(id="broker", cluster="broker"),
        admin=bootstrap_v3.Admin(address=admin, ignore_global_conn_limit=True),
        static_resources=bootstrap_v3.BootstrapStaticResources(clusters=[clusters.processor(place.processors)]),
        dynamic_resources=bootstrap_v3.BootstrapDynamicResources(ads_config=ads, cds_config=ADS, lds_config=ADS),
        bootstrap_extensions=[internal],
        overload_manager=overload.OverloadManager(resource_monitors=[flooded]),
    )
