"""The practice market by itself: the same seed gives the same course, books never cross, options are priced sanely."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.exchange.channels.account import Account
from workers.exchange.channels.hub import Frame, Hub
from workers.exchange.market.instruments import DAY, FOREVER, format_date, list_expiries
from workers.exchange.market.market import QUANTUM, Event, Market
from workers.exchange.market.payloads import describe_ticker
from workers.exchange.market.pricing import imply_volatility, value_option
from workers.exchange.protocol.session import Credits, Heartbeat

START = 1_765_541_474_000


def live(market: Market, seconds: float) -> list[Event]:
    """Let the market live; return its events."""
    events = []
    end = market.now + int(seconds * 1000)
    while market.now + QUANTUM <= end:
        assert market.step(market.now + QUANTUM)
        events += list(market.move())
    return events


class Listener:
    """Keeps the frames of its channels."""

    def __init__(self) -> None:
        self.seen: list[Frame] = []

    def deliver(self, frame: Frame) -> None:
        self.seen.append(frame)


@pytest.mark.parametrize("days", [0, 5])
def test_options_are_listed_for_as_long_as_it_runs(days: int) -> None:
    market = Market(1, START, options=60)
    market.now += days * 86_400_000
    for _ in range(450):
        made = [event.instrument for event in market.list_option()]
        assert len(made) == 2
        assert all(of.expiry > market.now and of.strike > 0 for of in made)
        for of in made:
            market.catalogue.retire(of)


def describe(events: list[Event]) -> list[object]:
    return [(e.instrument.name, e.timestamp, e.changes, e.trades, e.state) for e in events]


def test_the_same_seed_gives_the_same_course() -> None:
    one, two, other = Market(7, START), Market(7, START), Market(8, START)
    course = describe(live(one, 3))
    assert course == describe(live(two, 3))
    assert course != describe(live(other, 3))


def test_books_never_cross_and_trade_sequences_have_no_holes() -> None:
    market = Market(3, START, options=120, rate=2000)
    last = {name: day.trade_seq for name, day in market.days.items()}
    kinds = set[str]()
    for _ in range(20):
        for event in live(market, 1):
            for trade in event.trades:
                name = trade["instrument_name"]
                assert trade["trade_seq"] == last[name] + 1
                last[name] += 1
                kinds.add(event.instrument.kind)
        for name, book in market.books.items():
            bid, ask = book.best_bid, book.best_ask
            assert bid is None or ask is None or bid < ask, name
    assert kinds == {"future", "option", "spot", "future_combo", "option_combo"}


def test_the_trades_that_are_kept_are_bounded_whoever_made_them() -> None:
    market = Market(1, START, rate=2000)
    market.max_trades = 100
    newest = [trade for event in live(market, 5) for trade in event.trades][-100:]
    assert [trade for _, trade in market.all_trades] == newest
    assert sum(map(len, market.trades.values())) == 100
    for name, trades in market.trades.items():
        assert list(trades) == [trade for trade in newest if trade["instrument_name"] == name]


def test_prices_stay_near_their_index() -> None:
    market = Market(5, START, options=0, rate=500)
    for _ in range(6):
        live(market, 10)
        for name, book in market.books.items():
            of = market.catalogue.by_name[name]
            if not of.legs and book.best_bid and book.best_ask:
                middle = (book.best_bid + book.best_ask) / 2 * of.tick
                assert abs(middle / market.mark_price(of) - 1) < 0.005, name


def test_inverse_futures_and_combos_of_such_count_in_dollars_and_nothing_else_does() -> None:
    market = Market(3, START, options=60, rate=2000)
    hub, charts = Hub(market, Account(market)), Listener()
    for name in market.catalogue.by_name:
        hub.subscribe(f"chart.trades.{name}.1D", charts)
    for second in range(1, 32):
        market.frozen = second == 31  # the last bars have all
        hub.advance(START + second * 1000)
    bars = {frame.channel.split(".")[2]: frame.data for frame in charts.seen}
    seen = set[tuple[str, bool]]()
    for name, of in market.catalogue.by_name.items():
        trades, ticker = market.trades[name], describe_ticker(market, of)
        amount, is_dollars = sum(trade["amount"] for trade in trades), of.row["quote_currency"] == "USD"
        coins = sum(trade["amount"] / trade["index_price"] for trade in trades) if is_dollars else amount
        assert isinstance(ticker["open_interest"], int) is is_dollars
        assert ticker["stats"]["volume"] == pytest.approx(coins, 1e-3)
        if "volume_usd" in ticker["stats"]:
            dollars = amount if is_dollars else sum(trade["amount"] * trade["index_price"] for trade in trades)
            assert ticker["stats"]["volume_usd"] == pytest.approx(dollars, 1e-3)
        if name in bars:
            assert bars[name]["volume"] == pytest.approx(coins, 0.05)  # of a dated future by its price, not the index's
            assert not is_dollars or bars[name]["cost"] == amount
            seen.add((of.kind, is_dollars))
    inverse = {("future", True), ("future_combo", True)}
    assert seen == inverse | {("future", False), ("option", False), ("option_combo", False), ("spot", False)}


def test_expiries_are_at_eight_and_in_order() -> None:
    for now in range(START, START + 400 * 86_400_000, 37 * 3_600_000):
        expiries = list_expiries(now)
        times = [expiry for expiry, _ in expiries]
        assert all(a < b for a, b in pairwise(times))
        assert all(expiry % 86_400_000 == 8 * 3_600_000 and expiry > now for expiry in times)
        assert {period for _, period in expiries} >= {"day", "month"}
        fridays = [day for day in range(times[1], times[1] + 120 * DAY, DAY) if (day // DAY + 4) % 7 == 5]
        ends = [day for day in fridays if format_date(day)[-5:] != format_date(day + 7 * DAY)[-5:]]
        assert ends[0] in times, "the month's"
        assert next(day for day in ends if format_date(day)[-5:-2] in ("MAR", "JUN", "SEP", "DEC")) in times
    assert format_date(1779177600000) == "19MAY26"
    assert format_date(1780646400000) == "5JUN26"


def test_what_has_reached_its_time_expires_by_itself() -> None:
    eight = 1_765_526_400_000  # 12 December 2025, 08:00 UTC
    market = Market(1, eight - 660_000, options=60)
    doomed = [name for name, of in market.catalogue.by_name.items() if of.expiry == eight]
    assert doomed
    market.now = eight - 1000
    events = live(market, 2)
    states = [(e.instrument.name, e.state) for e in events if e.state]
    assert {name for name, state in states if state == "delivered"} == set(doomed)
    assert not set(doomed) & set(market.catalogue.by_name)
    assert all(not any(market.books[name].sides) for name in doomed)
    assert all(of.expiry > eight for of in market.catalogue.by_name.values())
    assert any(of.expiry == FOREVER for of in market.catalogue.by_name.values())


@pytest.mark.parametrize("step", [3_600_000, -3_600_000])
def test_a_clock_that_is_set_or_stood_still_is_followed_at_once(step: int) -> None:
    market = Market(1, START, options=0)
    hub, frames = Hub(market, Account(market)), Listener()
    hub.subscribe("ticker.BTC-PERPETUAL.100ms", frames)
    hub.subscribe("deribit_price_index.btc_usd", frames)
    hub.advance(START + 5000)
    frames.seen.clear()
    hub.advance(START + 5000 + step)
    assert len(frames.seen) < 5
    hub.advance(START + 7000 + step)
    assert {frame.channel for frame in frames.seen} == {"ticker.BTC-PERPETUAL.100ms", "deribit_price_index.btc_usd"}
    assert abs(frames.seen[-1].data["timestamp"] - (START + 7000 + step)) < 2000


def test_credits_and_heartbeats_outlive_a_clock_that_is_set() -> None:
    credits = Credits(100_000.0)
    assert credits.spend("public/subscribe", 100_000.0)
    assert credits.spend("public/subscribe", 10.0)
    for step in (-3600.0, 3600.0):
        heartbeat, now = Heartbeat(10.0, 100_000.0), 100_000.0 + step
        due = [heartbeat.find_due(now + tick / 2, now) for tick in range(60)]
        assert next(filter(None, due))[0] == "test_request"
        assert len([kinds for kinds in due if kinds and kinds != ["close"]]) <= 3
        assert ["close"] in due
        heartbeat = Heartbeat(10.0, 100_000.0)
        assert heartbeat.find_due(100_012.0, 100_012.0) == ["test_request"]
        assert heartbeat.find_due(now, now) == ["test_request"]  # who could not answer meanwhile gets the time for it


def test_the_ticker_of_a_combo_of_options_has_the_sums_of_its_legs() -> None:
    market = Market(1, START, options=60)
    combo = next(of for of in market.catalogue.by_name.values() if of.kind == "option_combo")
    ticker, low, high = (describe_ticker(market, of) for of in (combo, *(leg for _, leg in combo.legs)))
    assert ticker.keys() == low.keys() | {"implied_bid", "implied_ask", "combo_state"}
    assert ticker["mark_iv"] == pytest.approx(low["mark_iv"] - high["mark_iv"])
    assert ticker["greeks"] == pytest.approx({key: low["greeks"][key] - high["greeks"][key] for key in low["greeks"]})


def test_channels_say_what_has_changed_and_nothing_of_what_is_over() -> None:
    market, told = Market(1, START, options=60, rate=2000), Listener()
    hub = Hub(market, Account(market))
    option = next(of for of in market.catalogue.by_name.values() if of.kind == "option" and not market._is_leg(of))
    ticker, change, quote = f"ticker.{option.name}.100ms", "incremental_ticker.BTC-PERPETUAL", "quote.BTC-PERPETUAL"
    for channel in (ticker, change, quote):
        hub.subscribe(channel, told)
        hub.subscribe(channel, other := Listener())
        hub.unsubscribe(channel, other)  # which leaves it to the first

    def list_told(channel: str, seconds: int) -> list[dict[str, object]]:
        told.seen.clear()
        for _ in range(seconds):
            hub.advance(market.now + 1000)
        return [{**frame.data, "timestamp": 0} for frame in told.seen if frame.channel == channel]

    assert len(list_told(change, 5)) == 5
    quotes = list_told(quote, 5)
    assert len(quotes) > 10
    assert all(one != next for one, next in pairwise(quotes))
    market.frozen = True
    assert len(list_told(change, 1)) <= 1
    assert list_told(change, 9) == []
    assert len(list_told(ticker, 9)) == 3  # an option's value changes with time
    hub.take(market.expire(option.name))
    assert [each["state"] for each in list_told(ticker, 1)] == ["delivered"]
    assert list_told(ticker, 9) == []
    for channel in (ticker, change, quote):
        hub.unsubscribe(channel, told)
    assert not hub._feeds


def test_heartbeats_have_the_rhythm_that_was_measured() -> None:
    heartbeat, seen = Heartbeat(10.0, 0.0), list[tuple[float, list[str]]]()
    for tick in range(500):
        if kinds := heartbeat.find_due(tick / 10, last_sent=0.0 if tick < 200 else tick / 10):
            seen.append((tick / 10, kinds))
            if tick < 300:
                heartbeat.answer()
    # Alone only where nothing else was sent; and 10 s after the first that stays unanswered it is over.
    assert seen[:4] == [
        (12.0, ["test_request", "heartbeat"]),
        (22.6, ["test_request"]),
        (33.2, ["test_request"]),
        (43.2, ["close"]),
    ]


@settings(max_examples=200)
@given(
    forward=st.floats(50, 200_000), ratio=st.floats(0.5, 2), years=st.floats(0.003, 2), volatility=st.floats(0.2, 2.5)
)
def test_calls_and_puts_agree(forward: float, ratio: float, years: float, volatility: float) -> None:
    strike = forward * ratio
    call = value_option(True, forward, strike, years, volatility)
    put = value_option(False, forward, strike, years, volatility)
    assert math.isclose(call.price - put.price, forward - strike, rel_tol=1e-6, abs_tol=forward * 1e-9)
    assert math.isclose(call.delta - put.delta, 1.0, rel_tol=1e-9)
    assert call.gamma >= 0 <= call.vega
    if call.vega > forward * 1e-4:
        assert abs(imply_volatility(True, forward, strike, years, call.price) - volatility) < 0.01
