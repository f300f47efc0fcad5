"""Names of places and principals: endpoints and SPIFFE IDs, each in its one canonical spelling.

Law: refuse, don't normalise. Agreement compares hosts byte for byte, so only one spelling of each is accepted.
"""

import ipaddress
import re

from broker.policy.match import PathError, split_path
from broker.policy.snapshot import Endpoint


class AddressError(ValueError):
    """The text is no endpoint or SPIFFE ID; the message says why, and after a semicolon what to write."""


_ENDPOINT = re.compile(r"(?P<scheme>https?)://(?P<host>\[[^\]/]*\]|[^:/\[\]]*)(?::(?P<port>[^/]*))?(?P<path>/.*)?\Z")
_PORT = re.compile(r"[1-9][0-9]{0,4}\Z")
# RFC 1123 section 2.1 and RFC 5890 section 2.3.1: letters, digits, hyphens within; and no R-LDH label but A-labels.
_LABEL = re.compile(r"(?!..--)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")
_NUMERIC = re.compile(r"(?:[0-9]+|0x[0-9a-f]*)\Z")
_LONGEST_HOST = 253  # RFC 1035 section 2.3.4, without the root's dot


def parse_endpoint(text: str) -> Endpoint:
    """Read `scheme://host[:port][/base]`. Raises `AddressError`.

    First that applies: characters that never stand in an endpoint, the shape as a whole, the host, the port, the base path.
    """
    for character, name in (("@", "user information"), ("?", "a query"), ("#", "a fragment"), ("*", "a wildcard")):
        if character in text:
            raise AddressError(f"an endpoint is one exact place, without {name}; take it out")
    found = _ENDPOINT.match(text)
    if not found:
        raise AddressError("this is no http or https endpoint; write it as https://host[:port][/base/path]")
    scheme, port = found["scheme"], found["port"]
    if port is None:
        port = "443" if scheme == "https" else "80"
    if not _PORT.match(port) or int(port) > 65535:  # noqa: PLR2004 - the largest port (RFC 9293 section 3.1)
        raise AddressError("the port is not a number from 1 to 65535; write the port in plain digits, or leave it out")
    return Endpoint(scheme, _host(found["host"]), int(port), _base(found["path"] or ""))


def _host(host: str) -> str:
    if host.startswith("["):
        return _ipv6(host[1:-1])
    if not host.isascii():
        raise AddressError("the host is not ASCII; write the A-label (xn--…) of each part, so that look-alikes show")
    if host != host.lower():
        raise AddressError("the host has upper case; write it in lower case")
    if host.endswith("."):
        raise AddressError("the host ends with a dot; take the dot out")
    labels = host.split(".")
    if _NUMERIC.match(labels[-1]):
        return _ipv4(host)
    if len(host) > _LONGEST_HOST or not all(_is_label(label) for label in labels):
        raise AddressError("the host is no DNS name; write labels of a-z, 0-9 and inner hyphens, joined by dots")
    return host


def _is_label(label: str) -> bool:
    if not label.startswith("xn--"):
        return _LABEL.match(label) is not None
    try:  # an A-label stands for exactly one U-label (RFC 5890 section 2.3.2.1)
        unicode = label.encode().decode("idna")
        return not unicode.isascii() and unicode.encode("idna").decode() == label
    except UnicodeError:
        return False


def _ipv4(host: str) -> str:
    try:
        return str(ipaddress.IPv4Address(host))
    except ValueError:
        raise AddressError("the host is a number, but no IPv4 address; write four decimal numbers, such as 10.20.0.7") from None


def _ipv6(host: str) -> str:
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        raise AddressError("the host is no IPv6 address; write it as in [2001:db8::7]") from None
    if str(address) != host or address.ipv4_mapped or address.scope_id:
        raise AddressError(
            f"the IPv6 address is not in its canonical form (RFC 5952), or is mapped or scoped; write [{address.compressed}]"
        )
    return host


def _base(path: str) -> str:
    if path in ("", "/"):
        return ""
    try:
        split_path(path)
    except PathError as error:
        raise AddressError(f"{error}; write the base path in its one plain spelling") from None
    if path.endswith("/") or "%" in path:
        raise AddressError("the base path ends with a slash or is percent-encoded; write it plainly, without a slash at its end")
    return path


# SPIFFE-ID standard, sections 2.1 to 2.4: lower-case trust domain, path of plain segments, at most 2048 bytes.
_DOMAIN = r"[a-z0-9._-]{1,255}"
_SPIFFE = re.compile(rf"spiffe://{_DOMAIN}(?:/(?!\.{{1,2}}(?:/|\Z))[A-Za-z0-9._-]+)+\Z")


def check_spiffe(text: str | None) -> None:
    """Refuse what is no SPIFFE ID of a workload; None is none, and passes. Raises `AddressError`."""
    if text is not None and (len(text) > 2048 or not _SPIFFE.match(text)):  # noqa: PLR2004 - SPIFFE-ID section 2.3
        raise AddressError("this is no SPIFFE ID of a workload; write it as spiffe://trust-domain/path")


def check_trust_domain(text: str) -> None:
    """Refuse what is no SPIFFE trust domain. Raises `AddressError`."""
    if not re.fullmatch(_DOMAIN, text):
        raise AddressError("this is no SPIFFE trust domain; write it without spiffe://, such as acme.example")
