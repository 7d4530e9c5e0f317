"""The methods that need a socket or a login: hello, auth, heartbeat, subscriptions, the account.

Pure but for the exchange's state: a call and the time come in, a Reply goes out.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from collector.faults import Faults
from workers.exchange.channels.hub import Frame, Subscriber
from workers.exchange.channels.names import is_private, is_raw
from workers.exchange.exchange import Counts, Exchange, find_failure
from workers.exchange.protocol import routed
from workers.exchange.protocol.auth import LIFE
from workers.exchange.protocol.distort import distort_result
from workers.exchange.protocol.methods import VERSION, find_instrument
from workers.exchange.protocol.rpc import RpcError, refuse_param
from workers.exchange.protocol.session import FLOOR, Heartbeat, Session

MOST = 10**15
"""The largest number that a parameter may be; a float holds it exactly."""


@dataclass(slots=True)
class Reply:
    """What follows from a call: its result, first frames of new subscriptions; `silent`: no answer but the end."""

    result: Any
    frames: list[Frame] = field(default_factory=list)
    silent: bool = False


@dataclass(slots=True)
class Context:
    """One call: who asks, and when (ms)."""

    exchange: Exchange
    session: Session
    subscriber: Subscriber
    faults: Faults
    params: dict[str, Any]
    now: int
    counts: Counts


def say_hello(call: Context) -> Reply:
    for key in ("client_name", "client_version"):
        if not isinstance(call.params.get(key), str):
            raise refuse_param(key, "value required")
    return Reply({"version": VERSION})


def authenticate(call: Context) -> Reply:
    if "ban" in call.faults:
        raise RpcError(int(call.faults.number("ban")))
    life = 0.0 if "expired_token" in call.faults else call.faults.number("token_life", LIFE)
    login, result = call.exchange.authority.grant(call.params, call.now, call.session.number, life)
    call.session.login = login
    return Reply(result)


def log_out(call: Context) -> Reply:
    if call.session.login is not None and call.params.get("invalidate_token", True) is not False:
        call.exchange.authority.revoke(call.session.login)
    call.session.cancel_on_disconnect = False
    return Reply(None, silent=True)


def set_heartbeat(call: Context) -> Reply:
    interval = call.params.get("interval")
    if interval is None:
        raise refuse_param("interval", "value required")
    if not isinstance(interval, int | float):
        raise refuse_param("interval", "must be a number")
    if interval < call.faults.number("heartbeat_floor", FLOOR):
        raise refuse_param("interval", "must be at least 10")
    if interval > MOST:
        raise refuse_param("interval", "is too large")
    call.session.heartbeat = Heartbeat(float(interval), call.session.last_request)
    return Reply("ok")


def disable_heartbeat(call: Context) -> Reply:
    call.session.heartbeat = None
    return Reply("ok")


def _read_channels(call: Context) -> list[str]:
    channels = call.params.get("channels")
    if channels is None:
        raise refuse_param("channels", "value required")
    if not isinstance(channels, list) or not all(isinstance(channel, str) for channel in channels):
        raise refuse_param("channels", "must be a list of strings")
    return list(dict.fromkeys(channels))


def subscribe_public(call: Context) -> Reply:
    return _subscribe(call, [channel for channel in _read_channels(call) if not is_private(channel)])


def subscribe_private(call: Context) -> Reply:
    return _subscribe(call, _read_channels(call))


def _subscribe(call: Context, channels: list[str]) -> Reply:
    session, hub = call.session, call.exchange.hub
    if any(map(is_raw, channels)) and not session.is_logged_in(call.now):
        raise RpcError(13778)
    label = call.params.get("label")
    given = [each for each in channels if not find_failure(call.faults, "drop_subscribe", each, call.counts)]
    if "routed_spot" in call.faults:
        given = [each for each in given if not routed.leaves_out(each, call.exchange.market.catalogue)]
    offered = filter(hub.offers, given)
    reply = Reply(sorted(offered, reverse=True))
    for channel in reply.result:
        if channel not in session.subscriptions:
            session.subscriptions[channel] = str(label)[:16] if label and is_private(channel) else None
            reply.frames += hub.subscribe(channel, call.subscriber)
            if call.exchange.replay is not None:
                call.exchange.replay.wake(call.now / 1000.0)
    return reply


def unsubscribe(call: Context) -> Reply:
    held = [channel for channel in _read_channels(call) if channel in call.session.subscriptions]
    for channel in held:
        del call.session.subscriptions[channel]
        call.exchange.hub.unsubscribe(channel, call.subscriber)
    return Reply(sorted(held, reverse=True))


def unsubscribe_all(call: Context) -> Reply:
    _leave_all(call.exchange, call.session, call.subscriber)
    return Reply("ok")


def _leave_all(exchange: Exchange, session: Session, subscriber: Subscriber) -> None:
    for channel in session.subscriptions:
        exchange.hub.unsubscribe(channel, subscriber)
    session.subscriptions.clear()


def _set_cancelling(call: Context, enabled: bool) -> Reply:
    call.session.cancel_on_disconnect = enabled
    return Reply("ok")


def get_cancelling(call: Context) -> Reply:
    return Reply({"scope": "connection", "enabled": call.session.cancel_on_disconnect})


SOCKET_METHODS: dict[str, Callable[[Context], Reply]] = {
    "public/hello": say_hello,
    "public/set_heartbeat": set_heartbeat,
    "public/disable_heartbeat": disable_heartbeat,
    "public/subscribe": subscribe_public,
    "public/unsubscribe": unsubscribe,
    "public/unsubscribe_all": unsubscribe_all,
    "private/subscribe": subscribe_private,
    "private/unsubscribe": unsubscribe,
    "private/unsubscribe_all": unsubscribe_all,
    "private/logout": log_out,
    "private/enable_cancel_on_disconnect": lambda call: _set_cancelling(call, True),
    "private/disable_cancel_on_disconnect": lambda call: _set_cancelling(call, False),
    "private/get_cancel_on_disconnect": get_cancelling,
}
"""Methods that only a WebSocket may call (10030 over HTTP)."""


def _read_currency(call: Context) -> str:
    currency = str(call.params.get("currency", "")).upper()
    if currency not in call.exchange.account.balances:
        raise refuse_param("currency", "value required" if not currency else "invalid currency")
    return currency


def get_account_summary(call: Context) -> Reply:
    more = {"id": 7, "system_name": "practice", "type": "main", "username": "practice"}
    limits = {"limits": {"non_matching_engine": {"rate": 20, "burst": 100}}}
    return Reply(call.exchange.account.describe(_read_currency(call)) | limits | more)


def get_account_summaries(call: Context) -> Reply:
    account = call.exchange.account
    return Reply({"id": 7, "type": "main", "summaries": [account.describe(currency) for currency in account.balances]})


def get_positions(call: Context) -> Reply:
    account, known = call.exchange.account, call.exchange.market.catalogue.by_name
    return Reply([account.describe_position(known[name]) for name in account.positions if name in known])


def get_open_orders(call: Context) -> Reply:
    return Reply([held["order"] for held in call.exchange.account.orders.values()])


def place_order(call: Context, direction: str) -> Reply:
    of = find_instrument(call.exchange.market, call.params, expired=False)
    amount, price = call.params.get("amount"), call.params.get("price", call.exchange.market.round_mark(of))
    for key, value in (("amount", amount), ("price", price)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MOST:
            raise refuse_param(key, "must be a positive number")
    label = str(call.params.get("label", ""))
    event = call.exchange.account.place(of, direction, float(amount or 0), float(price), label, call.session.number)
    call.exchange.hub.take([event])
    return Reply({"order": event.own[0][0], "trades": []})


def cancel_order(call: Context) -> Reply:
    order_id = call.params.get("order_id")
    if not isinstance(order_id, str):
        raise refuse_param("order_id", "value required")
    if order_id not in call.exchange.account.orders:
        raise RpcError(11044)
    event = call.exchange.account.cancel(order_id)
    call.exchange.hub.take([event])
    return Reply(event.own[0][0])


def cancel_all(call: Context) -> Reply:
    return Reply(len(call.exchange.hub.take(call.exchange.account.cancel_all())))


def end_session(exchange: Exchange, session: Session, subscriber: Subscriber) -> None:
    """Forget a connection: its subscriptions, and its orders if it wanted that."""
    _leave_all(exchange, session, subscriber)
    if session.cancel_on_disconnect:
        exchange.hub.take(exchange.account.cancel_all(session.number, "cancel_on_disconnect"))


LOGIN_METHODS: dict[str, Callable[[Context], Reply]] = {
    "public/auth": authenticate,
    "private/get_account_summary": get_account_summary,
    "private/get_account_summaries": get_account_summaries,
    "private/get_positions": get_positions,
    "private/get_open_orders": get_open_orders,
    "private/buy": lambda call: place_order(call, "buy"),
    "private/sell": lambda call: place_order(call, "sell"),
    "private/cancel": cancel_order,
    "private/cancel_all": cancel_all,
}
"""Methods of logins and the account; over HTTP too."""


def carry_out(method: str, call: Context) -> Reply:
    """Carry out any method, having checked the login that it needs. Raises RpcError."""
    if method.startswith("private/"):
        _check_login(call)
    elif "login_only" in call.faults and method != "public/auth" and not call.session.is_logged_in(call.now):
        raise RpcError(11056)
    elif "routed_spot" in call.faults and routed.refuses(method, call.params, call.exchange.market.catalogue):
        raise RpcError(11060)
    act = SOCKET_METHODS.get(method) or LOGIN_METHODS.get(method)
    reply = act(call) if act else Reply(call.exchange.ask(method, call.params, call.now, call.faults))
    if "routed_spot" in call.faults:
        reply.result = routed.mark_rows(method, reply.result)
    reply.result = distort_result(reply.result, call.faults)
    return reply


def _check_login(call: Context) -> None:
    token = call.params.get("access_token")
    if token is not None:
        call.session.login = call.exchange.authority.check_token(str(token), call.now, call.session.number)
    if not call.session.is_logged_in(call.now):
        raise RpcError(13009, {"reason": "invalid_token"})
