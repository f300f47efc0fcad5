"""`broker render`: what the compiler makes of the manifests, on stdout."""

from pathlib import Path
from typing import Any

import click
import yaml

from broker.cli import options
from broker.dataplane.compile import bootstrap, resources
from broker.dataplane.routes import is_address
from broker.dataplane.site import Certificates, Leaf, Site
from broker.errors import UsageError
from broker.manifest.findings import FORMATS
from broker.manifest.load import load
from broker.policy.snapshot import PolicySnapshot


@click.group()
def render() -> None:
    """Print generated configuration."""


@render.command()
@click.argument("directory", metavar="[DIR]", default="manifests", type=click.Path(path_type=Path, file_okay=False))
@options.doors
@click.option("--run", "folder", default="/run/broker", show_default=True, help="The folder of the sockets.")
def envoy(*, directory: Path, proxy: tuple[str, int], base_url: tuple[str, int], folder: str) -> None:
    """Print Envoy's bootstrap and the resources that the broker serves over ADS, as YAML.

    Certificates and their keys are made by the broker at run time; here a placeholder stands for each.
    """
    loaded = load(directory)
    if loaded.snapshot is None:
        click.echo(FORMATS["text"](loaded.findings), err=True, nl=False)
        raise UsageError("the manifests have errors", f"correct them; `broker check {directory}` shows them again")
    site = Site(proxy, base_url, f"{folder}/processor.sock", f"{folder}/envoy-admin.sock", options.ROOTS[0])
    click.echo(
        yaml.safe_dump(rendered(loaded.snapshot, site, placeholders(loaded.snapshot)), sort_keys=False, width=120), nl=False
    )


def rendered(snapshot: PolicySnapshot, site: Site, certificates: Certificates) -> dict[str, Any]:
    """`{bootstrap, clusters, listeners, routes}` as Envoy's JSON form."""
    made = resources(snapshot, site, certificates)
    parts = {"clusters": made.clusters, "listeners": made.listeners, "routes": made.routes}
    documents = {name: [message.to_dict() for message in messages] for name, messages in parts.items()}
    return {"bootstrap": bootstrap(site).to_dict(), **documents}


def placeholders(snapshot: PolicySnapshot) -> Certificates:
    """In place of certificates, words that say what will stand there."""
    hosts = sorted({tool.endpoint.host for tool in snapshot.tools.values() if tool.endpoint.scheme == "https"})
    addresses = [host for host in hosts if is_address(host)]
    return Certificates(
        hosts={host: _leaf(host) for host in hosts if not is_address(host)},
        addresses=_leaf(", ".join(addresses)) if addresses else None,
        door=_leaf("the proxy itself"),
    )


def _leaf(what: str) -> Leaf:
    return Leaf(chain=f"<certificate for {what}>", key=f"<its key, made by the broker for {what}>")
