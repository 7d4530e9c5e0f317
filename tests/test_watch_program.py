"""Silence and lag, as the whole program tells them: proven, on the topics that they concern, once, and not for ever.

The waits are those of the product: a channel's rhythm is known after 20 s, and broken after as long a silence.
"""

import asyncio
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, TextIO

import pytest

from tests.collected import Collected, collected
from tests.deribit_support import TICKER, Hearer, collecting, wait_for
from tests.exchange_client import exchange, get
from tests.support import in_loop, wait_until
from workers.deribit.connection.subscriptions import EXPIRED

LIVE, LATE, MUTE, LOST = ("live", ""), ("stale", "lag"), ("stale", "mute"), ("recovering", "disconnect")
BEGINNING = ("recovering", "subscribe")
OWN = ("gap", "repair", "status")
SECOND = 1_000_000_000


class Watched:
    """A running collector, what its connections say, and what the exchange really did."""

    def __init__(self, run: Collected, hearer: Hearer, oracle: TextIO) -> None:
        self.run = run
        self.hearer = hearer
        self._oracle = oracle
        self._begun = ""
        self._happened: list[dict[str, Any]] = []
        self._taken = 0
        self._topics: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def wait(self, fact: Callable[[], Any], what: str) -> None:
        """Listen until it is true."""

        def look() -> Any:
            self._take()
            return fact()

        wait_until(look, what, 90)

    def _take(self) -> None:
        self.hearer.drain()
        for topic, body in self.hearer.heard[self._taken :]:
            self._topics[topic].append(body)
        self._taken = len(self.hearer.heard)

    def find(self, topic: str, **keys: Any) -> list[dict[str, Any]]:
        """What was heard on one topic, whose keys have the given values."""
        return [body for body in self._topics[topic] if all(body.get(key) == value for key, value in keys.items())]

    def list_data(self, topic: str) -> list[dict[str, Any]]:
        """What the exchange's frames gave on a topic."""
        return [body for body in self._topics[topic] if body["type"] not in OWN]

    def list_conditions(self, topic: str) -> list[tuple[str, str]]:
        """The states that were said of a topic since it began, with their reasons, each once if only said again."""
        states = ((b["state"], b["reason"]) for b in self.find(topic, type="status"))
        return [said for said, _ in groupby(states) if said != BEGINNING]

    def wait_conditions(self, topic: str, *wanted: tuple[str, str]) -> None:
        """Listen until just these states have been said of a topic, one after the other."""
        self.wait(lambda: len(self.list_conditions(topic)) >= len(wanted), f"{wanted} on {topic}")
        assert self.list_conditions(topic) == list(wanted), f"{topic}: {self.list_losses()}"

    def list_losses(self) -> list[tuple[str, str]]:
        """Each loss of a connection: its name and the reason."""
        topics = [topic for topic in self._topics if topic.startswith("deribit.status.")]
        return [(body["connection"], body["reason"]) for t in topics for body in self.find(t, state="backoff")]

    def hear_more(self, *topics: str) -> None:
        """Listen for some more data on each topic."""
        wanted = {topic: len(self.list_data(topic)) + 2 for topic in topics}
        self.wait(lambda: all(len(self.list_data(t)) >= count for t, count in wanted.items()), f"data on {wanted}")

    def check_numbers(self) -> None:
        """No topic has a hole in its numbers; answers to the subscription itself have none of their own."""
        for topic, bodies in self._topics.items():
            numbers = [body["seq"] for body in bodies if "join" not in body]
            # One that stays quiet has joins alone.
            assert all(later == earlier + 1 for earlier, later in pairwise(numbers)), topic

    def find_requests(self, fault: str, faults: str) -> list[dict[str, Any]]:
        """The requests for the exchange's state that a fault kept from their answers, on connections with `faults`."""
        *lines, self._begun = (self._begun + self._oracle.read()).split("\n")  # the last may be half written
        self._happened += [json.loads(line) for line in lines if '"event":"trade"' not in line]
        numbers = {event["connection"] for event in self._happened if event.get("faults") == faults}
        requests = [event for event in self._happened if event.get("fault") == fault]
        return [r for r in requests if r["connection"] in numbers and r["method"] == "public/status"]


