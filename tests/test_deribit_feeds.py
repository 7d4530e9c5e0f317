"""Feeds by themselves, without sockets: what they make of frames, and what they count."""

from typing import Any

import msgspec
import pytest

from collector.channels import parse_channel
from collector.messages import decode
from collector.schema import ENVELOPE, SCHEMA, find_faults
from tests.deribit_support import encode_data
from tests.faults.exchange import Line
from workers.deribit.feeds.book import BookFeed, WindowFeed
from workers.deribit.feeds.feed import Feed
from workers.deribit.feeds.listings import ListingFeed
from workers.deribit.feeds.normalise import MAX_DEPTH, TICKER_KEYS, TickerFeed, create_feed
from workers.deribit.feeds.trades.feed import TradeFeed
from workers.deribit.healing.heal import read_page
from workers.deribit.publishing.payloads import Book
from workers.deribit.publishing.streams import Malformed, Published, Topics

NAME = "BTC-PERPETUAL"


def encode(feed: Feed, data: dict[str, Any]) -> bytes:
    return Line(feed.channel.name, (NAME,)).encode({"timestamp": 1, "instrument_name": NAME, **data})


def take(feed: BookFeed | WindowFeed, change_id: int, bids: Any, asks: Any, **keys: Any) -> Published:
    feed.stream.last_ts = 7  # as the publisher does once it is out
    return feed.take(encode(feed, {"change_id": change_id, "bids": bids, "asks": asks, **keys}), 7)


def test_a_grouped_book_is_a_snapshot_each_time_and_is_built_up_again_after_a_loss(topics: Topics) -> None:
    feed = WindowFeed(parse_channel(f"book.{NAME}.none.10.100ms"), topics)
    reasons: list[Any] = []

    def lose(reason: str) -> None:
        feed.skip(b"", 9) if reason == "unreadable" else feed.lose(reason, 9)
        gap = feed.stream.due
        assert gap is not None
        reasons.append((gap.reason, gap.last_change_id, feed.is_complete, feed.stream.describe() is not None))
        feed.stream.lost = False  # as the publisher does with the next message

    assert not feed.is_complete
    for change_id, loss in ((5, ""), (6, "disconnect"), (20, "unreadable"), (21, "sequence"), (30, "")):
        ((stream, message),) = take(feed, change_id, [[1.0, 2.0]], [])
        assert isinstance(message, Book)
        assert stream.describe() is message
        reasons.append((message.reason, feed.is_complete, feed.changed))
        feed.changed = False
        if loss:
            lose(loss)
    assert reasons == [
        ("subscribe", True, True), ("exchange", True, False),
        ("disconnect", 6, False, False), ("subscribe", True, True),
        ("sequence", 20, True, True), ("resync", True, False),
        ("sequence", 21, False, False), ("resync", True, True),
    ]  # fmt: skip


def test_changes_without_a_book_are_counted(topics: Topics) -> None:
    feed = BookFeed(parse_channel(f"book.{NAME}.100ms"), topics)
    assert len(take(feed, 6, [["new", 1.0, 1.0]], [["new", 2.0, 1.0]], type="snapshot")) == 1
    assert feed.dropped == 0
    feed.lose("disconnect", 9)
    assert take(feed, 7, [], [], type="change", prev_change_id=6) == []
    assert feed.dropped == 1


