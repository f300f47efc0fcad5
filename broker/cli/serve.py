"""`broker serve`: the processor, the configuration service and the admin API, for an Envoy that someone else runs."""

import asyncio
import contextlib
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

import click
import orjson

from broker.cli import options
from broker.cli.folders import FOLDER
from broker.errors import UsageError
from broker.server import Server
from broker.state import State
from broker.supervisor import refuse_taken, without_core_dumps


@click.command()
@options.broker
@click.option("--run", "shared", type=FOLDER, help="Where the sockets between Envoy and processors lie, if not in STATE/run.")
@click.option(
    "--processor",
    "name",
    type=options.processor_name,
    metavar="NAME",
    help="Its name, where several are behind one Envoy: its socket is NAME.sock.",
)
@click.option(
    "--envoy", "reached_at", metavar="HOST", default="", help="Where it reaches Envoy's doors, if not at their addresses."
)
def serve(
    *,
    manifests: Path,
    state: Path,
    redis: str,
    as_json: bool,
    shared: Path | None,
    name: str | None,
    reached_at: str,
    **doors: options.Address,
) -> None:
    """Run a processor without Envoy. What `broker render envoy --bootstrap` prints leads an Envoy to it.

    Several of them, each with a state folder of its own, can be behind one Envoy.

    With --json a line for each event: {event, revision}, where event is "listening", or "accepted" when Envoy has this revision.
    """
    if name and not redis:
        raise UsageError("processors that share an Envoy must count together", "name their ledger with --redis")
    refuse_taken({"--admin": doors["admin"]})
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("grpc").setLevel(logging.ERROR)
    without_core_dumps()
    folder = State.at(state, shared, name or "processor")

    def announce(event: str, revision: str) -> None:
        if as_json:
            with contextlib.suppress(BrokenPipeError):
                os.write(1, orjson.dumps({"event": event, "revision": revision}) + b"\n")
        elif event == "listening":
            click.echo(f"serving revision {revision}")

    site = replace(options.site(folder, doors["proxy"], doors["base_url"]), reached_at=reached_at)
    server = Server(manifests, folder, site, doors["admin"], announce, redis, one_of_several=name is not None)
    asyncio.run(server.run())
