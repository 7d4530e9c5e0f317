"""Each channel of the practice exchange: shapes, rhythm, chains, and that what it says is true of its market."""

import itertools
import re
from typing import Any

from tests.exchange_client import apply_book, connect, exchange, get
from tests.support import in_loop

TRADE = {
    "timestamp", "price", "amount", "direction", "index_price", "instrument_name", "trade_seq", "mark_price",
    "tick_direction", "contracts", "trade_id", "starbase_match_id", "starbase_timestamp",
}  # fmt: skip
TICKER = {
    "timestamp", "state", "stats", "index_price", "instrument_name", "last_price", "min_price", "max_price",
    "open_interest", "mark_price", "best_ask_price", "best_bid_price", "best_ask_amount", "best_bid_amount",
    "estimated_delivery_price",
}  # fmt: skip


def check_chain(frames: list[dict[str, Any]]) -> dict[str, dict[float, float]]:
    """Check one book channel's frames from its snapshot on; return the book that they make."""
    levels: dict[str, dict[float, float]] = {"bids": {}, "asks": {}}
    assert frames[0]["type"] == "snapshot"
    assert "prev_change_id" not in frames[0]
    for frame, following in itertools.pairwise(frames):
        assert list(following) == [
            "timestamp", "type", "change_id", "instrument_name", "bids", "asks", "prev_change_id",
        ]  # fmt: skip
        assert following["type"] == "change"
        assert following["prev_change_id"] == frame["change_id"] < following["change_id"]
        assert following["bids"] or following["asks"]
    for frame in frames:
        for side, descending in (("bids", True), ("asks", False)):
            prices = [level[1] for level in frame[side]]
            assert prices == sorted(prices, reverse=descending)
        for side in ("bids", "asks"):
            for action, price, amount in frame[side]:
                known = float(price) in levels[side] and frame["type"] == "change"
                assert action == ("delete" if not amount else "change" if known else "new")
        apply_book(levels, frame)
        assert not levels["bids"] or not levels["asks"] or max(levels["bids"]) < min(levels["asks"])
    return levels


def same_book(levels: dict[str, dict[float, float]], book: dict[str, Any]) -> bool:
    """Whether the levels are those of the true book."""
    return all(levels[side] == dict(book[side]) for side in ("bids", "asks"))


@in_loop
async def test_books_of_all_intervals_chain_and_end_as_the_true_book() -> None:
    channels = [
        f"book.{name}.{interval}"
        for name in ("BTC-PERPETUAL", "ETH_USDC-PERPETUAL")
        for interval in ("raw", "100ms", "agg2")
    ]
    with exchange("--rate", "3000") as (url, _):
        async with connect(url) as client:
            await client.log_in()
            await client.subscribe(*channels, way="private")
            for channel in channels:
                await client.wait_data(channel, 4)
            true = dict.fromkeys(("BTC-PERPETUAL", "ETH_USDC-PERPETUAL"))
            await client.ask("practice/freeze")
            for name in true:
                whole = await client.ask("public/get_order_book", instrument_name=name, depth=10_000)
                true[name] = whole["result"]
            for channel in channels:
                book: Any = true[channel.split(".")[1]]
                # Changes that cancel out within a window are not sent, so levels are compared, not change ids.

                def is_true(channel: str = channel, book: Any = book) -> bool:
                    return same_book(check_chain(client.data(channel)), book)

                await client.wait(is_true, f"the end of {channel}")
            raw, paced = client.data(channels[0]), client.data(channels[2])
            assert len(raw) > 5 * len(paced)
            steps = [b["change_id"] - a["change_id"] for a, b in itertools.pairwise(raw)]
            assert min(steps) >= 1 < max(steps)
            assert (await client.ask("practice/freeze", frozen=False))["result"]["frozen"] is False
            await client.wait_data(channels[0], len(raw) + 1)


@in_loop
async def test_a_snapshot_in_the_middle_of_a_window_fits_the_chain_of_those_who_came_before(practice: str) -> None:
    async with connect(practice) as first:
        channel = "book.BTC-PERPETUAL.agg2"
        await first.ask("public/subscribe", channels=[channel])
        await first.wait_data(channel, 2)
        async with connect(practice) as later:
            await later.ask("public/subscribe", channels=[channel])
            frames = await later.wait_data(channel, 3)
            check_chain(frames)
            await first.wait(lambda: first.data(channel)[-1] == frames[-1], "the same frame")
            mine, theirs = check_chain(first.data(channel)), check_chain(frames)
            assert mine == theirs


