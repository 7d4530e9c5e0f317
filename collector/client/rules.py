"""What is remembered of one topic, for some rules of the wire each. No I/O, no clock."""

from bisect import bisect_right
from collections.abc import Iterator

from collector.client.orderbook import Side
from collector.client.stream import ON_DATA_TOPICS, Message
from collector.lifecycle import CONNECTION
from collector.messages import WIRE

CHANNEL_STATES = frozenset({"live", "recovering", "stale", "refused", "expired", "closed"})
CONNECTION_STATES = frozenset(CONNECTION.values())

_NOT_ASKED = frozenset({"closed", "expired", "refused"})
_NEVER_JOIN = frozenset({"trade", "repair", "heartbeat"})
_SECOND = 1_000_000_000
_AHEAD = 5 * _SECOND
SILENCE = 3 * _SECOND
_PAST = 1_000_000_000 * _SECOND
_DAY = 86_400 * _SECOND
_MAX_HOLES = 200


Fault = tuple[str, str]
"""A rule and what was seen."""


class Check:
    """What is remembered of one topic for some rules."""

    rules: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.count = 0

    def check(self, message: Message, now: int) -> Iterator[Fault]:
        """Say what is wrong with the next message."""
        raise NotImplementedError

    def forget(self) -> None:
        """Messages were lost on the way to us: what they said is not known."""

    def finish(self, now: int) -> Iterator[Fault]:
        """Say what should have come by now and has not."""
        return iter(())


class Joins(Check):
    """Whether a join is marked on a message that may be repeated, and repeats it. Of books, Chain looks at that."""

    rules = ("join",)

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, Message] = {}

    def check(self, message: Message, now: int) -> Iterator[Fault]:
        if message.is_join and (message.type in _NEVER_JOIN or message.get("kind") == "delta"):
            yield "join", f"a {message.get('kind', message.type)} cannot be a join"
        elif message.type == "book":
            return
        elif message.is_join and (last := self._last.get(message.type)) and last.epoch == message.epoch:
            changed = [key for key in (*message, *last) if message.get(key) != last.get(key)]
            if changed := [key for key in changed if key not in ("seq", "join")]:
                yield "join", f"the {message.type} is not what was said last: other {', '.join(changed)[:80]}"
        else:
            self._last[message.type] = message
            if message.type == "repair":
                self._note_healed(message.get("gap"))

    def _note_healed(self, number: object) -> None:
        """From its repair on a gap is repeated as one that is not being healed any more."""
        gap = self._last.get("gap")
        if gap is not None and gap.get("id") == number:
            self._last["gap"] = Message(gap.topic, {**gap.payload, "healing": False})

    def forget(self) -> None:
        self._last = {}


class Times(Check):
    """The clock of what was read and the clock of what the collector itself says, each for itself."""

    rules = ("time",)

    def __init__(self) -> None:
        super().__init__()
        self._last = {"read": 0, "said": 0}

    def check(self, message: Message, now: int) -> Iterator[Fault]:
        if message.receive_ts > now + _AHEAD:
            yield "time", f"receive_ts is {(message.receive_ts - now) / _SECOND:.1f} s in the future"
        if message.receive_ts < message.epoch - _AHEAD:
            yield "time", f"receive_ts {message.receive_ts} is before this life began, at {message.epoch}"
        clock = "said" if message.type in ON_DATA_TOPICS or message.type == "heartbeat" else "read"
        if message.exchange_ts and (clock == "said" or not _PAST < message.exchange_ts < now + _DAY):
            yield "time", f"exchange_ts of a {message.type} is {message.exchange_ts}"
        if message.is_join or "backfilled" in message:
            return
        behind = self._last[clock] - message.receive_ts
        if behind > 0:
            yield "time", f"receive_ts falls by {behind / 1e6:.3f} ms"
        self._last[clock] = message.receive_ts


