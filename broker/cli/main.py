"""`broker`: finds the verb and turns errors into one printable line and an exit code.

Law: a verb's imports are paid only by that verb, and no fault shows a traceback unless BROKER_DEBUG is set.
"""

import importlib
import os
import sys
from typing import Any

import click

from broker import __version__
from broker.errors import BrokerError, UsageError
from broker.manifest.findings import printable

_VERBS = (
    "agents", "approvals", "audit", "check", "demo", "denials", "diff", "doctor", "explain", "propose", "render", "run", "serve",
    "test", "token", "up",
)  # fmt: skip


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        return getattr(importlib.import_module(f"broker.cli.{cmd_name}"), cmd_name) if cmd_name in _VERBS else None


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="broker")
def cli() -> None:
    """The one way out for AI agents: Envoy in the network, a manifest per agent, a record of every call."""


def main(arguments: list[str] | None = None) -> None:
    """Run a verb and exit with its code."""
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    try:
        result: Any = cli.main(arguments, prog_name="broker", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 130
    except BrokerError as error:
        click.echo(printable(f"broker: {error}"), err=True)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read our output has seen enough (`broker audit tail | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except PermissionError as error:
        whose = "run this as the user whose it is, with sudo for one"
        click.echo(printable(f"broker: {error.filename or 'this'}: {error.strerror}; {whose}"), err=True)
        return UsageError.exit_code
    except Exception as error:
        if os.environ.get("BROKER_DEBUG"):
            raise
        what = f"broker: a fault of its own: {type(error).__name__}: {error}; set BROKER_DEBUG=1 to see where"
        click.echo(printable(what), err=True)
        return 3
    return result if isinstance(result, int) else 0
