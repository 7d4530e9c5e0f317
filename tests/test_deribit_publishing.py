"""What a worker publishes: every type from every channel, numbered, with heartbeats and states beside the data."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import pytest

from collector.lifecycle import Exit
from collector.limits import CALL_BURST, CALL_COST, Credits
from collector.messages import ControlError
from collector.schema import SCHEMA
from tests.deribit_support import (
    BOOK,
    LOGIN,
    QUOTE,
    TRADES,
    Hearer,
    collecting,
    encode_data,
    living,
    make_spec,
    make_trade,
    wait_for,
)
from tests.exchange_client import exchange, get
from tests.pipeline import short_directory
from tests.support import in_loop
from workers.deribit.connection.subscriptions import EXPIRED
from workers.deribit.feeds.rhythm import SECOND
from workers.deribit.intake import FIRST_PART, Intake, cut_burst
from workers.deribit.rpc.codec import DATA_PREFIX
from workers.deribit.watching.statuses import LAST_DATA, REPEAT
from workers.deribit.worker import Worker

CHANNELS = {
    "book.BTC-PERPETUAL.raw": "book.BTC-PERPETUAL.raw",
    "book.BTC-PERPETUAL.100ms": "book.BTC-PERPETUAL.100ms",
    "book.ETH-PERPETUAL.agg2": "book.ETH-PERPETUAL.agg2",
    "book.ETH-PERPETUAL.none.20.100ms": "book.ETH-PERPETUAL.none-20-100ms",
    "book.BTC-PERPETUAL.10.1.agg2": "book.BTC-PERPETUAL.10-1-agg2",
    "trades.BTC-PERPETUAL.raw": "trade.BTC-PERPETUAL.raw",
    "trades.option.any.100ms": "trade.BTC-",
    "trades.spot.USDC.agg2": "trade.BTC_USDC.agg2",
    "ticker.BTC-PERPETUAL.raw": "ticker.BTC-PERPETUAL.raw",
    "ticker.ETH-PERPETUAL.100ms": "ticker.ETH-PERPETUAL.100ms",
    "incremental_ticker.BTC-PERPETUAL": "ticker.BTC-PERPETUAL.incremental",
    "quote.BTC-PERPETUAL": "quote.BTC-PERPETUAL.raw",
    "deribit_price_index.btc_usd": "index.btc_usd.raw",
    "deribit_volatility_index.btc_usd": "volatility.btc_usd.raw",
    "estimated_expiration_price.btc_usd": "expiration_price.btc_usd.raw",
    "markprice.options.btc_usd": "mark_prices.btc_usd.raw",
    "perpetual.BTC-PERPETUAL.100ms": "funding.BTC-PERPETUAL.100ms",
    "chart.trades.BTC-PERPETUAL.1": "candle.BTC-PERPETUAL.1",
    "instrument.state.any.any": "instrument.",
    "instrument.creation.option.any": "instrument.",
    "platform_state": "platform.",
    "platform_state.public_methods_state": "platform.all.raw",
    "deribit_price_ranking.btc_usd": "other.deribit_price_ranking:btc_usd.raw",
    "deribit_price_statistics.btc_usd": "other.deribit_price_statistics:btc_usd.raw",
    "user.portfolio.btc": "other.user:portfolio:btc.raw",
    "user.orders.BTC-PERPETUAL.raw": "other.user:orders:BTC-PERPETUAL:raw.raw",
    "user.changes.any.any.raw": "other.user:changes:any:any:raw.raw",
}
"""Channels of every family, and how the topics begin that they feed."""

SNAPSHOT = {"type": "snapshot", "change_id": 1, "bids": [["new", 1.0, 1.0]], "asks": [], "timestamp": 1}
"""Data of a book."""


@pytest.fixture(scope="module")
def lively() -> Iterator[str]:
    """An exchange where instruments come and go."""
    with exchange("--rate", "1500", "--faults", "listing:0.5,expiry:0.7", "--options", "60") as (url, _):
        yield url


@pytest.fixture
def ending() -> Iterator[str]:
    """An exchange where one instrument after the other expires."""
    with exchange("--rate", "100", "--faults", "expiry:1") as (url, _):
        yield url


@in_loop
async def test_every_channel_feeds_its_topic(lively: str) -> None:
    async with collecting(lively, "", *CHANNELS, login=LOGIN) as run:
        await wait_for(lambda: run.worker.client.machine.state == "live", "the connection")
        order = {"instrument_name": "BTC-PERPETUAL", "amount": 10, "type": "limit", "price": 1000}
        await run.ask("send", method="private/buy", params=order)
        for channel, begin in CHANNELS.items():
            kind = begin.partition(".")[0]
            more: dict[str, Any] = {"channel": channel} if kind == "other" else {}
            await run.hearer.hear_of(f"deribit.{begin}", type=kind, **more)
        await run.hearer.hear_of("deribit.heartbeat.w.1s", type="heartbeat")
        assert {body["type"] for _, body in run.hearer.messages} >= SCHEMA.keys() - {"gap", "repair"}
        assert {body["epoch"] for _, body in run.hearer.messages} == {run.worker.epoch}
        state = await run.get_state()
        assert (state["malformed"], state["unknown"], state["reconnects"]) == (0, 0, 0)
        assert sorted(state["channels"]["confirmed"]) == sorted(CHANNELS)
        assert state["messages"] >= len(run.hearer.messages)
        assert state["lag"].keys() == state["latency"].keys() == {"p50", "p99"}


@in_loop
async def test_times_and_payloads_are_those_of_the_exchange(practice: str) -> None:
    async with collecting(practice, "", "ticker.BTC-PERPETUAL.100ms", "incremental_ticker.BTC-PERPETUAL", QUOTE) as run:
        full = (await run.hearer.hear_of("deribit.ticker.BTC-PERPETUAL.100ms", type="ticker"))[0]
        merged = (await run.hearer.hear_of("deribit.ticker.BTC-PERPETUAL.incremental", 3, type="ticker"))[-1]
        assert full.keys() == merged.keys()
        assert {"volume", "high", "low", "price_change", "volume_usd"} <= full.keys()
        assert not {"stats", "greeks", "instrument_name", "timestamp"} & full.keys()
        for body in (full, merged, (await run.hearer.hear_of("deribit.quote.", type="quote"))[0]):
            assert body["exchange_ts"] % 1_000_000 == 0
            assert abs(body["receive_ts"] - body["exchange_ts"]) < 60_000_000_000
            assert run.worker.epoch < body["receive_ts"]


@in_loop
async def test_a_heartbeat_each_second_also_while_disconnected(practice: str) -> None:
    async with collecting(practice, "refuse:503", QUOTE, retry_delay=0.5) as run:
        beats = await run.hearer.hear_of("deribit.heartbeat.w.1s", 4)
        assert [beat["seq"] for beat in beats[:4]] == [1, 2, 3, 4]
        assert {beat["state"] for beat in beats} <= {"connecting", "backoff"}
        assert {(beat["wire"], beat["connection"], beat["instrument"]) for beat in beats} == {(1, "w", "w")}
        assert beats[-1]["receive_ts"] - beats[0]["receive_ts"] > (len(beats) - 1) * 0.5e9, "more than one a second"
        assert all(one["published"] < two["published"] for one, two in pairwise(beats))


def is_live(hearer: Hearer, topic: str) -> bool:
    return bool(hearer.find(topic, type="status")[-1]["state"] == "live")


@in_loop
async def test_the_connection_tells_its_states(practice: str) -> None:
    async with collecting(practice, "drop:2,first:1", QUOTE) as run:
        topic = "deribit.status.w.connection"
        await run.hearer.hear_of(topic, state="backoff")
        await run.hearer.hear(partial(is_live, run.hearer, topic), "the second life")
        told = [(body["state"], body["connection"]) for body in run.hearer.find(topic)]
        life = [("connecting", "w"), ("bootstrapping", "w"), ("live", "w")]
        changes = [change for change, _ in groupby(told)]  # each is said again within a minute
        assert changes == [*life, ("backoff", "w"), *life]
        assert "broke off" in run.hearer.find(topic, state="backoff")[0]["reason"]
        run.worker.stop()
        await run.hearer.hear_of(topic, state="closed")
    assert run.worker.client.exit == Exit.STOPPED


@in_loop
async def test_each_channel_tells_its_state_on_its_topic(practice: str) -> None:
    async with collecting(practice, "drop:2,first:1", QUOTE, BOOK, TRADES, "quote.NOPE") as run:
        for topic in ("quote.BTC-PERPETUAL.raw", "book.BTC-PERPETUAL.100ms", "trade.BTC-PERPETUAL.100ms"):
            await run.hearer.hear_of(f"deribit.{topic}", type="status", state="recovering", reason="disconnect")
            await run.hearer.hear(partial(is_live, run.hearer, f"deribit.{topic}"), "the second life")
            told = [body["state"] for body in run.hearer.find(f"deribit.{topic}", type="status")]
            assert [state for state, _ in groupby(told)][-3:] == ["live", "recovering", "live"]
        refused = await run.hearer.hear_of("deribit.quote.NOPE.raw", 2, type="status", state="refused")
        assert "left it out" in refused[0]["reason"]


@pytest.mark.parametrize("is_restart", [False, True])
@in_loop
async def test_a_channel_that_awaits_its_first_full_state_says_so_as_soon_as_it_is_given(
    practice: str, is_restart: bool
) -> None:
    """After a restart the last word on its topic is that of the life before, which may have been `live`."""
    with short_directory() as place:
        if is_restart:
            with living(place, BOOK) as earlier:
                earlier.take_frames([encode_data(BOOK, SNAPSHOT)], time.time_ns())
        async with collecting(practice, "no_snapshot:9", BOOK, place=place, fresh=not is_restart) as run:
            await wait_for(lambda: run.worker.client.is_live, "the connection")
            run.worker.statuses.tell_connection("live", "after whatever is said of channels")
            await run.hearer.hear_of("deribit.status.", reason="after whatever is said of channels")
            told = run.hearer.find("deribit.book.")[0]
            assert (told["seq"], told["state"], told["reason"]) == (1, "recovering", "subscribe")
            feed = run.worker.feeds[BOOK.encode()]
            stream, status, feed.waiting_since = feed.stream, feed.stream.status, 1.0  # it waited once, long ago
            run.worker.confirm_channels([BOOK])
            assert time.monotonic() - feed.waiting_since < 60, "its snapshot is not late yet"
            assert (stream.status is status, stream.lost) == (True, is_restart), "it is said once"
            late = Hearer(run.worker.publisher.endpoint, prefixes=["deribit.book."])
            await late.hear(lambda: late.joins, "an answer to a late subscriber")
            assert [(body["state"], body["join"]) for _, body in late.joins] == [("recovering", True)]
            late.close()


@in_loop
async def test_a_book_that_was_refused_is_recovering_once_it_is_given(practice: str) -> None:
    async with collecting(practice, f"drop_subscribe:{BOOK}@2,no_snapshot:9", BOOK) as run:
        await run.hearer.hear_of("deribit.book.", state="refused")
        subscriptions = run.worker.client.reconciler.subscriptions
        subscriptions.give_another_chance()
        await run.worker.client.reconciler.reconcile()
        await run.hearer.hear_of("deribit.book.", state="recovering", reason="subscribe")


@pytest.mark.parametrize(("faults", "state"), [("", "live"), ("clock:2400000000000", "expired")])
@in_loop
async def test_of_many_instruments_on_one_channel_those_that_have_ended_say_so(
    practice: str, faults: str, state: str
) -> None:
    """By the exchange's clock, which may be 76 years ahead of ours."""
    async with collecting(practice, faults, "trades.option.BTC.100ms", breaks="time" * bool(faults)) as run:
        rows = [make_trade(1, instrument_name=name) for name in ("BTC-6NOV20-10000-C", "BTC-6NOV99-10000-C")]
        await wait_for(lambda: run.worker.client.is_live, "the connection")
        run.worker.take_frames([encode_data("trades.option.BTC.100ms", rows)], time.time_ns())
        (ended,) = await run.hearer.hear_of("deribit.trade.BTC-6NOV20-", type="status")
        (other,) = await run.hearer.hear_of("deribit.trade.BTC-6NOV99-", type="status")
        assert (ended["state"], ended["reason"], other["state"]) == ("expired", EXPIRED, state)
        run.worker.patrol._forget_old()
        is_known = "BTC-6NOV99-10000-C" in run.worker.feeds[b"trades.option.BTC.100ms"].streams
        assert is_known == (state == "live")


