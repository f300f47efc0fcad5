"""From written limits and prices to those that a ledger counts.

Law: which limits bear on an operation's calls is worked out here, once for each grant, so that a call reads one flat tuple.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from broker.manifest.admission import Source
from broker.manifest.platform import ModelPrice, PlatformSpec
from broker.manifest.words import Ceilings, Rate
from broker.policy.limits import WORDS, Limit, Price
from broker.policy.providers import PROVIDERS
from broker.policy.types import Effect


def limits(source: Source, spec: Ceilings | None, scope: str, *pointer: str) -> tuple[Limit, ...]:
    """What `spec`, at `pointer` in its document, bounds for `scope`."""
    if spec is None:
        return ()
    written = ((word, getattr(spec, word)) for word in WORDS if word in spec.model_fields_set)
    return tuple(
        _limit(word, scope, value, source.rule(*pointer, word), spec.burst) for word, value in written if value is not None
    )


def _limit(word: str, scope: str, value: Rate | int, rule: str, burst: int | None) -> Limit:
    amount, per = value if isinstance(value, Rate) else (value, 0)
    return Limit(word, scope, amount, rule, per, (burst or amount) if word == "rate" else 0)


def bearing(on: Iterable[Limit], effect: Effect | None, protocol: str) -> tuple[Limit, ...]:
    """Those that count calls with this effect (None: housekeeping) to a tool that speaks this protocol."""
    return tuple(limit for limit in on if limit.bears_on(effect, model=protocol in PROVIDERS))


def prices(spec: PlatformSpec) -> Mapping[tuple[str, str], Price]:
    """By provider and model."""
    written = {(provider, name): price for provider, models in spec.prices.items() for name, price in models.items()}
    return MappingProxyType({key: _price(price) for key, price in written.items()})


def _price(spec: ModelPrice) -> Price:
    cached = spec.input if spec.cached is None else spec.cached
    return Price(spec.input, spec.output, cached, 2 * spec.input if spec.cache_write is None else spec.cache_write)
