"""When a human must say yes to a call.

Law: an approval is for one call: this agent, run, operation, request and revision, once, and not for ever.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from broker.policy.schema import ParameterSchema
from broker.policy.types import ToolCall


@dataclass(frozen=True, slots=True)
class Approval:
    """Who must say yes to exactly this call: so many people, of one of these groups if any; good for `expires` seconds.

    `when` maps locations to schemas: only calls whose parameters fit all of them need it. `rule` is where it stands.
    """

    rule: str
    approvers: int = 1
    groups: frozenset[str] = frozenset()
    expires: int = 3600
    when: Mapping[str, ParameterSchema] = field(default_factory=dict, hash=False)

    def bears_on(self, call: ToolCall) -> bool:
        """Whether this call needs it: all that was read of it fits `when`.

        What was not read (a body of another type) counts as fitting, or a call could choose not to be asked about.
        """
        fits = (not schema.violations(call.params[where], where) for where, schema in self.when.items() if where in call.params)
        return all(fits)
