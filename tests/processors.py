"""Several processors behind one Envoy, on one Redis: the commands that docs/replicas.md names, with real processes.

Each processor has a state folder of its own, with the keys of the fleet; Envoy's bootstrap is what `broker render envoy` prints.
"""

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import stack
from redis_server import RedisServer

from broker import clock
from broker.keys import ed25519
from broker.pki import PlatformCA
from broker.supervisor import envoy_binary

SHARED_KEYS = ("ca.key", "jwt.key", "tokens.key")


class Processor:
    """One `broker serve`."""

    def __init__(self, fleet: "Fleet", name: str) -> None:
        self.name, self._fleet = name, fleet
        self.state = fleet.folder / name
        self.manifests = fleet.manifests
        self.redis = fleet.redis.url
        self.admin = f"127.0.0.1:{stack.free_port()}"
        shutil.copytree(fleet.keys, self.state / "keys")
        shutil.copy(fleet.ca, self.state / "ca.pem")

    def start(self, code: Path | None = None) -> None:
        """With another version of the code, if so."""
        command = [
            *(*stack.BROKER, "serve", "--manifests", str(self.manifests), "--state", str(self.state), "--redis", self.redis),
            *("--run", str(self._fleet.run), "--processor", self.name, "--admin", self.admin),
            *("--proxy", f"127.0.0.1:{self._fleet.proxy}", "--base-url", f"127.0.0.1:{self._fleet.base_url}"),
        ]
        path = {"PYTHONPATH": str(code)} if code else {}
        self.log = self._fleet.folder / f"{self.name}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **path})

    def until_ready(self) -> None:
        stack.until(lambda: self.health().get("ready"), 30, f"{self.name} is ready: {self.log.read_text()}")

    def health(self) -> dict[str, Any]:
        """What /readyz says."""
        with suppress(httpx.TransportError):
            found: dict[str, Any] = httpx.get(f"http://{self.admin}/readyz", timeout=2).json()
            return found
        return {}

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        self.process.terminate()
        return self.process.wait(20)

    def freeze(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    @property
    def decided(self) -> int:
        """How many calls it has judged."""
        return sum(path.read_bytes().count(b'"event":"decision"') for path in (self.state / "audit").glob("*.jsonl"))


class Link:
    """A way to a port of loopback that can be cut."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._open: list[socket.socket] = []
        self.port = stack.free_port()
        self.mend()

    def mend(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        for each in (self._listener, *self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                self._open.append(near)
                far = socket.create_connection(("127.0.0.1", self._to))
                self._open.append(far)
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=_pump, args=pair, daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while chunk := source.recv(65536):
            sink.sendall(chunk)


class Fleet:
    """Envoy, and the processors `names`, each started; the last one's way to Redis is `link`."""

    def __init__(self, *names: str, documents: list[dict[str, Any]]) -> None:
        self.redis = RedisServer()
        self.link = Link(self.redis.port)
        self.folder = stack.short_folder()
        self.manifests = stack.write_manifests(self.folder / "manifests", *documents)
        self.run, self.keys, self.ca = self.folder / "run", self.folder / "keys", self.folder / "ca.pem"
        self.keys.mkdir(mode=0o700)
        for name in SHARED_KEYS[1:]:
            ed25519(self.keys / name)
        PlatformCA(self.keys / "ca.key", self.ca, clock.now())
        self.proxy, self.base_url = stack.free_port(), stack.free_port()
        self.processors = [Processor(self, name) for name in names]
        self.processors[-1].redis = f"redis://127.0.0.1:{self.link.port}"
        for each in self.processors:
            each.start()
        for each in self.processors:
            each.until_ready()
        command = [str(envoy_binary()), "-c", str(self._bootstrap(names)), "--disable-hot-restart", "--log-level", "error"]
        with (self.folder / "envoy.log").open("wb") as log:
            self.envoy = subprocess.Popen(command, stdout=log, stderr=log)
        self.token = self.verb("token", "caller")
        stack.until(lambda: self.call().status_code == 200, 30, "calls are served")

    def _bootstrap(self, names: tuple[str, ...]) -> Path:
        named = [word for name in names for word in ("--processor", name)]
        command = [*stack.BROKER, "render", "envoy", "--bootstrap", str(self.manifests), "--run", str(self.run), *named]
        path = self.folder / "envoy.yaml"
        path.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        return path

    def verb(self, *words: str) -> str:
        """What a verb prints, on the first processor's state."""
        command = [*stack.BROKER, *words, "--state", str(self.processors[0].state)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def client(self) -> httpx.Client:
        return httpx.Client(
            base_url=f"http://127.0.0.1:{self.base_url}", headers={"x-broker-token": self.token}, timeout=10, verify=False
        )

    def call(self, method: str = "GET", path: str = "/plain/items") -> httpx.Response:
        with suppress(httpx.TransportError), self.client() as client:
            return client.request(method, path)
        return httpx.Response(0)

    @contextmanager
    def load(self, callers: int = 6) -> Iterator["Load"]:
        """Calls without a pause from so many clients, for as long as the block lasts."""
        load = Load()
        threads = [threading.Thread(target=load.run, args=(self,)) for _ in range(callers)]
        for thread in threads:
            thread.start()
        try:
            stack.until(lambda: len(load.answers) > 20, 10, "calls are served")
            yield load
            load.more(20)
        finally:
            load.over.set()
            for thread in threads:
                thread.join(15)

    def close(self) -> None:
        for process in (self.envoy, *(each.process for each in self.processors)):
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
            process.kill()
            process.wait()
        self.link.cut()
        self.redis.close()
        shutil.rmtree(self.folder)


@dataclass
class Load:
    """What came of calls: when each was sent and answered, and how."""

    answers: list[tuple[float, float, httpx.Response]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def run(self, fleet: Fleet) -> None:
        end = time.monotonic() + 60
        with fleet.client() as client:
            while not self.over.is_set() and time.monotonic() < end:
                began = time.monotonic()
                try:
                    answer = client.get("/plain/items")
                except httpx.TransportError as error:
                    answer = httpx.Response(0, text=repr(error))
                self.answers.append((began, time.monotonic(), answer))

    def more(self, count: int) -> None:
        """Wait for so many more answers."""
        known = len(self.answers)
        stack.until(lambda: len(self.answers) >= known + count, 20, "calls go on")

    @property
    def statuses(self) -> Counter[int]:
        return Counter(answer.status_code for _, _, answer in self.answers)

    @property
    def failed(self) -> list[tuple[float, float, httpx.Response]]:
        return [each for each in self.answers if each[2].status_code != 200]
