"""The image, and the stack of compose/, in a real engine: Debian's, with images that stand for those of a registry.

Redis and Prometheus are Debian's own. Grafana is in no registry that tests reach and is not started: that what it reads is well
formed and in place, `unit/test_compose.py` says.
"""

import json
import re
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from docker.errors import ContainerError
from testcontainers.compose import DockerCompose

from broker.dataplane.kubernetes import ADMIN_PORT
from tests import stack
from tests.engine import BASE, NAME_SERVER, Engine, engine
from tests.namespaces import within

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "compose"
BROKER, REDIS, PROMETHEUS = (f"broker-tests/{name}" for name in ("broker", "redis", "prometheus"))
PROCESSORS = ("processor-1", "processor-2", "processor-3")
pytestmark = pytest.mark.slow
# In Debian's images, what is in the registry's: the program, found by the same name.
_SERVERS = f"FROM {BASE}\nRUN apt-get update && apt-get install --yes --no-install-recommends prometheus redis-server\n"
_PROMETHEUS = f'FROM {REDIS}\nENTRYPOINT ["/bin/prometheus"]\n'


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine with the broker's image, and those that stand for Redis' and Prometheus'."""
    with engine() as made:
        with ThreadPoolExecutor() as pool:
            broker = pool.submit(made.build, ROOT, BROKER, {"BASE_IMAGE": BASE})
            for name, text in ((REDIS, _SERVERS), (PROMETHEUS, _PROMETHEUS)):
                context = tmp_path_factory.mktemp("context")
                (context / "Dockerfile").write_text(text)
                made.build(context, name, {})
            broker.result()
        yield made


# The image.


def test_the_image_runs_as_a_user_of_its_own_and_holds_what_a_pod_calls(containers):
    assert containers.client.images.get(BROKER).attrs["Config"]["User"] == "10001:10001"
    programs = (
        "id -u; for each in sh cp python broker envoy; do command -v $each; done; stat -c '%u %a' /var/lib/broker /run/broker"
    )
    assert containers.in_image(BROKER, "sh", "-c", programs).split() == [
        "10001",
        *("/usr/bin/sh", "/usr/bin/cp", *(f"/opt/broker/bin/{name}" for name in ("python", "broker", "envoy"))),
        *("10001", "700", "10001", "700"),
    ]
    assert "1.40.0" in containers.in_image(BROKER, "envoy", "--version")


def test_the_image_has_no_installer_and_no_compiler(containers):
    # Of these it has one, so that the question is known to find what is there.
    names = "sh pip pip3 uv gcc cc c++ g++ clang ld make cargo go curl wget git"
    assert containers.in_image(BROKER, "sh", "-c", f"for each in {names}; do command -v $each; done; true").split() == [
        "/usr/bin/sh"
    ]
    asked = "from importlib.util import find_spec; print([m for m in ('ssl', 'pip', 'setuptools', 'ensurepip') if find_spec(m)])"
    assert containers.in_image(BROKER, "python", "-c", asked).strip() == "['ssl']"
    left = "find /var/lib/apt/lists /var/cache/apt /root/.cache /tmp -type f 2>/dev/null; true"
    assert containers.in_image(BROKER, "sh", "-c", left, user="root") == ""


def test_it_serves_with_a_read_only_root_and_turns_healthy(containers, tmp_path):
    (tmp_path / "manifests").mkdir(mode=0o755)
    stack.write_manifest(tmp_path / "manifests", stack.agent("bot", {}))
    tmp_path.chmod(0o755)
    run = containers.client.containers.run(
        BROKER,
        detach=True,
        read_only=True,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges:true"],
        network_mode="none",
        tmpfs={"/tmp": "", "/var/lib/broker": "uid=10001,mode=0700"},
        volumes=[f"{tmp_path}/manifests:/etc/broker/manifests:ro"],
    )
    check = run.attrs["Config"]["Healthcheck"]["Test"]
    assert check[0] == "CMD"
    assert _health(run) == "healthy", run.logs().decode()
    assert run.exec_run(["touch", "/opt/broker/x"]).exit_code != 0
    run.stop()
    assert run.wait()["StatusCode"] == 0
    run.remove()
    # The check can say no: in a container of its own, nothing serves.
    with pytest.raises(ContainerError, match="Connection refused"):
        containers.in_image(BROKER, *check[1:])


