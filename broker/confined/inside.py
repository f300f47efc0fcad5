"""Process 1 of the command's namespaces: makes its network and its view of the machine, starts it, and ends with its code.

    python -I -S inside.py TOLD TELLING    (two inherited descriptors)

It is told the plan, tells its process ID, and is told what must not be changed once the doors are open; each a line of JSON.

Laws: nothing but the standard library is imported, so that it starts in milliseconds. The command starts with no capability, and
no way to get one (no_new_privs), only after the word has come that the doors are open. Where anything fails, it does not start.
"""

import contextlib
import ctypes
import errno
import json
import os
import re
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

# mount(2), and mount_setattr(2), which alone changes a whole tree at once.
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC = 1, 2, 4, 8, 32, 4096, 16384
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000

_IPV6 = Path("/proc/net/if_inet6")
_NETWORK = """link set lo up
route add local default dev lo table local
route add default dev lo
"""
# Unix sockets that lead out lie here (D-Bus, containers, terminals, agents for keys), as do the broker's own.
_HIDDEN = {"/run": "755", "/tmp": "1777", "/var/tmp": "1777", "/dev/shm": "1777"}  # noqa: S108
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
# By architecture: its AUDIT_ARCH, and its numbers of system calls (Linux, include/uapi/linux/audit.h, asm/unistd.h).
# `keys`: add_key(2), request_key(2), keyctl(2); keyrings are the user's in every network namespace, and a request may ask DNS.
# `modes`: chmod(2), fchmod(2), creat(2), mknod(2), fchmodat(2), mknodat(2), with the argument that is a mode; `opens`: open(2),
# openat(2), with the argument that is flags, before the mode.
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_NUMBERS: dict[str, dict[str, Any]] = {
    "x86_64": {
        "socket": 41, "ioctl": 16, "clone": 56, "unshare": 272, "setns": 308, "keys": (248, 249, 250),
        "modes": {90: 1, 91: 1, 85: 1, 133: 1, 268: 2, 259: 2}, "opens": {2: 1, 257: 2},
    },
    "aarch64": {
        "socket": 198, "ioctl": 29, "clone": 220, "unshare": 97, "setns": 268, "keys": (217, 218, 219),
        "modes": {52: 1, 53: 2, 33: 2}, "opens": {56: 2},
    },
}  # fmt: skip
_FCHMODAT2, _OPENAT2 = 452, 437  # the latter's mode lies in memory; who uses it knows kernels without it
_MAKING = 0x400040  # O_CREAT, or O_TMPFILE's own bit: else there is no mode, but whatever was in its place
_IO_URING_SETUP = 425  # makes sockets without socket(2)
_CLONE3 = 435  # its flags lie in memory, where no filter can read them; libc then takes clone(2)
# Of all flags for new namespaces: in a user namespace the command would have every capability, and could mount what is hidden.
_NAMESPACES = 0x7E020000
_X32 = 0x40000000  # numbers of another ABI of x86_64
# The rest is not bound to a network namespace (vsock reaches the host of a virtual machine), or nobody's need.
_FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C  # type into the terminal, or paste there, for the caller's shell to run
_LOAD, _EQUAL, _AT_LEAST, _ANY_OF, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
# By these root, also without capabilities, has the kernel do things; and others, in control groups that they were given.
_KERNEL = ("/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus", "/proc/fs", "/proc/scsi", "/proc/acpi", "/sys")
_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem", "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
)  # fmt: skip
_OPEN_S = 10.0
_DNS = 53
_QUERY = bytes(12)  # RFC 1035 section 4.1.1: a header without a question, which is answered and stands in no record
_FORWARDED = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGCONT,
)  # fmt: skip
_KEYBOARD = (signal.SIGINT, signal.SIGQUIT)
_ASKING = (signal.SIGTTIN, signal.SIGTTOU)
_FAULT = 3

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    """Run, as the module says. Gives the command's exit code, 128 + n for the signal n."""
    told, telling = (os.fdopen(int(number), mode) for number, mode in zip(sys.argv[1:], ("r", "w"), strict=True))
    for pipe in (told, telling):
        os.set_inheritable(pipe.fileno(), False)  # noqa: FBT003 - the library's
    plan = json.loads(told.readline())
    # The proc that is still the host's knows this process by its number there.
    pid = int(os.readlink("/proc/self"))
    _network()
    print(json.dumps({"pid": pid}), file=telling, flush=True)
    _view(plan)
    if not (word := told.readline()):
        return _FAULT  # whoever would have said that the doors are open has ended
    known = json.loads(word)
    _pin([*plan["hidden"], *known["readonly"], *known["masked"]], plan["user"][0])
    for path in filter(os.path.exists, known["readonly"]):
        _mount(path, path, flags=_BIND | _REC)
        _set_readonly(path, on=True)
    for path in filter(os.path.exists, (*known["masked"], *known["sockets"])):
        _mount("/dev/null", path, flags=_BIND)
    for name in known["without"]:
        plan["environment"].pop(name, None)
    os.chdir(plan["directory"])  # not into what was there before a mount
    _await_doors(plan["doors"])
    signal.pthread_sigmask(signal.SIG_BLOCK, {*_FORWARDED, signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        _become(plan)
    told.close()
    telling.close()
    return _attend(child, terminal=plan["terminal"])


def _network() -> None:
    subprocess.run(["ip", "-batch", "-"], input=_NETWORK, text=True, check=True)  # noqa: S607 - found in PATH before
    if _IPV6.exists():
        subprocess.run(["ip", "-6", "-batch", "-"], input=_NETWORK, text=True, check=True)  # noqa: S607


# The view.


def _view(plan: dict[str, Any]) -> None:
    keep = {path: os.open(path, os.O_PATH) for path in plan["writable"]}
    if plan["user"][0] == 0:
        # Root's files are root's also without capabilities: programs that others start, disks, the kernel's own files.
        for path in keep:
            _mount(path, path, flags=_BIND | _REC)
            keep[path] = os.open(path, os.O_PATH)
        _set_readonly("/", on=True)
        for path in keep:
            _set_readonly(path, on=False)
    _devices()
    _mount("proc", "/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    for path in _processes():
        _empty(path, "755")
    for path in filter(os.path.exists, _KERNEL):
        _mount(path, path, flags=_BIND | _REC)
        _set_readonly(path, on=True)
    for path, mode in _HIDDEN.items():
        _empty(path, mode)
    _restore(keep)
    for path in plan["hidden"]:
        _empty(path, "755")
    _trust(plan["ca"])
    _names()


def _pin(paths: list[str], uid: int) -> None:
    """No folder on the way to these may be renamed and another put there: what is mounted on can't be (rename(2): EBUSY)."""
    # Each once, from the root on: with it all that is mounted below is mounted again.
    above = {folder for path in paths for folder in Path(path).parents}
    for folder in sorted(above, key=lambda folder: len(folder.parts))[1:]:
        if folder.is_dir() and _may_write(folder.parent, uid):
            _mount(str(folder), str(folder), flags=_BIND | _REC)


def _may_write(folder: Path, uid: int) -> bool:
    """Whether the command may, or others beside the owner; where there is an ACL, the group's bits are its mask (acl(5))."""
    status = folder.stat()
    written = uid in (0, status.st_uid) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return bool(written) and not os.statvfs(folder).f_flag & os.ST_RDONLY


def _processes() -> list[str]:
    """Where else the host's processes are shown (a chroot's proc): by their `root` there is a way to all that is hidden."""
    mounts = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())  # proc(5)
    shown = (fields[4] for fields in mounts if fields[fields.index("-") + 1] == "proc" and fields[4] != "/proc")
    return [re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path) for path in shown]


def _restore(kept: dict[str, int]) -> None:
    """Folders that lie in one that is hidden now, by the descriptors that were opened before."""
    for path, descriptor in kept.items():
        if not os.path.exists(path):
            Path(path).mkdir(parents=True)
            _mount(f"/proc/self/fd/{descriptor}", path, flags=_BIND | _REC)
        os.close(descriptor)


def _devices() -> None:
    """A /dev with what programs need and no disk in it."""
    nodes = {name: os.open(f"/dev/{name}", os.O_PATH) for name in _DEVICES}
    _mount("tmpfs", "/dev", "tmpfs", _NOSUID | _NOEXEC, "mode=755")
    for name, descriptor in nodes.items():
        Path("/dev", name).touch()
        _mount(f"/proc/self/fd/{descriptor}", f"/dev/{name}", flags=_BIND)
        os.close(descriptor)
    for name in ("pts", "shm"):
        Path("/dev", name).mkdir()
    _mount("devpts", "/dev/pts", "devpts", _NOSUID | _NOEXEC, "newinstance,ptmxmode=0666,mode=620")
    links = {"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1"}
    for name, target in {**links, "stderr": "/proc/self/fd/2"}.items():
        Path("/dev", name).symlink_to(target)


def _trust(ca: str) -> None:
    """The broker's CA, and nobody else's: everything that answers is Envoy."""
    bundle = Path("/run/broker/ca.pem")
    bundle.parent.mkdir()
    bundle.write_text(ca)
    known = {os.path.realpath(path) for path in _BUNDLES if os.path.exists(path)}
    if os.path.isdir("/etc/ssl/certs"):
        _empty("/etc/ssl/certs", "755")
        Path(_BUNDLES[0]).write_text(ca)
    for path in filter(os.path.exists, known - {_BUNDLES[0]}):
        _mount(str(bundle), path, flags=_BIND)


def _names() -> None:
    """Names are asked of the namespace's own door, and of nothing else."""
    for path, text in {
        "/etc/resolv.conf": "nameserver 127.0.0.1\n",
        "/etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    }.items():
        ours, target = Path("/run/broker", os.path.basename(path)), Path(os.path.realpath(path))
        ours.write_text(text)
        if target.exists():
            _mount(str(ours), str(target), flags=_BIND)
        elif target.is_relative_to("/run"):  # a link into what is hidden now
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)


def _empty(path: str, mode: str) -> None:
    if os.path.isdir(path):
        _mount("tmpfs", os.path.realpath(path), "tmpfs", _NOSUID | _NODEV, f"mode={mode}")


def _mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    if _libc.mount(os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), data.encode() or None):
        _raise(f"mount {target}")


