"""Golden configurations, as `broker render` prints them with its defaults."""

from pathlib import Path

import yaml

from broker.cli import options
from broker.cli.render import IMAGE, base, placeholders, rendered
from broker.dataplane.compile import bootstrap
from broker.dataplane.kubernetes import Cluster
from broker.dataplane.nftables import ruleset
from broker.dataplane.proto import in_json
from broker.dataplane.site import Site
from broker.manifest.load import Loaded, load
from broker.policy.snapshot import PolicySnapshot


def _sample(directory: str = "manifests") -> tuple[Loaded, PolicySnapshot]:
    loaded = load(Path(directory))
    if loaded.snapshot is None:
        raise SystemExit(f"{directory} has errors; run `broker check {directory}`")
    return loaded, loaded.snapshot


def nftables() -> str:
    """As `broker render nftables`, where each agent's user is called as the agent."""
    _, snapshot = _sample()
    return ruleset({name: name for name in snapshot.agents}, (("127.0.0.1", 15001), ("127.0.0.1", 15002)))


def kubernetes() -> dict[str, str]:
    """Path → content, as `broker render kubernetes`."""
    output, (loaded, snapshot) = Path("netpol/kubernetes"), _sample()
    made = base(snapshot, loaded, Path("manifests"), Cluster(IMAGE), output)
    return {f"{output}/{name}": text for name, text in made.items()}


def envoy(directory: str) -> str:
    """As `broker render envoy` of that folder."""
    _, snapshot = _sample(directory)
    run = "/run/broker"
    doors = ("127.0.0.1", 15001), ("127.0.0.1", 15002)
    site = Site(*doors, (f"{run}/processor.sock",), f"{run}/envoy-admin.sock", options.ROOTS[0])
    text: str = yaml.safe_dump(rendered(snapshot, site, placeholders(snapshot)), sort_keys=False, width=120)
    return f"# broker render envoy {directory}\n{text}"


def compose() -> str:
    """The bootstrap of Envoy in compose/, with the processors that compose.yaml names."""
    services = yaml.safe_load(Path("compose/compose.yaml").read_text(encoding="utf-8"))["services"]
    names, run = [name for name in services if name.startswith("processor-")], "/run/broker"
    doors = ("0.0.0.0", 15001), ("0.0.0.0", 15002)  # noqa: S104 - a container's networks, which compose.yaml draws
    site = Site(*doors, tuple(f"{run}/{name}.sock" for name in names), f"{run}/envoy-admin.sock", options.ROOTS[0])
    text: str = yaml.safe_dump(in_json(bootstrap(site)), sort_keys=False, width=120)
    command = f"broker render envoy --bootstrap {' '.join(f'--processor {name}' for name in names)}"
    return f"# {command}\n{text}"
