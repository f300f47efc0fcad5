"""The official clients of OpenAI and Anthropic inside `broker run`: no address, no header and no key is theirs to set."""

import json
import shutil
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import stack
from e2e import providers
from e2e.conftest import KEYS, of_model, sample
from e2e.providers import ANSWER, WHOLE
from host import WHY_NOT, Host, Run

pytestmark = [pytest.mark.envoy, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

OPENAI, ANTHROPIC = "api.openai.com", "api.anthropic.com"
HEADERS = {"openai": ("authorization", f"Bearer {KEYS['OPENAI_API_KEY']}"), "anthropic": ("x-api-key", KEYS["ANTHROPIC_API_KEY"])}

# What anybody would write. It runs each line that it reads and prints, as JSON, each text, exception and, at its end, null.
PROGRAM = r"""
import json, sys
import anthropic, openai
gpt, claude = openai.OpenAI(), anthropic.Anthropic()
asked = [{"role": "user", "content": "Why was I charged twice?"}]
chat = lambda model="gpt-5-mini", **more: gpt.chat.completions.create(model=model, messages=asked, **more)
respond = lambda model="gpt-5-mini", **more: gpt.responses.create(model=model, input="Why?", **more)
message = lambda model="claude-haiku-4-5", **more: claude.messages.create(model=model, max_tokens=100, messages=asked, **more)
def say(text): print(json.dumps(text), flush=True)
say("ready")
for line in sys.stdin:
    try: exec(line)
    except Exception as error: say(f"{type(error).__module__}.{type(error).__name__}: {error}")
    say(None)
"""


@pytest.fixture(scope="module")
def models() -> Iterator[SimpleNamespace]:
    folder = stack.short_folder()
    host, ca = Host(folder, OPENAI, apart=ANTHROPIC), stack.TestCA()
    gpt, claude = ca.issue(folder / "certs", OPENAI), ca.issue(folder / "certs", ANTHROPIC)
    openai = host.inside(lambda: providers.openai(gpt, address=("127.0.0.1", 443)))
    anthropic = host.inside(lambda: providers.anthropic(claude, address=("127.0.0.2", 443)))
    granted = {"openai": ("chat.completions", "responses"), "anthropic": ("messages",)}
    names = {"openai": "gpt-5-mini", "anthropic": "claude-haiku-4-5"}
    tools = {tool: {"operations": {each: of_model(names[tool]) for each in operations}} for tool, operations in granted.items()}
    manifests = stack.write_manifests(folder / "manifests", *map(sample, granted), stack.agent("writer", tools))
    (manifests / "ca.pem").write_text(ca.pem)
    broker = stack.Broker(manifests, folder / "state", KEYS, within=host.within)
    yield SimpleNamespace(host=host, broker=broker, openai=openai, anthropic=anthropic)
    broker.stop()
    for each in (openai, anthropic, host):
        each.close()
    shutil.rmtree(folder)


@pytest.fixture(scope="module", params=["by the proxy variables", "captured"])
def agent(request, models) -> Iterator[Run]:
    without = [option for name in ("https_proxy", "all_proxy") for each in (name, name.upper()) for option in ("-u", each)]
    bare = ["env", *without] if request.param == "captured" else []
    with pytest.MonkeyPatch.context() as caller:
        for name in KEYS:
            caller.setenv(name, "sk-the-callers-own-key")
        made = Run(models.host, models.broker, "writer", *bare, sys.executable, "-c", PROGRAM)
    assert json.loads(made.line()) == "ready"
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _fresh(models):
    for provider in (models.openai, models.anthropic):
        provider.arrived.clear()
        provider.released.clear()


def said(agent, line, meanwhile=lambda: None):
    """What the program says to this line; `meanwhile` is done once it has said something."""
    found = [json.loads(agent.ask(line))]
    meanwhile()
    while found[-1] is not None:
        found.append(json.loads(agent.line()))
    return [each for each in found if each]


def arrived(models, provider):
    """The one request carries the broker's key, and nothing of the caller's or of what stood in for it."""
    [request] = getattr(models, provider).arrived
    header, value = HEADERS[provider]
    assert request.headers[header] == value
    assert not any(word in str(request) for word in ("sk-the-callers", "the-broker-has-it"))
    assert models.broker.decisions(verdict="allow")[-1]["door"] == "namespace"


@pytest.mark.parametrize(
    ("provider", "text"),
    [
        ("openai", "chat().choices[0].message.content"),
        ("openai", "respond().output_text"),
        ("anthropic", "message().content[0].text"),
    ],
)
def test_a_call_is_made_with_a_key_that_nobody_inside_has(models, agent, provider, text):
    assert said(agent, f"say({text})") == [WHOLE]
    arrived(models, provider)


@pytest.mark.parametrize(
    ("provider", "call", "text"),
    [
        ("openai", "chat", "each.choices and each.choices[0].delta.content"),
        ("openai", "respond", "getattr(each, 'delta', '')"),
        ("anthropic", "message", "getattr(getattr(each, 'delta', None), 'text', '')"),
    ],
)
def test_a_stream_arrives_as_it_is_made(models, agent, provider, call, text):
    # Only when something of it is here does the provider send the rest.
    released = getattr(models, provider).released
    assert said(agent, f"for each in {call}(stream=True): say({text} or '')", released.set) == ANSWER
    arrived(models, provider)


@pytest.mark.parametrize("stream", ["", ", stream=True"], ids=["whole", "as a stream"])
@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("chat('gpt-5'{})", "openai.PermissionDeniedError"),
        ("respond('gpt-5'{})", "openai.PermissionDeniedError"),
        ("message('claude-opus-4-6'{})", "anthropic.PermissionDeniedError"),
    ],
)
def test_a_model_that_is_not_granted_is_the_clients_own_error_with_our_reason_in_its_text(models, agent, call, error, stream):
    [told] = said(agent, call.format(stream))
    decision = models.broker.decisions(code="params_invalid")[-1]
    assert told.startswith(f"{error}: Error code: 403")
    assert "params_invalid" in told
    assert decision["decision_id"] in told
    assert (decision["agent"]["name"], decision["door"]) == ("writer", "namespace")
    assert models.openai.arrived == models.anthropic.arrived == []


def test_another_host_of_a_provider_is_refused_in_the_clients_own_words(models, agent):
    [told] = said(agent, "openai.OpenAI(base_url='https://eu.api.openai.com/v1', max_retries=0).models.list()")
    assert told.startswith("openai.APIConnectionError")
    found = stack.until(lambda: models.broker.decisions(code="host_not_declared"))
    assert found[-1]["host"].partition(":")[0] == "eu.api.openai.com"
