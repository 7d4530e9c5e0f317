"""The payloads that are built for each message of the busy channels, as typed records; see the README's wire tables.

Fields left at UNSET are absent on the wire. The keys of the envelope come first in each.
"""

import msgspec
from msgspec import UNSET, UnsetType

Number = float | None | UnsetType


class Payload(msgspec.Struct, tag_field="type", gc=False):
    """The envelope: times in ns since 1970 UTC; `epoch` is the start of this worker's life; `seq` 1, 2, 3 a topic."""

    exchange: str
    instrument: str
    epoch: int
    seq: int
    exchange_ts: int
    receive_ts: int


class Book(Payload, tag="book", gc=False):
    """A snapshot replaces all levels; a delta sets some, amount 0 removes. `reason` stands on snapshots only."""

    kind: str
    change_id: int
    bids: list[tuple[float, float]]
    asks: list[tuple[float, float]]
    prev_change_id: int | UnsetType = UNSET
    reason: str | UnsetType = UNSET
    join: bool | UnsetType = UNSET


class Trade(Payload, tag="trade", gc=False):
    """One trade; `side` is the taker's."""

    price: float
    amount: float
    side: str
    trade_id: str
    trade_seq: int
    mark_price: Number = UNSET
    index_price: Number = UNSET
    tick_direction: int | UnsetType = UNSET
    iv: Number = UNSET
    liquidation: str | UnsetType = UNSET
    block_trade_id: str | UnsetType = UNSET
    combo_id: str | UnsetType = UNSET
    combo_trade_id: str | UnsetType = UNSET
    contracts: Number = UNSET
    backfilled: bool | UnsetType = UNSET


class Quote(Payload, tag="quote", gc=False):
    """The top of a book; null where the exchange sends null."""

    best_bid_price: Number
    best_bid_amount: Number
    best_ask_price: Number
    best_ask_amount: Number
    join: bool | UnsetType = UNSET


class Gap(Payload, tag="gap", gc=False):
    """Something on this topic was lost between `from_ts` and `to_ts`, or may have been."""

    id: int
    reason: str
    from_ts: int
    to_ts: int
    last_change_id: int | UnsetType = UNSET
    next_change_id: int | UnsetType = UNSET
    missing_from: int | UnsetType = UNSET
    missing_to: int | UnsetType = UNSET
    healing: bool | UnsetType = UNSET
    join: bool | UnsetType = UNSET


class Repair(Payload, tag="repair", gc=False):
    """Healing of one gap has ended: how many trades came, and which trade_seq ranges stay missing."""

    gap: int
    repaired: int
    missing: list[tuple[int, int]]


class Status(Payload, tag="status", gc=False):
    """A change of state: of a channel on its data topic, of the connection on its status topic."""

    state: str
    reason: str
    connection: str
    join: bool | UnsetType = UNSET


class ConnectionHeartbeat(Payload, tag="heartbeat", gc=False):
    """One a second, also while disconnected. `published` counts messages of this epoch, `lag` is in seconds."""

    wire: int
    connection: str
    state: str
    published: int
    lag: float
