"""Invariant 4: every fault denies. Under load, with a real Envoy, one part after the other is taken away and comes back.

In each case every request that an upstream saw has an earlier recorded allow, nothing answers 2xx in the upstream's place, and
service resumes without anybody's help.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import grpc
import httpx
import pytest
import stack
import traffic
from envoy.service.discovery.v3.ads_pb2_grpc import add_AggregatedDiscoveryServiceServicer_to_server
from envoy.service.ext_proc.v3.external_processor_pb2_grpc import (
    ExternalProcessorServicer,
    add_ExternalProcessorServicer_to_server,
)
from google.protobuf.struct_pb2 import Struct

from broker.dataplane import listeners, site
from broker.dataplane.compile import bootstrap, resources
from broker.dataplane.site import Certificates, Leaf, Site
from broker.manifest.load import load
from broker.processor.convert import unchanged
from broker.processor.xds import Ads
from broker.supervisor import envoy_binary

pytestmark = pytest.mark.envoy

ITEMS = {
    "items.get": {"match": {"method": "GET", "path": "/items/{id}"}, "effect": "read"},
    "items.create": {"match": {"method": "POST", "path": "/items/{id}"}, "effect": "write"},
}
LOOPBACK = {"addresses": ["127.0.0.0/8", "::1/128"]}
GRANTED = {"operations": {"items.get": {}, "items.create": {}}}


@contextmanager
def _place(state: str = "state") -> Iterator[SimpleNamespace]:
    """A broker with a plain tool, a tool with TLS, and one agent that may call both."""
    folder = stack.short_folder()
    ca = stack.TestCA()
    manifests = folder / "manifests"
    manifests.mkdir()
    (manifests / "ca.pem").write_text(ca.pem)
    plain, secure = stack.Upstream(), stack.Upstream(ca.issue(folder / "certs", "localhost"))
    tools = {
        "plain": stack.tool("plain", f"http://127.0.0.1:{plain.port}", ITEMS, upstream=LOOPBACK),
        "secure": stack.tool("secure", f"https://localhost:{secure.port}", ITEMS, upstream={"ca": "ca.pem", **LOOPBACK}),
    }
    stack.write_manifests(manifests, *tools.values(), stack.agent("caller", dict.fromkeys(tools, GRANTED)))
    place = SimpleNamespace(
        folder=folder, manifests=manifests, state=folder / state, plain=plain, secure=secure, tools=tools, broker=None
    )
    try:
        yield place
    finally:
        if place.broker:
            place.broker.stop()
        plain.close()
        secure.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def shared() -> Iterator[SimpleNamespace]:
    with _place() as place:
        place.broker = stack.Broker(place.manifests, place.state)
        place.arrivals = [traffic.Arrivals(place.plain), traffic.Arrivals(place.secure)]
        yield place


@contextmanager
def _load(place: SimpleNamespace) -> Iterator[traffic.Traffic]:
    """Eight threads: four at the base-url door, two through tunnels, two in absolute form. Judged at the end, and verified."""
    broker = place.broker
    for each in place.arrivals:
        each.at.clear()
    ways = [
        *4 * [traffic.through_base_url(broker, "caller", "plain")],
        *2 * [traffic.through_proxy(broker, "caller", f"https://localhost:{place.secure.port}")],
        *2 * [traffic.through_proxy(broker, "caller", f"http://127.0.0.1:{place.plain.port}")],
    ]
    with traffic.traffic(ways) as found:
        found.runs()
        yield found
    traffic.assert_no_fault_let_anything_out(broker, found, *place.arrivals)
    assert _verified(broker)


def _verified(broker: stack.Broker) -> bool:
    run = subprocess.run(
        [*stack.BROKER, "audit", "verify", "--state", str(broker.state)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return True


def _gone(pid: int) -> bool:
    """Whether a process has ended (an ended one that nobody waits for yet is a zombie)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_killed_processor_denies_until_it_is_back_by_itself(shared):
    with _load(shared) as found:
        refused, pid = found.refused, shared.broker.child("processor")
        os.kill(pid, signal.SIGKILL)
        stack.until(lambda: found.refused > refused, why="calls are refused")
        found.resumes()
        assert shared.broker.child("processor") != pid


