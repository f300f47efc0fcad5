"""`broker check`: reads the manifests as the broker would, and says everything that is wrong with them."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click

from broker import clock
from broker.cli import options
from broker.cli.progress import told
from broker.credentials.base import CredentialUnavailable
from broker.errors import counted
from broker.keys import ed25519
from broker.manifest.findings import FORMATS, Finding, printable
from broker.manifest.load import Reading, load
from broker.policy.snapshot import PolicySnapshot
from broker.state import State


@click.command()
@options.directory
@click.option("--format", "form", type=click.Choice(list(FORMATS)), default="text", help="How findings are printed.")
@click.option("--json", "form", flag_value="json", help="The same as --format json.")
@click.option("--issuers", is_flag=True, help="Have each credential issued that an agent's calls would get, and take it back.")
@options.state
@options.short_lived
def check(*, manifests: Path, form: str, issuers: bool, state: Path) -> int:
    """Check the manifests in DIR (manifests).

    Prints every finding of every file on stdout and a summary on stderr. Ends with 0 where nothing is an error, 1 where something
    is, 2 where DIR can't be read. With --issuers, a credential that can't be had is a finding (issuer_failed), and those that can
    are named on stderr: agent, tool, issuer, scopes and life, never a value. The keys in STATE sign the broker's own tokens.
    """
    loaded = load(manifests, reading=Reading(manifests, told(str(manifests)), options.processors()))
    findings = [*loaded.findings]
    if issuers and loaded.snapshot:
        findings += _unissued(loaded.snapshot, state)
    # Printed as paths that an editor opens from where the person stands.
    found = [replace(finding, file=(manifests / finding.file).as_posix()) for finding in findings]
    click.echo(FORMATS[form](found), nl=False)
    severities = [finding.severity for finding in found]
    errors, warnings = (counted(severities.count(severity), severity) for severity in ("error", "warning"))
    revision = f"; revision {loaded.snapshot.revision}" if loaded.snapshot else ""
    click.echo(f"{errors}, {warnings} in {counted(len(loaded.files), 'file')}{revision}", err=True)
    return 1 if "error" in severities else 0


def _unissued(snapshot: PolicySnapshot, state: Path) -> Iterator[Finding]:
    """A finding for each credential that can't be had; the others are told."""
    from broker.credentials.proof import prove  # noqa: PLC0415 - the clients of all issuers, for this option alone

    for proof in asyncio.run(prove(snapshot, ed25519(State.at(state).keys / "jwt.key"), clock.now())):
        tool, agent, lease = proof.occasion.tool, proof.occasion.agent.name, proof.outcome
        if isinstance(lease, CredentialUnavailable):
            message = f"{tool.name}, as for {agent}: {lease.message}"
            yield Finding(tool.rule.partition("#")[0], 1, 1, "issuer_failed", message, lease.advice)
            continue
        scopes = f", scopes {' '.join(lease.scopes)}" if lease.scopes else ""
        life = "without an end" if proof.seconds is None else f"for {proof.seconds:.0f} s"
        click.echo(
            printable(f"{tool.name} for {agent}: {lease.issuer}{scopes}, {life}, in {proof.occasion.spec.placed}"), err=True
        )
    for tool in snapshot.tools.values():
        if tool.credential and not any(tool.name in agent.tools for agent in snapshot.agents.values()):
            click.echo(f"{tool.name}: no agent holds it, so nothing was asked for", err=True)
