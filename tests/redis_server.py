"""A real Redis for tests, on a loopback port that the system chose. Without Debian's `redis-server`, tests that need it skip."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from tests import stack


class RedisServer:
    """One server in a folder of its own, killed with the test. `command` speaks to it past the ledger."""

    def __init__(self, *options: str, tls: tuple[Path, Path] | None = None) -> None:
        if not shutil.which("redis-server"):
            pytest.skip("redis-server is not installed (apt-get install redis-server)")
        self.folder = Path(tempfile.mkdtemp(prefix="redis-"))
        self.port, self.url_port = stack.free_port(), 0
        self._options = ["--save", "", "--appendonly", "no", "--enable-debug-command", "yes", *options]
        if tls:
            self.url_port = stack.free_port()
            certificate, key = map(str, tls)
            self._options += ["--tls-port", str(self.url_port), "--tls-cert-file", certificate, "--tls-key-file", key]
            self._options += ["--tls-ca-cert-file", certificate, "--tls-auth-clients", "no"]
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        listen = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder)]
        self._process = subprocess.Popen(["redis-server", *listen, *self._options], stdout=subprocess.DEVNULL)
        stack.until(self._answers, why="redis-server starts")

    def stop(self) -> None:
        """Gone at once, with all that is not saved."""
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        self.stop()
        self.start()

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def freeze(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    def command(self, *words: str) -> str:
        return subprocess.run(
            ["redis-cli", "-p", str(self.port), *words], capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    def total(self, key: str) -> int:
        """What Redis holds to be spent of a window's counter."""
        return int(self.command("HGET", f"{{broker}}:{key}", "t") or 0)

    def _answers(self) -> bool:
        if self._process.poll() is not None:
            raise AssertionError(f"redis-server ended with {self._process.returncode}")
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as probe:
            probe.sendall(b"PING\r\n")
            return probe.recv(5).startswith((b"+PONG", b"-NOAU"))
        return False
