"""What Deribit's data frames hold, family by family, and the decoders that read them. No I/O, no clock.

The busy families (book, trades, quote) are decoded straight to what is needed of them; all others as maps, so that
what Deribit adds to them one day is passed on as well. A frame that a typed decoder refuses is read once more, laxly
(numbers as strings), before it counts as malformed.
"""

from collections.abc import Callable
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta

from workers.deribit.publishing.payloads import Number, Ticker, Time
from workers.deribit.publishing.streams import Malformed
from workers.deribit.rpc.codec import MAX_MS

T = TypeVar("T")
MS = 1_000_000
"""Deribit's timestamps are ms; ours are ns."""

Scalar = float | str | bool | None
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Amount = Annotated[float, Meta(ge=0)]


class _Params(msgspec.Struct, Generic[T], gc=False):
    data: T


class _Frame(msgspec.Struct, Generic[T], gc=False):
    params: _Params[T]


Change = tuple[Literal["new", "change", "delete"], float, Amount]
"""One level. An action that nobody knows makes a frame malformed, so a resync follows: a guess might spoil the book."""


class BookData(msgspec.Struct, gc=False):
    change_id: Count
    bids: list[Change]
    asks: list[Change]
    timestamp: Time = 0
    type: str | None = None
    prev_change_id: Count | None = None


class WindowData(msgspec.Struct, gc=False):
    change_id: Count
    bids: list[tuple[float, Amount]]
    asks: list[tuple[float, Amount]]
    timestamp: Time = 0


class TradeData(msgspec.Struct, gc=False, kw_only=True):
    """One trade, its members in Deribit's own order (see payloads.Ticker)."""

    timestamp: Time = 0
    price: float
    amount: float
    direction: Literal["buy", "sell"]
    index_price: Number = UNSET
    instrument_name: str
    trade_seq: Count
    mark_price: Number = UNSET
    tick_direction: Count | None = None
    contracts: Number = UNSET
    combo_trade_id: str | int | None = None
    trade_id: str | int
    iv: Number = UNSET
    liquidation: str | None = None
    block_trade_id: str | int | None = None
    combo_id: str | None = None
    # Since 2026, not in every frame, among the others: here they cost the frames without them least.
    starbase_match_id: Count | None = None
    starbase_timestamp: Count | None = None
    block_rfq_id: Count | None = None
    block_trade_leg_count: Count | None = None


SPARE = ("starbase_match_id", "starbase_timestamp", "block_rfq_id", "block_trade_leg_count")
"""The members of a trade that are left out where they cannot be taken: nobody needs them to have the trade."""


class QuoteData(msgspec.Struct, gc=False):
    timestamp: Time = 0
    best_bid_price: float | None = None
    best_bid_amount: float | None = None
    best_ask_price: float | None = None
    best_ask_amount: float | None = None


_Nested = Scalar | dict[str, Any] | list[Any]
TickerData = dict[str, Scalar | dict[str, _Nested] | list[_Nested]]
"""Numbers are floats down to the members of stats and greeks; what nobody knows yet may be of any shape."""

_json = msgspec.json.Decoder()


def convert_laxly(value: Any, kind: Any) -> Any:
    """Convert decoded JSON to a type, taking numbers that are spelled as text. Raises what msgspec raises."""
    loose = msgspec.convert(value, kind, strict=False)
    # That takes the text "nan" for a number; JSON has none for it but null, for the strict way to judge.
    return msgspec.json.decode(msgspec.json.encode(loose), type=kind)


def convert_trades(rows: Any) -> list[TradeData]:
    """Convert decoded trades laxly, without what is SPARE and is no count even then. Raises what msgspec raises.

    All else that a trade holds may be wanted: if that is of another type, the trade is not taken.
    """
    for row in rows if isinstance(rows, list) else ():
        for key in SPARE if isinstance(row, dict) else ():
            if key in row and not _is_count(row[key]):
                del row[key]
    trades: list[TradeData] = convert_laxly(rows, list[TradeData])
    return trades


def _is_count(value: Any) -> bool:
    try:
        convert_laxly(value, Count | None)
    except (msgspec.MsgspecError, ValueError, OverflowError):
        return False
    return True


def build_reader(kind: Any, convert: Callable[[Any], Any] | None = None) -> Callable[[bytes], Any]:
    """What decodes the data of a frame to one type: strictly, else laxly (by `convert`), else it is Malformed."""
    decode = msgspec.json.Decoder(_Frame[kind]).decode

    def read(frame: bytes) -> Any:
        try:
            return decode(frame).params.data
        except msgspec.ValidationError:
            return read_laxly(frame)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise Malformed(str(error)) from None

    def read_laxly(frame: bytes) -> Any:
        try:
            data = _json.decode(frame)["params"]["data"]
            return convert_laxly(data, kind) if convert is None else convert(data)
        except (msgspec.MsgspecError, RecursionError, TypeError, KeyError, ValueError, OverflowError) as error:
            raise Malformed(str(error)) from None

    return read


read_book: Callable[[bytes], BookData] = build_reader(BookData)
read_window: Callable[[bytes], WindowData] = build_reader(WindowData)
read_trades: Callable[[bytes], list[TradeData]] = build_reader(list[TradeData], convert_trades)
read_quote: Callable[[bytes], QuoteData] = build_reader(QuoteData)
read_ticker: Callable[[bytes], TickerData] = build_reader(TickerData)
read_any: Callable[[bytes], Any] = build_reader(Any)

_decode_ticker = msgspec.json.Decoder(_Frame[Ticker]).decode


def read_known_ticker(frame: bytes) -> Ticker | None:
    """A ticker of which all members are known and of the usual types, at less than half the cost; None for others."""
    try:
        return _decode_ticker(frame).params.data
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def take_timestamp(data: dict[str, Any]) -> int:
    """Take the `timestamp` (ms) out of a map; return it in ns, 0 if there is none."""
    value = data.pop("timestamp", 0)
    try:
        if value.__class__ is not bool and 0 <= value <= MAX_MS:
            return int(value) * MS
    except TypeError:
        pass
    raise Malformed(f"timestamp {value!r:.60} is no time")
