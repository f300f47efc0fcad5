"""`broker demo`: a broker with tools of its own on loopback, and a guided tour of what it does."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
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
from broker.demo.tools import Payments, Wiki
from broker.demo.tour import AGENT, Place, Surprise, Tour
from broker.errors import BrokerError
from broker.identity import TokenAuthority
from broker.keys import ed25519

_START_S = 60


@click.command()
@click.option("--once", is_flag=True, help="Walk the tour and end.")
@options.doors
def demo(*, once: bool, proxy: tuple[str, int], base_url: tuple[str, int]) -> int:
    """Start a broker and two tools on this machine and walk through what it allows and refuses.

    Ends with 1 if a step does not go as it should.
    """
    folder = Path(tempfile.mkdtemp(prefix="broker-demo-"))
    try:
        with _running(folder, proxy, base_url) as (place, payments, wiki):
            try:
                Tour(place, payments, wiki, click.echo).walk()
            except Surprise as surprise:
                click.echo(f"\nNot as it should be: {surprise}", err=True)
                return 1
            verified = verify(folder / "state" / "audit", None)
            click.echo(f"\nThe record: {verified.records} records, {len(verified.problems)} problems in the chain.")
            if not once:
                click.echo(f"The broker goes on at http://{place.proxy} until Ctrl-C; its state is in {folder / 'state'}.")
                signal.sigwait({signal.SIGINT, signal.SIGTERM})
        return 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _running(folder: Path, proxy: tuple[str, int], base_url: tuple[str, int]) -> Iterator[tuple[Place, Payments, Wiki]]:
    manifests, state = folder / "manifests", folder / "state"
    manifests.mkdir()
    payments, wiki = Payments(manifests, clock.now()), Wiki()
    while (port := wiki.port) is None:
        time.sleep(0.02)
    text = resources.files("broker.demo").joinpath("manifests", "payments.yaml").read_text()
    filled = Template(text).substitute(PAYMENTS_PORT=payments.port, WIKI_PORT=port)
    (manifests / "demo.yaml").write_text(filled)
    command = [sys.executable, "-m", "broker.cli", "up", "--json", "--manifests", str(manifests), "--state", str(state)]
    addresses = ["--proxy", f"{proxy[0]}:{proxy[1]}", "--base-url", f"{base_url[0]}:{base_url[1]}", "--admin", "127.0.0.1:0"]
    environment = {**os.environ, "DEMO_PAYMENTS_KEY": "sk_demo_only-the-broker-has-it"}
    with subprocess.Popen([*command, *addresses], stdout=subprocess.PIPE, env=environment, start_new_session=True) as broker:  # noqa: S603
        try:
            line = broker.stdout.readline() if broker.stdout else b""
            if not line:
                raise BrokerError("the broker did not start", "see its message above")
            ready = json.loads(line)
            token = TokenAuthority(ed25519(state / "keys" / "tokens.key")).mint(AGENT, clock.now())
            yield (
                Place(ready["proxy"], ready["base_url"], ready["ca"], token, lambda: _last_code(state / "audit")),
                payments,
                wiki,
            )
        finally:
            broker.terminate()


def _last_code(audit: Path) -> str:
    records = (json.loads(line) for line in chain.backwards(chain.segments(audit)))
    return next((record["code"] for record in records if record.get("verdict") == "deny"), "")
