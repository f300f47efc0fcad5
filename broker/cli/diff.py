"""`broker diff`: what a change of the manifests lets agents do, and what it stops, for the people who approve it.

Law: a ref is read as git stored it, from its objects: no attribute, filter or hook of the repository has a say in what is shown.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import click

from broker.cli import options
from broker.cli.progress import told
from broker.errors import BrokerError, UsageError
from broker.manifest.diff import Diff
from broker.manifest.diff import diff as differences
from broker.manifest.findings import FORMATS, printable
from broker.manifest.load import Reading, load
from broker.manifest.steps import Direction
from broker.policy.snapshot import EMPTY, PolicySnapshot
from broker.review.markdown import as_markdown


@click.command()
@click.argument("base")
@click.argument("head")
@options.manifests
@click.option("--format", "form", type=click.Choice(["markdown", "json"]), default="markdown", help="How changes are printed.")
@click.option("--json", "form", flag_value="json", help="The same as --format json.")
@click.option("--fail-on", type=click.Choice(["wider"]), help="End with 1 where a change is wider, or may be.")
@options.short_lived
def diff(*, base: str, head: str, manifests: Path, form: str, fail_on: str | None) -> int:
    """Say what becomes reachable and what stops, from BASE to HEAD.

    Each is a folder of manifests or, where there is no such folder, a git ref (branch, tag, commit) of the repository that holds
    the manifests folder, which is read as it was there; ./NAME is always a folder. From a ref that has no such folder yet, all
    of HEAD becomes reachable. Markdown is made for a comment on a pull request, JSON lists every change. Ends with 0; with 1
    where --fail-on says so or HEAD has errors; with 2 where BASE has, or one of them can't be read.
    """
    reading = Reading(manifests, processes=options.processors())
    absent = ""
    try:
        before = _snapshot(base, manifests, reading, "base", 2)
    except _Absent as error:
        before, absent = EMPTY, f"{error.message}, so all of {head} is new"
    after = _snapshot(head, manifests, reading, "head", 1)
    if absent:
        click.echo(printable(absent), err=True)
    found = differences(before, after)
    click.echo(as_markdown(found) if form == "markdown" else _as_json(found, before, after), nl=False)
    return int(fail_on is not None and found.widens)


def _as_json(found: Diff, before: PolicySnapshot, after: PolicySnapshot) -> str:
    counts = {direction: sum(change.direction is direction for change in found.changes) for direction in Direction}
    changes = [asdict(change) for change in found.changes]
    return json.dumps({"base": before.revision, "head": after.revision, **counts, "changes": changes}, indent=1) + "\n"


class _Absent(UsageError):
    """A ref, or a repository without commits, has no manifests yet."""


class _Unreadable(BrokerError):
    """There are findings; they are on stderr."""

    def __init__(self, which: str, name: str, exit_code: int) -> None:
        advice = "correct them" if which == "head" else "name a base whose manifests have none"
        super().__init__(f"the manifests of the {which}, {name}, have errors", advice)
        self.exit_code = exit_code


def _snapshot(name: str, manifests: Path, reading: Reading, which: str, exit_code: int) -> PolicySnapshot:
    with _folder(name, manifests) as (folder, shown):
        reading.progress = told(f"the {which}")
        loaded = load(folder, reading=reading)
    errors = [finding for finding in loaded.findings if finding.severity == "error"]
    click.echo(FORMATS["text"](replace(each, file=f"{shown}/{each.file}") for each in errors), err=True, nl=False)
    if loaded.snapshot is None:
        raise _Unreadable(which, name, exit_code)
    return loaded.snapshot


@contextmanager
def _folder(name: str, manifests: Path) -> Iterator[tuple[Path, str]]:
    """The folder to read, and how people know it."""
    if os.path.isdir(name):  # noqa: PTH112 - a name that is too long is none, and no error
        # No ref begins so (git-check-ref-format(1)).
        if not name.startswith(("/", ".", "-")) and _is_ref(name, manifests):
            advice = f"write ./{name} for the folder, or a commit's hash or refs/heads/{name} for the ref"
            raise UsageError(f"{name!r} is a folder and a git ref", advice)
        yield Path(name), Path(name).as_posix()
        return
    if name.startswith("-"):
        raise UsageError(f"{name!r} is no folder and no git ref", "name a folder of manifests, a branch, a tag or a commit")
    top, inside = _place(name, manifests)
    if name == "HEAD" and not _is_ref(name, manifests):
        raise _Absent("there is no commit yet", "commit the manifests, or compare folders")
    commit = _commit(top, name)
    # Of several git takes one by an order of its own: a tag of the base's name could stand for the base.
    if b"is ambiguous" in _ran(top, "-c", "core.warnAmbiguousRefs=true", "rev-parse", "--verify", name).stderr:
        advice = f"write a commit's hash, or all of the ref's name, like refs/heads/{name} or refs/remotes/{name}"
        raise UsageError(f"{name!r} is more than one git ref", advice)
    with tempfile.TemporaryDirectory(prefix="broker-diff-") as temporary:
        _checkout(top, name, commit, inside, Path(temporary))
        yield Path(temporary), f"{name}:{inside.as_posix()}"


def _is_ref(name: str, manifests: Path) -> bool:
    try:
        return bool(_commit(_place(name, manifests)[0], name))
    except UsageError:
        return False


def _commit(top: Path, name: str) -> str:
    problem = f"{name!r} is no folder, and git knows no such ref"
    return _git(top, problem, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").decode().strip()


def _place(name: str, manifests: Path) -> tuple[Path, PurePosixPath]:
    """The repository that holds the manifests folder, and where in it the folder is; it may be gone from the working tree."""
    near = manifests.absolute()
    while not near.is_dir():
        near = near.parent
    top = os.fsdecode(
        _git(near, f"{name!r} is no folder, and {str(manifests)!r} is in no git repository", "rev-parse", "--show-toplevel")
    )
    root = Path(top.removesuffix("\n"))
    return root, PurePosixPath(Path(os.path.realpath(near), manifests.absolute().relative_to(near)).relative_to(root).as_posix())


_SUBMODULE = "160000"


class _Entry(NamedTuple):
    """A file as git lists it: its mode, its object, and its path below the manifests folder."""

    mode: str
    blob: str
    path: PurePosixPath

    @property
    def plain(self) -> bool:
        return self.mode.startswith("100")

    @property
    def taken(self) -> bool:
        """Whether reading a folder takes it, or what is in it, for manifests."""
        return self.mode == _SUBMODULE or self.path.suffix in (".yaml", ".yml")


def _checkout(top: Path, name: str, commit: str, inside: PurePosixPath, into: Path) -> None:
    """Write the folder as it was. Raises `UsageError` where there was none, or a manifest that is no plain file.

    Other links are left out: reading a folder does not follow them to manifests either.
    """
    below = ["--", f"{inside}/"] if inside.parts else []
    listed = _git(top, "git can't list the files", "ls-tree", "-r", "-z", "--full-tree", commit, *below)
    entries = [_entry(os.fsdecode(line), inside) for line in listed.split(b"\0") if line]
    if not entries:
        raise _Absent(f"{name} has no folder {str(inside)!r}", "name the folder that it has with --manifests, or another ref")
    for entry in entries:
        if (not entry.plain and entry.taken) or ".." in entry.path.parts:
            what = "a submodule, which git has no files of" if entry.mode == _SUBMODULE else "no plain file"
            raise UsageError(f"{name}:{inside / entry.path} is {what}", "have the file itself there, or compare folders")
    entries = [entry for entry in entries if entry.plain]
    asked = "".join(f"{entry.blob}\n" for entry in entries).encode()
    contents = _git(top, "git can't read the files", "cat-file", "--batch", given=asked)
    at = 0
    for entry in entries:
        header, _, _ = contents[at : at + 200].partition(b"\n")
        begin = at + len(header) + 1
        at = begin + int(header.split()[-1])
        path = into / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[begin:at])
        at += 1  # the line feed after each


def _entry(line: str, inside: PurePosixPath) -> _Entry:
    about, _, path = line.partition("\t")
    mode, _, blob = about.split()
    return _Entry(mode, blob, PurePosixPath(path).relative_to(inside))


def _git(top: Path, problem: str, *arguments: str, given: bytes = b"") -> bytes:
    """What git says. Raises `UsageError` that begins with `problem` where it fails."""
    ended = _ran(top, *arguments, given=given)
    if ended.returncode:
        why = ended.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise UsageError(f"{problem}{f' ({why})' if why else ''}", "name a folder, or a branch, tag or commit that is here")
    return ended.stdout


def _ran(top: Path, *arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "LC_ALL": "C"}
    if "GIT_WORK_TREE" not in environment:
        # Hooks of linked worktrees have it alone; git then takes the folder that it is started in for the whole repository.
        environment.pop("GIT_DIR", None)
    try:
        return subprocess.run(  # noqa: S603
            ["git", "-C", str(top), *arguments],  # noqa: S607
            input=given, env=environment, capture_output=True, check=False,
        )  # fmt: skip
    except OSError as error:
        raise UsageError("git can't be started", "install git, or compare folders") from error
