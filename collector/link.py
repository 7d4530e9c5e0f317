"""The private link between the supervisor and one life of one worker: a socket pair that nobody else can reach.

The spec goes down it first (secrets never stand in argv or the environment), then commands; ready, beats,
replies and events come up. Its end of file is the lifeline: either side that sees it knows that the other is gone. Each
life has its own pair, so nothing meant for an earlier life can reach the next one.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Any, cast

import msgpack

from collector.messages import encode

MAX_MESSAGE = 64 << 20
"""Bytes of one message on a link; one more and the link is cut."""

MAX_ITEMS = 8 << 20
"""Of one list or map: as many as a frame of 16 MiB from the exchange may hold, whose error or answer goes on here."""

MAX_UNSENT = 64 << 20
"""Bytes that may wait for the other side to read; a stopped process must not eat our memory."""


class Link(asyncio.Protocol):
    """One end of a link. Calls `receive(map)` for each message and `ended(reason)` once, when the link is gone.

    Bytes that are no MessagePack maps end the link with a reason that says so.
    """

    def __init__(self, receive: Callable[[dict[str, Any]], None], ended: Callable[[str], None]) -> None:
        self._receive = receive
        self._ended = ended
        self._transport: asyncio.Transport | None = None
        self._unpacker = msgpack.Unpacker(
            max_buffer_size=MAX_MESSAGE, max_array_len=MAX_ITEMS, max_map_len=MAX_ITEMS, strict_map_key=True
        )
        self._fault = "end of file"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport (asyncio calls this)."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Hand on each complete message (asyncio calls this)."""
        try:
            self._unpacker.feed(data)
            messages = list(self._unpacker)
        except (ValueError, msgpack.UnpackException) as error:
            return self._reject(f"{type(error).__name__}: {str(error)[:100]}")
        for message in messages:
            if not isinstance(message, dict):
                return self._reject(f"{type(message).__name__} instead of a map")
            self._receive(message)

    def _reject(self, fault: str) -> None:
        self._fault = f"garbage on the link: {fault}"
        self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the owner, once (asyncio calls this)."""
        self._transport = None
        self._ended(f"{self._fault}: {exc}" if exc else self._fault)

    def send(self, message: dict[str, Any]) -> bool:
        """Send one map; False if the link is gone or the other side has stopped reading."""
        transport = self._transport
        if transport is None or transport.is_closing() or transport.get_write_buffer_size() > MAX_UNSENT:
            return False
        transport.write(encode(message))
        return True

    def pause(self) -> None:
        """Leave what comes from now on unread, until `resume`: nothing wakes this process then."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read what has come, and what will."""
        if self._transport is not None:
            self._transport.resume_reading()

    def close(self) -> None:
        """End the link; what was sent is still delivered."""
        if self._transport is not None:
            self._transport.close()


async def open_link(
    end: socket.socket, receive: Callable[[dict[str, Any]], None], ended: Callable[[str], None]
) -> Link:
    """Take one end of a socket pair into the running loop."""
    end.setblocking(False)
    link = Link(receive, ended)
    await asyncio.get_running_loop().connect_accepted_socket(lambda: link, end)
    return link
