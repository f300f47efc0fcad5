"""ADS as a script between Envoy and the processor, over real gRPC: what is asked, what is sent, and what is said of it."""

import asyncio
from types import SimpleNamespace

import grpc
import pytest
from envoy.service.discovery.v3.ads_pb2_grpc import (
    AggregatedDiscoveryServiceStub,
    add_AggregatedDiscoveryServiceServicer_to_server,
)
from envoy.service.discovery.v3.discovery_pb2 import DiscoveryRequest

from broker.dataplane.compile import Resources
from broker.processor.xds import Ads

PREFIX = "type.googleapis.com/envoy.config."
CLUSTER, LISTENER, ROUTES = (
    PREFIX + name for name in ("cluster.v3.Cluster", "listener.v3.Listener", "route.v3.RouteConfiguration")
)
PATIENCE_S = 10


class Text:
    """A resource that is nothing but its bytes."""

    def __init__(self, text):
        self.text = text

    def __bytes__(self):
        return self.text.encode()


def configuration(*, clusters="c1", listeners="l1", routes="r1"):
    return Resources([Text(clusters)], [Text(listeners)], [Text(routes)])


class Envoy:
    """One stream, as Envoy speaks on it: it remembers the last answer of each type."""

    def __init__(self, channel):
        self.stream = AggregatedDiscoveryServiceStub(channel).StreamAggregatedResources()
        self.last = {}

    async def asks(self, url, names=(), version=""):
        last = self.last.get(url)
        await self.stream.write(
            DiscoveryRequest(
                type_url=url,
                resource_names=names,
                version_info=last.version_info if last else version,
                response_nonce=last.nonce if last else "",
            )
        )

    async def refuses(self, url, why="no"):
        await self.stream.write(
            DiscoveryRequest(type_url=url, response_nonce=self.last[url].nonce, error_detail={"message": why})
        )

    async def gets(self):
        answer = await asyncio.wait_for(self.stream.read(), PATIENCE_S)
        self.last[answer.type_url] = answer
        return answer.type_url, [resource.value.decode() for resource in answer.resources]

    async def starts(self, version=""):
        got = []
        for url in (CLUSTER, LISTENER, ROUTES):
            await self.asks(url, version=version)
            got.append(await self.gets())
            await self.asks(url)
        return got


WHOLE = [(CLUSTER, ["c1"]), (LISTENER, ["l1"]), (ROUTES, ["r1"])]


def plays(script, tmp_path):
    """Run `script(ads, connect, verdicts)` against ADS on a socket."""

    async def run():
        verdicts = asyncio.Queue()
        ads, server = Ads(verdicts.put_nowait), grpc.aio.server()
        add_AggregatedDiscoveryServiceServicer_to_server(ads, server)
        server.add_insecure_port(f"unix:{tmp_path}/ads")
        await server.start()
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/ads") as channel:
            said = SimpleNamespace(next=lambda: asyncio.wait_for(verdicts.get(), PATIENCE_S), queue=verdicts)
            await script(ads, lambda: Envoy(channel), said)
        await server.stop(0)

    asyncio.run(run())


def test_a_first_configuration_is_sent_whole_and_accepted_once_all_of_it_is(tmp_path):
    async def script(ads, connect, verdicts):
        ads.publish(configuration())
        assert await connect().starts() == WHOLE
        assert await verdicts.next() is None
        assert verdicts.queue.empty()

    plays(script, tmp_path)


def test_an_envoy_that_asks_before_there_is_a_configuration_gets_it_when_there_is(tmp_path):
    async def script(ads, connect, _verdicts):
        envoy = connect()
        await envoy.asks(CLUSTER)
        ads.publish(configuration())
        assert await envoy.gets() == (CLUSTER, ["c1"])

    plays(script, tmp_path)


def test_only_what_changed_is_sent_again(tmp_path):
    async def script(ads, connect, verdicts):
        ads.publish(configuration())
        envoy = connect()
        await envoy.starts()
        assert await verdicts.next() is None
        ads.publish(configuration(listeners="l2"))
        assert await envoy.gets() == (LISTENER, ["l2"])
        await envoy.asks(LISTENER)
        assert await verdicts.next() is None
        ads.publish(configuration(listeners="l2", routes="r2"))
        assert await envoy.gets() == (ROUTES, ["r2"])

    plays(script, tmp_path)


