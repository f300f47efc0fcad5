"""A host of its own for tests: a network namespace with addresses that stand for the world, and its own /etc/hosts.

What listens here is the independent witness: it counts what got out of an agent's namespace, whatever the broker says.
"""

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import stack

Made = TypeVar("Made")

MISSING = [tool for tool in ("ip", "unshare", "setpriv", "nsenter", "curl") if shutil.which(tool) is None]
WHY_NOT = (
    "network namespaces are Linux's"
    if sys.platform != "linux"
    else "only root can make network namespaces"
    if os.geteuid() != 0
    else f"missing here: {', '.join(MISSING)} (packages iproute2, util-linux, curl)"
    if MISSING
    else ""
)
# In the world, on the machine itself, and where clouds keep credentials.
WORLD4, WORLD6, METADATA = "192.0.2.10", "fd00:db8::10", "169.254.169.254"
PATIENCE_S = 10
_CLONE_NEWNET = 0x40000000


class Host:
    """The namespace, for as long as its process lives. `names` go into its /etc/hosts, as 127.0.0.1, `apart` as 127.0.0.2.

    Its resolver is what `folder`/resolv.conf says, if that is there.
    """

    def __init__(self, folder: Path, *names: str, apart: str = "apart") -> None:
        (folder / "hosts").write_text(f"127.0.0.1 localhost {' '.join(names)}\n127.0.0.2 {apart}\n")
        script = f"""
            mount --bind {folder}/hosts /etc/hosts && ip link set lo up
            if [ -e {folder}/resolv.conf ]; then mount --bind {folder}/resolv.conf /etc/resolv.conf; fi
            ip address add {WORLD4}/32 dev lo && ip address add {METADATA}/32 dev lo
            ip -6 address add {WORLD6}/128 dev lo nodad
            echo ready && exec sleep infinity"""
        command = ["unshare", "--net", "--mount", "--propagation", "private", "--", "sh", "-c", script]
        self._holder = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._holder.stdout
        assert self._holder.stdout.readline() == b"ready\n"
        self.pid = self._holder.pid
        self.within = ("nsenter", f"--target={self._holder.pid}", "--net", "--mount", f"--wd={Path.cwd()}", "--")
        self.reached: Counter[str] = Counter()

    def inside(self, make: Callable[[], Made]) -> Made:
        """What `make` gives, with the sockets that it makes in this namespace."""
        return inside(self._holder.pid, make)

    def listen(self, name: str, host: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> None:
        """Count under `name` what comes to this address."""

        def make() -> socket.socket:
            made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
            made.bind((host, port))
            return made

        self._count(name, self.inside(make))

    def listen_icmp(self, name: str) -> None:
        """Count every echo request that reaches the host."""
        self._count(name, self.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)))

    def listen_unix(self, name: str, path: str) -> None:
        """Count who connects to this Unix socket, of an abstract name where `path` begins with a zero byte."""

        def make() -> socket.socket:
            made = socket.socket(socket.AF_UNIX)
            made.bind(path)
            return made

        self._count(name, self.inside(make))

    def _count(self, name: str, listening: socket.socket) -> None:
        def work() -> None:
            if listening.type == socket.SOCK_STREAM:
                listening.listen()
            while True:
                if listening.type == socket.SOCK_STREAM:
                    connection, _ = listening.accept()
                    with connection, suppress(OSError):  # who came is gone
                        connection.sendall(b"hello\n")
                else:
                    listening.recv(2048)
                self.reached[name] += 1

        threading.Thread(target=work, daemon=True).start()

    def quiet(self) -> bool:
        """Whether no connection is open on the host, nor about to be closed."""
        lines = Path(f"/proc/{self._holder.pid}/net/tcp").read_text().splitlines()[1:]
        return all(line.split()[3] in {"0A", "06"} for line in lines)  # LISTEN, TIME_WAIT

    def run(self, *command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """A command on the host."""
        return subprocess.run([*self.within, *command], capture_output=True, text=True, timeout=timeout, check=False)

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()
        if self._holder.stdout:
            self._holder.stdout.close()


class Run:
    """A `broker run` that goes on. `line` is the next line that its command prints."""

    def __init__(self, host: Host, broker: stack.Broker, agent: str, *command: str) -> None:
        self.process = subprocess.Popen(
            [*host.within, *verb(broker, agent), "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def ask(self, line: str) -> str:
        """What its command prints for a line that it reads."""
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.line()

    @property
    def first_process(self) -> int:
        """Process 1 of its namespaces, by its number out here: `broker run` has `unshare` as its child, and that has it."""
        pid = self.process.pid
        for _ in range(2):
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        return pid

    def close(self) -> int:
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]
        self.process.terminate()
        return self.process.wait(20)


class Packets:
    """tcpdump(8) on every interface of the network namespace of a process: a witness that knows nothing of the broker.

    It is believed because it sees a packet of its own, before and after. `only` is a filter (pcap-filter(7)), for a namespace in
    which others send too.
    """

    def __init__(self, pid: int | str, only: str = "") -> None:
        self._own = inside(pid, _datagrams)
        port = self._own.getsockname()[1]
        self._mark = f"127.0.0.1.{port}: UDP"
        only = f"({only}) or port {port}" if only else ""
        # Snapshots of 256 bytes: of whole packets its ring holds eight.
        command = ["tcpdump", "-i", "any", "-l", "-nn", "-q", "-t", "-s", "256", "--immediate-mode", only]
        within = ["nsenter", f"--net=/proc/{pid}/ns/net", "--"]
        self._process = subprocess.Popen([*within, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr
        while "listening on" not in (line := self._process.stderr.readline()):
            assert line, "tcpdump has ended"
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self._lines.put(line.strip())

    @contextmanager
    def seen(self) -> Iterator[list[str]]:
        """What it sees while the body runs, a line a packet: there once the body has ended."""
        lines: list[str] = []
        self._until_now()
        yield lines
        lines += self._until_now()

    def _until_now(self) -> list[str]:
        self._own.sendto(b"seen?", self._own.getsockname())
        lines = []
        while self._mark not in (line := self._lines.get(timeout=PATIENCE_S)):
            lines.append(line)
        return lines

    def close(self) -> None:
        self._process.terminate()
        self._reading.join()
        assert "\n0 packets dropped by kernel" in self._process.communicate()[1]
        self._own.close()


def _datagrams() -> socket.socket:
    made = socket.socket(type=socket.SOCK_DGRAM)
    made.bind(("127.0.0.1", 0))
    return made


def inside(where: int | str | Path, make: Callable[[], Made]) -> Made:
    """What `make` gives, with the sockets that it makes in the network namespace of this process, or that this path opens."""
    made: list[Made] = []

    def work() -> None:
        with (where if isinstance(where, Path) else Path(f"/proc/{where}/ns/net")).open() as namespace:
            assert ctypes.CDLL(None).setns(namespace.fileno(), _CLONE_NEWNET) == 0
        made.append(make())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return made[0]


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or left for its parent to take in."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def has_stopped(pid: int) -> bool:
    """Whether each of its threads has."""
    with suppress(OSError):  # one has just ended
        return all(path.read_text().rpartition(")")[2].split()[0] == "T" for path in Path(f"/proc/{pid}/task").glob("*/stat"))
    return False


def verb(broker: stack.Broker, agent: str) -> Sequence[str]:
    return [*stack.BROKER, "run", "--agent", agent, "--state", str(broker.state)]
