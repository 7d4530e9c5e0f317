"""What each channel says of the market: a feed takes events and gives the data of the next frame.

A feed belongs to a channel, not to a subscriber: its frames, and so a book's chain of change ids, are the same for
all. No I/O, no clock. Shapes and rhythms are those of Deribit's channels (measured on production, 2026).
"""

from collections.abc import Callable
from typing import Any

from workers.exchange.market.book import ASK, BID, sort_levels
from workers.exchange.market.instruments import Instrument
from workers.exchange.market.market import Event, Market
from workers.exchange.market.payloads import (
    Data,
    describe_expiration,
    describe_marks,
    describe_perpetual,
    describe_quote,
    describe_ranking,
    describe_statistics,
    describe_ticker,
    list_levels,
)

PERIODS = {"raw": 0, "100ms": 100, "agg2": 1000}
"""ms between frames of each interval; 0: one frame for each event. agg2 is one second, as measured."""

ACTIONS = {(False, True): "new", (True, True): "change", (True, False): "delete"}


class Feed:
    """One channel and those who listen. `period` is as in PERIODS; `steady`: a frame each period, whether or not
    anything happened; `refresh`: ms after which it counts as changed even without events (0: never)."""

    period = 100
    steady = False
    refresh = 0

    def __init__(self, channel: str, market: Market, instrument: Instrument | None = None) -> None:
        self.channel = channel
        self.market = market
        self.instrument = instrument
        self.subscribers: dict[Any, None] = {}
        self.dirty = False

    def open(self) -> list[Data]:
        """Return the data of the frames that a new subscriber gets at once."""
        return []

    def take(self, event: Event) -> bool:
        """Note an event; say whether there may be something to send because of it."""
        return False

    def flush(self) -> list[Data]:
        """Return the data of the next frames: of none if there is nothing to say."""
        return []


class InstrumentFeed(Feed):
    """A feed of one instrument: of its book, unless it takes something else."""

    def __init__(self, channel: str, market: Market, instrument: Instrument) -> None:
        super().__init__(channel, market, instrument)
        self.of = instrument

    def take(self, event: Event) -> bool:
        return bool(event.changes)


class BookFeed(InstrumentFeed):
    """`book.*`: a snapshot, then changes, each with the change_id of the frame before it."""

    def __init__(self, channel: str, market: Market, instrument: Instrument) -> None:
        super().__init__(channel, market, instrument)
        book = market.books[instrument.name]
        self._before: dict[tuple[int, int], int] = {}
        self._change_id, self._timestamp = book.change_id, book.timestamp

    def open(self) -> list[Data]:
        book = self.market.books[self.of.name]
        sides = []
        for side in (BID, ASK):
            levels = dict(book.sides[side])
            levels |= {tick: lots for (pending, tick), lots in self._before.items() if pending == side}
            sides.append([self._entry("new", t, levels[t]) for t in sort_levels(side, levels) if levels[t]])
        return [
            {
                "timestamp": self._timestamp, "type": "snapshot", "change_id": self._change_id,
                "instrument_name": self.of.name, "bids": sides[BID], "asks": sides[ASK],
            }
        ]  # fmt: skip

    def _entry(self, action: str, tick: int, lots: int) -> list[Any]:
        amount = self.of.to_amount(lots)
        whole = action == "new" and amount == int(amount)
        return [action, self.of.to_price(tick), int(amount) if whole else amount]

    def take(self, event: Event) -> bool:
        for change in event.changes:
            self._before.setdefault((change.side, change.tick), change.old)
        return bool(event.changes)

    def flush(self) -> list[Data]:
        book = self.market.books[self.of.name]
        sides: tuple[list[Any], list[Any]] = ([], [])
        for side in (BID, ASK):
            for tick in sort_levels(side, (tick for pending, tick in self._before if pending == side)):
                old, new = self._before[side, tick], book.sides[side].get(tick, 0)
                if old != new:
                    sides[side].append(self._change(old, tick, new))
        self._before.clear()
        if not sides[BID] and not sides[ASK]:
            return []
        previous, self._change_id, self._timestamp = self._change_id, book.change_id, book.timestamp
        return [{
            "timestamp": book.timestamp, "type": "change", "change_id": book.change_id, "instrument_name": self.of.name,
            "bids": sides[BID], "asks": sides[ASK], "prev_change_id": previous,
        }]  # fmt: skip

    def _change(self, old: int, tick: int, new: int) -> list[Any]:
        action = ACTIONS[bool(old), bool(new)]
        return [action, self.of.to_price(tick), self.of.to_amount(new)]


