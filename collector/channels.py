"""Deribit's channel names: what each one is, and the topic that it feeds. No I/O, no clock.

Source: Deribit's subscription pages (docs.deribit.com, 2026). A name that no pattern here knows is still a
channel: its messages are published as `other`.
"""

import re
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from typing import NamedTuple

from collector.messages import EXCHANGE, Topic

INTERVALS = ("raw", "100ms", "agg2")
KINDS = ("future", "option", "spot", "future_combo", "option_combo", "combo", "any")
RESOLUTIONS = ("1", "3", "5", "10", "15", "30", "60", "120", "180", "360", "720", "1D")
GROUPS = ("none", "1", "2", "5", "10", "25", "100", "250")
DEPTHS = ("1", "10", "20")

ENDED = frozenset({"delivered", "archivized", "closed", "terminated"})
"""States after which an instrument never comes back; the last two are the words used before 2026."""

LISTINGS = ("instrument.state.any.any", "instrument.creation.any.any")
"""The channels by which a connection with patterns hears of instruments that come and go, whatever the patterns are."""

_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,200}\Z")
_OPTION = re.compile(r"-\d{1,2}[A-Z]{3}\d{2}-[0-9d]+-[CP]\Z")
_DATED = re.compile(r"-\d{1,2}[A-Z]{3}\d{2}\Z")


class Channel(NamedTuple):
    """What a channel name says.

    `type` is the message type it feeds; `instrument` and `interval` are as in the topic, `instrument` is "" where
    one channel feeds the topics of many instruments (then `kind` and `currency` say of which).
    """

    name: str
    type: str
    instrument: str
    interval: str
    kind: str = ""
    currency: str = ""
    grouped: bool = False

    @property
    def needs_login(self) -> bool:
        """Whether Deribit gives it to logged-in connections only (error 13778 or 13009 otherwise)."""
        return self.is_private or self.name.endswith(".raw")

    @property
    def has_intervals(self) -> bool:
        """Whether Deribit offers it as `raw` and, without login, as `100ms`."""
        return self.type in _TYPES.values()

    @property
    def is_private(self) -> bool:
        """Whether it is subscribed by private/subscribe."""
        return self.name.startswith(("user.", "block_rfq.maker", "block_rfq.taker", "block_trade_confirmations"))

    @property
    def has_spot(self) -> bool:
        """Whether it feeds the topics of spot pairs among others."""
        return self.kind in ("spot", "any")

    @property
    def topic(self) -> str | None:
        """The one topic that it feeds; None where it feeds many."""
        if not self.instrument:
            return None
        return str(Topic(EXCHANGE, self.type, self.instrument, self.interval))


KEPT = 16_384
"""Names whose meaning is kept: all that the exchange may have, which a look at the listings parses five times (20 ms
for 3,000 channels, 40 without). Instruments come and go for months, and each name takes 0.4 KB in each process.
"""

_SIMPLE = {
    "quote": "quote",
    "deribit_price_index": "index",
    "deribit_volatility_index": "volatility",
    "estimated_expiration_price": "expiration_price",
}


@lru_cache(KEPT)
def parse_channel(name: str) -> Channel:
    """Say what a channel name means.

    Raises ValueError, in one line, for text that cannot be a channel, and for a known family with a part that
    Deribit does not offer (it would leave such a channel out in silence).
    """
    if not _NAME.match(name) or ".." in name or name.startswith(".") or name.endswith("."):
        raise ValueError(f"{name[:80]!r} is not a channel name (letters, digits, . _ -)")
    family, _, rest = name.partition(".")
    found = _parse_one(name, family, rest.split(".")) or _parse_many(name, family, rest.split("."))
    if found is None and family in _FORMS:
        raise ValueError(f"{name!r}: {family} channels have the form {_FORMS[family]}")
    return found or Channel(name, "other", name.replace(".", ":"), "raw")


def _parse_one(name: str, family: str, parts: list[str]) -> Channel | None:
    """Channels that feed one topic."""
    match family, parts:
        case (("trades" | "book" | "ticker" | "perpetual"), [instrument, interval]):
            return Channel(name, _TYPES[family], instrument, _check("interval", interval, INTERVALS, name))
        case "book", [instrument, group, depth, interval]:
            _check("depth", depth, DEPTHS, name)
            _check("interval", interval, INTERVALS[1:], name)
            _check("group", group, GROUPS, name)
            return Channel(name, "book", instrument, f"{group}-{depth}-{interval}", grouped=True)
        case "incremental_ticker", [instrument] if instrument:
            return Channel(name, "ticker", instrument, "incremental")
        case "chart", ["trades", instrument, resolution]:
            return Channel(name, "candle", instrument, _check("resolution", resolution, RESOLUTIONS, name))
        case "markprice", ["options", index]:
            return Channel(name, "mark_prices", index, "raw")
        case _, [subject] if subject and family in _SIMPLE:
            return Channel(name, _SIMPLE[family], subject, "raw")
    return None


