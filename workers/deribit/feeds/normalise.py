"""From Deribit's data frames to wire messages: one feed per channel. No I/O, no clock; times come in as arguments."""

import math
from operator import itemgetter
from typing import Any

import msgspec
from msgspec import UNSET

from collector.channels import Channel
from collector.messages import EXCHANGE
from collector.schema import SCHEMA
from workers.deribit.feeds.book import BookFeed, WindowFeed
from workers.deribit.feeds.feed import Feed
from workers.deribit.feeds.frames import MS, read_any, read_known_ticker, read_quote, read_ticker, take_timestamp
from workers.deribit.feeds.trades.feed import TradeFeed
from workers.deribit.publishing.payloads import Quote, Ticker
from workers.deribit.publishing.streams import Malformed, Published, Topics
from workers.deribit.rpc.codec import MAX_MS


class QuoteFeed(Feed):
    """The top of one book."""

    def take(self, frame: bytes, receive_ts: int) -> Published:
        """One quote."""
        data = read_quote(frame)
        stream = self.stream
        message = Quote(
            EXCHANGE, stream.instrument, stream.epoch, 0, data.timestamp * MS, receive_ts,
            data.best_bid_price, data.best_bid_amount, data.best_ask_price, data.best_ask_amount,
        )  # fmt: skip
        stream.current = message
        return [(stream, message)]


class TickerFeed(Feed):
    """A ticker, always complete: incremental ones are merged into the last full one."""

    def __init__(self, channel: Channel, topics: Topics) -> None:
        super().__init__(channel, topics)
        self._incremental = channel.interval == "incremental"
        self.is_complete = not self._incremental
        self._merged: dict[str, Any] = {}
        self._envelope = self.stream.build_envelope(0)

    def take(self, frame: bytes, receive_ts: int) -> Published:
        """One full ticker, or nothing while the first full one is awaited."""
        message = None if self._incremental else read_known_ticker(frame)
        if message is None:
            return self._take_any(frame, receive_ts)
        stream = self.stream
        flatten_ticker(message)
        message.exchange, message.instrument, message.epoch = EXCHANGE, stream.instrument, stream.epoch
        message.receive_ts = receive_ts
        stream.current = message
        return [(stream, message)]

    def _take_any(self, frame: bytes, receive_ts: int) -> Published:
        """Whatever members a ticker has, and however they are spelled."""
        data: dict[str, Any] = read_ticker(frame)
        data.pop("instrument_name", None)  # the topic's
        data.pop("join", None)  # ours to say
        for nested in ("stats", "greeks"):
            members = data.pop(nested, None)
            if members.__class__ is dict:
                data.update(members)
        exchange_ts = take_timestamp(data)
        # Numbers come as floats; of the few others, those that should be numbers are looked at.
        for key in [key for key, value in data.items() if value.__class__ is not float]:
            if key in TICKER_NUMBERS and data[key] is not None:
                data[key] = _check_number(key, data[key])
        if self._incremental:
            if not (data := self._merge(data)):
                return []
        else:
            _complete_ticker(data)
            check_encodable(data)
        stream = self.stream
        data.update(self._envelope)
        data["exchange_ts"] = exchange_ts
        data["receive_ts"] = receive_ts
        stream.current = data
        return [(stream, data)]

    def _merge(self, data: dict[str, Any]) -> dict[str, Any]:
        """The full ticker that a change makes; empty while a full one is awaited."""
        check_encodable(data)  # what is kept must not spoil all that follows
        if data.pop("type", None) != "snapshot":
            if not self.is_complete:
                self.dropped += 1
                return {}
            data = self._merged | data
        _complete_ticker(data)
        self._merged = data
        if not self.is_complete:
            self.is_complete = self.changed = True
        return dict(data)

    def skip(self, frame: bytes, now: int) -> None:
        """A frame could not be read: what it changed would stay wrong, so a full one is asked for."""
        super().skip(frame, now)
        if self._incremental and self.is_complete:
            self.is_complete, self.changed = False, True

    def lose(self, reason: str, now: int) -> None:
        """The connection is gone: a change alone would no longer make a full ticker."""
        super().lose(reason, now)
        if self._incremental:
            self.is_complete = self.changed = False


def flatten_ticker(ticker: Ticker) -> None:
    """Bring the exchange's time and what it nests into the wire's own fields."""
    ticker.exchange_ts = ticker.timestamp * MS  # type: ignore[operator]
    ticker.timestamp = ticker.instrument_name = UNSET
    stats, greeks = ticker.stats, ticker.greeks
    ticker.stats = ticker.greeks = UNSET
    if stats is not UNSET:
        ticker.high, ticker.low, ticker.price_change = stats.high, stats.low, stats.price_change
        ticker.volume, ticker.volume_usd = stats.volume, stats.volume_usd
        ticker.volume_notional = stats.volume_notional
    if greeks is not UNSET:
        ticker.delta, ticker.gamma, ticker.vega = greeks.delta, greeks.gamma, greeks.vega
        ticker.theta, ticker.rho = greeks.theta, greeks.rho


