"""Topics over months: what expired is forgotten, in memory and in the ledger, and its place serves another."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from collector.channels import LISTINGS, guess_expiry
from tests.deribit_support import (
    BOOK,
    QUOTE,
    TRADES,
    answer_nothing,
    encode_data,
    living,
    make_trade,
    run_healing,
    wait_for,
)
from tests.pipeline import Subscriber, short_directory, subscribed
from tests.support import in_loop, wait_until
from workers.deribit.connection.session import _read_steady
from workers.deribit.connection.subscriptions import EXPIRED
from workers.deribit.feeds.frames import TradeData
from workers.deribit.feeds.listings import ListingFeed
from workers.deribit.feeds.trades.feed import TradeFeed
from workers.deribit.healing.fetch import Ask, heal_feed
from workers.deribit.intake import LOG_EVERY
from workers.deribit.publishing.ledger import (
    BEGUN,
    EPOCH,
    FIRST,
    HEARD,
    LAST_ID,
    LAST_TS,
    OUT,
    SUBSCRIPTIONS,
    UNHEALED,
    WORDS,
    Ledger,
)
from workers.deribit.publishing.streams import ANY_ID, DAY, LONG_LEFT, MAX_TOPICS, SLICE, Malformed, Topics
from workers.deribit.watching.lag import Samples
from workers.deribit.watching.statuses import LAST_DATA, OVER, REPEAT, UNSUBSCRIBED
from workers.deribit.worker import Worker

WIDE = "trades.future.BTC.100ms"
EXPIRY = 1_793_952_000 * 1_000_000_000
"""2026-11-06 08:00 UTC."""

START = EXPIRY - 10 * DAY


@contextmanager
def heard(channel: str) -> Iterator[tuple[Worker, Subscriber]]:
    """A life of a worker that has one channel, and who hears it. All that was sent to it until now has come."""
    with (
        short_directory() as directory,
        living(directory, channel, fresh=True) as worker,
        subscribed(worker.publisher.bind()) as subscriber,
    ):
        wait_until(lambda: worker.publisher.take_subscriptions(), "the subscription")
        worker.statuses.heard_until = time.time_ns()
        yield worker, subscriber


def test_the_name_of_an_instrument_tells_its_expiry() -> None:
    assert guess_expiry("BTC-6NOV26-100000-C") == guess_expiry("ETH-6NOV26") == EXPIRY
    assert guess_expiry("XRP_USDC-6NOV26-0d625-P") == EXPIRY
    assert guess_expiry("BTC-CS-6NOV26-70000_75000") == EXPIRY
    assert guess_expiry("BTC-FS-6NOV26_PERP") == guess_expiry("BTC-FS-25DEC26_6NOV26") == EXPIRY
    for name in ("BTC-PERPETUAL", "BTC_USDC", "BTC-31FEB26", "BTC-6NOV26X", "BTC-6XYZ26-1-C", "btc_usd"):
        assert guess_expiry(name) is None


def test_expired_topics_are_forgotten_and_their_places_reused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a.ledger", fresh=True)
    topics = Topics(1, ledger)
    old = topics.find("trade", "BTC-6NOV26-100000-C", "100ms")
    kept = topics.find("trade", "BTC-6NOV26-90000-C", "100ms")
    young = topics.find("trade", "BTC-PERPETUAL", "100ms")
    for stream in (old, kept, young):
        stream.seq, ledger.cells[stream.slot] = 1, 5
    place = old.slot
    assert topics.forget_old(0, EXPIRY + DAY - 1, ()) == []
    assert topics.forget_old(0, EXPIRY + DAY + 1, {kept}) == [old]
    assert list(topics.match(b"")) == [kept, young]
    assert topics.find("trade", "BTC-27NOV26", "100ms").slot == place
    assert old.slot == 0
    ledger.close()
    names = {entry.topic.split(".")[2] for entry in Ledger(tmp_path / "a.ledger", fresh=False).earlier}
    assert names == {kept.instrument, young.instrument}


def test_what_is_taken_up_later_has_the_epoch_of_that(topics: Topics) -> None:
    first = topics.find("quote", "BTC-PERPETUAL", "raw")
    topics.begin_epoch(200)
    later = topics.find("quote", "ETH-PERPETUAL", "raw")
    assert topics.find("quote", "BTC-PERPETUAL", "raw") is first
    assert (first.epoch, later.epoch, topics.epoch) == (1, 200, 1)
    topics.begin_epoch(150)
    assert topics.find("quote", "SOL-PERPETUAL", "raw").epoch == 200


def test_a_topic_that_is_taken_up_again_has_a_later_epoch_and_counts_anew(topics: Topics) -> None:
    left = topics.find("trade", "BTC-PERPETUAL", "raw")
    left.seq, left.last_id, place = 7, 50, left.slot
    topics.leave(left, 150)
    again = topics.find("trade", "BTC-PERPETUAL", "raw")  # by a channel that was there all along
    assert (again.epoch, again.seq, again.left_at, again.slot) == (2, 0, 50, place)
    topics.leave(again, 250)
    topics.forget_left(250 + LONG)
    topics.begin_epoch(300)
    last = topics.find("trade", "BTC-PERPETUAL", "raw")
    assert (last.epoch, last.left_at) == (300, 50)
    assert topics.ledger.cells[last.slot + EPOCH] == 300


@in_loop
async def test_a_topic_whose_instrument_has_long_ended_is_forgotten_by_its_channel_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each later loss would be told of it, and healed. It is looked for once an hour, here each second."""
    monkeypatch.setattr("workers.deribit.watching.patrol.HOUR", 1)
    channel = "trades.option.any.100ms"
    with living(tmp_path, channel, fresh=True) as worker:
        feed = find_trades(worker)
        names = ["BTC-6NOV20-1-C", "BTC-6NOV99-1-C"]
        worker.take_frames([encode_data(channel, [make_trade(5, instrument_name=name) for name in names])], START)
        assert list(feed.tapes) == list(feed.streams) == names
        patrol = asyncio.create_task(worker.patrol.run())
        await wait_for(lambda: list(feed.tapes) == list(feed.streams) == names[1:], "one to be forgotten")
        patrol.cancel()


