"""Limits on a whole broker: each admits exactly what it says, an end of any kind gives back a call's place, and nothing gives
back what was spent. The upstream counts for itself.
"""

import collections
import contextlib
import os
import re
import shutil
import signal
import socket
import socketserver
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import stack

from broker import clock
from broker.identity import TokenAuthority
from broker.keys import ed25519

pytestmark = pytest.mark.envoy

LOOPBACK = {"addresses": ["127.0.0.0/8"]}
OPERATIONS = {
    "items.list": {"match": {"method": "GET", "path": "/items"}, "effect": "read"},
    "items.get": {"match": {"method": "GET", "path": "/items/{id}"}, "effect": "read"},
    "items.create": {"match": {"method": "POST", "path": "/items"}, "effect": "write"},
    "items.delete": {"match": {"method": "DELETE", "path": "/items/{id}"}, "effect": "destructive"},
}
LIST, OTHER = ("GET", "/plain/items"), ("GET", "/plain/items/1")
CREATE, DELETE = ("POST", "/plain/items"), ("DELETE", "/plain/items/1")
DAY = 86_400


def _agent(name: str, owner: str = "team-test", *, limits: Any = None, tool: Any = None, operation: Any = None) -> dict[str, Any]:
    """An agent that may do everything with the tool `plain`; `operation` bounds items.list."""
    written: dict[str, Any] = {each: {} for each in OPERATIONS}
    if operation:
        written["items.list"] = {"limits": operation}
    part = {"operations": written, **({"limits": tool} if tool else {})}
    document = stack.agent(name, {"plain": part}, **({"limits": limits} if limits else {}))
    document["metadata"]["owner"] = owner
    return document


def _call(broker: stack.Broker, name: str, call: tuple[str, str], headers: dict[str, str] | None = None) -> httpx.Response:
    with broker.direct(name) as client:
        return client.request(*call, headers=headers)


def _issue_tokens(place: SimpleNamespace, documents: tuple[dict[str, Any], ...]) -> None:
    """As `broker token`, without a process for each."""
    authority = TokenAuthority(ed25519(place.state / "keys" / "tokens.key"))
    names = [each["metadata"]["name"] for each in documents if each["kind"] == "Agent"]
    place.broker._tokens |= {name: authority.mint(name, clock.now()) for name in names}


@contextmanager
def _place(*documents: dict[str, Any], env: dict[str, str] | None = None) -> Iterator[SimpleNamespace]:
    folder, upstream = stack.short_folder(), stack.Upstream()
    manifests = stack.write_manifests(
        folder / "manifests", stack.tool("plain", f"http://127.0.0.1:{upstream.port}", OPERATIONS, upstream=LOOPBACK), *documents
    )
    broker = stack.Broker(manifests, folder / "state", env)
    place = SimpleNamespace(broker=broker, upstream=upstream, manifests=manifests, state=folder / "state")
    place.issue = lambda: _issue_tokens(place, documents)
    place.issue()
    try:
        yield place
    finally:
        broker.stop()
        upstream.close()
        shutil.rmtree(folder)


# Each kind, at each place that it can be written.


@dataclass(frozen=True)
class Row:
    """`once` is each call, or gives the i-th with its headers, `free` one that the limit at `at` does not count.

    `wait` is the longest `Retry-After`, 0 for none.
    """

    admits: int
    code: str
    wait: int
    once: Any
    at: str
    written: dict[str, Any]
    free: tuple[str, str] | None = None
    agents: int = 1
    owner: str = "team-test"

    def call(self, number: int) -> tuple[tuple[str, str], dict[str, str]]:
        return self.once(number) if callable(self.once) else (self.once, {})


