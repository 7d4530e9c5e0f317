"""Deribit's JSON-RPC: requests, replies, notifications. No I/O, no clock."""

from typing import Any, NamedTuple

import msgspec

from workers.deribit.rpc.errors import ExchangeError

DATA_PREFIX = b'{"jsonrpc":"2.0","method":"subscription","params":{"channel":"'
"""How Deribit begins each data frame; the channel's name follows. Frames in another key order are data as well."""

START = len(DATA_PREFIX)
"""Where the channel's name begins in such a frame."""


MAX_MS = 9_000_000_000_000
"""The year 2255, the latest time that is taken: as ns it still fits what MessagePack and others take for an int."""


def encode_request(number: int, method: str, params: dict[str, Any]) -> str:
    """The text of one request."""
    body = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
    return msgspec.json.encode(body).decode()


class Reply(NamedTuple):
    """An answer to a request. `number` is None where the exchange could not tell which request it was."""

    number: int | None
    result: Any
    error: ExchangeError | None


class Data(NamedTuple):
    """A notification of a subscribed channel."""

    channel: str


class Heartbeat(NamedTuple):
    """`kind` test_request must be answered at once, or the exchange closes the connection."""

    kind: str


class _Params(msgspec.Struct):
    channel: str | None = None
    type: str | None = None


class _Frame(msgspec.Struct):
    id: int | str | None = None
    method: str | None = None
    params: _Params | None = None
    result: Any = msgspec.UNSET
    error: dict[str, Any] | None = None


_decoder = msgspec.json.Decoder(_Frame)


def decode_frame(frame: bytes) -> Reply | Data | Heartbeat:
    """Say what a frame is. Raises ValueError for anything that Deribit would not send."""
    try:
        found = _decoder.decode(frame)
        if found.method == "subscription" and found.params is not None and found.params.channel:
            return Data(found.params.channel)
        if found.method == "heartbeat" and found.params is not None and found.params.type:
            return Heartbeat(found.params.type)
        number = found.id if isinstance(found.id, int) else None
        if found.error is not None:
            return Reply(number, None, ExchangeError(found.error))
        if found.result is not msgspec.UNSET:
            return Reply(number, found.result, None)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    raise ValueError("neither reply, notification nor heartbeat")