@contextmanager
def watched(connections: dict[str, Any], oracle: Path) -> Iterator[Watched]:
    """Run a collector with these connections, which one subscriber hears; the oracle is that of their exchange."""
    with collected(connections, exchange=None) as run:
        endpoints = [f"ipc://{run.runtime_dir}/{name}.pub" for name in connections]
        with closing(Hearer(*endpoints)) as hearer, oracle.open() as events:
            seen = Watched(run, hearer, events)
            yield seen
            seen.check_numbers()


@contextmanager
def serving(oracle: Path) -> Iterator[str]:
    """Run an exchange that is busy enough for a perpetual's channels to speak several times a second; its URL."""
    with exchange("--rate", "600", "--oracle", str(oracle)) as (url, _):
        yield url


def describe_connection(url: str, faults: str, *channels: str, timeout: float = 5.0) -> dict[str, Any]:
    return {"url": f"{url}?faults={faults}", "retry_delay": 0.05, "timeout": timeout, "channels": list(channels)}


def name_channels(instrument: str) -> tuple[str, str]:
    return f"quote.{instrument}", f"book.{instrument}.100ms"


def name_topics(instrument: str) -> tuple[str, str]:
    return f"deribit.quote.{instrument}.raw", f"deribit.book.{instrument}.100ms"


# -- silence ----------------------------------------------------------------------------------------------------------

SPOT, FLOW, DEALS = "quote.BTC-PERPETUAL", "book.BTC-PERPETUAL.100ms", "trades.BTC-PERPETUAL.100ms"
QUOTES, BOOKS, TRADES = (
    "deribit.quote.BTC-PERPETUAL.raw", "deribit.book.BTC-PERPETUAL.100ms", "deribit.trade.BTC-PERPETUAL.100ms",
)  # fmt: skip
UNANSWERED = "mute:quote.ETH-PERPETUAL@26,no_reply:public/status"
SHUT = "mute:quote.SOL_USDC-PERPETUAL@26,error:public/status=11051"
SILENT = "mute:*@26,first:1"
CLOSED = "mute:*@26,error:public/status=11051"


def find_option(url: str) -> str:
    """The option that lives longest."""
    rows = get(url, "public/get_instruments", currency="BTC", kind="option")[1]["result"]
    name: str = max(rows, key=lambda row: row["expiration_timestamp"])["instrument_name"]
    return name


def test_silence_is_told_of_the_channel_that_broke_its_rhythm_and_once_it_is_proven(tmp_path: Path) -> None:
    oracle = tmp_path / "oracle.jsonl"
    with serving(oracle) as url:
        quiet = f"ticker.{find_option(url)}.100ms"
        muted = f"mute:{SPOT}@26,mute:{quiet}@12,no_reply:public/status@1,until:70"
        connections = {
            "muted": describe_connection(url, muted, SPOT, FLOW, DEALS, quiet, timeout=2.0),
            "unanswered": describe_connection(url, UNANSWERED, *name_channels("ETH-PERPETUAL"), timeout=2.0),
            "shut": describe_connection(url, SHUT, *name_channels("SOL_USDC-PERPETUAL")),
            "closed": describe_connection(url, CLOSED, *name_channels("BTC_USDC-PERPETUAL")),
            "silent": describe_connection(url, SILENT, *name_channels("XRP_USDC-PERPETUAL")),
        }
        with watched(connections, oracle) as seen:
            check_mute(seen, muted, f"deribit.{quiet}")
            check_unproven(seen, "no_reply", UNANSWERED, *name_topics("ETH-PERPETUAL"))
            check_unproven(seen, "error", SHUT, *name_topics("SOL_USDC-PERPETUAL"))
            check_silent(seen, *name_topics("XRP_USDC-PERPETUAL"))
            check_closed(seen, *name_topics("BTC_USDC-PERPETUAL"))
            check_speaking_again(seen)


def check_mute(seen: Watched, faults: str, option: str) -> None:
    """The channel is stale only after an answer that was long in coming; an option that is quiet for longer is not."""
    seen.wait_conditions(QUOTES, LIVE, MUTE)
    (said,) = seen.find(QUOTES, type="status", state="stale")
    (unanswered,) = seen.find_requests("no_reply", faults)
    assert unanswered["timestamp"] * 1_000_000 < said["receive_ts"]
    last, quiet = seen.list_data(QUOTES)[-1], seen.list_data(option)[-1]
    assert quiet["receive_ts"] < last["receive_ts"] < said["receive_ts"]
    assert seen.list_conditions(option) == [LIVE]
    seen.hear_more(BOOKS, TRADES)
    assert seen.list_conditions(BOOKS) == seen.list_conditions(TRADES) == [LIVE]


