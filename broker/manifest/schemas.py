"""The JSON Schemas of the four kinds, for editors: generated from the models, checked in, compared by a test.

`python -m broker.manifest.schemas [--check]` writes `manifests/schema/*.json`, or only says (exit 1) whether they are current.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from broker.manifest.models import KINDS

FOLDER = Path("manifests/schema")


def schemas() -> Mapping[str, str]:
    """File name → text of one JSON Schema 2020-12."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {
        f"{kind.lower()}.json": json.dumps(dialect | model.model_json_schema(), indent=1, ensure_ascii=False) + "\n"
        for kind, model in KINDS.items()
    }


def main(arguments: list[str]) -> int:
    """Write or compare; 1 where a file is missing or differs."""
    stale = [name for name, text in schemas().items() if not _is(FOLDER / name, text)]
    if "--check" in arguments:
        sys.stderr.writelines(f"{FOLDER / name} is stale; run python -m broker.manifest.schemas\n" for name in stale)
        return 1 if stale else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in stale:
        (FOLDER / name).write_text(schemas()[name], encoding="utf-8")
    return 0


def _is(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
