"""Properties: whatever comes in a channel, subscribers get valid messages or nothing, and what follows goes on."""

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
import zmq
from hypothesis import example, given, settings
from hypothesis import strategies as st

from collector.channels import Channel, parse_channel
from collector.messages import parse_topic
from collector.schema import ENVELOPE, SCHEMA, find_faults
from tests.frames_checker import FrameReader, compare_message
from tests.support import wait_until
from workers.deribit.feeds.book import set_levels
from workers.deribit.feeds.normalise import create_feed
from workers.deribit.healing.heal import read_page
from workers.deribit.publishing.ledger import Ledger
from workers.deribit.publishing.publisher import Publisher
from workers.deribit.publishing.streams import Topics

bounded = settings(max_examples=300)

NOW = 1_700_000_000_000_000_000
MS = 1_000_000

TRADE = {
    "trade_seq": 5, "trade_id": "ETH-9", "timestamp": 1616321287195, "tick_direction": 0, "price": 56273.5,
    "mark_price": 56243.86, "instrument_name": "BTC-26MAR21", "index_price": 56127.59, "direction": "buy",
    "amount": 6000.0, "iv": 41.01, "contracts": 1.0, "liquidation": "MT", "block_trade_id": "B-1", "combo_id": "C",
    "combo_trade_id": 43, "starbase_match_id": 225046781992378368, "starbase_timestamp": 1616321287195718924,
    "block_rfq_id": 50510, "block_trade_leg_count": 2,
}  # fmt: skip
BOOK = {
    "type": "snapshot", "timestamp": 1622626472678, "instrument_name": "BTC-25JUN21", "change_id": 31479219781,
    "prev_change_id": 7, "bids": [["new", 37317.0, 2960.0], ["delete", 37311.5, 0.0]], "asks": [["new", 3.7e4, 10.0]],
}  # fmt: skip
TICKER = {
    "timestamp": 1590969597073, "stats": {"volume": None, "low": 1.5}, "state": "open",
    "open_interest": 0, "mark_price": 0.33859, "last_price": None, "index_price": 231.54, "best_bid_price": 0.0,
    "instrument_name": "ETH-5JUN20-310-P", "greeks": {"vega": 0.0092, "delta": -0.98566}, "best_bid_amount": 0.0,
    "estimated_delivery_price": "expired", "best_ask_price": 0.0, "best_ask_amount": 0.0,
}  # fmt: skip
FULL_TICKER = TICKER | {
    "instrument_name": "ETH-25JUN21-310-P", "estimated_delivery_price": 231.54, "mark_iv": 61.2, "bid_iv": 0,
    "greeks": {"vega": 0.0092, "delta": -0.98566, "gamma": 4.0e-7, "theta": -1, "rho": None}, "interest_rate": 0.0,
    "stats": {"volume": 3, "low": 1.5, "high": None, "price_change": -0.5, "volume_usd": 1e3, "volume_notional": 2.0},
    "underlying_price": 230, "underlying_index": "ETH-25JUN21", "min_price": 0.0001, "max_price": 1.0, "ask_iv": 500.0,
    "settlement_price": 0.33, "state": "open",
}  # fmt: skip
SEEDS: dict[str, Any] = {
    "trades.BTC-26MAR21.raw": [TRADE, {**TRADE, "trade_seq": 6}],
    "trades.future.any.100ms": [TRADE],
    "book.BTC-25JUN21.100ms": BOOK,
    "book.BTC-25JUN21.none.10.100ms": {**BOOK, "bids": [[1.5, 2.0]], "asks": [[2.5, 1.0]]},
    "ticker.ETH-5JUN20-310-P.raw": TICKER,
    "ticker.ETH-25JUN21-310-P.raw": FULL_TICKER,
    "incremental_ticker.ETH-5JUN20-310-P": {"type": "snapshot", **TICKER},
    "quote.BTC-PERPETUAL": {
        "timestamp": 1, "instrument_name": "BTC-PERPETUAL", "best_bid_price": 1.0, "best_bid_amount": 2,
        "best_ask_price": None, "best_ask_amount": 0.0,
    },
    "perpetual.BTC-PERPETUAL.100ms": {"interest": 0.005, "timestamp": 1571386349530, "index_price": 7872.88},
    "deribit_price_index.btc_usd": {"index_name": "btc_usd", "price": 3937.89, "timestamp": 1550588002899},
    "deribit_volatility_index.btc_usd": {"volatility": 129.36, "timestamp": 1619777946007, "index_name": "btc_usd"},
    "estimated_expiration_price.btc_usd": {"is_estimated": False, "price": 3939.73, "seconds": 180929},
    "markprice.options.btc_usd": [{"timestamp": 9, "mark_price": 0.3, "iv": 0.9, "instrument_name": "BTC-2JUN21-1-P"}],
    "chart.trades.BTC-PERPETUAL.1": {
        "volume": 0.05, "tick": 1573645080000, "open": 1.0, "low": 1.0, "high": 2.0, "cost": 460, "close": 1.5,
    },
    "instrument.state.any.any": {"timestamp": 1553080940000, "state": "created", "instrument_name": "BTC-22MAR19"},
    "platform_state": {"price_index": "sol_usdc", "locked": True},
    "user.changes.any.any.raw": {"instrument_name": "X", "trades": [], "orders": [{"price": "market_price"}]},
}  # fmt: skip

