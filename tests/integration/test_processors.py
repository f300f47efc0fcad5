"""Several processors behind one Envoy: one dies, hangs, is upgraded or cut off, and only calls in flight on it fail, closed."""

import resource
import shutil
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import stack
from processors import Fleet
from streams import Events, Listener

import broker

pytestmark = [pytest.mark.envoy, pytest.mark.slow]

NAMES = ("one", "two", "three")
CALLERS = 6
LIMIT = 400
CUT_S = 6.0  # three seconds, on a machine that does much else
LOOPBACK = {"addresses": ["127.0.0.0/8"]}
LIST = {"match": {"method": "GET", "path": "/items"}, "effect": "read"}
FOUND = {"match": {"method": "GET", "path": "/items/{id}"}, "effect": "read"}
NOTICED_S = 2.5  # a second and a half, on a machine that does much else
# Denied, or cut in the middle of its answer.
CLOSED = {503, 0}


@pytest.fixture(scope="module")
def upstream():
    server = stack.Upstream()
    yield server
    server.close()


@pytest.fixture(scope="module")
def events():
    server = Events()
    yield server
    server.close()


def tool(upstream, **operations):
    address = f"http://127.0.0.1:{upstream.port}"
    return stack.tool("plain", address, {"items.list": LIST, **operations}, upstream=LOOPBACK)


def agent(*operations, **limits):
    granted = {name: {} for name in ("items.list", *operations)}
    tools = {"plain": {"operations": granted}, **({} if limits else {"events": {"operations": {"items.list": {}}}})}
    return stack.agent("caller", tools, limits=limits)


@pytest.fixture(scope="module")
def running(upstream, events):
    # What a busy machine does to Redis is not the subject here.
    reads_pass = stack.platform(ledger={"unsafe_reads_without_redis": True})
    streamed = stack.tool("events", f"http://127.0.0.1:{events.port}", {"items.list": LIST}, upstream=LOOPBACK)
    fleet = Fleet(*NAMES, documents=[tool(upstream), streamed, agent(), reads_pass])
    yield fleet
    fleet.close()


@pytest.fixture
def fleet(running, upstream):
    """All of it whole."""
    for each in running.processors:
        if each.process.poll() is not None:
            each.start()
    for each in running.processors:
        each.until_ready()
    upstream.seen.clear()
    return running


def test_calls_are_spread_over_all_processors(fleet):
    before = [each.decided for each in fleet.processors]
    with fleet.load() as load:
        load.more(300)
    shares = [each.decided - known for each, known in zip(fleet.processors, before, strict=True)]
    assert sum(shares) == len(load.answers)
    assert min(shares) > sum(shares) / 10, shares
    assert load.failed == []


def test_of_one_that_is_killed_only_the_calls_in_flight_fail_and_closed(fleet, upstream):
    with fleet.load(CALLERS) as load:
        fleet.processors[1].kill()
        killed = time.monotonic()
        load.more(300)
    # Envoy's workers hear of it a moment later.
    assert all(began < killed + 0.1 for began, _, _ in load.failed), [(b - killed, e - killed, a) for b, e, a in load.failed]
    assert len(load.failed) <= CALLERS
    assert {answer.status_code for _, _, answer in load.failed} <= CLOSED
    assert len(upstream.seen) <= len(load.answers)  # what may have been judged is never judged again


def test_of_one_that_hangs_only_the_calls_in_flight_fail_and_closed_and_it_serves_again(fleet, upstream):
    hung = fleet.processors[1]
    with fleet.load(CALLERS) as load:
        hung.freeze()
        frozen = time.monotonic()
        try:
            stack.until(lambda: time.monotonic() > frozen + 4 and load.more(300) is None, 20, "calls go on")
        finally:
            hung.thaw()
        known = hung.decided
        stack.until(lambda: hung.decided > known + 20, 10, "it serves again")
    assert all(began < frozen + NOTICED_S for began, _, _ in load.failed), [
        (b - frozen, e - b, a.text) for b, e, a in load.failed
    ]
    assert len(load.failed) <= 2 * CALLERS
    assert {answer.status_code for _, _, answer in load.failed} <= CLOSED
    assert len(upstream.seen) <= len(load.answers)


