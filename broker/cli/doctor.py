"""`broker doctor`: tries to get out of where an agent is, and fails if it can."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from broker.cli import folders, options
from broker.confined.probes import Around, probes, proxy_of
from broker.confined.witness import Witness
from broker.dataplane.site import DOOR_PORT
from broker.errors import BrokerError, UsageError
from broker.manifest.findings import printable
from broker.policy.agreement import is_address
from broker.policy.snapshot import PolicySnapshot
from broker.state import State

_AROUND = "BROKER_DOCTOR"
_ADMIN_PORT = 15003


@dataclass(frozen=True, slots=True)
class Row:
    """One probe: what is right, what was seen, and whether that is a way out."""

    probe: str
    expected: str
    seen: str
    out: bool


@click.command()
@click.option("--agent", metavar="NAME", default="", help="Try it in a namespace of this agent's; needs root.")
@click.option("--from-here", is_flag=True, help="Try it from where this runs, without a witness.")
@options.manifests
@folders.state
@options.as_json
def doctor(*, agent: str, from_here: bool, manifests: Path, state: Path, as_json: bool) -> int:
    """Try to get out of where an agent is.

    Tries other addresses, ports, protocols and resolvers, metadata, the host, the broker's own sockets. Prints a table of what
    was tried, what is right and what was seen, and ends with 1 if anything got out. With --agent it starts itself as `broker
    run` starts a command, and a witness on this machine counts what reached it. An answer by anybody but the broker is a way
    out, wherever it is tried.
    """
    if from_here == bool(agent):
        raise UsageError("say from where", "write --agent NAME, or --from-here")
    rows = list(_tried(_around())) if from_here else _inside(agent, options.snapshot(manifests), folders.broker_state(state))
    if as_json:
        click.echo(options.ascii_json([asdict(row) for row in rows]))
    else:
        click.echo("\n".join(_table(rows)))
    return 1 if any(row.out for row in rows) else 0


def _around() -> Around:
    """What is told by whoever started this, or what can be known here."""
    if told := os.environ.get(_AROUND):
        return Around.read(json.loads(told))
    bundle = Path(os.environ.get("SSL_CERT_FILE", ""))
    return Around(proxy=proxy_of(os.environ), ca=bundle.read_text() if bundle.is_file() else "")


def _tried(around: Around) -> Iterator[Row]:
    for probe in probes(around):
        seen = probe.run()
        yield Row(probe.name, probe.expected, seen.what, seen.out)


def _inside(agent: str, snapshot: PolicySnapshot, held: State) -> list[Row]:
    """What the same verb sees in a namespace of the agent's, and what the witness counted."""
    witness = Witness().checked()
    try:
        hidden = (held.control_socket, held.processor_socket, held.envoy_admin_socket)
        around = Around(
            (*Around().world, *witness.addresses),
            witness.port,
            (witness.port, _ADMIN_PORT),
            tuple(map(str, hidden)),
            _declared(snapshot, agent),
            ("127.0.0.1", DOOR_PORT),
            held.ca.read_text(),
        )
        doctor = [sys.executable, "-m", "broker.cli", "doctor", "--from-here", "--json"]
        command = [sys.executable, "-m", "broker.cli", "run", "--agent", agent, "--state", str(held.root), "--", *doctor]
        environment = {**os.environ, _AROUND: json.dumps(asdict(around))}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)  # noqa: S603 - our own
        try:
            rows = [Row(**row) for row in json.loads(done.stdout)]
        except ValueError:
            why = UsageError if done.returncode == UsageError.exit_code else BrokerError
            advice = "see the message above; programs that lie in /tmp or /run are not there"
            raise why("nothing could be tried in a namespace", advice) from None
        return [*rows, Row("the witness on this machine", "nothing", f"{witness.heard} came", witness.heard > 0)]
    finally:
        witness.close()


def _declared(snapshot: PolicySnapshot, name: str) -> str:
    """An HTTPS host that the agent may reach at the usual port; empty where there is none."""
    agent = snapshot.agents.get(name)
    found = (snapshot.tools[tool].endpoint for tool in (agent.tools if agent else ()))
    usual = (each.host for each in found if (each.scheme, each.port) == ("https", 443) and not is_address(each.host))
    return next(usual, "")


def _table(rows: Iterable[Row]) -> Iterator[str]:
    shown = [("", "probe", "expected", "seen"), *(("OUT" if row.out else "", row.probe, row.expected, row.seen) for row in rows)]
    widths = [max(len(row[column]) for row in shown) for column in range(3)]
    for row in shown:
        yield printable("  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)).rstrip())
