"""Subscriptions: what is asked for becomes what is confirmed, in calls that the exchange takes, whatever goes wrong."""

import asyncio
import functools
import json
import re
import time
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector.lifecycle import Exit
from collector.limits import CALL_BURST, CALL_COST, MAX_CHANNELS, MAX_FRAME, SUBSCRIBE_COST, Credits
from collector.messages import ControlError
from tests.deribit_support import (
    BOOK,
    LOGIN,
    QUOTE,
    TICKER,
    TRADES,
    connected,
    encode_data,
    living,
    scripted,
    wait_for,
)
from tests.exchange_client import exchange, get
from tests.support import PATIENCE, in_loop
from workers.deribit import Client, ExchangeError
from workers.deribit.commands import SLICE
from workers.deribit.connection.reconcile import RETRIES, SECOND_CHANCE, SOON
from workers.deribit.connection.subscriptions import EXPIRED, LEFT_OUT, NO_TRADES, TRIES, Call, Subscriptions
from workers.deribit.rpc.codec import encode_request

RAW = ["book.BTC-PERPETUAL.raw", "trades.ETH-PERPETUAL.raw"]
OWN = ["user.portfolio.btc", "user.orders.BTC-PERPETUAL.raw"]


def are_equal(subscriptions: Subscriptions) -> bool:
    """Whether asked-for and confirmed are equal, but for what was refused, and no call is needed or under way."""
    wanted = {name for name in subscriptions.asked if name not in subscriptions.refused}
    is_quiet = not (subscriptions._in_flight or subscriptions._dropped)
    return is_quiet and subscriptions.confirmed == wanted


# -- pure: which calls are made, and what their answers mean ----------------------------------------------------------


def subscribe(*names: str) -> Subscriptions:
    subscriptions = Subscriptions()
    subscriptions.ask(list(names))
    return subscriptions


def take_answer(subscriptions: Subscriptions, call: Call, answered: list[str]) -> tuple[list[str], list[str]]:
    """What an answer means, with which its call ends."""
    meant = subscriptions.take_answer(call, answered)
    subscriptions.end_call(call)
    return meant


def note_left(subscriptions: Subscriptions, call: Call) -> None:
    """A call that leaves is answered, and ends with that."""
    subscriptions.note_left(call.channels)
    subscriptions.end_call(call)


def test_public_and_private_channels_go_by_their_own_calls() -> None:
    subscriptions = subscribe(QUOTE, *RAW, *OWN)
    assert subscriptions.plan_calls(False, awaits_login=True) == [Call("public/subscribe", (QUOTE,))]
    assert subscriptions.plan_calls(True) == [
        Call("public/subscribe", tuple(RAW)), Call("private/subscribe", tuple(OWN))
    ]  # fmt: skip
    assert subscriptions.plan_calls(True) == []  # all on their way
    assert subscribe(*OWN).plan_calls(False) == [Call("public/subscribe", tuple(OWN))]


def test_who_wants_a_channel_no_more_is_not_told_that_it_was_refused() -> None:
    subscriptions = subscribe(QUOTE, BOOK)
    (call,) = subscriptions.plan_calls(False)
    subscriptions.drop([QUOTE])
    assert subscriptions.refuse(list(call.channels), "no") == [BOOK]
    assert subscriptions.refused == {BOOK: "no"}


def test_what_is_left_out_twice_is_refused_until_the_next_bootstrap_or_wish() -> None:
    subscriptions = subscribe(QUOTE, BOOK)
    for attempt in range(1, TRIES + 1):
        (call,) = subscriptions.plan_calls(False)
        gained, refused = take_answer(subscriptions, call, [QUOTE])
        assert gained == ([QUOTE] if attempt == 1 else [])
        assert refused == ([BOOK] if attempt == TRIES else [])
    assert (subscriptions.plan_calls(False), subscriptions.refused) == ([], {BOOK: LEFT_OUT})
    assert are_equal(subscriptions)
    subscriptions.ask([BOOK])
    assert subscriptions.plan_calls(False) == [Call("public/subscribe", (BOOK,))]
    subscriptions.forget()
    assert subscriptions.plan_calls(False) == [Call("public/subscribe", (QUOTE, BOOK))]
    assert not are_equal(subscriptions)


def test_what_was_refused_is_looked_through_once_however_many_instruments_are_listed_together() -> None:
    """Hundreds are, when as many end: of those thousands of channels are refused just then."""
    subscriptions, looks = subscribe(QUOTE, BOOK, *RAW), []
    subscriptions.expire([QUOTE, *RAW])
    assert subscriptions.refuse([BOOK], "no") == [BOOK]

    class Refused(dict[str, str]):
        def items(self) -> Any:
            looks.append(1)
            return super().items()

    subscriptions.refused = Refused(subscriptions.refused)
    for number in range(1000):
        subscriptions.note_listed(f"BTC-{number}")
    assert subscriptions.plan_calls(False) == []
    subscriptions.note_listed("BTC-PERPETUAL")
    assert subscriptions.plan_calls(False) == [Call("public/subscribe", (BOOK,))]
    assert len(looks) == 2


def test_what_is_left_out_is_asked_for_once_more_whatever_was_before_a_loss_or_a_wish() -> None:
    subscriptions = subscribe(BOOK)
    for begin_anew in (subscriptions.forget, lambda: subscriptions.ask([BOOK]), subscriptions.forget):
        (call,) = subscriptions.plan_calls(False)
        assert take_answer(subscriptions, call, []) == ([], [])
        begin_anew()


