"""Each code has exactly one kind, and which one."""

import pytest

from broker.policy import denials
from broker.policy.denials import KIND_OF, DenialKind
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