@in_loop
async def test_what_was_said_to_have_ended_says_nothing_of_a_later_loss(practice: str) -> None:
    async with collecting(practice, "", "trades.option.BTC.100ms") as run:
        rows = [make_trade(1, instrument_name=name) for name in ("BTC-6NOV20-10000-C", "BTC-6NOV99-10000-C")]
        await wait_for(lambda: run.worker.client.is_live, "the connection")
        run.worker.take_frames([encode_data("trades.option.BTC.100ms", rows)], time.time_ns())
        await run.hearer.hear_of("deribit.trade.BTC-6NOV20-", type="status", state="expired")
        run.worker.client.cut("the test wants it so")
        await run.hearer.hear_of("deribit.trade.BTC-6NOV99-", type="status", state="recovering")
        run.worker.statuses.tell_connection("live", "behind whatever was said before")
        await run.hearer.hear_of("deribit.status.", reason="behind whatever was said before")
        said = [body.get("state", body["type"]) for body in run.hearer.find("deribit.trade.BTC-6NOV20-")]
        assert {*said[1:]} == {"expired"}


@in_loop
async def test_of_many_instruments_none_has_ended_before_all_that_was_sent_until_then_has_come() -> None:
    """The connection has died in silence; the day of the instrument is given by this test."""
    channel, topic = "trades.future.BTC.100ms", "deribit.trade.BTC-PERPETUAL."
    with exchange("--rate", "600") as (url, _):
        async with collecting(url, "half_open:3,first:1", channel, heartbeat_interval=60.0) as run:
            await run.hearer.hear_of(topic, type="trade")
            (feed,), traffic, statuses = run.worker.feeds.values(), run.worker.client.traffic, run.worker.statuses
            stream = feed.streams["BTC-PERPETUAL"]
            await wait_for(lambda: time.time_ns() - run.worker.patrol.last_ts > 5 * SECOND, "silence")
            frames, stream.expiry = traffic.frames, time.time_ns() - LAST_DATA - SECOND
            for part in range(REPEAT):
                statuses.repeat([feed], part)
            assert traffic.frames == frames
            run.worker.client.cut("the test wants it so")
            (repair, *_) = await run.hearer.hear_of(topic, type="repair")
            assert repair["repaired"]
            said = run.hearer.find(topic, type="status", state="expired")
            assert all(status["seq"] > repair["seq"] for status in said)


