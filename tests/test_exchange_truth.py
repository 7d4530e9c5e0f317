"""What the practice exchange says is true of its own market (units, signs, sums, ids), and as Deribit was recorded.

All in one process and without a clock: a market, its hub, and what its channels and methods give.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from collector.faults import parse_faults
from tests.exchange_client import KEYS, Line
from tests.support import FRAMES
from workers.exchange.channels.account import Account
from workers.exchange.channels.hub import Frame, Hub
from workers.exchange.exchange import Exchange, Settings
from workers.exchange.market.book import ASK, BID
from workers.exchange.market.instruments import Instrument
from workers.exchange.market.market import Event, Market
from workers.exchange.market.payloads import describe_expiration, describe_marks, describe_summary, describe_ticker
from workers.exchange.protocol.auth import DEFAULT_KEYS, Authority
from workers.exchange.protocol.connection import Connection
from workers.exchange.protocol.methods import MARKET_METHODS
from workers.exchange.protocol.rpc import RpcError
from workers.exchange.protocol.session import Credits

START = 1_765_541_474_000
SECONDS = 25


class Told:
    """A market that lives for a while, with all that its channels say; `frames` by channel, `events` in order."""

    def __init__(self, *channels: str, options: int = 60, start: int = START) -> None:
        self.market = Market(3, start, options=options, rate=1000)
        self.account = Account(self.market)
        self.hub = Hub(self.market, self.account)
        self.frames: defaultdict[str, list[Any]] = defaultdict(list)
        self.events: list[Event] = []
        self.subscribe(*channels)

    def deliver(self, frame: Frame) -> None:
        self.frames[frame.channel].append(frame.data)

    def subscribe(self, *channels: str) -> None:
        for channel in channels:
            for frame in self.hub.subscribe(channel, self):
                self.deliver(frame)

    def live(self, seconds: int) -> "Told":
        for _ in range(seconds):
            self.events += self.hub.advance(self.market.now + 1000)
        return self

    def find(self, kind: str, base: str = "BTC") -> Instrument:
        known = self.market.catalogue.by_name.values()
        return next(of for of in known if (of.kind, of.base) == (kind, base) and of.currency == base)


@pytest.fixture(scope="module")
def told() -> Told:
    """Read only: it has lived already."""
    return Told("platform_state", "user.trades.any.any.raw", "user.orders.any.any.raw").live(SECONDS)


def test_trades_say_what_they_did(told: Told) -> None:
    kinds, last = set[str](), dict[str, tuple[float, int]]()
    for event in told.events:
        for trade in event.trades:
            of = told.market.catalogue.by_name[trade["instrument_name"]]
            before, direction = last.get(of.name, (0.0, 0)), trade["tick_direction"]
            if of.name in last:  # plus, zero-plus, minus, zero-minus
                moved = trade["price"] - before[0]
                assert direction == (0 if moved > 0 else 2 if moved < 0 else before[1] // 2 * 2 + 1)
            last[of.name] = (trade["price"], direction)
            assert trade["contracts"] == pytest.approx(trade["amount"] / of.row["contract_size"])
            stem = {"BTC": "", "ETH": "ETH-", "USDC": "USDC-"}[of.currency] if of.kind != "spot" else f"{of.name}-"
            assert re.fullmatch(rf"{stem}\d+", trade["trade_id"])
            assert ("iv" in trade) is (of.kind == "option")
            assert 15 <= trade.get("iv", 50) <= 300  # in percent
            assert trade["price"] > 0 or of.legs
            kinds.add(of.kind)
        if event.trades and event.changes:  # who buys takes from the asks
            taken = {change.side for change in event.changes}
            assert {trade["direction"] for trade in event.trades} == {"buy" if taken == {ASK} else "sell"}
    assert kinds == {"future", "option", "spot", "future_combo", "option_combo"}


def test_a_combos_legs_are_traded_its_way(told: Told) -> None:
    combos = [trade for of, trade in told.market.all_trades if of.legs and "legs" in trade]
    assert combos
    for trade in combos:
        signs = [amount for amount, _ in told.market.catalogue.by_name[trade["instrument_name"]].legs]
        ways = {True: trade["direction"], False: "sell" if trade["direction"] == "buy" else "buy"}
        assert [leg["direction"] for leg in trade["legs"]] == [ways[sign > 0] for sign in signs]


def test_a_tickers_figures_are_those_of_the_trades(told: Told) -> None:
    for name, of in told.market.catalogue.by_name.items():
        prices, ticker = [trade["price"] for trade in told.market.trades[name]], describe_ticker(told.market, of)
        stats = ticker["stats"]
        if prices and not of.perpetual:  # which begin with a price
            assert (stats["high"], stats["low"]) == (max(prices), min(prices))
            assert ticker["last_price"] == prices[-1]
            if prices[0]:
                assert stats["price_change"] == pytest.approx((prices[-1] / prices[0] - 1) * 100, abs=1e-3)
        assert ticker["min_price"] < ticker["mark_price"] < ticker["max_price"] or of.kind == "option"
        assert ("volume_notional" in stats) is of.perpetual
        if of.perpetual:  # who is long pays where the price is above the index
            above, interest = ticker["mark_price"] > ticker["index_price"], ticker["interest_value"]
            assert (interest > 0) is (ticker["funding_8h"] > 0) is above
            assert abs(ticker["funding_8h"]) < abs(interest) / 10
        full = MARKET_METHODS["public/get_order_book"](told.market, {"instrument_name": name})
        for side, levels in (("bid", full["bids"]), ("ask", full["asks"])):
            assert [[ticker[f"best_{side}_price"], ticker[f"best_{side}_amount"]]] == (levels[:1] or [[0.0, 0.0]])
        if of.legs:
            assert ticker["combo_state"] == "active"
            assert ticker["implied_bid"] == ticker["best_bid_price"]
            assert ticker["implied_ask"] == ticker["best_ask_price"]


def test_volatilities_are_percent_but_in_the_list_of_marks(told: Told) -> None:
    marks = {row["instrument_name"]: row for index in ("btc_usd", "eth_usd") for row in list_marks(told, index)}
    options = [of for of in told.market.catalogue.by_name.values() if of.kind == "option" and of.inverse]
    assert {of.name for of in options} == set(marks)
    assert not marks.keys() & {row["instrument_name"] for row in list_marks(told, "xrp_usdc")}
    dated, near = set[bool](), 0
    for of in options:
        ticker = describe_ticker(told.market, of)
        assert ticker["mark_iv"] == pytest.approx(marks[of.name]["iv"] * 100, abs=0.01)
        is_known = ticker["underlying_index"] in told.market.catalogue.by_name
        assert ticker["underlying_index"].startswith("SYN.") is not is_known
        dated.add(is_known)
        if 0.2 < abs(ticker["greeks"]["delta"]) < 0.8:  # elsewhere a tick is many percent
            assert ticker["bid_iv"] - 1 < ticker["mark_iv"] < ticker["ask_iv"] + 1
            near += 1
    assert near > 5
    assert dated == {True, False}
    for index in ("btc_usd", "eth_usd"):
        assert 15 <= open_channel(told, f"deribit_volatility_index.{index}")["volatility"] <= 300


def list_marks(told: Told, index: str) -> list[dict[str, Any]]:
    assert told.hub.offers(f"markprice.options.{index}")
    rows: list[dict[str, Any]] = describe_marks(told.market, index)
    assert rows
    return rows


def test_channels_of_an_index_are_offered_where_there_is_one(told: Told) -> None:
    offered = {
        (family, index)
        for family in ("deribit_volatility_index", "markprice.options", "deribit_price_index")
        for index in ("btc_usd", "eth_usd", "sol_usdc", "xrp_usdc", "nope_usd")
        if told.hub.offers(f"{family}.{index}")
    }
    inverse = {(family, index) for family, _ in offered for index in ("btc_usd", "eth_usd")}
    more = {("deribit_price_index", "sol_usdc"), ("deribit_price_index", "xrp_usdc"), ("markprice.options", "xrp_usdc")}
    assert offered == inverse | more
    assert told.market.index_price("btc_usdc") != told.market.index_price("btc_usd")


def test_an_expiration_price_is_estimated_in_the_last_half_hour() -> None:
    market = Market(1, START, options=0)
    eight = START // 86_400_000 * 86_400_000 + 8 * 3_600_000
    for now, left, is_estimated in ((eight - 1_799_000, 1799, True), (eight - 1_801_000, 1801, False)):
        market.now = now
        data = describe_expiration(market, "btc_usd")
        assert (data["seconds"], data["is_estimated"]) == (left, is_estimated)
        assert ({"left_ticks", "total_ticks"} <= data.keys()) is is_estimated


def test_grouped_books_round_away_from_the_middle_and_lose_nothing(told: Told) -> None:
    for base, group, width in (("BTC", "100", 100.0), ("ETH", "100", 1.0), ("BTC", "none", 0.5)):
        perpetual = told.find("future", base)
        full = MARKET_METHODS["public/get_order_book"](
            told.market, {"instrument_name": perpetual.name, "depth": 10_000}
        )
        window = open_channel(told, f"book.{perpetual.name}.{group}.20.100ms")
        assert full["change_id"] == told.market.books[perpetual.name].change_id == window["change_id"]
        assert window["bids"][0][0] <= full["bids"][0][0] < full["asks"][0][0] <= window["asks"][0][0]
        for side in ("bids", "asks"):
            assert all(abs(price / width - round(price / width)) < 1e-6 for price, _ in window[side])
            edge, sign = window[side][-1][0], 1 if side == "bids" else -1
            inside = sum(amount for price, amount in full[side] if (price - edge) * sign >= 0)
            assert sum(amount for _, amount in window[side]) == pytest.approx(inside)
    first, second = (price for price, _ in open_channel(told, "book.ETH-PERPETUAL.100.20.100ms")["bids"][:2])
    assert first - second == 1.0  # of ETH the hundredth
    assert not told.hub.offers("book.BTC-PERPETUAL.none.10.raw")


def open_channel(told: Told, channel: str) -> Any:
    """The data that who subscribes to it now gets at once."""
    other = Told(options=0)
    (frame,) = told.hub.subscribe(channel, other)
    told.hub.unsubscribe(channel, other)
    return frame.data


def test_whole_amounts_of_a_snapshot_are_spelled_without_a_point(told: Told) -> None:
    """As they were seen: 2700 in a snapshot, 1054.0 in a change."""
    snapshot = open_channel(told, "book.BTC-PERPETUAL.100ms")
    assert {type(amount) for _, _, amount in snapshot["bids"] + snapshot["asks"]} == {int}


def test_rows_say_what_their_names_say(told: Told) -> None:
    for name, of in told.market.catalogue.by_name.items():
        row = of.row
        if of.kind == "option":
            strike, side = name.split("-")[-2:]
            assert row["option_type"] == {"C": "call", "P": "put"}[side]
            assert row["strike"] == float(strike.replace("d", "."))
            assert name.count(".") == 0
        linear = "_USDC" in name
        assert row["instrument_type"] == ("linear" if linear else "reversed")
        assert row["counter_currency"] == ("USDC" if linear else "USD")
        assert row["is_active"]
        assert row["state"] == "open"


def test_the_next_index_follows_in_platform_state(told: Told) -> None:
    said = [data["price_index"] for data in told.frames["platform_state"]]
    first = said[: len(set(said))]
    assert len(set(first)) == len(first) > 5
    assert said[len(first) :] == [first[(place + START // 1000 + 1) % len(first)] for place in range(SECONDS)]


def test_an_empty_side_is_0_in_a_ticker_and_null_in_a_summary() -> None:
    market = Market(1, START, options=60)
    of = next(of for of in market.catalogue.by_name.values() if of.kind == "option")
    book, whole = market.books[of.name], describe_summary(market, of)
    assert whole["bid_price"] < whole["mid_price"] < whole["ask_price"]
    for tick in list(book.sides[ASK]):
        book.set_level(ASK, tick, 0)
    ticker, summary = describe_ticker(market, of), describe_summary(market, of)
    assert (ticker["best_ask_price"], ticker["best_ask_amount"]) == (0.0, 0.0)
    assert (summary["ask_price"], summary["mid_price"]) == (None, None)
    for tick in list(book.sides[BID]):
        book.set_level(BID, tick, 0)
    assert describe_ticker(market, of)["best_bid_price"] == 0.0
    assert describe_summary(market, of)["bid_price"] is None


def test_what_is_listed_begins_anew_and_what_ends_ends_in_order() -> None:
    told = Told("instrument.state.any.any")
    made = [event.instrument for _ in range(2) for event in told.market.list_option()]
    assert {of.base for of in made} == {"BTC", "ETH"}
    for of in made:
        assert (told.market.days[of.name].trade_seq, of.row["creation_timestamp"]) == (0, told.market.now)
        assert "settlement_price" not in describe_ticker(told.market, of)
    combo = next(of for of in told.market.catalogue.by_name.values() if of.kind == "option_combo")
    leg = combo.legs[0][1]
    assert all(told.market.expire_next()[-1].instrument not in (leg, combo.legs[1][1]) for _ in range(20))
    told.hub.take(told.market.expire(leg.name))
    said = [(data["instrument_name"], data["state"]) for data in told.frames["instrument.state.any.any"]]
    assert said == [(of.name, state) for of in (combo, leg) for state in ("settlement", "delivered")]
    for of in (combo, leg):
        assert (of.row["state"], of.row["is_active"]) == ("delivered", False)
    assert describe_ticker(told.market, combo)["combo_state"] == "inactive"


def test_a_bar_holds_the_trades_of_its_minute_and_no_others() -> None:
    minute = START // 60_000 * 60_000 + 60_000
    told = Told("chart.trades.BTC-PERPETUAL.1", "chart.trades.BTC-PERPETUAL.1D", options=0, start=minute - 4000)
    told.live(8)
    told.market.frozen = True  # the last bars have all
    told.live(2)
    for tick in (minute - 60_000, minute):
        bar = [bar for bar in told.frames["chart.trades.BTC-PERPETUAL.1"] if bar["tick"] == tick][-1]
        held = [trade for trade in told.market.trades["BTC-PERPETUAL"] if 0 <= trade["timestamp"] - tick < 60_000]
        prices = [trade["price"] for trade in held]
        wanted = {"open": prices[0], "high": max(prices), "low": min(prices), "close": prices[-1]}
        assert bar == bar | wanted | {"cost": sum(trade["amount"] for trade in held)}
    assert {bar["tick"] for bar in told.frames["chart.trades.BTC-PERPETUAL.1D"]} == {minute // 86_400_000 * 86_400_000}


# The account


def test_fills_change_the_account_as_they_say(told: Told) -> None:
    fills = [trade for data in told.frames["user.trades.any.any.raw"] for trade in data]
    orders = told.frames["user.orders.any.any.raw"]
    assert len(fills) == len(orders) > 10
    sizes, fees = defaultdict[str, float](float), defaultdict[str, float](float)
    for fill, order in zip(fills, orders, strict=True):
        of = told.market.catalogue.by_name[fill["instrument_name"]]
        assert of.perpetual
        assert re.fullmatch({"BTC": r"\d+"}.get(of.currency, rf"{of.currency}-\d+"), order["order_id"])
        sizes[of.name] += fill["amount"] * (1 if fill["direction"] == "buy" else -1)
        fees[fill["fee_currency"]] += fill["fee"]
        assert fill["fee"] > 0
    assert told.account.positions == pytest.approx(sizes)
    begun = {"BTC": 10.0, "ETH": 100.0, "USDC": 250_000.0}
    assert told.account.balances == pytest.approx({coin: held - fees[coin] for coin, held in begun.items()})


def test_users_channels_tell_of_their_own_kind_and_of_no_more_than_happened() -> None:
    single, ether, changes = "user.orders.any.any.raw", "user.trades.future.ETH.raw", "user.changes.any.any.raw"
    told = Told(single, ether, changes, "user.portfolio.any", "user.portfolio.eth")
    assert [data["currency"] for data in told.frames["user.portfolio.any"]] == ["BTC", "ETH", "USDC"]
    bitcoin = told.market.catalogue.by_name["BTC-PERPETUAL"]
    own, foreign = (told.account.place(bitcoin, "buy", 10.0, 1.0, "", owner) for owner in (1, 2))
    told.hub.take([own, foreign])
    assert told.frames[single] == [own.own[0][0], foreign.own[0][0]]  # raw ones come one by one, all else in lists
    assert told.frames[ether] == []
    assert [(len(data["orders"]), data["trades"], data["positions"]) for data in told.frames[changes]] == [
        (1, [], [])
    ] * 2
    assert told.hub.take(told.account.cancel_all(1))
    assert list(told.account.orders) == [foreign.own[0][0]["order_id"]]
    told.market.frozen = True
    told.live(2)
    assert [data["currency"] for data in told.frames["user.portfolio.any"]][3:] == ["BTC"]
    assert len(told.frames["user.portfolio.eth"]) == 1


# Logins and limits


def test_subscribe_has_one_pool_however_it_is_called_and_get_instruments_another() -> None:
    credits = Credits(0.0)
    calls = ["public/subscribe", "private/subscribe"] * 5
    assert all(credits.spend(method, 0.0) for method in calls)
    assert not credits.spend("private/subscribe", 0.0)
    assert sum(credits.spend("public/get_instruments", 0.0) for _ in range(60)) == 50
    assert sum(credits.spend("public/test", 0.0) for _ in range(110)) == 100


def test_tokens_end_when_and_how_they_say() -> None:
    authority, now = Authority(DEFAULT_KEYS, Market(1, START, options=0).rng), START
    login, result = authority.grant(KEYS | {"scope": "session:s expires:30"}, now, 1, 900.0)
    assert (result["expires_in"], result["sid"], login.expires) == (30, "s", now + 30_000)
    assert authority.check_token(result["access_token"], now + 29_999, 2) == login
    with pytest.raises(RpcError):
        authority.check_token(result["access_token"], now + 30_000, 1)
    plain = authority.grant(KEYS, now, 1, 900.0)[1]
    assert "sid" not in plain
    assert {"connection", "mainaccount", "trade:read_write"} <= set(plain["scope"].split())
    narrow = authority.grant(KEYS | {"scope": "trade:read"}, now, 1, 900.0)[1]
    assert narrow["scope"].split() == ["trade:read", "connection", "mainaccount"]


class Caller:
    """One connection of an exchange that holds still; what it asks is answered at once."""

    def __init__(self, exchange: Exchange, faults: str = "") -> None:
        self.line = Line()
        self.connection = Connection(exchange, parse_faults(faults), self.line, START / 1000, "")

    def ask(self, method: str, seconds: float = 0.0, /, **params: Any) -> Any:
        """The answer's result, or its error."""
        body = json.dumps({"id": 1, "method": method, "params": params})
        self.connection.outbox.clear()
        self.connection.receive(body, START / 1000 + seconds)
        answer = json.loads(self.connection.outbox[0].payload or b"{}")
        return answer.get("result", answer.get("error"))

    def log_in(self, **more: Any) -> Any:
        return self.ask("public/auth", **KEYS, **more)


