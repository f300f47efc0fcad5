"""Names of places and principals: endpoints and SPIFFE IDs, each in its one canonical spelling.

Law: refuse, don't normalise. Agreement compares hosts byte for byte, so only one spelling of each is accepted.
"""

import ipaddress
import re

from broker.policy.match import split_path
from broker.policy.snapshot import Endpoint


class AddressError(ValueError):
    """The text is no endpoint or SPIFFE ID; the message says why, and after a semicolon what to write."""


_ENDPOINT = re.compile(r"(?P<scheme>https?)://(?P<host>\[[^\]/]*\]|[^:/\[\]]*)(?::(?P<port>[^/]*))?(?P<path>/.*)?\Z")
# RFC 1123 section 2.1 and RFC 5890 section 2.3.1: letters, digits, hyphens within; and no R-LDH label but A-labels.
_LABEL = re.compile(r"(?:(?=xn--)|(?!..--))[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")
_NUMERIC = re.compile(r"(?:[0-9]+|0x[0-9a-f]*)\Z")


def parse_endpoint(text: str) -> Endpoint:
    """Read `scheme://host[:port][/base]`. Raises `AddressError`."""
    for character, name in (("@", "user information"), ("?", "a query"), ("#", "a fragment"), ("*", "a wildcard")):
        if character in text:
            raise AddressError(f"an endpoint is one exact place, without {name}; take it out")
    found = _ENDPOINT.match(text)
    if not found:
        raise AddressError("this is no http or https endpoint; write it as https://host[:port][/base/path]")
    scheme, port = found["scheme"], found["port"]
    if port is None:
        port = "443" if scheme == "https" else "80"
    if not re.fullmatch("[1-9][0-9]{0,4}", port) or int(port) > 65535:  # noqa: PLR2004 - the largest port (RFC 9293 section 3.1)
        raise AddressError("the port is not a number from 1 to 65535; write the port in plain digits, or leave it out")
    return Endpoint(scheme, _host(found["host"]), int(port), _base(found["path"] or "/"))


def _host(host: str) -> str:
    labels = host.split(".")
    if host.startswith("[") or _NUMERIC.match(labels[-1]):
        return _address(host)
    for wrong, why in (
        (not host.isascii(), "is not ASCII; write the A-label (xn--…) of each part, so that look-alikes show"),
        (host != host.lower(), "has upper case; write it in lower case"),
        (host.endswith("."), "ends with a dot; take the dot out"),
        # RFC 1035 section 2.3.4, without the root's dot.
        (len(host) > 253, "is no DNS name; at most 253 characters are"),  # noqa: PLR2004
        (not all(map(_LABEL.match, labels)), "is no DNS name; write labels of a-z, 0-9 and inner hyphens, joined by dots"),
    ):
        if wrong:
            raise AddressError(f"the host {why}")
    return host


def _address(host: str) -> str:
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        raise AddressError("the host is a number, but no IP address; write it as in 10.20.0.7 or [2001:db8::7]") from None
    if host != (str(address) if address.version == 4 else f"[{address}]") or getattr(address, "ipv4_mapped", None) or "%" in host:  # noqa: PLR2004
        raise AddressError("the IP address is not in its canonical form (RFC 5952), or is mapped or scoped; write the plain one")
    return str(address)


def _base(path: str) -> str:
    try:
        split_path(path)
    except ValueError as error:
        raise AddressError(f"{error}; write the base path in its one plain spelling") from None
    if (path.endswith("/") and path != "/") or "%" in path:
        raise AddressError("the base path ends with a slash or is percent-encoded; write it plainly, without a slash at its end")
    return path.rstrip("/")


# SPIFFE-ID standard, sections 2.1 to 2.4: lower-case trust domain, path of plain segments, at most 2048 bytes.
_SPIFFE = re.compile(r"(?=.{1,2048}\Z)spiffe://[a-z0-9._-]{1,255}(?:/(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._-]+)+\Z")


def parse_spiffe(text: str) -> str:
    """The SPIFFE ID of a workload, as it is. Raises `AddressError`."""
    if not _SPIFFE.match(text):
        raise AddressError("this is no SPIFFE ID of a workload; write it as spiffe://trust-domain/path")
    return text
