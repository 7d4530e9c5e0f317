"""An exchange that begins to count anew: it is recognised, announced, and what came of the new count is fetched."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from collector.channels import guess_kind, parse_channel
from collector.client.orderbook import OrderBook
from collector.client.stream import read_message
from collector.client.verify import Verifier
from tests.collected import collected
from tests.deribit_support import make_trade
from tests.exchange_client import get
from tests.faults.exchange import Line
from tests.faults.programs import Recorder, list_futures
from tests.pipeline import exchange, find_port
from tests.support import wait_until
from workers.deribit.feeds.book import BookFeed
from workers.deribit.feeds.frames import MS, TradeData
from workers.deribit.feeds.trades.feed import TradeFeed
from workers.deribit.feeds.trades.holes import Hole
from workers.deribit.feeds.trades.tape import Tape
from workers.deribit.healing.fetch import PAUSES, Ask, Healed, Page, heal_feed
from workers.deribit.publishing.ledger import BEGUN, FIRST, KNOWN, LAST_ID, LAST_TS, OUT, Ledger
from workers.deribit.publishing.payloads import Book, Gap, Repair, Trade
from workers.deribit.publishing.streams import Published, Topics

NAME = "BTC-PERPETUAL"
LINE = Line(f"trades.{NAME}.raw", (NAME,))
START = 1_790_000_000_000
"""ms."""


def trade_at(seq: int, at: int) -> dict[str, Any]:
    """A trade of the exchange, `at` ms after START."""
    return make_trade(seq, trade_id=f"{seq}-{at}", timestamp=START + at)


class Life:
    """One life of a trade feed; what it publishes is told in short. `asked` counts requests; a page holds `page`."""

    page = 1000

    def __init__(self, directory: Path, is_first: bool = True) -> None:
        self.ledger = Ledger(directory / "ledger", fresh=is_first)
        self.topics = Topics(1, self.ledger)
        self.feed = TradeFeed(parse_channel(LINE.channel), self.topics)
        self.topics.recall()
        self.feed.lose("restart", START)
        self.asked = 0

    @property
    def tape(self) -> Tape:
        """The one instrument's."""
        return self.feed.tapes[self.feed.stream.instrument]

    def take(self, *trades: tuple[int, int]) -> list[Any]:
        """A frame comes; return what is said of it."""
        return self._publish(self.feed.take(LINE.encode([trade_at(*each) for each in trades]), 7))

    def fetch(self, *trades: tuple[int, int]) -> list[Any]:
        """Fetched trades come; return what is said of them."""
        rows = msgspec.convert([trade_at(*each) for each in trades], list[TradeData])
        return self._publish(self.feed.backfill(rows, 7))

    def heal(self, *history: tuple[int, int]) -> list[Any]:
        """Fetch what is lacking from an exchange that has these trades; return what is said of it."""
        healing, page = heal_feed(self.feed, (START + 10_000) * MS, 0), None
        said: list[Any] = []
        with suppress(StopIteration):
            while True:
                step, page = healing.send(page), None
                if isinstance(step, Healed):
                    said += map(describe, step.tape.end_healing(step.holes, 7))
                else:
                    self.asked += 1
                    found = [each for each in history if fits(each, step.params)]
                    has_more, found = len(found) > self.page, found[: self.page]
                    said += self.fetch(*found)
                    page = Page(msgspec.convert([trade_at(*each) for each in found], list[TradeData]), has_more)
        return said

    def end(self) -> list[Any]:
        """The channel is given up in the midst of its healing; return what is said of it."""
        return [describe(message) for _, message in self.feed.end(True, 7)]

    def take_up_again(self) -> None:
        """The channel is closed, and asked for and confirmed once more."""
        for stream in self.feed.streams.values():
            self.topics.leave(stream, 8)
        self.feed = TradeFeed(self.feed.channel, self.topics)
        self.feed.losses.confirmed_at = 8

    def _publish(self, published: Published) -> list[Any]:
        """What the publisher does, without its socket."""
        said = []
        for stream, message in published:
            if stream.lost and not isinstance(message, Gap):
                said += [describe(gap)] if (gap := stream.resume(message, 7)) else []
            if isinstance(message, Trade):
                self.ledger.cells[stream.slot + LAST_TS] = stream.last_ts = 7
                self.ledger.cells[stream.slot + LAST_ID] = message.trade_seq
            said.append(describe(message))
        return said


def fits(trade: tuple[int, int], params: dict[str, Any]) -> bool:
    """Whether a request asks for a trade."""
    seq, at = trade
    numbers: bool = params.get("start_seq", 0) <= seq <= params.get("end_seq", seq)
    times: bool = params.get("start_timestamp", 0) <= START + at <= params.get("end_timestamp", START + at)
    return numbers and times


