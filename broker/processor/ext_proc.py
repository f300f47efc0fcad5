"""The driver of exchanges: one gRPC stream of Envoy's ext_proc is one exchange."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from envoy.service.ext_proc.v3.external_processor_pb2_grpc import ExternalProcessorServicer

from broker.credentials.base import CredentialUnavailable
from broker.events import Command, Cut, Issue, Issued, Reserve, Reserved, Services
from broker.exchange import Exchange
from broker.ledger.base import LedgerUnavailable
from broker.processor.convert import event_of, response_of, unchanged

log = logging.getLogger(__name__)


class ExtProc(ExternalProcessorServicer):  # type: ignore[misc]  # generated without types
    """Feeds what Envoy sends to the exchange and writes what it commands. Holds no state between streams.

    `own_task` gives the task that a stream is carried by, which is cancelled when it must be cut.
    """

    def __init__(self, services: Services, own_task: Callable[[], "asyncio.Task[Any] | None"] = asyncio.current_task) -> None:
        self._services, self._own_task = services, own_task

    async def Process(self, request_iterator: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> None:  # noqa: N802
        """One HTTP request, from its headers to the end of its answer."""
        stream = _Stream(context, self._own_task())
        exchange = Exchange(self._services, stream.wake)
        try:
            async for message in request_iterator:
                event = event_of(message)
                if event is None:
                    await stream.write(unchanged(message))
                    continue
                command: Command = exchange.handle(event)
                while isinstance(command, Reserve | Issue):
                    command = exchange.handle(await (_reserved(command) if isinstance(command, Reserve) else _issued(command)))
                if isinstance(command, Cut):
                    await context.abort(grpc.StatusCode.ABORTED, "cut by the broker")
                await stream.write(response_of(command, message))
                if exchange.cut:
                    await context.abort(grpc.StatusCode.ABORTED, "cut by the broker")
        except asyncio.CancelledError:
            # An idle stream sends no messages: what waits for one is woken when the call must be cut. Else Envoy has hung up.
            if not exchange.cut:
                raise
            await context.abort(grpc.StatusCode.ABORTED, "cut by the broker")
        finally:
            exchange.close()


class _Stream:
    """What is written, and what wakes its task from all other waits: gRPC can't end a stream while a message is on its way."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], task: "asyncio.Task[Any] | None") -> None:
        self._context, self._task, self._writing = context, task, False

    async def write(self, message: Any) -> None:
        self._writing = True
        await self._context.write(message)
        self._writing = False

    def wake(self) -> None:
        if self._task and not self._writing:
            self._task.cancel()


async def _reserved(command: Reserve) -> Reserved:
    try:
        return Reserved(await command.answer)
    except LedgerUnavailable as error:
        return Reserved(error)
    except Exception:
        log.exception("the ledger is at fault")
        return Reserved(LedgerUnavailable("the ledger failed", "see its traceback in the log"))


async def _issued(command: Issue) -> Issued:
    try:
        return Issued(await command.issuer.issue(command.occasion, command.now))
    except CredentialUnavailable as error:
        return Issued(error)
    except Exception:
        log.exception("the issuer %s is at fault", command.issuer.name)
        return Issued(CredentialUnavailable("the issuer failed", "see its traceback in the log"))
