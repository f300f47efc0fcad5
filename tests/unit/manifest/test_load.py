"""What a right folder becomes, and what may and may not change its revision."""

import datetime as dt
import gc
import json
import os
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from broker.errors import UsageError
from broker.manifest import load as loading
from broker.manifest.load import Reading, load, load_texts
from broker.policy.types import Effect

TOOLS = b"""
apiVersion: broker/v1
kind: Tool
metadata: {name: github, owner: team-devex}
spec:
  protocol: rest
  endpoint: https://api.github.com
  credential: {issuer: jwt, ttl: 5m, scopes: [repo], as: {header: x-api-key, template: "{}"}}
  operations:
    issues.create:
      match: {method: POST, path: "/repos/{owner}/{repo}/issues"}
      effect: write
      data: [source-code]
      max_body: 64KiB
      params:
        path: {properties: {owner: {type: string}, repo: {type: string}}}
        body: {type: object, required: [title], properties: {title: {type: string}}, additionalProperties: false}
---
apiVersion: broker/v1
kind: Tool
metadata: {name: wiki, owner: team-docs}
spec:
  protocol: mcp
  endpoint: http://wiki.internal.example/mcp
  upstream: {addresses: [127.0.0.0/8, "::1/128"]}
  operations:
    search_pages: {effect: read, params: {arguments: {type: object}}}
    pages/delete: {match: {tool: delete_page}, effect: destructive, params: {arguments: {additionalProperties: false}}}
"""
AGENT = b"""
apiVersion: broker/v1
kind: Agent
metadata: {name: refund-bot, owner: team-payments, oncall: payments-primary}
spec:
  identity: {spiffe: spiffe://acme.example/agents/refund-bot, token: true}
  tools:
    github:
      operations:
        issues.create:
          params: {path: {properties: {owner: {const: acme}}}}
          approval: {approvers: 1}
    wiki: {operations: {pages/delete: {approval: {}}}}
"""
MODELS = b"""
apiVersion: broker/v1
kind: Tool
metadata: {name: gpt, owner: team-devex}
spec:
  protocol: openai
  endpoint: https://models.example
  operations:
    responses: {effect: read}
    models.list: {match: {method: GET, path: /v1/models}, effect: read}
    chat.completions: {match: {method: POST, path: /v2/chat/completions}, effect: read}
"""
CATALOG = b"{body: {properties: {max_output_tokens: {maximum: 8000}}}}"
PLATFORM = b"""
apiVersion: broker/v1
kind: Platform
metadata: {name: acme, owner: platform}
spec:
  environment: production
  credentials: {max_ttl: 10m}
  identity: {trust_bundles: {acme.example: {file: certs/acme.pem}}}
"""


def certificate(name, key):
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), 7, start, start + dt.timedelta(days=1))
    return builder.sign(key, None).public_bytes(Encoding.PEM)


@pytest.fixture
def folder(tmp_path):
    key = ed25519.Ed25519PrivateKey.generate()
    for name in ("tools", "agents", "certs", "schema", ".git"):
        (tmp_path / name).mkdir()
    (tmp_path / "tools/all.yaml").write_bytes(TOOLS)
    (tmp_path / "agents/refund-bot.yml").write_bytes(AGENT)
    (tmp_path / "platform.yaml").write_bytes(PLATFORM)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "certs/acme.pem").write_bytes(b"# ours\n" + private + certificate("one", key))
    (tmp_path / "schema/tool.yaml").write_bytes(b"not read")
    (tmp_path / ".git/x.yaml").write_bytes(b"not read")
    return tmp_path


def test_a_right_folder_becomes_a_snapshot(folder):
    loaded = load(folder)
    snapshot = loaded.snapshot
    assert loaded.findings == ()
    assert {path.relative_to(folder).as_posix() for path in loaded.files} == {
        "tools/all.yaml",
        "agents/refund-bot.yml",
        "platform.yaml",
        "certs/acme.pem",
    }
    create = snapshot.tools["github"].operations["issues.create"]
    assert (create.method, create.template.text, create.effect) == ("POST", "/repos/{owner}/{repo}/issues", Effect.WRITE)
    assert (create.rule, create.max_body, create.data) == (
        "tools/all.yaml#/spec/operations/issues.create",
        65536,
        ("source-code",),
    )
    credential = snapshot.tools["github"].credential
    assert dict(credential.settings) == {"ttl": 300, "scopes": ["repo"]}
    assert (credential.issuer, credential.header, credential.template) == ("jwt", "x-api-key", "{}")
    assert create.schemas["body"].rule == "tools/all.yaml#/spec/operations/issues.create/params/body"
    wiki = snapshot.tools["wiki"]
    assert {name: operation.alias for name, operation in wiki.operations.items()} == {
        "search_pages": "search_pages",
        "pages/delete": "delete_page",
    }
    assert wiki.operations["pages/delete"].rule == "tools/all.yaml#/spec/operations/pages~1delete"
    assert wiki.upstream.addresses == ("127.0.0.0/8", "::1/128")
    assert snapshot.hosts["http", "wiki.internal.example", 80] == (wiki,)


