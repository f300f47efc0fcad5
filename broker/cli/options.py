"""Options that several verbs share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from broker.dataplane.site import Site
from broker.errors import UsageError
from broker.state import State


class HostPort(click.ParamType[tuple[str, int]]):
    """`HOST:PORT`, as `(host, port)`."""

    name = "host:port"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """Read it, or say what is wrong."""
        if isinstance(value, tuple):
            return value
        host, _, port = str(value).rpartition(":")
        if not host or not port.isdigit() or int(port) > 65_535:  # noqa: PLR2004 - TCP's
            self.fail(f"{value!r} is no HOST:PORT, such as 127.0.0.1:15001", param, ctx)
        return host.strip("[]"), int(port)


def manifests(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--manifests DIR`."""
    kind = click.Path(path_type=Path, file_okay=False)
    return click.option("--manifests", type=kind, default=Path("manifests"), show_default=True, help="The manifests folder.")(
        function
    )


def state(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--state DIR`."""
    kind = click.Path(path_type=Path, file_okay=False)
    return click.option("--state", type=kind, default=Path(".broker"), show_default=True, help="The broker's state folder.")(
        function
    )


def as_json(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def doors(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--proxy`, `--base-url`."""
    function = _address("--base-url", 15002, "The reverse proxy: http://HOST:PORT/<tool>/…")(function)
    return _address("--proxy", 15001, "The explicit proxy, for HTTP_PROXY and HTTPS_PROXY.")(function)


def addresses(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--proxy`, `--base-url`, `--admin`."""
    return doors(_address("--admin", 15003, "Health, metrics and keys.")(function))


def _address(name: str, port: int, what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(name, type=HostPort(), default=f"127.0.0.1:{port}", show_default=True, help=what)


def redis(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--redis URL`: refused until a ledger uses it, so that nobody believes in shared limits that are not there."""

    def refuse(_: click.Context, __: click.Parameter, value: str | None) -> None:
        if value is not None:
            raise UsageError("--redis is not built yet", "leave it out: one broker keeps its own state")

    return click.option("--redis", metavar="URL", callback=refuse, expose_value=False, help="Shared state (not built yet).")(
        function
    )


ROOTS = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")


def site(state_folder: State, proxy: tuple[str, int], base_url: tuple[str, int]) -> Site:
    """Where this machine's Envoy stands. Raises `UsageError` where the system has no trust roots."""
    roots = next((path for path in ROOTS if Path(path).is_file()), None)
    if roots is None:
        raise UsageError(
            "this system has no trust roots, so no upstream could be verified", "install the package ca-certificates"
        )
    return Site(proxy, base_url, str(state_folder.processor_socket), str(state_folder.envoy_admin_socket), roots)
