"""`broker serve`: the processor, the configuration service and the admin API, for an Envoy that someone else runs."""

import asyncio
import contextlib
import logging
import os
import sys
from pathlib import Path

import click
import orjson

from broker.cli import options
from broker.server import Server
from broker.state import State
from broker.supervisor import without_core_dumps


@click.command()
@options.broker
def serve(*, manifests: Path, state: Path, redis: str, as_json: bool, **doors: options.Address) -> None:
    """Run the processor without Envoy. What `broker render envoy` prints under `bootstrap:` leads an Envoy to it."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("grpc").setLevel(logging.ERROR)
    without_core_dumps()
    folder = State.at(state)

    def announce(event: str, revision: str) -> None:
        if as_json:
            with contextlib.suppress(BrokenPipeError):
                os.write(1, orjson.dumps({"event": event, "revision": revision}) + b"\n")
        elif event == "listening":
            click.echo(f"serving revision {revision}")

    server = Server(manifests, folder, options.site(folder, doors["proxy"], doors["base_url"]), doors["admin"], announce, redis)
    asyncio.run(server.run())