def _health(run: Any) -> str:
    def state() -> str:
        run.reload()
        found: str = run.attrs["State"]["Health"]["Status"]
        return "" if found == "starting" else found

    return stack.until(state, 60, "a verdict on the container's health")


# The stack.


@dataclass
class Stack:
    """What `compose.yaml` describes, up and running, but for Grafana."""

    engine: Engine
    compose: DockerCompose

    def container(self, service: str) -> Any:
        (found,) = self.engine.client.containers.list(
            all=True, filters={"label": [f"com.docker.compose.service={service}", "com.docker.compose.oneoff=False"]}
        )
        return found

    def network(self, name: str) -> Any:
        (found,) = self.engine.client.networks.list(filters={"label": f"com.docker.compose.network={name}"})
        return found

    def agent(self, *arguments: str) -> list[str]:
        """The lines that one more run of the agent prints; an error where it does not end with 0."""
        command = [*self.compose.docker_compose_command(), "run", "--rm", "-T", "agent", *arguments]
        return self.compose._run_command(command).stdout.decode().splitlines()

    def ask_prometheus(self, path: str, **query: str) -> tuple[int, Any]:
        """By the port that is published, which is on the loopback of where the engine is."""
        with closing(HTTPConnection("127.0.0.1")) as asked:
            asked.sock = within(self.engine.network, lambda: socket.create_connection(("127.0.0.1", 9090), 5))
            asked.request("GET", f"{path}?{urlencode(query)}")
            answer = asked.getresponse()
            return answer.status, json.load(answer)


@pytest.fixture(scope="module")
def running(containers: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("compose")
    (folder / "without-grafana.yaml").write_text("services: {grafana: {profiles: [registry]}}\n")
    # Testcontainers calls `docker compose`; Debian's may be a program of its own.
    (folder / "docker").write_text('#!/bin/sh\nshift\nexec docker-compose "$@"\n')
    (folder / "docker").chmod(0o755)
    images = {"BROKER_IMAGE": BROKER, "REDIS_IMAGE": REDIS, "PROMETHEUS_IMAGE": PROMETHEUS}
    files = ["compose.yaml", str(folder / "without-grafana.yaml")]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"DOCKER_HOST": containers.url, **images}.items():
            patch.setenv(name, value)
        with DockerCompose(COMPOSE, files, wait=False, docker_command_path=str(folder / "docker")) as compose:
            yield Stack(containers, compose)


WORK = {
    "refund 12.00": "allowed",
    "refund 990.00": "params_invalid",
    "delete a charge": "operation_not_declared",
    "search pages (MCP)": "allowed",
    "delete a page (MCP)": "operation_not_declared",
    "a host that nobody declared": "Tunnel connection failed: 403 Forbidden",
}
PAST = (
    *("the tool itself", "Redis", "a processor's admin port", "the host", "the internet", "the cloud's metadata"),
    *("a name, by the system", "a name server"),
)


def _table(lines: list[str]) -> dict[str, str]:
    rows = (re.fullmatch(r"  (\S.{30}\S?) +(.+)", line) for line in lines)
    return {row[1].strip(): row[2] for row in rows if row}


def test_the_agent_does_what_it_may_and_finds_no_way_past_envoy(running):
    assert _table(running.agent()) == WORK | dict.fromkeys(PAST, "no way")
    # The tools saw the two calls that were allowed, with credentials that the agent does not have.
    seen = [line.partition("  authorization: ") for line in running.container("tools").logs().decode().splitlines()]
    assert [(request, credential[:9]) for request, _, credential in seen] == [
        ('POST /v1/refunds {"charge": "ch_1", "amount": 1200}', "Bearer sk"),
        ("tools/call search_pages", "Bearer ey"),
    ]


def test_the_agents_own_tries_can_succeed_where_there_is_a_way(running):
    tries = (
        f"import sys; sys.path.insert(0, '/'); import agent; print(agent.resolve('evil.example'), agent.ask_dns('{NAME_SERVER}'))"
    )
    agent = [f"{COMPOSE}/agent/agent.py:/agent.py:ro"]
    printed = running.engine.in_image(
        BROKER, "/usr/bin/python3", "-c", tries, volumes=agent, network=running.network("view").name
    )
    assert printed.count("REACHED") == 2


