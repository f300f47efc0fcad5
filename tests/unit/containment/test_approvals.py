"""What people are asked and what they say of it. Time is what a test says it is."""

from dataclasses import replace

import pytest

from broker.containment.approvals import Approvals, Asked, Refusal, Vote
from broker.containment.standing import EVERYONE
from broker.policy.approval import Approval

NOW = 1_800_000_000.0
BINDING = ("bot", "r", "bank/refund", "hash", "sha256:1")
NEED = Approval("r#")


def asked(id_="a-1", *, binding=BINDING, approvers=1, groups=(), at=NOW):
    need = Approval("r#", approvers, frozenset(groups), 3600)
    return Asked.about(need, binding, "it is large", {"body": "{}"}, at, id_)


def vote(by="ann", of="a-1", *, approves=True, groups=(), at=NOW + 1):
    return Vote(of, by, groups, approves, "", at)


def book(*steps, of=None):
    approvals, question = Approvals(), of or asked()
    approvals.ask(question)
    for each in steps:
        approvals.hear(question, approvals.judge(question.id, each, each.at) and each)
    return approvals, question


@pytest.mark.parametrize(
    ("approvers", "votes", "now", "status"),
    [
        pytest.param(1, [], NOW + 2, "waiting", id="nobody has said anything"),
        pytest.param(1, [vote()], NOW + 2, "approved", id="one of one"),
        pytest.param(2, [vote()], NOW + 2, "waiting", id="one of two"),
        pytest.param(2, [vote(), vote("bob")], NOW + 2, "approved", id="two of two"),
        pytest.param(1, [vote(approves=False)], NOW + 2, "rejected", id="a no"),
        pytest.param(2, [vote(), vote("bob", approves=False)], NOW + 2, "rejected", id="one no is a no"),
        pytest.param(1, [vote(), vote("bob", approves=False)], NOW + 2, "rejected", id="also after enough have said yes"),
        pytest.param(1, [], NOW + 3600, "expired", id="too late to say anything"),
        pytest.param(1, [vote()], NOW + 3600, "expired", id="too late to use it"),
    ],
)
def test_how_it_stands(approvers, votes, now, status):
    approvals, question = book(*votes, of=asked(approvers=approvers))
    assert approvals.status(question, now) == status
    found = approvals.found(BINDING, NEED, now)
    assert (found and found[1]) == (status if status != "expired" else None)


@pytest.mark.parametrize("position", range(len(BINDING)))
def test_an_answer_is_for_one_binding(position):
    approvals, _ = book(vote())
    other = (*BINDING[:position], "another", *BINDING[position + 1 :])
    assert approvals.found(other, NEED, NOW + 2) is None


def test_what_is_used_is_asked_anew():
    approvals, question = book(vote())
    approvals.use("a-1")
    assert approvals.status(question, NOW + 2) == "used"
    assert approvals.found(BINDING, NEED, NOW + 2) is None
    approvals.ask(again := asked("a-2"))
    assert approvals.found(BINDING, NEED, NOW + 2) == (again, "waiting")


@pytest.mark.parametrize(
    ("question", "before", "said", "why"),
    [
        pytest.param(asked(), [], vote(of="a-9"), "no such approval waits", id="of nothing"),
        pytest.param(asked(approvers=2), [vote()], vote(), "another person must", id="twice by one person"),
        pytest.param(asked(), [vote(approves=False)], vote("bob"), "rejected already", id="after a no"),
        pytest.param(asked(), [vote()], vote("bob"), "approved already", id="when enough have said yes"),
        pytest.param(asked(), [], vote(at=NOW + 3600), "expired already", id="too late"),
        pytest.param(asked(groups=("sec",)), [], vote(groups=("dev",)), "only people in sec", id="by nobody of the group"),
        pytest.param(asked(groups=("sec", "ops")), [], vote(), "only people in ops or sec", id="without any group"),
    ],
)
def test_whose_word_is_not_taken(question, before, said, why):
    approvals, _ = book(*before, of=question)
    with pytest.raises(Refusal, match=why):
        approvals.judge(said.of, said, said.at)


