"""How a shared Redis is asked, all that waits in one round trip, and what its answers mean to an embedded ledger."""

import asyncio
from contextlib import suppress
from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError

from broker.ledger.base import LedgerUnavailable
from broker.ledger.memory import MemoryLedger
from broker.ledger.said import Words

SLOW_S = 0.05
"""An answer that takes longer is not waited for."""


def window(told: MemoryLedger, key: str, answer: list[bytes | None]) -> None:
    """What a window has spent."""
    window, spent = answer
    if window and spent:
        told.windows[key] = int(window), int(spent)


def bucket(told: MemoryLedger, key: str, answer: bytes | None) -> None:
    """When a bucket is full again."""
    if answer:
        told.full_at[key] = float(answer)


def crowd(told: MemoryLedger, key: str, answer: int) -> None:
    """How many calls are open."""
    told.open[key] = dict.fromkeys(map(str, range(answer)), float("inf"))


async def round_trip(connection: AbstractConnection, commands: list[Words]) -> list[Any]:
    """The answers to commands that are sent together. Raises `TimeoutError` after `SLOW_S`, and what redis-py raises."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as patience:
        # One step of the loop after its time: what came while the loop itself stood still is read first.
        late = loop.call_later(SLOW_S, loop.call_soon, _lose, patience)
        try:
            await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
            answers = [await connection.read_response() for _ in commands]
        finally:
            late.cancel()
    if [b"away"] in answers:
        raise LedgerUnavailable("Redis lost its data, or this broker's place in it")
    return answers


def _lose(patience: asyncio.Timeout) -> None:
    with suppress(RuntimeError):  # it has just been answered
        patience.reschedule(0)


def reason(error: Exception) -> str:
    """Why a connection ended, for people."""
    if isinstance(error, TimeoutError):
        return f"no answer within {SLOW_S * 1000:.0f} ms"
    return f"{type(error).__name__}: {error}" if isinstance(error, RedisError | OSError) else str(error)
