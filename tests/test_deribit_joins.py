"""Late subscribers: whoever subscribes has what matters of each topic, in the stream, at no cost to the others."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from tests.deribit_support import (
    BOOK,
    LOGIN,
    QUOTE,
    TICKER,
    TRADES,
    Collecting,
    Hearer,
    collecting,
    make_spec,
    wait_for,
)
from tests.exchange_client import exchange, get
from tests.pipeline import short_directory, subscribed
from tests.support import in_loop, wait_until
from workers.deribit.publishing.joins import MAX_WAITING, TOGETHER, Joins
from workers.deribit.publishing.ledger import SUBSCRIPTIONS, Ledger
from workers.deribit.publishing.payloads import Status
from workers.deribit.publishing.publisher import MAX_HELD, Publisher
from workers.deribit.publishing.streams import Stream, Topics
from workers.deribit.worker import create_worker

CURRENT = {
    "deribit.quote.BTC-PERPETUAL.raw": QUOTE,
    "deribit.ticker.BTC-PERPETUAL.100ms": TICKER,
    "deribit.ticker.BTC-PERPETUAL.incremental": "incremental_ticker.BTC-PERPETUAL",
    "deribit.index.btc_usd.raw": "deribit_price_index.btc_usd",
    "deribit.mark_prices.btc_usd.raw": "markprice.options.btc_usd",
    "deribit.funding.BTC-PERPETUAL.100ms": "perpetual.BTC-PERPETUAL.100ms",
    "deribit.platform.btc_usd.raw": "platform_state",
    "deribit.book.BTC-PERPETUAL.100ms": BOOK,
    "deribit.book.BTC-PERPETUAL.none-10-100ms": "book.BTC-PERPETUAL.none.10.100ms",
}
"""Topics that have a current value, and their channels."""


@contextmanager
def joined(run: Collecting, *prefixes: str) -> Iterator[Hearer]:
    """One more subscriber, to these prefixes."""
    hearer = Hearer(run.worker.publisher.endpoint, prefixes=prefixes)
    try:
        yield hearer
    finally:
        hearer.close()


@in_loop
async def test_subscribers_of_an_earlier_life_that_stay_away_are_not_waited_for_long() -> None:
    with short_directory() as directory:
        ledger = Ledger(directory / "w.ledger", fresh=True)
        ledger.cells[SUBSCRIPTIONS] = 3
        ledger.close()
        worker = create_worker(make_spec("ws://127.0.0.1:9", str(directory), [QUOTE], fresh=False))
        await worker.start()
        assert worker.publisher.is_holding
        await wait_for(lambda: not worker.publisher.is_holding, "the end of its patience")
        worker._end()


@contextmanager
def holding(expected: int) -> Iterator[tuple[Publisher, Stream]]:
    """A publisher that waits for so many subscriptions of an earlier life, and a topic."""
    with short_directory() as directory:
        ledger = Ledger(directory / "w.ledger", fresh=True)
        ledger.cells[SUBSCRIPTIONS] = expected
        publisher = Publisher(f"ipc://{directory}/w.pub", 0, ledger)
        publisher.bind()
        try:
            yield publisher, Topics(1, ledger).find("quote", "BTC-PERPETUAL", "raw")
        finally:
            publisher.close()
            ledger.close()


def test_what_is_said_first_waits_until_as_many_subscriptions_are_there_as_there_were() -> None:
    with holding(2) as (publisher, stream):
        publisher.say(stream, {"receive_ts": 1})
        with subscribed(publisher.endpoint):
            assert wait_until(publisher.take_subscriptions, "one of them") == [b""]
            assert (publisher.is_holding, publisher.published) == (True, 0)
            with subscribed(publisher.endpoint) as last:
                wait_until(publisher.take_subscriptions, "the other")
                assert (publisher.is_holding, publisher.published) == (False, 1)
                last.wait_for("deribit.quote.")


def test_no_more_waits_for_them_than_may() -> None:
    with holding(1) as (publisher, stream):
        for number in range(MAX_HELD):
            assert publisher.published == 0
            publisher.say(stream, {"receive_ts": number})
        assert publisher.published == MAX_HELD
        publisher.say(stream, {"receive_ts": MAX_HELD})
        assert publisher.published == MAX_HELD + 1


def test_what_waits_for_them_is_sent_at_the_end() -> None:
    with holding(2) as (publisher, stream), subscribed(publisher.endpoint) as subscriber:
        wait_until(publisher.take_subscriptions, "one of them")
        publisher.say(stream, {"receive_ts": 1})
        publisher.close()
        subscriber.wait_for("deribit.quote.")


def test_neither_a_repeat_nor_who_leaves_counts() -> None:
    with holding(0) as (publisher, stream), zmq.Context() as context, context.socket(zmq.XSUB) as reader:
        reader.connect(publisher.endpoint)
        for wish in (b"\1a", b"\1b", b"\0a", b"\1c"):
            reader.send(wish)
        taken: list[bytes] = []

        def take() -> bool:
            taken.extend(publisher.take_subscriptions())
            return b"c" in taken

        wait_until(take, "all that it wishes")
        assert taken == [b"a", b"b", b"c"]
        publisher.say(stream, {"receive_ts": 1})
        publisher.repeat(stream, {"receive_ts": 1})
        assert publisher.published == 1


def test_what_is_said_within_what_is_gathered_goes_out_with_it() -> None:
    with holding(0) as (publisher, stream):
        with publisher.gather():
            with publisher.gather():
                publisher.say(stream, {"receive_ts": 1})
            assert publisher.published == 0
        assert publisher.published == 1


def list_joins(hearer: Hearer, topic: str) -> list[dict[str, Any]]:
    return [body for name, body in hearer.joins if name == topic]


async def wait_join(hearer: Hearer, topic: str, **keys: Any) -> dict[str, Any]:
    """The first join answer on a topic with these values."""

    def find() -> dict[str, Any] | None:
        answers = list_joins(hearer, topic)
        return next((body for body in answers if all(body.get(key) == value for key, value in keys.items())), None)

    found: dict[str, Any] = await hearer.hear(find, f"a join answer on {topic} with {keys}")
    return found


@in_loop
async def test_a_late_subscriber_gets_status_and_value_of_every_topic(practice: str) -> None:
    async with collecting(practice, "", *CURRENT.values(), TRADES) as run:
        for topic in CURRENT:
            await run.hearer.hear_of(topic, type=topic.split(".")[1])
        await run.hearer.hear_of("deribit.trade.", type="trade")
        await run.hearer.hear_of("deribit.platform.btc_usd.raw", type="status")
        with joined(run, "") as late:
            for topic in CURRENT:
                assert (await wait_join(late, topic, type="status"))["state"] == "live"
                value = await wait_join(late, topic, type=topic.split(".")[1])
                assert value["epoch"] == run.worker.epoch
                assert value.get("kind", "snapshot") == "snapshot"
            await wait_join(late, "deribit.status.w.connection", state="live")
            assert (await wait_join(late, "deribit.trade.BTC-PERPETUAL.100ms"))["state"] == "live"
            await late.hear_of("deribit.quote.", 3)
        await run.hearer.hear_of("deribit.quote.", len(run.hearer.find("deribit.quote.")) + 3)


@in_loop
async def test_a_late_subscriber_gets_the_last_word_of_any_other_channel(practice: str) -> None:
    async with collecting(practice, "", "user.portfolio.btc", login=LOGIN) as run:
        topic = "deribit.other.user:portfolio:btc.raw"
        await wait_for(lambda: run.worker.client.is_live, "the connection")
        await run.ask("send", method="private/buy", params={"instrument_name": "BTC-PERPETUAL", "amount": 10})
        await run.hearer.hear_of(topic, type="other")
        with joined(run, topic) as late:
            value = await wait_join(late, topic, type="other")
            await run.hearer.hear_of(topic, type="other", data=value["data"])


@in_loop
async def test_what_follows_a_join_continues_it(practice: str) -> None:
    """Its seq is the last one used, and the changes after it chain on its change_id."""
    async with collecting(practice, "", BOOK) as run:
        topic = "deribit.book.BTC-PERPETUAL.100ms"
        for _ in range(3):
            await run.hearer.hear_of(topic, len(run.hearer.find(topic)) + 3, type="book")
            with joined(run, f"{topic}") as late:
                snapshot = await wait_join(late, topic, type="book")
                await late.hear_of(topic, seq=snapshot["seq"] + 5)
                place = [id(body) for _, body in late.heard].index(id(snapshot))
                seq, change_id = snapshot["seq"], snapshot["change_id"]
                for _, body in late.heard[place + 1 :]:
                    if body.get("join"):
                        continue
                    assert body["seq"] == seq + 1
                    seq = body["seq"]
                    if body["type"] == "book":  # a status is said again from time to time
                        assert body["prev_change_id"] == change_id
                        change_id = body["change_id"]
            assert seq >= snapshot["seq"] + 5


@in_loop
async def test_a_join_shows_the_same_book_as_the_stream(practice: str) -> None:
    async with collecting(practice, "", BOOK) as run:
        topic = "deribit.book.BTC-PERPETUAL.100ms"
        await run.hearer.hear_of(topic, 10, type="book")
        with joined(run, topic) as late:
            snapshot = await wait_join(late, topic, type="book")
            await run.hearer.hear_of(topic, seq=snapshot["seq"])
        bids: dict[float, float] = {}
        asks: dict[float, float] = {}
        for body in run.hearer.find(topic, type="book"):
            if body["seq"] <= snapshot["seq"]:
                if body["kind"] == "snapshot":
                    bids, asks = {}, {}
                bids |= dict(body["bids"])
                asks |= dict(body["asks"])
        assert snapshot["bids"] == sorted(([p, a] for p, a in bids.items() if a), reverse=True)
        assert snapshot["asks"] == sorted([p, a] for p, a in asks.items() if a)


@in_loop
async def test_the_last_gap_comes_first(practice: str) -> None:
    async with collecting(practice, "", BOOK, TRADES) as run:
        topic = "deribit.book.BTC-PERPETUAL.100ms"
        for number in (1, 2):
            run.hearer.drain()
            await run.hearer.hear_of(topic, number, type="book", kind="snapshot")
            run.worker.client.cut("the test wants it so")
            await run.hearer.hear_of(topic, number, type="gap")
        await run.hearer.hear_of(topic, 3, type="book", kind="snapshot")
        last = run.hearer.find(topic, type="gap")[-1]
        with joined(run, topic) as late:
            await wait_join(late, topic, type="book")
            first, second, third = list_joins(late, topic)[:3]
            assert [first["type"], second["type"], third["type"]] == ["gap", "status", "book"]
            assert {key: first[key] for key in last if key != "seq"} == {k: v for k, v in last.items() if k != "seq"}


@in_loop
async def test_a_gap_that_has_been_repaired_is_healing_no_more(practice: str) -> None:
    """Its repair is not repeated: who comes late would wait for it in vain."""
    async with collecting(practice, "lost_trades:4@1", TRADES) as run:
        topic = "deribit.trade.BTC-PERPETUAL.100ms"
        await run.hearer.hear_of(topic, type="repair")
        (gap,) = run.hearer.find(topic, type="gap")
        assert gap["healing"]
        with joined(run, topic) as late:
            told = await wait_join(late, topic, type="gap")
            assert (told["id"], told["missing_from"], told["healing"]) == (gap["id"], gap["missing_from"], False)


@in_loop
async def test_a_book_out_of_step_gives_no_value_until_it_has_one(practice: str) -> None:
    async with collecting(practice, "gap:5@1,slow:public/unsubscribe=1@1", BOOK) as run:
        topic = "deribit.book.BTC-PERPETUAL.100ms"
        await run.hearer.hear_of(topic, type="status", state="recovering", reason="sequence")
        with joined(run, topic) as late:
            assert (await wait_join(late, topic, type="status"))["state"] == "recovering"
            assert [body["type"] for body in list_joins(late, topic)] == ["gap", "status"]
            snapshot = await late.hear_of(topic, type="book", kind="snapshot")
            assert snapshot[0]["reason"] == "resync"
            assert not [body for body in list_joins(late, topic) if body["type"] == "book"]


@in_loop
async def test_a_refused_channel_says_so_to_who_comes_late(practice: str) -> None:
    async with collecting(practice, "", QUOTE, "quote.NOPE") as run:
        await run.hearer.hear_of("deribit.quote.NOPE.raw", type="status", state="refused")
        with joined(run, "deribit.quote.NOPE.") as late:
            status = await wait_join(late, "deribit.quote.NOPE.raw", type="status")
            assert (status["state"], status["seq"]) == ("refused", 1)


@in_loop
async def test_a_topic_that_was_given_up_is_not_answered(practice: str) -> None:
    async with collecting(practice, "", BOOK, TICKER, QUOTE) as run:
        for kind in ("book", "ticker", "quote"):
            await run.hearer.hear_of(f"deribit.{kind}.", type=kind)
        await run.ask("unsubscribe", channels=[BOOK, TICKER])
        with joined(run, "deribit.book.", "deribit.ticker.", "deribit.quote.") as late:
            await wait_join(late, "deribit.quote.BTC-PERPETUAL.raw", type="quote")
            assert {topic for topic, _ in late.joins} == {"deribit.quote.BTC-PERPETUAL.raw"}


@in_loop
async def test_who_joins_while_it_is_away_gets_the_last_value_and_its_state(practice: str) -> None:
    async with collecting(practice, "skip:1,refuse:503", QUOTE) as run:
        await run.hearer.hear_of("deribit.quote.", type="quote")
        run.worker.client.cut("the test wants it so")
        await run.hearer.hear_of("deribit.quote.", type="status", state="recovering")
        last = run.hearer.find("deribit.quote.", type="quote")[-1]
        with joined(run, "deribit.quote.") as late:
            topic = "deribit.quote.BTC-PERPETUAL.raw"
            assert (await wait_join(late, topic, type="status"))["state"] == "recovering"
            value = await wait_join(late, topic, type="quote")
            assert value["best_bid_price"] == last["best_bid_price"]
            assert value["receive_ts"] == last["receive_ts"]


@in_loop
async def test_a_prefix_with_its_dot_is_answered_for_that_instrument_alone(practice: str) -> None:
    async with collecting(practice, "", QUOTE, "quote.BTC_USDC-PERPETUAL", "quote.ETH-PERPETUAL") as run:
        for name in ("BTC-PERPETUAL", "BTC_USDC-PERPETUAL", "ETH-PERPETUAL"):
            await run.hearer.hear_of(f"deribit.quote.{name}.", type="quote")
        with joined(run, "deribit.quote.BTC-PERPETUAL.", "nothing.at.all") as late:
            await wait_join(late, "deribit.quote.BTC-PERPETUAL.raw", type="quote")
            await late.hear_of("deribit.quote.", 3)
            assert {topic for topic, _ in late.heard} == {"deribit.quote.BTC-PERPETUAL.raw"}


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_answers_are_sent_some_at_a_time_so_that_a_slice_ends_by_what_sending_takes_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With each subscriber it takes longer."""
    monkeypatch.setattr("workers.deribit.publishing.joins.SLICE_TIME", 60.0)
    with short_directory() as directory:
        ledger = Ledger(directory / "w.ledger", fresh=True)
        publisher, topics, unsent = Publisher(f"ipc://{directory}/w.pub", 0, ledger), Topics(1, ledger), list[int]()
        joins = Joins(publisher, topics)

        def describe() -> dict[str, Any]:
            unsent.append(len(publisher._waiting))
            return {"receive_ts": 1}

        for number in range(3 * TOGETHER):
            stream = topics.find("quote", f"BTC-{number}", "raw")
            stream.describe = describe
            joins._waiting[stream] = None
        joins._repeat_all()
        assert (unsent, publisher._waiting, joins._waiting) == ([*range(TOGETHER)] * 3, [], {})
        ledger.close()


