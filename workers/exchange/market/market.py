"""The market: index prices walk, books move, trades happen, instruments are listed and expire.

No clock and no own randomness: time (ms since 1970) comes in, all chance comes from the seed. The market
moves in quanta of QUANTUM ms, so the same seed gives the same course whatever the pace of the calls.
"""

import math
from bisect import bisect
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from random import Random
from typing import Any

from workers.exchange.market.book import ASK, BID, Book, Change
from workers.exchange.market.instruments import (
    COINS,
    DAY,
    FOREVER,
    INVERSE,
    STRIKE_STEPS,
    Catalogue,
    Instrument,
    list_expiries,
)
from workers.exchange.market.participants import STYLES, Style, act_once, fill_book
from workers.exchange.market.pricing import YEAR_MS, Valuation, smile, value_option

QUANTUM = 20
"""ms."""

MAX_BEHIND = 2000
"""ms: after a longer standstill of the process, or where the clock was set, the market goes on from now."""

MAX_TRADES = 200_000
"""The trades that are kept for those who ask: 80 minutes at the default rate, 185 MB."""

_VOLATILITY = {"BTC": 0.45, "ETH": 0.65, "USDT": 0.01}
_WEIGHTS = {"future": 12.0, "option": 0.5, "spot": 6.0, "future_combo": 2.0, "option_combo": 1.0}
_FIRST_MATCH_ID = 225_046_781_992_378_368
"""More than a float holds exactly, as on production (2026)."""

_FIRST_CHANGE_IDS = {"BTC": 136_700_000_000, "ETH": 136_100_000_000, "USDC": 193_800_000_000}


@dataclass(slots=True)
class Event:
    """One thing that happened to one instrument: its book changed, it was traded, or its state changed.

    `own` is what the practice account had part in: (order, its trade or None).
    """

    instrument: Instrument
    timestamp: int
    changes: list[Change] = field(default_factory=list)
    trades: list[dict[str, Any]] = field(default_factory=list)
    state: str = ""
    created: bool = False
    own: list[tuple[dict[str, Any], dict[str, Any] | None]] = field(default_factory=list)


@dataclass(slots=True)
class Day:
    """Running figures of one instrument for its ticker."""

    last_price: float | None = None
    high: float | None = None
    low: float | None = None
    first: float | None = None
    volume: float = 0.0
    volume_usd: float = 0.0
    open_interest: float = 0.0
    settlement_price: float = 0.0
    tick_direction: int = 0
    trade_seq: int = 0