def test_what_is_dropped_and_wanted_again_before_a_call_is_subscribed_anew() -> None:
    """Else its second feed would never hear that it is confirmed, nor get a snapshot."""
    subscriptions = subscribe(QUOTE, BOOK)
    (call,) = subscriptions.plan_calls(False)
    take_answer(subscriptions, call, [QUOTE, BOOK])
    subscriptions.drop([BOOK])
    subscriptions.ask([BOOK])
    assert not are_equal(subscriptions)
    (call,) = subscriptions.plan_calls(False)
    assert call == Call("public/unsubscribe", (BOOK,))
    note_left(subscriptions, call)
    (call,) = subscriptions.plan_calls(False)
    assert call == Call("public/subscribe", (BOOK,))
    assert take_answer(subscriptions, call, [BOOK]) == ([BOOK], [])
    assert are_equal(subscriptions)


@pytest.mark.parametrize("is_over", [False, True])
def test_what_was_asked_for_again_and_again_may_be_left_as_often_as_any_other(is_over: bool) -> None:
    """Whether its instrument has ended, or it is left for a new snapshot."""
    subscriptions = subscribe(BOOK)
    assert subscriptions.refuse([BOOK], "not now", RETRIES) == []
    take_answer(subscriptions, subscriptions.plan_calls(False)[0], [BOOK])
    if is_over:
        subscriptions.expire([BOOK])
    for _ in range(RETRIES):
        assert subscriptions.confirmed == {BOOK}
        subscriptions.refuse_leaving(Call("public/unsubscribe", (BOOK,)), RETRIES)
    assert subscriptions.confirmed == set()


def test_what_is_not_let_go_counts_as_left_in_the_end_and_may_be_asked_for_as_often_as_before() -> None:
    subscriptions = subscribe(BOOK)
    take_answer(subscriptions, subscriptions.plan_calls(False)[0], [BOOK])
    subscriptions.drop([BOOK])
    subscriptions.ask([BOOK])
    for _ in range(3):
        assert subscriptions.confirmed == {BOOK}
        (call,) = subscriptions.plan_calls(False)
        subscriptions.refuse_leaving(call, tries=3)
        subscriptions.end_call(call)
    (call,) = subscriptions.plan_calls(False)
    assert (call, subscriptions.confirmed) == (Call("public/subscribe", (BOOK,)), set())
    assert take_answer(subscriptions, call, []) == ([], [])


def test_what_expires_while_it_is_asked_for_is_left_whatever_the_answer() -> None:
    subscriptions = subscribe(QUOTE, BOOK)
    (call,) = subscriptions.plan_calls(False)
    assert subscriptions.expire([BOOK]) == [BOOK]
    assert take_answer(subscriptions, call, [QUOTE, BOOK]) == ([QUOTE], [])
    assert subscriptions.plan_calls(False) == [Call("public/unsubscribe", (BOOK,))]


def test_what_has_expired_is_left_and_asked_for_again_only_on_a_new_wish() -> None:
    subscriptions = subscribe(QUOTE, BOOK)
    (call,) = subscriptions.plan_calls(False)
    take_answer(subscriptions, call, [QUOTE, BOOK])
    assert subscriptions.expire([BOOK, "never.asked"]) == [BOOK]
    assert subscriptions.expire([BOOK]) == []
    (call,) = subscriptions.plan_calls(False)
    assert call == Call("public/unsubscribe", (BOOK,))
    note_left(subscriptions, call)
    assert (subscriptions.refused, are_equal(subscriptions)) == ({BOOK: EXPIRED}, True)
    subscriptions.forget()
    assert subscriptions.plan_calls(False) == [Call("public/subscribe", (QUOTE,))]
    subscriptions.ask([BOOK])
    assert subscriptions.plan_calls(False) == [Call("public/subscribe", (BOOK,))]


def test_what_only_a_clock_has_ended_is_known_until_the_exchange_says_it_or_somebody_wants_it_again() -> None:
    subscriptions = subscribe(QUOTE, BOOK)
    assert subscriptions.expire([QUOTE], by_clock=True) == [QUOTE]
    assert subscriptions.expire([BOOK]) == [BOOK]
    assert subscriptions.expire([BOOK], by_clock=True) == []
    assert subscriptions.presumed == {QUOTE}
    subscriptions.forget()
    assert subscriptions.presumed == {QUOTE}
    assert subscriptions.expire([QUOTE]) == []
    assert subscriptions.presumed == set()
    subscriptions.ask([QUOTE])
    subscriptions.expire([QUOTE], by_clock=True)
    subscriptions.drop([QUOTE])
    assert subscriptions.presumed == set()


def test_what_is_unwanted_is_unsubscribed() -> None:
    subscriptions = subscribe(QUOTE, *OWN)
    for call in subscriptions.plan_calls(True):
        take_answer(subscriptions, call, list(call.channels))
    subscriptions.drop([QUOTE, OWN[0], "never.asked"])
    calls = subscriptions.plan_calls(True)
    assert calls == [Call("public/unsubscribe", (QUOTE,)), Call("private/unsubscribe", (OWN[0],))]
    for call in calls:
        note_left(subscriptions, call)
    assert subscriptions.confirmed == {OWN[1]}
    assert are_equal(subscriptions)


def test_a_wish_dropped_while_on_its_way_is_taken_back() -> None:
    subscriptions = subscribe(QUOTE)
    (call,) = subscriptions.plan_calls(False)
    subscriptions.drop([QUOTE])
    take_answer(subscriptions, call, [QUOTE])
    assert subscriptions.plan_calls(False) == [Call("public/unsubscribe", (QUOTE,))]


@pytest.mark.parametrize("name", ["", "a b", "x" * 300, "book.BTC-PERPETUAL.50ms", "book.BTC-PERPETUAL", "ü.ü", "a..b"])
def test_what_cannot_be_a_channel_is_refused_and_nothing_of_the_wish_is_kept(name: str) -> None:
    subscriptions = Subscriptions()
    with pytest.raises(ValueError, match=r"channel|offered|form"):
        subscriptions.ask([QUOTE, name])
    assert subscriptions.asked == {}


