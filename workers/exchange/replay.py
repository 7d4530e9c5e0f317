"""Recorded frames, read from a file, to be sent again byte for byte in their order. No sockets, no clock."""

import re
from pathlib import Path
from typing import NamedTuple

import msgspec

SETTLE = 0.3
"""Seconds between the last subscription that came before a recording and its first frame."""

MOST_AT_ONCE = 2000
"""Frames that are sent at once, however many are due."""

_RECEIVED = re.compile(rb"(\d+(?:\.\d+)?): (\{.*)")


class Recorded(NamedTuple):
    """One recorded notification; `offset` is seconds after the first one (0 where the file has no times)."""

    offset: float
    channel: str
    text: bytes


class _Params(msgspec.Struct):
    channel: str


class _Notification(msgspec.Struct):
    method: str
    params: _Params


_decode = msgspec.json.Decoder(_Notification).decode


def read_recording(path: str) -> list[Recorded]:
    """Read the subscription notifications of a recording, in order.

    Taken are JSON lines (one frame a line), one JSON object over many lines, and cryptofeed's text capture
    (`TIME: {json}` a line; what the client sent and when it connected are passed over). Other frames, such as
    answers, are passed over too. Raises ValueError if there is no notification in it, OSError as open does.
    """
    data = Path(path).read_bytes()
    found = [frame for line in data.splitlines() if (frame := _read_line(line)) is not None]
    if not found:
        whole = _read_frame(0.0, data.strip())
        found = [whole] if whole else []
    if not found:
        raise ValueError(f"{path}: no recorded notification in it (JSON lines or cryptofeed's capture are taken)")
    first = found[0].offset
    return [Recorded(max(0.0, frame.offset - first), frame.channel, frame.text) for frame in found]


def _read_line(line: bytes) -> Recorded | None:
    timed = _RECEIVED.match(line)
    if timed:
        return _read_frame(float(timed[1]), timed[2])
    return _read_frame(0.0, line.strip())


def _read_frame(at: float, text: bytes) -> Recorded | None:
    try:
        frame = _decode(text)
    except (msgspec.DecodeError, UnicodeError):
        return None
    return Recorded(at, frame.params.channel, text) if frame.method == "subscription" else None


class Replay:
    """Plays a recording: it follows the recording's own times divided by `speed` (0: all at once)."""

    def __init__(self, frames: tuple[Recorded, ...], speed: float) -> None:
        self._frames = frames
        self.channels = frozenset(frame.channel for frame in frames)
        self._played = 0
        self._speed = speed
        self._start: float | None = None

    def wake(self, now: float) -> None:
        """Somebody has subscribed to one of the channels."""
        if self._played == 0:
            self._start = now + SETTLE

    def take_due(self, now: float) -> list[Recorded]:
        """The frames that are due at `now` (seconds)."""
        if self._start is None or now < self._start:
            return []
        due: list[Recorded] = []
        while self._played < len(self._frames) and len(due) < MOST_AT_ONCE:
            frame = self._frames[self._played]
            if self._speed > 0 and self._start + frame.offset / self._speed > now:
                break
            due.append(frame)
            self._played += 1
        return due
