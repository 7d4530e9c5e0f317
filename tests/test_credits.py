"""Deribit's credits: never overdrawn, by one worker or by many that share them, whoever starts or comes back when."""

import asyncio
import contextlib
import fcntl
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector.channels import RESOLUTIONS
from collector.limits import (
    CALL_BURST,
    CALL_COST,
    CALL_REFILL,
    REFILL,
    REGAIN,
    SUBSCRIBE_BURST,
    SUBSCRIBE_COST,
    SUBSCRIBE_POOL,
    Credits,
    estimate_seconds,
)
from tests.collected import QUICK, Collected, collected
from tests.exchange_client import Client, connect, exchange
from tests.support import wait_until
from workers.deribit.connection.credits import MOMENT, Pool, SharedCredits, pay


def wait_for(pool: Pool, cost: float, now: float, reserve: float = 0.0) -> float:
    """When a call may be sent that asks from `now` on, and waits as it is told."""
    while wait := pool.take(cost, now, reserve):
        now += wait
    return now


def judge(sent: list[tuple[float, float]]) -> None:
    """What the exchange would say of calls at these times, at these costs: it never sends 10028."""
    level, since = float(SUBSCRIBE_POOL), 0.0
    for at, cost in sorted(sent):
        level = min(SUBSCRIBE_POOL, level + (at - since) * REFILL)
        since = at
        level -= cost
        assert level >= SUBSCRIBE_COST - 1, "one call stays in reserve, for those that bunch up on the way"


def test_nine_subscribe_calls_go_at_once_and_then_ten_in_three_seconds() -> None:
    credits, now, times = Credits(), 0.0, []
    for _ in range(20):
        now = wait_for(credits, SUBSCRIBE_COST, now)
        times.append(now)
    assert times[:9] == [0.0] * 9
    assert times[9:] == pytest.approx([0.3 * number for number in range(1, 12)])
    assert estimate_seconds(20) == pytest.approx(times[-1])
    assert wait_for(credits, SUBSCRIBE_COST, 100.0) == 100.0


def test_who_is_told_to_wait_has_taken_nothing() -> None:
    credits = Credits(burst=1_000, refill=100.0)
    assert credits.take(1_000, 0.0) == 0.0
    assert [credits.take(500, 0.0) for _ in range(3)] == [5.0] * 3
    assert credits.take(500, 3.0) == pytest.approx(2.0)
    assert credits.take(500, 5.0) == 0.0


def test_a_call_that_costs_more_than_the_pool_holds_waits_until_it_is_full() -> None:
    credits = Credits(burst=1_000, refill=100.0)
    assert wait_for(credits, 2_000, 0.0) == 0.0
    assert wait_for(credits, 100, 0.0) == pytest.approx(11.0)


def test_a_clock_that_goes_back_gives_nothing_away() -> None:
    credits = Credits(burst=1_000, refill=100.0, since=50.0)
    assert credits.take(1_000, 50.0) == 0.0
    assert credits.take(500, 10.0) == pytest.approx(5.0)
    assert credits.take(500, 55.0) == 0.0


def test_a_reserve_is_left_to_others() -> None:
    credits = Credits(CALL_BURST, CALL_REFILL)
    healing = [credits.take(CALL_COST, 0.0, reserve=CALL_BURST / 2) for _ in range(100)]
    assert healing.count(0.0) == CALL_BURST / 2 / CALL_COST
    assert [credits.take(CALL_COST, 0.0) for _ in range(45)] == [0.0] * 45
    assert credits.take(CALL_COST, 0.0) > 0.0


@given(st.lists(st.tuples(st.integers(1, 3_000), st.floats(0, 2)), max_size=200))
def test_who_waits_as_told_never_overdraws_the_exchanges_pool(calls: list[tuple[int, float]]) -> None:
    credits, now, sent = Credits(), 0.0, []
    for cost, pause in calls:
        now = wait_for(credits, cost, now + pause)
        sent.append((now, float(cost)))
    judge(sent)