ALL, TOOL, OPERATION = "/spec/limits/", "/spec/tools/plain/limits/", "/spec/tools/plain/operations/items.list/limits/"
RATE, BUDGET, STEPS, CROWD = "rate_limited", "budget_exhausted", "steps_exhausted", "concurrency_limited"
KINDS = {
    "a bucket's burst": Row(3, RATE, 30, LIST, f"{ALL}rate", {"limits": {"rate": "2/min", "burst": 3}}),
    "a rate's own amount at once": Row(4, RATE, 900, LIST, f"{ALL}rate", {"limits": {"rate": "4/h"}}),
    "calls a day": Row(3, RATE, DAY, LIST, f"{ALL}calls", {"limits": {"calls": "3/day"}}),
    "calls of one tool": Row(3, RATE, DAY, LIST, f"{TOOL}calls", {"tool": {"calls": "3/day"}}),
    "calls of one operation": Row(2, RATE, DAY, LIST, f"{OPERATION}calls", {"operation": {"calls": "2/day"}}, OTHER),
    "none at all": Row(0, RATE, 0, LIST, f"{OPERATION}calls", {"operation": {"calls": "0/day"}}, OTHER),
    "writes, of which one destroys": Row(
        3, RATE, DAY, lambda i: (DELETE if i == 1 else CREATE, {}), f"{ALL}writes", {"limits": {"writes": "3/day"}}, LIST
    ),
    "what destroys": Row(1, RATE, DAY, DELETE, f"{ALL}destructive", {"limits": {"destructive": "1/day"}}, CREATE),
    "bytes out, of which 20 do not hold 4 paths of 6": Row(
        3, BUDGET, DAY, LIST, f"{ALL}bytes_out", {"limits": {"bytes_out": "20/day"}}
    ),
    "no call at once": Row(0, CROWD, 0, LIST, f"{OPERATION}concurrency", {"operation": {"concurrency": 0}}, OTHER),
    "new runs": Row(2, RATE, DAY, lambda i: (LIST, {"x-run-id": f"r{i}"}), f"{ALL}runs", {"limits": {"runs": "2/day"}}),
    "steps of the implicit run": Row(3, STEPS, 600, LIST, f"{ALL}steps_per_run", {"limits": {"steps_per_run": 3}}),
    "steps of a named run": Row(
        3, STEPS, DAY, lambda _: (LIST, {"x-run-id": "r"}), f"{ALL}steps_per_run", {"limits": {"steps_per_run": 3}}, OTHER
    ),
    "identical calls": Row(
        2, STEPS, 600, LIST, f"{ALL}identical_per_run", {"limits": {"identical_per_run": 2}}, ("GET", "/plain/items?page=2")
    ),
    "a team's agents together": Row(3, RATE, DAY, LIST, "/spec/teams/team-one/ceilings/calls", {}, agents=2, owner="team-one"),
    "a team's rate": Row(2, RATE, 1800, CREATE, "/spec/teams/team-two/ceilings/rate", {}, agents=2, owner="team-two"),
    "everyone in the environment": Row(4, RATE, DAY, CREATE, "/spec/ceilings/writes", {}, LIST, agents=4, owner="team-{}"),
}


def _names(title: str) -> list[str]:
    stem = re.sub("[^a-z0-9]+", "-", title)
    return [f"{stem}-{number}" for number in range(KINDS[title].agents)]


def _documents() -> Iterator[dict[str, Any]]:
    teams = {"team-one": {"ceilings": {"calls": "3/day"}}, "team-two": {"ceilings": {"rate": "2/h"}}}
    yield stack.platform(teams=teams, environment="test")
    for title, row in KINDS.items():
        for number, name in enumerate(_names(title)):
            yield _agent(name, row.owner.format(number), **row.written)


@pytest.fixture(scope="module")
def calm() -> Iterator[SimpleNamespace]:
    with _place(
        *_documents(),
        _agent("many", operation={"calls": "100/day"}),
        _agent("slow", limits={"time_per_run": "1s"}),
        _agent("runner", limits={"runs": "2/day", "steps_per_run": 2}),
    ) as found:
        yield found


ENVIRONMENT = "everyone in the environment"


@pytest.mark.parametrize("title", [title for title in KINDS if title != ENVIRONMENT])
def test_admits_exactly_what_it_says(calm, title):
    _admits_exactly(calm, title)


def _admits_exactly(place: SimpleNamespace, title: str) -> None:
    row, names, broker = KINDS[title], _names(title), place.broker
    before = len(place.upstream.seen)
    for number in range(row.admits + 2):
        call, headers = row.call(number)
        answer = _call(broker, names[number % len(names)], call, headers)
        assert answer.status_code == (200 if number < row.admits else 429), answer.text
        if number >= row.admits:
            _is_refused_by(broker, answer, row)
    assert len(place.upstream.seen) == before + row.admits
    if row.free:
        assert _call(broker, names[0], row.free).status_code == 200


def _is_refused_by(broker: stack.Broker, answer: httpx.Response, row: Row) -> None:
    assert answer.json()["code"] == row.code
    assert (1 <= int(answer.headers["retry-after"]) <= row.wait) if row.wait else "retry-after" not in answer.headers
    record = broker.decision(answer.headers["x-broker-decision-id"])
    assert (record["verdict"], record["code"]) == ("deny", row.code)
    file, _, pointer = record["rule"].partition("#")
    assert (file, pointer) == (f"{'platform-test' if row.agents > 1 else 'agent-' + record['agent']['name']}.yaml", row.at)
    assert record["limits"]["refused"]["limit"] == row.at.rpartition("/")[2]
    assert not [each for each in broker.records() if each["event"] == "outcome" and each["decision_id"] == record["decision_id"]]


