"""The image, and the stack of compose/, in a real engine: Debian's, with images that stand for those of a registry.

Redis and Prometheus are Debian's own. Grafana is in no registry that tests reach and is not started: that what it reads is well
formed and in place, `unit/test_compose.py` says.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from docker.errors import ContainerError

from tests import stack
from tests.engine import BASE, Engine, engine

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
