"""The command line, from the help of its verbs."""

from collections.abc import Iterator
from typing import Any

import click

from broker.cli.main import cli
from docs.generate.page import MADE


def verbs() -> str:
    """The help of every verb, as it is printed 100 columns wide."""
    parts = "\n".join(f"## {path}\n\n```text\n{text}\n```\n" for path, text in _helps(cli, "broker", None))
    return (
        f"{MADE}# Command line\n\n"
        "Exit codes: 0 yes, 1 findings or a denial, 2 wrong usage or unreadable input, 3 the broker is at fault.\n\n"
        f"{parts}"
    )


def _helps(command: click.Command, path: str, parent: click.Context | None) -> Iterator[tuple[str, str]]:
    name = path.rpartition(" ")[2]
    settings: dict[str, Any] = {"terminal_width": 100, "max_content_width": 100} if parent is None else {}
    context = click.Context(command, info_name=name, parent=parent, help_option_names=["-h", "--help"], **settings)
    yield path, command.get_help(context)
    if isinstance(command, click.Group):
        for word in command.list_commands(context):
            verb = command.get_command(context, word)
            if verb is not None:
                yield from _helps(verb, f"{path} {word}", context)
