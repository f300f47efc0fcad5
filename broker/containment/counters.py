"""What is kept of each agent to count its events: one flat array of numbers, whose size the rules alone set.

Laws: pure. A rule of at most `EXACT` events is met at exactly that many within its window, to the millisecond; a larger one at
no fewer than nine tenths of them, and always at all of them. Nothing that an agent does makes its numbers more.

The numbers are uint32. From the front: times in ticks of a millisecond (longer where a window is weeks long), 0 for never; the
first is `now`. From the end: hashes and counts, 0 for none. Hashes are Python's own, keyed per process, so that nobody can
choose two names that count as one.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from broker.policy.containment import Action, Rule

EXACT = 20
"""Events: of a rule of up to so many, each one's time is kept; beyond it, of each so many that ten of them make up the count."""
_ID, _PRIOR = 20, 2  # characters of a decision's ID; how many are kept beside the one at hand
_BACK = 1.0  # seconds that the clock may be set back by, as corrections do; events then count as simultaneous
_HALF = 1 << 31  # ticks: the longest window
MOST = _HALF
"""A count goes no further."""

Numbers: TypeAlias = "array[int]"
_NOW = 0
_HALVES = -1  # the place of how many halves have been taken off the times, which would outgrow 32 bits in seven weeks


@dataclass(slots=True)
class Layout:
    """Gives out places in an agent's numbers: of `times` from the front, of `words` from the end; and of decisions (`ids`).

    `per_second` is how many ticks a second has; `longest` is the longest window or cool-down, in seconds.
    """

    longest: int
    times: int = 1
    words: int = 1
    ids: int = 0
    per_second: float = field(init=False)

    def __post_init__(self) -> None:
        self.per_second = min(1000.0, _HALF / max(1, self.longest))

    def time(self, size: int = 1) -> int:
        """The first of `size` places of times."""
        self.times += size
        return self.times - size

    def word(self, size: int = 1) -> int:
        """The first of `size` places of words, which is negative."""
        self.words += size
        return -self.words

    def id(self, size: int = 1) -> int:
        """The first of `size` places of decisions."""
        self.ids += size
        return self.ids - size


@dataclass(slots=True)
class Kept:
    """What is kept of one agent: its numbers, and the IDs of the few decisions before the one at hand, by place."""

    numbers: Numbers
    ids: bytearray

    @property
    def now(self) -> int:
        """The time of the event at hand, in ticks."""
        return self.numbers[_NOW]

    def find(self, word: int, place: int, size: int) -> int:
        """Which of `size` words from a place on is this one; -1 for none."""
        try:
            return self.numbers.index(word, place, place + size) - place - len(self.numbers)
        except ValueError:
            return -1

    def remember(self, place: int, decision_id: str) -> None:
        """Keep the ID of a decision that has been told of. One longer than ours is not kept: a part of it would name none."""
        size, text = _ID * _PRIOR, decision_id.encode("ascii", "replace")
        here = place * size
        if len(text) <= _ID:
            self.ids[here : here + size] = self.ids[here + _ID : here + size] + text.ljust(_ID, b"\0")

    def prior(self, place: int, most: int) -> Iterator[str]:
        """The IDs of the decisions before, at most so many, newest last."""
        end = (place + 1) * _ID * _PRIOR
        for at in range(end - _ID * min(most, _PRIOR), end, _ID):
            if text := self.ids[at : at + _ID].rstrip(b"\0"):
                yield text.decode()

    def forget_ids(self, place: int) -> None:
        """The place is somebody else's now."""
        for _ in range(_PRIOR):
            self.remember(place, "")


