"""The command's environment: the caller's, led to the broker, and without credentials.

Law: an agent holds no credential. What looks like one by its name or its value is left out and told, unless it is kept by name.
Where it was an API key, a placeholder stands in: clients of model providers don't start without one.
"""

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from broker.dataplane.site import DOOR_PORT
from broker.redaction import SHAPE

CA = "/run/broker/ca.pem"
"""The broker's CA, as the command sees it."""

_PROXY = f"http://127.0.0.1:{DOOR_PORT}"
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
# OpenSSL, Python and most else; Requests; Node; curl; git; AWS; pip; Deno; Cargo; gRPC; Nix; Bundler; npm; httplib2; gcloud.
_BUNDLES = (
    "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "AWS_CA_BUNDLE", "PIP_CERT",
    "DENO_CERT", "CARGO_HTTP_CAINFO", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", "NIX_SSL_CERT_FILE", "BUNDLE_SSL_CA_CERT",
    "npm_config_cafile", "HTTPLIB2_CA_CERTS", "CLOUDSDK_CORE_CUSTOM_CA_CERTS_FILE",
)  # fmt: skip
# What leads out by a socket of the host's, which is not to be seen from inside anyway; and roots beside ours.
_AWAY = (
    "DBUS_SESSION_BUS_ADDRESS", "DBUS_SYSTEM_BUS_ADDRESS", "DOCKER_HOST", "SSH_AUTH_SOCK", "GPG_AGENT_INFO", "XDG_RUNTIME_DIR",
    "WAYLAND_DISPLAY", "DISPLAY", "TMUX", "SSL_CERT_DIR", "NODE_TLS_REJECT_UNAUTHORIZED", "FTP_PROXY", "ftp_proxy",
)  # fmt: skip

_BY_NAME = re.compile(
    r"(AWS|STRIPE|SLACK|BROKER_REDIS)_.+|(.+_)?(TOKEN|SECRET|API_?KEY|ACCESS_?KEY|SECRET_?KEY|PRIVATE_?KEY|(?<!PUBLIC_)KEY|(PG)?PASSWORD"
    r"|PASSWD|PWD|PASSPHRASE|(SSH)?PASS|CREDENTIALS?|PAT|AUTH(_CONFIG)?|JWT|CONNECTION_?STRING|DSN|WEBHOOK(_URL)?)(_(ID|VALUE|FILE))?",
    re.IGNORECASE,
)
_API_KEY = re.compile(r"(.+_)?API_?KEY", re.IGNORECASE)
PLACEHOLDER = "the-broker-has-it"
_BY_VALUE = re.compile(
    SHAPE + r"|(?i:[a-z][a-z0-9+.-]*://[^/@\s:]*:[^/@\s]+@"  # RFC 3986 section 3.2.1: user:password@
    # Of a URL's query, or of a connection string.
    r"|(?:^|[?&;\s])(?:password|passwd|pwd|secret|token|access_token|api_?key|accountkey|sharedaccess(?:key|signature)|sig)=[^&;\s]"
    r"|\bauthorization: *[a-z]+ +\S)"
)
# The last but one is how images of Python name who signs its releases.
_NO_CREDENTIAL = ("PATH", "PWD", "OLDPWD", "AWS_REGION", "AWS_DEFAULT_REGION", "GPG_KEY", "AWS_CA_BUNDLE")


class Made(NamedTuple):
    """An environment, and the names of what looked like credentials and was left out, sorted."""

    variables: dict[str, str]
    cleared: list[str]


def environment(caller: Mapping[str, str], keep: Collection[str] = ()) -> Made:
    """The environment of a command, of the caller's and of the names to `keep` of it in spite of their look."""
    ours = {name: _PROXY for proxy in _PROXIES for name in (proxy, proxy.lower())}
    ours |= {"NO_PROXY": "", "no_proxy": "", "NODE_USE_ENV_PROXY": "1", **dict.fromkeys(_BUNDLES, CA)}
    theirs = {name: value for name, value in caller.items() if name not in ours and name not in _AWAY}
    cleared = sorted(name for name, value in theirs.items() if name not in keep and _credential(name, value))
    stand_ins = {name: PLACEHOLDER for name in cleared if _API_KEY.fullmatch(name)}
    return Made({name: value for name, value in theirs.items() if name not in cleared} | stand_ins | ours, cleared)


def _credential(name: str, value: str) -> bool:
    return name not in _NO_CREDENTIAL and bool(_BY_NAME.fullmatch(name) or _BY_VALUE.search(value))
