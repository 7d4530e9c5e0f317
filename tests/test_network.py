"""What networks do to a connection, in two of this machine's own: no link, packets that go astray, another address."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from collector.client.stream import Message, read_message
from tests.collected import Collected, collected
from tests.faults.judge import Truth, judge
from tests.faults.programs import Recorder, find_live, note_trades
from tests.pipeline import short_directory
from tests.support import collector, running, wait_until

THERE, HERE, LATER = "192.0.2.1", "192.0.2.2", "192.0.2.3"
"""Addresses of the exchange and of the collector, and one that the collector has later on."""

URL = f"ws://{THERE}:9000/ws/api/v2"
TRADED = ("BTC-PERPETUAL", "ETH-PERPETUAL")
CONNECTION = {
    "url": URL, "channels": [f"{family}.{name}.100ms" for family in ("trades", "book") for name in TRADED],
    "heartbeat_interval": 10.0, "timeout": 1.0, "retry_delay": 0.05, "retry_count": 1000,
}  # fmt: skip


def may_make_networks() -> bool:
    """Whether this user may, and has the tools."""
    make = ("unshare", "-n", "ip", "link", "add", "v", "type", "veth")
    has_tools = all(map(shutil.which, ("ip", "nsenter", "unshare")))
    return has_tools and subprocess.run(make, capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not may_make_networks(), reason="this user may not make networks, or has no ip command")


class Place(NamedTuple):
    """A network of its own with one device, `v`; it ends with the program that holds it."""

    under: tuple[str, ...]
    pid: int

    def ip(self, words: str) -> None:
        """Run `ip` there."""
        subprocess.run([*self.under, "ip", *words.split()], check=True)


@contextmanager
def opened_place() -> Iterator[Place]:
    # Longer than any test may last; but not for ever, should the tests be killed.
    with running("unshare", "-n", "sleep", "600") as holder:
        network = Path(f"/proc/{holder.pid}/ns/net")
        wait_until(lambda: network.readlink() != Path("/proc/self/ns/net").readlink(), "a network of its own")
        yield Place(("nsenter", "-t", str(holder.pid), "-n"), holder.pid)


@contextmanager
def linked_places() -> Iterator[tuple[Place, Place]]:
    """A place for the exchange and one for the collector, with a cable between them."""
    with opened_place() as there, opened_place() as here:
        there.ip(f"link add v type veth peer name v netns {here.pid}")
        for place, address in ((there, THERE), (here, HERE)):
            place.ip(f"address add {address}/24 dev v")
            place.ip("link set v up")
            place.ip("link set lo up")
        yield there, here


class Round(NamedTuple):
    """An exchange and, beyond a cable, a collector; what happens there, and what a subscriber receives."""

    there: Place
    here: Place
    oracle: Path
    run: Collected
    recorder: Recorder

    def list_trades(self) -> list[dict[str, Any]]:
        """What was traded, as the exchange tells."""
        events = [json.loads(line) for line in self.oracle.read_text().rpartition("\n")[0].splitlines()]
        return [event for event in events if event["event"] == "trade" and event["instrument_name"] in TRADED]

    def list_messages(self, kind: str) -> list[Message]:
        """What was received of a type."""
        found = [read_message(each.topic, each.payload) for each in list(self.recorder.records["a"])]
        return [message for message in found if message.type == kind]

    def wait_trade(self) -> None:
        """Wait until something that is traded from now on has been received."""
        now = time.time_ns()
        wait_until(lambda: any(each.exchange_ts > now for each in self.list_messages("trade")), "a new trade")

    def find_faults(self) -> list[str]:
        """What is wrong with all that was received."""
        record, truth = list(self.recorder.records["a"]), Truth()
        note_trades(truth, self.list_trades(), find_live(record))
        assert truth.owed
        truth.allowed = {"heartbeat"}  # on a busy machine they may come late
        return list(judge(record, truth))

    def judge(self) -> None:
        """Let the market stand still, and wait until every trade has come or been named."""
        ask = f"from tests.exchange_client import get; assert get({URL!r}, 'practice/freeze')[0] == 200"
        subprocess.run([*self.there.under, sys.executable, "-c", ask], check=True)
        try:
            wait_until(lambda: not self.find_faults(), "an account of every trade")
        finally:
            assert self.find_faults()[:3] == []


@pytest.fixture
def round_of_two() -> Iterator[Round]:
    with short_directory() as directory, linked_places() as (there, here):
        options = ("--host", THERE, "--port", "9000", "--oracle", str(directory / "oracle"), "--rate", "400")
        with running(*there.under, *collector("exchange", *options)) as exchange:
            exchange.wait_line("^listening on")
            with (
                collected({"a": CONNECTION}, exchange=None, log_level="info", under=here.under) as run,
                closing(Recorder({"a": f"ipc://{run.runtime_dir}/a.pub"})) as recorder,
            ):
                run.wait_state("a")
                opened = Round(there, here, directory / "oracle", run, recorder)
                opened.wait_trade()
                yield opened


def test_a_link_that_is_down_for_a_moment_costs_nothing(round_of_two: Round) -> None:
    each = round_of_two
    each.here.ip("link set v down")
    end = time.time() + 2
    wait_until(lambda: each.list_trades()[-1]["timestamp"] > end * 1000, "trades that cannot come")
    assert each.list_messages("trade")[-1].exchange_ts < (end - 1) * 1e9
    each.here.ip("link set v up")
    each.wait_trade()
    each.judge()
    assert each.list_messages("gap") == []
    assert each.run.get_state("a")["reconnects"] == 0


def lose_answers(there: Place, here: Place) -> Callable[[], None]:
    """Send what goes to the collector to a machine that is not there; return how to end that."""
    there.ip(f"neighbour replace {HERE} lladdr 02:00:00:00:00:99 dev v nud permanent")
    return lambda: there.ip(f"neighbour delete {HERE} dev v")


def change_address(there: Place, here: Place) -> Callable[[], None]:
    """Take the collector's address away; return how to give it another."""
    here.ip(f"address delete {HERE}/24 dev v")
    return lambda: here.ip(f"address add {LATER}/24 dev v")


@pytest.mark.parametrize("begin", [lose_answers, change_address])
def test_what_a_way_that_died_in_silence_has_cost_is_announced_and_fetched(
    round_of_two: Round, begin: Callable[[Place, Place], Callable[[], None]]
) -> None:
    each = round_of_two
    end = begin(each.there, each.here)
    each.run.program.wait_line("a: backoff: no .* and no answer to public/test")
    each.run.program.wait_line("a: backoff: (no connection to|Cannot connect to host)")
    end()
    each.run.wait_state("a")
    each.wait_trade()
    each.judge()
    assert {(gap["reason"], gap.get("healing")) for gap in each.list_messages("gap")} == {
        ("disconnect", True),
        ("disconnect", None),
    }
    assert all(repair["missing"] == [] for repair in each.list_messages("repair"))