def test_an_overdrawn_pool_is_halved_once_for_each_event() -> None:
    credits = Credits()
    credits.shrink(0.0)
    credits.shrink(0.0)  # a second session that was cut by the same
    assert (credits.burst, credits.level) == (SUBSCRIBE_BURST / 2, 0.0)
    for now in range(10, 100, 10):
        assert credits.take(SUBSCRIBE_COST, float(now)) == 0.0
        credits.shrink(float(now))
    assert credits.burst == SUBSCRIBE_COST  # one call must always be possible


def test_a_pool_that_was_halved_grows_back_within_the_hour() -> None:
    credits = Credits()
    assert credits.take(SUBSCRIBE_COST, 1_000_000.0) == 0.0
    credits.shrink(2_000_000.0)  # by something else that was asked long after
    assert credits.take(SUBSCRIBE_COST, 2_000_000.0) == pytest.approx(SUBSCRIBE_COST / REFILL)
    wait_for(credits, SUBSCRIBE_COST, 2_000_000.0 + REGAIN / 4)
    assert credits.burst == pytest.approx(SUBSCRIBE_BURST * 3 / 4)
    wait_for(credits, SUBSCRIBE_COST, 2_000_000.0 + REGAIN)
    assert credits.burst == SUBSCRIBE_BURST  # and never more


# shared by workers


def share(directory: Path, workers: int) -> list[SharedCredits]:
    return [SharedCredits(f"{directory}/pool", SUBSCRIBE_BURST, REFILL) for _ in range(workers)]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1)), max_size=100))
