"""One tiny wrong file per failure: where it is reported, and by which code."""

from pathlib import Path

import pytest

from broker.manifest.admission import Vocabulary
from broker.manifest.findings import as_text
from broker.manifest.load import load_texts
from broker.manifest.rules import ADMISSION

BAD = Path(__file__).parents[2] / "bad_manifests"


WORDS = Vocabulary(
    {**dict.fromkeys(("rest", "openai", "anthropic"), frozenset({"path", "query", "body"})), "mcp": frozenset({"arguments"})},
    {
        "static": lambda settings: [] if "secret" in settings else ["it needs a reference; write secret: {env: NAME}"],
        "jwt": lambda settings: ["it needs no secret; take it out"] if "secret" in settings else [],
        "aws-sts": lambda _: [],
    },
    1_800_000_000.0,
)

EXPECTED = {
    "addresses_invalid.yaml": ["7:26 field_invalid", "7:38 field_invalid"],
    "burst_without_rate.yaml": ["7:19 field_invalid"],
    "ca_garbage.yaml": ["7:18 pem_invalid"],
    "ca_missing.yaml": ["7:18 file_unreadable"],
    "callers_not_built.yaml": ["7:3 callers_not_built"],
    "catalog_mistake_once.yaml": ["8:56 field_invalid"],
    "ceiling_exceeded.yaml": ["7:12 ceiling_exceeded"],
    "ceiling_per_run.yaml": ["5:34 field_unknown", "6:14 field_unknown"],
    "credential_invalid.yaml": ["7:3 credential_invalid"],
    "credential_two_places.yaml": ["7:54 field_invalid"],
    "decoy_in_use.yaml": ["15:38 decoy_in_use", "15:61 decoy_in_use"],
    "destructive_unbounded.yaml": ["6:30 destructive_unbounded"],
    "duration_invalid.yaml": ["5:26 field_invalid"],
    "endpoint_overlap.yaml": ["15:13 endpoint_overlap"],
    "endpoint_plaintext.yaml": ["6:13 endpoint_plaintext"],
    "endpoint_plaintext_beyond_loopback.yaml": ["6:13 endpoint_plaintext"],
    "expires_invalid.yaml": ["6:46 field_invalid"],
    "field_invalid.yaml": ["8:56 field_invalid", "8:72 field_invalid"],
    "field_missing.yaml": ["4:1 field_missing"],
    "field_unknown.yaml": ["7:3 field_unknown"],
    "grant_location_unknown.yaml": ["16:41 location_unknown"],
    "grant_variable_unknown.yaml": ["16:61 schema_param_unknown"],
    "header_reserved.yaml": ["7:63 field_invalid"],
    "idempotency_invalid.yaml": [
        "9:62 idempotency_invalid",
        "10:66 idempotency_invalid",
        "11:75 idempotency_invalid",
        "12:81 field_invalid",
    ],
    "idempotency_invalid_mcp.yaml": ["8:28 idempotency_invalid"],
    "identity_missing.yaml": ["5:13 identity_missing"],
    "issuer_unknown.yaml": ["7:24 issuer_unknown"],
    "kind_missing.yaml": ["1:1 field_missing"],
    "kind_unknown.yaml": ["2:7 kind_unknown"],
    "limit_amounts.yaml": [f"7:{column} field_invalid" for column in (31, 41, 59, 78, 93, 109)],
    "limit_amounts_per_run.yaml": [f"7:{column} field_invalid" for column in (25, 48, 65, 89, 108)],
    "limit_invalid.yaml": ["7:18 field_invalid"],
    "limit_unknown.yaml": ["7:12 field_unknown"],
    "location_unknown.yaml": ["8:71 location_unknown"],
    "match_invalid_mcp.yaml": ["8:14 match_invalid"],
    "match_invalid_model.yaml": ["9:5 match_invalid", "11:18 match_invalid"],
    "match_invalid_rest.yaml": ["8:12 match_invalid", "9:38 match_invalid"],
    "mistakes_behind_mistakes.yaml": ["6:13 endpoint_invalid", "7:3 field_unknown", "9:56 field_invalid", "10:38 match_invalid"],
    "name_duplicate.yaml": ["12:18 name_duplicate"],
    "name_invalid.yaml": ["3:18 field_invalid"],
    "namespace_duplicate.yaml": ["12:25 namespace_duplicate"],
    "null_grant.yaml": ["18:14 field_invalid"],
    "oncall_missing.yaml": ["3:1 oncall_missing"],
    "operation_ambiguous.yaml": ["8:5 operation_ambiguous"],
    "operation_ambiguous_mcp.yaml": ["8:5 operation_ambiguous"],
    "operation_ambiguous_model.yaml": ["8:5 operation_ambiguous"],
    "operation_name_invalid.yaml": ["8:5 field_invalid"],
    "operation_unknown.yaml": ["16:25 operation_unknown"],
    "owner_unknown.yaml": ["3:23 owner_unknown"],
    "platform_duplicate.yaml": ["8:7 platform_duplicate"],
    "price_invalid.yaml": ["5:55 field_invalid"],
    "price_missing.yaml": ["5:21 field_missing"],
    "protocol_unknown.yaml": ["5:13 protocol_unknown"],
    "schema_invalid.yaml": ["12:43 schema_invalid"],
    "schema_param_unknown.yaml": ["11:36 schema_param_unknown", "11:74 schema_param_unknown"],
    "schema_pattern_not_linear.yaml": ["12:43 schema_invalid"],
    "schema_remote.yaml": ["12:47 schema_invalid"],
    "schema_unreachable.yaml": ["6:66 schema_unreachable"],
    "schema_unsatisfiable.yaml": ["6:74 schema_unsatisfiable"],
    "secret_literal.yaml": ["7:40 secret_literal"],
    "secret_literal_field.yaml": ["10:16 secret_literal"],
    "secret_literal_known_form.yaml": ["7:46 secret_literal"],
    "secret_literal_nested.yaml": ["10:34 secret_literal"],
    "secret_literal_template.yaml": ["10:43 secret_literal"],
    "secret_two_sources.yaml": ["7:40 field_invalid"],
    "server_tool_invalid.yaml": ["6:57 field_invalid"],
    "shadow_without_end.yaml": ["6:9 shadow_without_end"],
    "signed_without_keys.yaml": ["7:3 credential_invalid", "16:3 credential_invalid"],
    "sink_unknown.yaml": ["6:19 sink_unknown", "8:15 sink_unknown"],
    "spiffe_duplicate.yaml": ["12:22 spiffe_duplicate"],
    "spire_and_bundles.yaml": ["7:20 field_invalid"],
    "spire_invalid.yaml": ["5:30 field_invalid", "5:52 spiffe_invalid"],
    "string_as_boolean.yaml": ["5:21 field_invalid"],
    "template_without_place.yaml": ["7:65 field_invalid"],
    "test_case_invalid.yaml": ["7:88 field_invalid", "8:28 field_invalid", "8:73 field_invalid"],
    "tool_not_approved.yaml": ["6:11 tool_not_approved"],
    "tool_unknown.yaml": ["7:5 tool_unknown"],
    "trust_domain_invalid.yaml": ["5:30 field_invalid"],
    "version_unknown.yaml": ["1:13 field_invalid"],
    "yaml_anchor_alias.yaml": ["5:13 yaml_anchor", "7:11 yaml_alias"],
    "yaml_bom.yaml": ["1:1 yaml_encoding"],
    "yaml_boolean.yaml": ["5:21 yaml_boolean"],
    "yaml_boolean_country.yaml": ["11:58 yaml_boolean"],
    "yaml_character.yaml": ["2:15 yaml_character"],
    "yaml_depth.yaml": ["1:68 yaml_depth"],
    "yaml_duplicate_key.yaml": ["8:3 yaml_duplicate_key"],
    "yaml_empty.yaml": ["1:1 yaml_empty"],
    "yaml_empty_document.yaml": ["8:1 yaml_empty"],
    "yaml_encoding.yaml": ["2:7 yaml_encoding"],
    "yaml_key.yaml": ["7:12 yaml_key"],
    "yaml_merge.yaml": ["5:3 yaml_merge"],
    "yaml_not_mapping.yaml": ["1:1 yaml_not_mapping"],
    "yaml_number.yaml": ["7:25 yaml_number", "7:46 yaml_number"],
    "yaml_syntax.yaml": ["3:1 yaml_syntax"],
    "yaml_tab.yaml": ["2:6 yaml_tab"],
    "yaml_tag.yaml": ["5:21 yaml_tag"],
}
# These load, and say what their author may not think.
WARNED = {
    "lapsed.yaml": ["6:37 lapsed"],
    "schema_open.yaml": ["8:5 schema_open"],
    "shadow.yaml": ["7:3 shadow"],
    "unsafe_never.yaml": ["8:61 unsafe_never"],
    "unsafe_reads_without_redis.yaml": ["5:12 unsafe_reads_without_redis"],
}


