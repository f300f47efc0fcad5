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
        source, where = next(iter(reference.items()))
        value = (_from_environment if source == "env" else _from_file)(where, occasion.tool.name)
        digest = hashlib.sha256(f"{source}:{where}\0{occasion.agent.name}\0{occasion.tool.name}".encode()).hexdigest()
        return Lease(f"static-{digest[:16]}", self.name, occasion.spec.header, rendered(occasion.spec, value))

    async def issue(self, occasion: Occasion, now: float) -> Lease:
        """Never asked: `cached` always answers."""
        raise CredentialUnavailable(f"the secret of {occasion.tool.name!r} is gone at {now:.0f}")


def _from_environment(name: str, tool: str) -> str:
    if value := os.environ.get(name, ""):
        return value
    what = f"the environment variable {name} is not set, and {tool!r} takes its credential from it"
    raise CredentialUnavailable(what, f"start the broker with {name} set")


def _from_file(path: str, tool: str) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        what = f"the secret file of {tool!r} can't be read ({type(error).__name__})"
        raise CredentialUnavailable(what, f"put the secret into {path}, readable by the broker") from error