@in_loop
async def test_a_thousand_joins_share_their_answers_and_the_stream_goes_on(practice: str) -> None:
    channels = [QUOTE, BOOK, TICKER, TRADES, "deribit_price_index.btc_usd"]
    async with collecting(practice, "", *channels) as run:
        for kind in ("quote", "book", "ticker", "index"):
            await run.hearer.hear_of(f"deribit.{kind}.", type=kind)
        context = zmq.Context()
        crowd = [context.socket(zmq.SUB) for _ in range(50)]
        before, began = run.worker.publisher.subscriptions, time.monotonic()
        joins = len(run.hearer.joins)
        try:
            for socket in crowd:
                socket.connect(run.worker.publisher.endpoint)
                socket.subscribe(b"deribit.")
                for number in range(19):
                    socket.subscribe(b"deribit.quote.BTC-PERPETUAL.%d" % number)
            await wait_for(lambda: run.worker.publisher.subscriptions - before == 1000, "all joins")
            await run.hearer.hear(lambda: len(run.hearer.joins) > joins + 5, "answers")
            await run.hearer.hear_of("deribit.book.", len(run.hearer.find("deribit.book.")) + 5)
            took = time.monotonic() - began
            answers = Counter((topic, body["type"]) for topic, body in run.hearer.joins[joins:])
            assert answers["deribit.quote.BTC-PERPETUAL.raw", "quote"] >= 1
            assert max(answers.values()) <= took / 0.25 + 1
            for socket in crowd:
                assert socket.poll(5000)
        finally:
            context.destroy(linger=0)
        await wait_for(lambda: run.worker.publisher.subscriptions == before, "the end of the crowd")
        assert run.worker.client.reconnects == 0


