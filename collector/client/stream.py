"""What a reader of the wire gets: messages, and losses on the way to this reader. No I/O, no clock.

What comes in is hostile until `read_message` has taken it: bounded in size, of the right shape, its topic and
payload saying the same.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from collector.messages import Topic, decode, parse_topic
from collector.schema import ENVELOPE, SCHEMA, find_faults
from collector.words import say_count

MAX_PAYLOAD = 32 << 20
"""Bytes of one payload; a larger one is malformed."""

MAX_TOPICS = 200_000
"""Topics that one reader follows: with one more, the one that spoke longest ago is forgotten."""

ON_DATA_TOPICS = frozenset({"gap", "repair", "status"})
"""Types that also stand on the topics of other types, in order with the data."""

ANSWERED_WITHIN = 10_000_000_000
"""Time (ns) after a subscription in which a topic that there was before may be heard amid its numbers: each publisher
has many to answer for, and the first data may overtake the answer."""

_NO_DATA = frozenset({"status", "repair", "heartbeat"})
"""Types that are neither data nor say where data are missing."""


class Message(Mapping[str, Any]):
    """One message: the keys of the envelope as attributes, every key by `message["price"]` or `message.get("iv")`.

    `topic` is a named tuple (exchange, type, instrument, interval). `type` is the payload's own: on a `trade` topic
    it may also be gap, repair or status. `epoch` is since when (ns) its sender feeds the topic, `seq` the number in
    that epoch, `exchange_ts` and `receive_ts` are ns since 1970 UTC, `is_join` marks a repeat for a late subscriber.
    """

    __slots__ = (
        "epoch", "exchange_ts", "instrument", "interval", "is_join", "payload", "receive_ts", "seq", "topic", "type"
    )  # fmt: skip

    def __init__(self, topic: Topic, payload: dict[str, Any]) -> None:
        self.topic = topic
        self.payload = payload
        self.instrument = topic.instrument
        self.interval = topic.interval
        self.type: str = payload["type"]
        self.epoch: int = payload["epoch"]
        self.seq: int = payload["seq"]
        self.exchange_ts: int = payload["exchange_ts"]
        self.receive_ts: int = payload["receive_ts"]
        self.is_join = "join" in payload

    def __getitem__(self, key: str) -> Any:
        return self.payload[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.payload)

    def __len__(self) -> int:
        return len(self.payload)

    def __repr__(self) -> str:
        return f"Message({str(self.topic)!r}, {self.payload!r})"


class Loss(NamedTuple):
    """What this reader could not have, and no `gap` message tells of. But for `anew` nobody else may have lost it.

    `reason`: `sequence` (messages `first` to `last` of the topic were dropped on the way), `anew` (its data go on in
    another epoch, and no gap says what is missing between: the collector was started anew, or the topic was left and
    taken up again), `repeated` (a number came again), `epoch` (a message of an earlier epoch), `malformed` (a message
    that cannot be read; `detail` says why, and `topic` is None if even that could not be read).
    """

    topic: Topic | None
    reason: str
    epoch: int = 0
    first: int = 0
    last: int = 0
    detail: str = ""

    def __str__(self) -> str:
        if self.reason == "sequence":
            which = (
                f"message {self.first} was" if self.first == self.last else f"messages {self.first} to {self.last} were"
            )
            return f"{self.topic}: {which} lost on the way to this subscriber"
        return f"{self.topic or 'unknown topic'}: {self.reason}: {self.detail}"


class LossError(Exception):
    """Raised by a Subscriber that was not told to report losses; the next call goes on behind it."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(str(loss))
        self.loss = loss


def read_message(*frames: bytes) -> Message:
    """Read one message, with all that its type promises (of one that came later than this program, its envelope).

    Raises ValueError, in one line, for frames that are none.
    """
    message = read_envelope(*frames)
    faults = find_faults(message.payload, SCHEMA.get(message.type, {}))
    if faults:
        raise ValueError("; ".join(faults))
    return message


def read_envelope(*frames: bytes) -> Message:
    """Read a message, topic and payload, whose further keys are not looked at. Raises ValueError."""
    if len(frames) != 2:
        raise ValueError(f"{say_count(len(frames), 'frame')} instead of topic and payload")
    topic, payload = frames
    parsed = read_topic(topic)
    body = decode(payload, MAX_PAYLOAD)
    if not isinstance(body, dict):
        raise ValueError(f"the payload is a {type(body).__name__}, not a map")
    faults = find_faults(body, ENVELOPE)
    if faults:
        raise ValueError("; ".join(faults))
    if body["type"] != parsed.type and body["type"] not in ON_DATA_TOPICS:
        raise ValueError(f"type {body['type']!r:.60} on a topic of {parsed.type}")
    if body["exchange"] != parsed.exchange or body["instrument"] != parsed.instrument:
        raise ValueError(f"the payload is of {body['exchange']!r:.60} {body['instrument']!r:.60}, the topic is not")
    return Message(parsed, body)