@pytest.fixture
def exchange() -> Exchange:
    return Exchange(Settings(options=60, keys=DEFAULT_KEYS), START)


@pytest.mark.parametrize(("more", "is_void"), [({}, True), ({"invalidate_token": False}, False)])
def test_who_logs_out_may_leave_the_token_to_others(exchange: Exchange, more: dict[str, Any], is_void: bool) -> None:
    one, other = Caller(exchange), Caller(exchange)
    token = one.log_in(scope="session:both")["access_token"]
    one.ask("private/logout", **more)
    assert one.connection.session.ended
    answer = other.ask("private/get_open_orders", access_token=token)
    assert (answer == []) is not is_void
    assert other.connection.session.is_logged_in(START) is not is_void


def test_labels_are_on_private_channels_alone_and_channels_count_once(exchange: Exchange) -> None:
    caller = Caller(exchange)
    caller.log_in()
    public, private = "quote.BTC-PERPETUAL", "user.portfolio.BTC"
    asked = [public, private, "ticker.BTC-PERPETUAL.raw", public]
    assert caller.ask("private/subscribe", channels=asked, label="l") == sorted(set(asked), reverse=True)
    said = [json.loads(frame.payload)["params"] for frame in caller.connection.outbox if b'"params"' in frame.payload]
    assert {data["channel"]: data.get("label") for data in said} == {public: None, private: "l", asked[2]: None}
    assert caller.ask("private/unsubscribe", channels=asked) == sorted(set(asked), reverse=True)


