"""The option that nearly every verb has, for those that must start fast."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from broker.errors import UsageError
from broker.state import State

FOLDER = click.Path(path_type=Path, file_okay=False, readable=False)  # whoever reads it says why it can't

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def folder(name: str, default: str, what: str) -> Decorator:
    """An option that takes a folder."""
    return click.option(name, type=FOLDER, default=default, show_default=True, help=what)


state = folder("--state", ".broker", "The broker's state folder.")


def broker_state(folder: Path) -> State:
    """The state folder of a broker that ran before. Raises `UsageError` where none has, `PermissionError`."""
    try:
        (folder / "keys" / "tokens.key").stat()  # `exists` says no, in a newer Python, also where it may not look
    except (FileNotFoundError, NotADirectoryError):
        advice = "start one with `broker up`, or name its folder with --state"
        raise UsageError(f"{folder} is no state folder of a broker", advice) from None
    return State.at(folder)