@in_loop
async def test_a_topic_is_not_forgotten_before_what_was_lost_of_it_is_fetched_and_its_end_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exchange was away for a day. Else the last word of the topic would be `recovering`."""
    monkeypatch.setattr("workers.deribit.watching.patrol.HOUR", 1)
    channel, name = "trades.option.any.100ms", "BTC-6NOV20-1-C"
    with living(tmp_path, channel, fresh=True) as worker:
        feed, other = find_trades(worker), worker.topics.find("quote", name, "raw")
        feed.confirm(START)
        worker.take_frames([encode_data(channel, [make_trade(5, instrument_name=name)])], START)
        worker.change_state("backoff", "for a day")
        other.seq = 1
        patrol = asyncio.create_task(worker.patrol.run())
        await wait_for(lambda: other not in worker.topics.match(b""), "another topic to be forgotten")
        assert list(feed.streams) == [name]
        feed.losses.begin_healing(time.time_ns())
        feed.losses.end()
        worker.statuses.heard_until = time.time_ns()
        worker.statuses.tell_first(feed)
        await wait_for(lambda: not feed.streams, "this one, too")
        patrol.cancel()


def test_a_forgotten_topic_that_is_spoken_of_once_more_has_a_later_epoch(topics: Topics) -> None:
    """The exchange tells that an instrument is archivized days after its end."""
    old = topics.find("instrument", "BTC-6NOV26", "raw")
    assert topics.forget_old(0, EXPIRY + 2 * DAY, ()) == [old]
    again = topics.find("instrument", "BTC-6NOV26", "raw")
    assert (again.seq, old.epoch, again.epoch) == (0, 1, 2)
    assert topics.forget_old(0, EXPIRY + 3 * DAY, ()) == [again]
    assert topics.find("instrument", "BTC-6NOV26", "raw").epoch == 3


def test_a_topic_that_was_left_long_ago_is_forgotten_though_its_instrument_never_ends(topics: Topics) -> None:
    """Else who asks for others and others, for months, would be refused in the end."""
    first, second = (topics.find("quote", f"{name}-PERPETUAL", "raw") for name in ("BTC", "ETH"))
    place = first.slot
    topics.leave(first, 100)
    topics.leave(second, 200)
    assert topics.forget_old(100 + LONG_LEFT, START, ()) == []
    assert topics.forget_old(200 + LONG_LEFT, START, ()) == [first]
    assert topics.find("quote", "SOL-PERPETUAL", "raw").slot == place
    again = topics.find("quote", "BTC-PERPETUAL", "raw")
    assert (again is first, again.epoch, again.slot) == (False, first.epoch + 1, second.slot + WORDS)
    assert topics.forget_old(201 + LONG_LEFT, START, ()) == [second], "what is asked for stays"


@in_loop
async def test_of_thousands_that_were_left_together_all_are_forgotten_and_what_comes_need_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.deribit.publishing.streams.LONG_LEFT", -1)
    with living(tmp_path, fresh=True) as worker:
        streams = [worker.topics.find("quote", f"BTC-{number}", "raw") for number in range(SLICE + 1)]
        for stream in streams:
            worker.topics.leave(stream, time.monotonic_ns())
        forgetting = asyncio.create_task(worker.patrol._forget_all_old())
        counts = []
        while not forgetting.done():
            await asyncio.sleep(0)
            counts.append(sum(not stream.slot for stream in streams))
        assert list(dict.fromkeys(counts)) == [SLICE, SLICE + 1]


def test_what_is_forgotten_says_no_last_word(tmp_path: Path) -> None:
    """It may be asked for anew meanwhile."""
    with living(tmp_path, QUOTE, TRADES, fresh=True) as worker:
        forgotten, other = (feed.stream for feed in worker.feeds.values())
        for channel in (QUOTE, TRADES):
            ask(worker, "unsubscribe", channel)
        assert worker.topics.forget_old(other.left_since + LONG_LEFT, START, ()) == [forgotten]
        for part in range(REPEAT):
            worker.statuses.repeat_others(part)
        assert (forgotten.seq, other.seq) == (1, 2)


def test_what_was_left_just_now_is_not_forgotten_however_far_our_clock_is_behind(tmp_path: Path) -> None:
    """Trades that it has said would be said again, and its last word not once more."""
    with living(tmp_path, TRADES, fresh=True) as worker:
        (feed,) = worker.feeds.values()
        ask(worker, "unsubscribe", TRADES)
        worker.client.session._ahead = time.time_ns() + 3 * LONG_LEFT - _read_steady()
        worker.patrol._forget_old()
        for part in range(REPEAT):
            worker.statuses.repeat_others(part)
        assert (feed.stream.seq, worker.topics.forget_old(0, START, ())) == (2, [])
        assert worker.topics.find("trade", "BTC-PERPETUAL", "100ms").slot


def test_what_is_left_days_after_its_end_says_its_last_word_again_like_any_other(tmp_path: Path) -> None:
    channel = "quote.BTC-6NOV20"
    with living(tmp_path, channel, QUOTE, fresh=True) as worker:
        streams = [feed.stream for feed in worker.feeds.values()]
        for name in (channel, QUOTE):
            ask(worker, "unsubscribe", name)
        worker.patrol._forget_old()
        for part in range(REPEAT):
            worker.statuses.repeat_others(part)
        assert [stream.seq for stream in streams] == [2, 2]


@pytest.mark.parametrize("hours", [3, -3])
def test_trades_of_a_topic_that_was_left_hours_ago_are_not_said_again_where_clocks_differ(
    tmp_path: Path, hours: int
) -> None:
    """What a wide channel lacks is asked for from so much earlier on."""
    hour, now = 3600 * 1_000_000_000, time.time_ns()
    theirs = now + hours * hour
    before = [make_trade(5, timestamp=(theirs - 2 * hour) // 1_000_000)]
    with living(tmp_path, TRADES, fresh=True) as worker:
        worker.take_frames([encode_data(TRADES, before)], now - 2 * hour)
        left = find_trades(worker).stream
        ask(worker, "unsubscribe", TRADES)
        worker.topics.forget_old(left.left_since + 2 * hour, theirs, ())
        ask(worker, "subscribe", WIDE)
        feed = find_trades(worker)
        feed.confirm(now)
        other = make_trade(7, instrument_name="BTC-27NOV99", timestamp=theirs // 1_000_000)
        worker.take_frames([encode_data(WIDE, [other])], now)
        feed.lose("disconnect", now)
        step = next(heal_feed(feed, now, theirs - now))
        assert isinstance(step, Ask)
        assert step.params["start_timestamp"] < before[0]["timestamp"]
        assert feed.backfill(msgspec.convert(before, list[TradeData]), now) == []


@in_loop
async def test_a_clock_that_is_set_back_leaves_nothing_of_what_was_left_to_a_later_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would say a loss and an end there, beside another connection that has the topic by now."""
    monkeypatch.setattr("workers.deribit.publishing.streams.SURE", 0.0)
    with living(tmp_path, QUOTE, fresh=True) as worker:
        worker.take_frames([encode_data(QUOTE, {"instrument_name": "BTC-PERPETUAL", "timestamp": 1})], 5)
        worker.client.reconciler.subscriptions.drop([QUOTE])
        worker.channels.leave([QUOTE], UNSUBSCRIBED)
        ours = time.time_ns() - 3600 * 1_000_000_000
        monkeypatch.setattr(time, "time_ns", lambda: ours)
        looking = asyncio.create_task(worker.patrol.run())
        await wait_for(lambda: not worker.topics._left, "it to be out")
        looking.cancel()
        assert Ledger(worker.ledger._path, fresh=False).earlier == []


def test_all_topics_of_a_connection_have_a_place_in_the_ledger_and_one_more_is_refused(topics: Topics) -> None:
    for number in range(MAX_TOPICS):
        assert topics.ledger.find_slot(f"trades.X-{number}.100ms")
        assert topics.find("trade", f"X-{number}", "100ms").slot
    with pytest.raises(Malformed, match=f"more than {MAX_TOPICS} topics"):
        topics.find("trade", "X", "100ms")


# -- what a later life goes on with -----------------------------------------------------------------------------------

LONG = 10_000_000_000
"""Ns after which whatever was said is surely out."""

INSTRUMENT = {"instrument_name": "BTC-6NOV26", "state": "settlement", "timestamp": 1_793_952_000_000}


def test_what_a_connection_hears_for_itself_has_no_gaps(tmp_path: Path) -> None:
    """An earlier life was asked for the listings; this one only hears them, for the supervisor."""
    with living(tmp_path, LISTINGS[0], follow=True, fresh=True) as worker:
        worker.take_frames([encode_data(LISTINGS[0], INSTRUMENT)], 5)
        assert worker.publisher.published == 1
    with living(tmp_path, LISTINGS[0], follow=True) as worker:
        assert worker.topics.gaps == 1
        worker.take_frames([encode_data(LISTINGS[0], INSTRUMENT)], 7)
        assert worker.publisher.published == 2  # the gap, and the event
    with living(tmp_path, QUOTE, follow=True) as worker:
        worker.take_frames([encode_data(LISTINGS[0], INSTRUMENT)], 9)
        assert [len(worker.take_events()) for _ in range(2)] == [1, 0]
        assert (worker.topics.gaps, worker.publisher.published) == (0, 1)  # that it is closed