class Gaps(Check):
    """Gap messages: on every topic that carries data, before the first data after a loss."""

    rules = ("gap",)

    def __init__(self) -> None:
        super().__init__()
        self._epoch = 0
        self._id = 0
        self._open = False
        self._carried = False
        self._due = False
        self._last_ts = 0

    def check(self, message: Message, now: int) -> Iterator[Fault]:
        if message.epoch != self._epoch:
            self._epoch, self._id, self._last_ts = message.epoch, 0, 0
            self.forget()
        if message.type == "repair" or (message.type not in ON_DATA_TOPICS and not message.is_join):
            self._open = False
        if message.type == "gap":
            yield from self._take_gap(message)
        elif not message.is_join and "backfilled" not in message:
            yield from self._await_gap(message)
        if message.type not in ON_DATA_TOPICS:
            self._last_ts = max(self._last_ts, message.receive_ts)
        elif message.type == "repair" and message.topic.type != "trade":
            yield "repair", f"a repair on a topic of {message.topic.type}"

    def _await_gap(self, message: Message) -> Iterator[Fault]:
        """A lost connection is said by the state of the channel; what follows is its gap, then data."""
        if message.type == "status":
            lost = (message["state"], message.get("reason")) == ("recovering", "disconnect")
            self._due = self._carried and (self._due or lost)
        elif message.type != "repair":
            if self._due:
                yield "gap", "data after a lost connection, and no gap says so"
            self._carried, self._due = True, False

    def _take_gap(self, message: Message) -> Iterator[Fault]:
        if message.topic.type in ("status", "heartbeat"):
            yield "gap", f"a gap on a topic of {message.topic.type}"
        if message["from_ts"] > message["to_ts"]:
            yield "gap", f"from_ts {message['from_ts']} is after to_ts {message['to_ts']}"
        if self._last_ts and not 0 < message["from_ts"] <= self._last_ts:
            yield "gap", f"from_ts {message['from_ts']} is not when the last data came, {self._last_ts}"
        if message.is_join:
            self._id = max(self._id, message["id"])
            return
        if message["id"] <= self._id:
            yield "gap", f"id {message['id']} after {self._id}"
        if self._open:
            yield "gap", f"gap {message['id']} follows gap {self._id} with no data between"
        self._id, self._open, self._carried, self._due = message["id"], True, False, False

    def forget(self) -> None:
        self._open = self._carried = self._due = False


class States(Check):
    """Words for states, and what may follow them."""

    rules = ("status",)

    def __init__(self) -> None:
        super().__init__()
        self._expired = False

    def check(self, message: Message, now: int) -> Iterator[Fault]:
        if message.type not in ("status", "heartbeat"):
            if self._expired and not message.is_join and message.type not in ON_DATA_TOPICS:
                yield "status", "data after the channel has expired"
            return
        is_own = message.topic.type in ("status", "heartbeat")  # of a connection, on a topic of its own
        words = CONNECTION_STATES if is_own else CHANNEL_STATES
        if message["state"] not in words:
            yield "status", f"{message['state']!r:.60} is none of {', '.join(sorted(words))}"
        if is_own and message["connection"] != message.instrument:
            yield "status", f"connection {message['connection']!r:.60} on a topic of another"
        self._expired = message["state"] == "expired"

    def forget(self) -> None:
        self._expired = False


