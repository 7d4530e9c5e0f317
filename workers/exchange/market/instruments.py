"""The practice exchange's instruments: which there are, and each one's row as public/get_instruments gives it.

No clock and no random: the dates follow from the time that is passed in. Names and rows are Deribit's (2026).
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

FOREVER = 32503708800000
"""Deribit's expiration_timestamp (ms) of what never expires."""

DAY = 86_400_000
COINS = {
    "BTC": 92_000.0, "ETH": 3_150.0, "SOL": 138.0, "XRP": 2.05, "DOGE": 0.142,
    "ADA": 0.41, "AVAX": 13.6, "LINK": 13.9, "LTC": 82.0, "USDT": 1.0,
}  # fmt: skip
"""Each coin and the price in USD at which its market starts."""

INVERSE = ("BTC", "ETH")
STRIKE_STEPS = {"BTC": 1000.0, "ETH": 50.0, "XRP": 0.05}
_TICKS = {"BTC": 0.5, "ETH": 0.05, "SOL": 0.01, "LTC": 0.01, "AVAX": 0.001, "LINK": 0.001, "USDT": 0.0001}
_LINEAR_LOTS = {"BTC": 0.0001, "ETH": 0.001, "SOL": 0.01, "LTC": 0.01, "AVAX": 0.1, "LINK": 0.1}


@dataclass(slots=True, eq=False)
class Instrument:
    """One instrument. `tick` is the price step, `lot` the amount step; legs are (amount, instrument) of a combo."""

    name: str
    kind: str
    base: str
    currency: str  # settlement currency; of spot the quote currency. Its change_id counter and trade ids go by it
    index: str
    tick: float
    lot: float
    size: float  # contract size
    expiry: int  # ms
    created: int  # ms
    row: dict[str, Any]
    strike: float = 0.0
    call: bool = False
    legs: list[tuple[int, "Instrument"]] = field(default_factory=list)
    state: str = "open"

    @property
    def inverse(self) -> bool:
        """Whether it is settled in its base coin."""
        return self.currency == self.base

    @property
    def in_dollars(self) -> bool:
        """Whether its amounts are USD; else they are of its base coin."""
        return self.inverse and self.kind in ("future", "future_combo")

    @property
    def perpetual(self) -> bool:
        return self.kind == "future" and self.expiry == FOREVER

    def to_price(self, tick: int) -> float:
        """A price in ticks as the exchange writes it."""
        return round(tick * self.tick, 6)

    def to_amount(self, lots: int) -> float:
        """An amount in lots as the exchange writes it."""
        return round(lots * self.lot, 6)

    def matches(self, kind: str, currency: str) -> bool:
        """Whether it belongs to a kind and a currency as channels and methods name them ("any" matches all)."""
        if kind not in ("any", self.kind) and not (kind == "combo" and self.kind.endswith("_combo")):
            return False
        return currency in ("any", self.currency) or (self.kind == "spot" and currency == self.base)


def format_date(expiry: int) -> str:
    """`25DEC26`, `5JUN26`: an expiry (ms) as instrument names write it."""
    day = datetime.fromtimestamp(expiry / 1000, UTC)
    return f"{day.day}{day.strftime('%b%y').upper()}"


def format_strike(strike: float) -> str:
    """`100000`, `0d625`: a strike as instrument names write it."""
    return f"{strike:.4f}".rstrip("0").rstrip(".").replace(".", "d")


def list_expiries(now: int) -> list[tuple[int, str]]:
    """The expiries (ms, 08:00 UTC) that are listed at `now` (ms), each with its settlement period."""
    today = datetime.fromtimestamp(now / 1000, UTC).replace(hour=8, minute=0, second=0, microsecond=0)
    first = today if today.timestamp() * 1000 > now + 600_000 else today + timedelta(days=1)
    found = {first + timedelta(days=1): "day", first: "day"}
    friday = first + timedelta(days=(4 - first.weekday()) % 7)
    found |= {friday + timedelta(days=7 * week): "week" for week in range(2)}
    months = [day for ahead in range(10) if (day := _last_friday(first.year, first.month + ahead)) > first]
    found |= dict.fromkeys([*months[:2], *[day for day in months if day.month % 3 == 0][:2]], "month")
    return [(int(day.timestamp() * 1000), found[day]) for day in sorted(found)]


