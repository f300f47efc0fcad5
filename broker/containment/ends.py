"""What ends by itself soon: people hear of it before it does.

Law: pure; `now` is an argument. Each end is told under a key of its own, so that a receiver knows it again the next day.
"""

from collections.abc import Iterator

from broker.containment.sinks import Alert
from broker.policy.containment import Severity
from broker.policy.snapshot import Agent, PolicySnapshot

WITHIN_S = 7 * 86_400
"""How long before: time for a pull request."""


def ending(snapshot: PolicySnapshot, now: float) -> Iterator[Alert]:
    """An alert for each grant that lapses, and each shadow mode that ends, within the next days. `now` in seconds."""
    for agent in snapshot.agents.values():
        if now < agent.shadow_until <= now + WITHIN_S:
            yield _alert(agent, "its shadow mode ends", agent.shadow_until - now, "shadow")
        for tool, grants in agent.tools.items():
            for operation, grant in grants.items():
                if now < grant.expires <= now + WITHIN_S:
                    yield _alert(agent, f"its grant of {tool}/{operation} lapses", grant.expires - now, f"{tool}/{operation}")
                if now < grant.shadow_until <= now + WITHIN_S:
                    what = f"shadow mode of {tool}/{operation} ends"
                    yield _alert(agent, what, grant.shadow_until - now, f"shadow/{tool}/{operation}")


def _alert(agent: Agent, what: str, left: float, key: str) -> Alert:
    hours = int(left // 3600)
    within = f"{hours // 24} days" if hours > 48 else f"{hours} hours"  # noqa: PLR2004 - two days
    return Alert("ends", Severity.LOW, f"{agent.name}: {what} in {within}", f"{agent.name}/ends/{key}", agent.described)
