"""What is generated and checked in is what the code says; and Envoy itself accepts the golden configurations."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker.cli import options
from broker.cli.render import placeholders
from broker.dataplane.compile import bootstrap, resources
from broker.dataplane.proto import in_json
from broker.dataplane.site import Site
from broker.manifest.load import load
from broker.pki import PlatformCA
from broker.policy.snapshot import PolicySnapshot
from broker.state import State
from broker.supervisor import envoy_binary

ROOT = Path(__file__).parents[2]
NOW = 1_767_225_600.0  # only the certificates' dates depend on it, and Envoy does not look at them here
GENERATED = (
    "compose/envoy.yaml",
    "docs/reference/audit.md",
    "docs/reference/cli.md",
    "docs/reference/codes.md",
    "docs/reference/detectors.md",
    "docs/reference/kinds.md",
    "docs/reference/metrics.md",
    "envoy/minimal.yaml",
    "envoy/sample-organisation.yaml",
    "envoy/spire.yaml",
    "netpol/kubernetes/agents.yaml",
    "netpol/kubernetes/broker.yaml",
    "netpol/kubernetes/kustomization.yaml",
    "netpol/kubernetes/namespaces.yaml",
    "netpol/kubernetes/network-policies.yaml",
    "netpol/nftables.nft",
)


def _check(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "docs.generate", "--check"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_every_generated_file_is_current():
    found = _check(ROOT)
    assert (found.returncode, found.stderr) == (0, "")


def test_each_file_that_was_changed_by_hand_or_deleted_is_named(tmp_path):
    for name in ("broker", "compose", "docs", "envoy", "manifests", "netpol", "tests/bad_manifests", "tests/golden"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests/corpora.py", tmp_path / "tests")
    deleted, *changed = GENERATED
    (tmp_path / deleted).unlink()
    for name in changed:
        (tmp_path / name).write_text((tmp_path / name).read_text().replace("a", "b", 1))
    found = _check(tmp_path)
    assert found.returncode == 1
    assert sorted(line.split()[0] for line in found.stderr.splitlines()) == sorted(GENERATED)


def _static(snapshot: PolicySnapshot, site: Site, folder: Path) -> dict[str, Any]:
    """The bootstrap with all that ADS would serve written into it, and real certificates: what `--mode validate` can judge."""
    made = resources(snapshot, site, PlatformCA(folder / "ca.key", folder / "ca.pem", NOW).certify(snapshot, ["localhost"], NOW))
    configuration: dict[str, Any] = in_json(bootstrap(site))
    del configuration["dynamicResources"]
    routes = {message.to_dict()["name"]: in_json(message) for message in made.routes}
    listeners = [in_json(message) for message in made.listeners]
    for listener in listeners:
        for chain in listener["filterChains"]:
            manager = chain["filters"][0]["typedConfig"]
            manager["routeConfig"] = routes[manager.pop("rds")["routeConfigName"]]
    static = configuration["staticResources"]
    static["clusters"] += [in_json(message) for message in made.clusters]
    static["listeners"] = listeners
    return configuration


def _validate(configuration: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    path = folder / "envoy.json"
    path.write_text(json.dumps(configuration))
    command = [envoy_binary(), "--mode", "validate", "-c", path, "--log-level", "error", "--disable-hot-restart"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.envoy
@pytest.mark.parametrize("manifests", ["manifests", "tests/golden/minimal", "tests/golden/spire"])
def test_envoy_accepts_the_golden_configuration(manifests, tmp_path):
    snapshot = load(ROOT / manifests).snapshot
    assert snapshot is not None
    site = options.site(State.at(tmp_path / "state"), ("127.0.0.1", 15001), ("127.0.0.1", 15002))
    configuration = _static(snapshot, site, tmp_path)
    found = _validate(configuration, tmp_path)
    assert found.returncode == 0, found.stderr
    # It can say no: a route to a cluster that nobody declared.
    configuration["staticResources"]["clusters"] = configuration["staticResources"]["clusters"][:1]
    found = _validate(configuration, tmp_path)
    assert found.returncode == 1
    assert "unknown cluster" in found.stderr


@pytest.mark.parametrize("name", ["sample-organisation", "minimal", "spire"])
def test_a_golden_configuration_holds_no_key(name):
    text = (ROOT / "envoy" / f"{name}.yaml").read_text()
    assert text.startswith("# broker render envoy ")
    assert "PRIVATE KEY" not in text
    assert set(yaml.safe_load(text)) == {"bootstrap", "clusters", "listeners", "routes"}


def test_every_declared_https_host_has_its_place_for_a_certificate():
    snapshot = load(ROOT / "manifests").snapshot
    assert snapshot is not None
    declared = {tool.endpoint.host for tool in snapshot.tools.values() if tool.endpoint.scheme == "https"}
    assert set(placeholders(snapshot).hosts) == declared
    text = (ROOT / "envoy" / "sample-organisation.yaml").read_text()
    assert all(f"<certificate for {host}>" in text for host in declared)