@pytest.mark.parametrize("name", [pytest.param(name, id=name.removesuffix(".yaml").replace("_", " ")) for name in EXPECTED])
def test_is_reported_where_it_stands(name):
    loaded = load_texts({name: (BAD / name).read_bytes()}, BAD, WORDS)
    errors = [finding for finding in loaded.findings if finding.severity == "error"]
    assert [f"{finding.line}:{finding.column} {finding.code}" for finding in errors] == EXPECTED[name]
    assert loaded.snapshot is None
    assert all(finding.message and finding.advice for finding in errors)


@pytest.mark.parametrize("name", [pytest.param(name, id=name.removesuffix(".yaml").replace("_", " ")) for name in WARNED])
def test_is_warned_of_where_it_stands(name):
    loaded = load_texts({name: (BAD / name).read_bytes()}, BAD, WORDS)
    assert {finding.severity for finding in loaded.findings} == {"warning"}
    assert [f"{finding.line}:{finding.column} {finding.code}" for finding in loaded.findings] == WARNED[name]
    assert loaded.snapshot is not None
    assert all(finding.message and finding.advice for finding in loaded.findings)


def test_every_bad_file_is_expected():
    assert {path.name for path in BAD.iterdir()} == {*EXPECTED, *WARNED}


def test_all_at_once_gives_every_error_of_every_file():
    loaded = load_texts({path.name: path.read_bytes() for path in BAD.iterdir()}, BAD, WORDS)
    found = {f"{finding.file} {finding.line}:{finding.column} {finding.code}" for finding in loaded.findings}
    # An unknown tool may become known by another file, and what the platform asks is said by another; nothing else may vanish.
    found |= {f"{name} {error}" for name, errors in EXPECTED.items() for error in errors if error.split()[1] in ADMISSION}
    assert {f"{name} {error}" for name, errors in EXPECTED.items() for error in errors} <= found


def test_no_finding_repeats_a_secret():
    texts = {name: (BAD / name).read_bytes() for name in EXPECTED if name.startswith("secret")}
    text = as_text(load_texts(texts, BAD, WORDS).findings)
    assert "secret_literal" in text
    assert not any(secret in text for secret in ("hunter2", "sk_live", "dXNlcjpwYXNz"))