def test_what_a_connection_hears_for_itself_is_published_once_somebody_asks_for_it(tmp_path: Path) -> None:
    frame = encode_data(LISTINGS[0], INSTRUMENT)
    with living(tmp_path, QUOTE, follow=True, fresh=True) as worker:
        worker.take_frames([frame], 5)
        assert worker.publisher.published == 0
        ask(worker, "subscribe", LISTINGS[0])
        worker.take_frames([frame], 7)
        assert worker.publisher.published == 1


def test_the_supervisor_hears_of_a_listing_that_it_is_matched_at_coinbase(tmp_path: Path) -> None:
    """By that patterns know that it has no trades."""
    pair = {"instrument_name": "BTC_USDC", "kind": "spot", "state": "open", "base_currency": "BTC", "is_csr": True}
    pair["timestamp"] = 1_793_952_000_000
    with living(tmp_path, QUOTE, follow=True) as worker:
        worker.take_frames([encode_data(LISTINGS[0], pair | {"tick_size": 1})], 5)
        assert worker.take_events() == [{"event": "instrument", "row": pair}]


def test_a_topic_that_was_left_between_two_lives_continues_nothing(tmp_path: Path) -> None:
    with living(tmp_path, TRADES, fresh=True) as worker:
        worker.take_frames([encode_data(TRADES, [make_trade(5)])], 5)
    with living(tmp_path, TRADES) as worker:
        assert worker.topics.gaps == 1
    with living(tmp_path) as worker:
        ask(worker, "subscribe", TRADES)
        worker.take_frames([encode_data(TRADES, [make_trade(50)])], 7)
        # The gap of what was left, that it is closed, that it is asked for again, and the trade without a gap.
        assert (worker.topics.gaps, worker.publisher.published) == (1, 4)


def test_what_an_earlier_life_had_said_is_held_no_longer_than_it_is_needed(tmp_path: Path) -> None:
    with living(tmp_path, TRADES, fresh=True) as worker:
        worker.take_frames([encode_data(TRADES, [make_trade(5)])], 5)
    with living(tmp_path, TRADES) as worker:
        assert (worker.topics.gaps, worker.ledger.earlier) == (1, [])


@pytest.mark.parametrize(("instrument", "state"), [("BTC-PERPETUAL", "closed"), ("BTC-6NOV20", "expired")])
def test_a_topic_that_was_given_up_while_no_worker_was_there_is_said_to_be_closed(instrument: str, state: str) -> None:
    """Else its last word would be `live` for ever. Where its instrument has ended meanwhile, it is said to be over."""
    channel, quote = f"quote.{instrument}", {"instrument_name": instrument, "best_bid_price": 1.0, "timestamp": 1}
    with short_directory() as directory:
        with living(directory, channel, fresh=True) as worker:
            worker.take_frames([encode_data(channel, quote)], 5)
            epoch = worker.epoch
            worker.ledger.cells[SUBSCRIPTIONS] = 1  # it waits for its subscriber to come back
        with living(directory) as worker, subscribed(worker.publisher.bind()) as subscriber:
            wait_until(lambda: worker.publisher.take_subscriptions(), "the subscription")
            last = subscriber.wait_for("deribit.quote.")
            assert (last["type"], last["seq"], last["state"]) == ("status", 1, state)
            assert last["epoch"] == epoch + 1  # another connection may feed it since then
        with living(directory) as worker, subscribed(worker.publisher.bind()) as subscriber:
            # The life before may have been killed before that was out.
            wait_until(lambda: worker.publisher.take_subscriptions(), "the subscription")
            worker.publisher.release()
            again = subscriber.wait_for("deribit.quote.")
            assert (again["seq"], again["state"], again["epoch"]) == (1, state, epoch + 2)
            worker.topics.forget_left(time.monotonic_ns() + LONG)
        with living(directory) as worker:
            assert worker.publisher.published == 0


@pytest.mark.parametrize("channel", [TRADES, "trades.future.BTC.100ms"])
def test_trades_that_were_lost_before_their_channel_was_given_up_without_a_worker_are_said(channel: str) -> None:
    with short_directory() as directory:
        with living(directory, channel, fresh=True) as worker:
            worker.take_frames([encode_data(channel, [make_trade(5)])], 100)
            worker.ledger.cells[SUBSCRIPTIONS] = 1  # it waits for its subscriber to come back
        with living(directory) as worker, subscribed(worker.publisher.bind()) as subscriber:
            wait_until(lambda: worker.publisher.take_subscriptions(), "the subscription")
            subscriber.wait_for("deribit.trade.", state="closed")
            gap, closed = subscriber.find("deribit.trade.")
            assert (gap["seq"], gap["reason"], gap["from_ts"], gap["missing_from"]) == (1, "restart", 100, 5)
            assert ("missing_to" in gap, gap["healing"]) == (False, False)
            assert (closed["seq"], closed["epoch"]) == (2, gap["epoch"])


def test_that_an_instrument_has_ended_is_said_also_by_a_life_that_had_no_channel_of_it() -> None:
    with (
        short_directory() as directory,
        living(directory, fresh=True) as worker,
        subscribed(worker.publisher.bind()) as subscriber,
    ):
        wait_until(lambda: worker.publisher.take_subscriptions(), "the subscription")
        ask(worker, "unsubscribe", "quote.BTC-6NOV20", reason="expired")
        assert subscriber.wait_for("deribit.quote.BTC-6NOV20.")["state"] == "expired"
        assert not worker.feeds


def test_what_is_said_of_a_topic_of_an_earlier_life_is_older_than_what_another_connection_says() -> None:
    """It had taken the topic up while this one was still leaving it."""
    frame = encode_data(QUOTE, {"instrument_name": "BTC-PERPETUAL", "timestamp": 1})
    with short_directory() as one, short_directory() as other:
        with living(other, fresh=True) as second, living(one, QUOTE, fresh=True) as first:
            first.take_frames([frame], time.time_ns())
            ask(second, "subscribe", QUOTE)
            taken_up = second.feeds[QUOTE.encode()].stream.epoch
            first.take_frames([frame], time.time_ns())
        with living(one) as successor:
            (said,) = successor.statuses._left
            assert first.epoch < said.epoch < taken_up


def find_trades(worker: Worker) -> TradeFeed:
    """The feed of a worker whose one channel is one of trades."""
    (feed,) = worker.feeds.values()
    assert isinstance(feed, TradeFeed)
    return feed


def ask(worker: Worker, op: str, channel: str, **more: str) -> None:
    asyncio.run(worker.answer(op, {"channels": [channel], "epoch": time.time_ns(), **more}))


def test_that_a_topic_was_closed_is_not_lost_with_a_worker_that_is_killed_at_once() -> None:
    """The message may not have left it: better twice than lost. The names of some do not say that they have ended."""
    ended = ("BTC-6NOV20", "ETH_USDC", "BTC_USDC")
    names = [QUOTE, *(f"quote.{name}" for name in ended)]
    with short_directory() as directory:
        with living(directory, *names, fresh=True) as worker:
            for name in names:
                worker.take_frames([encode_data(name, {"instrument_name": name[6:], "timestamp": 1})], 5)
            ask(worker, "unsubscribe", QUOTE)
            for name in names[1:]:
                ask(worker, "unsubscribe", name, reason="expired")
        with living(directory):
            pass  # killed at once as well
        with living(directory) as worker:
            worker.ledger.cells[SUBSCRIPTIONS] = 1
        with living(directory) as worker, subscribed(worker.publisher.bind()) as subscriber:
            wait_until(lambda: worker.publisher.take_subscriptions(), "the subscription")
            assert subscriber.wait_for("deribit.quote.BTC-PERPETUAL.")["state"] == "closed"
            assert [subscriber.wait_for(f"deribit.quote.{name}.")["state"] for name in ended] == ["expired"] * 3


