"""The practice account: it takes part in some of the market's trades, may place orders, and tells `user.*` channels.

Orders that it places rest beside the book: they are never filled, only cancelled.
"""

from typing import Any

from workers.exchange.channels.feeds import PERIODS, Feed
from workers.exchange.market.instruments import Instrument
from workers.exchange.market.market import Event, Market
from workers.exchange.market.payloads import Data

EVERY = 5
"""The account has part in every n-th trade of a perpetual."""


class Account:
    """Balances, positions and orders of the one practice account."""

    def __init__(self, market: Market) -> None:
        self.market = market
        self.balances = {"BTC": 10.0, "ETH": 100.0, "USDC": 250_000.0}
        self.positions: dict[str, float] = {}
        self.orders: dict[str, dict[str, Any]] = {}
        self._seen = 0
        self._order_id = 74_365_704_226

    def take(self, event: Event) -> None:
        """Take part in the event's trades now and then; what came of it stands in `event.own`."""
        if not event.instrument.perpetual:
            return
        for trade in event.trades:
            self._seen += 1
            if self._seen % EVERY == 0:
                event.own.append(self._fill(event.instrument, trade))

    def _fill(self, of: Instrument, trade: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        order = self._make_order(of, trade["direction"], trade["amount"], trade["price"], trade["timestamp"])
        order |= {"time_in_force": "immediate_or_cancel", "filled_amount": trade["amount"], "order_state": "filled"}
        order["average_price"] = trade["price"]
        sign = 1.0 if trade["direction"] == "buy" else -1.0
        self.positions[of.name] = round(self.positions.get(of.name, 0.0) + sign * trade["amount"], 8)
        worth = trade["amount"] / trade["price"] if of.inverse else trade["amount"] * trade["price"]
        fee = round(worth * 0.0005, 8)
        self.balances[of.currency] = round(self.balances[of.currency] - fee, 8)
        own = {key: value for key, value in trade.items() if key != "legs"}
        own |= {
            "state": "filled", "order_id": order["order_id"], "order_type": "limit", "matching_id": None, "fee": fee,
            "fee_currency": of.currency, "liquidity": "T", "self_trade": False, "reduce_only": False,
            "post_only": False, "mmp": False, "profit_loss": None, "label": "", "api": True, "risk_reducing": False,
        }  # fmt: skip
        return order, own

    def _make_order(self, of: Instrument, direction: str, amount: float, price: float, now: int) -> dict[str, Any]:
        self._order_id += 1
        prefix = "" if of.currency == "BTC" else f"{of.currency}-"
        return {
            "label": "", "price": price, "user_id": 7, "amount": amount, "direction": direction,
            "time_in_force": "good_til_cancelled", "instrument_name": of.name, "web": False, "api": True,
            "order_id": f"{prefix}{self._order_id}", "creation_timestamp": now, "replaced": False,
            "filled_amount": 0.0, "last_update_timestamp": now, "post_only": False, "reduce_only": False,
            "average_price": 0.0, "mmp": False, "contracts": round(amount / of.size, 8), "order_state": "open",
            "order_type": "limit", "is_liquidation": False, "risk_reducing": False,
        }  # fmt: skip

    def place(self, of: Instrument, direction: str, amount: float, price: float, label: str, owner: int) -> Event:
        """Place an order that rests until it is cancelled; `owner` is the connection that placed it."""
        order = self._make_order(of, direction, amount, price, self.market.now)
        order["label"] = label
        self.orders[order["order_id"]] = {"order": order, "owner": owner, "of": of}
        return Event(of, self.market.now, own=[(dict(order), None)])

    def cancel(self, order_id: str, reason: str = "user_request") -> Event:
        """Cancel a resting order. Raises KeyError if there is none of that id."""
        held = self.orders.pop(order_id)
        order = {**held["order"], "order_state": "cancelled", "cancel_reason": reason}
        order["last_update_timestamp"] = self.market.now
        return Event(held["of"], self.market.now, own=[(order, None)])

    def cancel_all(self, owner: int | None = None, reason: str = "user_request") -> list[Event]:
        """Cancel all resting orders, or those of one connection."""
        due = [i for i, held in self.orders.items() if owner is None or held["owner"] == owner]
        return [self.cancel(order_id, reason) for order_id in due]

    def describe(self, currency: str) -> Data:
        """The account summary in one currency, as user.portfolio and private/get_account_summary give it."""
        balance, index = self.balances[currency], "btc_usd" if currency == "BTC" else "eth_usd"
        held = {name: size for name, size in self.positions.items() if name.startswith(f"{currency}-")}
        delta = round(sum(held.values()) / self.market.index_price(index), 8) if currency != "USDC" else 0.0
        margin = round(abs(delta) * 0.02, 8)
        zeros = (
            "options_value", "options_delta", "options_gamma", "options_vega", "options_theta", "options_pl",
            "options_session_rpl", "options_session_upl", "futures_session_rpl", "futures_session_upl", "session_rpl",
            "session_upl", "total_pl", "futures_pl", "fee_balance", "spot_reserve", "additional_reserve",
            "locked_balance",
        )  # fmt: skip
        return {
            "currency": currency, "equity": balance, "balance": balance, "margin_balance": balance,
            "available_funds": round(balance - margin, 8), "available_withdrawal_funds": round(balance - margin, 8),
            "initial_margin": margin, "maintenance_margin": round(margin / 2, 8), "projected_initial_margin": margin,
            "projected_maintenance_margin": round(margin / 2, 8), "delta_total": delta, "projected_delta_total": delta,
            "delta_total_map": {index: delta} if delta else {}, **dict.fromkeys(zeros, 0.0),
            "options_gamma_map": {}, "options_theta_map": {}, "options_vega_map": {},
            "margin_model": "segregated_sm",
            "portfolio_margining_enabled": False, "cross_collateral_enabled": False,
        }  # fmt: skip

    def describe_position(self, of: Instrument) -> Data:
        """The position in one instrument."""
        size, mark = self.positions.get(of.name, 0.0), self.market.round_mark(of)
        return {
            "instrument_name": of.name, "kind": of.kind, "size": size, "mark_price": mark, "average_price": mark,
            "direction": "buy" if size > 0 else "sell" if size < 0 else "zero", "leverage": 50,
            "index_price": self.market.index_price(of.index),
            "settlement_price": self.market.days[of.name].settlement_price,
            "total_profit_loss": 0.0, "realized_profit_loss": 0.0, "floating_profit_loss": 0.0, "initial_margin": 0.0,
            "maintenance_margin": 0.0, "delta": size, "size_currency": round(size / mark, 8) if of.inverse else size,
        }  # fmt: skip


Own = tuple[Instrument, dict[str, Any], dict[str, Any] | None]
"""An order of ours, and its trade."""


class OwnFeed(Feed):
    """`user.orders.*`, `user.trades.*`, `user.changes.*`; raw orders come one object a frame, all else as arrays."""

    def __init__(
        self, channel: str, market: Market, account: Account, what: str, interval: str,
        name: str = "", kind: str = "any", currency: str = "any",
    ) -> None:  # fmt: skip
        super().__init__(channel, market, market.catalogue.by_name.get(name))
        self.period = PERIODS[interval]
        self._account, self._what = account, what
        self._kind, self._currency = kind, currency
        self._pending: list[Own] = []

    def take(self, event: Event) -> bool:
        if event.own and event.instrument.matches(self._kind, self._currency):
            self._pending += [(event.instrument, order, trade) for order, trade in event.own]
        return bool(self._pending)

    def flush(self) -> list[Data]:
        pending, self._pending = self._pending, []
        if self._what == "changes":
            return [self._describe_changes(of, pending) for of in dict.fromkeys(of for of, _, _ in pending)]
        orders, trades = [order for _, order, _ in pending], [trade for _, _, trade in pending if trade]
        told = orders if self._what == "orders" else trades
        return told if told is orders and self.period == 0 else [told] if told else []

    def _describe_changes(self, of: Instrument, pending: list[Own]) -> Data:
        orders = [order for each, order, _ in pending if each is of]
        trades = [trade for each, _, trade in pending if each is of and trade]
        positions = [self._account.describe_position(of)] if trades else []
        return {"instrument_name": of.name, "trades": trades, "orders": orders, "positions": positions}


class PortfolioFeed(Feed):
    """`user.portfolio.*`: the summary, at once and after each second with changes."""

    period = 1000

    def __init__(self, channel: str, market: Market, account: Account, currency: str) -> None:
        super().__init__(channel, market)
        self._account, self._currencies = account, list(account.balances) if currency == "ANY" else [currency]
        self._changed: list[str] = []

    def open(self) -> list[Data]:
        return [self._account.describe(currency) for currency in self._currencies]

    def take(self, event: Event) -> bool:
        currency = event.instrument.currency
        if event.own and currency in self._currencies and currency not in self._changed:
            self._changed.append(currency)
        return bool(self._changed)

    def flush(self) -> list[Data]:
        changed, self._changed = self._changed, []
        return [self._account.describe(currency) for currency in changed]