def describe(message: Any) -> Any:
    """A trade: its number, negative if it is marked; a gap: reason and what is missing; a repair: the latter."""
    if isinstance(message, Trade):
        return -message.trade_seq if message.backfilled is True else message.trade_seq
    if isinstance(message, Gap):
        numbers = [each for each in (message.missing_from, message.missing_to) if each is not msgspec.UNSET]
        return (message.reason, *numbers)
    assert isinstance(message, Repair)
    return message.missing


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    life = Life(tmp_path)
    assert life.take((101, 0), (102, 10), (103, 20)) == [101, 102, 103]
    yield life
    life.ledger.close()


def test_what_a_new_count_leaves_missing_is_counted_as_its_repair_says(life: Life) -> None:
    assert life.take((107, 60)) == [("sequence", 104, 106), 107]
    assert life.fetch((105, 40)) == [-105]
    assert life.take((5, 1_000)) == [[(104, 104), (106, 106)], ("sequence",), 5]
    assert (life.topics.repaired, life.topics.missing) == (1, 2)


def test_a_topic_left_and_taken_up_again_does_not_say_a_trade_twice(life: Life) -> None:
    life.take_up_again()
    life.feed.lose("disconnect", 9)
    # A fetch by time begins a little before the loss, so among what was said before the topic was left.
    assert life.fetch((102, 10), (103, 20), (104, 30), (105, 40)) == [-104, -105]
    assert life.take((105, 40), (106, 50)) == [106]


def test_nor_if_the_next_trade_comes_before_the_fetched_ones(life: Life) -> None:
    life.take_up_again()
    life.feed.lose("disconnect", 9)
    assert life.take((106, 50)) == [106]
    assert life.fetch((102, 10), (103, 20), (104, 30), (105, 40)) == [-104, -105]


def test_what_is_newer_is_fetched_where_another_channel_that_fed_the_topic_was_given_up(life: Life) -> None:
    """An exchange may send an instrument on a channel that is not its own: the topic is left with that channel."""
    assert life.take((107, 60)) == [("sequence", 104, 106), 107]
    life.topics.leave(life.feed.stream, 8)
    assert life.fetch((105, 40), (108, 70), (109, 80)) == [-108, -109]


@pytest.mark.parametrize(("traded", "said"), [([(104, 30)], [104]), ([(106, 30)], [("disconnect", 104, 105), 106])])
def test_after_a_loss_of_which_nothing_was_answered_what_follows_the_last_trade_before_it_was_left_is_told(
    life: Life, traded: list[tuple[int, int]], said: list[Any]
) -> None:
    life.take_up_again()
    life.feed.lose("disconnect", 8)
    for _ in heal_feed(life.feed, (START + 10_000) * MS, 0):
        pass  # no answer to any request
    assert life.take(*traded) == said


def test_a_hole_behind_the_first_trade_of_a_topic_is_told_also_within_one_frame(life: Life) -> None:
    life.take_up_again()
    assert life.take((104, 30), (107, 40)) == [104, ("sequence", 105, 106), 107]


def test_a_topic_taken_up_again_on_an_exchange_that_counts_anew_says_all(life: Life) -> None:
    life.take_up_again()
    assert life.take((5, 1000)) == [5]
    life.feed.lose("disconnect", 9)
    assert life.take((7, 1010)) == [("disconnect", 6, 6), 7]
    assert life.fetch((5, 1000), (6, 1005), (7, 1010)) == [-6]


def test_and_what_it_lacks_of_the_new_count_is_fetched(life: Life) -> None:
    life.take_up_again()
    life.feed.lose("disconnect", 9)
    assert life.take((3, 1000)) == [3]
    assert life.heal((1, 900), (2, 950), (3, 1000)) == [-1, -2]


def test_a_number_that_was_given_before_on_a_newer_trade_begins_a_new_count(life: Life) -> None:
    assert life.take((5, 1000), (6, 1000)) == [("sequence",), 5, 6]
    assert life.take((7, 1001)) == [7]
    assert life.take((9, 1200)) == [("sequence", 8, 8), 9]


def test_it_is_one_gap_with_that_of_a_lost_connection(life: Life) -> None:
    life.feed.lose("disconnect", 8)
    assert life.take((5, 1000)) == [("sequence",), 5]


def test_what_a_healing_was_to_bring_is_named_before_it(life: Life) -> None:
    assert life.take((106, 30)) == [("sequence", 104, 105), 106]
    assert life.fetch((104, 25)) == [-104]
    assert life.take((1, 1000)) == [[(105, 105)], ("sequence",), 1]


