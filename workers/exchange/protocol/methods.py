"""The methods that ask about the market, the same over HTTP and WebSocket. Pure: market and params in, result out."""

from collections.abc import Callable, Iterable
from typing import Any

from workers.exchange.channels.feeds import list_indices
from workers.exchange.channels.names import CURRENCIES, KINDS
from workers.exchange.market.instruments import COINS, Instrument, format_date
from workers.exchange.market.market import Market
from workers.exchange.market.payloads import Data, describe_order_book, describe_summary, describe_ticker
from workers.exchange.protocol.rpc import RpcError, refuse_param

VERSION = "1.2.26"
Params = dict[str, Any]
_DEPTHS = (1, 5, 10, 20, 50, 100, 1000, 10000)


def find_instrument(market: Market, params: Params, expired: bool = True) -> Instrument:
    """The instrument that instrument_name names. Raises RpcError -32602."""
    name = params.get("instrument_name")
    if name is None:
        raise refuse_param("instrument_name", "value required")
    known = market.catalogue
    of = known.by_name.get(str(name)) or (known.expired.get(str(name)) if expired else None)
    if of is None:
        raise refuse_param("instrument_name", "instrument not found")
    return of


def _read_choice(params: Params, key: str, offered: Iterable[str], default: str | None) -> str:
    value = params.get(key, default)
    if value is None:
        raise refuse_param(key, "value required")
    if value not in offered:
        raise refuse_param(key, f"invalid {key}")
    return str(value)


def _read_int(params: Params, key: str, default: int | None) -> int | None:
    value = params.get(key)
    if value is None or value == "":
        return default
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):  # infinity
        raise refuse_param(key, "must be an integer") from None


def _read_flag(params: Params, key: str) -> bool:
    return params.get(key) in (True, "true")


def get_instruments(market: Market, params: Params) -> Data:
    currency = _read_choice(params, "currency", (*CURRENCIES, "SOL"), "any")
    kind = _read_choice(params, "kind", KINDS, "any")
    catalogue = market.catalogue
    held = catalogue.expired if _read_flag(params, "expired") else catalogue.by_name
    return [of.row for of in held.values() if of.matches(kind, currency)]


def get_currencies(market: Market, params: Params) -> Data:
    return [
        {
            "currency": coin, "currency_long": coin, "coin_type": "BITCOIN" if coin == "BTC" else "ETHER",
            "min_confirmations": 1, "withdrawal_fee": 0.0, "min_withdrawal_fee": 0.0, "withdrawal_priorities": [],
            "network_currency": coin, "network_fee": 0.0, "decimals": 8 if coin == "BTC" else 6, "apr": 0.0,
            "in_cross_collateral_pool": False,
        }
        for coin in (*COINS, "USDC")
    ]  # fmt: skip


def get_order_book(market: Market, params: Params) -> Data:
    depth = _read_int(params, "depth", 5)
    if depth not in _DEPTHS:
        raise refuse_param("depth", "invalid depth")
    return describe_order_book(market, find_instrument(market, params), depth or 5)


def get_index_price(market: Market, params: Params) -> Data:
    name = _read_choice(params, "index_name", list_indices(market), None)
    price = market.index_price(name)
    return {"estimated_delivery_price": price, "index_price": price}


def get_expirations(market: Market, params: Params) -> Data:
    currency = _read_choice(params, "currency", (*CURRENCIES, "grouped"), None)
    kind = _read_choice(params, "kind", ("future", "option", "any"), None)
    kinds = ("option", "future") if kind == "any" else (kind,)
    if currency == "any":
        return {k: _list_dates(market, k, "any") for k in kinds}
    coins = ("BTC", "ETH", "USDC") if currency == "grouped" else (currency,)
    return {coin.lower(): {k: _list_dates(market, k, coin) for k in kinds} for coin in coins}


def _list_dates(market: Market, kind: str, currency: str) -> list[str]:
    found = [of for of in market.catalogue.by_name.values() if of.matches(kind, currency)]
    dates = [format_date(e) for e in sorted({of.expiry for of in found if not of.perpetual})]
    return dates + (["PERPETUAL"] if any(of.perpetual for of in found) else [])


def get_book_summary_by_currency(market: Market, params: Params) -> Data:
    currency = _read_choice(params, "currency", CURRENCIES, None)
    kind = _read_choice(params, "kind", KINDS, "any")
    found = [of for of in market.catalogue.by_name.values() if of.matches(kind, currency)]
    return [describe_summary(market, of) for of in found]


def get_combos(market: Market, params: Params) -> Data:
    currency = _read_choice(params, "currency", CURRENCIES, None)
    return [
        {
            "id": of.name, "state": "active",
            "legs": [{"amount": amount, "instrument_name": leg.name} for amount, leg in of.legs],
            "creation_timestamp": of.created, "instrument_id": of.row["instrument_id"], "state_timestamp": of.created,
        }
        for of in market.catalogue.by_name.values() if of.legs and of.matches("combo", currency)
    ]  # fmt: skip