def test_a_processor_that_hangs_denies_within_its_timeout_and_goes_on_when_it_wakes(shared):
    with _load(shared) as found:
        pid = shared.broker.child("processor")
        os.kill(pid, signal.SIGSTOP)
        try:
            passed = found.passed
            stack.until(lambda: found.refused >= 8, 10, "every thread's call is refused, none hangs")
            assert found.passed <= passed + 8  # those under way when it stopped
        finally:
            os.kill(pid, signal.SIGCONT)
        found.resumes()
        assert shared.broker.child("processor") == pid


def test_a_hung_processor_is_the_brokers_fault_to_those_who_call(shared):
    pid = shared.broker.child("processor")
    with shared.broker.direct("caller") as client:
        os.kill(pid, signal.SIGSTOP)
        try:
            answer = client.get("/plain/items/hung")
        finally:
            os.kill(pid, signal.SIGCONT)
    assert answer.status_code == 503


def test_without_envoy_nothing_gets_out_until_it_is_back_by_itself(shared):
    with _load(shared) as found:
        refused, pid = found.refused, shared.broker.child("envoy")
        os.kill(pid, signal.SIGKILL)
        stack.until(lambda: found.refused > refused, why="calls fail")
        found.resumes()
        assert shared.broker.child("envoy") != pid


def test_a_tool_that_leaves_the_catalog_while_calls_run_is_not_reached_any_more_and_the_others_are(shared):
    with _load(shared) as found:
        (shared.manifests / "tool-plain.yaml").unlink()
        stack.write_manifest(shared.manifests, stack.agent("caller", {"secure": GRANTED}))
        stack.until(lambda: found.refused > 50, why="the removed tool's calls are refused")
        found.resumes()  # the other tool's
        seen = len(shared.plain.seen)
        with shared.broker.direct("caller") as client:
            answer = client.get("/plain/items/gone")
        assert (answer.status_code, answer.json()["code"], len(shared.plain.seen)) == (403, "tool_not_declared", seen)
        stack.write_manifests(
            shared.manifests, shared.tools["plain"], stack.agent("caller", dict.fromkeys(shared.tools, GRANTED))
        )
        back = len(shared.plain.seen)
        stack.until(lambda: len(shared.plain.seen) > back + 20, why="the tool is back")


def test_a_folder_that_breaks_under_load_leaves_what_was_in_force(shared):
    with _load(shared) as found:
        refused, errors = found.refused, shared.manifests / "broken.yaml"
        errors.write_text("kind: Nonsense\n")
        stack.until(lambda: any("refused" in (r.get("detail") or "") for r in shared.broker.records()), why="it is recorded")
        found.resumes()
        errors.unlink()
        assert found.refused == refused


def test_a_processor_that_comes_back_to_a_broken_folder_denies_until_it_is_mended(shared):
    with _load(shared) as found:
        errors = shared.manifests / "broken.yaml"
        errors.write_text("kind: Nonsense\n")
        pid = shared.broker.child("processor")
        os.kill(pid, signal.SIGKILL)
        stack.until(lambda: _status(f"{shared.broker.admin}/readyz") == 503, 20, "it is back, and not ready")
        passed = found.passed
        stack.until(lambda: 401 in list(found.answers.values())[-20:], 10, "it knows nobody")
        assert found.passed == passed
        errors.unlink()
        found.resumes()


def test_a_full_disk_under_the_audit_log_denies_until_there_is_room_again():
    with _place() as place:
        audit = place.state / "audit"
        audit.mkdir(parents=True, mode=0o700)
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "none", str(audit)]
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a tmpfs can't be mounted here: {done.stderr.strip()}")
        try:
            place.broker = stack.Broker(place.manifests, place.state)
            place.arrivals = [traffic.Arrivals(place.plain), traffic.Arrivals(place.secure)]
            filler = audit / "filler"
            with _load(place) as found:
                _fill(filler)
                stack.until(lambda: found.refused > 100, 30, "calls are refused")
                passed = found.passed
                with place.broker.direct("caller") as client:
                    answer = client.get("/plain/items/full")
                assert (answer.status_code, answer.json()["code"]) == (503, "audit_unavailable")
                assert "full" not in place.arrivals[0].at
                stack.until(lambda: found.refused > 300, 30, "they stay refused")
                assert found.passed <= passed + 8
                filler.unlink()
                found.resumes()
            place.broker.stop()
            assert _verified(place.broker)
        finally:
            if place.broker:
                place.broker.stop()
            subprocess.run(["umount", str(audit)], check=True)


def _fill(filler: Path) -> None:
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            return


