"""Network namespaces whose processes are an agent's, and the doors that Envoy has inside them.

Laws: the broker's own namespace is nobody's, and no namespace is two agents'. It is held open here by a descriptor, so that no
other can stand in its place, and let go when the process that brought it ends; a broker that starts knows of none. Whoever brings
one is answered when Envoy listens in it, or has said why not. One that others made (`identity.namespace`) is found by its name,
and let go when that name is gone or another's.

An Envoy that can't listen somewhere stays in that namespace with what it does next (as of 1.40), and would look for tools there:
it is ended, and the namespace gets no doors any more.
"""

import asyncio
import contextlib
import ctypes
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from broker.admin.api import Act
from broker.containment.sinks import sink_references
from broker.credentials.base import references
from broker.dataplane.compile import Written, doors_of, shared_by_namespaces
from broker.dataplane.site import Certificates, Leaf, Namespace
from broker.errors import BrokerError, UsageError
from broker.policy.snapshot import EMPTY, PolicySnapshot

log = logging.getLogger(__name__)

_AS_ROOT = "run `broker up` as root, on the same machine"
_PATIENCE_S = 4.0  # less than who asks waits; Envoy answers within milliseconds, or a second while it is started again


NAMED = Path("/run/netns")
"""Where ip-netns(8) keeps them, by name."""
_LOOK_S = 1.0
_DRAINED_S = 1200.0  # twice as long as Envoy keeps the connections of a listener that is gone

_NOTHING = Written((), (), ())
_CLONE_NEWNET = 0x40000000
_SETTLED_S = 1.0  # Envoy has taken the doors' configuration; milliseconds later it listens


class _NoAnswerError(BrokerError):
    """Envoy says nothing."""


@dataclass(slots=True)
class Held:
    """A namespace by its `inode`, which no two have at a time. `descriptor` keeps it.

    A process brought it, whose pidfd is `process`, or it is found by its name. `joined` is when Envoy took its doors, by
    the loop's clock, 0 before; `shut` says that it gets none any more, `ended` that it has been let go.
    """

    namespace: Namespace
    inode: int
    descriptor: int
    process: int | None
    doors: Written = _NOTHING
    joined: float = 0.0
    shut: bool = False
    ended: bool = False

    def socket(self) -> socket.socket:
        """For TCP over IPv4, in the namespace: it stays where it was made (network_namespaces(7)). Raises `OSError`."""
        made: list[socket.socket] = []

        def make() -> None:  # in a thread of its own, for no other work may find itself in there
            if ctypes.CDLL(None).setns(self.descriptor, _CLONE_NEWNET) == 0:
                made.append(socket.socket())

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        if not made:
            raise OSError(f"namespace {self.namespace.key} can't be entered")
        made[0].setblocking(False)  # noqa: FBT003 - the library's
        return made[0]


