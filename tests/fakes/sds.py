"""SPIRE's Secret Discovery Service on a Unix socket, strict, written from its documentation and from how it behaves.

What it holds its client to: state of the world only (`DeltaSecrets` is unimplemented in SPIRE), the type URL of secrets, an
Envoy's node with its version in every request (SPIRE chooses the form of the bundles by the request that it answers; without a
version it gives a plain list of authorities), answers that carry the last nonce and the version accepted, and names that this
workload has: anything else ends the stream with INVALID_ARGUMENT, and a workload without an entry with PERMISSION_DENIED.
Whatever breaks this is kept in `faults`.
"""

import os
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from envoy.extensions.transport_sockets.tls.v3.secret_pb2 import Secret
from envoy.extensions.transport_sockets.tls.v3.tls_spiffe_validator_config_pb2 import SPIFFECertValidatorConfig
from envoy.service.discovery.v3.discovery_pb2 import DiscoveryResponse
from envoy.service.secret.v3.sds_pb2_grpc import SecretDiscoveryServiceServicer, add_SecretDiscoveryServiceServicer_to_server

TYPE_URL = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
_ROTATED = object()


class SpireAgent(SecretDiscoveryServiceServicer):
    """One workload's view of a SPIRE agent.

    `identities` are its SVIDs, chain and key (PEM) by SPIFFE ID, in SPIRE's order; without any it has no entry. `bundles` are
    authorities (PEM) by trust domain, the agent's own first, then the federated ones. Both may be replaced; `rotate` tells it.
    `plain_bundles` is `disable_spiffe_cert_validation`.
    """

    def __init__(self, socket: Path, identities: dict[str, tuple[str, str]], bundles: dict[str, str]) -> None:
        self.socket, self.identities, self.bundles = socket, identities, bundles
        self.plain_bundles = False
        self.requested: list[str] = []
        self.faults: list[str] = []
        self._streams: list[queue.Queue[Any]] = []
        # Nonces that wait for an answer, and streams that have not heard of a rotation yet.
        self._pending: set[object] = set()
        self._changed = threading.Condition()
        self._server: grpc.Server | None = None

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        self._server = grpc.server(ThreadPoolExecutor(32))
        add_SecretDiscoveryServiceServicer_to_server(self, self._server)
        assert self._server.add_insecure_port(f"unix:{self.socket}")
        self._server.start()

    def stop(self) -> None:
        if self._server:
            self._server.stop(0).wait()
            self._server = None

    def rotate(self) -> None:
        """Send what has changed to everyone who asked, and wait until all of it is accepted."""
        with self._changed:
            self._pending |= {id(stream) for stream in self._streams}
            for stream in self._streams:
                stream.put(_ROTATED)
        self.settle()

    def settle(self, seconds: float = 10) -> None:
        """Wait until nothing that was sent is unanswered."""
        with self._changed:
            assert self._changed.wait_for(lambda: not self._pending, seconds), f"not accepted; {self.faults}"

    def StreamSecrets(self, request_iterator: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        """One subscription."""
        if not self.identities:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "no identity issued")
        events: queue.Queue[Any] = queue.Queue()
        last, nonce, version = None, "", 0
        with self._changed:
            self._streams.append(events)
        threading.Thread(target=_hear, args=(request_iterator, events), daemon=True).start()
        try:
            while (event := events.get()) is not None:
                due = last is not None
                if event is not _ROTATED:
                    if not self._fits(event, nonce, version):
                        continue
                    due = last is None or set(last.resource_names) != set(event.resource_names)
                    last = event
                if due:
                    version, nonce = version + 1, os.urandom(4).hex()
                    answer = self._answer(last, str(version), nonce, context)
                    self._pends(nonce, instead_of=id(events))
                    yield answer
                else:
                    self._pends(instead_of=nonce if event is last else id(events))
        finally:
            with self._changed:
                self._streams.remove(events)
            self._pends(instead_of=id(events))
            self._pends(instead_of=nonce)

    def _pends(self, *nonces: str, instead_of: object) -> None:
        with self._changed:
            self._pending = (self._pending - {instead_of}) | set(nonces)
            self._changed.notify_all()

    def DeltaSecrets(self, _: Iterator[Any], context: grpc.ServicerContext) -> None:  # noqa: N802
        """SPIRE has none."""
        self.faults.append("DeltaSecrets was called")
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method is not implemented")

    def _fits(self, request: Any, nonce: str, version: int) -> bool:
        if request.type_url != TYPE_URL:
            self.faults.append(f"type URL {request.type_url!r}")
        if not request.node.id:
            self.faults.append("a request without a node")
        if request.HasField("error_detail"):
            self.faults.append(f"refused: {request.error_detail.message}")
        if not nonce:
            if request.response_nonce:
                self.faults.append("a nonce on a stream that has had no answer")
            return True
        if request.response_nonce != nonce:  # an answer to something older, which SPIRE passes over
            return False
        if request.version_info != str(version):
            self.faults.append(f"version {request.version_info!r} in place of {version}")
        return True

    def _answer(self, request: Any, version: str, nonce: str, context: grpc.ServicerContext) -> Any:
        names = [name for name in request.resource_names if name]
        self.requested += names
        answer = DiscoveryResponse(type_url=request.type_url, version_info=version, nonce=nonce)
        unknown = []
        for name in names:
            secret = self._certificate(name) or self._bundle(name, request, context)
            if secret is None:
                unknown.append(name)
            else:
                answer.resources.add().Pack(secret)
        if unknown:
            why = f"workload is not authorized for the requested identities {sorted(unknown)}"
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, why)
        return answer

    def _certificate(self, name: str) -> Any:
        found = next(iter(self.identities.values())) if name == "default" else self.identities.get(name)
        if not found:
            return None
        chain, key = ({"inline_bytes": text.encode()} for text in found)
        return Secret(name=name, tls_certificate={"certificate_chain": chain, "private_key": key})

    def _bundle(self, name: str, request: Any, context: grpc.ServicerContext) -> Any:
        own = next(iter(self.bundles))
        domains = {"ALL": list(self.bundles), "ROOTCA": [own]}.get(name) or [
            domain for domain in self.bundles if name == f"spiffe://{domain}"
        ]
        if not domains:
            return None
        build = request.node.user_agent_build_version.version
        if self.plain_bundles or (build.major_number, build.minor_number) < (1, 18):
            if name == "ALL":
                context.abort(grpc.StatusCode.INTERNAL, 'unable to use "SPIFFE validator" on Envoy below 1.17')
            return Secret(name=name, validation_context={"trusted_ca": {"inline_string": self.bundles[domains[0]]}})
        config = SPIFFECertValidatorConfig()
        for domain in sorted(domains):
            config.trust_domains.add(name=domain, trust_bundle={"inline_bytes": self.bundles[domain].encode()})
        secret = Secret(name=name)
        validator = secret.validation_context.custom_validator_config
        validator.name = "envoy.tls.cert_validator.spiffe"
        validator.typed_config.Pack(config)
        return secret


def _hear(requests: Iterator[Any], events: "queue.Queue[Any]") -> None:
    try:
        for request in requests:
            events.put(request)
    except grpc.RpcError:
        pass
    events.put(None)
