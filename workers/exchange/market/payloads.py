"""What the exchange says of the market, as Deribit's JSON objects with its key orders.

Reads the market, changes nothing.
"""

from collections import Counter
from typing import Any

from workers.exchange.market.book import ASK, BID, sort_levels
from workers.exchange.market.instruments import DAY, Instrument
from workers.exchange.market.market import Market
from workers.exchange.market.pricing import imply_volatility

Data = Any
"""JSON data: what stands under `data` of a notification, or under `result` of an answer."""


def describe_top(market: Market, of: Instrument) -> dict[str, Any]:
    """Best prices and amounts; an empty side is 0.0, as on the wire."""
    book = market.books[of.name]
    bid, ask = book.best_bid, book.best_ask
    return {
        "best_ask_price": 0.0 if ask is None else of.to_price(ask),
        "best_bid_price": 0.0 if bid is None else of.to_price(bid),
        "best_ask_amount": 0.0 if ask is None else of.to_amount(book.sides[ASK][ask]),
        "best_bid_amount": 0.0 if bid is None else of.to_amount(book.sides[BID][bid]),
    }


def describe_quote(market: Market, of: Instrument) -> Data:
    """Data of `quote.*`."""
    return {"timestamp": market.books[of.name].timestamp, "instrument_name": of.name, **describe_top(market, of)}


def describe_ticker(market: Market, of: Instrument) -> Data:
    """A full ticker object; of an expired instrument the final one (state delivered, delivery price)."""
    index, mark, day = market.index_price(of.index), market.round_mark(of), market.days[of.name]
    closed = of.state != "open"
    ticker: dict[str, Any] = {"timestamp": market.now, "state": of.state}
    ticker |= {"stats": _describe_stats(market, of), "index_price": index, "instrument_name": of.name}
    ticker["last_price"] = day.last_price
    if day.settlement_price and not closed and of.kind != "spot":
        ticker["settlement_price"] = day.settlement_price
    band = max(abs(mark) * 0.015, of.tick * 50)
    ticker |= {"min_price": _to_tick(of, mark - band), "max_price": _to_tick(of, mark + band)}
    interest = round(day.open_interest, 4)
    ticker |= {"open_interest": int(interest) if of.in_dollars else interest, "mark_price": mark}
    if of.kind == "option":
        ticker |= _describe_option(market, of)
    if of.kind == "option_combo":
        ticker |= _sum_options(market, of)
    if of.perpetual:
        ticker["interest_value"] = _draw_interest(market, of)
    ticker |= describe_top(market, of)
    ticker["estimated_delivery_price"] = "expired" if closed else index
    if closed:
        ticker["delivery_price"] = index
    if of.perpetual:
        ticker |= {"current_funding": 0.0, "funding_8h": round(_draw_interest(market, of) / 100.0, 8)}
    if of.legs:
        ticker |= {"implied_bid": ticker["best_bid_price"], "implied_ask": ticker["best_ask_price"]}
        ticker["combo_state"] = "inactive" if closed else "active"
    return ticker


def _to_tick(of: Instrument, price: float) -> float:
    floor = of.tick if not of.legs else price
    return round(round(max(price, floor) / of.tick) * of.tick, 6)


def _describe_stats(market: Market, of: Instrument) -> dict[str, Any]:
    day = market.days[of.name]
    change = None
    if day.first and day.last_price is not None:
        change = round((day.last_price / day.first - 1.0) * 100.0, 4)
    stats: dict[str, Any] = {"high": day.high, "low": day.low, "price_change": change, "volume": round(day.volume, 8)}
    if of.kind != "spot":
        stats["volume_usd"] = round(day.volume_usd, 2)
    if of.perpetual:
        stats["volume_notional"] = stats["volume_usd"]
    return stats


def _draw_interest(market: Market, of: Instrument) -> float:
    return round((market.mark_price(of) / market.index_price(of.index) - 1.0) * 10.0, 12)


def _describe_option(market: Market, of: Instrument) -> dict[str, Any]:
    value, forward = market.value(of), market.forward(of)
    book, years = market.books[of.name], market.count_years(of)
    implied = {}
    for key, tick in (("bid_iv", book.best_bid), ("ask_iv", book.best_ask)):
        price = 0.0 if tick is None else of.to_price(tick) * (forward if of.inverse else 1.0)
        implied[key] = round(imply_volatility(of.call, forward, of.strike, years, price) * 100.0, 2)
    greeks = {
        "delta": round(value.delta, 5), "gamma": round(value.gamma, 5), "vega": round(value.vega, 5),
        "theta": round(value.theta, 5), "rho": round(value.rho, 5),
    }  # fmt: skip
    dated = f"{of.base}-{of.name.split('-')[1]}"
    known = dated in market.catalogue.by_name
    return {
        "mark_iv": round(market.volatility(of) * 100.0, 2), **implied, "underlying_price": round(forward, 4),
        "underlying_index": dated if known else f"SYN.{dated}", "interest_rate": 0.0, "greeks": greeks,
    }  # fmt: skip