class Chain(Check):
    """One book: its chain of change ids and its levels."""

    rules = ("chain", "crossed")

    def __init__(self) -> None:
        super().__init__()
        self._epoch = 0
        self._change_id: int | None = None
        self._awaiting = False
        self._complete = False
        self._crossed = False
        self._left = False
        self._began: int | None = None
        self._bids, self._asks = Side(descending=True), Side(descending=False)

    def check(self, message: Message, now: int) -> Iterator[Fault]:
        if message.epoch > self._epoch and message.seq <= 1:
            self._break(awaiting=True)
        self._epoch = message.epoch
        if self._began is None:
            self._began = now
        if message.type == "gap" and not message.is_join:
            yield from self._take_gap(message)
        elif message.type == "status":
            self._left |= message["state"] in _NOT_ASKED
        elif message.type == "book" and message["kind"] == "delta":
            yield from self._take_delta(message)
        elif message.type == "book":
            yield from self._take_snapshot(message)

    def finish(self, now: int) -> Iterator[Fault]:
        if self._began and self._change_id is not None and not self._complete and now - self._began > _AHEAD:
            yield "join", f"no snapshot in {(now - self._began) / _SECOND:.1f} s, only deltas"

    def forget(self) -> None:
        self._break(awaiting=False)
        self._began = 0  # the snapshot that we got may have been among them

    def _break(self, awaiting: bool) -> None:
        self._change_id, self._awaiting, self._complete = None, awaiting, False

    def _take_gap(self, message: Message) -> Iterator[Fault]:
        said = message.get("last_change_id")
        if message["reason"] != "restart" and None not in (said, self._change_id) and said != self._change_id:
            yield "chain", f"the gap says that change {said} was the last, it was {self._change_id}"
        self._break(awaiting=True)

    def _take_delta(self, message: Message) -> Iterator[Fault]:
        before = message.get("prev_change_id")
        if self._awaiting:
            yield "chain", f"delta {message['change_id']} where a snapshot was due"
            self._break(awaiting=False)
        elif before is None:
            yield "chain", f"delta {message['change_id']} does not say which change it follows"
        elif self._change_id not in (None, before):
            yield "chain", f"delta {message['change_id']} follows {before}, the last was {self._change_id}"
            self._break(awaiting=False)
        self._change_id = message["change_id"]
        if self._complete:
            self._bids.apply(message["bids"])
            self._asks.apply(message["asks"])
            yield from self._compare_best()

    def _take_snapshot(self, message: Message) -> Iterator[Fault]:
        if message.is_join and self._change_id is not None:
            yield from self._compare_join(message)
            if self._complete:
                return
        elif "reason" not in message:
            yield "schema", "a snapshot without a reason"
        elif message["reason"] != "exchange" and self._change_id is not None and not self._left:
            yield "gap", f"a snapshot for a new subscription after change {self._change_id}, and no gap before it"
        self._left = False
        self._change_id, self._awaiting, self._complete = message["change_id"], False, True
        for side, name in ((self._bids, "bids"), (self._asks, "asks")):
            side.replace(message[name])
            if side.get_levels() != [tuple(level) for level in message[name]]:
                yield "schema", f"the {name} of a snapshot are not best first, each price once, no amount 0"
        yield from self._compare_best()

    def _compare_join(self, message: Message) -> Iterator[Fault]:
        if message["change_id"] != self._change_id:
            yield "join", f"the book at change {message['change_id']}, the stream is at {self._change_id}"
        elif self._complete and any(
            side.get_levels() != [tuple(level) for level in message[name]]
            for name, side in (("bids", self._bids), ("asks", self._asks))
        ):
            yield "join", f"the book at change {self._change_id} is not what snapshot and deltas give"

    def _compare_best(self) -> Iterator[Fault]:
        bid, ask = self._bids.best_price, self._asks.best_price
        crossed = bid is not None and ask is not None and bid >= ask
        if crossed and not self._crossed:
            yield "crossed", f"bid {bid} against ask {ask} at change {self._change_id}"
        self._crossed = crossed