class GroupedBookFeed(InstrumentFeed):
    """`book.{i}.{group}.{depth}.{interval}`: the whole window each time that the book has changed."""

    def __init__(self, channel: str, market: Market, instrument: Instrument, group: float, depth: int) -> None:
        super().__init__(channel, market, instrument)
        self._group, self._depth = group, depth

    def flush(self) -> list[Data]:
        book = self.market.books[self.of.name]
        return [{
            "timestamp": book.timestamp, "change_id": book.change_id, "instrument_name": self.of.name,
            "bids": list_levels(self.market, self.of, BID, self._depth, self._group),
            "asks": list_levels(self.market, self.of, ASK, self._depth, self._group),
        }]  # fmt: skip

    open = flush


class TradesFeed(Feed):
    """`trades.*`, of one instrument or of a kind and currency: all trades of the period in one array."""

    def __init__(
        self, channel: str, market: Market, instrument: Instrument | None = None, kind: str = "", currency: str = ""
    ) -> None:
        super().__init__(channel, market, instrument)
        self._kind, self._currency = kind, currency
        self._pending: list[Data] = []

    def take(self, event: Event) -> bool:
        if event.trades and (self.instrument or event.instrument.matches(self._kind, self._currency)):
            self._pending += event.trades
        return bool(self._pending)

    def flush(self) -> list[Data]:
        pending, self._pending = self._pending, []
        return [pending]


class TickerFeed(InstrumentFeed):
    """`ticker.*`: the full ticker."""

    def __init__(self, channel: str, market: Market, instrument: Instrument) -> None:
        super().__init__(channel, market, instrument)
        self.refresh = 3000 if instrument.kind == "option" else 1000

    def take(self, event: Event) -> bool:
        return True

    def flush(self) -> list[Data]:
        return [describe_ticker(self.market, self.of)]

    open = flush


class IncrementalTickerFeed(TickerFeed):
    """`incremental_ticker.*`: at most once a second, only what has changed since the frame before."""

    period = 1000

    def __init__(self, channel: str, market: Market, instrument: Instrument) -> None:
        super().__init__(channel, market, instrument)
        self._last: dict[str, Any] = describe_ticker(market, instrument)

    def open(self) -> list[Data]:
        return [{"type": "snapshot", **self._last}]

    def flush(self) -> list[Data]:
        last, self._last = self._last, describe_ticker(self.market, self.of)
        changed = find_changes(last, self._last)
        if not changed.keys() - {"timestamp"}:
            return []
        return [{"type": "change", **changed, "instrument_name": self.of.name, "timestamp": self._last["timestamp"]}]


