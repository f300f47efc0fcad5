"""`broker up`: Envoy, the processor and the admin API on this machine, with embedded state."""

import asyncio
import contextlib
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import click
import orjson

from broker.cli import options
from broker.dataplane.site import Site
from broker.errors import BrokerError
from broker.manifest.findings import FORMATS
from broker.manifest.load import load
from broker.policy.snapshot import PolicySnapshot
from broker.state import State
from broker.supervisor import Supervisor, envoy_binary, envoy_version, refuse_taken

# From nothing to the first call: a start takes about a second; a slow disk or a thousand hosts, a few.
_START_S = 60.0


@click.command()
@options.manifests
@options.state
@options.addresses
@options.redis
@options.as_json
def up(
    *, manifests: Path, state: Path, proxy: tuple[str, int], base_url: tuple[str, int], admin: tuple[str, int], as_json: bool
) -> int:
    """Run the broker: one command, no root, no other server.

    Prints one line when calls can be served, and goes on until SIGTERM or Ctrl-C.
    """
    snapshot = _checked(manifests)
    refuse_taken({"--proxy": proxy, "--base-url": base_url, "--admin": admin})
    folder = State.at(state)
    site = options.site(folder, proxy, base_url)
    version = envoy_version(envoy_binary())
    click.echo(f"starting Envoy {version} for {len(snapshot.agents)} agents and {len(snapshot.tools)} tools …", err=True)
    command = [
        sys.executable, "-m", "broker.cli", "serve", "--json", "--manifests", str(manifests), "--state", str(state),
        "--proxy", shown(proxy), "--base-url", shown(base_url), "--admin", shown(admin),
    ]  # fmt: skip
    ready = {"event": "ready", "proxy": shown(proxy), "base_url": shown(base_url), "admin": shown(admin), "ca": str(folder.ca)}
    return asyncio.run(_Up(site, folder, command, ready, snapshot, as_json=as_json).run())


def shown(address: tuple[str, int]) -> str:
    """`host:port`, as it is written in a URL."""
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"{host}:{address[1]}"


def _checked(manifests: Path) -> PolicySnapshot:
    loaded = load(manifests)
    errors = [finding for finding in loaded.findings if finding.severity == "error"]
    click.echo(FORMATS["text"](errors), err=True, nl=False)
    if warnings := len(loaded.findings) - len(errors):
        click.echo(f"{warnings} warnings in the manifests; `broker check {manifests}` shows them", err=True)
    if loaded.snapshot is None:
        raise _Refused("the manifests have errors", f"correct them; `broker check {manifests}` shows them again")
    return loaded.snapshot


class _Refused(BrokerError):
    exit_code = 1


class _Up:
    def __init__(
        self, site: Site, folder: State, command: list[str], ready: dict[str, str], snapshot: PolicySnapshot, *, as_json: bool
    ) -> None:
        self._site = site
        self._folder = folder
        self._ready = ready
        self._snapshot = snapshot
        self._as_json = as_json
        self._accepted = asyncio.Event()
        self._listening = asyncio.Event()
        self._supervisor = Supervisor(command, site, folder.run, self._heard)

    async def run(self) -> int:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        waits = {
            "stop": asyncio.create_task(stop.wait()),
            "processor": asyncio.create_task(self._supervisor.processor()),
            "envoy": asyncio.create_task(self._envoy()),
            "ready": asyncio.create_task(self._until_ready()),
        }
        try:
            await self._first_end(waits)
        finally:
            await self._supervisor.stop()
            for task in waits.values():
                task.cancel()
            await asyncio.gather(*waits.values(), return_exceptions=True)
        return 0

    async def _first_end(self, waits: dict[str, asyncio.Task[Any]]) -> None:
        pending = set(waits.values())
        while not waits["stop"].done():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    async def _envoy(self) -> None:
        # The socket is bound first: an Envoy that finds it asks at once, instead of after a pause.
        await self._listening.wait()
        await self._supervisor.envoy()

    async def _until_ready(self) -> None:
        try:
            async with asyncio.timeout(_START_S):
                await self._accepted.wait()
                for address in (self._site.proxy, self._site.base_url):
                    await _open(address)
        except TimeoutError:
            raise BrokerError(f"Envoy did not take its configuration within {_START_S:.0f} s", "see its messages above") from None
        click.echo(orjson.dumps(self._ready) if self._as_json else self._words())

    def _heard(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "listening":
            self._listening.set()
        if kind in ("listening", "accepted"):
            self._ready["revision"] = event["revision"]
        if kind == "accepted":
            self._accepted.set()
        if kind == "refused":
            click.echo(f"broker: {event['error']}", err=True)

    def _words(self) -> str:
        name = next((agent.name for agent in self._snapshot.agents.values() if agent.token), "AGENT")
        program = "broker" if shutil.which("broker") else Path(sys.executable).with_name("broker")
        token = f"$({program} token {name} --state {self._folder.root})"
        ready = self._ready
        return (
            f"ready: proxy http://{ready['proxy']}, base URL http://{ready['base_url']}/<tool>/, CA {ready['ca']}\n"
            f"  export HTTPS_PROXY=http://{name}:{token}@{ready['proxy']}\n"
            f"  export http_proxy=$HTTPS_PROXY\n"
            f"  export SSL_CERT_FILE={ready['ca']}"
        )


async def _open(address: tuple[str, int]) -> None:
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(*address)
            writer.close()
            await writer.wait_closed()
            return
        await asyncio.sleep(0.01)