NAMES = [f"quote.A{number}" for number in range(6)] + ["book.A.raw", "user.portfolio.btc"]
some = st.lists(st.sampled_from(NAMES), max_size=4)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(["ask", "drop", "answer", "fail", "forget"]), some, st.booleans())))
def test_whatever_happens_a_well_exchange_makes_them_equal_in_the_end(steps: list[tuple[str, list[str], bool]]) -> None:
    subscriptions = Subscriptions()
    held: set[str] = set()
    calls: list[Call] = []
    for what, names, logged_in in steps:
        calls += subscriptions.plan_calls(logged_in)
        assert len([name for call in calls for name in call.channels]) == len({n for c in calls for n in c.channels})
        if what == "ask":
            subscriptions.ask(names)
        elif what == "drop":
            subscriptions.drop(names)
        elif what == "forget":
            subscriptions.forget()
            held, calls = set(), []
        elif calls and what == "fail":
            subscriptions.end_call(calls.pop(0))
        elif calls:
            answer(subscriptions, calls.pop(0), held, leave_out=names)
    for call in calls:
        answer(subscriptions, call, held)
    while calls := subscriptions.plan_calls(True):
        for call in calls:
            answer(subscriptions, call, held)
    assert are_equal(subscriptions)
    assert held == subscriptions.confirmed == set(subscriptions.asked) - set(subscriptions.refused)


def answer(subscriptions: Subscriptions, call: Call, held: set[str], leave_out: list[str] | None = None) -> None:
    """Answer a call as Deribit does, but for the channels left out."""
    if call.method.endswith("unsubscribe"):
        held.difference_update(call.channels)
        note_left(subscriptions, call)
        return
    given = [name for name in call.channels if name not in (leave_out or ())]
    held.update(given)
    take_answer(subscriptions, call, sorted(given, reverse=True))


@given(st.integers(1, 3000), st.integers(1, 60))
def test_no_call_is_larger_than_the_exchange_takes(count: int, length: int) -> None:
    names = [f"quote.{'X' * length}{number}" for number in range(count)]
    calls = subscribe(*names).plan_calls(False)
    assert [name for call in calls for name in call.channels] == names
    for call in calls:
        assert len(call.channels) <= MAX_CHANNELS
        assert len(encode_request(2**40, call.method, {"channels": list(call.channels)}).encode()) <= MAX_FRAME
    for one, other in pairwise(calls):  # and none is smaller than need be
        assert (
            len(one.channels) == MAX_CHANNELS or len(json.dumps([*one.channels, other.channels[0]])) > MAX_FRAME - 200
        )


# -- against the exchange ---------------------------------------------------------------------------------------------


def check_equal(client: Client, *but: str) -> None:
    """Asked for and confirmed are equal, but for these, which are refused."""
    channels = client.get_state()["channels"]
    assert sorted(channels["asked"]) == sorted({*channels["confirmed"], *but})
    assert sorted(channels["refused"]) == sorted(but)


@in_loop
async def test_a_channel_left_out_once_is_asked_for_again(practice: str) -> None:
    async with connected(practice, f"drop_subscribe:{QUOTE}@1", channels=[BOOK, QUOTE, TICKER]) as (client, ear):
        check_equal(client)
        await ear.wait_frames([QUOTE])
        assert ear.refused == {}


@in_loop
async def test_a_text_is_one_channel_not_its_letters() -> None:
    client = Client("ws://127.0.0.1:1/")
    assert list(await client.subscribe(QUOTE)) == [QUOTE]
    assert client.get_state()["channels"]["asked"] == [QUOTE]
    assert await client.unsubscribe(QUOTE) == {QUOTE: True}
    assert client.get_state()["channels"]["asked"] == []


@in_loop
async def test_a_channel_left_out_for_ever_is_refused_and_the_others_flow(practice: str) -> None:
    async with connected(practice, f"drop_subscribe:{QUOTE}@99", channels=[BOOK, QUOTE, TICKER]) as (client, ear):
        check_equal(client, QUOTE)
        assert ear.refused == {QUOTE: LEFT_OUT}
        await ear.wait_frames([BOOK, TICKER])
        result = await client.subscribe([QUOTE, TRADES])
        assert result == {QUOTE: {"code": "exchange_error", "message": LEFT_OUT}, TRADES: True}


MAY_BE_AT_COINBASE = [
    "trades.BTC_USDC.100ms", "chart.trades.BTC_USDC.60", "trades.spot.USDC.100ms", "trades.any.ETH.agg2",
    "trades.option.any.100ms",
]  # fmt: skip
SURELY_NOT = [
    "trades.BTC-PERPETUAL.100ms", "trades.option.ETH.agg2", "chart.trades.BTC-PERPETUAL.1", "book.BTC_USDC.agg2",
]  # fmt: skip


@in_loop
async def test_trades_that_are_left_out_are_refused_with_what_to_ask_for_instead(practice: str) -> None:
    faults = ",".join(f"drop_subscribe:{name}@99" for name in (*MAY_BE_AT_COINBASE, *SURELY_NOT))
    async with connected(practice, faults, channels=[QUOTE, *MAY_BE_AT_COINBASE, *SURELY_NOT]) as (client, ear):
        check_equal(client, *MAY_BE_AT_COINBASE, *SURELY_NOT)
        assert ear.refused == dict.fromkeys(MAY_BE_AT_COINBASE, NO_TRADES) | dict.fromkeys(SURELY_NOT, LEFT_OUT)


