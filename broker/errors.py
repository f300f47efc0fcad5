"""The base of every error this package raises on purpose.

A denial is a value (`broker.policy.types.Decision`), never an exception. An exception is a fault, and a fault on the way of a
call becomes a denial at the edge. Foreign exceptions are wrapped where they enter.
"""


class BrokerError(Exception):
    """What happened, and what to do about it, in words for the person who reads it.

    `advice` is one sentence that begins with a verb; `exit_code` is what a verb of the command line ends with (2: wrong usage
    or unreadable input, 3: the broker is at fault).
    """

    exit_code = 3

    def __init__(self, message: str, advice: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.message}; {self.advice}" if self.advice else self.message


class UsageError(BrokerError):
    """The caller's input can't be used: a missing file, a taken port, an unknown agent."""

    exit_code = 2


def counted(number: int, word: str) -> str:
    """`1 error`, `2 errors`."""
    return f"{number} {word}{'' if number == 1 else 's'}"
