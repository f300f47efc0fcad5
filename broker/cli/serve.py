"""`broker serve`: the processor, the configuration service and the admin API, for an Envoy that someone else runs."""

import asyncio
import logging
import sys
from pathlib import Path
from typing import Any

import click

from broker.cli import options
from broker.server import Server, Settings, announce_json
from broker.state import State


@click.command()
@options.manifests
@options.state
@options.addresses
@options.redis
@options.as_json
def serve(
    *, manifests: Path, state: Path, proxy: tuple[str, int], base_url: tuple[str, int], admin: tuple[str, int], as_json: bool
) -> None:
    """Run the processor without Envoy; `broker render envoy` prints the bootstrap that leads Envoy to it."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("grpc").setLevel(logging.ERROR)
    folder = State.at(state)
    settings = Settings(manifests, folder, options.site(folder, proxy, base_url), admin)
    asyncio.run(_serve(settings, announce_json if as_json else _announce))


async def _serve(settings: Settings, announce: Any) -> None:
    await Server(settings, announce).run()


def _announce(event: dict[str, Any]) -> None:
    if event["event"] == "listening":
        click.echo(f"serving revision {event['revision']}")
