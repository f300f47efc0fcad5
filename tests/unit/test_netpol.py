"""What `broker render kubernetes` means: valid for several versions of Kubernetes, and, read as a cluster does, closed.

The evaluator below reads NetworkPolicies as their documentation has it: a pod that some policy selects for a direction may do
what any of these allows in that direction, and nothing else; a connection needs the sender's egress and the receiver's ingress.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import jsonschema_rs
import kubernetes_validate
import pytest
import yaml

from broker.cli.main import _run
from broker.cli.serve import serve
from broker.dataplane.clusters import NOT_PUBLIC
from broker.dataplane.kubernetes import AGENT_LABEL, Cluster, resources
from broker.manifest.load import load
from broker.policy.snapshot import EMPTY, Endpoint, Tool, Upstream

ROOT = Path(__file__).parents[2]
BASE = ROOT / "netpol" / "kubernetes"
VERSIONS = ("1.34", "1.36", "1.37")
SCHEMAS = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"


def _resources() -> list[dict[str, Any]]:
    return [each for path in sorted(BASE.glob("*.yaml")) if path.stem != "kustomization" for each in _documents(path.read_text())]


def _documents(text: str) -> list[dict[str, Any]]:
    return [*yaml.safe_load_all(text)]


RESOURCES = _resources()
POLICIES = [each for each in RESOURCES if each["kind"] == "NetworkPolicy"]
(PODS,) = (each["spec"] for each in RESOURCES if each["kind"] == "StatefulSet")
AGENTS = sorted(load(ROOT / "manifests").snapshot.agents)


# Valid.


@pytest.fixture(scope="module", params=VERSIONS)
def schemas(request: pytest.FixtureRequest) -> Mapping[tuple[str, str], jsonschema_rs.Validator]:
    """Kind and API version → a validator that refuses fields that are not there."""
    folder = SCHEMAS / f"v{request.param}.0-local-strict"
    definitions = json.loads((folder / "_definitions.json").read_text())
    needed = {(each["kind"], each["apiVersion"]) for each in RESOURCES}
    made = {}
    for kind, version in needed:
        *group, number = version.split("/")
        name = "-".join([kind.lower(), *(part.partition(".")[0] for part in group), number])
        schema = json.loads((folder / f"{name}.json").read_text())
        registry = jsonschema_rs.Registry([("_definitions.json", definitions)])
        made[kind, version] = jsonschema_rs.validator_for(schema, registry=registry)
    return made


def test_every_resource_is_valid(schemas):
    assert len(RESOURCES) > 2 * len(AGENTS)
    for each in RESOURCES:
        schemas[each["kind"], each["apiVersion"]].validate(each)


def test_the_schemas_can_say_no(schemas):
    for each in RESOURCES:
        with pytest.raises(jsonschema_rs.ValidationError):
            schemas[each["kind"], each["apiVersion"]].validate({**each, "metadata": {**each["metadata"], "nmae": "x"}})


def test_names_are_given_once_and_namespaces_exist():
    names = [(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in RESOURCES]
    assert len(set(names)) == len(names)
    spaces = {each["metadata"]["name"] for each in RESOURCES if each["kind"] == "Namespace"}
    assert {namespace for _, namespace, _ in names} == {*spaces, None}
    assert {kind for kind, namespace, _ in names if namespace is None} == {"Namespace"}


# Who may reach whom.


@dataclass(frozen=True)
class Pod:
    namespace: str
    labels: Mapping[str, str] = field(default_factory=dict)


def _selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    expressions = selector.get("matchExpressions", ())
    assert all(each["operator"] == "Exists" for each in expressions)
    equal = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    return equal and all(each["key"] in labels for each in expressions)


def _is_peer(peer: Mapping[str, Any], policy: Mapping[str, Any], other: Pod | str) -> bool:
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        inside = isinstance(other, str) and ip_address(other) in ip_network(block["cidr"])
        return inside and not any(ip_address(other) in ip_network(each) for each in block.get("except", ()))
    if isinstance(other, str):
        return False
    namespace = policy["metadata"]["namespace"]
    spaces = peer.get("namespaceSelector", {"matchLabels": {"kubernetes.io/metadata.name": namespace}})
    return _selects(spaces, {"kubernetes.io/metadata.name": other.namespace}) and _selects(
        peer.get("podSelector", {}), other.labels
    )


def _allows(pod: Pod, direction: str, other: Pod | str, port: Mapping[str, Any], policies: list[Any]) -> bool:
    word = {"Egress": "to", "Ingress": "from"}[direction]
    selecting = [
        each
        for each in policies
        if direction in each["spec"]["policyTypes"]
        and each["metadata"]["namespace"] == pod.namespace
        and _selects(each["spec"]["podSelector"], pod.labels)
    ]
    rules = ((each, rule) for each in selecting for rule in each["spec"].get(direction.lower(), ()))
    return not selecting or any(
        port in rule["ports"] and any(_is_peer(peer, each, other) for peer in rule[word]) for each, rule in rules
    )


def reaches(
    sender: Pod | str, receiver: Pod | str, port: int, protocol: str = "TCP", policies: list[dict[str, Any]] = POLICIES
) -> bool:
    """Whether a connection may come about. A text is an address outside the cluster."""
    at = {"protocol": protocol, "port": port}
    out = isinstance(sender, str) or _allows(sender, "Egress", receiver, at, policies)
    return out and (isinstance(receiver, str) or _allows(receiver, "Ingress", sender, at, policies))


def agent(name: str, namespace: str = "agents") -> Pod:
    return Pod(namespace, {AGENT_LABEL: name})


BROKER = Pod("broker", {"app.kubernetes.io/name": "broker"})
REDIS = Pod("broker", {"app.kubernetes.io/name": "redis"})
DNS = Pod("kube-system", {"k8s-app": "kube-dns"})
PROMETHEUS = Pod("monitoring", {"app.kubernetes.io/name": "prometheus"})
SHOP = Pod("shop", {"app": "shop"})
UNLABELLED = Pod("agents", {"app": "something"})
BOT = agent(AGENTS[0])
PUBLIC, PUBLIC6 = "8.8.8.8", "2606:4700::1111"


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("door", [15001, 15002])
def test_each_agent_reaches_the_doors(name, door):
    assert reaches(agent(name), BROKER, door)


NOT_REACHED = [
    pytest.param(BROKER, 15003, "TCP", id="the admin port"),
    pytest.param(BROKER, 9901, "TCP", id="another port of the pod"),
    pytest.param(BROKER, 15001, "UDP", id="a door over UDP"),
    pytest.param(REDIS, 6379, "TCP", id="Redis"),
    pytest.param(DNS, 53, "UDP", id="DNS"),
    pytest.param(DNS, 53, "TCP", id="DNS over TCP"),
    pytest.param(SHOP, 443, "TCP", id="a pod of another namespace"),
    pytest.param(SHOP, 15001, "TCP", id="the door's port at another pod"),
    pytest.param(Pod("shop", BROKER.labels), 15001, "TCP", id="the broker's label in another namespace"),
    pytest.param(UNLABELLED, 15001, "TCP", id="a pod beside it"),
    pytest.param(PUBLIC, 443, "TCP", id="the internet"),
    pytest.param(PUBLIC, 443, "UDP", id="QUIC"),
    pytest.param(PUBLIC, 53, "UDP", id="a public resolver"),
    pytest.param(PUBLIC6, 443, "TCP", id="the internet over IPv6"),
    pytest.param("169.254.169.254", 80, "TCP", id="the cloud's metadata"),
    pytest.param("10.96.0.1", 443, "TCP", id="the API server"),
]


@pytest.mark.parametrize(("where", "port", "protocol"), NOT_REACHED)
def test_an_agent_reaches_nothing_else(where, port, protocol):
    assert reaches(BOT, where, port, protocol, []), "without policies everything is open"
    assert not any(reaches(agent(name), where, port, protocol) for name in AGENTS)


@pytest.mark.parametrize("sender", [*(agent(name) for name in AGENTS), BROKER, SHOP, PROMETHEUS, UNLABELLED, PUBLIC], ids=repr)
def test_nobody_reaches_an_agent(sender):
    assert not any(reaches(sender, agent(name), port) for name in AGENTS for port in (80, 443, 8000, 15001))


def test_a_pod_with_no_agents_label_or_a_strangers_reaches_nothing():
    for pod in (UNLABELLED, agent("stranger")):
        assert not any(reaches(pod, where, port) for where in (BROKER, SHOP, PUBLIC) for port in (443, 15001, 15002))
    # Even where someone opened the way out: the doors take labelled pods only.
    assert not _allows(BROKER, "Ingress", UNLABELLED, {"protocol": "TCP", "port": 15001}, POLICIES)
    # An agent's label is worth nothing outside the agents' namespace.
    assert not reaches(agent(AGENTS[0], "shop"), BROKER, 15001)


def test_the_broker_reaches_what_it_needs():
    assert all(reaches(BROKER, where, port, protocol) for where, port, protocol in (
        (PUBLIC, 443, "TCP"), (PUBLIC6, 443, "TCP"), (DNS, 53, "UDP"), (DNS, 53, "TCP"), (REDIS, 6379, "TCP"),
    ))  # fmt: skip
    assert reaches(PROMETHEUS, BROKER, 15003)


@pytest.mark.parametrize(
    "address", ["169.254.169.254", "fd00:ec2::254", "168.63.129.16", "100.100.100.200", "10.96.0.1", "127.0.0.1"]
)
def test_the_broker_reaches_no_metadata_and_no_private_address(address):
    assert not reaches(BROKER, address, 443)
    assert not reaches(BROKER, address, 80)


def test_the_broker_reaches_no_other_port_and_no_other_pod():
    assert not any((reaches(BROKER, PUBLIC, 80), reaches(BROKER, PUBLIC, 53, "UDP"), reaches(BROKER, SHOP, 443)))
    assert not any(reaches(who, BROKER, port) for who in (SHOP, UNLABELLED, PUBLIC) for port in (15001, 15002, 15003))
    assert not any(reaches(PROMETHEUS, BROKER, port) for port in (15001, 15002))


def _template_pods() -> Iterator[Pod]:
    """All pods that there can be: those of the StatefulSet, and the agents', each with its ServiceAccount's label."""
    yield Pod("broker", PODS["template"]["metadata"]["labels"])
    for each in RESOURCES:
        if each["kind"] == "ServiceAccount" and each["metadata"]["namespace"] == "agents":
            yield Pod("agents", each["metadata"]["labels"])


def test_no_policy_selects_nothing_and_none_is_without_one():
    pods = [*_template_pods()]
    selected = [
        [
            pod
            for pod in pods
            if each["metadata"]["namespace"] == pod.namespace and _selects(each["spec"]["podSelector"], pod.labels)
        ]
        for each in POLICIES
    ]
    assert all(selected)
    assert {repr(pod) for found in selected for pod in found} == {repr(pod) for pod in pods}
    assert all(each["spec"]["policyTypes"] == ["Ingress", "Egress"] for each in POLICIES)


def test_every_exception_lies_within_its_block():
    blocks = [
        peer["ipBlock"]
        for each in POLICIES
        for rule in each["spec"].get("egress", ())
        for peer in rule["to"]
        if "ipBlock" in peer
    ]
    assert blocks
    for block in blocks:
        outer, inner = ip_network(block["cidr"]), [ip_network(each) for each in block.get("except", ())]
        assert all(each != outer and each.subnet_of(outer) for each in inner)
        # Go takes these for IPv4, so that Kubernetes finds them outside an IPv6 block.
        assert not any(each.version == 6 and each.network_address.ipv4_mapped for each in inner)
    excepted = {each for block in blocks for each in block.get("except", ())}
    assert excepted >= {each for each in NOT_PUBLIC if each != "::ffff:0:0/96"}


def _of(*tools: Tool) -> list[dict[str, Any]]:
    snapshot = replace(load(ROOT / "manifests").snapshot, tools={tool.name: tool for tool in tools})
    return resources(snapshot, Cluster("broker:1"), {})["network-policies"]


def _tool(name: str, port: int, *addresses: str) -> Tool:
    return Tool(name, "web", "rest", Endpoint("https", f"{name}.example", port), "", {}, Upstream(addresses=addresses))


def test_private_addresses_are_open_where_a_tool_names_them_at_its_port():
    policies = _of(_tool("wiki", 8443, "10.20.0.0/16", "fd12::/16"), _tool("ledger", 443))
    assert reaches(BROKER, "10.20.1.1", 8443, policies=policies)
    assert reaches(BROKER, "fd12::1", 8443, policies=policies)
    assert reaches(BROKER, PUBLIC, 8443, policies=policies)
    assert not reaches(BROKER, "10.20.1.1", 443, policies=policies)
    assert not reaches(BROKER, "10.21.0.1", 8443, policies=policies)
    assert not reaches(BOT, "10.20.1.1", 8443, policies=policies)


@pytest.mark.parametrize("addresses", [("0.0.0.0/0", "::/0"), ("169.254.169.254/32",), ("169.254.0.0/16", "fd00:ec2::/32")])
def test_metadata_addresses_stay_closed_whatever_a_tool_names(addresses):
    policies = _of(_tool("sly", 80, *addresses))
    assert not any(reaches(BROKER, each, 80, policies=policies) for each in ("169.254.169.254", "fd00:ec2::254"))


def test_without_agents_and_tools_there_is_still_no_way_out():
    policies = resources(EMPTY, Cluster("broker:1"), {})["network-policies"]
    assert not any(reaches(BOT, where, 15001, policies=policies) for where in (BROKER, PUBLIC))


# The pods.


def test_every_container_is_confined():
    pod = PODS["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod["automountServiceAccountToken"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    for each in (*pod["initContainers"], *pod["containers"]):
        confined = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        assert each["securityContext"] == confined
        assert each["resources"]["requests"].keys() == each["resources"]["limits"].keys() == {"cpu", "memory"}
    for each in pod["containers"]:
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= each.keys()


def test_keys_credentials_and_the_record_are_the_processors_alone():
    pod = PODS["template"]["spec"]
    (envoy,) = (each for each in pod["containers"] if each["name"] == "envoy")
    assert {each["name"] for each in envoy["volumeMounts"]} == {"run", "bootstrap"}
    assert not {"env", "envFrom"} & envoy.keys()


def test_no_account_token_is_mounted_anywhere():
    accounts = [each for each in RESOURCES if each["kind"] == "ServiceAccount"]
    assert {each["metadata"]["name"] for each in accounts} == {*AGENTS, "broker"}
    assert all(each["automountServiceAccountToken"] is False for each in accounts)


def test_what_is_referred_to_is_there_or_named_in_the_readme():
    spec, readme = PODS["template"]["spec"], (ROOT / "netpol/README.md").read_text()
    volumes = {each["name"]: each for each in spec["volumes"]} | {
        each["metadata"]["name"]: each for each in PODS["volumeClaimTemplates"]
    }
    for container in (*spec["initContainers"], *spec["containers"]):
        assert {each["name"] for each in container["volumeMounts"]} <= volumes.keys()
    made = {each["metadata"]["name"] for each in RESOURCES if each["kind"] == "ConfigMap"}
    named = {each["configMap"]["name"] for each in volumes.values() if "configMap" in each}
    named |= {each["secret"]["secretName"] for each in volumes.values() if "secret" in each}
    text = json.dumps(spec)
    named |= {"broker-redis", "broker-credentials"}
    assert all(f'"{name}"' in text for name in named)
    assert all(f"`{name}`" in readme for name in named - made)


def test_the_processors_command_is_one_that_the_product_takes():
    (processor,) = (each for each in PODS["template"]["spec"]["containers"] if each["name"] == "processor")
    program, verb, *options = processor["command"]
    assert (program, verb) == ("broker", "serve")
    context = serve.make_context("serve", [*options])
    assert str(context.params["admin"]) == "0.0.0.0:15003"
    assert {str(context.params[door]) for door in ("proxy", "base_url")} == {"0.0.0.0:15001", "0.0.0.0:15002"}


def test_one_replica_needs_no_redis(capsys):
    assert _run(["render", "kubernetes", str(ROOT / "manifests"), "--replicas", "1"]) == 0
    assert "redis" not in capsys.readouterr().out.lower()


# What is checked in.


def test_what_is_checked_in_is_what_the_command_prints(capsys, tmp_path):
    assert _run(["render", "kubernetes", str(ROOT / "manifests")]) == 0
    groups = ("namespaces", "agents", "network-policies", "broker")
    assert capsys.readouterr().out == "".join((BASE / f"{name}.yaml").read_text() for name in groups)
    assert _run(["render", "kubernetes", str(ROOT / "manifests"), "--output", str(tmp_path / "base")]) == 0
    capsys.readouterr()
    written = {path.name: path.read_text() for path in (tmp_path / "base").iterdir()}
    assert written.keys() == {path.name for path in BASE.iterdir()}
    assert all(written[f"{name}.yaml"] == (BASE / f"{name}.yaml").read_text() for name in groups)
    assert _run(["render", "nftables", str(ROOT / "manifests")]) == 0
    assert capsys.readouterr().out == (ROOT / "netpol/nftables.nft").read_text()


def test_the_configmap_is_made_of_every_manifest():
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    (generated,) = kustomization["configMapGenerator"]
    files = dict(each.split("=") for each in generated["files"])
    assert {(BASE / path).resolve() for path in files.values()} == {*load(ROOT / "manifests").files}
    (items,) = (each["configMap"]["items"] for each in PODS["template"]["spec"]["volumes"] if each["name"] == "manifests")
    assert {each["key"]: f"../../manifests/{each['path']}" for each in items} == files