CHANNELS = st.sampled_from(list(SEEDS)).map(parse_channel)

# Spellings that a JSON writer would not produce, spliced in as they are.
SPELLINGS = st.sampled_from(
    [
        "1e400", "-1e400", "NaN", "Infinity", "1e308", "4.0e-7", "-0.0", "-1", "01", "+1", "9" * 400, "9" * 25,
        "9" * 19, '"\\ud800"', '"\\u0000"', '"nan"', '"inf"', '"1.5"', '""', '"a.b"', '"a b"', '"\xff"',
        '"%s"' % ("A" * 5000), "[" * 2000 + "]" * 2000,
        '{"a":' * 600 + "1" + "}" * 600, "{", "", "nul", "true", "null", "[]", "{}",
    ]
)  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8"), max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


@st.composite
def damaged_data(draw: st.DrawFn, seed: Any) -> bytes:
    """The text of the seed with one to three of its members deleted, replaced, doubled or misspelled."""
    data = json.loads(json.dumps(seed))
    splices: list[str] = []
    for _ in range(draw(st.integers(1, 3))):
        data = _damage(draw, data, splices)
    text = json.dumps(data)
    for number, spelling in enumerate(splices):
        text = text.replace(f'"@@{number}"', spelling)
    return text.encode()


def _damage(draw: st.DrawFn, data: Any, splices: list[str]) -> Any:
    """Walk down at random; at the place reached, put something else."""
    if isinstance(data, (dict, list)) and data and draw(st.integers(0, 4)):
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        key = draw(st.sampled_from(keys))
        if draw(st.integers(0, 5)) == 0:
            del data[key]
        else:
            data[key] = _damage(draw, data[key], splices)
        return data
    if draw(st.booleans()):
        splices.append(draw(SPELLINGS))
        return f"@@{len(splices) - 1}"
    return draw(VALUES)


def read_leniently(text: bytes) -> Any:
    """The JSON value as the client hands on an answer's; None for what it refuses."""
    with suppress(msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return msgspec.json.decode(text)


def wrap(channel: str, data: bytes) -> bytes:
    return b'{"jsonrpc":"2.0","method":"subscription","params":{"channel":"%s","data":%s}}' % (channel.encode(), data)


class Wire:
    """A worker's publisher and a subscriber to it, joined by a real socket."""

    def __init__(self, directory: Path) -> None:
        self.ledger = Ledger(directory / "ledger", fresh=True)
        self.publisher = Publisher("tcp://127.0.0.1:*", 100_000, self.ledger)
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.SUB)
        self.socket.setsockopt(zmq.RCVTIMEO, 10_000)
        self.socket.connect(self.publisher.bind())
        self.socket.subscribe(b"")
        wait_until(self.publisher.take_subscriptions, "the subscription")

    def take(self, channel: Channel, *frames: bytes) -> list[tuple[str, dict[str, Any]]]:
        """What a subscriber receives for the frames of one connection; what is refused gives nothing.

        What a late subscriber would be given at the end has to be valid as well.
        """
        topics = Topics(5, self.ledger)
        feed = create_feed(channel, topics)
        for frame in frames:
            with suppress(ValueError):  # Malformed, or not to be encoded
                self.publisher.publish(feed.take(frame, NOW), NOW)
        for stream in feed.streams.values():
            if (message := stream.describe()) is not None:
                self.publisher.repeat(stream, message)
        end = topics.find("other", "END", "raw")
        self.publisher.say(end, end.build_envelope(NOW))
        got = []
        while (parts := self.socket.recv_multipart())[0] != end.topic:
            got.append((parts[0].decode(), msgpack.unpackb(parts[1], strict_map_key=True)))
        for topic, body in got:
            check_wire(topic, body)
        return [(topic, body) for topic, body in got if "join" not in body]

    def close(self) -> None:
        self.context.destroy(linger=0)
        self.publisher.close()
        self.ledger.close()


@pytest.fixture(scope="module")
def wire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    wire = Wire(tmp_path_factory.mktemp("wire"))
    yield wire
    wire.close()


def check_wire(topic: str, body: dict[str, Any]) -> None:
    """The message is one that the wire's tables allow, and says the same as its topic."""
    parsed = parse_topic(topic)
    assert (parsed.exchange, parsed.instrument) == (body["exchange"], body["instrument"])
    assert body["type"] in (parsed.type, "gap")
    assert find_faults(body, {**ENVELOPE, **SCHEMA[body["type"]]}) == []


@bounded
@given(CHANNELS, st.binary(max_size=300))
def test_arbitrary_bytes_in_a_channel(wire: Wire, channel: Channel, frame: bytes) -> None:
    wire.take(channel, frame, wrap(channel.name, frame))


@bounded
@given(CHANNELS, VALUES)
def test_arbitrary_json_in_a_channel(wire: Wire, channel: Channel, data: Any) -> None:
    wire.take(channel, wrap(channel.name, json.dumps(data).encode()))


