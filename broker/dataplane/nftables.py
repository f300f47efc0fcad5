"""From agents' names to nftables rules, for hosts on which each agent runs as a system user of its own.

Laws: what an agent's user sends reaches the doors on this host or is dropped and counted, whatever its protocol and family; other
users are left alone. The rules replace their own table whole, in one transaction, or leave the old one in force (nft(8), `-f`).

A user, not a cgroup: the kernel knows the user of every socket that a program holds, while a cgroup is matched by the number that
it had when the rules were loaded, and is another one after the service started again. Of a socket that its program has closed the
user is not known any more, though what it had to send is still sent; hence connections that an agent had are remembered. The
rules see a packet after its destination was translated (priority `filter` comes after `dstnat`): they judge where it really goes.
"""

from collections.abc import Mapping
from ipaddress import ip_address

TABLE = "broker"
"""The table's name; its family is inet, for IPv4 and IPv6."""


def ruleset(users: Mapping[str, str], doors: tuple[tuple[str, int], ...]) -> str:
    """A file for `nft -f`.

    `users`: agent → system user, a name or a UID, each once. `doors`: (IP address, TCP port) of Envoy on this host. An agent's
    counters are `agent-NAME-doors` and `agent-NAME-dropped`, in packets and bytes; `closed-dropped` is what closed sockets of
    agents had still to send. `nft list counters` shows them.
    """
    names = sorted(users)
    to_chains = ",\n".join(f"            {_user(users[name])} : goto agent-{name}" for name in names)
    counters = "".join(f"    counter agent-{name}-{what} {{ }}\n" for name in names for what in ("doors", "dropped"))
    chains = "".join(_agent(name, doors) for name in names)
    return _TEXT.format(
        table=TABLE,
        counters=counters,
        chains=chains,
        judge=f"        meta skuid vmap {{\n{to_chains}\n        }}\n" if names else "",
        **{name: f"{family} saddr . tcp sport . {family} daddr . tcp dport" for name, family in (("four", "ip"), ("six", "ip6"))},
    )


# The table is made first if it is missing, so that it can be deleted in any case. Of what is dropped, only packets of connections
# that came about are remembered: nobody else has one with the same ends, so an agent can't keep others from anything by it.
_TEXT = """# broker render nftables; load with nft -f
table inet {table} {{ }}
delete table inet {table}

table inet {table} {{
    set had4 {{
        typeof {four}
        flags dynamic, timeout
        timeout 1h
        size 65536
    }}

    set had6 {{
        typeof {six}
        flags dynamic, timeout
        timeout 1h
        size 65536
    }}

{counters}    counter closed-dropped {{ }}

    chain refused {{
        tcp flags & (syn | ack) == syn drop
        update @had4 {{ {four} }}
        update @had6 {{ {six} }}
        drop
    }}

{chains}    chain output {{
        type filter hook output priority filter; policy accept;
{judge}        meta skuid 0-4294967295 accept comment "someone else's"
        {four} @had4 counter name "closed-dropped" drop
        {six} @had6 counter name "closed-dropped" drop
    }}
}}
"""


def _agent(name: str, doors: tuple[tuple[str, int], ...]) -> str:
    # Whatever address of its own the host is reached by, the way there is the loopback device.
    accepted = "".join(
        f'        oifname "lo" {_family(host)} daddr {host} tcp dport {port} counter name "agent-{name}-doors" accept\n'
        for host, port in doors
    )
    return f'    chain agent-{name} {{\n{accepted}        counter name "agent-{name}-dropped" goto refused\n    }}\n\n'


def _family(host: str) -> str:
    return "ip" if ip_address(host).version == 4 else "ip6"  # noqa: PLR2004 - IPv4


def _user(user: str) -> str:
    return user if user.isdecimal() else f'"{user}"'
