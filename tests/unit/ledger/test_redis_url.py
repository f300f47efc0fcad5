"""What a Redis URL may say, before any Redis is asked."""

import pytest

from broker.errors import UsageError
from broker.ledger.memory import MemoryLedger
from broker.ledger.redis import RedisLedger


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("http://redis.example", id="another scheme"),
        pytest.param("redis://user:pass word@host:port", id="no port"),
        pytest.param("rediss://redis.example?ssl_cert_reqs=none", id="no check of the certificate"),
        pytest.param("rediss://redis.example?ssl_check_hostname=false", id="no check of its name"),
    ],
)
def test_is_refused_without_a_word_of_it(url):
    with pytest.raises(UsageError) as caught:
        RedisLedger(url, "replica", MemoryLedger())
    assert "pass word" not in str(caught.value)
