"""One topic each: its sequence, what was last said on it, and the gap that is due before its next data."""

import math
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from typing import Any

from collector.channels import guess_expiry
from collector.messages import EXCHANGE, Topic, is_topic_part, parse_topic
from workers.deribit.publishing.ledger import (
    EPOCH,
    HAS_ENDED,
    LAST_TS,
    MAX_NAMES,
    NEWEST,
    OUT,
    UNHEALED,
    Entry,
    Ledger,
)
from workers.deribit.publishing.payloads import Book, Gap, Payload, Status
from workers.deribit.publishing.pub import Route

Message = Payload | dict[str, Any]


MAX_TOPICS = MAX_NAMES // 2
"""Topics of one connection: each has a place in the ledger, and so has its channel. An exchange that invents
instruments must not eat the memory, and no topic may be left without its gap after a restart."""

ANY_ID = (1 << 63) - 1
"""No trade_seq is higher."""

DAY = 86_400 * 1_000_000_000

SURE = 5.0
"""Seconds after which what was published is taken to have left this process, should it be killed."""

LONG_LEFT = DAY
"""Time (ns) after which nothing speaks of a topic that was left: no fetch by time goes so far back. How far it does
depends on how far our clock is off."""

SLICE = 1000
"""Topics that are forgotten in one go: some 3 ms."""

REPEATS = 100
"""Trades of an earlier life that are said again after it was killed: it may have taken them along unsent."""


class Malformed(ValueError):
    """A frame, or a part of one, that is not what its channel carries."""


class Stream(Route):
    """The state of one topic.

    `lost` holds from a loss to the next data. `due` is the gap that is still to be published before that data;
    `gap` is the last one published in this epoch and `status` the last status; `describe()` builds the full message
    that a late subscriber needs, where there is one; `last_ts` is the receive_ts of the last data (0: none yet) and
    `last_id` its change_id or trade_seq; `reached` the last trade_seq of an earlier life; `left_at` the last one said
    before the topic was left, which no later fetch may say again; `expiry` is when its instrument ends by its name (ns,
    None if it does not); `slot` is its place in the ledger; `left_since` is when the last one who asked for it gave it
    up (ns, monotonic: our clock may be set; 0: it is asked for).
    """

    __slots__ = (
        "answered", "current", "describe", "due", "epoch", "expiry", "gap", "instrument",
        "interval", "last_id", "last_ts", "left_at", "left_since", "lost", "reached", "seq", "slot", "status", "type",
    )  # fmt: skip

    def __init__(self, kind: str, instrument: str, interval: str, epoch: int) -> None:
        if not (is_topic_part(instrument) and is_topic_part(interval)):
            raise Malformed(f"{instrument[:80]!r} cannot stand in a topic")
        super().__init__(str(Topic(EXCHANGE, kind, instrument, interval)).encode())
        self.type = kind
        self.instrument = instrument
        self.interval = interval
        self.expiry = guess_expiry(instrument)
        self.epoch = epoch
        self.seq = 0
        self.last_ts = 0
        self.last_id = 0
        self.reached = 0
        self.left_at = 0
        self.left_since = 0
        self.lost = False
        self.slot = 0
        self.due: Gap | None = None
        self.gap: Gap | None = None
        self.status: Status | None = None
        self.current: Message | None = None
        self.describe: Callable[[], Message | None] = self._give_current
        self.answered = -math.inf

    def _give_current(self) -> Message | None:
        return self.current

    def reset(self, now: int) -> None:
        """Nobody asks for this topic any more, and late subscribers are told nothing of it: another connection may feed
        it by now.
        """
        self.left_since = now
        self.gap, self.status, self.describe = None, None, self._give_current
        self.lost, self.due, self.current = False, None, None
        self.left_at = max(self.left_at, self.last_id)
        self.last_ts, self.last_id, self.reached = 0, 0, 0

    def build_envelope(self, receive_ts: int, exchange_ts: int = 0) -> dict[str, Any]:
        """The keys that every payload has, for one that is a map; the publisher counts `seq`."""
        return {
            "type": self.type,
            "exchange": EXCHANGE,
            "instrument": self.instrument,
            "epoch": self.epoch,
            "seq": 0,
            "exchange_ts": exchange_ts,
            "receive_ts": receive_ts,
        }

    @property
    def is_over(self) -> bool:
        """Whether it was said last that its instrument has ended: nothing follows that."""
        return self.status is not None and self.status.state == "expired"

    @property
    def awaits_end(self) -> bool:
        """Whether its end, once that has come, will be said: of trades alone, and once what was lost is fetched."""
        return self.type == "trade" and self.status is not None and not self.is_over

    def has_expired(self, now: int) -> bool:
        """Whether the life of its instrument is over at `now` (ns), by its name alone."""
        return self.expiry is not None and self.expiry < now

    def is_old(self, now: int, clock: int) -> bool:
        """Whether nobody has asked for it since LONG_LEFT (`now` is monotonic, ns): who asks for others and others must
        not use up the places of all. Or, while none has left it, whether its instrument expired a day ago (`clock` is
        the exchange's, ns), unless that is still to be said: what was lost of its trades may not be fetched yet.
        """
        if self.left_since:
            return self.left_since < now - LONG_LEFT
        return self.has_expired(clock - DAY) and not self.awaits_end

    def lose(self, reason: str, topics: "Topics", now: int) -> Gap | None:
        """Note a loss. Returns its gap, or None where nothing was yet to lose or the last loss had no data after it."""
        if self.lost or not self.last_ts:
            return None
        self.lost = True
        self.due = Gap(EXCHANGE, self.instrument, self.epoch, 0, 0, now, topics.number_gap(), reason, self.last_ts, now)
        self.due.end(now)
        if self.type == "book":
            self.due.last_change_id = self.last_id
        elif self.type == "trade":
            self.due.missing_from = self.last_id + 1
            self.due.healing = True
        return self.due

    def take_due(self, now: int) -> Gap | None:
        """The gap that is due, if there is one: it is to be published now."""
        self.lost = False
        gap, self.due = self.due, None
        if gap is not None:
            gap.end(now)
            self.gap = gap
        return gap

    def resume(self, message: Message, receive_ts: int) -> Gap | None:
        """Data comes again with `message`. Returns the gap that must be published before it, if one is due."""
        gap = self.take_due(receive_ts)
        if gap is not None and isinstance(message, Book):
            gap.next_change_id = message.change_id
        return gap