def test_a_later_life_knows_since_when_a_channel_came(tmp_path: Path) -> None:
    """What it lacks is fetched from then on, not from the beginning of the life before."""

    def confirm(worker: Worker) -> int:
        worker.confirm_channels([TRADES])
        feed = find_trades(worker)
        return feed.losses.confirmed_at

    with living(tmp_path, TRADES, fresh=True) as worker:
        first = confirm(worker)
        assert confirm(worker) == first > 0
    with living(tmp_path, TRADES) as worker:
        feed = find_trades(worker)
        assert (feed.losses.confirmed_at, feed.losses.lost_from) == (first, first)
        ask(worker, "unsubscribe", TRADES)
        ask(worker, "subscribe", TRADES)
        again = confirm(worker)
        assert again > first
    with living(tmp_path, TRADES) as worker:
        assert confirm(worker) == again
        ask(worker, "unsubscribe", TRADES)
    with living(tmp_path, TRADES) as worker:
        feed = find_trades(worker)
        assert (feed.losses.confirmed_at, feed.losses.lost_from) == (0, None)


@pytest.mark.parametrize("channel", [TRADES, "trades.future.BTC.100ms"])
@pytest.mark.parametrize("healing", ["not yet", "refused", "whole"])
def test_a_loss_is_said_also_where_no_trade_follows_it(channel: str, healing: str) -> None:
    """The channel is given up before what was lost could be fetched; if it was, there is nothing to say."""
    with heard(channel) as (worker, subscriber):
        feed = find_trades(worker)
        feed.losses.confirm(50)
        worker.take_frames([encode_data(channel, [make_trade(5)])], 100)
        feed.lose("disconnect", 200)
        if healing == "refused":  # each request is answered with a no
            assert [step for step in heal_feed(feed, 300, 0) if isinstance(step, Ask)]
        elif healing == "whole":
            feed.losses.begin_healing(300)
            feed.losses.end()
            feed.losses.is_checked = True
        ask(worker, "unsubscribe", channel)
        subscriber.wait_for("deribit.trade.", state="closed")
        *_, before_last, last = said = subscriber.find("deribit.trade.")
        assert last["type"] == "status"
        kinds = [body["type"] for body in said if body["type"] != "status"]
        assert kinds == (["trade"] if healing == "whole" else ["trade", "gap"])
        if healing != "whole":
            gap = before_last
            assert (gap["reason"], gap["from_ts"], gap["missing_from"]) == ("disconnect", 100, 6)
            assert ("missing_to" in gap, gap["healing"]) == (False, False)


@pytest.mark.parametrize("channel", [TRADES, "trades.future.BTC.100ms"])
def test_what_an_interrupted_healing_has_not_asked_for_is_said_after_its_repair(channel: str) -> None:
    """The channel is given up when the first page has come, and nobody knows what the next one would have held."""
    with heard(channel) as (worker, subscriber):
        feed = find_trades(worker)
        worker.take_frames([encode_data(channel, [make_trade(5)])], 100)
        feed.losses.confirm(50)
        feed.lose("disconnect", 200)
        fetched = msgspec.convert([make_trade(6)], list[TradeData])
        worker.publisher.publish(feed.backfill(fetched, 300), 300, is_fetched=True)
        ask(worker, "unsubscribe", channel)
        subscriber.wait_for("deribit.trade.", state="closed")
        gap, late, repair, rest, closed = subscriber.find("deribit.trade.")[1:]
        assert (gap["type"], late["trade_seq"], closed["state"]) == ("gap", 6, "closed")
        assert (repair["gap"], repair["repaired"], repair["missing"]) == (gap["id"], 1, [])
        assert (rest["type"], rest["reason"], rest["missing_from"]) == ("gap", "disconnect", 7)
        assert ("missing_to" in rest, rest["healing"]) == (False, False)


def test_what_an_interrupted_healing_has_not_asked_for_of_a_new_instrument_is_said() -> None:
    """It first trades after a loss: what it traded before, while the connection was away, has not been fetched yet."""
    channel = "trades.future.BTC.100ms"
    with heard(channel) as (worker, subscriber):
        feed = find_trades(worker)
        feed.losses.confirm(50)
        feed.lose("disconnect", 200)
        worker.take_frames([encode_data(channel, [make_trade(5)])], 300)
        ask(worker, "unsubscribe", channel)
        subscriber.wait_for("deribit.trade.", state="closed")
        _, gap, repair, _ = subscriber.find("deribit.trade.")
        assert (gap["reason"], gap["from_ts"]) == ("disconnect", 50)
        assert (gap["missing_from"], gap["missing_to"]) == (1, 4)
        assert (repair["gap"], repair["missing"]) == (gap["id"], [[1, 4]])


def test_what_an_interrupted_healing_has_begun_to_fetch_of_a_new_instrument_may_not_be_all() -> None:
    """It first traded while the connection was away: nobody knows what came after the trades of the first page."""
    channel = "trades.future.BTC.100ms"
    with heard(channel) as (worker, subscriber):
        feed = find_trades(worker)
        feed.losses.confirm(50)
        feed.lose("disconnect", 200)
        fetched = msgspec.convert([make_trade(5)], list[TradeData])
        worker.publisher.publish(feed.backfill(fetched, 300), 300, is_fetched=True)
        ask(worker, "unsubscribe", channel)
        subscriber.wait_for("deribit.trade.", state="closed")
        gaps = [body for body in subscriber.find("deribit.trade.") if body["type"] == "gap"]
        assert [(gap["reason"], gap["from_ts"], gap["missing_from"]) for gap in gaps] == [
            ("disconnect", 50, 1), ("disconnect", 50, 6),
        ]  # fmt: skip


def test_one_of_many_instruments_is_not_over_while_what_was_lost_of_it_is_fetched() -> None:
    """The connection was lost over its end; what is lost later on changes nothing."""
    channel, name = "trades.option.any.100ms", "BTC-6NOV20-1-C"
    with heard(channel) as (worker, subscriber):
        feed = find_trades(worker)
        feed.confirm(50)
        worker.take_frames([encode_data(channel, [make_trade(1, instrument_name=name)])], 100)
        worker.change_state("backoff", "for a loss")
        worker.confirm_channels([channel])
        feed.losses.begin_healing(time.time_ns())
        feed.losses.end()
        feed.losses.is_checked = True
        worker.statuses.repeat([feed], hash(feed.streams[name].topic) % REPEAT)
        worker.change_state("backoff", "for another")
        said = [subscriber.wait_for("deribit.trade.", type="status", state=state) for state in ("recovering", "live")]
        subscriber.wait_for("deribit.trade.", type="status", state="expired", seq=said[-1]["seq"] + 2)
        states = [body["state"] for body in subscriber.find("deribit.trade.", type="status")]
        assert states == ["recovering", "live", "expired", "expired"]


