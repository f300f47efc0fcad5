"""The HTTP filters that every call passes, in order: identity (tunnels only), the processor, the gate, the router.

Law: `failure_mode_allow` is never set. ext_proc lets a request through when its gRPC stream ends cleanly without an answer, so
the processor alone does not guard: the gate after it wants proof, per request, that the processor decided.
"""

from collections.abc import Mapping
from dataclasses import replace

import betterproto2
import envoy_data_plane.envoy.config.accesslog.v3 as accesslog
import envoy_data_plane.envoy.config.core.v3 as core
import envoy_data_plane.envoy.config.rbac.v3 as rbac
import envoy_data_plane.envoy.extensions.access_loggers.grpc.v3 as grpc_logs
import envoy_data_plane.envoy.extensions.filters.common.set_filter_state.v3 as filter_state
import envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 as ext_proc
import envoy_data_plane.envoy.type.matcher.v3 as matcher
from envoy_data_plane.envoy.config.common.mutation_rules.v3 import HeaderMutationRules
from envoy_data_plane.envoy.config.route.v3 import HeaderMatcher
from envoy_data_plane.envoy.extensions.filters.http.ext_authz.v3 import ExtAuthz
from envoy_data_plane.envoy.extensions.filters.http.rbac.v3 import Rbac as RbacFilter
from envoy_data_plane.envoy.extensions.filters.http.router.v3 import Router
from envoy_data_plane.envoy.extensions.filters.http.set_filter_state.v3 import Config as SetFilterState
from envoy_data_plane.envoy.extensions.filters.http.set_metadata.v3 import Config as SetMetadata
from envoy_data_plane.envoy.extensions.filters.http.set_metadata.v3 import Metadata
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.envoy.type.tracing.v3 import CustomTag, CustomTagLiteral
from envoy_data_plane.envoy.type.v3 import HttpStatus, StatusCode
from envoy_data_plane.google.protobuf import Struct

from broker.dataplane import site
from broker.dataplane.proto import extension, inline, seconds, to_processor

EXT_PROC = "envoy.filters.http.ext_proc"

# Longer than any decision takes (microseconds) and than an issuer may take; a hung processor holds a call this long, then 503.
MESSAGE_TIMEOUT_S = 2.0
# What the processor may ask for when an issuer is slow.
MAX_MESSAGE_TIMEOUT_S = 30.0

_SEND, _BODY = ext_proc.ProcessingModeHeaderSendMode, ext_proc.ProcessingModeBodySendMode
OBSERVED = ext_proc.ProcessingMode(
    request_trailer_mode=_SEND.SKIP,
    request_body_mode=_BODY.BUFFERED,
    response_header_mode=_SEND.SEND,
    response_body_mode=_BODY.STREAMED,
    # Keeps the gRPC stream open while an answer streams unseen, at no cost per chunk, so that an abort cuts it.
    response_trailer_mode=_SEND.SEND,
)
"""What the processor asks for to see an answer's body. Envoy ignores, without a word, an override that is not exactly this."""

TUNNEL = replace(OBSERVED, request_header_mode=_SEND.SKIP, request_body_mode=_BODY.NONE, response_body_mode=_BODY.NONE)
"""Of a tunnel, only that it is open: whoever may cut it holds its gRPC stream, which carries nothing until it ends."""

_UNAVAILABLE = HttpStatus(code=StatusCode.ServiceUnavailable)


def call_filters(*openers: rbac.Principal) -> list[HttpFilter]:
    """For calls: processor, gate, router. The gate lets a call pass that the processor allowed, or that is one of `openers`."""
    proven = [_proof(site.GATE_NAMESPACE), *openers]
    gate = rbac_filter(rbac.RbacAction.ALLOW, "decided", rbac.Permission(any=True), proven)
    # CVE-2025-64763: bytes sent after CONNECT and before its 200 could be read as a request of the tunnel.
    router = http_filter("router", Router(suppress_envoy_headers=True, reject_connect_request_early_data=True))
    return [_ext_proc(), gate, router]


