"""`static`: a long-lived secret, by reference, for tools that know nothing better."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from broker.credentials.base import CredentialUnavailable, Lease, Occasion, rendered


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
        reference = occasion.spec.settings["secret"]
        if not isinstance(reference, Mapping):
            raise CredentialUnavailable(f"the credential of {occasion.tool.name!r} has no reference to a secret")
        source, value = _read(reference, occasion.tool.name)
        digest = hashlib.sha256(f"{source}\0{occasion.agent.name}\0{occasion.tool.name}".encode()).hexdigest()
        return Lease(
            lease_id=f"static-{digest[:16]}", issuer=self.name, header=occasion.spec.header, value=rendered(occasion.spec, value)
        )

    async def issue(self, occasion: Occasion, now: float) -> Lease:
        """Never asked: `cached` always answers."""
        raise CredentialUnavailable(f"the secret of {occasion.tool.name!r} is gone at {now:.0f}")


def _read(reference: Mapping[str, object], tool: str) -> tuple[str, str]:
    if "env" in reference:
        name = str(reference["env"])
        if not (value := os.environ.get(name, "")):
            raise CredentialUnavailable(
                f"the environment variable {name} is not set, and {tool!r} takes its credential from it",
                f"start the broker with {name} set",
            )
        return f"env:{name}", value
    path = Path(str(reference["file"]))
    try:
        return f"file:{path}", path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CredentialUnavailable(
            f"the secret file of {tool!r} can't be read ({type(error).__name__})",
            f"put the secret into {path}, readable by the broker",
        ) from error
