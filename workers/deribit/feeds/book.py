"""The book of one channel: the chain of change ids, the levels, and what to publish for each frame. No I/O, no clock.

Facts (order-book semantics of Deribit's full book channels): a subscription begins with a snapshot, each later
change names the change_id before it *in this channel*; ids of one book may jump. There is no checksum.
"""

from msgspec import UNSET, UnsetType

from collector.channels import Channel
from collector.lifecycle import BOOK, Machine
from collector.messages import EXCHANGE
from workers.deribit.feeds.feed import Feed
from workers.deribit.feeds.frames import MS, read_book, read_window
from workers.deribit.publishing.payloads import Book
from workers.deribit.publishing.streams import Message, Published, Topics

Levels = dict[float, float]


class BookState:
    """Amounts by price on each side."""

    def __init__(self) -> None:
        self.machine = Machine(BOOK, "awaiting")
        self.bids: Levels = {}
        self.asks: Levels = {}
        self.change_id = 0
        self.exchange_ts = 0
        self.crossed = 0
        self.emptied = 0
        self._reason = "subscribe"
        self._bid_bound = 0.0
        self._ask_bound = 0.0

    def await_snapshot(self, reason: str, event: str) -> None:
        """The next snapshot will be for `reason` (subscribe or resync); until then deltas are dropped."""
        self._reason = reason
        self.machine.apply(event)

    def replace(self, bids: list[tuple[float, float]], asks: list[tuple[float, float]], change_id: int) -> str:
        """Take a snapshot. Returns its reason: `exchange` if nobody asked for it."""
        reason = self._reason if self.machine.state == "awaiting" else "exchange"
        self.machine.apply("snapshot")
        self.bids = {price: amount for price, amount in bids if amount}
        self.asks = {price: amount for price, amount in asks if amount}
        self.change_id = change_id
        self._find_best()
        return reason

    def apply(self, bids: list[tuple[float, float]], asks: list[tuple[float, float]], change_id: int) -> None:
        """Take a delta whose prev_change_id was ours. Crossed and emptied books are counted, not mended."""
        levels, bound = self.bids, self._bid_bound
        for price, amount in bids:
            if amount:
                levels[price] = amount
                if price > bound:
                    self._bid_bound = bound = price
            else:
                levels.pop(price, None)
        levels, bound = self.asks, self._ask_bound
        for price, amount in asks:
            if amount:
                levels[price] = amount
                if price < bound:
                    self._ask_bound = bound = price
            else:
                levels.pop(price, None)
        self.change_id = change_id
        # The two bounds enclose the best prices from outside, at no cost; only when they meet is it worth looking.
        if self._bid_bound >= self._ask_bound:
            self._find_best()
            self.crossed += self._bid_bound >= self._ask_bound
        if not (self.bids and self.asks):
            self.emptied += bool(bids and not self.bids) + bool(asks and not self.asks)

    def build_snapshot(self, instrument: str, epoch: int, receive_ts: int, reason: str) -> Book:
        """The whole book now, best levels first, as a message."""
        bids, asks = sorted(self.bids.items(), reverse=True), sorted(self.asks.items())
        return Book(
            EXCHANGE, instrument, epoch, 0, self.exchange_ts, receive_ts,
            "snapshot", self.change_id, bids, asks, reason=reason,
        )  # fmt: skip

    def _find_best(self) -> None:
        self._bid_bound = max(self.bids, default=float("-inf"))
        self._ask_bound = min(self.asks, default=float("inf"))


class BookFeed(Feed):
    """A full book: checks the chain of change ids and keeps the levels."""

    is_complete = False

    def __init__(self, channel: Channel, topics: Topics) -> None:
        super().__init__(channel, topics)
        self.book = BookState()
        self.stream.describe = self._build_snapshot

    def _build_snapshot(self) -> Message | None:
        if not self.is_complete:
            return None
        return self.book.build_snapshot(self.stream.instrument, self.epoch, self.stream.last_ts, "subscribe")

    def take(self, frame: bytes, receive_ts: int) -> Published:
        """A snapshot, a delta, a gap where the chain is broken, or nothing while a snapshot is awaited."""
        data = read_book(frame)
        book, stream = self.book, self.stream
        bids = [(price, 0.0 if action == "delete" else amount) for action, price, amount in data.bids]
        asks = [(price, 0.0 if action == "delete" else amount) for action, price, amount in data.asks]
        change_id = data.change_id
        previous = data.prev_change_id
        # Frames of 2019 and older bear no type: there a snapshot is what has no previous id.
        if data.type == "snapshot" or (data.type is None and not previous):
            reason: str | UnsetType = book.replace(bids, asks, change_id)
            kind, previous = "snapshot", None
            if not self.is_complete:
                self.is_complete = self.changed = True
        elif not self.is_complete:
            self.dropped += 1
            return []
        elif previous != book.change_id or not previous:
            return self._break(change_id, receive_ts)
        else:
            book.apply(bids, asks, change_id)
            self.crossed, self.emptied = book.crossed, book.emptied
            kind, reason = "delta", UNSET
        stream.last_id = change_id
        book.exchange_ts = exchange_ts = data.timestamp * MS
        message = Book(
            EXCHANGE, stream.instrument, self.epoch, 0, exchange_ts, receive_ts,
            kind, change_id, bids, asks, UNSET if previous is None else previous, reason,
        )  # fmt: skip
        return [(stream, message)]

    def _break(self, change_id: int, receive_ts: int) -> Published:
        self.book.await_snapshot("resync", "broken")
        self.is_complete, self.changed = False, True
        gap = self.stream.lose("sequence", self.topics, receive_ts)
        if gap is None:
            return []
        gap.next_change_id = change_id
        self.stream.due, self.stream.gap = None, gap
        return [(self.stream, gap)]

    def lose(self, reason: str, now: int) -> None:
        """The connection is gone: the next snapshot is for a new subscription."""
        super().lose(reason, now)
        self.is_complete = self.changed = False
        self.book.await_snapshot("subscribe", "lost")


class WindowFeed(Feed):
    """A grouped book: each frame is the whole window, so each is a snapshot; a lost frame can not be seen."""

    _reason = "subscribe"

    def take(self, frame: bytes, receive_ts: int) -> Published:
        """One snapshot."""
        data = read_window(frame)
        stream = self.stream
        stream.last_id = data.change_id
        message = Book(
            EXCHANGE, stream.instrument, self.epoch, 0, data.timestamp * MS, receive_ts,
            "snapshot", data.change_id, data.bids, data.asks, UNSET, self._reason,
        )  # fmt: skip
        self._reason = "exchange"
        stream.current = message
        return [(stream, message)]

    def lose(self, reason: str, now: int) -> None:
        """The connection is gone: the next window is for a new subscription."""
        super().lose(reason, now)
        self._reason = "subscribe"
