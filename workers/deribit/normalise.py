"""From Deribit's data frames to wire messages: one feed per channel. No I/O, no clock; times come in as arguments.

The busy families (book, trades, quote) are decoded by typed decoders straight to what is needed; all others as maps, so
that what Deribit adds to them one day is passed on as well. A frame that a typed decoder refuses is read once more,
laxly (numbers as strings), before it counts as malformed.
"""

import math
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from collector.channels import Channel
from collector.messages import EXCHANGE
from collector.schema import SCHEMA
from workers.deribit.book import BookState
from workers.deribit.payloads import Book, Number, Quote, Trade
from workers.deribit.streams import Malformed, Message, Published, Stream, Topics

T = TypeVar("T")
MS = 1_000_000
"""Deribit's timestamps are ms; ours are ns."""

MAX_MS = 9_000_000_000_000
"""The year 2255: as ns it still fits what MessagePack and others take for an int."""

Scalar = float | str | bool | None
Time = Annotated[int, Meta(ge=0, le=MAX_MS)]
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Amount = Annotated[float, Meta(ge=0)]


class _Params(msgspec.Struct, Generic[T], gc=False):
    data: T


class _Frame(msgspec.Struct, Generic[T], gc=False):
    params: _Params[T]


class _BookData(msgspec.Struct, gc=False):
    change_id: Count
    bids: list[tuple[str, float, Amount]]
    asks: list[tuple[str, float, Amount]]
    timestamp: Time = 0
    type: str | None = None
    prev_change_id: Count | None = None


class _WindowData(msgspec.Struct, gc=False):
    change_id: Count
    bids: list[tuple[float, Amount]]
    asks: list[tuple[float, Amount]]
    timestamp: Time = 0


class _TradeData(msgspec.Struct, gc=False):
    instrument_name: str
    trade_seq: Count
    trade_id: str | int
    price: float
    amount: float
    direction: Literal["buy", "sell"]
    timestamp: Time = 0
    mark_price: Number = UNSET
    index_price: Number = UNSET
    tick_direction: Count | UnsetType = UNSET
    iv: Number = UNSET
    liquidation: str | UnsetType = UNSET
    block_trade_id: str | int | UnsetType = UNSET
    combo_id: str | UnsetType = UNSET
    combo_trade_id: str | int | UnsetType = UNSET
    contracts: Number = UNSET


class _QuoteData(msgspec.Struct, gc=False):
    timestamp: Time
    best_bid_price: float | None = None
    best_bid_amount: float | None = None
    best_ask_price: float | None = None
    best_ask_amount: float | None = None


_Nested = dict[str, Scalar]
_TickerData = dict[str, Scalar | _Nested | list[Scalar | _Nested]]
_json = msgspec.json.Decoder()


