"""From a snapshot to Kubernetes resources: who may reach whom, and the pods in which Envoy and the processor run.

Laws: an agent's pod reaches the doors and nothing else, names included; what no policy names is denied. Nothing secret is written
here: keys, credentials and Redis's URL are named, and stand in Secrets of the cluster. Envoy and the processor talk over Unix
sockets that only one user may open, so they share a pod, its user and one folder; the keys, the record and the credentials are
the processor's alone. What is written validates against the strict schemas of Kubernetes 1.34 and newer.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

from broker.dataplane.clusters import NOT_PUBLIC
from broker.dataplane.compile import bootstrap
from broker.dataplane.proto import in_json
from broker.dataplane.site import Site
from broker.errors import UsageError
from broker.policy.snapshot import PolicySnapshot

AGENT_LABEL = "broker/agent"
"""The label of an agent's pods; its value is the agent's name. The prefix is that of `apiVersion: broker/v1`."""

MANIFESTS, KEYS, CREDENTIALS, REDIS = "broker-manifests", "broker-keys", "broker-credentials", "broker-redis"
"""What a cluster must have of its own: a ConfigMap with the manifests, Secrets with keys, credentials and Redis's `url`."""

ADMIN_PORT = 15003
"""Health, metrics and keys, for the kubelet and Prometheus; not a door."""

Resource = dict[str, Any]
_Network = IPv4Network | IPv6Network
_VERSIONS = {"NetworkPolicy": "networking.k8s.io/v1", "PodDisruptionBudget": "policy/v1", "StatefulSet": "apps/v1"}
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

_USER = 10001
_STATE, _RUN, _MANIFESTS, _KEYS = "/var/lib/broker", "/var/lib/broker/run", "/etc/broker/manifests", "/etc/broker/keys"
_SHARED_KEYS = ("ca.key", "ca.pem", "jwt.key", "tokens.key")
# One replica's own keys (its record's, its outbox's) stay on its volume; the fleet's are copied there, since a key file that a
# group may read is refused, and Kubernetes mounts Secrets so. The folder of the sockets must belong to the user, not to root.
_PREPARE = f"""set -eu
umask 077
mkdir -p {_STATE}/keys /mnt/run/run
cp -f {_KEYS}/*.key {_STATE}/keys/
cp -f {_KEYS}/ca.pem {_STATE}/ca.pem
chmod -R go= {_STATE}/keys
"""
# No core dumps: credentials are in memory. Two workers, as the limit has it, however many processors the node has.
_ENVOY = (
    "ulimit -c 0 && exec envoy -c /etc/envoy/envoy.json --disable-hot-restart --log-level error"
    " --file-flush-interval-msec 1000 --concurrency 2"
)
_DRAIN = f"from pathlib import Path; from broker.supervisor import drain; drain(Path('{_RUN}/envoy-admin.sock'))"


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
        "broker": [
            _identity("broker", cluster.namespace, _BROKER),
            _bootstrap(cluster),
            _pods(cluster, files),
            _doors(cluster),
            _disruption(cluster),
        ],
    }


def _resource(kind: str, name: str, namespace: str = "", labels: Mapping[str, str] | None = None, **body: Any) -> Resource:
    metadata = {"name": name, "namespace": namespace, "labels": labels}
    kept = {key: value for key, value in metadata.items() if value}
    return {"apiVersion": _VERSIONS.get(kind, "v1"), "kind": kind, "metadata": kept, **body}


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


def _bootstrap(cluster: Cluster) -> Resource:
    # The doors and the roots reach Envoy from the processor; of the site the bootstrap holds the sockets alone.
    site = Site(("0.0.0.0", 0), ("0.0.0.0", 0), f"{_RUN}/processor.sock", f"{_RUN}/envoy-admin.sock", "")  # noqa: S104 - never bound
    text = json.dumps(in_json(bootstrap(site)), indent=1) + "\n"
    return _resource("ConfigMap", "envoy-bootstrap", cluster.namespace, _BROKER, data={"envoy.json": text})


def _pods(cluster: Cluster, files: Mapping[str, str]) -> Resource:
    template = {
        "metadata": {"labels": _BROKER},
        "spec": {
            "serviceAccountName": "broker",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            # Envoy's drain (5 s) and the processor's grace (5 s), one after the other, and time to write.
            "terminationGracePeriodSeconds": 30,
            "securityContext": {
                "runAsNonRoot": True,
                **dict.fromkeys(("runAsUser", "runAsGroup", "fsGroup"), _USER),
                # Else each start would open the key files on the volume to the group, and the broker refuses such.
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "initContainers": [_prepare(cluster)],
            "containers": [_processor(cluster), _envoy(cluster)],
            "volumes": _volumes(files),
        },
    }
    claim = {
        "metadata": {"name": "state"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "10Gi"}}},
    }
    # Not a Deployment: each replica has a record of its own, a chain with one writer, which must outlive its pod.
    spec = {
        "serviceName": "broker",
        "replicas": cluster.replicas,
        "podManagementPolicy": "Parallel",
        "selector": {"matchLabels": _BROKER},
        "template": template,
        "volumeClaimTemplates": [claim],
    }
    return _resource("StatefulSet", "broker", cluster.namespace, _BROKER, spec=spec)


