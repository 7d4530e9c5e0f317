"""Loss is told in the stream, in order, and made good where it can be: gaps, resyncs, healed trades, restarts."""

import asyncio
import logging
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from collector.channels import parse_channel
from collector.lifecycle import Exit
from collector.limits import Credits
from tests.collected import collected
from tests.deribit_support import (
    BOOK,
    LOGIN,
    QUOTE,
    TICKER,
    TRADES,
    Collecting,
    Hearer,
    answer_nothing,
    collecting,
    encode_data,
    make_trade,
    run_healing,
    scripted,
    wait_for,
)
from tests.exchange_client import exchange
from tests.faults.exchange import Line
from tests.faults.life import Healer, Life
from tests.pipeline import Subscriber, short_directory, subscribed
from tests.support import in_loop
from workers.deribit.feeds.book import BookFeed
from workers.deribit.feeds.feed import Feed
from workers.deribit.feeds.frames import MS, TradeData
from workers.deribit.feeds.rhythm import SECOND
from workers.deribit.feeds.trades.feed import TradeFeed
from workers.deribit.healing.fetch import CURRENCIES, PAUSES, Ask, Page, heal_feed, heal_known
from workers.deribit.healing.heal import PATIENCE, read_page
from workers.deribit.publishing.ledger import HEARD, LAST_TS, OUT, UNHEALED
from workers.deribit.publishing.payloads import Gap, Repair, Trade
from workers.deribit.publishing.streams import SURE, Topics
from workers.deribit.watching.patrol import REFILL, RESYNCS
from workers.deribit.watching.statuses import UNSUBSCRIBED

TOPICS = {
    "deribit.book.BTC-PERPETUAL.100ms": BOOK,
    "deribit.trade.BTC-PERPETUAL.100ms": TRADES,
    "deribit.quote.BTC-PERPETUAL.raw": QUOTE,
    "deribit.ticker.BTC-PERPETUAL.100ms": TICKER,
}
START = 1_790_000_000_000_000_000
"""ns."""
BOOKS, TRADED = list(TOPICS)[:2]
OWN = ("gap", "repair", "status")


def list_data(hearer: Hearer, topic: str) -> list[dict[str, Any]]:
    """What the exchange's frames gave on a topic, without our own messages."""
    return [body for body in hearer.find(topic) if body["type"] not in OWN]


async def hear_more(run: Collecting, topics: Iterable[str], more: int = 2) -> None:
    """Hear some more data on each topic."""
    run.hearer.drain()
    wanted = {topic: len(list_data(run.hearer, topic)) + more for topic in topics}
    await run.hearer.hear(
        lambda: all(len(list_data(run.hearer, topic)) >= count for topic, count in wanted.items()), f"data on {wanted}"
    )


async def lose_trades(run: Collecting, topic: str) -> dict[str, Any]:
    """Lose connections until trades are missing that are to be fetched; return their gap."""
    gap: dict[str, Any] = {}
    while not gap.get("healing"):  # it was back before the next trade otherwise
        await hear_more(run, [topic])
        run.worker.client.cut("the test wants it so")
        gap = (await run.hearer.hear_of(topic, len(run.hearer.find(topic, type="gap")) + 1, type="gap"))[-1]
    return gap


def is_confirmed(feed: Feed) -> bool:
    """Whether the exchange gives this channel of trades."""
    return isinstance(feed, TradeFeed) and bool(feed.losses.confirmed_at)


# -- lost connections -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["drop:2", "reset:2", "close:1001@2"])
@in_loop
async def test_a_lost_connection_is_one_gap_on_each_topic_before_its_new_data(practice: str, fault: str) -> None:
    async with collecting(practice, f"{fault},first:1", *TOPICS.values(), "quote.NOPE") as run:
        for topic in TOPICS:
            await run.hearer.hear_of(topic, type="gap")
        await hear_more(run, TOPICS)
        for topic in TOPICS:
            bodies = run.hearer.find(topic)
            (gap,) = [body for body in bodies if body["type"] == "gap"]
            place = bodies.index(gap)
            before = [body for body in bodies[:place] if body["type"] not in OWN]
            after = [body for body in bodies[place:] if body["type"] not in OWN]
            assert gap["reason"] == "disconnect"
            assert before[-1]["receive_ts"] == gap["from_ts"] < gap["to_ts"] <= after[0]["receive_ts"]
            assert "recovering" in [body["state"] for body in bodies[:place] if body["type"] == "status"]
            assert run.hearer.find(topic, type="status")[-1]["state"] == "live"
        (gap,) = run.hearer.find(BOOKS, type="gap")
        books = list_data(run.hearer, BOOKS)
        assert gap["last_change_id"] == [b["change_id"] for b in books if b["seq"] < gap["seq"]][-1]
        snapshot = next(book for book in books if book["seq"] > gap["seq"])
        assert (snapshot["kind"], snapshot["reason"]) == ("snapshot", "subscribe")
        assert gap["next_change_id"] == snapshot["change_id"]
        assert run.hearer.find("deribit.quote.NOPE.", type="gap") == []
        state = await run.get_state()
        assert (state["gaps"], state["reconnects"]) == (4, 1)


@in_loop
async def test_two_losses_with_no_data_between_are_one_gap(practice: str) -> None:
    """The second connection carries no data and is lost as well."""
    async with collecting(practice, "skip:1,mute:*@0,drop:1.5,first:1", *TOPICS.values()) as run:
        await hear_more(run, TOPICS)
        run.worker.client.cut("the test wants it so")
        await wait_for(lambda: run.worker.client.reconnects == 2, "the second loss")
        await hear_more(run, TOPICS)
        for topic in TOPICS:
            said = [b["type"] for b in run.hearer.find(topic) if b["type"] not in ("status", "repair")]
            assert ("gap", "gap") not in pairwise(said), topic
            # Trades may be fetched on the second connection: that is data, and then the second loss is one of its own.
            assert topic == TRADED or said.count("gap") == 1


@in_loop
async def test_many_losses_are_each_told_once_and_nothing_else_is_lost(practice: str) -> None:
    async with collecting(practice, "", *TOPICS.values()) as run:
        for number in range(1, 6):
            await hear_more(run, TOPICS)
            run.worker.client.cut("the test wants it so")
            for topic in TOPICS:
                await run.hearer.hear_of(topic, number, type="gap")
        await hear_more(run, TOPICS)
        ids = [body["id"] for _, body in run.hearer.messages if body["type"] == "gap"]
        assert len(ids) == len(set(ids)) == 20
        for topic in TOPICS:
            assert [b["id"] for b in run.hearer.find(topic, type="gap")] == sorted(
                b["id"] for b in run.hearer.find(topic, type="gap")
            )
        for gap in run.hearer.find(TRADED, type="gap", healing=True):
            await run.hearer.hear_of(TRADED, type="repair", gap=gap["id"])


@in_loop
async def test_a_silent_connection_without_data_has_no_gap(practice: str) -> None:
    async with collecting(practice, "mute:*@0,drop:1.5,first:1", *TOPICS.values()) as run:
        await hear_more(run, TOPICS)
        assert run.worker.client.reconnects == 1
        assert not [body for _, body in run.hearer.messages if body["type"] == "gap"]


# -- books ------------------------------------------------------------------------------------------------------------

OTHER, THIRD = "book.ETH-PERPETUAL.100ms", "book.SOL_USDC-PERPETUAL.100ms"
BROKEN = {"type": "change", "change_id": 1 << 52, "prev_change_id": 1, "bids": [], "asks": [], "timestamp": 1}


@pytest.mark.parametrize("fault", ["gap:6@1", "prev0:6@1", "duplicate:6@1", "reorder:6@1", "gap:6@1,lag:0.5@0"])
@in_loop
async def test_a_broken_chain_is_a_gap_and_a_new_snapshot_of_that_book_alone(practice: str, fault: str) -> None:
    """With `lag` data of the old subscription come after the answer to its end, and after that to the new one."""
    async with collecting(practice, fault, BOOK) as run:
        (gap,) = await run.hearer.hear_of(BOOKS, type="gap")
        snapshot = (await run.hearer.hear_of(BOOKS, type="book", reason="resync"))[0]
        await hear_more(run, [BOOKS])
        deltas = [b for b in list_data(run.hearer, BOOKS) if b["seq"] < gap["seq"]]
        assert gap["reason"] == "sequence"
        assert gap["last_change_id"] == deltas[-1]["change_id"]
        assert not [b for b in list_data(run.hearer, BOOKS) if gap["seq"] < b["seq"] < snapshot["seq"]]
        told = [(b["state"], b["reason"]) for b in run.hearer.find(BOOKS, type="status")]
        changes = [state for state, _ in groupby(told)]
        assert changes[-3:] == [("live", ""), ("recovering", "sequence"), ("live", "")]
        state = await run.get_state()
        assert (state["resyncs"], state["gaps"], state["reconnects"]) == (1, 1, 0)


@in_loop
async def test_the_others_flow_while_one_book_is_resynced(practice: str) -> None:
    """The new snapshot is long in coming; deltas of that book are dropped and counted meanwhile."""
    faults = "gap:15@1,slow:public/unsubscribe=0.5@1"
    async with collecting(practice, faults, BOOK, OTHER, QUOTE) as run:
        await run.hearer.hear(lambda: [b for _, b in run.hearer.messages if b["type"] == "gap"], "the gap")
        (name,) = {t for t, body in run.hearer.messages if body["type"] == "gap" and body["reason"] == "sequence"}
        await run.hearer.hear_of(name, type="book", reason="resync")
        gap = run.hearer.find(name, type="gap")[0]
        snapshot = run.hearer.find(name, type="book", reason="resync")[0]
        others = [
            body for topic, body in run.hearer.messages
            if topic != name and gap["receive_ts"] < body["receive_ts"] < snapshot["receive_ts"]
        ]  # fmt: skip
        assert len([body for body in others if body["type"] in ("book", "quote")]) > 2
        state = await run.get_state()
        assert (state["resyncs"], state["reconnects"]) == (1, 0)


@in_loop
async def test_deltas_that_wait_for_a_snapshot_are_dropped_and_counted(practice: str) -> None:
    async with collecting(practice, "gap:5@1,delay:300", BOOK) as run:
        await run.hearer.hear_of(BOOKS, type="book", reason="resync")
        assert (await run.get_state())["dropped"] > 0


@in_loop
async def test_a_book_that_breaks_again_and_again_does_not_cost_the_others_their_connection(practice: str) -> None:
    async with collecting(practice, "gap:2", BOOK, QUOTE) as run:
        feed = run.worker.feeds[BOOK.encode()]
        await wait_for(lambda: feed.is_rationed, "a book that has to wait")
        await hear_more(run, ["deribit.quote.BTC-PERPETUAL.raw"], 30)
        state = await run.get_state()
        assert state["reconnects"] == 0
        assert RESYNCS <= state["resyncs"] < 2 * RESYNCS


