"""Between Envoy's ext_proc messages and the exchange's events and commands."""

from typing import Any

from envoy.config.core.v3.base_pb2 import HeaderValue, HeaderValueOption
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3.external_processor_pb2 import (
    BodyMutation,
    BodyResponse,
    CommonResponse,
    HeaderMutation,
    HeadersResponse,
    ImmediateResponse,
    ProcessingResponse,
    TrailersResponse,
)
from google.protobuf.struct_pb2 import Struct

from broker.dataplane import site
from broker.events import Command, Event, Mark, Observe, Replace, RequestBody, RequestHead, ResponseChunk, ResponseHead, Send
from broker.identity import Evidence
from broker.policy.agreement import Wire
from broker.policy.types import Door, Request
from broker.protocols.base import Reply

BROKER_REPLY = "broker_reply"
"""The response code details of an answer that the broker gave itself."""

_FILTER = "envoy.filters.http.ext_proc"
_OBSERVED = ProcessingMode(
    request_trailer_mode=ProcessingMode.SKIP,
    request_body_mode=ProcessingMode.BUFFERED,
    response_header_mode=ProcessingMode.SEND,
    response_body_mode=ProcessingMode.STREAMED,
    response_trailer_mode=ProcessingMode.SEND,
)
_PROOF = Struct()  # made once: a quarter of what an allow took to write was this
_PROOF[site.GATE_NAMESPACE] = {site.GATE_KEY: site.GATE_ALLOW}
_DOORS = {site.PROXY: Door.PROXY, site.INNER: Door.PROXY, site.BASE_URL: Door.BASE_URL}


def event_of(message: Any) -> Event | None:
    """The event in a `ProcessingRequest`; None for one that needs no decision (trailers)."""
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
    return None


def _attributes(message: Any) -> dict[str, str]:
    fields = message.attributes[_FILTER].fields if _FILTER in message.attributes else {}
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
    inside = listener == site.INNER
    door = _DOORS[listener]
    wire = Wire(
        door=door,
        scheme=pseudo.get(":scheme", ""),
        authority=pseudo.get(":authority", ""),
        path=path,
        sni=attributes.get("connection.requested_server_name", "") if inside else "",
        connect_host=attributes.get(f"filter_state['{site.STATE_CONNECT_HOST}']", "") if inside else "",
        route_tool=tool,
    )
    carried = (
        attributes.get(f"filter_state['{site.STATE_AGENT}']", ""),
        attributes.get(f"filter_state['{site.STATE_TOKEN}']", ""),
    )
    evidence = Evidence(
        door=door,
        peer_uri="" if inside else attributes.get("connection.uri_san_peer_certificate", ""),
        carried=carried if inside else None,
        proxy_authorization=request.header("proxy-authorization"),
        token=request.header(site.TOKEN_HEADER),
    )
    return RequestHead(wire, request, evidence, not message.request_headers.end_of_stream, attributes.get("request.protocol", ""))


def _response_head(message: Any) -> ResponseHead:
    headers = _headers(message.response_headers)
    status = next((value for name, value in headers if name == ":status"), "")
    return ResponseHead(
        status=int(status) if status.isdigit() else 0,
        headers=tuple(headers),
        details=_attributes(message).get("response.code_details", ""),
        has_body=not message.response_headers.end_of_stream,
    )


def response_of(command: Command, message: Any) -> Any:
    """The `ProcessingResponse` that carries out `command` in answer to `message`. `Issue` and `Cut` are the driver's."""
    if isinstance(command, Reply):
        return ProcessingResponse(immediate_response=immediate(command))
    if isinstance(command, Send):
        return _proven(command, message)
    if isinstance(command, Mark):
        common = CommonResponse(header_mutation=HeaderMutation(set_headers=[_set(site.DECISION_HEADER, command.decision_id)]))
        return ProcessingResponse(response_headers=HeadersResponse(response=common))
    if isinstance(command, Replace):
        mutation = BodyMutation(body=command.data)
        return ProcessingResponse(response_body=BodyResponse(response=CommonResponse(body_mutation=mutation)))
    if isinstance(command, Observe):
        common = CommonResponse(header_mutation=HeaderMutation(remove_headers=["content-length"]))
        return ProcessingResponse(response_headers=HeadersResponse(response=common), mode_override=_OBSERVED)
    return unchanged(message)


def unchanged(message: Any) -> Any:
    """Go on without a change, and without proof."""
    kind = message.WhichOneof("request")
    if kind in ("request_trailers", "response_trailers"):
        return ProcessingResponse(**{kind: TrailersResponse()})
    if kind in ("request_body", "response_body"):
        return ProcessingResponse(**{kind: BodyResponse()})
    return ProcessingResponse(**{kind: HeadersResponse()})


def immediate(reply: Reply) -> Any:
    """The broker's own answer."""
    return ImmediateResponse(
        status={"code": reply.status},
        headers=HeaderMutation(set_headers=[_set(name, value) for name, value in reply.headers]),
        body=reply.body,
        details=BROKER_REPLY,
    )


def _set(name: str, value: str) -> Any:
    header = HeaderValue(key=name, raw_value=value.encode("latin-1", "replace"))
    return HeaderValueOption(header=header, append_action=HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD)


def _proven(command: Send, message: Any) -> Any:
    pairs = command.set_headers if command.path is None else (*command.set_headers, (":path", command.path))
    mutation = HeaderMutation(set_headers=[_set(name, value) for name, value in pairs], remove_headers=command.remove_headers)
    common = CommonResponse(header_mutation=mutation)
    if message.WhichOneof("request") == "request_body":
        return ProcessingResponse(request_body=BodyResponse(response=common), dynamic_metadata=_PROOF)
    return ProcessingResponse(request_headers=HeadersResponse(response=common), dynamic_metadata=_PROOF)