def get_trades_by_instrument(market: Market, params: Params) -> Data:
    of = find_instrument(market, params)
    kept = _list_kept(market, market.trades[of.name])
    return _select_trades(kept, params, "seq", lambda trade: int(trade["trade_seq"]))


def get_trades_by_currency(market: Market, params: Params) -> Data:
    currency = _read_choice(params, "currency", CURRENCIES, None)
    kind = _read_choice(params, "kind", KINDS, "any")
    kept = _list_kept(market, (trade for of, trade in market.all_trades if of.matches(kind, currency)))
    return _select_trades(kept, params, "id", lambda trade: _count_id(trade["trade_id"], ""))


def _list_kept(market: Market, trades: Iterable[Data]) -> list[Data]:
    """The trades that are not too old: who asks for earlier ones by number is given these (measured, 2026)."""
    oldest = market.now - market.retention
    return [trade for trade in trades if trade["timestamp"] >= oldest]


def get_recent(select: Callable[[Market, Params], Data]) -> Callable[[Market, Params], Data]:
    """Trades by time: of an older start than the exchange keeps nothing is found, without an error."""

    def get(market: Market, params: Params) -> Data:
        start = _read_int(params, "start_timestamp", None)
        if start is not None and start < market.now - market.retention:
            return {"trades": [], "has_more": False}
        return select(market, params)

    return get


def _count_id(text: str, key: str) -> int:
    """The number in a trade id (`ETH-123`), by which ids are in order."""
    digits = text.rpartition("-")[2]
    if not digits.isdecimal() or len(digits) > 20:
        raise refuse_param(key, "invalid trade id")
    return int(digits)


def _read_edge(params: Params, key: str) -> int | None:
    if key.endswith("_id") and params.get(key) is not None:
        return _count_id(str(params[key]), key)
    return _read_int(params, key, None)


def _select_trades(trades: list[Data], params: Params, unit: str, place: Callable[[Data], int]) -> Data:
    count = _read_int(params, "count", 10) or 10
    if not 1 <= count <= 1000:
        raise refuse_param("count", "must be between 1 and 1000")
    sorting = _read_choice(params, "sorting", ("asc", "desc", "default"), "default")
    for key, bound, of in (
        (f"start_{unit}", 1, place), (f"end_{unit}", -1, place),
        ("start_timestamp", 1, _read_time), ("end_timestamp", -1, _read_time),
    ):  # fmt: skip
        edge = _read_edge(params, key)
        if edge is not None:
            trades = [trade for trade in trades if (of(trade) - edge) * bound >= 0]
    forward = params.get(f"start_{unit}") is not None or params.get("start_timestamp") is not None
    if sorting == "asc" or (sorting == "default" and forward):
        return {"trades": trades[:count], "has_more": len(trades) > count}
    return {"trades": trades[::-1][:count], "has_more": len(trades) > count}


def _read_time(trade: Data) -> int:
    return int(trade["timestamp"])


def run_test(market: Market, params: Params) -> Data:
    if params.get("expected_result") == "exception":
        raise RpcError(-32602, {"reason": "exception", "param": "expected_result"})
    return {"version": VERSION}


def freeze_market(market: Market, params: Params) -> Data:
    """practice/freeze: stop the market (frozen=false: let it go on), to compare a client with it; not Deribit's."""
    market.frozen = params.get("frozen", True) not in (False, "false")
    return {"frozen": market.frozen}


MARKET_METHODS: dict[str, Callable[[Market, Params], Data]] = {
    "public/test": run_test,
    "public/status": lambda market, params: {"locked": "false"},
    "public/get_instruments": get_instruments,
    "public/get_instrument": lambda market, params: find_instrument(market, params).row,
    "public/get_currencies": get_currencies,
    "public/get_order_book": get_order_book,
    "public/ticker": lambda market, params: describe_ticker(market, find_instrument(market, params)),
    "public/get_index_price": get_index_price,
    "public/get_index_price_names": lambda market, params: list_indices(market),
    "public/get_expirations": get_expirations,
    "public/get_book_summary_by_currency": get_book_summary_by_currency,
    "public/get_combos": get_combos,
    "public/get_last_trades_by_instrument": get_trades_by_instrument,
    "public/get_last_trades_by_instrument_and_time": get_recent(get_trades_by_instrument),
    "public/get_last_trades_by_currency": get_trades_by_currency,
    "public/get_last_trades_by_currency_and_time": get_recent(get_trades_by_currency),
    "practice/freeze": freeze_market,
}
"""Method -> function(market, params). Raises RpcError for what is refused. practice/freeze is not Deribit's."""
