"""What a tool's `credential` becomes: the issuer's own fields, where it goes, and what the manifests pin."""

from pathlib import Path

import pytest

from broker.manifest.load import load_texts

TOOL = """
apiVersion: broker/v1
kind: Tool
metadata: {{name: github, owner: team}}
spec:
  protocol: rest
  endpoint: https://api.github.com
  credential: {{{credential}}}
  operations:
    issues.create:
      match: {{method: POST, path: "/repos/{{owner}}/{{repo}}/issues"}}
      effect: read
      params: {{{catalog}}}
---
apiVersion: broker/v1
kind: Agent
metadata: {{name: bot, owner: team}}
spec:
  identity: {{token: true}}
  tools: {{github: {{operations: {{issues.create: {{params: {{{manifest}}}}}}}}}}}
"""
STATIC = "issuer: static, secret: {env: A}"


def loaded(credential=STATIC, catalog="", manifest=""):
    text = TOOL.format(credential=credential, catalog=catalog, manifest=manifest)
    return load_texts({"t.yaml": text.encode()}, Path("/etc/manifests"))


def spec(credential):
    result = loaded(credential)
    assert result.findings == ()
    return result.snapshot.tools["github"].credential


@pytest.mark.parametrize(
    ("written", "placed"),
    [
        ("", ("authorization", "Bearer {}", None, None)),
        (', as: {template: "token {}"}', ("authorization", "token {}", None, None)),
        (', as: {header: x-api-key, template: "{}"}', ("x-api-key", "{}", None, None)),
        (", as: {basic: bot@acme.example}", ("authorization", "Bearer {}", "bot@acme.example", None)),
        (', as: {basic: ""}', ("authorization", "Bearer {}", "", None)),
    ],
    ids=["as a bearer", "by a template", "in a header", "as a password", "as a password of nobody"],
)
def test_a_credential_goes(written, placed):
    made = spec(STATIC + written)
    assert (made.header, made.template, made.basic, made.sigv4) == placed


def test_a_signature_is_for_a_service_in_a_region():
    role = "issuer: aws-sts, role: 'arn:aws:iam::123456789012:role/r', scopes: {policy: {Version: '2012-10-17'}}"
    assert spec(f"{role}, as: {{sigv4: {{service: s3, region: eu-west-1}}}}").sigv4 == ("s3", "eu-west-1")


@pytest.mark.parametrize(
    "written",
    [
        "basic: 'a:b'",
        'basic: "a\\nb"',
        "basic: bot, sigv4: {service: s3, region: x}",
        "sigv4: {service: s3}",
        "basic: ghp_0123456789",
    ],
    ids=["a user with a colon", "a user with a line break", "two ways", "half a signature", "a secret for a user"],
)
def test_a_place_that_is_none_is_refused(written):
    assert loaded(f"{STATIC}, as: {{{written}}}").snapshot is None


def test_files_are_relative_to_the_manifests_folder_however_deep_they_are_named():
    made = spec(
        "issuer: oauth, token_url: 'https://sts.example/token', grant: token-exchange, "
        "subject: {file: svid/jwt}, ca: {file: /abs/ca.pem}"
    )
    assert made.settings["subject"] == {"file": "/etc/manifests/svid/jwt"}
    assert made.settings["ca"] == {"file": "/abs/ca.pem"}


@pytest.mark.parametrize("field", ["scope: [a]", "placement: {header: x}", "model_config: 1"])
def test_a_field_that_the_issuer_does_not_have_is_a_finding_that_names_it(field):
    result = loaded(f"{STATIC}, {field}")
    [finding] = result.findings
    assert (finding.code, result.snapshot) == ("credential_invalid", None)
    assert finding.message == f"the static issuer has no field {field.partition(':')[0]}"


def test_all_of_an_issuers_problems_are_told_at_once():
    findings = loaded("issuer: oauth, token_url: 'http://sts.example/token', tokens: 1").findings
    assert len(findings) == 2
    assert {finding.code for finding in findings} == {"credential_invalid"}


@pytest.mark.parametrize("field", ["client_secret", "token", "api_key", "Password", "private_key", "x_pem"])
def test_a_field_that_is_a_secret_by_its_name_holds_no_text(field):
    result = loaded(f"{STATIC}, deep: [{{{field}: hunter2}}]")
    [finding] = result.findings
    assert finding.code == "secret_literal"
    assert "hunter2" not in finding.sentence


PATH = "path: {properties: {owner: {const: acme}, repo: {enum: [web, api]}}}"


@pytest.mark.parametrize(
    ("catalog", "manifest", "pins"),
    [
        ("", PATH, {"owner": ("acme",), "repo": ("web", "api")}),
        (PATH, "", {"owner": ("acme",), "repo": ("web", "api")}),
        (PATH, "path: {properties: {repo: {const: web}}}", {"owner": ("acme",), "repo": ("web",)}),
        ("", "path: {properties: {repo: {pattern: '^w'}}}", {}),
        ("", "body: {properties: {repo: {const: web}, team: {const: red}}}", {"team": ("red",)}),
        ("", "query: {properties: {page: {const: 1}, all: {enum: [x, 2]}, deep: {properties: {a: {const: b}}}}}", {}),
    ],
    ids=[
        "the manifest", "the catalog", "the manifest after the catalog", "no pattern", "no field of the body for one of the path",
        "nothing but texts",
    ],
)  # fmt: skip
def test_what_pins_a_parameter(catalog, manifest, pins):
    result = loaded(catalog=catalog, manifest=manifest)
    assert result.findings == ()
    assert dict(result.snapshot.agents["bot"].tools["github"]["issues.create"].pins) == pins