def test_an_agent_holds_its_grants_and_nothing_else(folder):
    snapshot = load(folder).snapshot
    agent = snapshot.by_spiffe["spiffe://acme.example/agents/refund-bot"]
    assert agent is snapshot.agents["refund-bot"]
    assert (agent.owner, agent.oncall, agent.token, agent.rule) == (
        "team-payments",
        "payments-primary",
        True,
        "agents/refund-bot.yml#",
    )
    grant = agent.tools["github"]["issues.create"]
    assert grant.approval
    assert grant.schemas["path"].violations({"owner": "evil"}, "path")[0].pointer == "/path/owner"
    assert {name: set(grants) for name, grants in agent.tools.items()} == {"github": {"issues.create"}, "wiki": {"pages/delete"}}


def test_two_places_with_one_schema_keep_their_own_rules():
    schema = b"params: {path: {properties: {owner: {const: acme}}}}"
    texts = {"t.yaml": TOOLS, "a.yaml": AGENT, "b.yaml": AGENT.replace(b"refund-bot", b"other-bot")}
    assert schema in AGENT
    agents = load_texts(texts, Path()).snapshot.agents
    rules = {agent.tools["github"]["issues.create"].schemas["path"].rule.partition("#")[0] for agent in agents.values()}
    assert rules == {"a.yaml", "b.yaml"}


def test_the_platform_part_is_compiled_and_only_certificates_enter(folder):
    snapshot = load(folder).snapshot
    assert (snapshot.environment, snapshot.max_ttl) == ("production", 600)
    bundle = snapshot.trust_bundles["acme.example"]
    assert bundle.startswith("-----BEGIN CERTIFICATE-----")
    assert "PRIVATE" not in bundle
    assert "ours" not in bundle


def test_comments_formatting_and_file_names_do_not_change_the_revision(folder):
    before = load(folder).snapshot.revision
    (folder / "tools/all.yaml").rename(folder / "zzz.yaml")
    tools = TOOLS.replace(b"{name: wiki, owner: team-docs}", b"# a comment\n  owner: 'team-docs'\n  name: \"wiki\"\n")
    (folder / "zzz.yaml").write_bytes(tools)
    (folder / "certs/acme.pem").write_bytes((folder / "certs/acme.pem").read_bytes() + b"\n# more\n")
    assert load(folder).snapshot.revision == before
    assert before.startswith("sha256:")


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        pytest.param("tools/all.yaml", b"64KiB", b"63KiB", id="a bound in the catalog"),
        pytest.param("agents/refund-bot.yml", b"const: acme", b"const: acne", id="a value in a manifest"),
        pytest.param("platform.yaml", b"10m", b"11m", id="the platform policy"),
    ],
)
def test_every_change_of_meaning_changes_the_revision(folder, file, old, new):
    before = load(folder).snapshot.revision
    (folder / file).write_bytes((folder / file).read_bytes().replace(old, new))
    assert load(folder).snapshot.revision != before


def test_another_certificate_changes_the_revision(folder):
    before = load(folder).snapshot.revision
    (folder / "certs/acme.pem").write_bytes(certificate("two", ed25519.Ed25519PrivateKey.generate()))
    assert load(folder).snapshot.revision != before


def test_unsafe_plaintext_is_accepted_with_a_warning():
    tools = TOOLS.replace(b'upstream: {addresses: [127.0.0.0/8, "::1/128"]}', b"unsafe_plaintext: true")
    loaded = load_texts({"t.yaml": tools}, Path())
    assert [(finding.code, finding.severity, finding.line) for finding in loaded.findings] == [
        ("unsafe_plaintext", "warning", 25)
    ]
    assert loaded.snapshot is not None


def test_a_grant_that_names_no_model_is_accepted_with_a_warning_that_says_what_to_write():
    bare = (
        b"spec: {identity: {token: true}, tools: {gpt: {operations: {responses: {}, models.list: {}, chat.completions: {params: "
    )
    named = b"{body: {properties: {model: {const: m}}}}}}}}}"
    agent = AGENT.partition(b"spec:")[0] + bare + named
    [finding] = load_texts({"t.yaml": MODELS, "a.yaml": agent}, Path()).findings
    assert (finding.code, finding.severity) == ("model_not_named", "warning")
    assert "{model: {enum: [NAME]}}" in finding.advice


