"""Short ways to say what Envoy's API says at length."""

from datetime import timedelta

import betterproto2
from envoy_data_plane.envoy.config.core.v3 import (
    Address,
    AggregatedConfigSource,
    ApiVersion,
    ConfigSource,
    DataSource,
    GrpcService,
    GrpcServiceEnvoyGrpc,
    SocketAddress,
)
from envoy_data_plane.envoy.config.endpoint.v3 import ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints
from envoy_data_plane.google.protobuf import Any

ADS = ConfigSource(ads=AggregatedConfigSource(), resource_api_version=ApiVersion.V3)


def any_of(message: betterproto2.Message) -> Any:
    """The message packed with its type URL."""
    return Any.pack(message)


def seconds(value: float) -> timedelta:
    """A duration."""
    return timedelta(seconds=value)


def inline(text: str) -> DataSource:
    """A PEM given in the configuration itself."""
    return DataSource(inline_string=text)


def grpc_to(cluster: str, timeout: float | None = None) -> GrpcService:
    """A gRPC service at one of the bootstrap's clusters."""
    return GrpcService(
        envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=cluster), timeout=seconds(timeout) if timeout is not None else None
    )


def socket(address: tuple[str, int]) -> Address:
    """A TCP address."""
    return Address(socket_address=SocketAddress(address=address[0], port_value=address[1]))


def one_endpoint(cluster: str, address: Address) -> ClusterLoadAssignment:
    """A cluster's only endpoint."""
    endpoint = LbEndpoint(endpoint=Endpoint(address=address))
    return ClusterLoadAssignment(cluster_name=cluster, endpoints=[LocalityLbEndpoints(lb_endpoints=[endpoint])])