def _set_readonly(path: str, *, on: bool) -> None:
    wanted = (ctypes.c_uint64 * 4)(_RDONLY, 0, 0, 0) if on else (ctypes.c_uint64 * 4)(0, _RDONLY, 0, 0)  # struct mount_attr
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    if _libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, path.encode(), ctypes.c_uint(_AT_RECURSIVE), ctypes.byref(wanted), size):
        _raise(f"mount_setattr {path}")


def _raise(what: str) -> NoReturn:
    number = ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")


# The command.


def _await_doors(ports: list[int]) -> None:
    """Envoy has taken the doors' configuration; a moment later it listens."""
    end = time.monotonic() + _OPEN_S
    hosts = ("127.0.0.1", "::1") if _IPV6.exists() else ("127.0.0.1",)
    while not (all(_listens(host, port) for port in ports for host in hosts) and _answers()):
        if time.monotonic() > end:
            raise TimeoutError(f"Envoy does not listen in the namespace within {_OPEN_S:.0f} s")
        time.sleep(0.001)


def _listens(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        return probe.connect_ex((host, port)) == 0


def _answers() -> bool:
    with socket.socket(type=socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.settimeout(0.25)
        probe.connect(("127.0.0.1", _DNS))
        probe.send(_QUERY)
        return bool(probe.recv(512))
    return False


def _become(plan: dict[str, Any]) -> NoReturn:
    """Become the command, of the user and without any right of root's."""
    try:
        for name, most in plan["limits"].items():
            resource.setrlimit(getattr(resource, name), (most, most))
        _filter_calls(os.uname().machine)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        uid, gid, groups = plan["user"]
        whose = ["--reuid", str(uid), "--regid", str(gid), *(["--groups", groups] if groups else ["--clear-groups"])]
        bare = ["--no-new-privs", "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all"]
        os.execve(plan["setpriv"], ["setpriv", *whose, *bare, "--", *plan["command"]], plan["environment"])  # noqa: S606
    except OSError as error:
        print(f"broker: {error}", file=sys.stderr)
    os._exit(_FAULT)


def _filter_calls(machine: str) -> None:
    """Refuse the system calls that no network namespace holds (seccomp(2))."""
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOTSUP, f"no system calls are known of {machine}, so that none could be refused")
    program = _program(_ARCHITECTURES[machine], _NUMBERS[machine])
    code = b"".join(struct.pack("HBBI", *each) for each in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer)))
    if _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header):
        _raise("seccomp")


