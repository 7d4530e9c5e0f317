"""Channels by pattern: which of an exchange's instruments a pattern stands for. No I/O, no clock.

A pattern is a channel name whose instrument is a glob, conditions in braces, or both:

    book.BTC-*.100ms
    ticker.{kind=option,currency=ETH,expiry<45d}.100ms
    quote.BTC-*{kind=option,strike>=80000}
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import filter as filter_names
from operator import eq, ge, gt, le, lt
from typing import Any, NamedTuple

from collector.channels import ENDED, KINDS, Channel, parse_channel
from collector.config.keys import show, suggest

PER_INSTRUMENT = ("trades", "book", "ticker", "incremental_ticker", "quote", "perpetual", "chart")
"""First words of the channels that stand for one instrument each."""

_KINDS = KINDS[:-1]  # without any, which says nothing of an instrument

SETTLING = 60_000
"""Ms after its expiry in which an instrument may still say its last word."""

_NEVER = 32_500_000_000_000
"""Ms since 1970; what is said to expire later does not expire."""

OF_TRADES = ("trades.", "chart.trades.")
"""How the channels begin that Deribit makes of trades: of spot pairs that are matched at Coinbase there are none."""

MAX_AROUND = 60
"""Letters of a pattern's channel around the instrument."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}\Z")
_PATTERN = re.compile(r"([a-z_.]+\.)((?:[\w*?-]|\[!?[\w-]+\])*)(?:\{([^{}]*)\})?((?:\.[A-Za-z0-9]+)*)\Z", re.ASCII)
_CONDITION = re.compile(r"([a-z_]+)\s*(<=|>=|<|>|=)([^<>=]*)\Z")
_WORD = re.compile(r"[A-Za-z0-9_]{1,30}\Z")
_NUMBER = re.compile(r"\d{1,12}(\.\d{1,9})?\Z")
_SPAN = re.compile(r"(\d{1,6}(?:\.\d{1,6})?)([dh])\Z")
_HOURS = {"d": 24, "h": 1}
_EQUAL = ("=",)
_COMPARE: dict[str, Callable[[float, Any], bool]] = {"<": lt, ">": gt, "<=": le, ">=": ge, "=": eq}
_ORDERED = tuple(_COMPARE)

CONDITIONS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "kind": (_EQUAL, "kind=option", f"the kind: {', '.join(_KINDS)}"),
    "currency": (_EQUAL, "currency=ETH", "the settlement currency; of spot either side"),
    "base": (_EQUAL, "base=BTC", "the base currency"),
    "quote": (_EQUAL, "quote=USDC", "the quote currency"),
    "settlement": (_EQUAL, "settlement=USDC", "the settlement currency"),
    "option_type": (_EQUAL, "option_type=call", "call or put"),
    "state": (_EQUAL, "state=open", "the state as the exchange writes it; what is in settlement is open too"),
    "expiry": (_ORDERED, "expiry<45d", "time to expiry in d or h, or a date: expiry<2026-12-25 (08:00 UTC)"),
    "strike": (_ORDERED, "strike>=80000", "an option's strike"),
}
"""The conditions: the signs that each takes, an example, and its meaning."""


@dataclass(frozen=True, slots=True)
class Instrument:
    """One row of the exchange's list, as far as patterns ask. `expiry` is in ms, 0 for what never expires.

    `has_trades`: whether the exchange publishes them.
    """

    name: str
    kind: str
    state: str = "open"
    base: str = ""
    quote: str = ""
    settlement: str = ""
    expiry: int = 0
    strike: float | None = None
    option_type: str = ""
    has_trades: bool = True

    def is_listed(self, now: int) -> bool:
        """Whether it is traded, or may be again, at `now` (ms)."""
        return self.state not in ENDED and not 0 < self.expiry <= now - SETTLING


ROUTED = ("is_csr", "is_cbe_routed")
"""The marks of a spot pair that is matched at Coinbase; listings on a channel bear the first alone."""


def is_instrument(name: Any) -> bool:
    """Whether a name can be an instrument's: what else stands in the exchange's list is left out."""
    return isinstance(name, str) and _NAME.match(name) is not None


