"""The verifier: a good stream passes, and each rule, broken alone, is named."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.client.rules.trades import Ranges
from collector.client.verify import RULES, Verifier
from collector.messages import encode

SECOND = 1_000_000_000
START = 1_790_000_000 * SECOND
BOOK = "deribit.book.BTC-PERPETUAL.100ms"
TRADE = "deribit.trade.BTC-PERPETUAL.100ms"
TICKER = "deribit.ticker.BTC-PERPETUAL.100ms"
BEAT = "deribit.heartbeat.futures.1s"
LIVE: dict[str, Any] = {"wire": 1, "connection": "futures", "state": "live", "published": 10, "lag": None}


class Wire:
    """Writes messages as a publisher does, and has each one checked."""

    def __init__(self) -> None:
        self.verifier = Verifier()
        self.now = START
        self.set_by = 0  # how far clocks have been set since
        self.epoch = START
        self.seq: dict[str, int] = {}
        self.last_ts: dict[str, int] = {}
        self.found: list[str] = []

    def say(self, topic: str, type: str | None = None, **keys: Any) -> list[str]:
        """Publish one message; return the rules that it breaks."""
        parts = topic.split(".")
        self.now += SECOND // 100
        if "join" not in keys:
            self.seq[topic] = self.seq.get(topic, 0) + 1
        payload = {
            "type": type or parts[1], "exchange": parts[0], "instrument": parts[2], "epoch": self.epoch,
            "seq": self.seq.get(topic, 0), "exchange_ts": 0, "receive_ts": self.now + self.set_by, **keys,
        }  # fmt: skip
        if type is None:
            self.last_ts[topic] = self.now + self.set_by
        return self.send(topic.encode(), encode(payload))

    def send(self, topic: bytes, payload: bytes) -> list[str]:
        rules = [
            finding.rule
            for finding in self.verifier.check(topic, payload, now_ns=self.now + self.set_by, steady_ns=self.now)
        ]
        self.found += rules
        return rules

    def snapshot(self, change: int, **keys: Any) -> list[str]:
        levels = {"bids": [[100.0, 1.0], [99.0, 2.0]], "asks": [[101.0, 1.0], [102.0, 5.0]], "reason": "subscribe"}
        return self.say(BOOK, kind="snapshot", change_id=change, **{**levels, **keys})

    def delta(self, change: int, before: int, **keys: Any) -> list[str]:
        return self.say(BOOK, kind="delta", change_id=change, prev_change_id=before, **{"bids": [], "asks": [], **keys})

    def trade(self, number: int, **keys: Any) -> list[str]:
        prices = {"price": 100.5, "mark_price": 100.4, "index_price": 100.3, "amount": 10.0}
        trade = {**prices, "side": "buy", "trade_id": str(number), "trade_seq": number, "tick_direction": 0}
        return self.say(TRADE, **{**trade, **keys})

    def gap(self, topic: str, id: int = 1, reason: str = "disconnect", **keys: Any) -> list[str]:
        stamps = {"from_ts": self.last_ts.get(topic, 0), "to_ts": self.now + 1}
        return self.say(topic, "gap", **{"id": id, "reason": reason, **stamps, **keys})

    def ticker(self, **keys: Any) -> list[str]:
        prices = dict.fromkeys(("best_bid_price", "best_ask_price", "last_price", "mark_price", "index_price"), 1.0)
        return self.say(TICKER, **{**prices, "best_bid_amount": 1.0, "best_ask_amount": 1.0, "state": "open", **keys})

    def status(self, topic: str, state: str, reason: str = "", **keys: Any) -> list[str]:
        return self.say(topic, "status", **{"state": state, "reason": reason, "connection": "futures", **keys})

    def restart(self) -> None:
        self.epoch += SECOND
        self.seq.clear()


@pytest.fixture
def wire() -> Wire:
    return Wire()


def test_good_stream_breaks_no_rule(wire: Wire) -> None:
    wire.say("deribit.heartbeat.futures.1s", wire=1, connection="futures", state="live", published=0, lag=0.01)
    wire.snapshot(10)
    wire.delta(12, 10, bids=[[100.0, 0.0], [99.5, 3.0]])
    wire.snapshot(12, join=True, bids=[[99.5, 3.0], [99.0, 2.0]])
    wire.delta(13, 12, asks=[[101.0, 7.0]])
    wire.snapshot(13, join=True, bids=[[99.5, 3.0], [99.0, 2.0]], asks=[[101.0, 7.0], [102.0, 5.0]])
    wire.gap(BOOK, last_change_id=13)
    wire.snapshot(90, reason="resync", bids=[])
    wire.delta(91, 90, asks=[[101.0, 7.0]])
    wire.trade(1)
    wire.trade(2)
    wire.gap(TRADE, 2, missing_from=3, healing=True)
    wire.trade(7)
    wire.trade(3, backfilled=True)
    wire.trade(4, backfilled=True)
    wire.say(TRADE, "repair", gap=2, repaired=2, missing=[[5, 6]])
    wire.say(TRADE, "status", state="live", reason="", connection="futures")
    wire.restart()
    wire.gap(TRADE, 1, "restart", missing_from=7, healing=True)
    wire.trade(9)
    wire.trade(7, backfilled=True)
    wire.trade(8, backfilled=True)
    wire.say(TRADE, "repair", gap=1, repaired=2, missing=[])
    assert wire.found == []
    assert wire.verifier.finish(wire.now) == []
    untested = {rule for rule in RULES if not wire.verifier.count_checks()[rule]}
    assert untested == set()


def test_restarted_collector_starts_anew_without_gaps(wire: Wire) -> None:
    wire.snapshot(10)
    wire.trade(5)
    wire.restart()
    wire.snapshot(3)
    wire.delta(4, 3)
    wire.trade(1)
    wire.trade(2)
    assert wire.found == []


def test_a_restarted_collector_promises_nothing_of_the_trades_before_but_a_restarted_worker_does(wire: Wire) -> None:
    wire.trade(5)
    wire.restart()
    wire.trade(50)
    assert wire.found == []
    wire.restart()
    wire.gap(TRADE, 1, "restart", missing_from=51, missing_to=52, healing=True)
    assert wire.trade(55) == ["hole"]


def test_the_heartbeats_of_a_restarted_worker_begin_anew(wire: Wire) -> None:
    wire.say(BEAT, **LIVE)
    wire.now += 10 * SECOND
    wire.restart()
    assert wire.say(BEAT, **{**LIVE, "published": 5}) == []
    assert wire.say(BEAT, **{**LIVE, "published": 4}) == ["heartbeat"]


def test_what_was_checked_and_what_was_wrong_is_counted(wire: Wire) -> None:
    wire.trade(1)
    wire.trade(2)
    wire.trade(2)
    wire.send(b"no topic", b"")
    checked = wire.verifier.count_checks()
    assert [checked[rule] for rule in ("envelope", "sequence", "hole", "chain")] == [4, 3, 3, 0]
    assert (wire.verifier.messages, dict(wire.verifier.wrong)) == (4, {"duplicate": 1, "envelope": 1})


def test_a_break_in_the_chain_of_a_book_is_named_once(wire: Wire) -> None:
    wire.snapshot(10)
    wire.gap(BOOK, 1)
    assert wire.delta(13, 12) == ["chain"]
    assert wire.delta(14, 13) == []
    wire.snapshot(20, reason="exchange")
    assert wire.delta(23, 22) == ["chain"]
    assert wire.delta(24, 23, bids=[[101.5, 1.0]]) == []  # which asks there are is not known any more


def test_a_late_subscriber_begins_with_a_repeat_of_the_book(wire: Wire) -> None:
    wire.seq[BOOK] = 7
    wire.status(BOOK, "live", join=True)
    assert wire.snapshot(9, join=True) == []
    assert wire.delta(10, 9) == []
    assert wire.delta(12, 11) == ["chain"]


def test_a_topic_that_another_connection_takes_up_begins_anew(wire: Wire) -> None:
    def move() -> None:
        for topic in (BOOK, TRADE):
            wire.status(topic, "closed", "unsubscribed")
        wire.restart()
        for topic in (BOOK, TRADE):
            wire.status(topic, "recovering", "subscribe", connection="options")

    wire.snapshot(10)
    wire.trade(5)
    move()
    wire.snapshot(30)
    wire.delta(31, 30)
    wire.trade(20)
    wire.epoch -= SECOND  # the last words of who had it before come on a way of their own
    wire.status(BOOK, "closed", "unsubscribed", seq=3)
    wire.gap(TRADE, 1, "restart", missing_from=5, healing=False, seq=3)
    wire.epoch += SECOND
    wire.delta(32, 31, seq=4)
    assert wire.found == []
    wire.epoch -= SECOND
    assert wire.delta(12, 11) == ["epoch"]


def test_exchange_that_counts_anew_says_so_with_a_gap(wire: Wire) -> None:
    for number in (10, 11, 12, 13):
        wire.trade(number)
    wire.gap(TRADE, 1, missing_from=14, healing=True)
    wire.trade(14, backfilled=True)
    wire.say(TRADE, "repair", gap=1, repaired=1, missing=[])
    wire.gap(TRADE, 2, "sequence", healing=False)
    wire.trade(12)
    wire.trade(13)
    wire.trade(10, backfilled=True)
    wire.trade(11, backfilled=True)
    wire.gap(TRADE, 3, healing=False)
    wire.trade(14)
    assert wire.found == []
    assert wire.trade(14) == ["duplicate"]


def test_a_new_count_may_be_ahead_of_the_old_one(wire: Wire) -> None:
    wire.trade(10)
    wire.gap(TRADE, 1, "disconnect", healing=False)
    wire.trade(13)
    wire.trade(10, backfilled=True)
    assert wire.trade(14) == []
    assert wire.found == []


def test_a_new_count_may_go_on_with_a_number_that_stayed_missing_before(wire: Wire) -> None:
    """One higher than the last live one, but fetched ones were higher: so it is another trade."""
    wire.trade(1)
    wire.gap(TRADE, 1, missing_from=2, healing=True)
    wire.trade(3, backfilled=True)
    wire.say(TRADE, "repair", gap=1, repaired=1, missing=[[2, 2]])
    wire.gap(TRADE, 2, "sequence", healing=False)
    wire.trade(2)
    wire.trade(3)
    assert wire.found == []
    assert wire.trade(3) == ["duplicate"]


def test_a_gap_in_which_nothing_is_missing_ends_no_healing_that_goes_on(wire: Wire) -> None:
    wire.trade(10)
    wire.gap(TRADE, 1, missing_from=11, healing=True)
    wire.trade(11, backfilled=True)
    wire.trade(13, backfilled=True)
    wire.gap(TRADE, 2, healing=False)
    wire.trade(14)
    assert wire.say(TRADE, "repair", gap=1, repaired=2, missing=[[12, 12]]) == []
    assert wire.trade(12) == ["repair"]


def test_a_gap_without_an_end_ends_where_the_next_one_begins(wire: Wire) -> None:
    wire.trade(10)
    wire.gap(TRADE, 1, missing_from=11, healing=True)
    wire.trade(11, backfilled=True)
    wire.trade(13, backfilled=True)
    wire.gap(TRADE, 2, missing_from=14, healing=True)
    wire.trade(20)
    wire.trade(14, backfilled=True)
    wire.say(TRADE, "repair", gap=1, repaired=2, missing=[[12, 12]])
    wire.say(TRADE, "repair", gap=2, repaired=1, missing=[[15, 19]])
    assert wire.found == []


def test_a_gap_in_which_nothing_is_missing_excuses_nothing_before_it(wire: Wire) -> None:
    wire.trade(3)
    assert wire.trade(5) == ["hole"]
    wire.gap(TRADE, 1, healing=False)
    wire.trade(6)
    assert wire.trade(4) == ["hole"]


def test_a_new_count_leaves_the_repair_of_a_gap_before_it_unjudged(wire: Wire) -> None:
    wire.trade(1)
    wire.gap(TRADE, 1, missing_from=2, healing=True)
    wire.trade(5)
    wire.gap(TRADE, 2, "sequence", healing=False)
    wire.trade(1)
    wire.say(TRADE, "repair", gap=1, repaired=0, missing=[[2, 4]])
    assert wire.found == []


def test_trades_are_nobodys_loss_while_nobody_asks_for_them_but_else_a_status_hides_no_hole(wire: Wire) -> None:
    wire.trade(1)
    wire.status(TRADE, "stale", "mute")
    assert wire.trade(3) == ["hole"]
    wire.status(TRADE, "closed", "unsubscribed")
    assert wire.trade(9) == []
    assert wire.trade(11) == ["hole"]


def test_book_whose_change_ids_fall_after_a_gap_is_right(wire: Wire) -> None:
    wire.snapshot(9000)
    wire.delta(9001, 9000)
    wire.gap(BOOK, 1, last_change_id=9001, next_change_id=10)
    wire.snapshot(10)
    wire.delta(11, 10)
    wire.snapshot(11, join=True)
    assert wire.found == []


def test_what_was_given_up_and_asked_for_again_begins_anew(wire: Wire) -> None:
    wire.snapshot(10)
    wire.trade(5)
    wire.status(BOOK, "closed", "unsubscribed")
    wire.status(TRADE, "closed", "unsubscribed")
    wire.snapshot(90)
    wire.trade(30)
    wire.trade(31)
    assert wire.found == []
    assert wire.trade(33) == ["hole"]
    assert wire.trade(5) == ["duplicate"]


def break_book(wire: Wire) -> dict[str, list[str]]:
    wire.snapshot(10)
    wire.status(BOOK, "live", join=True)
    broken = {"join: another book, repeated at once": wire.snapshot(10, join=True, bids=[])}
    broken["chain: foreign change"] = wire.delta(12, 11)
    wire.gap(BOOK, 1)
    broken["chain: delta after gap"] = wire.delta(13, 12)
    wire.snapshot(20)
    broken["chain: gap names another change"] = wire.gap(BOOK, 2, last_change_id=19)
    wire.snapshot(30)
    broken["crossed: bid over ask"] = wire.delta(31, 30, bids=[[101.5, 1.0]])
    broken["join: another change"] = wire.snapshot(29, join=True, bids=[[101.5, 1.0], [100.0, 1.0], [99.0, 2.0]])
    broken["join: another book"] = wire.snapshot(31, join=True)
    broken["join: a delta"] = wire.delta(31, 31, join=True)
    broken["schema: no reason"] = wire.say(BOOK, kind="snapshot", change_id=40, bids=[], asks=[])
    broken["schema: negative amount"] = wire.delta(41, 40, bids=[[99.0, -1.0]])
    broken["schema: not a number"] = wire.snapshot(42, bids=[[math.nan, 1.0]])
    return broken


def break_trades(wire: Wire) -> dict[str, list[str]]:
    wire.trade(5)
    broken = {"duplicate: again": wire.trade(5), "duplicate: marked without restart": wire.trade(5, backfilled=True)}
    broken["hole: nothing said"] = wire.trade(8)
    broken["hole: late and unmarked"] = wire.trade(7)
    broken["duplicate: an earlier one again"] = wire.trade(7)
    wire.gap(TRADE, 1, missing_from=10)
    broken["hole: the gap says less"] = wire.trade(12)
    wire.gap(TRADE, 2, missing_from=13, healing=True)
    wire.trade(16)
    wire.trade(13, backfilled=True)
    broken["repair: one neither came nor named"] = wire.say(TRADE, "repair", gap=2, repaired=1, missing=[[14, 14]])
    broken["repair: again"] = wire.say(TRADE, "repair", gap=2, repaired=1, missing=[[14, 15]])
    wire.gap(TRADE, 3, missing_from=17, missing_to=18, healing=True)
    wire.trade(17, backfilled=True)
    broken["repair: named but came"] = wire.say(TRADE, "repair", gap=3, repaired=1, missing=[[17, 18]])
    wire.gap(TRADE, 4, missing_from=19, missing_to=20, healing=True)
    wire.trade(19, backfilled=True)
    broken["repair: counts another number"] = wire.say(TRADE, "repair", gap=4, repaired=2, missing=[[20, 20]])
    broken["schema: a price as text"] = wire.trade(19, price="1")
    broken["join: a trade"] = wire.trade(18, join=True)
    return broken


@pytest.mark.parametrize("end", ["closed", "expired", ""])
def test_no_gap_is_owed_for_what_was_lost_before_a_topic_said_anything(wire: Wire, end: str) -> None:
    wire.trade(1)
    if end:
        wire.status(TRADE, end)
    wire.status(TRADE, "recovering", "disconnect")
    wire.status(TRADE, "live")
    assert wire.trade(2) == ([] if end else ["gap"])


def test_what_is_repeated_for_somebody_else_is_no_data_after_a_lost_connection(wire: Wire) -> None:
    wire.ticker()
    wire.status(TICKER, "recovering", "disconnect")
    assert wire.ticker(join=True, receive_ts=wire.last_ts[TICKER]) == []
    assert wire.ticker() == ["gap"]


def test_a_gap_stands_also_for_a_connection_that_is_lost_before_its_data(wire: Wire) -> None:
    wire.ticker()
    wire.gap(TICKER, 1)
    wire.status(TICKER, "recovering", "disconnect")
    assert wire.ticker() == []


def test_a_gap_is_repeated_as_healed_from_its_repair_on(wire: Wire) -> None:
    wire.trade(1)
    stamps: dict[str, Any] = {
        "from_ts": wire.last_ts[TRADE],
        "to_ts": wire.now,
        "receive_ts": wire.now,
        "missing_from": 2,
    }
    wire.gap(TRADE, 1, healing=True, **stamps)
    wire.trade(3)
    assert wire.gap(TRADE, 1, healing=True, join=True, **stamps) == []
    assert wire.gap(TRADE, 1, healing=False, join=True, **stamps) == ["join"]
    assert wire.verifier.count_missing() == (1, 0)
    wire.say(TRADE, "repair", gap=1, repaired=0, missing=[[2, 2]])
    assert wire.verifier.count_missing() == (0, 1)
    assert wire.gap(TRADE, 1, healing=False, join=True, **stamps) == []
    assert wire.gap(TRADE, 1, healing=True, join=True, **stamps) == ["join"]
    stamps = {"from_ts": wire.last_ts[TRADE], "to_ts": wire.now, "receive_ts": wire.now, "missing_from": 4}
    wire.gap(TRADE, 2, healing=True, **stamps)
    wire.trade(5)
    wire.say(TRADE, "repair", gap=1, repaired=0, missing=[])  # of another one
    assert wire.gap(TRADE, 2, healing=True, join=True, **stamps) == []


def test_what_is_announced_as_missing_for_good_is_counted(wire: Wire) -> None:
    wire.trade(1)
    wire.gap(TRADE, 1, healing=False, missing_from=2, missing_to=4)
    wire.trade(5)
    assert wire.verifier.count_missing() == (0, 3)
    wire = Wire()
    wire.seq[TRADE] = 7
    wire.gap(TRADE, 1, healing=False, missing_from=2, missing_to=4, from_ts=1, join=True)  # of before we came
    assert wire.verifier.count_missing() == (0, 0)


def test_who_joins_amid_healing_is_told_nothing_wrong(wire: Wire) -> None:
    wire.seq[TRADE] = 7
    wire.say(TRADE, "repair", gap=2, repaired=3, missing=[])  # of a gap that was said before
    wire.gap(TRADE, 3, missing_from=12, missing_to=15, healing=True, from_ts=1, join=True)
    wire.trade(13, backfilled=True)
    wire.trade(20)
    wire.trade(14, backfilled=True)
    wire.say(TRADE, "repair", gap=3, repaired=3, missing=[[15, 15]])  # one came before us
    assert wire.found == []
    assert wire.verifier.count_missing() == (0, 1)
    assert wire.trade(22) == ["hole"]


def test_who_joins_after_a_gap_that_names_no_trades_is_told_nothing_wrong(wire: Wire) -> None:
    wire.seq[TRADE] = 7
    wire.gap(TRADE, 3, healing=True, from_ts=1, join=True)
    wire.trade(20)
    wire.trade(19, backfilled=True)
    wire.say(TRADE, "repair", gap=3, repaired=3, missing=[[18, 18]])
    assert wire.found == []
    assert wire.trade(22) == ["hole"]


def test_who_has_heard_a_status_alone_may_have_missed_a_gap(wire: Wire) -> None:
    wire.seq[TRADE] = 7
    wire.status(TRADE, "stale", "mute")
    assert wire.say(TRADE, "repair", gap=2, repaired=3, missing=[]) == []


def test_who_comes_amid_a_healing_may_have_missed_what_was_fetched_before(wire: Wire) -> None:
    wire.gap(TRADE, 1, "restart", missing_from=2, missing_to=4, healing=True)
    wire.trade(2, backfilled=True)
    assert wire.say(TRADE, "repair", gap=1, repaired=1, missing=[[3, 3]]) == []


def test_who_joins_amid_two_healings_knows_of_both(wire: Wire) -> None:
    """The last gap is repeated, so the one before it has been announced too."""
    wire.seq[TRADE] = 7
    wire.gap(TRADE, 3, missing_from=12, missing_to=15, healing=True, from_ts=1, join=True)
    wire.status(TRADE, "live", join=True)
    assert wire.say(TRADE, "repair", gap=2, repaired=3, missing=[]) == []
    assert wire.say(TRADE, "repair", gap=4, repaired=3, missing=[]) == ["repair"]


def test_a_fetched_trade_that_comes_before_the_repeated_gap_says_nothing_of_those_behind_it(wire: Wire) -> None:
    wire.seq[TRADE] = 7
    wire.trade(3, backfilled=True)
    wire.gap(TRADE, 1, missing_from=2, missing_to=5, healing=True, from_ts=1, join=True)
    assert wire.trade(100) == []


def test_who_hears_that_there_was_no_gap_knows_it(wire: Wire) -> None:
    wire.seq[TRADE] = 7
    wire.status(TRADE, "live", join=True)
    assert wire.say(TRADE, "repair", gap=1, repaired=0, missing=[]) == ["repair"]
    wire.restart()
    wire.gap(TRADE, 9, "restart")
    wire.restart()
    wire.trade(20)
    assert wire.say(TRADE, "repair", gap=9, repaired=0, missing=[]) == ["repair"]


def test_what_one_life_has_said_binds_no_later_one(wire: Wire) -> None:
    wire.trade(1)
    wire.gap(TRADE, 1, missing_from=2, missing_to=3, healing=True)
    wire.trade(4)
    wire.say(TRADE, "repair", gap=1, repaired=0, missing=[[2, 3]])
    wire.gap(TRADE, 2, missing_from=5, missing_to=6, healing=True)
    wire.trade(7)
    wire.restart()
    wire.gap(TRADE, 1, "restart", missing_from=2, healing=True)
    assert wire.verifier.count_missing() == (1, 2)  # of the other no repair comes any more
    wire.trade(9)
    for number in (3, 4, 7):
        wire.trade(number, backfilled=True)
    missing = [[2, 2], [5, 6], [8, 8]]
    assert wire.say(TRADE, "repair", gap=1, repaired=3, missing=missing) == []
    wire.gap(TRADE, 2, missing_from=10, missing_to=11, healing=True)
    wire.trade(12)
    wire.trade(10, backfilled=True)
    assert wire.found == []
    assert wire.say(TRADE, "repair", gap=2, repaired=1, missing=[[10, 11]]) == ["repair"]


def test_a_gap_repeated_for_somebody_else_hides_no_hole(wire: Wire) -> None:
    wire.trade(1)
    stamps: dict[str, Any] = {"from_ts": wire.last_ts[TRADE], "to_ts": wire.now, "receive_ts": wire.now}
    wire.gap(TRADE, 1, healing=False, **stamps)
    wire.trade(2)
    assert wire.gap(TRADE, 1, healing=False, join=True, **stamps) == []
    assert wire.trade(5) == ["hole"]


def test_gaps_that_are_never_healed_are_kept_up_to_a_number(wire: Wire) -> None:
    for number in range(1, 300):
        wire.gap(TRADE, number, missing_from=10 * number, missing_to=10 * number + 8, healing=True, from_ts=1)
        wire.trade(10 * number + 9)
    assert 100 < wire.verifier.count_missing()[0] < 250
    assert wire.found == []


def test_fetched_trades_and_repairs_may_come_before_a_gap_and_between_two(wire: Wire) -> None:
    wire.trade(1)
    wire.gap(TRADE, 1, missing_from=2, healing=True)
    wire.trade(9)
    read: dict[str, Any] = {"from_ts": wire.now}
    wire.status(TRADE, "recovering", "disconnect")
    wire.trade(2, backfilled=True, receive_ts=read["from_ts"] - 1)
    wire.say(TRADE, "repair", gap=1, repaired=1, missing=[[3, 8]])
    wire.gap(TRADE, 2, missing_from=10, missing_to=10, healing=True, **read)
    wire.say(TRADE, "repair", gap=2, repaired=0, missing=[[10, 10]])
    wire.gap(TRADE, 3, healing=False, **read)
    wire.trade(11)
    assert wire.found == []


def break_envelope(wire: Wire) -> dict[str, list[str]]:
    wire.trade(1)
    good = {
        "type": "index", "exchange": "deribit", "instrument": "btc_usd", "epoch": START, "seq": 1, "exchange_ts": 0,
        "receive_ts": START, "price": 1.0,
    }  # fmt: skip
    topic = b"deribit.index.btc_usd.raw"
    broken = {
        "envelope: three parts": wire.send(b"deribit.index.btc_usd", encode(good)),
        "envelope: no text": wire.send(b"\xff\xfe.a.b.c", encode(good)),
        "envelope: no such type": wire.send(b"deribit.nonsense.btc_usd.raw", encode(good)),
        "envelope: another instrument": wire.send(b"deribit.index.eth_usd.raw", encode(good)),
        "envelope: another exchange": wire.send(topic, encode({**good, "exchange": "other"})),
        "envelope: another type": wire.send(b"deribit.quote.btc_usd.raw", encode(good)),
        "envelope: no map": wire.send(topic, encode([1, 2])),
        "envelope: no MessagePack": wire.send(topic, b"\xc1"),
        "envelope: cut": wire.send(topic, encode(good)[:-1]),
        "envelope: deep": wire.send(topic, b"\x91" * 100_000),
        "envelope: claims 4 billion": wire.send(topic, b"\xdd\xff\xff\xff\xff"),
        "envelope: seq is true": wire.send(topic, encode({**good, "seq": True})),
        "envelope: join is false": wire.send(topic, encode({**good, "join": False})),
        "envelope: no epoch": wire.send(topic, encode({k: v for k, v in good.items() if k != "epoch"})),
        "schema: no such type": wire.send(b"deribit.nonsense.btc_usd.raw", encode({**good, "type": "nonsense"})),
        "schema: no price": wire.send(topic, encode({k: v for k, v in good.items() if k != "price"})),
    }
    wire.seq[TRADE] += 1
    broken["sequence: one dropped"] = wire.trade(2)
    wire.seq[TRADE] -= 1
    broken["sequence: a number again"] = wire.trade(2)
    broken["time: the future"] = wire.trade(3, receive_ts=wire.now + 60 * SECOND)
    broken["time: falls"] = wire.trade(4)
    broken["epoch: falls"] = wire.trade(5, epoch=START - 1)
    return broken


def break_rest(wire: Wire) -> dict[str, list[str]]:
    wire.trade(1)
    wire.gap(TRADE, 4, missing_from=2)
    broken = {"gap: no data between": wire.gap(TRADE, 5)}
    wire.trade(2)
    wire.ticker()
    wire.gap(TICKER, 1)
    wire.ticker(join=True)
    broken["gap: only a repeat between"] = wire.gap(TICKER, 2)
    wire.seq[BOOK] = 7
    wire.gap(BOOK, 4, from_ts=1, join=True)
    broken["gap: id that a late subscriber was told"] = wire.gap(BOOK, 4)
    broken["gap: id falls"] = wire.gap(TRADE, 3)
    wire.trade(3)
    broken["gap: backwards"] = wire.say(TRADE, "gap", id=6, reason="sequence", from_ts=2, to_ts=1)
    broken["schema: reason"] = wire.gap(TRADE, 7, "boredom")
    broken["status: word"] = wire.say(TRADE, "status", state="fine", reason="", connection="futures")
    topic = "deribit.status.futures.connection"
    wire.say(topic, state="bootstrapping", reason="", connection="futures")
    broken["gap: of a connection"] = wire.gap(topic, 1)
    broken["status: of a connection"] = wire.say(topic, state="recovering", reason="", connection="futures")
    wire.say(BEAT, **LIVE)
    broken["heartbeat: published falls"] = wire.say(BEAT, **{**LIVE, "published": 9})
    broken["heartbeat: wire 2"] = wire.say(BEAT, **{**LIVE, "wire": 2})
    wire.now += 4 * SECOND
    broken["heartbeat: silence"] = wire.say(BEAT, **LIVE)
    late = wire.verifier.finish(wire.now + 4 * SECOND)
    broken["heartbeat: silence at the end"] = [finding.rule for finding in late]
    return broken


def break_book_more(wire: Wire) -> dict[str, list[str]]:
    broken = {"chain: no snapshot first": wire.delta(9, 8)}
    wire.snapshot(10)
    broken["chain: names no change before"] = wire.say(BOOK, kind="delta", change_id=11, bids=[], asks=[])
    broken["gap: a resync without one"] = wire.snapshot(20, reason="resync")
    wire.status(BOOK, "recovering", "disconnect")
    broken["gap: none after a lost connection"] = wire.delta(21, 20)
    broken["repair: of a book"] = wire.say(BOOK, "repair", gap=1, repaired=0, missing=[])
    broken["schema: worst first"] = wire.snapshot(22, reason="exchange", bids=[[99.0, 2.0], [100.0, 1.0]])
    broken["schema: a price twice"] = wire.snapshot(23, reason="exchange", asks=[[101.0, 2.0], [101.0, 1.0]])
    wire.status(BOOK, "closed", "unsubscribed")
    wire.snapshot(23)
    broken["gap: a new subscription without one"] = wire.snapshot(23)
    broken["crossed: bid at ask"] = wire.delta(24, 23, bids=[[101.0, 1.0]])
    broken["schema: a number as text"] = wire.trade(1, starbase_match_id="225046781992378368")
    broken["schema: a level of nothing"] = wire.snapshot(24, reason="exchange", asks=[[101.0, 0.0]])
    return broken


def break_trades_more(wire: Wire) -> dict[str, list[str]]:
    wire.trade(1)
    broken = {"repair: of no gap": wire.say(TRADE, "repair", gap=1, repaired=0, missing=[])}
    wire.gap(TRADE, 2, missing_from=2, missing_to=9, healing=True)
    wire.trade(10)
    broken["repair: named twice"] = wire.say(TRADE, "repair", gap=2, repaired=0, missing=[[2, 6], [5, 9]])
    broken["repair: came all the same"] = wire.trade(4, backfilled=True)
    wire.gap(TRADE, 3, missing_from=11, missing_to=12, healing=True)
    broken["repair: names others"] = wire.say(TRADE, "repair", gap=3, repaired=0, missing=[[11, 13]])
    wire.trade(14)
    wire.gap(TRADE, 4, missing_from=15, missing_to=15, healing=False)
    wire.trade(16)
    broken["repair: none is due"] = wire.say(TRADE, "repair", gap=4, repaired=0, missing=[[15, 15]])
    broken["hole: a mark hides it"] = wire.trade(20, backfilled=True)
    wire.restart()
    wire.gap(TRADE, 1, "restart", missing_from=21, healing=True)
    wire.trade(20, backfilled=True)
    broken["duplicate: twice in one life"] = wire.trade(20, backfilled=True)
    broken["duplicate: of an earlier life, and unmarked"] = wire.trade(16)
    return broken


def break_rest_more(wire: Wire) -> dict[str, list[str]]:
    wire.ticker()
    broken = {"join: other values": wire.ticker(join=True, mark_price=2.0)}
    read = {"receive_ts": wire.now}
    wire.ticker(open_interest=5.0, **read)
    broken["join: less than was said"] = wire.ticker(join=True, **read)
    broken["join: another time"] = wire.ticker(join=True, open_interest=5.0, receive_ts=wire.now)
    wire.ticker()
    wire.gap(TICKER, 1)
    broken["join: another gap"] = wire.gap(TICKER, 2, join=True)
    wire.ticker()
    wire.status(TICKER, "live")
    broken["join: another state"] = wire.status(TICKER, "stale", join=True)
    broken["gap: from no time"] = wire.gap(TICKER, 3, from_ts=0)
    broken["gap: of heartbeats"] = wire.gap(BEAT, 4)
    broken["join: a heartbeat"] = wire.say(BEAT, **LIVE, join=True)
    broken["time: the exchange says no heartbeat"] = wire.say(BEAT, **LIVE, exchange_ts=wire.now)
    wire.seq[BOOK] = 7
    first = wire.say(BOOK, kind="delta", change_id=9, bids=[], asks=[])
    broken["chain: the first one names no change before"] = first
    broken["crossed: from its first snapshot on"] = wire.snapshot(9, join=True, bids=[[101.5, 1.0]])
    wire.gap(TRADE, 1, missing_from=2, missing_to=2, healing=True)
    broken["join: a repair"] = wire.say(TRADE, "repair", gap=1, repaired=0, missing=[[2, 2]], join=True)
    broken["time: read, not in ns"] = wire.say("deribit.index.eth_usd.raw", price=1.0, receive_ts=START // 1_000_000)
    broken["time: not in ns"] = wire.ticker(exchange_ts=wire.now // 1_000_000)
    broken["time: the exchange says no status"] = wire.status(TICKER, "live", exchange_ts=wire.now)
    broken["status: of another connection"] = wire.say(BEAT, **{**LIVE, "connection": "options"})
    wire.status(TICKER, "expired")
    broken["status: data of an expired channel"] = wire.ticker()
    wire.seq["deribit.index.btc_usd.raw"] = -1
    broken["sequence: 0"] = wire.say("deribit.index.btc_usd.raw", price=1.0)
    return broken


def test_a_repeat_is_compared_with_nothing_that_we_cannot_know(wire: Wire) -> None:
    wire.ticker()
    wire.seq[TICKER] += 2
    assert wire.ticker(join=True, mark_price=2.0) == ["sequence"]
    wire.ticker()
    wire.restart()
    wire.ticker(join=True, mark_price=3.0)
    wire.snapshot(10)
    wire.delta(12, 11)
    wire.snapshot(12, join=True, bids=[[98.0, 1.0]])  # since a break in the chain the levels may be others
    wire.snapshot(11, join=True)
    wire.delta(13, 12)
    assert wire.found == ["sequence", "chain", "join"]


def test_a_book_begins_anew_after_a_refusal_or_a_restart_but_not_after_a_repeat(wire: Wire) -> None:
    wire.snapshot(10)
    wire.status(BOOK, "refused", "exchange_error")
    wire.snapshot(20)
    wire.status(BOOK, "expired")
    wire.status(BOOK, "recovering", "subscribe")
    wire.snapshot(25)
    stamps: dict[str, Any] = {"from_ts": wire.last_ts[BOOK], "to_ts": wire.now, "receive_ts": wire.now}
    wire.gap(BOOK, 1, **stamps)
    wire.snapshot(30, reason="resync")
    wire.gap(BOOK, 1, **stamps, join=True)
    wire.delta(31, 30)
    wire.restart()
    wire.gap(BOOK, 1, "restart", last_change_id=30)  # the last one before was killed with what it had not sent
    wire.snapshot(40)
    wire.delta(41, 40)
    wire.now += 6 * SECOND
    assert wire.found == []
    assert [what for what in find_at_end(wire) if BOOK in what] == []


def test_an_expired_channel_is_repeated_and_may_have_come_back_unseen(wire: Wire) -> None:
    wire.ticker()
    wire.status(TICKER, "expired")
    assert wire.ticker(join=True, receive_ts=wire.last_ts[TICKER]) == []
    wire.trade(1)
    wire.gap(TRADE, 1, missing_from=2, missing_to=2, healing=True)
    wire.status(TRADE, "expired")
    wire.say(TRADE, "repair", gap=1, repaired=0, missing=[[2, 2]])
    assert wire.found == []
    wire.seq[TICKER] += 1
    assert wire.ticker() == ["sequence"]
    wire.status(TICKER, "recovering", "disconnect")
    wire.seq[TICKER] += 1  # maybe its gap
    assert wire.ticker() == ["sequence"]
    wire.seq[TICKER] += 1
    assert wire.status(TICKER, "recovering", "disconnect") == ["sequence"]
    assert wire.ticker() == []
    wire.status(TICKER, "recovering", "disconnect")
    wire.restart()
    assert wire.ticker() == []
    wire.status(TICKER, "expired")
    wire.restart()
    assert wire.ticker() == [], "asked for again by a worker that knows nothing of the one before"
    wire.status(TICKER, "expired")
    assert wire.ticker() == ["status"]


def test_what_an_earlier_life_says_late_changes_nothing(wire: Wire) -> None:
    wire.trade(1)
    wire.trade(2)
    assert wire.trade(9, epoch=START - 1, seq=9) == ["epoch"]
    wire.seq[TRADE] = 2
    assert wire.trade(5) == ["hole"]


def find_at_end(wire: Wire) -> list[str]:
    return [f"{finding.rule} {finding.topic}" for finding in wire.verifier.finish(wire.now)]


def test_who_never_gives_a_heartbeat_is_named_at_the_end(wire: Wire) -> None:
    wire.verifier.expect("options", wire.now)
    wire.status(TICKER, "live")
    assert find_at_end(wire) == []
    wire.now += 4 * SECOND
    assert find_at_end(wire) == ["heartbeat deribit.heartbeat.options.1s", f"heartbeat {BEAT}"]


def test_heartbeats_are_owed_from_the_first_word_on_until_the_connection_itself_ends(wire: Wire) -> None:
    for _ in range(3):
        wire.status(TICKER, "live")
        wire.now += 2 * SECOND
    wire.status(TICKER, "closed", "unsubscribed")
    assert find_at_end(wire) == [f"heartbeat {BEAT}"]
    wire.say("deribit.status.futures.connection", state="failed", reason="", connection="futures")
    assert find_at_end(wire) == []


@pytest.mark.parametrize("state", ["closed", "failed"])
def test_whose_last_heartbeat_was_lost_owes_no_more_once_it_has_ended(wire: Wire, state: str) -> None:
    wire.say(BEAT, **LIVE)
    wire.say("deribit.status.futures.connection", state=state, reason="", connection="futures")
    wire.now += 60 * SECOND
    assert find_at_end(wire) == []


@pytest.mark.parametrize("state", ["closed", "failed"])
def test_who_is_closed_or_has_given_up_gives_no_more_heartbeats(wire: Wire, state: str) -> None:
    wire.say(BEAT, **LIVE)
    wire.say("deribit.status.futures.connection", state=state, reason="", connection="futures")
    wire.status(BOOK, "closed")
    wire.say(BEAT, **{**LIVE, "state": state})  # its last one
    wire.now += 60 * SECOND
    assert find_at_end(wire) == []
    wire.restart()
    assert wire.say(BEAT, **LIVE) == []
    wire.now += 4 * SECOND
    assert find_at_end(wire) == [f"heartbeat {BEAT}"]


@pytest.mark.parametrize("step", [5 * SECOND, 3600 * SECOND, -3600 * SECOND, -3 * 86_400 * SECOND])
def test_a_clock_that_is_set_breaks_no_rule(wire: Wire, step: int) -> None:
    def speak() -> None:
        wire.say(BEAT, **LIVE)
        wire.ticker(exchange_ts=wire.now)
        wire.status(TICKER, "live")

    speak()
    wire.set_by = step
    wire.ticker(receive_ts=wire.now)  # on its way when the clock was set
    speak()
    wire.gap(TICKER, 1, to_ts=wire.now + step, from_ts=wire.now + min(step, 0))
    speak()
    assert wire.found == []
    assert wire.ticker(receive_ts=wire.now + step - max(SECOND, -2 * step)) == ["time"]
    assert wire.ticker(receive_ts=wire.now + max(step, 0) + 60 * SECOND) == ["time"]
    wire.now += 4 * SECOND
    assert wire.say(BEAT, **LIVE) == ["heartbeat"]
    wire.now += 4 * SECOND
    assert find_at_end(wire) == [f"heartbeat {BEAT}"]


def test_who_reads_late_misses_no_heartbeats_at_the_end(wire: Wire) -> None:
    sent = wire.now
    wire.now += 10 * SECOND
    assert wire.say(BEAT, **LIVE, receive_ts=sent) == []
    wire.now += 10 * SECOND
    assert wire.say(BEAT, **LIVE, receive_ts=sent + SECOND) == []
    assert find_at_end(wire) == []


def test_a_restarted_worker_may_have_had_more_than_we_have_heard(wire: Wire) -> None:
    wire.ticker()
    wire.now += SECOND
    wire.restart()
    assert wire.gap(TICKER, 1, "restart", from_ts=wire.now) == []


def test_each_crossing_of_a_book_is_counted_once(wire: Wire) -> None:
    wire.snapshot(10)
    assert wire.delta(11, 10, bids=[[101.0, 1.0]]) == ["crossed"]
    assert wire.delta(12, 11, bids=[[98.0, 1.0]]) == []
    assert wire.delta(13, 12, bids=[[101.0, 0.0]]) == []
    assert wire.delta(14, 13, bids=[[101.0, 1.0]]) == ["crossed"]


def test_topics_that_somebody_invents_are_kept_up_to_a_number(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collector.client.verify.MAX_TOPICS", 2)
    wire.trade(1)
    wire.ticker()
    assert wire.found == []
    wire.snapshot(10)
    assert (wire.found, len(wire.verifier.topics)) == (["envelope"], 2)
    wire.trade(2)
    assert wire.found == ["envelope"]


def test_a_book_without_a_snapshot_is_named_at_the_end(wire: Wire) -> None:
    wire.seq[BOOK] = 7  # we joined late: it should have come for us
    wire.delta(8, 7)
    assert find_at_end(wire) == []
    wire.now += 6 * SECOND
    wire.delta(9, 8)
    assert wire.found == []
    assert find_at_end(wire) == [f"join {BOOK}"]
    wire.snapshot(9, join=True)
    assert find_at_end(wire) == []


SCENES = [
    break_book, break_book_more, break_trades, break_trades_more, break_envelope, break_rest, break_rest_more,
]  # fmt: skip


@pytest.mark.parametrize("scene", SCENES)
def test_each_broken_rule_is_named_alone(scene: Any, wire: Wire) -> None:
    broken = scene(wire)
    assert {what: rules for what, rules in broken.items() if rules != [what.split(":")[0]]} == {}


def test_scenes_break_every_rule(wire: Wire) -> None:
    named = {what.split(":")[0] for scene in SCENES for what in scene(Wire())}
    assert named == set(RULES)


def test_loss_on_the_way_does_not_accuse_book_trades_or_heartbeats(wire: Wire) -> None:
    wire.snapshot(10)
    wire.trade(1)
    wire.seq[BOOK] += 3
    wire.seq[TRADE] += 3
    wire.say(BEAT, **LIVE)
    wire.seq[BEAT] += 3
    wire.now += 4 * SECOND
    assert wire.say(BEAT, **LIVE) == ["sequence"]
    assert wire.delta(17, 16) == ["sequence"]
    wire.now += 6 * SECOND
    assert wire.delta(18, 17) == []
    assert [what for what in find_at_end(wire) if BOOK in what] == []
    assert wire.trade(6) == ["sequence"]
    assert wire.trade(7) == []
    wire.gap(TRADE, 1, missing_from=8, missing_to=9, healing=True)
    wire.seq[TRADE] += 2
    assert wire.say(TRADE, "repair", gap=1, repaired=2, missing=[]) == ["sequence"]
    assert wire.say(TRADE, "repair", gap=2, repaired=0, missing=[]) == []  # its gap may have been among them
    wire.ticker()
    wire.gap(TICKER, 1)
    wire.seq[TICKER] += 1  # the data between the two
    assert wire.gap(TICKER, 2) == ["sequence"]


@given(st.binary(max_size=200), st.binary(max_size=400))
def test_any_bytes_give_findings_and_never_an_exception(topic: bytes, payload: bytes) -> None:
    assert Verifier().check(topic, payload, now_ns=START)


WORDS = st.sampled_from(["type", "seq", "epoch", "kind", "bids", "change_id", "reason", "join", "state", "trade_seq"])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.lists(
        st.tuples(st.sampled_from(["snapshot", "delta", "trade", "gap"]), st.dictionaries(WORDS, VALUES)), max_size=6
    )
)
def test_any_values_in_known_keys_never_raise(messages: list[tuple[str, dict[str, Any]]]) -> None:
    wire = Wire()
    for what, keys in messages:
        match what:
            case "snapshot":
                wire.say(
                    BOOK, **{"kind": "snapshot", "change_id": 1, "bids": [], "asks": [], "reason": "resync", **keys}
                )
            case "delta":
                wire.say(BOOK, **{"kind": "delta", "change_id": 1, "bids": [[1.0, 2.0]], "asks": [], **keys})
            case "trade":
                wire.say(TRADE, **{"price": 1.0, "amount": 1.0, "side": "buy", "trade_id": "1", "trade_seq": 1, **keys})
            case "gap":
                wire.say(BOOK, **{"type": "gap", "id": 1, "reason": "restart", "from_ts": 0, "to_ts": 0, **keys})
    wire.verifier.finish(wire.now)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 6)), max_size=25), st.integers(0, 60), st.integers(0, 20))
def test_ranges_are_a_set(parts: list[tuple[int, int]], first: int, length: int) -> None:
    ranges, plain = Ranges(), set[int]()
    for start, count in parts:
        ranges.add(start, start + count)
        plain.update(range(start, start + count + 1))
    assert {number for number in range(-2, 80) if number in ranges} == plain
    assert len(vars(ranges)["_starts"]) == len(plain - {number + 1 for number in plain})  # as few as can be
    wanted = set(range(first, first + length + 1))
    missing = ranges.find_missing(first, first + length)
    assert {n for low, high in missing for n in range(low, high + 1)} == wanted - plain
