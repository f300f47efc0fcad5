"""The benchmark runs and says all that it promises; how fast anything is, is nobody's verdict here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CALLS = ("GET, no body", "POST 1 KB", "POST 1 KB, HTTPS")
WAYS = ("direct", "bare Envoy", "broker", "broker, 8 limits", "broker, 8 limits in Redis")

pytestmark = [pytest.mark.envoy, pytest.mark.slow]


@pytest.fixture(scope="module")
def bench():
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done, json.loads(done.stdout)


def test_every_call_is_measured_by_every_way(bench):
    assert [(row["call"], row["way"]) for row in bench[1]["calls"]] == [(call, way) for call in CALLS for way in WAYS]


@pytest.mark.parametrize(
    "name", ["p50_ms_at_1", "p99_ms_at_1", "p50_ms_at_16", "p99_ms_at_16", "requests_per_s", "to_bare", "to_broker"]
)
def test_every_number_was_measured(bench, name):
    assert all(row[name] > 0 for row in bench[1]["calls"])


@pytest.mark.parametrize(
    ("way", "names"),
    [("direct", []), ("bare Envoy", ["envoy"]), ("broker", ["envoy", "processor"]), ("broker, 8 limits", ["envoy", "processor"])],
)
def test_processor_time_is_that_of_the_processes_on_the_way(bench, way, names):
    assert all(list(row["cpu_us"]) == names for row in bench[1]["calls"] if row["way"] == way)


def test_the_table_has_a_line_for_each_row_and_the_targets(bench, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.run import table  # noqa: PLC0415 - found by the path of the line above

    lines = table(bench[1]).splitlines()
    assert sum(line.startswith(tuple(f"| {call} | {way} |" for call in CALLS for way in WAYS)) for line in lines) == 15
    assert sum(line.startswith("| decision of a 1 KB") and line.endswith("| 60 |") for line in lines) == 2
    assert sum(line.startswith("| reserve and settle, 8 limits") and line.endswith("| 15 |") for line in lines) == 1
    assert sum(line.startswith("| reserve and settle, 20 limits") for line in lines) == 2


def test_the_ratio_to_a_run_without_limits_stands_where_there_are_limits(bench, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.run import table  # noqa: PLC0415 - the same

    cells = [
        line.split(" | ") for line in table(bench[1]).splitlines() if line.startswith(tuple(f"| {call} | " for call in CALLS))
    ]
    assert {(cell[1], cell[4] != "-") for cell in cells} == {(way, "limits" in way) for way in WAYS}


def test_what_an_agent_takes_of_memory_was_measured(bench):
    assert [row["bytes"] > 100 for row in bench[1]["kept"]] == [True] * len(bench[1]["kept"])
    assert [(row["streams"], 0 < row["p99_s"] <= row["most_s"]) for row in bench[1]["cut"]] == [(4, True), (8, True)]


def test_progress_without_a_terminal_is_plain_lines(bench):
    lines = bench[0].stderr.splitlines()
    assert "\x1b" not in bench[0].stderr
    assert sum(line.startswith("round 1/1: ") for line in lines) == 30