def _parse_many(name: str, family: str, parts: list[str]) -> Channel | None:
    """Channels that feed the topics of many instruments."""
    match family, parts:
        case "trades", [kind, currency, interval]:
            _check("kind", kind, KINDS, name)
            return Channel(name, "trade", "", _check("interval", interval, INTERVALS, name), kind, currency)
        case "instrument", ["state" | "creation", kind, currency]:
            return Channel(name, "instrument", "", "raw", _check("kind", kind, KINDS, name), currency)
        case "platform_state", [""] | ["public_methods_state"]:
            return Channel(name, "platform", "", "raw")
    return None


_TYPES = {"trades": "trade", "book": "book", "ticker": "ticker", "perpetual": "funding"}
"""The families of which Deribit offers each channel in INTERVALS."""

_FORMS = {
    "trades": "trades.INSTRUMENT.INTERVAL or trades.KIND.CURRENCY.INTERVAL",
    "book": "book.INSTRUMENT.INTERVAL or book.INSTRUMENT.GROUP.DEPTH.INTERVAL",
    "ticker": "ticker.INSTRUMENT.INTERVAL",
    "perpetual": "perpetual.INSTRUMENT.INTERVAL",
    "quote": "quote.INSTRUMENT",
    "incremental_ticker": "incremental_ticker.INSTRUMENT",
    "chart": "chart.trades.INSTRUMENT.RESOLUTION",
    "markprice": "markprice.options.INDEX",
    "instrument": "instrument.state.KIND.CURRENCY or instrument.creation.KIND.CURRENCY",
    "platform_state": "platform_state or platform_state.public_methods_state",
    **{family: f"{family}.INDEX" for family in _SIMPLE if family != "quote"},
}


def _check(what: str, value: str, offered: tuple[str, ...], name: str) -> str:
    if value not in offered:
        raise ValueError(f"{name!r}: {what} {value!r} is not offered ({', '.join(offered)})")
    return value


def guess_kind(instrument: str) -> str:
    """The kind of an instrument by its name alone: future, option, spot, future_combo or option_combo."""
    if instrument.endswith("-PERPETUAL") or _DATED.search(instrument):
        return "future"
    if _OPTION.search(instrument):
        return "option"
    if "-FS-" in instrument:
        return "future_combo"
    return "option_combo" if "-" in instrument else "spot"


_EXPIRY = re.compile(r"[-_](\d{1,2})([A-Z]{3})(\d{2})(?![^-_])")
_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")


def guess_expiry(instrument: str) -> int | None:
    """When an instrument expires, in ns, by its name alone: at 08:00 UTC of the day in it. None without a day.

    A combo ends with the first of its legs (recorded: BTC-FS-22MAY26_19MAY26 expires on the 19th).
    """
    return min(filter(None, map(_find_expiry, _EXPIRY.findall(instrument))), default=None)


@lru_cache(1024)
def _find_expiry(date: tuple[str, str, str]) -> int | None:
    """The time (ns) of a day, month and year as names have them; None if there is no such day. Thousands share one."""
    day, month, year = date
    with suppress(ValueError):
        when = datetime(2000 + int(year), _MONTHS.index(month) + 1, int(day), 8, tzinfo=UTC)
        return int(when.timestamp()) * 1_000_000_000
    return None


def has_expired(instrument: str, now: int) -> bool:
    """Whether the life of an instrument is over at `now` (ns), by its name alone."""
    expiry = guess_expiry(instrument)
    return expiry is not None and expiry < now


def guess_currencies(instrument: str) -> frozenset[str]:
    """The currencies under which Deribit may file an instrument: that which settles it, of spot both.

    Recorded: BTC_USDC-PERPETUAL is filed under USDC alone (and BTC-PERPETUAL under BTC); of the spot pair BTC_USDC we
    reckon with both.
    """
    pair = instrument.split("-", 1)[0].split("_")
    return frozenset(pair if guess_kind(instrument) == "spot" else pair[-1:])


def share_topic(one: Channel, other: Channel) -> bool:
    """Whether two channels could feed the same topic. Such a pair must not run side by side.

    instrument.state and instrument.creation (also platform_state and its sub-channel) are different
    events on one topic: they may stand together on one connection, which numbers them in one row.
    """
    if one.type != other.type or one.interval != other.interval:
        return False
    if one.instrument and other.instrument:
        return one.instrument == other.instrument
    if one.type == "platform":  # of all: its topics are named after indices, which have no kind
        return True
    wide, narrow = (other, one) if one.instrument else (one, other)
    if narrow.instrument:
        return _kinds_meet(wide.kind, guess_kind(narrow.instrument)) and (
            wide.currency == "any" or wide.currency in guess_currencies(narrow.instrument)
        )
    return _kinds_meet(wide.kind, narrow.kind) and (
        "any" in (wide.currency, narrow.currency)
        or wide.currency == narrow.currency
        or (wide.has_spot and narrow.has_spot)  # ETH_BTC may come on both
    )


def _kinds_meet(one: str, other: str) -> bool:
    if "any" in (one, other) or one == other:
        return True
    pair = {one, other}
    return "combo" in pair and bool(pair & {"future_combo", "option_combo"})
