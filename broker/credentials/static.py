"""`static`: a long-lived secret, by reference, for tools that know nothing better."""

import hashlib
from typing import ClassVar

from pydantic import Field

from broker.credentials.base import CredentialUnavailable, Lease, Occasion, leased, referenced
from broker.manifest.words import Model, Reference


class StaticSettings(Model):
    """A long-lived secret."""

    secret: Reference = Field(description="Where the secret is: {env: NAME} or {file: PATH}.")


class StaticIssuer:
    """Reads the secret at each call from the environment, or from a file, so that a rotated file is used at once."""

    name: ClassVar[str] = "static"
    Settings: ClassVar[type[Model]] = StaticSettings

    def cached(self, occasion: Occasion, now: float) -> Lease | None:  # noqa: ARG002 - it never expires by itself
        """The secret as it is now."""
        reference = occasion.spec.settings.get("secret")
        value = referenced(reference, occasion.tool.name)
        digest = hashlib.sha256(f"{reference}\0{occasion.agent.name}\0{occasion.tool.name}".encode()).hexdigest()
        return leased(occasion.spec, value, lease_id=f"static-{digest[:16]}")

    async def issue(self, occasion: Occasion, now: float) -> Lease:
        """Never asked: `cached` always answers."""
        raise CredentialUnavailable(f"the secret of {occasion.tool.name!r} is gone at {now:.0f}")
