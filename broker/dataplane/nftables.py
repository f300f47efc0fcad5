"""From agents' names to nftables rules, for hosts on which each agent runs as a system user of its own.

Laws: what an agent's user sends reaches the doors on this host or is dropped and counted, whatever its protocol and family; other
users are left alone. The rules replace their own table whole, in one transaction, or leave the old one in force (nft(8), `-f`).

A user, not a cgroup: the kernel knows a socket's user for as long as the socket lives, while a cgroup is matched by the number
that it had when the rules were loaded, and is another one after the service started again. The rules see a packet after its
destination was translated (priority `filter` comes after `dstnat`), so they judge where it really goes.
"""

from collections.abc import Mapping
from ipaddress import ip_address

TABLE = "broker"
"""The table's name; its family is inet, for IPv4 and IPv6."""


def ruleset(users: Mapping[str, str], doors: tuple[tuple[str, int], ...]) -> str:
    """A file for `nft -f`.

    `users`: agent → system user, a name or a UID, each once. `doors`: (IP address, TCP port) of Envoy on this host. An agent's
    counters are `agent-NAME-doors` and `agent-NAME-dropped`, in packets and bytes; `nft list counters` shows them.
    """
    names = sorted(users)
    to_chains = ",\n".join(f"            {_user(users[name])} : goto agent-{name}" for name in names)
    judge = f"        meta skuid vmap {{\n{to_chains}\n        }}\n" if names else ""
    counters = "".join(f"    counter agent-{name}-{what} {{ }}\n" for name in names for what in ("doors", "dropped"))
    chains = "".join(_agent(name, doors) for name in names)
    return (
        # Made first if it is missing, so that it can be deleted in any case.
        f"# broker render nftables; load with nft -f\ntable inet {TABLE} {{ }}\ndelete table inet {TABLE}\n\n"
        f"table inet {TABLE} {{\n{counters}\n{chains}"
        "    chain output {\n"
        "        type filter hook output priority filter; policy accept;\n"
        f"{judge}"
        "    }\n"
        "}\n"
    )


def _agent(name: str, doors: tuple[tuple[str, int], ...]) -> str:
    # Whatever address of its own the host is reached by, the way there is the loopback device.
    accepted = "".join(
        f'        oifname "lo" {_family(host)} daddr {host} tcp dport {port} counter name "agent-{name}-doors" accept\n'
        for host, port in doors
    )
    return f'    chain agent-{name} {{\n{accepted}        counter name "agent-{name}-dropped" drop\n    }}\n\n'


def _family(host: str) -> str:
    return "ip" if ip_address(host).version == 4 else "ip6"  # noqa: PLR2004 - IPv4


def _user(user: str) -> str:
    return user if user.isdecimal() else f'"{user}"'
