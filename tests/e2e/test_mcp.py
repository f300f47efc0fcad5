"""The official MCP client, unchanged, through the broker: it can't tell, except for what its manifest does not grant.

A door is how the client reaches the wiki: by the broker's base URL, through HTTP_PROXY in the clear, through HTTPS_PROXY in a
tunnel; or `direct`, around the broker, to compare with.
"""

import json
import ssl
import uuid
from contextlib import asynccontextmanager
from functools import partial

import anyio
import anyio.to_thread
import httpx2
import pytest
import stack
from e2e.wiki import PATIENCE_S
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client
from mcp.client.subscriptions import ToolsListChanged
from mcp_types import ElicitResult, ServerNotification, ToolListChangedNotification

HANDSHAKES = ["2025-06-18", "2025-11-25"]
MODERN = "2026-07-28"
DOORS = ["base-url", "http-proxy", "https-proxy"]

pytestmark = [pytest.mark.anyio, pytest.mark.envoy]


@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"


@pytest.fixture(autouse=True)
def _fresh(wikis):
    for wiki in (wikis.plain, wikis.secure):
        wiki.arrived.clear()
        for event in (wiki.released, wiki.cancelled, wiki.listened_to):
            event.clear()


@pytest.fixture(params=[*HANDSHAKES, MODERN])
def revision(request, monkeypatch):
    return _offered(request.param, monkeypatch)


@pytest.fixture(params=HANDSHAKES)
def handshake(request, monkeypatch):
    return _offered(request.param, monkeypatch)


def _offered(revision, monkeypatch):
    """The client offers only the newest revision with a handshake, so that is set back for an older one."""
    if revision in HANDSHAKES:
        monkeypatch.setattr("mcp.client.session.LATEST_HANDSHAKE_VERSION", revision)
    return revision


@pytest.fixture(params=DOORS)
def door(request):
    return request.param


def way(wikis, door):
    """The URL to call, the options of an HTTP client that calls it, and the wiki that is there."""
    broker, plain = wikis.broker, f"http://127.0.0.1:{wikis.plain.port}/mcp"
    if door == "direct":
        return plain, {}, wikis.plain
    if door == "base-url":
        return f"{broker.base_url}/plain", {"headers": {"x-broker-token": broker.token("reader")}}, wikis.plain
    proxied = {"proxy": broker.proxy_url("reader"), "verify": ssl.create_default_context(cafile=broker.ca)}
    return (plain, proxied, wikis.plain) if door == "http-proxy" else (secure_url(wikis), proxied, wikis.secure)


def secure_url(wikis):
    return f"https://localhost:{wikis.secure.port}/mcp"


async def _agree(context, params):
    return ElicitResult(action="accept", content={"sure": True})


@asynccontextmanager
async def connected(wikis, door, revision, *, run="", **options):
    """A session of the official client, and the wiki that it is with."""
    url, http_options, wiki = way(wikis, door)
    options = {"read_timeout_seconds": 2 * PATIENCE_S, "elicitation_callback": _agree, **options}
    async with httpx2.AsyncClient(**http_options, timeout=2 * PATIENCE_S) as http:
        if run:
            http.headers["x-run-id"] = run
        transport = streamable_http_client(url, http_client=http)
        async with Client(transport, mode="legacy" if revision in HANDSHAKES else "auto", **options) as client:
            assert client.protocol_version == revision
            yield client, wiki


def text(result):
    return "\n".join(part.text for part in result.content)


async def happened(event):
    return await anyio.to_thread.run_sync(partial(event.wait, PATIENCE_S), abandon_on_cancel=True)


# The same session.


async def conversation(wikis, door, revision):
    """Everything that a client can tell of a session: what it was told, and what it heard meanwhile."""
    told, heard = [], []

    async def note(message):
        if isinstance(message, ServerNotification):
            heard.append(message.model_dump(mode="json"))

    async with connected(wikis, door, revision, message_handler=note) as (client, wiki):

        async def progress(done, total, message):
            heard.append([done, total, message])
            wiki.released.set()

        told.append([client.protocol_version, client.instructions, client.server_info])
        told.append(client.server_capabilities)
        told.append({tool.name: tool for tool in (await client.list_tools()).tools if tool.name in wikis.granted})
        for name, arguments in (
            ("search_pages", {"query": "refunds"}),
            ("read_page", {"page": "home", "region": "eu-west"}),
            ("show_logo", {}),
            ("read_broken_page", {}),
            ("rename_page", {"page": "home"}),
        ):
            told.append(await client.call_tool(name, arguments))
        told.append(await client.call_tool("rebuild_index", {}, progress_callback=progress))
    return told, heard