@in_loop
async def test_refused_channels_get_another_chance_at_the_next_bootstrap(practice: str) -> None:
    async with connected(practice, f"drop_subscribe:{QUOTE}@99,first:1", channels=[QUOTE, BOOK]) as (client, ear):
        check_equal(client, QUOTE)
        client.cut("the test wants it so")
        await wait_for(lambda: len(ear.find("live")) == 2, "the second life")
        check_equal(client)
        assert client.reconnects == 1


@in_loop
async def test_channels_that_do_not_exist_are_refused(practice: str) -> None:
    strange = ["quote.NOPE", "book.NOPE-PERPETUAL.100ms", "surprise.party", "deribit_price_index.nope_usd"]
    async with connected(practice, channels=[QUOTE, *strange]) as (client, _):
        check_equal(client, *strange)


@in_loop
async def test_without_login_only_those_that_need_one_are_refused(practice: str) -> None:
    async with connected(practice, channels=[QUOTE, *RAW, BOOK, *OWN]) as (client, ear):
        check_equal(client, *RAW, *OWN)
        assert all("13778" in client.get_state()["channels"]["refused"][name] for name in RAW)
        await ear.wait_frames([QUOTE, BOOK])
        assert (client.attempts, client.reconnects) == (1, 0)


@pytest.mark.parametrize("code", [13009, 13778])
@pytest.mark.parametrize("is_old", [True, False])
@in_loop
async def test_a_login_that_has_died_is_renewed_by_a_new_connection(practice: str, code: int, is_old: bool) -> None:
    faults = f"error:public/subscribe={code}@2,first:1"
    async with connected(practice, faults, login=LOGIN) as (client, _):
        client.session.logged_in_at -= 61 if is_old else 0
        told = await client.subscribe(RAW[:1])
        if is_old:
            await wait_for(lambda: client.reconnects == 1 and RAW[0] in client.reconciler.subscriptions.confirmed, "it")
        else:
            assert str(code) in told[RAW[0]]["message"]
            assert client.reconnects == 0


@pytest.mark.parametrize("code", [13009, 13778, 10000])
@in_loop
async def test_a_channel_that_the_key_may_not_have_costs_no_connection_when_it_is_asked_for_again(
    practice: str, code: int
) -> None:
    faults = f"error:public/subscribe={code}@2,first:1"
    async with connected(practice, faults, login=LOGIN, channels=RAW[:1]) as (client, ear):
        client.session.logged_in_at -= 61
        for wanted in (ear.refused, ear.confirmed):
            assert str(code) in ear.refused.pop(RAW[0])
            client.reconciler._chance_at = 0.0
            await wait_for(functools.partial(wanted.__contains__, RAW[0]), "the answer")
        assert client.reconnects == 0


@in_loop
async def test_a_channel_that_the_key_came_to_have_tells_of_a_dead_login_like_any_other() -> None:
    is_known = False

    def answer(params: dict[str, Any], number: int) -> dict[str, Any] | None:
        return None if is_known else {"error": {"code": 13009}}

    async with scripted("public/subscribe", answer) as url, connected(url, login=LOGIN) as (client, _):
        assert "13009" in (await client.subscribe([QUOTE]))[QUOTE]["message"]
        is_known = True
        assert await client.subscribe([QUOTE]) == {QUOTE: True}
        await client.unsubscribe([QUOTE])
        is_known = False
        client.session.logged_in_at -= 61
        await client.subscribe([QUOTE])
        await wait_for(lambda: client.reconnects, "the loss")


@in_loop
async def test_a_call_that_is_to_log_in_though_it_has_is_cut_until_the_bad_channel_is_found(practice: str) -> None:
    async with connected(practice, "error:public/subscribe=13778@2", login=LOGIN, channels=RAW) as (client, _):
        check_equal(client, RAW[0])


@in_loop
async def test_with_login_all_are_given(practice: str) -> None:
    async with connected(practice, channels=[QUOTE, *RAW, BOOK, *OWN], login=LOGIN) as (client, _):
        check_equal(client)


@pytest.mark.parametrize("code", [-32602, -32600, 10001, 11045, 11052])
@in_loop
async def test_a_call_that_fails_as_a_whole_is_cut_until_the_bad_channels_are_found(practice: str, code: int) -> None:
    """The first five calls fail: 8 channels, 4, 2, and each of two; the others are given, and with 11052 later all."""
    names = [BOOK, QUOTE, TICKER, TRADES, "quote.ETH-PERPETUAL", "book.ETH-PERPETUAL.agg2", "trades.BTC_USDC.100ms"]
    names.append("deribit_price_index.btc_usd")
    times = 5 if code != 10001 else 1
    async with connected(practice, f"error:public/subscribe={code}@{times}", channels=names) as (client, _):
        check_equal(client, *(names[:2] if code not in (10001, 11052) else ()))
        assert all(str(code) in reason for reason in client.get_state()["channels"]["refused"].values())
        assert (client.attempts, client.reconnects) == (1, 0)


@pytest.mark.parametrize("times", [1, 2])
@in_loop
async def test_a_channel_that_failed_without_a_reason_is_asked_for_once_more(practice: str, times: int) -> None:
    async with connected(practice, f"error:public/subscribe=11052@{times}") as (client, ear):
        told = await client.subscribe([QUOTE])
        assert told == {QUOTE: True} if times == 1 else "11052" in told[QUOTE]["message"]
        assert list(ear.refused) == ([] if times == 1 else [QUOTE])


@in_loop
async def test_a_call_that_the_exchange_wants_again_is_sent_again_once_in_its_pause(practice: str) -> None:
    """One try a second, ten in all: the upkeep, which looks more often, must not use them up."""
    async with connected(practice, "error:public/subscribe=10040,until:7") as (client, _):
        assert await client.subscribe([QUOTE]) == {QUOTE: True}
        assert (client.attempts, client.reconnects) == (1, 0)


