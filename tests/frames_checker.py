"""Says which messages the wire owes for a frame that Deribit sent, and compares what came with it.

Written from the wire's tables and Deribit's documents, on purpose without looking at (or importing) the normaliser:
two readings of one contract have to agree.

What a key may hold is a tuple of choices: a value (types count: 1 is not 1.0), a type (any value of it), or ABSENT.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

ABSENT = object()
MS = 1_000_000
ENVELOPE = ("type", "exchange", "instrument", "epoch", "seq", "exchange_ts", "receive_ts")
BESIDE_DATA = ("status", "repair", "heartbeat")
TRADE_NUMBERS = ("price", "amount", "mark_price", "index_price")
TRADE_OPTIONAL = ("iv", "liquidation", "block_trade_id", "combo_id", "combo_trade_id", "contracts")
TRADE_COUNTS = ("starbase_match_id", "starbase_timestamp", "block_rfq_id", "block_trade_leg_count")
TICKER_FLOATS = (
    "best_bid_price", "best_bid_amount", "best_ask_price", "best_ask_amount", "last_price", "mark_price", "index_price",
)  # fmt: skip

Choices = tuple[Any, ...]
Keys = dict[str, Choices]


class Expected(NamedTuple):
    """One message that must come on `topic`: for each key what it may hold, epoch, seq and receive_ts aside."""

    topic: str
    keys: Keys


def same(value: Any, choice: Any) -> bool:
    """Whether a received value is the one meant, types included, all the way down."""
    if isinstance(choice, type):
        return type(value) is choice
    if type(value) is not type(choice):
        return False
    if isinstance(choice, dict):
        return value.keys() == choice.keys() and all(same(value[key], choice[key]) for key in choice)
    if isinstance(choice, list):
        return len(value) == len(choice) and all(map(same, value, choice))
    return bool(value == choice)


def exact(value: Any) -> Choices:
    return (value,)


def as_float(value: Any) -> Choices:
    """A price or an amount: a float on the wire however it was spelled; null and strings stay what they are."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (float(value),)
    return (value,)


def as_number(value: Any) -> Choices:
    """A number that the contract gives no type: as an int or as a float."""
    return (*as_float(value), value)


def message(type_: str, instrument: str, interval: str, timestamp: Any, keys: Keys) -> Expected:
    """Wrap the keys of one message; `timestamp` is Deribit's (ms), None where it gives none."""
    when = exact(timestamp * MS) if timestamp is not None else exact(0)
    head: Keys = {"type": exact(type_), "exchange": exact("deribit"), "instrument": exact(instrument)}
    return Expected(f"deribit.{type_}.{instrument}.{interval}", {**head, "exchange_ts": when, **keys})