def _last_friday(year: int, month: int) -> datetime:
    year, month = year + (month - 1) // 12, (month - 1) % 12 + 1
    following = datetime(year + month // 12, month % 12 + 1, 1, 8, tzinfo=UTC)
    last = following - timedelta(days=1)
    return last - timedelta(days=(last.weekday() - 4) % 7)


class Catalogue:
    """All instruments, by name; also those that have expired since the start."""

    def __init__(self, now: int, options: int) -> None:
        self.now = now
        self.by_name: dict[str, Instrument] = {}
        self.expired: dict[str, Instrument] = {}
        self._next_id = 124_972
        self.expiries = list_expiries(now)
        self._add_linear_and_spot()
        for coin in INVERSE:
            self._add_futures(coin)
        self._add_options(options)
        for coin in INVERSE:
            self._add_combos(coin)

    def _add(
        self, name: str, kind: str, base: str, currency: str, *, lot: float, period: str = "perpetual", **more: Any
    ) -> Instrument:
        index = f"{base}_{'usd' if currency == base else currency}".lower()
        self._next_id += 7
        made = {"expiry": FOREVER, "created": self.now - 30 * DAY, "size": lot, **more}
        instrument = Instrument(name, kind, base, currency, index, lot=lot, row={}, **made)
        instrument.row = _make_row(instrument, period, self._next_id)
        self.by_name[name] = instrument
        return instrument

    def _add_linear_and_spot(self) -> None:
        for coin in COINS:
            tick, lot = _TICKS.get(coin, 0.0001), _LINEAR_LOTS.get(coin, 1.0)
            if coin != "USDT":
                self._add(
                    f"{coin}_USDC-PERPETUAL", "future", coin, "USDC", tick=tick, lot=lot, created=self.now - 900 * DAY
                )
            if coin in ("BTC", "ETH", "USDT"):
                self._add(f"{coin}_USDC", "spot", coin, "USDC", tick=tick, lot=lot)

    def _add_futures(self, coin: str) -> None:
        lot = 10.0 if coin == "BTC" else 1.0
        created = 1_534_167_754_000 if coin == "BTC" else 1_552_568_454_000
        self._add(f"{coin}-PERPETUAL", "future", coin, coin, tick=_TICKS[coin], lot=lot, created=created)
        for expiry, period in self.expiries[2:]:
            self._add(
                f"{coin}-{format_date(expiry)}", "future", coin, coin,
                tick=2.5 if coin == "BTC" else 0.25, lot=lot, expiry=expiry, period=period,
            )  # fmt: skip

    def _add_options(self, count: int) -> None:
        bases = [*INVERSE, "XRP"]
        series = [(base, expiry, period) for base in bases for expiry, period in self.expiries]
        pairs = max(0, count) // 2
        for place in range(pairs):
            base, expiry, period = series[place % len(series)]
            rank = place // len(series)
            offset = (rank + 1) // 2 * (1 if rank % 2 else -1)  # 0, +1, -1, +2, -2 ... steps from the money
            step = STRIKE_STEPS[base]
            strike = round(COINS[base] / step) * step + offset * step
            if strike > 0:
                self.add_option_pair(base, expiry, period, strike)

    def add_option_pair(self, base: str, expiry: int, period: str, strike: float) -> list[Instrument]:
        """List the call and the put of one strike; none if they are listed already."""
        currency = base if base in INVERSE else "USDC"
        stem = f"{base}{'' if currency == base else '_USDC'}-{format_date(expiry)}-{format_strike(strike)}"
        if f"{stem}-C" in self.by_name or f"{stem}-C" in self.expired:
            return []
        lot, size = {"BTC": 0.1, "ETH": 1.0}.get(base, 1000.0), {"XRP": 1000.0}.get(base, 1.0)
        return [
            self._add(
                f"{stem}-{side}", "option", base, currency, tick=0.0001, lot=lot, size=size,
                strike=round(strike, 4), call=side == "C", expiry=expiry, period=period,
            )
            for side in "CP"
        ]  # fmt: skip

    def _add_combos(self, coin: str) -> None:
        expiry, period = self.expiries[-1]
        future, perpetual = self.by_name[f"{coin}-{format_date(expiry)}"], self.by_name[f"{coin}-PERPETUAL"]
        self._add(
            f"{coin}-FS-{format_date(expiry)}_PERP", "future_combo", coin, coin, tick=perpetual.tick,
            lot=perpetual.lot, expiry=expiry, period=period, legs=[(1, future), (-1, perpetual)],
        )  # fmt: skip
        calls = [i for i in self.by_name.values() if i.kind == "option" and i.call and i.base == coin]
        pairs = [
            (low, high) for low in calls for high in calls if low.expiry == high.expiry and low.strike < high.strike
        ]
        if pairs:
            low, high = pairs[0]
            name = f"{coin}-CS-{format_date(low.expiry)}-{format_strike(low.strike)}_{format_strike(high.strike)}"
            self._add(
                name, "option_combo", coin, coin, tick=0.0001, lot=low.lot, size=1.0,
                expiry=low.expiry, period=low.row["settlement_period"], legs=[(1, low), (-1, high)],
            )  # fmt: skip

    def retire(self, instrument: Instrument) -> None:
        """Move an instrument to the expired ones."""
        instrument.state, instrument.row["state"], instrument.row["is_active"] = "delivered", "delivered", False
        self.expired[instrument.name] = self.by_name.pop(instrument.name)


def _make_row(of: Instrument, period: str, number: int) -> dict[str, Any]:
    option, combo, spot = of.kind == "option", of.kind.endswith("_combo"), of.kind == "spot"
    row: dict[str, Any] = {"state": of.state, "price_index": of.index, "kind": of.kind, "instrument_name": of.name}
    if option:
        row |= {"option_type": "call" if of.call else "put", "strike": of.strike}
    if not spot and not combo:
        row["max_leverage"] = 1 if option else 50
    row |= {"instrument_type": "reversed" if of.inverse else "linear", "expiration_timestamp": of.expiry}
    row |= {"creation_timestamp": of.created, "is_active": True, "tick_size": of.tick, "contract_size": of.size}
    row |= {"instrument_id": number, "min_trade_amount": of.lot}
    if of.kind == "future":
        row |= {"future_type": row["instrument_type"], "max_non_default_leverage": 5}
    if not spot:
        row |= {"settlement_currency": of.currency, "settlement_period": period}
    quote = "USD" if of.in_dollars else of.currency
    row |= {"base_currency": of.base, "counter_currency": "USD" if of.inverse else of.currency, "quote_currency": quote}
    return row | _list_fees(of.kind) | {"tick_size_steps": [], "underlying_type": "crypto"}


def _list_fees(kind: str) -> dict[str, Any]:
    """What trading a kind of instrument costs, and from what size on it may be done in blocks."""
    option, combo = kind == "option", kind.endswith("_combo")
    fees: dict[str, Any] = {
        "maker_commission": 0.0003 if option else 0.0,
        "taker_commission": 0.0003 if option else 0.0 if combo else 0.0005,
    }
    if kind == "future":
        fees["max_liquidation_commission"] = 0.0075
    if kind in ("future", "option"):
        fees |= {
            "block_trade_commission": 0.00025, "block_trade_tick_size": 0.0001 if option else 0.01,
            "block_trade_min_trade_amount": 25 if option else 200_000,
        }  # fmt: skip
    return fees
