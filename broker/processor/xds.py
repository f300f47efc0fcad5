"""ADS: Envoy's configuration, state of the world, over the same socket.

Law: what was accepted stays in force until something else is accepted. A refused configuration is reported in Envoy's words.
"""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from envoy.service.discovery.v3.ads_pb2_grpc import AggregatedDiscoveryServiceServicer
from envoy.service.discovery.v3.discovery_pb2 import DiscoveryResponse
from google.protobuf.any_pb2 import Any as AnyMessage

from broker.dataplane.compile import Resources, Written

log = logging.getLogger(__name__)

_CLUSTER = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
_LISTENER = "type.googleapis.com/envoy.config.listener.v3.Listener"
_ROUTES = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
# What is pointed at goes before what points (Envoy, "xDS protocol: eventual consistency considerations").
_ORDER = (_CLUSTER, _LISTENER, _ROUTES)


def _answer(url: str, messages: Sequence[Any]) -> Any:
    packed = [AnyMessage(type_url=url, value=bytes(message)) for message in messages]
    version = hashlib.sha256(b"\0".join(each.value for each in packed)).hexdigest()[:16]
    # Envoy hands the nonce back and looks at it no further; only that there is one tells an answer from a first question.
    return DiscoveryResponse(version_info=version, type_url=url, resources=packed, nonce=version)


@dataclass(slots=True)
class _Subscription:
    """One Envoy's view: per type, the names it asked for, the version it has or is about to have, and the one it accepted."""

    asked: dict[str, frozenset[str]] = field(default_factory=dict)
    sent: dict[str, str] = field(default_factory=dict)
    accepted: dict[str, str] = field(default_factory=dict)
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)


class Ads(AggregatedDiscoveryServiceServicer):  # type: ignore[misc]  # generated without types
    """Serves the newest configuration, to as many Envoys as are `connected`.

    `on_verdict(error)` hears each answer: None when Envoy has accepted all of the newest.
    """

    def __init__(self, on_verdict: Callable[[str | None], None]) -> None:
        self._on_verdict = on_verdict
        self._answers: dict[str, Any] = {}
        self._changed = asyncio.Event()
        self.connected = 0

    def publish(self, resources: Resources | Written) -> None:
        """Make this the configuration. Types whose content is the same are not sent again."""
        contents = (resources.clusters, resources.listeners, resources.routes)
        self._answers = {url: _answer(url, messages) for url, messages in zip(_ORDER, contents, strict=True)}
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def StreamAggregatedResources(  # noqa: N802
        self, request_iterator: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """One Envoy, for as long as it stays."""
        subscription = _Subscription()
        pusher = asyncio.create_task(self._push(subscription, context))
        self.connected += 1
        try:
            async for request in request_iterator:
                if self._hear(subscription, request):
                    await self._send(subscription, request.type_url, context)
        finally:
            self.connected -= 1
            pusher.cancel()

    async def _push(self, subscription: _Subscription, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        while True:
            changed = self._changed  # before the round, so that what is published during it gets a round of its own
            for url in _ORDER:
                if url in subscription.asked:
                    await self._send(subscription, url, context)
            await changed.wait()

    def _hear(self, subscription: _Subscription, request: Any) -> bool:
        """Whether Envoy waits for an answer: it asks for the first time on this stream, or for other names than before."""
        url, names = request.type_url, frozenset(request.resource_names)
        if request.HasField("error_detail"):
            message = request.error_detail.message
            log.error("Envoy refused the new configuration and keeps the old one: %s", message)
            self._on_verdict(message)
            # Tried again with the next publish (a port may be free by then), never at once: that would go round for ever.
            subscription.sent[url] = ""
        elif request.response_nonce:
            subscription.accepted[url] = request.version_info
            if all(subscription.accepted.get(each) == answer.version_info for each, answer in self._answers.items()):
                self._on_verdict(None)
        if subscription.asked.get(url) == names:
            return False
        subscription.asked[url], subscription.sent[url] = names, ""
        return True

    async def _send(self, subscription: _Subscription, url: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        async with subscription.writing:
            answer = self._answers.get(url)
            if answer is not None and subscription.sent.get(url) != answer.version_info:
                subscription.sent[url] = answer.version_info
                await context.write(answer)
