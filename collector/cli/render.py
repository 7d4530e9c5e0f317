"""Messages and numbers as text for a person: the value of each type in a few words, and one line for a message."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from collector.client.stream import Loss, Message
from collector.words import printable, say_count


def show_number(value: Any) -> str:
    """A price or amount: thousands apart, no needless digits."""
    if isinstance(value, int | float):
        return f"{value:,.10g}"
    return "-" if value is None else str(value)[:20]


def show_clock(ns: int) -> str:
    """The time of day, UTC, with milliseconds."""
    seconds, rest = divmod(ns, 1_000_000_000)
    return f"{time.strftime('%H:%M:%S', time.gmtime(seconds))}.{rest // 1_000_000:03d}"


def show_level(amount: Any, price: Any) -> str:
    """Amount at a price."""
    return f"{show_number(amount)} @ {show_number(price)}"


def describe(message: Message) -> str:
    """What a message says, in one short line."""
    say = _WORDS.get(message.type)
    return printable(say(message) if say else say_count(len(message.payload), "key"))


def pad_rows(rows: Iterable[Iterable[str]]) -> Iterator[list[str]]:
    """The cells of each row, as wide as their column and without what could steer a terminal."""
    cells = [[printable(text) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield [text.ljust(width) for text, width in zip(row, widths, strict=True)]


def format_line(item: Message | Loss) -> str:
    """One line for a message or a loss, aligned as far as lengths allow."""
    if isinstance(item, Loss):
        return printable(f"{'':12}  LOSS      {item}")
    join = "  (join)" if item.is_join else ""
    kind = item.type if item.type == item.topic.type else f"{item.topic.type} {item.type}"
    return f"{show_clock(item.receive_ts)}  {kind:8}  {item.instrument:22}  {item.interval:7}  {describe(item)}{join}"


def _trade(m: Mapping[str, Any]) -> str:
    marks = [word for word in ("liquidation", "block_trade_id", "combo_id", "backfilled") if m.get(word)]
    return f"{m['side']:4} {show_level(m['amount'], m['price'])}" + (f"  {' '.join(marks)}" if marks else "")


def _book(m: Mapping[str, Any]) -> str:
    changes = [f"{side} {show_level(amount, price)}" for side in ("bids", "asks") for price, amount in m[side][:2]]
    more = max(0, len(m["bids"]) - 2) + max(0, len(m["asks"]) - 2)
    return f"{m['kind']:8} {m['change_id']}  {', '.join(changes)}" + (f", {more} more" if more else "")


def _best(m: Mapping[str, Any]) -> str:
    bid = show_level(m["best_bid_amount"], m["best_bid_price"])
    return f"bid {bid}  ask {show_level(m['best_ask_amount'], m['best_ask_price'])}"


def _ticker(m: Mapping[str, Any]) -> str:
    return f"{_best(m)}  last {show_number(m['last_price'])}  mark {show_number(m['mark_price'])}  {m['state']}"


def _gap(m: Mapping[str, Any]) -> str:
    text = f"GAP {m['id']}: {m['reason']}"
    if m["from_ts"]:
        text += f", {(m['to_ts'] - m['from_ts']) / 1e9:.3f} s"
    if "missing_from" in m:
        text += f", trades from {m['missing_from']} to {m.get('missing_to', '?')}"
    if "last_change_id" in m:
        text += f", book after change {m['last_change_id']}"
    return text + (", healing" if m.get("healing") else "")


def _repair(m: Mapping[str, Any]) -> str:
    missing = sum(last - first + 1 for first, last in m["missing"])
    return f"repair of gap {m['gap']}: {m['repaired']} came, {missing} stay missing"


def _heartbeat(m: Mapping[str, Any]) -> str:
    return f"{m['state']}, {m['published']:,} published, lag {(m['lag'] or 0) * 1e3:,.0f} ms"


def _candle(m: Mapping[str, Any]) -> str:
    prices = (f"{word} {show_number(m[word])}" for word in ("open", "high", "low", "close", "volume"))
    return "  ".join(prices)


def _mark_prices(m: Mapping[str, Any]) -> str:
    first = m["marks"][0] if m["marks"] else None
    example = f", {first['instrument']} {show_number(first['mark_price'])}" if first else ""
    return say_count(len(m["marks"]), "option") + example


def _platform(m: Mapping[str, Any]) -> str:
    known = ("maintenance", "locked", "allow_unauthenticated_public_requests")
    return ", ".join(f"{word} {str(m[word]).lower()}" for word in known if word in m)


_WORDS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "trade": _trade,
    "book": _book,
    "ticker": _ticker,
    "quote": _best,
    "index": lambda m: show_number(m["price"]),
    "volatility": lambda m: show_number(m["volatility"]),
    "expiration_price": lambda m: f"{show_number(m['price'])} in {m['seconds']} s",
    "mark_prices": _mark_prices,
    "funding": lambda m: f"interest {show_number(m['interest'])}  index {show_number(m['index_price'])}",
    "candle": _candle,
    "instrument": lambda m: str(m.get("state", "")),
    "platform": _platform,
    "other": lambda m: f"{m['channel']} {str(m['data'])[:80]}",
    "gap": _gap,
    "repair": _repair,
    "status": lambda m: f"status {m['state']}" + (f" ({m['reason']})" if m.get("reason") else ""),
    "heartbeat": _heartbeat,
}