def test_the_gap_of_a_loss_stands_before_what_one_page_holds_of_both_counts(life: Life) -> None:
    life.feed.lose("disconnect", 8)
    said = life.fetch((104, 30), (105, 40), (1, 1000), (2, 1010))
    assert said == [("disconnect", 104), -104, -105, [], ("sequence",), -1, -2]


def test_what_came_before_the_first_trade_of_the_new_count_is_asked_for_by_time(life: Life) -> None:
    life.take((5, 1000))
    assert life.feed.losses.lost_from is not None
    assert life.fetch((3, 980), (4, 990), (5, 1000)) == [-3, -4]


def test_fetched_trades_show_it_as_well(life: Life) -> None:
    life.feed.lose("disconnect", 8)
    assert life.fetch((101, 1000), (102, 1010)) == [("sequence",), -101, -102]
    assert life.take((103, 1020)) == [103]


def test_a_new_count_that_had_passed_the_old_one_is_found_by_the_trade_before_the_hole(life: Life) -> None:
    """After a long time away the next trade seems to show a hole, or none at all."""
    life.feed.lose("disconnect", 8)
    assert life.take((110, 5000)) == [("disconnect", 104, 109), 110]
    assert life.fetch((103, 4000), (104, 4100)) == [("sequence",), -103, -104]
    assert life.fetch((1, 1000), (2, 1010)) == [-1, -2]


def test_and_what_it_lacks_is_fetched_but_what_came_between_two_holes_is_not_said_again(life: Life) -> None:
    life.feed.lose("disconnect", 8)
    assert life.take((106, 5000), (109, 5100)) == [("disconnect", 104, 105), 106, ("sequence", 107, 108), 109]
    fetched = [(1, 3000), (2, 3010), (103, 4800), (104, 4900), (105, 4950), (107, 5050), (108, 5060)]
    history = sorted([*fetched, (106, 5000), (109, 5100)])
    said = [*life.heal(*history), *life.heal(*history)]
    assert sorted(-each for each in said if isinstance(each, int)) == [seq for seq, _ in fetched]


def test_also_if_nothing_seems_to_be_missing(life: Life) -> None:
    life.feed.lose("disconnect", 8)
    assert life.take((104, 5000)) == [("disconnect",), 104]
    assert life.tape.find_missing(tails=True) == (104, 103)  # which asks for the one before
    assert life.fetch((103, 4000)) == [("sequence",), -103]


def test_also_if_what_seems_to_be_missing_comes_by_itself(life: Life) -> None:
    life.feed.lose("disconnect", 8)
    assert life.take((106, 5000)) == [("disconnect", 104, 105), 106]
    assert life.take((104, 4900), (105, 4950)) == [-104, -105]
    assert life.heal((103, 4800), (104, 4900), (105, 4950), (106, 5000))[:2] == [("sequence",), -103]


def test_also_by_a_trade_that_comes_late(life: Life) -> None:
    life.feed.lose("disconnect", 8)
    assert life.take((106, 5000), (103, 4800)) == [("disconnect", 104, 105), 106, ("sequence",), -103]


def test_also_if_no_trade_comes_and_the_new_numbers_are_not_above_the_old(life: Life) -> None:
    life.feed.losses.confirmed_at = 8
    life.feed.lose("disconnect", 8)
    assert life.heal((1, 1000), (2, 1010)) == [("sequence",), -1, -2]
    assert life.heal((1, 1000), (2, 1010), (3, 1020)) == [-3]
    assert life.take((4, 1030)) == [4]


def test_a_quiet_topic_is_asked_for_by_number_alone_while_the_exchange_has_its_last_trade(life: Life) -> None:
    life.feed.losses.confirmed_at = 8
    life.feed.lose("disconnect", 8)
    assert life.heal((101, 0), (102, 10), (103, 20)) == []
    assert life.take((104, 30)) == [("disconnect",), 104]
    assert life.heal((103, 20), (104, 30)) == []
    assert life.asked == len(PAUSES)


def test_a_doubt_is_ended_by_one_request_while_the_exchange_has_the_trade_before_the_loss(life: Life) -> None:
    life.feed.losses.confirmed_at = 8
    life.feed.lose("disconnect", 8)
    assert life.take((104, 30)) == [("disconnect",), 104]
    assert life.heal((103, 20), (104, 30)) == []
    assert life.asked == 1