@settings(bounded, max_examples=800)
@given(st.data(), CHANNELS)
def test_damaged_data_in_a_channel(wire: Wire, data: st.DataObject, channel: Channel) -> None:
    """One damaged frame gives nothing or valid messages; a refused one does not touch the sound one after it."""
    seed = SEEDS[channel.name]
    damaged = wrap(channel.name, data.draw(damaged_data(seed)))
    if wire.take(channel, damaged):
        return
    sound = wrap(channel.name, json.dumps(seed).encode())
    owed = FrameReader().read(sound)
    got = wire.take(channel, damaged, sound)
    assert [topic for topic, _ in got] == [one.topic for one in owed]
    for one, (_, body) in zip(owed, got, strict=True):
        assert list(compare_message(one.keys, body)) == []


@settings(bounded, max_examples=600)
@given(damaged_data(FULL_TICKER) | st.just(json.dumps(FULL_TICKER).encode()))
@example(json.dumps({**FULL_TICKER, "timestamp": 10**400}).encode())  # SystemError below msgspec 0.22
@example(b'{"instrument_name":' + b"[" * 200 + b"]" * 200 + b"," + json.dumps(FULL_TICKER).encode()[1:])
@example(json.dumps(FULL_TICKER).encode()[:-1] + b',"instrument_name":' + b"[" * 200 + b"]" * 200 + b"}")
def test_both_ways_to_read_a_ticker_say_the_same(wire: Wire, text: bytes) -> None:
    """Tickers of which all members are known have a short cut; incremental ones always go the general way."""
    short = wire.take(parse_channel("ticker.A-B.raw"), wrap("ticker.A-B.raw", text))
    general = wire.take(parse_channel("incremental_ticker.A-B"), wrap("incremental_ticker.A-B", as_snapshot(text)))
    assert [body for _, body in short] == [body for _, body in general]


def as_snapshot(text: bytes) -> bytes:
    """A ticker's JSON object as the first of an incremental channel; other text as it is."""
    return text.replace(b"{", b'{"type":"snapshot",', 1) if text.startswith(b'{"') else text


@bounded
@given(damaged_data({"type": "change", **TICKER}))
def test_damaged_change_does_not_spoil_a_ticker(wire: Wire, damaged: bytes) -> None:
    """What a refused change held is not merged: the sound change after it is published."""
    channel = parse_channel("incremental_ticker.ETH-5JUN20-310-P")
    sound = json.dumps({"type": "change", "timestamp": 9, "mark_price": 0.25}).encode()
    frames = (json.dumps(SEEDS[channel.name]).encode(), damaged, sound)
    _, last = wire.take(channel, *(wrap(channel.name, frame) for frame in frames))[-1]
    assert (last["mark_price"], last["exchange_ts"]) == (0.25, 9 * MS)


@bounded
@given(VALUES | st.fixed_dictionaries({"trades": st.lists(damaged_data(TRADE).map(read_leniently))}))
def test_any_answer_holds_trades_or_is_refused(answer: Any) -> None:
    """What is fetched to fill a hole is as hostile as what streams."""
    with suppress(ValueError):
        for trade in read_page(answer).trades:
            assert all(math.isfinite(number) for number in (trade.price, trade.amount))
            assert trade.direction in ("buy", "sell")


@settings(bounded, max_examples=400)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"change_id": st.integers(1, 6), "type": st.sampled_from(["snapshot", "change"]), "timestamp": st.just(1)},
            optional={"prev_change_id": st.none() | st.integers(0, 6)},
        ),
        max_size=12,
    )
)
def test_any_row_of_book_frames(wire: Wire, rows: list[dict[str, Any]]) -> None:
    """Whatever the chain does: what the independent reader says is owed comes out, gaps included."""
    channel = parse_channel("book.A-B.100ms")
    sides = {"bids": [["new", 1.5, 2.0]], "asks": []}
    frames = [wrap(channel.name, json.dumps({**row, **sides}).encode()) for row in rows]
    reader = FrameReader()
    owed = [one for frame in frames for one in reader.read(frame)]
    got = wire.take(channel, *frames)
    assert [body["type"] for _, body in got] == [one.keys["type"][0] for one in owed]
    for one, (topic, body) in zip(owed, got, strict=True):
        assert one.topic == topic
        assert list(compare_message(one.keys, body)) == []


side = st.lists(
    st.tuples(st.sampled_from(["new", "change", "delete"]), st.integers(1, 9).map(float), st.sampled_from([0.0, 1.0])),
    max_size=4,
)


@settings(bounded)
@given(st.lists(side, min_size=1, max_size=10))
def test_a_book_holds_what_it_was_told(changes: list[Any]) -> None:
    held: dict[float, float] = {}
    expected: dict[float, float] = {}
    for changed in changes:
        levels = set_levels(held, changed)
        assert levels == [(price, 0.0 if action == "delete" else amount) for action, price, amount in changed]
        for price, amount in levels:
            expected[price] = amount
            if not amount:
                del expected[price]
        assert held == expected