def test_of_200_parallel_calls_on_a_budget_of_100_exactly_100_reach_the_upstream(calm):
    before = len(calm.upstream.seen)
    with calm.broker.direct("many") as client, ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda _: client.request(*LIST).status_code, range(200)))
    assert collections.Counter(answers) == {200: 100, 429: 100}
    assert len(calm.upstream.seen) == before + 100


def test_a_run_has_no_step_after_its_time(calm):
    with calm.broker.direct("slow") as client:
        assert client.request(*LIST, headers={"x-run-id": "long"}).status_code == 200
        refused = stack.until(
            lambda: found if (found := client.request(*LIST, headers={"x-run-id": "long"})).status_code != 200 else None, 5
        )
        assert (refused.status_code, refused.json()["code"]) == (429, "steps_exhausted")
        assert client.request(*LIST, headers={"x-run-id": "fresh"}).status_code == 200


def test_a_run_is_one_however_it_is_named_and_new_names_come_to_an_end(calm):
    script = [
        ({"x-run-id": "a"}, 200, 1), ({"baggage": "user=1,run.id=a;p=1"}, 200, 2), ({"x-run-id": "a"}, 429, 0),
        ({"baggage": "run.id=b"}, 200, 1), ({"x-run-id": "b", "baggage": "run.id=c"}, 200, 2),
        ({"x-run-id": "c"}, 429, 0), ({}, 429, 0), ({"x-run-id": "not a name"}, 429, 0),
    ]  # fmt: skip
    for headers, status, step in script:
        answer = _call(calm.broker, "runner", LIST, headers)
        assert answer.status_code == status, (headers, answer.text)
        assert calm.broker.decision(_id_of(calm.broker, "runner"))["step"] == step
    codes = [each["code"] for each in calm.broker.decisions(verdict="deny") if each["agent"].get("name") == "runner"]
    assert codes == ["steps_exhausted", "rate_limited", "rate_limited", "rate_limited"]


def _id_of(broker: stack.Broker, name: str) -> str:
    return [each["decision_id"] for each in broker.decisions() if each["agent"].get("name") == name][-1]


# A call's place among the open ones.


class Rough:
    """An upstream that does with a request what the last part of its path says; it holds one until the peer is gone."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.gone: list[str] = []
        rough = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                data = b""
                while b"\r\n\r\n" not in data:
                    if not (part := self.request.recv(65536)):
                        return
                    data += part
                what = data.split(b" ")[1].decode().rpartition("/")[2]
                rough.seen.append(what)
                rough.act(self.request, what)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def act(self, connection: socket.socket, what: str) -> None:
        status = {"fails": "500 Internal Server Error", "busy": "503 Service Unavailable"}.get(what, "200 OK")
        size = 1000 if what in ("half", "cut") else 2
        head = f"HTTP/1.1 {status}\r\ncontent-length: {size}\r\nconnection: close\r\n\r\n".encode()
        if what not in ("silent", "resets", "closes"):
            connection.sendall(head + b"ok")
        if what == "resets":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if what in ("silent", "half"):
            with contextlib.suppress(OSError):
                connection.recv(1)
            self.gone.append(what)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def rough() -> Iterator[SimpleNamespace]:
    """Two agents' places: one call at once with the tools of a rough upstream, one of them with a secret in a file."""
    upstream = Rough()
    place = f"http://127.0.0.1:{upstream.port}"
    credential = {"issuer": "static", "secret": {"file": "secret"}}
    crowd = {"operations": {each: {} for each in OPERATIONS}}
    with _place(
        stack.tool("rough", place, OPERATIONS, upstream=LOOPBACK),
        stack.tool("secret", place.replace("127.0.0.1", "localhost"), OPERATIONS, upstream=LOOPBACK, credential=credential),
        stack.agent("one", {"rough": crowd, "secret": crowd}, limits={"concurrency": 1, "calls": "10k/day"}),
    ) as found:
        (found.manifests / "secret").write_text("s3cret")
        yield SimpleNamespace(**vars(found), rough=upstream)
        upstream.close()