@pytest.mark.parametrize("name", ["null", "-1", "[]", f'"{NAME}"', '"ETH-PERPETUAL"', None])
def test_what_an_unreadable_frame_held_is_fetched_also_where_it_names_no_instrument(
    life: Life, name: str | None
) -> None:
    frame = LINE.encode([trade_at(104, 30) | {"price": None}])
    key = f'"instrument_name":"{NAME}"'
    life.feed.skip(frame.replace(key.encode(), (f'"instrument_name":{name}' if name else '"is":1').encode()), 8)
    assert life.feed.changed, "it is healed though nothing comes after it"
    assert life.heal((103, 20), (104, 30)) == [("sequence", 104), -104, []]


def test_an_unreadable_frame_has_a_gap_of_its_own_while_a_quiet_topic_is_healed(life: Life) -> None:
    life.feed.lose("disconnect", 8)
    assert life.fetch((104, 30)) == [("disconnect", 104), -104]
    life.feed.skip(b"no frame", 9)
    assert life.take((106, 50)) == [("sequence", 105, 105), 106]
    assert life.heal((103, 20), (104, 30), (105, 40)) == [-105, [], []]


def test_a_fetched_trade_of_another_instrument_is_dropped_and_counted(life: Life) -> None:
    life.feed.lose("disconnect", 8)
    rows = [trade_at(104, 30) | {"instrument_name": "ETH-PERPETUAL"}, trade_at(104, 30)]
    published = life.feed.backfill(msgspec.convert(rows, list[TradeData]), 7)
    assert [describe(said) for _, said in published] == [("disconnect", 104), -104]
    assert life.feed.dropped == 1


def test_what_no_page_holds_is_fetched_page_by_page_by_number(life: Life) -> None:
    life.page = 10
    history = [(seq, seq - 83) for seq in range(103, 150)]
    life.feed.lose("disconnect", 8)
    assert life.take((140, 57)) == [("disconnect", 104, 139), 140]
    assert life.heal(*history) == [*range(-104, -140, -1), []]
    assert life.asked == 4  # 103 to 139


