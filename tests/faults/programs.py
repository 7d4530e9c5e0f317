"""Whole programs: exchange, collector and subscriber as processes; each connection of a round is one case."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import zmq

from collector.client.stream import read_message
from tests.certificate import make_certificate, trusted
from tests.collected import Collected, collected
from tests.exchange_client import apply_book, connect, exchange, get
from tests.faults.exchange import sort_levels
from tests.faults.judge import Received, Traded, Truth, judge
from tests.pipeline import short_directory

LASTS, SETTLES = 9.0, 30.0
"""Seconds of a round until the market stands still, and in which all must then be told."""

MS = 1_000_000


class Scenario(NamedTuple):
    """What happens to one connection: its channels, the faults of its URL, and when its worker is killed (seconds).

    `instrument`: its name, `future.BTC.0` for the first one that expires, `option.BTC` for all of those.
    `shown`: the reason of a gap that must be seen, so that it is known to have happened; "" where nothing is lost, or
    where topics are so quiet that none need have data after it (a gap stands before the next data).
    """

    name: str
    instrument: str
    shown: str
    faults: str = ""
    kills: tuple[float, ...] = ()
    allowed: frozenset[str] = frozenset()

    @property
    def channels(self) -> list[str]:
        if self.instrument.startswith("option."):
            return [f"trades.{self.instrument}.100ms"]
        return [f"{family}.{self.instrument}.100ms" for family in ("book", "trades")]


SCENARIOS = (
    Scenario("gap", "BTC-PERPETUAL", "sequence", "gap:8@9,first:2"),
    Scenario("lost-trades", "ETH-PERPETUAL", "sequence", "lost_trades:3@9,first:2"),
    Scenario("duplicate", "BTC_USDC-PERPETUAL", "sequence", "duplicate:4@30"),
    Scenario("reorder", "ETH_USDC-PERPETUAL", "sequence", "reorder:5@8,first:2"),
    Scenario("drop", "SOL_USDC-PERPETUAL", "disconnect", "drop:1.5,first:3"),
    Scenario("reset", "XRP_USDC-PERPETUAL", "disconnect", "reset:2,first:2"),
    Scenario("close", "DOGE_USDC-PERPETUAL", "disconnect", "close:1001@1,first:3"),
    Scenario("mute", "ADA_USDC-PERPETUAL", "disconnect", "mute:*@1,drop:3,first:1"),
    Scenario("resnapshot", "AVAX_USDC-PERPETUAL", "sequence", "resnapshot:5@5,prev0:9@4,no_snapshot:1,first:2"),
    Scenario("crossed", "LINK_USDC-PERPETUAL", "", "crossed:7@5,first:1", allowed=frozenset({"crossed"})),
    Scenario(
        "refused",
        "LTC_USDC-PERPETUAL",
        "disconnect",
        "error:public/get_last_trades_by_instrument=10028@1,drop:2,first:2",
    ),
    Scenario("kill", "future.BTC.0", "restart", kills=(3.0,)),
    Scenario("kill-twice", "future.ETH.0", "restart", "lost_trades:3@4,gap:9@3,first:2", kills=(2.5, 4.5)),
    Scenario("options-drop", "option.BTC", "", "drop:2,first:3"),
    Scenario("options-kill", "option.ETH", "", kills=(3.5,)),
)

SLOW = (Scenario("half-open", "future.BTC.1", "disconnect", "half_open:1,first:1"),)
"""It takes half a minute until such a connection is given up."""


class Recorder:
    """A thread with one SUB socket for each connection; `records` grow by name."""

    def __init__(self, endpoints: dict[str, str]) -> None:
        self.records: dict[str, list[Received]] = {name: [] for name in endpoints}
        self._endpoints = endpoints
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        context, poller, names = zmq.Context(), zmq.Poller(), {}
        for name, endpoint in self._endpoints.items():
            socket = context.socket(zmq.SUB)
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.setsockopt(zmq.RECONNECT_IVL, 5)  # so that nothing is said before it is there
            socket.subscribe(b"")
            socket.connect(endpoint)
            poller.register(socket, zmq.POLLIN)
            names[socket] = name
        while not self._ended.is_set():
            for socket, _ in poller.poll(50):
                topic, payload = socket.recv_multipart()
                self.records[names[socket]].append(Received(topic, payload, time.time_ns()))
        context.destroy(linger=0)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()


class Witness:
    """A thread with a plain WebSocket of its own, without faults: it has each book at each change."""

    def __init__(self, url: str, channels: list[str]) -> None:
        self.books: dict[str, dict[int, Any]] = {}
        self._url, self._channels = url, channels
        self._ready, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._watch()), daemon=True)
        self._thread.start()
        assert self._ready.wait(20), "the witness is not subscribed"

    async def _watch(self) -> None:
        levels: dict[str, dict[str, dict[float, float]]] = {}
        async with connect(self._url, "") as client:
            await client.ask("public/subscribe", channels=self._channels)
            self._ready.set()
            while not self._ended.is_set():
                texts, client.texts = client.texts, []
                for text in texts:
                    self._take(json.loads(text), levels)
                await asyncio.sleep(0.05)

    def _take(self, message: dict[str, Any], levels: dict[str, dict[str, dict[float, float]]]) -> None:
        if message.get("method") != "subscription":
            return
        channel, data = message["params"]["channel"], message["params"]["data"]
        book = levels.setdefault(channel, {"bids": {}, "asks": {}})
        apply_book(book, data)
        self.books.setdefault(f"deribit.{channel}", {})[data["change_id"]] = sort_levels((book["bids"], book["asks"]))

    def close(self) -> None:
        self._ended.set()
        self._thread.join()


def list_futures(url: str, currency: str) -> list[str]:
    """The futures that expire, the next one to do so first."""
    rows = get(url, "public/get_instruments", currency=currency, kind="future")[1]["result"]
    dated = [row for row in rows if row["settlement_period"] != "perpetual"]
    return [row["instrument_name"] for row in sorted(dated, key=lambda row: int(row["expiration_timestamp"]))]


def name_future(scenario: Scenario, url: str) -> Scenario:
    """The scenario with the name of its future."""
    kind, *which = scenario.instrument.split(".")
    if kind != "future":
        return scenario
    return scenario._replace(instrument=list_futures(url, which[0])[int(which[1])])


def run_round(seed: int, scenarios: tuple[Scenario, ...] = SCENARIOS, tls: bool = False) -> dict[str, list[str]]:
    """Run all scenarios side by side, over TLS if asked for; return what is wrong with each, by name."""
    if not tls:
        return run_exchange(seed, scenarios)
    with short_directory() as directory:
        own = make_certificate(directory)
        with trusted(own):
            return run_exchange(seed, scenarios, "--certificate", own)


def run_exchange(seed: int, scenarios: tuple[Scenario, ...], *more: str) -> dict[str, list[str]]:
    """A round against an exchange with these further options."""
    rng = Random(seed)
    with short_directory() as directory:
        oracle = directory / "oracle"
        options = ("--oracle", str(oracle), "--rate", "900", "--seed", str(seed + 1))
        faults = ("--faults", "connections:0,listing:2,expiry:3")
        keys = {"PRACTICE_KEYS": ",".join(f"account{number}:account{number}" for number in range(len(scenarios)))}
        with exchange(*options, *faults, *more, env=keys) as (url, _):
            named = tuple(name_future(each, url) for each in scenarios)
            books = [name for each in named for name in each.channels if name.startswith("book.")]
            with closing(Witness(url, books)) as witness:
                return run_collector(url, oracle, witness, named, rng)


def run_collector(
    url: str, oracle: Path, witness: Witness, scenarios: tuple[Scenario, ...], rng: Random
) -> dict[str, list[str]]:
    """One collector with a connection for each scenario; judge when the market has come to rest."""
    tables = {
        each.name: {
            "url": f"{url}?faults={each.faults},seed:{rng.randrange(10**6)}" if each.faults else url,
            "channels": each.channels, "retry_delay": 0.05, "retry_count": 1000,
            "heartbeat_interval": 10.0, "timeout": 2.0, "credentials": f"ACCOUNT_{number}",
        }
        for number, each in enumerate(scenarios)
    }  # fmt: skip
    with collected(tables, exchange=None, log_level="info", env=write_secrets(scenarios)) as running:
        endpoints = {each.name: f"ipc://{running.runtime_dir}/{each.name}.pub" for each in scenarios}
        with closing(Recorder(endpoints)) as whole:
            running.wait_state(scenarios[-1].name)
            kill_workers(running, scenarios, rng)
            with closing(Recorder(endpoints)) as late:
                time.sleep(1.5)
                assert get(url, "practice/freeze")[0] == 200
                return judge_round(scenarios, [whole, late], oracle, witness)


def write_secrets(scenarios: tuple[Scenario, ...]) -> dict[str, str]:
    """The environment in which each connection has an account: those of one account wait for each other's credits."""
    accounts = range(len(scenarios))
    return {f"ACCOUNT_{number}_CLIENT_{part}": f"account{number}" for number in accounts for part in ("ID", "SECRET")}