def test_each_volume_holds_what_its_container_needs_and_no_more(running):
    def files(name: str) -> set[str]:
        (volume,) = running.engine.client.volumes.list(filters={"label": f"com.docker.compose.volume={name}"})
        listed = "cd /v && find . -type f -printf '%P %U %m\\n'"
        return set(running.engine.in_image(BROKER, "sh", "-c", listed, user="root", volumes=[f"{volume.name}:/v"]).splitlines())

    assert files("agent") == {"ca.pem 10001 600", "token 10001 600"}
    assert files("tools") == {"ca.key 10001 600", "tools.pem 10001 600"}
    assert files("tools-ca") == {"tools.pem 10001 644"}
    kept = {line.split()[0] for line in files("processor-2")}
    assert {"ca.pem", "redis-password", *(f"keys/{name}.key" for name in ("ca", "jwt", "tokens", "audit"))} <= kept


# Tries addresses from wherever it runs. A refusal is an answer too: somebody is there.
_TRY = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor
def attempt(address):
    try:
        socket.create_connection(address, 2).close()
    except ConnectionRefusedError:
        return "refused"
    except OSError:
        return "nothing"
    return "answered"
targets = [tuple(each) for each in json.loads(sys.argv[1])]
with ThreadPoolExecutor(len(targets)) as pool:
    print(json.dumps([[*target, came] for target, came in zip(targets, pool.map(attempt, targets))]))
"""


def _reached(sitting: Any, targets: set[tuple[str, int]]) -> dict[tuple[str, int], str]:
    done = sitting.exec_run(["/usr/bin/python3", "-c", _TRY, json.dumps(sorted(targets))])
    assert done.exit_code == 0, done.output.decode()
    return {(host, port): came for host, port, came in json.loads(done.output) if came != "nothing"}


@pytest.fixture(scope="module")
def sitting(running: Stack) -> Iterator[Any]:
    """The agent's container, made as Compose makes it, with nothing in it but time."""
    command = [*running.compose.docker_compose_command(), "run", "--detach", "--entrypoint", "sleep 600", "agent"]
    name = running.compose._run_command(command).stdout.decode().split()[-1]
    container = running.engine.client.containers.get(name)
    yield container
    container.remove(force=True)


def _addresses(container: Any) -> dict[str, str]:
    container.reload()
    networks: Mapping[str, Any] = container.attrs["NetworkSettings"]["Networks"]
    return {name.rpartition("_")[2]: each["IPAddress"] for name, each in networks.items()}


PORTS = (15001, 15002, 15003, 6379, 8443, 8444, 9090)


def test_from_the_agents_network_nothing_answers_but_envoys_doors(running, sitting):
    others = [each for each in running.engine.client.containers.list() if each.id != sitting.id]
    assert len(others) == len({"envoy", *PROCESSORS, "redis", "tools", "prometheus"})
    everywhere = {(address, port) for each in others for address in _addresses(each).values() for port in PORTS}
    doors = _addresses(running.container("envoy"))["agents"]
    # It can see: on the tools' network too, it finds the tools.
    tools = running.network("tools")
    tools.connect(sitting)
    found = _reached(sitting, everywhere)
    address = _addresses(running.container("tools"))["tools"]
    assert found[address, 8443] == found[address, 8444] == "answered"
    tools.disconnect(sitting)
    found = _reached(sitting, everywhere)
    assert {target for target, came in found.items() if came == "answered"} == {(doors, 15001), (doors, 15002)}
    assert {host for host, _ in found} == {doors}


def test_the_host_is_not_on_the_agents_network(running, sitting):
    """An engine gives a bridge an address, by which containers reach what listens on the host, on internal networks too."""
    with within(running.engine.network, lambda: socket.create_server(("0.0.0.0", 0))) as listening:
        port = listening.getsockname()[1]
        everyone = {(_gateway(each), port) for each in running.engine.client.networks.list() if _gateway(each)}
        assert _reached(sitting, everyone) == {}
        plain = running.engine.client.networks.create("plain", internal=True)
        plain.connect(sitting)
        plain.reload()
        assert _reached(sitting, {(_gateway(plain), port)}) == {(_gateway(plain), port): "answered"}
        plain.disconnect(sitting)
        plain.remove()


