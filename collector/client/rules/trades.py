"""The rules of trades: none twice, none missing that no gap announces, each gap healed as it says."""

from bisect import bisect_right
from collections.abc import Iterator

from collector.client.rules.check import Check, Fault, Now
from collector.client.stream import Message

_MAX_HOLES = 200


class Ranges:
    """A set of ints that mostly follow each other, kept as ranges."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self._starts, number) - 1
        return at >= 0 and number <= self._ends[at]

    @property
    def highest(self) -> int:
        """The highest of them, of which there must be one."""
        return self._ends[-1]

    def add(self, first: int, last: int) -> None:
        """Add all numbers from first to last."""
        low = bisect_right(self._ends, first - 2)  # the first range that ends at first - 1 or later
        high = bisect_right(self._starts, last + 1)  # behind the last range that starts at last + 1 or before
        if low < high:
            first, last = min(first, self._starts[low]), max(last, self._ends[high - 1])
        self._starts[low:high] = [first]
        self._ends[low:high] = [last]

    def find_missing(self, first: int, last: int) -> list[tuple[int, int]]:
        """The parts of first to last that are not in the set."""
        missing = []
        for at in range(bisect_right(self._ends, first - 1), len(self._starts)):
            if self._starts[at] > last:
                break
            if first < self._starts[at]:
                missing.append((first, self._starts[at] - 1))
            first = self._ends[at] + 1
        if first <= last:
            missing.append((first, last))
        return missing


class Hole:
    """What a gap said of trades: from which trade_seq on, up to which; None while that is not known."""

    def __init__(self, message: Message, last: int | None) -> None:
        self.first: int | None = message.get("missing_from", None if last is None else last + 1)
        self.last: int | None = message.get("missing_to")
        self.is_healing = bool(message.get("healing"))
        self.is_partial = message.is_join  # what came of it before we joined is not known
        self.epoch = message.epoch
        self.came = 0  # trades of it, since the gap
        self.repaired = False

    def holds(self, number: int) -> bool:
        """Whether a trade_seq lies in it, as far as is known."""
        return (self.first is None or self.first <= number) and (self.last is None or number <= self.last)


class Trades(Check):
    """The trades of one topic: each once, none missing unannounced."""

    rules = ("duplicate", "hole", "repair")

    def __init__(self) -> None:
        super().__init__()
        self._epoch = self._first = self.missing = 0
        self._reborn = self._may_fall = False
        self._last: int | None = None
        self._newest: int | None = None
        self._begin_anew()

    @property
    def healing(self) -> int:
        """How many gaps have their repair still to come."""
        holes = (hole for hole in self._holes.values() if hole.epoch == self._epoch)  # of an earlier one none comes
        return sum(hole.is_healing and not hole.repaired for hole in holes)

    def check(self, message: Message, now: Now) -> Iterator[Fault]:
        if message.epoch != self._epoch:
            self._epoch, self._reborn = message.epoch, self._epoch != 0
            self._said, self._final, self._newest = Ranges(), Ranges(), None
        if message.seq <= 1 or message.is_join:
            self._newest = self._newest or 0  # had there been a gap, we would know it
        if message.type == "trade" and not message.is_join:
            yield from self._take_trade(message)
        elif message.type == "gap":
            self._take_gap(message)
        elif message.type == "repair":
            yield from self._take_repair(message)
        elif message.type == "status" and message["state"] == "closed":
            self._last = None  # what is traded until somebody asks for it again is nobody's loss

    def forget(self) -> None:
        self._newest = None
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._last = None
        self._seen, self._final = Ranges(), Ranges()
        self._said = Ranges()  # in this life: of what an earlier one said some is fetched again, or found no more
        self._holes: dict[tuple[int, int], Hole] = {}

    def _take_gap(self, message: Message) -> None:
        self._newest = max(self._newest or 0, message["id"])
        if not message.is_join:
            self._may_fall = "missing_from" not in message
        if message["reason"] == "restart":
            self._reborn = False  # this life knows of the one before: what it lost is announced
        if (message.epoch, message["id"]) in self._holes:
            return
        hole = Hole(message, self._find_highest())
        if not (message.is_join or hole.is_healing) and "missing_from" in message and hole.last is not None:
            self.missing += hole.last - message["missing_from"] + 1
        for earlier in self._holes.values():
            if earlier.last is None and hole.first is not None and hole.first >= (earlier.first or 0):
                earlier.last = hole.first - 1  # what it lacks ends where the next gap begins
        self._holes[message.epoch, message["id"]] = hole
        if len(self._holes) > _MAX_HOLES:
            del self._holes[next(iter(self._holes))]

    def _take_trade(self, message: Message) -> Iterator[Fault]:
        number = message["trade_seq"]
        # A new start of the whole collector promises nothing about the time before; the exchange may count anew.
        if self._reborn or (self._may_fall and number - 1 != self._find_highest()):
            self._begin_anew()
        self._reborn = self._may_fall = False
        repeated, is_late = number in self._seen, "backfilled" in message
        if number in self._said or (repeated and not is_late):
            yield "duplicate", f"trade {number} comes again"
        elif number in self._final:
            yield "repair", f"trade {number} comes, and was said to stay missing"
        if not (repeated or (is_late and (self._last is None or number <= self._last or self._is_announced(number)))):
            yield from self._compare_number(number)
        self._seen.add(number, number)
        self._said.add(number, number)
        for hole in self._holes.values():
            hole.came += hole.holds(number)

    def _find_highest(self) -> int | None:
        """The highest trade_seq of this count, late ones too; None if that is not known."""
        return None if self._last is None else self._seen.highest

    def _compare_number(self, number: int) -> Iterator[Fault]:
        last = self._last
        self._last = number if last is None else max(last, number)
        if last is None:
            self._first = number
        elif number < last:
            if number > self._first and not self._is_announced(number):
                yield "hole", f"trade {number} comes after {last}, and is not marked"
        else:
            for first, end in self._seen.find_missing(last + 1, number - 1):
                if not (self._is_announced(first) and self._is_announced(end)):
                    yield "hole", f"trades {first} to {end} have not come, and no gap says so"
        for hole in self._holes.values():
            if hole.last is None and (hole.first is None or hole.first <= number):
                hole.last = number - 1

    def _is_announced(self, number: int) -> bool:
        return any(hole.holds(number) for hole in self._holes.values())

    def _take_repair(self, message: Message) -> Iterator[Fault]:
        hole = self._holes.get((message.epoch, message["gap"]))
        if hole is None:
            if self._newest is not None and message["gap"] > self._newest:
                yield "repair", f"of gap {message['gap']}, which was not announced"
            return
        if hole.repaired or not hole.is_healing:
            yield "repair", f"{'a second' if hole.repaired else 'no'} repair of gap {message['gap']} was due"
        hole.repaired = True
        named = Ranges()
        for first, last in message["missing"]:
            if named.find_missing(first, last) != [(first, last)]:
                yield "repair", f"trades {first} to {last} are named twice"
            if not (hole.holds(first) and hole.holds(last)):
                yield "repair", f"trades {first} to {last} are not of gap {message['gap']}"
            named.add(first, last)
            self.missing += last - first + 1
            self._final.add(first, last)
            if self._said.find_missing(first, last) != [(first, last)]:
                yield "repair", f"trades {first} to {last} are said to be missing, but some have come"
        if not hole.is_partial and hole.came != message["repaired"]:
            yield "repair", f"of gap {message['gap']} {message['repaired']} are said to have come, but {hole.came} did"
        if hole.first is None or hole.last is None or hole.is_partial or self._last is None:
            return  # who has heard no trade of this count may have come amid the healing
        for first, last in self._seen.find_missing(max(hole.first, self._first), hole.last):
            if named.find_missing(first, last):
                yield "repair", f"trades {first} to {last} of gap {message['gap']} neither came nor are named"