def read_instrument(row: Any) -> Instrument | None:
    """Take an instrument from a row of public/get_instruments; None for what is no such row."""
    if not isinstance(row, dict) or not is_instrument(row.get("instrument_name")):
        return None
    expiry, strike = row.get("expiration_timestamp"), row.get("strike")

    def word(key: str, default: str = "") -> str:
        return value if isinstance(value := row.get(key), str) else default

    return Instrument(
        name=row["instrument_name"],
        kind=word("kind"),
        state=word("state", "open"),
        base=word("base_currency"),
        quote=word("quote_currency"),
        settlement=word("settlement_currency"),
        expiry=expiry if isinstance(expiry, int) and 0 < expiry < _NEVER else 0,
        strike=float(strike) if isinstance(strike, (int, float)) and abs(strike) < 1e15 else None,
        option_type=word("option_type"),
        has_trades=word("kind") != "spot" or not any(row.get(key) is True for key in ROUTED),
    )


class Condition(NamedTuple):
    """One condition. `value` is a word, a strike, or a moment of expiry in ms: of time left where `is_span`."""

    key: str
    sign: str
    value: str | float
    is_span: bool = False


class Pattern(NamedTuple):
    """A channel name with a hole for the instrument: `head` + name + `tail`."""

    head: str
    glob: str
    tail: str
    conditions: tuple[Condition, ...]

    def write_channel(self, instrument: str) -> str:
        """The channel of one instrument."""
        return f"{self.head}{instrument}{self.tail}"


def is_pattern(text: str) -> bool:
    """Whether a configured channel is a pattern."""
    return any(letter in text for letter in "*?[{}")


def parse_pattern(text: str) -> Pattern:
    """Read a pattern. Raises ValueError, in one line that says what to write instead."""
    match = _PATTERN.match(text)
    if match is None:
        raise ValueError(f"{show(text)}: one part may be a pattern, the instrument; write for example book.BTC-*.100ms")
    head, glob, braces, tail = match.groups()
    family = head.split(".")[0]
    if family not in PER_INSTRUMENT:
        meant = f"; did you mean {close}?" if (close := suggest(family, PER_INSTRUMENT, 0.7)) else ""
        raise ValueError(f"{show(text)}: patterns go over instruments, in {', '.join(PER_INSTRUMENT)}{meant}")
    channel = _parse_example(head, tail, text)
    if channel is None or channel.instrument != "INSTRUMENT" or len(head + tail) > MAX_AROUND:
        raise ValueError(f"{show(text)}: the pattern must stand for the instrument; write for example book.BTC-*.100ms")
    try:
        conditions = tuple(_parse_condition(part.strip()) for part in (braces or "").split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"{show(text)}: {error}") from None
    if not glob and not conditions:
        raise ValueError(f"{show(text)}: names no condition; write for example {{kind=option}}, or * for all")
    keys = [each.key for each in conditions if CONDITIONS[each.key][0] == _EQUAL]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ValueError(f"{show(text)}: {twice} stands twice, no instrument has both; write a pattern for each")
    return Pattern(head, glob or "*", tail, conditions)


def _parse_example(head: str, tail: str, pattern: str) -> Channel | None:
    """The channel of one instrument, None where none may stand; a refusal speaks of the pattern as it was written."""
    name = f"{head}INSTRUMENT{tail}"
    try:
        return parse_channel(name)
    except ValueError as error:
        if "'INSTRUMENT'" in str(error):
            return None
        raise ValueError(str(error).replace(repr(name), show(pattern))) from None