async def test_a_session_through_the_broker_is_the_session_without_it(wikis, revision, door):
    told, heard = await conversation(wikis, door, revision)
    assert (told, heard) == await conversation(wikis, "direct", revision)
    assert [each for each in heard if isinstance(each, list)] == [[1, 3, "reading"], [2, 3, "writing"], [3, 3, "done"]]


async def test_the_tool_hears_from_who_heard_its_progress_before_it_finishes(wikis, revision, door):
    async with connected(wikis, door, revision) as (client, wiki):

        async def progress(done, total, message):
            wiki.released.set()

        result = await client.call_tool("rebuild_index", {}, progress_callback=progress)
    assert text(result) == "rebuilt"


async def test_a_tool_may_ask_the_user_while_it_is_called(wikis, revision, door):
    async with connected(wikis, door, revision) as (client, _):
        assert text(await client.call_tool("rename_page", {"page": "home"})) == "home is renamed: True"


async def test_a_cancelled_call_is_cancelled_at_the_tool(wikis, revision, door):
    async with connected(wikis, door, revision) as (client, wiki):
        with anyio.CancelScope() as scope:

            async def progress(done, total, message):
                scope.cancel()

            await client.call_tool("rebuild_index", {}, progress_callback=progress)
        assert await happened(wiki.cancelled)
        assert text(await client.call_tool("search_pages", {"query": "fees"})).startswith("{")


async def test_what_the_server_says_by_itself_arrives(wikis, door):
    """Since 2026-07-28 on a stream that the client asked for, before on the GET stream."""
    async with connected(wikis, door, MODERN) as (client, _), client.listen(tools_list_changed=True) as events:
        await client.call_tool("add_page")
        with anyio.fail_after(PATIENCE_S):
            assert isinstance(await anext(aiter(events)), ToolsListChanged)


async def test_before_it_arrives_on_the_get_stream(wikis, door, handshake):
    heard = anyio.Event()

    async def note(message):
        if isinstance(message, ToolListChangedNotification):
            heard.set()

    async with connected(wikis, door, handshake, message_handler=note) as (client, wiki):
        assert await happened(wiki.listened_to)
        await client.call_tool("add_page")
        with anyio.fail_after(PATIENCE_S):
            await heard.wait()


