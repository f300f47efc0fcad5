"""`broker render`: what the compiler makes of the manifests, on stdout or as a folder.

Law: a folder is written whole or not at all, and never over a file that was not rendered.
"""

import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import click
import yaml

from broker import __version__
from broker.cli import folders, options
from broker.dataplane import kubernetes as cluster_resources
from broker.dataplane.compile import bootstrap, resources
from broker.dataplane.kubernetes import ADMIN_PORT, MANIFESTS, Cluster
from broker.dataplane.nftables import ruleset
from broker.dataplane.proto import in_json
from broker.dataplane.site import Certificates, Leaf, Site
from broker.errors import UsageError
from broker.manifest.load import Loaded
from broker.pki import declared_hosts
from broker.policy.snapshot import PolicySnapshot

IMAGE = f"envoy-tool-broker:{__version__}"
_PORT = click.IntRange(1024, 65_535)  # below, a port can't be had without root's rights
_KUSTOMIZATION = "kustomization.yaml"


@click.group()
def render() -> None:
    """Print generated configuration."""


@render.command()
@options.directory
@options.doors
@click.option("--run", "folder", default="/run/broker", show_default=True, help="The folder of the sockets.")
@click.option(
    "--processor",
    "names",
    type=options.processor_name,
    multiple=True,
    metavar="NAME",
    help="A processor's name; once for each of several.",
)
@click.option("--bootstrap", "alone", is_flag=True, help="The bootstrap alone: the file that Envoy is started with.")
def envoy(
    *, manifests: Path, proxy: options.Address, base_url: options.Address, folder: str, names: tuple[str, ...], alone: bool
) -> None:
    """Print Envoy's bootstrap and its resources, as YAML.

    The broker serves these over ADS. Certificates and their keys are made by the broker at run time; here a placeholder stands
    for each.
    """
    snapshot = options.snapshot(manifests)
    processors = tuple(f"{folder}/{name}.sock" for name in names or ("processor",))
    site = Site(proxy, base_url, processors, f"{folder}/envoy-admin.sock", options.ROOTS[0])
    made = in_json(bootstrap(site)) if alone else rendered(snapshot, site, placeholders(snapshot))
    click.echo(yaml.safe_dump(made, sort_keys=False, width=120), nl=False)


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


def _named(name: str, default: str, what: str) -> folders.Decorator:
    return click.option(name, default=default, show_default=True, help=what)


@render.command()
@options.directory
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), help="Write a kustomize base to this folder.")
@_named("--namespace", "broker", "Where Envoy and the processor run.")
@_named("--agents-namespace", "agents", "Where agents run.")
@_named("--monitoring-namespace", "monitoring", "Where Prometheus runs.")
@_named("--image", IMAGE, "An image with this package.")
@click.option("--replicas", type=click.IntRange(1), default=2, show_default=True, help="With more than one they share a Redis.")
@click.option("--proxy", type=_PORT, default=15001, show_default=True, help="The port of the explicit proxy.")
@click.option("--base-url", type=_PORT, default=15002, show_default=True, help="The port of the reverse proxy.")
def kubernetes(*, manifests: Path, output: Path | None, agents_namespace: str, monitoring_namespace: str, **named: Any) -> None:
    """Print what the broker needs in a cluster, as YAML.

    NetworkPolicies are among it: a pod labelled broker/agent: NAME reaches Envoy's doors and nothing else. netpol/README.md has
    the steps.
    """
    snapshot, loaded = options.compiled(manifests)
    cluster = Cluster(agents=agents_namespace, monitoring=monitoring_namespace, **named)
    if len({*cluster.doors, ADMIN_PORT}) != 3:  # noqa: PLR2004 - two doors and the admin port
        raise UsageError("two listeners can't have one port", f"choose others than {ADMIN_PORT} for --proxy and --base-url")
    if cluster.namespace == cluster.agents:
        raise UsageError("agents would run among the broker's own pods", "name two namespaces")
    if output:
        if output.resolve().is_relative_to(manifests.resolve()):
            raise UsageError(f"{output} is in the manifests folder, where it would be read as manifests", "name one beside it")
        _write(output, base(snapshot, loaded, manifests, cluster, output))
        click.echo(f"wrote {output}; what to do with it: netpol/README.md", err=True)
    else:
        groups = cluster_resources.resources(snapshot, cluster, _placed(loaded, manifests))
        click.echo(_documents(each for group in groups.values() for each in group), nl=False)