def check_speaking_again(seen: Watched) -> None:
    """With the next data the channel is live again; nothing was lost, and its neighbours never were anything else."""
    seen.wait_conditions(QUOTES, LIVE, MUTE, LIVE)
    seen.hear_more(QUOTES, BOOKS)
    assert seen.list_conditions(BOOKS) == seen.list_conditions(TRADES) == [LIVE]
    assert (seen.run.get_state("muted")["reconnects"], seen.find(QUOTES, type="gap")) == (0, [])


def check_unproven(seen: Watched, fault: str, faults: str, quote: str, book: str) -> None:
    """Silence is nobody's own while the exchange does not answer, or says that it is closed."""
    seen.wait(lambda: len(seen.find_requests(fault, faults)) > 1, "questions to the exchange")
    seen.hear_more(book)
    assert seen.list_conditions(quote) == [LIVE]


def check_closed(seen: Watched, *topics: str) -> None:
    """Where nothing at all comes of an exchange that is not open, no new connection is called for."""
    seen.wait(lambda: len(seen.find_requests("error", CLOSED)) > 1, "questions to the exchange")
    assert [seen.list_conditions(topic) for topic in topics] == [[LIVE]] * len(topics)
    assert seen.run.get_state("closed")["reconnects"] == 0


def check_silent(seen: Watched, *topics: str) -> None:
    """A connection that gives no data at all any more is lost: a gap, and a new one.

    A channel of it may be told as mute before, if its own rhythm is the quicker one.
    """
    for topic in topics:
        seen.wait(partial(lambda each: seen.list_conditions(each)[-2:] == [LOST, LIVE], topic), f"a loss on {topic}")
        assert [said for said in seen.list_conditions(topic) if said != MUTE] == [LIVE, LOST, LIVE]
        seen.hear_more(topic)
        (gap,) = seen.find(topic, type="gap")
        assert gap["reason"] == "disconnect"
        assert [b["seq"] < gap["seq"] for b in seen.list_data(topic)].count(True) > 20
        assert seen.list_data(topic)[-1]["seq"] > gap["seq"]
    assert [(name, reason[:14]) for name, reason in seen.list_losses()] == [("silent", "no data at all")]
    assert seen.run.get_state("silent")["reconnects"] == 1


@in_loop
async def test_a_channel_that_a_new_connection_never_brings_back_is_told_as_well() -> None:
    """Its rhythm is known from the connection before: the first silence on the new one is already out of it."""
    with exchange("--rate", "600") as (url, _):
        async with collecting(url, f"skip:1,mute:{SPOT}@0", SPOT, FLOW) as run:
            feed = run.worker.feeds[SPOT.encode()]
            await wait_for(lambda: feed.rhythm.is_broken(time.monotonic_ns() + 30 * SECOND), "a rhythm", 40)
            run.worker.client.cut("the test wants it so")
            stale = await run.hearer.hear_of(QUOTES, type="status", state="stale", timeout=50)
            assert stale[0]["reason"] == "mute"
            assert run.hearer.find(QUOTES, type="quote")[-1]["seq"] < stale[0]["seq"]
            assert run.hearer.find(BOOKS, type="status", state="stale") == []


