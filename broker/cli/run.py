"""`broker run --agent NAME -- CMD`: a command in a network namespace of its own, with no way out but the broker."""

import contextlib
import os
import pwd
import re
from collections.abc import Sequence
from pathlib import Path

import click

from broker.cli import folders
from broker.confined.ceilings import Ceilings, NoGroups, group, join, mounted
from broker.confined.environment import environment
from broker.confined.launch import Confined, Plan, check_tools, hold_signals, hold_streams, joined
from broker.errors import UsageError
from broker.state import State

_SIZE = re.compile(r"([0-9]{1,9})(KiB|MiB|GiB)?")
_UNITS = {None: 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_FEWEST_CPUS, _MOST_CPUS = 0.01, 100_000
_MOST_PIDS = 4_194_304  # the kernel's own (proc(5), pid_max)
_EXISTING = click.Path(exists=True, file_okay=False, resolve_path=True)


def _cpus(text: str) -> float:
    with contextlib.suppress(ValueError):
        if _FEWEST_CPUS <= (number := float(text)) <= _MOST_CPUS:
            return number
    raise UsageError(f"{text!r} is no number of processors", f"write one of {_FEWEST_CPUS} to {_MOST_CPUS}")


def _bytes(text: str) -> int:
    if (found := _SIZE.fullmatch(text)) is None:
        raise UsageError(f"{text!r} is no size", "write it like 512MiB or 2GiB")
    return int(found[1]) * _UNITS[found[2]]


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--agent", metavar="NAME", required=True, help="The agent that the command is.")
@folders.state
@click.option(
    "--user", metavar="NAME", help="Run it as this user; else as whoever called sudo, or as root without any right of root's."
)
@click.option("--keep", multiple=True, metavar="NAME", help="Leave it this variable, though it looks like a credential.")
@click.option("--writable", multiple=True, type=_EXISTING, help="A folder that root may write to beside the working directory.")
@click.option("--memory", type=_bytes, metavar="SIZE", default="2GiB", show_default=True, help="The most memory that it may use.")
@click.option("--cpus", type=_cpus, metavar="NUMBER", default=2.0, show_default=True, help="The most processors.")
@click.option(
    "--pids",
    type=click.IntRange(1, _MOST_PIDS),
    metavar="NUMBER",
    default=512,
    show_default=True,
    help="The most processes and threads.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    *,
    agent: str,
    state: Path,
    user: str | None,
    keep: tuple[str, ...],
    writable: tuple[str, ...],
    memory: int,
    cpus: float,
    pids: int,
    command: tuple[str, ...],
) -> int:
    """Run a command as an agent, with no way out but the broker.

    It runs in a network namespace where there is nothing but the broker. Linux, root.

    Its HTTP and HTTPS reach the broker whether it heeds proxy variables or not, the names of its tools' hosts alone resolve, and
    all else leads nowhere. It sees no /run and /tmp of the host's, trusts the broker's CA alone, and ends when this ends, which
    ends with its code.
    """
    hold_streams()
    check_tools()
    here = _here()
    folder = folders.broker_state(state)
    made = environment(os.environ, keep)
    if made.cleared:
        _warn(f"left out what looks like a credential (keep one with --keep NAME): {', '.join(made.cleared)}")
    who = _user(user)
    variables = made.variables | ({"HOME": who.pw_dir, "USER": who.pw_name, "LOGNAME": who.pw_name} if who.pw_uid else {})
    plan = Plan(command, variables, _ids(who), str(here), folder.ca.read_text(), _hidden(folder, here), _writable(here, writable))
    hold_signals()
    with contextlib.ExitStack() as held:
        ceilings = Ceilings(memory, cpus, pids)
        try:
            place = held.enter_context(group(mounted(Path("/proc/mounts").read_text()), ceilings))
        except NoGroups as why:
            place = None
            _warn(f"{why}: only the memory of each process is limited, not that of all, nor processors, nor their number")
        confined = Confined(plan, {} if place else ceilings.by_process)
        held.callback(confined.end)
        if place:
            join(place, confined.pid)
        known = held.enter_context(joined(folder, agent, confined.pid, _warn))
        if secrets := sorted({*known["secrets"]["env"]} & os.environ.keys() - {*keep, *made.cleared}):
            _warn(f"left out what the broker has secrets in (keep one with --keep NAME): {', '.join(secrets)}")
        # Else an agent that works beside the manifests could write its own, or read the tools' secrets.
        confined.go([known["manifests"]], known["secrets"]["file"], secrets)
        return confined.wait()


def _warn(what: str) -> None:
    click.echo(f"broker: {what}", err=True)


def _user(name: str | None) -> pwd.struct_passwd:
    number = os.environ.get("SUDO_UID") or str(os.geteuid())
    try:
        return pwd.getpwnam(name) if name else pwd.getpwuid(int(number))
    except (KeyError, ValueError) as error:
        raise UsageError(f"there is no user {name or number}", "name one with --user") from error


def _ids(who: pwd.struct_passwd) -> tuple[int, int, str]:
    groups = os.getgrouplist(who.pw_name, who.pw_gid) if who.pw_uid else []
    return who.pw_uid, who.pw_gid, ",".join(map(str, groups))


def _here() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise UsageError("the working directory is gone", "start it in one that is there") from None


def _hidden(state: State, here: Path) -> Sequence[str]:
    if here.is_relative_to(state.root):
        raise UsageError(f"{here} is in the broker's state folder, which no agent sees", "start it somewhere else")
    return [str(state.root), str(state.run)]


def _writable(here: Path, more: Sequence[str]) -> Sequence[str]:
    return [path for path in dict.fromkeys([str(here), *more]) if path != "/"]