async def test_an_agent_is_governed_by_its_environment_alone(wikis, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", wikis.broker.proxy_url("reader"))
    monkeypatch.setenv("SSL_CERT_FILE", wikis.broker.ca)
    async with Client(secure_url(wikis)) as client:
        assert text(await client.call_tool("read_page", {"page": "home", "region": "eu"})) == "home as in eu"
        assert (await client.call_tool("delete_page", {"page": "home"})).is_error


# What is denied, and that the session goes on.


@pytest.mark.parametrize(
    "attempt",
    [
        pytest.param(("delete_page", {"page": "home"}, "operation_not_declared", []), id="a tool that the agent does not hold"),
        pytest.param(("purge_history", {}, "operation_not_declared", []), id="a tool that the catalog does not know"),
        pytest.param(("search_pages", {"query": "x" * 41}, "params_invalid", ["/arguments/query"]), id="an argument too long"),
    ],
)
async def test_a_denied_call_tells_the_model_why_and_leaves_the_session_usable(wikis, revision, door, attempt):
    name, arguments, code, pointers = attempt
    async with connected(wikis, door, revision) as (client, wiki):
        denied = await client.call_tool(name, arguments)
        allowed = await client.call_tool("read_page", {"page": "home", "region": "eu"})
    problem = json.loads(text(denied))
    assert denied.is_error
    assert (problem["code"], [each["pointer"] for each in problem["violations"]]) == (code, pointers)
    assert (problem["agent"], problem["status"]) == ("reader", 403)
    assert wikis.broker.decision(problem["decision_id"])["code"] == code
    assert text(allowed) == "home as in eu"
    assert [call["name"] for call in wiki.called()] == ["read_page"]
    sessions = {each.headers.get("mcp-session-id") for each in wiki.arrived[1:]}
    assert len(sessions) == 1


async def test_a_denied_method_is_an_error_of_json_rpc_and_leaves_the_session_usable(wikis, revision, door):
    async with connected(wikis, door, revision) as (client, wiki):
        with pytest.raises(MCPError) as caught:
            await client.list_resources()
        allowed = await client.call_tool("read_page", {"page": "home", "region": "eu"})
    assert (caught.value.error.code, caught.value.error.data["code"]) == (-32010, "operation_not_declared")
    assert text(allowed) == "home as in eu"
    assert "resources/list" not in [each.json()["method"] for each in wiki.arrived if each.method == "POST"]


async def test_a_call_that_waits_for_a_person_says_how_to_go_on_and_passes_once_when_it_is_made_again(wikis, revision):
    asking = {"headers": {"x-broker-token": wikis.broker.token("asking")}}
    arguments = {"query": f"refunds {revision}"}
    async with httpx2.AsyncClient(**asking, timeout=2 * PATIENCE_S) as http:
        transport = streamable_http_client(f"{wikis.broker.base_url}/plain", http_client=http)
        async with Client(transport, mode="legacy" if revision in HANDSHAKES else "auto") as client:
            waits = await client.call_tool("search_pages", arguments)
            problem = json.loads(text(waits))
            assert (waits.is_error, problem["code"]) == (True, "approval_required")
            assert any("make exactly this call again" in step for step in problem["next_steps"])
            approval = problem["approval"]["id"]
            verb = [*stack.BROKER, "approvals", "approve", approval, "--state", str(wikis.broker.state)]
            await anyio.run_process(verb)
            changed = json.loads(text(await client.call_tool("search_pages", {"query": "charges"})))
            assert changed["approval"]["id"] != approval
            passed = await client.call_tool("search_pages", arguments)
            assert not passed.is_error
            assert (await client.call_tool("search_pages", arguments)).is_error
    assert [call["arguments"] for call in wikis.plain.called()] == [arguments]


async def test_the_list_shows_what_is_granted_and_nothing_else(wikis, revision, door):
    async with connected(wikis, door, revision) as (client, _):
        assert [tool.name for tool in (await client.list_tools()).tools] == wikis.granted
    async with connected(wikis, "direct", revision) as (client, _):
        assert {tool.name for tool in (await client.list_tools()).tools} == {*wikis.granted, "delete_page", "purge_history"}


# On the wire, for what the official client does not send.


ACCEPT = {"accept": "application/json, text/event-stream"}


@asynccontextmanager
async def wire(wikis, door="base-url"):
    url, options, wiki = way(wikis, door)
    async with httpx2.AsyncClient(**options, timeout=PATIENCE_S) as http:
        http.headers.update(ACCEPT)
        yield http, url, wiki


def request(method, params=None, number=7):
    return {"jsonrpc": "2.0", "id": number, "method": method, "params": params or {}}


def modern(method, params=None, **headers):
    """A request of the newest revision and its headers; `headers` replaces some, or drops them where None."""
    meta = {
        "io.modelcontextprotocol/protocolVersion": MODERN,
        "io.modelcontextprotocol/clientInfo": {"name": "wire", "version": "1"},
        "io.modelcontextprotocol/clientCapabilities": {},
    }
    params = {**(params or {}), "_meta": meta}
    mirrors = {"mcp-protocol-version": MODERN, "mcp-method": method, "mcp-name": params.get("name")}
    mirrors.update({name.replace("_", "-"): value for name, value in headers.items()})
    return {"json": request(method, params), "headers": {name: value for name, value in mirrors.items() if value is not None}}


async def opened(http, url, revision):
    """A session made by hand: the headers that carry it."""
    hello = {"protocolVersion": revision, "capabilities": {}, "clientInfo": {"name": "wire", "version": "1"}}
    answer = await http.post(url, json=request("initialize", hello, 1))
    session = {"mcp-session-id": answer.headers["mcp-session-id"], "mcp-protocol-version": revision}
    await http.post(url, json={"jsonrpc": "2.0", "method": "notifications/initialized"}, headers=session)
    return session


async def listed(stream):
    """The tools in the first answer on an event stream, and the ID of the first event."""
    first = ""
    with anyio.fail_after(PATIENCE_S):
        async for line in stream.aiter_lines():
            field, _, value = line.partition(": ")
            first = first or (value if field == "id" else "")
            message = json.loads(value) if field == "data" and value else {}
            if "result" in message:
                return [tool["name"] for tool in message["result"]["tools"]], first
    raise AssertionError("the stream ended without an answer")


@pytest.mark.parametrize("via", DOORS)
async def test_a_list_on_an_event_stream_shows_what_is_granted_and_so_does_the_stream_that_resumes_it(wikis, via):
    async with wire(wikis, via) as (http, url, _):
        session = await opened(http, url, "2025-11-25")
        async with http.stream("POST", url, json=request("tools/list"), headers=session) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            names, first = await listed(stream)
        assert (names, first != "") == (wikis.granted, True)
        async with http.stream("GET", url, headers={**session, "last-event-id": first}) as stream:
            names, _ = await listed(stream)
        assert names == wikis.granted


READ = {"name": "read_page", "arguments": {"page": "home", "region": "eu"}}


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"mcp_name": "search_pages"}, id="a name of another tool"),
        pytest.param({"mcp_name": None}, id="no name"),
        pytest.param({"mcp_method": "tools/list"}, id="another method"),
        pytest.param({"mcp_method": None}, id="no method"),
        pytest.param({"mcp_param_region": "us"}, id="another argument"),
        pytest.param({"mcp_param_region": None}, id="no argument"),
        pytest.param({"mcp_protocol_version": "2025-11-25"}, id="another revision"),
    ],
)
async def test_headers_that_do_not_say_what_the_body_says_are_a_mismatch(wikis, changed):
    async with wire(wikis) as (http, url, wiki):
        told = await http.post(url, **modern("tools/call", READ, mcp_param_region="eu"))
        assert (told.status_code, told.json()["result"]["content"][0]["text"]) == (200, "home as in eu")
        wiki.arrived.clear()
        answer = await http.post(url, **modern("tools/call", READ, **{"mcp_param_region": "eu", **changed}))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], answer.json()["id"]) == (400, -32020, 7)
    assert error["data"]["code"] == "protocol_violation"
    assert wiki.arrived == []


