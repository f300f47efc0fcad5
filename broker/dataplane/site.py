"""Where this Envoy stands: its addresses, its way to the processor, and the names both sides must agree on."""

from collections.abc import Mapping
from dataclasses import dataclass, field

# Listener names. A route is named `<listener>/<tool>`, so that one request attribute tells the processor both.
PROXY = "proxy"
BASE_URL = "base-url"
INNER = "inner"
INNER_ADDRESSES = "inner-ip"
# The same for namespaces: every HTTP door inside one, and where what is captured there ends.
NAMESPACE_PROXY = "namespace-proxy"
NAMESPACE = "namespace"
NAMESPACE_ADDRESSES = "namespace-ip"

# Clusters of the bootstrap.
PROCESSOR = "processor"

# Filter state that carries identity from the CONNECT request to the calls inside its tunnel.
STATE_AGENT = "broker.agent"
# The name of a key: its value is the times of a token or certificate, never the token. In a namespace it is `Namespace.carried`.
STATE_TOKEN = "broker.token"  # noqa: S105
STATE_CONNECT_HOST = "broker.connect_host"

# Dynamic metadata by which the processor proves to the gate that it decided.
GATE_NAMESPACE = "broker"
GATE_KEY = "decision"
GATE_ALLOW = "allow"
EXT_AUTHZ = "envoy.filters.http.ext_authz"
# Dynamic metadata by which a namespace's doors tell ext_authz whose they are.
NAMESPACE_METADATA = "broker.namespace"

# Request attributes (CEL) that reach the processor with a stream's first message.
CARRIED = tuple(f"filter_state['{key}']" for key in (STATE_AGENT, STATE_TOKEN, STATE_CONNECT_HOST))
ATTRIBUTES = (
    "xds.route_name",
    "connection.requested_server_name",
    "request.protocol",
    "connection.uri_san_peer_certificate",
    *CARRIED,
)
# Of a tunnel the processor hears with its 200 only: for whom it was opened must come along.
RESPONSE_ATTRIBUTES = ("response.code_details", CARRIED[0])

# Headers by which a door proves an agent's identity.
TOKEN_HEADER = "x-broker-token"  # noqa: S105 - a header's name
DECISION_HEADER = "x-broker-decision-id"


MOST_CONNECTIONS = 32_768
"""With as many to tools, 65,536 descriptors."""


@dataclass(frozen=True, slots=True)
class Site:
    """One Envoy's surroundings. Addresses are `(host, port)`; paths are absolute.

    `processors` are Unix sockets, each of which serves ext_proc, ext_authz, xDS and access logs; `admin_socket` is Envoy's own
    admin API; `system_roots` is a PEM file with the trust roots for tools without their own; `reached_at` is the host at which
    the processor reaches the doors, empty where that is the address they listen at. Of `connections` of agents there are at most
    so many, all together; each may take as many again to tools.
    """

    proxy: tuple[str, int]
    base_url: tuple[str, int]
    processors: tuple[str, ...]
    admin_socket: str
    system_roots: str
    reached_at: str = ""
    connections: int = MOST_CONNECTIONS

    @property
    def reached(self) -> tuple[tuple[str, int], tuple[str, int]]:
        """Where the processor reaches the doors: the proxy, and the base URL."""
        return (self.reached_at or self.proxy[0], self.proxy[1]), (self.reached_at or self.base_url[0], self.base_url[1])


# The doors inside a namespace: below 1024, for agents, which have no capability, must not take their places while Envoy is away
# (ip(7)). Where its names lead to (benchmarking ranges, RFC 2544 and 5180: nobody's, and routed to itself).
DOOR_PORT = 1001
TRANSPARENT_PORTS = (80, 443)
DNS_PORT = 53
CAPTURED = ("198.18.0.1", "2001:2::1")
# In the log of a namespace's questions to DNS: who asks, and the answer's code (RFC 1035 section 4.1.1) before the name.
ASKING, ASKED = "agent", "asked"


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network namespace whose processes are the agent's. `key` is in no other's name, `path` opens it for Envoy.

    `name` is that by which the agent's manifest names it, empty where a process brought it.
    """

    key: str
    agent: str
    path: str
    name: str = ""
    ipv6: bool = True

    @property
    def carried(self) -> str:
        """What goes along with each call from it."""
        return f"{self.key}/{self.name}"


@dataclass(frozen=True, slots=True)
class Leaf:
    """A certificate chain and its private key, both PEM."""

    chain: str
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Certificates:
    """What Envoy shows to agents: a leaf per declared HTTPS host name, one for all IP addresses, one for its own door."""

    hosts: Mapping[str, Leaf]
    addresses: Leaf | None
    door: Leaf
