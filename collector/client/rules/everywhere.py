"""The rules of every topic: what may be repeated, the clocks, gaps, states."""

from collections.abc import Iterator

from collector.client.rules.check import AHEAD, SECOND, Check, Fault, Now
from collector.client.stream import ON_DATA_TOPICS, Message
from collector.lifecycle import CONNECTION

CHANNEL_STATES = frozenset({"live", "recovering", "stale", "refused", "expired", "closed"})
CONNECTION_STATES = frozenset(CONNECTION.values())

_NEVER_JOIN = frozenset({"trade", "repair", "heartbeat"})
_PAST = 1_000_000_000 * SECOND
_DAY = 86_400 * SECOND


class Joins(Check):
    """Whether a join is marked on a message that may be repeated, and repeats it. Of books, Chain looks at that."""

    rules = ("join",)

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, Message] = {}

    def check(self, message: Message, now: Now) -> Iterator[Fault]:
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
    """The clock of what was read and the clock of what the collector itself says, each for itself.

    Both are the clock of this host, as ours is: where it is set back, they may fall as far.
    """

    rules = ("time",)

    def __init__(self) -> None:
        super().__init__()
        self._last = {"read": 0, "said": 0}
        self._ahead = -(1 << 63)  # our clock less the steady one, at its highest

    def check(self, message: Message, now: Now) -> Iterator[Fault]:
        ahead = now.wall - now.steady
        self._ahead = max(self._ahead, ahead)
        fallen = self._ahead - ahead
        if not _PAST < message.receive_ts <= now.wall + fallen + AHEAD:
            yield "time", f"receive_ts is {message.receive_ts}, and now it is {now.wall}"
        clock = "said" if message.type in ON_DATA_TOPICS or message.type == "heartbeat" else "read"
        if message.exchange_ts and (clock == "said" or not _PAST < message.exchange_ts < now.wall + fallen + _DAY):
            yield "time", f"exchange_ts of a {message.type} is {message.exchange_ts}"
        if message.is_join or "backfilled" in message:
            return
        behind = self._last[clock] - message.receive_ts
        if behind > fallen:
            yield "time", f"receive_ts falls by {behind / 1e6:.3f} ms"
        self._last[clock] = message.receive_ts


class Gaps(Check):
    """Gap messages: on every topic that carries data, before the first data after a loss."""

    rules = ("gap",)

    def __init__(self) -> None:
        super().__init__()
        self._epoch = self._id = self._last_ts = 0
        self._open = self._carried = self._due = False

    def check(self, message: Message, now: Now) -> Iterator[Fault]:
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
            if message["state"] in ("closed", "expired"):  # what comes after that begins anew
                self._carried = False
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
    """Words for states, and what may follow them; in a later epoch somebody has taken the topic up anew."""

    rules = ("status",)

    def __init__(self) -> None:
        super().__init__()
        self._epoch = 0
        self._expired = False

    def check(self, message: Message, now: Now) -> Iterator[Fault]:
        if message.epoch != self._epoch:
            self._epoch, self._expired = message.epoch, False
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
