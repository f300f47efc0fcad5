"""What credentials of well-known forms look like, to everyone who must not show or keep one.

Law: shapes that issuers reserve, so that ordinary text hardly ever has one. It is a net, not a proof.
"""

import re
from urllib.parse import unquote

SHAPE = (
    r"[srp]k_(?:live|test)_\w|whsec_\w|\bsk-[\w-]{8}|gh[pousr]_\w{8}|github_pat_\w|glpat-\w|xox[a-z]-\w|xapp-\w|npm_\w{30}"
    r"|\bA(?:KIA|SIA)[A-Z0-9]{12}|\bAIza[\w-]{20}|\beyJ[\w-]+\.[\w-]+\.|-----BEGIN [A-Z ]*PRIVATE KEY"
)
"""A regular expression that finds the beginning of one."""
REMEDY = "put it into the environment or a file, name that as {env: NAME} or {file: PATH}, and revoke this one"
"""What to do about a credential that stands in a file."""
_WHOLE = re.compile(rf"(?:{SHAPE})\S*")
_SEGMENT = re.compile(r"[^\s/]+")


# What no shape can do without, in one piece of any text that is written without an escape.
_HINT = re.compile(
    r"\\|%[0-9A-Fa-f]{2}|k_(?:live|test)_|whsec_|sk-|gh[pousr]_|github_pat_|glpat-|xox|xapp-|npm_|AKIA|ASIA|AIza|eyJ|PRIVATE"
)


def may_hold(text: str) -> bool:
    """Whether a file's text may hold a credential that `redacted` finds in one of its values. Quick, and never wrongly False."""
    return _HINT.search(text) is not None


def redacted(text: str) -> str:
    """The text without credentials of well-known forms, as they are or percent-encoded as in a path."""
    text = _WHOLE.sub("[redacted]", text)
    return _SEGMENT.sub(_unless_encoded, text) if "%" in text else text


def _unless_encoded(segment: re.Match[str]) -> str:
    return "[redacted]" if "%" in segment[0] and _WHOLE.search(unquote(segment[0])) else segment[0]
