"""JSON-RPC as Deribit speaks it: reading requests, writing answers and notifications. No I/O, no clock.

Key orders, codes and messages are those seen on the wire (2025, 2026).
"""

from typing import Any, NamedTuple

import msgspec

MAX_REQUEST = 32 * 1024
"""Bytes of one frame or HTTP body from a client; more is refused, the socket stays open."""

encode = msgspec.json.encode
_decode = msgspec.json.Decoder().decode

MESSAGES = {
    10000: "authorization_required", 10001: "error", 10012: "book_closed", 10020: "invalid_or_unsupported_instrument",
    10028: "too_many_requests", 10030: "must_be_websocket_request", 10033: "not_implemented", 10040: "retry",
    10041: "settlement_in_progress", 10047: "matching_engine_queue_full", 10048: "not_on_this_server",
    10066: "too_many_concurrent_requests", 11029: "invalid_arguments", 11042: "permission_denied",
    11044: "not_open_order", 11045: "invalid_event", 11050: "bad_request", 11051: "system_maintenance",
    11052: "subscribe_error_unsubscribed", 11056: "unauthenticated_public_requests_temporarily_disabled",
    11060: "not_supported_for_coinbase_routed_spot",
    11094: "internal_server_error", 11098: "account_locked", 12003: "login_over_limit", 12005: "country_is_banned",
    12998: "security_key_authorization_over_limit", 13004: "invalid_credentials", 13007: "user_not_found",
    13008: "request_failed", 13009: "unauthorized", 13019: "orderbook_closed", 13020: "not_found", 13021: "forbidden",
    13025: "method_switched_off_by_admin", 13028: "temporarily_unavailable", 13403: "scope_exceeded",
    13503: "unavailable", 13668: "security_key_authorization_error",
    13778: "raw_subscriptions_not_available_for_unauthorized", 13888: "timed_out",
    -32600: "request entity too large", -32601: "Method not found", -32602: "Invalid params",
}  # fmt: skip
"""Message of each error code (official table)."""

NO_ID = msgspec.UNSET


class RpcError(Exception):
    """An answer that is an error. `data` is left out of it if None."""

    def __init__(self, code: int, data: Any = None, message: str = "") -> None:
        super().__init__(code)
        self.code = code
        self.data = data
        self.message = message or MESSAGES.get(code, "error")

    def to_map(self) -> dict[str, Any]:
        """The error object; its key order is code, data, message."""
        data = {} if self.data is None else {"data": self.data}
        return {"code": self.code, **data, "message": self.message}


def refuse_param(param: str, reason: str) -> RpcError:
    """The error for one bad parameter."""
    return RpcError(-32602, {"reason": reason, "param": param})


class Call(NamedTuple):
    """One request. `id` is NO_ID where the client gave none; `params` is None if it was not an object."""

    id: Any
    method: str
    params: dict[str, Any] | None


def read_call(text: str | bytes) -> Call:
    """Read one request. Raises RpcError (then the answer has no id) for what is none."""
    size = len(text if isinstance(text, bytes) else text.encode())
    if size > MAX_REQUEST:
        raise RpcError(-32600)
    try:
        body = _decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        raise RpcError(11050, "invalid json") from None
    if not isinstance(body, dict):
        raise RpcError(-32600, message="Invalid Request")
    params, method = body.get("params", {}), body.get("method")
    return Call(
        body.get("id", NO_ID),
        method if isinstance(method, str) else "",
        params if isinstance(params, dict) else None,
    )


def encode_answer(id: Any, outcome: Any, us_in: int, us_out: int) -> bytes:
    """Write the answer to a request: its result, or the RpcError. Times are us since 1970."""
    body: dict[str, Any] = {"jsonrpc": "2.0"}
    if id is not NO_ID:
        body["id"] = id
    if isinstance(outcome, RpcError):
        body["error"] = outcome.to_map()
    else:
        body["result"] = outcome
    body |= {"usIn": us_in, "usOut": us_out, "usDiff": us_out - us_in, "testnet": False}
    return encode(body)


def encode_notification(channel: str, data: Any, label: str | None = None) -> bytes:
    """Write one subscription notification."""
    more = {} if label is None else {"label": label}
    params = {"channel": channel, "data": data, **more}
    return encode({"jsonrpc": "2.0", "method": "subscription", "params": params})


def encode_heartbeat(kind: str) -> bytes:
    """Write `heartbeat` or `test_request`, with the reversed key order of the wire."""
    return encode({"params": {"type": kind}, "method": "heartbeat", "jsonrpc": "2.0"})