@in_loop
async def test_more_topics_than_a_slice_holds_are_all_answered(practice: str) -> None:
    """600 topics: refused ones have a status each, which is all that a late subscriber needs of them."""
    channels = [f"quote.NOPE{number}" for number in range(600)]
    async with collecting(practice, "", *channels, QUOTE) as run:
        await run.hearer.hear_of("deribit.quote.NOPE", 600, type="status", state="refused")
        with joined(run, "deribit.quote.") as late:
            await late.hear(lambda: len(late.joins) >= 602, "all answers")
            assert Counter(topic for topic, body in late.joins if body["type"] == "status").most_common(1)[0][1] == 1
            assert len({topic for topic, _ in late.joins}) == 601


@pytest.mark.parametrize("garbage", [b"", b"\2deribit.", b"hello", b"\1" + b"x" * 5000, b"\0deribit.", b"\xff" * 300])
@in_loop
async def test_garbage_from_upstream_is_ignored(practice: str, garbage: bytes) -> None:
    async with collecting(practice, "", QUOTE) as run:
        await run.hearer.hear_of("deribit.quote.", type="quote")
        context = zmq.Context()
        stranger = context.socket(zmq.XSUB)
        try:
            stranger.connect(run.worker.publisher.endpoint)
            for _ in range(100):
                stranger.send(garbage)
            with joined(run, "deribit.quote.") as late:
                await late.hear_of("deribit.quote.", 5)
            await run.hearer.hear_of("deribit.quote.", len(run.hearer.find("deribit.quote.")) + 5)
        finally:
            context.destroy(linger=0)


