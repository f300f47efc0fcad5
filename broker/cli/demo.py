"""`broker demo`: a broker with tools of its own on loopback, and a guided tour of what it does."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from string import Template

import click

from broker import clock
from broker.audit import chain
from broker.audit.verify import verify
from broker.cli import options
from broker.cli.up import to_paste
from broker.demo.tools import payments, wiki
from broker.demo.tour import AGENT, Place, Surprise, Tour
from broker.errors import BrokerError, counted
from broker.identity import TokenAuthority
from broker.keys import ed25519


@click.command()
@click.option("--once", is_flag=True, help="Walk the tour and end.")
@options.door("--proxy", "127.0.0.1:0", "The explicit proxy; port 0 is a free one.")
@options.door("--base-url", "127.0.0.1:0", "The reverse proxy; port 0 is a free one.")
def demo(*, once: bool, proxy: options.Address, base_url: options.Address) -> int:
    """Walk through what a broker allows and refuses.

    Starts one, with two tools, on this machine. Ends with 1 if a step does not go as it should.
    """
    proxy, base_url = (each if each.port else options.Address(each.host, _free_port(each.host)) for each in (proxy, base_url))
    with tempfile.TemporaryDirectory(prefix="broker-demo-") as folder, _running(Path(folder), proxy, base_url) as tour:
        try:
            asyncio.run(tour.walk())
        except Surprise as surprise:
            click.echo(f"\nNot as it should be: {surprise}", err=True)
            return 1
        state = Path(folder) / "state"
        _settled(state / "audit")
        found = verify(state / "audit", None)
        click.echo(f"\nThe record: {counted(found.records, 'record')}, {counted(len(found.problems), 'problem')} in the chain.")
        if not once:
            ready = {"proxy": str(proxy), "base_url": str(base_url), "ca": str(state / "ca.pem")}
            click.echo(f"The broker goes on until Ctrl-C. {to_paste(AGENT, state, ready)}")
            signal.sigwait({signal.SIGINT, signal.SIGTERM})
    return 0


@contextlib.contextmanager
def _running(folder: Path, proxy: options.Address, base_url: options.Address) -> Iterator[Tour]:
    manifests, state = folder / "manifests", folder / "state"
    manifests.mkdir()
    tools = payments(manifests, clock.now()), wiki()
    text = resources.files("broker.demo").joinpath("manifests", "payments.yaml").read_text()
    filled = Template(text).substitute(PAYMENTS_PORT=tools[0].port, WIKI_PORT=tools[1].port)
    (manifests / "demo.yaml").write_text(filled)
    admin = options.Address("127.0.0.1", _free_port("127.0.0.1"))
    command = options.command("up", manifests=manifests, state=state, proxy=proxy, base_url=base_url, admin=admin)
    environment = {**os.environ, "DEMO_PAYMENTS_KEY": "sk_demo_only-the-broker-has-it"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True) as broker:  # noqa: S603
        try:
            line = broker.stdout.readline() if broker.stdout else b""
            if not line:
                raise BrokerError("the broker did not start", "see its message above")
            token = TokenAuthority(ed25519(state / "keys" / "tokens.key")).mint(AGENT, clock.now())
            place = Place(str(proxy), str(base_url), json.loads(line)["ca"], token, lambda: _last_code(state / "audit"))
            yield Tour(place, *tools, click.echo)
        finally:
            broker.terminate()


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])


def _last_code(audit: Path) -> str:
    records = (json.loads(line) for line in chain.backwards(chain.segments(audit)))
    return next((record["code"] for record in records if record.get("verdict") == "deny"), "")


def _settled(audit: Path) -> None:
    """Wait until each allowed call has its outcome in the record, which is written once the answer has gone."""
    for _ in range(100):
        records = [json.loads(line) for line in chain.backwards(chain.segments(audit))]
        if sum(r.get("verdict") == "allow" for r in records) == sum(r["event"] == "outcome" for r in records):
            return
        time.sleep(0.02)