@in_loop
async def test_what_was_only_to_be_asked_for_later_gets_another_chance_soon(
    practice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.deribit.connection.reconcile.RETRY_PAUSE", 0.02)
    async with connected(practice, f"error:public/subscribe=10040@{RETRIES}") as (client, _):
        assert "10040" in (await client.subscribe([QUOTE]))[QUOTE]["message"]
        await client.reconciler.keep_up(time.monotonic() + SOON + 1)
        assert client.reconciler.subscriptions.confirmed == {QUOTE}


@pytest.mark.parametrize("code", [10028, 11051])
@in_loop
async def test_an_exchange_that_wants_a_pause_is_left_and_tried_again(practice: str, code: int) -> None:
    channels = [QUOTE, BOOK]
    async with connected(practice, f"error:public/subscribe={code},first:1", channels=channels) as (client, ear):
        assert len(ear.find("backoff")) == 1
        assert all(str(code) in reason for reason in ear.find("backoff"))
        check_equal(client)


@in_loop
async def test_a_close_that_comes_with_the_wish_for_a_pause_is_told_with_it() -> None:
    """That the connection has ended is known sooner than what came of its last answer."""
    overdrawn = {"code": 10028, "message": "too_many_requests"}

    def refuse(params: dict[str, Any], number: int) -> dict[str, Any]:
        return {"error": overdrawn, "close": b"enough"}

    settings: dict[str, Any] = {"live": False, "channels": [QUOTE]}
    async with scripted("public/subscribe", refuse) as url, connected(url, **settings) as (client, ear):
        await wait_for(lambda: ear.find("backoff"), "the loss")
        (reason,) = ear.find("backoff")
        said = "closed by the exchange: 1000 enough, after 10028 too_many_requests; no other attempt for"
        assert re.fullmatch(rf"{said} [1-3] s", reason)
        assert client.last_error == overdrawn


@pytest.mark.parametrize("fault", ["no_reply:public/subscribe", "wrong_id:public/subscribe", "credits:1000"])
@in_loop
async def test_calls_that_come_to_nothing_cost_the_connection(practice: str, fault: str) -> None:
    async with connected(practice, f"{fault},first:1", channels=[QUOTE, BOOK], timeout=2.0) as (client, ear):
        assert len(ear.find("backoff")) == 1
        check_equal(client)
        await ear.wait_frames([QUOTE, BOOK])


@in_loop
async def test_data_before_their_ack_are_taken(practice: str) -> None:
    async with connected(practice, "ack_late", channels=[QUOTE, BOOK]) as (client, ear):
        check_equal(client)
        assert ear.frames


@in_loop
async def test_what_was_refused_gets_another_chance_after_a_while(practice: str) -> None:
    async with connected(practice, f"drop_subscribe:{QUOTE}@2", channels=[QUOTE, BOOK]) as (client, ear):
        subscriptions, now = client.reconciler.subscriptions, time.monotonic()
        for later in (0.0, SECOND_CHANCE - 1):
            await client.reconciler.keep_up(now + later)
            assert QUOTE in subscriptions.refused
        await client.reconciler.keep_up(now + SECOND_CHANCE + 10)
        await wait_for(lambda: QUOTE in subscriptions.confirmed, "the channel")
        assert (list(ear.refused), client.reconnects) == ([QUOTE], 0)


@pytest.mark.parametrize("code", [11098, 12005])
@pytest.mark.parametrize("channels", [[QUOTE, TICKER], []])
@in_loop
async def test_a_ban_that_a_subscribe_is_answered_with_ends_it(practice: str, code: int, channels: list[str]) -> None:
    """Also where it is a wish of later on: who asked is told that it is kept."""
    fault = f"error:public/subscribe={code}"
    async with connected(practice, fault, channels=channels, live=not channels) as (client, ear):
        kept = {"code": "not_connected", "message": "kept, and asked for when the connection is live"}
        assert await client.subscribe([QUOTE, TICKER]) == {QUOTE: kept, TICKER: kept}
        await wait_for(lambda: ear.find("failed"), "the end", 5)
        assert (client.exit, client.attempts, ear.refused) == (Exit.BANNED, 1, {})
        assert ear.find("failed")[0].startswith(f"public/subscribe: {code}")
        assert client.traffic.requests == 3 + 1, "nobody asks once more"


@pytest.mark.parametrize("times", [1, 3])
@in_loop
async def test_a_refused_unsubscribe_costs_no_connection(practice: str, times: int) -> None:
    """Of two channels: the call fails, or each half of it too; then the exchange does not send them, as it says."""
    faults = f"error:public/unsubscribe=13019@{times}"
    async with connected(practice, faults, channels=[QUOTE, TICKER, BOOK]) as (client, ear):
        assert await client.unsubscribe([QUOTE, TICKER]) == {QUOTE: True, TICKER: True}
        assert client.reconciler.subscriptions.confirmed == {BOOK}
        assert client.last_error["code"] == 13019
        await ear.wait_frames([BOOK])
        assert client.reconnects == 0


@in_loop
async def test_an_unsubscribe_that_overdraws_its_pool_costs_the_connection(practice: str) -> None:
    faults = "error:public/unsubscribe=10028@1,first:1"
    async with connected(practice, faults, channels=[QUOTE, BOOK]) as (client, _):
        await client.unsubscribe([QUOTE])
        await wait_for(lambda: client.reconnects == 1 and client.is_live, "the next connection")
        assert client.reconciler.subscriptions.confirmed == {BOOK}


@pytest.mark.parametrize("code", [13028, 11051])
@in_loop
async def test_an_exchange_that_wants_a_pause_before_an_unsubscribe_is_not_left(practice: str, code: int) -> None:
    """Neither for a wish, nor for what the upkeep does by itself when an instrument has ended."""
    faults = f"error:public/unsubscribe={code}@2"
    async with connected(practice, faults, channels=[QUOTE, TICKER, BOOK]) as (client, ear):
        client.reconciler.expire([QUOTE])
        await wait_for(lambda: client.last_error, "the first refusal")
        assert await client.unsubscribe([TICKER]) == {TICKER: True}
        await wait_for(lambda: client.reconciler.subscriptions.confirmed == {BOOK}, "both unsubscribes")
        assert client.last_error["code"] == code
        await ear.wait_frames([BOOK])
        assert client.reconnects == 0


@in_loop
async def test_an_unsubscribe_that_tells_of_a_dead_login_costs_the_connection(practice: str) -> None:
    """However new the login is. At the latest when the upkeep asks again."""
    faults = "error:public/unsubscribe=13009@2,first:1"
    async with connected(practice, faults, login=LOGIN, channels=[QUOTE, BOOK]) as (client, ear):
        await client.unsubscribe([QUOTE])
        await wait_for(lambda: ear.find("backoff"), "the loss")
        assert "public/unsubscribe: 13009" in ear.find("backoff")[0]


@in_loop
async def test_a_subscribe_that_is_locked_out_costs_the_connection(practice: str) -> None:
    async with connected(practice, "error:public/subscribe=12998", live=False, channels=[QUOTE]) as (client, ear):
        await wait_for(lambda: ear.find("backoff"), "the loss")
        assert "public/subscribe: 12998" in ear.find("backoff")[0]
        assert client.get_state()["channels"]["refused"] == {}


@in_loop
async def test_an_unsubscribe_that_the_exchange_wants_again_and_again_is_given_up(
    practice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nothing else of the upkeep would be done any more."""
    monkeypatch.setattr("workers.deribit.connection.reconcile.RETRY_PAUSE", 0.1)
    async with connected(practice, "error:public/unsubscribe=11094", channels=[QUOTE, BOOK]) as (client, ear):
        leaving = asyncio.create_task(client.unsubscribe([QUOTE]))
        await wait_for(lambda: client.reconciler.subscriptions.confirmed == {BOOK}, "the end of patience")
        assert await leaving == {QUOTE: True}
        await ear.wait_frames([BOOK])
        assert await client.subscribe([QUOTE]) == {QUOTE: True}
        assert client.reconnects == 0


@pytest.mark.parametrize("method", ["public/subscribe", "public/unsubscribe", "public/ticker"])
@in_loop
async def test_the_pool_that_was_overdrawn_is_used_less(practice: str, method: str) -> None:
    async with connected(practice, f"error:{method}=10028@1") as (client, _):
        subscribing, calls = client.reconciler.credits, client.session.credits
        with pytest.raises(ExchangeError, match="10028"):
            await client.send(method, {"instrument_name": "BTC-PERPETUAL", "channels": [QUOTE]})
        overdrawn = [pool for pool in (subscribing, calls) if isinstance(pool, Credits) and pool.burst < pool.whole]
        assert overdrawn == [subscribing if method == "public/subscribe" else calls]


@in_loop
async def test_each_call_of_a_connection_is_paid_for_from_its_pool(practice: str) -> None:
    pools = Credits(refill=1e-9), Credits(CALL_BURST, 1e-9)
    settings: dict[str, Any] = {"login": LOGIN, "cancel_on_disconnect": True, "channels": [QUOTE], "pools": pools}
    async with connected(practice, **settings) as (client, _):
        spent = [pool.whole - pool.level for pool in pools]
        assert spent == pytest.approx([SUBSCRIBE_COST, 5 * CALL_COST])
        await client.unsubscribe([QUOTE])
        spent = [pool.whole - pool.level for pool in pools]
        assert spent == pytest.approx([SUBSCRIBE_COST, 6 * CALL_COST])


# -- at run time ------------------------------------------------------------------------------------------------------


@in_loop
async def test_channels_come_and_go_while_it_is_live(practice: str) -> None:
    async with connected(practice) as (client, ear):
        assert await client.subscribe([QUOTE, BOOK, RAW[0]]) == {
            QUOTE: True, BOOK: True,
            RAW[0]: {
                "code": "exchange_error", "message": "13778 raw_subscriptions_not_available_for_unauthorized",
            },
        }  # fmt: skip
        await ear.wait_frames([QUOTE, BOOK])
        assert await client.subscribe([QUOTE]) == {QUOTE: True}
        assert await client.unsubscribe([QUOTE, "quote.NEVER"]) == {QUOTE: True, "quote.NEVER": True}
        held = ear.count_frames(QUOTE)
        await ear.wait_frames([BOOK], 5)
        assert ear.count_frames(QUOTE) == held
        check_equal(client, RAW[0])
        with pytest.raises(ValueError, match="not a channel name"):
            await client.subscribe([TICKER, "a b"])
        assert TICKER not in client.get_state()["channels"]["asked"]


@in_loop
async def test_wishes_made_while_it_is_away_are_kept(practice: str) -> None:
    faults = "skip:1,refuse:503,first:3"
    async with connected(practice, faults, channels=[BOOK, TICKER], retry_delay=0.2) as (client, ear):
        read = client.get_state()["bytes"]
        client.cut("the test wants it so")
        await wait_for(lambda: client.machine.state == "backoff", "the loss")
        assert client.get_state()["channels"]["confirmed"] == []
        assert client.get_state()["bytes"] >= read > 0
        kept = {"code": "not_connected", "message": "kept, and asked for when the connection is live"}
        assert await client.subscribe([QUOTE, BOOK]) == {QUOTE: kept, BOOK: kept}
        assert await client.unsubscribe([TICKER]) == {TICKER: True}
        await wait_for(lambda: len(ear.find("live")) == 2, "the second life")
        check_equal(client)
        assert client.get_state()["channels"]["confirmed"] == sorted([BOOK, QUOTE])


@pytest.mark.parametrize("fault", ["no_reply:public/subscribe@1", "wrong_id:public/subscribe@1", "drop:0.4,first:1"])
@in_loop
async def test_a_wish_whose_call_comes_to_nothing_is_kept(practice: str, fault: str) -> None:
    async with connected(practice, f"{fault},skip:0", timeout=1.5) as (client, _):
        results = [await client.subscribe([name]) for name in (QUOTE, BOOK)]
        if "drop" not in fault:
            assert results[0][QUOTE]["code"] == "not_connected"
        await wait_for(lambda: client.reconciler.subscriptions.confirmed == {QUOTE, BOOK}, "both")
        check_equal(client)


@pytest.mark.parametrize("faults", ["", "no_reply:public/subscribe@1", "error:public/subscribe=11045@1"])
@in_loop
async def test_all_who_ask_for_a_channel_at_once_get_its_true_answer(practice: str, faults: str) -> None:
    """Also where the call of the first comes to nothing: then the second's is sent."""
    async with connected(practice, faults, timeout=1.5) as (client, _):
        first, *others = await asyncio.gather(*(client.subscribe([QUOTE, "quote.NOPE"]) for _ in range(3)))
        true = {QUOTE: True, "quote.NOPE": {"code": "exchange_error", "message": LEFT_OUT}}
        assert others == [true, true]
        assert first == true or "no_reply" in faults
        check_equal(client, "quote.NOPE")


@in_loop
async def test_who_waits_for_a_call_of_another_is_told_when_the_connection_is_lost(practice: str) -> None:
    async with connected(practice, "no_reply:public/subscribe,first:1", timeout=60) as (client, ear):
        asking = [asyncio.create_task(client.subscribe([QUOTE])) for _ in range(2)]
        await wait_for(lambda: client.traffic.waiting, "the call")
        client.cut("the test wants it so")
        kept = {"code": "not_connected", "message": "kept, and asked for when the connection is live"}
        assert await asyncio.gather(*asking) == [{QUOTE: kept}] * 2
        await ear.wait_frames([QUOTE])


@in_loop
async def test_many_wishes_side_by_side(practice: str) -> None:
    async with connected(practice) as (client, _):
        names = [f"chart.trades.BTC-PERPETUAL.{minutes}" for minutes in (1, 3, 5, 10, 15, 30)]
        await asyncio.gather(*(client.subscribe([name]) for name in names))
        await asyncio.gather(*(client.unsubscribe([name]) for name in names[::2]), client.subscribe([names[0], BOOK]))
        await wait_for(lambda: are_equal(client.reconciler.subscriptions), "both equal")
        assert client.reconnects == 0
        assert {*names[1::2], BOOK} <= client.reconciler.subscriptions.confirmed


@in_loop
async def test_who_gives_up_a_call_of_an_earlier_connection_leaves_those_of_this_one_alone(practice: str) -> None:
    """It waits for credits over the loss; meanwhile the next connection asks for the same channel."""
    async with connected(practice, "skip:1,no_reply:public/subscribe", timeout=60) as (client, _):
        pool = client.reconciler.credits
        assert isinstance(pool, Credits)
        pool.level = -1e6
        asking = asyncio.create_task(client.subscribe([QUOTE]))
        subscriptions = client.reconciler.subscriptions
        await wait_for(lambda: subscriptions.is_any_in_flight([QUOTE]), "the call")
        client.cut("the test wants it so")
        await wait_for(lambda: client.machine.state == "bootstrapping", "the next connection")
        await wait_for(lambda: subscriptions.is_any_in_flight([QUOTE]), "its call")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert subscriptions.is_any_in_flight([QUOTE])


@in_loop
async def test_what_callers_have_given_up_waiting_for_is_asked_for_in_one_call(practice: str) -> None:
    """One by one, a crowd of calls would cost all credits of a minute."""
    channels = [f"quote.{name}-PERPETUAL" for name in ("BTC", "ETH", "SOL_USDC", "XRP_USDC")]
    async with connected(practice) as (client, _):
        pool = client.reconciler.credits
        assert isinstance(pool, Credits)
        pool.level = -1e6
        asking = [asyncio.create_task(client.subscribe([name])) for name in channels]
        subscriptions = client.reconciler.subscriptions
        await wait_for(lambda: subscriptions.is_any_in_flight(channels), "the calls")
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        pool.level, requests = 1e6, client.traffic.requests
        await wait_for(lambda: subscriptions.confirmed >= {*channels}, "all of them")
        assert client.traffic.requests == requests + 1


@in_loop
async def test_a_call_that_was_sent_is_seen_through_though_its_caller_has_given_up(practice: str) -> None:
    """Else the exchange would send a channel of which nobody knows, whoever unsubscribes from it."""
    async with connected(practice, "slow:public/subscribe=0.5") as (client, ear):
        asking = asyncio.create_task(client.subscribe([QUOTE]))
        await wait_for(lambda: client.traffic.waiting, "the request")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        requests = client.traffic.requests
        assert await client.subscribe([QUOTE]) == {QUOTE: True}
        assert client.traffic.requests == requests, "it was on its way already"
        await wait_for(lambda: ear.frames, "data")
        await client.unsubscribe([QUOTE])
        assert client.reconciler.subscriptions.confirmed == set()
        assert client.traffic.requests == requests + 1


# -- many -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large() -> Iterator[tuple[str, list[str]]]:
    """A slow exchange with many instruments, and thousands of its channels that say little."""
    with exchange("--rate", "10", "--options", "400") as (url, _):
        rows: list[dict[str, Any]] = get(url, "public/get_instruments")[1]["result"]
        minutes = (1, 3, 5, 10, 15, 30, 60, 120, 180, 360, 720, "1D")
        names = [f"chart.trades.{row['instrument_name']}.{each}" for row in rows for each in minutes]
        yield url, [*names, *(f"trades.{row['instrument_name']}.agg2" for row in rows)][:5600]


@in_loop
async def test_thousands_of_channels_are_asked_for_in_paced_calls(large: tuple[str, list[str]]) -> None:
    url, names = large
    assert len(names) > 5000
    async with connected(url, channels=names) as (client, ear):
        check_equal(client)
        assert len(ear.confirmed) == len(set(ear.confirmed)) == len(names)
        assert (client.attempts, client.get_state()["last_error"]) == (1, None)


@in_loop
async def test_an_overdrawn_pool_ends_well_all_the_same(large: tuple[str, list[str]]) -> None:
    url, names = large
    async with connected(url, "credits:6000", channels=names[:1600], timeout=2) as (client, ear):
        assert all("too_many_requests" in reason for reason in ear.find("backoff"))
        assert ear.find("backoff")
        check_equal(client)


@in_loop
async def test_calls_of_a_life_that_failed_are_not_sent_in_the_next(large: tuple[str, list[str]]) -> None:
    """The bootstrap fails while calls wait for credits: they end with it."""
    url, names = large
    faults = "error:public/set_heartbeat=11094,first:1"
    async with connected(url, faults, live=False, channels=names, retry_delay=30) as (_, ear):
        await wait_for(lambda: ear.find("backoff"), "the loss")
        ours = {"connect", "_live_on", "wait_live", "run_test"}
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert {getattr(task.get_coro(), "__name__", "") for task in others} <= ours


@in_loop
async def test_many_channels_are_taken_up_and_let_go_in_slices_between_which_data_go_out(
    tmp_path: Path,
) -> None:
    many = [f"quote.BTC-{number}" for number in range(3 * SLICE)]
    with living(tmp_path, QUOTE, fresh=True) as worker:
        stream, seen = worker.feeds[QUOTE.encode()].stream, list[tuple[int, int]]()
        quote = encode_data(QUOTE, {"timestamp": 1_700_000_000_000})
        for op in ("subscribe", "unsubscribe"):
            doing = asyncio.create_task(worker.answer(op, {"channels": many, "epoch": time.time_ns()}))
            while not doing.done():
                await asyncio.sleep(0)
                worker.take_frames([quote], time.time_ns())
                seen.append((len(worker.feeds), stream.seq))
            assert len((await doing)["channels"]) == len(many)
        sizes = [size for size, _ in seen]
        assert [size for size, _ in groupby(sizes)][-6:] == [1 + count * SLICE for count in (1, 2, 3, 2, 1, 0)]
        assert [seq for _, seq in seen] == list(range(1, len(seen) + 1))


@in_loop
async def test_what_is_given_up_while_it_is_being_taken_up_is_given_up_whole(tmp_path: Path) -> None:
    many = [f"quote.BTC-{number}" for number in range(3 * SLICE)]
    with living(tmp_path, fresh=True) as worker:
        wanting = asyncio.create_task(worker.answer("subscribe", {"channels": many, "epoch": time.time_ns()}))
        await asyncio.sleep(0)
        assert 0 < len(worker.feeds) < len(many)
        await worker.answer("unsubscribe", {"channels": many})
        await wanting
        assert (worker.feeds, worker.client.reconciler.subscriptions.asked) == ({}, {})


@in_loop
async def test_what_has_ended_is_not_asked_for_while_others_are_being_taken_up(tmp_path: Path) -> None:
    """That its end was said of an earlier life is no reason to ask the exchange for it."""
    many = [f"quote.BTC-{number}" for number in range(3 * SLICE)]
    with living(tmp_path, fresh=True) as worker:
        wanting = asyncio.create_task(worker.answer("subscribe", {"channels": many, "epoch": time.time_ns()}))
        await asyncio.sleep(0)
        ending = asyncio.create_task(worker.answer("unsubscribe", {"channels": [QUOTE], "reason": "expired"}))
        while not ending.done():
            await asyncio.sleep(0)
            assert QUOTE not in worker.client.reconciler.subscriptions.asked
        assert (await ending, wanting.done()) == ({"channels": {QUOTE: True}}, True)


@in_loop
async def test_of_many_channels_none_is_taken_up_where_one_is_none(tmp_path: Path) -> None:
    with living(tmp_path, fresh=True) as worker:
        many = [*(f"quote.BTC-{number}" for number in range(SLICE)), "trades.BTC-PERPETUAL.never"]
        with pytest.raises(ControlError, match="never"):
            await worker.answer("subscribe", {"channels": many, "epoch": time.time_ns()})
        assert worker.feeds == {}


@in_loop
async def test_instruments_that_end_together_are_let_go_in_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.deribit.worker.LAST_WORDS", 0.0)
    many = [f"BTC-{number}" for number in range(3 * SLICE)]
    with living(tmp_path, "instrument.state.any.any", *(f"quote.{name}" for name in many), fresh=True) as worker:
        refused = worker.client.reconciler.subscriptions.refused
        ended = [{"instrument_name": name, "state": "closed", "timestamp": 1_700_000_000_000} for name in many]
        worker.take_frames([encode_data("instrument.state.any.any", row) for row in ended], time.time_ns())
        assert not worker.channels.events, "it is told when their channels have been left"
        sizes, end = list[int](), time.monotonic() + PATIENCE
        while not worker.channels.events and time.monotonic() < end:
            await asyncio.sleep(0)
            sizes.append(len(refused))
        assert [size for size, _ in groupby(sizes)][-3:] == [count * SLICE for count in (1, 2, 3)]
        assert len(worker.channels.events) == len(many)
