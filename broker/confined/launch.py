"""From `broker run`'s side: the command is started, joined to the running broker, watched, and its end waited for."""

import collections
import contextlib
import functools
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker.admin.client import ask
from broker.confined.terminal import Terminal
from broker.dataplane.site import DOOR_PORT, TRANSPARENT_PORTS
from broker.errors import BrokerError, UsageError
from broker.lifetimes import die_with
from broker.state import State

_TOOLS = {"ip": "iproute2", "unshare": "util-linux", "setpriv": "util-linux"}
_NAMESPACES = ("--net", "--ipc", "--uts", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child")
_WATCHED = {
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGTSTP,
    signal.SIGCONT,
}  # fmt: skip
# Where services keep sockets, beside the folders that look empty inside.
_KEEPING = ("/var", "/srv", "/opt")
_NO_FILES = ("/proc", "/sys")
_MOST_ENTRIES = 100_000  # of each place: about 0.1 s
_REJOIN_S = 0.25
_INSIDE = Path(__file__).with_name("inside.py")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to run: the command and its environment, as which user (`uid`, `gid`, all groups by commas), and where.

    `ca` is the text of the broker's CA. `hidden` are folders that look empty to it, `writable` those that root may write to.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    user: tuple[int, int, str]
    directory: str
    ca: str
    hidden: Sequence[str]
    writable: Sequence[str]

    def document(self, limits: Mapping[str, int], *, terminal: bool) -> bytes:
        """As the process inside reads it, on one line. With a `terminal`, it tells when the command stops."""
        said = {name: getattr(self, name) for name in self.__slots__} | {"setpriv": _found("setpriv")}
        said |= {"limits": limits, "doors": [DOOR_PORT, *TRANSPARENT_PORTS], "terminal": terminal}
        return json.dumps(said).encode() + b"\n"

    def sockets(self) -> list[str]:
        """The Unix sockets of others that the command could reach."""
        return _sockets([self.directory, *self.writable, self.environment.get("HOME", ""), *_KEEPING])


def check_tools() -> None:
    """Raises `UsageError` where something is missing."""
    if os.geteuid() != 0:
        raise UsageError("only root can make network namespaces", "run it with sudo")
    for tool in _TOOLS:
        _found(tool)


def _found(tool: str) -> str:
    if (path := shutil.which(tool)) is None:
        raise UsageError(f"{tool!r} is missing here", f"install the package {_TOOLS[tool]}")
    return path


def _sockets(places: Iterable[str]) -> list[str]:
    """The Unix sockets that somebody listens on, who could fetch what the command may not.

    The kernel names those of this network namespace that were bound by a whole path, as it then was; the others are looked for.
    """
    lines = Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()
    named = (line.split(maxsplit=7)[-1] for line in lines)
    found = itertools.chain.from_iterable(_sockets_below(place) for place in dict.fromkeys(places))
    return sorted(path for path in {*named, *found} if path.startswith("/") and _is_answered(path))


def _sockets_below(place: str) -> Iterator[str]:
    """What may be one in a folder and those in it, the nearest first, of so many entries that a start is not delayed."""
    left, folders = _MOST_ENTRIES, collections.deque([place])
    while folders and left > 0:
        with contextlib.suppress(OSError), os.scandir(folders.popleft()) as entries:
            for entry in itertools.islice(entries, left):
                left -= 1
                if entry.is_dir(follow_symlinks=False) and entry.path not in _NO_FILES:
                    folders.append(entry.path)
                elif not (entry.is_file(follow_symlinks=False) or entry.is_symlink()):
                    yield entry.path


def _is_answered(path: str) -> bool:
    """Whether this is a socket that somebody has open. A datagram one disturbs nobody by asking: it connects to no other."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # it is of another kind, or its path too long
            return True
    return True


class Confined:
    """Process 1 of a command's namespaces, which waits for `go` before it starts the command. `pid` is its number out here.

    `limits` are those of each process, by name. Raises `BrokerError` where it can't be made.
    """

    def __init__(self, plan: Plan, limits: Mapping[str, int]) -> None:
        self._terminal = Terminal()
        (told, self._tell), (hear, telling) = os.pipe(), os.pipe()
        # Isolated, and without the packages or the environment of whoever called.
        inside = [sys.executable, "-I", "-S", str(_INSIDE), str(told), str(telling)]
        self._process = subprocess.Popen(  # noqa: S603 - our own
            [_found("unshare"), *_NAMESPACES, "--", *inside],
            pass_fds=(told, telling),
            env={"PATH": os.environ.get("PATH", os.defpath)},
            preexec_fn=functools.partial(die_with, os.getpid()),  # noqa: PLW1509 - no thread runs yet
            process_group=0,  # the command's too: what it sends to its own must not reach the caller's
        )
        os.close(told)
        os.close(telling)
        with os.fdopen(hear) as answers:
            self._say(plan.document(limits, terminal=bool(self._terminal)))
            line = answers.readline()
        if not line:
            self.end()
            raise BrokerError("the command's namespaces can't be made", "see the message above")
        self.pid = int(json.loads(line)["pid"])
        # Meanwhile the broker opens the doors.
        self._sockets = ThreadPoolExecutor(1).submit(plan.sockets)

    def _say(self, line: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended, which is seen by what it answers
            os.write(self._tell, line)

    def go(self, readonly: Sequence[str], masked: Sequence[str], without: Sequence[str]) -> None:
        """The doors are open: have the command started, which may not change, nor read, these paths, without these variables."""
        said = {"readonly": readonly, "masked": masked, "sockets": self._sockets.result(), "without": without}
        self._terminal.offer(self._process.pid)
        self._say(json.dumps(said).encode() + b"\n")

    def wait(self) -> int:
        """Its exit code, once it has ended; signals that come meanwhile are passed on."""
        while (code := self._process.poll()) is None:
            self._attend(signal.sigwaitinfo({*_WATCHED, signal.SIGCHLD}).si_signo)
        return code if code >= 0 else 128 - code

    def _attend(self, number: int) -> None:
        group = self._process.pid
        if number == signal.SIGTSTP:
            os.killpg(group, number)
        elif number == signal.SIGCONT:
            self._terminal.go_on(group)
        elif number != signal.SIGCHLD:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
        elif not (stop := self._stop()):
            return
        elif self._terminal:
            self._terminal.stopped(group, stop.si_status)
        else:
            self._process.send_signal(signal.SIGCONT)  # the command's group has stopped, and we have nobody to tell

    def _stop(self) -> os.waitid_result | None:
        with contextlib.suppress(ChildProcessError):  # it has ended
            return os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOHANG)
        return None

    def end(self) -> None:
        """End it, and all that it started."""
        self._process.kill()
        self._process.wait()
        self._terminal.take_back()
        os.close(self._tell)


def hold_streams() -> None:
    """Have standard input, output and error lead nowhere where the caller closed them: else pipes of ours took their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003 - the library's


def hold_signals() -> None:
    """From now on signals wait for `Confined.wait`. Threads and children that are started later inherit this."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {*_WATCHED, signal.SIGCHLD})


@contextlib.contextmanager
def joined(state: State, agent: str, pid: int, tell: Callable[[str], object]) -> Iterator[dict[str, Any]]:
    """For as long as the body runs, the namespace of this process is the agent's; gives what the broker answers.

    A broker that is started again knows nothing of it, and is told again; until then nothing gets out. Raises what `ask` raises,
    and `UsageError` where none runs.
    """
    said = {"agent": agent, "pid": pid}
    line = _connected(state)
    if line is None or (made := ask(state.control_socket, "POST", "/namespaces", said)) is None:
        raise UsageError(f"no broker runs on {state.root}", "start it with `broker up`, or name another's folder with --state")
    threading.Thread(target=_stay, args=(state, said, line, tell), daemon=True).start()
    yield made


def _stay(state: State, said: Mapping[str, Any], line: socket.socket, tell: Callable[[str], object]) -> None:
    while True:
        with contextlib.suppress(OSError):
            line.recv(1)  # nothing is ever said, so this is its end
        line.close()
        tell("the broker is gone: nothing gets out until it is back")
        line = _rejoined(state, said)
        tell("the broker is back")


def _rejoined(state: State, said: Mapping[str, Any]) -> socket.socket:
    while True:
        if line := _connected(state):
            with contextlib.suppress(BrokerError):
                if ask(state.control_socket, "POST", "/namespaces", said):
                    return line
            line.close()
        time.sleep(_REJOIN_S)


def _connected(state: State) -> socket.socket | None:
    """A connection on which nothing is said: it ends when the broker does."""
    line = socket.socket(socket.AF_UNIX)
    try:
        line.connect(str(state.control_socket))
    except OSError:
        line.close()
        return None
    return line
