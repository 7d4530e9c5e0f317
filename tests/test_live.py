"""The whole program against a real exchange: `make live`. Skipped, saying why, where that cannot be.

COLLECTOR_LIVE_URL names another exchange (or `practice`, which shows that these tests can pass).
"""

import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import msgpack
import pytest

from collector.client.verify import Verifier
from tests.collected import Collected, collected
from tests.pipeline import Subscriber

URL = os.environ.get("COLLECTOR_LIVE_URL", "wss://test.deribit.com/ws/api/v2")
PREFIX = "DERIBIT_TEST"
CHANNELS = ["trades.BTC-PERPETUAL.100ms", "book.BTC-PERPETUAL.100ms", "ticker.BTC-PERPETUAL.100ms"]


def find_obstacle() -> str:
    """Why the exchange cannot be reached, in words; empty if it can."""
    if not os.environ.get("COLLECTOR_LIVE"):
        return "needs a real exchange: run `make live`"
    if URL == "practice":
        return ""
    host = urlsplit(URL).hostname or ""
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError as error:
        return f"{host} cannot be reached: {error}"
    return ""


OBSTACLE = find_obstacle()
HAS_KEYS = bool(os.environ.get(f"{PREFIX}_CLIENT_ID"))
pytestmark = [pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE), pytest.mark.timeout(180)]


@pytest.fixture
def live() -> Iterator[Collected]:
    with collected({"a": {"url": URL, "channels": CHANNELS}}) as running:
        running.wait_state("a")
        yield running


def listen(running: Collected) -> Subscriber:
    return Subscriber(running.get_state("a")["publish"])


def test_books_and_tickers_flow_and_every_rule_of_the_wire_holds(live: Collected) -> None:
    subscriber = listen(live)
    subscriber.listen_until(lambda: len(subscriber.find("deribit.book.", kind="delta")) >= 20, "20 changes", 90)
    subscriber.listen_until(lambda: subscriber.find("deribit.ticker.BTC-PERPETUAL."), "a ticker", 60)
    snapshot = subscriber.find("deribit.book.", kind="snapshot")[0]
    assert snapshot["bids"][0][0] < snapshot["asks"][0][0]
    verifier = Verifier()
    for topic, payload in subscriber.messages:
        assert not verifier.check(topic.encode(), msgpack.packb(payload), now_ns=time.time_ns())
    assert abs(live.get_state("a")["clock_offset"]) < 60e9


def test_control_subscribes_sends_and_unsubscribes(live: Collected) -> None:
    channels = ["quote.BTC-PERPETUAL", "quote.NO-SUCH-THING"]
    answered: dict[str, Any] = live.ask("subscribe", connection="a", channels=channels)["channels"]
    assert answered["quote.BTC-PERPETUAL"] is True
    assert answered["quote.NO-SUCH-THING"]["code"] == "exchange_error"
    theirs = live.ask("send", connection="a", method="public/get_time", params={})
    assert abs(theirs / 1000 - time.time()) < 60
    assert live.ask("unsubscribe", connection="a", channels=channels[:1])["channels"] == {channels[0]: True}


def test_a_killed_worker_comes_back_and_says_what_was_lost(live: Collected) -> None:
    subscriber = listen(live)
    subscriber.listen_until(lambda: subscriber.find("deribit.book.", kind="delta"), "a change", 60)
    live.find_process("a").kill()
    subscriber.listen_until(lambda: subscriber.find("deribit.book.", type="gap", reason="restart"), "a gap", 60)
    subscriber.listen_until(lambda: len(subscriber.find("deribit.book.", kind="snapshot")) >= 2, "a snapshot", 60)
    assert live.stop(signal.SIGTERM) == 0


@pytest.mark.skipif(not HAS_KEYS, reason=f"no {PREFIX}_CLIENT_ID and {PREFIX}_CLIENT_SECRET in the environment")
def test_a_login_gives_raw_channels() -> None:
    wanted = {"a": {"url": URL, "credentials": PREFIX, "channels": ["book.BTC-PERPETUAL.raw", "user.portfolio.any"]}}
    with collected(wanted) as running:
        state = running.wait_state("a", authenticated=True)
        assert set(state["channels"]["confirmed"]) == set(wanted["a"]["channels"])