def test_a_killed_broker_takes_envoy_and_processor_along_and_starts_again_at_once_on_the_same_state():
    with _place() as place:
        place.broker = broker = stack.Broker(place.manifests, place.state)
        place.arrivals = [traffic.Arrivals(place.plain), traffic.Arrivals(place.secure)]
        children = [broker.child("envoy"), broker.child("processor")]
        with _load(place):
            broker.process.kill()
            stack.until(lambda: all(map(_gone, children)), 10, "both die with it")
        broker.stop()
        started = time.monotonic()
        broker.start()
        assert time.monotonic() - started < 10
        with broker.direct("caller") as client:
            assert client.get("/plain/items/again").status_code == 200
        assert broker.stop() == 0
        assert _verified(broker)


def test_a_broker_does_not_start_without_a_configuration():
    with _place() as place:
        (place.manifests / "tool-plain.yaml").write_text("kind: Tool\n")
        run = subprocess.run(
            [*stack.BROKER, "up", "--json", "--manifests", str(place.manifests), "--state", str(place.state)],
            check=False,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert (run.returncode, run.stdout) == (1, "")
        assert "tool-plain.yaml:1:1" in run.stderr
        assert "Traceback" not in run.stderr


def test_an_envoy_whose_processor_has_no_configuration_opens_no_door_until_there_is_one():
    with _place() as place:
        good = (place.manifests / "tool-plain.yaml").read_text()
        (place.manifests / "tool-plain.yaml").write_text("kind: Tool\n")
        doors = {name: stack.free_port() for name in ("--proxy", "--base-url", "--admin")}
        options = [text for name, port in doors.items() for text in (name, f"127.0.0.1:{port}")]
        command = [*stack.BROKER, "serve", "--manifests", str(place.manifests), "--state", str(place.state), *options]
        with _process(command, place.folder / "serve.log"):
            health = f"http://127.0.0.1:{doors['--admin']}"
            stack.until(lambda: _status(f"{health}/healthz") == 200, 30, "the processor serves")
            assert _status(f"{health}/readyz") == 503
            run = place.state / "run"
            where = Site(
                ("127.0.0.1", doors["--proxy"]), ("127.0.0.1", doors["--base-url"]), (str(run / "processor.sock"),),
                str(run / "envoy-admin.sock"), "/etc/ssl/certs/ca-certificates.crt",
            )  # fmt: skip
            with _envoy(where, place.folder):
                stack.until((run / "envoy-admin.sock").exists, 10, "Envoy runs")
                url = f"http://127.0.0.1:{doors['--base-url']}/plain/items/a"
                assert _status(url) is None
                (place.manifests / ".draft").write_text(good)
                (place.manifests / ".draft").rename(place.manifests / "tool-plain.yaml")
                stack.until(lambda: _status(url) == 401, 20, "the door opens")
                assert place.plain.seen == []


# On a signal its one thread of Python does nothing else any more.
_HANGS = """
import signal, time
import broker.watch
from broker.cli.main import main
broker.watch.HUNG_S = 1.0
signal.signal(signal.SIGUSR1, lambda *_: time.sleep(600))
main()
"""


def test_a_processor_whose_event_loop_stands_still_ends_itself_and_says_where_it_was():
    with _place() as place:
        admin = f"127.0.0.1:{stack.free_port()}"
        options = ["--manifests", str(place.manifests), "--state", str(place.state), "--admin", admin]
        with (place.folder / "serve.log").open("wb") as log:
            processor = subprocess.Popen([sys.executable, "-c", _HANGS, "serve", *options], stdout=log, stderr=log)
        try:
            stack.until(lambda: _status(f"http://{admin}/healthz") == 200, 30, "the processor serves")
            time.sleep(2)  # longer than it may hang
            assert processor.poll() is None
            processor.send_signal(signal.SIGUSR1)
            assert processor.wait(20) == 1
        finally:
            processor.kill()
            processor.wait()
        picture = place.state / "hung.txt"
        assert "in <lambda>" in picture.read_text()
        assert picture.stat().st_mode & 0o777 == 0o600


def _status(url: str) -> int | None:
    try:
        return httpx.get(url, timeout=5).status_code
    except httpx.TransportError:
        return None


@contextmanager
def _process(command: list[str], log: Path) -> Iterator[None]:
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            yield
        finally:
            process.terminate()
            process.wait(20)


@contextmanager
def _envoy(where: Site, folder: Path) -> Iterator[None]:
    configuration = folder / "envoy.json"
    configuration.write_text(bootstrap(where).to_json())
    with _process(
        [str(envoy_binary()), "-c", str(configuration), "--disable-hot-restart", "--log-level", "error"], folder / "envoy.log"
    ):
        yield


# A processor that ends its streams cleanly, which Envoy takes for "nothing to object": only the gate stands in the way.


class Rogue(ExternalProcessorServicer):
    """Answers no request as it should; `manner` says how."""

    manner = ""

    async def Process(self, request_iterator: AsyncIterator[object], context: object) -> None:  # noqa: N802
        if self.manner == "ends at the headers":
            return
        async for message in request_iterator:
            if self.manner == "ends at the body" and message.WhichOneof("request") == "request_body":
                return
            answer = unchanged(message)
            if self.manner == "proves something else":
                proof = Struct()
                proof[site.GATE_KEY] = "deny"
                answer.dynamic_metadata[site.GATE_NAMESPACE] = proof
            if self.manner == "proves in another namespace":
                proof = Struct()
                proof[site.GATE_KEY] = site.GATE_ALLOW
                answer.dynamic_metadata[site.EXT_AUTHZ] = proof
            await context.write(answer)
            if self.manner == "ends after the headers reply":
                return


MANNERS = (
    "ends at the headers",
    "ends after the headers reply",
    "ends at the body",
    "replies without proof",
    "proves something else",
    "proves in another namespace",
)


@contextmanager
def _served(ads: Ads, processor: ExternalProcessorServicer, socket: Path) -> Iterator[None]:
    loop = asyncio.new_event_loop()
    started, over = threading.Event(), asyncio.Event()

    async def serve() -> None:
        server = grpc.aio.server()
        add_AggregatedDiscoveryServiceServicer_to_server(ads, server)
        add_ExternalProcessorServicer_to_server(processor, server)
        server.add_insecure_port(f"unix:{socket}")
        await server.start()
        started.set()
        await over.wait()
        await server.stop(0)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(10)
        loop.close()


@contextmanager
def _rogue_place() -> Iterator[tuple[Rogue, SimpleNamespace, str]]:
    with _place() as place:
        port = stack.free_port()
        where = Site(
            ("127.0.0.1", stack.free_port()), ("127.0.0.1", port), (str(place.folder / "processor.sock"),),
            str(place.folder / "admin.sock"), "/etc/ssl/certs/ca-certificates.crt",
        )  # fmt: skip
        snapshot = load(place.manifests).snapshot
        assert snapshot is not None
        ads, rogue = Ads(lambda _: None), Rogue()
        ads.publish(resources(snapshot, where, Certificates({}, None, Leaf("", ""))))
        url = f"http://127.0.0.1:{port}/plain/items/r1"
        with _served(ads, rogue, place.folder / "processor.sock"), _envoy(where, place.folder):
            rogue.manner = MANNERS[0]
            stack.until(lambda: _status(url) is not None, 10, "Envoy is there")
            place.plain.seen.clear()
            yield rogue, place, url


@pytest.fixture(scope="module")
def gated() -> Iterator[tuple[Rogue, SimpleNamespace, str]]:
    with _rogue_place() as found:
        yield found


@pytest.fixture(scope="module")
def ungated() -> Iterator[tuple[Rogue, SimpleNamespace, str]]:
    whole = listeners.call_filters
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listeners, "call_filters", lambda: [each for each in whole() if each.name != "envoy.filters.http.rbac"])
        with _rogue_place() as found:
            yield found


@pytest.mark.parametrize("manner", MANNERS)
def test_the_gate_refuses_when_the_processor(manner, gated):
    rogue, place, url = gated
    rogue.manner = manner
    answer = httpx.post(url, content=json.dumps({"title": "x"}), headers={"content-type": "application/json"}, timeout=10)
    assert answer.status_code == 403
    assert place.plain.seen == []


@pytest.mark.parametrize("manner", MANNERS)
def test_without_the_gate_the_same_request_gets_out_when_the_processor(manner, ungated):
    rogue, place, url = ungated
    rogue.manner = manner
    place.plain.seen.clear()
    answer = httpx.post(url, content=json.dumps({"title": "x"}), headers={"content-type": "application/json"}, timeout=10)
    assert answer.status_code == 200
    assert [seen.body for seen in place.plain.seen] == [b'{"title": "x"}']
