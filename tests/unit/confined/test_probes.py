"""What a probe makes of what it sees."""

import socket
import struct

import pytest

from broker.confined.probes import Probe, Seen, resolved

QUERY = struct.pack("!HHHHHH", 0x6272, 0x0100, 1, 0, 0, 0)


def answer(code=0, answers=0, ident=0x6272):
    return struct.pack("!HHHHHH", ident, 0x8180 | code, 1, answers, 0, 0)


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        pytest.param(b"", Seen("no answer"), id="nothing"),
        pytest.param(answer(3), Seen("0 addresses, code 3"), id="no such name"),
        pytest.param(answer(0, 2), Seen("2 addresses, code 0", out=True), id="addresses"),
        pytest.param(b"HTTP/1.1 400 Bad Request", Seen("an answer that is no DNS", out=True), id="another protocol"),
        pytest.param(b"220 hi", Seen("an answer that is no DNS", out=True), id="too short"),
        pytest.param(QUERY, Seen("an answer that is no DNS", out=True), id="an echo"),
        pytest.param(answer(ident=1), Seen("an answer that is no DNS", out=True), id="an answer to another question"),
    ],
)
def test_an_answer_is_read_as_dns_only_where_it_is(answer, seen):
    assert resolved(QUERY, answer) == seen


def test_what_does_not_answer_in_time_is_said_in_words():
    def attempt():
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.settimeout(0.01)
            return Seen(str(ours.recv(1)))

    assert Probe("silence", "nothing", attempt).run() == Seen("no answer")
