"""The payloads that are built for each message of the busy channels, as typed records; see docs/wire.md.

Fields left at UNSET are absent on the wire. The keys of the envelope come first in each.
"""

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from workers.deribit.rpc.codec import MAX_MS

Number = float | None | UnsetType
Time = Annotated[int, Meta(ge=0, le=MAX_MS)]


class Payload(msgspec.Struct, tag_field="type", gc=False):
    """The envelope: times in ns since 1970 UTC; `epoch` is the topic's (see Topics); `seq` 1, 2, 3 in it."""

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


class Trade(Payload, tag="trade", gc=False, omit_defaults=True):
    """One trade; `side` is the taker's. What is None by default is absent then."""

    price: float
    amount: float
    side: str
    trade_id: str
    trade_seq: int
    mark_price: Number = UNSET
    index_price: Number = UNSET
    tick_direction: int | None = None
    iv: Number = UNSET
    liquidation: str | None = None
    block_trade_id: str | None = None
    combo_id: str | None = None
    combo_trade_id: str | None = None
    contracts: Number = UNSET
    starbase_match_id: int | None = None
    starbase_timestamp: int | None = None
    block_rfq_id: int | None = None
    block_trade_leg_count: int | None = None
    backfilled: bool | UnsetType = UNSET


class Stats(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """What Deribit nests in a ticker, of the last 24 hours."""

    high: Number = UNSET
    low: Number = UNSET
    price_change: Number = UNSET
    volume: Number = UNSET
    volume_usd: Number = UNSET
    volume_notional: Number = UNSET


class Greeks(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """What Deribit nests in the ticker of an option."""

    delta: Number = UNSET
    gamma: Number = UNSET
    vega: Number = UNSET
    theta: Number = UNSET
    rho: Number = UNSET


class Ticker(Payload, tag="ticker", gc=False, forbid_unknown_fields=True, kw_only=True):
    """A ticker of which all members are known: the exchange's JSON is decoded straight into what is published.

    Members stand in the order in which Deribit sends them (recorded in 2025; an option's own ones as they seem to
    follow): each is looked for from where the last one was found. What is the exchange's alone is emptied on the way
    (see feeds.normalise), and so absent.
    """

    exchange: str = ""
    instrument: str = ""
    epoch: int = 0
    seq: int = 0
    exchange_ts: int = 0
    receive_ts: int = 0
    timestamp: Time | UnsetType = 0
    state: str
    stats: Stats | UnsetType = UNSET
    index_price: float | None
    instrument_name: str | UnsetType = UNSET
    last_price: float | None
    settlement_price: Number = UNSET
    min_price: Number = UNSET
    max_price: Number = UNSET
    open_interest: Number = UNSET
    mark_price: float | None
    interest_value: Number = UNSET
    best_ask_price: float | None
    best_bid_price: float | None
    estimated_delivery_price: Number = UNSET
    best_ask_amount: float | None
    best_bid_amount: float | None
    current_funding: Number = UNSET
    funding_8h: Number = UNSET
    mark_iv: Number = UNSET
    bid_iv: Number = UNSET
    ask_iv: Number = UNSET
    underlying_price: Number = UNSET
    underlying_index: str | UnsetType = UNSET
    interest_rate: Number = UNSET
    greeks: Greeks | UnsetType = UNSET
    implied_bid: Number = UNSET
    implied_ask: Number = UNSET
    combo_state: str | UnsetType = UNSET
    delivery_price: Number = UNSET
    delta: Number = UNSET
    gamma: Number = UNSET
    vega: Number = UNSET
    theta: Number = UNSET
    rho: Number = UNSET
    high: Number = UNSET
    low: Number = UNSET
    volume: Number = UNSET
    price_change: Number = UNSET
    volume_usd: Number = UNSET
    volume_notional: Number = UNSET


class Quote(Payload, tag="quote", gc=False):
    """The top of a book; null where the exchange sends null."""

    best_bid_price: Number
    best_bid_amount: Number
    best_ask_price: Number
    best_ask_amount: Number


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

    def end(self, now: int) -> None:
        """Data comes again, or the loss is seen. It did not begin after that: our clock may have been set back."""
        self.to_ts = self.receive_ts = now
        self.from_ts = min(self.from_ts, now)


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


class ConnectionHeartbeat(Payload, tag="heartbeat", gc=False):
    """One a second, also while disconnected. `published` counts messages of this life, `lag` is in seconds."""

    wire: int
    connection: str
    state: str
    published: int
    lag: float
