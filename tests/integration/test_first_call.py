"""The path through everything, by each door: allowed, refused with the reason, unknown host."""

import os
import signal
import ssl

import httpx
import pytest
import stack


def test_an_allowed_call_through_http_proxy_arrives_with_a_credential_that_the_agent_never_held(world):
    with world.broker.client("reader") as client:
        answer = client.get(f"http://127.0.0.1:{world.plain.port}/items/a1", headers={"authorization": "Bearer mine"})
    assert answer.status_code == 200
    assert answer.json() == {"path": "/items/a1"}
    [seen] = world.plain.seen
    assert seen.header("authorization") == f"Bearer {world.secret}"
    assert seen.header("proxy-authorization") is None
    assert world.secret not in answer.text + str(answer.headers)


def test_an_allowed_call_through_connect_and_tls_arrives_with_the_credential(world):
    with world.broker.client("writer") as client:
        answer = client.post(f"https://localhost:{world.secure.port}/items", json={"title": "x"})
    assert answer.status_code == 200
    [seen] = world.secure.seen
    assert (seen.method, seen.path, seen.body) == ("POST", "/items", b'{"title":"x"}')
    assert seen.header("authorization") == f"Bearer {world.secret}"
    assert seen.header("host") == f"localhost:{world.secure.port}"


def test_a_tool_at_an_ip_address_is_reached_through_connect_without_sni(world):
    with world.broker.client("writer") as client:
        answer = client.get(f"https://127.0.0.1:{world.other.port}/v1/items/a1")
    assert answer.status_code == 200
    assert world.other.seen[0].path == "/v1/items/a1"


def test_an_allowed_call_at_the_base_url_door_reaches_the_rewritten_path(world):
    with world.broker.direct("writer") as client:
        assert client.get("/plain/items/a1?page=2").status_code == 200
        assert client.get("/other/items").status_code == 200
    assert world.plain.seen[0].path == "/items/a1?page=2"
    assert world.plain.seen[0].header("host") == f"127.0.0.1:{world.plain.port}"
    assert world.plain.seen[0].header("x-broker-token") is None
    assert world.other.seen[0].path == "/v1/items"


def test_a_bad_parameter_is_refused_with_pointer_rule_and_decision_id(world):
    with world.broker.client("writer") as client:
        answer = client.post(f"https://localhost:{world.secure.port}/items", json={"title": "x" * 21})
    assert answer.status_code == 403
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["code"] == "params_invalid"
    assert problem["violations"][0]["pointer"] == "/body/title"
    assert problem["decision_id"] == answer.headers["x-broker-decision-id"]
    record = world.broker.decision(problem["decision_id"])
    assert (record["verdict"], record["code"], record["agent"]["name"]) == ("deny", "params_invalid", "writer")
    assert world.secure.seen == []


def test_an_unknown_host_is_refused_at_connect(world):
    before = len(world.broker.decisions(code="host_not_declared"))
    with world.broker.client("writer") as client, pytest.raises(httpx.ProxyError, match="403"):
        client.get("https://evil.example/")
    assert len(world.broker.decisions(code="host_not_declared")) == before + 1


def test_an_unknown_host_is_refused_in_absolute_form(world):
    with world.broker.client("writer") as client:
        answer = client.get("http://evil.example/")
    assert (answer.status_code, answer.json()["code"]) == (403, "host_not_declared")


def test_a_manifest_narrows_the_catalog(world):
    with world.broker.client("reader") as client:
        answer = client.get(f"http://127.0.0.1:{world.plain.port}/items/A-1")
        assert (answer.status_code, answer.json()["code"]) == (403, "params_invalid")
        answer = client.post(f"http://127.0.0.1:{world.plain.port}/items", json={"title": "x"})
        assert (answer.status_code, answer.json()["code"]) == (403, "operation_not_declared")
    assert world.plain.seen == []


