"""The doors inside a namespace: whose they are, and which names they tell."""

import pytest
import stack

from broker.dataplane import namespaces, site
from broker.dataplane.compile import Resources, Written, doors_of, shared_by_namespaces
from broker.dataplane.proto import in_json
from broker.dataplane.site import Certificates, Leaf, Namespace
from broker.manifest.load import load

OPERATIONS = {"items.list": {"match": {"method": "GET", "path": "/items"}, "effect": "read"}}
GRANTED = {"operations": {"items.list": {}}}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    folder = tmp_path_factory.mktemp("manifests")
    private = {"addresses": ["10.0.0.0/8"]}
    stack.write_manifests(
        folder,
        stack.tool("api", "https://api.example", OPERATIONS),
        stack.tool("wiki", "https://wiki.example:8443/base", OPERATIONS),
        stack.tool("by-address", "https://10.0.0.7", OPERATIONS, upstream=private),
        stack.agent("coder", {"api": GRANTED, "by-address": GRANTED}),
        stack.agent("nobody", {}),
        stack.agent("learner", {}, mode="shadow", shadow_until="2099-01-31"),
    )
    found = load(folder).snapshot
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("agent", "names"),
    [
        pytest.param("coder", ["api.example"], id="the names of its own tools"),
        pytest.param("nobody", [], id="none for who has no tools"),
        pytest.param("learner", ["api.example", "wiki.example"], id="all of them in shadow mode"),
        pytest.param("gone", [], id="none for who has no manifest"),
    ],
)
def test_an_agent_is_told_the_names_that_it_may_use(snapshot, agent, names):
    assert namespaces.hosts(snapshot, agent) == names
    [_, dns] = doors_of(snapshot, Namespace("k", agent, "/ns")).listeners
    table = in_json(dns)["listenerFilters"][0]["typedConfig"]["serverConfig"].get("inlineDnsTable", {})
    assert [each["name"] for each in table.get("virtualDomains", [])] == names


def test_every_address_of_a_door_is_in_the_namespace_and_every_name_has_its_key(snapshot):
    made = doors_of(snapshot, Namespace("k1", "coder", "/run/ns-k1"))
    for listener in map(in_json, made.listeners):
        assert listener["name"].startswith("namespace/k1")
        for each in (listener["address"], *(more["address"] for more in listener["additionalAddresses"])):
            assert each["socketAddress"]["networkNamespaceFilepath"] == "/run/ns-k1"
    assert (made.clusters, made.routes) == ([], [])


def test_without_ipv6_no_door_and_no_answer_has_such_an_address(snapshot):
    made = doors_of(snapshot, Namespace("k1", "coder", "/ns", ipv6=False))
    assert not any("::" in str(in_json(listener)) for listener in made.listeners)


def test_the_identity_is_a_literal_also_of_a_name_that_means_something_to_envoy(snapshot):
    text = str(in_json(doors_of(snapshot, Namespace("k", "100%REQ(x)%", "/ns")).listeners[0]))
    assert text.count("'inlineString': '100%%REQ(x)%%'") == 2
    assert "'agent': '100%REQ(x)%'" in text


def test_what_namespaces_share_leads_to_the_same_tools_and_no_further(snapshot):
    leaf = Leaf("chain", "key")
    shared = shared_by_namespaces(snapshot, Certificates({"api.example": leaf, "wiki.example": leaf}, leaf, leaf))
    names = [in_json(each)["name"] for each in (*shared.clusters, *shared.listeners, *shared.routes)]
    inner = [site.NAMESPACE, site.NAMESPACE_ADDRESSES]
    assert names == [*inner, *inner, site.NAMESPACE_PROXY, site.NAMESPACE]
    proxy, within = (in_json(each) for each in shared.routes)
    assert "namespace-proxy/api" in str(proxy)
    assert "'cluster': 'tool/wiki'" in str(within)
    for routes in (proxy, within):
        last = routes["virtualHosts"][-1]
        assert (last["domains"], [set(each) & {"directResponse"} for each in last["routes"]]) == (["*"], [{"directResponse"}] * 2)


def test_written_resources_are_the_same_bytes_and_can_be_put_together(snapshot):
    made = doors_of(snapshot, Namespace("k", "coder", "/ns"))
    written = Written.of(made)
    assert written.listeners == tuple(map(bytes, made.listeners))
    both = Written.all(written, Written.of(Resources([], [], [])), written)
    assert both.listeners == written.listeners * 2


def test_a_door_opens_so_many_connections_at_a_time_and_counts_them_before_all_else(snapshot):
    [doors, _] = doors_of(snapshot, Namespace("k", "coder", "/ns")).listeners
    for chain in in_json(doors)["filterChains"]:
        assert chain["filters"][0]["name"] == "envoy.filters.network.connection_limit"
        assert chain["filters"][0]["typedConfig"]["maxConnections"] == 512