class _Reader(Generic[T]):
    """Decodes the data of a frame to one type: strictly, else laxly, else it is Malformed."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind
        self._decode = msgspec.json.Decoder(_Frame[kind]).decode

    def read(self, frame: bytes) -> T:
        try:
            data: T = self._decode(frame).params.data
            return data
        except msgspec.ValidationError:
            return self.read_laxly(frame)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise Malformed(str(error)) from None

    def read_laxly(self, frame: bytes) -> T:
        try:
            loose = msgspec.convert(_json.decode(frame)["params"]["data"], self._kind, strict=False)
            # The lax way takes the text "nan" for a number; JSON has none for it but null, for the strict way to judge.
            data: T = msgspec.json.decode(msgspec.json.encode(loose), type=self._kind)
            return data
        except (msgspec.MsgspecError, RecursionError, TypeError, KeyError, ValueError, OverflowError) as error:
            raise Malformed(str(error)) from None


_books: _Reader[_BookData] = _Reader(_BookData)
_windows: _Reader[_WindowData] = _Reader(_WindowData)
_trades: _Reader[list[_TradeData]] = _Reader(list[_TradeData])
_quotes: _Reader[_QuoteData] = _Reader(_QuoteData)
_tickers: _Reader[_TickerData] = _Reader(_TickerData)
_any: _Reader[Any] = _Reader(Any)


class Feed:
    """One channel: takes its frames, gives messages.

    `is_complete` is false while a channel waits for its first full state; `changed` is set when that changes.
    `condition` is the (state, reason) last said on its topics. `dropped`, `crossed` and `emptied` count oddities.
    """

    is_complete = True
    changed = False
    dropped = 0
    crossed = 0
    emptied = 0

    def __init__(self, channel: Channel, topics: Topics) -> None:
        self.channel = channel
        self.topics = topics
        self.epoch = topics.epoch
        self.condition = ("recovering", "subscribe")
        self.streams: dict[str, Stream] = {}
        if channel.instrument:
            self.stream = self.find_stream(channel.instrument)

    def find_stream(self, instrument: str) -> Stream:
        """The stream of one instrument on this channel, made at need. Raises Malformed for a bad name."""
        stream = self.streams.get(instrument)
        if stream is None:
            stream = self.topics.find(self.channel.type, instrument, self.channel.interval)
            self.streams[instrument] = stream
        return stream

    def take(self, frame: bytes, receive_ts: int) -> Published:
        """What a frame of this channel says. Raises Malformed if it is not one."""
        raise NotImplementedError

    def lose(self, reason: str, now: int) -> None:
        """All that was on its way has been lost (`now` in ns)."""
        for stream in self.streams.values():
            stream.lose(reason, self.topics, now)


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
        data = _books.read(frame)
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
        data = _windows.read(frame)
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


class TradeFeed(Feed):
    """Trades of one instrument or of many: one message each, on the instrument's own topic."""

    def take(self, frame: bytes, receive_ts: int) -> Published:
        """The trades of one frame, in the exchange's order."""
        return [self.build_trade(data, receive_ts) for data in _trades.read(frame)]

    def build_trade(self, data: _TradeData, receive_ts: int) -> tuple[Stream, Trade]:
        """One trade as a message."""
        stream = self.find_stream(data.instrument_name)
        stream.last_id = data.trade_seq
        message = Trade(
            EXCHANGE, stream.instrument, self.epoch, 0, data.timestamp * MS, receive_ts,
            data.price, data.amount, data.direction, str(data.trade_id), data.trade_seq,
            data.mark_price, data.index_price, data.tick_direction, data.iv, data.liquidation,
            _text(data.block_trade_id), data.combo_id, _text(data.combo_trade_id), data.contracts,
        )  # fmt: skip
        return stream, message


def _text(value: str | int | UnsetType) -> str | UnsetType:
    return str(value) if isinstance(value, int) else value


class QuoteFeed(Feed):
    """The top of one book."""

    def take(self, frame: bytes, receive_ts: int) -> Published:
        """One quote."""
        data = _quotes.read(frame)
        stream = self.stream
        message = Quote(
            EXCHANGE, stream.instrument, self.epoch, 0, data.timestamp * MS, receive_ts,
            data.best_bid_price, data.best_bid_amount, data.best_ask_price, data.best_ask_amount,
        )  # fmt: skip
        stream.current = message
        return [(stream, message)]


class TickerFeed(Feed):
    """A ticker, always complete: incremental ones are merged into the last full one."""

    def __init__(self, channel: Channel, topics: Topics) -> None:
        super().__init__(channel, topics)
        self._incremental = channel.interval == "incremental"
        self._merged: dict[str, Any] | None = None

    def take(self, frame: bytes, receive_ts: int) -> Published:
        """One full ticker, or nothing while the first full one is awaited."""
        data: dict[str, Any] = _tickers.read(frame)
        for nested in ("stats", "greeks"):
            members = data.pop(nested, None)
            if isinstance(members, dict):
                data.update(members)
        exchange_ts = _take_timestamp(data)
        for key, value in data.items():
            if value.__class__ is not float and value is not None and key in TICKER_NUMBERS:
                data[key] = _check_number(key, value)
        if self._incremental:
            if data.pop("type", None) == "snapshot":
                self._merged = data
            elif self._merged is None:
                return []
            else:
                self._merged.update(data)
            data = dict(self._merged)
        _complete_ticker(data)
        stream = self.stream
        data.update(stream.build_envelope(receive_ts, exchange_ts))
        stream.current = data
        return [(stream, data)]

    def lose(self, reason: str, now: int) -> None:
        """The connection is gone: a change alone would no longer make a full ticker."""
        super().lose(reason, now)
        self._merged = None


TICKER_NUMBERS = frozenset(key.rstrip("?") for key, kind in SCHEMA["ticker"].items() if kind == "float or nil")
TICKER_KEYS = frozenset(key for key, kind in SCHEMA["ticker"].items() if kind == "float or nil" and key[-1] != "?")


def _complete_ticker(data: dict[str, Any]) -> None:
    """What every ticker has: a state, and the core numbers, null where the exchange left one out."""
    if type(data.get("state")) is not str:
        raise Malformed("a ticker without state")
    if not data.keys() >= TICKER_KEYS:
        data.update(dict.fromkeys(TICKER_KEYS - data.keys()))
    data.pop("instrument_name", None)
    data.pop("join", None)  # ours to say