def test_one_of_many_instruments_is_over_a_minute_after_its_end() -> None:
    """Its last trades may come late, and nothing follows the word."""
    channel, name = "trades.option.any.100ms", "BTC-6NOV20-1-C"
    with heard(channel) as (worker, subscriber):
        feed = find_trades(worker)
        worker.take_frames([encode_data(channel, [make_trade(1, instrument_name=name)])], 100)
        for since in (LAST_DATA // 2, 2 * LAST_DATA):
            feed.streams[name].expiry = time.time_ns() - since
            worker.statuses.repeat([feed], hash(feed.streams[name].topic) % REPEAT)
        subscriber.wait_for("deribit.trade.", type="status", state="expired")
        states = [body["state"] for body in subscriber.find("deribit.trade.", type="status")]
        assert states == ["recovering", "expired"]


@pytest.mark.parametrize("channel", ["trades.option.any.100ms", "trades.BTC-6NOV20-1-C.100ms"])
@pytest.mark.parametrize("is_refused", [False, True])
def test_the_last_trades_of_an_instrument_that_could_not_be_fetched_are_told_before_its_end(
    channel: str, is_refused: bool
) -> None:
    """The exchange may know nothing of it any more, and no trade follows."""
    trade = make_trade(1, instrument_name="BTC-6NOV20-1-C")
    with heard(channel) as (worker, subscriber):
        feed = find_trades(worker)
        feed.confirm(50)
        worker.take_frames([encode_data(channel, [trade])], 100)
        worker.change_state("backoff", "for a loss")
        worker.confirm_channels([channel])
        healing = heal_feed(feed, time.time_ns(), 0)
        if is_refused:  # each request is answered with a no
            assert [step for step in healing if isinstance(step, Ask)]
        else:
            assert run_healing(healing, answer_nothing)
            assert feed.backfill(msgspec.convert([trade], list[TradeData]), 200) == []  # the one before the loss
        worker.statuses.tell(feed, *(OVER if feed.channel.instrument else ("stale", "lag")))
        subscriber.wait_for("deribit.trade.", type="status", state="expired")
        kinds = [body.get("state", body["type"]) for body in subscriber.find("deribit.trade.")]
        assert kinds == ["trade", "recovering", "live", *(["gap"] if is_refused else []), "expired"]
        for gap in subscriber.find("deribit.trade.", type="gap"):
            assert (gap["reason"], gap["missing_from"], gap["healing"]) == ("disconnect", 2, False)


@pytest.mark.parametrize("channel", ["trades.option.any.100ms", "trades.BTC-6NOV20-1-C.100ms"])
def test_what_is_lost_after_the_end_of_an_instrument_is_no_loss_of_its(channel: str) -> None:
    """It traded no more: nobody need ask for what came after that."""
    trade = make_trade(1, instrument_name="BTC-6NOV20-1-C")
    with heard(channel) as (worker, subscriber):
        feed = find_trades(worker)
        feed.confirm(50)
        worker.take_frames([encode_data(channel, [trade])], 100)
        worker.statuses.tell(feed, *(OVER if feed.channel.instrument else ("live", "")))
        worker.change_state("backoff", "for a loss")
        ask(worker, "unsubscribe", channel)
        worker.statuses.tell_connection("closed", "")
        subscriber.wait_for("deribit.status.", state="closed")
        kinds = {body.get("state", body["type"]) for body in subscriber.find("deribit.trade.")}
        assert kinds == {"trade", "expired", *(["closed"] if feed.channel.instrument else [])}
        assert worker.topics.gaps == (0 if feed.channel.instrument else 1)


def test_what_has_ended_says_nothing_of_a_worker_that_is_stopped(tmp_path: Path) -> None:
    with living(tmp_path, QUOTE, fresh=True) as worker:
        (feed,) = worker.feeds.values()
        worker.statuses.tell(feed, *OVER)
        worker.change_state("closed", "")
        assert feed.condition == OVER


@pytest.mark.parametrize("is_answered", [True, False])
def test_trades_that_are_given_up_while_the_last_are_fetched_are_not_said_to_be_over(
    tmp_path: Path, is_answered: bool
) -> None:
    """Whether or not the exchange has answered that it sends them no more."""

    async def fetch_last(worker: Worker, feed: TradeFeed) -> None:
        ending = asyncio.create_task(worker._end_trades(feed))
        await asyncio.sleep(0)
        if is_answered:
            worker.healer.end(feed)
        else:
            worker.client.reconciler.subscriptions.drop([TRADES])
        worker.healer._under_way.clear()  # all has come meanwhile
        worker.healer._rested.set()
        await ending

    with living(tmp_path, TRADES, fresh=True) as worker:
        feed = find_trades(worker)
        worker.client.reconciler.subscriptions.expire([TRADES])
        asyncio.run(fetch_last(worker, feed))
        assert feed.condition != OVER


def test_an_instrument_that_ends_while_another_is_left_is_left_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.deribit.worker.LAST_WORDS", 0.0)
    events = [{"event": "instrument", "row": {"instrument_name": name}} for name in ("BTC-6NOV20", "ETH-6NOV20")]

    async def end_both(worker: Worker, listing: ListingFeed) -> None:
        listing.ended.append(events[0])
        leaving = asyncio.create_task(worker._leave_ended(listing))
        await asyncio.sleep(0)
        listing.ended.append(events[1])
        await leaving

    with living(tmp_path, LISTINGS[0], follow=True, fresh=True) as worker:
        listing = worker.feeds[LISTINGS[0].encode()]
        assert isinstance(listing, ListingFeed)
        asyncio.run(end_both(worker, listing))
        assert worker.take_events() == events


@pytest.mark.parametrize(
    ("frame", "condition"),
    [(f'{{"channel":"{BOOK}", cut off', ("recovering", "sequence")), ('{"channel":"book.BTC-PE', ("live", ""))],
)
def test_a_book_is_out_of_step_at_once_where_a_frame_that_names_it_is_no_json(
    tmp_path: Path, frame: str, condition: tuple[str, str]
) -> None:
    async def lose(worker: Worker) -> None:
        worker.take_malformed(frame.encode(), "no JSON")

    book = {"type": "snapshot", "bids": [], "asks": [], "change_id": 1, "timestamp": 1}
    with living(tmp_path, BOOK, fresh=True) as worker:
        worker.take_frames([encode_data(BOOK, book)], 5)
        (feed,) = worker.feeds.values()
        asyncio.run(lose(worker))
        assert (feed.condition, worker.intake.malformed) == (condition, 1)


def test_a_book_that_was_given_just_now_is_waited_for_before_it_is_asked_for_anew(tmp_path: Path) -> None:
    with living(tmp_path, BOOK, fresh=True) as worker:
        (feed,) = worker.feeds.values()
        worker.client.reconciler.subscriptions.confirmed.add(BOOK)
        worker.confirm_channels([BOOK])
        worker.patrol._judge_waiting(feed)
        assert not worker.patrol._broken


def test_what_was_to_be_asked_for_anew_goes_with_its_connection(tmp_path: Path) -> None:
    """Else nothing would be asked for anew on the next one: it would seem to be under way."""
    with living(tmp_path, BOOK, fresh=True) as worker:
        (feed,) = worker.feeds.values()
        worker.patrol._broken[feed] = None
        worker.change_state("backoff", "reset")
        assert not worker.patrol._broken


def test_a_frame_that_could_not_be_read_long_ago_is_not_healed_again(tmp_path: Path) -> None:
    channel, second = "trades.option.any.100ms", 1_000_000_000
    with living(tmp_path, channel, fresh=True) as worker:
        feed = find_trades(worker)
        feed.losses.confirm(START)
        feed.skip(b"no frame", START + second)
        assert run_healing(heal_feed(feed, START + 2 * second, 0), answer_nothing)
        later = START + DAY // 2
        trade = make_trade(5, instrument_name="BTC-6NOV26-1-C", timestamp=later // 1_000_000)
        worker.take_frames([encode_data(channel, [trade])], later)
        feed.lose("disconnect", later + second)
        feed.losses.confirm(later + 2 * second)
        asked = run_healing(heal_feed(feed, later + 3 * second, 0), answer_nothing)
        assert min(ask.params["start_timestamp"] for ask in asked) > later // 1_000_000 - 60_000


@pytest.mark.parametrize("is_killed", [False, True])
def test_what_was_first_traded_while_a_channel_was_refused_for_days_is_told(tmp_path: Path, is_killed: bool) -> None:
    """Also by a later life, before which the connection stood again."""
    channel, second = "trades.option.any.100ms", 1_000_000_000
    trade = make_trade(50, instrument_name="BTC-6NOV26-1-C")
    with living(tmp_path, channel, fresh=True) as worker:
        feed = find_trades(worker)
        feed.losses.confirm(START)
        feed.lose("disconnect", START + second)
        run_healing(heal_feed(feed, START + 10 * second, 0), answer_nothing)
        later = START + 2 * DAY
        feed.losses.confirm(later)
        run_healing(heal_feed(feed, later, 0), answer_nothing)
        if not is_killed:
            worker.take_frames([encode_data(channel, [trade])], later + second)
            assert worker.topics.gaps == 1
        worker.ledger.cells[HEARD] = later + second
    if is_killed:
        with living(tmp_path, channel, epoch=later + 2 * second) as worker:
            feed = find_trades(worker)
            feed.losses.confirm(later + 3 * second)
            run_healing(heal_feed(feed, later + 3 * second, 0), answer_nothing)
            worker.take_frames([encode_data(channel, [trade])], later + 4 * second)
            assert worker.topics.gaps == 1


def test_first_trades_while_a_channel_was_refused_are_fetched_or_told(tmp_path: Path) -> None:
    """It was lost, and healed while the exchange would not send it; then it does again."""
    channel, second = "trades.option.any.100ms", 1_000_000_000
    with living(tmp_path, channel, fresh=True) as worker:
        feed = find_trades(worker)
        feed.losses.confirm(START)
        feed.lose("disconnect", START + second)
        assert run_healing(heal_feed(feed, START + 10 * second, 0), answer_nothing)
        assert feed.losses.lost_from is None
        feed.losses.confirm(START + 600 * second)
        asked = run_healing(heal_feed(feed, START + 600 * second, 0), answer_nothing)
        assert min(ask.params["start_timestamp"] for ask in asked) <= (START + 10 * second) // 1_000_000
        assert feed.losses.lost_from is None
        assert run_healing(heal_feed(feed, START + 700 * second, 0), answer_nothing) == []


@pytest.mark.parametrize(("old", "new"), [(TRADES, WIDE), (WIDE, TRADES)])
def test_what_a_new_channel_shares_with_one_that_is_being_left_begins_anew(tmp_path: Path, old: str, new: str) -> None:
    """The exchange has not yet answered that it sends the old one no more; the supervisor counts it as given up."""
    with living(tmp_path, old, fresh=True) as worker:
        worker.take_frames([encode_data(old, [make_trade(5)])], 100)
        worker.client.reconciler.subscriptions.drop([old])  # as unsubscribe does before it waits
        ask(worker, "subscribe", new)
        worker.take_frames([encode_data(new, [make_trade(6)])], 200)
        worker.channels.leave([old], UNSUBSCRIBED)  # as it does after that
        (feed,) = worker.feeds.values()
        (stream,) = feed.streams.values()
        assert (feed.channel.name, stream.left_since, stream.last_id) == (new, 0, 6)
        assert stream.epoch > worker.epoch


def test_a_channel_that_is_asked_for_again_though_nobody_has_left_it_goes_on(tmp_path: Path) -> None:
    with living(tmp_path, TRADES, fresh=True) as worker:
        feed = find_trades(worker)
        ask(worker, "subscribe", TRADES)
        assert find_trades(worker) is feed


def test_a_channel_that_has_expired_and_is_asked_for_again_begins_anew(tmp_path: Path) -> None:
    """It was left: whatever changed until it is sent again is lost, though nothing of it was seen to be."""
    with living(tmp_path, BOOK, fresh=True) as worker:
        snapshot = {"type": "snapshot", "bids": [], "asks": [], "change_id": 1, "timestamp": 1}
        worker.take_frames([encode_data(BOOK, snapshot)], 5)
        (old,) = worker.feeds.values()
        worker.client.reconciler.expire([BOOK])
        assert old.condition == ("expired", EXPIRED)
        ask(worker, "subscribe", BOOK)
        assert old.condition[0] == "expired"  # not given up
        (feed,) = worker.feeds.values()
        assert feed.stream.epoch > old.stream.epoch
        assert (feed.is_complete, feed.condition) == (False, ("recovering", "subscribe"))
        assert feed.stream.status is not None
        assert feed.stream.status.state == "recovering"


def test_a_channel_takes_no_topic_of_another_that_is_settled_in_another_currency(tmp_path: Path) -> None:
    """Of BTC_USDC-PERPETUAL trades come with those of USDC alone: given up with those of BTC it would fall silent."""
    linear, inverse = "trades.future.USDC.100ms", "trades.future.BTC.100ms"
    trades = [make_trade(1, instrument_name=name) for name in ("BTC_USDC-PERPETUAL", "BTC-PERPETUAL")]
    with living(tmp_path, linear, inverse, fresh=True) as worker:
        worker.take_frames([encode_data(linear, trades[:1]), encode_data(inverse, trades[1:])], 5)
    with living(tmp_path, linear, inverse) as worker:
        feeds = [worker.feeds[name.encode()] for name in (linear, inverse)]
        assert [list(feed.streams) for feed in feeds] == [["BTC_USDC-PERPETUAL"], ["BTC-PERPETUAL"]]


@pytest.mark.parametrize("more", [{}, {"reason": "expired"}])
def test_the_place_of_a_channel_that_was_given_up_serves_another(
    tmp_path: Path, more: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.deribit.commands.LAST_HEALING", 0.1)  # of what is never connected
    channel = "trades.BTC-6NOV20.raw"
    with living(tmp_path, channel) as worker:
        worker.confirm_channels([channel])
        place = worker.ledger.find_slot(channel)
        ask(worker, "unsubscribe", channel, **more)
        assert worker.ledger.find_slot("another") == place


def test_each_topic_of_a_wide_channel_that_is_taken_up_again_is_told_so_before_its_next_data() -> None:
    channel = "trades.future.BTC.100ms"
    with heard(channel) as (worker, subscriber):
        worker.take_frames([encode_data(channel, [make_trade(5)])], 5)
        ask(worker, "unsubscribe", channel)
        assert subscriber.wait_for("deribit.trade.", state="closed")["seq"] == 2
        ask(worker, "subscribe", channel)
        assert subscriber.wait_for("deribit.trade.", state="recovering")["seq"] == 1


def test_samples_go_on_when_the_clock_is_set_back(tmp_path: Path) -> None:
    with living(tmp_path, QUOTE) as worker:
        later, now = 1_790_003_600_000_000_000, 1_790_000_000_000_000_000
        for receive_ts in (later, now):
            quote = {"instrument_name": "BTC-PERPETUAL", "timestamp": receive_ts // 1_000_000}
            worker.take_frames([encode_data(QUOTE, quote)], receive_ts)
            assert worker.intake._sampled == receive_ts


def test_a_topic_that_was_closed_and_taken_up_again_is_not_forgotten(tmp_path: Path) -> None:
    quote = encode_data(QUOTE, {"instrument_name": "BTC-PERPETUAL", "timestamp": 1})
    with living(tmp_path, QUOTE, fresh=True) as worker:
        worker.take_frames([quote], 5)
        ask(worker, "unsubscribe", QUOTE)
        ask(worker, "subscribe", QUOTE)
        worker.take_frames([quote], 7)
        worker.topics.forget_left(time.monotonic_ns() + LONG)
    with living(tmp_path, QUOTE) as worker:
        assert worker.topics.gaps == 1


@pytest.mark.parametrize("is_holding", [False, True])
def test_of_a_topic_that_was_taken_up_again_and_has_said_nothing_yet_a_later_life_is_told_nothing(
    tmp_path: Path, is_holding: bool
) -> None:
    """What was said before may still wait for the subscribers of an earlier life."""
    with living(tmp_path, TRADES, fresh=True) as worker:
        worker.publisher.is_holding = is_holding
        worker.take_frames([encode_data(TRADES, [make_trade(5)])], 5)
        ask(worker, "unsubscribe", TRADES)
        ask(worker, "subscribe", TRADES)
        worker.publisher.release()
    with living(tmp_path, TRADES) as worker:
        assert (worker.topics.gaps, find_trades(worker).stream.last_id) == (0, 0)


def test_the_lag_does_not_count_the_age_of_a_book(tmp_path: Path) -> None:
    """The time of a snapshot is that of the book's last change."""
    with living(tmp_path, BOOK) as worker:
        now = time.time_ns()
        book = {"bids": [], "asks": [], "change_id": 1, "timestamp": now // 1_000_000 - 3_600_000}
        worker.take_frames([encode_data(BOOK, book | {"type": "snapshot"})], now)
        assert worker.patrol.lag.describe() == Samples().describe()
        change = {"type": "change", "change_id": 2, "prev_change_id": 1, "timestamp": now // 1_000_000}
        worker.take_frames([encode_data(BOOK, book | change)], now + 30_000_000)
        assert worker.patrol.lag.describe() != Samples().describe()


def test_the_lag_does_not_count_times_that_are_not_the_exchanges(tmp_path: Path) -> None:
    """Those of a ranking are when the sources of an index had their last prices: of some nobody trades for hours."""
    ranking = "deribit_price_ranking.paxg_usd"
    with living(tmp_path, ranking) as worker:
        now = time.time_ns()
        sources = [{"identifier": name, "timestamp": now // 1_000_000 - 3_600_000} for name in ("kraken", "gemini")]
        worker.take_frames([encode_data(ranking, sources)], now)
        assert (worker.publisher.published, worker.patrol.lag.describe()) == (1, {})


def test_the_lag_does_not_count_what_a_channel_says_first(tmp_path: Path) -> None:
    """The first quote of a quiet market bears the time of its last change."""
    with living(tmp_path, QUOTE) as worker:

        def say(late: int) -> None:
            now = time.time_ns()
            worker.take_frames(
                [encode_data(QUOTE, {"timestamp": now // 1_000_000 - late})], now + worker.intake.unknown
            )

        def sample() -> float:
            say(40_000)
            return worker.patrol.lag.describe().get("p50", 0)

        worker.change_state("bootstrapping", "")
        say(600_000)
        worker.confirm_channels([QUOTE])
        say(600_000)
        assert worker.patrol.lag.describe() == {}
        assert wait_until(sample, "the first sample") == pytest.approx(40, abs=5)


def test_the_lag_counts_only_what_bears_a_time_and_counts_it_once(tmp_path: Path) -> None:
    with living(tmp_path, QUOTE) as worker:
        now = time.time_ns()
        worker.take_frames([encode_data(QUOTE, {"best_bid_price": 1.5})], now)
        assert worker.patrol.lag.describe() == {}
        worker.take_frames([encode_data(QUOTE, {"timestamp": now // 1_000_000})], now + 30_000_000)
        told = worker.patrol.lag.describe()
        assert told["p50"] == pytest.approx(0.03, abs=0.002)
        worker.take_frames([encode_data("quote.ETH-PERPETUAL", {})], now + 3_600_000_000_000)
        assert worker.patrol.lag.describe() == told


def test_of_many_malformed_frames_the_first_ten_are_logged_and_then_one_a_minute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with living(tmp_path, QUOTE, fresh=True) as worker:
        for _ in range(15):
            worker.take_malformed(b"{", "no JSON")
        assert len(caplog.records) == 10
        worker.intake._log_at -= LOG_EVERY
        for _ in range(5):
            worker.take_malformed(b"{", "no JSON")
        assert [record.getMessage() for record in caplog.records[10:]] == ["malformed frame 16: no JSON: b'{'"]


def test_a_channel_of_an_account_may_come_in_other_letters(tmp_path: Path) -> None:
    asked, said = "user.portfolio.BTC", "user.portfolio.btc"
    with living(tmp_path, asked, QUOTE) as worker:
        subscriptions = worker.client.reconciler.subscriptions
        calls = subscriptions.plan_calls(logged_in=True)
        answers = [subscriptions.take_answer(call, [said, QUOTE.lower()]) for call in calls]
        assert [name for gained, _ in answers for name in gained] == [asked]
        worker.take_frames([encode_data(said, {"currency": "BTC"})], 5)
        assert (worker.intake.unknown, worker.publisher.published) == (0, 1)
        worker.take_frames([encode_data(QUOTE.lower(), {"timestamp": 1})], 6)
        assert (worker.intake.unknown, worker.publisher.published) == (1, 1)


def test_a_loss_began_when_the_stream_itself_last_spoke(tmp_path: Path) -> None:
    """What was fetched came later than trades that may be lost: it does not count, in this life or the next."""
    with living(tmp_path, TRADES, fresh=True) as worker:
        feed = find_trades(worker)
        worker.take_frames([encode_data(TRADES, [make_trade(seq)]) for seq in (5, 7)], 100)
        fetched = msgspec.convert([make_trade(6)], list[TradeData])
        worker.publisher.publish(feed.backfill(fetched, 900), 900, is_fetched=True)
        feed.lose("disconnect", 950)
        assert feed.stream.due is not None
        assert feed.stream.due.from_ts == 100
        assert worker.ledger.cells[feed.stream.slot + LAST_TS] == 100
        assert worker.ledger.cells[feed.stream.slot + LAST_ID] == 7


def test_a_topic_is_known_to_a_later_life_also_where_all_that_came_was_fetched(tmp_path: Path) -> None:
    """And where the first page of it shows already that the exchange counts anew."""
    both = [make_trade(1000, timestamp=50_000), make_trade(3, timestamp=90_000)]
    with living(tmp_path, WIDE, fresh=True) as worker:
        fetched = msgspec.convert(both, list[TradeData])
        worker.publisher.publish(find_trades(worker).backfill(fetched, 900), 900, is_fetched=True)
    with living(tmp_path, WIDE) as worker:
        (stream,) = find_trades(worker).streams.values()
        assert stream.due is not None
        assert (stream.due.reason, stream.due.from_ts) == ("restart", 900)


def test_a_topic_whose_first_trades_show_that_some_are_missing_is_noted_before_they_are_sent(tmp_path: Path) -> None:
    """Like any other: its gap would be lost with a worker that is killed between the two."""
    with living(tmp_path, WIDE, fresh=True) as worker, worker.publisher.gather():
        worker.publisher.publish(find_trades(worker).take(encode_data(WIDE, [make_trade(3), make_trade(7)]), 900), 900)
        assert worker.publisher.published == 0
        later = Ledger(worker.ledger._path, fresh=False)
        assert [(entry.last_ts, entry.last_id, entry.first_id) for entry in later.earlier if entry.last_id] == [
            (900, 3, 3)
        ]
        later.close()


@pytest.mark.parametrize(
    ("channel", "data"),
    [(QUOTE, {"timestamp": 1}), ("deribit_price_index.btc_usd", {"index_name": "btc_usd", "price": 1, "timestamp": 1})],
)
def test_a_later_life_knows_when_a_topic_spoke_last(tmp_path: Path, channel: str, data: dict[str, Any]) -> None:
    with living(tmp_path, channel, fresh=True) as worker:
        for now in (5, 9):
            worker.take_frames([encode_data(channel, data)], now)
    with living(tmp_path, channel) as worker:
        (feed,) = worker.feeds.values()
        assert feed.stream.due is not None
        assert (feed.stream.due.reason, feed.stream.due.from_ts) == ("restart", 9)


def test_a_later_life_goes_on_with_the_topics_of_the_platform(tmp_path: Path) -> None:
    """They are named after indices, of which no kind or currency can be guessed."""
    with living(tmp_path, "platform_state", fresh=True) as worker:
        for more in ({}, {"price_index": "btc_usd"}):
            worker.take_frames([encode_data("platform_state", {"locked": False, **more})], 9)
    with living(tmp_path, "platform_state") as worker:
        (feed,) = worker.feeds.values()
        gaps = {name: stream.due and (stream.due.reason, stream.due.from_ts) for name, stream in feed.streams.items()}
        assert gaps == {"all": ("restart", 9), "btc_usd": ("restart", 9)}


def test_what_a_late_subscriber_was_told_of_a_topic_without_data_is_no_loss_to_a_later_life(tmp_path: Path) -> None:
    with living(tmp_path, QUOTE, fresh=True) as worker:
        (feed,) = worker.feeds.values()
        worker.statuses.tell(feed, "live", "")
        assert feed.stream.status is not None
        worker.publisher.repeat(feed.stream, feed.stream.status)
    with living(tmp_path, QUOTE) as worker:
        assert worker.topics.gaps == 0


def test_a_later_life_knows_the_last_trade_also_where_a_gap_was_said_after_it(tmp_path: Path) -> None:
    """Else it would say all trades again that it finds, and not as late ones."""
    with living(tmp_path, TRADES, fresh=True) as worker:
        feed = find_trades(worker)
        worker.take_frames([encode_data(TRADES, [make_trade(1000)])], 100)
        feed.lose("disconnect", 200)
        gap = feed.take_last(feed.stream, 300)
        assert gap is not None
        worker.publisher.say(feed.stream, gap)
    with living(tmp_path, TRADES) as worker:
        assert find_trades(worker).stream.reached == 1000


def test_a_later_life_knows_which_change_of_a_book_was_the_last_and_which_comes_next(tmp_path: Path) -> None:
    book = {"type": "snapshot", "bids": [], "asks": [], "timestamp": 1}
    with living(tmp_path, BOOK, fresh=True) as worker:
        worker.take_frames([encode_data(BOOK, book | {"change_id": 5})], 5)
    with living(tmp_path, BOOK) as worker:
        worker.take_frames([encode_data(BOOK, book | {"change_id": 9})], 9)
        (feed,) = worker.feeds.values()
        assert feed.stream.gap is not None
        assert (feed.stream.gap.last_change_id, feed.stream.gap.next_change_id) == (5, 9)


def test_a_later_life_goes_on_from_the_new_count(tmp_path: Path) -> None:
    with living(tmp_path, TRADES, fresh=True) as worker:
        for seq, timestamp in ((1000, 50_000), (3, 90_000)):
            worker.take_frames([encode_data(TRADES, [make_trade(seq, timestamp=timestamp)])], 100)
        assert worker.topics.gaps == 1
        assert worker.ledger.cells[find_trades(worker).stream.slot + LAST_ID] == 3


@pytest.mark.parametrize(
    ("words", "last_id", "reached"),
    [
        ({LAST_ID: 1000, FIRST: 5}, 900, 1000),
        ({LAST_ID: 1000, FIRST: 950}, 949, 1000),  # before its first there was nothing
        ({LAST_ID: 50, FIRST: 1}, 0, 50),
        ({LAST_ID: 1000, FIRST: 5, UNHEALED: 700}, 699, 1000),
        ({LAST_ID: 1000, FIRST: 5, BEGUN: 900}, 900, 1000),
        ({LAST_ID: 1000, FIRST: 5, BEGUN: 901}, 900, ANY_ID),  # that the exchange counts anew is told again
        ({LAST_ID: 50, FIRST: 1, BEGUN: 1}, 0, ANY_ID),
        ({LAST_ID: 50, FIRST: 1, BEGUN: 0}, 0, 50),
    ],
)
def test_a_later_life_says_the_last_trades_again(
    tmp_path: Path, words: dict[int, int], last_id: int, reached: int
) -> None:
    """And whatever had not been healed: the life before may have taken them along."""
    ledger = Ledger(tmp_path / "a.ledger", fresh=True)
    slot = Topics(1, ledger).find("trade", "BTC-PERPETUAL", "100ms").slot
    for word, value in ({LAST_TS: 1} | words).items():
        ledger.cells[slot + word] = value
    ledger.close()
    later = Ledger(tmp_path / "a.ledger", fresh=False)
    (stream,) = Topics(2, later).recall()
    assert (stream.last_id, stream.reached) == (last_id, reached)
    later.close()


@pytest.mark.parametrize(
    ("out", "words", "said"),
    [
        (5.0, {}, 900),
        (5.1, {}, 1000),
        (5.1, {UNHEALED: 1000}, 900),  # that one was fetched, maybe just before the end
        (5.1, {BEGUN: 950}, 1000),
    ],
)
def test_unless_they_were_surely_out(tmp_path: Path, out: float, words: dict[int, int], said: int) -> None:
    """And as long as no life has said them again, the next one does."""
    ledger = Ledger(tmp_path / "a.ledger", fresh=True)
    slot = Topics(1, ledger).find("trade", "BTC-PERPETUAL", "100ms").slot
    for word, value in ({LAST_TS: START, LAST_ID: 1000, FIRST: 5} | words).items():
        ledger.cells[slot + word] = value
    ledger.cells[OUT] = START + int(out * 1e9)
    for epoch in (2, 3):
        ledger.close()
        ledger = Ledger(tmp_path / "a.ledger", fresh=False)
        (stream,) = Topics(epoch, ledger).recall()
        assert (stream.last_id, stream.reached) == (said, 1000)
        ledger.cells[OUT] += 100_000_000_000 if said < 1000 else 0
    ledger.close()


@pytest.mark.parametrize("is_seen", [True, False])
def test_a_gap_does_not_end_before_it_begins_where_the_clock_was_set_back(tmp_path: Path, is_seen: bool) -> None:
    """Whether the exchange's numbers show the loss, or the connection was lost."""
    change = {"timestamp": 1, "change_id": 9, "bids": [], "asks": []}
    book = [{**change, "type": "snapshot"}, {**change, "type": "change", "prev_change_id": 5, "change_id": 10}]
    says: dict[str, list[Any]] = {
        QUOTE: [{"timestamp": 1}] * 2,
        TRADES: [[make_trade(1, timestamp=1)], [make_trade(4, timestamp=2)]],
        BOOK: book if is_seen else [book[0]] * 2,
    }
    with living(tmp_path, *says, fresh=True) as worker:
        feeds = list(worker.feeds.values())

        def take(place: int, now: int) -> None:
            for feed in feeds:
                frame = encode_data(feed.channel.name, says[feed.channel.name][place])
                worker.publisher.publish(feed.take(frame, now), now)

        take(0, START)
        for feed in feeds[:1] if is_seen else feeds:
            feed.lose("disconnect", START)
        take(1, START - DAY)
        gaps = [feed.stream.gap for feed in feeds]
        assert [gap and (gap.from_ts, gap.to_ts) for gap in gaps] == [(START - DAY, START - DAY)] * 3
        tape = next(feed.tapes["BTC-PERPETUAL"] for feed in feeds if isinstance(feed, TradeFeed))
        said = tape.describe_gap(START - 2 * DAY)
        assert said.from_ts <= said.to_ts == START - 2 * DAY