@pytest.fixture
def streams(fleet, events):
    """Streams that are open, spread over the processors."""
    with ExitStack() as held:
        opened = []
        for number in range(9):
            head = f"GET /events/items?{number} HTTP/1.1\r\nhost: x\r\nx-broker-token: {fleet.token}\r\n\r\n"
            connection = socket.create_connection(("127.0.0.1", fleet.base_url), timeout=10)
            opened.append(Listener(connection, head.encode()))
            held.callback(opened[-1].close)
            assert opened[-1].began.wait(10)
            assert opened[-1].answer.startswith(b"HTTP/1.1 200"), opened[-1].answer
        yield opened


def test_what_is_open_on_one_that_hangs_is_cut_and_nothing_else(fleet, streams):
    hung = fleet.processors[1]
    hung.freeze()
    try:
        stack.until(lambda: any(each.ended.is_set() for each in streams), CUT_S, "what it held is cut")
        ended = sum(each.ended.is_set() for each in streams)
        assert ended < len(streams)
    finally:
        hung.thaw()


def test_a_revocation_at_one_cuts_what_is_open_on_each(fleet, streams):
    fleet.verb("agents", "revoke", "caller", "--reason", "it lies")
    end = time.monotonic() + 2
    try:
        for each in streams:
            assert each.ended.wait(max(0.0, end - time.monotonic()))
        # One that held no stream may be a moment later, within the same two seconds.
        stack.until(lambda: all(_revoked(fleet)), end - time.monotonic(), "all know")
        assert all(_revoked(fleet))
    finally:
        fleet.verb("agents", "release", "caller", "--reason", "a test")
        fleet.token = fleet.verb("token", "caller")
    stack.until(lambda: [fleet.call().status_code for _ in range(9)] == [200] * 9, 10, "it is served again")


def _revoked(fleet):
    """More calls than there are processors, and whether each is refused for that."""
    with fleet.client() as client:
        return [client.get("/plain/items").json().get("code") == "agent_revoked" for _ in range(12)]


