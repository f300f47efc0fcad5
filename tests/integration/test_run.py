"""`broker run`: unchanged programs are governed, whatever they heed; nothing else gets out; all ends together."""

import asyncio
import contextlib
import errno
import json
import os
import pty
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import stack
from conftest import LOOPBACK, OPERATIONS
from host import METADATA, WHY_NOT, WORLD4, Host, Run, has_ended, has_stopped, inside, verb
from streams import Events

from broker.admin.client import Refused, ask, fetch
from broker.canary import Canary
from broker.confined.ceilings import mounted
from broker.dataplane.compile import Written
from broker.dataplane.site import Namespace, Site
from broker.namespaces import Held

pytestmark = [pytest.mark.envoy, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

API, WIKI, LATER, EVENTS = "api.tool.test", "wiki.tool.test", "later.tool.test", "events.tool.test"
GRANTED = {"operations": {"items.list": {}, "items.create": {}}}
PYTHON = sys.executable


@pytest.fixture(scope="module")
def place() -> Iterator[SimpleNamespace]:
    folder = stack.short_folder()
    host = Host(folder, API, WIKI, LATER, apart=EVENTS)
    ca = stack.TestCA()
    certificate = ca.issue(folder / "certs", API, LATER)
    secure = host.inside(lambda: stack.Upstream(certificate, port=443))
    plain = host.inside(lambda: stack.Upstream(port=80))
    for_events = ca.issue(folder / "certs", EVENTS)
    events = host.inside(lambda: Events(for_events, host="127.0.0.2", port=443))
    trusted = {"ca": "ca.pem", **LOOPBACK}
    manifests = stack.write_manifests(
        folder / "manifests",
        stack.platform(
            alerts={
                "routes": [{"to": "hook"}],
                "webhooks": {"hook": {"url": "https://hook.tool.test/", "secret": {"file": "hook.txt"}}},
            }
        ),
        stack.tool("api", f"https://{API}", OPERATIONS, upstream=trusted),
        stack.tool("later", f"https://{LATER}", OPERATIONS, upstream=trusted),
        stack.tool("wiki", f"http://{WIKI}", OPERATIONS, upstream=LOOPBACK),
        stack.tool("paid", "https://paid.tool.test", OPERATIONS, credential={"issuer": "static", "secret": {"file": "paid.txt"}}),
        stack.tool("named", "https://named.tool.test", OPERATIONS, credential={"issuer": "static", "secret": {"env": "NAMED"}}),
        stack.tool("events", f"https://{EVENTS}", OPERATIONS, upstream=trusted),
        stack.agent("listener", {"events": {"operations": {"items.get": {}}}}),
        stack.agent("coder", {"api": GRANTED, "wiki": GRANTED}),
        stack.agent("other", {"wiki": GRANTED}),
        stack.agent("leaver", {"api": GRANTED}),
        *(stack.agent(name, {"api": GRANTED}) for name in ("learner", "resolver", "flooder")),
    )
    (manifests / "ca.pem").write_text(ca.pem)
    (manifests / "paid.txt").write_text("nobodys")
    (manifests / "hook.txt").write_text("nobodys")
    broker = stack.Broker(manifests, folder / "state", within=host.within)
    yield SimpleNamespace(host=host, broker=broker, secure=secure, plain=plain, folder=folder, manifests=manifests)
    broker.stop()
    for upstream in (secure, plain, events):
        upstream.close()
    host.close()


@pytest.fixture(autouse=True)
def _fresh(place):
    place.secure.seen.clear()
    place.plain.seen.clear()


def run(
    place: SimpleNamespace, *command: str, agent: str = "coder", env: dict[str, str] | None = None, options: tuple[str, ...] = ()
):
    return subprocess.run(
        [*place.host.within, *verb(place.broker, agent), *options, "--", *command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **(env or {})},
    )


NODE = pytest.param(["node", "-e", f"fetch('https://{API}/items').then(r => r.text()).then(console.log)"], id="node",
                    marks=pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed"))  # fmt: skip
UNPROXIED = f"import httpx; print(httpx.get('https://{API}/items', trust_env=False, verify='/run/broker/ca.pem').text)"
URLLIB = f"from urllib.request import urlopen; print(urlopen('https://{API}/items').read().decode())"
BARE = ["env", "-i", f"PATH={os.environ['PATH']}"]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["curl", "-sS", f"https://{API}/items"], id="curl"),
        pytest.param([*BARE, "curl", "-sS", f"https://{API}/items"], id="curl without any variable"),
        pytest.param([PYTHON, "-c", f"import httpx; print(httpx.get('https://{API}/items').text)"], id="httpx"),
        pytest.param([PYTHON, "-c", UNPROXIED], id="httpx without proxy"),
        pytest.param([PYTHON, "-c", f"import requests; print(requests.get('https://{API}/items').text)"], id="requests"),
        pytest.param([PYTHON, "-c", URLLIB], id="urllib"),
        NODE,
        pytest.param(["curl", "-sS", "-4", "--noproxy", "*", f"https://{API}/items"], id="captured over IPv4"),
        pytest.param(["curl", "-sS", "-6", "--noproxy", "*", f"https://{API}/items"], id="captured over IPv6"),
        pytest.param(["curl", "-sS", f"http://{WIKI}/items"], id="HTTP by the proxy"),
        pytest.param(["curl", "-sS", "--noproxy", "*", f"http://{WIKI}/items"], id="HTTP captured"),
    ],
)  # fmt: skip
def test_an_unchanged_client_reaches_a_declared_upstream(place, command):
    done = run(place, *command)
    assert (done.returncode, done.stdout.strip()) == (0, '{"path": "/items"}'), done.stderr
    [seen] = place.secure.seen + place.plain.seen
    assert seen.path == "/items"
    decision = place.broker.decisions(verdict="allow")[-1]
    assert (decision["agent"]["name"], decision["door"]) == ("coder", "namespace")