def find_changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Members of `new` that differ from `old`; of members that are objects again only what differs."""
    changed: dict[str, Any] = {}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            inner = find_changes(before, value)
            if inner:
                changed[key] = inner
        elif value != before or key not in old:
            changed[key] = value
    return changed


class QuoteFeed(InstrumentFeed):
    """`quote.*`: on every change at the top of the book."""

    period = 0

    def __init__(self, channel: str, market: Market, instrument: Instrument) -> None:
        super().__init__(channel, market, instrument)
        self._last = describe_quote(market, instrument)

    def open(self) -> list[Data]:
        return [self._last]

    def flush(self) -> list[Data]:
        last, self._last = self._last, describe_quote(self.market, self.of)
        return [self._last] if last != {**self._last, "timestamp": last["timestamp"]} else []


class PerpetualFeed(InstrumentFeed):
    """`perpetual.*`: interest and index price."""

    refresh = 1000

    def take(self, event: Event) -> bool:
        return bool(event.trades)

    def flush(self) -> list[Data]:
        return [describe_perpetual(self.market, self.of)]


class ChartFeed(InstrumentFeed):
    """`chart.trades.*`: the bar in progress, again each second in which it was traded."""

    period = 1000

    def __init__(self, channel: str, market: Market, instrument: Instrument, resolution: str) -> None:
        super().__init__(channel, market, instrument)
        self._length = 60_000 * (1440 if resolution == "1D" else int(resolution))
        self._bar: dict[str, Any] = {}
        begun = market.now // self._length * self._length  # a bar does not begin with who subscribes amid it
        self._add([trade for trade in market.trades[instrument.name] if trade["timestamp"] >= begun])

    def take(self, event: Event) -> bool:
        self._add(event.trades)
        return bool(event.trades)

    def _add(self, trades: list[dict[str, Any]]) -> None:
        for trade in trades:
            tick, price = trade["timestamp"] // self._length * self._length, trade["price"]
            if self._bar.get("tick") != tick:
                self._bar = {"tick": tick, "open": price, "high": price, "low": price}
                self._bar |= {"close": price, "volume": 0.0, "cost": 0.0}
            dollars = self.of.in_dollars
            cost = trade["amount"] if dollars else trade["amount"] * price
            coin = trade["index_price"] if self.of.legs else price  # a combo's own price is a difference
            self._bar["high"], self._bar["low"] = max(self._bar["high"], price), min(self._bar["low"], price)
            self._bar["close"] = price
            self._bar["volume"] = round(self._bar["volume"] + (cost / coin if dollars else trade["amount"]), 8)
            self._bar["cost"] = round(self._bar["cost"] + cost, 8)

    def flush(self) -> list[Data]:
        return [dict(self._bar)]


class SteadyFeed(Feed):
    """A channel with a frame each period; `describe` gives its data, or None for nothing this time.

    `at_once`: a new subscriber gets one, too.
    """

    steady = True

    def __init__(
        self, channel: str, market: Market, describe: Callable[[], Data], period: int = 1000, at_once: bool = True
    ):
        super().__init__(channel, market)
        self.period = period
        self._describe = describe
        self._at_once = at_once

    def open(self) -> list[Data]:
        return self.flush() if self._at_once else []

    def flush(self) -> list[Data]:
        data = self._describe()
        return [] if data is None else [data]


class PlatformFeed(Feed):
    """`platform_state`: one frame for each index at first, then one index after another."""

    period = 1000
    steady = True

    def open(self) -> list[Data]:
        return [{"locked": False, "price_index": index, "reasons": []} for index in list_indices(self.market)]

    def flush(self) -> list[Data]:
        each = self.open()
        return [each[self.market.now // 1000 % len(each)]]


class LifeFeed(Feed):
    """`instrument.state.*` and `instrument.creation.*`: at once when it happens."""

    period = 0

    def __init__(self, channel: str, market: Market, kind: str, currency: str, creations: bool) -> None:
        super().__init__(channel, market)
        self._kind, self._currency, self._creations = kind, currency, creations
        self._next: list[Data] = []

    def take(self, event: Event) -> bool:
        wanted = event.created if self._creations else event.state
        if not wanted or not event.instrument.matches(self._kind, self._currency):
            return False
        state = {"state": event.state, "instrument_name": event.instrument.name}
        self._next = [{"timestamp": event.timestamp, **(event.instrument.row if self._creations else state)}]
        return True

    def flush(self) -> list[Data]:
        return self._next


def list_indices(market: Market) -> list[str]:
    """Names of all index prices, sorted."""
    return sorted({of.index for of in market.catalogue.by_name.values()})


def describe_index(market: Market, index: str) -> Data:
    """Data of `deribit_price_index.*`."""
    return {"timestamp": market.now, "price": market.index_price(index), "index_name": index}


def describe_volatility(market: Market, index: str) -> Data:
    """Data of `deribit_volatility_index.*`."""
    level = market.coin_volatility[index.split("_")[0].upper()] * 100.0
    drift = market.now % 600_000 / 600_000
    return {"volatility": round(level + abs(drift - 0.5), 4), "timestamp": market.now, "index_name": index}


def describe_rfq(market: Market, currency: str) -> Data:
    """Data of `block_rfq.trades.*`: a block trade of the first perpetual of the currency, if there is one."""
    known = market.catalogue.by_name.values()
    of = next((of for of in known if of.perpetual and of.matches("any", currency)), None)
    if of is None:
        return None
    price, amount = market.round_mark(of), of.row["block_trade_min_trade_amount"]
    return {
        "id": market.now // 5000 % 100_000, "timestamp": market.now, "amount": amount, "direction": "sell",
        "combo_id": of.name, "legs": [{"direction": "buy", "price": price, "instrument_name": of.name, "ratio": 1}],
        "trades": [{"amount": amount, "direction": "sell", "price": price}], "mark_price": price,
    }  # fmt: skip


def describe_announcement(market: Market) -> Data:
    """Data of `announcements`."""
    return {
        "action": "new", "body": "This is the practice exchange; nothing here is worth anything.", "id": market.now,
        "important": False, "publication_timestamp": market.now, "title": "Practice",
    }  # fmt: skip


INDEX_FEEDS: dict[str, Callable[[Market, str], Data]] = {
    "deribit_price_index": describe_index,
    "deribit_price_ranking": describe_ranking,
    "deribit_price_statistics": describe_statistics,
    "estimated_expiration_price": describe_expiration,
    "markprice.options": describe_marks,
    "deribit_volatility_index": describe_volatility,
}
"""Channels that go by the name of an index, one frame a second."""