def test_an_outcome_is_recorded_after_the_answer(world):
    with world.broker.client("reader") as client:
        client.get(f"http://127.0.0.1:{world.plain.port}/items")
    decision = world.broker.decisions(verdict="allow")[-1]
    outcome = world.broker.outcome(decision["decision_id"])
    assert outcome["upstream"]["status"] == 200
    assert outcome["upstream"]["duration_ms"] > 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        pytest.param({}, 401, id="no token"),
        pytest.param({"x-broker-token": "garbage"}, 401, id="garbage"),
        pytest.param({"authorization": "Bearer x", "x-agent-id": "writer"}, 401, id="claims of its own"),
    ],
)
def test_without_a_valid_token_nothing_passes_the_base_url_door(world, headers, status):
    answer = httpx.get(f"{world.broker.base_url}/plain/items", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (status, "agent_unknown")
    assert world.plain.seen == []


def test_the_proxy_asks_for_identity_with_407(world):
    answer = httpx.get(f"http://127.0.0.1:{world.plain.port}/items", proxy=f"http://{world.broker.ready['proxy']}")
    assert (answer.status_code, answer.json()["code"]) == (407, "agent_unknown")
    assert answer.headers["proxy-authenticate"].startswith("Basic")


def test_an_agent_does_not_pass_under_another_agents_name(world):
    token = world.broker.token("writer")
    answer = httpx.get(f"http://127.0.0.1:{world.plain.port}/items", proxy=f"http://reader:{token}@{world.broker.ready['proxy']}")
    assert (answer.status_code, answer.json()["code"]) == (407, "agent_unknown")


def _mutual(world, certificate):
    server = ssl.create_default_context(cafile=world.broker.ca)
    server.load_cert_chain(*certificate)
    proxy = httpx.Proxy(f"https://{world.broker.ready['proxy']}", ssl_context=server)
    return httpx.Client(proxy=proxy, verify=ssl.create_default_context(cafile=world.broker.ca), timeout=10)


def test_an_agent_with_a_spiffe_certificate_needs_no_token(world):
    with _mutual(world, world.svid) as client:
        assert client.get(f"https://localhost:{world.secure.port}/items").status_code == 200
    assert world.broker.decisions(verdict="allow")[-1]["agent"]["name"] == "mutual"


def test_a_certificate_of_the_right_trust_domain_but_no_manifest_is_nobody(world):
    with _mutual(world, world.stranger) as client, pytest.raises(httpx.ProxyError, match="407"):
        client.get(f"https://localhost:{world.secure.port}/items")


def test_a_certificate_of_another_authority_does_not_get_in(world):
    with _mutual(world, world.forged) as client, pytest.raises(httpx.TransportError):
        client.get(f"https://localhost:{world.secure.port}/items")
    assert world.secure.seen == []


def test_the_ready_line_names_an_absolute_ca_path_and_the_revision(world):
    assert world.broker.ca.startswith("/")
    assert world.broker.ready["revision"] == httpx.get(f"{world.broker.admin}/readyz").json()["revision"]


def test_sigterm_drains_and_exits_0_and_stdout_stays_silent(tmp_path):
    folder = stack.short_folder()
    stack.write_manifests(folder / "manifests", stack.agent("nobody", {}))
    broker = stack.Broker(folder / "manifests", folder / "state")
    broker.process.terminate()
    rest = broker.process.stdout.read()
    assert (broker.stop(), rest) == (0, b"")


def test_a_tool_that_the_manifest_does_not_list_is_named_before_an_operation_that_nobody_knows(world):
    with world.broker.client("nobody") as client:
        answer = client.post(f"http://127.0.0.1:{world.plain.port}/nothing", json={"title": "x"})
    assert (answer.status_code, answer.json()["code"]) == (403, "tool_not_declared")
    with world.broker.client("reader") as client:
        answer = client.post(f"http://127.0.0.1:{world.plain.port}/nothing", json={"title": "x"})
    assert (answer.status_code, answer.json()["code"]) == (403, "operation_not_declared")
    assert world.plain.seen == []


@pytest.mark.parametrize("order", [("reader", "nobody"), ("nobody", "reader")], ids=["its own first", "the other first"])
def test_of_two_tokens_nobody_can_say_which_counts(world, order):
    headers = [("x-broker-token", world.broker.token(name)) for name in order]
    answer = httpx.get(f"{world.broker.base_url}/plain/items", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (401, "agent_unknown")


@pytest.mark.parametrize(
    ("headers", "run"),
    [
        pytest.param([("x-run-id", "r1")], "r1", id="our header"),
        pytest.param([("x-run-id", "r1"), ("x-run-id", "r2")], None, id="two of them name none"),
        pytest.param([("baggage", "a=b, run.id=r3")], "r3", id="baggage"),
        pytest.param([("baggage", "run.id = r4 ;p=1")], "r4", id="with properties and spaces"),
        pytest.param([("baggage", "run.id=r%2D5")], "r-5", id="percent-encoded"),
    ],
)
def test_the_run_that_a_call_names_is_recorded(world, headers, run):
    with world.broker.direct("reader") as client:
        client.get("/plain/items", headers=[*client.headers.items(), *headers])
    assert world.broker.decisions(verdict="allow")[-1]["run_id"] == run


def test_the_record_names_the_path_as_the_tool_sees_it(world):
    with world.broker.direct("writer") as client:
        client.get("/other/items/a1")
    assert world.broker.decisions(verdict="allow")[-1]["path"] == "/v1/items/a1"


def test_the_sockets_are_for_their_owner_alone(world):
    for name in ("processor.sock", "control.sock", "envoy-admin.sock"):
        assert (world.broker.state / "run" / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("child", ["processor", "envoy"])
def test_sigterm_ends_the_broker_also_when_a_child_hangs(child):
    folder = stack.short_folder()
    stack.write_manifests(folder / "manifests", stack.agent("nobody", {}))
    broker = stack.Broker(folder / "manifests", folder / "state")
    os.kill(broker.child(child), signal.SIGSTOP)
    assert broker.stop() == 0


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        pytest.param({"content-type": "application/json"}, b"{", 400, id="malformed"),
        pytest.param({"content-type": "text/csv"}, b"a,b", 415, id="of another type"),
        pytest.param({"content-type": "application/octet-stream"}, b"x" * 1001, 413, id="too large"),
    ],
)
def test_a_body_that_is_refused_still_names_its_operation(world, headers, body, status):
    with world.broker.direct("writer") as client:
        answer = client.request(
            "PUT" if status == 413 else "POST", f"/plain/items{'/a1' if status == 413 else ''}", content=body, headers=headers
        )
    assert answer.status_code == status
    assert answer.json()["operation"] == ("items.upload" if status == 413 else "items.create")
    record = world.broker.decision(answer.json()["decision_id"])
    assert (record["operation"], record["effect"]) == (answer.json()["operation"], "write")