def test_events_that_wait_for_a_beat_are_bounded_and_said_all_the_same(
    topics: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exchange that invents instruments must not eat the memory; those that have ended wait, and count, as well."""
    monkeypatch.setattr("workers.deribit.feeds.listings.MAX_EVENTS", 3)
    events, again = list[dict[str, Any]](), list[str]()
    feed = ListingFeed(parse_channel("instrument.state.any.any"), topics, events, again.append, is_asked=True)

    def take(number: int, state: str) -> int:
        row = {"instrument_name": f"BTC-{number}", "state": state, "timestamp": 1}
        return len(feed.take(encode_data(feed.channel.name, row), number))

    states = ["open", "delivered", "open", "open", "delivered"]
    assert [take(number, state) for number, state in enumerate(states)] == [1] * 5
    assert [event["row"]["instrument_name"] for event in (*events, *feed.ended)] == ["BTC-0", "BTC-2", "BTC-1"]
    assert again == ["BTC-0", "BTC-2", "BTC-3"]
    events.clear()  # they went along with a beat
    take(5, "open")
    assert [event["row"]["instrument_name"] for event in events] == ["BTC-5"]


def test_no_seconds_are_left_when_a_price_is_final(topics: Topics) -> None:
    feed = create_feed(parse_channel("estimated_expiration_price.btc_usd"), topics)
    ((_, message),) = feed.take(encode(feed, {"price": 1.5, "seconds": 0, "is_estimated": False}), 7)
    assert isinstance(message, dict)
    assert (message["price"], message["seconds"], message["is_estimated"]) == (1.5, 0, False)


@pytest.mark.parametrize(
    ("data", "newest"),
    [
        ({"timestamp": 3}, 3),
        ([{"timestamp": 3}, {"timestamp": 5}, {"timestamp": 4}], 5),
        ([{"price": 1}, {"timestamp": "4"}, {"timestamp": 1 << 62}, {"timestamp": True}, 4, None, {"timestamp": 2}], 2),
        ([], 0),
        ("4", 0),
    ],
)
def test_what_is_passed_on_as_it_is_bears_its_newest_time(topics: Topics, data: Any, newest: int) -> None:
    feed = create_feed(parse_channel("user.trades.any.any.raw"), topics)
    ((_, message),) = feed.take(encode_data(feed.channel.name, data), 7)
    assert isinstance(message, dict)
    assert (message["exchange_ts"], message["data"]) == (newest * 1_000_000, data)


def test_a_ticker_with_a_member_that_nobody_knows_has_all_that_every_ticker_has_and_nothing_of_ours(
    topics: Topics,
) -> None:
    feed = TickerFeed(parse_channel(f"ticker.{NAME}.100ms"), topics)
    data = {"state": "open", "mark_price": 1.5, "last_price": None, "min_price": "2", "join": True, "of_tomorrow": "x"}
    ((_, message),) = feed.take(encode(feed, data), 7)
    assert isinstance(message, dict)
    assert not find_faults(message, {**ENVELOPE, **SCHEMA["ticker"]})
    assert (message["mark_price"], message["min_price"], message["of_tomorrow"]) == (1.5, 2.0, "x")
    assert {key for key in TICKER_KEYS if message[key] is None} == TICKER_KEYS - {"mark_price"}
    assert not {"join", "instrument_name"} & message.keys()


@pytest.mark.parametrize("channel", [f"ticker.{NAME}.100ms", f"incremental_ticker.{NAME}"])
def test_a_ticker_that_could_not_be_read_or_was_lost_is_a_gap_and_an_incremental_one_awaits_a_full_one(
    topics: Topics, channel: str
) -> None:
    feed = TickerFeed(parse_channel(channel), topics)
    is_incremental = channel.startswith("incremental")
    full = encode(feed, {"type": "snapshot", "state": "open", "mark_price": 1.5, "stats": {"high": 2.0, "low": 1.0}})
    part = encode(feed, {"type": "change", "state": "open", "stats": {"high": 3.0}})
    for number in (1, 2):
        feed.stream.last_ts, feed.stream.lost = number, False
        said: list[Any] = feed.take(full, number)
        assert feed.is_complete
        if is_incremental:
            said = feed.take(part, number)
            message: Any = said[0][1]
            assert (message["mark_price"], message["high"], message["low"]) == (1.5, 3.0, 1.0)
        assert len(said) == 1
        assert feed.stream.describe() is said[0][1]
        feed.skip(b"", 5) if number == 1 else feed.lose("disconnect", 5)
        gap = feed.stream.due
        assert gap is not None
        assert gap.reason == ("sequence" if number == 1 else "disconnect")
        assert len(feed.take(part, 6)) == (0 if is_incremental else 1)
        assert (feed.is_complete, feed.dropped) == ((False, number) if is_incremental else (True, 0))


@pytest.mark.parametrize("channel", ["user.changes.any.any.raw", f"ticker.{NAME}.100ms", f"incremental_ticker.{NAME}"])
def test_what_is_nested_too_deep_for_readers_is_malformed(topics: Topics, channel: str) -> None:
    feed = create_feed(parse_channel(channel), topics)
    for depth in (MAX_DEPTH - 1, MAX_DEPTH):
        nested: list[Any] = []
        for _ in range(depth - 1):
            nested = [nested]
        frame = encode(feed, {"type": "snapshot", "state": "open", "new": nested})
        if depth == MAX_DEPTH:  # with the map around it it is one more
            with pytest.raises(Malformed, match="nested more than 100 deep"):
                feed.take(frame, 1)
        else:
            assert len(feed.take(frame, 1)) == 1


TRADE = {
    "timestamp": 1789344933994, "price": 76917.5, "amount": 8450.0, "direction": "buy", "index_price": 76906.67,
    "instrument_name": NAME, "trade_seq": 5, "mark_price": 76917.12, "tick_direction": 0, "trade_id": "267258393",
}  # fmt: skip
SPARE = {
    "starbase_match_id": 225046781992378368, "starbase_timestamp": 1789344933994718924, "block_rfq_id": 50510,
    "block_trade_leg_count": 2,
}  # fmt: skip


def read_spare(published: Published) -> dict[str, Any]:
    """What of SPARE stands on the wire in the one trade that was published, which the wire's table allows."""
    ((_, message),) = published
    payload = decode(msgspec.msgpack.encode(message))
    assert find_faults(payload, {**ENVELOPE, **SCHEMA["trade"]}) == []
    assert (payload["trade_seq"], payload["exchange_ts"]) == (TRADE["trade_seq"], 1789344933994000000)
    return {key: value for key, value in payload.items() if key in SPARE}


@pytest.mark.parametrize("way", ["streamed", "fetched"])
@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ({}, {}),
        (SPARE, SPARE),
        (dict.fromkeys(SPARE), {}),
        ({"block_rfq_id": 7, "starbase_match_id": None}, {"block_rfq_id": 7}),
        ({key: str(value) for key, value in SPARE.items()}, SPARE),  # as all other numbers are taken
        ({"block_trade_leg_count": 2.0, "mark_price": "76917.12"}, {"block_trade_leg_count": 2}),
        *(
            (SPARE | {"starbase_match_id": odd}, {key: SPARE[key] for key in SPARE if key != "starbase_match_id"})
            for odd in (2.5, 2.25046781992378368e17, 1 << 63, 10**400, -1, True, "B-1", "", [1], {"id": 1}, 1e308)
        ),
    ],
)
def test_what_trades_have_since_2026_is_passed_on_and_never_costs_a_trade(
    topics: Topics, sent: dict[str, Any], said: dict[str, Any], way: str
) -> None:
    feed = TradeFeed(parse_channel(f"trades.{NAME}.100ms"), topics)
    row = TRADE | sent
    if way == "streamed":
        published = feed.take(Line(feed.channel.name, (NAME,)).encode([row]), 7)
    else:
        feed.find_tape(NAME).open_hole(None, 1, 9)
        published = feed.backfill(read_page({"trades": [row, {}]}).trades, 7)
    assert read_spare(published) == said


def test_a_trade_of_which_something_else_is_of_another_type_is_not_taken(topics: Topics) -> None:
    feed = TradeFeed(parse_channel(f"trades.{NAME}.100ms"), topics)
    with pytest.raises(Malformed):
        feed.take(Line(feed.channel.name, (NAME,)).encode([TRADE | SPARE | {"tick_direction": 0.5}]), 7)
