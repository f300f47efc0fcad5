"""The echoing upstream does echo: without a scrubber, a client sees its credential everywhere."""

from functools import partial

import httpx
import pytest
from e2e.serving import Served
from fakes import echo
from stack import Upstream

VALUE = 'Bearer t0ken/with+"awkward" <characters>'
FORMS = ["body", "error", "headers", "redirect"]


@pytest.fixture(scope="module")
def ask():
    upstream, served = Upstream(), Served(echo.app)
    upstream.answer = echo.answer
    with httpx.Client(headers={"authorization": VALUE}) as client:
        yield {"stack.Upstream": partial(asked, client, upstream.port), "Served": partial(asked, client, served.port)}
    upstream.close()
    served.close()


def asked(client, port, form, encoding):
    answer = client.get(f"http://127.0.0.1:{port}/{form}/{encoding}")
    return answer, "\n".join([*answer.headers.values(), ""]).encode("latin-1") + answer.content


@pytest.mark.parametrize("server", ["stack.Upstream", "Served"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("encoding", echo.ENCODINGS)
def test_every_form_shows_the_credential_in_the_encoding(ask, server, form, encoding):
    answer, text = ask[server](form, encoding)
    assert encoding in echo.shown(text, VALUE)
    assert answer.status_code == {"error": 502, "redirect": 302}.get(form, 200)


def test_events_show_it_once_for_each_place_to_cut_it_at(ask):
    _, text = ask["Served"]("events", "plain")
    assert text.count(VALUE.encode()) == len(VALUE) - 1