class Topics:
    """All streams of one life, by topic. `epoch` is that of what this life has had from its start. `gaps` counts the
    gaps that were found, `repaired` and `missing` the trades of all repairs.

    What is made later has the epoch that was begun last (see begin_epoch), and a topic that is left and taken up again
    has a new stream: by then another connection, which began later than this one, may have fed it.
    """

    def __init__(self, epoch: int, ledger: Ledger) -> None:
        self.epoch = epoch
        self.ledger = ledger
        self.gaps = self.repaired = self.missing = 0
        self._latest = epoch
        self._streams: dict[tuple[str, str, str], Stream] = {}
        self._left: set[Stream] = set()

    def begin_epoch(self, epoch: int) -> None:
        """What is made from now on has this epoch at least. The supervisor's is newer than all that anybody said."""
        self._latest = max(self._latest, epoch)

    def find(self, kind: str, instrument: str, interval: str) -> Stream:
        """The stream of a topic, made at need. Raises Malformed for what cannot stand in a topic."""
        key = (kind, instrument, interval)
        stream = self._streams.get(key)
        if stream is None:
            if len(self._streams) >= MAX_TOPICS:
                raise Malformed(f"more than {MAX_TOPICS} topics on one connection")
            stream = self._streams[key] = Stream(kind, instrument, interval, self._latest)
            stream.slot = self.ledger.find_slot(stream.topic.decode())
            self.ledger.cells[stream.slot + EPOCH] = stream.epoch
        elif stream.left_since:
            stream = self._streams[key] = self._succeed(stream)
        return stream

    def _succeed(self, left: Stream) -> Stream:
        """The stream of a topic that is taken up again. What the one before has said may wait still to be numbered."""
        stream = Stream(left.type, left.instrument, left.interval, max(self._latest, left.epoch + 1))
        stream.left_at = left.left_at
        stream.slot, left.slot = left.slot, 0
        self.ledger.clear(stream.slot)
        self.ledger.cells[stream.slot + EPOCH] = stream.epoch
        left.left_since = 0
        return stream

    def recall(self) -> dict[Stream, int]:
        """The streams of which an earlier life had carried data, with the epoch that each had there; those that it left
        as ended have no `last_ts`.
        """
        recalled = {}
        earlier, self.ledger.earlier = self.ledger.earlier, []  # asked for once, and a seventh of what topics take
        for entry in earlier:
            try:
                topic = parse_topic(entry.topic)
            except ValueError:  # the life before was killed while it wrote this
                continue
            stream = self.find(topic.type, topic.instrument, topic.interval)
            recalled[stream] = entry.epoch
            if entry.last_ts == HAS_ENDED:
                continue
            stream.last_ts, stream.last_id = entry.last_ts, entry.last_id
            if topic.type == "trade":
                self._wind_back(stream, entry)
        return recalled

    def _wind_back(self, stream: Stream, entry: Entry) -> None:
        """Trades from a little before the last one are said again, unless they are surely out: the earlier life may
        have taken them along. So may the next one what this one is to say again.
        """
        is_out = not entry.unhealed and self.ledger.cells[OUT] - entry.last_ts > SURE * 1e9
        repeat_from = entry.last_id + 1 - (0 if is_out else REPEATS)
        stream.last_id = max(1, entry.first_id, min(repeat_from, entry.unhealed or repeat_from)) - 1
        stream.reached = entry.last_id
        if not is_out:
            self.ledger.lower(stream.slot, UNHEALED, stream.last_id + 1)
        if entry.begun >= max(1, repeat_from):  # that the exchange counts anew must be found, and told, again
            stream.reached, self.ledger.cells[stream.slot + NEWEST] = ANY_ID, entry.before

    def forget_old(self, now: int, clock: int, kept: Collection[Stream]) -> list[Stream]:
        """Drop, and return, the streams that are old, but for those that are kept: SLICE at most, since thousands may
        have been left together. `now` is monotonic, `clock` the exchange's (ns).
        """
        found = (each for each in self._streams.items() if each[1].is_old(now, clock) and each[1] not in kept)
        old = list(islice(found, SLICE))
        for key, stream in old:
            del self._streams[key]
            self.ledger.free_slot(stream.topic.decode())
            # Whoever holds it still must not write into another's place, nor say a last word beside its successor.
            stream.slot = stream.left_since = 0
        if old:  # one that is spoken of once more counts anew
            self.begin_epoch(max(stream.epoch for _, stream in old) + 1)
        return [stream for _, stream in old]

    def leave(self, stream: Stream, now: int, is_over: bool = False) -> None:
        """Nobody asks for a topic any more (`now` in ns, monotonic): this life does not go on from what was said.

        A later one is told of it, and whether its instrument has ended (`is_over`), for some seconds more: this one may
        be killed and take its last word along.
        """
        stream.reset(now)
        if is_over:
            self.ledger.cells[stream.slot + LAST_TS] = HAS_ENDED
        self._left.add(stream)

    def go_back(self, stream: Stream, epoch: int) -> None:
        """What is said of a topic that had this epoch in an earlier life, and for which nobody asks, is older than what
        others may say by now.
        """
        stream.epoch = self.ledger.cells[stream.slot + EPOCH] = epoch + 1

    def forget_left(self, now: int) -> None:
        """Let a later life know nothing of the topics whose last word is surely out (`now` is monotonic)."""
        for stream in [stream for stream in self._left if now - stream.left_since > SURE * 1e9]:
            self._left.remove(stream)
            self.ledger.clear(stream.slot)

    def number_gap(self) -> int:
        """The id of the next gap."""
        self.gaps += 1
        return self.gaps

    def match(self, prefix: bytes) -> Iterator[Stream]:
        """The streams that have said something and whose topic begins so."""
        return (s for s in self._streams.values() if s.seq and s.topic.startswith(prefix))


Published = list[tuple[Stream, Message]]
"""What one frame gave, in order."""