@in_loop
async def test_what_has_never_spoken_is_told_where_it_is_never_quiet_and_a_new_connection_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No rhythm is known: what cannot be quiet is given a minute, which this test lets pass by its arguments.

    Each channel is looked at in a slice of its own.
    """
    monkeypatch.setattr("workers.deribit.watching.patrol.SLICE", 1)
    with exchange() as (url, _):
        option = find_option(url)
        quiet = [f"quote.{option}", f"trades.{option}.100ms", "instrument.state.any.any"]
        async with collecting(url, "mute:*@0", SPOT, *quiet) as run:
            patrol, feeds = run.worker.patrol, list(run.worker.feeds.values())
            await wait_for(lambda: all(feed.condition == LIVE for feed in feeds), "all channels")
            for feed in feeds:
                feed.rhythm.restart(feed.last_ts, time.monotonic_ns() - 61 * SECOND)
            await run.hearer.hear_of(QUOTES, type="status", state="stale", reason="mute")
            assert [feed.condition for feed in feeds] == [MUTE, LIVE, LIVE, LIVE]
            patrol._whole.restart(patrol.last_ts, time.monotonic_ns() - 61 * SECOND)
            (lost,) = await run.hearer.hear_of("deribit.status.w.", state="backoff")
            assert lost["reason"].startswith("no data at all for 6")
            await run.ask("unsubscribe", channels=[SPOT])
            await wait_for(lambda: not patrol._whole.is_steady, "a look at what is left")
            assert not patrol._whole.is_broken(time.monotonic_ns() + 3600 * SECOND)


@in_loop
async def test_a_dead_connection_whose_data_had_a_rhythm_is_left_before_its_heartbeat_is_missed() -> None:
    with exchange("--rate", "600") as (url, _):
        settings: dict[str, Any] = {"heartbeat_interval": 600.0, "timeout": 1.0}
        async with collecting(url, "half_open:3", SPOT, **settings) as run:
            patrol = run.worker.patrol
            await run.hearer.hear_of(QUOTES, type="quote")
            await wait_for(lambda: time.time_ns() - patrol.last_ts > 2 * SECOND, "silence")
            patrol._whole.is_steady = True
            patrol._whole.restart(patrol.last_ts, time.monotonic_ns() - 61 * SECOND)
            (lost,) = await run.hearer.hear_of("deribit.status.w.", state="backoff")
            assert re.fullmatch(r"no data for 6\d s, and no answer to public/test", lost["reason"])


@in_loop
async def test_what_has_ended_by_its_name_is_left_once_it_is_silent_and_not_before() -> None:
    """The day of the instrument and a minute of silence are given by this test."""
    with exchange("--rate", "600") as (url, _):
        ended = [SPOT, FLOW, DEALS]
        faults = ",".join(f"mute:{name}@2" for name in ended)
        async with collecting(url, faults, *ended, TICKER) as run:
            patrol, feeds = run.worker.patrol, list(run.worker.feeds.values())
            await run.hearer.hear_of("deribit.ticker.", 40)
            assert [feed.condition for feed in feeds] == [LIVE] * 4
            for feed in feeds:
                feed.stream.expiry = time.time_ns() - 61 * SECOND
            await patrol._look_at_all(0)
            await run.hearer.hear_of("deribit.ticker.", 60)
            assert [feed.condition for feed in feeds] == [LIVE] * 4
            for feed in feeds:
                feed.rhythm.restart(feed.last_ts, time.monotonic_ns() - 61 * SECOND)
            await run.hearer.hear_of("deribit.ticker.", 70)
            await patrol._look_at_all(0)
            for topic in (QUOTES, BOOKS, TRADES):
                await run.hearer.hear_of(topic, type="status", state="expired")
            run.worker.client.cut("the test wants it so")
            await run.hearer.hear_of("deribit.ticker.", type="gap")
            channels = (await run.get_state())["channels"]
            assert (channels["refused"], channels["confirmed"]) == (dict.fromkeys(ended, EXPIRED), [TICKER])


@in_loop
async def test_what_is_taken_up_anew_while_silence_is_looked_into_does_not_end_for_what_it_was_before() -> None:
    with exchange("--rate", "600") as (url, _):
        async with collecting(url, f"mute:{SPOT}@2,mute:{FLOW}@2", SPOT, FLOW, TICKER) as run:
            await run.hearer.hear_of("deribit.ticker.", 40)
            feeds = [run.worker.feeds[name.encode()] for name in (SPOT, FLOW)]
            for feed in feeds:
                feed.stream.expiry = time.time_ns() - 61 * SECOND
                feed.rhythm.restart(feed.last_ts, time.monotonic_ns() - 61 * SECOND)
            again = {"channels": [SPOT], "epoch": time.time_ns()}
            ways = [run.worker.answer(op, again) for op in ("unsubscribe", "subscribe")]
            await asyncio.gather(run.worker.patrol._look_at_all(0), *ways)
            await run.hearer.hear_of(BOOKS, type="status", state="expired")
            assert run.worker.client.reconciler.subscriptions.refused == {FLOW: EXPIRED}
            assert run.worker.feeds[SPOT.encode()] is not feeds[0]


@in_loop
async def test_what_a_wrong_clock_had_ended_is_taken_up_again_once_the_clock_is_right() -> None:
    """The exchange's clock is 76 years ahead on the first connection; a minute of silence is given by this test."""
    with exchange("--rate", "600") as (url, _):
        rows = get(url, "public/get_instruments", kind="future")[1]["result"]
        first, second, third, *_ = (row["instrument_name"] for row in rows if row["settlement_period"] != "perpetual")
        early, refused, over = [f"quote.{first}", f"trades.{first}.100ms"], f"quote.{second}", f"quote.{third}"
        muted = ",".join(f"mute:{name}@2" for name in (*early, over))
        faults = f"clock:2400000000000,drop_subscribe:{refused}@2,{muted},first:1"
        async with collecting(url, faults, *early, refused, over, TICKER, breaks="time") as run:
            client, patrol = run.worker.client, run.worker.patrol
            await run.hearer.hear_of("deribit.ticker.", 40)
            client.reconciler.expire([over])  # the exchange has said so
            for name in early:
                feed = run.worker.feeds[name.encode()]
                feed.rhythm.restart(feed.last_ts, time.monotonic_ns() - 61 * SECOND)
            await patrol._look_at_all(0)
            topics = [f"deribit.quote.{first}.", f"deribit.trade.{first}.", f"deribit.quote.{second}."]
            for topic in (*topics, f"deribit.quote.{third}."):
                await run.hearer.hear_of(topic, type="status", state="expired")
            ends = [run.hearer.find(topic, state="expired")[0] for topic in topics]
            client.cut("the test wants it so")
            await run.hearer.hear_of("deribit.ticker.", type="gap")
            await wait_for(lambda: client.machine.state == "live", "it to be live: data come a little before")
            await patrol._look_at_all(0)
            for topic, end in zip(topics, ends, strict=True):
                await run.hearer.hear_of(topic, type="status", state="live", epoch=end["epoch"] + 1)
                (first_word,) = run.hearer.find(topic, epoch=end["epoch"] + 1, seq=1)
                assert (first_word["state"], first_word["reason"]) == BEGINNING
            channels = (await run.get_state())["channels"]
            assert (channels["refused"], channels["confirmed"]) == ({over: EXPIRED}, sorted([*early, refused, TICKER]))


