"""Between Envoy's ext_proc messages and the exchange's events and commands."""

from collections.abc import Iterable, Mapping
from typing import Any

from envoy.config.core.v3.base_pb2 import HeaderValueOption
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingResponse
from google.protobuf.struct_pb2 import Struct

from broker.dataplane import site
from broker.dataplane.filters import EXT_PROC, OBSERVED
from broker.events import (
    Command,
    Event,
    Mark,
    Observe,
    Pass,
    Replace,
    RequestBody,
    RequestHead,
    ResponseChunk,
    ResponseHead,
    ResponseTrailers,
    Send,
)
from broker.identity import Evidence
from broker.policy.agreement import Wire
from broker.policy.types import Door, Request
from broker.protocols.base import Reply

BROKER_REPLY = "broker_reply"
"""The response code details of an answer that the broker gave itself."""

_OBSERVED = ProcessingMode.FromString(bytes(OBSERVED))
_PROOF = Struct()  # made once: a quarter of what an allow took to write was this
_PROOF[site.GATE_NAMESPACE] = {site.GATE_KEY: site.GATE_ALLOW}
_DOORS = {
    site.PROXY: Door.PROXY,
    site.INNER: Door.PROXY,
    site.BASE_URL: Door.BASE_URL,
    site.NAMESPACE_PROXY: Door.NAMESPACE,
    site.NAMESPACE: Door.NAMESPACE,
}
_INSIDE = (site.INNER, site.NAMESPACE)


def event_of(message: Any) -> Event | None:
    """The event in a `ProcessingRequest`; None for one that needs no decision (a request's trailers)."""
    kind = message.WhichOneof("request")
    if kind == "request_headers":
        return _request_head(message)
    if kind == "request_body":
        # A buffered body is whole, so the stream goes on after it only where trailers follow.
        return RequestBody(message.request_body.body, trailers=not message.request_body.end_of_stream)
    if kind == "response_headers":
        return _response_head(message)
    if kind == "response_body":
        return ResponseChunk(message.response_body.body, message.response_body.end_of_stream)
    if kind == "response_trailers":
        return ResponseTrailers(
            tuple((each.key, each.raw_value.decode("latin-1")) for each in message.response_trailers.trailers.headers)
        )
    return None


def _attributes(message: Any) -> dict[str, str]:
    fields = message.attributes[EXT_PROC].fields if EXT_PROC in message.attributes else {}
    return {name: value.string_value for name, value in fields.items()}


def _headers(headers: Any) -> list[tuple[str, str]]:
    # Latin-1 keeps every byte of an obsolete header value; the path is judged byte for byte (policy/match.py).
    return [(header.key, header.raw_value.decode("latin-1")) for header in headers.headers.headers]


def _request_head(message: Any) -> RequestHead:
    attributes = _attributes(message)
    pairs = _headers(message.request_headers)
    pseudo = {name: value for name, value in pairs if name.startswith(":")}
    headers = tuple(pair for pair in pairs if not pair[0].startswith(":"))
    path, _, query = pseudo.get(":path", "").partition("?")
    request = Request(pseudo.get(":method", ""), path, query, headers)
    listener, _, tool = attributes.get("xds.route_name", "").partition("/")
    door, inside = _DOORS[listener], listener in _INSIDE
    agent, token, connect_host = (attributes.get(name, "") for name in site.CARRIED)
    wire = Wire(
        door=door,
        scheme=pseudo.get(":scheme", ""),
        authority=pseudo.get(":authority", ""),
        path=path,
        sni=attributes.get("connection.requested_server_name", "") if inside else "",
        connect_host=connect_host if inside else "",
        route_tool=tool,
    )
    evidence = Evidence(
        door=door,
        peer_uri="" if inside else attributes.get("connection.uri_san_peer_certificate", ""),
        peer_times=token,
        # The doors of a namespace carry its agent and which one it is themselves.
        carried=(agent, "") if door is Door.NAMESPACE else (agent, token) if inside else None,
        namespace=token if door is Door.NAMESPACE else "",
        proxy_authorization=request.only("proxy-authorization"),
        token=request.only(site.TOKEN_HEADER),
    )
    return RequestHead(wire, request, evidence, not message.request_headers.end_of_stream, attributes.get("request.protocol", ""))


def _response_head(message: Any) -> ResponseHead:
    headers = _headers(message.response_headers)
    status = next((value for name, value in headers if name == ":status"), "")
    attributes = _attributes(message)
    return ResponseHead(
        status=int(status) if status.isdigit() else 0,
        headers=tuple(headers),
        details=attributes.get("response.code_details", ""),
        has_body=not message.response_headers.end_of_stream,
        agent=attributes.get(site.CARRIED[0], ""),
    )


def response_of(command: Command, message: Any) -> Any:
    """The `ProcessingResponse` that carries out `command` in answer to `message`. `Issue` and `Cut` are the driver's."""
    match command:
        case Reply():
            return ProcessingResponse(immediate_response=_immediate(command))
        case Send(path=path, set_headers=headers):
            pairs = headers if path is None else (*headers, (":path", path))
            common: dict[str, Any] = {}
            if command.body is not None:
                pairs = (*pairs, ("content-length", str(len(command.body))))
                common["body_mutation"] = {"body": command.body}
            common["header_mutation"] = {"set_headers": _set(pairs), "remove_headers": command.remove_headers}
            return _answer(message, common, dynamic_metadata=_PROOF)
        case Mark():
            return _answer(message, {"header_mutation": {"set_headers": _set([(site.DECISION_HEADER, command.decision_id)])}})
        case Replace():
            return _answer(message, {"body_mutation": {"body": command.data}})
        case Observe():
            mutation = {"remove_headers": ["content-length"], "set_headers": _set(command.set_headers)}
            return _answer(message, {"header_mutation": mutation}, mode_override=_OBSERVED)
        case Pass() if command.set_headers and message.HasField("response_trailers"):
            return ProcessingResponse(response_trailers={"header_mutation": {"set_headers": _set(command.set_headers)}})
        case Pass() if command.set_headers:
            return _answer(message, {"header_mutation": {"set_headers": _set(command.set_headers)}})
        case _:
            return unchanged(message)


def unchanged(message: Any) -> Any:
    """Go on without a change, and without proof."""
    return ProcessingResponse(**{message.WhichOneof("request"): {}})


def _answer(message: Any, common: Mapping[str, Any], **beside: Any) -> Any:
    # A response's field has the name of the request's that it answers, and a dict fills any message in less than half the time.
    return ProcessingResponse(**{message.WhichOneof("request"): {"response": common}}, **beside)


def _immediate(reply: Reply) -> Mapping[str, Any]:
    headers = {"set_headers": _set(reply.headers)}
    return {"status": {"code": reply.status}, "headers": headers, "body": reply.body, "details": BROKER_REPLY}


def _set(pairs: Iterable[tuple[str, str]]) -> list[Mapping[str, Any]]:
    """The first of a name replaces all that are there; what follows of it is added."""
    told: set[str] = set()
    options: list[Mapping[str, Any]] = []
    for name, value in pairs:
        how = HeaderValueOption.APPEND_IF_EXISTS_OR_ADD if name in told else HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
        told.add(name)
        options.append({"header": {"key": name, "raw_value": value.encode("latin-1", "replace")}, "append_action": how})
    return options
