import json
from pathlib import Path

import jsonschema
import pytest

from broker.manifest.models import KINDS
from broker.manifest.schemas import schemas
from broker.manifest.strict_yaml import read

MANIFESTS = Path(__file__).parents[3] / "manifests"


def test_the_checked_in_schemas_are_current():
    assert {path.name: path.read_text(encoding="utf-8") for path in (MANIFESTS / "schema").iterdir()} == dict(schemas())


@pytest.mark.parametrize("text", list(schemas().values()), ids=list(schemas()))
def test_a_schema_is_a_schema_and_describes_every_field(text):
    schema = json.loads(text)
    jsonschema.Draft202012Validator.check_schema(schema)
    for part in (schema, *schema["$defs"].values()):
        assert part.get("description") or "properties" not in part
        for name, field in part.get("properties", {}).items():
            assert field.get("description") or "$ref" in field, f"{part['title']}.{name} has no description"


@pytest.mark.parametrize("path", sorted(MANIFESTS.rglob("*.yaml")), ids=lambda path: path.name)
def test_the_sample_organisation_fits_its_schemas(path):
    documents, findings = read(path.name, path.read_bytes())
    assert findings == ()
    for document in documents:
        assert document.data["kind"] in KINDS
        jsonschema.Draft202012Validator(json.loads(schemas()[f"{document.data['kind'].lower()}.json"])).validate(document.data)
