"""The one socket at which Envoy reaches the processor."""

from pathlib import Path

import grpc
from envoy.service.accesslog.v3.als_pb2_grpc import add_AccessLogServiceServicer_to_server
from envoy.service.auth.v3.external_auth_pb2_grpc import add_AuthorizationServicer_to_server
from envoy.service.discovery.v3.ads_pb2_grpc import add_AggregatedDiscoveryServiceServicer_to_server
from envoy.service.ext_proc.v3.external_processor_pb2_grpc import add_ExternalProcessorServicer_to_server
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from broker.events import Services
from broker.processor.access_log import AccessLog
from broker.processor.ext_authz import ExtAuthz
from broker.processor.ext_proc import ExtProc
from broker.processor.health import Health
from broker.processor.xds import Ads

_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.so_reuseport", 0),
    # Envoy's pings tell a processor that hangs from one that has nothing to say; gRPC would take so many for an attack.
    ("grpc.http2.max_ping_strikes", 0),
]


async def listening(services: Services, ads: Ads, health: Health, path: Path) -> grpc.aio.Server:
    """A server that has begun, on a Unix socket that its own user may use. What lies at `path` is a dead one's."""
    server = grpc.aio.server(options=_OPTIONS)
    add_ExternalProcessorServicer_to_server(ExtProc(services), server)
    add_AuthorizationServicer_to_server(ExtAuthz(services), server)
    add_AggregatedDiscoveryServiceServicer_to_server(ads, server)
    add_AccessLogServiceServicer_to_server(AccessLog(services), server)
    add_HealthServicer_to_server(health, server)
    path.unlink(missing_ok=True)  # noqa: ASYNC240 - one system call
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    path.chmod(0o600)  # noqa: ASYNC240 - one system call
    return server
