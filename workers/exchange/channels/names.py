"""From a channel's name to its feed; None for what Deribit would silently leave out."""

from collections.abc import Callable

from workers.exchange.channels.account import Account, OwnFeed, PortfolioFeed
from workers.exchange.channels.feeds import (
    INDEX_FEEDS,
    PERIODS,
    BookFeed,
    ChartFeed,
    Feed,
    GroupedBookFeed,
    IncrementalTickerFeed,
    LifeFeed,
    PerpetualFeed,
    PlatformFeed,
    QuoteFeed,
    SteadyFeed,
    TickerFeed,
    TradesFeed,
    describe_announcement,
    describe_rfq,
    list_indices,
)
from workers.exchange.market.instruments import INVERSE, Instrument
from workers.exchange.market.market import Market

KINDS = ("future", "option", "spot", "future_combo", "option_combo", "combo", "any")
CURRENCIES = ("BTC", "ETH", "USDC", "USDT", "EURR", "any")
RESOLUTIONS = ("1", "3", "5", "10", "15", "30", "60", "120", "180", "360", "720", "1D")
GROUPS = ("none", "1", "2", "5", "10", "25", "100", "250")
DEPTHS = ("1", "10", "20")
_Families = dict[str, Callable[[str, Market, Instrument], Feed]]
_PACED: _Families = {"trades": TradesFeed, "book": BookFeed, "ticker": TickerFeed, "perpetual": PerpetualFeed}
_UNPACED: _Families = {"quote": QuoteFeed, "incremental_ticker": IncrementalTickerFeed}
"""Families of channels of one instrument, with an interval and without."""


def is_private(channel: str) -> bool:
    """Whether only private/subscribe gives it."""
    return channel.startswith(("user.", "block_rfq.maker.", "block_rfq.taker.", "block_trade_confirmations"))


def is_raw(channel: str) -> bool:
    """Whether it needs a login even where it is public (13778 without)."""
    return channel.endswith(".raw")


def open_feed(channel: str, market: Market, account: Account) -> Feed | None:
    """Make the feed of a channel; None if there is no such channel."""
    parts = channel.split(".")
    if is_private(channel):
        return _open_private(channel, parts, market, account)
    if parts[-1] in PERIODS and len(parts) > 2:
        feed = _open_paced(channel, parts, market)
        if feed is not None:
            feed.period = PERIODS[parts[-1]]
        return feed
    return _open_unpaced(channel, parts, market)


def _open_paced(channel: str, parts: list[str], market: Market) -> Feed | None:
    of = market.catalogue.by_name.get(parts[1])
    match parts:
        case ["trades", kind, currency, _] if kind in KINDS and currency in CURRENCIES:
            return TradesFeed(channel, market, None, kind, currency)
        case ["book", _, group, depth, interval] if of and group in GROUPS and depth in DEPTHS and interval != "raw":
            width = 0.0 if group == "none" else float(group) / (1.0 if of.base == "BTC" else 100.0)
            return GroupedBookFeed(channel, market, of, width, int(depth))
        case [family, _, _] if of and family in _PACED and (of.perpetual or family != "perpetual"):
            return _PACED[family](channel, market, of)
    return None


def _open_unpaced(channel: str, parts: list[str], market: Market) -> Feed | None:
    of = market.catalogue.by_name.get(parts[1]) if len(parts) > 1 else None
    match parts:
        case [family, _] if of and family in _UNPACED:
            return _UNPACED[family](channel, market, of)
        case ["chart", "trades", name, resolution] if name in market.catalogue.by_name and resolution in RESOLUTIONS:
            return ChartFeed(channel, market, market.catalogue.by_name[name], resolution)
        case ["instrument", "state" | "creation" as what, kind, currency] if kind in KINDS and currency in CURRENCIES:
            return LifeFeed(channel, market, kind, currency, what == "creation")
        case ["platform_state"]:
            return PlatformFeed(channel, market)
        case ["platform_state", "public_methods_state"]:
            return SteadyFeed(channel, market, lambda: {"allow_unauthenticated_public_requests": True}, 60_000)
        case ["announcements"]:
            return SteadyFeed(channel, market, lambda: describe_announcement(market), 20_000, at_once=False)
        case ["block_rfq", "trades", currency] if currency in CURRENCIES:
            return SteadyFeed(channel, market, lambda: describe_rfq(market, currency), 5000, at_once=False)
    return _open_index(channel, market)


def _open_index(channel: str, market: Market) -> Feed | None:
    family, _, index = channel.rpartition(".")
    describe = INDEX_FEEDS.get(family)
    known = list_indices(market)
    if family in ("deribit_volatility_index", "markprice.options"):
        known = [f"{coin.lower()}_usd" for coin in INVERSE] + (["xrp_usdc"] if family.startswith("mark") else [])
    if describe is None or index not in known:
        return None
    return SteadyFeed(channel, market, lambda: describe(market, index))


def _open_private(channel: str, parts: list[str], market: Market, account: Account) -> Feed | None:
    match parts:
        case ["user", "portfolio", currency] if currency == "any" or currency.upper() in account.balances:
            return PortfolioFeed(channel, market, account, currency.upper())
        case ["user", "orders" | "trades" | "changes" as what, name, interval] if interval in PERIODS:
            of = market.catalogue.by_name.get(name)
            return OwnFeed(channel, market, account, what, interval, name=name) if of else None
        case ["user", "orders" | "trades" | "changes" as what, kind, currency, interval] if interval in PERIODS:
            if kind in KINDS and currency in CURRENCIES:
                return OwnFeed(channel, market, account, what, interval, kind=kind, currency=currency)
        case ["user", "access_log" | "lock"] | ["user", "combo_trades" | "mmp_trigger", *_]:
            return Feed(channel, market)
        case ["block_rfq" | "block_trade_confirmations", *_]:
            return Feed(channel, market)
    return None
