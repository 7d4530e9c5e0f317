"""What is done once a second for each channel holds nothing up, however many there are."""

import asyncio
import shutil
import time
from bisect import bisect
from collections.abc import Iterator
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest

from collector.limits import Credits
from tests.deribit_support import QUOTE, Collecting, collecting, living, scripted, wait_for
from tests.support import in_loop
from workers.deribit.connection.session import NEVER
from workers.deribit.feeds.rhythm import SAMPLES, SECOND
from workers.deribit.rpc.codec import DATA_PREFIX
from workers.deribit.watching.lag import LASTING
from workers.deribit.watching.patrol import PATIENCE, RECONNECT_ONCE_IN, REFILL, RESYNCS, SLICE
from workers.deribit.watching.statuses import REPEAT, UNSUBSCRIBED
from workers.deribit.worker import Worker

CHANNELS = [f"quote.BTC-{number}" for number in range(3 * SLICE)]


def build_quote(channel: str) -> bytes:
    """A frame of a quote without a price."""
    return DATA_PREFIX + channel.encode() + b'","data":{"timestamp":1700000000000}}}'


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    """A worker that is not connected, with a message on the topic of each of its channels."""
    # Its own status is said again in the first second of each minute.
    name = next(f"w{n}" for n in count() if hash(f"deribit.status.w{n}.connection") % REPEAT == 0)
    with living(tmp_path, *CHANNELS, fresh=True, name=name) as worker:
        worker.take_frames([build_quote(channel) for channel in CHANNELS], time.time_ns())
        yield worker


@in_loop
async def test_each_status_is_said_again_once_a_minute(worker: Worker) -> None:
    for _ in range(2):  # they are told at the first look
        before = [feed.stream.seq for feed in worker.feeds.values()]
        for part in range(REPEAT):
            await worker.patrol._look_at_all(part)
    assert [feed.stream.seq for feed in worker.feeds.values()] == [seq + 1 for seq in before]


def test_of_what_no_channel_has_the_own_state_is_said_once_a_minute_and_a_last_word_twice_more(tmp_path: Path) -> None:
    with living(tmp_path, QUOTE, fresh=True) as worker:
        worker.statuses.tell_connection("live", "")
        (feed,), own = worker.feeds.values(), worker.topics.find("status", worker.name, "connection")
        worker.client.reconciler.subscriptions.drop([QUOTE])
        worker.channels.leave([QUOTE], UNSUBSCRIBED)
        numbers = [(own.seq, feed.stream.seq)]
        for _ in range(3):
            for part in range(REPEAT):
                worker.statuses.repeat_others(part)
            numbers.append((own.seq, feed.stream.seq))
    assert numbers == [(1, 1), (2, 2), (3, 3), (4, 3)]


@in_loop
async def test_what_is_due_is_said_again_each_second(worker: Worker) -> None:
    worker.statuses.tell_connection("connecting", "")
    worker.statuses.repeat(worker.feeds.values(), -1)
    patrol = asyncio.create_task(worker.patrol.run())
    own = worker.topics.find("status", worker.name, "connection")
    await wait_for(lambda: own.seq == 2, "the connection's own")
    due = [feed.stream for feed in worker.feeds.values() if hash(feed.stream.topic) % REPEAT == 0]
    await wait_for(lambda: all(stream.seq == 3 for stream in due), "those of the first second")
    published = worker.publisher.published
    assert len(CHANNELS) < worker.patrol.rate < published, "all before the first look"
    await wait_for(lambda: worker.publisher.published > published, "the second look")
    assert worker.report()["rate"] < len(CHANNELS), "what was published between the two"
    patrol.cancel()
    await asyncio.wait([patrol])


@in_loop
async def test_lag_is_corrected_by_the_clock_offset(practice: str) -> None:
    hour = 3600 * SECOND
    async with collecting(practice, f"clock:{-hour // 1_000_000}", QUOTE) as run:  # each message is an hour old by ours
        await wait_for(lambda: run.worker.patrol.lag.newest, "a sample of the lag")
        assert abs(run.worker.patrol.lag.newest) < hour / 2