class FrameReader:
    """Turns the frames of one connection, in order, into the messages that they owe."""

    def __init__(self) -> None:
        self._chains: dict[str, int | None] = {}
        self._broken: set[str] = set()
        self._tickers: dict[str, dict[str, Any]] = {}
        self._sequences: dict[str, int] = {}

    def read(self, frame: str | bytes) -> list[Expected]:
        """The messages that one frame owes; none for anything but a subscription's notification."""
        body = json.loads(frame)
        if body.get("method") != "subscription":
            return []
        channel, data = body["params"]["channel"], body["params"]["data"]
        family, *rest = channel.split(".")
        readers: dict[str, Callable[..., Iterable[Expected]]] = {
            "trades": self._read_trades, "book": self._read_book, "ticker": self._read_ticker,
            "incremental_ticker": self._read_incremental, "quote": read_quote, "perpetual": read_funding,
            "deribit_price_index": read_index, "deribit_volatility_index": read_volatility,
            "estimated_expiration_price": read_expiration, "platform_state": read_platform,
        }  # fmt: skip
        reader = readers.get(family) or {
            ("chart", "trades"): read_candle, ("markprice", "options"): read_marks,
            ("instrument", "state"): read_instrument, ("instrument", "creation"): read_instrument,
        }.get((family, rest[0] if rest else ""), read_other)  # fmt: skip
        return list(reader(channel, rest, data))

    def _read_trades(self, channel: str, rest: list[str], trades: list[dict[str, Any]]) -> Iterator[Expected]:
        for trade in trades:
            expected = read_trade(trade, interval=rest[-1])
            last, now = self._sequences.get(expected.topic), trade["trade_seq"]
            if last is not None and now > last + 1:
                hole: Keys = {"missing_from": exact(last + 1), "missing_to": exact(now - 1), "healing": (True, False)}
                yield gap(expected, hole)
            self._sequences[expected.topic] = max(now, last or 0)
            yield expected

    def _read_book(self, channel: str, rest: list[str], book: dict[str, Any]) -> Iterator[Expected]:
        if len(rest) == 4:
            keys: Keys = {"kind": exact("snapshot"), "reason": ("subscribe", "exchange"), **read_levels(book)}
            return iter([message("book", rest[0], "-".join(rest[1:]), book["timestamp"], keys)])
        previous = book.get("prev_change_id")
        kind = book.get("type") or ("snapshot" if previous is None else "change")
        read = self._read_snapshot if kind == "snapshot" else self._read_change
        return read(channel, rest, book)

    def _read_snapshot(self, channel: str, rest: list[str], book: dict[str, Any]) -> Iterator[Expected]:
        reason = "resync" if channel in self._broken else "exchange" if channel in self._chains else "subscribe"
        self._broken.discard(channel)
        self._chains[channel] = book["change_id"]
        keys: Keys = {"kind": exact("snapshot"), "reason": exact(reason), **read_levels(book)}
        if "prev_change_id" in book:
            keys["prev_change_id"] = (ABSENT, book["prev_change_id"])
        yield message("book", rest[0], rest[1], book["timestamp"], keys)

    def _read_change(self, channel: str, rest: list[str], book: dict[str, Any]) -> Iterator[Expected]:
        """A change is owed only where it continues the chain; the break of a chain is owed a gap, once."""
        standing = self._chains.get(channel)
        if channel in self._broken or standing is None:
            return
        previous = book.get("prev_change_id")
        delta: Keys = {"kind": exact("delta"), "prev_change_id": exact(previous), **read_levels(book)}
        expected = message("book", rest[0], rest[1], book["timestamp"], delta)
        if previous != standing:
            self._broken.add(channel)
            ids: Keys = {"last_change_id": exact(standing), "next_change_id": (ABSENT, int)}
            yield gap(expected, ids)
            return
        self._chains[channel] = book["change_id"]
        yield expected

    def _read_ticker(self, channel: str, rest: list[str], data: dict[str, Any]) -> Iterator[Expected]:
        yield message("ticker", rest[0], rest[1], data["timestamp"], read_ticker_keys(data))

    def _read_incremental(self, channel: str, rest: list[str], data: dict[str, Any]) -> Iterator[Expected]:
        if data["type"] == "snapshot":
            self._tickers[channel] = data
        elif channel in self._tickers:
            self._tickers[channel] = merge(self._tickers[channel], data)
        else:
            return
        keys = read_ticker_keys(self._tickers[channel])
        keys.pop("type")
        yield message("ticker", rest[0], "incremental", data["timestamp"], keys)


def gap(before: Expected, keys: Keys) -> Expected:
    """A gap that the stream itself shows, on the topic of the message that revealed it."""
    plain: Keys = {"id": (int,), "reason": exact("sequence"), "from_ts": (int,), "to_ts": (int,)}
    head: Keys = {"type": exact("gap"), "instrument": before.keys["instrument"], "exchange_ts": exact(0)}
    return Expected(before.topic, {**head, **plain, **keys})


