"""ext_authz: who may open which tunnel (CONNECT)."""

from typing import Any

import grpc
from envoy.service.auth.v3.external_auth_pb2 import CheckResponse
from envoy.service.auth.v3.external_auth_pb2_grpc import AuthorizationServicer
from google.rpc.code_pb2 import OK, PERMISSION_DENIED

from broker.dataplane import site
from broker.events import Services
from broker.identity import Evidence, Principal
from broker.policy.types import Door
from broker.protocols.base import Reply
from broker.tunnel import authorize


class ExtAuthz(AuthorizationServicer):  # type: ignore[misc]  # generated without types
    """Answers Envoy's check of each CONNECT."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def Check(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: ARG002, N802
        """Open, with the identity that the tunnel carries, or refused with a problem body."""
        attributes = request.attributes
        http = attributes.request.http
        outcome = authorize(self._services, _evidence(attributes), http.host)
        return _refused(outcome) if isinstance(outcome, Reply) else _opened(outcome)


def _evidence(attributes: Any) -> Evidence:
    told = attributes.metadata_context.filter_metadata
    if site.NAMESPACE_METADATA in told:  # a namespace is its agent's: what a request says beside it counts for nothing
        owner = told[site.NAMESPACE_METADATA]
        return Evidence(Door.NAMESPACE, carried=(owner["agent"], ""), namespace=owner["namespace"])
    return Evidence(
        door=Door.PROXY,
        # Filled by Envoy from a verified client certificate only; a plain connection has none.
        peer_uri=attributes.source.principal,
        proxy_authorization=attributes.request.http.headers.get("proxy-authorization"),
    )


def _opened(principal: Principal) -> Any:
    carried = {site.GATE_KEY: site.GATE_ALLOW, "agent": principal.agent, "token": principal.encode()}
    return CheckResponse(status={"code": OK}, ok_response={}, dynamic_metadata=carried)


def _refused(reply: Reply) -> Any:
    headers = [{"header": {"key": name, "value": value}} for name, value in reply.headers]
    denied = {"status": {"code": reply.status}, "headers": headers, "body": reply.body.decode()}
    return CheckResponse(status={"code": PERMISSION_DENIED}, denied_response=denied)