@in_loop
async def test_who_comes_after_the_end_of_an_instrument_is_told_of_it_and_gets_its_last_value() -> None:
    with exchange("--faults", "expiry:0.3", "--options", "60") as (url, _):
        rows = get(url, "public/get_instruments", kind="option")[1]["result"]
        quotes = [f"quote.{row['instrument_name']}" for row in rows]
        async with collecting(url, "", "instrument.state.option.any", *quotes) as run:

            def find_ended() -> str | None:
                ended = [body["instrument"] for body in run.hearer.find("deribit.quote.", state="expired")]
                topics = [f"deribit.quote.{name}.raw" for name in ended]
                return next((topic for topic in topics if run.hearer.find(topic, type="quote")), None)

            topic = await run.hearer.hear(find_ended, "the end of one that has spoken")
            last = run.hearer.find(topic, type="quote")[-1]
            with joined(run, topic) as late:
                assert (await wait_join(late, topic, type="quote"))["exchange_ts"] == last["exchange_ts"]
                assert list_joins(late, topic)[0]["state"] == "expired"


@contextmanager
def joining(directory: Path, topics: int) -> Iterator[tuple[Joins, Publisher]]:
    """The answers of a publisher with so many topics, on each of which a status was said."""
    ledger = Ledger(directory / "ledger", fresh=True)
    all_topics = Topics(1, ledger)
    publisher = Publisher(f"ipc://{directory}/pub", 0, ledger)
    for number in range(topics):
        stream = all_topics.find("quote", f"X-{number}", "raw")
        stream.status = Status("deribit", stream.instrument, 1, 0, 0, 1, "live", "", "w")
        publisher.say(stream, stream.status)
    publisher.bind()
    joins = Joins(publisher, all_topics)
    joins.watch()
    yield joins, publisher
    joins.end()
    publisher.close()
    ledger.close()


