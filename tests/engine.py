"""A container engine for tests: Debian's dockerd, in namespaces of its own, and a base image that debootstrap makes.

Laws: what the engine does to the network (bridges, rules, forwarding), its mounts and its processes are in namespaces that end
with it, also when the tests are killed; no engine of the machine's is used or changed. Its way out, for builds, is slirp4netns: a
process, and no rule of the host's. Where that can't be had, tests that need it skip, and say why.
"""

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import docker
import pytest

from broker.lifetimes import die_with
from tests import stack
from tests.namespaces import namespace

BASE = "broker-tests/debian:trixie"
# Program → Debian's package.
_NEEDED = {
    "debootstrap": "debootstrap",
    "docker-compose": "docker-compose",
    "dockerd": "docker.io",
    "ip": "iproute2",
    "iptables": "iptables",
    "slirp4netns": "slirp4netns",
    "unshare": "util-linux",
}
# slirp4netns(1): the name server that it offers, which asks the host's. The host's own may be on a loopback that isn't ours.
NAME_SERVER = "10.0.2.3"
_BEGIN = """
mount --make-rprivate / && mount --bind {folder}/resolv.conf /etc/resolv.conf
exec dockerd --data-root {folder}/data --exec-root {folder}/exec --pidfile {folder}/pid --host unix://{folder}/socket
"""


@dataclass(frozen=True)
class Engine:
    """One that runs. `network` is the name of the namespace in which its published ports are."""

    folder: Path
    network: str
    client: docker.DockerClient

    @property
    def url(self) -> str:
        return f"unix://{self.folder}/socket"

    def build(self, context: Path, tag: str, arguments: Mapping[str, str], dockerfile: str = "Dockerfile") -> None:
        """`docker build`; what it said is in the error of one that fails."""
        try:
            self.client.images.build(
                path=str(context), dockerfile=dockerfile, tag=tag, buildargs=dict(arguments), network_mode="host", rm=True
            )
        except docker.errors.BuildError as failed:
            said = "".join(str(line.get("stream", "")) for line in failed.build_log)
            raise AssertionError(f"{tag} can't be built: {failed}\n{said[-4000:]}") from failed

    def in_image(self, image: str, *command: str, **options: object) -> str:
        """What a command in a container of its own prints."""
        printed: bytes = self.client.containers.run(image, list(command), remove=True, **options)
        return printed.decode()


@contextmanager
def engine() -> Iterator[Engine]:
    """An engine that has the image `BASE`."""
    missing = {package for program, package in _NEEDED.items() if not shutil.which(program)}
    if missing:
        pytest.skip(f"no container engine can run here: apt-get install {' '.join(sorted(missing))}")
    with namespace("dockerd") as network, tempfile.TemporaryDirectory(prefix="engine-") as made:
        folder = Path(made)
        (folder / "resolv.conf").write_text(f"nameserver {NAME_SERVER}\n")
        with _running(folder, network) as client:
            found = Engine(folder, network, client)
            _import_base(found)
            yield found


@contextmanager
def _running(folder: Path, network: str) -> Iterator[docker.DockerClient]:
    own = functools.partial(die_with, os.getpid())
    outward = ["slirp4netns", "--configure", "--disable-host-loopback", "--netns-type=path", f"/run/netns/{network}", "tap0"]
    # As PID 1 of a namespace, so that everything in it ends with it. (`ip netns exec` would hide the control groups.)
    within = ["nsenter", f"--net=/run/netns/{network}", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with (folder / "log").open("wb") as log:
        begun = [
            subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=own)  # noqa: PLW1509 - between fork and exec it makes two system calls
            for command in (outward, [*within, "sh", "-euc", _BEGIN.format(folder=folder)])
        ]
        try:
            stack.until(
                lambda: _said(folder, "API listen on") or any(each.poll() is not None for each in begun), 30, "dockerd begins"
            )
            if any(each.poll() is not None for each in begun):
                pytest.skip(f"no container engine can run here: {(folder / 'log').read_text()[-300:]}")
            with closing(docker.DockerClient(f"unix://{folder}/socket", timeout=120)) as client:
                yield client
        finally:
            _end(begun)


def _said(folder: Path, what: str) -> bool:
    return what in (folder / "log").read_text()


def _ended(begun: list[subprocess.Popen[bytes]]) -> bool:
    return any(each.poll() is not None for each in begun)


def _end(begun: list[subprocess.Popen[bytes]]) -> None:
    """The engine in its own way, which ends containers first; what then is left, at once."""
    for child in Path(f"/proc/{begun[-1].pid}/task/{begun[-1].pid}/children").read_text().split():
        os.kill(int(child), 15)
    for each in reversed(begun):
        with suppress(subprocess.TimeoutExpired):
            each.wait(20 if each is begun[-1] else 0)
        each.kill()
        each.wait()


def _import_base(engine: Engine) -> None:
    """Debian's smallest tree, and what this machine trusts: its way to package registries may have an authority of its own."""
    tree = engine.folder / "debian"
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", "--include=ca-certificates", "trixie", str(tree)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"debootstrap can't make a base image here: {made.stdout.strip().splitlines()[-1:]}")
    for certificate in Path("/usr/local/share/ca-certificates").rglob("*.crt"):
        shutil.copy(certificate, tree / "usr/local/share/ca-certificates")
    subprocess.run(["chroot", str(tree), "update-ca-certificates"], check=True, capture_output=True)
    with suppress(FileNotFoundError):
        shutil.copy("/etc/pip.conf", tree / "etc")
    # As in Debian's own images.
    (tree / "etc/dpkg/dpkg.cfg.d/docker-apt-speedup").write_text("force-unsafe-io\n")
    name, _, tag = BASE.partition(":")
    with subprocess.Popen(["tar", "--create", "--directory", str(tree), "."], stdout=subprocess.PIPE) as packed:
        engine.client.api.import_image_from_stream(packed.stdout, repository=name, tag=tag)
    assert packed.returncode == 0
    shutil.rmtree(tree)
