"""`broker check`: reads the manifests as the broker would, and says everything that is wrong with them."""

from dataclasses import replace
from pathlib import Path

import click

from broker.cli import options
from broker.errors import counted
from broker.manifest.findings import FORMATS
from broker.manifest.load import load


@click.command()
@options.directory
@click.option("--format", "form", type=click.Choice(list(FORMATS)), default="text", help="How findings are printed.")
@click.option("--json", "form", flag_value="json", help="The same as --format json.")
def check(*, manifests: Path, form: str) -> int:
    """Check the manifests in DIR (manifests).

    Prints every finding of every file on stdout and a summary on stderr. Ends with 0 where nothing is an error, 1 where something
    is, 2 where DIR can't be read.
    """
    loaded = load(manifests)
    # Printed as paths that an editor opens from where the person stands.
    found = [replace(finding, file=(manifests / finding.file).as_posix()) for finding in loaded.findings]
    click.echo(FORMATS[form](found), nl=False)
    severities = [finding.severity for finding in found]
    errors, warnings = (counted(severities.count(severity), severity) for severity in ("error", "warning"))
    revision = f"; revision {loaded.snapshot.revision}" if loaded.snapshot else ""
    click.echo(f"{errors}, {warnings} in {counted(len(loaded.files), 'file')}{revision}", err=True)
    return 0 if loaded.snapshot else 1
