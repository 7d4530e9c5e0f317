"""The book of one topic, kept from its messages; it answers only while it is sure to be right. No I/O, no clock."""

from bisect import bisect_left, insort
from collections.abc import Iterable

from collector.client.stream import Loss, Message
from collector.messages import Topic, parse_topic

Level = tuple[float, float]
"""Price and amount."""

_NOT_FOLLOWED = frozenset({"recovering", "refused", "expired", "closed"})
"""States of a channel in which the exchange's book goes on without us, or has ended."""


_WAITING = "waiting for a snapshot (Subscriber.ask_again asks for one)"


class NotInSync(Exception):
    """The book is not known to be right just now; the text says why, and what it waits for."""


class Side:
    """One side of a book, best price first."""

    def __init__(self, descending: bool) -> None:
        self._sign = -1.0 if descending else 1.0
        self._keys: list[float] = []  # price times sign, rising
        self._amounts: dict[float, float] = {}

    def replace(self, levels: Iterable[Level]) -> None:
        """Forget all levels and take these ([price, amount])."""
        amounts = dict(levels)
        self._amounts = {price: amount for price, amount in amounts.items() if amount}
        self._keys = sorted(self._sign * price for price in self._amounts)

    def apply(self, levels: Iterable[Level]) -> None:
        """Set the amount at each price; 0 removes the level, also one that is not there."""
        for price, amount in levels:
            key = self._sign * price
            if not amount:
                if self._amounts.pop(price, None) is not None:
                    del self._keys[bisect_left(self._keys, key)]
                continue
            if price not in self._amounts:
                insort(self._keys, key)
            self._amounts[price] = amount

    def get_levels(self, depth: int | None = None) -> list[Level]:
        """The levels, best first; the first `depth` of them if given."""
        prices = (self._sign * key for key in self._keys[:depth])
        return [(price, self._amounts[price]) for price in prices]

    @property
    def best_price(self) -> float | None:
        """The best price; None if the side is empty."""
        return self._sign * self._keys[0] if self._keys else None


class OrderBook:
    """A book, from the messages of one topic (the first book message decides which, if none is given).

    Raises ValueError for a text that is no topic, such as a prefix.

    Give it everything that a Subscriber yields; it takes what belongs to its topic:

        books = collections.defaultdict(OrderBook)
        with Subscriber(prefixes=["deribit.book."], on_loss="report") as subscriber:
            for item in subscriber:
                book = books[item.topic]
                if book.apply(item) and book.in_sync:
                    print(item.topic, *book.best())

    It is in sync from a snapshot on, until a gap, a lost message or a status other than live or stale says otherwise.
    While it is not, every question raises NotInSync. `connection` feeds the topic, as its last status said: watch the
    heartbeats of that one. A book that began amid the messages of its topic, or was not given
    all of them, has to wait for a snapshot that may never come: Subscriber.ask_again(topic) has it said.
    """

    def __init__(self, topic: Topic | str | None = None) -> None:
        self.topic = parse_topic(topic) if isinstance(topic, str) else topic
        self.change_id = 0
        self.exchange_ts = 0
        self.receive_ts = 0
        self.status = "live"
        self.connection = ""
        self._bids, self._asks = Side(descending=True), Side(descending=False)
        self._epoch = self._seq = 0
        self._why = f"no snapshot has come yet; {_WAITING}"
        self._suspended = ""

    @property
    def in_sync(self) -> bool:
        """Whether questions are answered."""
        return not (self._why or self._suspended)

    def apply(self, item: Message | Loss) -> bool:
        """Take the next message, or a loss that the subscriber reports. Returns whether levels were set by it."""
        if isinstance(item, Loss):
            if item.topic == self.topic and item.reason != "epoch":
                self._break(f"messages were lost on the way to this subscriber ({item.reason})")
            return False
        if self.topic is None and item.topic.type == "book":
            self.topic = item.topic
        if item.topic != self.topic or not self._follow(item):
            return False
        if item.type == "book":
            return self._apply_snapshot(item) if item["kind"] == "snapshot" else self._apply_delta(item)
        if item.type == "gap" and not item.is_join:  # a repeat for somebody else says nothing new
            self._break(f"a gap ({item['reason']}) was announced")
        elif item.type == "status":
            self.status, self.connection = item["state"], item["connection"]
            self._suspended = f"its channel is {self.status}" if self.status in _NOT_FOLLOWED else ""
        return False

    def _follow(self, message: Message) -> bool:
        """Check epoch and seq; False for a message that is to change nothing."""
        if message.epoch < self._epoch:
            return False  # of who fed the topic before
        if message.epoch > self._epoch:
            if self._epoch:
                self._break("the worker was restarted, or another feeds the topic now")
            self._epoch, self._seq = message.epoch, message.seq
            return True
        expected = self._seq if message.is_join else self._seq + 1
        if message.seq < expected:
            return False
        if message.seq > expected:
            self._break("messages were lost on the way, or not given to this book")
        self._seq = message.seq
        return True

    def _apply_snapshot(self, message: Message) -> bool:
        if message.is_join and not self._why:
            return False  # it is what we have
        self._bids.replace(message["bids"])
        self._asks.replace(message["asks"])
        self._why = ""
        if not message.is_join:  # that may be the last one before the connection was lost
            self._suspended = ""
        self._note(message)
        return True

    def _apply_delta(self, message: Message) -> bool:
        if self._why:
            return False
        before = message.get("prev_change_id")
        if before != self.change_id:
            self._break(f"a delta follows change {before or 'unknown'}, the book is at {self.change_id}")
            return False
        self._bids.apply(message["bids"])
        self._asks.apply(message["asks"])
        self._note(message)
        return True

    def _note(self, message: Message) -> None:
        self.change_id = message["change_id"]
        self.exchange_ts, self.receive_ts = message.exchange_ts, message.receive_ts

    def _break(self, why: str) -> None:
        self._why = f"{why}; {_WAITING}"

    @property
    def bids(self) -> list[Level]:
        """All bids as (price, amount), highest price first."""
        return self.get_depth(None)[0]

    @property
    def asks(self) -> list[Level]:
        """All asks as (price, amount), lowest price first."""
        return self.get_depth(None)[1]

    def get_depth(self, levels: int | None) -> tuple[list[Level], list[Level]]:
        """The best `levels` bids and asks (None: all). Raises NotInSync."""
        if not self.in_sync:
            raise NotInSync(f"{self.topic or 'book'}: {self._why or self._suspended}")
        return self._bids.get_levels(levels), self._asks.get_levels(levels)

    def best(self) -> tuple[Level | None, Level | None]:
        """The best bid and the best ask, each None where that side is empty. Raises NotInSync."""
        bids, asks = self.get_depth(1)
        return (bids[0] if bids else None), (asks[0] if asks else None)
