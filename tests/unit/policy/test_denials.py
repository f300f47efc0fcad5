"""Each code has exactly one kind, and which one."""

import pytest

from broker.policy import denials
from broker.policy.denials import KIND_OF, DenialKind, by_canary
from broker.policy.types import Code


def test_each_code_has_exactly_one_kind():
    listed = [code for codes in denials._CODES.values() for code in codes]
    assert sorted(listed) == sorted(Code)
    assert set(denials._CODES) == set(DenialKind)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        pytest.param("params_invalid", "permission", id="a manifest's schema is a permission"),
        pytest.param("flow_forbidden", "people", id="a flow rule may be lifted by an approval"),
        pytest.param("budget_exhausted", "limit", id="money is a limit"),
        pytest.param("agent_read_only", "containment", id="a restriction is containment"),
        pytest.param("agent_unknown", "identity", id="nobody is an identity"),
        pytest.param("authority_mismatch", "malformed", id="two destinations in one request"),
        pytest.param("response_blocked", "fault", id="what the upstream answered"),
    ],
)
def test_a_code_is_of_the_kind_whose_move_it_is(code, kind):
    assert KIND_OF[Code(code)] is DenialKind(kind)


@pytest.mark.parametrize(
    ("host", "code", "said"),
    [
        pytest.param("must-deny.invalid", "host_not_declared", True, id="the canary"),
        pytest.param("must-deny.invalid:443", "host_not_declared", True, id="and its tunnel"),
        pytest.param("must-deny.invalid", None, False, id="a call that passes under its name"),
        pytest.param("must-deny.invalid", "params_invalid", False, id="a call of a tool under its name"),
        pytest.param("x.must-deny.invalid", "host_not_declared", False, id="another name"),
    ],
)
def test_of_the_canarys_denials_none_is_its_agents(host, code, said):
    assert by_canary(host, code) is said
