"""Shadow mode through a real Envoy: what would be denied goes on to the catalog's hosts, recorded, and is granted nothing."""

import subprocess

import httpx
import pytest
import stack


def test_a_tool_that_the_manifest_does_not_list_is_reached_through_a_tunnel_without_its_credential(world):
    with world.broker.client("trainee") as client:
        answer = client.post(
            f"https://localhost:{world.secure.port}/items", json={"title": "x"}, headers={"authorization": "mine"}
        )
    assert answer.status_code == 200
    [seen] = world.secure.seen
    assert (seen.path, seen.body, seen.header("authorization")) == ("/items", b'{"title":"x"}', None)
    tunnel, call = world.broker.decisions(verdict="would_deny")[-2:]
    assert (tunnel["method"], tunnel["code"]) == ("CONNECT", "tool_not_declared")
    assert (call["tool"], call["operation"], call["code"]) == ("secure", "items.create", "tool_not_declared")


def test_a_granted_operation_whose_parameters_break_a_rule_goes_on_with_its_credential(world):
    with world.broker.direct("trainee") as client:
        assert client.get("/plain/items/A-1").status_code == 200
    assert world.plain.seen[0].header("authorization") == f"Bearer {world.secret}"
    assert world.broker.decisions(tool="plain")[-1]["verdict"] == "would_deny"


def test_what_the_catalog_does_not_know_goes_on_with_its_whole_body(world):
    with world.broker.direct("trainee") as client:
        assert client.post("/plain/unheard/of", content=b"raw" * 1000).status_code == 200
        too_large = client.post("/plain/unheard/of", content=b"x" * 1_048_577)
    assert (too_large.status_code, too_large.json()["code"]) == (413, "body_too_large")
    [seen] = world.plain.seen
    assert (seen.path, len(seen.body), seen.header("authorization")) == ("/unheard/of", 3000, None)


def test_a_host_that_the_catalog_does_not_have_stays_out_of_reach(world):
    with world.broker.client("trainee") as client:
        with pytest.raises(httpx.ProxyError, match="403"):
            client.get("https://evil.example/")
        assert client.get("http://evil.example/").json()["code"] == "host_not_declared"


def test_a_revocation_is_enforced_in_shadow_mode(world):
    with world.broker.direct("dropout") as client:
        assert client.get("/other/items").status_code == 200
        revoke = ["agents", "revoke", "dropout", "--reason", "a test", "--state", str(world.broker.state)]
        subprocess.run([*stack.BROKER, *revoke], check=True, capture_output=True)
        answer = client.get("/other/items")
    assert (answer.status_code, answer.json()["code"]) == (403, "agent_revoked")
    assert len(world.other.seen) == 1
