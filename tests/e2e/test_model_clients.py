"""The official clients of OpenAI and Anthropic, unchanged: an agent's environment alone puts them behind the broker.

At the base-url door the environment names the broker as the provider's address; through the proxy the address stays the
provider's own. The key in the agent's environment is worth nothing.
"""

import anthropic
import openai
import pytest
from e2e.providers import ANSWER, VECTOR, WHOLE

OWN_KEY = "sk-the-agents-own-key"
QUESTION = [{"role": "user", "content": "Why was I charged twice?"}]
LOOKUP = {"type": "object", "properties": {"charge": {"type": "string"}}, "required": ["charge"]}

pytestmark = pytest.mark.envoy


@pytest.fixture(autouse=True)
def _fresh(models):
    for provider in (models.openai, models.anthropic):
        provider.arrived.clear()
        provider.released.clear()


@pytest.fixture(params=["base-url", "https-proxy"])
def surroundings(request, models, monkeypatch):
    """The agent's environment, and the headers that its clients are told to send."""
    broker = models.broker
    monkeypatch.setenv("OPENAI_API_KEY", OWN_KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", OWN_KEY)
    if request.param == "base-url":
        monkeypatch.setenv("OPENAI_BASE_URL", f"{broker.base_url}/openai/v1")
        monkeypatch.setenv("ANTHROPIC_BASE_URL", f"{broker.base_url}/anthropic")
        return {"default_headers": {"x-broker-token": broker.token("writer")}}
    monkeypatch.setenv("OPENAI_BASE_URL", f"https://localhost:{models.openai.port}/v1")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", f"https://localhost:{models.anthropic.port}")
    monkeypatch.setenv("HTTPS_PROXY", broker.proxy_url("writer"))
    monkeypatch.setenv("SSL_CERT_FILE", broker.ca)
    return {}


@pytest.fixture
def gpt(surroundings):
    with openai.OpenAI(**surroundings) as client:
        yield client


@pytest.fixture
def claude(surroundings):
    with anthropic.Anthropic(**surroundings) as client:
        yield client


def complete(client, model="gpt-5-mini", **options):
    tool = {"type": "function", "function": {"name": "lookup", "parameters": LOOKUP}}
    return client.chat.completions.create(model=model, messages=QUESTION, tools=[tool], **options)


def respond(client, model="gpt-5-mini", **options):
    tool = {"type": "function", "name": "lookup", "parameters": LOOKUP, "strict": False}
    return client.responses.create(model=model, input=QUESTION, tools=[tool], **options)


def message(client, model="claude-haiku-4-5", **options):
    tool = {"name": "lookup", "input_schema": LOOKUP}
    return client.messages.create(model=model, max_tokens=100, messages=QUESTION, tools=[tool], **options)


def arrived_with(provider, header, value):
    """The one request that arrived carries the broker's credential, and nothing that the agent held."""
    [request] = provider.arrived
    assert request.headers[header] == value
    assert OWN_KEY not in str(request)
    assert not {"x-broker-token", "proxy-authorization"} & request.headers.keys()


def parts(events, provider, text_of):
    """The texts of a stream. Its provider sends the second event only after the first has arrived here."""
    texts = []
    for event in events:
        provider.released.set()
        texts.append(text_of(event))
    return [text for text in texts if text]


# Allowed: the provider gets a key that the agent never had.


def test_a_chat_completion_is_made_with_a_key_that_the_client_never_had(models, gpt):
    assert complete(gpt).choices[0].message.content == WHOLE
    arrived_with(models.openai, "authorization", f"Bearer {models.keys['OPENAI_API_KEY']}")


def test_a_response_is_made_with_a_key_that_the_client_never_had(models, gpt):
    assert respond(gpt).output_text == WHOLE
    arrived_with(models.openai, "authorization", f"Bearer {models.keys['OPENAI_API_KEY']}")


def test_a_message_is_made_with_a_key_that_the_client_never_had(models, claude):
    assert message(claude).content[0].text == WHOLE
    arrived_with(models.anthropic, "x-api-key", models.keys["ANTHROPIC_API_KEY"])
    assert "authorization" not in models.anthropic.arrived[0].headers


def test_embeddings_are_made_with_a_key_that_the_client_never_had(models, gpt):
    made = gpt.embeddings.create(model="text-embedding-3-small", input="A duplicate charge.", encoding_format="float")
    assert (made.data[0].embedding, made.usage.prompt_tokens) == (VECTOR, 4)
    arrived_with(models.openai, "authorization", f"Bearer {models.keys['OPENAI_API_KEY']}")


def test_usage_arrives_as_the_provider_told_it(gpt, claude):
    spent = complete(gpt).usage
    assert (spent.prompt_tokens, spent.completion_tokens) == (9, 6)
    spent = respond(gpt).usage
    assert (spent.input_tokens, spent.output_tokens, spent.input_tokens_details.cached_tokens) == (9, 6, 4)
    spent = message(claude).usage
    assert (spent.input_tokens, spent.output_tokens) == (9, 6)


# Streams are not held back.


def test_a_chat_completion_arrives_as_it_is_made(models, gpt):
    with complete(gpt, stream=True) as stream:
        assert parts(stream, models.openai, lambda chunk: chunk.choices[0].delta.content) == ANSWER


def test_a_response_arrives_as_it_is_made(models, gpt):
    with respond(gpt, stream=True) as stream:
        assert parts(stream, models.openai, lambda event: getattr(event, "delta", "")) == ANSWER


def test_a_message_arrives_as_it_is_made(models, claude):
    with message(claude, stream=True) as stream:
        assert parts(stream, models.anthropic, lambda event: getattr(getattr(event, "delta", None), "text", "")) == ANSWER


def test_the_usage_of_a_stream_arrives_at_its_end(models, gpt, claude):
    models.openai.released.set()
    models.anthropic.released.set()
    with complete(gpt, stream=True, stream_options={"include_usage": True}) as stream:
        assert [chunk.usage.completion_tokens for chunk in stream if chunk.usage] == [6]
    with respond(gpt, stream=True) as stream:
        assert [event.response.usage.output_tokens for event in stream if event.type == "response.completed"] == [6]
    with message(claude, stream=True) as stream:
        assert [event.usage.output_tokens for event in stream if event.type == "message_delta"] == [6]


# Denied: the client raises what it raises for any refusal, and the reason is inside.


def refused(models, error, media="application/json"):
    """The problem in an error, which is the one that was recorded. The client did not try again."""
    body = error.body
    problem = body.get("error", body)
    assert error.response.headers["content-type"] == media
    assert error.response.headers["x-broker-decision-id"] == problem["decision_id"]
    record = models.broker.decision(problem["decision_id"])
    assert (record["verdict"], record["code"]) == ("deny", problem["code"])
    assert models.openai.arrived == models.anthropic.arrived == []
    return problem


@pytest.mark.parametrize("stream", [pytest.param(False, id="whole"), pytest.param(True, id="as a stream")])
@pytest.mark.parametrize("ask", [complete, respond])
def test_a_model_that_the_manifest_does_not_allow_is_openais_permission_denied(models, gpt, ask, stream):
    with pytest.raises(openai.PermissionDeniedError) as caught:
        ask(gpt, model="gpt-5", stream=stream)
    problem = refused(models, caught.value)
    assert caught.value.code == problem["code"] == "params_invalid"
    assert (caught.value.type, caught.value.param) == ("invalid_request_error", "/body/model")
    assert [each["pointer"] for each in problem["violations"]] == ["/body/model"]


@pytest.mark.parametrize("stream", [pytest.param(False, id="whole"), pytest.param(True, id="as a stream")])
def test_a_model_that_the_manifest_does_not_allow_is_anthropics_permission_denied(models, claude, stream):
    with pytest.raises(anthropic.PermissionDeniedError) as caught:
        message(claude, model="claude-opus-4-6", stream=stream)
    problem = refused(models, caught.value)
    assert (caught.value.body["type"], problem["type"], problem["code"]) == ("error", "permission_error", "params_invalid")
    assert caught.value.body["request_id"] == problem["decision_id"]
    assert [each["pointer"] for each in problem["violations"]] == ["/body/model"]


URL = "https://elsewhere.example/receipt.png"


def show(**part):
    return [{"role": "user", "content": [part]}]


@pytest.mark.parametrize(
    ("ask", "options", "pointer"),
    [
        pytest.param(respond, {"extra_body": {"tools": [{"type": "web_search"}]}}, "/body/tools/0/type", id="web search"),
        pytest.param(respond, {"extra_body": {"background": True}}, "/body", id="an answer that comes later"),
        pytest.param(
            respond,
            {"extra_body": {"input": show(type="input_image", image_url=URL)}},
            "/body/input/0/content/0/image_url",
            id="an image at an address",
        ),
        pytest.param(
            complete,
            {"extra_body": {"messages": show(type="image_url", image_url={"url": URL})}},
            "/body/messages/0/content/0/image_url/url",
            id="an image at an address, in a chat",
        ),
    ],
)
def test_what_openai_would_run_or_fetch_is_refused(models, gpt, ask, options, pointer):
    with pytest.raises(openai.PermissionDeniedError) as caught:
        ask(gpt, **options)
    assert refused(models, caught.value)["violations"][0]["pointer"] == pointer


@pytest.mark.parametrize(
    ("options", "pointer"),
    [
        pytest.param({"tools": [{"type": "web_fetch_20250910", "name": "web_fetch"}]}, "/body/tools/0/type", id="web fetch"),
        pytest.param({"mcp_servers": [{"type": "url", "url": URL, "name": "x"}]}, "/body", id="an MCP server"),
        pytest.param(
            {"messages": show(type="image", source={"type": "url", "url": URL})},
            "/body/messages/0/content/0/source/type",
            id="an image at an address",
        ),
    ],
)
def test_what_anthropic_would_run_or_fetch_is_refused(models, claude, options, pointer):
    with pytest.raises(anthropic.PermissionDeniedError) as caught:
        message(claude, extra_body=options)
    assert refused(models, caught.value)["violations"][0]["pointer"] == pointer


def test_an_agent_whose_manifest_names_a_server_tool_may_use_it(models):
    broker = models.broker
    with openai.OpenAI(
        api_key=OWN_KEY, base_url=f"{broker.base_url}/openai/v1", default_headers={"x-broker-token": broker.token("finder")}
    ) as client:
        assert client.responses.create(model="gpt-5-mini", input="New?", tools=[{"type": "web_search"}]).output_text == WHOLE


def test_a_call_that_cannot_be_read_is_openais_bad_request(models, gpt):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(gpt, extra_body={"n": "many"})
    assert refused(models, caught.value)["code"] == "protocol_violation"


def test_another_part_of_the_providers_api_is_refused(models, gpt):
    with pytest.raises(openai.PermissionDeniedError) as caught:
        gpt.models.list()
    assert refused(models, caught.value)["code"] == "operation_not_declared"


def test_without_a_token_the_client_is_told_to_authenticate(models):
    with (
        openai.OpenAI(api_key=OWN_KEY, base_url=f"{models.broker.base_url}/openai/v1") as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        complete(client)
    assert refused(models, caught.value, "application/problem+json")["code"] == "agent_unknown"