def merge(old: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Lay the members of a change over what was, deeply."""
    merged = dict(old)
    for key, value in change.items():
        inner = isinstance(value, dict) and isinstance(old.get(key), dict)
        merged[key] = merge(old[key], value) if inner else value
    return merged


def read_trade(trade: dict[str, Any], interval: str) -> Expected:
    """One trade, on its own instrument's topic."""
    keys: Keys = {"side": exact(trade["direction"]), "trade_id": exact(str(trade["trade_id"]))}
    keys["trade_seq"] = exact(trade["trade_seq"])
    for key in TRADE_NUMBERS:
        keys[key] = as_float(trade[key]) if key in trade else (ABSENT, None)
    keys["tick_direction"] = exact(trade["tick_direction"]) if "tick_direction" in trade else (ABSENT, None)
    for key in TRADE_OPTIONAL:
        if key in trade:
            value = trade[key]
            keys[key] = (ABSENT, None) if value is None else exact(str(value)) if "id" in key else as_float(value)
    keys |= {key: (ABSENT,) if trade[key] is None else exact(trade[key]) for key in TRADE_COUNTS if key in trade}
    return message("trade", trade["instrument_name"], interval, trade["timestamp"], keys)


def read_levels(book: dict[str, Any]) -> Keys:
    """Bids and asks as [price, amount] in the order sent; the action word only tells removals."""
    keys: Keys = {"change_id": exact(book["change_id"])}
    for side in ("bids", "asks"):
        keys[side] = exact([[float(p), 0.0 if action == ["delete"] else float(a)] for *action, p, a in book[side]])
    return keys


def read_ticker_keys(data: dict[str, Any]) -> Keys:
    """All that Deribit sends, the members of stats and greeks beside the others."""
    flat = {**data, **(data.get("stats") or {}), **(data.get("greeks") or {})}
    keys: Keys = {key: as_float(value) if key in TICKER_FLOATS else as_number(value) for key, value in flat.items()}
    for absorbed in ("stats", "greeks", "timestamp", "instrument_name"):
        keys.pop(absorbed, None)
    return keys


def read_quote(channel: str, rest: list[str], data: dict[str, Any]) -> Iterator[Expected]:
    names = ("best_bid_price", "best_bid_amount", "best_ask_price", "best_ask_amount")
    yield message("quote", rest[0], "raw", data["timestamp"], {name: as_float(data[name]) for name in names})


def read_funding(channel: str, rest: list[str], data: dict[str, Any]) -> Iterator[Expected]:
    keys = {name: as_float(data[name]) for name in ("interest", "index_price")}
    yield message("funding", rest[0], rest[1], data["timestamp"], keys)


def read_index(channel: str, rest: list[str], data: dict[str, Any]) -> Iterator[Expected]:
    yield message("index", rest[0], "raw", data["timestamp"], {"price": as_float(data["price"])})


def read_volatility(channel: str, rest: list[str], data: dict[str, Any]) -> Iterator[Expected]:
    yield message("volatility", rest[0], "raw", data["timestamp"], {"volatility": as_float(data["volatility"])})


def read_expiration(channel: str, rest: list[str], data: dict[str, Any]) -> Iterator[Expected]:
    keys = {"price": as_float(data["price"]), "seconds": as_number(data["seconds"])}
    yield message("expiration_price", rest[0], "raw", None, {**keys, "is_estimated": exact(data["is_estimated"])})


def read_candle(channel: str, rest: list[str], data: dict[str, Any]) -> Iterator[Expected]:
    keys = {name: as_float(data[name]) for name in ("open", "high", "low", "close", "volume", "cost")}
    # Deribit gives the bar's start only: told as the time, or none told; the contract leaves both.
    when: Keys = {"exchange_ts": (data["tick"] * MS, 0)}
    yield message("candle", rest[1], rest[2], None, {**keys, "tick": exact(data["tick"]), **when})


def read_marks(channel: str, rest: list[str], data: list[dict[str, Any]]) -> Iterator[Expected]:
    marks = [
        {"instrument": m["instrument_name"], **{key: as_float(m[key])[0] for key in ("mark_price", "iv")}} for m in data
    ]
    newest = max((m["timestamp"] for m in data), default=None)
    yield message("mark_prices", rest[1], "raw", newest, {"marks": exact(marks)})


def read_instrument(channel: str, rest: list[str], data: dict[str, Any]) -> Iterator[Expected]:
    keys = {key: (value, *as_float(value)) for key, value in data.items()}
    for absorbed in ("timestamp", "instrument_name"):
        keys[absorbed] = (ABSENT, data[absorbed])
    yield message("instrument", data["instrument_name"], "raw", data["timestamp"], keys)


def read_platform(channel: str, rest: list[str], data: dict[str, Any]) -> Iterator[Expected]:
    keys = {key: exact(value) for key, value in data.items()}
    keys["price_index"] = (ABSENT, data.get("price_index"))
    yield message("platform", data.get("price_index") or "all", "raw", data.get("timestamp"), keys)


def read_other(channel: str, rest: list[str], data: Any) -> Iterator[Expected]:
    rows = data if isinstance(data, list) else [data]
    stamps = [row["timestamp"] for row in rows if isinstance(row, dict) and "timestamp" in row]
    keys: Keys = {"channel": exact(channel), "data": exact(data)}
    yield message("other", channel.replace(".", ":"), "raw", max(stamps, default=None), keys)


def compare_all(expected: Iterable[Expected], received: Iterable[tuple[str, dict[str, Any]]]) -> list[str]:
    """Every difference between what was owed and what came, topic by topic; an empty list is a pass."""
    owed, came = defaultdict(list), defaultdict(list)
    for one in expected:
        owed[one.topic].append(one.keys)
    faults = []
    for topic, body in received:
        if body.get("type") not in BESIDE_DATA and not body.get("join"):
            came[topic].append(body)
    for topic in sorted({*owed, *came}):
        faults += compare_topic(topic, owed[topic], came[topic])
    return faults


def compare_topic(topic: str, owed: list[Keys], came: list[dict[str, Any]]) -> list[str]:
    """The differences on one topic, where order counts."""
    faults = [] if len(owed) == len(came) else [f"{topic}: {len(came)} messages, {len(owed)} owed"]
    for place, (keys, body) in enumerate(zip(owed, came, strict=False), 1):
        faults += [f"{topic} message {place}: {fault}" for fault in compare_message(keys, body)]
    return faults


def compare_message(keys: Keys, body: dict[str, Any]) -> Iterator[str]:
    """The differences of one message: wrong values, keys that lack, keys that nobody sent."""
    for key, choices in keys.items():
        value = body.get(key, ABSENT)
        if not any(value is choice or same(value, choice) for choice in choices):
            shown = "absent" if value is ABSENT else repr(value)[:200]
            yield f"{key} is {shown}, not {' or '.join(repr(c)[:200] for c in choices)}"
    for key in body.keys() - keys.keys() - set(ENVELOPE):
        yield f"{key} = {body[key]!r:.200} stands in no contract"