def test_one_that_can_not_write_its_record_gets_no_calls_until_it_can(fleet):
    full = fleet.processors[1]
    [segment] = (full.state / "audit").glob("*.jsonl")
    resource.prlimit(full.process.pid, resource.RLIMIT_FSIZE, (segment.stat().st_size, resource.RLIM_INFINITY))
    with fleet.load(CALLERS) as load:
        stack.until(lambda: "the record can't be written" in full.health().get("reasons", ()), 10, "it says so")
        noticed = time.monotonic()
        load.more(500)
        assert all(began < noticed + NOTICED_S for began, _, _ in load.failed), load.statuses
        resource.prlimit(full.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        full.until_ready()
        known = full.decided
        stack.until(lambda: full.decided > known + 20, 10, "it serves again")


def version(folder: Path) -> Path:
    """Another version of the code: this one under another number."""
    shutil.copytree(Path(broker.__file__).parent, folder / "broker", ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "broker" / "__init__.py"
    file.write_text(file.read_text().replace(broker.__version__, "99.0.0"))
    return folder


def test_a_rolling_upgrade_under_load_fails_at_most_calls_in_flight(fleet, tmp_path):
    newer = version(tmp_path)
    with fleet.load(CALLERS) as load:
        stopped = []
        for each in fleet.processors:
            stopped.append(time.monotonic())
            assert each.terminate() == 0
            each.start(newer)
            each.until_ready()
            known = each.decided
            stack.until(lambda each=each, known=known: each.decided > known + 20, 10, "it serves")
    assert len(load.failed) <= CALLERS, [(b - moment, answer.text) for b, _, answer in load.failed for moment in stopped]
    assert {answer.status_code for _, _, answer in load.failed} <= CLOSED


def test_without_any_nothing_passes_and_with_the_first_that_comes_calls_do(fleet, upstream):
    for each in fleet.processors:
        each.kill()
    upstream.seen.clear()
    with fleet.client() as client:
        assert {client.get("/plain/items").status_code for _ in range(20)} == {503}
    assert upstream.seen == []
    fleet.processors[2].start()
    stack.until(lambda: fleet.call().status_code == 200, 20, "calls are served")


def test_whichever_are_left_bring_a_change_to_envoy_and_those_that_come_later_agree(fleet, upstream):
    one, two, three = fleet.processors
    assert fleet.call(path="/plain/items/1").status_code == 403
    one.kill()
    two.freeze()
    try:
        stack.write_manifest(fleet.manifests, tool(upstream, **{"items.get": FOUND}))
        stack.write_manifest(fleet.manifests, agent("items.get"))
        stack.until(lambda: fleet.call(path="/plain/items/1").status_code == 200, 20, "the change is in force")
    finally:
        two.thaw()
    one.start()
    one.until_ready()
    stack.until(lambda: len({each.health().get("revision") for each in fleet.processors}) == 1, 10, "all have one revision")
    assert three.health()["ready"]
    with fleet.client() as client:
        answers = [client.get("/plain/items/1") for _ in range(30)]
    assert {answer.status_code for answer in answers} == {200}


def test_a_name_is_one_processors_alone(fleet, tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as refused:
        _serve(fleet, tmp_path, "one", fleet.redis.url)
    assert "another processor serves at" in refused.value.stderr
    assert fleet.call().status_code == 200


def test_one_with_other_keys_than_those_beside_it_does_not_start(fleet, tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as refused:
        _serve(fleet, tmp_path, "four", fleet.redis.url)
    assert "this processor has other keys than" in refused.value.stderr
    assert "copy its ca.pem and keys/ca.key, keys/jwt.key and keys/tokens.key" in refused.value.stderr
    assert "limits can't be checked" not in refused.value.stderr  # it ends before it began, and that is no alarm
    assert fleet.call().status_code == 200


def test_one_with_the_records_key_of_another_does_not_start(fleet, tmp_path):
    shutil.copytree(fleet.processors[0].state / "keys", tmp_path / "s" / "keys")
    shutil.copy(fleet.processors[0].state / "ca.pem", tmp_path / "s")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        _serve(fleet, tmp_path, "four", fleet.redis.url)
    assert (
        "this processor has the record's key of one, which serves beside it; give each a keys/audit.key" in refused.value.stderr
    )
    assert fleet.call().status_code == 200


def test_a_taken_admin_port_is_said_in_one_line(fleet, tmp_path):
    taken = fleet.processors[0].admin
    with pytest.raises(subprocess.CalledProcessError) as refused:
        _serve(fleet, tmp_path, "four", fleet.redis.url, taken)
    assert refused.value.returncode == 2
    assert refused.value.stderr.splitlines() == [
        f"broker: {taken} can't be used (Address already in use); choose another with --admin HOST:PORT"
    ]


def test_processors_of_one_envoy_must_count_together(fleet, tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as refused:
        _serve(fleet, tmp_path, "four", "")
    assert "must count together; name their ledger with --redis" in refused.value.stderr


def _serve(fleet, folder, name, redis, admin=""):
    command = [*stack.BROKER, "serve", "--manifests", fleet.manifests, "--state", folder / "s", "--run", fleet.run]
    options = ["--processor", name, "--admin", admin or f"127.0.0.1:{stack.free_port()}", "--redis", redis]
    subprocess.run([*command, *options], capture_output=True, text=True, timeout=30, check=True)


@pytest.fixture
def counting(upstream):
    """One whose limit is soon spent, and without reads that pass uncounted."""
    upstream.seen.clear()
    fleet = Fleet(*NAMES, documents=[tool(upstream), agent(calls=f"{LIMIT}/day")])
    yield fleet
    fleet.close()


def test_one_that_is_cut_off_from_the_ledger_judges_nothing_and_the_limit_holds(counting, upstream):
    cut_off = counting.processors[2]
    with counting.load(CALLERS) as load:
        counting.link.cut()
        stack.until(lambda: load.statuses[429] > 100, 30, "nothing is left to spend")
        assert not cut_off.health()["ready"]
    assert load.statuses[200] <= LIMIT
    # It denied what came until Envoy had asked it; then the others served.
    assert load.statuses[200] > LIMIT * 0.8, load.statuses
    counting.link.mend()
    cut_off.until_ready()
    known = cut_off.decided
    with counting.load(CALLERS) as after:
        stack.until(lambda: cut_off.decided > known + 20, 10, "it judges again")
    # What a call gave back that failed meanwhile may be spent.
    assert load.statuses[200] + after.statuses[200] <= LIMIT
    counting.redis.stop()
    with counting.client() as client:
        answers = [client.get("/plain/items") for _ in range(30)]
    assert {answer.status_code for answer in answers} == {503}
    assert {answer.json()["code"] for answer in answers} == {"ledger_unavailable"}
    assert len(upstream.seen) <= LIMIT