async def test_a_lying_name_does_not_carry_a_call_past_its_denial_in_any_revision(wikis, handshake):
    params = {"name": "delete_page", "arguments": {"page": "home"}}
    async with wire(wikis) as (http, url, wiki):
        session = await opened(http, url, handshake)
        answer = await http.post(url, json=request("tools/call", params), headers={**session, "mcp-name": "read_page"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, -32020)
    assert wiki.called() == []


async def test_a_batch_is_refused(wikis, handshake):
    async with wire(wikis) as (http, url, wiki):
        session = await opened(http, url, handshake)
        answer = await http.post(url, json=[request("tools/call", READ, n) for n in (1, 2)], headers=session)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, -32600)
    assert "batches" in answer.json()["error"]["message"]
    assert wiki.called() == []


@pytest.mark.parametrize("via", DOORS)
async def test_a_delete_ends_the_session(wikis, via):
    async with wire(wikis, via) as (http, url, _):
        session = await opened(http, url, "2025-11-25")
        assert (await http.post(url, json=request("tools/list"), headers=session)).status_code == 200
        assert (await http.delete(url, headers=session)).status_code == 200
        assert (await http.post(url, json=request("tools/list"), headers=session)).status_code == 404


# The record.


async def test_the_record_names_each_call_with_its_arguments_and_each_other_message_by_its_method(wikis, revision, door):
    run = uuid.uuid4().hex
    async with connected(wikis, door, revision, run=run) as (client, wiki):
        assert revision == MODERN or await happened(wiki.listened_to)
        await client.list_tools()
        await client.call_tool("search_pages", {"query": "refunds"})
        await client.call_tool("delete_page", {"page": "home"})
        with pytest.raises(MCPError):
            await client.list_resources()
    told = [(each["verdict"], each["operation"], each["args"]) for each in wikis.broker.decisions(run_id=run)]
    opening = [("allow", "server/discover", {})]
    closing = []
    if revision in HANDSHAKES:
        # The client sends the last two of the opening at once.
        opening = [("allow", method, {}) for method in ("initialize", "GET (listen)", "notifications/initialized")]
        closing = [("allow", "DELETE (end the session)", {})]
        told[1:3] = sorted(told[1:3])
    assert told == [
        *opening,
        ("allow", "tools/list", {}),
        ("allow", "search_pages", {"arguments": {"query": "refunds"}}),
        ("deny", "delete_page", {"arguments": {"page": "home"}}),
        ("deny", "resources/list", {}),
        *closing,
    ]