TICKER_NUMBERS = frozenset(key.rstrip("?") for key, kind in SCHEMA["ticker"].items() if kind == "float or nil")
TICKER_KEYS = frozenset(key for key, kind in SCHEMA["ticker"].items() if kind == "float or nil" and key[-1] != "?")
_pick_core = itemgetter(*TICKER_KEYS)
"""Raises KeyError if one is missing: the quickest look at all of them."""


def _complete_ticker(data: dict[str, Any]) -> None:
    """What every ticker has: a state, and the core numbers, null where the exchange left one out."""
    if type(data.get("state")) is not str:
        raise Malformed("a ticker without state")
    try:
        _pick_core(data)
    except KeyError:
        data.update(dict.fromkeys(TICKER_KEYS - data.keys()))


MAX_DEPTH = 100
"""How deep lists and maps of a message may be nested; Deribit's are at 4. Readers give up somewhere, Python's msgpack
after 1,024; and what Python itself takes differs from version to version."""


class PlainFeed(Feed):
    """The small types: a fixed set of keys, the current value of one thing."""

    def __init__(self, channel: Channel, topics: Topics) -> None:
        super().__init__(channel, topics)
        self._checks = PLAIN_TYPES[channel.type]

    def take(self, frame: bytes, receive_ts: int) -> Published:
        """One message."""
        data = read_map(frame)
        stream = self.stream
        message = stream.build_envelope(receive_ts, take_timestamp(data))
        for key, check in self._checks.items():
            message[key] = check(key, data.get(key))
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
    if type(value) is float and value.is_integer():  # 1.7e12 is a count as well
        value = int(value)
    if type(value) is int and 0 <= value < 1 << 63:
        return value
    raise Malformed(f"{key} is {value!r:.60}")


def _check_bool(key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise Malformed(f"{key} is {value!r:.60}")


_CHECKS = {"float": _check_number, "count": _check_count, "bool": _check_bool}

PLAIN_TYPES = {
    type: {key: _CHECKS[kind] for key, kind in SCHEMA[type].items()}
    for type in ("index", "volatility", "expiration_price", "funding", "candle")
}
"""The small types: their keys are those of the wire's table, each of one of these kinds, and none may be absent."""


class MarkPricesFeed(Feed):
    """The mark prices of all options of one index."""

    def take(self, frame: bytes, receive_ts: int) -> Published:
        """One message with all marks of the frame; its time is the newest one's."""
        rows = read_any(frame)
        if not isinstance(rows, list):
            raise Malformed("not a list of marks")
        newest = 0
        marks = []
        for row in rows:
            if not isinstance(row, dict) or not isinstance(row.get("instrument_name"), str):
                raise Malformed(f"a mark is {row!r:.60}")
            newest = max(newest, take_timestamp(row))
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
        return self.build_event(read_map(frame), receive_ts)

    def build_event(self, data: dict[str, Any], receive_ts: int) -> Published:
        """The message of what was read. Raises Malformed if it says not of what it is."""
        if self.channel.type == "platform":
            subject = data.get("price_index") or "all"
        else:
            subject = data.pop("instrument_name", None)
        if not isinstance(subject, str) or not isinstance(data.get("state", ""), str):
            raise Malformed("it names no instrument, or no state")
        data.pop("join", None)  # ours to say
        check_encodable(data)
        stream = self.find_stream(subject)
        exchange_ts = take_timestamp(data)
        data.update(stream.build_envelope(receive_ts, exchange_ts))
        stream.current = data
        return [(stream, data)]


class OtherFeed(Feed):
    """Every other channel: its data as decoded."""

    def take(self, frame: bytes, receive_ts: int) -> Published:
        """One message; its time is the newest one's, where the data are a list."""
        data = read_any(frame)
        check_encodable(data)
        newest = max(map(_find_timestamp, data if isinstance(data, list) else [data]), default=0)
        message = self.stream.build_envelope(receive_ts, newest)
        message["channel"] = self.channel.name
        message["data"] = data
        self.stream.current = message
        return [(self.stream, message)]


def _find_timestamp(data: Any) -> int:
    """What the `timestamp` (ms) of a map says, in ns; 0 for what has none, or another thing of that name."""
    value = data.get("timestamp") if isinstance(data, dict) else None
    return value * MS if type(value) is int and 0 <= value <= MAX_MS else 0


def check_encodable(data: Any) -> None:
    """Raise Malformed for what MessagePack cannot hold, or its readers may not take: integers beyond 64 bits, more than
    MAX_DEPTH lists and maps in each other.
    """
    level: list[Any] = [[data]]
    for _ in range(MAX_DEPTH + 1):
        inner = (each for outer in level for each in (outer.values() if outer.__class__ is dict else outer))
        if not (level := [each for each in inner if each.__class__ is dict or each.__class__ is list]):
            break
    else:
        raise Malformed(f"it is nested more than {MAX_DEPTH} deep")
    try:
        msgspec.msgpack.encode(data)
    except (TypeError, OverflowError) as error:
        raise Malformed(f"cannot be encoded: {error}") from None


def read_map(frame: bytes) -> dict[str, Any]:
    """The data of a frame. Raises Malformed unless it is an object."""
    data = read_any(frame)
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
