"""The checker of recorded frames is itself checked: hand-written messages pass, each kind of damage is seen."""

import copy
import json
from typing import Any

import pytest

from tests.frames_checker import FrameReader, compare_all

Received = list[tuple[str, dict[str, Any]]]

ENVELOPE = {"exchange": "deribit", "epoch": 5, "receive_ts": 1_700_000_000_000_000_000}


def notify(channel: str, data: Any) -> str:
    return json.dumps({"jsonrpc": "2.0", "method": "subscription", "params": {"channel": channel, "data": data}})


def book(kind: str, number: int, previous: int | None = None, **more: Any) -> str:
    data = {"type": kind, "timestamp": 7, "instrument_name": "A-B", "change_id": number, "bids": [], "asks": [], **more}
    if previous is not None:
        data["prev_change_id"] = previous
    return notify("book.A-B.100ms", data)


TRADES = notify(
    "trades.option.any.raw",
    [
        {"trade_seq": 9, "trade_id": "ETH-1", "timestamp": 2, "tick_direction": 0, "price": 3.2e4, "mark_price": 1,
         "instrument_name": "X-1", "index_price": 2.5, "direction": "sell", "amount": 10, "legs": [{"price": 1}]},
    ],
)  # fmt: skip
TRADE: Received = [
    (
        "deribit.trade.X-1.raw",
        {**ENVELOPE, "type": "trade", "instrument": "X-1", "seq": 1, "exchange_ts": 2_000_000, "price": 32000.0,
         "amount": 10.0, "side": "sell", "trade_id": "ETH-1", "trade_seq": 9, "mark_price": 1.0, "index_price": 2.5,
         "tick_direction": 0},
    )
]  # fmt: skip


def payload(type_: str, seq: int, **keys: Any) -> tuple[str, dict[str, Any]]:
    head = {
        **ENVELOPE,
        "type": type_,
        "instrument": "A-B",
        "seq": seq,
        "exchange_ts": 0 if type_ == "gap" else 7_000_000,
    }
    return "deribit.book.A-B.100ms", {**head, **keys}


def snapshot(seq: int, number: int, reason: str) -> tuple[str, dict[str, Any]]:
    return payload("book", seq, kind="snapshot", reason=reason, change_id=number, bids=[], asks=[])


def find_faults(frames: list[str], received: Received) -> list[str]:
    reader = FrameReader()
    return compare_all([owed for frame in frames for owed in reader.read(frame)], received)


def test_trade_passes() -> None:
    assert find_faults([TRADES], TRADE) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("price", 32000), ("price", 32000.5), ("side", "buy"), ("trade_id", 1), ("trade_seq", 9.0), ("legs", []),
        ("exchange_ts", 2_000), ("instrument", "X-2"), ("type", "book"), ("iv", None),
        ("mark_price", None), ("backfilled", True),
    ],
)  # fmt: skip
def test_damaged_trade_is_seen(key: str, value: Any) -> None:
    damaged = copy.deepcopy(TRADE)
    damaged[0][1][key] = value
    assert find_faults([TRADES], damaged)


@pytest.mark.parametrize("key", ["price", "side", "trade_id", "index_price", "exchange"])
def test_missing_key_is_seen(key: str) -> None:
    damaged = copy.deepcopy(TRADE)
    del damaged[0][1][key]
    assert find_faults([TRADES], damaged)


def test_missing_doubled_and_strange_messages_are_seen() -> None:
    again = copy.deepcopy(TRADE[0])
    again[1]["seq"] = 2
    assert find_faults([TRADES], [])
    assert find_faults([TRADES], [*TRADE, again])
    assert find_faults([], TRADE)


def test_book_chain() -> None:
    """Before a snapshot a change is dropped; a foreign or zero predecessor is one gap, then a snapshot is awaited."""
    frames = [
        book("change", 3, 2), book("snapshot", 5), book("change", 6, 5, bids=[["delete", 1.5, 4]]),
        book("snapshot", 8, 1, asks=[["new", 2, 3e1]]), book("change", 9, 0), book("change", 10, 9),
        book("snapshot", 12),
    ]  # fmt: skip
    lost = {"id": 1, "reason": "sequence", "from_ts": 1, "to_ts": 2, "last_change_id": 8}
    received = [
        snapshot(1, 5, "subscribe"),
        payload("book", 2, kind="delta", change_id=6, prev_change_id=5, bids=[[1.5, 0.0]], asks=[]),
        payload("book", 3, kind="snapshot", reason="exchange", change_id=8, bids=[], asks=[[2.0, 30.0]]),
        payload("gap", 4, **lost),
        snapshot(5, 12, "resync"),
    ]
    assert find_faults(frames, received) == []
    del received[3]
    assert find_faults(frames, received)


def test_incremental_ticker_is_complete() -> None:
    """Nothing before its snapshot; then each change gives the whole, nested members beside the others."""
    name = "incremental_ticker.A-B"
    frames = [
        notify(name, {"type": "change", "timestamp": 1, "mark_price": 1.0}),
        notify(name, {"type": "snapshot", "timestamp": 2, "mark_price": 1.0, "stats": {"low": None, "high": 3}}),
        notify(name, {"type": "change", "timestamp": 7, "mark_price": None, "stats": {"low": 2.5}}),
    ]
    head = {**ENVELOPE, "type": "ticker", "instrument": "A-B"}
    topic = "deribit.ticker.A-B.incremental"
    received = [
        (topic, {**head, "seq": 1, "exchange_ts": 2_000_000, "mark_price": 1.0, "low": None, "high": 3}),
        (topic, {**head, "seq": 2, "exchange_ts": 7_000_000, "mark_price": None, "low": 2.5, "high": 3.0}),
    ]
    assert find_faults(frames, received) == []
    del received[1][1]["high"]
    assert find_faults(frames, received)


def test_unknown_channels_are_passed_on_whole() -> None:
    data = [{"timestamp": 3, "price": "market_price", "id": 2**60, "none": None}]
    frames = [notify("user.orders.any.any.raw", data)]
    topic = "deribit.other.user:orders:any:any:raw.raw"
    body = {**ENVELOPE, "type": "other", "instrument": "user:orders:any:any:raw", "seq": 1, "exchange_ts": 3_000_000}
    assert find_faults(frames, [(topic, {**body, "channel": "user.orders.any.any.raw", "data": data})]) == []
    changed = [{**data[0], "id": float(2**60)}]
    assert find_faults(frames, [(topic, {**body, "channel": "user.orders.any.any.raw", "data": changed})])
