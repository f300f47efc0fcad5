"""How times and addresses are written on the command line."""

import pytest

from broker import clock
from broker.cli.options import _address, _moment
from broker.errors import UsageError

NOW = 1_700_000_000.0


@pytest.fixture(autouse=True)
def fixed(monkeypatch):
    monkeypatch.setattr(clock, "now", lambda: NOW)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        pytest.param("30s", NOW - 30, id="seconds ago"),
        pytest.param("15m", NOW - 900, id="minutes ago"),
        pytest.param("12h", NOW - 43_200, id="hours ago"),
        pytest.param("7d", NOW - 604_800, id="days ago"),
        pytest.param("0s", NOW, id="now"),
        pytest.param("2023-11-14", 1_699_920_000.0, id="a date is in UTC, as the log is"),
        pytest.param("2023-11-14T22:13:20Z", NOW, id="RFC 3339"),
        pytest.param("2023-11-14t22:13:20.5z", NOW + 0.5, id="in small letters, with a fraction"),
        pytest.param("2023-11-15T00:13:20+02:00", NOW, id="with an offset"),
        pytest.param("2023-11-14 22:13:20Z", NOW, id="with a space, as RFC 3339 allows"),
    ],
)
def test_a_time_is_read(text, seconds):
    assert _moment(text, -1) == seconds


def test_a_span_can_lie_ahead():
    assert _moment("30d", 1) == NOW + 30 * 86_400


@pytest.mark.parametrize(
    "text",
    ["", "7", "d", "-7d", "7w", "1.5h", "٧d", "7d ", "999999d",
     "9999999d", "2023-02-30", "2023-11-14T22:13:20", "20231114", "2023-W46-2",
     "yesterday", "2023-11-14T25:00:00Z", "0001-01-01T00:00:00+23:59"],
)  # fmt: skip
def test_what_is_no_time_is_wrong_usage_that_says_how_to_write_one(text):
    with pytest.raises(UsageError, match="write 30s, 15m, 12h, 7d, 2026-01-31") as raised:
        _moment(text, -1)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "shown"), [("127.0.0.1:15001", "127.0.0.1:15001"), ("[::1]:15001", "[::1]:15001"), ("0.0.0.0:0", "0.0.0.0:0")]
)
def test_an_address_is_read(text, shown):
    assert str(_address(text)) == shown


@pytest.mark.parametrize("text", ["localhost:15001", "envoy.example:15001", "127.1:15001", "[no]:15001", "127.0.0.1", ":1"])
def test_what_envoy_could_not_listen_at_is_wrong_usage(text):
    with pytest.raises(UsageError, match=r"write it like 127\.0\.0\.1:15001"):
        _address(text)