@contextmanager
def _unfinished(place: SimpleNamespace, what: str, *, body: bytes = b"", declared: int = 0) -> Iterator[socket.socket]:
    """A call that is under way: its request is with the upstream or, with half a body, with Envoy."""
    host, _, port = place.broker.ready["base_url"].rpartition(":")
    token = place.broker.token("one")
    method = "POST /rough/items" if declared else f"GET /rough/items/{what}"
    framing = f"content-type: application/json\r\ncontent-length: {declared}\r\n" if declared else ""
    seen = len(place.rough.seen)
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(f"{method} HTTP/1.1\r\nhost: x\r\nx-broker-token: {token}\r\n{framing}\r\n".encode() + body)
        if not declared:
            stack.until(lambda: len(place.rough.seen) > seen, why="the upstream has it")
        yield connection


def _free(place: SimpleNamespace) -> bool:
    """Whether a call has a place; when it does, that call has ended too."""
    with place.broker.direct("one") as client:
        passed = client.get("/rough/items/fine").status_code == 200
    if passed:
        allowed = {record["decision_id"] for record in place.broker.decisions(verdict="allow")}
        stack.until(lambda: _ended(place.broker) >= allowed, why="each call has its outcome")
    return passed


def _comes_back(place: SimpleNamespace) -> None:
    stack.until(lambda: _free(place), 10, "the place is free again")
    assert len(_ended(place.broker)) == sum(record["event"] == "outcome" for record in place.broker.records()), "each has one"


def _ended(broker: stack.Broker) -> set[str]:
    return {record["decision_id"] for record in broker.records() if record["event"] == "outcome"}


@pytest.mark.parametrize("what", ["fine", "fails", "busy", "resets", "closes", "cut"])
def test_a_place_comes_back_after_an_answer_of_any_kind(rough, what):
    assert _free(rough)
    with rough.broker.direct("one") as client, contextlib.suppress(httpx.TransportError):
        answer = client.get(f"/rough/items/{what}")
        assert (answer.status_code == 200) == (what == "fine")
    _comes_back(rough)


@pytest.mark.parametrize("what", ["silent", "half"])
def test_a_place_is_taken_while_the_upstream_is_silent_and_comes_back_when_the_client_is_gone(rough, what):
    assert _free(rough)
    gone = len(rough.rough.gone)
    with _unfinished(rough, what) as connection:
        if what == "half":
            assert b"ok" in stack.exchange_bytes(connection, b"", 1)
        refused = _call(rough.broker, "one", ("GET", "/rough/items/fine"))
        assert (refused.status_code, refused.json()["code"], refused.headers["retry-after"]) == (429, "concurrency_limited", "1")
        assert rough.rough.seen[-1] == what
    _comes_back(rough)
    stack.until(lambda: len(rough.rough.gone) > gone, why="the upstream's connection ended with it")


def test_a_client_that_leaves_before_its_body_is_whole_has_taken_nothing(rough):
    with _unfinished(rough, "", body=b'{"a":', declared=9):
        assert _free(rough)
    _comes_back(rough)


def test_a_place_comes_back_where_there_was_no_credential(rough):
    secret = rough.manifests / "secret"
    content = secret.read_text()
    secret.unlink()
    assert _call(rough.broker, "one", ("GET", "/secret/items/fine")).json()["code"] == "credential_unavailable"
    _comes_back(rough)
    secret.write_text(content)
    assert _call(rough.broker, "one", ("GET", "/secret/items/fine")).status_code == 200


def test_a_place_comes_back_where_there_was_no_record(rough):
    _comes_back(rough)
    # Something else in the log: the broker writes no more until it is as it was.
    *_, segment = sorted((rough.state / "audit").glob("*.jsonl"))
    size = segment.stat().st_size
    with segment.open("ab") as file:
        file.write(b"x")
    try:
        assert _call(rough.broker, "one", ("GET", "/rough/items/fine")).json()["code"] == "audit_unavailable"
    finally:
        os.truncate(segment, size)
    _comes_back(rough)


def test_ten_clients_that_leave_one_after_the_other_take_no_place_with_them(rough):
    for _ in range(10):
        stack.until(lambda: _free(rough))
        with _unfinished(rough, "silent"):
            pass
    _comes_back(rough)


# What was spent stays spent.


@pytest.fixture(scope="module")
def shaken() -> Iterator[SimpleNamespace]:
    documents = [_agent(name, f"team-{number}") for number, name in enumerate(_names(ENVIRONMENT))]
    with _place(
        stack.platform(environment="test", ceilings={"writes": "4/day"}),
        *documents,
        _agent("hot", limits={"calls": "3/day"}),
        _agent("driven", limits={"calls": "400/day"}),
        *(_agent(name, limits={"calls": "4/day", "steps_per_run": 4, "rate": "4/h"}) for name in SPENDERS),
    ) as found:
        yield found


