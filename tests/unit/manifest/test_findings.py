import json

import pytest

from broker.manifest.findings import FORMATS, Finding

PLAIN = Finding("agents/a.yaml", 3, 7, "field_unknown", "there is no field x", "take it out")
WARNING = Finding("a.yaml", 1, 1, "not_enforced", "limits are not enforced yet", "don't rely on them", "warning")
HOSTILE = Finding("a,b:\n::error::c.yaml", 1, 2, "yaml_key", "\x1b[2J\r\n::set-output name=x::100%\u202e\udcff", "go")


def test_text_is_one_line_each_with_place_code_and_remedy():
    assert FORMATS["text"]([PLAIN, WARNING]) == (
        "agents/a.yaml:3:7: field_unknown: there is no field x; take it out\n"
        "a.yaml:1:1: not_enforced: limits are not enforced yet; don't rely on them (warning)\n"
    )


@pytest.mark.parametrize("form", list(FORMATS))
def test_what_a_file_smuggles_in_comes_out_escaped(form):
    text = FORMATS[form]([HOSTILE])
    assert text.encode("utf-8")
    assert not any(character in text for character in "\x1b\r\u202e\udcff")
    assert form in ("json", "sarif") or text.count("\n") == 1


def test_github_escapes_what_would_end_a_command():
    assert FORMATS["github"]([HOSTILE]).startswith(
        "::error file=a%2Cb%3A%0A%3A%3Aerror%3A%3Ac.yaml,line=1,col=2,title=yaml_key::"
    )
    assert "100%25" in FORMATS["github"]([HOSTILE])
    assert FORMATS["github"]([WARNING]).startswith("::warning file=a.yaml,line=1,col=1,title=not_enforced::limits")


def test_json_has_every_field():
    assert json.loads(FORMATS["json"]([PLAIN]))[0] == {
        "file": "agents/a.yaml",
        "line": 3,
        "column": 7,
        "code": "field_unknown",
        "message": "there is no field x",
        "advice": "take it out",
        "severity": "error",
    }


def test_sarif_names_rule_level_and_region():
    run = json.loads(FORMATS["sarif"]([PLAIN, WARNING]))["runs"][0]
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == ["field_unknown", "not_enforced"]
    assert [(result["ruleId"], result["level"]) for result in run["results"]] == [
        ("field_unknown", "error"),
        ("not_enforced", "warning"),
    ]
    assert run["results"][0]["locations"][0]["physicalLocation"]["region"] == {"startLine": 3, "startColumn": 7}