def proxy_filters(within: site.Namespace | None = None) -> list[HttpFilter]:
    """For an explicit proxy, where CONNECT opens a tunnel: identity for tunnels, then as for calls.

    `within` a namespace, whoever comes through is its agent.
    """
    connect = rbac.Principal(header=HeaderMatcher(name=":method", string_match=matcher.StringMatcher(exact="CONNECT")))
    opener = rbac.Principal(and_ids=rbac.PrincipalSet(ids=[connect, _proof(site.EXT_AUTHZ)]))
    if within:
        return [_owner(within), _ext_authz([site.NAMESPACE_METADATA]), _owner_state(within), *call_filters(opener)]
    return [_ext_authz(), _identity_state(), *call_filters(opener)]


def http_filter(name: str, config: betterproto2.Message) -> HttpFilter:
    """One HTTP filter."""
    return extension(HttpFilter, f"envoy.filters.http.{name}", config)


def rbac_filter(
    action: rbac.RbacAction, why: str, permission: rbac.Permission, principals: list[rbac.Principal], *, upstream: bool = False
) -> HttpFilter:
    """One rule of access, named `why`; `upstream` for a cluster's filters."""
    policy = rbac.Policy(permissions=[permission], principals=principals)
    rules = rbac.Rbac(action=action, policies={why: policy})
    return http_filter("upstream_rbac" if upstream else "rbac", RbacFilter(rules=rules))


def _ext_proc() -> HttpFilter:
    return http_filter(
        "ext_proc",
        ext_proc.ExternalProcessor(
            grpc_service=to_processor(),
            failure_mode_allow=False,
            processing_mode=replace(OBSERVED, request_header_mode=_SEND.SEND, response_body_mode=_BODY.NONE),
            allow_mode_override=True,
            allowed_override_modes=[OBSERVED],
            message_timeout=seconds(MESSAGE_TIMEOUT_S),
            max_message_timeout=seconds(MAX_MESSAGE_TIMEOUT_S),
            request_attributes=list(site.ATTRIBUTES),
            response_attributes=list(site.RESPONSE_ATTRIBUTES),
            mutation_rules=HeaderMutationRules(allow_all_routing=False, allow_envoy=True, disallow_is_error=True),
            metadata_options=ext_proc.MetadataOptions(
                receiving_namespaces=ext_proc.MetadataOptionsMetadataNamespaces(untyped=[site.GATE_NAMESPACE])
            ),
            status_on_error=_UNAVAILABLE,
        ),
    )


def _ext_authz(told: list[str] | None = None) -> HttpFilter:
    return http_filter(
        "ext_authz",
        ExtAuthz(
            grpc_service=to_processor(seconds(MESSAGE_TIMEOUT_S)),
            transport_api_version=core.ApiVersion.V3,
            failure_mode_allow=False,
            status_on_error=_UNAVAILABLE,
            metadata_context_namespaces=told or [],
        ),
    )


def _identity_state() -> HttpFilter:
    values = {
        site.STATE_AGENT: f"%DYNAMIC_METADATA({site.EXT_AUTHZ}:agent)%",
        # A certificate ends like a token: what it opened passes nothing from then on.
        site.STATE_TOKEN: f"%DYNAMIC_METADATA({site.EXT_AUTHZ}:token)%%DOWNSTREAM_PEER_CERT_V_END(/%s)%",
        site.STATE_CONNECT_HOST: "%REQ(:AUTHORITY)%",
    }
    return http_filter("set_filter_state", SetFilterState(on_request_headers=carried(values)))


def _owner(within: site.Namespace) -> HttpFilter:
    # ext_authz is told no filter state. Metadata, like it, comes from filters alone: no header can set it.
    value = Struct.from_dict({"agent": within.agent, "namespace": within.carried})
    return http_filter("set_metadata", SetMetadata(metadata=[Metadata(metadata_namespace=site.NAMESPACE_METADATA, value=value)]))


def _owner_state(within: site.Namespace) -> HttpFilter:
    return http_filter("set_filter_state", SetFilterState(on_request_headers=owned(within, "%REQ(:AUTHORITY)%")))


