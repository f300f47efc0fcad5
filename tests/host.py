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
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
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
        self.within = ("nsenter", f"--target={self._holder.pid}", "--net", "--mount", f"--wd={Path.cwd()}", "--")
        self.reached: Counter[str] = Counter()

    def inside(self, make: Callable[[], Made]) -> Made:
        """What `make` gives, with the sockets that it makes in this namespace."""
        made: list[Made] = []

        def work() -> None:
            with open(f"/proc/{self._holder.pid}/ns/net") as namespace:  # noqa: PTH123 - its descriptor is needed
                assert ctypes.CDLL(None).setns(namespace.fileno(), _CLONE_NEWNET) == 0
            made.append(make())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return made[0]

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
            with suppress(OSError):
                if listening.type == socket.SOCK_STREAM:
                    listening.listen()
                while True:
                    if listening.type == socket.SOCK_STREAM:
                        connection, _ = listening.accept()
                        connection.sendall(b"hello\n")
                        connection.close()
                    else:
                        listening.recv(2048)
                    self.reached[name] += 1

        threading.Thread(target=work, daemon=True).start()

    def packets(self) -> int:
        """How many the host's interfaces have received since it began."""
        lines = Path(f"/proc/{self._holder.pid}/net/dev").read_text().splitlines()[2:]
        return sum(int(line.split()[2]) for line in lines)

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

    def close(self) -> int:
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]
        self.process.terminate()
        return self.process.wait(20)


def verb(broker: stack.Broker, agent: str) -> Sequence[str]:
    return [*stack.BROKER, "run", "--agent", agent, "--state", str(broker.state)]
