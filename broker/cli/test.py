"""`broker test`: runs the policy tests, through the recognisers, the core and the ledger that judge real calls."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import click

from broker import clock
from broker.cli import options
from broker.errors import counted
from broker.manifest.findings import FORMATS, printable
from broker.review.policytests import coverage, results


@click.command()
@options.directory
@click.option("--format", "form", type=click.Choice(["text", "json", "github"]), default="text", help="How results are printed.")
@click.option("--json", "form", flag_value="json", help="The same as --format json.")
def test(*, manifests: Path, form: str) -> int:
    """Run the PolicyTest files in DIR (manifests).

    Nothing is sent and nothing is spent. Prints each case that fails, and which granted operations no case shows to be allowed.
    Ends with 0 where all pass, 1 where a case fails or the manifests have errors, 2 where DIR can't be read.
    """
    snapshot, loaded = options.compiled(manifests)
    found = tuple(results(snapshot, loaded.sources, clock.now()))
    failed = [replace(each.finding, file=(manifests / each.file).as_posix()) for each in found if each.wrong]
    covered = coverage(snapshot, found)
    if form == "json":
        operations = {agent: {"granted": granted, "uncovered": missing} for agent, (granted, missing) in covered.items()}
        cases = [{**asdict(each), "file": (manifests / each.file).as_posix(), "passed": not each.wrong} for each in found]
        click.echo(json.dumps({"cases": cases, "coverage": operations}, indent=1))
    else:
        click.echo(FORMATS[form](failed), nl=False)
    if form == "text":
        for agent, (granted, missing) in covered.items():
            shown, rest = granted - len(missing), f"; not {', '.join(missing)}" if missing else ""
            click.echo(printable(f"{agent}: {shown} of {counted(granted, 'operation')} shown to be allowed{rest}"))
    click.echo(f"{counted(len(found), 'case')}, {len(found) - len(failed)} passed, {len(failed)} failed", err=True)
    return 1 if failed else 0
