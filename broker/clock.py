"""The one place that reads a clock. Everything else takes `now` as an argument."""

import time


def now() -> float:
    """Seconds since the epoch."""
    return time.time()  # noqa: TID251 - this is the edge


def mono_ns() -> int:
    """Nanoseconds of a clock that never steps, for durations."""
    return time.monotonic_ns()
