"""What a command may use of the machine, by a control group of its own (Linux, Documentation/admin-guide/cgroup-v2.rst).

Law: a group is named after the `broker run` that made it, and is removed with it; what a killed one left, the next removes.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from broker.errors import BrokerError

_CONTROLLERS = ("memory", "cpu", "pids")
_PERIOD_US = 100_000  # the kernel's own
_SWAP = "memory.swap.max"  # a kernel without swap has no such file
_PREFIX = "broker-run-"


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The most memory in bytes, processors, and processes and threads."""

    memory: int
    cpus: float
    pids: int

    @property
    def files(self) -> Mapping[str, str]:
        """The files of a group, and what is written to them."""
        quota = f"{int(self.cpus * _PERIOD_US)} {_PERIOD_US}"
        return {"memory.max": str(self.memory), _SWAP: "0", "cpu.max": quota, "pids.max": str(self.pids)}

    @property
    def by_process(self) -> Mapping[str, int]:
        """What stands in where there are no groups: limits of each process (setrlimit(2)), by name.

        Not of the address space, of which runtimes reserve far more than they use, nor of processes, which are counted by user.
        """
        return {"RLIMIT_DATA": self.memory}


class NoGroups(BrokerError):
    """Control groups can't be had here."""


def mounted(mounts: str) -> Path:
    """Where the groups are, by the text of /proc/mounts. Raises `NoGroups`."""
    found = [line.split()[1] for line in mounts.splitlines() if line.split()[2:3] == ["cgroup2"]]
    if not found:
        raise NoGroups("control groups (v2) are not mounted")
    return Path(found[0])


@contextlib.contextmanager
def group(root: Path, ceilings: Ceilings) -> Iterator[Path]:
    """A group with these ceilings, for as long as the body runs; whatever is then in it is killed. Raises `NoGroups`."""
    for left in root.glob(f"{_PREFIX}*"):
        if not Path("/proc", left.name.removeprefix(_PREFIX)).exists():
            _remove(left)
    made = root / f"{_PREFIX}{os.getpid()}"
    try:
        offered = (root / "cgroup.controllers").read_text().split()
        if missing := [name for name in _CONTROLLERS if name not in offered]:
            raise NoGroups(f"control groups (v2) don't have {', '.join(missing)} here")
        (root / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in _CONTROLLERS))
        made.mkdir()
        for name, most in ceilings.files.items():
            if name != _SWAP or (made / name).exists():
                (made / name).write_text(most)
    except OSError as error:
        _remove(made)
        raise NoGroups(f"control groups can't be made in {root} ({error.strerror})") from error
    try:
        yield made
    finally:
        with contextlib.suppress(OSError):
            (made / "cgroup.kill").write_text("1")
        _remove(made)


def join(made: Path, pid: int) -> None:
    """Put a process into a group, and so all that it starts."""
    (made / "cgroup.procs").write_text(str(pid))


def _remove(made: Path) -> None:
    with contextlib.suppress(OSError):  # something in it still ends: the next start removes it
        made.rmdir()
