"""What must not stand in a request: a decoy credential, or something of the shape of a secret.

Laws: pure, and linear in what it reads: agents choose the bytes. All is searched in one pass of the Rust engine that is here
already, which takes less of a megabyte than `in` does for each of the marks that a shape could begin with, and never backtracks.
A decoy is found in every spelling that `broker.credentials.scrub` knows, so also in a query and in a Basic login.
"""

from collections.abc import Iterable

import jsonschema_rs

from broker.credentials.scrub import SHORTEST, spellings
from broker.policy.containment import Detector
from broker.redaction import SHAPE


class Contents:
    """Looks into requests for decoys and secrets. A decoy of fewer than `SHORTEST` characters is not looked for."""

    __slots__ = ("_decoys", "_secrets")

    def __init__(self, decoy_values: tuple[str, ...]) -> None:
        known = sorted({form for value in decoy_values if len(value) >= SHORTEST for form in spellings(value)})
        literals = ("".join(f"\\x{octet:02x}" for octet in form) for form in known)
        self._decoys = _pattern("|".join(literals)) if known else None
        # Word boundaries of ASCII: with Unicode's, the engine leaves its fast path at the first other character.
        self._secrets = _pattern(SHAPE.replace(r"\b", r"(?-u:\b)"))

    def seen(self, texts: Iterable[bytes]) -> Detector | None:
        """The gravest that stands in any of them (path, query, header values, body), or None.

        Leave out what proves the agent's identity to the broker, which is a secret in its right place.
        """
        found = None
        for octets in texts:
            text = octets.decode("latin-1")
            if self._decoys is not None and self._decoys.is_valid(text):
                return Detector.HONEYTOKEN
            if found is None and self._secrets.is_valid(text):
                found = Detector.SECRET_IN_REQUEST
        return found


def _pattern(pattern: str) -> jsonschema_rs.Draft202012Validator:
    return jsonschema_rs.Draft202012Validator({"pattern": pattern}, pattern_options=jsonschema_rs.RegexOptions())
