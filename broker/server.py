"""The composition root: the only place that knows every part. It wires them, watches the manifests, and stops in order."""

import asyncio
import contextlib
import logging
import secrets
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from broker import clock
from broker.admin import api
from broker.admin.operators import Operators, by_token, local
from broker.audit import AuditUnavailable, chain
from broker.audit.log import AuditLog
from broker.audit.record import config_record
from broker.canary import Canary
from broker.containment.alerts import Alert, Alerts
from broker.containment.ends import ending
from broker.containment.response import Containment, Surroundings
from broker.credentials.base import CredentialUnavailable, referenced, unset
from broker.credentials.jwt import jwks, key_id
from broker.credentials.leases import Leases
from broker.credentials.outbox import Outbox
from broker.credentials.registry import issuers
from broker.dataplane.compile import Written, resources
from broker.dataplane.site import Site
from broker.errors import BrokerError, counted
from broker.events import Services
from broker.identity import TokenAuthority
from broker.keys import ed25519, fernet, public_pem, write_private
from broker.ledger import checkpoint
from broker.ledger.base import RENEW_S, Balance, Ledger
from broker.ledger.checkpoint import rebuild
from broker.ledger.memory import MemoryLedger
from broker.ledger.redis import RedisLedger
from broker.manifest.findings import FORMATS
from broker.manifest.load import Loaded, load
from broker.metrics import Metrics, Standing, windows
from broker.namespaces import Namespaces
from broker.pki import PlatformCA, declared_hosts
from broker.policy.containment import Severity
from broker.policy.snapshot import EMPTY, PolicySnapshot
from broker.processor.health import Health
from broker.processor.listening import listening
from broker.processor.self_test import SelfTest
from broker.processor.xds import Ads
from broker.protocols.registry import ADAPTERS
from broker.state import State
from broker.watch import Watch, alive

log = logging.getLogger(__name__)

# A change of the manifests is in force within a second: this is how often the folder is looked at.
_WATCH_S = 0.25
_SYNC_S = 1.0
_RECERTIFY_S = 86_400.0
_GRACE_S = 5.0
_BALANCES_AT_ONCE = 1000  # a millisecond
# In which an Envoy that can choose has asked once more, and sends its calls elsewhere.
_UNASKED_S = 1.0

Announce = Callable[[str, str], None]


