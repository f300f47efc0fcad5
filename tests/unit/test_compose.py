"""What compose/ and the Dockerfile say, read as files: who is on which network, what each container may do, what stands where."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker import __version__
from broker.cli.render import IMAGE
from broker.dataplane.kubernetes import ADMIN_PORT
from broker.manifest.load import load
from tests import stack

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "compose"
STACK = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
SERVICES: dict[str, Any] = STACK["services"]
PROCESSORS = {"processor-1", "processor-2", "processor-3"}
# The one that fills the others' volumes: root's, which new volumes are, but without a network.
ONCE = "keys"


def _networks(service: str) -> set[str]:
    return set(SERVICES[service].get("networks", ()))


def _sources(service: str) -> dict[str, str]:
    """Volume or path → where it is mounted."""
    return {each.split(":")[0]: each.partition(":")[2] for each in SERVICES[service].get("volumes", ())}


def test_the_agents_network_holds_the_agent_and_envoy_and_leads_nowhere():
    assert {name for name in SERVICES if "agents" in _networks(name)} == {"agent", "envoy"}
    assert _networks("agent") == {"agents"}
    assert STACK["networks"]["agents"]["internal"] is True
    assert STACK["networks"]["agents"]["driver_opts"] == {"com.docker.network.bridge.inhibit_ipv4": "true"}
    assert SERVICES["agent"]["dns"] == "127.0.0.1"


def test_only_who_shows_something_to_people_is_on_a_network_that_leads_out():
    open_networks = {name for name, network in STACK["networks"].items() if not network.get("internal")}
    assert open_networks == {"view"}
    assert {name for name in SERVICES if "view" in _networks(name)} == {"prometheus", "grafana"}
    published = {name: each for name in SERVICES for each in SERVICES[name].get("ports", ())}
    assert set(published) == {"prometheus", "grafana"}
    assert all(each.startswith("127.0.0.1:") for each in published.values())


def test_redis_is_reached_by_processors_alone_and_the_tools_by_envoy():
    assert {name for name in SERVICES if "ledger" in _networks(name)} == PROCESSORS | {"redis"}
    assert {name for name in SERVICES if "tools" in _networks(name)} == {"envoy", "tools"}


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_can_do_no_more_than_it_must(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["ulimits"] == {"core": 0}
    assert not {"privileged", "pid", "ipc", "devices"} & set(service)
    if name == ONCE:
        assert (service["user"], service["network_mode"], service["cap_add"]) == ("root", "none", ["CHOWN", "DAC_OVERRIDE"])
    else:
        assert service["user"] == "10001:10001"
        assert not {"network_mode", "cap_add"} & set(service)


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_from_this_machine_is_there_and_can_only_be_read(name):
    for source, at in _sources(name).items():
        if source.startswith("."):
            assert (COMPOSE / source).exists()
            assert at.endswith(":ro")
        else:
            assert source in STACK["volumes"]


def test_a_volume_with_keys_is_mounted_by_its_container_alone():
    for volume in ("processor-1", "processor-2", "processor-3", "redis", "tools", "agent"):
        assert {name for name in SERVICES if volume in _sources(name)} == {volume, ONCE}
    assert {name for name in SERVICES if "run" in _sources(name)} == PROCESSORS | {"envoy"}


def test_images_are_named_by_digest_and_ours_by_its_version():
    images = {re.fullmatch(r"\$\{\w+_IMAGE:-(.+)\}", service["image"])[1] for service in SERVICES.values()}
    assert IMAGE in images
    assert SERVICES[ONCE]["build"]["args"]["VERSION"] == __version__
    others = images - {IMAGE}
    assert {each.partition(":")[0] for each in others} == {"redis", "prom/prometheus", "grafana/grafana"}
    assert all(re.fullmatch(r"[a-z/]+:[\w.-]+@sha256:[0-9a-f]{64}", each) for each in others)
    base = re.search(r"^ARG BASE_IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert re.fullmatch(r"debian:trixie-\d{8}-slim@sha256:[0-9a-f]{64}", base[1])


def test_what_goes_into_the_image_is_named_and_nothing_else_is_sent_to_the_engine():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert kept == {name for line in copied for name in line.split()}


def test_prometheus_asks_the_processors():
    (job,) = yaml.safe_load((COMPOSE / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    (group,) = job["static_configs"]
    assert set(group["targets"]) == {f"{name}:{ADMIN_PORT}" for name in PROCESSORS}
    assert all({"scrape"} <= _networks(name) for name in (*PROCESSORS, "prometheus"))


def test_grafana_finds_the_dashboard_and_prometheus():
    """Grafana is in no registry that tests reach: what it would read is read here."""
    mounted = _sources("grafana")
    (provider,) = yaml.safe_load((COMPOSE / "grafana/provisioning/dashboards/broker.yaml").read_text())["providers"]
    at = mounted["./grafana/dashboard.json"].removesuffix(":ro")
    assert at.startswith(provider["options"]["path"] + "/")
    assert SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == at
    assert mounted["./grafana/provisioning"] == "/etc/grafana/provisioning:ro"
    (source,) = yaml.safe_load((COMPOSE / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    assert json.loads((COMPOSE / "grafana/dashboard.json").read_text())["uid"]
    assert SERVICES["grafana"]["environment"]["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"


def test_the_stacks_manifests_have_nothing_wrong(tmp_path):
    for path in (COMPOSE / "manifests").glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "certs").mkdir()
    (tmp_path / "certs/tools.pem").write_text(stack.TestCA().pem)
    loaded = load(tmp_path)
    assert loaded.findings == ()
    assert {tool.endpoint.host for tool in loaded.snapshot.tools.values()} == set(
        SERVICES["tools"]["networks"]["tools"]["aliases"]
    )
