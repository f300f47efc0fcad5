"""How far a verb has come, for a person who waits: on a terminal, and only where it takes a while."""

import sys
from collections.abc import Callable

from broker import clock

_PATIENCE_S = 1.5
_PACE_S = 0.2


def told(what: str = "") -> Callable[[str, int, int], None]:
    """Writes `reading base: 40 %` over itself on stderr, in the order in which it is called; `what` is what is read."""
    began = shown = clock.steady()
    terminal = sys.stderr.isatty()

    def tell(doing: str, done: int, of: int) -> None:
        nonlocal shown
        now = clock.steady()
        if terminal and now - began > _PATIENCE_S and now - shown > _PACE_S:
            shown = now
            sys.stderr.write(f"\r{doing} {what}: {100 * done // max(of, 1)} %\x1b[K\r")
            sys.stderr.flush()

    return tell
