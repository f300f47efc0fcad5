"""`static`: a long-lived secret, by reference, for tools that know nothing better."""

import hashlib
from collections.abc import Mapping
from typing import ClassVar

from broker.credentials.base import CredentialUnavailable, Lease, Occasion, Secret, referenced, rendered


class StaticIssuer:
    """Reads the secret at each call from the environment, or from a file, so that a rotated file is used at once."""

    name: ClassVar[str] = "static"

    @staticmethod
    def check(settings: Mapping[str, object]) -> list[str]:
        """One reference, `{env: NAME}` or `{file: PATH}`."""
        secret = settings.get("secret")
        if isinstance(secret, Mapping) and len(secret) == 1 and set(secret) <= {"env", "file"}:
            return []
        return ["the static issuer needs a reference to its secret; write secret: {env: NAME} or secret: {file: PATH}"]

    def cached(self, occasion: Occasion, now: float) -> Lease | None:  # noqa: ARG002 - it never expires by itself
        """The secret as it is now."""
        reference = occasion.spec.settings.get("secret")
        value = referenced(reference, occasion.tool.name)
        digest = hashlib.sha256(f"{reference}\0{occasion.agent.name}\0{occasion.tool.name}".encode()).hexdigest()
        made = rendered(occasion.spec, value)
        return Lease(f"static-{digest[:16]}", self.name, occasion.spec.header, made, secrets=(Secret(value),))

    async def issue(self, occasion: Occasion, now: float) -> Lease:
        """Never asked: `cached` always answers."""
        raise CredentialUnavailable(f"the secret of {occasion.tool.name!r} is gone at {now:.0f}")