def kill_workers(running: Collected, scenarios: tuple[Scenario, ...], rng: Random) -> None:
    """Let the round last, and kill the workers whose time has come."""
    began = time.monotonic()
    due = sorted((at + rng.random() / 2, each.name) for each in scenarios for at in each.kills)
    for at, name in due:
        time.sleep(max(0.0, began + at - time.monotonic()))
        running.find_process(name).kill()
    time.sleep(max(0.0, began + LASTS - 1.5 - time.monotonic()))


def judge_round(
    scenarios: tuple[Scenario, ...], recorders: list[Recorder], oracle: Path, witness: Witness
) -> dict[str, list[str]]:
    """Judge each case again and again until nothing is wrong, or it has taken too long."""
    found: dict[str, list[str]] = {}
    end = time.monotonic() + SETTLES
    while not found or (any(found.values()) and time.monotonic() < end):
        time.sleep(0.7)
        events = [json.loads(line) for line in oracle.read_bytes().splitlines()]
        for each in scenarios:
            if found.get(each.name) != []:
                found[each.name] = list(judge_scenario(each, recorders, events, witness))
    return found


def judge_scenario(
    scenario: Scenario, recorders: list[Recorder], events: list[dict[str, Any]], witness: Witness
) -> Iterator[str]:
    whole, late = (list(recorder.records[scenario.name]) for recorder in recorders)
    truth = build_truth(scenario, whole, events, witness)
    gaps = [read_message(received.topic, received.payload) for received in whole if b"\xa3gap" in received.payload]
    if scenario.shown and not any(gap.get("reason") == scenario.shown for gap in gaps):
        yield f"no gap for the reason {scenario.shown} was announced"
    yield from judge(whole, truth)
    truth.owed.clear()
    yield from (f"late subscriber: {text}" for text in judge(late, truth, is_whole=False))


