"""`broker up`: Envoy, the processor and the admin API on this machine, with embedded state."""

import asyncio
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import click
import orjson

from broker.cli import options
from broker.errors import UsageError, counted
from broker.state import State
from broker.supervisor import NotStarted, Supervisor, envoy_binary, envoy_version, refuse_taken, without_core_dumps


@click.command()
@options.broker
def up(*, manifests: Path, state: Path, redis: str, as_json: bool, **doors: options.Address) -> int:
    """Run the broker: one command, no root, no other server.

    Prints where its doors are, and what to paste into an agent's shell, once Envoy has its configuration; goes on until SIGTERM
    or Ctrl-C. While the Redis of --redis can't be reached, calls are denied all the same: the log and /readyz say so.

    With --json one line: {event: "ready", proxy, base_url, admin, ca, revision}.
    """
    without_core_dumps()
    snapshot = options.snapshot(manifests)
    folder = State.at(state)
    if folder.in_use:  # before the ports, which it has too unless others were chosen
        raise UsageError(f"a broker already runs on {folder.root}", "stop it, or give this one its own folder with --state")
    refuse_taken({f"--{name.replace('_', '-')}": address for name, address in doors.items()})
    who, what = counted(len(snapshot.agents), "agent"), counted(len(snapshot.tools), "tool")
    click.echo(f"starting Envoy {envoy_version(envoy_binary())} for {who} and {what} …", err=True)
    # Not as an argument: it may hold a password.
    os.environ[options.REDIS] = redis
    serve = options.command("serve", manifests=manifests, state=state, **doors)
    supervisor = Supervisor(serve, options.site(folder, doors["proxy"], doors["base_url"]), folder.run)
    places = {**{name: str(address) for name, address in doors.items()}, "ca": str(folder.ca)}
    name = next((agent.name for agent in snapshot.agents.values() if agent.token), "AGENT")

    def ready(revision: str) -> None:
        event = {"event": "ready", **places, "revision": revision}
        click.echo(orjson.dumps(event) if as_json else to_paste(name, folder.root, event))

    try:
        asyncio.run(supervisor.run(ready))
    except NotStarted as refused:
        return refused.exit_code
    return 0


def to_paste(name: str, state: Path, ready: Mapping[str, str]) -> str:
    """The ready line, and what to paste into the shell of the agent `name`."""
    program = "broker" if shutil.which("broker") else Path(sys.executable).with_name("broker")
    return (
        f"ready: proxy http://{ready['proxy']}, base URL http://{ready['base_url']}/<tool>/, CA {ready['ca']}\n"
        f"  export HTTPS_PROXY=http://{name}:$({program} token {name} --state {state})@{ready['proxy']}\n"
        f"  export http_proxy=$HTTPS_PROXY\n"
        f"  export SSL_CERT_FILE={ready['ca']} REQUESTS_CA_BUNDLE={ready['ca']} CURL_CA_BUNDLE={ready['ca']}"
        f" NODE_EXTRA_CA_CERTS={ready['ca']}"
    )
