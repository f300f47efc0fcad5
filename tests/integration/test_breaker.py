"""The circuit breaker of a tool, with a real Envoy: what fails is left alone for a while, and nothing else notices."""

import contextlib
import json
import resource
import select
import shutil
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import pytest
import stack

from broker.dataplane.clusters import OPEN_S

pytestmark = pytest.mark.envoy

ITEMS = {"items.get": {"match": {"method": "GET", "path": "/items/{id}"}, "effect": "read"}}
LOOPBACK = {"addresses": ["127.0.0.0/8"]}
TOOLS = ("failing", "away", "hanging-up", "faulty", "silent", "well", "untrusted")
OPEN_CALLS, WAITING_CALLS, FILES = 1000, 500, 8192
TRIPS, AT_ONCE_S = 5, 0.5


class _HangingUp:
    """An upstream that takes every request and closes without an answer."""

    def __init__(self) -> None:
        self.seen = 0
        upstream = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                if self.rfile.readline():
                    upstream.seen += 1

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Silent:
    """An upstream that takes every connection and never says anything."""

    def __init__(self) -> None:
        self.taken: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0), backlog=OPEN_CALLS)
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.taken.append(self._server.accept()[0])

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)  # so that nobody waits at it
        self._server.close()
        for each in self.taken:
            each.close()


@pytest.fixture(scope="module")
def _files() -> Iterator[None]:
    """As many open files as two ends of all calls are, here and in Envoy, which inherits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < FILES:
        pytest.skip(f"needs {FILES} open files; the system allows {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, FILES), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def place(_files: None) -> Iterator[SimpleNamespace]:
    folder, hanging_up, silent = stack.short_folder(), _HangingUp(), _Silent()
    failing, faulty, well = stack.Upstream(), stack.Upstream(), stack.Upstream()
    untrusted = stack.Upstream(stack.TestCA().issue(folder / "certs", "127.0.0.1"))
    listening = (failing.port, stack.free_port(), hanging_up.port, faulty.port, silent.port, well.port, untrusted.port)
    ports = dict(zip(TOOLS, listening, strict=True))
    model = {"params": {"body": {"properties": {"model": {"const": "m"}}}}}
    stack.write_manifests(
        folder / "manifests",
        *(
            stack.tool(name, f"http{'s' * (name == 'untrusted')}://127.0.0.1:{port}", ITEMS, upstream=LOOPBACK)
            for name, port in ports.items()
        ),
        stack.tool(
            "wiki", f"http://127.0.0.1:{stack.free_port()}", {"find": {"effect": "read"}}, protocol="mcp", upstream=LOOPBACK
        ),
        stack.tool(
            "llm",
            f"http://127.0.0.1:{stack.free_port()}",
            {"chat.completions": {"effect": "read"}},
            protocol="openai",
            upstream=LOOPBACK,
        ),
        *(
            stack.agent(
                name,
                {
                    **{tool: {"operations": {"items.get": {}}} for tool in TOOLS},
                    "wiki": {"operations": {"find": {}}},
                    "llm": {"operations": {"chat.completions": model}},
                },
                limits={"tokens": "10k/day"},
            )
            for name in ("one", "other")
        ),
    )
    broker = stack.Broker(folder / "manifests", folder / "state")
    upstreams = {
        "failing": failing,
        "hanging_up": hanging_up,
        "faulty": faulty,
        "silent": silent,
        "well": well,
        "untrusted": untrusted,
    }
    yield SimpleNamespace(broker=broker, ports=ports, **upstreams)
    broker.stop()
    for upstream in upstreams.values():
        upstream.close()
    shutil.rmtree(folder)


def _get(place: SimpleNamespace, tool: str, agent: str = "one") -> httpx.Response:
    with place.broker.direct(agent) as client:
        return client.get(f"/{tool}/items/1")


def _trip(place: SimpleNamespace, tool: str, status: int = 503) -> None:
    """Call until the breaker opens: after so many failures, and the few calls that pass until Envoy's threads all know."""
    answers: list[httpx.Response] = []

    def opened() -> bool:
        answers.append(_get(place, tool))
        opens = b"upstream_unavailable" in answers[-1].content
        assert answers[-1].status_code == (503 if opens else status)
        return opens

    stack.until(opened, OPEN_S, "the breaker opens")
    assert TRIPS < len(answers) < 4 * TRIPS


def _assert_refused(place: SimpleNamespace, tool: str, agent: str = "one") -> None:
    """The agent is told, at once and in the broker's words, and it is on record."""
    place.broker.token(agent)
    began = time.monotonic()
    answer = _get(place, tool, agent)
    assert time.monotonic() - began < OPEN_S / 2
    assert (answer.status_code, answer.json()["code"]) == (503, "upstream_unavailable")
    assert answer.headers["retry-after"] == str(round(OPEN_S))
    outcome = place.broker.outcome(answer.headers["x-broker-decision-id"])
    assert (outcome["code"], outcome["upstream"]["status"]) == ("upstream_unavailable", 0)
    assert "no_healthy_upstream" in outcome["detail"]


