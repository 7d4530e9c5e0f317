"""Faults in the data: what one connection gets instead of a frame. All chance is seeded; no I/O, no clock."""

import re
from collections import Counter
from collections.abc import Callable, Container
from copy import deepcopy
from random import Random
from typing import Any

from collector.faults import Faults
from workers.exchange.channels.feeds import BookFeed
from workers.exchange.channels.hub import Frame
from workers.exchange.protocol.rpc import encode

_REPEATABLE = ("ticker.", "quote.", "deribit_price_index.", "perpetual.")
_NUMBER = re.compile(rb"(?<=[:,\[])(-?)(\d+)(?:\.(\d+))?(?=[,\]}])")
_UNKNOWN = {"never_seen_before": {"nested": [1, "two", None]}}
_ODD_VALUES: tuple[Any, ...] = ("text", None, True, [], {}, "12.5", -1, 1e308)


class Distortion:
    """The data faults of one connection; `report(fault, frame)` is told of each.

    Where there are none any more, what has been begun is ended with the next frames.
    """

    def __init__(self, faults: Faults, rng: Random, report: Callable[[str, Frame], None]) -> None:
        self._faults, self._rng, self._report = faults, rng, report
        self._seen: Counter[tuple[str, str]] = Counter()
        self._times: Counter[str] = Counter()
        self._held: dict[str, Frame] = {}
        self._crossed: dict[str, float] = {}  # channel -> price of the false bid
        self.repeatable: dict[str, bytes] = {}

    def forget_others(self, channels: Container[str]) -> None:
        """Forget what was begun or kept of all channels but these."""
        for state in (self._held, self._crossed, self.repeatable):
            for channel in [channel for channel in state if channel not in channels]:
                del state[channel]

    def apply(self, frame: Frame) -> list[bytes]:
        """The texts that go out in the place of a frame, in order; maybe none."""
        changed = self._change_data(frame)
        if changed is None:
            return []
        frames = [changed]
        if self._hits("duplicate", changed):
            frames.append(changed)
        held = self._held.pop(changed.channel, None)
        if held is not None:
            frames.append(held)
        elif self._hits("reorder", changed):
            self._held[changed.channel] = changed
            return []
        texts = [self._respell(frame) for frame in frames]
        if "flood" in self._faults and changed.channel.startswith(_REPEATABLE):
            self.repeatable[changed.channel] = texts[0]
        return texts

    def _respell(self, frame: Frame) -> bytes:
        text = frame.text if frame.recorded else distort_envelope(frame.text, self._faults)
        return _NUMBER.sub(_spell_exponent, text) if "exponents" in self._faults else text

    def _hits(self, name: str, frame: Frame) -> bool:
        for setting in self._faults.all(name):
            self._seen[name, frame.channel] += 1
            rate, place = setting.value, self._seen[name, frame.channel]
            hit = self._rng.random() < rate if rate < 1 else place % int(rate) == 0
            if hit and self._times[name] < setting.at:
                self._times[name] += 1
                self._report(name, frame)
                return True
        return False

    def _change_data(self, frame: Frame) -> Frame | None:
        if isinstance(frame.feed, BookFeed):
            return self._change_book(frame, frame.feed)
        if frame.channel.startswith("trades.") and self._hits("lost_trades", frame):
            return None
        return self._finish(frame, frame.data)

    def _change_book(self, frame: Frame, feed: BookFeed) -> Frame | None:
        data = frame.data
        if data["type"] == "snapshot":
            self._crossed.pop(frame.channel, None)
            self._times["no_snapshot"] += 1
            if self._times["no_snapshot"] <= self._faults.number("no_snapshot"):
                self._report("no_snapshot", frame)
                return None
            return self._finish(frame, data)
        if self._hits("gap", frame):
            return None
        if self._hits("resnapshot", frame):
            self._crossed.pop(frame.channel, None)
            return self._finish(frame, feed.open()[0])
        if self._hits("prev0", frame):
            data = {**data, "prev_change_id": 0}
        bids = self._cross(frame, feed)
        return self._finish(frame, data if bids is data["bids"] else {**data, "bids": bids})

    def _cross(self, frame: Frame, feed: BookFeed) -> list[Any]:
        """The bids of a change, with a false one among them, or without that of the frame before."""
        bids: list[Any] = frame.data["bids"]
        false = self._crossed.pop(frame.channel, None)
        if false is not None:  # a true level of that price has taken its place
            return bids if any(level[1] == false for level in bids) else [*bids, ["delete", false, 0.0]]
        if not bids or not self._hits("crossed", frame):
            return bids
        price = self._crossed[frame.channel] = _find_crossing(feed)
        return [["new", price, 10.0], *(level for level in bids if level[1] != price)]

    def _finish(self, frame: Frame, data: Any) -> Frame:
        if not frame.recorded:
            if self._hits("wrong_types", frame):
                data = self._mistype(deepcopy(data))
            data = distort_result(data, self._faults)
        return frame if data is frame.data else Frame(frame.channel, data, frame.feed, label=frame.label)

    def _mistype(self, data: Any) -> Any:
        target = data[0] if isinstance(data, list) and data and isinstance(data[0], dict) else data
        if isinstance(target, dict) and target:
            target[self._rng.choice(sorted(target))] = self._rng.choice(_ODD_VALUES)
        return data


