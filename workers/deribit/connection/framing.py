"""Cuts what is read from a WebSocket into frames (RFC 6455, section 5.2). No I/O, no clock.

Only what data come in is cut here: whole, unmasked text (or binary) frames. It is done for each message, and costs a
third of what aiohttp's reader and queue do. Pings, pongs, fragments, the close and all that breaks the rules is left to
aiohttp.
"""

import struct

MAX_FRAME = 16 << 20
"""Bytes of one frame that are taken; Deribit's largest (an instrument list) was measured at 5.1 MB."""

TEXT, BINARY = 0x81, 0x82
"""First bytes of whole data frames."""

LIMITS = {TEXT: MAX_FRAME, BINARY: MAX_FRAME, 0x89: 125, 0x8A: 125}
"""Longest payload by first byte: data, pings, pongs. From any other frame on, everything is left to aiohttp."""

TEXT_16 = TEXT << 8 | 126
"""The first two bytes of a text frame whose length, 126 to 65,535 bytes, stands in the next two."""

_unpack = struct.Struct(">HH").unpack_from


class Framing:
    """The frames of one connection. `is_foreign` once a frame has come that is not for us, nor any after it."""

    def __init__(self) -> None:
        self.is_foreign = False
        self._pieces: list[bytes] = []
        self._held = 0
        self._needed = 0

    def cut(self, data: bytes) -> tuple[list[bytes], bytes]:
        """The payloads of the data frames that have become whole, in order, and the bytes that are left to aiohttp."""
        if self._pieces:
            data = self._join(data)
        frames: list[bytes] = []
        others: list[bytes] = []
        at, end = 0, len(data)
        while at < end:
            start = at + 4
            if start < end:
                head, size = _unpack(data, at)
                if head == TEXT_16 and (stop := start + size) <= end:
                    frames.append(data[start:stop])
                    at = stop
                    continue
            first, start, stop = measure_frame(data, at)
            if stop - start > LIMITS.get(first, -1):
                self.is_foreign = True
                others.append(data[at:])
                break
            if stop > end:
                self._pieces, self._held, self._needed = [data[at:]], end - at, stop - at
                break
            if first in (TEXT, BINARY):
                frames.append(data[start:stop])
            else:
                others.append(data[at:stop])
            at = stop
        return frames, b"".join(others)

    def _join(self, data: bytes) -> bytes:
        """What was kept and this, once a whole frame is there; nothing before: a long one must not be copied often."""
        self._pieces.append(data)
        self._held += len(data)
        if self._held < self._needed:
            return b""
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)


def measure_frame(data: bytes, at: int) -> tuple[int, int, int]:
    """First byte of the frame at a place, and where its payload begins and ends.

    While its head is not there it ends just after what is. A masked one, which no server may send, is longer than any.
    """
    head = data[at : at + 10]
    start, size = 2, head[1] if len(head) > 1 else 0
    if size in (126, 127):
        start = 4 if size == 126 else 10
        size = int.from_bytes(head[2:start], "big")
    elif size > 127:
        size = MAX_FRAME + 1
    if len(head) < start:
        start, size = len(head), 1
    return head[0], at + start, at + start + size