@in_loop
async def test_what_is_asked_of_a_worker_that_has_ended_is_refused_in_plain_words(practice: str) -> None:
    """Its ledger is closed by then: nothing may be written there, nor said."""
    async with collecting(practice, "", QUOTE) as run:
        await run.hearer.hear_of("deribit.quote.", type="quote")
    for op in ("subscribe", "unsubscribe"):
        with pytest.raises(ControlError, match="has ended") as refusal:
            await run.ask(op, channels=[QUOTE])
        assert refusal.value.code == "not_connected"
    assert (await run.get_state())["state"] == "closed"


@in_loop
async def test_a_worker_that_is_stopped_says_so_on_each_topic_and_what_stays_missing(practice: str) -> None:
    faults = "lost_trades:4@1,no_reply:public/get_last_trades_by_instrument"
    async with collecting(practice, faults, QUOTE, BOOK, TRADES, EXPIRED_QUOTE) as run:
        topics = ("deribit.quote.BTC-PERPETUAL.", "deribit.book.", "deribit.trade.")
        (gap,) = await run.hearer.hear_of("deribit.trade.", type="gap", healing=True)
        run.worker.stop()
        for topic in topics:
            await run.hearer.hear_of(topic, type="status", state="closed", reason="stopped")
        assert {run.hearer.find(topic)[-1].get("state") for topic in topics} == {"closed"}
        (repair,) = run.hearer.find("deribit.trade.", type="repair", gap=gap["id"])
        assert repair["missing"] == [[gap["missing_from"], gap["missing_to"]]]
        assert run.hearer.find("deribit.quote.BTC-6NOV20-", type="status")[-1]["state"] == "expired"