@in_loop
async def test_trades_of_one_instrument_and_of_a_kind_are_the_same_and_without_holes(practice: str) -> None:
    async with connect(practice) as client:
        await client.log_in()
        one, wide, every = "trades.ETH-PERPETUAL.raw", "trades.future.ETH.100ms", "trades.any.any.agg2"
        await client.subscribe(one, wide, every, way="private")
        await client.wait_data(one, 20)
        await client.wait_data(every, 2)
        trades = [trade for data in client.data(one) for trade in data]
        sequence = [trade["trade_seq"] for trade in trades]
        assert sequence == list(range(sequence[0], sequence[0] + len(sequence)))
        assert all(set(trade) >= TRADE for trade in trades)
        ids = [trade["trade_id"] for trade in trades]
        assert all(re.fullmatch(r"ETH-\d+", identity) for identity in ids)
        assert len(set(ids)) == len(ids)
        assert {trade["direction"] for trade in trades} == {"buy", "sell"}
        assert all(trade["starbase_timestamp"] // 1_000_000 == trade["timestamp"] for trade in trades)
        assert 1 << 53 < trades[0]["starbase_match_id"] < trades[-1]["starbase_match_id"] < 1 << 63
        await client.wait(lambda: len(client.data(wide)) > 3, "wide trades")
        same = [t for data in client.data(wide) for t in data if t["instrument_name"] == "ETH-PERPETUAL"]
        assert same[:5] == trades[:5]
        assert {t["instrument_name"] for data in client.data(wide) for t in data} - {"ETH-PERPETUAL"}
        names = {t["instrument_name"] for data in client.data(every) for t in data}
        assert any(name.endswith("_USDC-PERPETUAL") for name in names)


@in_loop
async def test_an_options_trade_has_iv_and_a_combos_trade_is_on_its_legs_too() -> None:
    with exchange("--rate", "6000", "--options", "60") as (url, _):
        async with connect(url) as client:
            await client.subscribe("trades.option.any.100ms", "trades.combo.any.100ms", "trades.future.any.100ms")
            await client.wait_data("trades.combo.any.100ms", 2)
            trades = [trade for data in client.data("trades.combo.any.100ms") for trade in data]
            combo = next(trade for trade in trades if "legs" in trade)  # of one sweep the last trade has them
            legs = combo["legs"]
            assert [leg["combo_id"] for leg in legs] == [combo["instrument_name"]] * 2
            assert [leg["combo_trade_id"] for leg in legs] == [combo["trade_id"]] * 2
            assert {leg["direction"] for leg in legs} == {"buy", "sell"}
            kind = "option" if "-CS-" in combo["instrument_name"] else "future"
            channel = f"trades.{kind}.any.100ms"
            await client.wait(
                lambda: all(leg in [t for d in client.data(channel) for t in d] for leg in legs),
                "the legs' own trades",
            )
            options = [t for d in await client.wait_data("trades.option.any.100ms", 2) for t in d]
            assert all(0 < trade["iv"] < 500 for trade in options)


@in_loop
async def test_tickers_agree_with_the_book(practice: str) -> None:
    async with connect(practice) as client:
        await client.log_in()
        book, ticker, quote = "book.BTC-PERPETUAL.raw", "ticker.BTC-PERPETUAL.raw", "quote.BTC-PERPETUAL"
        await client.subscribe(book, ticker, quote, way="private")
        await client.wait_data(ticker, 60)
        levels: dict[str, dict[float, float]] = {"bids": {}, "asks": {}}
        tops = set()
        for data in client.data(book):
            apply_book(levels, data)
            tops.add((max(levels["bids"]), min(levels["asks"])))
        # A ticker may come before the book change that it shows: the newest ones are left out.
        for data in client.data(ticker)[1:50]:
            assert set(data) >= TICKER | {"current_funding", "funding_8h", "interest_value"}
            assert (data["best_bid_price"], data["best_ask_price"]) in tops
            assert data["best_bid_price"] < data["best_ask_price"]
            assert abs(data["mark_price"] / data["best_bid_price"] - 1) < 0.01
        assert list(client.data(quote)[0]) == [
            "timestamp", "instrument_name",
            "best_ask_price", "best_bid_price", "best_ask_amount", "best_bid_amount",
        ]  # fmt: skip


def test_tickers_of_every_kind_have_their_own_members(practice: str) -> None:
    rows = get(practice, "public/get_instruments", currency="BTC")[1]["result"]
    dated_first = sorted(rows, key=lambda row: row["expiration_timestamp"])
    kinds = ("option", "future", "future_combo", "spot")
    names = [next(row["instrument_name"] for row in dated_first if row["kind"] == kind) for kind in kinds]
    ticker = {name: get(practice, "public/ticker", instrument_name=name)[1]["result"] for name in names}
    option, dated, spread, spot = names
    assert set(ticker[option]["greeks"]) == {"delta", "gamma", "vega", "theta", "rho"}
    wanted = {"mark_iv", "bid_iv", "ask_iv", "underlying_price", "underlying_index", "interest_rate"}
    assert wanted <= set(ticker[option])
    assert not {"greeks", "funding_8h"} & set(ticker[dated])
    assert {"implied_bid", "implied_ask", "combo_state"} <= set(ticker[spread])
    assert "volume_usd" not in ticker[spot]["stats"]
    assert {name for name in names if "settlement_price" in ticker[name]} == {option, dated, spread}
    assert all(set(t) >= TICKER for t in ticker.values())


@in_loop
async def test_an_incremental_ticker_merges_to_the_full_one(practice: str) -> None:
    def merge(into: dict[str, Any], changes: dict[str, Any]) -> None:
        for key, value in changes.items():
            if isinstance(value, dict):
                merge(into.setdefault(key, {}), value)
            else:
                into[key] = value

    async with connect(practice) as client:
        channel = "incremental_ticker.BTC-PERPETUAL"
        await client.subscribe(channel)
        frames = await client.wait_data(channel, 3)
        assert [frame["type"] for frame in frames[:3]] == ["snapshot", "change", "change"]
        assert len(frames[1]) < len(frames[0])
        merged: dict[str, Any] = {}
        for frame in frames:
            merge(merged, frame)
        async with connect(practice) as other:
            await other.subscribe(channel)
            snapshot = (await other.wait_data(channel))[0]
            await client.wait(lambda: client.data(channel)[-1]["timestamp"] >= snapshot["timestamp"], "the same frame")
        for frame in client.data(channel)[len(frames) :]:
            if frame["timestamp"] <= snapshot["timestamp"]:
                merge(merged, frame)
        assert {**merged, "type": ""} == {**snapshot, "type": ""}


OTHERS = {
    "deribit_price_index.btc_usd": {"timestamp", "price", "index_name"},
    "deribit_price_statistics.eth_usd": {"low24h", "high24h", "change24h", "index_name", "high_volatility"},
    "deribit_volatility_index.btc_usd": {"volatility", "timestamp", "index_name"},
    "perpetual.ETH-PERPETUAL.100ms": {"index_price", "interest", "timestamp"},
    "platform_state": {"locked", "price_index", "reasons"},
    "platform_state.public_methods_state": {"allow_unauthenticated_public_requests"},
    "chart.trades.BTC-PERPETUAL.1": {"tick", "open", "high", "low", "close", "volume", "cost"},
    "block_rfq.trades.USDC": {"id", "timestamp", "amount", "direction", "combo_id", "legs", "trades", "mark_price"},
    "book.BTC-PERPETUAL.none.10.100ms": {"timestamp", "change_id", "instrument_name", "bids", "asks"},
    "book.BTC-PERPETUAL.100.20.agg2": {"timestamp", "change_id", "instrument_name", "bids", "asks"},
}


@in_loop
async def test_the_other_channels_have_their_shapes(practice: str) -> None:
    async with connect(practice) as client:
        lists = ["deribit_price_ranking.btc_usd", "markprice.options.btc_usd"]
        quiet = ["announcements", "instrument.state.any.any", "instrument.creation.option.BTC", "block_rfq.trades.EURR"]
        await client.subscribe(*OTHERS, *lists, *quiet, "estimated_expiration_price.btc_usd")
        for channel, members in OTHERS.items():
            assert set((await client.wait_data(channel))[0]) == members, channel
        assert set((await client.wait_data(lists[0]))[0][0]) == {
            "weight", "original_price", "price", "identifier", "timestamp", "enabled",
        }  # fmt: skip
        marks = (await client.wait_data(lists[1]))[0]
        assert set(marks[0]) == {"timestamp", "iv", "instrument_name", "mark_price"}
        assert all(0 < mark["iv"] < 5 for mark in marks)
        expiration = (await client.wait_data("estimated_expiration_price.btc_usd"))[0]
        assert set(expiration) >= {"seconds", "price", "is_estimated"}
        assert len({state["price_index"] for state in client.data("platform_state")}) > 5
        window = client.data("book.BTC-PERPETUAL.none.10.100ms")[0]
        assert len(window["bids"]) == len(window["asks"]) == 10
        grouped = client.data("book.BTC-PERPETUAL.100.20.agg2")[0]
        assert all(price % 100 == 0 for price, _ in grouped["bids"] + grouped["asks"])


@in_loop
async def test_a_bar_holds_all_trades_since_its_start_whoever_subscribes_when() -> None:
    with exchange("--rate", "1500") as (url, _):
        async with connect(url) as client:
            trades, bars = "trades.BTC-PERPETUAL.100ms", "chart.trades.BTC-PERPETUAL.1D"
            await client.subscribe(trades)
            await client.wait_data(trades, 3)
            await client.subscribe(bars)
            bar = (await client.wait_data(bars))[0]
        asked = {"instrument_name": "BTC-PERPETUAL", "start_timestamp": bar["tick"], "count": 1000, "sorting": "asc"}
        kept = get(url, "public/get_last_trades_by_instrument", **asked)[1]["result"]["trades"]
    assert bar["open"] == kept[0]["price"]
    assert bar["cost"] in itertools.accumulate(trade["amount"] for trade in kept)


SILENT = ["user.access_log", "user.lock", "user.mmp_trigger.btc_usd", "user.combo_trades.any.any.raw"]
SILENT += ["block_rfq.maker.any", "block_rfq.maker.quotes.BTC", "block_rfq.taker.ETH", "block_trade_confirmations"]


@in_loop
async def test_users_channels_tell_of_orders_trades_changes_and_the_portfolio(practice: str) -> None:
    async with connect(practice) as client:
        await client.log_in()
        single, rows = "user.orders.any.any.raw", "user.orders.future.BTC.100ms"
        trades, changes, money = "user.trades.any.any.100ms", "user.changes.BTC-PERPETUAL.raw", "user.portfolio.btc"
        await client.subscribe(single, rows, trades, changes, money, *SILENT, way="private")
        unknown = await client.ask("private/subscribe", channels=["user.lock.BTC", "user.access_log.any"])
        assert unknown["result"] == []
        assert (await client.wait_data(single))[0]["order_state"] == "filled"
        assert (await client.wait_data(rows))[0][0]["instrument_name"].startswith("BTC-")
        own = (await client.wait_data(trades))[0][0]
        assert {"order_id", "fee", "fee_currency", "liquidity", "matching_id", "state"} <= set(own)
        change = (await client.wait_data(changes))[0]
        assert set(change) == {"instrument_name", "trades", "orders", "positions"}
        assert change["orders"][0]["order_id"] == change["trades"][0]["order_id"]
        portfolio = (await client.wait_data(money, 2))[0]
        assert portfolio["currency"] == "BTC"
        assert {"equity", "delta_total_map", "options_gamma_map", "options_theta_map", "options_vega_map"} <= set(
            portfolio
        )


@in_loop
async def test_instruments_are_listed_and_expire_during_the_run() -> None:
    with exchange("--faults", "listing:0.4,expiry:0.5", "--options", "60", "--rate", "400") as (url, _):
        rows = get(url, "public/get_instruments", kind="option")[1]["result"]
        async with connect(url) as client:
            states, created = "instrument.state.any.any", "instrument.creation.any.any"
            first = sorted((row["expiration_timestamp"], row["instrument_name"]) for row in rows)
            books = [f"book.{name}.100ms" for _, name in first[:12]]
            tickers = [f"ticker.{name}.100ms" for _, name in first[:12]]
            await client.ask("public/subscribe", channels=[states, created, *books, *tickers])
            gone = await client.wait(
                lambda: [s["instrument_name"] for s in client.data(states) if s["state"] == "delivered"],
                "an expiry",
            )
            fresh = (await client.wait_data(created))[0]
            assert fresh["kind"] == "option"
            assert fresh["state"] == "open"
            assert {"timestamp", "strike", "tick_size", "expiration_timestamp"} <= set(fresh)
            opened = [s for s in client.data(states) if s["state"] == "open"]
            assert fresh["instrument_name"] in {s["instrument_name"] for s in opened}
            name = next(name for name in gone if f"book.{name}.100ms" in books)
            last = await client.wait(
                lambda: [t for t in client.data(f"ticker.{name}.100ms") if t["state"] == "delivered"],
                "the final ticker",
            )
            assert last[-1]["estimated_delivery_price"] == "expired"
            assert last[-1]["delivery_price"] > 0
            assert "settlement_price" not in last[-1]
            assert last[-1]["best_bid_price"] == last[-1]["best_ask_amount"] == 0.0
            empty: dict[str, Any] = {"bids": {}, "asks": {}}
            await client.wait(lambda: check_chain(client.data(f"book.{name}.100ms")) == empty, "the emptied book")
            again = await client.ask(
                "public/subscribe", channels=[f"quote.{name}", f"quote.{fresh['instrument_name']}"]
            )
            assert again["result"] == [f"quote.{fresh['instrument_name']}"]
        expired = get(url, "public/get_instruments", kind="option", expired="true")[1]["result"]
        assert {row["state"] for row in expired} == {"delivered"}
        listed = get(url, "public/get_instruments", kind="option")[1]["result"]
        names, before, after = ({row["instrument_name"] for row in each} for each in (expired, rows, listed))
        assert names
        assert names <= before - after