def _parse_condition(text: str) -> Condition:
    match = _CONDITION.match(text)
    key = re.split(r"[^A-Za-z_]", text)[0]
    if key not in CONDITIONS:
        close = suggest(key, CONDITIONS, 0.7)
        advice = f"did you mean {close}?" if close else f"there are {', '.join(CONDITIONS)}"
        raise ValueError(f"no condition is called {show(key)}; {advice}")
    signs, example, _ = CONDITIONS[key]
    if match is None or match[2] not in signs:
        raise ValueError(f"{show(text)} is no condition; write for example {example}, a comma between two")
    sign, value = match[2], match[3].strip()
    if key == "expiry":
        return _parse_expiry(sign, value)
    if key != "strike":
        return Condition(key, sign, _parse_word(key, value))
    if not _NUMBER.match(value):
        raise ValueError(f"strike {show(value)} is no number; write for example {example}")
    return Condition(key, sign, float(value))


def _parse_expiry(sign: str, value: str) -> Condition:
    if (span := _SPAN.match(value)) and sign != "=":
        return Condition("expiry", sign, float(span[1]) * _HOURS[span[2]] * 3_600_000, is_span=True)
    for form in ("%Y-%m-%d", "%d%b%y"):
        with suppress(ValueError):
            day = datetime.strptime(value, form)
            return Condition("expiry", sign, day.replace(hour=8, tzinfo=UTC).timestamp() * 1000)
    raise ValueError(
        f"expiry{sign}{show(value)[:40]} is neither a time nor a date; "
        "write for example expiry<45d, expiry<12h or expiry=2026-12-25"
    )


_CHOICES = {"kind": _KINDS, "option_type": ("call", "put")}


def _parse_word(key: str, value: str) -> str:
    if not _WORD.match(value):
        raise ValueError(f"{key} {show(value)} is no word; write for example {CONDITIONS[key][1]}")
    if key not in _CHOICES:
        return value.lower() if key == "state" else value.upper()
    if value.lower() not in _CHOICES[key]:
        close = suggest(value, _CHOICES[key])
        advice = f"did you mean {close}?" if close else f"there are {', '.join(_CHOICES[key])}"
        raise ValueError(f"no {key} is called {show(value)}; {advice}")
    return value.lower()


def meets(instrument: Instrument, pattern: Pattern, now: int) -> bool:
    """Whether an instrument whose name fits meets all other conditions of a pattern at `now` (ms)."""
    if pattern.head == "perpetual." and (instrument.kind != "future" or instrument.expiry):
        return False  # only futures without expiry have funding
    if pattern.head in OF_TRADES and not instrument.has_trades:
        return False
    return all(_holds(condition, instrument, now) for condition in pattern.conditions)


def _holds(condition: Condition, instrument: Instrument, now: int) -> bool:
    key, sign, value, is_span = condition
    if key == "expiry":
        return bool(instrument.expiry) and _COMPARE[sign](instrument.expiry - (now if is_span else 0), value)
    if key == "strike":
        return instrument.strike is not None and _COMPARE[sign](instrument.strike, value)
    return value in _list_words(key, instrument)


def _list_words(key: str, instrument: Instrument) -> Sequence[str]:
    """The words by which an instrument is found under a key."""
    if key == "kind":
        return (instrument.kind, "combo") if instrument.kind.endswith("_combo") else (instrument.kind,)
    if key == "currency":
        spot = instrument.kind == "spot" or not instrument.settlement
        return (instrument.base, instrument.quote) if spot else (instrument.settlement,)
    if key == "state" and instrument.state == "settlement":  # it passes each day, soon after 08:00 UTC
        return (instrument.state, "open")
    word: str = getattr(instrument, key)
    return (word,)


def expand(patterns: Iterable[str], listed: Mapping[str, Instrument], now: int) -> dict[str, dict[str, str]]:
    """Expand patterns over the instruments of an exchange, by name, at `now` (ms).

    Returns {pattern: {channel: instrument}}, in the order of the patterns, instruments by name. Small letters stand for
    capitals too: no two of Deribit's names differ in these alone.
    """
    living = {name.upper(): name for name in sorted(listed) if listed[name].is_listed(now)}
    found: dict[str, dict[str, str]] = {}
    for text in patterns:
        pattern = parse_pattern(text)
        named = [living[name] for name in filter_names(living, pattern.glob.upper())]
        found[text] = {pattern.write_channel(name): name for name in named if meets(listed[name], pattern, now)}
    return found