def test_a_tool_that_fails_is_left_alone_for_a_while_and_taken_up_again_by_itself(place):
    whole = place.failing.answer
    place.failing.answer = lambda _: (503, {}, b"down")
    _trip(place, "failing")
    opened, seen = time.monotonic(), len(place.failing.seen)
    for agent in ("one", "other"):
        _assert_refused(place, "failing", agent)
        assert _get(place, "well", agent).status_code == 200
    place.failing.answer = whole
    assert len(place.failing.seen) == seen
    stack.until(lambda: _get(place, "failing").status_code == 200, 2 * OPEN_S, "it is taken up again")
    assert time.monotonic() - opened > OPEN_S - AT_ONCE_S
    assert len(place.failing.seen) == seen + 1


def test_a_tool_that_is_not_there_is_left_alone_for_a_while_and_taken_up_again_by_itself(place):
    _trip(place, "away")
    _assert_refused(place, "away")
    back = stack.Upstream(port=place.ports["away"])
    try:
        stack.until(lambda: _get(place, "away").status_code == 200, 2 * OPEN_S, "it is taken up again")
    finally:
        back.close()


def test_a_tool_that_is_not_who_it_should_be_is_left_alone(place):
    _trip(place, "untrusted", 403)
    _assert_refused(place, "untrusted")
    assert place.untrusted.seen == []


def test_an_agent_that_makes_a_tool_hang_up_cuts_nobody_off(place):
    for call in range(4 * TRIPS):
        assert _get(place, "hanging-up").status_code == 503
        assert place.hanging_up.seen == call + 1


def test_an_agent_that_makes_a_tool_answer_500_cuts_nobody_off(place):
    whole = place.faulty.answer
    place.faulty.answer = lambda _: (500, {}, b"a bug")
    for _ in range(4 * TRIPS):
        assert _get(place, "faulty").status_code == 500
    place.faulty.answer = whole
    assert _get(place, "faulty", "other").status_code == 200


def test_an_agent_that_gives_its_calls_up_cuts_nobody_off(place):
    for _ in range(2 * TRIPS):
        taken = len(place.silent.taken)
        with pytest.raises(httpx.ReadTimeout), place.broker.direct("one") as client:
            client.get("/silent/items/1", timeout=0.3)
        stack.until(lambda taken=taken: len(place.silent.taken) > taken)
    with pytest.raises(httpx.ReadTimeout), place.broker.direct("other") as client:
        client.get("/silent/items/1", timeout=AT_ONCE_S)


def test_failures_between_successes_cut_nobody_off(place):
    for _ in range(2 * TRIPS):
        whole = place.well.answer
        place.well.answer = lambda _: (503, {}, b"")
        assert _get(place, "well").status_code == 503
        place.well.answer = whole
        assert _get(place, "well", "other").status_code == 200


def test_the_client_of_an_mcp_server_reads_it_as_the_result_of_its_call(place):
    call = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "find", "arguments": {}}}
    with place.broker.direct("one") as client:
        answer = stack.until(lambda: next((a for a in [client.post("/wiki", json=call)] if a.status_code == 200), None))
    result = answer.json()["result"]
    assert (answer.status_code, answer.json()["id"], result["isError"]) == (200, 7, True)
    assert json.loads(result["content"][0]["text"])["code"] == "upstream_unavailable"


def test_a_model_call_that_was_not_sent_has_used_nothing(place):
    asked = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_completion_tokens": 1500}
    with place.broker.direct("one") as client:
        # Were it counted at what it may use, the tenth would be over the day's 10k tokens.
        answers = [client.post("/llm/v1/chat/completions", json=asked) for _ in range(2 * TRIPS)]
    assert [answer.status_code for answer in answers] == [503] * 2 * TRIPS
    outcome = place.broker.outcome(answers[-1].headers["x-broker-decision-id"])
    assert (outcome["code"], outcome["tokens"]["output"]) == ("upstream_unavailable", 0)


def test_a_tool_that_never_answers_holds_a_bounded_number_of_calls_and_denies_nobody_else(place):
    (host, port), before = place.broker.ready["base_url"].split(":"), len(place.silent.taken)
    call = f"GET /silent/items/1 HTTP/1.1\r\nhost: {host}\r\nx-broker-token: {place.broker.token('one')}\r\n\r\n".encode()
    with contextlib.ExitStack() as held:
        calls, answers = {}, select.poll()
        for number in range(1, OPEN_CALLS + WAITING_CALLS + 2):
            connection = held.enter_context(socket.create_connection((host, int(port))))
            calls[connection.fileno()] = connection
            answers.register(connection, select.POLLIN)
            connection.sendall(call)
            if number % 250 == 0 and number <= OPEN_CALLS:
                # gRPC refuses some of more than a thousand calls that come at once.
                stack.until(lambda number=number: len(place.silent.taken) - before == number, why="as many as fit are open")
        refused = calls[answers.poll(30_000)[0][0]]
        answer = refused.recv(4096)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"upstream_unavailable" in answer
        assert len(place.silent.taken) - before == OPEN_CALLS
        # Each of them holds a stream of the processor, more than Envoy's default lets it have.
        assert _get(place, "well", "other").status_code == 200
