"""The pages, as a reader follows them: every block of the tutorial is run in order, and every output is the one that it shows.

How a block is read, by the words after its fence:

    console            commands (`$ …`, with a text as far as END where they want one) in the reader's terminal, each with the
                       output that it must have
    console NAME       a command that goes on in a terminal called NAME; it must print at least the lines shown
    text NAME          lines that the terminal NAME must print next
    yaml FILE          a file that the reader writes; without a name, an example
    python FILE        docs/tutorial/FILE, shown word for word
    sh                 not run: it makes the environment that the tests run in

`…` stands for anything in a line, and a line of it alone for any lines. Ports are replaced by free ones.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import stack

ROOT = Path(__file__).parents[2]
PORTS = ("15001", "15002", "15003", "18443", "18080")
# A block's fence may be longer, so that what it shows may hold fences.
BLOCK = re.compile(r"^(?P<fence>`{3,})(\w+)(?: (\S+))?\n(.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL)


class Terminal:
    """A shell whose variables and folder last from one command to the next."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._state = folder / ".terminal"
        self._environment = environment
        self._state.write_text(f"cd {folder}\n")

    def run(self, command: str) -> str:
        script = f". {self._state}\n{command}\nexport -p > {self._state}; echo \"cd '$PWD'\" >> {self._state}"
        done = subprocess.run(
            ["bash", "-c", script],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout


class Running:
    """A command that goes on; its output is read as far as it was expected."""

    def __init__(self, command: str, folder: Path, environment: dict[str, str], log: Path) -> None:
        self._log, self._read = log, 0
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                ["bash", "-c", f"exec env {command}"], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    def prints(self, expected: str) -> None:
        def found() -> re.Match[str] | None:
            return re.search(pattern(expected), self._log.read_text()[self._read :], re.MULTILINE)

        try:
            self._read += stack.until(found, 20).end()
        except AssertionError:
            raise AssertionError(f"expected:\n{expected}\nprinted:\n{self._log.read_text()[self._read :]}") from None

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)


def pattern(expected: str) -> str:
    """The regular expression of an output."""
    lines = [
        "(?:.*\n)*?" if line == "…" else ".*?".join(map(re.escape, line.split("…"))) + "\n" for line in expected.splitlines()
    ]
    return "".join(lines)


def blocks(text: str) -> Iterator[tuple[str, str, str]]:
    for found in BLOCK.finditer(text):
        yield found[2], found[3] or "", found[4]


def commands(block: str) -> Iterator[tuple[str, str]]:
    """Each command of a console block, with its output."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        lines = part.splitlines(keepends=True)
        end = 1 + (lines.index("END\n") if lines[0].endswith("<< 'END'\n") else 0)
        yield "".join(lines[:end]).removesuffix("\n"), "".join(lines[end:])


class Reader:
    """Follows pages in `folder`, each in a folder of its own there, with free ports in place of the page's."""

    def __init__(self, folder: Path) -> None:
        self._ports = {port: str(stack.free_port()) for port in PORTS}
        self._folder = self._work = folder
        self._environment = _environment(folder, self._ports)
        self._terminal = Terminal(folder, self._environment)
        self._running: dict[str, Running] = {}
        (folder / "docs" / "tutorial").mkdir(parents=True)
        shutil.copytree(ROOT / "manifests", folder / "manifests")
        for path in (ROOT / "docs" / "tutorial").glob("*.py"):
            (folder / "docs" / "tutorial" / path.name).write_text(self.placed(path.read_text()))

    def placed(self, text: str) -> str:
        return re.sub("|".join(PORTS), lambda found: self._ports[found[0]], text)

    def follow(self, page: str) -> None:
        """Do what docs/PAGE.md says, which works in PAGE."""
        self._work = self._folder / page
        kinds = {"yaml": self._write, "python": self._look_at, "text": self._watch, "console": self._type, "sh": self._skip}
        for kind, name, block in blocks(self.placed((ROOT / "docs" / f"{page}.md").read_text())):
            kinds[kind](name, block)

    def _write(self, name: str, block: str) -> None:
        if not name:
            return
        (self._work / name).parent.mkdir(parents=True, exist_ok=True)
        (self._work / name).write_text(block)

    def _look_at(self, name: str, block: str) -> None:
        assert (self._work / name).read_text() == block, f"docs/tutorial/{name} is not what the tutorial shows"

    def _watch(self, name: str, block: str) -> None:
        self._running[name].prints(block)

    def _type(self, name: str, block: str) -> None:
        if name:
            [(command, output)] = commands(block)
            self._running[name] = Running(command, self._work, self._environment, self._folder / f"{name}.log")
            self._running[name].prints(output)
            return
        for command, output in commands(block):
            printed = self._terminal.run(command)
            assert re.fullmatch(pattern(output), printed), f"$ {command}\n{printed}\nbut the tutorial shows\n{output}"

    def _skip(self, name: str, block: str) -> None:
        pass

    def stop(self) -> None:
        for each in self._running.values():
            each.stop()