@pytest.mark.parametrize("way", ["given up", "ended at the exchange"])
@in_loop
async def test_what_is_left_while_the_clock_is_asked_is_not_taken_up(way: str) -> None:
    with exchange("--rate", "600") as (url, _):
        async with collecting(url, "", SPOT, TICKER, breaks="status") as run:
            await run.hearer.hear_of("deribit.heartbeat.", 2)  # the next look in which that is asked is this test's
            reconciler = run.worker.client.reconciler
            subscriptions = reconciler.subscriptions
            reconciler.expire([SPOT], by_clock=True)
            await wait_for(lambda: SPOT not in subscriptions.confirmed, "it to be left")

            async def leave() -> None:
                if way == "given up":
                    await run.worker.answer("unsubscribe", {"channels": [SPOT], "epoch": time.time_ns()})
                else:
                    reconciler.expire([SPOT])

            await asyncio.gather(run.worker.patrol._look_at_all(0), leave())
            assert (SPOT in subscriptions.asked) == (SPOT.encode() in run.worker.feeds) == (way != "given up")
            assert subscriptions.refused == ({} if way == "given up" else {SPOT: EXPIRED})


@in_loop
async def test_what_is_late_has_ended_only_once_nothing_comes_at_all() -> None:
    """The day of the instrument and a minute of silence are given by this test."""
    with exchange("--rate", "600") as (url, _):
        async with collecting(url, f"lag:6@1,mute:{SPOT}@2", SPOT, TICKER) as run:
            feed, patrol = run.worker.feeds[SPOT.encode()], run.worker.patrol
            await wait_for(lambda: feed.condition == LATE, "lag")
            feed.stream.expiry = time.time_ns() - 61 * SECOND
            feed.rhythm.restart(feed.last_ts, time.monotonic_ns() - 61 * SECOND)
            await patrol._look_at_all(0)
            run.hearer.drain()
            await run.hearer.hear_of("deribit.ticker.", len(run.hearer.find("deribit.ticker.")) + 20)
            assert (feed.condition, run.worker.client.reconciler.subscriptions.presumed) == (LATE, set())
            await run.worker.client.send("public/unsubscribe", {"channels": [TICKER]})  # the worker knows nothing of it
            await wait_for(lambda: time.time_ns() - patrol.last_ts > 3 * SECOND, "silence")
            patrol._whole.restart(patrol.last_ts, time.monotonic_ns() - 61 * SECOND)
            await patrol._look_at_all(0)
            await run.hearer.hear_of(QUOTES, type="status", state="expired")


