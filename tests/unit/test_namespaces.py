"""Whose namespaces are whose, and what Envoy is told of them; with real namespaces' processes, and an Envoy that is played."""

import asyncio
import fcntl
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import stack
from host import WHY_NOT

from broker.dataplane.compile import Resources, Written, resources
from broker.dataplane.site import Certificates, Leaf, Site
from broker.errors import BrokerError, UsageError
from broker.identity import Person
from broker.manifest.load import load
from broker.namespaces import Namespaces

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

LEAF = Leaf("chain", "key")
CERTIFICATES = Certificates({"api.example": LEAF}, None, LEAF)
ME = Person("root")
OPERATIONS = {"items.list": {"match": {"method": "GET", "path": "/items"}, "effect": "read"}}


@pytest.fixture
def snapshot(tmp_path):
    folder = stack.write_manifests(
        tmp_path / "manifests",
        stack.tool("api", "https://api.example", OPERATIONS),
        *(stack.agent(name, {"api": {"operations": {"items.list": {}}}}) for name in ("coder", "other")),
    )
    return load(folder).snapshot


@pytest.fixture
def process():
    with apart() as made:
        yield made


@contextmanager
def apart():
    """A process in a network namespace of its own."""
    command = ["unshare", "--net", "--", sys.executable, "-c", "print('in', flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as made:
        made.stdout.readline()
        yield made
        made.kill()


class Played:
    """An Envoy that gives `verdict` to each configuration, or none where it is `...`; `told` are the names of its listeners."""

    def __init__(self, tmp_path, snapshot, verdict=None, admin="envoy"):
        (tmp_path / "run").mkdir()
        self.folder, self.verdict, self.told, self.recorded = tmp_path / "run", verdict, [], []
        self.namespaces = Namespaces(
            self.folder, tmp_path / "manifests", admin and tmp_path / admin, self._publish, self.recorded.append
        )
        site = Site(("127.0.0.1", 1), ("127.0.0.1", 2), ("/p",), "/a", "/r")
        self.base = Written.of(resources(snapshot, site, CERTIFICATES))

    def _publish(self, written):
        self.told.append(len(written.listeners) - len(self.base.listeners))
        if self.verdict is not ...:
            asyncio.get_running_loop().call_soon(self.namespaces.heard, self.verdict)

    async def join(self, agent, pid):
        return await self.namespaces.acts["POST /namespaces"]({}, {"agent": agent, "pid": pid}, ME)


def test_it_is_held_until_its_process_ends_and_then_let_go(tmp_path, snapshot, process):
    async def script():
        envoy = Played(tmp_path, snapshot)
        await envoy.namespaces.use(snapshot, CERTIFICATES, envoy.base)
        answer = await envoy.join("coder", process.pid)
        assert answer["manifests"] == str(tmp_path / "manifests")
        [link] = envoy.folder.iterdir()
        assert link.stat().st_ino == os.stat(f"/proc/{process.pid}/ns/net").st_ino  # noqa: PTH116
        # The same again is the same: a broker that was away is told so.
        assert await envoy.join("coder", process.pid) == answer
        await envoy.namespaces.use(snapshot, CERTIFICATES, envoy.base)
        # Two doors of its own, and the listener that all namespaces share.
        assert envoy.told == [0, 3, 3]
        process.kill()
        while len(envoy.told) < 4:  # noqa: ASYNC110 - the loop's own event brings it
            await asyncio.sleep(0.01)
        assert envoy.told[-1] == 0
        assert list(envoy.folder.iterdir()) == []
        assert envoy.recorded == [f"namespace {answer['namespace']} is coder's"]
        assert envoy.namespaces.has_ended(answer["namespace"])
        assert not envoy.namespaces.has_ended("another")

    asyncio.run(script())


def test_where_envoy_has_other_processors_there_are_none(tmp_path, snapshot, process):
    async def script():
        envoy = Played(tmp_path, snapshot, admin=None)
        await envoy.namespaces.use(snapshot, CERTIFICATES, envoy.base)
        with pytest.raises(ValueError, match="this Envoy has other processors too"):
            await envoy.join("coder", process.pid)
        await envoy.namespaces.look()
        assert envoy.told == [0]

    asyncio.run(script())


def test_each_is_entered_in_its_turn_once_its_doors_are_open_and_until_it_ends(tmp_path, snapshot, process, monkeypatch):
    monkeypatch.setattr("broker.namespaces._SETTLED_S", 0.0)

    async def script():
        envoy = Played(tmp_path, snapshot)
        held = envoy.namespaces.in_turn
        await envoy.namespaces.use(snapshot, CERTIFICATES, envoy.base)
        assert held() is None
        with apart() as other:
            await envoy.join("coder", process.pid)
            await envoy.join("other", other.pid)
            found = [held() for _ in range(4)]
            assert [each.namespace.agent for each in found] == ["coder", "other"] * 2
            for each, within in zip(found, (process, other), strict=False):
                with each.socket() as made:
                    # SIOCGSKNS (Linux, include/uapi/linux/sockios.h): the namespace that a socket is in.
                    descriptor = fcntl.ioctl(made.fileno(), 0x894C)
                assert os.fstat(descriptor).st_ino == os.stat(f"/proc/{within.pid}/ns/net").st_ino  # noqa: PTH116
                os.close(descriptor)
        while not found[1].ended:  # noqa: ASYNC110 - the loop's own event brings it
            await asyncio.sleep(0.01)
        assert [held().namespace.agent for _ in range(2)] == ["coder"] * 2
        with pytest.raises(OSError, match="can't be entered"):
            found[1].socket()
        monkeypatch.setattr("broker.namespaces._SETTLED_S", 60.0)
        assert held() is None

    asyncio.run(script())


@pytest.mark.parametrize("verdict", ["it can't", ...], ids=["refused", "no answer"])
def test_where_envoy_does_not_listen_nothing_stays(tmp_path, snapshot, process, verdict, monkeypatch):
    monkeypatch.setattr("broker.namespaces._PATIENCE_S", 0.05)

    async def script():
        envoy = Played(tmp_path, snapshot, verdict)
        await envoy.namespaces.use(snapshot, CERTIFICATES, envoy.base)
        with pytest.raises(BrokerError, match=r"does not listen in this namespace: (it can't|no answer)"):
            await envoy.join("coder", process.pid)
        assert envoy.told == [0, 3, 0]
        assert (list(envoy.folder.iterdir()), envoy.recorded) == ([], [])

    asyncio.run(script())


def test_one_that_is_shut_stays_so_whoever_it_is_given_to(tmp_path, process, monkeypatch):
    (tmp_path / "netns").mkdir()
    (tmp_path / "netns" / "build-7").symlink_to(f"/proc/{process.pid}/ns/net")
    monkeypatch.setattr("broker.namespaces.NAMED", tmp_path / "netns")
    tool = stack.tool("api", "https://api.example", OPERATIONS)
    granted = {"api": {"operations": {"items.list": {}}}}
    before, after = (
        load(stack.write_manifests(tmp_path / name, tool, stack.agent(name, granted, identity={"namespace": "build-7"}))).snapshot
        for name in ("coder", "other")
    )

    async def script():
        envoy = Played(tmp_path, before)
        await envoy.namespaces.use(before, CERTIFICATES, envoy.base)
        await asyncio.sleep(0)
        await envoy.namespaces.look()
        assert envoy.told == [0, 3]
        [held] = envoy.namespaces._held.values()
        held.shut = True
        await envoy.namespaces.use(after, CERTIFICATES, envoy.base)
        await envoy.namespaces.look()
        assert envoy.told == [0, 3, 1]

    asyncio.run(script())


def test_what_is_no_agents_to_have_is_refused(tmp_path, snapshot, process):
    async def script():
        envoy = Played(tmp_path, snapshot)
        await envoy.namespaces.use(snapshot, CERTIFICATES, envoy.base)
        for agent, pid, error, words in (
            ("ghost", process.pid, UsageError, "no manifest names an agent 'ghost'"),
            ("coder", os.getpid(), ValueError, "own network namespace"),
            ("coder", 0, UsageError, "can't be opened"),
            ("coder", "self", UsageError, "can't be opened"),
            ("coder", 1 << 40, UsageError, "can't be opened"),
        ):
            with pytest.raises(error, match=words):
                await envoy.join(agent, pid)
        await envoy.join("coder", process.pid)
        with pytest.raises(ValueError, match="is coder's already"):
            await envoy.join("other", process.pid)

    asyncio.run(script())


def test_what_a_killed_broker_left_is_removed_at_the_start(tmp_path, snapshot):
    (tmp_path / "left").mkdir()
    (tmp_path / "left/namespace-0").symlink_to("/proc/1/fd/99999")
    Namespaces(tmp_path / "left", tmp_path, tmp_path / "envoy", lambda _: None, print)
    assert list((tmp_path / "left").iterdir()) == []
    assert Written.of(Resources([], [], [])) == Written((), (), ())