def test_but_no_more_of_it_than_is_kept(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.deribit.feeds.trades.holes.MAX_HELD", 10)
    life.page = 10
    history = [(seq, seq - 83) for seq in range(103, 150)]
    assert life.take((140, 57)) == [("sequence", 104, 139), 140]
    assert life.heal(*history) == [*range(-104, -114, -1), [(114, 139)]]
    assert life.asked == 4


def test_and_by_time_where_a_page_may_end_within_a_millisecond(life: Life) -> None:
    life.page = 10
    history = [(seq, 1000 + seq // 4) for seq in range(1, 50)]
    life.feed.lose("disconnect", 8)
    assert life.take((50, 2000)) == [("sequence",), 50]
    assert life.heal(*history, (50, 2000)) == [*range(-1, -50, -1)]


def test_and_a_page_that_leads_nowhere_does_not_hold_it_up(life: Life) -> None:
    life.page = 10
    history = [*((seq, 1000) for seq in range(1, 20)), *((seq, 1500) for seq in range(20, 25))]
    life.feed.lose("disconnect", 8)
    assert life.take((25, 2000)) == [("sequence",), 25]
    by_time, by_number = [*range(-1, -11, -1), *range(-20, -25, -1)], [*range(-11, -20, -1)]
    assert life.heal(*history, (25, 2000)) == by_time + by_number


def test_nor_does_an_exchange_that_tells_no_times(life: Life) -> None:
    life.feed.losses.confirmed_at = 8
    life.feed.lose("disconnect", 8)
    assert life.take((5, 1000)) == [("sequence",), 5]  # so that it is asked by time
    healing, page, asked = heal_feed(life.feed, (START + 10_000) * MS, 0), None, 0
    with suppress(StopIteration):
        while asked < 100:
            asked += isinstance(healing.send(page), Ask)
            page = Page(msgspec.convert([trade_at(3, -START)], list[TradeData]), True)
    assert 1 < asked < 100


def test_what_was_lost_last_is_told_after_what_an_earlier_loss_had_left_open(life: Life) -> None:
    """Of trades before the first one no gap has told: theirs comes with the repair, and two gaps may not meet."""
    life.take_up_again()
    life.feed.skip(b"no frame", 9)
    assert life.take((106, 50)) == [106]
    life.feed.skip(b"no frame", 9)
    assert life.end() == [("disconnect", 104, 105), [(104, 105)], ("sequence", 107)]


@pytest.mark.parametrize("is_healing", [True, False])
def test_a_loss_is_told_at_the_end_unless_all_of_it_has_been_asked_for(life: Life, is_healing: bool) -> None:
    life.feed.lose("disconnect", 8)
    assert life.fetch((103, 20)) == []
    assert [describe(said) for _, said in life.feed.end(is_healing, 7)] == [("disconnect", 104)] * is_healing


def test_what_may_have_come_after_all_that_was_fetched_is_told_for_what_was_lost(life: Life) -> None:
    life.feed.lose("restart", 8)
    assert life.fetch((104, 30)) == [("restart", 104), -104]
    assert life.end() == [[], ("restart", 105)]


def test_also_where_a_new_count_was_found_after_it(life: Life) -> None:
    life.feed.losses.confirmed_at = 8
    life.feed.lose("disconnect", 8)
    assert life.take((104, 5000)) == [("disconnect",), 104]
    life.feed.lose("disconnect", 9)
    assert life.fetch((103, 4000)) == [("sequence",), -103, ("disconnect", 105)]
    assert life.end() == [[], ("disconnect", 1, 102), [(1, 102)], ("disconnect", 105)]


def test_a_loss_after_a_gap_that_nothing_has_followed_is_told_by_that_gap(life: Life) -> None:
    """Fetched trades show the new count, and with it the gap that was due, before anything new has come."""
    life.feed.losses.confirmed_at = 8
    life.feed.lose("disconnect", 8)
    assert life.take((104, 5000)) == [("disconnect",), 104]
    life.feed.lose("disconnect", 9)
    assert life.fetch((103, 4000)) == [("sequence",), -103, ("disconnect", 105)]
    life.feed.lose("disconnect", 10)
    assert life.take((107, 6000)) == [107]
    said = life.heal((103, 4000), (104, 5000), (105, 5500), (106, 5600), (107, 6000))
    assert said[:3] == [-105, -106, []]


@pytest.mark.parametrize("is_killed", [False, True])
def test_each_loss_that_one_gap_tells_of_may_hide_a_new_count(life: Life, tmp_path: Path, is_killed: bool) -> None:
    """After the first it was seen that the exchange still counted on; in the second one it was reset."""
    assert life.take((107, 60)) == [("sequence", 104, 106), 107]
    life.feed.lose("disconnect", 8)
    assert life.fetch((103, 20), (105, 40), (107, 60)) == [("disconnect", 108), -105]
    life.tape.note_out()
    life.feed.lose("disconnect", 9)
    assert life.take((111, 6000)) == [111]
    if is_killed:
        later = Life(tmp_path, is_first=False)
        assert later.fetch((107, 5500)) == [("restart",), -107]
        later.ledger.close()
    else:
        assert life.fetch((107, 5500)) == [[(104, 104), (106, 106)], ("sequence",), -107]


def test_a_loss_after_a_new_count_was_told_has_a_gap_of_its_own(life: Life) -> None:
    """The one that was said before tells of numbers of the old count."""
    assert life.take((107, 60)) == [("sequence", 104, 106), 107]
    life.feed.lose("disconnect", 8)
    assert life.take((108, 5000)) == [("disconnect",), 108]
    life.feed.lose("disconnect", 9)
    assert life.fetch((105, 40)) == [("disconnect", 109), -105]
    assert life.fetch((106, 4500)) == [[(104, 104), (106, 106)], ("sequence",), -106]
    life.feed.lose("disconnect", 10)
    assert life.take((111, 9000)) == [("disconnect", 109, 110), 111]


def test_repeated_swapped_and_fetched_trades_of_the_same_count_are_none(life: Life) -> None:
    assert life.take((102, 10), (103, 20)) == []
    assert life.take((106, 30), (105, 29), (107, 31)) == [("sequence", 104, 105), 106, -105, 107]
    assert life.fetch((101, 0), (102, 10), (103, 20), (104, 28), (105, 29), (106, 30)) == [-104]
    life.feed.lose("disconnect", 8)
    assert life.fetch((107, 31), (108, 90), (109, 95)) == [("disconnect", 108), -108, -109]
    assert life.take((108, 90)) == []
    assert life.take((109, 95), (110, 99)) == [110]
    assert life.feed.duplicates == 4


def test_times_that_fall_a_little_are_none(life: Life) -> None:
    assert life.take((104, 15), (104, 15), (103, 40)) == [104]


def test_the_last_gap_is_what_late_subscribers_are_told_also_if_an_earlier_one_is_healed_after_it(life: Life) -> None:
    life.feed.lose("disconnect", 8)
    assert life.take((105, 40)) == [("disconnect", 104, 104), 105]
    life.feed.lose("disconnect", 9)
    assert life.take((106, 50)) == [("disconnect",), 106]
    last = life.feed.stream.gap
    assert life.heal((104, 30), (105, 40))[-2:] == [-104, []]
    assert life.feed.stream.gap is last


def test_the_gap_of_a_loss_stands_before_a_trade_that_comes_late_in_the_first_frame_after_it(life: Life) -> None:
    assert life.take((106, 50)) == [("sequence", 104, 105), 106]
    life.feed.lose("disconnect", 8)
    assert life.take((105, 40), (109, 80)) == [("disconnect", 107), -105, 109]
    assert life.heal((104, 30), (105, 40), (106, 50), (107, 60), (108, 70), (109, 80)) == [-104, -107, -108, [], []]


def test_a_later_life_knows_the_last_number_of_the_earlier_one(life: Life, tmp_path: Path) -> None:
    later = Life(tmp_path, is_first=False)
    assert later.fetch((101, 0), (102, 10), (103, 20), (104, 25)) == [("restart", 101), -101, -102, -103, -104]
    later.ledger.close()
    anew = Life(tmp_path, is_first=False)
    assert anew.take((102, 3000), (103, 3010)) == [("restart",), 102, 103]
    anew.ledger.close()


def test_a_later_life_tells_it_again_if_that_may_not_be_out(life: Life, tmp_path: Path) -> None:
    life.take((5, 1000))
    later = Life(tmp_path, is_first=False)
    assert later.fetch((5, 1000), (6, 1010)) == [("restart",), -5, -6]
    later.ledger.close()


@pytest.mark.parametrize("is_live", [False, True])
def test_lives_that_are_killed_one_after_the_other_amid_a_new_count_do_not_end_the_last(
    life: Life, tmp_path: Path, is_live: bool
) -> None:
    """What they know is that any number may be given again."""
    assert life.take((5001, 40)) == [("sequence", 104, 5000), 5001]
    assert life.take((2501, 3110)) == [[(104, 5000)], ("sequence",), 2501]
    for _ in range(2):
        life = Life(tmp_path, is_first=False)
        assert life.fetch((5001, 40)) == [("restart", 2402), -5001]
        life.ledger.close()
    for _ in range(2):
        last = Life(tmp_path, is_first=False)
        if is_live:
            assert last.take((2502, 9000)) == [("restart",), 2502]
        else:
            assert -2501 in last.heal((5001, 40), (2501, 3110))
        last.ledger.close()


def test_a_doubt_that_ends_says_nothing_of_what_came_first(life: Life) -> None:
    cells, place = life.ledger.cells, life.tape.stream.slot + FIRST
    assert life.take((5, 1_000)) == [("sequence",), 5]
    assert cells[place] == 0
    life.tape.holes = [Hole(None, 104, 103, (103, START + 20))]
    assert life.tape.end_healing(life.tape.holes, 7) == []
    assert cells[place] == 0


@pytest.mark.parametrize(("is_out", "first"), [(False, 104), (True, 300)])
def test_a_later_life_fetches_again_what_a_healing_brought_unless_that_is_out(
    life: Life, tmp_path: Path, is_out: bool, first: int
) -> None:
    history = [(seq, 10 * (seq - 101)) for seq in range(103, 399)]
    life.feed.lose("disconnect", 8)
    assert life.take(*history[10:]) == [("disconnect", 104, 112), *range(113, 399)]
    assert life.heal(*history)[-1] == []
    assert life.take((399, 2980)) == [399]
    if is_out:
        life.tape.note_out()
    later = Life(tmp_path, is_first=False)
    assert later.take((400, 2990)) == [("restart", first, 399), 400]
    later.ledger.close()


def test_what_an_earlier_life_said_is_marked_also_where_the_exchange_itself_sends_it(
    life: Life, tmp_path: Path
) -> None:
    """It had been fetched before the frame came that holds it: on some channels that takes a second or two."""
    later = Life(tmp_path, is_first=False)
    assert later.take((102, 10), (103, 20)) == [("restart", 101), -102, -103]
    assert later.heal((101, 0), (102, 10), (103, 20)) == [-101, []]
    assert later.take((104, 30)) == [104]
    later.ledger.close()


def test_of_more_than_is_kept_track_of_what_comes_too_is_not_taken_for_the_last_that_came(
    life: Life, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nothing would tell of what lies between."""
    monkeypatch.setattr("workers.deribit.feeds.trades.holes.MAX_HELD", 1)
    later = Life(tmp_path, is_first=False)
    assert later.fetch((101, 0)) == [("restart", 101), -101]
    assert later.take((103, 20)) == []
    assert later.heal() == [[]]
    assert later.take((104, 30)) == [("sequence", 102, 103), 104]
    later.ledger.close()


def test_but_not_once_it_has_been_told_that_no_more_of_it_is_to_be_had(life: Life, tmp_path: Path) -> None:
    later = Life(tmp_path, is_first=False)
    assert later.heal((101, 0)) == [("restart", 101), -101, []]
    assert later.take((103, 20)) == [("sequence", 102, 102), 103]
    later.ledger.close()


def test_what_could_not_be_said_again_is_left_to_the_life_after_the_next(life: Life, tmp_path: Path) -> None:
    """The exchange does not have it now; and all else is out for long enough."""
    later = Life(tmp_path, is_first=False)
    assert later.heal() == []
    later.tape.note_out()
    later.ledger.cells[OUT] = START * MS
    later.ledger.close()
    last = Life(tmp_path, is_first=False)
    assert last.take((104, 30)) == [("restart", 101, 103), 104]
    last.ledger.close()


def test_a_later_life_goes_on_with_the_latest_doubt_and_not_with_one_that_is_over(life: Life, tmp_path: Path) -> None:
    life.feed.lose("disconnect", 8)
    assert life.fetch((103, 20), (104, 30)) == [("disconnect", 104), -104]
    later = Life(tmp_path, is_first=False)
    assert later.take((108, 3000)) == [("restart", 101, 107), 108]
    later.ledger.close()
    last = Life(tmp_path, is_first=False)  # the one before was killed before it had asked for what is missing
    assert last.fetch((104, 2600)) == [("restart",), -104]
    last.ledger.close()


@pytest.mark.parametrize("loss", [0, 1, 2, 3])
def test_a_later_life_goes_on_with_each_doubt_of_several(life: Life, tmp_path: Path, loss: int) -> None:
    """The exchange counted anew in one of the losses, from the last number before it on; what came after that is of the
    new count.
    """
    came = [(104, 5000), (105, 6000), (106, 7000), (107, 8000)]
    for number, at in came:
        life.feed.lose("disconnect", 8)
        assert life.take((number, at)) == [("disconnect",), number]
    later = Life(tmp_path, is_first=False)
    began = 103 + loss
    said = later.fetch((began, 4500 + 1000 * loss), *came[loss:])
    assert said == [("restart",), *range(-began, -108, -1)]
    later.ledger.close()


def test_of_more_doubts_than_there_is_room_for_a_later_life_has_the_oldest(life: Life) -> None:
    for number in range(104, 109):
        life.feed.lose("disconnect", 8)
        assert life.take((number, 1000 * number)) == [("disconnect",), number]
    words = [life.ledger.cells[life.tape.stream.slot + cell] for cell in (*KNOWN, BEGUN)]
    assert words[::2] == [103, 104, 105, 106, 0]
    assert [hole.known[1] for hole in life.tape.holes[:4]] == words[1::2]
    life.tape.end_healing(life.tape.holes[1:], 7)
    life.tape.note_doubt()
    assert [life.ledger.cells[life.tape.stream.slot + cell] for cell in KNOWN] == [*words[:2], 0, 0, 0, 0, 0, 0]


def test_a_later_life_goes_on_with_a_doubt_also_where_an_earlier_one_is_over(life: Life, tmp_path: Path) -> None:
    """The exchange counted anew in the second loss."""
    life.feed.lose("disconnect", 8)
    assert life.take((104, 5000)) == [("disconnect",), 104]
    assert life.fetch((103, 20)) == []
    life.feed.lose("disconnect", 8)
    assert life.take((105, 6000)) == [("disconnect",), 105]
    later = Life(tmp_path, is_first=False)
    assert later.fetch((104, 5500), (105, 6000)) == [("restart",), -104, -105]
    later.ledger.close()


def test_a_later_life_goes_on_with_the_new_count_once_it_is_out(life: Life, tmp_path: Path) -> None:
    life.take(*((seq, 1000 + seq) for seq in range(5, 200)))
    later = Life(tmp_path, is_first=False)
    repeated = [(seq, 1000 + seq) for seq in range(100, 200)]
    assert later.fetch(*repeated) == [("restart", 100), *(-seq for seq, _ in repeated)]
    later.ledger.close()


def test_a_book_whose_change_ids_fall_goes_on_with_its_next_snapshot(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger", fresh=True)
    book = BookFeed(parse_channel(f"book.{NAME}.raw"), Topics(1, ledger))
    line = Line(book.channel.name, (NAME,))

    def take(kind: str, change_id: int, before: int | None = None) -> list[Any]:
        data = {"type": kind, "change_id": change_id, "prev_change_id": before, "bids": [], "asks": [], "timestamp": 1}
        said: list[Any] = []
        for stream, message in book.take(line.encode(data), 7):
            gap = stream.resume(message, 7) if stream.lost and not isinstance(message, Gap) else None
            stream.last_ts = 7
            said += [(each.last_change_id, each.next_change_id) for each in (gap, message) if isinstance(each, Gap)]
            said += [message.change_id] if isinstance(message, Book) else []
        return said

    assert [take("snapshot", 9000), take("change", 9001, 9000)] == [[9000], [9001]]
    book.lose("disconnect", 8)
    assert [take("snapshot", 10), take("change", 11, 10)] == [[(9001, 10), 10], [11]]
    assert [take("change", 6, 5), take("change", 7, 6)] == [[(11, 6)], []]
    assert [take("snapshot", 3), take("change", 4, 3)] == [[3], [4]]
    ledger.close()


# -- whole programs ---------------------------------------------------------------------------------------------------


def read_trades(recorder: Recorder, since: int) -> Counter[tuple[str, int, str]]:
    """Instrument, trade_seq and trade_id of all trades on the exchange since then (ns), as published so far."""
    messages = [read_message(each.topic, each.payload) for each in list(recorder.records["w"])]
    trades = [each for each in messages if each.type == "trade" and each.exchange_ts > since]
    return Counter((each.instrument, each["trade_seq"], each["trade_id"]) for each in trades)


def read_oracle(path: Path, future: str) -> Counter[tuple[str, int, str]]:
    """The trades that there were."""
    events = [json.loads(line) for line in path.read_bytes().splitlines()]
    trades = [each for each in events if each["event"] == "trade"]
    return Counter(
        (each["instrument_name"], each["trade_seq"], str(each["trade_id"])) for each in trades
        if each["instrument_name"] == future or guess_kind(each["instrument_name"]) == "option"
    )  # fmt: skip


def check_topics(recorder: Recorder, since: int) -> int:
    """A fall of trade_seq stands behind a gap that says nothing of numbers. Returns how many there were."""
    falls, last, anew = 0, dict[str, int](), set[str]()
    for each in recorder.records["w"]:
        message = read_message(each.topic, each.payload)
        if message.type == "gap" and "missing_from" not in message:
            anew.add(message.instrument)
        if message.type == "trade" and (message.exchange_ts > since) and message.instrument in last:
            assert message["trade_seq"] > last[message.instrument] or message.instrument in anew
            falls += message["trade_seq"] <= last.pop(message.instrument)
        elif message.type == "trade" and message.exchange_ts <= since:
            last[message.instrument] = max(message["trade_seq"], last.get(message.instrument, 0))
    return falls


def check_anew(url: str, oracle: Path, recorder: Recorder, future: str, since: int) -> None:
    """All trades of the new market have come, once, and nothing that was said is wrong."""
    wait_until(lambda: len(read_trades(recorder, since)) > 200, "trades of the new market")
    assert get(url, "practice/freeze")[0] == 200
    wait_until(lambda: read_trades(recorder, since) == read_oracle(oracle, future), "all trades of the new market")
    assert check_topics(recorder, since) > 3
    verifier, book = Verifier(), OrderBook()
    for each in list(recorder.records["w"]):
        assert verifier.check(each.topic, each.payload, now_ns=each.at) == []
        book.apply(read_message(each.topic, each.payload))
    assert book.in_sync


@pytest.mark.parametrize("patience", [1000, 1])
def test_a_practice_exchange_that_is_killed_and_started_anew_counts_anew(tmp_path: Path, patience: int) -> None:
    """Its market starts again; and so does the worker, where it has no patience."""
    port = find_port()
    url = f"ws://127.0.0.1:{port}/ws/api/v2"
    with exchange(port, "--rate", "1500") as old:
        future = list_futures(url, "BTC")[-1]  # a new market begins these, and options, with the same number again
        channels = [f"trades.{future}.100ms", f"book.{future}.100ms", "trades.option.any.100ms"]
        table = {"url": url, "channels": channels, "retry_count": patience, "retry_delay": 0.05}
        with (
            collected({"w": table}, exchange=None) as run,
            closing(Recorder({"w": run.wait_state("w")["publish"]})) as recorder,
        ):
            wait_until(lambda: len(read_trades(recorder, 0)) > 100, "trades of the old market")
            old.process.kill()
            old.wait_exit()
            since = time.time_ns()
            with exchange(port, "--rate", "1500", "--oracle", str(tmp_path / "oracle")):
                check_anew(url, tmp_path / "oracle", recorder, future, since)
                assert (run.get_state("w")["restarts"] > 0) == (patience == 1)
