"""Two Envoys without a broker: the upstream of everyone, and the bare proxy to compare with.

The bare proxy is our own compiler's configuration without what makes it a broker: no ext_proc, no ext_authz, no gate, no access
log. Doors, tunnels, TLS, routes, clusters and limits are the same, so the difference is the price of deciding.
"""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from typing import Any

from broker import clock
from broker.dataplane.compile import bootstrap, resources
from broker.dataplane.proto import in_json
from broker.dataplane.site import Site
from broker.manifest.load import load
from broker.pki import PlatformCA
from broker.supervisor import envoy_binary
from tests import stack

_HCM = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
_HTTP = "type.googleapis.com/envoy.extensions.filters.http"
_TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext"
_ROUTER = "envoy.filters.http.router"


@contextmanager
def running(folder: Path, name: str, configuration: dict[str, Any], ports: list[int], *options: str) -> Iterator[int]:
    """An Envoy with this configuration while the block runs; its process ID, once its ports are open."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(configuration))
    command = [str(envoy_binary()), "-c", str(path), "--disable-hot-restart", "--log-level", "error", *options]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            stack.until(lambda: all(_open(port, process) for port in ports), 30, f"{name} opens its ports")
            yield process.pid
        finally:
            process.kill()


def _open(port: int, process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is not None:
        raise SystemExit("an Envoy did not start; see its message above")
    with socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def upstream(http: int, https: int, certificate: tuple[Path, Path], answer: str) -> dict[str, Any]:
    """Answers every request, once it is whole, with 200 and `answer`."""
    chain, key = certificate
    certificates = [{"certificate_chain": {"filename": str(chain)}, "private_key": {"filename": str(key)}}]
    context = {"@type": _TLS, "common_tls_context": {"alpn_protocols": ["h2", "http/1.1"], "tls_certificates": certificates}}
    tls = {"transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": context}}
    return {"static_resources": {"listeners": [_answering(http, answer, {}), _answering(https, answer, tls)]}}


def _answering(port: int, answer: str, transport: dict[str, Any]) -> dict[str, Any]:
    reply = {"status": 200, "body": {"inline_string": answer}}
    hosts = [{"name": "*", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "direct_response": reply}]}]
    whole = {"@type": f"{_HTTP}.buffer.v3.Buffer", "max_request_bytes": 65_536}
    manager = {
        "@type": _HCM,
        "stat_prefix": "upstream",
        "codec_type": "AUTO",
        "route_config": {"virtual_hosts": hosts},
        "http_filters": [
            {"name": "envoy.filters.http.buffer", "typed_config": whole},
            {"name": _ROUTER, "typed_config": {"@type": f"{_HTTP}.router.v3.Router"}},
        ],
    }
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}], **transport}
    return {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}, "filter_chains": [chain]}


def bare(manifests: Path, folder: Path, proxy: int, base_url: int) -> tuple[dict[str, Any], Path]:
    """The bare proxy's configuration, and the CA that its tunnels' certificates lead to."""
    snapshot = load(manifests).snapshot
    if snapshot is None:
        raise SystemExit("the benchmark's manifests have errors")
    now, root = clock.now(), folder / "bare-ca.pem"
    certificates = PlatformCA(folder / "bare-ca.key", root, now).certify(snapshot, ["127.0.0.1"], now)
    site = Site(("127.0.0.1", proxy), ("127.0.0.1", base_url), ("/nowhere",), str(folder / "bare.sock"), str(root))
    made = resources(snapshot, site, certificates)
    routes = {each.to_dict()["name"]: _without(each.to_dict(), "typedPerFilterConfig") for each in made.routes}
    static = {
        "clusters": [in_json(each) for each in made.clusters],
        "listeners": [_bare_listener(each.to_dict(), routes) for each in made.listeners],
    }
    return {"staticResources": static, "bootstrapExtensions": bootstrap(site).to_dict()["bootstrapExtensions"]}, root


def _bare_listener(listener: dict[str, Any], routes: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = _without(listener, "accessLog")
    for chain in found["filterChains"]:
        manager = chain["filters"][0]["typedConfig"]
        manager["routeConfig"] = routes[manager.pop("rds")["routeConfigName"]]
        manager["httpFilters"] = [each for each in manager["httpFilters"] if each["name"] == _ROUTER]
    return found


def _without(node: Any, name: str) -> Any:
    if isinstance(node, dict):
        return {key: _without(value, name) for key, value in node.items() if key != name}
    return [_without(each, name) for each in node] if isinstance(node, list) else node