def test_a_heartbeat_keeps_a_socket_without_subscriptions(exchange: Exchange) -> None:
    caller = Caller(exchange)
    caller.ask("public/set_heartbeat", interval=100)
    for second in range(100):
        caller.connection.tick(START / 1000 + second)
    assert not caller.line.is_cut


def test_what_has_expired_is_told_of_but_not_traded(exchange: Exchange) -> None:
    gone = exchange.market.expire_next()[-1].instrument.name
    caller = Caller(exchange)
    caller.log_in()
    assert caller.ask("public/get_instrument", instrument_name=gone)["state"] == "delivered"
    ticker = caller.ask("public/ticker", instrument_name=gone)
    assert ticker["estimated_delivery_price"] == "expired"
    assert ticker["delivery_price"] == ticker["index_price"]
    assert caller.ask("private/buy", instrument_name=gone, amount=1)["data"]["reason"] == "instrument not found"
    assert [row["instrument_name"] for row in caller.ask("public/get_instruments", expired=True)] == [gone]
    assert {row["id"].split("-")[0] for row in caller.ask("public/get_combos", currency="ETH")} == {"ETH"}
    wide = caller.ask("public/get_expirations", currency="BTC", kind="any")
    assert {kind: dates != wide["btc"]["future"] for kind, dates in wide["btc"].items()} == {
        "option": True,
        "future": False,
    }
    price = caller.ask("public/get_index_price", index_name="btc_usd")
    assert price["index_price"] == price["estimated_delivery_price"] == exchange.market.index_price("btc_usd")