def _container(name: str, image: str, command: Sequence[str], mounts: Mapping[str, Resource], **rest: Any) -> Resource:
    return {
        "name": name,
        "image": image,
        "command": [*command],
        **rest,
        "securityContext": {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": name, **mount} for name, mount in mounts.items()],
    }


def _resources(cpu: str, memory: str) -> Resource:
    return {"requests": {"cpu": cpu, "memory": memory}, "limits": {"cpu": "2", "memory": memory}}


_SOCKETS = {"mountPath": _RUN, "subPath": "run"}


def _prepare(cluster: Cluster) -> Resource:
    keys = {"mountPath": _KEYS, "readOnly": True}
    mounts: dict[str, Resource] = {"state": {"mountPath": _STATE}, "run": {"mountPath": "/mnt/run"}, "keys": keys}
    return _container("prepare", cluster.image, ["sh", "-c", _PREPARE], mounts, resources=_resources("50m", "64Mi"))


def _processor(cluster: Cluster) -> Resource:
    options = {
        # The link that the kubelet turns over: the files change all at once, and none is seen twice.
        "manifests": f"{_MANIFESTS}/..data",
        "state": _STATE,
        "proxy": f"0.0.0.0:{cluster.proxy}",
        "base-url": f"0.0.0.0:{cluster.base_url}",
        "admin": f"0.0.0.0:{ADMIN_PORT}",
    }
    url = {"name": "BROKER_REDIS_URL", "valueFrom": {"secretKeyRef": {"name": REDIS, "key": "url"}}}
    mounts: dict[str, Resource] = {
        "state": {"mountPath": _STATE},
        "run": _SOCKETS,
        "tmp": {"mountPath": "/tmp"},  # noqa: S108 - a folder of the pod's own
        "manifests": {"mountPath": _MANIFESTS, "readOnly": True},
    }
    return _container(
        "processor",
        cluster.image,
        ["broker", "serve", *(word for name, value in options.items() for word in (f"--{name}", value))],
        mounts,
        env=[url] if cluster.replicas > 1 else [],
        envFrom=[{"secretRef": {"name": CREDENTIALS}}],
        ports=[{"name": "admin", "containerPort": ADMIN_PORT}],
        # A long record is read before the port opens: up to five minutes.
        startupProbe=_asked("/healthz", periodSeconds=2, failureThreshold=150),
        livenessProbe=_asked("/healthz", periodSeconds=10, timeoutSeconds=5),
        readinessProbe=_asked("/readyz", periodSeconds=2, timeoutSeconds=2),
        # Envoy's open calls need it for as long as Envoy drains.
        lifecycle={"preStop": {"sleep": {"seconds": 7}}},
        resources=_resources("500m", "1Gi"),
    )


def _asked(path: str, **times: int) -> Resource:
    return {"httpGet": {"path": path, "port": "admin"}, **times}


def _envoy(cluster: Cluster) -> Resource:
    # Its admin API is a socket of its user's alone; a door that takes a connection has its configuration.
    open_door = {"tcpSocket": {"port": "proxy"}}
    return _container(
        "envoy",
        cluster.image,
        ["sh", "-c", _ENVOY],
        {"run": _SOCKETS, "bootstrap": {"mountPath": "/etc/envoy", "readOnly": True}},
        ports=[{"name": "proxy", "containerPort": cluster.proxy}, {"name": "base-url", "containerPort": cluster.base_url}],
        startupProbe={**open_door, "periodSeconds": 2, "failureThreshold": 150},
        livenessProbe={**open_door, "periodSeconds": 10},
        readinessProbe={**open_door, "periodSeconds": 2},
        lifecycle={"preStop": {"exec": {"command": ["python", "-c", _DRAIN]}}},
        resources=_resources("500m", "512Mi"),
    )


def _volumes(files: Mapping[str, str]) -> list[Resource]:
    shared = [{"key": name, "path": name} for name in _SHARED_KEYS]
    placed = [{"key": key, "path": path} for key, path in sorted(files.items())]
    return [
        {"name": "run", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}},
        {"name": "tmp", "emptyDir": {"sizeLimit": "256Mi"}},
        {"name": "manifests", "configMap": {"name": MANIFESTS, "items": placed}},
        {"name": "keys", "secret": {"secretName": KEYS, "items": shared, "defaultMode": 0o440}},
        {"name": "bootstrap", "configMap": {"name": "envoy-bootstrap"}},
    ]


def _doors(cluster: Cluster) -> Resource:
    ports = [{"name": "proxy", "port": cluster.proxy}, {"name": "base-url", "port": cluster.base_url}]
    return _resource("Service", "broker", cluster.namespace, _BROKER, spec={"selector": _BROKER, "ports": ports})


def _disruption(cluster: Cluster) -> Resource:
    spec = {"maxUnavailable": 1, "selector": {"matchLabels": _BROKER}}
    return _resource("PodDisruptionBudget", "broker", cluster.namespace, _BROKER, spec=spec)