@in_loop
async def test_two_books_that_break_again_and_again_do_not_cost_the_third_its_connection(
    practice: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Their frames are damaged on the way in: what the exchange sends of the third is well. It is said once of each."""
    async with collecting(practice, "", BOOK, OTHER, THIRD) as run:
        sick = [run.worker.feeds[name.encode()] for name in (BOOK, OTHER)]
        patrol, end = run.worker.patrol, time.monotonic() + 90
        while not all(feed.waiting_since and time.monotonic() - feed.waiting_since > 7 for feed in sick):
            assert time.monotonic() < end
            assert run.worker.client.reconnects == 0
            for feed in sick:
                if feed.is_complete:
                    run.worker.take_frames([encode_data(feed.channel.name, BROKEN)], time.time_ns())
            await asyncio.sleep(0.05)
        resyncs = patrol.resyncs
        assert resyncs >= 2 * RESYNCS
        told = [record.getMessage() for record in caplog.records if "breaks again" in record.message]
        assert sorted(line.split()[0] for line in told) == sorted([BOOK, OTHER])
        await hear_more(run, ["deribit.book.SOL_USDC-PERPETUAL.100ms"], 30)
        assert (run.worker.client.reconnects, patrol.resyncs - resyncs < 3) == (0, True)
        assert run.hearer.find("deribit.book.SOL_USDC-PERPETUAL.100ms", type="gap") == []


@in_loop
async def test_a_new_connection_is_made_for_books_that_are_all_sick_once_one_may_be_asked_for_no_more(
    practice: str,
) -> None:
    async with collecting(practice, "", BOOK, OTHER) as run:
        feeds = [run.worker.feeds[name.encode()] for name in (BOOK, OTHER)]

        async def break_one(left: float) -> None:
            await wait_for(lambda: all(feed.is_complete for feed in feeds), "all books")
            for feed in feeds:
                feed.allowance = Credits(RESYNCS, REFILL, time.monotonic())
                feed.allowance.level = left
            run.worker.take_frames([encode_data(BOOK, BROKEN)], time.time_ns())

        await break_one(RESYNCS / 2 - 1)
        await run.hearer.hear_of(BOOKS, type="book", reason="resync")
        assert run.worker.client.reconnects == 0
        await break_one(0.0)
        (lost,) = await run.hearer.hear_of("deribit.status.w.connection", state="backoff")
        assert (lost["reason"], run.worker.patrol.resyncs) == ("all books out of step", 1)


@in_loop
async def test_books_that_break_together_are_asked_for_anew_together(practice: str) -> None:
    """Each call costs credits, which connections share."""
    books = [BOOK, OTHER, THIRD]
    async with collecting(practice, "", *books) as run:
        feeds = [run.worker.feeds[name.encode()] for name in books]
        await wait_for(lambda: all(feed.is_complete for feed in feeds), "all books")
        requests = run.worker.client.traffic.requests
        run.worker.take_frames([encode_data(name, BROKEN) for name in books], time.time_ns())
        await wait_for(lambda: all(feed.is_complete for feed in feeds), "all books again")
        assert (run.worker.patrol.resyncs, run.worker.client.traffic.requests - requests) == (3, 2)
        gaps = await run.hearer.hear_of("deribit.book.", 3, type="gap")
        assert [gap["reason"] for gap in gaps] == ["sequence"] * 3


@in_loop
async def test_an_unasked_snapshot_is_no_gap(practice: str) -> None:
    async with collecting(practice, "resnapshot:6@2", BOOK) as run:
        unasked = await run.hearer.hear_of(BOOKS, 2, type="book", reason="exchange")
        await hear_more(run, [BOOKS])
        assert {body["kind"] for body in unasked} == {"snapshot"}
        assert run.hearer.find(BOOKS, type="gap") == []


@in_loop
async def test_a_book_that_an_unasked_snapshot_has_mended_is_not_asked_for_anew(practice: str) -> None:
    """The changes between leaving the channel and its next snapshot would be lost without a word."""
    async with collecting(practice, "", BOOK) as run:
        await hear_more(run, [BOOKS])
        feed = run.worker.feeds[BOOK.encode()]
        assert isinstance(feed, BookFeed)
        change_id = feed.stream.last_id
        sides = {"bids": [["new", *level] for level in sorted(feed.bids.items(), reverse=True)],
                 "asks": [["new", *level] for level in sorted(feed.asks.items())]}  # fmt: skip
        change = {"type": "change", "change_id": change_id + 1, "prev_change_id": 1, "bids": [], "asks": []}
        snapshot = {"type": "snapshot", "change_id": change_id, **sides}
        run.worker.take_frames([encode_data(BOOK, change), encode_data(BOOK, snapshot)], time.time_ns())
        await hear_more(run, [BOOKS], 8)
        bodies = run.hearer.find(BOOKS)
        (gap,) = [body for body in bodies if body["type"] == "gap"]
        after = [body for body in bodies if body["type"] == "book" and body["seq"] > gap["seq"]]
        assert [body["kind"] for body in after] == ["snapshot"] + ["delta"] * (len(after) - 1)
        assert (await run.get_state())["resyncs"] == 0


@in_loop
async def test_a_snapshot_that_comes_unasked_while_a_book_is_being_left_is_followed_by_a_gap(practice: str) -> None:
    """The channel is left all the same: what changes until it is there again is lost."""
    async with collecting(practice, "gap:8@1,resnapshot:11@1,slow:public/unsubscribe=0.7@1", BOOK) as run:
        await run.hearer.hear_of(BOOKS, 2, type="gap")
        await hear_more(run, [BOOKS], 3)
        bodies = run.hearer.find(BOOKS)
        kinds = [body.get("kind", body["type"]) for body in bodies if body["type"] != "status"]
        again = ["gap", "snapshot", "delta"]
        assert [kind for kind, _ in groupby(kinds)] == ["snapshot", "delta", *again, *again]
        second = [body for body in bodies if body["type"] == "gap"][1]
        before, after = ([b for b in bodies if b["type"] == "book" and (b["seq"] > second["seq"]) is late]
                         for late in (False, True))  # fmt: skip
        assert (second["reason"], after[0]["reason"]) == ("sequence", "resync")
        assert second["last_change_id"] == before[-1]["change_id"] < second["next_change_id"] == after[0]["change_id"]
        states = [body["state"] for body in bodies if body["type"] == "status"]
        assert states[-4:] == ["recovering", "live", "recovering", "live"]
        assert (await run.get_state())["resyncs"] == 1


@in_loop
async def test_a_broken_book_that_is_given_up_and_taken_up_again_is_not_resynced(practice: str) -> None:
    """What was about to be left for a new snapshot has been left: its successor is in step."""
    async with collecting(practice, "", BOOK) as run:
        await run.hearer.hear_of(BOOKS, 2, type="book")
        broken = run.worker.feeds[BOOK.encode()]
        await run.ask("unsubscribe", channels=[BOOK])
        await run.ask("subscribe", channels=[BOOK])
        await run.hearer.hear_of(BOOKS, 2, type="book", kind="snapshot", reason="subscribe")
        broken.is_complete = False
        run.worker.patrol._broken = {broken: None}
        await run.worker.patrol._resubscribe()
        await hear_more(run, [BOOKS])
        assert run.worker.patrol.resyncs == 0


@in_loop
async def test_of_a_book_that_is_taken_up_anew_while_it_is_left_for_a_snapshot_only_the_new_one_speaks(
    practice: str,
) -> None:
    async with collecting(practice, "slow:public/unsubscribe=0.7@1", BOOK) as run:
        await run.hearer.hear_of(BOOKS, 2, type="book")
        broken, waiting = run.worker.feeds[BOOK.encode()], run.worker.client.traffic.waiting
        broken.is_complete = False
        run.worker.patrol._broken = {broken: None}
        resync = asyncio.create_task(run.worker.patrol._resubscribe())
        await wait_for(lambda: "public/unsubscribe" in dict(waiting.values()), "it to be left")
        broken.is_complete = True  # a snapshot came unasked
        again = {"channels": [BOOK], "epoch": time.time_ns()}
        await asyncio.gather(resync, *(run.worker.answer(op, again) for op in ("unsubscribe", "subscribe")))
        await hear_more(run, [BOOKS])
        epochs = [body["epoch"] for body in run.hearer.find(BOOKS)]
        assert epochs == sorted(epochs)
        assert epochs[-1] > run.worker.epoch


@in_loop
async def test_a_snapshot_that_does_not_come_is_asked_for_again(practice: str) -> None:
    async def recover(fault: str) -> None:
        async with collecting(practice, fault, BOOK, timeout=2.0) as run:
            feed = run.worker.feeds[BOOK.encode()]
            await run.hearer.hear(lambda: feed.is_complete and run.worker.patrol.resyncs, "the book", 30)
            await hear_more(run, [BOOKS])
            assert run.hearer.find(BOOKS, type="status")[-1]["state"] == "live"
            assert ("gap" in fault) == bool(run.hearer.find(BOOKS, type="gap"))

    unanswered = [f"gap:5@1,{what}" for what in ("no_reply:public/unsubscribe@1", "error:public/unsubscribe=10001@1")]
    await asyncio.gather(*map(recover, ["no_snapshot:1", *unanswered]))


@in_loop
async def test_of_a_book_that_the_exchange_does_not_give_no_snapshot_is_missing(practice: str) -> None:
    async with collecting(practice, f"drop_subscribe:{BOOK}@9", BOOK) as run:
        (feed,) = run.worker.feeds.values()
        await wait_for(lambda: feed.condition[0] == "refused", "the refusal")
        run.worker.patrol._judge_feeds([feed], time.monotonic_ns())
        assert (feed.allowance, run.worker.patrol._broken) == (None, {})


@in_loop
async def test_a_grouped_book_is_live_with_its_first_window_and_has_no_levels_before(practice: str) -> None:
    channel, topic = "book.BTC-PERPETUAL.none.10.100ms", "deribit.book.BTC-PERPETUAL.none-10-100ms"
    async with collecting(practice, "", channel) as run:
        await hear_more(run, [topic])
        feed = run.worker.feeds[channel.encode()]
        run.worker.change_state("backoff", "for a loss")
        run.worker.confirm_channels([channel])
        assert (feed.condition, feed.stream.describe()) == (("recovering", "disconnect"), None)
        await run.hearer.hear_of(topic, 2, type="status", state="live")
        said = [body.get("reason", body["type"]) for body in run.hearer.find(topic)]
        after = said[said.index("disconnect") :]
        assert after[:4] == ["disconnect", "disconnect", "subscribe", ""]  # status, gap, window, status


@in_loop
async def test_an_incremental_ticker_that_missed_a_change_is_asked_for_anew(practice: str) -> None:
    """What an unreadable change held is not known: merged further, the ticker would be wrong until it changes again."""
    async with collecting(practice, "", "incremental_ticker.BTC-PERPETUAL", BOOK) as run:
        topic = "deribit.ticker.BTC-PERPETUAL.incremental"
        await run.hearer.hear_of(topic, type="status", state="live")
        data = {"type": "change", "timestamp": START // 10**6, "last_price": "unreadable", "mark_price": 7.0}
        run.worker.take_frames([encode_data("incremental_ticker.BTC-PERPETUAL", data)], time.time_ns())
        assert run.worker.intake.malformed == 1
        await run.hearer.hear_of(topic, type="gap", reason="sequence")
        await hear_more(run, [topic, BOOKS])
        changes = [body["state"] for body in run.hearer.find(topic, type="status")]
        assert [state for state, _ in groupby(changes)][-3:] == ["live", "recovering", "live"]
        state = await run.get_state()
        assert (state["resyncs"], state["gaps"], state["reconnects"]) == (1, 1, 0)
        assert not run.hearer.find(BOOKS, type="gap")


@pytest.mark.parametrize("spelling", [(b":", b": "), (b'{"jsonrpc"', b'{"json\0rpc"'), (b'{"jsonrpc":"2.0",', b"")])
@in_loop
async def test_a_frame_that_is_no_json_is_a_loss_of_the_channels_that_it_names(
    practice: str, spelling: tuple[bytes, bytes]
) -> None:
    async with collecting(practice, "", BOOK, OTHER) as run:
        await run.hearer.hear_of(BOOKS, type="status", state="live")
        frame = encode_data(BOOK, BROKEN).replace(*spelling)[:-3]
        run.worker.client.traffic._take([frame])
        assert run.worker.intake.malformed == 1
        await run.hearer.hear_of(BOOKS, type="gap", reason="sequence")
        await run.hearer.hear_of(BOOKS, type="book", reason="resync")
        await hear_more(run, ["deribit.book.ETH-PERPETUAL.100ms"])
        assert not run.hearer.find("deribit.book.ETH-PERPETUAL.", type="gap")


@in_loop
async def test_a_book_of_which_a_change_could_not_be_read_is_out_of_step_at_once(practice: str) -> None:
    """The next change may be long in coming, or as unreadable: meanwhile the book is wrong."""
    async with collecting(practice, "", BOOK, OTHER) as run:
        await run.hearer.hear_of(BOOKS, type="status", state="live")
        feed = run.worker.feeds[BOOK.encode()]
        assert isinstance(feed, BookFeed)
        change = BROKEN | {"prev_change_id": feed.stream.last_id, "bids": [["moved", 1.0, 1.0]]}
        run.worker.take_frames([encode_data(BOOK, change)] * 2, time.time_ns())
        assert (run.worker.intake.malformed, feed.condition) == (2, ("recovering", "sequence"))
        (gap,) = await run.hearer.hear_of(BOOKS, type="gap", reason="sequence")
        snapshot = (await run.hearer.hear_of(BOOKS, type="book", reason="resync"))[0]
        await hear_more(run, [BOOKS, "deribit.book.ETH-PERPETUAL.100ms"])
        assert (snapshot["seq"], gap["next_change_id"]) == (gap["seq"] + 1, snapshot["change_id"])
        changes = [body["state"] for body in run.hearer.find(BOOKS, type="status")]
        assert [state for state, _ in groupby(changes)][-3:] == ["live", "recovering", "live"]
        state = await run.get_state()
        assert (state["resyncs"], state["gaps"], state["reconnects"]) == (1, 1, 0)


@in_loop
async def test_books_that_break_again_and_again_are_bounded(practice: str) -> None:
    async with collecting(practice, "gap:3,first:1", "book.BTC-PERPETUAL.raw", OTHER, BOOK, login=LOGIN) as run:
        await wait_for(lambda: run.worker.client.reconnects == 1, "a new connection", 40)
        await run.hearer.hear_of("deribit.status.w.connection", state="backoff")
        assert "out of step" in run.hearer.find("deribit.status.w.connection", state="backoff")[0]["reason"]
        await hear_more(run, [BOOKS, "deribit.book.ETH-PERPETUAL.100ms", "deribit.book.BTC-PERPETUAL.raw"])
        assert (await run.get_state())["resyncs"] <= 33


# -- trades -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel", [TRADES, "trades.BTC-PERPETUAL.raw", "trades.future.BTC.100ms"])
@in_loop
async def test_lost_trades_are_told_fetched_and_said_late(practice: str, channel: str) -> None:
    topic = f"deribit.trade.BTC-PERPETUAL.{channel.rpartition('.')[2]}"
    async with collecting(practice, "lost_trades:4@4", channel, login=LOGIN) as run:
        repairs = await run.hearer.hear_of(topic, 2, type="repair")
        bodies = run.hearer.find(topic)
        for repair in repairs:
            gap = next(body for body in bodies if body["type"] == "gap" and body["id"] == repair["gap"])
            assert (gap["reason"], gap["healing"]) == ("sequence", True)
            assert repair["repaired"] == gap["missing_to"] - gap["missing_from"] + 1
            assert repair["missing"] == []
            late = {body["trade_seq"] for body in bodies if body.get("backfilled") and body["seq"] < repair["seq"]}
            assert late >= set(range(gap["missing_from"], gap["missing_to"] + 1))
        state = await run.get_state()
        assert (state["missing"], state["reconnects"]) == (0, 0)
        assert state["repaired"] >= sum(repair["repaired"] for repair in repairs)


@in_loop
async def test_trades_that_nobody_has_any_more_stay_missing_and_are_named(practice: str) -> None:
    """The exchange refuses every request for them."""
    faults = "lost_trades:4@1,error:public/get_last_trades_by_instrument=13020"
    async with collecting(practice, faults, TRADES) as run:
        (repair,) = await run.hearer.hear_of(TRADED, type="repair")
        (gap,) = run.hearer.find(TRADED, type="gap")
        assert (repair["gap"], repair["repaired"]) == (gap["id"], 0)
        assert repair["missing"] == [[gap["missing_from"], gap["missing_to"]]]
        assert (await run.get_state())["missing"] == gap["missing_to"] - gap["missing_from"] + 1


@in_loop
async def test_an_exchange_that_asks_for_patience_gets_it(practice: str) -> None:
    """Twice it wants to be asked later: so it is, and not at once."""
    faults = "lost_trades:4@1,error:public/get_last_trades_by_instrument=13888@2"
    async with collecting(practice, faults, TRADES) as run:
        (repair,) = await run.hearer.hear_of(TRADED, type="repair")
        (gap,) = run.hearer.find(TRADED, type="gap")
        assert repair["missing"] == []
        assert repair["receive_ts"] - gap["receive_ts"] >= sum(PATIENCE[:2]) * SECOND


@in_loop
async def test_who_must_be_patient_does_not_hold_up_the_healing_of_others(practice: str) -> None:
    """Requests for single instruments are refused, and asked for again later; those for a currency are answered."""
    wide = "deribit.trade.ETH-PERPETUAL.100ms"
    faults = "error:public/get_last_trades_by_instrument=13888"
    async with collecting(practice, faults, TRADES, "trades.future.ETH.100ms") as run:
        cuts = healed = 0
        while healed < 2:
            await hear_more(run, [TRADED, wide])
            run.worker.client.cut("the test wants it so")
            cuts += 1
            gap = (await run.hearer.hear_of(wide, cuts, type="gap"))[-1]
            if gap["healing"]:  # it was back before the next trade otherwise
                (repair,) = await run.hearer.hear_of(wide, type="repair", gap=gap["id"])
                assert repair["missing"] == []
                healed += 1
        assert run.hearer.find(TRADED, type="repair") == []


@in_loop
async def test_what_is_known_to_be_missing_does_not_wait_for_a_history_that_asks_for_patience(practice: str) -> None:
    """Trades are to be had by number; by time, as all of a currency are asked for first, not for minutes."""
    topic = "deribit.trade.ETH-PERPETUAL.100ms"
    faults = "error:public/get_last_trades_by_currency_and_time=13888"
    async with collecting(practice, faults, "trades.future.ETH.100ms") as run:
        gap = await lose_trades(run, topic)
        (repair,) = await run.hearer.hear_of(topic, type="repair", gap=gap["id"])
        assert (repair["missing"], repair["repaired"]) == ([], gap["missing_to"] - gap["missing_from"] + 1)
        feed = run.worker.feeds[b"trades.future.ETH.100ms"]
        assert isinstance(feed, TradeFeed)
        assert feed.losses.lost_from is not None, "what nobody knows of is still asked for"


@in_loop
async def test_but_where_that_asks_for_patience_too_it_gets_it(practice: str, caplog: pytest.LogCaptureFixture) -> None:
    """It does not ask for itself again and again meanwhile."""
    topic = "deribit.trade.ETH-PERPETUAL.100ms"
    faults = ",".join(f"error:public/get_last_trades_by_{what}=13888" for what in ("instrument", "currency_and_time"))
    async with collecting(practice, faults, "trades.future.ETH.100ms") as run:
        await lose_trades(run, topic)
        await wait_for(lambda: "cannot be fetched yet: 13888" in caplog.text, "a word in the log")


@pytest.mark.parametrize("is_bounded", [True, False])
def test_while_an_answer_by_time_is_awaited_only_what_is_known_to_be_missing_is_asked_for(
    topics: Topics, is_bounded: bool
) -> None:
    """Of a thousand that are quiet since the loss nothing is known: each would cost a request."""
    quiet, other = "BTC-27MAR27-90000-C", "BTC-27MAR27-95000-C"
    feed = TradeFeed(parse_channel("trades.option.BTC.raw"), topics)

    def trade(name: str, seq: int) -> None:
        data = msgspec.to_builtins(make_option_trade(name, seq))
        for stream, _ in feed.take(Line(feed.channel.name, (name,)).encode([data]), START):
            stream.last_ts = START

    for name in (quiet, other):
        trade(name, 5)
    feed.losses.confirm(START)
    feed.lose("disconnect", START + SECOND)
    healing = heal_feed(feed, START + 5 * SECOND, 0)
    assert isinstance(step := next(healing), Ask)
    assert "start_timestamp" in step.params
    if is_bounded:
        trade(other, 9)
    asked = run_healing(heal_known(feed), answer_nothing)
    runs = [(ask.params["instrument_name"], ask.params.get("end_seq")) for ask in asked]
    assert runs == [(other, 8)] * is_bounded
    refused = run_healing(heal_known(feed), lambda ask: None)
    assert len(refused) == is_bounded
    assert feed.losses.lost_from is not None
    assert feed.tapes[quiet].stream.due is not None
    assert len(feed.tapes[other].holes) == is_bounded, "what could not be had yet is given up by no other healing"


def test_while_an_answer_by_time_is_awaited_only_that_is_closed_of_which_all_has_come(topics: Topics) -> None:
    name = "BTC-27MAR27-90000-C"
    feed = TradeFeed(parse_channel("trades.option.BTC.raw"), topics)
    line = Line(feed.channel.name, (name,))
    feed.losses.confirm(START)
    feed.lose("disconnect", START + SECOND)

    def heal_by_number(*seqs: int) -> list[tuple[int, int | None]]:
        healing = heal_known(feed)
        assert isinstance(next(healing), Ask)
        trades = [make_option_trade(name, seq) for seq in seqs]
        feed.backfill(trades, START)
        with suppress(StopIteration):
            step = healing.send(Page(trades, False))
            assert not isinstance(step, Ask)
            return [(hole.first, hole.last) for hole in step.holes]
        return []

    for seq in (6, 9):  # what came before the first is known by time alone
        feed.take(line.encode([msgspec.to_builtins(make_option_trade(name, seq))]), START + 2 * SECOND)
    assert heal_by_number(6, 7) == []
    assert heal_by_number(6, 7, 8) == [(7, 8)]


def test_many_that_lack_trades_wait_once_for_a_history_that_is_behind(topics: Topics) -> None:
    names = [f"BTC-27MAR27-{strike}-C" for strike in (90000, 95000, 99000)]
    feed = TradeFeed(parse_channel("trades.option.BTC.raw"), topics)
    for name in names:
        rows = [msgspec.to_builtins(make_option_trade(name, seq)) for seq in (6, 9)]
        feed.take(Line(feed.channel.name, (name,)).encode(rows), START)
    asked = run_healing(heal_feed(feed, START + SECOND, 0), answer_nothing)
    assert [ask.pause for ask in asked] == [pause for first in PAUSES for pause in (first, 0.0, 0.0)]


@in_loop
async def test_a_request_that_is_not_answered_does_not_begin_the_healing_anew() -> None:
    """The third is not: what the two before it brought need not be fetched again."""
    channel, asked = "trades.future.any.100ms", list[tuple[str, int]]()

    def script(params: dict[str, Any], count: int) -> dict[str, Any]:
        asked.append((params["currency"], params["start_timestamp"]))
        return {"result": {"trades": [], "has_more": False}} | ({"id": 1} if count == 3 else {})

    async with scripted("public/get_last_trades", script) as url, collecting(url, "", channel, timeout=2.0) as run:
        (feed,) = run.worker.feeds.values()
        assert isinstance(feed, TradeFeed)
        await wait_for(lambda: run.worker.client.is_live and feed.losses.confirmed_at, "the confirmation")
        run.worker.client.cut("the test wants it so")
        await wait_for(lambda: feed.losses.lost_from is not None, "the loss")
        await wait_for(lambda: feed.losses.lost_from is None, "the healing")
    firsts = [currency for currency, start in asked if start == asked[0][1]]
    assert firsts == [*CURRENCIES[:3], *CURRENCIES[2:]]


@in_loop
async def test_an_instrument_of_which_nothing_is_answered_holds_up_the_others_of_its_channel_but_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("workers.deribit.healing.heal.PATIENCE", (0.1,))
    channel, silent, other = "trades.future.any.100ms", "BTC-PERPETUAL", "ETH-PERPETUAL"

    def script(params: dict[str, Any], count: int) -> dict[str, Any]:
        trades = [make_trade(seq, instrument_name=other) for seq in (5, 6, 7, 8)]
        return {"id": 0} if params["instrument_name"] == silent else {"result": {"trades": trades, "has_more": False}}

    async with scripted("public/get_last_trades", script) as url, collecting(url, "", channel, timeout=0.5) as run:
        (feed,) = run.worker.feeds.values()
        await wait_for(lambda: run.worker.client.is_live and is_confirmed(feed), "the confirmation")
        trades = [make_trade(seq, instrument_name=name) for name in (silent, other) for seq in (5, 8)]
        run.worker.take_frames([encode_data(channel, trades)], time.time_ns())
        (repair,) = await run.hearer.hear_of(f"deribit.trade.{other}.", type="repair")
        assert (repair["repaired"], repair["missing"]) == (2, [])
        assert not run.hearer.find(f"deribit.trade.{silent}.", type="repair")


@in_loop
async def test_an_answer_that_holds_no_trades_at_all_is_a_refusal(caplog: pytest.LogCaptureFixture) -> None:
    """What is missing is asked for once more."""

    def script(params: dict[str, Any], count: int) -> dict[str, Any]:
        page = {"trades": [make_trade(6), make_trade(7)], "has_more": False}
        return {"result": "maintenance" if count == 1 else page}

    async with scripted("public/get_last_trades", script) as url, collecting(url, "", TRADES) as run:
        (feed,) = run.worker.feeds.values()
        await wait_for(lambda: run.worker.client.is_live and is_confirmed(feed), "the confirmation")
        run.worker.take_frames([encode_data(TRADES, [make_trade(5), make_trade(8)])], now := time.time_ns())
        (repair,) = await run.hearer.hear_of(TRADED, type="repair")
    assert feed.stream.last_ts == now, "the next loss begins where the stream itself last spoke"
    assert (repair["repaired"], repair["missing"]) == (2, [])
    assert f"trades of {TRADES} could not be fetched: the answer holds no trades" in caplog.text


@in_loop
async def test_of_many_channels_only_so_many_are_healed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here one; the exchange asks for patience with its first request."""
    monkeypatch.setattr("workers.deribit.healing.heal.AT_ONCE", 1)
    names = ["BTC-PERPETUAL", "ETH-PERPETUAL"]
    asked: list[str] = []

    def script(params: dict[str, Any], count: int) -> dict[str, Any]:
        asked.append(params["instrument_name"])
        late = {"error": {"code": 13888, "message": "timed_out"}}
        return late if count == 1 else {"result": {"trades": [], "has_more": False}}

    channels = [f"trades.{name}.100ms" for name in names]
    async with scripted("public/get_last_trades", script) as url, collecting(url, "", *channels) as run:
        feeds, healer = run.worker.feeds.values(), run.worker.healer
        # What each is called for when it is confirmed must be over: who calls amid it has to wait for another turn.
        await wait_for(lambda: all(map(is_confirmed, feeds)) and not healer._under_way, "both")
        for name, channel in zip(names, channels, strict=True):
            trades = [make_trade(seq, instrument_name=name) for seq in (5, 8)]
            run.worker.take_frames([encode_data(channel, trades)], time.time_ns())
        await wait_for(lambda: names[1] in asked, "the healing of the second")
    assert [name for name, _ in groupby(asked)] == names
    assert asked.count(names[0]) > 1


@in_loop
async def test_what_is_fetched_of_a_channel_that_is_given_up_meanwhile_is_not_said_and_no_more_is_asked_for() -> None:
    """It is given up just before the answer is sent, which says that there is more."""
    asked: list[int] = []
    runs: list[Collecting] = []

    def script(params: dict[str, Any], count: int) -> dict[str, Any]:
        asked.append(count)
        for run in runs:
            run.worker.client.reconciler.subscriptions.drop([TRADES])
            run.worker.channels.leave([TRADES], UNSUBSCRIBED)
        return {"result": {"trades": [make_trade(6), make_trade(9)], "has_more": True}}

    async with scripted("public/get_last_trades", script) as url, collecting(url, "", TRADES) as run:
        (feed,) = run.worker.feeds.values()
        assert isinstance(feed, TradeFeed)
        await wait_for(lambda: run.worker.client.is_live and feed.losses.confirmed_at, "the confirmation")
        runs.append(run)
        run.worker.take_frames([encode_data(TRADES, [make_trade(5), make_trade(8)])], time.time_ns())
        await wait_for(lambda: asked and not run.worker.healer._under_way, "the end of the healing")
        await run.hearer.hear_of(TRADED, type="status", state="closed")
        assert [body["trade_seq"] for body in run.hearer.find(TRADED, type="trade")] == [5, 8]
    assert asked == [1]


@in_loop
async def test_what_a_healing_shows_to_be_missing_is_fetched_by_another_though_nothing_comes_by_itself() -> None:
    """The exchange counts anew, and its channel is quiet: of the new count there is only what is fetched."""
    traded = time.time_ns() // MS

    def script(params: dict[str, Any], count: int) -> dict[str, Any]:
        is_by_time = "start_timestamp" in params
        return {"result": {"trades": [] if is_by_time else [make_trade(5, timestamp=traded)], "has_more": False}}

    async with scripted("public/get_last_trades", script) as url, collecting(url, "", TRADES) as run:
        (feed,) = run.worker.feeds.values()
        assert isinstance(feed, TradeFeed)
        await wait_for(lambda: run.worker.client.is_live and feed.losses.confirmed_at, "the confirmation")
        run.worker.take_frames([encode_data(TRADES, [make_trade(9, timestamp=traded - 1000)])], time.time_ns())
        run.worker.client.cut("the test wants it so")
        await run.hearer.hear_of(TRADED, type="gap", reason="sequence")
        assert feed.losses.lost_from is not None
        await wait_for(lambda: feed.losses.lost_from is None, "the healing of what was found", 60)


@in_loop
async def test_a_healing_that_has_to_wait_is_told(practice: str, caplog: pytest.LogCaptureFixture) -> None:
    faults = "lost_trades:4@1,error:public/get_last_trades_by_instrument=13888"
    async with collecting(practice, faults, TRADES) as run:
        await run.hearer.hear_of(TRADED, type="gap")
        assert (await run.get_state())["healing"] == 1
        await wait_for(lambda: "cannot be fetched yet: 13888" in caplog.text, "a word in the log")
        assert (await run.get_state())["healing"] == 1


@in_loop
async def test_what_a_repair_leaves_to_be_done_is_not_done_after_the_end(practice: str) -> None:
    """Its notes in the ledger are due some seconds later; by then the worker has given up, and closed the ledger."""
    loop, failures = asyncio.get_running_loop(), list[dict[str, Any]]()
    loop.set_exception_handler(lambda _, context: failures.append(context))
    async with collecting(practice, "lost_trades:4@1", TRADES, retry_count=1) as run:
        await run.hearer.hear_of(TRADED, type="repair")
        run.worker.client.cut("the test wants it so")
        await wait_for(lambda: run.worker.client.exit is Exit.GAVE_UP, "the end")
    is_due = asyncio.Event()
    loop.call_later(SURE, is_due.set)  # after all that is due
    await is_due.wait()
    assert failures == []


@in_loop
async def test_a_quiet_tail_is_healed_without_waiting_for_the_next_trade(practice: str) -> None:
    """After the loss no trade comes by itself; what was traded meanwhile comes all the same."""
    async with collecting(practice, f"skip:1,mute:{TRADES}@0", TRADES, QUOTE, retry_delay=2) as run:
        await hear_more(run, [TRADED], 5)
        run.worker.client.cut("the test wants it so")
        late = await run.hearer.hear_of(TRADED, type="trade", backfilled=True)
        (repair,) = await run.hearer.hear_of(TRADED, type="repair")
        (gap,) = run.hearer.find(TRADED, type="gap")
        assert gap["seq"] < late[0]["seq"] < repair["seq"]
        assert (gap["reason"], repair["gap"], repair["missing"]) == ("disconnect", gap["id"], [])
        assert not [b for b in run.hearer.find(TRADED, type="trade") if b["seq"] > gap["seq"] and "backfilled" not in b]


@in_loop
async def test_duplicate_trades_are_counted_and_said_once(practice: str) -> None:
    async with collecting(practice, "duplicate:2", TRADES) as run:
        await wait_for(lambda: sum(feed.duplicates for feed in run.worker.feeds.values()) > 3, "duplicates")
        await hear_more(run, [TRADED])
        assert (await run.get_state())["duplicates"] > 3
        assert run.hearer.find(TRADED, type="gap") == []


@in_loop
async def test_trades_out_of_order_are_all_said(practice: str) -> None:
    async with collecting(practice, "reorder:5@3", TRADES) as run:
        await run.hearer.hear_of(TRADED, type="repair")
        await hear_more(run, [TRADED], 5)
        seqs = [body["trade_seq"] for body in run.hearer.find(TRADED, type="trade")]
        assert len(seqs) == len(set(seqs))


@in_loop
async def test_healing_goes_on_on_a_connection_that_asks_for_the_channel_no_more(practice: str) -> None:
    """Its instrument has expired, and the connection is lost while its last trades are fetched."""
    faults = "lost_trades:4@1,no_reply:public/get_last_trades_by_instrument,first:1"
    async with collecting(practice, faults, TRADES) as run:
        (gap,) = await run.hearer.hear_of(TRADED, type="gap")
        client = run.worker.client
        waiting = client.traffic.waiting
        await wait_for(lambda: "public/get_last_trades_by_instrument" in dict(waiting.values()), "healing")
        client.reconciler.expire([TRADES])
        client.cut("for a loss")
        (repair,) = await run.hearer.hear_of(TRADED, type="repair", gap=gap["id"])
        assert (repair["missing"], client.reconnects) == ([], 1)
        assert client.get_state()["channels"]["confirmed"] == []
        await run.hearer.hear_of(TRADED, type="status", state="expired")
        assert run.hearer.find(TRADED)[-1]["state"] == "expired", "nothing comes after that"


@in_loop
async def test_the_last_trades_of_an_instrument_are_healed_before_its_channel_is_given_up(practice: str) -> None:
    faults = "lost_trades:4@1,no_reply:public/get_last_trades_by_instrument@1"
    async with collecting(practice, faults, TRADES, timeout=1.0) as run:
        (gap,) = await run.hearer.hear_of(TRADED, type="gap")
        assert await run.ask("unsubscribe", channels=[TRADES], reason="expired") == {"channels": {TRADES: True}}
        (repair,) = await run.hearer.hear_of(TRADED, type="repair", gap=gap["id"])
        assert repair["missing"] == []
        await run.hearer.hear_of(TRADED, type="status", state="expired")
        assert run.hearer.find(TRADED)[-1]["type"] == "status"
        assert not run.worker.feeds


@in_loop
async def test_healing_pays_for_no_request_before_the_connection_is_live(
    practice: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It would not be sent. Here the channel is confirmed while the login is still to come."""
    async with collecting(practice, "delay:100", TRADES, login=LOGIN) as run:
        await run.hearer.hear_of(TRADED, type="trade")
        with caplog.at_level(logging.INFO, "deribit"):
            run.worker.client.cut("for a loss")
            await run.hearer.hear_of(TRADED, type="repair")
        assert "live" in caplog.text
        assert "goes on after the next bootstrap" not in caplog.text


@in_loop
async def test_of_a_loss_that_is_older_than_what_the_exchange_keeps_the_rest_comes_and_the_start_is_told() -> None:
    """By time it tells nothing of it, by number what it still has. What it has moves on while that is asked for."""
    with exchange("--rate", "2000", "--faults", "retention:4") as (url, _):
        async with collecting(url, f"skip:1,mute:{TRADES}@9", TRADES, retry_delay=8) as run:
            await hear_more(run, [TRADED], 5)
            run.worker.client.cut("the test wants it so")
            (repair,) = await run.hearer.hear_of(TRADED, type="repair", timeout=40)
            (gap,) = run.hearer.find(TRADED, type="gap")
            ((first, last),) = repair["missing"]
            late = [body["trade_seq"] for body in run.hearer.find(TRADED, type="trade", backfilled=True)]
            heard = [b["trade_seq"] for b in run.hearer.find(TRADED, type="trade") if b["seq"] < gap["seq"]]
            assert (first, gap["reason"], repair["gap"]) == (heard[-1] + 1, "disconnect", gap["id"])
            assert late == list(range(last + 1, late[-1] + 1))
            assert repair["repaired"] == len(late) > 0


@pytest.mark.parametrize("channel", ["trades.BTC-27MAR27-1-C.100ms", "trades.option.BTC.100ms"])
def test_after_a_loss_of_more_than_a_day_what_the_exchange_still_keeps_comes_and_the_rest_is_told(
    topics: Topics, channel: str
) -> None:
    """Measured, 2026: a request by number is answered from the oldest trade on that is kept, one by time with nothing
    if it starts before that.
    """
    name, hour = "BTC-27MAR27-1-C", 3600 * SECOND
    feed = TradeFeed(parse_channel(channel), topics)
    line = Line(channel, (name,))
    now = START + 30 * hour
    traded = [replace(make_option_trade(name, seq), timestamp=(START + (seq - 1) * hour) // MS) for seq in range(1, 32)]
    kept = [trade for trade in traded if trade.timestamp * MS >= now - 24 * hour]
    said: list[Any] = []

    def hear(published: Iterable[tuple[Any, Any]]) -> None:
        for stream, message in published:
            stream.last_ts = max(stream.last_ts, START)
            said.append(message)

    def answer(ask: Ask) -> Page:
        if ask.params.get("currency", "BTC") != "BTC" or ask.params.get("start_timestamp", now) < kept[0].timestamp:
            return Page([], False)
        found = [trade for trade in kept if fits(trade, ask.params)]
        hear(feed.backfill(found, now))
        return Page(found, False)

    hear(feed.take(line.encode([msgspec.to_builtins(traded[0])]), START))
    feed.losses.confirm(START)
    feed.lose("disconnect", START + SECOND)
    feed.losses.confirm(now)
    hear(feed.take(line.encode([msgspec.to_builtins(traded[-1])]), now))
    healing, page = heal_feed(feed, now, 0), None
    with suppress(StopIteration):
        while True:
            step = healing.send(page)
            page = answer(step) if isinstance(step, Ask) else None
            if not isinstance(step, Ask):
                said += step.tape.end_healing(step.holes, now)
    (repair,) = [message for message in said if isinstance(message, Repair)]
    late = [message.trade_seq for message in said if isinstance(message, Trade) and message.backfilled is True]
    assert (repair.missing, repair.repaired) == ([(2, kept[0].trade_seq - 1)], len(late))
    assert sorted(late) == [trade.trade_seq for trade in kept[:-1]]
    assert feed.losses.lost_from is None


@pytest.mark.parametrize("size", [4, 7, 1000])
@pytest.mark.parametrize("is_quiet", [True, False])
@pytest.mark.parametrize("channel", ["trades.BTC-27MAR27-1-C.100ms", "trades.option.BTC.100ms"])
def test_fetched_trades_of_one_ms_come_in_any_order_and_a_page_may_end_between_them(
    topics: Topics, channel: str, is_quiet: bool, size: int
) -> None:
    """Seen at history.deribit.com, 2026: it goes by time, of 10,000 trades 1,885 stood out of the order of numbers; one
    from before the number that was asked for came as well, and one that was asked for did not, though there was room.
    """
    name = "BTC-27MAR27-1-C"
    feed = TradeFeed(parse_channel(channel), topics)
    line = Line(channel, (name,))
    traded = [replace(make_option_trade(name, seq), timestamp=START // MS + 2000 + seq // 3) for seq in range(1, 41)]
    now, said = START + 9 * SECOND, list[Any]()

    def take(seq: int, at: int) -> None:
        published = feed.take(line.encode([msgspec.to_builtins(traded[seq - 1])]), at)
        said.extend(message for _, message in published)
        for stream, _ in published:
            stream.last_ts = at

    def answer(ask: Ask) -> Page:
        wider = ask.params | {"start_seq": ask.params.get("start_seq", 1) - 1}
        last = ask.params.get("end_seq", 40)
        found = [trade for trade in traded if fits(trade, wider) and trade.trade_seq <= last]
        found = [] if ask.params.get("currency", "BTC") != "BTC" else found
        found.sort(key=lambda trade: (trade.timestamp, -trade.trade_seq))
        said.extend(message for _, message in feed.backfill(found[:size], now))
        return Page(found[:size], len(found) > size)

    feed.losses.confirm(START)
    take(5, START)
    feed.lose("disconnect", START + SECOND)
    feed.losses.confirm(now)
    if not is_quiet:
        take(40, now)
    run_healing(heal_feed(feed, now, 0), answer)
    late = [message.trade_seq for message in said if isinstance(message, Trade) and message.backfilled is True]
    assert sorted(late) == list(range(6, 41 if is_quiet else 40))
    assert feed.tapes[name].find_missing(tails=False) is None


def test_where_the_history_by_time_is_refused_for_good_each_instrument_is_asked_for_by_number_and_the_rest_told(
    topics: Topics,
) -> None:
    """As Deribit answers from the hour on in which a spot pair of the currency comes to be matched at Coinbase."""
    feed = TradeFeed(parse_channel("trades.any.EURR.100ms"), topics)
    names = ("BTC_EURR", "ETH_EURR", "USDC_EURR")
    line = Line(feed.channel.name, names)

    def take(name: str, seq: int) -> list[Any]:
        published = feed.take(line.encode([msgspec.to_builtins(make_option_trade(name, seq))]), START)
        for stream, _ in published:
            stream.last_ts = START
        return [message for _, message in published if not isinstance(message, Trade)]

    def answer(ask: Ask) -> Page | None:
        if ask.params.get("kind") == "spot" or ask.params.get("instrument_name") == "ETH_EURR":
            return None
        return Page([], False)

    assert take("BTC_EURR", 5) == take("ETH_EURR", 5) == []
    feed.losses.confirm(START)
    feed.lose("disconnect", START + SECOND)
    asked = run_healing(heal_feed(feed, START + 5 * SECOND, 0), answer)
    assert {ask.params["instrument_name"] for ask in asked if ask.params.get("start_seq") == 5} == set(names[:2])
    refused = [ask.params.get("kind") for ask in asked].count("spot")
    assert refused <= 3 * len(PAUSES), "what is refused for good is asked for a few times"
    assert feed.losses.lost_from is None, "and by no later healing"
    (told,) = take("USDC_EURR", 3)
    assert (told.reason, told.missing_from, told.missing_to, told.healing) == ("disconnect", 1, 2, False)
    ended = feed.end(False, START + 9 * SECOND)
    open_from = [(stream.instrument, gap.missing_from) for stream, gap in ended if isinstance(gap, Gap)]
    assert open_from == [("BTC_EURR", 6), ("ETH_EURR", 6)]


@pytest.mark.parametrize("refused", ["first", "last"])
def test_what_only_a_look_may_find_that_is_refused_is_unsure(topics: Topics, refused: str) -> None:
    feed, _ = lose_after_trade(topics, "BTC-27MAR27-90000-C")
    asked: list[Ask] = []

    def answer_others(ask: Ask) -> Page | None:
        asked.append(ask)
        is_first = ask.params.get("start_timestamp") == asked[0].params["start_timestamp"]
        is_last = max(each.pause for each in asked) > PAUSES[-1]
        return None if (is_first if refused == "first" else is_last) else Page([], False)

    run_healing(heal_feed(feed, START + 5 * SECOND, 0), answer_others)
    assert max(ask.pause for ask in asked) == sum(PAUSES)
    assert (feed.losses.lost_from, feed.losses.unanswered_from) == (None, START)


def test_a_page_that_is_empty_though_there_is_more_is_the_last(topics: Topics) -> None:
    feed, line = lose_after_trade(topics, "BTC-27MAR27-90000-C")
    feed.take(line.encode([msgspec.to_builtins(make_option_trade("BTC-27MAR27-90000-C", 9))]), START + 2 * SECOND)
    asked = run_healing(heal_feed(feed, START + 5 * SECOND, 0), lambda _: Page([], True))
    assert {"start_seq", "start_timestamp"} <= {key for ask in asked for key in ask.params}
    assert feed.losses.lost_from is None


def test_an_instrument_that_ends_waits_for_its_healing_and_has_a_gap_for_what_was_not_asked_for(topics: Topics) -> None:
    feed, line = lose_after_trade(topics, "BTC-27MAR27-90000-C")
    (stream,) = feed.streams.values()
    assert feed.awaits_healing(stream)
    run_healing(heal_feed(feed, START + 5 * SECOND, 0), answer_nothing)
    assert not feed.awaits_healing(stream)
    assert feed.take_last(stream, START + 9 * SECOND) is None
    feed.take(line.encode([msgspec.to_builtins(make_option_trade(stream.instrument, 9))]), START + 9 * SECOND)
    assert feed.awaits_healing(stream)
    feed.lose("disconnect", START + 10 * SECOND)
    gap = feed.take_last(stream, START + 10 * SECOND)
    assert gap is not None
    assert (gap.missing_from, gap.healing) == (10, False)


def test_the_repair_of_what_has_come_does_not_wait_for_the_last_look_by_time(topics: Topics) -> None:
    name = "BTC-27MAR27-90000-C"
    feed, line = lose_after_trade(topics, name)
    feed.take(line.encode([msgspec.to_builtins(make_option_trade(name, 9))]), START + 2 * SECOND)
    healing, page = heal_feed(feed, START + 5 * SECOND, 0), None
    done: list[Any] = []
    with suppress(StopIteration):
        while True:
            step = healing.send(page)
            if isinstance(step, Ask):
                trades = [make_option_trade(name, seq) for seq in range(5, 9) if "start_seq" in step.params]
                feed.backfill(trades, START)
                page = Page(trades, False)
                done += ["last look"] * (step.pause == sum(PAUSES))
            else:
                page = None
                done += [type(said) for said in step.tape.end_healing(step.holes, START)]
    assert done == [Repair, "last look"]


def test_all_is_asked_for_from_the_newest_trade_of_any_on(topics: Topics) -> None:
    """Else each loss would fetch from the last trade of the quietest on."""
    feed = TradeFeed(parse_channel("trades.option.BTC.raw"), topics)
    feed.losses.confirm(START)
    for name, at in (("BTC-27MAR27-90000-C", START + 60 * SECOND), ("BTC-27MAR27-95000-C", START + SECOND)):
        trade = replace(make_option_trade(name, 5), timestamp=at // MS)
        ((stream, _),) = feed.take(Line(feed.channel.name, (name,)).encode([msgspec.to_builtins(trade)]), at)
        stream.last_ts = at
    feed.lose("disconnect", START + 90 * SECOND)
    assert feed.losses.lost_from == START + 60 * SECOND


def test_a_currency_that_the_exchange_refuses_does_not_cost_the_others(topics: Topics) -> None:
    feed = TradeFeed(parse_channel("trades.option.any.100ms"), topics)
    feed.losses.confirmed_at = START
    feed.lose("disconnect", START)
    healing = heal_feed(feed, START + 5_000_000_000, 0)
    asks = run_healing(healing, lambda ask: None if ask.params["currency"] == CURRENCIES[1] else Page([], False))
    asked = [ask.params["currency"] for ask in asks]
    assert {currency: asked.count(currency) for currency in asked} == dict.fromkeys(CURRENCIES, 3) | {
        CURRENCIES[1]: 3 * len(PAUSES)
    }
    assert feed.losses.lost_from is None  # else each later healing would fetch from here on, for ever
    assert topics.ledger.cells[topics.ledger.find_slot(feed.channel.name) + UNHEALED] == START  # but a later life asks


def test_what_is_lost_during_a_healing_does_not_keep_what_was_lost_before_from_being_healed(topics: Topics) -> None:
    """Else the time that each healing asks for would grow as long as there is no pause between two losses."""
    feed = TradeFeed(parse_channel("trades.option.BTC.100ms"), topics)
    feed.losses.confirm(START)
    now = START + 10 * SECOND
    feed.losses.add_since(now)

    def lose_more(ask: Ask) -> Page:
        nonlocal now
        now += int(ask.pause * SECOND) + 1
        feed.losses.add_since(now)
        return Page([], False)

    for _ in range(5):
        begun = now
        asked = run_healing(heal_feed(feed, now, 0), lose_more)
        assert all(ask.params["start_timestamp"] * MS > begun - 20 * SECOND for ask in asked)
        assert now > begun + 2 * SECOND
    assert feed.losses.lost_from is not None
    assert feed.losses.lost_from > begun - 10 * SECOND


def test_a_loss_amid_a_healing_leaves_in_doubt_whether_the_exchange_counts_anew(topics: Topics) -> None:
    """What that healing brings is of before."""
    name = "BTC-27MAR27-90000-C"
    feed, line = lose_after_trade(topics, name)

    def lose_once_more(_: Ask) -> Page:
        if feed.losses.newer_from is None:
            feed.lose("disconnect", START + 4 * SECOND)
        return Page([], False)

    assert run_healing(heal_feed(feed, START + 3 * SECOND, 0), lose_once_more)
    feed.take(line.encode([msgspec.to_builtins(make_option_trade(name, 6))]), START + 20 * SECOND)
    assert [hole.is_doubt for hole in feed.tapes[name].holes] == [True]


def test_that_one_instrument_counts_on_tells_nothing_of_the_others(topics: Topics) -> None:
    """Its trade may have been fetched before the exchange was reset."""
    name = "BTC-27MAR27-90000-C"
    feed, _ = lose_after_trade(topics, name)
    assert feed.backfill([make_option_trade(name, 5)], START + 2 * SECOND) == []
    assert not feed.losses.is_checked


def test_a_day_of_losses_that_are_all_healed_in_time_leaves_nothing_in_doubt(topics: Topics) -> None:
    """The exchange tells of the last day only; what was lost before was healed long ago."""
    feed = TradeFeed(parse_channel("trades.option.BTC.100ms"), topics)
    feed.losses.confirm(START)
    now = START + SECOND
    feed.lose("disconnect", now)

    def lose_more(_: Ask) -> Page:
        feed.losses.add_since(now + SECOND)
        return Page([], False)

    for _ in range(30):
        now += 3600 * SECOND
        feed.losses.add_since(now - SECOND)
        assert run_healing(heal_feed(feed, now, 0), lose_more)
        assert feed.losses.lost_from == now + SECOND
    assert feed.losses.unanswered_from is None


def test_a_channel_that_is_sent_only_while_it_is_healed_is_healed_once_more_from_then_on(topics: Topics) -> None:
    feed = TradeFeed(parse_channel("trades.option.BTC.100ms"), topics)
    feed.losses.confirm(START)
    feed.lose("disconnect", START + SECOND)
    begun = START + 60 * SECOND

    def confirm(_: Ask) -> Page:
        feed.losses.confirm(begun + SECOND)
        return Page([], False)

    assert run_healing(heal_feed(feed, begun, 0), confirm)
    assert feed.losses.lost_from == begun


def test_first_trades_whose_healing_was_cut_by_a_kill_do_not_cost_a_request_each() -> None:
    """They were traded before, too, when nobody was there: that is of no interest to a later life either."""
    channel, second = "trades.option.any.100ms", 1_000_000_000
    rows = [make_option_trade(f"BTC-27MAR27-{strike}-C", seq) for seq in (7, 8) for strike in range(50)]
    with short_directory() as directory:
        life = Life(directory, [channel], START, is_first=True)
        life.confirm(channel, START)
        life.lose(START + second)
        heal_life(life, START + 2 * second).take(rows[:60], True, START + 2 * second)
        life.end()
        later = Life(directory, [channel], START + 3 * second, is_first=False)
        healer, methods = heal_life(later, START + 4 * second), set()
        while healer.ask is not None:
            methods.add(healer.ask.method)
            healer.take(rows if healer.ask.params.get("currency") == "BTC" else [], False, START + 4 * second)
        assert methods == {"public/get_last_trades_by_currency_and_time"}
        assert later.publisher.published == len(rows) + 2 * 50  # and a gap and a repair on each topic
        later.end()


@pytest.mark.parametrize("fetched", [0, 50])
def test_what_came_before_a_first_trade_is_fetched_also_where_its_healing_was_cut_by_a_kill(fetched: int) -> None:
    """It first traded while nobody was there, and that was known in the killed life alone."""
    channel, second = "trades.option.any.100ms", 1_000_000_000
    rows = [make_option_trade("BTC-27MAR27-1-C", seq) for seq in range(1, 303)]
    with short_directory() as directory:
        life = Life(directory, [channel], START, is_first=True)
        life.confirm(channel, START)
        life.lose(START + second)
        life.confirm(channel, START + second)
        life.take(channel, encode_data(channel, [rows[300]]), START + 2 * second)
        if fetched:
            heal_life(life, START + 2 * second).take(rows[:fetched], True, START + 2 * second)
        life.end()
        later = Life(directory, [channel], START + 3 * second, is_first=False)
        reader = later.listen()
        later.confirm(channel, START + 3 * second)
        later.take(channel, encode_data(channel, [rows[301]]), START + 4 * second)
        healer = heal_life(later, START + 5 * second)
        while healer.ask is not None:
            healer.take([row for row in rows if fits(row, healer.ask.params)], False, START + 5 * second)
        reader.receive(later.said, START)
        said = [msgspec.msgpack.decode(received.payload) for received in reader.record]
        assert sorted(body["trade_seq"] for body in said if body["type"] == "trade") == list(range(1, 303))
        reader.close()
        later.end()


def test_and_also_after_two_kills_of_which_the_second_came_amid_a_run_by_number() -> None:
    channel, second = "trades.option.any.100ms", 1_000_000_000
    rows = [make_option_trade("BTC-27MAR27-1-C", seq) for seq in range(1, 504)]
    received: list[bytes] = []
    with short_directory() as directory:
        for number, row in enumerate(rows[500:]):
            now = START + 10 * number * second
            life = Life(directory, [channel], now, is_first=number == 0)
            reader = life.listen()
            life.confirm(channel, now)
            if number == 0:
                life.lose(now + second)
                life.confirm(channel, now + second)
            life.take(channel, encode_data(channel, [row]), now + 2 * second)
            healer = heal_life(life, now + 3 * second)
            while number > 0 and healer.ask is not None:
                found = [row for row in rows[: 501 + number] if fits(row, healer.ask.params)]
                is_by_number = "start_seq" in healer.ask.params
                if number == 2 or is_by_number:
                    healer.take(found, False, now + 3 * second)
                else:
                    healer.go_on(None, now + 3 * second)  # the exchange refuses it
                if number == 1 and is_by_number:
                    break
            reader.receive(life.said, now)
            received += [each.payload for each in reader.record]
            reader.close()
            life.end()
    said = [msgspec.msgpack.decode(payload) for payload in received]
    assert {body["trade_seq"] for body in said if body["type"] == "trade"} == {row.trade_seq for row in rows}


def test_what_was_published_from_the_first_trade_on_is_not_fetched_again_after_a_kill() -> None:
    """Of an instrument that began to trade while we collected, too: its first trade has number 1, as it should."""
    channel, second = "trades.BTC-27MAR27-1-C.100ms", 1_000_000_000
    rows = [make_option_trade("BTC-27MAR27-1-C", seq) for seq in range(1, 302)]
    with short_directory() as directory:
        life = Life(directory, [channel], START, is_first=True)
        life.confirm(channel, START)
        life.take(channel, encode_data(channel, rows[:-1]), START + second)
        life.end()
        later = Life(directory, [channel], START + 2 * second, is_first=False)
        later.confirm(channel, START + 2 * second)
        later.take(channel, encode_data(channel, rows[-1:]), START + 3 * second)
        healer = heal_life(later, START + 4 * second)
        while healer.ask is not None:
            assert healer.ask.method == "public/get_last_trades_by_instrument"
            healer.take([row for row in rows if fits(row, healer.ask.params)], False, START + 4 * second)
        assert later.publisher.published == 100 + 1 + 2  # those that may not have gone out, the new one, gap and repair
        later.end()


def test_options_that_are_quiet_after_a_loss_do_not_cost_a_request_each() -> None:
    """What one of them missed makes the channel be healed once more: all the others have been asked for by time."""
    channel, second = "trades.option.any.100ms", 1_000_000_000
    names = [f"BTC-27MAR27-{strike}-C" for strike in range(50)]
    with short_directory() as directory:
        life = Life(directory, [channel], START, is_first=True)
        life.confirm(channel, START)
        life.take(channel, encode_data(channel, [make_option_trade(n, 7) for n in names]), START)
        life.lose(START + second)
        missed, asked = [make_option_trade(names[0], 8)], []
        for _ in range(2):
            healer = heal_life(life, START + 2 * second)
            while healer.ask is not None:
                asked.append(healer.ask.params)
                healer.take(missed if healer.ask.params.get("currency") == "BTC" else [], False, START + 2 * second)
        assert [params for params in asked if "instrument_name" in params] == []
        assert life.publisher.published == 50 + 3  # one gap, its trade, its repair
        life.end()


@pytest.mark.parametrize("channel", ["trades.option.any.100ms", "trades.BTC-27MAR27-1-C.100ms"])
def test_what_is_traded_while_a_channel_is_refused_comes_though_it_was_healed_meanwhile(channel: str) -> None:
    """No later trade shows it."""
    first, second, third = history = [make_option_trade("BTC-27MAR27-1-C", seq) for seq in (7, 8, 9)]
    with short_directory() as directory:
        life = Life(directory, [channel], START, is_first=True)
        reader = life.listen()
        life.confirm(channel, START)
        life.take(channel, encode_data(channel, [first]), START)
        life.lose(START + SECOND)
        for known in (history[:2], history):
            now = START + len(known) * SECOND
            healer = heal_life(life, now)
            while healer.ask is not None:
                healer.take([trade for trade in known if fits(trade, healer.ask.params)], False, now)
            life.confirm(channel, now)
        reader.receive(7, START)
        said = [msgspec.msgpack.decode(received.payload) for received in reader.record]
        assert [body["type"] for body in said] == ["trade", *["gap", "trade", "repair"] * 2]
        assert [body["missing_from"] for body in said if body["type"] == "gap"] == [second.trade_seq, third.trade_seq]
        reader.close()
        life.end()


@pytest.mark.parametrize("is_cut", [False, True], ids=["whole", "cut off"])
@pytest.mark.parametrize("name", ["null", "true", '"BTC-27MAR27-1-C"'])
def test_an_unreadable_frame_of_many_instruments_is_a_loss_on_all_that_it_may_speak_of(name: str, is_cut: bool) -> None:
    """On quiet ones too: no later trade would show what they miss. What was cut off may have been of any."""
    channel, names = "trades.option.any.100ms", ["BTC-27MAR27-1-C", "BTC-27MAR27-2-C"]
    with short_directory() as directory:
        life = Life(directory, [channel], START, is_first=True)
        feed = life.feeds[channel]
        life.confirm(channel, START)
        life.take(channel, encode_data(channel, [make_option_trade(n, 7) for n in names]), START)
        missed = make_option_trade(names[0], 8)
        frame = encode_data(channel, [msgspec.to_builtins(missed) | {"price": None}])
        frame = frame.replace(f'"{names[0]}"'.encode(), name.encode())
        if is_cut:
            frame = frame.replace(b"}]", b'},{"timestamp":17')
        feed.skip(frame, START + SECOND)
        assert [stream.lost for stream in feed.streams.values()] == [True, is_cut or names[0] not in name]
        healer = heal_life(life, START + 2 * SECOND)
        while healer.ask is not None:
            healer.take([missed] if healer.ask.params.get("currency") == "BTC" else [], False, START + 2 * SECOND)
        assert life.publisher.published == 2 + 3  # one gap, its trade, its repair
        life.end()


def test_an_unreadable_frame_of_a_new_instrument_is_no_loss_of_others() -> None:
    channel = "trades.option.any.100ms"
    with short_directory() as directory:
        life = Life(directory, [channel], START, is_first=True)
        feed = life.feeds[channel]
        life.confirm(channel, START)
        life.take(channel, encode_data(channel, [make_option_trade("BTC-27MAR27-1-C", 7)]), START)
        missed = make_option_trade("BTC-27MAR27-2-C", 1)
        feed.skip(encode_data(channel, [msgspec.to_builtins(missed) | {"price": None}]), START + SECOND)
        assert [stream.lost for stream in feed.streams.values()] == [False]
        healer = heal_life(life, START + 2 * SECOND)
        while healer.ask is not None:
            healer.take([missed] if healer.ask.params.get("currency") == "BTC" else [], False, START + 2 * SECOND)
        assert feed.streams["BTC-27MAR27-2-C"].last_id == 1
        life.end()


def heal_life(life: Life, now: int) -> Healer:
    (feed,) = life.feeds.values()
    assert isinstance(feed, TradeFeed)
    return Healer(life, feed, now, 0)


def make_option_trade(name: str, seq: int) -> TradeData:
    return msgspec.convert(make_trade(seq, instrument_name=name, timestamp=START // MS + 1500 + seq), TradeData)


def lose_after_trade(topics: Topics, name: str) -> tuple[TradeFeed, Line]:
    """All options, of which one has had its trade 5 when the connection is lost, and how their frames are made."""
    feed = TradeFeed(parse_channel("trades.option.BTC.100ms"), topics)
    line = Line(feed.channel.name, (name,))
    feed.losses.confirm(START)
    feed.take(line.encode([msgspec.to_builtins(make_option_trade(name, 5))]), START)
    feed.find_stream(name).last_ts = START  # as the publisher does once it is out
    feed.lose("disconnect", START + SECOND)
    return feed, line


@pytest.mark.parametrize(("later", "offset", "earlier"), [(-3599, 0, -3600), (7200, -3600, 0)])
def test_our_clock_may_be_set_around_a_loss(topics: Topics, later: int, offset: int, earlier: int) -> None:
    """It was an hour ahead, and is set back during the loss; or was set ahead before it. All in seconds."""
    feed = TradeFeed(parse_channel("trades.option.BTC.raw"), topics)
    feed.losses.confirm(START)
    feed.lose("disconnect", START)
    first = next(heal_feed(feed, START + later * SECOND, offset * SECOND, earlier * SECOND))
    assert isinstance(first, Ask)
    assert START - 3610 * SECOND < first.params["start_timestamp"] * MS < START - 3600 * SECOND


def test_of_two_losses_that_are_healed_together_the_first_says_since_when(topics: Topics) -> None:
    """The answers to what was asked after the first one went with the connection."""
    feed, line = lose_after_trade(topics, "BTC-27MAR27-90000-C")
    last = START + 60 * SECOND
    trade = replace(make_option_trade("BTC-27MAR27-90000-C", 6), timestamp=last // MS)
    ((stream, _), *_) = feed.take(line.encode([msgspec.to_builtins(trade)]), last)
    stream.last_ts = last
    feed.lose("disconnect", last + SECOND)
    first = next(heal_feed(feed, last + 2 * SECOND, 0))
    assert isinstance(first, Ask)
    assert first.params["start_timestamp"] * MS < START


@pytest.mark.parametrize("channel", ["trades.option.BTC.raw", "trades.BTC-27MAR27-90000-C.raw"])
def test_our_clock_may_be_set_back_between_a_quiet_start_and_the_loss(topics: Topics, channel: str) -> None:
    """Nothing had come that could tell by the exchange's clock since when it may lack trades."""
    feed = TradeFeed(parse_channel(channel), topics)
    feed.losses.confirm(START + 86_400 * SECOND)
    feed.lose("disconnect", START + 100 * SECOND)
    first = next(heal_feed(feed, START + 110 * SECOND, 0, 0))
    assert isinstance(first, Ask)
    assert START - 86_400 * SECOND < first.params["start_timestamp"] * MS < START


@pytest.mark.parametrize("ahead", [-86_400, -3600, 3600, 86_400])
def test_a_clock_that_was_wrong_from_the_start_leaves_nothing_out(topics: Topics, ahead: int) -> None:
    """`ahead`: the exchange's clock is so many seconds ahead of ours."""
    feed = TradeFeed(parse_channel("trades.option.BTC.raw"), topics)
    feed.losses.confirm(START - ahead * SECOND)
    feed.lose("disconnect", START + (100 - ahead) * SECOND)
    first = next(heal_feed(feed, START + (110 - ahead) * SECOND, ahead * SECOND, ahead * SECOND))
    assert isinstance(first, Ask)
    assert START - 86_400 * SECOND < first.params["start_timestamp"] * MS < START


@pytest.mark.parametrize("ahead", [0, 3600 * SECOND])
def test_what_came_late_before_a_loss_does_not_hide_what_is_missing(topics: Topics, ahead: int) -> None:
    """`ahead`: so much the exchange's clock is ahead of ours, in ns."""
    name = "BTC-27MAR27-90000-C"
    feed = TradeFeed(parse_channel("trades.option.BTC.raw"), topics)
    feed.losses.confirm(START)
    last = replace(make_option_trade(name, 7), timestamp=(START + ahead) // MS + 40_000)
    came = START + 60 * SECOND  # so 20 s late
    ((stream, _),) = feed.take(Line(feed.channel.name, (name,)).encode([msgspec.to_builtins(last)]), came)
    stream.last_ts = came
    feed.lose("disconnect", came)
    first = next(heal_feed(feed, came + SECOND, ahead))
    assert isinstance(first, Ask)
    assert first.params["start_timestamp"] < last.timestamp


@pytest.mark.parametrize("channel", ["trades.option.BTC.raw", "trades.BTC-27MAR27-90000-C.raw"])
@pytest.mark.parametrize("is_known", [False, True])
def test_a_day_without_trades_does_not_hide_those_of_a_lost_connection(
    topics: Topics, channel: str, is_known: bool
) -> None:
    """To a request for what is older than a day the exchange answers that there is nothing, not even since then.

    It may be sent late: here the exchange has asked for half an hour of patience.
    """
    name, day, late = "BTC-27MAR27-90000-C", 86_400_000, 1_800_000
    feed = TradeFeed(parse_channel(channel), topics)
    feed.losses.confirmed_at = START
    line = Line(channel, (name,))
    if is_known:
        first = make_option_trade(name, 1)
        ((stream, _),) = feed.take(line.encode([msgspec.to_builtins(first)]), START)
        stream.last_ts = START
    now = START + 2 * day * MS
    missed = [replace(make_option_trade(name, seq), timestamp=now // MS - 20_000 + seq) for seq in (2, 3)]
    feed.lose("disconnect", now - 20_000 * MS)
    came: list[int] = []

    def answer(ask: Ask) -> Page:
        is_late = ask.params.get("start_timestamp", now) < now // MS + late - day
        page = Page([] if is_late else [each for each in missed if fits(each, ask.params)], False)
        came.extend(said.trade_seq for _, said in feed.backfill(page.trades, now) if isinstance(said, Trade))
        return page

    run_healing(heal_feed(feed, now, 0), answer)
    assert came == [2, 3]
    if not feed.channel.instrument:  # while the connection stood, nothing was missed: no gap is owed for older numbers
        later = msgspec.to_builtins(make_option_trade("BTC-27MAR27-95000-C", 50))
        assert [type(said) for _, said in feed.take(line.encode([later]), now)] == [Trade]


@in_loop
async def test_a_later_life_is_told_when_the_connection_stood_last(practice: str) -> None:
    async with collecting(practice, "", QUOTE) as run:
        start = time.time_ns()
        await wait_for(lambda: run.worker.ledger.cells[HEARD] > start, "the look of the second")


@in_loop
async def test_a_later_life_is_told_up_to_when_all_that_was_said_is_out(practice: str) -> None:
    """What waits for a subscriber that reads nothing is not."""
    async with collecting(practice, "", QUOTE) as run:
        cells, peers = run.worker.ledger.cells, run.worker.publisher._socket._peers
        start, count = time.time_ns(), len(peers)
        await wait_for(lambda: cells[OUT] > start, "the look of the second")
        with socket.socket(socket.AF_UNIX) as mute:
            mute.connect(run.worker.publisher.endpoint.removeprefix("ipc://"))
            await wait_for(lambda: len(peers) > count, "one that reads nothing")
            while not peers[-1].unsent:
                peers[-1].write(b"a" * 1000, 1)
            filled = time.time_ns()
            await wait_for(lambda: cells[HEARD] > filled, "the next look")
            assert cells[OUT] < filled
        await wait_for(lambda: cells[OUT] > filled, "the look after it has gone")


@in_loop
async def test_a_later_life_is_told_nothing_of_a_topic_that_was_left_once_its_last_word_is_out(practice: str) -> None:
    """Another connection may feed it by then."""
    async with collecting(practice, "", QUOTE) as run:
        (stream,) = (feed.stream for feed in run.worker.feeds.values())
        place = stream.slot + LAST_TS
        await wait_for(lambda: run.worker.ledger.cells[place], "a quote")
        await run.ask("unsubscribe", channels=[QUOTE])
        assert run.worker.ledger.cells[place], "it may have been killed at once"
        await wait_for(lambda: not run.worker.ledger.cells[place], "it to be surely out")


@pytest.mark.parametrize("is_late", [False, True])
def test_what_could_not_be_asked_for_is_told_where_an_instrument_first_trades(topics: Topics, is_late: bool) -> None:
    """All requests are refused: of what an instrument traded meanwhile, that was not heard of before, nobody knows."""
    name = "BTC-27MAR27-90000-C"
    feed = TradeFeed(parse_channel("trades.option.BTC.raw"), topics)
    line = Line(feed.channel.name, (name,))

    def trade(seq: int) -> list[Any]:
        return [said for _, said in feed.take(line.encode([msgspec.to_builtins(make_option_trade(name, seq))]), START)]

    feed.losses.confirm(START - 9)
    feed.lose("disconnect", START)
    said = trade(5) if is_late else []
    for step in heal_feed(feed, START, 0):  # no answer to any request
        if not isinstance(step, Ask):
            said += step.tape.end_healing(step.holes, START)
    said += [] if is_late else trade(5)
    gap = next(each for each in said if isinstance(each, Gap))
    assert trade(3) == [], "it was said to stay missing"
    assert (gap.reason, gap.from_ts, gap.missing_from, gap.missing_to) == ("disconnect", START - 9, 1, 4)
    assert gap.healing is is_late
    assert [(each.gap, each.missing) for each in said if isinstance(each, Repair)] == [(gap.id, [(1, 4)])] * is_late
    assert [type(each) for each in trade(6)] == [Trade], "it is told once"


def test_the_gap_of_a_first_trade_does_not_begin_after_its_end_where_our_clock_was_set_back(topics: Topics) -> None:
    name = "BTC-27MAR27-90000-C"
    feed = TradeFeed(parse_channel("trades.option.BTC.raw"), topics)
    feed.losses.confirm(START)
    feed.lose("disconnect", START)
    run_healing(heal_feed(feed, START, 0), lambda _: None)
    frame = Line(feed.channel.name, (name,)).encode([msgspec.to_builtins(make_option_trade(name, 5))])
    (_, gap), _ = feed.take(frame, START - 3600 * SECOND)
    assert isinstance(gap, Gap)
    assert gap.from_ts == gap.to_ts == START - 3600 * SECOND


def test_a_trade_that_comes_after_the_first_though_it_is_older_is_said_late_and_once(topics: Topics) -> None:
    """What lies between the two is missing then: it is fetched, or named. Of before them nothing is asked for."""
    name = "BTC-27MAR27-90000-C"
    feed = TradeFeed(parse_channel("trades.option.BTC.raw"), topics)
    feed.losses.confirm(START)

    def take(*numbers: int) -> list[tuple[int, bool]]:
        rows = [msgspec.to_builtins(make_option_trade(name, seq)) for seq in numbers]
        published = feed.take(Line(feed.channel.name, (name,)).encode(rows), START)
        return [(said.trade_seq, said.backfilled is True) for _, said in published if isinstance(said, Trade)]

    assert take(18, 17) == [(18, False), (17, True)]
    assert take(17, 18, 14, 15, 17, 14) == [(14, True), (15, True)]
    assert (feed.duplicates, feed.changed) == (4, True)
    assert topics.ledger.cells[feed.tapes[name].stream.slot + UNHEALED] == 14, "a later life would fetch from there"
    asked: list[tuple[int, int]] = []
    said: list[Any] = []
    for step in heal_feed(feed, START, 0):  # no answer to any request
        if isinstance(step, Ask):
            asked.append((step.params["start_seq"], step.params["end_seq"]))
        else:
            said += step.tape.end_healing(step.holes, START)
    assert asked == [(15, 16)] * len(PAUSES)
    assert [(each.missing_from, each.missing_to) for each in said if isinstance(each, Gap)] == [(16, 16)]
    assert [each.missing for each in said if isinstance(each, Repair)] == [[(16, 16)]]
    assert take(12) == [(12, True)]
    feed.tapes[name].note_out()
    assert topics.ledger.cells[feed.tapes[name].stream.slot + UNHEALED] == 12, "no end of another healing"
    assert take(14, 15, 17, 18, 19) == [(19, False)]
    assert take(13, 11) == [(13, True), (11, True)]


def test_and_also_where_a_healing_has_found_nothing_before_the_first(topics: Topics) -> None:
    name = "BTC-27MAR27-90000-C"
    feed = TradeFeed(parse_channel("trades.option.BTC.raw"), topics)
    line = Line(feed.channel.name, (name,))
    first, late = (line.encode([msgspec.to_builtins(make_option_trade(name, seq))]) for seq in (18, 17))
    feed.losses.confirm(START)
    feed.lose("disconnect", START)
    feed.take(first, START)
    run_healing(heal_feed(feed, START, 0), answer_nothing)
    tape = feed.tapes[name]
    assert tape.end_healing(tape.holes, START) == []
    assert [type(said) for _, said in feed.take(late, START)] == [Trade]


def test_a_trade_of_before_a_topic_was_left_is_not_said_again_where_the_new_first_is_later(topics: Topics) -> None:
    name = "BTC-27MAR27-90000-C"
    line = Line("trades.option.BTC.raw", (name,))
    for first, late, said in ((18, 17, 2), (25, 18, 1)):
        feed = TradeFeed(parse_channel(line.channel), topics)
        feed.losses.confirm(START)
        rows = [msgspec.to_builtins(make_option_trade(name, seq)) for seq in (first, late)]
        assert len(feed.take(line.encode(rows), START)) == said
        topics.leave(feed.tapes[name].stream, START)


def fits(trade: TradeData, params: dict[str, Any]) -> bool:
    """Whether a request asks for a trade."""
    numbers: bool = params.get("start_seq", 0) <= trade.trade_seq
    return numbers and bool(params.get("start_timestamp", 0) <= trade.timestamp)


def test_a_fetched_trade_that_cannot_be_read_does_not_cost_the_others() -> None:
    trade = make_trade(7, price="1.5", amount=1, timestamp=5)
    page = read_page({"trades": [trade, trade | {"price": None}, 5, trade | {"trade_seq": 8}], "has_more": True})
    assert [(each.trade_seq, each.price) for each in page.trades] == [(7, 1.5), (8, 1.5)]
    assert page.has_more
    assert read_page({"trades": []}).trades == []
    deep: list[Any] = []
    for _ in range(600):  # an answer so deep can be read all the same
        deep = [deep]
    wrong: list[Any] = [{"trades": [5, None]}, {"trades": None}, {}, [], None, {"trades": 5}, {"trades": deep}]
    for answer in wrong:
        with pytest.raises(ValueError, match="holds no trades"):
            read_page(answer)


# -- restarts ---------------------------------------------------------------------------------------------------------


def test_a_killed_worker_is_carried_on_by_the_next_without_a_loss(practice: str) -> None:
    """The same subscriber hears both lives: a restart gap on each topic, no number missing, no trade lost."""
    connection = {"url": practice, "retry_delay": 0.05, "channels": list(TOPICS.values())}
    with collected({"w": connection}, exchange=None) as run:
        state = run.wait_state("w")
        with subscribed(state["publish"]) as ear:
            for _ in range(2):
                epoch = run.wait_state("w")["epoch"]
                for topic in TOPICS:
                    ear.wait_for(topic, epoch=epoch, type=topic.split(".")[1])
                ear.listen_until(partial(count_trades, ear, epoch), "trades")
                run.find_process("w").kill()
                for topic in TOPICS:
                    ear.listen_until(partial(find_later, ear, topic, epoch), "the next life")
                run.wait_state("w")
            epoch = run.get_state("w")["epoch"]
            ear.wait_for(TRADED, epoch=epoch, type="repair")
            ear.listen_until(lambda: len(ear.find(BOOKS, epoch=epoch, type="book")) > 3, "the book")
            messages = [(topic, body) for topic, body in ear.messages if not body.get("join")]
        epochs = sorted({body["epoch"] for _, body in messages})
        assert len(epochs) == 3
        for topic in TOPICS:
            for earlier, later in pairwise(epochs):
                check_second_life([b for t, b in messages if t == topic], earlier, later)
        trades = {b["trade_seq"] for t, b in messages if t == TRADED and b["type"] == "trade"}
        assert set(range(min(trades), max(trades) + 1)) == trades
        run.stop()


def count_trades(ear: Subscriber, epoch: int) -> bool:
    return len(ear.find(TRADED, epoch=epoch, type="trade")) > 3


def find_later(ear: Subscriber, topic: str, epoch: int) -> bool:
    return any(body["epoch"] > epoch for body in ear.find(topic))


def check_second_life(bodies: list[dict[str, Any]], earlier: int, later: int) -> None:
    """It begins with number 1, and says the gap before any new data."""
    first = [body for body in bodies if body["epoch"] == later]
    assert [body["seq"] for body in first] == list(range(1, len(first) + 1))
    (gap,) = [body for body in first if body["type"] == "gap" and body["reason"] == "restart"]
    assert [body["type"] for body in first if body["seq"] < gap["seq"]].count("status") == gap["seq"] - 1
    before = {body["receive_ts"] for body in bodies if body["epoch"] == earlier and body["type"] not in OWN}
    # What is out is noted next: a kill between the two leaves the read before as the last word.
    assert gap["from_ts"] >= max(sorted(before)[:-1], default=0)


def test_a_stopped_and_started_collector_has_no_restart_gaps(practice: str) -> None:
    connection = {"url": practice, "channels": list(TOPICS.values())}
    with collected({"w": connection}, exchange=None) as run:
        state = run.wait_state("w")
        with subscribed(state["publish"]) as ear:
            for topic in TOPICS:
                ear.wait_for(topic, type=topic.split(".")[1])
            assert not [body for _, body in ear.messages if body["type"] == "gap"]
        assert run.stop() == 0
        assert not list(run.runtime_dir.glob("*.ledger"))


def test_of_two_losses_that_could_not_be_asked_for_the_first_says_since_when_trades_may_be_missing(
    topics: Topics,
) -> None:
    feed = TradeFeed(parse_channel("trades.option.BTC.raw"), topics)
    feed.losses.confirm(START)
    names = [f"BTC-27MAR27-{strike}-C" for strike in (90000, 95000, 99000)]
    said: list[Any] = []
    for number, name in enumerate(names):
        frame = Line(feed.channel.name, (name,)).encode([msgspec.to_builtins(make_option_trade(name, 5))])
        said = [message for _, message in feed.take(frame, START + number * SECOND)]
        feed.find_stream(name).last_ts = START + number * SECOND  # as the publisher does once it is out
        feed.lose("disconnect", START + (number + 1) * SECOND)
        run_healing(heal_feed(feed, START + (number + 1) * SECOND, 0), lambda ask: None)
    assert [(gap.from_ts, gap.missing_from, gap.missing_to) for gap in said[:1]] == [(START, 1, 4)]


def test_a_loss_that_was_healed_days_ago_makes_none_unsure_that_comes_later(topics: Topics) -> None:
    """In between the connection stood: all that was traded came."""
    name = "BTC-27MAR27-90000-C"
    feed = TradeFeed(parse_channel("trades.option.BTC.raw"), topics)
    feed.losses.confirm(START)
    for lost in (START + SECOND, START + 3 * 86_400 * SECOND):
        feed.lose("disconnect", lost)
        feed.losses.confirm(lost + SECOND)
        run_healing(heal_feed(feed, lost + 10 * SECOND, 0), answer_nothing)
    frame = Line(feed.channel.name, (name,)).encode([msgspec.to_builtins(make_option_trade(name, 50))])
    assert [type(said) for _, said in feed.take(frame, START + 4 * 86_400 * SECOND)] == [Trade]


def test_after_more_than_a_day_away_what_an_instrument_may_have_traded_before_its_first_trade_is_told(
    topics: Topics,
) -> None:
    """Asked for what is older, the exchange answers that there is nothing."""
    feed = TradeFeed(parse_channel("trades.option.BTC.raw"), topics)
    feed.losses.confirm(START)
    feed.lose("disconnect", START + SECOND)
    now = START + 2 * 86_400 * SECOND
    feed.losses.confirm(now)
    run_healing(heal_feed(feed, now + 10 * SECOND, 0), answer_nothing)
    name = "BTC-27MAR27-90000-C"
    frame = Line(feed.channel.name, (name,)).encode([msgspec.to_builtins(make_option_trade(name, 50))])
    (_, gap), (_, trade) = feed.take(frame, now + 20 * SECOND)
    assert isinstance(gap, Gap)
    assert (gap.reason, gap.from_ts, gap.missing_from, gap.missing_to) == ("disconnect", START, 1, 49)
    assert isinstance(trade, Trade)


def test_and_also_where_it_was_lost_amid_a_healing_and_the_next_had_to_wait_for_a_day(topics: Topics) -> None:
    feed = TradeFeed(parse_channel("trades.option.BTC.raw"), topics)
    feed.losses.confirm(START)
    feed.lose("disconnect", START + SECOND)
    feed.losses.confirm(START + 2 * SECOND)

    def lose_once_more(_: Ask) -> Page:
        if feed.losses.newer_from is None:
            feed.lose("disconnect", START + 4 * SECOND)
            feed.losses.confirm(START + 5 * SECOND)
        return Page([], False)

    run_healing(heal_feed(feed, START + 3 * SECOND, 0), lose_once_more)
    assert feed.losses.unanswered_from is None
    run_healing(heal_feed(feed, START + 2 * 86_400 * SECOND, 0), answer_nothing)
    assert feed.losses.unanswered_from is not None


@pytest.mark.parametrize("is_refused", [True, False])
def test_and_by_a_later_life(topics: Topics, is_refused: bool) -> None:
    """The connection has not stood for days; or it has, but what was lost before could not be asked for."""
    feed = TradeFeed(parse_channel("trades.option.BTC.raw"), topics)
    feed.losses.confirm(START)
    if is_refused:
        feed.lose("disconnect", START + SECOND)
        feed.losses.confirm(START + 2 * SECOND)
        run_healing(heal_feed(feed, START + 3 * SECOND, 0), lambda _: None)
    now = START + 2 * 86_400 * SECOND
    topics.ledger.cells[HEARD] = now if is_refused else START + SECOND
    later = TradeFeed(feed.channel, topics)
    later.losses.recall()
    later.lose("restart", now)
    later.losses.confirm(now)
    run_healing(heal_feed(later, now + SECOND, 0), answer_nothing)
    assert later.losses.unanswered_from == START


def test_the_trade_before_a_loss_is_asked_for_by_number_also_where_all_was_asked_for_by_time(topics: Topics) -> None:
    """Of many instruments, too, one may be counted anew, and by then have come to the number that was due."""
    name = "BTC-27MAR27-90000-C"
    feed, line = lose_after_trade(topics, name)
    feed.take(line.encode([msgspec.to_builtins(make_option_trade(name, 6))]), START + 2 * SECOND)
    asked = [each.params for each in run_healing(heal_feed(feed, START + 3 * SECOND, 0), answer_nothing)]
    assert {(each["start_seq"], each["end_seq"]) for each in asked if "end_seq" in each} == {(5, 5)}