def owned(within: site.Namespace, host: str) -> list[filter_state.FilterStateValue]:
    """What goes along with what comes from a namespace; `host`, a format string, is where it wants to."""
    known = {site.STATE_AGENT: literal(within.agent), site.STATE_TOKEN: literal(within.carried)}
    return carried({**known, site.STATE_CONNECT_HOST: host})


def literal(text: str) -> str:
    """Text as a format string that means just it."""
    return text.replace("%", "%%")


def carried(values: Mapping[str, str]) -> list[filter_state.FilterStateValue]:
    """Filter state that goes along into a tunnel: key → format string."""
    return [_carried(key, source) for key, source in values.items()]


def _carried(key: str, source: str) -> filter_state.FilterStateValue:
    return filter_state.FilterStateValue(
        object_key=key,
        # Hashable: Envoy pools its internal connections by these values. A plain `envoy.string` is left out of the pool's key,
        # and a tunnel could then lead into a connection that carries another agent's identity.
        factory_key="envoy.hashable_string",
        format_string=core.SubstitutionFormatString(text_format_source=inline(source), omit_empty_values=True),
        shared_with_upstream=filter_state.FilterStateValueSharedWithUpstream.ONCE,
        skip_if_empty=True,
    )


def _decision(namespace: str, value: matcher.ValueMatcher) -> matcher.MetadataMatcher:
    key = matcher.MetadataMatcherPathSegment(key=site.GATE_KEY)
    return matcher.MetadataMatcher(filter=namespace, path=[key], value=value)


def _proof(namespace: str) -> rbac.Principal:
    allowed = matcher.ValueMatcher(string_match=matcher.StringMatcher(exact=site.GATE_ALLOW))
    source = rbac.MetadataSource.DYNAMIC
    return rbac.Principal(
        sourced_metadata=rbac.SourcedMetadata(metadata_matcher=_decision(namespace, allowed), metadata_source=source)
    )


def http_access_log() -> accesslog.AccessLog:
    """What Envoy refused before the processor decided (framing, HTTP/1.0, upgrades) reaches the record this way.

    Requests that carry the processor's word are left out: they are recorded already.
    """
    # Envoy's log filter ignores `invert`; where the key is set, this never matches, so nothing is logged.
    decided = _decision(site.GATE_NAMESPACE, matcher.ValueMatcher(null_match=matcher.ValueMatcherNullMatch()))
    undecided = accesslog.MetadataFilter(matcher=decided, match_if_key_not_found=True)
    config = grpc_logs.HttpGrpcAccessLogConfig(
        common_config=_log_to("http"), additional_response_headers_to_log=[site.DECISION_HEADER]
    )
    log = extension(accesslog.AccessLog, "processor", config)
    log.filter = accesslog.AccessLogFilter(metadata_filter=undecided)
    return log


def connection_access_log() -> accesslog.AccessLog:
    """Connections that no filter chain takes: an SNI that is not declared, or no TLS where TLS is spoken."""
    return extension(accesslog.AccessLog, "processor", grpc_logs.TcpGrpcAccessLogConfig(common_config=_log_to("connection")))


def dns_access_log(agent: str) -> accesslog.AccessLog:
    """Each question of this agent's."""
    asking = CustomTag(tag=site.ASKING, literal=CustomTagLiteral(value=agent))
    tags = [asking, CustomTag(tag=site.ASKED, value="%RESPONSE_CODE% %QUERY_NAME%")]
    config = replace(_log_to("dns"), custom_tags=tags)
    return extension(accesslog.AccessLog, "processor", grpc_logs.TcpGrpcAccessLogConfig(common_config=config))


def _log_to(name: str) -> grpc_logs.CommonGrpcAccessLogConfig:
    return grpc_logs.CommonGrpcAccessLogConfig(
        log_name=name,
        grpc_service=to_processor(),
        transport_api_version=core.ApiVersion.V3,
        buffer_flush_interval=seconds(0.2),
        filter_state_objects_to_log=[site.STATE_AGENT, site.STATE_CONNECT_HOST],
    )
