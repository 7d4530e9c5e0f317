"""The wire: topics, control requests and replies.

Nothing here does I/O or reads a clock. What comes in from a socket is hostile until it went
through one of the decode functions, which bound its size, depth and types.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgpack

WIRE = 1
"""Version of what subscribers receive; told in each heartbeat."""

EXCHANGE = "deribit"

CODES = {
    "bad_request": "the request is not a map of the right shape; correct it",
    "unknown_op": "there is no such op",
    "unknown_connection": "no connection has that name",
    "exists": "a connection of that name is running already",
    "not_connected": "the connection is not live just now: try again when it is; only if it ended with a send under "
    "way, whether that was carried out is not known",
    "forbidden": "this method may not be sent through the control channel",
    "timeout": "no answer within the deadline; whether it was carried out is not known",
    "expired": "the deadline had passed before it could be carried out; it was not",
    "exchange_error": "the exchange refused; data is its own error object, unchanged",
    "internal": "a fault of the collector; see its log",
}
"""Control error codes and what each means to the one who asked."""

MAX_CONTROL = 1 << 20
"""Bytes of a control request; a larger one is answered with bad_request."""

MAX_REPLY = 64 << 20
"""Bytes of a control reply that are taken."""

_TOPIC_PART = re.compile(r"[A-Za-z0-9_:\-]+\Z")


class ControlError(Exception):
    """A control request that was refused. `code` is one of CODES; `data` the exchange's own error, if any."""

    def __init__(self, code: str, message: str, data: Any = None) -> None:
        super().__init__(code, message, data)  # of which copies are made, for another process too
        self.code = code
        self.message = message
        self.data = data

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"

    def to_map(self) -> dict[str, Any]:
        """Return the error as the map that stands in a reply."""
        error: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.data is not None:
            error["data"] = self.data
        return error


class Topic(NamedTuple):
    """The four parts of a topic, in order; none of them holds a dot."""

    exchange: str
    type: str
    instrument: str
    interval: str

    def __str__(self) -> str:
        return ".".join(self)


def parse_topic(text: str) -> Topic:
    """Split a topic into its four parts. Raises ValueError if it is not one."""
    parts = text.split(".")
    if len(parts) != 4 or not all(map(is_topic_part, parts)):
        raise ValueError(f"not a topic (four parts with dots between): {text[:100]!r}")
    return Topic(*parts)


def is_topic_part(text: str) -> bool:
    """Whether the text may stand in a topic: no dot, no space, no wildcard, at most 200 characters."""
    return len(text) <= 200 and _TOPIC_PART.match(text) is not None


def list_names(names: str | Iterable[str]) -> list[str]:
    """Names as a list; a text is one name, not its letters."""
    return [names] if isinstance(names, str) else list(names)


def encode(value: Any) -> bytes:
    """Encode a map for the control channel or a link."""
    packed: bytes = msgpack.packb(value)
    return packed


def decode(data: bytes, limit: int = MAX_CONTROL) -> Any:
    """Decode one MessagePack value of at most `limit` bytes. Raises ValueError for anything else."""
    if len(data) > limit:
        raise ValueError(f"{len(data)} bytes, at most {limit} are taken")
    try:
        return msgpack.unpackb(data, strict_map_key=True)
    except Exception as error:  # msgpack raises many kinds for hostile bytes; all mean the same here
        raise ValueError(f"not MessagePack ({type(error).__name__})") from None


class Request(NamedTuple):
    """One control request. `deadline` is in ns since 1970."""

    op: str
    connection: str | None
    deadline: int
    arguments: dict[str, Any]


OPS = ("connect", "subscribe", "unsubscribe", "send", "close", "get_state")

DEFAULT_TIMEOUT = 5_000_000_000
"""Ns from its arrival that a request without a deadline has."""


def decode_request(data: bytes, now: int) -> Request:
    """Decode and check one control request that arrived at `now` (ns). Raises ControlError with the code to answer."""
    try:
        body = decode(data)
    except ValueError as error:
        raise ControlError("bad_request", str(error)) from None
    if not isinstance(body, dict):
        raise ControlError("bad_request", 'a request is a map: {"op": ..., "connection": ..., ...}')
    op = body.pop("op", None)
    if not isinstance(op, str):
        raise ControlError("bad_request", f"op must be one of {', '.join(OPS)}")
    if op not in OPS:
        raise ControlError("unknown_op", f"no op {op[:40]!r}; there are {', '.join(OPS)}")
    connection = body.pop("connection", None)
    if op == "connect":
        _require("connection", connection, dict)
        body["connection"], connection = connection, None
    elif op != "get_state" or connection is not None:
        _require("connection", connection, str)
    deadline = body.pop("deadline", None)
    if deadline is None:
        deadline = now + DEFAULT_TIMEOUT
    if type(deadline) is not int or not 0 <= deadline < 1 << 63:
        raise ControlError("bad_request", "deadline must be an int, ns since 1970")
    if op == "send":
        _require("method", body.get("method"), str)
        if body.get("params") is not None:
            _require("params", body["params"], dict)
    elif op in ("subscribe", "unsubscribe"):
        _check_channels(body.get("channels"))
    return Request(op, connection, deadline, body)


def _require(key: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise ControlError("bad_request", f"{key} must be {'a map' if kind is dict else 'a string'}")


def _check_channels(channels: Any) -> None:
    named = isinstance(channels, list) and all(isinstance(name, str) and 0 < len(name) <= 200 for name in channels)
    if not named or not channels:
        raise ControlError("bad_request", "channels must be a list of one or more channel names")


def encode_reply(result: Any = None, error: ControlError | None = None) -> bytes:
    """Encode a reply: the result, or the error if there is one."""
    if error is not None:
        return encode({"ok": False, "error": error.to_map()})
    return encode({"ok": True, "result": result})


def decode_reply(data: bytes) -> Any:
    """Return the result of a reply, or raise the ControlError that it carries."""
    try:
        body = decode(data, MAX_REPLY)
        if body["ok"] is True:
            return body.get("result")
        error = body["error"]
        raised = ControlError(str(error["code"]), str(error["message"]), error.get("data"))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ControlError("internal", "the reply is not a control reply; is this a collector's endpoint?") from None
    raise raised
