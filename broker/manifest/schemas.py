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


if __name__ == "__main__":
    stale = {
        name: text for name, text in schemas().items() if not (FOLDER / name).exists() or (FOLDER / name).read_text() != text
    }
    if "--check" in sys.argv:
        sys.exit(f"{', '.join(stale)}: stale; run python -m broker.manifest.schemas" if stale else 0)
    for name, text in stale.items():
        (FOLDER / name).write_text(text)