class Namespaces:
    """The namespaces there are. `publish` has Envoy told of all of its configuration, `record` writes down what was done.

    `folder` is where Envoy finds them, `manifests` what those inside must not change. `envoy` is the socket of Envoy's admin API;
    where Envoy has other processors too, None, and then there are no namespaces: only one of them would know.
    """

    def __init__(
        self, folder: Path, manifests: Path, envoy: Path | None, publish: Callable[[Written], None], record: Callable[[str], None]
    ) -> None:
        self._folder, self._manifests, self._publish, self._record = folder, str(manifests.resolve()), publish, record
        self._admin = envoy
        self._snapshot, self._certificates = EMPTY, Certificates({}, None, Leaf("", ""))
        self._base = self._shared = _NOTHING
        self._held: dict[int, Held] = {}
        for left in folder.glob(f"{_LINK}*"):
            left.unlink()
        self._changing = asyncio.Lock()
        self._verdict: asyncio.Future[str | None] | None = None
        self._envoy = False  # whether there was one
        self._refused: dict[str, int] = {}  # the inodes of those, by name, that are not tried again
        self._gone: dict[str, float] = {}  # when each ended, by its key and the loop's clock

    async def use(self, snapshot: PolicySnapshot, certificates: Certificates, base: Written) -> None:
        """Make this the configuration, with each namespace's doors as it has them."""
        async with self._changing:
            shared = await _shared(snapshot, certificates) if self._held else _NOTHING
            # In one step: whoever is let go meanwhile has all of the old configuration published, or all of this.
            self._snapshot, self._certificates, self._base, self._shared = snapshot, certificates, base, shared
            for held in self._held.values():
                held.doors = _NOTHING if held.shut else Written.of(doors_of(snapshot, held.namespace))
            self._publish_all()

    def heard(self, error: str | None) -> None:
        """Envoy has taken the newest configuration, or refused one in these words."""
        self._envoy = self._envoy or error is None
        if error and self._held:
            self._end_stray_envoy()
        if self._verdict and not self._verdict.done():
            self._verdict.set_result(error)

    def _end_stray_envoy(self) -> None:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as admin:  # it has ended by itself
            admin.connect(str(self._admin))
            pid = int.from_bytes(admin.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4), sys.byteorder)
            there = {path.stat().st_ino for path in Path(f"/proc/{pid}/task").glob("*/ns/net")}
            if not (strayed := there & self._held.keys()):
                return
            os.kill(pid, signal.SIGKILL)
            for held in map(self._held.__getitem__, strayed):
                held.doors, held.shut = _NOTHING, True
                log.error("Envoy is left in the namespace %s, and is ended", held.namespace.key)
                self._record(f"namespace {held.namespace.key} of {held.namespace.agent}'s is shut: Envoy could not listen there")
            self._publish_all()

    def in_turn(self) -> Held | None:
        """One whose doors are open, each time another."""
        before = asyncio.get_running_loop().time() - _SETTLED_S
        found = next((held for held in self._held.values() if 0 < held.joined < before and not held.shut), None)
        if found:
            self._held[found.inode] = self._held.pop(found.inode)  # to the end
        return found

    @property
    def acts(self) -> Mapping[str, Act]:
        """What is asked over the control socket."""
        return {"POST /namespaces": self._join}

    async def _join(self, _path: Mapping[str, str], said: Mapping[str, object], _who: object) -> dict[str, object]:
        agent, pid = str(said.get("agent")), said.get("pid")
        if self._admin is None:
            raise ValueError("this Envoy has other processors too, which would not know of it; use a broker of `broker up`")
        if agent not in self._snapshot.agents:
            raise UsageError(f"no manifest names an agent {agent!r}", "see `broker agents list`")
        async with self._changing:
            held = self._brought(agent, pid if isinstance(pid, int) else 0)
            if held.shut:
                raise ValueError("Envoy could not listen in this namespace before, so it stays shut")
            if not held.joined:
                await self._open(held)
        return self._told(held)

    async def _open(self, held: Held) -> None:
        kind: type[BrokerError] = BrokerError
        try:
            error = await self._opened(held)
        except TimeoutError:
            kind, error = _NoAnswerError, f"no answer within {_PATIENCE_S:.0f} s"
        if error:
            self._release(held)
            raise kind(f"Envoy does not listen in this namespace: {' '.join(error.split())}", _AS_ROOT)
        held.joined = asyncio.get_running_loop().time()
        what = f"namespace {held.namespace.name or held.namespace.key} is {held.namespace.agent}'s"
        log.info(what)
        self._record(what)

    async def watch(self) -> None:
        """Look for ever for the namespaces that agents have by name."""
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self.look()
            except Exception:  # a fault of ours: the next look must follow
                log.exception("the namespaces in %s could not be looked at", NAMED)

    async def look(self) -> None:
        """Open doors in the namespaces that agents have by name, and let go of those that are gone or another's."""
        if self._admin is None or not self._envoy:
            return
        async with self._changing:
            wanted = {agent.namespace: agent.name for agent in self._snapshot.agents.values() if agent.namespace}
            there = {name: inode for name in wanted if (inode := _inode(NAMED / name))}
            self._refused = {name: inode for name, inode in self._refused.items() if there.get(name) == inode}
            for held in [held for held in self._held.values() if held.namespace.name]:
                if there.get(held.namespace.name) != held.inode:
                    self._release(held)
                elif wanted[held.namespace.name] != held.namespace.agent and not held.shut:
                    await self._pass_on(held, wanted[held.namespace.name])
            known = {held.namespace.name for held in self._held.values()} | self._refused.keys()
            for name in sorted(there.keys() - known):
                await self._find(name, wanted[name], there[name])

    async def _pass_on(self, held: Held, agent: str) -> None:
        """The same doors, by the same path: Envoy can't open others where it still lets these go."""
        held.namespace = replace(held.namespace, agent=agent)
        await self._open(held)

    async def _find(self, name: str, agent: str, inode: int) -> None:
        try:
            with contextlib.ExitStack() as opened:
                descriptor = _kept(opened, os.open(NAMED / name, os.O_RDONLY | os.O_CLOEXEC))
                held = self._hold(agent, descriptor, named=name)
                opened.pop_all()
            await self._open(held)
        except _NoAnswerError:
            return  # it is started again, maybe; the next look tries once more
        except (OSError, ValueError, BrokerError) as error:
            self._refused[name] = inode
            what = f"namespace {name} of {agent}'s gets no doors: {error}"
            log.error("%s", what)  # noqa: TRY400 - it says all there is
            self._record(what)

    def _told(self, held: Held) -> dict[str, object]:
        return {"namespace": held.namespace.key, "manifests": self._manifests, "secrets": _secrets(self._snapshot)}

    def _brought(self, agent: str, pid: int) -> Held:
        with contextlib.ExitStack() as opened:
            try:
                process = _kept(opened, os.pidfd_open(pid))
                descriptor = _kept(opened, os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC))
                signal.pidfd_send_signal(process, 0)  # so both are the same process's: a number is used again
            except (OSError, OverflowError) as error:
                raise UsageError(f"the namespace of process {pid} can't be opened ({error})", _AS_ROOT) from error
            known = self._held.get(os.fstat(descriptor).st_ino)
            if known and known.namespace.agent == agent:
                return known
            held = self._hold(agent, descriptor, process)
            opened.pop_all()
        asyncio.get_running_loop().add_reader(process, self._release, held)
        return held

    def _hold(self, agent: str, descriptor: int, process: int | None = None, named: str = "") -> Held:
        inode = os.fstat(descriptor).st_ino
        if inode == Path("/proc/self/ns/net").stat().st_ino:
            raise ValueError("this is the broker's own network namespace; an agent needs one of its own")
        if known := self._held.get(inode):
            raise ValueError(f"this namespace is {known.namespace.agent}'s already")
        key = secrets.token_hex(4)
        # A path that no other namespace had before: Envoy takes over the sockets of a listener that ended, by their address.
        path = self._folder / f"{_LINK}{key}"
        path.symlink_to(f"/proc/{os.getpid()}/fd/{descriptor}")
        namespace = Namespace(key, agent, str(path), name=named, ipv6=Path("/proc/net/if_inet6").exists())
        held = Held(namespace, inode, descriptor, process)
        self._held[inode] = held
        return held

    async def _opened(self, held: Held) -> str | None:
        """Have Envoy open the doors; its words where it does not. Raises `TimeoutError` where it says nothing."""
        if self._shared is _NOTHING:
            self._shared = await _shared(self._snapshot, self._certificates)
        held.doors = Written.of(doors_of(self._snapshot, held.namespace))
        self._verdict = asyncio.get_running_loop().create_future()
        self._publish_all()
        refused = await asyncio.wait_for(self._verdict, _PATIENCE_S)
        return refused if held.inode in self._held else "its process has ended"

    def _release(self, held: Held) -> None:
        """The process that brought it has ended, and with it all that was in it; or its name is gone; or Envoy refused it."""
        if self._held.pop(held.inode, None) is None:
            return
        held.ended = True
        now = asyncio.get_running_loop().time()
        self._gone = {key: at for key, at in self._gone.items() if at > now - _DRAINED_S} | {held.namespace.key: now}
        self._publish_all()
        Path(held.namespace.path).unlink(missing_ok=True)
        if held.process is not None:
            asyncio.get_running_loop().remove_reader(held.process)
            os.close(held.process)
        os.close(held.descriptor)
        log.info("namespace %s has ended", held.namespace.key)

    def has_ended(self, key: str) -> bool:
        """Whether a namespace was let go. What was connected in it stays so for a while, for whoever got hold of a socket."""
        return key in self._gone

    def _publish_all(self) -> None:
        self._publish(Written.all(*self._parts()))

    def _parts(self) -> Iterator[Written]:
        yield self._base
        if self._held:
            yield self._shared
            for held in self._held.values():
                yield held.doors


def _secrets(snapshot: PolicySnapshot) -> Mapping[str, list[str]]:
    """Where the secrets of tools and alerts are: the names of variables as `env`, and paths as `file`."""
    known = {(kind, where) for kind, where, _ in references(snapshot.tools.values())}
    known |= {pair for reference in sink_references(snapshot.alerting) for pair in reference.items()}
    return {kind: sorted(where for source, where in known if source == kind) for kind in ("env", "file")}


def _inode(path: Path) -> int:
    """0 where nothing is."""
    with contextlib.suppress(OSError):
        return path.stat().st_ino
    return 0


_LINK = "namespace-"


async def _shared(snapshot: PolicySnapshot, certificates: Certificates) -> Written:
    return await asyncio.to_thread(lambda: Written.of(shared_by_namespaces(snapshot, certificates)))


def _kept(opened: contextlib.ExitStack, descriptor: int) -> int:
    opened.callback(os.close, descriptor)
    return descriptor