@pytest.mark.parametrize(
    ("url", "code"),
    [
        (f"https://{API}/nothing", "operation_not_declared"),
        (f"http://{WIKI}/nothing", "operation_not_declared"),
        ("http://evil.test/", "host_not_declared"),
        (f"http://{METADATA}/latest/meta-data", "host_not_declared"),
        (f"https://{LATER}/items", "tool_not_declared"),
    ],
)
@pytest.mark.parametrize("how", ["by the proxy", "captured"])
def test_what_is_not_declared_is_refused_with_a_reason_that_the_client_sees(place, url, code, how):
    if how == "by the proxy" and LATER in url:
        done = run(place, "curl", "-sS", "-p", "-o", "/dev/null", "-w", "%{http_connect}", url)
        assert done.stdout == "403"
        assert place.broker.decisions(code=code)[-1]["agent"]["name"] == "coder"
        return
    # Whatever address it has: a name is looked up in vain, so it is told one.
    captured = ["--noproxy", "*", "--resolve", f"evil.test:80:{WORLD4}", "--resolve", f"{LATER}:443:{WORLD4}"]
    done = run(place, "curl", "-sS", *(captured if how == "captured" else []), url)
    problem = json.loads(done.stdout)
    assert (problem["code"], problem["agent"]) == (code, "coder")
    assert place.broker.decision(problem["decision_id"])["door"] == "namespace"
    assert place.secure.seen + place.plain.seen == []


def test_tls_to_a_name_that_nobody_declared_is_not_certified_and_is_recorded_as_the_agents(place):
    done = run(place, "curl", "-sS", "--noproxy", "*", "--resolve", f"sni.evil.test:443:{WORLD4}", "https://sni.evil.test/")
    assert done.returncode == 35
    found = stack.until(lambda: place.broker.decisions(host="sni.evil.test"))
    assert (found[0]["code"], found[0]["agent"]["name"]) == ("host_not_declared", "coder")


@pytest.mark.parametrize("header", ["--proxy-header", "--header"])
def test_what_a_request_says_of_its_sender_counts_for_nothing_in_a_namespace(place, header):
    token = place.broker.token("coder")
    proof = f"Proxy-Authorization: {stack.basic('coder', token)}"
    # The agent `other` may not use this tool; with coder's token it is still `other`.
    done = run(
        place,
        "curl",
        "-sS",
        "-w",
        "%{http_connect}",
        header,
        proof,
        "-H",
        f"x-broker-token: {token}",
        f"https://{API}/items",
        agent="other",
    )
    assert done.stdout[-3:] == "403"
    assert place.broker.decisions(code="tool_not_declared")[-1]["agent"]["name"] == "other"
    done = run(place, "curl", "-sS", "-H", proof, "-H", f"x-broker-token: {token}", f"http://{WIKI}/items", agent="other")
    assert json.loads(done.stdout) == {"path": "/items"}
    [seen] = place.plain.seen
    assert seen.header("proxy-authorization") is None
    assert seen.header("x-broker-token") is None
    assert place.broker.decisions(verdict="allow")[-1]["agent"]["name"] == "other"


def test_only_the_names_of_the_agents_own_tools_resolve_and_new_ones_without_a_restart(place):
    look = "while read name; do getent ahosts $name | head -1 | cut -d' ' -f1; echo .; done"
    running = Run(place.host, place.broker, "learner", "sh", "-c", look)
    try:
        assert running.ask(API) == "198.18.0.1"
        assert running.line() == "."
        for name in (WIKI, LATER, f"secret.{API}", "tool.test", "example.com"):
            assert running.ask(name) == "."
        stack.write_manifest(place.manifests, stack.agent("learner", {"api": GRANTED, "later": GRANTED}))

        def found() -> bool:
            answer = running.ask(LATER)
            return answer != "." and running.line() == "."

        stack.until(found)
    finally:
        running.close()


QUESTIONS = r"""
import socket, sys
def ask(name, kind=1, tcp=False):
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    made = socket.socket(type=socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM)
    made.settimeout(5)
    made.connect(("192.0.2.53", 53))
    made.send(bytes.fromhex("627201000001000000000000") + labels + b"\0" + bytes([0, kind, 0, 1]))
    return made.recv(512)[3] & 15
"""


def asked_in_vain(place: SimpleNamespace, agent: str) -> list[dict[str, Any]]:
    found = place.broker.decisions(code="host_not_declared")
    return [each for each in found if each["agent"].get("name") == agent and each["detail"].startswith("DNS was asked")]


