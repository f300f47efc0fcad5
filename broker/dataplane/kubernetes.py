"""From a snapshot to Kubernetes resources: who may reach whom, and the pods in which Envoy and the processor run.

Laws: an agent's pod reaches the doors and nothing else, names included; what no policy names is denied. Nothing secret is written
here: keys, credentials and Redis's URL are named, and stand in Secrets of the cluster. Envoy and the processor talk over Unix
sockets that only one user may open, so they share a pod, its user and one folder; the keys, the record and the credentials are
the processor's alone. What is written validates against the strict schemas of Kubernetes 1.34 and newer.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from string import Template
from typing import Any

import yaml

from broker.dataplane.clusters import NOT_PUBLIC
from broker.dataplane.compile import bootstrap
from broker.dataplane.proto import in_json
from broker.dataplane.site import Site
from broker.errors import UsageError
from broker.policy.snapshot import PolicySnapshot

AGENT_LABEL = "broker/agent"
"""The label of an agent's pods; its value is the agent's name. The prefix is that of `apiVersion: broker/v1`."""

MANIFESTS = "broker-manifests"
"""The ConfigMap of the manifests, which the cluster must have of its own."""

ADMIN_PORT = 15003
"""Health, metrics and keys, for the kubelet and Prometheus; not a door."""

Resource = dict[str, Any]
_Network = IPv4Network | IPv6Network
# Kubernetes sets this label itself on each namespace (since 1.21).
_NAMESPACE_LABEL = "kubernetes.io/metadata.name"
_BROKER = {"app.kubernetes.io/name": "broker"}
_REDIS_PODS, _REDIS_PORT = {"app.kubernetes.io/name": "redis"}, 6379
_DNS_PODS = {"k8s-app": "kube-dns"}  # CoreDNS has kept this label, and every distribution with it
_DNS = [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]
# Where clouds answer a machine's questions about itself, credentials included. Not even a range in the catalog opens these.
_METADATA = tuple(map(ip_network, ("169.254.0.0/16", "168.63.129.16/32", "fe80::/10", "fd00:ec2::/32")))
# But IPv4-mapped addresses: Go, and so Kubernetes, takes them for IPv4 and refuses them in an IPv6 block; no packet has them.
_NOT_WORLD = (*(ip_network(each) for each in NOT_PUBLIC if each != "::ffff:0:0/96"), *_METADATA)

_REDIS_URL = {"name": "BROKER_REDIS_URL", "valueFrom": {"secretKeyRef": {"name": "broker-redis", "key": "url"}}}

# Doors and roots reach Envoy from the processor; of the site its bootstrap holds the sockets alone, where the pods have them.
_SOCKETS = "/var/lib/broker/run"
_SITE = Site(("", 0), ("", 0), (f"{_SOCKETS}/processor.sock",), f"{_SOCKETS}/envoy-admin.sock", "")
_PODS = Template(Path(__file__).with_name("pods.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a cluster calls things. `proxy` and `base_url` are TCP ports; `monitoring` is Prometheus's namespace.

    With one of `replicas` what is spent and revoked is kept in the pod's record; with more it is shared, in Redis.
    """

    image: str
    namespace: str = "broker"
    agents: str = "agents"
    monitoring: str = "monitoring"
    replicas: int = 2
    proxy: int = 15001
    base_url: int = 15002

    @property
    def doors(self) -> tuple[int, int]:
        """The TCP ports that agents reach."""
        return self.proxy, self.base_url


def resources(snapshot: PolicySnapshot, cluster: Cluster, files: Mapping[str, str]) -> Mapping[str, list[Resource]]:
    """Groups of resources by name, in the order in which they can be applied.

    `files`: key of the ConfigMap `MANIFESTS` → where the file lies in the manifests folder. Raises `UsageError` for an agent
    whose name can't be a label.
    """
    for name in snapshot.agents:
        if name.endswith("-"):
            raise UsageError(f"{name!r} can't be a label in Kubernetes, as it ends with a hyphen", "rename the agent")
    names = sorted(snapshot.agents)
    return {
        "namespaces": [_namespace(cluster.namespace), _namespace(cluster.agents)],
        "agents": [_identity(name, cluster.agents, {AGENT_LABEL: name}) for name in names],
        "network-policies": [_denied(cluster), *(_agent(name, cluster) for name in names), _broker(snapshot, cluster)],
        "broker": _workload(cluster, files),
    }


def _resource(kind: str, name: str, namespace: str = "", labels: Mapping[str, str] | None = None, **body: Any) -> Resource:
    metadata = {"name": name, "namespace": namespace, "labels": labels}
    kept = {key: value for key, value in metadata.items() if value}
    return {"apiVersion": "networking.k8s.io/v1" if kind == "NetworkPolicy" else "v1", "kind": kind, "metadata": kept, **body}