def test_lag_that_lasts_is_logged_and_its_end_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with living(tmp_path, fresh=True) as worker:
        for lag in [6] * (LASTING + 2) + [1] * 2:
            worker.patrol.take_lag(lag * SECOND)
            worker.patrol._judge_lag(SECOND)
    assert [record.getMessage() for record in caplog.records] == ["lag 6.0 s", "lag is over, 1.0 s"]


def test_all_has_surely_come_until_something_came_before_what_came_last_and_is_not_late(tmp_path: Path) -> None:
    with living(tmp_path, fresh=True) as worker:
        patrol, statuses, read_clock = worker.patrol, worker.statuses, worker.client.session.read_exchange_clock
        clocks = [read_clock()]
        patrol.begin()
        heard = []
        for frames, lag in ((0, 1), (1, 1), (1, 1), (2, 1), (3, 1), (4, 6), (5, 1)):
            clocks.append(read_clock())
            worker.client.traffic.frames = frames
            for _ in range(LASTING):
                patrol.take_lag(lag * SECOND)
                patrol._judge_lag(SECOND)
            patrol._note_heard()
            heard.append(bisect(clocks, statuses.heard_until) - 1)  # the step whose clock it is
    assert heard == [-1, 0, 0, 2, 4, 4, 5]


def test_neither_silence_nor_lag_of_a_connection_is_held_against_the_next(tmp_path: Path) -> None:
    with living(tmp_path, fresh=True) as worker:
        patrol, now = worker.patrol, time.monotonic_ns()
        patrol._whole.is_steady = True
        patrol._whole.restart(patrol.last_ts, now - 61 * SECOND)
        for _ in range(LASTING):
            patrol.take_lag(6 * SECOND)
            patrol._judge_lag(now)
        assert (patrol._late.is_lagging, patrol._whole.is_broken(now)) == (True, True)
        worker.change_state("backoff", "reset")
        worker.change_state("live", "")
        assert (patrol._late.is_lagging, patrol._whole.is_broken(now)) == (False, False)


def test_whether_all_books_are_out_of_step_is_looked_at_once_a_second_however_many_break(tmp_path: Path) -> None:
    looks: list[int] = []

    class Feeds(dict[bytes, Any]):
        def values(self) -> Any:
            looks.append(1)
            return super().values()

    with living(tmp_path, *(f"book.BTC-{number}.100ms" for number in range(20)), fresh=True) as worker:
        patrol, now = worker.patrol, time.monotonic_ns()
        patrol._feeds = Feeds(worker.feeds)
        for feed in worker.feeds.values():
            feed.allowance = Credits(RESYNCS, REFILL, time.monotonic())
            feed.allowance.level = 0.0
        patrol._judge_books(now)
        assert patrol._reconnected != now, "none has broken yet"
        for feed in worker.feeds.values():
            patrol.resync(feed)
        assert looks == []
        patrol._judge_books(now)
        patrol._judge_books(now + 1)
        assert (looks, patrol._reconnected) == ([1], now)


def test_that_files_cannot_be_made_again_is_logged_once_and_only_if_it_lasts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The supervisor may be making their directory."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    with living(place, fresh=True) as worker:
        for times in (PATIENCE - 1, PATIENCE - 1, PATIENCE + 2):
            shutil.rmtree(place)
            for _ in range(times):
                worker.patrol._restore_files()
            place.mkdir()
            worker.patrol._restore_files()
            told = [record for record in caplog.records if "cannot be made again" in record.getMessage()]
            assert len(told) == (times >= PATIENCE)