def test_a_name_that_is_asked_of_dns_and_not_declared_stands_in_the_record_and_among_the_denials(place):
    names = f"for name in ('c2VjcmV0.evil.test', 'C2VjcmV0.EVIL.test', '{API}', '{LATER}'):\n"
    done = run(place, PYTHON, "-c", f"{QUESTIONS}{names}  for kind in (1, 28, 16): print(ask(name, kind))", agent="resolver")
    # The codes 3 (no such name) and 4 (no such kind of question), at any address.
    assert done.stdout.split() == ["3", "3", "4"] * 2 + ["0", "0", "4"] + ["3", "3", "4"], done.stderr
    stack.until(lambda: len(asked_in_vain(place, "resolver")) == 2)
    first, second = asked_in_vain(place, "resolver")
    assert (first["host"], second["host"], first["door"]) == ("c2vjcmv0.evil.test", LATER, "namespace")
    assert first["detail"] == "DNS was asked for 'c2vjcmv0.evil.test', which is not declared"
    command = [*stack.BROKER, "denials", "--agent", "resolver", "--state", str(place.broker.state)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "c2vjcmv0.evil.test" in shown.stdout


def test_a_flood_of_names_is_a_few_records_and_one_that_says_that_there_are_more(place):
    flood = "for number in range(5000): ask(f'{number}.evil.test')"
    assert run(place, PYTHON, "-c", f"{QUESTIONS}{flood}", agent="flooder").returncode == 0
    found = stack.until(lambda: [each for each in asked_in_vain(place, "flooder") if not each["host"]])
    assert found[0]["detail"] == "DNS was asked for more than 20 such names within a minute"
    # Others are not kept from theirs, and a flood may go on into another minute.
    assert run(place, "getent", "hosts", "other.evil.test", agent="resolver").returncode == 2
    stack.until(lambda: asked_in_vain(place, "resolver")[-1]["host"] == "other.evil.test")
    assert 21 <= len(asked_in_vain(place, "flooder")) <= 42


def test_dns_over_tcp_is_refused_at_once(place):
    done = run(place, PYTHON, "-c", f"{QUESTIONS}ask('{API}', tcp=True)")
    assert "ConnectionRefusedError" in done.stderr
    done = run(place, "sh", "-c", f"RES_OPTIONS=use-vc timeout 4 getent hosts {API}")  # which would wait 5 s for an answer
    assert (done.returncode, done.stdout) == (2, "")


# No way out.


def test_from_inside_nothing_of_the_brokers_can_be_seen(place):
    state = place.broker.state
    script = f"ls -A {state} /run /tmp /dev 2>/dev/null; find / -xdev -name '*.sock' -path '*broker*' 2>/dev/null; echo seen"
    seen = run(place, "sh", "-c", script).stdout.split()
    for name in ("control.sock", "processor.sock", "envoy-admin.sock", "keys", "audit", "vda", "mem", "kmsg"):
        assert name not in seen
    assert "seen" in seen


def test_the_command_has_no_capability_and_no_way_to_get_one(place):
    status = run(place, "cat", "/proc/self/status").stdout
    found = dict(line.split(":\t", 1) for line in status.splitlines())
    assert {found[f"Cap{each}"].strip("0") for each in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {""}
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")


@pytest.mark.parametrize(
    "path", ["/etc/cron.d/x", "/proc/sys/kernel/core_pattern", "/root/.profile-x", "/sys/kernel/uevent_helper"]
)
def test_root_can_have_nobody_else_do_anything(place, path):
    done = run(place, "sh", "-c", f"echo x > {path}")
    assert done.returncode != 0
    assert not Path("/etc/cron.d/x").exists()


LISTENING = r"""
import os, socket, sys
made = socket.socket(socket.AF_UNIX)
made.bind(sys.argv[1])
made.listen()
if len(sys.argv) > 2: os.rename(sys.argv[1], sys.argv[2])
print("listens", flush=True)
sys.stdin.read()
"""
CONNECTING = """rm stale.sock
for name in relative deep/er/renamed elsewhere; do curl -s -m 2 --unix-socket $name.sock http://x/; echo $?; done"""


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_a_socket_in_a_folder_of_the_commands_can_not_be_opened_wherever_and_however_it_was_bound(place, user, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sockets")
    (folder / "deep/er").mkdir(parents=True)
    for each, mode in ((folder, 0o777), *((above, 0o755) for above in folder.parents[:-2])):
        each.chmod(mode)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as stale:
        stale.bind(str(folder / "stale.sock"))
    listening = [PYTHON, "-c", LISTENING]
    started = [
        subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for command in (
            [*listening, "relative.sock"],
            [*listening, f"{folder}/bound.sock", f"{folder}/deep/er/renamed.sock"],
            ["unshare", "--net", "--", *listening, f"{folder}/elsewhere.sock"],
        )
    ]
    try:
        for each in started:
            assert each.stdout.readline() == "listens\n"
        for path in folder.rglob("*.sock"):
            path.chmod(0o777)
        within = [*place.host.within[:-2], f"--wd={folder}", "--", "env", f"PYTHONPATH={Path.cwd()}"]
        command = [*verb(place.broker, "coder"), "--user", user, "--", "sh", "-c", CONNECTING]
        done = subprocess.run([*within, *command], capture_output=True, text=True, timeout=60, check=False)
        assert (done.stdout.split(), "stale.sock" in done.stderr) == (["7", "7", "7"], False), done.stderr
    finally:
        for each in started:
            each.communicate("")


def test_an_agent_that_works_beside_the_manifests_can_not_change_them(place):
    script = f"ls {place.manifests} | grep -c yaml; touch x && rm x && echo written; touch {place.manifests}/x"
    command = [*verb(place.broker, "coder"), "--", "sh", "-c", script]
    within = [*place.host.within[:-2], f"--wd={place.folder}", "--", "env", f"PYTHONPATH={Path.cwd()}"]
    done = subprocess.run([*within, *command], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split()[-1] == "written", done.stderr
    assert int(done.stdout.split()[0]) >= 7
    assert "Read-only file system" in done.stderr


RENAMES = (
    r'mkdir "a"; print(rename($_, "$_.gone") ? "moved\n" : 0 + $!, "\n") for @ARGV'  # a Python may lie where not all may look
)
WAYS = ("w", "w/conf", "w/conf/manifests", "w/var", "w/var/state", "w/var/keys", "w/var/keys/paid.txt")


@pytest.mark.parametrize(
    ("user", "mode"), [("root", 0o755), ("nobody", 0o755), ("nobody", 0o775)], ids=["root", "owner", "group"]
)
def test_an_agent_can_not_exchange_a_folder_above_the_manifests_the_state_or_a_secret(place, user, mode):
    """Else it could grant itself anything, and have the broker start again with keys that it has."""
    outer = place.folder / f"outer-{user}-{mode:o}"
    folders = [outer, outer / "w", outer / "w/conf", outer / "w/var", outer / "w/var/keys"]
    for each in folders:
        each.mkdir(parents=True)
    secrets = [outer / "w/var/keys/paid.txt", *(outer / f"w/var/keys/{number}.txt" for number in range(20))]
    tools = []
    for number, path in enumerate(secrets):
        path.write_text("nobodys")
        name = f"wiki-{number}" if number else "wiki"
        credential = {"issuer": "static", "secret": {"file": str(path)}}
        tools.append(stack.tool(name, f"http://{name}.{WIKI}", OPERATIONS, upstream=LOOPBACK, credential=credential))
    stack.write_manifests(outer / "w/conf/manifests", *tools, stack.agent("coder", {"wiki": GRANTED}))
    for each in folders:
        group = mode == 0o775
        if user != "root":
            os.chown(each, 0 if group else 65534, 65534 if group else 0)
        each.chmod(mode)
    broker = stack.Broker(outer / "w/conf/manifests", outer / "w/var/state", within=place.host.within)
    try:
        within = [*place.host.within[:-2], f"--wd={outer}", "--", "env", f"PYTHONPATH={Path.cwd()}"]
        mounts = f'open(M, "/proc/self/mountinfo"); print(scalar(grep {{ m!{outer}! }} <M>), "\\n"); '
        command = [*verb(broker, "coder"), "--user", user, "--", "perl", "-e", mounts + RENAMES, "a", *WAYS]
        done = subprocess.run([*within, *command], capture_output=True, text=True, timeout=60, check=False)
        mounted, *moves = done.stdout.split()
        assert moves == ["moved", *[str(errno.EBUSY)] * len(WAYS)], done.stderr
        assert int(mounted) < len(secrets) + 20, "no more for each secret than what hides it"
    finally:
        broker.stop()


CALLS = r"""
import ctypes, errno, fcntl, socket, sys
def tried(call):
    try: call()
    except OSError as error: return errno.errorcode[error.errno]
    return "made"
libc = ctypes.CDLL(None, use_errno=True)
print(tried(lambda: socket.socket(socket.AF_VSOCK)), tried(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)),
      *(tried(lambda: fcntl.ioctl(0, each, b"x")) for each in (0x5412, 0x541C)),
      libc.syscall(425, 1, 0), tried(lambda: socket.socket(socket.AF_INET6)))
"""


def test_what_no_network_namespace_holds_is_refused_by_the_kernel(place):
    assert run(place, PYTHON, "-c", CALLS).stdout == "EAFNOSUPPORT EAFNOSUPPORT EPERM EPERM -1 made\n"


NAMESPACES = r"""
import ctypes, errno, os, signal, subprocess
libc = ctypes.CDLL(None, use_errno=True)
def tried(*call):
    made = libc.syscall(*call)
    if made == 0: os._exit(9)
    return errno.errorcode[ctypes.get_errno()] if made < 0 else "made"
numbers = {"x86_64": (56, 272, 308), "aarch64": (220, 97, 268)}[os.uname().machine]
print(*(tried(numbers[0], flag | signal.SIGCHLD, 0, 0, 0, 0) for flag in (0x20000, 0x2000000, 0x10000000, 0x40000000)),
      tried(numbers[1], 0x10000000), tried(numbers[2], os.open("/proc/self/ns/user", 0), 0), tried(435, 0, 0),
      subprocess.run(["true"]).returncode)
"""


def test_the_command_makes_no_namespaces_in_which_it_would_have_capabilities(place):
    done = run(place, PYTHON, "-c", NAMESPACES)
    assert done.stdout == f"{'EPERM ' * 6}ENOSYS 0\n", done.stderr


SETUID = r"""
import errno, os
def tried(call):
    try: call()
    except OSError as error: return errno.errorcode[error.errno]
    return "made"
os.umask(0)
file, folder = os.open("x", os.O_CREAT), os.open(".", 0)
os.mkdir("y")
print(*(tried(call) for call in (
    lambda: os.chmod("x", 0o4755), lambda: os.fchmod(file, 0o4755), lambda: os.chmod("x", 0o4755, dir_fd=folder),
    lambda: os.mknod("a", 0o104755), lambda: os.mknod("b", 0o104755, dir_fd=folder), lambda: os.open("c", os.O_CREAT, 0o4755),
    lambda: os.open("d", os.O_CREAT, 0o4755, dir_fd=folder), lambda: os.open(".", os.O_TMPFILE | os.O_RDWR, 0o4755))))
print(*(tried(call) for call in (
    lambda: os.chmod("x", 0o755), lambda: os.chmod("y", 0o2775), lambda: os.mknod("e", 0o100755),
    lambda: os.open("f", os.O_CREAT, 0o755))))
print(any(os.stat(each).st_mode & 0o4000 for each in os.listdir(".")))
"""


def test_no_program_is_made_that_others_would_run_as_its_owner(place):
    done = run(place, "sh", "-c", f"cd /tmp && exec {PYTHON} -c '{SETUID}'")
    assert done.stdout.splitlines() == [" ".join(["EPERM"] * 8), " ".join(["made"] * 4), "False"], done.stderr


KEYS = r"""
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
for number in {"x86_64": (248, 249, 250), "aarch64": (217, 218, 219)}[os.uname().machine]:
    print(libc.syscall(number, b"user", b"broker-test", b"x", 1, -4), errno.errorcode.get(ctypes.get_errno()), end=" ")
"""


def test_the_kernels_keys_which_all_share_who_have_a_user_are_not_to_be_had(place):
    assert run(place, PYTHON, "-c", KEYS).stdout == "-1 ENOSYS " * 3


def test_no_control_group_can_be_written_to_also_not_one_that_its_user_was_given(place):
    groups = mounted(Path("/proc/mounts").read_text())
    given = groups / "broker-test-given"
    given.mkdir()
    try:
        os.chown(given / "cgroup.procs", 65534, 65534)
        done = run(place, "sh", "-c", f"echo 0 > {given}/cgroup.procs", options=("--user", "nobody"))
        assert "Read-only file system" in done.stderr
    finally:
        given.rmdir()


def test_it_runs_as_who_is_named_or_as_who_called_sudo(place):
    assert run(place, "id", "-u", options=("--user", "nobody")).stdout == "65534\n"
    assert run(place, "sh", "-c", "id -u; echo $HOME", env={"SUDO_UID": "65534"}).stdout.split()[0] == "65534"
    assert run(place, "id", "-u").stdout == "0\n"


def test_a_credential_of_the_callers_is_left_out_and_told_unless_it_is_kept(place):
    secrets = {"OPENAI_API_KEY": "sk-1", "DATABASE_URL": "postgres://u:p@h/d", "GH_TOKEN": "t", "EDITOR": "vi"}
    done = run(place, "env", env=secrets, options=("--keep", "GH_TOKEN"))
    found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert (found.get("GH_TOKEN"), found.get("EDITOR")) == ("t", "vi")
    assert ("DATABASE_URL" in found, found["OPENAI_API_KEY"]) == (False, "the-broker-has-it")
    [line] = [line for line in done.stderr.splitlines() if "credential" in line]
    assert "DATABASE_URL" in line
    assert "OPENAI_API_KEY" in line
    assert "sk-1" not in done.stderr


def test_what_tools_and_alerts_have_their_secrets_in_is_not_to_be_read(place):
    script = f"cat {place.manifests}/paid.txt {place.manifests}/hook.txt; cat {place.manifests}/ca.pem | head -1; echo $NAMED"
    within = [*place.host.within[:-2], f"--wd={place.manifests}", "--", "env", f"PYTHONPATH={Path.cwd()}", "NAMED=nobodys"]
    command = [*within, *verb(place.broker, "coder"), "--", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ("nobodys" in done.stdout, done.stdout.split()[0]) == (False, "-----BEGIN"), done.stderr
    assert "left out what the broker has secrets in (keep one with --keep NAME): NAMED" in done.stderr
    kept = subprocess.run(
        [*command[:-4], "--keep", "NAMED", *command[-4:]], capture_output=True, text=True, timeout=60, check=False
    )
    assert kept.stdout.split()[-1] == "nobodys"


def test_the_hosts_processes_are_not_shown_by_another_proc(place):
    elsewhere = place.folder / "chroot/proc"
    elsewhere.mkdir(parents=True)
    command = shlex.join([*verb(place.broker, "coder"), "--", "sh", "-c", f"ls {elsewhere} | wc -l; ls -d /proc/1"])
    script = f"mount -t proc proc {elsewhere} && cd {elsewhere.parent} && ls {elsewhere} | grep -c . && {command}"
    within = [*place.host.within, "env", f"PYTHONPATH={Path.cwd()}", "unshare", "--mount", "--", "sh", "-c", script]
    done = subprocess.run(within, capture_output=True, text=True, timeout=60, check=False)
    shown, left, own = done.stdout.split()
    assert int(shown) > 10, done.stderr
    assert (left, own) == ("0", "/proc/1"), done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-"])
def test_a_standard_stream_that_the_caller_closed_leads_nowhere(place, closed):
    command = f"{shlex.join([*verb(place.broker, 'coder'), '--', 'true'])} {closed}"
    done = subprocess.run(
        [*place.host.within, "setsid", "sh", "-c", command], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--cpus", "nan"), "'nan' is no number of processors; write one of 0.01 to 100000"),
        (("--cpus", "inf"), "'inf' is no number of processors"),
        (("--pids", "99999999999"), "not in the range"),
    ],
)
def test_a_ceiling_that_no_kernel_takes_is_refused(place, options, told):
    done = run(place, "true", options=options)
    assert done.returncode == 2
    assert told in done.stderr


def test_a_working_directory_that_is_gone_is_told(place):
    script = f"mkdir {place.folder}/gone && cd {place.folder}/gone && rmdir {place.folder}/gone && "
    command = [
        *place.host.within,
        "env",
        f"PYTHONPATH={Path.cwd()}",
        "sh",
        "-c",
        script + shlex.join([*verb(place.broker, "coder"), "--", "true"]),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "the working directory is gone" in done.stderr) == (2, True), done.stderr


# Side by side.

# One line for each path that it reads: the answer, or that there is none.
ASKING = f'while read path; do echo "$(curl -s -m 5 http://{WIKI}$path || echo failed)"; done'


def test_two_agents_side_by_side_have_each_its_own_doors_and_see_nothing_of_the_other(place):
    one, two = (Run(place.host, place.broker, name, "sh", "-c", ASKING) for name in ("coder", "other"))
    try:
        for each, name in ((one, "coder"), (two, "other"), (one, "coder")):
            assert each.ask("/items") == '{"path": "/items"}'
            assert place.broker.decisions(verdict="allow")[-1]["agent"]["name"] == name
        first, second = (each.first_process for each in (one, two))
        namespaces = {Path(f"/proc/{pid}/ns/net").stat().st_ino for pid in (first, second, "self")}
        assert len(namespaces) == 3
        # What one listens on, the other does not reach; nor does the host reach a door.
        assert run(place, "sh", "-c", "ls /proc | grep -c '^[0-9]'").stdout.strip() < "9"
        assert place.host.run("curl", "-s", "-m", "2", "http://127.0.0.1:1001/").returncode == 7
        with pytest.raises(Refused, match="is coder's already"):
            ask(place.broker.state / "run/control.sock", "POST", "/namespaces", {"agent": "other", "pid": first})
    finally:
        one.close()
        two.close()


HOLDING = r"""
import socket, sys
held = []
for number in range(600):
    made = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    made.settimeout(5)
    try:
        made.sendall(b"GET http://wiki.tool.test/items HTTP/1.1\r\nhost: wiki.tool.test\r\n\r\n")
        if not made.recv(4096): break
    except ConnectionError: break
    held.append(made)
print(len(held), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("port", ["1001", "80"])
def test_an_agent_that_holds_connections_gets_no_more_and_takes_none_of_anothers(place, port):
    holding = Run(place.host, place.broker, "other", PYTHON, "-c", HOLDING, port)
    try:
        assert 500 <= int(holding.line()) <= 512
        assert run(place, "curl", "-sS", f"http://{WIKI}/items").stdout.strip() == '{"path": "/items"}'
    finally:
        holding.close()


def test_the_brokers_own_namespace_is_nobodys(place):
    with pytest.raises(Refused, match="own network namespace"):
        ask(
            place.broker.state / "run/control.sock",
            "POST",
            "/namespaces",
            {"agent": "coder", "pid": place.broker.child("processor")},
        )


def test_what_must_be_denied_is_denied_at_every_door_of_a_namespace_and_in_no_reviewers_way(place):
    running = Run(place.host, place.broker, "learner", "cat")
    assert running.ask("ready") == "ready"
    try:
        with open(f"/proc/{running.first_process}/ns/net") as namespace:  # noqa: PTH123 - its descriptor is needed
            held = Held(Namespace("1", "learner", ""), 1, namespace.fileno(), -1, Written((), (), ()))
            canary = Canary(Site(("", 0), ("", 0), "", "", ""), lambda: held)
            assert asyncio.run(canary._namespace()) == ""

        def tried() -> list[dict[str, Any]]:
            found = place.broker.records(canary=True)
            return [
                each for each in found if each.get("host", "").startswith("must-deny") and each["agent"].get("name") == "learner"
            ]

        assert {each["host"] for each in stack.until(lambda: len(tried()) == 4 and tried())} == {
            "must-deny.invalid:443",
            "must-deny.invalid",
        }
        assert {each["code"] for each in tried()} == {"host_not_declared"}
        command = [*stack.BROKER, "denials", "--state", str(place.broker.state), "--json"]
        assert "must-deny" not in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    finally:
        running.close()


def test_a_namespace_is_never_taken_over_tcp(place):
    token = subprocess.run(
        [*stack.BROKER, "token", "o", "--operator", "--state", str(place.broker.state)],
        capture_output=True,
        text=True,
        check=True,
    )
    call = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-H", f"Authorization: Bearer {token.stdout.strip()}"]
    assert place.host.run(*call, f"{place.broker.admin}/agents").stdout == "200"
    assert place.host.run(*call, "-d", "{}", f"{place.broker.admin}/namespaces").stdout == "404"


# Faults.


TAKING = r"""
import errno, os, socket, sys, urllib.parse
for _ in sys.stdin:
    for port in (urllib.parse.urlsplit(os.environ["HTTPS_PROXY"]).port, 80, 443, 53):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            try: socket.socket(type=kind).bind(("", port))
            except OSError as error: print(errno.errorcode[error.errno], end=" ")
            else: print(port, end=" ")
    print(flush=True)
"""


@contextmanager
def without_envoy(broker: stack.Broker) -> Iterator[None]:
    """While the body runs there is none, or until it lets the supervisor go on."""
    os.kill(broker.process.pid, signal.SIGSTOP)
    try:
        stack.until(lambda: has_stopped(broker.process.pid))  # else it could take in the Envoy that it then starts anew
        envoy = broker.child("envoy")
        os.kill(envoy, signal.SIGKILL)
        stack.until(
            lambda: has_ended(envoy) and len([*Path(f"/proc/{envoy}/task").iterdir()]) == 1
        )  # its threads hold its sockets
        yield
    finally:
        os.kill(broker.process.pid, signal.SIGCONT)


def where_envoy_is(broker: stack.Broker) -> set[int]:
    """The network namespaces of its threads."""
    return {path.stat().st_ino for path in Path(f"/proc/{broker.child('envoy')}/task").glob("*/ns/net")}


def test_an_agent_can_not_take_the_places_of_its_doors_while_envoy_is_away(place):
    # What can't be bound Envoy would be left in: it would look for the tools of all agents there.
    running = Run(place.host, place.broker, "coder", PYTHON, "-c", TAKING)
    try:
        assert running.ask("ready")
        with without_envoy(place.broker):
            assert set(running.ask("now").split()) == {"EACCES"}
        stack.until(lambda: run(place, "curl", "-s", f"http://{WIKI}/items", agent="other").stdout == '{"path": "/items"}', 20)
    finally:
        running.close()


def test_an_envoy_that_is_left_in_a_namespace_is_ended_and_the_namespace_stays_shut(place):
    taken = Run(place.host, place.broker, "coder", "sh", "-c", ASKING)
    other = Run(place.host, place.broker, "other", "sh", "-c", ASKING)
    expected = '{"path": "/items"}'
    try:
        assert (taken.ask("/items"), other.ask("/items")) == (expected, expected)
        with without_envoy(place.broker), inside(taken.first_process, lambda: socket.create_server(("127.0.0.1", 443))):
            os.kill(place.broker.process.pid, signal.SIGCONT)
            stack.until(lambda: "is left in the namespace" in place.broker.log(), 20)
            stack.until(lambda: other.ask("/items") == expected, 20)
            assert where_envoy_is(place.broker) == {Path(f"/proc/{place.host.pid}/ns/net").stat().st_ino}
            assert run(place, "curl", "-s", f"http://{WIKI}/items", agent="other").stdout.strip() == expected
            assert taken.ask("/items") == "failed"
            assert json.loads(place.host.run("curl", "-s", f"{place.broker.admin}/readyz").stdout)["ready"]
    finally:
        taken.close()
        other.close()
    assert run(place, "curl", "-s", f"http://{WIKI}/items").stdout.strip() == expected


@pytest.mark.parametrize("child", ["envoy", "processor"])
def test_a_part_of_the_broker_that_is_killed_lets_nothing_out_and_once_back_has_its_doors_again(place, child):
    running = Run(place.host, place.broker, "coder", "sh", "-c", ASKING)
    try:
        assert running.ask("/items") == '{"path": "/items"}'
        os.kill(place.broker.child(child), signal.SIGKILL)
        place.plain.seen.clear()
        answers: list[str] = []

        def back() -> bool:
            answers.append(running.ask("/items"))
            return answers[-1] == '{"path": "/items"}'

        stack.until(back, 30)
        assert len(place.plain.seen) == answers.count('{"path": "/items"}') == 1
    finally:
        running.close()


# The end.

LINGERING = "setsid sh -c 'setsid sleep 1000 & sleep 1000' & echo started; sleep 1000"


def test_when_it_is_killed_all_that_it_started_and_its_namespace_are_gone(place):
    running = Run(place.host, place.broker, "coder", "sh", "-c", LINGERING)
    assert running.line() == "started"
    inode = Path(f"/proc/{running.first_process}/ns/net").stat().st_ino
    assert len(_in_namespace(inode)) >= 4
    assert _doors(place)
    running.process.kill()
    running.process.wait()
    stack.until(lambda: not _in_namespace(inode), why="processes outlive `broker run`")
    stack.until(lambda: not _doors(place), why="Envoy still has doors in it")
    running.close()


def test_what_was_connected_in_it_is_nobodys_once_it_has_ended_whoever_got_hold_of_it(place):
    running = Run(place.host, place.broker, "coder", "sh", "-c", LINGERING)
    assert running.line() == "started"
    handed_on, tunnel = inside(running.first_process, lambda: [socket.create_connection(("127.0.0.1", 1001)) for _ in range(2)])
    plain = f"GET http://{WIKI}/items HTTP/1.1\r\nhost: {WIKI}\r\n\r\n".encode()
    assert stack.exchange_bytes(tunnel, f"CONNECT {API}:443 HTTP/1.1\r\nhost: {API}:443\r\n\r\n".encode()).startswith(
        b"HTTP/1.1 200"
    )
    within = f"GET /items HTTP/1.1\r\nhost: {API}\r\n\r\n".encode()
    with handed_on, stack.tls(tunnel, place.broker, API) as tls:
        for connection, call in ((handed_on, plain), (tls, within)):
            assert stack.exchange_bytes(connection, call).startswith(b"HTTP/1.1 200")
        running.process.kill()
        running.process.wait()
        stack.until(lambda: not _doors(place))
        for connection, call in ((handed_on, plain), (tls, within)):
            assert b"agent_unknown" in stack.exchange_bytes(connection, call)
    running.close()


def test_when_the_command_ends_so_does_what_it_left_in_the_background(place):
    done = run(place, "sh", "-c", "setsid sleep 1000 & readlink /proc/self/ns/net; exit 5")
    assert done.returncode == 5
    inode = int(done.stdout.strip().removeprefix("net:[").removesuffix("]"))
    assert _in_namespace(inode) == []
    stack.until(lambda: not _doors(place))


@pytest.mark.parametrize(
    ("command", "code"),
    [
        pytest.param(["true"], 0, id="well"),
        pytest.param(["sh", "-c", "exit 7"], 7, id="its own code"),
        pytest.param(["sh", "-c", "kill -9 $$"], 137, id="128 and the signal"),
        pytest.param(["/no/such/program"], 127, id="not found"),
    ],
)
def test_it_ends_with_the_commands_code(place, command, code):
    assert run(place, *command).returncode == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_once(place, number):
    name = signal.Signals(number).name.removeprefix("SIG")
    script = f"trap 'echo got {name}' {name}; trap 'exit 9' USR1; echo ready; while :; do sleep 0.02; done"
    running = Run(place.host, place.broker, "coder", "bash", "-c", script)
    assert running.line() == "ready"
    running.process.send_signal(number)
    assert running.line() == f"got {name}"
    running.process.send_signal(signal.SIGUSR1)
    assert running.process.wait(10) == 9
    assert running.line() == ""
    running.close()


SPREADING = "trap '' TERM; kill -TERM 0; echo goes on"


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_a_signal_of_the_commands_to_its_group_reaches_nobody_else_of_the_callers(place, user):
    command = [*verb(place.broker, "coder"), "--user", user, "--", "sh", "-c", SPREADING]
    script = ["sh", "-c", f"trap 'echo the caller too' TERM; {shlex.join(command)}; echo $?"]
    done = subprocess.run([*place.host.within, *script], capture_output=True, text=True, check=False, start_new_session=True)
    assert done.stdout.split("\n") == ["goes on", "0", ""], done.stderr


@contextmanager
def at_a_terminal(*command: str) -> Iterator[Callable[[str, str], str]]:
    """The command with a terminal of its own. Gives what types a text, and gives all that is shown until a text has come."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(command[0], command)
    shown = ""

    def type_and_see(text: str, expected: str) -> str:
        nonlocal shown
        os.write(terminal, text.encode())
        end = time.monotonic() + 30
        while expected not in shown:
            assert select.select([terminal], [], [], max(0, end - time.monotonic()))[0], f"{expected!r} is not in {shown!r}"
            shown += os.read(terminal, 4096).decode()
        before, _, shown = shown.partition(expected)
        return before

    try:
        yield type_and_see
    finally:
        os.close(terminal)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


TALKING = (
    'trap \'echo inter""rupted\' INT; echo re""ady; '
    'while [ "$said" != bye ]; do read -r said && echo "has $said" || sleep 0.1; done; exit 4'
)


@pytest.mark.parametrize("end", ["", " </dev/tty", " | cat"])
def test_a_command_at_a_terminal_reads_from_it_and_is_interrupted_and_stopped_by_it(place, end):
    command = shlex.join([*verb(place.broker, "coder"), "--", "bash", "-c", TALKING]) + end
    with at_a_terminal(*place.host.within, "bash", "--norc", "--noprofile", "-i") as type_and_see:
        type_and_see(f"{command}\n", "\nready")
        type_and_see("one\n", "has one")
        assert type_and_see("\x03two\n", "has two").count("interrupted") == 1
        if end == " | cat":  # whose other part a key stops only where it is sent to all
            type_and_see("bye\n", "has bye")
            return
        type_and_see("\x1a", "Stopped")
        type_and_see("echo sh''ell\n", "shell\r\n")
        type_and_see("fg\nthree\n", "has three")
        type_and_see("\x1a", "Stopped")
        type_and_see("fg; echo c''ode $?\nbye\n", "code 4")


def test_the_terminal_is_the_callers_again_when_the_command_has_ended(place):
    command = shlex.join([*verb(place.broker, "coder"), "--", "bash", "-c", "echo re''ady; read -r said; echo has $said"])
    with at_a_terminal(*place.host.within, "sh", "-c", f'{command}; read -r said; echo "caller has $said"') as type_and_see:
        type_and_see("", "ready")
        type_and_see("one\n", "has one")
        type_and_see("two\n", "caller has two")


def test_a_revoked_agent_is_cut_off_in_its_namespace(place):
    running = Run(
        place.host,
        place.broker,
        "leaver",
        "sh",
        "-c",
        f"while read path; do curl -s https://{API}$path -o - -w '%{{http_code}}\\n' | tail -c 4; done",
    )
    operate = [*stack.BROKER, "agents"]
    about = ["leaver", "--reason", "test", "--state", str(place.broker.state)]
    try:
        assert running.ask("/items").endswith("200")
        subprocess.run([*operate, "revoke", *about], check=True, capture_output=True)
        place.secure.seen.clear()
        running.ask("/items")
        assert stack.until(lambda: place.broker.decisions(code="agent_revoked"))[-1]["door"] == "namespace"
        assert place.secure.seen == []
        subprocess.run([*operate, "release", *about], check=True, capture_output=True)
        stack.until(lambda: running.ask("/items").endswith("200"))
        # Nor has one whose manifest is gone anything left.
        (place.manifests / "agent-leaver.yaml").unlink()
        stack.until(lambda: not running.ask("/items").endswith("200"))
        place.secure.seen.clear()
        running.ask("/items")
        assert place.secure.seen == []
    finally:
        running.close()


def test_agents_that_start_at_once_each_have_their_doors(place):
    answers = f"curl -s http://{WIKI}/items"
    running = [Run(place.host, place.broker, name, "sh", "-c", answers) for name in ("coder", "other") * 4]
    assert [each.line() for each in running] == ['{"path": "/items"}'] * 8
    assert [each.process.wait(20) for each in running] == [0] * 8
    assert [each.close() for each in running] == [0] * 8


def test_a_broker_that_may_not_enter_namespaces_says_so_and_nothing_is_started(place):
    less = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", "--")
    broker = stack.Broker(place.manifests, place.folder / "less", within=(*place.host.within, *less))
    try:
        done = subprocess.run([*verb(broker, "coder"), "--", "echo", "on"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (3, "")
        assert "Operation not permitted" in done.stderr
        assert "run `broker up` as root" in done.stderr
    finally:
        broker.stop()


@pytest.mark.parametrize("how", ["by the proxy", "captured"])
def test_a_stream_that_is_open_and_idle_is_cut_when_its_agent_is_revoked(place, how):
    direct = "--noproxy '*'" if how == "captured" else ""
    listening = f"curl -sN {direct} https://{EVENTS}/items/idle; echo cut"
    running = Run(place.host, place.broker, "listener", "sh", "-c", listening)
    about = ["listener", "--reason", "test", "--state", str(place.broker.state)]
    try:
        assert (running.line(), running.line()) == ("data: x", "")
        subprocess.run([*stack.BROKER, "agents", "revoke", *about], check=True, capture_output=True)
        revoked = time.monotonic()
        assert running.line() == "cut"
        assert time.monotonic() - revoked < 2
    finally:
        running.close()
        subprocess.run([*stack.BROKER, "agents", "release", *about], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_is_told_no_by_the_broker(place):
    done = run(place, "git", "ls-remote", f"https://{API}/acme/web")
    assert "403" in done.stderr
    assert place.broker.decisions(code="operation_not_declared")[-1]["path"] == "/acme/web/info/refs"


def test_wrong_usage_says_what_to_do(place, tmp_path):
    for agent, state, words in (
        ("nobody-knows", place.broker.state, "no manifest names an agent 'nobody-knows'"),
        ("coder", tmp_path, "is no state folder of a broker"),
    ):
        done = subprocess.run(
            [*stack.BROKER, "run", "--agent", agent, "--state", str(state), "true"], capture_output=True, text=True, check=False
        )
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
    bare = tmp_path / "bin"
    bare.mkdir()
    done = subprocess.run(
        [*stack.BROKER, "run", "--agent", "coder", "true"], capture_output=True, text=True, check=False, env={"PATH": str(bare)}
    )
    assert (done.returncode, "install the package iproute2" in done.stderr) == (2, True)


def _in_namespace(inode: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            if path.stat().st_ino == inode and not has_ended(int(path.parts[2])):
                found.append(int(path.parts[2]))
        except OSError:
            continue
    return found


def _doors(place: SimpleNamespace) -> bool:
    _, listeners = fetch(place.broker.state / "run/envoy-admin.sock", "GET", "/listeners")
    return b"namespace/" in listeners
