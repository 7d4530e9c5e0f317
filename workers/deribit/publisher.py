"""The PUB side: numbers each topic's messages, encodes them, and hands them to ZeroMQ.

The socket is an XPUB (on the wire the same as PUB), so that new subscriptions can be seen and answered.
"""

import os
import socket
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from workers.deribit.ledger import Ledger
from workers.deribit.payloads import Gap, Payload
from workers.deribit.streams import Message, Published, Stream

LINGER_MS = 1000
"""What subscribers have not yet taken is kept this long when the worker stops."""

MAX_HELD = 100_000
"""Frames that may wait for the subscribers of an earlier life."""

Send = Callable[[bytes, int, bool, bool], Any]
MORE, LAST = int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.NOBLOCK)


class Publisher:
    """One bound XPUB socket. `published` counts messages of this epoch."""

    def __init__(self, endpoint: str, queue: int, ledger: Ledger) -> None:
        self.endpoint = endpoint
        self.published = 0
        self.subscriptions = 0
        self._ledger = ledger
        self._expected = ledger.subscriptions
        self._held: list[tuple[bytes, int]] = []
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.XPUB)
        self._socket.setsockopt(zmq.SNDHWM, queue)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.XPUB_VERBOSER, 1)  # also repeated ones, and each unsubscription
        self._socket.setsockopt(zmq.MAXMSGSIZE, 4096)  # upstream come subscriptions, nothing longer
        # The backend's own send: the wrapper's checks cost more than the send (measured: 3.5 against 1.9 us a pair).
        self._pass_on: Send = super(zmq.Socket, self._socket).send  # type: ignore[assignment]
        self._send = self._hold if self._expected else self._pass_on
        self._encode = msgspec.msgpack.Encoder().encode

    def bind(self) -> str:
        """Bind; return the endpoint really bound. Raises OSError if it is taken."""
        if self.endpoint.startswith("ipc://"):
            claim_ipc(self.endpoint)
        self._socket.bind(self.endpoint)
        bound = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        self.endpoint = bound.rstrip(b"\0").decode()
        return self.endpoint

    def publish(self, published: Published, receive_ts: int) -> None:
        """Send data, each message after the gap that is due before it. Raises ValueError for what cannot be encoded."""
        cells = self._ledger.cells
        for stream, message in published:
            if stream.lost and not isinstance(message, Gap):
                gap = stream.resume(message, receive_ts)
                if gap is not None:
                    self.say(stream, gap)
            try:
                self.say(stream, message)
            except ValueError:
                stream.current = None  # what cannot be said cannot be repeated
                raise
            stream.last_ts = cells[stream.slot] = receive_ts
            cells[stream.slot + 1] = stream.last_id

    def say(self, stream: Stream, message: Message) -> None:
        """Send one message as the next of its topic. Raises ValueError for what cannot be encoded."""
        seq = stream.seq + 1
        if type(message) is dict:
            message["seq"] = seq
        else:
            message.seq = seq  # type: ignore[union-attr]
        try:
            payload = self._encode(message)
        except (TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"cannot be encoded: {error}") from None
        stream.seq = seq
        self.published += 1
        send = self._send
        send(stream.topic, MORE, True, False)
        send(payload, LAST, True, False)

    def repeat(self, stream: Stream, message: Payload | dict[str, Any]) -> None:
        """Send a join answer: it carries the last seq used and does not count."""
        body = msgspec.to_builtins(message) if isinstance(message, Payload) else dict(message)
        body["seq"] = stream.seq
        body["join"] = True
        self._send(stream.topic, MORE, True, False)
        self._send(self._encode(body), LAST, True, False)

    def take_subscriptions(self) -> list[bytes]:
        """The prefixes that were subscribed to since the last call; anything else that came upstream is ignored."""
        prefixes = []
        while self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:  # type: ignore[arg-type, operator]
            frame = self._socket.recv(zmq.NOBLOCK)
            if frame[:1] == b"\x01":
                prefixes.append(frame[1:])
            self.subscriptions += {b"\x01": 1, b"\x00": -1}.get(frame[:1], 0)
        if self._send == self._hold:
            if self.subscriptions >= self._expected:
                self.release()
        else:
            self._ledger.subscriptions = max(0, self.subscriptions)
        return prefixes

    @property
    def is_holding(self) -> bool:
        """Whether messages wait for the subscribers of an earlier life to come back."""
        return self._send == self._hold

    def _hold(self, data: bytes, flags: int, copy: bool, track: bool) -> None:
        self._held.append((data, flags))
        if len(self._held) >= MAX_HELD:
            self.release()

    def release(self) -> None:
        """Send what was held, and hold no more."""
        self._send = self._pass_on
        for data, flags in self._held:
            self._send(data, flags, True, False)
        self._held.clear()

    def close(self) -> None:
        """Drain for LINGER_MS at most, then close."""
        self.release()
        self._socket.close()
        self._context.term()


def claim_ipc(endpoint: str) -> None:
    """Make sure that nobody listens on an ipc endpoint: ZeroMQ would let a second bind succeed and steal it.

    Raises OSError (EADDRINUSE) if somebody does. A socket file that nobody listens on is left to ZeroMQ to replace.
    """
    path = endpoint.removeprefix("ipc://")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(f"\0{path[1:]}" if path.startswith("@") else path)
        except OSError:
            return
    raise OSError(98, os.strerror(98), endpoint)