def test_a_ceiling_of_the_environment_is_everyones_together(shaken):
    _admits_exactly(shaken, ENVIRONMENT)


def _reload(place: SimpleNamespace, document: dict[str, Any]) -> None:
    def revision() -> str:
        return httpx.get(f"{place.broker.admin}/readyz").json()["revision"]

    before = revision()
    stack.write_manifest(place.manifests, document)
    stack.until(lambda: revision() != before, 5, "the change is in force")


def test_a_limit_that_is_raised_lowered_taken_out_and_put_back_knows_what_was_spent(shaken):
    def passes(calls: int) -> int:
        return [_call(shaken.broker, "hot", LIST).status_code for _ in range(calls)].count(200)

    assert passes(4) == 3
    _reload(shaken, _agent("hot", limits={"calls": "5/day"}))
    assert passes(4) == 2
    _reload(shaken, _agent("hot", limits={"calls": "2/day"}))
    assert passes(2) == 0
    _reload(shaken, _agent("hot"))
    assert passes(2) == 2
    _reload(shaken, _agent("hot", limits={"calls": "5/day"}))
    assert passes(2) == 0
    broken = shaken.manifests / "broken.yaml"
    broken.write_text("kind: [")
    try:
        stack.until(lambda: "broken.yaml:" in shaken.broker.log(), why="it is reported")
        assert passes(2) == 0
    finally:
        broken.unlink()
    _reload(shaken, _agent("hot", limits={"calls": "6/day"}))
    assert passes(3) == 1


def _kill(place: SimpleNamespace) -> None:
    """Kill -9 the processor, and wait until its successor, on the same state, answers."""
    pid = place.broker.child("processor")
    os.kill(pid, signal.SIGKILL)
    stack.until(lambda: _ready(place), 20, "it is back")


def _ready(place: SimpleNamespace) -> bool:
    with place.broker.direct("hot") as client:
        return client.get("/plain/nowhere").status_code == 403


def test_a_processor_killed_in_the_middle_of_calls_undercounts_nothing(shaken):
    broker, stopping = shaken.broker, threading.Event()
    arrived: list[str] = []
    answer = shaken.upstream.answer

    def noted(seen: stack.Seen) -> Any:
        arrived.append(seen.path)
        return answer(seen)

    def work(_: int) -> collections.Counter[Any]:
        met = collections.Counter[Any]()
        with broker.direct("driven") as client:
            while not met[429] and not stopping.is_set():
                try:
                    status: Any = client.request(*LIST).status_code
                except httpx.TransportError as error:
                    status = type(error).__name__
                met[status] += 1
                if status != 200:
                    stopping.wait(0.05)  # leaves the processor the cores that it needs to come back
        return met

    shaken.upstream.answer = noted
    try:
        with ThreadPoolExecutor(8) as pool:
            workers = [pool.submit(work, number) for number in range(8)]
            for number in (100, 200):
                stack.until(lambda number=number: len(arrived) > number, 20, "calls pass")
                _kill(shaken)
            answers = sum((worker.result(30) for worker in workers), collections.Counter())
            stopping.set()
    finally:
        stopping.set()
        shaken.upstream.answer = answer
    allowed = [each for each in broker.decisions(verdict="allow") if each["agent"].get("name") == "driven"]
    refused = broker.decision(_id_of(broker, "driven"))["limits"]["refused"]
    assert answers[200] <= len(arrived) <= refused["spent"] == len(allowed) == 400
    assert answers[429] == 8


SPENDERS = ("restarted", "torn", "lost")


def test_neither_a_restart_nor_a_kill_nor_a_lost_picture_of_the_ledger_gives_back_what_was_spent(shaken):
    def passed(name: str, calls: int) -> list[int]:
        return [_call(shaken.broker, name, LIST).status_code for _ in range(calls)]

    picture = shaken.state / "ledger.json"
    for name in SPENDERS:
        assert passed(name, 3) == [200] * 3
    assert shaken.broker.stop() == 0
    shaken.broker.start()
    shaken.issue()
    assert passed("restarted", 2) == [200, 429]
    picture.write_bytes(picture.read_bytes()[:-20])
    _kill(shaken)
    assert passed("torn", 2) == [200, 429]
    picture.unlink()
    _kill(shaken)
    assert passed("lost", 2) == [200, 429]
    assert [passed(name, 1) for name in SPENDERS] == [[429]] * 3
