"""How agents stand, and what of theirs is open."""

from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.containment.standing import EVERYONE, OpenCalls, Opened, Restriction, Standing
from broker.policy.containment import Action
from broker.policy.evaluate import View

NOW = 1_800_000_000.0


def restriction(id_="r-1", action=Action.REVOKE_AGENT, agent="bot", run_id=None, at=NOW):
    return Restriction(id_, action, agent, run_id, f"because {id_}", "jo", at)


def of_run(run):
    return restriction(action=Action.REVOKE_RUN, run_id=run)


@pytest.mark.parametrize(
    ("held", "run", "expected"),
    [
        pytest.param([], "r", View(), id="nothing was done"),
        pytest.param([restriction()], "r", View(revoked="r-1"), id="the agent is revoked"),
        pytest.param([restriction()], None, View(revoked="r-1"), id="also for what belongs to no run"),
        pytest.param([restriction(agent=EVERYONE)], "r", View(revoked="r-1"), id="everyone is"),
        pytest.param([restriction(agent="other")], "r", View(), id="another is"),
        pytest.param([of_run("r")], "r", View(revoked="r-1"), id="the run is"),
        pytest.param([of_run("r")], "q", View(), id="another run is"),
        pytest.param([of_run("r")], "", View(), id="a run, and this call names none"),
        pytest.param([of_run("r")], None, View(), id="a run, and tunnels belong to none"),
        pytest.param([of_run("")], "", View(revoked="r-1"), id="calls without one"),
        pytest.param([of_run("")], "r", View(), id="calls without one, and this names one"),
        pytest.param(
            [restriction(action=Action.HOLD), restriction("r-2", Action.READ_ONLY)],
            "r",
            View(hold="r-1", read_only="r-2"),
            id="two things were done",
        ),
    ],
)
def test_an_agent_stands_by_all_that_holds_for_it(held, run, expected):
    standing = Standing()
    for each in held:
        standing.restrict(each)
    assert standing.view("bot", run) == expected


STEPS = [("restrict", "r-1"), ("restrict", "r-2"), ("lift", "r-1"), ("restrict", "r-1"), ("lift", "r-1")]


@pytest.mark.parametrize("order", list(permutations(STEPS)))
def test_a_revocation_that_a_release_does_not_name_stays_in_whatever_order_they_are_heard(order):
    standing = Standing()
    for step, id_ in order:
        standing.restrict(restriction(id_)) if step == "restrict" else standing.lift([id_])
    assert [each.id for each in standing.of("bot")] == ["r-2"]
    assert standing.all == standing.of("bot")


@given(st.lists(st.tuples(st.sampled_from(["restrict", "lift"]), st.integers(0, 3)), max_size=12), st.randoms())
def test_two_brokers_that_heard_the_same_agree(steps, dice):
    one, other = Standing(), Standing()
    shuffled = [*steps, *steps[:3]]
    dice.shuffle(shuffled)
    for standing, heard in ((one, steps), (other, shuffled)):
        for step, number in heard:
            standing.restrict(restriction(f"r-{number}")) if step == "restrict" else standing.lift([f"r-{number}"])
    assert set(one.of("bot")) == set(other.of("bot"))


def test_a_restriction_is_read_as_it_was_told():
    for each in (restriction(), restriction(action=Action.REVOKE_RUN, run_id="")):
        assert Restriction.read(each.notice) == each


def test_forgetting_the_canary_leaves_nothing():
    standing = Standing()
    standing.restrict(canary := restriction(agent=".canary"))
    assert standing.view(".canary", None).revoked
    standing.forget(canary)
    assert (standing.view(".canary", None), standing.all) == (View(), [])


class Calls:
    """What was cut, and why."""

    def __init__(self):
        self.open, self.cut = OpenCalls(), []

    def enter(self, name, agent="bot", run_id="r"):
        return self.open.enter(Opened(agent, run_id, lambda why: self.cut.append((name, why))))


def test_a_revocation_cuts_all_that_is_open_of_the_agent_and_of_nobody_else():
    calls = Calls()
    for name, agent, run in (("call", "bot", "r"), ("tunnel", "bot", None), ("theirs", "other", "r")):
        calls.enter(name, agent, run)
    assert calls.open.cut(restriction()) == 2
    assert sorted(calls.cut) == [("call", "because r-1 (by jo)"), ("tunnel", "because r-1 (by jo)")]
    assert len(calls.open) == 1
    assert calls.open.cut(restriction()) == 0
    assert calls.open.cut(restriction(agent=EVERYONE)) == 1


def test_a_revoked_run_cuts_its_own_calls_and_no_tunnel_for_others_run_in_it():
    calls = Calls()
    for name, run in (("mine", "r"), ("another", "q"), ("tunnel", None), ("unnamed", "")):
        calls.enter(name, run_id=run)
    calls.open.cut(restriction(action=Action.REVOKE_RUN, run_id="r"))
    assert [name for name, _ in calls.cut] == ["mine"]


def test_what_can_not_be_cut_does_not_save_the_others(caplog):
    calls = Calls()
    for number in range(3):
        calls.enter(number)
    calls.open.enter(Opened("bot", "r", lambda _: 1 / 0))
    assert calls.open.cut(restriction()) == 4
    assert len(calls.cut) == 3
    assert "could not be cut" in caplog.text


def test_what_has_left_is_not_cut_and_may_leave_twice():
    calls = Calls()
    opened = calls.enter("call")
    calls.open.leave(opened)
    calls.open.leave(opened)
    assert (calls.open.cut(restriction()), calls.cut, len(calls.open)) == (0, [], 0)