def _gateway(network: Any) -> str:
    configured = network.attrs["IPAM"]["Config"] or [{}]
    return str(configured[0].get("Gateway", ""))


def test_a_revocation_at_one_processor_holds_at_all_and_so_does_its_release(running, sitting):
    def answers(wanted: str) -> bool:
        done = sitting.exec_run(["/usr/bin/python3", "-c", _SEARCHES])
        return set(json.loads(done.output)) == {wanted}

    for verb, at, wanted in (("revoke", "processor-1", "agent_revoked"), ("release", "processor-3", "allowed")):
        acted = ["broker", "agents", verb, "refund-bot", "--reason", "drill", "--state", "/var/lib/broker"]
        done = running.container(at).exec_run(acted)
        assert done.exit_code == 0, done.output.decode()
        # The tokens of before stay dead; `keys` makes one anew.
        keys = running.container("keys")
        keys.start()
        assert keys.wait(timeout=30)["StatusCode"] == 0
        stack.until(lambda wanted=wanted: answers(wanted), 10, wanted)
    decided = [_decided(running, name) for name in PROCESSORS]
    assert all(decided), decided


# More calls than there are processors, each on a connection of its own.
_SEARCHES = """
import json, sys
sys.path.insert(0, "/")
import agent
agent.equip()
print(json.dumps([agent.tool("search_pages", query="refunds") for _ in range(12)]))
"""


def _decided(running: Stack, processor: str) -> int:
    """How many decisions stand in a processor's own record."""
    asked = ["broker", "audit", "query", "--state", "/var/lib/broker", "--json"]
    done = running.container(processor).exec_run(asked)
    return done.output.count(b'"event":"decision"')


def test_redis_wants_its_password(running):
    said = running.container("redis").exec_run(["redis-cli", "dbsize"]).output.decode()
    assert said.startswith("NOAUTH")


def test_prometheus_sees_three_processors_and_takes_what_the_dashboard_asks(running):
    def up() -> bool:
        _, answer = running.ask_prometheus("/api/v1/query", query="up")
        found = {each["metric"]["instance"]: each["value"][1] for each in answer["data"]["result"]}
        return found == {f"{name}:{ADMIN_PORT}": "1" for name in PROCESSORS}

    stack.until(up, 30, "three processors are up")
    dashboard = json.loads((COMPOSE / "grafana/dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(asked) > 30
    told = set()
    for expression in asked:
        filled = expression.replace("$__rate_interval", "1m").replace("$agent", "[^/]+").replace("$tool", "[^/]+")
        status, answer = running.ask_prometheus("/api/v1/query", query=filled)
        assert (status, answer["status"]) == (200, "success"), (expression, answer)
        told |= {expression} if answer["data"]["result"] else set()
    # Of models, alerts and restrictions there is nothing to tell here; of what has happened, there is.
    for name in (
        "decisions_total",
        "decision_duration",
        "upstream_duration",
        "ledger_reserve",
        "ledger_up",
        "configuration_info",
        "budget_spent",
    ):
        assert any(name in expression for expression in told), (name, told)
    # It can say no.
    assert running.ask_prometheus("/api/v1/query", query="sum(")[0] == 400


_CALLS = """
import json, sys, time
sys.path.insert(0, "/")
import agent
agent.equip()
came = []
for _ in range(60):
    came.append(agent.call("GET", agent.PAYMENTS + "/v1/charges/ch_1"))
    time.sleep(0.05)
print(json.dumps(came))
"""


def test_calls_go_on_when_a_processor_is_killed(running, sitting):
    def calls() -> list[str]:
        told: list[str] = json.loads(sitting.exec_run(["/usr/bin/python3", "-c", _CALLS]).output)
        return told

    with ThreadPoolExecutor() as pool:
        calling = pool.submit(calls)
        time.sleep(1)
        running.container("processor-2").kill()
        came = calling.result()
    # What the processor that died was asked is denied, never let through unasked; from then on the others are asked.
    assert came.count("allowed") >= len(came) - 5, came
    assert set(calls()) == {"allowed"}
    for name in ("processor-1", "processor-3"):
        verified = running.container(name).exec_run(["broker", "audit", "verify", "--state", "/var/lib/broker", "--json"])
        assert verified.exit_code == 0, verified.output
        assert json.loads(verified.output)["records"] > 20