@in_loop
async def test_a_connection_that_is_refused_for_good_closes_each_topic(practice: str) -> None:
    async with collecting(practice, "skip:1,ban:12005", QUOTE, BOOK, TRADES, EXPIRED_QUOTE, login=LOGIN) as run:
        topics = ("deribit.quote.BTC-PERPETUAL.", "deribit.book.", "deribit.trade.")
        for topic in topics:
            await run.hearer.hear_of(topic, type=topic.split(".")[1])
        await run.hearer.hear_of("deribit.quote.BTC-6NOV20-", type="status", state="expired")  # it is asked for twice
        run.worker.client.cut("the test wants it so")
        for topic in topics:
            await run.hearer.hear_of(topic, type="status", state="recovering", reason="disconnect")
            await run.hearer.hear_of(topic, type="status", state="closed", reason="failed")
            assert run.hearer.find(topic)[-1].get("state") == "closed"
        assert run.hearer.find("deribit.trade.", type="gap")
        assert run.hearer.find("deribit.status.", type="status")[-1]["state"] == "failed"
        assert run.hearer.find("deribit.quote.BTC-6NOV20-", type="status")[-1]["state"] == "expired"


@in_loop
async def test_one_that_gives_up_leaves_its_topics_to_its_successor(practice: str) -> None:
    async with collecting(practice, "skip:1,refuse:503", QUOTE, retry_count=1) as run:
        await run.hearer.hear_of("deribit.quote.", type="quote")
        run.worker.client.cut("the test wants it so")
        await run.hearer.hear_of("deribit.status.", type="status", state="failed")
        assert run.hearer.find("deribit.quote.", type="status")[-1]["state"] == "recovering"


EXPIRED_QUOTE = "quote.BTC-6NOV20-10000-C"


@in_loop
async def test_a_channel_of_an_instrument_whose_day_has_passed_is_expired_and_asked_for_once(practice: str) -> None:
    async with collecting(practice, "", QUOTE, EXPIRED_QUOTE) as run:
        topic = "deribit.quote.BTC-6NOV20-10000-C.raw"
        (status,) = (await run.hearer.hear_of(topic, type="status"))[:1]
        assert (status["state"], status["reason"]) == ("expired", EXPIRED)
        await run.hearer.hear_of("deribit.quote.BTC-PERPETUAL.", type="quote")  # what has data has a gap to tell of
        run.worker.client.cut("the test wants it so")
        await run.hearer.hear_of("deribit.quote.BTC-PERPETUAL.", type="gap")
        channels = (await run.get_state())["channels"]
        assert (channels["refused"], channels["confirmed"]) == ({EXPIRED_QUOTE: EXPIRED}, [QUOTE])
        assert {body["state"] for body in run.hearer.find(topic)} == {"expired"}
        await wait_for(lambda: run.worker.client.machine.state == "live", "it to be live: data come a little before")
        wish = await run.ask("subscribe", channels=[EXPIRED_QUOTE])  # who asks for it again, has it asked for again
        assert wish["channels"][EXPIRED_QUOTE] == {"code": "exchange_error", "message": EXPIRED}


