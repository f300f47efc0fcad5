"""`broker render`: what the compiler makes of the manifests, on stdout."""

from pathlib import Path
from typing import Any

import click
import yaml

from broker.cli import options
from broker.dataplane.compile import bootstrap, resources
from broker.dataplane.proto import in_json
from broker.dataplane.site import Certificates, Leaf, Site
from broker.pki import declared_hosts
from broker.policy.snapshot import PolicySnapshot


@click.group()
def render() -> None:
    """Print generated configuration."""


@render.command()
@options.directory
@options.doors
@click.option("--run", "folder", default="/run/broker", show_default=True, help="The folder of the sockets.")
def envoy(*, manifests: Path, proxy: options.Address, base_url: options.Address, folder: str) -> None:
    """Print Envoy's bootstrap and the resources that the broker serves over ADS, as YAML.

    Certificates and their keys are made by the broker at run time; here a placeholder stands for each.
    """
    snapshot = options.snapshot(manifests)
    site = Site(proxy, base_url, f"{folder}/processor.sock", f"{folder}/envoy-admin.sock", options.ROOTS[0])
    click.echo(yaml.safe_dump(rendered(snapshot, site, placeholders(snapshot)), sort_keys=False, width=120), nl=False)


def rendered(snapshot: PolicySnapshot, site: Site, certificates: Certificates) -> dict[str, Any]:
    """`{bootstrap, clusters, listeners, routes}` as Envoy's JSON form."""
    made = resources(snapshot, site, certificates)
    parts = {"clusters": made.clusters, "listeners": made.listeners, "routes": made.routes}
    documents = {name: [in_json(message) for message in messages] for name, messages in parts.items()}
    return {"bootstrap": in_json(bootstrap(site)), **documents}


def placeholders(snapshot: PolicySnapshot) -> Certificates:
    """In place of certificates, words that say what will stand there."""
    names, addresses = declared_hosts(snapshot)
    return Certificates(
        hosts={host: _leaf(host) for host in names},
        addresses=_leaf(", ".join(addresses)) if addresses else None,
        door=_leaf("the proxy itself"),
    )


def _leaf(what: str) -> Leaf:
    return Leaf(chain=f"<certificate for {what}>", key=f"<its key, made by the broker for {what}>")