def _namespace(name: str) -> Resource:
    # Pods of the node's own network are beyond every NetworkPolicy; this standard admits none (and no root, no host paths).
    return _resource("Namespace", name, labels={"pod-security.kubernetes.io/enforce": "restricted"})


def _identity(name: str, namespace: str, labels: Mapping[str, str]) -> Resource:
    return _resource("ServiceAccount", name, namespace, labels, automountServiceAccountToken=False)


# Who may reach whom: https://kubernetes.io/docs/concepts/services-networking/network-policies/


def _policy(
    name: str, namespace: str, selector: Resource, ingress: Sequence[Resource] = (), egress: Sequence[Resource] = ()
) -> Resource:
    rules = {"ingress": [*ingress], "egress": [*egress]}
    spec = {
        "podSelector": selector,
        "policyTypes": ["Ingress", "Egress"],
        **{key: value for key, value in rules.items() if value},
    }
    return _resource("NetworkPolicy", name, namespace, spec=spec)


def _pods_of(namespace: str, **selector: Any) -> Resource:
    return {"namespaceSelector": {"matchLabels": {_NAMESPACE_LABEL: namespace}}, "podSelector": selector}


def _tcp(*ports: int) -> list[Resource]:
    return [{"protocol": "TCP", "port": port} for port in ports]


def _denied(cluster: Cluster) -> Resource:
    return _policy("default-deny", cluster.agents, {})


def _agent(name: str, cluster: Cluster) -> Resource:
    to_doors = {"to": [_pods_of(cluster.namespace, matchLabels=_BROKER)], "ports": _tcp(*cluster.doors)}
    return _policy(f"agent-{name}", cluster.agents, {"matchLabels": {AGENT_LABEL: name}}, egress=[to_doors])


def _broker(snapshot: PolicySnapshot, cluster: Cluster) -> Resource:
    labelled = _pods_of(cluster.agents, matchExpressions=[{"key": AGENT_LABEL, "operator": "Exists"}])
    ingress = [
        {"from": [labelled], "ports": _tcp(*cluster.doors)},
        {"from": [_pods_of(cluster.monitoring)], "ports": _tcp(ADMIN_PORT)},
    ]
    egress = [{"to": [_pods_of("kube-system", matchLabels=_DNS_PODS)], "ports": _DNS}, *_world(snapshot)]
    if cluster.replicas > 1:
        egress.append({"to": [{"podSelector": {"matchLabels": _REDIS_PODS}}], "ports": _tcp(_REDIS_PORT)})
    return _policy("broker", cluster.namespace, {"matchLabels": _BROKER}, ingress, egress)


def _world(snapshot: PolicySnapshot) -> Iterable[Resource]:
    """Public addresses, at the catalog's ports and at 443 for issuers; and of private ones those that a tool names."""
    ports = sorted({443, *(tool.endpoint.port for tool in snapshot.tools.values())})
    yield {"to": [_block(ip_network(all_of), _NOT_WORLD) for all_of in ("0.0.0.0/0", "::/0")], "ports": _tcp(*ports)}
    for _, tool in sorted(snapshot.tools.items()):
        named = map(ip_network, tool.upstream.addresses)
        if private := [_block(range_, _METADATA) for range_ in named if not any(_within(range_, each) for each in _METADATA)]:
            yield {"to": private, "ports": _tcp(tool.endpoint.port)}


def _block(network: _Network, but: Iterable[_Network]) -> Resource:
    without = [str(each) for each in but if _within(each, network)]
    return {"ipBlock": {"cidr": str(network), **({"except": without} if without else {})}}


def _within(inner: _Network, outer: _Network) -> bool:
    if isinstance(inner, IPv4Network):
        return isinstance(outer, IPv4Network) and inner.subnet_of(outer)
    return isinstance(outer, IPv6Network) and inner.subnet_of(outer)


# The pods.


def _workload(cluster: Cluster, files: Mapping[str, str]) -> list[Resource]:
    filled = _PODS.substitute({name: json.dumps(value) for name, value in asdict(cluster).items()}, admin=ADMIN_PORT)
    made: list[Resource] = [*yaml.safe_load_all(filled)]
    by_kind = {each["kind"]: each for each in made}
    by_kind["ConfigMap"]["data"]["envoy.json"] = json.dumps(in_json(bootstrap(_SITE)), indent=1) + "\n"
    pod = by_kind["StatefulSet"]["spec"]["template"]["spec"]
    items = [{"key": key, "path": path} for key, path in sorted(files.items())]
    pod["volumes"].append({"name": "manifests", "configMap": {"name": MANIFESTS, "items": items}})
    if cluster.replicas > 1:
        pod["containers"][0]["env"].append(_REDIS_URL)
    return made
