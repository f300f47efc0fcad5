"""The doors inside an agent's network namespace, and what all namespaces share.

Laws: whoever is in the namespace is its agent: the doors carry its name as a literal, and read no proof that a request brings.
A connection that ignores the proxy is captured at the ports of HTTP and HTTPS, whatever address it names: the SNI or Host says
where to, and is judged like a proxy's. Only the hosts of the tools that the agent may use have an address; nothing is resolved.
"""

import envoy_data_plane.envoy.config.listener.v3 as listener_v3
import envoy_data_plane.envoy.data.dns.v3 as dns_v3
import envoy_data_plane.envoy.extensions.filters.udp.dns_filter.v3 as dns_filter
from envoy_data_plane.envoy.extensions.filters.network.connection_limit.v3 import ConnectionLimit
from envoy_data_plane.envoy.extensions.filters.network.set_filter_state.v3 import Config as SetFilterState
from envoy_data_plane.envoy.extensions.filters.network.tcp_proxy.v3 import TcpProxy

from broker.dataplane import listeners, routes, site
from broker.dataplane.filters import dns_access_log, owned
from broker.dataplane.proto import extension, seconds, socket
from broker.dataplane.site import Namespace
from broker.policy.agreement import is_address
from broker.policy.snapshot import PolicySnapshot

# Open at a time, plain and TLS each. Clients' pools keep a hundred; of descriptors, which all agents share, Envoy has thousands.
_MOST_CONNECTIONS = 512
_ANSWER_S = 30  # how long a name may be remembered: as long as a tool that was taken away may still seem to be there


def doors(namespace: Namespace) -> listener_v3.Listener:
    """All that speaks TCP: the explicit proxy, and what is captured at the ports of HTTP and HTTPS."""
    first, *rest = [
        socket((host, port), namespace.path) for port in (site.DOOR_PORT, *site.TRANSPARENT_PORTS) for host in _any(namespace)
    ]
    http = listeners.chain("plain", site.NAMESPACE_PROXY, within=namespace)
    chains = [listeners.on(listeners.PLAIN, http), listeners.on(listeners.TLS, _captured(namespace))]
    for chain in chains:
        limit = ConnectionLimit(stat_prefix="namespace", max_connections=_MOST_CONNECTIONS)
        chain.filters.insert(0, extension(listener_v3.Filter, "envoy.filters.network.connection_limit", limit))
    return listeners.listener(f"namespace/{namespace.key}", chains, first, *rest)


def dns(snapshot: PolicySnapshot, namespace: Namespace) -> listener_v3.Listener:
    """Answers, over UDP, for the hosts of the agent's tools, and has no other name to tell."""
    first, *rest = [socket((host, site.DNS_PORT), namespace.path, udp=True) for host in _any(namespace)]
    address = dns_v3.DnsTableDnsEndpoint(
        address_list=dns_v3.DnsTableAddressList(address=list(site.CAPTURED if namespace.ipv6 else site.CAPTURED[:1]))
    )
    names = [
        dns_v3.DnsTableDnsVirtualDomain(name=host, endpoint=address, answer_ttl=seconds(_ANSWER_S))
        for host in hosts(snapshot, namespace.agent)
    ]
    table = dns_filter.DnsFilterConfigServerContextConfig(inline_dns_table=dns_v3.DnsTable(virtual_domains=names))
    log = [dns_access_log(namespace.agent)]
    config = dns_filter.DnsFilterConfig(stat_prefix="namespace", server_config=table, access_log=log)
    return listener_v3.Listener(
        name=f"namespace/{namespace.key}/dns",
        address=first,
        additional_addresses=[listener_v3.AdditionalAddress(address=each) for each in rest],
        listener_filters=[extension(listener_v3.ListenerFilter, "envoy.filters.udp.dns_filter", config)],
    )


def _any(namespace: Namespace) -> tuple[str, ...]:
    """Inside the namespace every address is its own."""
    return ("0.0.0.0", "::") if namespace.ipv6 else ("0.0.0.0",)  # noqa: S104


def hosts(snapshot: PolicySnapshot, agent: str) -> list[str]:
    """The names of the hosts of the tools that the agent may use, also in shadow mode, sorted."""
    known = snapshot.agents.get(agent)
    usable = {*known.tools, *known.shadow} if known else set()
    names = {snapshot.tools[tool].endpoint.host for tool in usable if tool in snapshot.tools}
    return sorted(name for name in names if not is_address(name))


def _captured(namespace: Namespace) -> listener_v3.FilterChain:
    """Where TLS leads: into a tunnel to the name that it asks for, as if CONNECT had opened one."""
    state = owned(namespace, "%REQUESTED_SERVER_NAME%:%DOWNSTREAM_LOCAL_PORT%")
    through = TcpProxy(
        stat_prefix="namespace-captured",
        cluster=site.NAMESPACE,
        idle_timeout=seconds(routes.IDLE_S),
        max_downstream_connection_duration=seconds(routes.MAX_STREAM_S),
    )
    filters = [
        extension(listener_v3.Filter, "envoy.filters.network.set_filter_state", SetFilterState(on_new_connection=state)),
        extension(listener_v3.Filter, "envoy.filters.network.tcp_proxy", through),
    ]
    return listener_v3.FilterChain(name="tls", filters=filters)
