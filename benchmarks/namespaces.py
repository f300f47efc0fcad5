"""How long `broker run` takes until its command runs, and what memory each agent in a namespace costs. Root, Linux.

`python -m benchmarks.namespaces [--agents 50]` starts a broker and, one after the other, a command for each of so many agents,
all of which stay. Memory is PSS (what processes share is divided among them), and what one more costs on the mean.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from broker.admin.client import fetch
from tests import stack

_MOST = 500
_OPERATIONS = {"items.list": {"match": {"method": "GET", "path": "/items"}, "effect": "read"}}
_WAITS = "echo started; exec sleep infinity"


def main() -> int:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--agents", type=int, choices=range(2, _MOST), metavar="N", default=50)
    number = options.parse_args().agents
    with ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="bn-")))
        names = [f"agent-{each}" for each in range(number)]
        broker = stack.Broker(_manifests(folder, names), folder / "state")
        held.callback(broker.stop)
        parts: dict[str, Callable[[], float]] = {
            "Envoy (allocated)": lambda: _allocated(broker),
            "the processor": lambda: _pss(broker.child("processor")),
        }
        held.enter_context(_started(broker, names[0]))  # what is made for the first only
        before = {part: taken() for part, taken in parts.items()}
        times, own = [], []
        for name in names[1:]:
            began = time.perf_counter()
            pid = held.enter_context(_started(broker, name))
            times.append(time.perf_counter() - began)
            own.append(sum(map(_pss, _chain(pid))))
        _print(times, own, {part: (taken() - before[part]) / (number - 1) for part, taken in parts.items()})
    return 0


def _manifests(folder: Path, names: list[str]) -> Path:
    tool = stack.tool("api", "https://api.tool.test", _OPERATIONS)
    agents = [stack.agent(name, {"api": {"operations": {"items.list": {}}}}) for name in names]
    return stack.write_manifests(folder / "manifests", tool, *agents)


@contextmanager
def _started(broker: stack.Broker, agent: str) -> Iterator[int]:
    command = [*stack.BROKER, "run", "--agent", agent, "--state", str(broker.state), "--", "sh", "-c", _WAITS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        if process.stdout is None or process.stdout.readline() != b"started\n":
            sys.exit(f"broker run ended with {process.wait()}; run it by hand to see why")
        try:
            yield process.pid
        finally:
            process.kill()


def _chain(pid: int) -> Iterator[int]:
    """`broker run` and what it is made of, without the command: `unshare` and process 1."""
    for _ in range(3):
        yield pid
        pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _pss(pid: int) -> int:
    """In KiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def _allocated(broker: stack.Broker) -> float:
    """In KiB. Envoy has its memory from the system in large pieces, so that its pages say little."""
    _, said = fetch(broker.state / "run/envoy-admin.sock", "GET", "/memory")
    return int(json.loads(said)["allocated"]) / 1024


def _print(times: list[float], own: list[int], shared: dict[str, float]) -> None:
    ordered = sorted(times)
    p50, p99 = (ordered[min(len(ordered) - 1, int(len(ordered) * part))] * 1000 for part in (0.5, 0.99))
    print(f"{len(times) + 1} namespaces, one after the other, all open")
    print(f"start, to the command's first line:  p50 {p50:.0f} ms, p99 {p99:.0f} ms, most {ordered[-1] * 1000:.0f} ms")
    print(f"memory of one:  {statistics.mean(own) / 1024:.1f} MiB of its own (broker run, unshare, process 1)")
    for part, each in shared.items():
        print(f"                {each / 1024:.2f} MiB in {part}")


if __name__ == "__main__":
    sys.exit(main())