class Market:
    """Everything that is true of the market just now; `step` and `move` let it live on."""

    def __init__(self, seed: int, now: int, options: int = 240, rate: float = 200.0) -> None:
        self.rng = Random(seed)
        self.now = now
        self.rate = rate
        self.frozen = False
        self.retention = DAY
        self.catalogue = Catalogue(now, options)
        self.coins = dict(COINS)
        self.coin_volatility = {coin: _VOLATILITY.get(coin, 0.9) for coin in COINS}
        self.change_ids = {c: first + (now - 1_760_000_000_000) * 20 for c, first in _FIRST_CHANGE_IDS.items()}
        self.trade_ids = dict.fromkeys(_FIRST_CHANGE_IDS, (now - 1_700_000_000_000) // 100)
        self.books: dict[str, Book] = {}
        self.days: dict[str, Day] = {}
        self.trades: dict[str, deque[dict[str, Any]]] = {}
        self.all_trades: deque[tuple[Instrument, dict[str, Any]]] = deque()
        self.max_trades = MAX_TRADES
        self._due = 0.0
        for instrument in self.catalogue.by_name.values():
            self._open(instrument)
        self._weigh()

    # Prices

    def index_price(self, index: str) -> float:
        """The price of an index such as btc_usd or eth_usdc, one of those of the instruments."""
        coin, _, quote = index.partition("_")
        price = self.coins[coin.upper()]
        return round(price * (1.0 if quote == "usd" else 0.9998), 2 if price > 50 else 4)

    def count_years(self, instrument: Instrument) -> float:
        """Until it expires; 0 of what is over, or never will be."""
        return 0.0 if instrument.expiry == FOREVER else max(0.0, (instrument.expiry - self.now) / YEAR_MS)

    def forward(self, instrument: Instrument) -> float:
        """The model price of a future of its base and expiry."""
        premium = 1.0002 if instrument.expiry == FOREVER else 1.0
        return self.index_price(instrument.index) * math.exp(0.06 * self.count_years(instrument)) * premium

    def volatility(self, instrument: Instrument) -> float:
        """Implied volatility (a fraction) of an option."""
        forward, years = self.forward(instrument), self.count_years(instrument)
        return smile(self.coin_volatility[instrument.base], forward, instrument.strike, years)

    def value(self, option: Instrument) -> Valuation:
        """The model's view of an option, in its counter currency."""
        forward, years = self.forward(option), self.count_years(option)
        return value_option(option.call, forward, option.strike, years, self.volatility(option))

    def mark_price(self, instrument: Instrument) -> float:
        """The fair price of an instrument, in the unit of its book."""
        if instrument.legs:
            return sum(amount * self.mark_price(leg) for amount, leg in instrument.legs)
        if instrument.kind == "option":
            price = self.value(instrument).price
            return price / self.forward(instrument) if instrument.inverse else price
        if instrument.kind == "spot":
            return self.index_price(instrument.index)
        return self.forward(instrument)

    def round_mark(self, instrument: Instrument) -> float:
        """The mark price as the exchange writes it."""
        return round(self.mark_price(instrument), 6 if instrument.tick < 0.001 else 4 if instrument.tick < 0.05 else 2)

    # Movement

    def step(self, now: int) -> bool:
        """Move the market's clock one quantum on, if it is not yet `now`; say whether it was moved."""
        if abs(now - self.now) > MAX_BEHIND:
            self.now = now - QUANTUM
        if self.now + QUANTUM > now:
            return False
        self.now += QUANTUM
        return True

    def move(self) -> Iterator[Event]:
        """Let a quantum's worth happen; yield each event while it is the newest."""
        if self.frozen:
            return
        if self.now % 100 < QUANTUM:
            self._walk()
        self._due += self.rate * QUANTUM / 1000.0
        while self._due >= 1.0 and self._names:
            self._due -= 1.0
            place = bisect(self._weights, self.rng.random() * self._weights[-1])
            yield from self._act(self.catalogue.by_name[self._names[min(place, len(self._names) - 1)]])
        for name in self._find_expired():
            yield from self.expire(name)

    def _walk(self) -> None:
        scale = math.sqrt(100.0 / YEAR_MS)
        common = self.rng.gauss(0.0, 1.0)
        for coin, volatility in self.coin_volatility.items():
            shock = (0.7 * common + 0.7 * self.rng.gauss(0.0, 1.0)) * volatility * scale
            pull = 1e-5 * math.log(COINS[coin] / self.coins[coin])
            self.coins[coin] *= math.exp(shock + pull)

    def _act(self, instrument: Instrument) -> list[Event]:
        book = self.books[instrument.name]
        fair = self.mark_price(instrument) / instrument.tick
        changes, fills = act_once(book, fair, _style(instrument), self.rng)
        if not changes:
            return []
        self._stamp(instrument, book)
        price, amount = instrument.to_price, instrument.to_amount
        trades = [self._trade(instrument, side, price(tick), amount(lots)) for side, tick, lots in fills]
        legs = self._trade_legs(instrument, trades[-1]) if instrument.legs and trades else []
        return [Event(instrument, self.now, changes, trades), *legs]

    def _stamp(self, instrument: Instrument, book: Book) -> None:
        step = 1 if self.rng.random() < 0.3 else self.rng.randint(2, 40)
        self.change_ids[instrument.currency] += step
        book.change_id, book.timestamp = self.change_ids[instrument.currency], self.now

    def _trade(self, of: Instrument, side: int, price: float, amount: float, **more: Any) -> dict[str, Any]:
        day = self.days[of.name]
        day.trade_seq += 1
        if day.last_price is not None and price != day.last_price:
            day.tick_direction = 0 if price > day.last_price else 2
        elif day.tick_direction in (0, 2):
            day.tick_direction += 1
        trade: dict[str, Any] = {"timestamp": self.now}
        if of.kind == "option":
            trade["iv"] = round(self.volatility(of) * 100.0, 2)
        trade |= {"price": price, "amount": amount, "direction": "buy" if side == ASK else "sell"}
        trade |= {"index_price": self.index_price(of.index), "instrument_name": of.name, "trade_seq": day.trade_seq}
        trade |= {"mark_price": self.round_mark(of), "tick_direction": day.tick_direction, **more}
        match_id = _FIRST_MATCH_ID + self.trade_ids[of.currency]  # as of one engine a currency
        trade |= {"starbase_match_id": match_id, "trade_id": self._draw_trade_id(of)}
        trade |= {"contracts": round(amount / of.size, 8), "starbase_timestamp": self.now * 1_000_000 + 718_924}
        self._record(of, day, trade)
        return trade

    def _draw_trade_id(self, of: Instrument) -> str:
        self.trade_ids[of.currency] += 1
        number = str(self.trade_ids[of.currency])
        if of.kind == "spot":
            return f"{of.name}-{number}"
        return number if of.currency == "BTC" else f"{of.currency}-{number}"

    def _record(self, of: Instrument, day: Day, trade: dict[str, Any]) -> None:
        price, amount = trade["price"], trade["amount"]
        usd = amount if of.in_dollars else amount * self.coins[of.base]
        day.last_price = price
        day.first = price if day.first is None else day.first
        day.high = price if day.high is None else max(day.high, price)
        day.low = price if day.low is None else min(day.low, price)
        day.volume += usd / self.coins[of.base]
        day.volume_usd += usd
        day.open_interest += amount * (0.3 if trade["direction"] == "buy" else -0.2)
        day.open_interest = max(0.0, day.open_interest)
        self.trades[of.name].append(trade)
        self.all_trades.append((of, trade))
        while len(self.all_trades) > self.max_trades:
            oldest = self.all_trades.popleft()[0]
            self.trades[oldest.name].popleft()

    def _trade_legs(self, combo: Instrument, trade: dict[str, Any]) -> list[Event]:
        legs, events = [], []
        for amount, leg in combo.legs:
            buys = (trade["direction"] == "buy") == (amount > 0)
            price = round(round(self.mark_price(leg) / leg.tick) * leg.tick, 6) or leg.tick
            tags = {"combo_id": combo.name, "combo_trade_id": trade["trade_id"]}
            made = self._trade(leg, ASK if buys else BID, price, trade["amount"] * abs(amount), **tags)
            legs.append(made)
            events.append(Event(leg, self.now, trades=[made]))
        trade["legs"] = legs
        return events

    # Listing and expiry

    def list_option(self) -> list[Event]:
        """List a new strike, call and put, of the next base in turn, for the first expiry that has room."""
        base = INVERSE[len(self.catalogue.by_name) // 2 % len(INVERSE)]
        step = STRIKE_STEPS[base]
        money = round(self.coins[base] / step) * step
        offsets = (*range(400), *range(-1, -round(money / step), -1))  # up from the money, then down
        places = ((*expiry, money + by * step) for expiry in list_expiries(self.now)[1:] for by in offsets)
        add = self.catalogue.add_option_pair
        made: list[Instrument] = next(filter(None, (add(base, *place) for place in places)), [])
        for instrument in made:
            instrument.created = instrument.row["creation_timestamp"] = self.now
            self._open(instrument)
        self._weigh()
        return [Event(instrument, self.now, state="open", created=True) for instrument in made]

    def expire_next(self) -> list[Event]:
        """End the instrument that would expire next: the first dated option by expiry and name."""
        options = [i for i in self.catalogue.by_name.values() if i.kind == "option" and not self._is_leg(i)]
        return self.expire(min(options, key=lambda i: (i.expiry, i.name)).name) if options else []

    def _is_leg(self, instrument: Instrument) -> bool:
        return any(leg is instrument for combo in self.catalogue.by_name.values() for _, leg in combo.legs)

    def expire(self, name: str) -> list[Event]:
        """End an instrument, and each combo of it: its book empties, then it is in settlement, then delivered."""
        instrument = self.catalogue.by_name[name]
        combos = [i.name for i in self.catalogue.by_name.values() if any(leg is instrument for _, leg in i.legs)]
        events = [event for combo in combos for event in self.expire(combo)]
        book = self.books[name]
        changes = [book.set_level(side, tick, 0) for side in (BID, ASK) for tick in list(book.sides[side])]
        self._stamp(instrument, book)
        events.append(Event(instrument, self.now, changes, state="settlement"))
        self.catalogue.retire(instrument)
        self._weigh()
        return [*events, Event(instrument, self.now, state="delivered")]

    def _find_expired(self) -> list[str]:
        if self.now < self._next_expiry:
            return []
        due = [i for i in self.catalogue.by_name.values() if i.expiry <= self.now]
        return [i.name for i in due if not (i.legs and any(leg in due for _, leg in i.legs))]

    def _open(self, instrument: Instrument) -> None:
        book, day = Book(), Day()
        self.books[instrument.name], self.days[instrument.name] = book, day
        self.trades[instrument.name] = deque()
        mark = self.mark_price(instrument)
        fill_book(book, mark / instrument.tick, _style(instrument), self.rng)
        self._stamp(instrument, book)
        if instrument.created < self.now:
            pace = 20 if instrument.perpetual else 300_000 if instrument.kind == "option" else 2_000
            day.trade_seq = (self.now - max(instrument.created, 1_760_000_000_000)) // pace
            day.settlement_price = round(mark * self.rng.uniform(0.98, 1.02), 4)
            day.open_interest = round(
                1e6 * self.rng.random() / (1.0 if instrument.inverse else self.coins[instrument.base]), 1
            )
        if instrument.perpetual:
            day.open_interest *= 1000.0
            day.last_price = day.high = day.low = day.first = instrument.to_price(round(mark / instrument.tick))

    def _weigh(self) -> None:
        instruments = self.catalogue.by_name.values()
        self._names = [i.name for i in instruments]
        bonus = {"BTC-PERPETUAL": 60.0, "ETH-PERPETUAL": 40.0, "BTC_USDC-PERPETUAL": 25.0}
        weights = (bonus.get(i.name, _WEIGHTS[i.kind] / (1.0 if i.perpetual else 3.0)) for i in instruments)
        self._weights = list(accumulate(weights))
        self._next_expiry = min((i.expiry for i in instruments), default=FOREVER)


def _style(instrument: Instrument) -> Style:
    return STYLES["perpetual" if instrument.perpetual else instrument.kind]