@in_loop
async def test_a_channel_is_expired_when_the_exchange_says_that_its_instrument_has_ended(ending: str) -> None:
    rows = get(ending, "public/get_instruments", kind="option")[1]["result"]
    quotes = [f"quote.{row['instrument_name']}" for row in rows]
    async with collecting(ending, "", "instrument.state.option.any", *quotes) as run:
        (status,) = (await run.hearer.hear_of("deribit.quote.", type="status", state="expired"))[:1]
        assert status["reason"] == EXPIRED
        gone = f"quote.{status['instrument']}"
        await run.hearer.hear_of(f"deribit.instrument.{status['instrument']}.", state="delivered")
        await wait_for(lambda: gone not in run.worker.client.reconciler.subscriptions.confirmed, "it to be left")
        assert (await run.get_state())["channels"]["refused"][gone] == EXPIRED
        assert run.worker.take_events() == []  # nobody follows patterns here


@pytest.mark.parametrize(
    "event", [{"kind": "option", "state": "open"}, {"state": "open"}, {"kind": "option"}, {"state": "closed"}]
)
@in_loop
async def test_what_was_refused_of_an_instrument_is_asked_for_again_when_it_is_listed(
    practice: str, event: dict[str, str]
) -> None:
    """Not when it has ended; and nothing of others is asked for."""
    listings, other = "instrument.creation.any.any", "quote.ETH-PERPETUAL"
    faults = f"drop_subscribe:{QUOTE}@2,drop_subscribe:{other}@9"
    async with collecting(practice, faults, listings, QUOTE, other) as run:
        subscriptions = run.worker.client.reconciler.subscriptions
        await wait_for(lambda: len(subscriptions.refused) == 2, "the refusals")
        data = {"timestamp": time.time_ns() // 1_000_000, "instrument_name": "BTC-PERPETUAL", **event}
        run.worker.take_frames([encode_data(listings, data)], time.time_ns())
        if event.get("state") == "closed":
            assert QUOTE in subscriptions.refused
        else:
            await run.hearer.hear_of("deribit.quote.BTC-PERPETUAL.", type="quote")
        assert other in subscriptions.refused


@in_loop
async def test_the_supervisor_hears_that_an_instrument_has_ended_once_its_channels_are_left(ending: str) -> None:
    """It gives them up at once, and they had their last words still to say."""
    rows = get(ending, "public/get_instruments", kind="option")[1]["result"]
    quotes = [f"quote.{row['instrument_name']}" for row in rows]
    async with collecting(ending, "", *quotes, follow=True) as run:
        events = run.worker.channels.events
        ends = await wait_for(lambda: [e for e in events if e.get("row", {}).get("state") == "delivered"], "an end")
        gone = {f"quote.{event['row']['instrument_name']}" for event in ends} & {*quotes}
        refused = run.worker.client.reconciler.subscriptions.refused
        assert gone
        assert {refused.get(name) for name in gone} == {EXPIRED}


@in_loop
async def test_each_status_is_said_again_within_a_minute(practice: str) -> None:
    async with collecting(practice, "", QUOTE, BOOK, TRADES) as run:
        prefixes = ("deribit.quote.", "deribit.book.", "deribit.trade.")
        for prefix in prefixes:
            await run.hearer.hear_of(prefix, type="status", state="live")
        said = {prefix: len(run.hearer.find(prefix, type="status")) for prefix in prefixes}
        feeds = list(run.worker.feeds.values())
        for part in range(60):  # as topics come and go, their order changes
            run.worker.statuses.repeat(feeds[-part % 3 :] + feeds[: -part % 3], part)
        for prefix in prefixes:
            again = await run.hearer.hear_of(prefix, said[prefix] + 1, type="status")
            assert again[-1]["state"] == "live"
            assert len(again) <= said[prefix] + 2  # one more may be of the worker's own clock


@in_loop
async def test_the_connections_own_status_is_said_again_within_a_minute(practice: str) -> None:
    async with collecting(practice, "", QUOTE) as run:
        topic = "deribit.status.w.connection"
        await run.hearer.hear_of(topic, state="live")
        said = len(run.hearer.find(topic))
        for part in range(60):
            run.worker.statuses.repeat_others(part)
        assert (await run.hearer.hear_of(topic, said + 1))[-1]["state"] == "live"


@in_loop
async def test_that_a_topic_was_closed_is_said_twice_more_unless_it_is_taken_up_again(practice: str) -> None:
    def pass_a_minute() -> None:
        for part in range(60):
            run.worker.statuses.repeat_others(part)

    async with collecting(practice, "", QUOTE, BOOK) as run:
        for prefix in ("deribit.quote.", "deribit.book."):
            await run.hearer.hear_of(prefix, 2, type=prefix.split(".")[1])
        await run.ask("unsubscribe", channels=[QUOTE, BOOK])
        await run.hearer.hear_of("deribit.quote.", state="closed")
        pass_a_minute()
        for prefix in ("deribit.quote.", "deribit.book."):
            await run.hearer.hear_of(prefix, 2, state="closed")
        await run.ask("subscribe", channels=[BOOK])
        pass_a_minute()
        pass_a_minute()
        await run.hearer.hear_of("deribit.quote.", 3, state="closed")
        run.worker.statuses.tell_connection("live", "behind whatever was said before")
        await run.hearer.hear_of("deribit.status.", reason="behind whatever was said before")
        assert len(run.hearer.find("deribit.quote.", state="closed")) == 3
        epochs = [body["epoch"] for body in run.hearer.find("deribit.book.")]
        assert epochs == sorted(epochs)
        assert epochs[-1] > run.worker.epoch


@in_loop
async def test_a_topic_that_is_left_and_taken_up_again_begins_a_new_epoch(practice: str) -> None:
    async with collecting(practice, "", QUOTE, BOOK) as run:
        topic = "deribit.quote.BTC-PERPETUAL.raw"
        await run.hearer.hear_of(topic, 3, type="quote")
        assert await run.ask("unsubscribe", channels=[QUOTE]) == {"channels": {QUOTE: True}}
        closed = await run.hearer.hear_of(topic, type="status", state="closed")
        await run.hearer.hear_of("deribit.book.", len(run.hearer.find("deribit.book.")) + 5)
        assert run.hearer.find(topic)[-1] == closed[0]
        assert await run.ask("subscribe", channels=[QUOTE]) == {"channels": {QUOTE: True}}
        quotes = await run.hearer.hear_of(topic, len(run.hearer.find(topic, type="quote")) + 2, type="quote")
        said = run.hearer.find(topic)
        first = said[said.index(closed[0]) + 1]
        assert first["epoch"] == quotes[-1]["epoch"] > closed[0]["epoch"] == run.worker.epoch
        assert (first["seq"], first["state"]) == (1, "recovering")
        assert not run.hearer.find(topic, type="gap")  # who left it lost nothing


@pytest.mark.parametrize("fault", ["", "ack_late"])
@in_loop
async def test_a_channel_that_is_taken_up_again_says_so_before_its_data(practice: str, fault: str) -> None:
    """Also one that feeds many topics, of which nobody knows which will speak; and also those that stay silent."""
    channels = ["platform_state", "trades.future.any.100ms", QUOTE, BOOK]
    async with collecting(practice, fault, *channels) as run:
        await run.hearer.hear_of("deribit.platform.", 3, type="platform")
        await run.hearer.hear_of("deribit.trade.", 3, type="trade")
        await run.hearer.hear_of("deribit.book.", type="book")
        await run.hearer.hear_of("deribit.quote.", type="quote")
        await run.ask("unsubscribe", channels=channels)
        await run.hearer.hear_of("deribit.quote.", type="status", state="closed")
        await run.ask("subscribe", channels=channels)
        kinds = ("platform", "trade", "quote", "book")
        topics = {topic for topic, body in run.hearer.messages if body["type"] in kinds}

        def list_since(topic: str) -> list[str]:
            """What has been said on a topic since it was closed."""
            said = [body.get("state", "") if body["type"] == "status" else "data" for body in run.hearer.find(topic)]
            return said[said.index("closed") + 1 :] if "closed" in said else []

        await run.hearer.hear(lambda: all("live" in list_since(topic) for topic in topics), "all to be live again")
        await run.hearer.hear(lambda: sum("data" in list_since(topic) for topic in topics) >= 4, "data")
        assert {list_since(topic)[0] for topic in topics} == {"recovering"}


@in_loop
async def test_a_topic_that_another_channel_feeds_as_well_is_not_closed(lively: str) -> None:
    given_up, kept = "instrument.creation.any.any", "instrument.state.any.any"
    async with collecting(lively, "", given_up, kept) as run:
        feeds = {name: run.worker.feeds[name.encode()] for name in (given_up, kept)}
        await wait_for(lambda: feeds[given_up].streams.keys() & feeds[kept].streams.keys(), "both on one topic")
        await run.ask("unsubscribe", channels=[given_up])
        shared = feeds[kept].streams.keys()
        for name in feeds[given_up].streams.keys() - shared:
            await run.hearer.hear_of(f"deribit.instrument.{name}.", type="status", state="closed")
        run.worker.statuses.tell(feeds[kept], "live", "said again")  # behind whatever was said before
        for name in shared:
            await run.hearer.hear_of(f"deribit.instrument.{name}.", type="status", reason="said again")
            assert not run.hearer.find(f"deribit.instrument.{name}.", type="status", state="closed")


@in_loop
async def test_nothing_comes_after_the_word_that_an_instrument_has_expired() -> None:
    """A channel that speaks every 100 ms says the last of its book after the exchange has said that it ended."""
    with exchange("--faults", "expiry:0.3", "--options", "60") as (url, _):
        rows = get(url, "public/get_instruments", kind="option")[1]["result"]
        books = [f"book.{row['instrument_name']}.100ms" for row in rows]
        async with collecting(url, "", "instrument.state.option.any", *books) as run:

            def spoke_after(status: dict[str, Any]) -> bool:
                place = f".{status['instrument']}."
                said = [body.get("state", body["type"]) for topic, body in run.hearer.messages if place in topic]
                return "book" in said[said.index("delivered") :]

            def find_ended() -> list[dict[str, Any]]:
                found = run.hearer.find("deribit.book.", type="status", state="expired")
                return found if len(found) >= 5 and any(map(spoke_after, found)) else []

            ended = await run.hearer.hear(find_ended, "some, and one that says something after its end")
            left = {f"book.{status['instrument']}.100ms" for status in ended}
            await wait_for(lambda: not left & run.worker.client.reconciler.subscriptions.confirmed, "all to be left")
            run.hearer.drain()
            for status in ended:
                said = run.hearer.find(f"deribit.book.{status['instrument']}.")
                after = said[said.index(status) :]
                assert {each.get("state") for each in after} == {"expired"}  # which is said again when its turn comes


@in_loop
async def test_unsubscribing_and_subscribing_at_once_leaves_it_subscribed(practice: str) -> None:
    async with collecting(practice, "delay:100", QUOTE, BOOK) as run:
        topic = "deribit.quote.BTC-PERPETUAL.raw"
        await run.hearer.hear_of(topic, type="quote")
        leaving = asyncio.create_task(run.ask("unsubscribe", channels=[QUOTE]))
        await asyncio.sleep(0)  # the call is on its way
        await run.ask("subscribe", channels=[QUOTE])
        await leaving
        now = time.time_ns()
        await run.hearer.hear(lambda: run.hearer.find(topic)[-1]["receive_ts"] > now, "quotes from then on")
        assert run.worker.client.get_state()["channels"]["confirmed"] == sorted([QUOTE, BOOK])


@in_loop
async def test_a_channel_that_is_taken_up_again_while_it_is_left_ends_and_begins_anew(practice: str) -> None:
    """The exchange has left it by then: what follows does not continue what was before."""
    async with collecting(practice, "slow:public/unsubscribe=0.3@1", BOOK, QUOTE) as run:
        topic = "deribit.book.BTC-PERPETUAL.100ms"
        await run.hearer.hear_of(topic, 5, type="book")
        leaving = asyncio.create_task(run.ask("unsubscribe", channels=[BOOK]))
        await wait_for(lambda: BOOK not in run.worker.client.reconciler.subscriptions.asked, "it to be left")
        assert await run.ask("subscribe", channels=[BOOK]) == {"channels": {BOOK: True}}
        assert await leaving == {"channels": {BOOK: True}}
        await run.hearer.hear_of(topic, 2, type="book", kind="snapshot")
        said = [body for body in run.hearer.find(topic) if body["type"] in ("book", "status")]
        place = next(place for place, body in enumerate(said) if body.get("state") == "closed")
        assert [body["state"] for body in said[place : place + 2]] == ["closed", "recovering"]
        assert (said[place + 2]["kind"], said[place + 2]["reason"]) == ("snapshot", "subscribe")


@pytest.mark.parametrize("fault", ["no_reply:public/unsubscribe@1", "error:public/unsubscribe=10001@1"])
@in_loop
async def test_a_channel_is_closed_also_if_nobody_answers(practice: str, fault: str) -> None:
    async with collecting(practice, fault, QUOTE, BOOK, timeout=2.0) as run:
        await run.hearer.hear_of("deribit.quote.", type="quote")
        assert await run.ask("unsubscribe", channels=[QUOTE]) == {"channels": {QUOTE: True}}
        await run.hearer.hear_of("deribit.quote.", type="status", state="closed")
        await wait_for(lambda: run.worker.client.reconciler.subscriptions.confirmed == {BOOK}, "what is left")


@in_loop
async def test_wishes_while_it_is_away_are_kept_and_fed_later(practice: str) -> None:
    async with collecting(practice, "refuse:503,first:3", BOOK, retry_delay=0.3) as run:
        answer = await run.ask("subscribe", channels=[QUOTE])
        assert answer["channels"][QUOTE]["code"] == "not_connected"
        assert await run.ask("unsubscribe", channels=[BOOK]) == {"channels": {BOOK: True}}
        await run.hearer.hear_of("deribit.quote.BTC-PERPETUAL.raw", type="quote")
        assert not run.hearer.find("deribit.book.", type="book")


@in_loop
async def test_commands_are_answered_with_their_codes(practice: str) -> None:
    async with collecting(practice, "", QUOTE) as run:
        await wait_for(lambda: run.worker.client.machine.state == "live", "the connection")
        assert await run.ask("send", method="public/test") == {"version": "1.2.26"}
        codes: dict[str, ControlError] = {}
        requests: dict[str, dict[str, Any]] = {
            "unknown_op": {"op": "dance"},
            "exchange_error": {"op": "send", "method": "public/nothing"},
            "bad_request": {"op": "subscribe", "channels": ["a b"]},
        }
        for code, request in requests.items():
            with pytest.raises(ControlError) as error:
                await run.ask(**request)
            codes[code] = error.value
            assert error.value.code == code
        assert codes["exchange_error"].data == {"code": -32601, "message": "Method not found"}
        run.worker.stop()
        await wait_for(lambda: run.worker.client.machine.state == "closed", "the end")
        with pytest.raises(ControlError, match="not_connected"):
            await run.ask("send", method="public/test")


@in_loop
async def test_who_loses_the_connection_while_it_waits_hears_that_the_outcome_is_not_known(practice: str) -> None:
    """Who asks after that hears that nothing was sent."""
    async with collecting(practice, "no_reply:public/status") as run:
        client = run.worker.client
        await wait_for(lambda: client.is_live, "live")
        asking = asyncio.create_task(run.ask("send", method="public/status"))
        await wait_for(lambda: "public/status" in dict(client.traffic.waiting.values()), "the request")
        client.cut("the test wants it so")
        with pytest.raises(ControlError, match="answer came; whether it was carried out is not known"):
            await asking
        told = r"^not_connected: the connection (has just been lost|is not live: backoff)$"
        with pytest.raises(ControlError, match=told):
            await run.ask("send", method="public/status")


@pytest.mark.parametrize("faults", ["", "error:public/status=11051"])
@in_loop
async def test_sends_unsubscribes_and_proofs_of_life_draw_on_the_credits_of_all(practice: str, faults: str) -> None:
    """An exchange that is not open is not asked again at once: that would use up what others need to come back."""
    async with collecting(practice, faults, QUOTE) as run:
        client, patrol = run.worker.client, run.worker.patrol
        await wait_for(lambda: client.is_live, "live")
        pool = client.session.credits = Credits(CALL_BURST, 1e-6, time.monotonic())
        assert await patrol._ask_for_life() is patrol._may_ask_for_life() is (not faults)
        await run.ask("unsubscribe", channels=[QUOTE])
        await wait_for(lambda: not client.reconciler.subscriptions.confirmed, "the answer")
        await run.ask("send", method="public/get_time")
        assert pool.level == pytest.approx(CALL_BURST - 4 * CALL_COST, abs=1)


@in_loop
async def test_data_of_channels_that_nobody_asked_for_are_counted(practice: str) -> None:
    async with collecting(practice, "", QUOTE) as run:
        await run.hearer.hear_of("deribit.quote.", type="quote")
        await wait_for(lambda: run.worker.client.is_live, "the end of the bootstrap: data come before it")
        await run.worker.client.send("public/subscribe", {"channels": [BOOK]})
        await wait_for(lambda: run.worker.intake.unknown > 2, "unknown data")
        assert not run.hearer.find("deribit.book.")


@in_loop
async def test_wrong_types_are_counted_and_what_is_published_stays_valid(practice: str) -> None:
    channels = [name for name in CHANNELS if not name.endswith(".raw")]
    # A side of a change may be sent as an empty list: the book is then as wrong as the exchange said it.
    async with collecting(practice, "wrong_types:5", *channels, breaks="crossed") as run:
        await wait_for(lambda: run.worker.intake.malformed > 20, "malformed frames")
        await run.hearer.hear_of("deribit.quote.", len(run.hearer.find("deribit.quote.")) + 5, type="quote")
        counts: defaultdict[str, int] = defaultdict(int)
        for _, body in run.hearer.messages:
            counts[body["type"]] += 1
        assert {"book", "ticker", "quote", "index", "trade"} <= counts.keys()


def test_a_long_burst_goes_out_in_parts_that_grow_and_a_short_one_whole() -> None:
    frames = [b"%d" % number for number in range(640)]
    assert [len(part) for part in cut_burst(frames)] == [32, 96, 288, 224]
    for length in (0, 1, 31, 32, 33, 127, 128, 129, 640):
        assert [frame for part in cut_burst(frames[:length]) for frame in part] == frames[:length]
    assert cut_burst(frames[:32]) == [frames[:32]]


class Noting(Intake):
    """Notes how much was out when it met a frame that cannot be read."""

    out = 0

    def take_malformed(self, frame: bytes, reason: str) -> None:
        self.out = self._publisher.published


@in_loop
async def test_the_first_of_a_burst_is_out_before_the_last_is_looked_at() -> None:
    with short_directory() as directory:
        worker = Worker(make_spec("ws://127.0.0.1:9", str(directory), [QUOTE]))
        intake = Noting(worker.channels, worker.publisher, worker.patrol, worker.client.session, attend=worker._attend)
        quote = DATA_PREFIX + QUOTE.encode() + b'","data":{"timestamp":1700000000000}}}'
        intake.take_frames([quote] * 100 + [b"{}"], time.time_ns())
        assert intake.out == FIRST_PART
        assert worker.publisher.published == 100
        worker.publisher.close()
        worker.ledger.close()
