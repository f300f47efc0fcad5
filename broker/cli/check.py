"""`broker check`: reads the manifests as the broker would, and says everything that is wrong with them."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import click

from broker.errors import UsageError
from broker.manifest.findings import FORMATS, Finding
from broker.manifest.load import Loaded, load


@click.command()
@click.argument("directory", metavar="[DIR]", default="manifests", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(list(FORMATS)), default="text", help="How findings are printed.")
@click.option("--json", "form", flag_value="json", help="The same as --format json.")
@click.pass_context
def check(context: click.Context, directory: Path, form: str) -> None:
    """Check the manifests in DIR (manifests).

    Prints every finding of every file on stdout and a summary on stderr. Ends with 0 where nothing is an error, 1 where something
    is, 2 where DIR can't be read.
    """
    try:
        loaded = load(directory)
    except UsageError as error:
        click.echo(f"broker check: {error}", err=True)
        context.exit(error.exit_code)
    # Printed as paths that an editor opens from where the person stands.
    found = [replace(finding, file=(directory / finding.file).as_posix()) for finding in loaded.findings]
    click.echo(FORMATS[form](found), nl=False)
    click.echo(_summary(loaded, found), err=True)
    context.exit(0 if loaded.snapshot else 1)


def _summary(loaded: Loaded, found: Iterable[Finding]) -> str:
    severities = [finding.severity for finding in found]
    errors, warnings = _count(severities.count("error"), "error"), _count(severities.count("warning"), "warning")
    revision = f"; revision {loaded.snapshot.revision}" if loaded.snapshot else ""
    return f"{errors}, {warnings} in {_count(len(loaded.files), 'file')}{revision}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