def test_those_who_share_a_pool_never_overdraw_it(calls: list[tuple[int, float]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        pools = share(Path(directory), 5)
        now = start = time.monotonic() + 1.0
        sent = []
        for worker, pause in calls:
            now = wait_for(pools[worker], SUBSCRIBE_COST, now + pause)
            sent.append((now - start, float(SUBSCRIBE_COST)))
        judge(sent)


def test_all_who_share_a_pool_know_what_is_left_of_it(tmp_path: Path) -> None:
    one, other = share(tmp_path, 2)
    now = time.monotonic() + 1.0
    assert one.take(SUBSCRIBE_BURST - 1, now) == 0.0
    assert other.take(SUBSCRIBE_COST, now) == pytest.approx((SUBSCRIBE_COST - 1) / REFILL)
    (late,) = share(tmp_path, 1)
    assert late.take(1, now) == 0.0
    assert one.take(1, now) > 0.0


def test_all_who_share_a_pool_know_that_it_was_overdrawn(tmp_path: Path) -> None:
    one, other = share(tmp_path, 2)
    now = time.monotonic() + 1.0
    assert one.take(SUBSCRIBE_COST, now) == other.take(SUBSCRIBE_COST, now) == 0.0
    one.shrink(now)
    other.shrink(now)
    assert other.take(SUBSCRIBE_COST, now) > 0.0
    assert [other.take(SUBSCRIBE_BURST // 4, now + 10) for _ in range(2)] == [0.0, 0.0]  # halved once, not twice
    assert one.take(SUBSCRIBE_COST, now + 10) > 0.0
    later = now + REGAIN
    assert one.take(SUBSCRIBE_BURST, later) == 0.0
    assert other.take(1, later) > 0.0


def test_a_pool_at_which_another_looks_is_asked_again_and_never_waited_for(tmp_path: Path) -> None:
    (pool,) = share(tmp_path, 1)
    with (tmp_path / "pool").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert pool.take(SUBSCRIBE_COST, time.monotonic()) == MOMENT
    assert pool.take(SUBSCRIBE_BURST, time.monotonic()) == 0.0


def test_who_has_overdrawn_a_pool_waits_for_another_that_looks_at_it(tmp_path: Path) -> None:
    one, other = share(tmp_path, 2)
    now = time.monotonic()
    with (tmp_path / "pool").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        shrinking = threading.Thread(target=one.shrink, args=(now,))
        shrinking.start()
        shrinking.join(0.1)
        assert shrinking.is_alive()
    shrinking.join(10)
    assert other.take(SUBSCRIBE_COST, now) == pytest.approx(SUBSCRIBE_COST / REFILL), "it is empty"


def test_who_leaves_a_reserve_waits_where_others_go_on() -> None:
    async def run() -> None:
        pool = Credits(CALL_BURST, 1e-9, time.monotonic())
        pool.level = CALL_BURST / 2
        waiting = asyncio.create_task(pay(pool, CALL_COST, reserve=CALL_BURST / 2))
        await asyncio.sleep(0)
        await pay(pool, CALL_COST)
        assert pool.level == pytest.approx(CALL_BURST / 2 - CALL_COST)
        assert waiting.cancel()

    asyncio.run(run())


# the practice exchange


async def subscribe(client: Client, calls: int) -> list[dict[str, Any]]:
    """Send so many calls at once; the answers up to the cut, if there is one."""
    body = {"jsonrpc": "2.0", "id": "call", "method": "public/subscribe", "params": {"channels": ["announcements"]}}
    with contextlib.suppress(ConnectionResetError):  # the cut may come before the last of them is sent
        for _ in range(calls):
            await client.send(json.dumps(body))

    def find() -> list[dict[str, Any]]:
        return [message for message in client.messages() if message.get("id") == "call"]

    await client.wait(lambda: client.closed or len(find()) == calls, "all answers or the cut")
    return find()


def test_the_exchange_counts_for_an_address_or_an_account_and_not_for_a_connection() -> None:
    async def act(url: str) -> None:
        async with connect(url) as one, connect(url) as other, connect(url) as member:
            await member.log_in()
            assert all("result" in answer for answer in await subscribe(one, 9))
            assert (await subscribe(other, 9))[-1]["error"]["code"] == 10028
            assert all("result" in answer for answer in await subscribe(member, 9))

    with exchange(own_credits=False) as (url, _):
        asyncio.run(act(url))


# whole programs

CALLS = [f"chart.trades.{currency}-PERPETUAL.{each}" for currency in ("BTC", "ETH") for each in RESOLUTIONS[:7]]
"""A channel for each connection, and so a call: more than go at once."""


def check_pace(run: Collected, start: int) -> None:
    """At no time since `start` (ns) were more connections live than the exchange's pool has calls for."""
    for number, live in enumerate(sorted(state["since"] for state in run.ask("get_state").values()), 1):
        assert number * SUBSCRIBE_COST <= SUBSCRIBE_POOL + (live - start) / 1e9 * REFILL
    assert "too_many_requests" not in run.program.text()


def test_connections_that_are_cut_together_come_back_at_the_pace_of_one_account() -> None:
    """The exchange goes on and counts on: what it has granted before the cut is not there again after it."""
    table = {**QUICK, "url": f"practice?faults=drop:15,first:{len(CALLS)}", "retry_count": 1000}
    connections = {f"c{number}": {**table, "channels": [call]} for number, call in enumerate(CALLS)}
    with collected(connections) as run:
        for count in (0, 1):
            for name in connections:
                run.wait_state(name, reconnects=count)
        assert "too_many_requests" not in run.program.text()
        assert run.stop() == 0


def test_connections_that_start_or_come_back_together_share_their_credits() -> None:
    names = [f"c{number}" for number in range(len(CALLS))]
    table = {**QUICK, "retry_count": 1000}
    connections = {name: {**table, "channels": [call]} for name, call in zip(names, CALLS, strict=True)}
    with collected(connections) as run:
        check_pace(run, min(run.wait_state(name)["epoch"] for name in names))
        assert {path.name for path in run.runtime_dir.glob("credits-*")} == {"credits-1.calls", "credits-1.subscribe"}
        killed = time.time_ns()
        run.find_process("exchange").kill()
        wait_until(lambda: all(state["reconnects"] for state in run.ask("get_state").values()), "all losses")
        for name in names:
            run.wait_state(name)
        check_pace(run, killed)
        assert run.stop() == 0
        assert [path.name for path in run.runtime_dir.iterdir()] == ["lock"]


def test_one_account_under_two_names_has_one_pool() -> None:
    logins = {name: {**QUICK, "credentials": name.upper(), "channels": []} for name in ("one", "two")}
    secrets = {f"{name.upper()}_CLIENT_{part}": "practice" for name in logins for part in ("ID", "SECRET")}
    with collected(logins, env=secrets) as run:
        for name in logins:
            run.wait_state(name, authenticated=True)
        assert {path.name for path in run.runtime_dir.glob("credits-*")} == {"credits-1.calls", "credits-1.subscribe"}
