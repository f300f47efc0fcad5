"""The one place that reads a clock. Everything else takes `now` as an argument."""

import time


def now() -> float:
    """Seconds since the epoch."""
    return time.time()  # noqa: TID251 - this is the edge


def mono_ns() -> int:
    """Nanoseconds of a clock that never steps, for durations."""
    return time.monotonic_ns()


_BEGAN = now() - time.clock_gettime(time.CLOCK_BOOTTIME)


def steady() -> float:
    """Seconds since the epoch by a clock that nobody sets: `now` at the start, and what has passed since."""
    return _BEGAN + time.clock_gettime(time.CLOCK_BOOTTIME)