@in_loop
async def test_topics_are_answered_while_many_prefixes_are_still_to_be_looked_up() -> None:
    with short_directory() as directory, joining(directory, 20_000) as (joins, publisher):
        hearer = Hearer(publisher.endpoint, prefixes=[f"deribit.quote.X-{number}." for number in range(900)])
        await hearer.hear(lambda: hearer.joins, "the first answer")
        assert len(joins._prefixes) > 100
        hearer.close()


@in_loop
async def test_a_topic_is_answered_once_in_a_while_however_often_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("workers.deribit.publishing.joins.ONCE_IN", 3600.0)
    with short_directory() as directory, joining(directory, 10) as (joins, _):
        for left in (0, 10):
            joins._prefixes[b""] = None
            joins._answer()
            assert len(joins._waiting) == left


@in_loop
async def test_a_slice_of_answers_ends_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with short_directory() as directory, joining(directory, 10) as (joins, _):
        joins._prefixes[b""] = None
        joins._match()
        monkeypatch.setattr("workers.deribit.publishing.joins.SLICE_TIME", -1.0)
        joins._repeat_all()
        assert len(joins._waiting) == 10


@in_loop
async def test_more_prefixes_than_are_kept_mean_all_topics() -> None:
    prefixes = [f"deribit.quote.Y-{number}" for number in range(MAX_WAITING + 200)]
    with short_directory() as directory, joining(directory, 10) as (joins, publisher):
        half = len(prefixes) // 2  # libzmq drops what is beyond 1,000 at once
        hearers = [Hearer(publisher.endpoint, prefixes=each) for each in (prefixes[:half], prefixes[half:])]
        hearers.append(Hearer(publisher.endpoint, prefixes=["deribit.quote.X-7."]))

        def look() -> bool:
            joins.notice()
            return publisher.subscriptions > len(prefixes)

        wait_until(look, "all subscriptions")  # the loop does not come to look them up meanwhile
        assert len(joins._prefixes) < MAX_WAITING
        await hearers[-1].hear(lambda: hearers[-1].joins, "what was asked for")
        for hearer in hearers:
            hearer.close()
