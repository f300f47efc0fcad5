"""The pod of `broker render kubernetes`, without Kubernetes: its own commands, environment, user and mounts.

Each container gets a read-only root of its own in a mount namespace, no capability, and the volumes as a kubelet lays them: a
ConfigMap as links into a folder that is turned over whole, a Secret readable by the group, an emptyDir of root's.
"""

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml

from broker.cli.main import _run
from tests import stack
from tests.namespaces import namespace, within

ROOT = Path(__file__).parents[2]
IDENTITY = 10001
_numbers = count()
# What an image has at places of its own: wherever the tests' Python lies, a volume may be mounted over that.
_PROGRAMS = {"python": "", "broker": "-m broker.cli", "envoy": "/python/bin/envoy"}
_TOOL = """{apiVersion: broker/v1, kind: Tool, metadata: {name: shop, owner: web}, spec: {protocol: rest,
endpoint: "https://shop.example", operations: {list: {match: {method: GET, path: /}, effect: read}}}}
"""
_AGENT = """{apiVersion: broker/v1, kind: Agent, metadata: {name: NAME, owner: web}, spec: {identity: {token: true},
tools: {shop: {operations: {list: {}}}}}}
"""


@dataclass
class Pod:
    """One pod as its StatefulSet describes it, in `folder`."""

    spec: dict[str, Any]
    folder: Path
    network: str
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def _command(self, container: dict[str, Any]) -> list[str]:
        """A shell's work: the root, the volumes, then the command as its user."""
        root = self.folder / "roots" / str(next(_numbers))
        (root / "changed").mkdir(parents=True)
        lines = [
            f"mount -t tmpfs tmpfs {root / 'changed'}",
            f"mkdir {root}/changed/upper {root}/changed/work {root}/root",
            f"mount -t overlay overlay -o lowerdir=/,upperdir={root}/changed/upper,workdir={root}/changed/work {root}/root",
            f"cd {root / 'root'}",
            f"mkdir -p product python programs && mount --bind {shlex.quote(str(ROOT))} product",
            f"mount --bind {shlex.quote(sys.prefix)} python && mount --bind {self.folder}/programs programs",
            # Where a test's Python may lie; an image has it where all may read.
            "chmod a+rx root tmp 2>/dev/null || true",
            "mount --rbind /proc proc && mount --rbind /dev dev",
            # The kubelet's mounts, those of outer folders first.
            *(self._mount(each) for each in sorted(container["volumeMounts"], key=lambda each: each["mountPath"])),
            "mount -o remount,ro .",
            " ".join(["exec chroot . setpriv", *self._user(container), *map(shlex.quote, container["command"])]),
        ]
        return ["ip", "netns", "exec", self.network, "unshare", "--mount", "sh", "-euc", "\n".join(lines)]

    def _mount(self, mount: dict[str, Any]) -> str:
        source = self.folder / "volumes" / mount["name"] / mount.get("subPath", "")
        at = mount["mountPath"].removeprefix("/")
        return f"mkdir -p {at} && mount --bind {source} {at}" + (
            f" && mount -o remount,bind,ro {at}" if mount.get("readOnly") else ""
        )

    def _user(self, container: dict[str, Any]) -> list[str]:
        context = self.spec["securityContext"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        return [
            f"--reuid={context['runAsUser']}",
            f"--regid={context['runAsGroup']}",
            f"--groups={context['fsGroup']}",
            "--no-new-privs",
            "--bounding-set=-all",
            "--inh-caps=-all",
        ]

    def _environment(self) -> dict[str, str]:
        return {"PATH": "/programs:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": "/product", "PYTHONDONTWRITEBYTECODE": "1"}

    def run(self, container: dict[str, Any]) -> subprocess.Popen[bytes]:
        made = subprocess.Popen(self._command(container), env=self._environment(), cwd="/")
        self.running.append(made)
        return made

    def inside(self, container: dict[str, Any], command: list[str]) -> subprocess.CompletedProcess[bytes]:
        """As `kubectl exec`, and as a preStop hook, runs it: in the same mounts."""
        return subprocess.run(
            self._command({**container, "command": command}), env=self._environment(), cwd="/", check=False, capture_output=True
        )

    def lay(self, name: str, files: dict[str, bytes], mode: int, version: str = "..1") -> None:
        """A ConfigMap or Secret as the kubelet lays it; laid again, `..data` is turned over in one step."""
        volume = self.folder / "volumes" / name
        for path, content in files.items():
            at = volume / version / path
            at.parent.mkdir(parents=True, exist_ok=True)
            at.write_bytes(content)
            at.chmod(mode)
            os.chown(at, 0, IDENTITY)
            with suppress(FileExistsError):
                (volume / Path(path).parts[0]).symlink_to(f"..data/{Path(path).parts[0]}")
        (volume / "..data_tmp").symlink_to(version)
        (volume / "..data_tmp").rename(volume / "..data")

    def connect(self, port: int) -> socket.socket:
        return within(self.network, lambda: socket.create_connection(("127.0.0.1", port), 5))

    def ask(self, path: str) -> tuple[int, Any]:
        with suppress(OSError), closing(HTTPConnection("127.0.0.1")) as asked:
            asked.sock = self.connect(15003)
            asked.request("GET", path)
            answer = asked.getresponse()
            return answer.status, json.load(answer)
        return 0, {}

    def stop(self) -> None:
        for each in self.running:
            each.kill()
            each.wait()


def _keys(folder: Path) -> dict[str, bytes]:
    """The fleet's keys, as the README has them made: by a broker that ran once."""
    made = {"ca.pem": (folder / "ca.pem").read_bytes()}
    return made | {name: (folder / "keys" / name).read_bytes() for name in ("ca.key", "jwt.key", "tokens.key")}


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    with namespace("unshare", "setpriv", "chroot") as network:
        made = _laid(tmp_path_factory.mktemp("pod"), network)
        yield made
        made.stop()


def _laid(folder: Path, network: str) -> Pod:
    (folder / "programs").mkdir()
    for name, arguments in _PROGRAMS.items():
        (folder / "programs" / name).write_text(f'#!/bin/sh\nexec /python/bin/python {arguments} "$@"\n')
        (folder / "programs" / name).chmod(0o755)
    for name in ("state", "run", "tmp"):
        (folder / "volumes" / name).mkdir(parents=True)
        os.chown(folder / "volumes" / name, 0, IDENTITY)
        (folder / "volumes" / name).chmod(0o2777)
    manifests = folder / "manifests"
    (manifests / "tools").mkdir(parents=True)
    (manifests / "agents").mkdir()
    (manifests / "tools/shop.yaml").write_text(_TOOL)
    (manifests / "agents/bot.yaml").write_text(_AGENT.replace("NAME", "bot"))
    assert _run(["render", "kubernetes", str(manifests), "--replicas", "1", "--output", str(folder / "base")]) == 0
    resources = {each["kind"]: each for each in yaml.safe_load_all((folder / "base/broker.yaml").read_text())}
    made = Pod(resources["StatefulSet"]["spec"]["template"]["spec"], folder, network)
    placed = next(each["configMap"]["items"] for each in made.spec["volumes"] if each["name"] == "manifests")
    made.lay("manifests", {each["path"]: (manifests / each["path"]).read_bytes() for each in placed}, 0o644)
    made.lay("bootstrap", {name: text.encode() for name, text in resources["ConfigMap"]["data"].items()}, 0o644)
    once = stack.Broker(manifests, folder / "once", {})
    once.stop()
    made.lay("keys", _keys(folder / "once"), 0o440)
    return made


@pytest.mark.envoy
@pytest.mark.slow
def test_the_pod_serves_reloads_and_drains_as_it_is_rendered(pod):
    (prepare,), (processor, envoy) = pod.spec["initContainers"], pod.spec["containers"]
    assert pod.run(prepare).wait() == 0
    processing, carrying = pod.run(processor), pod.run(envoy)
    stack.until(lambda: pod.ask("/readyz")[0] == 200, 60, "the pod is ready")
    assert pod.ask("/healthz") == (200, {"status": "ok"})
    state = pod.folder / "volumes" / "state"
    assert {path.name for path in (state / "keys").iterdir()} >= {"ca.key", "audit.key", "tokens.key"}
    assert all(path.stat().st_uid == IDENTITY for path in state.rglob("*") if path.name != "run")
    assert (state / "ca.pem").read_bytes() == (pod.folder / "once" / "ca.pem").read_bytes()
    for port in (15001, 15002):
        with pod.connect(port) as door:
            door.sendall(b"GET http://shop.example/ HTTP/1.1\r\nhost: shop.example\r\n\r\n")
            assert door.recv(100).startswith(b"HTTP/1.1 40")
    # A ConfigMap that changed is in force without a new pod.
    before = pod.ask("/readyz")[1]["revision"]
    changed = {"agents/bot.yaml": _AGENT.replace("NAME", "clerk").encode(), "tools/shop.yaml": _TOOL.encode()}
    pod.lay("manifests", changed, 0o644, "..2")
    stack.until(lambda: pod.ask("/readyz")[1].get("revision", before) != before, 20, "the new manifests are in force")
    # An agent's token, taken as the README has it, opens the door; the call is decided and recorded here, and goes nowhere.
    token = pod.inside(processor, ["broker", "token", "clerk", "--state", "/var/lib/broker"]).stdout.decode().strip()
    with closing(HTTPConnection("127.0.0.1")) as call:
        call.sock = pod.connect(15002)
        call.request("GET", "/shop/", headers={"x-broker-token": token})
        assert call.getresponse().status == 503
    recorded = [json.loads(line) for path in sorted((state / "audit").glob("*.jsonl")) for line in path.read_text().splitlines()]
    decisions = [(each["agent"].get("name"), each["verdict"]) for each in recorded if each["event"] == "decision"]
    assert decisions[-1] == ("clerk", "allow")
    # Started again, each on its own, as the kubelet does; and on a volume that was opened to the pod's group meanwhile.
    for container, one in ((processor, processing), (envoy, carrying)):
        one.kill()
        one.wait()
        (state / "keys" / "audit.key").chmod(0o660)
        assert pod.run(prepare).wait() == 0
        pod.run(container)
        stack.until(lambda: pod.ask("/readyz")[0] == 200, 60, f"{container['name']} is ready again")
    hook = envoy["lifecycle"]["preStop"]["exec"]["command"]
    drained = pod.inside(envoy, hook)
    assert (drained.returncode, drained.stderr) == (0, b"")
