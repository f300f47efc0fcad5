"""Side by side, in one interleaved run: no proxy, a bare Envoy, the broker. Prints a Markdown table.

Law: numbers only, no judgement: nothing fails for being slow. A wrong answer fails.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import costs, cut, envoys, world
from benchmarks.load import Load
from broker.supervisor import envoy_binary, envoy_version
from tests import stack
from tests.redis_server import RedisServer

BROKERS = {"broker": (False, False), "broker, 8 limits": (True, False), "broker, 8 limits in Redis": (True, True)}
"""The brokers that are measured: whether they have limits, and whether these are counted in a Redis. The first has neither."""

WAYS = ("direct", "bare Envoy", *BROKERS)
CONNECTIONS = (1, 16)
_WARM_S = 0.2
_GRACE_S = 60.0


@dataclass(frozen=True, slots=True)
class Cell:
    """One call by one way."""

    call: str
    way: str
    load: Load


def main(arguments: list[str] | None = None) -> None:
    """Run, and print the table (or, with --json, all numbers) on stdout; progress goes to stderr."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement (default 1.5)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds, of which the median counts (default 3)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: one short round, whose numbers mean little")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    given = parser.parse_args(arguments)
    seconds, rounds = (0.2, 1) if given.quick else (given.seconds, given.rounds)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    machine = _machine()
    with _cells(seconds) as cells:
        rows = measure(cells, rounds)
    inside = {"costs": costs.measure(quick=given.quick), "kept": costs.kept(quick=given.quick)}
    found = {"machine": machine, "calls": rows, **inside, "cut": cut.measure(quick=given.quick)}
    print(json.dumps(found) if given.json else table(found))


# The ways.


@contextmanager
def _cells(seconds: float) -> Iterator[list[Cell]]:
    folder = stack.short_folder()
    os.environ["BENCH_SECRET"] = world.SECRET
    http, https, proxy, base_url = (stack.free_port() for _ in range(4))
    ca = stack.TestCA()
    (folder / "upstream-ca.pem").write_text(ca.pem)
    manifests = world.write(folder / "manifests", http, https, ca.pem)
    answering = envoys.upstream(http, https, ca.issue(folder / "certs", "localhost"), world.ANSWER)
    bare, bare_ca = envoys.bare(manifests, folder, proxy, base_url)
    with ExitStack() as running:
        running.callback(shutil.rmtree, folder)
        running.enter_context(envoys.running(folder, "upstream", answering, [http, https], "--concurrency", "1"))
        pid = running.enter_context(envoys.running(folder, "bare", bare, [proxy]))
        blank = Load(("127.0.0.1", http), "", world.ANSWER, 1, seconds, _WARM_S)
        ways: dict[str, tuple[tuple[Load, Load], str]] = {
            "direct": ((blank, replace(blank, address=("127.0.0.1", https), tls_ca=str(folder / "upstream-ca.pem"))), ""),
            "bare Envoy": (_proxied(replace(blank, address=("127.0.0.1", proxy), pids={"envoy": pid}), str(bare_ca), https), ""),
        }
        for number, (way, (limits, shared)) in enumerate(BROKERS.items()):
            held = world.write(folder / f"manifests-{number}", http, https, ca.pem, limits=limits)
            redis = running.enter_context(closing(RedisServer())).url if shared else ""
            broker = stack.Broker(held, folder / f"state-{number}", {"BROKER_REDIS_URL": redis})
            running.callback(broker.stop)
            ways[way] = _through(broker, blank, https)
        yield [_cell(call, way, *ways[way], (http, https)) for call in _CALLS for way in WAYS]


def _through(broker: stack.Broker, blank: Load, https: int) -> tuple[tuple[Load, Load], str]:
    pids = {"envoy": broker.child("envoy"), "processor": broker.child("processor")}
    authorization = stack.basic(world.AGENT, broker.token(world.AGENT))
    # Answers are read for the credential, so they come in chunks.
    through = replace(blank, address=broker.proxy, pids=pids, ends=f"{world.ANSWER}\r\n0\r\n\r\n")
    return _proxied(through, broker.ca, https, authorization), authorization


def _proxied(plain: Load, ca: str, https: int, authorization: str = "") -> tuple[Load, Load]:
    proof = f"proxy-authorization: {authorization}\r\n" if authorization else ""
    target = f"localhost:{https}"
    return plain, replace(plain, connect=f"CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n{proof}\r\n", tls_ca=ca)


_CALLS = {
    "GET, no body": ("GET", world.LIST, b"", False),
    "POST 1 KB": ("POST", world.CREATE, world.ISSUE, False),
    "POST 1 KB, HTTPS": ("POST", world.CREATE, world.ISSUE, True),
}


def _cell(call: str, way: str, loads: tuple[Load, Load], authorization: str, ports: tuple[int, int]) -> Cell:
    method, path, body, secure = _CALLS[call]
    host = f"localhost:{ports[1]}" if secure else f"127.0.0.1:{ports[0]}"
    absolute = way != "direct" and not secure
    proof = [("proxy-authorization", authorization)] if absolute and authorization else []
    request = world.request(method, f"http://{host}{path}" if absolute else path, host, body, *proof)
    return Cell(call, way, replace(loads[secure], request=request, tls_name="localhost" if secure else ""))