class Counter:
    """A rule with its places in an agent's numbers. `window` and `cooldown` are in ticks; `slots` count apart from each other.

    Where it counts in a window, every `every`-th event is marked in a ring of `size` times. A rule that revokes a run is quiet
    about that run only, and after it fired counts nothing that was before, lest one run pay for another.
    """

    __slots__ = ("_cooldown", "_fired", "_marks", "_position", "_run", "_size", "count", "every", "rule", "window")

    def __init__(self, rule: Rule, count: int, slots: int, layout: Layout) -> None:
        self.rule, self.count = rule, count
        self.window, self._cooldown = rule.window * layout.per_second, rule.cooldown * layout.per_second
        self._fired, self._run = layout.time(), layout.word() if rule.action is Action.REVOKE_RUN else 0
        self.every = 1 if count <= EXACT else count // 10
        self._size = -(-count // self.every) if slots else 0
        self._marks, self._position = layout.time(self._size * slots), layout.word(slots)

    def since(self, numbers: Numbers) -> float:
        """The moment after which events count."""
        start = max(0, numbers[_NOW] - self.window)
        return max(start, numbers[self._fired]) if self._run else start

    def fires(self, numbers: Numbers, run: str) -> bool:
        """Whether it is not quiet; from now on it is."""
        now, fired, word = numbers[_NOW], numbers[self._fired], hashed(run) if self._run else 0
        if fired and now - fired < self._cooldown and (not word or numbers[self._run] == word):
            return False
        numbers[self._fired] = now
        if word:
            numbers[self._run] = word
        return True

    def counted(self, numbers: Numbers, when: int, slot: int = 0) -> int:
        """Count an event: how many of them are surely within the window once they are enough, or else 0."""
        position, marks = self._position + slot, self._marks + slot * self._size
        number, every = numbers[position], self.every
        newest, since = divmod(number, every)
        if not since:
            numbers[marks + newest] = when
        numbers[position] = (number + 1) % (every * self._size)
        # So many marks back that all events but a step's worth lie after it: with `count` of them in the window, it is there too.
        back = -((since + every - self.count) // every)
        oldest = numbers[marks + (newest - back) % self._size]
        return since + back * every + 1 if oldest > self.since(numbers) else 0

    def clear(self, numbers: Numbers, slot: int) -> None:
        """Count anew."""
        marks = self._marks + slot * self._size
        numbers[marks : marks + self._size] = array("I", bytes(4 * self._size))
        numbers[self._position + slot] = 0


class Agents:
    """What is kept, by agent. A clock set back by more than a second makes counts begin anew: nobody can say when they were."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._kept: dict[str, Kept] = {}
        self._base: float | None = None

    def get(self, agent: str) -> Kept | None:
        """What is kept of an agent, as it was at its last event."""
        return self._kept.get(agent)

    def at(self, agent: str, now: float) -> Kept:
        """What is kept of an agent that something happened to. `now` in seconds."""
        if self._base is None or now < self._base:
            self._base, self._kept = now - 10 * _BACK, {}
        kept = self._kept.get(agent) or self._new(agent)
        numbers, ticks = kept.numbers, int((now - self._base) * self._layout.per_second + 0.5) + 1
        time, last = ticks - numbers[_HALVES] * _HALF, numbers[_NOW]
        if time < last:
            if last - time > _BACK * self._layout.per_second:
                kept = self._new(agent)
                numbers, last = kept.numbers, ticks
            time = last
        numbers[_NOW] = time if time < 2 * _HALF else self._shifted(numbers, time)
        return kept

    def forget(self, agent: str) -> None:
        """Begin anew with an agent."""
        self._kept.pop(agent, None)

    def _new(self, agent: str) -> Kept:
        layout = self._layout
        kept = Kept(array("I", bytes(4 * (layout.times + layout.words))), bytearray(layout.ids * _ID * _PRIOR))
        self._kept[agent] = kept
        return kept

    def _shifted(self, numbers: Numbers, time: int) -> int:
        """Take whole halves off all times; what would then be before the beginning is older than any window."""
        halves = time // _HALF - 1
        for at in range(self._layout.times):
            numbers[at] = max(0, numbers[at] - halves * _HALF)
        numbers[_HALVES] += halves
        return time - halves * _HALF


def hashed(what: object) -> int:
    """The word for something that is told apart from others."""
    return hash(what) & 0xFFFF_FFFF or 1  # 0 is none