# What was recorded of Deribit

SINCE = {"contracts", "volume_usd", "starbase_match_id", "starbase_timestamp"}
"""Members that came later than some of the recordings."""


def list_recorded() -> Iterator[tuple[str, Any]]:
    """(channel, data) of the recordings that are real and not cut."""
    paths = [Path(FRAMES) / "nautilus" / f"ws_{name}.json" for name in ("ticker", "quote", "trades", "chart")]
    texts = [path.read_text() for path in paths]
    capture = (Path(FRAMES) / "cryptofeed" / "DERIBIT.ws.1.0").read_text()
    texts += re.findall(r"^[\d.]+: (\{.*)$", capture, re.MULTILINE)
    for text in texts:
        body = json.loads(text)
        if body.get("method") == "subscription":
            yield body["params"]["channel"], body["params"]["data"]


@pytest.mark.skipif(not FRAMES, reason="COLLECTOR_FRAMES names no folder of recorded frames")
def test_data_have_the_members_that_were_recorded() -> None:
    """And no others, but for SINCE. A trade that is no combo's leg has no `combo_trade_id`."""
    told, pairs = Told(options=60), list[tuple[str, Any]]()
    option = told.find("option").name
    for channel, data in list_recorded():
        family, name, *rest = channel.split(".")
        is_known = family in ("trades", "chart") or name in told.market.catalogue.by_name
        pairs.append((".".join([family, name if is_known else option, *rest]), data))
    told.subscribe(*{own for own, _ in pairs})
    told.live(5)
    for own, data in pairs:
        like = [each for each in told.frames[own] if isinstance(each, list) or each.get("type") == data.get("type")]
        assert list_members(like[0]) - SINCE == list_members(data) - SINCE - {"combo_trade_id"}, own
    assert {own.split(".")[0] for own, _ in pairs} == {"ticker", "quote", "trades", "chart", "book"}


def list_members(data: Any) -> set[str]:
    """The members of an object, or of the first of a list, with those nested in it."""
    if isinstance(data, list):
        return list_members(data[0]) if data else set()
    if not isinstance(data, dict):
        return set()
    return data.keys() | {member for value in data.values() if isinstance(value, dict) for member in value}
