"""The JSON Schemas of the four kinds, for editors: generated from the models, checked in, compared by a test.

`python -m broker.manifest.schemas` writes `manifests/schema/*.json`.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from broker.manifest.models import KINDS


def schemas() -> Mapping[str, str]:
    """File name → text of one JSON Schema 2020-12."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {
        f"{kind.lower()}.json": json.dumps(dialect | model.model_json_schema(), indent=1, ensure_ascii=False) + "\n"
        for kind, model in KINDS.items()
    }


if __name__ == "__main__":
    for name, text in schemas().items():
        Path("manifests/schema", name).write_text(text, encoding="utf-8")
