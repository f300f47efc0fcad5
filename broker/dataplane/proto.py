"""Short ways to say what Envoy's API says at length."""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import betterproto2
import envoy_data_plane.envoy.config.core.v3 as core
from envoy_data_plane.envoy.config.endpoint.v3 import ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints
from envoy_data_plane.google.protobuf import Any

from broker.dataplane.site import PROCESSOR

ADS = core.ConfigSource(ads=core.AggregatedConfigSource(), resource_api_version=core.ApiVersion.V3)

Place = TypeVar("Place")


def extension(place: Callable[..., Place], name: str, config: betterproto2.Message) -> Place:
    """An extension of Envoy's by name, for the `place` that it stands in (`HttpFilter`, `TransportSocket`, …)."""
    return place(name=name, typed_config=Any.pack(config))


def in_json(message: betterproto2.Message) -> dict[str, object]:
    """A message as Envoy reads it in JSON or YAML."""
    # betterproto2 has its own idea of a digit in a name; protobuf's leaves the letter after it as it is.
    found: dict[str, object] = json.loads(message.to_json().replace('"enforcingConsecutive5Xx"', '"enforcingConsecutive5xx"'))
    return found


def seconds(value: float) -> timedelta:
    """A duration."""
    return timedelta(seconds=value)


def inline(text: str) -> core.DataSource:
    """Text given in the configuration itself."""
    return core.DataSource(inline_string=text)


def to_processor(timeout: timedelta | None = None, retry: core.RetryPolicy | None = None) -> core.GrpcService:
    """The processor, over gRPC."""
    return core.GrpcService(envoy_grpc=core.GrpcServiceEnvoyGrpc(cluster_name=PROCESSOR, retry_policy=retry), timeout=timeout)


def sds(path: str) -> core.ConfigSource:
    """Secrets from a Unix socket, of which only Envoy knows the contents.

    By gRPC's own client, because Envoy's wants a cluster of the bootstrap: the socket could then not change without a restart.
    """
    patience = core.GrpcServiceGoogleGrpcChannelArgsValue(int_value=1000)
    channel = core.GrpcServiceGoogleGrpcChannelArgs(args={"grpc.max_reconnect_backoff_ms": patience})
    client = core.GrpcServiceGoogleGrpc(target_uri=f"unix:{path}", stat_prefix="sds", channel_args=channel)
    api = core.ApiConfigSource(
        api_type=core.ApiConfigSourceApiType.GRPC,
        transport_api_version=core.ApiVersion.V3,
        grpc_services=[core.GrpcService(google_grpc=client)],
    )
    # How long listeners wait for their first secrets; then they open, and what needs a secret stays closed.
    return core.ConfigSource(api_config_source=api, resource_api_version=core.ApiVersion.V3, initial_fetch_timeout=seconds(1))


def socket(address: tuple[str, int], namespace: str = "", *, udp: bool = False) -> core.Address:
    """An address of TCP or UDP; with a `namespace` (a path that opens it), in that network namespace."""
    protocol = core.SocketAddressProtocol.UDP if udp else core.SocketAddressProtocol.TCP
    host, port = address
    return core.Address(
        socket_address=core.SocketAddress(protocol=protocol, address=host, port_value=port, network_namespace_filepath=namespace)
    )


def one_endpoint(cluster: str, address: core.Address) -> ClusterLoadAssignment:
    """A cluster's only endpoint."""
    endpoint = LbEndpoint(endpoint=Endpoint(address=address))
    return ClusterLoadAssignment(cluster_name=cluster, endpoints=[LocalityLbEndpoints(lb_endpoints=[endpoint])])
