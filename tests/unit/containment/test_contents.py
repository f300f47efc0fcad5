"""What is seen in a request: decoys in every spelling, secrets by their shape, and how long it takes."""

import base64
import time
from urllib.parse import quote

import pytest

from broker.containment.contents import Contents
from broker.policy.containment import Detector

DECOY = "decoy/4f9c+2e71 b0aa"
WITH = Contents((DECOY, "AKIADECOYDECOYDECOY0", "short"))


@pytest.mark.parametrize(
    ("texts", "seen"),
    [
        pytest.param([], None, id="nothing"),
        pytest.param([b"", b"an honest text about tokens, risk-based, sk-learn"], None, id="words"),
        pytest.param(["Клиент".encode(), b"\xff\xfe\x00"], None, id="any bytes"),
        pytest.param([b"a", b'{"key": "' + DECOY.encode() + b'"}'], Detector.HONEYTOKEN, id="a decoy"),
        pytest.param([quote(DECOY, "").encode()], Detector.HONEYTOKEN, id="a decoy in a query"),
        pytest.param([b"Basic " + base64.b64encode(b"bot:" + DECOY.encode())], Detector.HONEYTOKEN, id="a decoy in a login"),
        pytest.param([b"ghp_0123456789abcdef", DECOY.encode()], Detector.HONEYTOKEN, id="the gravest counts"),
        pytest.param([b"AKIADECOYDECOYDECOY0"], Detector.HONEYTOKEN, id="a decoy that looks like a secret"),
        pytest.param([b"a short text"], None, id="a decoy that is too short"),
        pytest.param([b"x", b"key=AKIA0123456789ABCDEF"], Detector.SECRET_IN_REQUEST, id="a secret"),
        pytest.param([b"-----BEGIN RSA PRIVATE KEY-----"], Detector.SECRET_IN_REQUEST, id="a private key"),
        pytest.param(["é sk-0123456789".encode()], Detector.SECRET_IN_REQUEST, id="a secret beside other letters"),
        pytest.param([b"eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhIn0.c2ln"], Detector.SECRET_IN_REQUEST, id="a JWT"),
    ],
)
def test_what_is_seen(texts, seen):
    assert WITH.seen(texts) is seen


def test_without_decoys_there_are_secrets():
    assert Contents(()).seen([DECOY.encode()]) is None
    assert Contents(()).seen([b"glpat-0"]) is Detector.SECRET_IN_REQUEST


@pytest.mark.parametrize("hostile", [b"-eyJ", b" sk-", b"decoy/4f", b"-----BEGIN ", b"A", b"AKIA"])
def test_a_hostile_megabyte_takes_no_time_to_speak_of(hostile):
    text = (hostile * 1_048_576)[:1_048_576]
    began = time.process_time()
    WITH.seen([text])
    assert time.process_time() - began < 0.5