def _find_crossing(feed: BookFeed) -> float:
    full = feed.open()[0]
    asks = [level[1] for level in full["asks"]] or [level[1] for level in full["bids"]]
    return float(asks[min(2, len(asks) - 1)])


def distort_result(result: Any, faults: Faults) -> Any:
    """The result of a request, or data, as faults of its content leave it."""
    if "unknown_fields" in faults:
        result = [_add_unknown(item) for item in result] if isinstance(result, list) else _add_unknown(result)
    return shift_times(result, int(faults.number("clock"))) if "clock" in faults else result


def distort_envelope(text: bytes, faults: Faults) -> bytes:
    """A message with one more member, that nobody knows, if that is a fault."""
    return text[:-1] + b"," + encode(_UNKNOWN)[1:] if "unknown_fields" in faults else text


def _add_unknown(item: Any) -> Any:
    return {**item, **_UNKNOWN} if isinstance(item, dict) else item


def shift_times(data: Any, by: int) -> Any:
    """A copy of the data with each timestamp moved by so many ms. An expiry is no reading of a clock."""
    if isinstance(data, list):
        return [shift_times(item, by) for item in data]
    if isinstance(data, dict):
        return {key: _shift_member(key, value, by) for key, value in data.items()}
    return data


def _shift_member(key: str, value: Any, by: int) -> Any:
    if not key.endswith("timestamp") or key == "expiration_timestamp" or not isinstance(value, int | float):
        return shift_times(value, by)
    return value + by * (1_000_000 if key == "starbase_timestamp" else 1)  # which is in ns


def _spell_exponent(match: re.Match[bytes]) -> bytes:
    sign, whole, fraction = match[1], match[2], match[3]
    if fraction is None or len(whole) > 12:
        return match[0]
    digits = whole + fraction
    return sign + digits[:1] + b"." + (digits[1:] or b"0") + b"e" + str(len(whole) - 1).encode()


def make_nonsense(kind: str, rng: Random, number: float = 0.0) -> list[tuple[bool, bytes]]:
    """Frames that are no messages, as (is text, bytes); `kind` is the fault's name."""
    if kind == "garbage":
        return [(True, b"%d hello \xc3\xa9 {]" % rng.randrange(10**9)), (False, rng.randbytes(64))]
    if kind == "bad_json":
        return [(True, _BROKEN)]
    if kind == "deep_json":
        return [(True, b'{"jsonrpc":"2.0","method":"subscription","params":' + b"[" * 100_000 + b"]" * 100_000 + b"}")]
    if kind == "odd_json":
        return [(True, text) for text in _ODD_FRAMES]
    filler = {"jsonrpc": "2.0", "method": "subscription", "params": {"channel": "oversized", "data": "x" * int(number)}}
    return [(True, encode(filler))]


_BROKEN = b'{"jsonrpc":"2.0","method":"subscription","params":{"channel":"trades.BTC-PERPETUAL.raw","data":[{"trade'
_ODD_MESSAGES: tuple[Any, ...] = (
    None, [], "text", 17, {}, {"jsonrpc": "2.0"}, {"jsonrpc": "2.0", "id": [1], "result": "ok"},
    {"jsonrpc": "2.0", "id": 10**15, "result": "ok"}, {"jsonrpc": "2.0", "method": "subscription"},
    {"jsonrpc": "2.0", "method": "subscription", "params": None},
    {"jsonrpc": "2.0", "method": "subscription", "params": {"channel": 5, "data": {}}},
    {"jsonrpc": "2.0", "method": "subscription", "params": {"channel": "book.NOPE-1.raw", "data": 5}},
    {"jsonrpc": "2.0", "method": "subscription", "params": {"channel": "trades.NOPE-1.raw", "data": [None]}},
    {"jsonrpc": "2.0", "method": "heartbeat"}, {"jsonrpc": "2.0", "method": "heartbeat", "params": {"type": 7}},
    {"jsonrpc": "2.0", "method": "something_new", "params": {}},
)  # fmt: skip
_ODD_FRAMES = tuple(map(encode, _ODD_MESSAGES))
