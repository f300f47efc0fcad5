"""How long `broker check` and `broker diff` take over a large organisation: whole processes, from start to exit.

`python -m benchmarks.manifests [--agents N] [--keep DIR]`. Each agent has a file of its own with 50 grants over 5 tools: 20 as
the catalog has them, 20 narrowed by a schema, 10 narrowed and limited. What is compared: one agent that changed, and a catalog
entry that bears on everybody.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

AGENTS = 10_000
TOOLS = 5
OPERATIONS = 10  # of each tool
TARGET_S = 30
_HEAD = "apiVersion: broker/v1\nkind: {kind}\nmetadata: {{name: {name}, owner: {owner}{more}}}\nspec:\n"


def tool(number: int, most: int = 100) -> str:
    """A catalog entry of ten operations; `most` bounds the length of a title."""
    operations = "".join(
        f"    op{index}:\n"
        f"      match: {{method: POST, path: '/repos/{{owner}}/{{repo}}/op{index}'}}\n"
        f"      effect: {'write' if index % 2 else 'read'}\n"
        "      params:\n"
        "        path: {properties: {owner: {type: string}, repo: {type: string}}}\n"
        "        body: {type: object, additionalProperties: false, "
        f"properties: {{title: {{type: string, maxLength: {most}}}}}}}\n"
        for index in range(OPERATIONS)
    )
    head = _HEAD.format(kind="Tool", name=f"tool{number}", owner="platform", more="")
    return (
        f"{head}  protocol: rest\n  endpoint: https://tool{number}.example\n"
        f"  credential: {{issuer: static, secret: {{env: TOOL_{number}}}}}\n  operations:\n{operations}"
    )


def agent(number: int, limit: int = 40) -> str:
    """An agent's manifest; `limit` is its first limit of calls."""
    head = _HEAD.format(kind="Agent", name=f"agent{number}", owner=f"team{number % 100}", more=", oncall: pager")
    tools = "".join(
        f"    tool{index}:\n      operations:\n{''.join(_grants(number, limit if index == 0 else 40))}" for index in range(TOOLS)
    )
    return (
        f"{head}  identity: {{spiffe: spiffe://acme.example/agents/agent{number}}}\n  tools:\n{tools}"
        "  limits: {rate: 10/s, concurrency: 8, steps_per_run: 40, writes: 100/day}\n"
    )


def _grants(number: int, limit: int) -> Iterator[str]:
    for index in range(OPERATIONS):
        params = f"params: {{path: {{properties: {{owner: {{const: acme}}, repo: {{enum: [web, repo{number % 50}]}}}}}}}}"
        parts = (params, f"limits: {{calls: {limit}/hour}}")[: 0 if index < 4 else 1 if index < 8 else 2]  # noqa: PLR2004
        yield f"        op{index}: {{{', '.join(parts)}}}\n"


def write(folder: Path, agents: int) -> None:
    """The organisation's manifests."""
    for part in ("tools", "agents"):
        (folder / part).mkdir(parents=True)
    for number in range(TOOLS):
        (folder / f"tools/tool{number}.yaml").write_text(tool(number))
    for number in range(agents):
        (folder / f"agents/agent{number:05}.yaml").write_text(agent(number))


def timed(*arguments: object) -> tuple[float, int]:
    """Seconds, and the process's exit code."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "broker.cli", *map(str, arguments)]
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    return time.perf_counter() - began, ended.returncode


def runs(folder: Path, agents: int) -> Iterator[tuple[str, Sequence[object]]]:
    """What is timed, and the verb's arguments."""
    base, one, catalog = folder / "base", folder / "one", folder / "catalog"
    write(base, agents)
    for copy in (one, catalog):
        shutil.copytree(base, copy)
    (one / "agents/agent00000.yaml").write_text(agent(0, limit=50))
    (catalog / "tools/tool0.yaml").write_text(tool(0, most=200))
    yield "check", ("check", base)
    yield "diff, one agent changed", ("diff", base, one)
    yield "diff, the catalog changed", ("diff", base, catalog)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", type=int, default=AGENTS)
    parser.add_argument("--keep", type=Path, help="Write the folders here and leave them there.")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(f"{chosen.agents} agents x {TOOLS * OPERATIONS} operations\n")
        print("| verb | seconds | target | exit |\n| --- | --- | --- | --- |")
        for name, arguments in runs(chosen.keep or Path(temporary), chosen.agents):
            seconds, code = timed(*arguments)
            print(f"| {name} | {seconds:.1f} | {TARGET_S} | {code} |", flush=True)


if __name__ == "__main__":
    main()