def _sum_options(market: Market, combo: Instrument) -> dict[str, Any]:
    """What a combo of options has of its legs, added up."""
    legs = [(amount, _describe_option(market, leg)) for amount, leg in combo.legs]
    greeks = {key: round(sum(amount * leg["greeks"][key] for amount, leg in legs), 5) for key in legs[0][1]["greeks"]}
    return {
        "mark_iv": round(sum(amount * leg["mark_iv"] for amount, leg in legs), 2), "bid_iv": 0.0, "ask_iv": 0.0,
        "underlying_price": market.index_price(combo.index), "underlying_index": "index_price", "interest_rate": 0.0,
        "greeks": greeks,
    }  # fmt: skip


def list_levels(market: Market, of: Instrument, side: int, depth: int, group: float = 0.0) -> list[list[float]]:
    """One side of the true book, best first: [[price, amount], ...].

    In price steps of `group` (0: as it is): bids rounded down, asks rounded up.
    """
    width = max(1, round(group / of.tick))
    sums = market.books[of.name].sides[side]
    if width > 1:
        levels, sums = sums, Counter()
        for tick, lots in levels.items():
            sums[tick // width if side == BID else -(-tick // width)] += lots
    places = sort_levels(side, sums)[:depth]
    return [[of.to_price(place * width), of.to_amount(sums[place])] for place in places]


def describe_order_book(market: Market, of: Instrument, depth: int) -> Data:
    """Result of public/get_order_book."""
    sides = {"bids": list_levels(market, of, BID, depth), "asks": list_levels(market, of, ASK, depth)}
    return {**describe_ticker(market, of), **sides, "change_id": market.books[of.name].change_id}


def describe_summary(market: Market, of: Instrument) -> Data:
    """One row of public/get_book_summary_by_currency."""
    ticker = describe_ticker(market, of)
    bid, ask = ticker["best_bid_price"] or None, ticker["best_ask_price"] or None
    stats = ticker["stats"]
    row = {
        "volume": stats["volume"], "quote_currency": of.row["quote_currency"],
        "price_change": stats["price_change"], "open_interest": ticker["open_interest"],
        "mark_price": ticker["mark_price"],
        "mid_price": round((bid + ask) / 2, 6) if bid and ask else None, "low": stats["low"], "high": stats["high"],
        "last": ticker["last_price"], "instrument_name": of.name, "estimated_delivery_price": ticker["index_price"],
        "creation_timestamp": market.now, "bid_price": bid, "ask_price": ask, "base_currency": of.base,
    }  # fmt: skip
    optional = ("mark_iv", "underlying_price", "underlying_index", "interest_rate", "funding_8h", "current_funding")
    known = ticker | stats
    return row | {key: known[key] for key in ("volume_usd", *optional) if key in known}


def describe_perpetual(market: Market, of: Instrument) -> Data:
    """Data of `perpetual.*`."""
    price, interest = market.index_price(of.index), _draw_interest(market, of)
    return {"index_price": price, "interest": interest, "timestamp": market.now}


def describe_marks(market: Market, index: str) -> Data:
    """Data of `markprice.options.*`: every option of the index; iv is a fraction here."""
    return [
        {
            "timestamp": market.now, "iv": round(market.volatility(of), 4), "instrument_name": of.name,
            "mark_price": market.round_mark(of),
        }
        for of in market.catalogue.by_name.values() if of.kind == "option" and of.index == index
    ]  # fmt: skip


def describe_expiration(market: Market, index: str) -> Data:
    """Data of `estimated_expiration_price.*`: the next 08:00 UTC; estimated in its last half hour."""
    left = (8 * 3_600_000 - market.now) % DAY // 1000
    data: dict[str, Any] = {"seconds": left, "price": market.index_price(index), "is_estimated": left < 1800}
    if left < 1800:
        data |= {"left_ticks": left, "total_ticks": 1800}
    return data


def describe_ranking(market: Market, index: str) -> Data:
    """Data of `deribit_price_ranking.*`."""
    price, names = market.index_price(index), ("bitfinex", "bitstamp", "coinbase", "gemini", "itbit", "kraken")
    return [
        {
            "weight": 16.67, "original_price": round(price * (1 + (place - 2.5) * 1e-5), 4), "price": price,
            "identifier": name, "timestamp": market.now - 40 * place, "enabled": True,
        }
        for place, name in enumerate(names)
    ]  # fmt: skip


def describe_statistics(market: Market, index: str) -> Data:
    """Data of `deribit_price_statistics.*`."""
    price = market.index_price(index)
    return {
        "low24h": round(price * 0.98, 4), "high24h": round(price * 1.015, 4), "change24h": round(price * 0.004, 4),
        "index_name": index, "high_volatility": False,
    }  # fmt: skip
