"""What ends by itself soon is told before it does, and not after."""

import math
from dataclasses import replace

import pytest

from broker.containment.ends import WITHIN_S, ending
from broker.policy.snapshot import EMPTY, Agent, Grant

NOW = 1_800_000_000.0
DAY = 86_400


def told(grant=None, shadow_until=0.0):
    agent = Agent("bot", "team", "primary", "a#", {"git": {"read": grant or Grant("g#")}}, shadow_until=shadow_until)
    return [alert.summary for alert in ending(replace(EMPTY, agents={"bot": agent}), NOW)]


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (NOW - 1, []),
        (NOW + DAY, ["bot: its grant of git/read lapses in 24 hours"]),
        (NOW + WITHIN_S, ["bot: its grant of git/read lapses in 7 days"]),
        (NOW + WITHIN_S + 1, []),
        (math.inf, []),
    ],
    ids=["it has lapsed", "tomorrow", "in a week", "later", "never"],
)
def test_a_grant(end, expected):
    assert told(Grant("g#", expires=end)) == expected


def test_shadow_mode_of_an_agent_and_of_an_operation():
    assert told(shadow_until=NOW + 3 * DAY) == ["bot: its shadow mode ends in 3 days"]
    assert told(Grant("g#", shadow_until=NOW + 3 * DAY)) == ["bot: shadow mode of git/read ends in 3 days"]
    assert told(shadow_until=NOW) == told(Grant("g#", shadow_until=NOW)) == []
