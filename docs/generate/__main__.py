"""Writes what can be read off the code: docs/reference/*.md and the golden configurations in envoy/, netpol/ and compose/.

`python -m docs.generate [--check]`, from the repository's root. With `--check` nothing is written: each file that differs is
named on stderr, and the exit code is 1.

Law: whatever a page says of the code, it took from there. Prose that the code doesn't hold stands in a table, and the script
fails when the code has something that the table lacks, or the reverse.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from docs.generate.codes import codes
from docs.generate.detectors import detectors
from docs.generate.golden import compose, envoy, kubernetes, nftables
from docs.generate.kinds import issuers, kinds
from docs.generate.metrics import metrics
from docs.generate.record import audit
from docs.generate.verbs import verbs


def files() -> Mapping[str, str]:
    """Path, relative to the repository's root → content."""
    made: Mapping[str, Callable[[], str]] = {
        "docs/reference/kinds.md": kinds,
        "docs/reference/issuers.md": issuers,
        "docs/reference/codes.md": codes,
        "docs/reference/cli.md": verbs,
        "docs/reference/audit.md": audit,
        "docs/reference/metrics.md": metrics,
        "docs/reference/detectors.md": detectors,
        "envoy/sample-organisation.yaml": lambda: envoy("manifests"),
        "envoy/minimal.yaml": lambda: envoy("tests/golden/minimal"),
        "envoy/spire.yaml": lambda: envoy("tests/golden/spire"),
        "netpol/nftables.nft": nftables,
        "compose/envoy.yaml": compose,
    }
    return {path: make() for path, make in made.items()} | kubernetes()


def main(arguments: list[str], root: Path = Path()) -> int:
    """Write or compare below `root`; 1 where a file is missing or differs."""
    made = files()
    stale = [path for path, text in made.items() if not _is(root / path, text)]
    if "--check" in arguments:
        sys.stderr.writelines(f"{path} differs from what the code says; run python -m docs.generate\n" for path in stale)
        return 1 if stale else 0
    for path in stale:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(made[path], encoding="utf-8")
    return 0


def _is(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
