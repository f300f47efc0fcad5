"""What several verbs share: their options, and what they make of them."""

import contextlib
import functools
import gc
import getpass
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import click

from broker import clock
from broker.admin.client import ask
from broker.audit import AuditSink, chain
from broker.audit.index import Index
from broker.audit.log import AuditLog
from broker.cli import folders
from broker.cli.folders import FOLDER, Decorator, folder
from broker.containment.response import Containment, Surroundings
from broker.dataplane.site import Site
from broker.errors import BrokerError, UsageError, counted
from broker.keys import ed25519
from broker.manifest.findings import FORMATS
from broker.manifest.load import Loaded, load
from broker.manifest.words import moment as date_or_time
from broker.policy.snapshot import PolicySnapshot
from broker.state import State

_PORTS = 65_535
REDIS = "BROKER_REDIS_URL"
ROOTS = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")


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
    try:
        return Address(str(ip_address(host.strip("[]"))), int(port))
    except ValueError:
        raise UsageError(f"{host!r} is no IP address, and Envoy listens at no other", "write it like 127.0.0.1:15001") from None


def processor_name(text: str) -> str:
    """What can be the name of a processor, and so of its socket. Raises `UsageError`."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}", text) or text == "envoy-admin":
        raise UsageError(f"{text!r} can't be a processor's name", "write small letters, digits and hyphens, like processor-1")
    return text


def _together(*options: Decorator) -> Decorator:
    def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorated


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_SPAN = re.compile(r"([0-9]{1,6})([smhd])", re.ASCII)


def _moment(text: str, direction: int) -> float:
    with contextlib.suppress(ValueError, OverflowError):  # of what is written well, but before the year 1 or after 9999
        if span := _SPAN.fullmatch(text):
            away = timedelta(seconds=direction * int(span[1]) * _UNITS[span[2]])
            return (datetime.fromtimestamp(clock.now(), UTC) + away).timestamp()
        return date_or_time(text)
    raise UsageError(f"{text!r} is no time", "write 30s, 15m, 12h, 7d, 2026-01-31 (in UTC) or 2026-01-31T09:30:00Z")


def moment(name: str, what: str, *, ahead: bool = False) -> Decorator:
    """An option that takes a time, in seconds since the epoch: a date, a date and time, or so long ago (`ahead`: from now)."""

    def read(text: str) -> float:
        return _moment(text, 1 if ahead else -1)

    return click.option(name, type=read, metavar="7d|DATE|TIME", help=what)


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


directory = click.argument("manifests", metavar="[DIR]", default="manifests", type=FOLDER)
manifests = folder("--manifests", "manifests", "The manifests folder.")
state, broker_state = folders.state, folders.broker_state
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


def index(folder: Path) -> Index:
    """The index over the audit log of this state folder, brought up to date; a person is told while that takes long.

    Raises `UsageError`.
    """
    with contextlib.ExitStack() as files:
        opened = files.enter_context(Index(folder))
        shown = sys.stderr.isatty()
        opened.update(_progress if shown else lambda _read, _size: None)
        click.echo("\r\x1b[K" if shown else "", err=True, nl=False)
        files.pop_all()
    return opened


def _progress(read: int, size: int) -> None:
    click.echo(f"indexing the audit log, once: {100 * read // (size or 1)} %\r", err=True, nl=False)


def ascii_json(value: object) -> str:
    """JSON of ASCII characters that can be seen."""
    return json.dumps(value, separators=(",", ":")).replace("\x7f", "\\u007f")


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
            offline(contained(folder.audit, log), by)
            log.sync(now)
    return answer


def command(verb: str, **chosen: object) -> list[str]:
    """The command line of a verb with these options (`base_url` is `--base-url`) and `--json`."""
    options = [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "broker.cli", verb, "--json", *options]


def contained(audit: Path, sink: AuditSink) -> Containment:
    """What was done about agents, as the log in this folder has it. Raises `UsageError`."""
    held = Containment(Surroundings(sink, clock.now, clock.steady, clock.mono_ns, lambda: secrets.token_hex(10)))
    try:
        held.replay(chain.notices(audit))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        what = "a notice in the audit log is not as this broker writes it, so who is under containment is not known"
        raise UsageError(what, "see what `broker audit verify` says of the log") from error
    return held


class ManifestErrors(BrokerError):
    """There are findings; they are on stderr."""

    exit_code = 1


def snapshot(manifests: Path) -> PolicySnapshot:
    """What the manifests compile to. Raises as `compiled`."""
    return compiled(manifests)[0]


def compiled(manifests: Path) -> tuple[PolicySnapshot, Loaded]:
    """What the manifests compile to, and all that was read; says what is wrong on stderr.

    Raises `ManifestErrors`, and `UsageError` without a folder.
    """
    loaded = load(manifests)
    errors = [
        replace(finding, file=(manifests / finding.file).as_posix()) for finding in loaded.findings if finding.severity == "error"
    ]
    click.echo(FORMATS["text"](errors), err=True, nl=False)
    if warnings := len(loaded.findings) - len(errors):
        click.echo(f"{counted(warnings, 'warning')} in the manifests; `broker check {manifests}` shows them", err=True)
    if loaded.snapshot is None:
        raise ManifestErrors("the manifests have errors", f"correct them; `broker check {manifests}` shows them again")
    return loaded.snapshot, loaded


def site(state_folder: State, proxy: tuple[str, int], base_url: tuple[str, int]) -> Site:
    """Where this machine's Envoy stands. Raises `UsageError` where the system has no trust roots."""
    roots = next((path for path in ROOTS if Path(path).is_file()), None)
    if roots is None:
        raise UsageError("there are no trust roots here to verify upstreams by", "install the package ca-certificates")
    return Site(proxy, base_url, (str(state_folder.processor_socket),), str(state_folder.envoy_admin_socket), roots)