def test_nobody_approves_what_is_not_shown_since_only_a_vote_on_it_was_kept_until_it_is_asked_again():
    approvals, whole = Approvals(), asked(approvers=2)
    approvals.hear(replace(whole, shown={}), vote())
    [listed] = approvals.listed(NOW + 2)
    assert (listed["agent"], listed["run_id"], listed["operation"], "body" in listed) == ("bot", "r", "bank/refund", False)
    with pytest.raises(Refusal, match="make the call again"):
        approvals.judge("a-1", vote("bob"), NOW + 2)
    approvals.judge("a-1", vote("bob", approves=False), NOW + 2)
    approvals.ask(whole)
    approvals.hear(replace(whole, shown={}), vote())
    assert approvals.judge("a-1", vote("bob"), NOW + 2) == whole


def test_anyone_may_say_no_and_a_member_yes():
    approvals, question = book(of=asked(groups=("sec",)))
    approvals.judge("a-1", vote(approves=False), NOW + 1)
    approvals.hear(question, approvals.judge("a-1", said := vote(groups=("dev", "sec")), NOW + 1) and said)
    assert approvals.status(question, NOW + 2) == "approved"


def test_a_vote_that_is_heard_before_the_question_counts_and_a_second_copy_of_either_changes_nothing():
    approvals, question = Approvals(), asked(approvers=2)
    approvals.hear(question, vote())
    approvals.ask(question)
    approvals.hear(question, vote())
    assert approvals.described(question, NOW)["approved_by"] == ["ann"]
    assert approvals.status(question, NOW) == "waiting"


@pytest.mark.parametrize("agent", ["bot", EVERYONE])
def test_a_revocation_ends_what_was_asked_before_it_also_where_that_is_heard_late(agent):
    approvals, question = book(vote())
    approvals.cancel(agent, NOW + 5)
    assert approvals.found(BINDING, NEED, NOW + 6) is None
    approvals.hear(question, vote())
    assert approvals.found(BINDING, NEED, NOW + 6) is None
    approvals.ask(later := asked("a-2", at=NOW + 7))
    assert approvals.found(BINDING, NEED, NOW + 8) == (later, "waiting")


def test_what_is_over_is_forgotten_and_named_if_nobody_used_or_rejected_it():
    approvals = Approvals()
    for id_ in ("waiting", "approved", "rejected", "used"):
        approvals.ask(asked(id_, binding=(id_, *BINDING[1:])))
    for said in (vote(of="approved"), vote(of="rejected", approves=False), vote(of="used")):
        approvals.hear(approvals.judge(said.of, said, NOW), said)
    approvals.use("used")
    assert approvals.forget(NOW + 3599) == []
    assert sorted(each.id for each in approvals.forget(NOW + 3600)) == ["approved", "waiting"]
    assert [*approvals.listed(NOW)] == []


def test_people_see_it_the_oldest_first_with_all_that_is_sent():
    approvals = Approvals()
    approvals.ask(asked("second", binding=(*BINDING[:3], "2"), at=NOW + 1))
    approvals.ask(asked("first", binding=(*BINDING[:3], "1")))
    shown = [*approvals.listed(NOW)]
    assert [each["id"] for each in shown] == ["first", "second"]
    assert {(each["body"], each["why"]) for each in shown} == {("{}", "it is large")}
    assert approvals.waiting("bot", NOW) == 2
    assert approvals.waiting("other", NOW) == 0


def test_a_no_counts_for_the_same_call_also_where_two_brokers_asked_about_it_at_once():
    approvals, _ = book(vote())
    approvals.hear(asked("a-2"), vote("bob", "a-2", approves=False))
    assert approvals.found(BINDING, NEED, NOW + 2) == (asked("a-2"), "rejected")


@pytest.mark.parametrize("name", ["ANN", " ann ", "a\u200bnn", "\uff41nn"])
def test_a_person_is_one_person_however_the_name_is_written(name):
    approvals, question = book(vote(), of=asked(approvers=2))
    with pytest.raises(Refusal, match="another person must"):
        approvals.judge("a-1", vote(name), NOW + 2)
    approvals.hear(question, vote(name))
    assert approvals.status(question, NOW + 2) == "waiting"
