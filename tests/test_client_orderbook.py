"""The order book that a subscriber keeps: right, or silent."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.client.orderbook import NotInSync, OrderBook
from collector.client.stream import Loss, Message
from collector.messages import parse_topic

TOPIC = parse_topic("deribit.book.BTC-PERPETUAL.100ms")


class Feed:
    """Numbers messages as a publisher does, and gives each to the book."""

    def __init__(self) -> None:
        self.book = OrderBook()
        self.seq = 0
        self.epoch = 1

    def give(self, type: str = "book", **keys: Any) -> bool:
        if "join" not in keys:
            self.seq += 1
        stamps = {"exchange_ts": 5, "receive_ts": 6, "epoch": self.epoch, "seq": self.seq}
        return self.book.apply(Message(TOPIC, {"type": type, **stamps, **keys}))

    def snapshot(self, change: int, **keys: Any) -> bool:
        levels = {"bids": [[100.0, 1.0], [99.0, 2.0]], "asks": [[101.0, 3.0]]}
        return self.give(kind="snapshot", change_id=change, **{**levels, **keys})

    def delta(self, change: int, before: int | None, **keys: Any) -> bool:
        link: dict[str, Any] = {} if before is None else {"prev_change_id": before}
        return self.give(kind="delta", change_id=change, **link, **{"bids": [], "asks": [], **keys})


@pytest.fixture
def feed() -> Feed:
    return Feed()


def refuse(book: OrderBook) -> str:
    """Check that every question is refused; return the reason."""
    assert not book.in_sync
    for question in (book.best, lambda: book.bids, lambda: book.asks, lambda: book.get_depth(5)):
        with pytest.raises(NotInSync) as raised:
            question()
    return str(raised.value)


def test_it_answers_from_the_first_snapshot_on(feed: Feed) -> None:
    assert "no snapshot" in refuse(feed.book)
    book = feed.book
    assert (book.topic, book.change_id, book.exchange_ts, book.receive_ts) == (None, 0, 0, 0)
    assert (book.status, book.connection) == ("live", "")
    assert not feed.delta(5, 4)
    assert "no snapshot" in refuse(feed.book)
    assert feed.snapshot(10)
    assert feed.book.best() == ((100.0, 1.0), (101.0, 3.0))
    assert feed.delta(12, 10, bids=[[100.0, 0.0], [99.5, 4.0], [7.0, 0.0]], asks=[[100.5, 1.0], [101.0, 2.0]])
    assert feed.book.bids == [(99.5, 4.0), (99.0, 2.0)]
    assert feed.book.asks == [(100.5, 1.0), (101.0, 2.0)]
    assert feed.book.get_depth(1) == ([(99.5, 4.0)], [(100.5, 1.0)])
    assert feed.delta(13, 12, bids=[[99.5, 0.0], [99.0, 0.0]])
    assert feed.book.best() == (None, (100.5, 1.0))
    assert feed.delta(14, 13, bids=[[99.0, 2.0]], asks=[[100.5, 0.0], [101.0, 0.0]])
    assert feed.book.best() == ((99.0, 2.0), None)
    assert (feed.book.change_id, feed.book.exchange_ts, feed.book.receive_ts) == (14, 5, 6)


def test_its_topic_may_be_text_and_no_prefix(feed: Feed) -> None:
    feed.book = OrderBook(str(TOPIC))
    assert feed.snapshot(10)
    assert feed.book.topic == TOPIC
    with pytest.raises(ValueError, match="not a topic"):
        OrderBook("deribit.book.BTC-PERPETUAL.")


def break_by_gap(feed: Feed) -> None:
    assert not feed.give("gap", id=1, reason="disconnect")


def break_by_chain(feed: Feed) -> None:
    assert not feed.delta(12, 11)
    assert refuse(feed.book).startswith(f"{TOPIC}: a delta follows change 11, the book is at 10; ")


def break_by_delta_of_unknown_place(feed: Feed) -> None:
    assert not feed.delta(12, None)


def break_by_dropped_message(feed: Feed) -> None:
    feed.seq += 1
    feed.delta(12, 11)


def test_a_book_that_is_not_given_every_message_says_that_this_may_be_so(feed: Feed) -> None:
    feed.snapshot(10)
    feed.seq += 1  # a status, which the user kept back
    feed.delta(11, 10)
    assert "not given to this book" in refuse(feed.book)


def break_by_reported_loss(feed: Feed) -> None:
    assert not feed.book.apply(Loss(TOPIC, "malformed"))


def break_by_restart(feed: Feed) -> None:
    feed.epoch, feed.seq = 2, 0
    feed.give("gap", id=1, reason="restart")


def break_by_silent_restart(feed: Feed) -> None:
    feed.epoch, feed.seq = 2, 0
    feed.delta(12, 10)


@pytest.mark.parametrize(
    "break_it",
    [
        break_by_gap, break_by_chain, break_by_delta_of_unknown_place, break_by_dropped_message,
        break_by_reported_loss, break_by_restart, break_by_silent_restart,
    ],
)  # fmt: skip
def test_it_refuses_until_the_next_snapshot(feed: Feed, break_it: Any) -> None:
    feed.snapshot(10)
    break_it(feed)
    assert "waiting for a snapshot" in refuse(feed.book)
    assert not feed.delta(20, feed.book.change_id)
    refuse(feed.book)
    feed.snapshot(30, bids=[[50.0, 1.0]])
    assert feed.book.bids == [(50.0, 1.0)]


def test_a_late_subscriber_begins_with_a_repeat(feed: Feed) -> None:
    assert feed.snapshot(10, join=True)
    assert feed.book.in_sync


@pytest.mark.parametrize("state", ["recovering", "closed", "expired", "refused"])
def test_it_refuses_while_its_channel_is_not_followed(feed: Feed, state: str) -> None:
    feed.snapshot(10)
    feed.give("status", state="stale", reason="lag", connection="futures")
    assert feed.book.in_sync
    assert (feed.book.status, feed.book.connection) == ("stale", "futures")
    feed.give("status", state=state, reason="", connection="futures")
    assert state in refuse(feed.book)
    feed.give("status", state="live", reason="", connection="futures")
    assert feed.book.in_sync


def test_join_snapshot_changes_nothing_that_is_known_and_helps_whom_it_is_for(feed: Feed) -> None:
    feed.snapshot(10)
    feed.delta(11, 10, bids=[[100.0, 9.0]])
    feed.give("gap", id=1, reason="disconnect", join=True)  # of before the snapshot; another one has subscribed
    assert feed.book.in_sync
    assert not feed.snapshot(10, join=True)
    assert not feed.snapshot(11, join=True, bids=[])
    assert feed.book.best()[0] == (100.0, 9.0)
    break_by_dropped_message(feed)
    feed.seq -= 1
    assert not feed.snapshot(10, join=True)  # of before the last message
    refuse(feed.book)
    feed.seq += 1
    assert feed.snapshot(12, join=True)
    assert feed.book.best()[0] == (100.0, 1.0)


def test_join_snapshot_helps_also_if_the_exchange_was_reset(feed: Feed) -> None:
    """What was dropped on the way held a gap, and a snapshot with a lower change_id."""
    feed.snapshot(9000)
    break_by_dropped_message(feed)
    assert feed.snapshot(5, join=True)
    assert feed.delta(6, 5)
    assert feed.book.change_id == 6


def test_last_value_of_a_channel_that_is_away_is_no_answer(feed: Feed) -> None:
    """A join alone does not say that the channel is live again; a new snapshot does."""
    feed.give("status", state="recovering", reason="disconnect", connection="futures", join=True)
    feed.snapshot(10, join=True)
    assert "recovering" in refuse(feed.book)
    feed.snapshot(20)
    assert feed.book.in_sync


def test_messages_of_other_topics_and_earlier_lives_change_nothing(feed: Feed) -> None:
    stamps = {"exchange_ts": 0, "receive_ts": 0, "epoch": 9, "seq": 1}
    trades = parse_topic("deribit.trade.BTC-PERPETUAL.100ms")
    feed.book.apply(Message(trades, {"type": "gap", "id": 1, "reason": "restart", **stamps}))  # decides no topic
    feed.epoch = 2
    feed.snapshot(10)
    feed.epoch = 1
    feed.give("gap", id=9, reason="disconnect")
    other = parse_topic("deribit.book.BTC-PERPETUAL.raw")
    assert not feed.book.apply(Message(other, {"type": "gap", "id": 1, "reason": "restart", **stamps}))
    feed.book.apply(Loss(other, "malformed"))
    feed.book.apply(Loss(None, "malformed"))
    feed.book.apply(Loss(TOPIC, "epoch"))
    assert feed.book.in_sync


LEVELS = st.lists(st.tuples(st.integers(1, 30).map(float), st.integers(0, 3).map(float)), max_size=12)


@given(st.lists(st.tuples(st.booleans(), LEVELS, LEVELS), min_size=1, max_size=10))
def test_it_is_what_a_plain_map_gives(updates: list[tuple[bool, Any, Any]]) -> None:
    feed = Feed()
    feed.snapshot(0, bids=[], asks=[])
    plain: dict[str, dict[float, float]] = {"bids": {}, "asks": {}}
    for change, (is_snapshot, bids, asks) in enumerate(updates, 1):
        for side, levels in (("bids", bids), ("asks", asks)):
            plain[side] = {**({} if is_snapshot else plain[side]), **dict(levels)}
        if is_snapshot:
            feed.snapshot(change, bids=bids, asks=asks)
        else:
            feed.delta(change, change - 1, bids=bids, asks=asks)
    kept = {side: sorted((p, a) for p, a in levels.items() if a) for side, levels in plain.items()}
    assert feed.book.bids == kept["bids"][::-1]
    assert feed.book.asks == kept["asks"]