@pytest.mark.parametrize(
    ("after", "sent"),
    [
        pytest.param("l3", "l3", id="another configuration follows"),
        pytest.param("l1", "l1", id="the one before it is published again"),
        pytest.param("l2", "l2", id="the same is published again, and tried once more"),
    ],
)
def test_a_refused_type_is_reported_and_not_sent_again_until(after, sent, tmp_path):
    async def script(ads, connect, verdicts):
        ads.publish(configuration())
        envoy = connect()
        await envoy.starts()
        assert await verdicts.next() is None
        ads.publish(configuration(listeners="l2"))
        await envoy.gets()
        await envoy.refuses(LISTENER, "the port is taken")
        assert await verdicts.next() == "the port is taken"
        # Were the refused type sent again at once, it would come before the routes.
        ads.publish(configuration(listeners="l2", routes="r2"))
        assert await envoy.gets() == (LISTENER, ["l2"])
        assert await envoy.gets() == (ROUTES, ["r2"])
        await envoy.asks(ROUTES)
        await envoy.refuses(LISTENER, "still taken")
        assert await verdicts.next() == "still taken"
        ads.publish(configuration(listeners=after, routes="r2"))
        assert await envoy.gets() == (LISTENER, [sent])
        await envoy.asks(LISTENER)
        assert await verdicts.next() is None
        assert verdicts.queue.empty()

    plays(script, tmp_path)


def test_a_refusal_is_answered_by_nothing(tmp_path):
    async def script(ads, connect, verdicts):
        ads.publish(configuration())
        envoy = connect()
        await envoy.asks(CLUSTER)
        await envoy.gets()
        await envoy.refuses(CLUSTER)
        assert await verdicts.next() == "no"
        await envoy.asks(LISTENER)
        assert await envoy.gets() == (LISTENER, ["l1"])

    plays(script, tmp_path)


def test_an_envoy_that_outlived_the_processor_gets_the_whole_set(tmp_path):
    async def script(ads, connect, verdicts):
        ads.publish(configuration())
        first = connect()
        await first.starts()
        assert await verdicts.next() is None
        versions = {url: answer.version_info for url, answer in first.last.items()}
        first.stream.cancel()
        # The new stream's first requests carry the version that Envoy has, and no nonce.
        again, got = connect(), []
        for url in (CLUSTER, LISTENER, ROUTES):
            await again.asks(url, version=versions[url])
            got.append(await again.gets())
            await again.asks(url)
        assert got == WHOLE
        assert await verdicts.next() is None

    plays(script, tmp_path)


def test_a_name_that_is_asked_for_later_is_answered(tmp_path):
    async def script(ads, connect, _verdicts):
        ads.publish(configuration())
        envoy = connect()
        await envoy.asks(ROUTES, ["inner"])
        await envoy.gets()
        await envoy.asks(ROUTES, ["inner"])
        await envoy.asks(ROUTES, ["inner", "proxy"])
        assert await envoy.gets() == (ROUTES, ["r1"])

    plays(script, tmp_path)


def test_what_is_published_while_another_is_being_sent_is_sent_too():
    async def script():
        ads = Ads(lambda _: None)

        class Context:
            """Publishes the second configuration in the middle of the first one's last part."""

            def __init__(self):
                self.written = []

            async def write(self, answer):
                self.written.append(answer.resources[0].value.decode())
                if self.written[-1] == "r1":
                    ads.publish(configuration(clusters="c2", listeners="l2", routes="r2"))
                if self.written[-1] == "r2":
                    done.set()

        async def requests():
            for url in (CLUSTER, LISTENER, ROUTES):
                yield DiscoveryRequest(type_url=url)
            ads.publish(configuration())
            await done.wait()

        done, context = asyncio.Event(), Context()
        await asyncio.wait_for(ads.StreamAggregatedResources(requests(), context), PATIENCE_S)
        assert context.written == ["c1", "l1", "r1", "c2", "l2", "r2"]

    asyncio.run(script())