_Steps = list[tuple[int, int, int, int]]


def _program(architecture: int, numbers: dict[str, Any]) -> _Steps:
    """The filter: `(code, jump if so, jump if not, constant)`; it reads struct seccomp_data."""
    number, arch = 0, 4
    first, second, *_ = argument = range(16, 64, 8)  # their lower halves
    allow = (_RETURN, 0, 0, _ALLOW)
    absent, forbidden, no_family = ((_RETURN, 0, 0, _ERRNO | why) for why in (errno.ENOSYS, errno.EPERM, errno.EAFNOSUPPORT))
    families = [each for family in _FAMILIES for each in ((_EQUAL, 0, 1, family), allow)]
    setuid = ((_ANY_OF, 0, 1, stat.S_ISUID), forbidden, allow)
    modes, opens = {_FCHMODAT2: 2, **numbers["modes"]}, numbers["opens"]
    return [
        (_LOAD, 0, 0, arch), (_EQUAL, 1, 0, architecture), absent,
        (_LOAD, 0, 0, number), (_AT_LEAST, 0, 1, _X32), absent,
        *_on([_IO_URING_SETUP, _CLONE3, _OPENAT2, *numbers["keys"]], absent),
        *_on([numbers["unshare"], numbers["setns"]], forbidden),
        *_on([numbers["clone"]], (_LOAD, 0, 0, first), (_ANY_OF, 0, 1, _NAMESPACES), forbidden, allow),
        *_on([numbers["ioctl"]], (_LOAD, 0, 0, second), (_EQUAL, 1, 0, _TIOCSTI), (_EQUAL, 0, 1, _TIOCLINUX), forbidden, allow),
        *_on([numbers["socket"]], (_LOAD, 0, 0, first), *families, no_family),
        *(step for call, mode in modes.items() for step in _on([call], (_LOAD, 0, 0, argument[mode]), *setuid)),
        *(
            step
            for call, flags in opens.items()
            for step in _on(
                [call],
                (_LOAD, 0, 0, argument[flags]), (_ANY_OF, 1, 0, _MAKING), allow, (_LOAD, 0, 0, argument[flags + 1]), *setuid,
            )
        ),
        allow,
    ]  # fmt: skip


