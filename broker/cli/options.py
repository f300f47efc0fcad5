"""What several verbs share: their options, and what they make of them."""

import contextlib
import functools
import gc
import getpass
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import click

from broker import clock
from broker.admin.client import ask
from broker.audit import chain
from broker.audit.log import AuditLog
from broker.containment.response import Containment, Surroundings
from broker.dataplane.site import Site
from broker.errors import BrokerError, UsageError, counted
from broker.keys import ed25519
from broker.manifest.findings import FORMATS
from broker.manifest.load import load
from broker.policy.snapshot import PolicySnapshot
from broker.state import State

_PORTS = 65_535
_FOLDER = click.Path(path_type=Path, file_okay=False)
REDIS = "BROKER_REDIS_URL"
ROOTS = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Address(NamedTuple):
    """A TCP address; `str` writes it as a URL does."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > _PORTS:
        raise UsageError(f"{text!r} is no HOST:PORT", "write it like 127.0.0.1:15001")
    return Address(host.strip("[]"), int(port))


def _together(*options: Decorator) -> Decorator:
    def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorated


def _folder(name: str, default: str, what: str) -> Decorator:
    return click.option(name, type=_FOLDER, default=default, show_default=True, help=what)


def door(name: str, default: str, what: str) -> Decorator:
    """An option that takes an address."""
    return click.option(name, type=_address, metavar="HOST:PORT", default=default, show_default=True, help=what)


def _redis(_context: click.Context, _option: click.Parameter, url: str | None) -> str:
    """The URL with the password that stands in the environment, since arguments can be read by every user of the machine."""
    if not url:
        return ""
    password = os.environ.get("BROKER_REDIS_PASSWORD", "")
    parts = urlsplit(url)
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise UsageError("--redis names no Redis", "write redis[s]://[USER@]HOST:PORT")
    if password and parts.password is None:
        user, _, host = parts.netloc.rpartition("@")
        parts = parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}")
    return parts.geturl()


directory = click.argument("manifests", metavar="[DIR]", default="manifests", type=_FOLDER)
manifests = _folder("--manifests", "manifests", "The manifests folder.")
state = _folder("--state", ".broker", "The broker's state folder.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
doors = _together(
    door("--proxy", "127.0.0.1:15001", "The explicit proxy, for HTTP_PROXY and HTTPS_PROXY."),
    door("--base-url", "127.0.0.1:15002", "The reverse proxy: http://HOST:PORT/<tool>/…"),
)
broker = _together(
    manifests,
    state,
    doors,
    door("--admin", "127.0.0.1:15003", "Health, metrics and keys."),
    click.option(
        "--redis",
        metavar="URL",
        envvar=REDIS,
        callback=_redis,
        help="Count in this Redis, with all brokers that do: redis[s]://[USER@]HOST:PORT; password in BROKER_REDIS_PASSWORD.",
    ),
    as_json,
)


def short_lived(function: Callable[..., Any]) -> Callable[..., Any]:
    """For a verb that makes much and then ends: nothing is searched for unreachable cycles, also not at the process's end."""

    @functools.wraps(function)
    def verb(*arguments: Any, **named: Any) -> Any:
        gc.disable()
        try:
            return function(*arguments, **named)
        finally:
            gc.freeze()
            gc.enable()

    return verb


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def broker_state(folder: Path) -> State:
    """The state folder of a broker that ran before. Raises `UsageError` where none has."""
    if not (folder / "keys" / "tokens.key").exists():
        raise UsageError(
            f"{folder} is no state folder of a broker", "start one with `broker up`, or name its folder with --state"
        )
    return State.at(folder)


def me() -> str:
    """The name of whoever runs this, as the system knows it; with sudo, of whoever asked for root's rights."""
    with contextlib.suppress(KeyError, OSError):  # a user without a name
        return os.environ.get("SUDO_USER") or getpass.getuser()
    return f"user {os.getuid()}"


def act(
    folder: State, target: str, said: Mapping[str, Any], offline: Callable[[Containment, str], object], by: str = ""
) -> dict[str, Any] | None:
    """Have the running broker do it by its control API; where none runs, `offline` does it in the record, for the next start.

    Gives the running broker's answer, None where there is none. Raises what `ask` raises.
    """
    by = by or me()
    answer = ask(folder.control_socket, "POST", target, {**said, "by": by})
    if answer is None:
        now = clock.now()
        with AuditLog(folder.audit, ed25519(folder.keys / "audit.key"), now, clock.mono_ns()) as log:
            held = Containment(Surroundings(log, clock.now, clock.steady, clock.mono_ns, lambda: secrets.token_hex(10)))
            held.replay(chain.notices(folder.audit))
            offline(held, by)
            log.sync(now)
    return answer


def command(verb: str, **chosen: object) -> list[str]:
    """The command line of a verb with these options (`base_url` is `--base-url`) and `--json`."""
    options = [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "broker.cli", verb, "--json", *options]


class ManifestErrors(BrokerError):
    """There are findings; they are on stderr."""

    exit_code = 1


def snapshot(manifests: Path) -> PolicySnapshot:
    """What the manifests compile to; says what is wrong on stderr. Raises `ManifestErrors`, and `UsageError` without a folder."""
    loaded = load(manifests)
    errors = [finding for finding in loaded.findings if finding.severity == "error"]
    click.echo(FORMATS["text"](errors), err=True, nl=False)
    if warnings := len(loaded.findings) - len(errors):
        click.echo(f"{counted(warnings, 'warning')} in the manifests; `broker check {manifests}` shows them", err=True)
    if loaded.snapshot is None:
        raise ManifestErrors("the manifests have errors", f"correct them; `broker check {manifests}` shows them again")
    return loaded.snapshot


def site(state_folder: State, proxy: tuple[str, int], base_url: tuple[str, int]) -> Site:
    """Where this machine's Envoy stands. Raises `UsageError` where the system has no trust roots."""
    roots = next((path for path in ROOTS if Path(path).is_file()), None)
    if roots is None:
        raise UsageError("there are no trust roots here to verify upstreams by", "install the package ca-certificates")
    return Site(proxy, base_url, str(state_folder.processor_socket), str(state_folder.envoy_admin_socket), roots)
