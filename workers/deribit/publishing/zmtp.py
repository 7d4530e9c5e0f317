"""What a publisher and one subscriber say to each other: ZMTP 3.0 with the mechanism NULL. No I/O, no clock.

Source: RFC 23/ZMTP of rfc.zeromq.org. Every libzmq since 4.0 speaks it, and what has come after it is still understood:
subscriptions as commands (3.1), and heartbeats. A peer that is no subscriber, or that speaks no ZMTP 3, is refused.
"""

import struct
from typing import NamedTuple

MAX_HEARD = 4096
"""Bytes of one frame from a subscriber that are held: a longer one, which can be no subscription, is passed over."""

MORE, LONG, COMMAND = 1, 2, 4
"""Flags of a frame: more frames of this message follow; its size has 8 bytes instead of 1; it is no message."""

SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
GREETING_SIZE = 64
GREETING = (SIGNATURE + b"\x03\x00" + b"NULL".ljust(20, b"\0")).ljust(GREETING_SIZE, b"\0")
"""Version 3.0; the rest says that we are no server, which NULL does not care about."""

SUBSCRIBERS = (b"SUB", b"XSUB")

_pack_long = struct.Struct(">BQ").pack

SHORT = [bytes((0, size)) for size in range(256)]
"""What stands before a frame that is a whole message, for each size up to 255 bytes."""


class NoSubscriber(ValueError):
    """This peer can not be a subscriber; why. `farewell` is what it is told before it is let go."""

    def __init__(self, reason: str, farewell: bytes = b"") -> None:
        super().__init__(reason)
        self.farewell = farewell


class Wish(NamedTuple):
    """A subscriber wants the topics that begin so, or wants them no more."""

    prefix: bytes
    is_wanted: bool


def encode_topic(topic: bytes) -> bytes:
    """The frame of a topic, which stands before each of its messages."""
    return encode_size(len(topic), MORE) + topic


def encode_size(size: int, flags: int = 0) -> bytes:
    """What stands before the bytes of a frame."""
    if size > 255:
        return _pack_long(flags | LONG, size)
    return bytes((flags, size)) if flags else SHORT[size]


def encode_command(name: bytes, body: bytes) -> bytes:
    """A whole command."""
    content = bytes((len(name),)) + name + body
    return encode_size(len(content), COMMAND) + content


def encode_property(name: bytes, value: bytes) -> bytes:
    """One property of READY."""
    return bytes((len(name),)) + name + len(value).to_bytes(4, "big") + value


READY = encode_command(b"READY", encode_property(b"Socket-Type", b"XPUB"))

FOR_SUBSCRIBERS = b"this is read by SUB sockets"

WRONG_TYPE = encode_command(b"ERROR", bytes((len(FOR_SUBSCRIBERS),)) + FOR_SUBSCRIBERS)
"""To a socket of a wrong type: who hears it does not connect again, where a mere end would be tried again for ever."""


class Conversation:
    """One subscriber: bytes in, wishes and bytes to answer out. We speak first: GREETING. `is_ready` once both have."""

    def __init__(self) -> None:
        self.is_greeted = False
        self.is_ready = False
        self._held = b""
        self._passing = 0  # bytes still to come of a frame that is too long

    def hear(self, data: bytes) -> tuple[list[Wish], bytes]:
        """Take what was received. Returns what is wished for, and what to answer. Raises NoSubscriber."""
        passed = min(self._passing, len(data))
        self._passing -= passed
        self._held += data[passed:]
        wishes: list[Wish] = []
        answer = b""
        if not self.is_greeted:
            if not self._take_greeting():
                return wishes, answer
            answer = READY
        held, at = self._held, 0
        while (place := find_frame(held, at)) is not None:
            flags, start, at = place
            if not (self.is_ready or flags & COMMAND):
                raise NoSubscriber("a message came before READY")
            if at - start > MAX_HEARD:
                continue  # a proxy passes on whatever its subscribers say
            body = held[start:at]
            if flags & COMMAND:
                answer += self._take_command(body, wishes)
            elif body[:1] in (b"\0", b"\1"):  # anything else is no subscription, and is let pass as libzmq does
                wishes.append(Wish(body[1:], body[0] == 1))
        self._held = held[at:]
        self._passing += max(0, at - len(held))
        return wishes, answer

    def _take_greeting(self) -> bool:
        """Whether it is there whole. What can not be one is refused at its first byte that is wrong."""
        held = self._held
        if held[:1] not in (b"", b"\xff") or (len(held) > 9 and not held[9] & 1):
            raise NoSubscriber("it speaks no ZMTP")
        if len(held) > 10 and held[10] < 3:
            raise NoSubscriber("it speaks an older ZMTP than 3; ZeroMQ 4.0 or later is needed")
        if len(held) < GREETING_SIZE:
            return False
        mechanism = held[12:32].rstrip(b"\0")
        if mechanism != b"NULL":
            raise NoSubscriber(f"it wants the mechanism {mechanism!r}; there is NULL only")
        self._held, self.is_greeted = held[GREETING_SIZE:], True
        return True

    def _take_command(self, content: bytes, wishes: list[Wish]) -> bytes:
        """Returns the answer; a command that nobody knows needs none."""
        size = int.from_bytes(content[:1], "big")
        name, body = content[1 : 1 + size], content[1 + size :]
        if name == b"READY":
            self._check_kind(body)
            self.is_ready = True
        elif name == b"ERROR":
            raise NoSubscriber(f"it said {body[1:]!r}")
        elif name == b"PING":
            return encode_command(b"PONG", body[2:])  # after two bytes of its patience, what is to come back
        elif self.is_ready and name in (b"SUBSCRIBE", b"CANCEL"):
            wishes.append(Wish(body, name == b"SUBSCRIBE"))
        return b""

    def _check_kind(self, body: bytes) -> None:
        kind = read_properties(body).get(b"socket-type", b"")
        if kind not in SUBSCRIBERS:
            name = kind.decode("ascii", "replace") or "socket of no type"
            raise NoSubscriber(f"it is a {name}; {FOR_SUBSCRIBERS.decode()}", WRONG_TYPE)


def find_frame(data: bytes, at: int) -> tuple[int, int, int] | None:
    """Flags of the frame at a place, where its content begins and ends; None if it is not all there.

    One that is too long may end beyond what is there.
    """
    start = at + (9 if data[at : at + 1] and data[at] & LONG else 2)
    if len(data) < start:
        return None
    size = int.from_bytes(data[at + 1 : start], "big")
    return (data[at], start, start + size) if size > MAX_HEARD or len(data) >= start + size else None


def read_properties(body: bytes) -> dict[bytes, bytes]:
    """The properties of READY, names in lower case. Raises NoSubscriber if they are none."""
    properties = {}
    while body:
        size = body[0]
        name, rest = body[1 : 1 + size], body[1 + size :]
        length = int.from_bytes(rest[:4], "big")
        if len(rest) < 4 + length:
            raise NoSubscriber("READY breaks off")
        properties[name.lower()], body = rest[4 : 4 + length], rest[4 + length :]
    return properties