def _on(numbers: Sequence[int], *steps: tuple[int, int, int, int]) -> _Steps:
    """These steps, the last of which returns, for each of these system calls."""
    return [each for number in numbers for each in ((_EQUAL, 0, len(steps), number), *steps)]


def _attend(child: int, *, terminal: bool) -> int:
    """Pass signals on and take in whoever ends, until the command does. Where there is a terminal, stop with the command."""
    while True:
        came = signal.sigwaitinfo({*_FORWARDED, signal.SIGCHLD})
        if came.si_signo != signal.SIGCHLD:
            # What the terminal sends (its code is above 0), and the command to its own group, the command has as well.
            if came.si_code <= 0 and came.si_pid == 0:
                _pass_on(child, came.si_signo)
            continue
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG | (os.WUNTRACED if terminal else 0))
            if pid == 0:
                break
            if os.WIFSTOPPED(status):
                if pid == child:
                    _stop(os.WSTOPSIG(status))
            elif pid == child:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code


def _stop(number: int) -> None:
    """Stop `unshare` by this signal, which `broker run` sees; this process is the first of its namespace, and does not stop."""
    os.kill(0, number if number in _ASKING else signal.SIGSTOP)


def _pass_on(child: int, number: int) -> None:
    """What a keyboard sends is for all of the command's group; to go on is said to ours already."""
    group = os.getpgid(child)  # 0, which is ours, if it has made no other
    if number in _KEYBOARD:
        os.killpg(group, number)
    elif group or number != signal.SIGCONT:
        os.kill(child, number)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"broker: the command can't be confined: {error}", file=sys.stderr)
        sys.exit(_FAULT)
