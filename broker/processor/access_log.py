"""Envoy's access log, as far as it tells what the processor never saw: requests and connections refused below it."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
from envoy.service.accesslog.v3.als_pb2 import StreamAccessLogsResponse
from envoy.service.accesslog.v3.als_pb2_grpc import AccessLogServiceServicer
from google.protobuf.wrappers_pb2 import StringValue

from broker.case import Case
from broker.dataplane import site
from broker.events import Services
from broker.policy.types import Code, deny
from broker.processor.convert import BROKER_REPLY

# Envoy's response code details that have a code of ours; every other refusal of Envoy's is a protocol violation.
_CODES: Mapping[str, Code] = {
    "request_payload_too_large": Code.BODY_TOO_LARGE,
    "ext_proc_error": Code.INTERNAL_FAULT,
    "ext_authz_error": Code.INTERNAL_FAULT,
    "rbac_access_denied": Code.INTERNAL_FAULT,
    "filter_chain_not_found": Code.HOST_NOT_DECLARED,
}


class AccessLog(AccessLogServiceServicer):  # type: ignore[misc]  # generated without types
    """Writes a denial for each refusal that has none yet."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def StreamAccessLogs(  # noqa: N802
        self,
        request_iterator: AsyncIterator[Any],
        context: grpc.aio.ServicerContext[Any, Any],  # noqa: ARG002
    ) -> Any:
        """One of Envoy's access log streams."""
        async for message in request_iterator:
            for entry in message.http_logs.log_entry:
                self._http(entry)
            for entry in message.tcp_logs.log_entry:
                self._connection(entry)
        return StreamAccessLogsResponse()

    def _http(self, entry: Any) -> None:
        request, common = entry.request, entry.common_properties
        details = entry.response.response_code_details
        if details in _RECORDED or (request.request_method == _CONNECT and entry.response.response_code.value == _OPENED):
            return
        case = self._case(common, entry.response.response_headers.get(site.DECISION_HEADER, ""), host=request.authority)
        case.note(method=_METHODS.get(request.request_method, ""), path=request.path.partition("?")[0])
        case.record(deny(_code(details), f"Envoy refused the request: {details or 'no details'}"))

    def _connection(self, entry: Any) -> None:
        common = entry.common_properties
        failed = common.downstream_transport_failure_reason
        if any(mark in failed for mark in _CERTIFICATE):
            why = failed.removesuffix(":TLS_error_end").rpartition("OPENSSL_internal:")[2]
            self._case(common, "", host="").record(deny(Code.AGENT_UNKNOWN, f"no connection by certificate: {why}"))
            return
        details = common.connection_termination_details or common.upstream_transport_failure_reason
        if not common.response_flags.no_route_found and "filter_chain_not_found" not in details:
            return
        sni = common.tls_properties.tls_sni_hostname
        what = f"TLS was opened to {sni!r}, which is not declared" if sni else "TLS was opened without a declared name"
        self._case(common, "", host=sni).record(deny(Code.HOST_NOT_DECLARED, what))

    def _case(self, common: Any, decision_id: str, host: str) -> Case:
        case = Case(self._services, decision_id, host=host)
        carried = common.filter_state_objects.get(site.STATE_AGENT)
        if carried is not None and (agent := case.snapshot.agents.get(_text(carried))):
            case.note(agent=agent.described)
        return case


# Denials that the processor gave (immediate replies; ext_authz) are in the record. An opened tunnel is no refusal.
_RECORDED = (BROKER_REPLY, "ext_authz_denied")
# Why the proxy door's TLS ended before it began: a certificate that no bundle vouches for, none at all, or no bundles (yet).
_CERTIFICATE = ("CERTIFICATE_VERIFY_FAILED", "PEER_DID_NOT_RETURN_A_CERTIFICATE", "SDS")
_CONNECT, _OPENED = 6, 200

_METHODS = {1: "GET", 2: "HEAD", 3: "POST", 4: "PUT", 5: "DELETE", 6: "CONNECT", 7: "OPTIONS", 8: "TRACE", 9: "PATCH"}


def _code(details: str) -> Code:
    return next((code for mark, code in _CODES.items() if mark in details), Code.PROTOCOL_VIOLATION)


def _text(packed: Any) -> str:
    value = StringValue()
    return value.value if packed.Unpack(value) else ""