def granted(operation="responses", tool=MODELS, **grant):
    spec = {"identity": {"token": True}, "tools": {"gpt": {"operations": {operation: grant}}}}
    agent = {"apiVersion": "broker/v1", "kind": "Agent", "metadata": {"name": "bot", "owner": "team"}, "spec": spec}
    loaded = load_texts({"t.yaml": tool, "a.yaml": json.dumps(agent).encode()}, Path())
    return loaded.snapshot.agents["bot"].tools["gpt"][operation]


def body(**properties):
    return {"params": {"body": {"properties": properties}}}


@pytest.mark.parametrize(
    ("schema", "models"),
    [
        pytest.param({"const": "m"}, {"m"}, id="one"),
        pytest.param({"enum": ["m", "n", 7]}, {"m", "n"}, id="several"),
        pytest.param({"pattern": "^m"}, set(), id="a pattern names none"),
        pytest.param(True, set(), id="any"),
    ],
)
def test_a_grant_holds_the_models_that_its_schema_names(schema, models):
    assert granted(**body(model=schema)).models == models


def test_a_grant_holds_the_words_of_what_the_provider_may_do():
    assert granted(server_tools=["web_search", "url"]).server_tools == {"web_search", "url"}
    assert granted().server_tools == set()


@pytest.mark.parametrize(
    ("operation", "properties", "most"),
    [
        pytest.param("responses", {}, 4096, id="what no schema says"),
        pytest.param("responses", {"max_output_tokens": {"maximum": 100}}, 100, id="the manifest's"),
        pytest.param("responses", {"max_output_tokens": {"maximum": 100000}}, 8000, id="the catalog's, where it is the lesser"),
        pytest.param("responses", {"max_output_tokens": True, "max_tokens": {"maximum": 1}}, 8000, id="not another field's"),
        pytest.param("chat.completions", {"max_tokens": {"maximum": 50.0}}, 50, id="either field of a chat"),
        pytest.param("models.list", {"max_tokens": {"maximum": 1}}, 4096, id="nothing where no model is called"),
    ],
)
def test_a_grant_holds_the_most_output_of_a_call_that_says_none(operation, properties, most):
    tool = MODELS if not properties else MODELS.replace(b"responses: {", b"responses: {params: " + CATALOG + b", ")
    assert granted(operation, tool, **body(**properties)).max_output == most


@pytest.mark.parametrize(
    ("endpoint", "path"),
    [
        pytest.param(b"https://models.example", "/v1/responses", id="at the root, below the version"),
        pytest.param(b"https://models.example/openai/v1", "/responses", id="below a base path, right there"),
    ],
)
def test_a_providers_api_needs_no_match(endpoint, path):
    tool = load_texts({"t.yaml": MODELS.replace(b"https://models.example", endpoint)}, Path()).snapshot.tools["gpt"]
    operation = tool.operations["responses"]
    assert (operation.method, operation.template.text) == ("POST", path)
    assert tool.operations["chat.completions"].template.text == "/v2/chat/completions", "what is written counts"


def test_shadow_mode_says_that_it_is_on():
    shadow = AGENT.replace(b"  tools:", b"  mode: shadow\n  shadow_until: 2099-01-31\n  tools:", 1)
    loaded = load_texts({"t.yaml": TOOLS, "a.yaml": shadow}, Path())
    assert [finding.code for finding in loaded.findings] == ["shadow"]
    assert loaded.snapshot is not None


def test_a_folder_that_is_not_there_is_wrong_usage(tmp_path):
    with pytest.raises(UsageError, match="there is no folder"):
        load(tmp_path / "none")


def test_an_empty_folder_is_an_error_so_that_a_lost_mount_changes_nothing(tmp_path):
    loaded = load(tmp_path)
    assert (loaded.snapshot, [finding.code for finding in loaded.findings]) == (None, ["manifests_missing"])


def test_what_is_no_readable_file_is_a_finding(folder):
    os.mkfifo(folder / "pipe.yaml")
    (folder / "gone.yaml").symlink_to(folder / "nowhere")
    loaded = load(folder)
    assert loaded.snapshot is None
    assert [(finding.file, finding.code) for finding in loaded.findings if finding.severity == "error"] == [
        ("gone.yaml", "file_unreadable"),
        ("pipe.yaml", "file_unreadable"),
    ]