# -- lag --------------------------------------------------------------------------------------------------------------


def test_lag_is_told_on_every_topic_and_acted_on_when_it_gets_worse(tmp_path: Path) -> None:
    oracle = tmp_path / "oracle.jsonl"
    with serving(oracle) as url:
        connections = {
            "late": describe_connection(url, "lag:6@4,until:22", SPOT, FLOW),
            "far": describe_connection(url, "lag:31@4", *name_channels("ETH-PERPETUAL")),
            "worse": describe_connection(url, "backlog:0.1@4,first:1", *name_channels("SOL_USDC-PERPETUAL")),
        }
        with watched(connections, oracle) as seen:
            check_late(seen)
            check_worse(seen, *name_topics("SOL_USDC-PERPETUAL"))
            check_far(seen, *name_topics("ETH-PERPETUAL"))


def check_late(seen: Watched) -> None:
    """Lag that lasts is told, in order with the late data, and its end too; nothing is lost by it."""
    for topic in (QUOTES, BOOKS):
        seen.wait_conditions(topic, LIVE, LATE)
        said = seen.find(topic, type="status", state="stale")[0]  # it is said again within a minute
        late = [body for body in seen.list_data(topic) if body["seq"] < said["seq"]][-1]
        assert late["receive_ts"] - late["exchange_ts"] > 5 * SECOND
    assert seen.find("deribit.heartbeat.late.1s")[-1]["lag"] > 5
    assert seen.run.get_state("late")["lag"]["p99"] > 5
    for topic in (QUOTES, BOOKS):
        seen.wait_conditions(topic, LIVE, LATE, LIVE)
        seen.hear_more(topic)
        assert seen.find(topic, type="gap") == []
    seen.wait(lambda: seen.find("deribit.heartbeat.late.1s")[-1]["lag"] < 5, "a beat with little lag")
    assert seen.run.get_state("late")["reconnects"] == 0


def check_worse(seen: Watched, *topics: str) -> None:
    """A connection that falls behind further and further is given up; the next one is in time."""
    for topic in topics:
        seen.wait_conditions(topic, LIVE, LATE, LOST, LIVE)
        seen.hear_more(topic)
        (gap,) = seen.find(topic, type="gap")
        newest = seen.list_data(topic)[-1]
        assert (gap["reason"], newest["seq"] > gap["seq"]) == ("disconnect", True)
        assert newest["receive_ts"] - newest["exchange_ts"] < 5 * SECOND
    assert max(beat["lag"] for beat in seen.find("deribit.heartbeat.worse.1s")) > 30
    ((name, reason),) = seen.list_losses()
    assert (name, "later and later" in reason) == ("worse", True)


def check_far(seen: Watched, *topics: str) -> None:
    """Lag that is great but does not rise is told, and that is all: a new connection would not be any better."""
    for topic in topics:
        seen.wait_conditions(topic, LIVE, LATE)
    said = seen.find(topics[0], type="status", state="stale")[0]  # it is said again within a minute
    beats = "deribit.heartbeat.far.1s"
    seen.wait(lambda: len([b for b in seen.find(beats) if b["receive_ts"] > said["receive_ts"]]) > 8, "beats")
    assert seen.find(beats)[-1]["lag"] > 30
    state = seen.run.get_state("far")
    assert state["lag"]["p99"] > 30
    assert (state["state"], state["reconnects"]) == ("live", 0)