# Measuring.


def measure(cells: list[Cell], rounds: int) -> list[dict[str, Any]]:
    """Each call by each way, at each number of connections: the medians of the rounds."""
    seen: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for number in range(rounds):
        for connections in CONNECTIONS:
            for cell in cells:
                _say(f"round {number + 1}/{rounds}: {cell.call}, {connections} connections, {cell.way}")
                found = _run(replace(cell.load, connections=connections))
                seen.setdefault((cell.call, cell.way, connections), []).append(found)
    _say("")
    return [_row(cell, seen) for cell in cells]


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def _run(load: Load) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("load.py"))]
    limit = load.seconds + load.warm_s + _GRACE_S
    done = subprocess.run(command, input=load.to_json(), stdout=subprocess.PIPE, timeout=limit, check=False)
    if done.returncode:
        raise SystemExit(f"the load generator ended with {done.returncode}; see its message above")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _row(cell: Cell, seen: dict[tuple[str, str, int], list[dict[str, Any]]]) -> dict[str, Any]:
    one, many = (seen[cell.call, cell.way, connections] for connections in CONNECTIONS)
    bare, broker = (seen[cell.call, way, CONNECTIONS[-1]] for way in ("bare Envoy", "broker"))
    requests = sum(each["requests"] for each in many)
    return {
        "call": cell.call,
        "way": cell.way,
        "requests_per_s": round(median(map(_rate, many))),
        "to_bare": _ratio(many, bare),
        "to_broker": _ratio(many, broker),
        **{
            f"p{share}_ms_at_{count}": round(median(_percentile(each["latencies"], share) for each in runs) * 1000, 3)
            for count, runs in zip(CONNECTIONS, (one, many), strict=True)
            for share in (50, 99)
        },
        "cpu_us": {name: round(sum(each["cpu"][name] for each in many) / requests * 1e6) for name in many[0]["cpu"]},
    }


def _ratio(these: list[dict[str, Any]], those: list[dict[str, Any]]) -> float:
    return round(median(_rate(each) / _rate(other) for each, other in zip(these, those, strict=True)), 3)


def _rate(found: dict[str, Any]) -> float:
    return float(found["requests"] / found["seconds"])


def _percentile(ordered: list[float], share: int) -> float:
    return ordered[min(len(ordered) - 1, len(ordered) * share // 100)]


# Printing.


def table(found: dict[str, Any]) -> str:
    """All numbers as Markdown."""
    machine = found["machine"]
    lines = [
        "{cpus} cores ({cpu}), load {load} before, Linux {linux}, Python {python}, Envoy {envoy}.".format(**machine),
        "",
        *_heading(
            "call", "way", "requests/s", "to bare", "to no limits", "p50/p99 at 1", "p50/p99 at 16", "CPU Envoy", "CPU processor"
        ),
        *map(_line, found["calls"]),
        "",
        *_heading("inside the processor", "us", "target"),
        *(f"| {each['name']} | {each['us']:.1f} | {each['target_us'] or '-'} |" for each in found["costs"]),
        "",
        *_heading("kept in the processor", "bytes"),
        *(f"| {each['name']} | {each['bytes']:,} |" for each in found["kept"]),
        "",
        *_heading("from a revocation to the last byte at", "streams", "p50", "p99", "most"),
        *(
            f"| {each['name']} | {each['streams']} | {each['p50_s']:.3f} s | {each['p99_s']:.3f} s | {each['most_s']:.3f} s |"
            for each in found["cut"]
        ),
    ]
    return "\n".join(lines)


def _heading(*names: str) -> list[str]:
    return ["| " + " | ".join(names) + " |", "| --- " * len(names) + "|"]


def _line(row: dict[str, Any]) -> str:
    def latency(count: int) -> str:
        return f"{row[f'p50_ms_at_{count}']:.2f} / {row[f'p99_ms_at_{count}']:.2f} ms"

    cpu: Callable[[str], str] = lambda name: f"{row['cpu_us'][name]} us" if name in row["cpu_us"] else "-"  # noqa: E731 - beside the one above
    limited = f"{row['to_broker']:.2f}" if row["way"] in list(BROKERS)[1:] else "-"
    cells = (row["call"], row["way"], f"{row['requests_per_s']:,}", f"{row['to_bare']:.2f}", limited, latency(1), latency(16))
    return "| " + " | ".join((*cells, cpu("envoy"), cpu("processor"))) + " |"


def _machine() -> dict[str, Any]:
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": model[0].partition(": ")[2] if model else platform.machine(),
        "load": round(os.getloadavg()[0], 1),  # what others do on these cores: above 0.5 or so, only the CPU columns mean much
        "linux": platform.release(),
        "python": platform.python_version(),
        "envoy": envoy_version(envoy_binary()),
    }


if __name__ == "__main__":
    main()
