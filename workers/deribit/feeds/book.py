"""The book of one channel: the chain of change ids, the levels, and what to publish for each frame. No I/O, no clock.

Facts (order-book semantics of Deribit's full book channels): a subscription begins with a snapshot, each later
change names the change_id before it *in this channel*; ids of one book may jump. There is no checksum.
"""

from msgspec import UNSET, UnsetType

from collector.channels import Channel
from collector.messages import EXCHANGE
from workers.deribit.feeds.feed import Feed
from workers.deribit.feeds.frames import MS, Change, read_book, read_window
from workers.deribit.publishing.payloads import Book
from workers.deribit.publishing.streams import Message, Published, Topics

Levels = dict[float, float]
Side = list[tuple[float, float]]


def set_levels(levels: Levels, changes: list[Change]) -> Side:
    """On the path of every message."""
    side: Side = []
    for action, price, amount in changes:
        if amount and action != "delete":
            levels[price] = amount
            side.append((price, amount))
        else:
            levels.pop(price, None)
            side.append((price, 0.0))
    return side


class SnapshotFeed(Feed):
    """A book of either kind: after each loss it waits for a snapshot, which says what it is for."""

    is_complete = False
    _reason = "subscribe"  # what the next snapshot is for

    def lose(self, reason: str, now: int) -> None:
        """The connection is gone, or the channel was left for a resync: the next snapshot is for what follows."""
        super().lose(reason, now)
        self.is_complete = self.changed = False
        self.stream.current = None
        self._reason = "resync" if reason == "sequence" else "subscribe"


class BookFeed(SnapshotFeed):
    """A full book: checks the chain of change ids and keeps the levels. Deltas are taken only while `is_complete`."""

    _exchange_ts = 0

    def __init__(self, channel: Channel, topics: Topics) -> None:
        super().__init__(channel, topics)
        self.bids: Levels = {}
        self.asks: Levels = {}
        self.stream.describe = self._build_snapshot

    def _build_snapshot(self) -> Message | None:
        """The whole book now, best levels first."""
        if not self.is_complete:
            return None
        stream = self.stream
        bids, asks = sorted(self.bids.items(), reverse=True), sorted(self.asks.items())
        return Book(
            EXCHANGE, stream.instrument, stream.epoch, 0, self._exchange_ts, stream.last_ts,
            "snapshot", stream.last_id, bids, asks, reason="subscribe",
        )  # fmt: skip

    def take(self, frame: bytes, receive_ts: int) -> Published:
        """A snapshot, a delta, a gap where the chain is broken, or nothing while a snapshot is awaited."""
        data = read_book(frame)
        stream = self.stream
        change_id, previous = data.change_id, data.prev_change_id
        reason: str | UnsetType
        # Frames of 2019 and older bear no type: there a snapshot is what has no previous id.
        if data.type == "snapshot" or (data.type is None and not previous):
            kind, previous, reason = "snapshot", None, "exchange" if self.is_complete else self._reason
            self.bids, self.asks = {}, {}
            if not self.is_complete:
                self.is_complete = self.changed = True
        elif not self.is_complete:
            self.dropped += 1
            return []
        elif previous != stream.last_id or not previous:
            return self._break(change_id, receive_ts)
        else:
            kind, reason = "delta", UNSET
        stream.last_id = change_id
        self._exchange_ts = exchange_ts = data.timestamp * MS
        bids = set_levels(self.bids, data.bids) if data.bids else []
        asks = set_levels(self.asks, data.asks) if data.asks else []
        message = Book(
            EXCHANGE, stream.instrument, stream.epoch, 0, exchange_ts, receive_ts,
            kind, change_id, bids, asks, UNSET if previous is None else previous, reason,
        )  # fmt: skip
        return [(stream, message)]

    def _break(self, change_id: int, receive_ts: int) -> Published:
        self._reason = "resync"
        self.is_complete, self.changed = False, True
        gap = self.stream.lose("sequence", self.topics, receive_ts)
        if gap is None:
            return []
        gap.next_change_id = change_id
        self.stream.due, self.stream.gap = None, gap
        return [(self.stream, gap)]

    def skip(self, frame: bytes, now: int) -> None:
        """A frame could not be read: what it changed would stay wrong, so a snapshot is asked for."""
        if self.is_complete:
            self.lose("sequence", now)
            self.changed = True


class WindowFeed(SnapshotFeed):
    """A grouped book: each frame is the whole window, so each is a snapshot; a lost frame can not be seen."""

    def take(self, frame: bytes, receive_ts: int) -> Published:
        """One snapshot."""
        data = read_window(frame)
        stream = self.stream
        stream.last_id = data.change_id
        message = Book(
            EXCHANGE, stream.instrument, stream.epoch, 0, data.timestamp * MS, receive_ts,
            "snapshot", data.change_id, data.bids, data.asks, UNSET, self._reason,
        )  # fmt: skip
        self._reason = "exchange"
        if not self.is_complete:
            self.is_complete = self.changed = True
        stream.current = message
        return [(stream, message)]

    def skip(self, frame: bytes, now: int) -> None:
        """A frame could not be read: the next window comes by itself."""
        super().skip(frame, now)
        if self.is_complete:
            self._reason = "resync"
