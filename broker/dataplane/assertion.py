"""What must be true of the configuration that Envoy runs, whoever made it: nothing passes that was not judged.

Laws: pure; it reads Envoy's own account (`/config_dump`), not what was sent to it. What it does not know is a problem: a filter,
a kind of route, an override. So it finds what was changed by mistake or from outside, and what another Envoy reads otherwise.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from broker.dataplane import site
from broker.dataplane.filters import EXT_PROC

Json = Mapping[str, Any]
_HTTP = "envoy.filters.network.http_connection_manager"
_RBAC, _ROUTER = "envoy.filters.http.rbac", "envoy.filters.http.router"
_GUARD = [EXT_PROC, _RBAC, _ROUTER]
# Before the guard: who is it. None of them lets a request out.
_IDENTITY = frozenset({site.EXT_AUTHZ, "envoy.filters.http.set_filter_state", "envoy.filters.http.set_metadata"})
_INNER = frozenset({site.INNER, site.INNER_ADDRESSES, site.NAMESPACE})
_UPSTREAM = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def unguarded(dump: Json) -> list[str]:
    """What lets something pass unjudged, a sentence each; empty where nothing does, and never for an account without doors."""
    parts = {part["@type"].rpartition(".")[2]: part for part in dump.get("configs", ())}
    listeners = [*_active(parts.get("ListenersConfigDump", {}), "listener")]
    problems = [
        *_open_failures(dump, ""),
        *(problem for listener in listeners for problem in _listener(listener)),
        *(problem for routes in _active(parts.get("RoutesConfigDump", {}), "route_config") for problem in _routes(routes)),
        *(problem for cluster in _active(parts.get("ClustersConfigDump", {}), "cluster") for problem in _cluster(cluster)),
    ]
    return problems if listeners else ["Envoy has no doors", *problems]


def _active(part: Json, what: str) -> Iterator[Json]:
    """The resources of one kind that are in force, however they came."""
    for name, entries in part.items():
        if name.startswith(("static_", "dynamic_")) and isinstance(entries, list):
            for entry in entries:
                held = entry.get("active_state", entry)
                if what in held:
                    yield held[what]


def _open_failures(node: Any, where: str) -> Iterator[str]:
    if isinstance(node, dict):
        for name, part in node.items():
            if name == "failure_mode_allow" and part:
                yield f"a filter lets requests pass when it fails ({where})"
            yield from _open_failures(part, f"{where}/{name}")
    elif isinstance(node, list):
        for number, part in enumerate(node):
            yield from _open_failures(part, f"{where}/{number}")


def _listener(listener: Json) -> Iterator[str]:
    name, default = listener.get("name", ""), listener.get("default_filter_chain")
    for chain in (*listener.get("filter_chains", ()), *([default] if default else ())):
        last: Json = chain["filters"][-1] if chain.get("filters") else {}
        config: Json = last.get("typed_config", {})
        if last.get("name") == _HTTP:
            yield from (f"door {name}: {problem}" for problem in _http(config))
        elif not config.get("@type", "").endswith(".TcpProxy"):
            yield f"door {name} ends in {last.get('name', 'nothing')}, which is not known here"
        elif config.get("cluster") not in _INNER:
            yield f"door {name} leads to {config.get('cluster')} past the processor"


def _http(config: Json) -> Iterator[str]:
    filters: Sequence[Json] = config.get("http_filters", ())
    names = [each.get("name") for each in filters]
    if names[-len(_GUARD) :] != _GUARD:
        yield f"its filters end with {', '.join(map(str, names[-3:]))}, and not with the processor, the gate and the router"
    if others := [str(name) for name in names[: -len(_GUARD)] if name not in _IDENTITY]:
        yield f"it has the filter {others[0]}, which is not known here"
    if any(each.get("disabled") or each.get("is_optional") for each in filters):
        yield "one of its filters is disabled or optional"
    gates: list[Json] = [each["typed_config"].get("rules", {}) for each in filters if each.get("name") == _RBAC]
    if not all(gate.get("action", "ALLOW") == "ALLOW" and gate.get("policies") for gate in gates):
        yield "its gate allows what nothing proves"


def _routes(routes: Json) -> Iterator[str]:
    for host in routes.get("virtual_hosts", ()):
        for each in (routes, host, *host.get("routes", ())):
            where = f"route {each.get('name') or host.get('name')} of {routes.get('name')}"
            yield from (f"{where}: {problem}" for problem in _overrides(each))


def _overrides(route: Json) -> Iterator[str]:
    tunnel = "connect_matcher" in route.get("match", {})
    for name, config in route.get("typed_per_filter_config", {}).items():
        # ext_authz judges CONNECT alone; and of a tunnel the processor hears only that it is open: what is inside is judged.
        identity = name == site.EXT_AUTHZ and not tunnel
        opened = name == EXT_PROC and tunnel and [*config.get("overrides", ())] == ["processing_mode"]
        if not (identity or opened) or (opened and config.get("disabled")):
            yield f"it changes the filter {name}"
    cluster = route.get("route", {}).get("cluster", "")
    if tunnel and cluster and cluster not in _INNER:
        yield f"a tunnel leads to {cluster} past the processor"


def _cluster(cluster: Json) -> Iterator[str]:
    name = cluster.get("name", "")
    if not name.startswith("tool/"):
        return
    filters = cluster.get("typed_extension_protocol_options", {}).get(_UPSTREAM, {}).get("http_filters", ())
    if not filters or filters[0].get("name") != "envoy.filters.http.upstream_rbac":
        yield f"cluster {name} connects to addresses that nobody checked"
    if cluster.get("type") != "STRICT_DNS":
        yield f"cluster {name} is {cluster.get('type')}, of which only the first address is checked"