def describe_malformed(topic: bytes, error: ValueError) -> Loss:
    """The loss of a message that read_message refused."""
    try:
        parsed = read_topic(topic)
    except ValueError:
        parsed = None
    return Loss(parsed, "malformed", detail=str(error))


@lru_cache(maxsize=65536)
def read_topic(topic: bytes) -> Topic:
    """Read a topic frame. Raises ValueError if it is no topic."""
    try:
        return parse_topic(topic[:1000].decode())
    except UnicodeDecodeError:
        raise ValueError(f"not a topic: {topic[:100]!r}") from None


class SequenceCheck:
    """Follows the numbers of each topic. In a greater epoch they start again with 1.

    Given the reader's clock (ns), and told by `note_asked` when more is subscribed to, it knows which topics are new
    long after that: these begin with 1, or with a join.
    """

    def __init__(self, read_clock: Callable[[], int] = lambda: 0) -> None:
        self._read_clock = read_clock
        self._asked_at = 0
        # The epoch and number of each topic's last message, and the epoch of its last data or gap (0: there were none).
        self._last: OrderedDict[Topic, tuple[int, int, int]] = OrderedDict()  # who spoke longest ago comes first

    def follow(self, message: Message) -> Loss | None:
        """Take the next message of a topic; return what is wrong with its number, if anything."""
        topic, epoch, seq = message.topic, message.epoch, message.seq
        if topic not in self._last:
            self._start(topic, epoch, seq, epoch if message.type not in _NO_DATA else 0)
            return Loss(topic, "sequence", epoch, 1, seq - 1) if self._is_begun_late(message) else None
        self._last.move_to_end(topic)
        last_epoch, last, told = self._last[topic]
        if epoch < last_epoch:
            return Loss(topic, "epoch", epoch, detail=f"{epoch} after {last_epoch}: two have published this topic")
        if epoch > last_epoch:
            last = 0
        if not message.is_join and seq <= last:
            return Loss(topic, "repeated", epoch, seq, seq, f"seq {seq} after {last}")
        missed_to = seq if message.is_join else seq - 1  # a join says the last number used, and takes none
        self._last[topic] = (epoch, max(last, seq), told if message.type in _NO_DATA else epoch)
        return Loss(topic, "sequence", epoch, last + 1, missed_to) if missed_to > last else None

    def note_asked(self) -> None:
        """What is said up to ANSWERED_WITHIN from now may be heard amid its numbers."""
        self._asked_at = self._read_clock()

    def is_anew(self, message: Message) -> bool:
        """Whether it is the first data of a greater epoch, and no gap has said what is missing before them."""
        last = self._last.get(message.topic)
        return last is not None and 0 < last[2] < message.epoch and message.type not in (*_NO_DATA, "gap")

    def is_outdated(self, message: Message) -> bool:
        """Whether it is of an earlier epoch, and no data: a last word of who fed the topic before, which came late.

        Nothing is lost by it: that a newer epoch has begun tells all that it could.
        """
        last = self._last.get(message.topic)
        return last is not None and message.type in ON_DATA_TOPICS and message.epoch < last[0]

    def forget_all_but(self, kept: Iterable[str]) -> list[Topic]:
        """Forget, and return, the topics that begin as none of these prefixes: they are read no more."""
        gone = [topic for topic in self._last if not str(topic).startswith(tuple(kept))]
        for topic in gone:
            del self._last[topic]
        return gone

    def _is_begun_late(self, message: Message) -> bool:
        """Whether what came before the first message of a topic was dropped on the way.

        Heartbeats, and what was left, are not said again to late subscribers; a connection says its first states before
        anybody can hear it. By both clocks: they may be those of two machines.
        """
        is_last = message.type == "status" and message.payload.get("state") in ("closed", "expired")
        begins = message.seq <= 1 or message.is_join or is_last or message.topic.type in ("heartbeat", "status")
        return not begins and min(message.receive_ts, self._read_clock()) > self._asked_at + ANSWERED_WITHIN

    def _start(self, topic: Topic, epoch: int, seq: int, told: int) -> None:
        if len(self._last) >= MAX_TOPICS:
            self._last.popitem(last=False)
            self._read_clock = lambda: 0  # it may come again, amid its numbers
        self._last[topic] = (epoch, seq, told)