@in_loop
async def test_an_exchange_that_proves_no_life_is_asked_once_in_a_while_and_nobody_is_called_mute_meanwhile() -> None:
    """It does not answer at first, then says that it is closed, then that it is open for some."""
    asked: list[int] = []

    def script(params: dict[str, Any], count: int) -> dict[str, Any]:
        asked.append(count)
        return {"result": {"locked": "true" if count == 2 else "partial"}} | ({"id": 1} if count == 1 else {})

    async with scripted("public/status", script) as url, collecting(url, "", QUOTE, timeout=2.5) as run:
        (feed,), hearer = run.worker.feeds.values(), run.hearer
        await wait_for(lambda: run.worker.client.is_live and feed.condition == ("live", ""), "the channel")
        feed.rhythm.restart(feed.last_ts, time.monotonic_ns() - 61 * SECOND)
        for number in (1, 2):
            await wait_for(partial(asked.__contains__, number), "a question")
            await hearer.hear_of("deribit.heartbeat.", len(hearer.find("deribit.heartbeat.")) + 3)
            await wait_for(lambda: run.worker.patrol._ask_at != NEVER, "the end of the wait for an answer")
            assert (len(asked), feed.condition) == (number, ("live", ""))
            run.worker.patrol._ask_at = 0.0  # a while has passed
        await hearer.hear_of("deribit.quote.", type="status", state="stale", reason="mute")
        assert (asked, (await run.get_state())["channels"]["mute"]) == ([1, 2, 3], [QUOTE])


def has_lost(run: Collecting, losses: int) -> bool:
    """Whether its connection was lost so often."""
    return run.worker.client.reconnects == losses


@in_loop
async def test_a_connection_is_left_for_what_only_we_think_of_it_once_a_minute(practice: str) -> None:
    async with collecting(practice, "", QUOTE) as run:
        for number, (later, losses) in enumerate(((0, 1), (RECONNECT_ONCE_IN, 1), (RECONNECT_ONCE_IN + 1, 2))):
            await wait_for(lambda: run.worker.client.is_live, "the connection")
            run.worker.patrol._reconnect(SECOND * 1000 + later, f"reason {number}")
            await wait_for(partial(has_lost, run, losses), "the loss")
        told = await run.hearer.hear_of("deribit.status.w.connection", 2, state="backoff")
        assert [status["reason"][:8] for status in told] == ["reason 0", "reason 2"]


@in_loop
async def test_between_looks_at_some_channels_the_loop_turns(worker: Worker) -> None:
    """Topics that have spoken and were told no state yet are all told theirs at the next look."""
    told = [worker.publisher.published]
    patrol = asyncio.create_task(worker.patrol.run())
    while worker.publisher.published < 2 * len(CHANNELS):
        await asyncio.sleep(0)  # one turn of the loop, as a read would have
        told.append(worker.publisher.published)
    patrol.cancel()
    await asyncio.wait([patrol])
    assert all(feed.stream.status for feed in worker.feeds.values())
    steps = [after - before for before, after in pairwise(told)]
    assert max(steps) <= SLICE + 1  # and a heartbeat


@pytest.mark.parametrize("step", [-3600, 30, 3600])
def test_a_clock_that_is_set_neither_makes_silence_nor_hides_it(tmp_path: Path, step: int) -> None:
    """Of one channel, and of the whole connection."""
    by_ours, now = time.time_ns(), 1000 * SECOND
    with living(tmp_path, CHANNELS[0], fresh=True) as worker:
        (feed,), patrol = worker.feeds.values(), worker.patrol
        worker.statuses.tell(feed, "live", "")

        def look(comes: bool) -> tuple[bool, bool]:
            nonlocal by_ours, now
            by_ours, now = by_ours + SECOND, now + SECOND
            if comes:
                worker.take_frames([build_quote(CHANNELS[0])], by_ours)
            patrol._whole.look(patrol.last_ts, now)
            return patrol._judge_feeds([feed], now) == [feed], patrol._whole.is_broken(now)

        seen = [look(comes=True) for _ in range(SAMPLES + 1)]
        by_ours += step * SECOND
        seen += [look(comes=second > 0) for second in range(5)]
        assert {*seen, *(look(comes=False) for _ in range(20))} == {(False, False)}
        assert look(comes=False) == (True, True)
        worker.statuses.tell(feed, "stale", "mute")
        by_ours -= step * SECOND
        look(comes=True)
        assert feed.condition == ("live", "")
