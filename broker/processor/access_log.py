"""Envoy's access log, as far as it tells what the processor never saw: requests and connections refused below it, and names.

Law: what an agent does without a limit is not recorded without one.
"""

from collections import Counter
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
from envoy.service.accesslog.v3.als_pb2 import StreamAccessLogsResponse
from envoy.service.accesslog.v3.als_pb2_grpc import AccessLogServiceServicer
from google.protobuf.wrappers_pb2 import StringValue

from broker.case import Case
from broker.dataplane import site
from broker.dataplane.namespaces import hosts
from broker.events import Services
from broker.policy.types import Code, Door, deny
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
        self._minute = 0.0
        self._names: dict[str, set[str]] = {}  # by agent, of which there is no more to say in this minute
        self._told = Counter[str]()

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
                if tags := entry.common_properties.custom_tags:
                    self._question(tags[site.ASKING], *tags[site.ASKED].split(" ", 1))
                else:
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

    def _question(self, agent: str, answer: str, name: str) -> None:
        """A name that no tool of the agent's has: each once a minute, of an agent the first so many, then that there are more."""
        if answer == _ANSWERED or name in _NO_NAME:
            return
        snapshot, minute = self._services.snapshot(), self._services.steady() // 60
        if minute != self._minute:
            self._minute, self._names, self._told = minute, {}, Counter()
        if agent not in self._names:
            self._names[agent] = set(hosts(snapshot, agent))  # of these only IPv6 addresses, or other things, can be in vain
        if (name := name.lower()) in self._names[agent] or self._told[agent] > _NAMES or agent not in snapshot.agents:
            return
        self._names[agent].add(name)
        self._told[agent] += 1
        more = self._told[agent] > _NAMES
        case = Case(self._services, door=Door.NAMESPACE, host="" if more else name)
        case.note(agent=snapshot.agents[agent].described)
        what = f"for more than {_NAMES} such names within a minute" if more else f"for {name!r}, which is not declared"
        case.record(deny(Code.HOST_NOT_DECLARED, f"DNS was asked {what}"))

    def _case(self, common: Any, decision_id: str, host: str) -> Case:
        case = Case(self._services, decision_id, host=host)
        carried = common.filter_state_objects.get(site.STATE_AGENT)
        if carried is not None and (agent := case.snapshot.agents.get(_text(carried))):
            case.note(agent=agent.described)
        return case


# An answer's code; what stands for the root, and for a question that can't be read.
_ANSWERED, _NO_NAME = "0", ("", "-")
_NAMES = 20  # more than a program that means well looks up in vain within a minute

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
