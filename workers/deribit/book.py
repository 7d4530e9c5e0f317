"""The book of one channel: the chain of change ids, the levels, and what to publish for each frame. No I/O, no clock.

Facts (order-book semantics of Deribit's full book channels): a subscription begins with a snapshot, each later
change names the change_id before it *in this channel*; ids of one book may jump. There is no checksum.
"""

from collector.lifecycle import BOOK, Machine
from collector.messages import EXCHANGE
from workers.deribit.payloads import Book

Levels = dict[float, float]


class BookState:
    """Levels by price; an amount of 0 is a level that has gone (and is swept now and then)."""

    def __init__(self) -> None:
        self.machine = Machine(BOOK, "awaiting")
        self.bids: Levels = {}
        self.asks: Levels = {}
        self.change_id = 0
        self.exchange_ts = 0
        self.crossed = 0
        self.emptied = 0
        self._reason = "subscribe"
        self._highest_bid = 0.0
        self._lowest_ask = 0.0
        self._sweep_at = 4096

    def await_snapshot(self, reason: str, event: str) -> None:
        """The next snapshot will be for `reason` (subscribe or resync); until then deltas are dropped."""
        self._reason = reason
        self.machine.apply(event)

    def replace(self, bids: list[tuple[float, float]], asks: list[tuple[float, float]], change_id: int) -> str:
        """Take a snapshot. Returns its reason: `exchange` if nobody asked for it."""
        reason = self._reason if self.machine.state == "awaiting" else "exchange"
        self.machine.apply("snapshot")
        self.bids, self.asks, self.change_id = dict(bids), dict(asks), change_id
        self._find_best()
        return reason

    def apply(self, bids: list[tuple[float, float]], asks: list[tuple[float, float]], change_id: int) -> None:
        """Take a delta whose prev_change_id was ours. Crossed and emptied books are counted, not mended."""
        if bids:
            self.bids.update(bids)
            self._highest_bid = max(self._highest_bid, max(bids)[0])
            if not any(self.bids.values()):
                self.emptied += 1
        if asks:
            self.asks.update(asks)
            self._lowest_ask = min(self._lowest_ask, min(asks)[0])
            if not any(self.asks.values()):
                self.emptied += 1
        self.change_id = change_id
        # The two prices bound the best ones from outside, cheaply; only when they meet is it worth looking.
        if self._highest_bid >= self._lowest_ask:
            self._find_best()
            if self._highest_bid >= self._lowest_ask:
                self.crossed += 1
        if len(self.bids) + len(self.asks) > self._sweep_at:
            self._sweep()

    def build_snapshot(self, instrument: str, epoch: int, receive_ts: int, reason: str) -> Book:
        """The whole book now, best levels first, as a message."""
        bids = sorted(((p, a) for p, a in self.bids.items() if a), reverse=True)
        asks = sorted((p, a) for p, a in self.asks.items() if a)
        return Book(
            EXCHANGE, instrument, epoch, 0, self.exchange_ts, receive_ts,
            "snapshot", self.change_id, bids, asks, reason=reason,
        )  # fmt: skip

    def _find_best(self) -> None:
        self._highest_bid = max((p for p, a in self.bids.items() if a), default=float("-inf"))
        self._lowest_ask = min((p for p, a in self.asks.items() if a), default=float("inf"))

    def _sweep(self) -> None:
        self.bids = {p: a for p, a in self.bids.items() if a}
        self.asks = {p: a for p, a in self.asks.items() if a}
        self._sweep_at = max(4096, 2 * (len(self.bids) + len(self.asks)))