def _take_timestamp(data: dict[str, Any]) -> int:
    value = data.pop("timestamp", 0)
    if isinstance(value, (int, float)) and 0 <= value <= MAX_MS:
        return int(value) * MS
    raise Malformed(f"timestamp {value!r:.60} is no time")


PLAIN_TYPES = ("index", "volatility", "expiration_price", "funding", "candle")
"""The small types: their keys are those of the wire's table."""


class PlainFeed(Feed):
    """The small types: a fixed set of keys, the current value of one thing."""

    def __init__(self, channel: Channel, topics: Topics) -> None:
        super().__init__(channel, topics)
        self._keys = SCHEMA[channel.type]

    def take(self, frame: bytes, receive_ts: int) -> Published:
        """One message."""
        data = _read_map(frame)
        stream = self.stream
        message = stream.build_envelope(receive_ts, _take_timestamp(data))
        for key, kind in self._keys.items():
            message[key] = _CHECKS[kind](key, data.get(key))
        stream.current = message
        return [(stream, message)]


def _check_number(key: str, value: Any) -> float:
    """A finite float, also from an int or from text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise Malformed(f"{key} is {value!r:.60}")
    return number


def _check_count(key: str, value: Any) -> int:
    if type(value) is int and 0 <= value < 1 << 63:
        return value
    raise Malformed(f"{key} is {value!r:.60}")


def _check_bool(key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise Malformed(f"{key} is {value!r:.60}")


_CHECKS = {"float": _check_number, "count": _check_count, "bool": _check_bool}


class MarkPricesFeed(Feed):
    """The mark prices of all options of one index."""

    def take(self, frame: bytes, receive_ts: int) -> Published:
        """One message with all marks of the frame; its time is the newest one's."""
        rows = _any.read(frame)
        if not isinstance(rows, list):
            raise Malformed("not a list of marks")
        newest = 0
        marks = []
        for row in rows:
            if not isinstance(row, dict) or not isinstance(row.get("instrument_name"), str):
                raise Malformed(f"a mark is {row!r:.60}")
            newest = max(newest, _take_timestamp(row))
            mark: dict[str, Any] = {"instrument": row["instrument_name"]}
            for key in ("mark_price", "iv"):
                mark[key] = None if row.get(key) is None else _check_number(key, row[key])
            marks.append(mark)
        message = self.stream.build_envelope(receive_ts, newest)
        message["marks"] = marks
        self.stream.current = message
        return [(self.stream, message)]


class EventFeed(Feed):
    """Instruments and the platform: what Deribit sends, on the topic of the thing that it is about."""

    def take(self, frame: bytes, receive_ts: int) -> Published:
        """One message."""
        data = _read_map(frame)
        if self.channel.type == "platform":
            subject = data.get("price_index") or "all"
        else:
            subject = data.pop("instrument_name", None)
        if not isinstance(subject, str) or not isinstance(data.get("state", ""), str):
            raise Malformed("it names no instrument, or no state")
        data.pop("join", None)  # ours to say
        stream = self.find_stream(subject)
        exchange_ts = _take_timestamp(data)
        data.update(stream.build_envelope(receive_ts, exchange_ts))
        stream.current = data
        return [(stream, data)]


class OtherFeed(Feed):
    """Every other channel: its data as decoded."""

    def take(self, frame: bytes, receive_ts: int) -> Published:
        """One message."""
        data = _any.read(frame)
        timestamp = data.get("timestamp") if isinstance(data, dict) else None
        exchange_ts = timestamp * MS if type(timestamp) is int and 0 <= timestamp < 1 << 43 else 0
        message = self.stream.build_envelope(receive_ts, exchange_ts)
        message["channel"] = self.channel.name
        message["data"] = data
        return [(self.stream, message)]


def _read_map(frame: bytes) -> dict[str, Any]:
    data = _any.read(frame)
    if not isinstance(data, dict):
        raise Malformed(f"data is {data!r:.60}, not an object")
    return data


_FEEDS: dict[str, type[Feed]] = {
    "book": BookFeed,
    "trade": TradeFeed,
    "quote": QuoteFeed,
    "ticker": TickerFeed,
    "mark_prices": MarkPricesFeed,
    "instrument": EventFeed,
    "platform": EventFeed,
    "other": OtherFeed,
} | dict.fromkeys(PLAIN_TYPES, PlainFeed)


def create_feed(channel: Channel, topics: Topics) -> Feed:
    """The feed for a channel."""
    kind = WindowFeed if channel.grouped else _FEEDS[channel.type]
    return kind(channel, topics)