@render.command()
@options.directory
@options.doors
@click.option(
    "--user", "users", multiple=True, metavar="NAME=USER", help="The agent's system user, if it is not called as the agent."
)
def nftables(*, manifests: Path, proxy: options.Address, base_url: options.Address, users: tuple[str, ...]) -> None:
    """Print nftables rules for agents that are system users.

    Each is one of its own. Load the rules with `nft -f`. That user then reaches Envoy's doors on this host and nothing else.
    netpol/README.md tells more.
    """
    snapshot = options.snapshot(manifests)
    click.echo(ruleset(_users(snapshot, users), _local(proxy, base_url)), nl=False)


_USER = re.compile(r"[1-9][0-9]{0,9}|[a-z_][a-z0-9_-]{0,31}")  # useradd(8): what is a name everywhere
_NOBODY = 2**32 - 1  # (uid_t) -1, and what fits in none


def _users(snapshot: PolicySnapshot, written: Iterable[str]) -> Mapping[str, str]:
    users = {name: name for name in snapshot.agents}
    for text in written:
        name, _, user = text.partition("=")
        if name not in users:
            raise UsageError(f"--user {text} names no agent of the manifests", f"write one of {', '.join(sorted(users))}")
        users[name] = user
    for name, user in users.items():
        if not _USER.fullmatch(user) or user == "root" or (user.isdecimal() and int(user) >= _NOBODY):
            raise UsageError(f"{user!r} can't be the user of {name}", f"write --user {name}=UID, of a user that only it has")
    if twice := {user for user in users.values() if [*users.values()].count(user) > 1}:
        raise UsageError(f"two agents would share the user {min(twice)}", "give each its own with --user NAME=UID")
    return users


def _local(*doors: options.Address) -> tuple[tuple[str, int], ...]:
    for door in doors:
        if ip_address(door.host).is_unspecified:
            raise UsageError(f"{door} is no address that agents could call", "write the door's IP address, like 127.0.0.1:15001")
    return doors


def base(snapshot: PolicySnapshot, loaded: Loaded, manifests: Path, cluster: Cluster, output: Path) -> Mapping[str, str]:
    """A kustomize base: file name → content. It takes the manifests from where they lie, seen from the folder `output`."""
    files = _placed(loaded, manifests)
    groups = cluster_resources.resources(snapshot, cluster, files)
    found = os.path.relpath(manifests.resolve(), output.resolve())
    generated = {
        "name": MANIFESTS,
        "namespace": cluster.namespace,
        "files": [f"{key}={found}/{path}" for key, path in sorted(files.items())],
    }
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"{name}.yaml" for name in groups],
        "configMapGenerator": [generated],
        # One name for good: the broker sees the files change and reloads them; a new name would start the pods anew.
        "generatorOptions": {"disableNameSuffixHash": True},
    }
    return {**{f"{name}.yaml": _documents(group) for name, group in groups.items()}, _KUSTOMIZATION: _documents([kustomization])}


def _placed(loaded: Loaded, manifests: Path) -> Mapping[str, str]:
    """Keys of a ConfigMap, which have no slashes, and the files that they stand for."""
    try:
        paths = sorted(path.resolve().relative_to(manifests.resolve()).as_posix() for path in loaded.files)
    except ValueError as error:
        raise UsageError(f"the manifests name a file outside their folder ({error})", "put it below the folder") from error
    return {path.replace("/", "__"): path for path in paths}


class _Dumper(yaml.SafeDumper):
    """Each value written out where it stands, and text of several lines as a block."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _documents(resources: Iterable[Mapping[str, Any]]) -> str:
    text: str = yaml.dump_all(resources, Dumper=_Dumper, sort_keys=False, width=120, explicit_start=True)
    return text


def _write(output: Path, files: Mapping[str, str]) -> None:
    """Put a folder with these files in the place of the one that was rendered before, if any."""
    try:
        there = {path.name for path in output.iterdir()} if output.is_dir() else set()
        if there and (_KUSTOMIZATION not in there or there - set(files)):
            raise UsageError(f"{output} holds files that were not rendered", "name a folder that is new or was rendered before")
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as draft:
            fresh = Path(draft) / "fresh"
            fresh.mkdir()
            for name, text in files.items():
                (fresh / name).write_text(text)
            _exchange(output, fresh, Path(draft) / "old")
    except OSError as error:
        raise UsageError(f"{output} can't be written ({error.strerror})", "name another folder with --output") from error


def _exchange(output: Path, fresh: Path, old: Path) -> None:
    if not output.exists():
        fresh.rename(output)
        return
    output.rename(old)
    try:
        fresh.rename(output)
    except OSError:
        old.rename(output)
        raise