def build_truth(scenario: Scenario, record: list[Received], events: list[dict[str, Any]], witness: Witness) -> Truth:
    """What the exchange's oracle and the witness know of one connection's topics."""
    truth = Truth()
    truth.allowed = set(scenario.allowed) | {"heartbeat"}  # on a busy machine they may come late
    truth.books.update({topic: dict(books) for topic, books in witness.books.items()})
    is_wide = scenario.instrument.startswith("option.")

    def is_wanted(name: str) -> bool:
        if is_wide:
            return name.startswith(scenario.instrument[7:] + "-") and name[-2:] in ("-C", "-P")
        return name == scenario.instrument

    if not is_wide:
        topic = f"deribit.book.{scenario.instrument}.100ms"
        truth.final[topic] = {max(truth.books[topic])}
    if "crossed" in scenario.allowed:
        (end,) = truth.final[topic]
        truth.books.clear()  # what it sent was not the true book; the end is
        truth.books[topic] = {end: witness.books[topic][end]}
    note_trades(truth, [event for event in events if is_wanted(event.get("instrument_name", ""))], find_live(record))
    return truth


def note_trades(truth: Truth, events: list[dict[str, Any]], live: int) -> None:
    """Add the trades among the events; those since `live` (ms) must come, if it is not 0."""
    for event in events:
        if event["event"] == "trade":
            name, seq = event["instrument_name"], event["trade_seq"]
            price, amount = float(event["price"]), float(event["amount"])
            truth.note(name, 0, seq, Traded(str(event["trade_id"]), price, amount, event["direction"]))
            if live and event["timestamp"] > live:
                truth.owed.setdefault(f"deribit.trade.{name}.100ms", seq)


def find_live(record: list[Received]) -> int:
    """When (ms) a connection was surely live for the first time: a second after its first data; 0 if it never was."""
    data = (b"deribit.book.", b"deribit.trade.")
    return next((received.at // MS + 1000 for received in record if received.topic.startswith(data)), 0)