class Ranges:
    """A set of ints that mostly follow each other, kept as ranges."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self._starts, number) - 1
        return at >= 0 and number <= self._ends[at]

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
            first = max(first, self._ends[at] + 1)
        if first <= last:
            missing.append((first, last))
        return missing


class Hole:
    """What a gap said of trades: from which trade_seq on, up to which; None while that is not known."""

    def __init__(self, message: Message, last: int | None) -> None:
        self.first: int | None = message.get("missing_from", None if last is None else last + 1)
        self.last: int | None = message.get("missing_to")
        self.is_restart = message["reason"] == "restart"
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
        self._epoch = 0
        self._reborn = False
        self._may_fall = False
        self._first = 0
        self._last: int | None = None
        self._seen = Ranges()
        self._said = Ranges()  # in this life; of what an earlier one said some is repeated
        self._final = Ranges()
        self._holes: dict[tuple[int, int], Hole] = {}
        self._newest: int | None = None

    def check(self, message: Message, now: int) -> Iterator[Fault]:
        if message.epoch != self._epoch:
            self._epoch, self._reborn = message.epoch, self._epoch != 0
            self._said, self._final, self._newest = Ranges(), Ranges(), None
        if message.seq <= 1 or (message.type == "status" and message.is_join):
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
        self._last = self._newest = None
        self._seen, self._said, self._final = Ranges(), Ranges(), Ranges()
        self._holes = {}

    def _take_gap(self, message: Message) -> None:
        self._newest = max(self._newest or 0, message["id"])
        if not message.is_join:
            self._may_fall = "missing_from" not in message
        if message["reason"] == "restart":
            self._reborn = False  # this life knows of the one before: what it lost is announced
        if (message.epoch, message["id"]) in self._holes:
            return
        hole = Hole(message, self._last)
        for earlier in self._holes.values():
            if earlier.last is None and hole.first is not None and hole.first >= (earlier.first or 0):
                earlier.last = hole.first - 1  # what it lacks ends where the next gap begins
        self._holes[message.epoch, message["id"]] = hole
        if len(self._holes) > _MAX_HOLES:
            del self._holes[next(iter(self._holes))]

    def _take_trade(self, message: Message) -> Iterator[Fault]:
        number = message["trade_seq"]
        # A new start of the whole collector promises nothing about the time before; the exchange may count anew.
        if self._reborn or (self._may_fall and (number - 1 != self._last or number in self._seen)):
            self.forget()
        self._reborn = self._may_fall = False
        repeated, is_late = number in self._seen, "backfilled" in message
        if number in self._said or (repeated and not (is_late and self._may_repeat())):
            yield "duplicate", f"trade {number} comes again"
        elif number in self._final:
            yield "repair", f"trade {number} comes, and was said to stay missing"
        if not (repeated or (is_late and (self._last is None or number <= self._last or self._is_announced(number)))):
            yield from self._compare_number(number)
        self._seen.add(number, number)
        self._said.add(number, number)
        for hole in self._holes.values():
            hole.came += hole.epoch == message.epoch and hole.holds(number)

    def _compare_number(self, number: int) -> Iterator[Fault]:
        last = self._last
        if last is None and any(hole.is_partial and number <= (hole.last or 0) for hole in self._holes.values()):
            return  # an older one: what came after it came before we joined
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

    def _may_repeat(self) -> bool:
        """Whether an earlier life may have said what this one fetches again, or finds no more."""
        return any(hole.is_restart for hole in self._holes.values())

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
            self._final.add(first, last)
            if not self._may_repeat() and self._seen.find_missing(first, last) != [(first, last)]:
                yield "repair", f"trades {first} to {last} are said to be missing, but some have come"
        if not hole.is_partial and hole.came != message["repaired"]:
            yield "repair", f"of gap {message['gap']} {message['repaired']} are said to have come, but {hole.came} did"
        if hole.first is None or hole.last is None or hole.is_partial or self._last is None:
            return
        for first, last in self._seen.find_missing(max(hole.first, self._first), hole.last):
            if named.find_missing(first, last):
                yield "repair", f"trades {first} to {last} of gap {message['gap']} neither came nor are named"


class Heartbeats(Check):
    """The heartbeats of one connection."""

    rules = ("heartbeat",)

    def __init__(self) -> None:
        super().__init__()
        self._epoch = 0
        self._came = 0
        self._published = 0

    def check(self, message: Message, now: int) -> Iterator[Fault]:
        if message.type != "heartbeat":
            return
        if message["wire"] != WIRE:
            yield "heartbeat", f"wire {message['wire']}, this program reads {WIRE}"
        if message.epoch != self._epoch:
            self._epoch, self._published, self._came = message.epoch, 0, message.receive_ts
        if message.receive_ts - self._came > SILENCE:
            yield "heartbeat", f"none for {(message.receive_ts - self._came) / _SECOND:.1f} s"
        if message["published"] < self._published:
            yield "heartbeat", f"published falls from {self._published} to {message['published']}"
        self._came, self._published = message.receive_ts, message["published"]

    def finish(self, now: int) -> Iterator[Fault]:
        """Say whether the last one is too long ago."""
        if self._came and now - self._came > SILENCE:
            yield "heartbeat", f"none for {(now - self._came) / _SECOND:.1f} s at the end"

    def forget(self) -> None:
        self._came = 0


_EVERYWHERE: tuple[type[Check], ...] = (Joins, Times, Gaps, States)
_BY_TYPE: dict[str, tuple[type[Check], ...]] = {"book": (Chain,), "trade": (Trades,), "heartbeat": (Heartbeats,)}


def create_checks(type: str) -> list[Check]:
    """The checks for a new topic of that type."""
    return [create() for create in (*_EVERYWHERE, *_BY_TYPE.get(type, ()))]
