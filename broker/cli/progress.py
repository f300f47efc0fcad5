"""How far a verb has come, for a person who waits: on a terminal, and only where it takes a while."""

import sys
from collections.abc import Callable

from broker import clock

_PATIENCE_S = 1.5
_PACE_S = 0.2


def told(what: str) -> Callable[[str, int, int], None]:
    """Writes `reading the base: 40 %` over itself on stderr, and takes it away at the end; `what` is what is worked on."""
    began = clock.steady()
    shown = 0.0
    terminal = sys.stderr.isatty()

    def tell(doing: str, done: int, of: int) -> None:
        nonlocal shown
        now = clock.steady()
        if done >= of:
            text = "\r\x1b[K" if shown else ""
        elif terminal and now - began > _PATIENCE_S and now - shown > _PACE_S:
            shown = now
            text = f"\r{doing} {what}: {100 * done // of} %\x1b[K"
        else:
            return
        sys.stderr.write(text)
        sys.stderr.flush()

    return tell
