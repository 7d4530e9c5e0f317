"""What a payload holds, by type: the wire's tables as data. No I/O, no clock.

A key that ends in `?` may be absent. A value is named by a word of KINDS; `or nil` where the exchange may send null.
Keys beyond these are allowed: a reader ignores what it does not know.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

ENVELOPE: Mapping[str, str] = {
    "type": "str",
    "exchange": "str",
    "instrument": "str",
    "epoch": "count",
    "seq": "count",
    "exchange_ts": "count",
    "receive_ts": "count",
    "join?": "true",
}

_BEST = {
    "best_bid_price": "float or nil",
    "best_bid_amount": "float or nil",
    "best_ask_price": "float or nil",
    "best_ask_amount": "float or nil",
}

SCHEMA: Mapping[str, Mapping[str, str]] = {
    "trade": {
        "price": "float",
        "amount": "float",
        "side": "side",
        "trade_id": "str",
        "trade_seq": "count",
        "mark_price?": "float or nil",
        "index_price?": "float or nil",
        "tick_direction?": "count",
        "iv?": "float or nil",
        "liquidation?": "str",
        "block_trade_id?": "str",
        "combo_id?": "str",
        "combo_trade_id?": "str",
        "contracts?": "float or nil",
        "starbase_match_id?": "count",
        "starbase_timestamp?": "count",
        "block_rfq_id?": "count",
        "block_trade_leg_count?": "count",
        "backfilled?": "true",
    },
    "book": {
        "kind": "book kind",
        "change_id": "count",
        "prev_change_id?": "count",
        "bids": "levels",
        "asks": "levels",
        "reason?": "snapshot reason",
    },
    "ticker": {
        **_BEST,
        "last_price": "float or nil",
        "mark_price": "float or nil",
        "index_price": "float or nil",
        "open_interest?": "float or nil",
        "state": "str",
        "min_price?": "float or nil",
        "max_price?": "float or nil",
        "settlement_price?": "float or nil",
        "current_funding?": "float or nil",
        "funding_8h?": "float or nil",
        "mark_iv?": "float or nil",
        "bid_iv?": "float or nil",
        "ask_iv?": "float or nil",
        "underlying_price?": "float or nil",
        "interest_rate?": "float or nil",
        "delta?": "float or nil",
        "gamma?": "float or nil",
        "vega?": "float or nil",
        "theta?": "float or nil",
        "rho?": "float or nil",
        "high?": "float or nil",
        "low?": "float or nil",
        "volume?": "float or nil",
        "price_change?": "float or nil",
    },
    "quote": _BEST,
    "index": {"price": "float"},
    "volatility": {"volatility": "float"},
    "expiration_price": {"price": "float", "seconds": "count", "is_estimated": "bool"},
    "mark_prices": {"marks": "marks"},
    "funding": {"interest": "float", "index_price": "float"},
    "candle": {
        "open": "float",
        "high": "float",
        "low": "float",
        "close": "float",
        "volume": "float",
        "cost": "float",
        "tick": "count",
    },
    "instrument": {"state?": "str"},
    "platform": {},
    "other": {"channel": "str", "data": "any"},
    "gap": {
        "id": "count",
        "reason": "gap reason",
        "from_ts": "count",
        "to_ts": "count",
        "last_change_id?": "count",
        "next_change_id?": "count",
        "missing_from?": "count",
        "missing_to?": "count",
        "healing?": "bool",
    },
    "repair": {"gap": "count", "repaired": "count", "missing": "ranges"},
    "status": {"state": "str", "reason?": "str", "connection": "str"},
    "heartbeat": {"wire": "count", "connection": "str", "state": "str", "published": "count", "lag": "float or nil"},
}
"""The further keys of each type of payload. Prices and amounts are floats; counts and times are ints from 0."""


def _is_float(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_level(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_float(value[0]) and _is_float(value[1]) and value[1] >= 0


def _is_mark(value: Any) -> bool:
    return isinstance(value, dict) and not find_faults(
        value, {"instrument": "str", "mark_price": "float or nil", "iv": "float or nil"}
    )


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value)) and value[0] <= value[1]


def _is_list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _is_one_of(*words: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in words


KINDS: Mapping[str, Callable[[Any], bool]] = {
    "any": lambda value: True,
    "bool": lambda value: isinstance(value, bool),
    "true": lambda value: value is True,
    "str": lambda value: isinstance(value, str),
    "count": _is_count,
    "float": _is_float,
    "float or nil": lambda value: value is None or _is_float(value),
    "levels": _is_list_of(_is_level),
    "marks": _is_list_of(_is_mark),
    "ranges": _is_list_of(_is_range),
    "side": _is_one_of("buy", "sell"),
    "book kind": _is_one_of("snapshot", "delta"),
    "snapshot reason": _is_one_of("subscribe", "resync", "exchange"),
    "gap reason": _is_one_of("disconnect", "sequence", "restart", "overflow"),
}
"""Each word for a value, and the check behind it."""


def find_faults(payload: Mapping[Any, Any], shape: Mapping[str, str]) -> list[str]:
    """Compare a payload with a shape (ENVELOPE, or a row of SCHEMA); return one line for each key that breaks it."""
    faults = []
    for name, kind in shape.items():
        key = name.rstrip("?")
        if key not in payload:
            if key == name:
                faults.append(f"{key} is missing")
        elif not KINDS[kind](payload[key]):
            faults.append(f"{key} must be {kind}, is {payload[key]!r:.60}")
    return faults