class Server:
    """The processor, the configuration service and the admin API.

    `admin` is `(host, port)`; `redis` is the URL of the ledger that several share, empty for an embedded one; `one_of_several`
    where Envoy has other processors too. `announce` hears `listening` once, and `accepted` each time Envoy has taken the newest
    configuration; with the revision.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - one an option of the verb
        self,
        manifests: Path,
        state: State,
        site: Site,
        admin: tuple[str, int],
        announce: Announce,
        redis: str = "",
        *,
        one_of_several: bool = False,
    ) -> None:
        self._manifests, self._state, self._site, self._admin, self._announce = manifests, state, site, admin, announce
        now = clock.now()
        self._snapshot = EMPTY
        self._broken = False
        self._told_day = 0
        self._loaded: Loaded | None = None
        # Of several, one has Envoy's ear; what the others would hear, the canary sees.
        self._refused: str | None = None if one_of_several else "Envoy has not asked for its configuration yet"
        self._one_of_several = one_of_several
        self._draining = False
        self._certified: object = None
        audit_key, jwt_key, tokens_key = (ed25519(state.keys / f"{name}.key") for name in ("audit", "jwt", "tokens"))
        (state.keys / "audit.pub.pem").write_bytes(public_pem(audit_key))
        self._ca = PlatformCA(state.keys / "ca.key", state.ca, now)
        self._audit = AuditLog(state.audit, audit_key, now, clock.mono_ns())
        self._own = MemoryLedger()
        self._shared = RedisLedger(redis, key_id(audit_key), self._own, on_change=self._ledger_changed) if redis else None
        self._ledger: Ledger = self._shared or self._own
        self._keys = f"{self._ca.fingerprint} {key_id(jwt_key)} {key_id(tokens_key)}", key_id(audit_key)
        seal = fernet(state.keys / "outbox.key")
        self._outbox = Outbox(state.outbox, seal)
        self._alerts = Alerts(state.alerts, seal, lambda: self._snapshot.alerting)
        self._metrics = Metrics()
        self._containment = self._contained()
        self._budgets = windows(EMPTY)
        self._ads = Ads(self._heard)
        envoy = None if one_of_several else state.envoy_admin_socket
        self._namespaces = Namespaces(state.run, manifests, envoy, self._ads.publish, self._note)
        self._services = Services(
            snapshot=lambda: self._snapshot,
            adapters=ADAPTERS,
            issuers=issuers(jwt_key, self._outbox.put),
            audit=self._audit,
            ledger=self._ledger,
            tokens=TokenAuthority(tokens_key),
            containment=self._containment,
            now=clock.now,
            steady=clock.steady,
            mono_ns=clock.mono_ns,
            random_id=_random_id,
            metrics=self._metrics,
            has_ended=self._namespaces.has_ended,
        )
        self._self_test = Watch("the self-test", SelfTest(self._services, str(state.processor_socket)).test, self._tested)
        self._jwks = jwks(jwt_key)
        self._canary = Watch("the canary", Canary(site, self._namespaces.in_turn).test, self._tried)

    def _contained(self) -> Containment:
        around = Surroundings(
            self._audit,
            clock.now,
            clock.steady,
            clock.mono_ns,
            _random_id,
            later=lambda what: asyncio.get_running_loop().call_soon(what),
            send=self._alerts.send,
            drop_leases=lambda agent: self._drop_leases((agent,)),
        )
        if shared := self._shared:
            around = replace(around, share=shared.share, unshare=shared.unshare)
        contained = Containment(around, self._metrics.found)
        contained.replay(chain.notices(self._state.audit))
        if shared:
            shared.notices, shared.on_notices = lambda: contained.notices, contained.learn
            shared.on_lapse = contained.open.cut_off
        return contained

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain. Raises `BrokerError` where it can't start."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with contextlib.AsyncExitStack() as self._joined:
            try:
                await self._reload()
                await self._serve(stop)
            finally:
                self._draining = True
        await self._checkpoint()
        self._audit.close()

    async def _serve(self, stop: asyncio.Event) -> None:
        await asyncio.to_thread(self._state.join, *self._keys)
        health = Health(self._faults, clock.steady)
        server = await listening(self._services, self._ads, health, self._state.processor_socket)
        host, port = self._admin
        acts = Operators(lambda: self._snapshot, self._ledger, self._containment, clock.steady).acts
        public = [
            *api.public(self._readiness, self._exposition, self._jwks),
            *api.acting(acts, by_token(self._services.tokens, clock.now)),
        ]
        control = api.acting({**acts, **self._namespaces.acts}, local)
        async with api.serving(public, host=host, port=port), api.serving(control, uds=str(self._state.control_socket)):
            own = (self._watch(), self._sync(), self._keep(), self._take_back(), alive(self._state.root / "hung.txt"))
            work = (*own, self._alerts.run(), self._self_test.run(), self._canary.run(), self._namespaces.watch())
            background = [asyncio.create_task(each) for each in work]
            self._announce("listening", self._snapshot.revision)
            await stop.wait()
            self._draining = True
            await asyncio.sleep(_UNASKED_S if self._one_of_several else 0)
            for task in background:
                task.cancel()
            await server.stop(_GRACE_S)
        with contextlib.suppress(AuditUnavailable):
            self._audit.sync(clock.now())

    # Configuration.

    async def _watch(self) -> None:
        # The first look finds all of it new, so that nothing is missed that changed between the first load and now.
        seen: object = None
        while True:
            await asyncio.sleep(_WATCH_S)
            try:
                now = await asyncio.to_thread(self._signature)
                if now != seen:
                    seen = now
                    await self._reload()
            except Exception:  # a folder that vanishes while it is listed, or a fault of ours: the next look must follow
                log.exception("the manifests could not be looked at; revision %s stays in force", self._snapshot.revision)

    def _signature(self) -> object:
        """What changes when the configuration must be made anew: the files, and the day, since leaves live for a few."""
        found = set()
        for path in {*self._manifests.rglob("*"), *(self._loaded.files if self._loaded else ())}:
            with contextlib.suppress(OSError):
                status = path.stat()
                found.add((path, status.st_mtime_ns, status.st_size, status.st_ino))
        return found, _day()

    async def _reload(self) -> None:
        try:
            loaded = await asyncio.to_thread(load, self._manifests)
        except BrokerError as error:
            self._report(f"the manifests can't be read: {error}")
            return
        self._loaded = loaded
        if loaded.snapshot is None:
            errors = [finding for finding in loaded.findings if finding.severity == "error"]
            for line in FORMATS["text"](errors).splitlines():
                log.error("%s", line)
            self._report(f"{counted(len(errors), 'error')} in the manifests, the first: {FORMATS['text'](errors[:1]).strip()}")
            return
        written = await asyncio.to_thread(self._compile, loaded.snapshot)
        await self._namespaces.use(loaded.snapshot, self._certificates, written)
        if self._snapshot is EMPTY:
            # Only now is it known which limits there are to count under; nothing was let through before.
            await asyncio.to_thread(rebuild, self._own, self._state.ledger, self._state.audit, loaded.snapshot, clock.now())
            if self._shared:
                await self._joined.enter_async_context(self._shared)
        if self._shared:
            self._shared.unsafe_reads = loaded.snapshot.unsafe_reads
        if loaded.snapshot.revision != self._snapshot.revision or self._broken:
            self._record("configuration in force", loaded.snapshot.revision)
            gone = self._snapshot.agents.keys() - loaded.snapshot.agents.keys()
            self._snapshot = loaded.snapshot
            self._containment.apply_policy(loaded.snapshot, tuple(self._decoys(loaded.snapshot)))
            self._drop_leases(gone)
            self._broken = False
            self._budgets = await asyncio.to_thread(windows, loaded.snapshot)
            log.info("revision %s is in force", loaded.snapshot.revision)
            if missing := ", ".join(sorted(unset(loaded.snapshot.tools.values()))):
                log.warning("not set, so that calls get 503 credential_unavailable: %s", missing)

    def _decoys(self, snapshot: PolicySnapshot) -> Iterator[str]:
        for reference in snapshot.decoys.credentials:
            try:
                yield referenced(reference, "honeytoken")
            except CredentialUnavailable as error:
                log.error("a decoy is not looked for: %s", error)  # noqa: TRY400 - it says all there is

    def _report(self, what: str) -> None:
        self._broken = True
        log.error("%s; revision %s stays in force", what, self._snapshot.revision)
        self._note(f"refused: {what}")

    def _compile(self, snapshot: PolicySnapshot) -> Written:
        wanted = (declared_hosts(snapshot), _day())
        # Certificates that stay the same leave Envoy's listeners, and so the open tunnels, alone.
        if wanted != self._certified:
            doors = {"localhost", "127.0.0.1", self._site.proxy[0], self._site.reached[0][0]}
            self._certified, self._certificates = wanted, self._ca.certify(snapshot, doors, clock.now())
        return Written.of(resources(snapshot, self._site, self._certificates))

    def _heard(self, error: str | None) -> None:
        self._refused = error
        self._namespaces.heard(error)
        if error is None:
            self._announce("accepted", self._snapshot.revision)
        else:
            self._note(f"Envoy refused: {error}")

    # The rest.

    def _faults(self) -> list[str]:
        """Why another processor, if there is one, should have the calls."""
        reasons = ["it ends"] if self._draining else []
        if self._snapshot is EMPTY:
            reasons.append("no configuration is in force")
        if not self._audit.writable:
            reasons.append("the record can't be written")
        if self._shared and self._shared.away:
            reasons.append(f"the shared ledger: {self._shared.away}")
        if self._self_test.failure:
            reasons.append(f"the self-test of revocation: {self._self_test.failure}")
        return reasons

    def _readiness(self) -> tuple[list[str], str]:
        reasons = self._faults()
        if self._refused and (self._ads.connected or not self._one_of_several):
            reasons.append(f"Envoy: {self._refused}")
        if self._canary.failure:
            reasons.append(f"the must-deny canary: {self._canary.failure}")
        return reasons, self._snapshot.revision

    async def _exposition(self) -> bytes:
        standing = Standing(
            revision="" if self._snapshot is EMPTY else self._snapshot.revision,
            current=self._snapshot is not EMPTY and not self._broken,
            accepted=self._refused is None,
            audit_writable=self._audit.writable,
            open_calls=len(self._own.grants),
            balances=await self._own_balances(),
            self_test=not self._self_test.failure,
            restrictions=Counter(str(each.action) for each in self._containment.standing.all),
            alerts=self._alerts.results,
            alerts_waiting=len(self._alerts),
        )
        return await asyncio.to_thread(self._metrics.exposition, standing)

    async def _own_balances(self) -> list[Balance]:
        """Of the windows that something was spent in; calls are served meanwhile."""
        # The ledger's own last word on the time, at most RENEW_S old: where it is shared, its clock is not ours.
        now = self._own.now
        found = list[Balance]()
        spent_of = [self._budgets[key] for key in self._own.windows if key in self._budgets]
        for start in range(0, len(spent_of), _BALANCES_AT_ONCE):
            found += await self._own.balances(tuple(spent_of[start : start + _BALANCES_AT_ONCE]), now)
            await asyncio.sleep(0)
        return found

    def _tested(self, failure: str) -> None:
        """The self-test's result has changed."""
        what = f"an agent that is revoked is not cut off: {failure}" if failure else "revocation works again"
        self._containment.alert(Alert("self_test", Severity.HIGH, what, "self-test", resolves=not failure))

    def _tried(self, failure: str) -> None:
        """The canary's result has changed."""
        what = f"what must be denied is not: {failure}" if failure else "what must be denied is denied again"
        self._containment.alert(Alert("canary", Severity.HIGH, what, "canary", resolves=not failure))

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(_SYNC_S)
            if not self._audit.writable:  # where calls go to another processor, none tries it
                self._note("the record can be written again")
            try:
                await asyncio.to_thread(self._audit.sync, clock.now())
            except AuditUnavailable as error:
                log.error("%s", error)  # noqa: TRY400 - it says all there is

    def _ledger_changed(self, healthy: bool, why: str) -> None:  # noqa: FBT001 - the ledger's callback
        self._metrics.ledger_up = healthy
        if self._draining:
            return  # it is closed in the end, and that is nobody's alarm
        passing = ", and reads pass on this broker's own limits" if self._snapshot.unsafe_reads else ""
        what = "limits can be checked again" if healthy else f"limits can't be checked{passing}: {why}"
        self._containment.alert(Alert("ledger", Severity.HIGH, what, "ledger", resolves=healthy))

    def _drop_leases(self, agents: Iterable[str]) -> None:
        for agent in agents:
            for each in self._leases():
                each.drop(agent)

    def _leases(self) -> list[Leases]:
        return [each for each in self._services.issuers.values() if isinstance(each, Leases)]

    async def _take_back(self) -> None:
        await self._outbox.run({each.name: each.source for each in self._leases()})

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                self._ledger.renew(clock.steady())
                self._containment.sweep()
                self._tell_of_ends()
                await self._checkpoint()
            except Exception:  # open calls must keep their places, whatever this round's fault was
                log.exception("the ledger could not be kept up; it is tried again in %.0f s", RENEW_S)

    def _tell_of_ends(self) -> None:
        today = _day()
        if self._told_day != today:
            self._told_day = today
            for alert in ending(self._snapshot, clock.now()):
                self._containment.alert(alert)

    async def _checkpoint(self) -> None:
        if self._snapshot is not EMPTY:
            picture = checkpoint.take(self._own, self._audit.head)
            try:
                await asyncio.to_thread(write_private, self._state.ledger, picture)
            except OSError as error:
                log.warning("the ledger can't be saved (%s); a restart will take longer", error.strerror)

    def _note(self, what: str) -> None:
        self._record(what, self._snapshot.revision)

    def _record(self, what: str, revision: str) -> None:
        try:
            self._audit.append(config_record(clock.now(), clock.mono_ns(), what, revision))
        except AuditUnavailable as error:
            log.error("%s", error)  # noqa: TRY400 - it says all there is


def _day() -> int:
    return int(clock.now() // _RECERTIFY_S)


def _random_id() -> str:
    return secrets.token_hex(10)