def test_a_folder_whose_manifests_would_be_passed_over_is_a_finding(folder, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("linked", "schema/linked", ".linked"):
        (folder / name).symlink_to(elsewhere)
    (folder / "tools/locked").mkdir()
    scandir = os.scandir

    def locked(path):  # root, as whom tests may run, may read it
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    errors = [finding for finding in load(folder).findings if finding.severity == "error"]
    assert [(finding.file, finding.code) for finding in errors] == [
        ("linked", "file_unreadable"),
        ("tools/locked", "file_unreadable"),
    ]
    assert [finding.sentence for finding in errors] == [
        "the folder is a link, which is not followed; have the folder itself there, or remove it",
        "the folder can't be listed (Permission denied); let the broker read it, or remove it",
    ]
    with pytest.raises(UsageError, match="can't be listed"):
        load(folder / "tools/locked")


def test_a_folder_is_read_as_kubernetes_mounts_it(folder):
    (folder / "..2026").mkdir()
    (folder / "..data").symlink_to("..2026")
    for name in ("tools", "agents", "certs", "platform.yaml"):
        (folder / name).rename(folder / "..2026" / name)
        (folder / name).symlink_to(f"..data/{name}")
    loaded = load(folder)
    assert loaded.snapshot is not None
    assert loaded.snapshot.agents.keys() == {"refund-bot"}


@pytest.mark.parametrize("value", ["5", "[]", "{}", "null", "[[a]]", "{a: {b: [c]}}", '"x"'])
def test_a_value_of_any_shape_anywhere_is_judged_without_a_fault(value):
    texts = {"t.yaml": TOOLS, "a.yaml": AGENT}
    for name, text in texts.items():
        lines = [line for line in text.decode().split("\n") if ": " in line]
        for line in lines:
            head, _, _ = line.partition(": ")
            loaded = load_texts({**texts, name: text.replace(line.encode(), f"{head}: {value}".encode(), 1)}, Path())
            assert (loaded.snapshot is None) == any(finding.severity == "error" for finding in loaded.findings)


def test_a_schema_that_requires_what_is_no_name_is_a_finding():
    tools = TOOLS.replace(b"path: {properties: {owner", b"path: {required: [[a]], properties: {owner")
    assert [finding.code for finding in load_texts({"t.yaml": tools}, Path()).findings] == ["schema_invalid"]


def test_a_secret_file_is_named_from_the_manifests_folder_wherever_the_broker_was_started(folder, monkeypatch):
    tools = TOOLS.replace(b"{issuer: jwt, ttl: 5m, scopes: [repo],", b"{issuer: static, secret: {file: keys/github},")
    (folder / "tools/all.yaml").write_bytes(tools)
    monkeypatch.chdir(folder.parent)
    tool = load(Path(folder.name)).snapshot.tools["github"]
    assert tool.credential.settings["secret"] == {"file": str(folder / "keys/github")}


def test_a_credential_of_a_well_known_form_is_found_wherever_it_stands():
    agent = AGENT.replace(b"oncall: payments-primary", b"oncall: ghp_0123456789abcdefghij")
    findings = [
        finding for finding in load_texts({"t.yaml": TOOLS, "a.yaml": agent}, Path()).findings if finding.severity == "error"
    ]
    assert [(finding.code, finding.line) for finding in findings] == [("secret_literal", 4)]
    assert "0123456789" not in str(findings)


def test_several_processes_read_what_one_reads(folder, monkeypatch):
    monkeypatch.setattr(loading, "_FORK_FROM", 2)
    for number in range(120):
        agent = (
            AGENT.decode().replace("refund-bot", f"bot{number}").replace("token: true", "token: true" if number else "token: no")
        )
        (folder / f"agents/bot{number:03}.yaml").write_text(agent)
    told = []
    one, many = load(folder), load(folder, reading=Reading(folder, lambda *done: told.append(done), processes=2))
    assert many.findings == one.findings
    assert [(finding.file, finding.code) for finding in many.findings] == [("agents/bot000.yaml", "yaml_boolean")]
    assert told[0] == ("reading", 0, 123)
    (folder / "agents/bot000.yaml").unlink()
    snapshots = [load(folder, reading=Reading(folder, processes=number)).snapshot for number in (1, 2)]
    assert snapshots[0].revision == snapshots[1].revision
    assert len(snapshots[1].agents) == 120


def test_collection_is_as_it_was_after_reading(folder):
    for before in (gc.disable, gc.enable):
        before()
        load(folder)
        assert gc.isenabled() is (before is gc.enable)
