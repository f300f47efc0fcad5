"""Short ways to say what Envoy's API says at length."""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import betterproto2
import envoy_data_plane.envoy.config.core.v3 as core
from envoy_data_plane.envoy.config.endpoint.v3 import ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints
from envoy_data_plane.envoy.extensions.retry.host.previous_hosts.v3 import PreviousHostsPredicate
from envoy_data_plane.google.protobuf import Any

from broker.dataplane.site import PROCESSOR

ADS = core.ConfigSource(ads=core.AggregatedConfigSource(), resource_api_version=core.ApiVersion.V3)

Place = TypeVar("Place")


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


def extension(place: Callable[..., Place], name: str, config: betterproto2.Message) -> Place:
    """An extension of Envoy's by name, for the `place` that it stands in (`HttpFilter`, `TransportSocket`, …)."""
    return place(name=name, typed_config=Any.pack(config))


# A call that no processor has seen may go to another one. What was sent may have been counted and recorded: never that.
_ANOTHER = core.RetryPolicy(
    retry_on="connect-failure,refused-stream",
    num_retries=2,
    retry_back_off=core.BackoffStrategy(base_interval=timedelta(milliseconds=10), max_interval=timedelta(milliseconds=50)),
    # Who is dead has the fewest calls open, and would be chosen again.
    retry_host_predicate=[
        extension(core.RetryPolicyRetryHostPredicate, "envoy.retry_host_predicates.previous_hosts", PreviousHostsPredicate())
    ],
    host_selection_retry_max_attempts=20,
)


def to_processor(timeout: timedelta | None = None) -> core.GrpcService:
    """A processor, over gRPC."""
    return core.GrpcService(envoy_grpc=core.GrpcServiceEnvoyGrpc(cluster_name=PROCESSOR), timeout=timeout, retry_policy=_ANOTHER)


def ads_from_processor() -> core.GrpcService:
    """The configuration, from a processor: asked for again and again until there is one."""
    again = core.RetryPolicy(retry_back_off=core.BackoffStrategy(base_interval=seconds(0.05), max_interval=seconds(0.25)))
    return core.GrpcService(envoy_grpc=core.GrpcServiceEnvoyGrpc(cluster_name=PROCESSOR, retry_policy=again))


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


def endpoints(cluster: str, *addresses: core.Address) -> ClusterLoadAssignment:
    """A cluster's endpoints."""
    each = [LbEndpoint(endpoint=Endpoint(address=address)) for address in addresses]
    return ClusterLoadAssignment(cluster_name=cluster, endpoints=[LocalityLbEndpoints(lb_endpoints=each)])