@pytest.fixture
def reader() -> Iterator[Reader]:
    folder = stack.short_folder()
    found = Reader(folder)
    yield found
    found.stop()
    shutil.rmtree(folder)


@pytest.mark.envoy
@pytest.mark.slow
def test_the_tutorial_does_what_it_says(reader):
    reader.follow("tutorial")


@pytest.mark.envoy
@pytest.mark.slow
def test_the_review_loop_does_what_it_says(reader):
    reader.follow("review")


@pytest.mark.envoy
def test_the_readme_shows_the_tour_as_it_is():
    [shown] = [block for kind, _, block in blocks((ROOT / "README.md").read_text()) if block.startswith("An agent's environment")]
    ports = [option for name in ("--proxy", "--base-url") for option in (name, f"127.0.0.1:{stack.free_port()}")]
    command = [*stack.BROKER, "demo", "--once", *ports]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    printed = re.sub(r"localhost:\d+", "localhost:PORT", done.stdout)
    assert re.fullmatch(pattern(re.sub(r"localhost:\d+", "localhost:PORT", shown)), printed), printed


PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "envoy" / "README.md",
    ROOT / "compose" / "grafana" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_every_link_leads_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", page.read_text())
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not target.startswith("https://")]
    assert [target for target in targets if not _leads(page, target)] == []


def _leads(page: Path, target: str) -> bool:
    file, _, anchor = target.partition("#")
    place = page.parent / file if file else page
    if not anchor or not place.is_file():
        return place.exists()
    headings = re.findall(r"^#+ (.*)$", place.read_text(), re.MULTILINE)
    return anchor in (re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


def _environment(folder: Path, ports: dict[str, str]) -> dict[str, str]:
    """The activated environment: `broker` and `python`; `broker up` on free ports in place of its defaults."""
    commands = folder / "bin"
    commands.mkdir()
    doors = {"--proxy": "15001", "--base-url": "15002", "--admin": "15003"}
    options = " ".join(f"{option} 127.0.0.1:{ports[port]}" for option, port in doors.items())
    broker = f'#!/bin/sh\n[ "$1" = up ] && set -- "$@" {options}\nexec {sys.executable} -m broker.cli "$@"\n'
    python = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    for name, script in {"broker": broker, "python": python}.items():
        (commands / name).write_text(script)
        (commands / name).chmod(0o755)
    inherited = {
        name: value for name, value in os.environ.items() if not re.search("proxy|SSL_|OPENAI|PYTEST", name, re.IGNORECASE)
    }
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    git = {f"GIT_{who}_{what}": "reader@acme.example" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    inherited |= {**git, "GIT_CONFIG_GLOBAL": "/dev/null"}
    return {**inherited, "PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": search}


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        pytest.param("200 ok\n", "200 ok\n", True, id="an output is the one shown"),
        pytest.param("200 ok\n", "200 okay\n", False, id="a longer line is another output"),
        pytest.param("200 ok\n", "200 ok\nand more\n", False, id="a further line is another output"),
        pytest.param("", "a warning\n", False, id="a command that shows nothing must print nothing"),
        pytest.param("in … s\n", "in 2 s\n", True, id="an ellipsis stands for a part of a line"),
        pytest.param("a\n…\nz\n", "a\nb\nc\nz\n", True, id="an ellipsis alone stands for lines"),
        pytest.param("a … z\n", "a\nz\n", False, id="an ellipsis in a line stays in its line"),
    ],
)
def test_an_output_is_compared_with_the_page(expected, printed, same):
    assert bool(re.fullmatch(pattern(expected), printed)) is same
