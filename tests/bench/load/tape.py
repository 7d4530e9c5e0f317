"""The load: a deterministic tape of WebSocket frames, shaped like Deribit's, ready to be sent as they are.

Book changes chain, trades count, and both go on when the tape is played again: the fields that change have a fixed
width and are written over in place. One field of each frame carries the time of sending to whoever receives it at
the far end: the first amount, 16 digits (monotonic ns - `ORIGIN` + 10**15: exact as a JSON number and as a double).
"""

import random
import struct
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

MIX = {"book": 60, "trade": 10, "ticker": 20, "quote": 10}
"""Percent of each type in the mix."""

CHANNELS = {"book": "book.{}.100ms", "trade": "trades.{}.100ms", "ticker": "ticker.{}.100ms", "quote": "quote.{}"}

MARK = 10**15
"""A first amount of at least this is a time of sending."""

LAST_CHANNEL = "quote.LAST-PERPETUAL"
"""The frame on this channel ends a run."""

DEEP_CHANNEL, DEEP_LEVELS = "book.DEEP-PERPETUAL.100ms", 5_000
"""A book that is not on the tape: nothing but its snapshot, with so many levels a side, comes to who subscribes."""

_CHANGE_ID, _TRADE_SEQ = 193_000_000_000, 200_000_000
_SIDE = 80  # price levels a side that a book may have; half of them are there at first


class Frame(NamedTuple):
    """Where a frame lies on the tape, and (offsets) the fields written over: times, the first amount, counters."""

    start: int
    end: int
    times: tuple[int, ...]
    mark: int
    counters: tuple[int, ...]
    kind: str
    instrument: int


class Book:
    """One book of the market: which levels of its grid are there, and the frames that change it."""

    def __init__(self, mid: float, tick: float) -> None:
        self.prices = ([mid - tick * n for n in range(1, _SIDE + 1)], [mid + tick * n for n in range(1, _SIDE + 1)])
        self.present = ([n % 2 == 0 for n in range(_SIDE)], [n % 2 == 0 for n in range(_SIDE)])
        self.frames: list[int] = []
        self.last_id = 0


class Tape:
    """`count` frames of the types in `mix` over `instruments` instruments; the same seed gives the same tape."""

    def __init__(self, count: int, instruments: int, mix: dict[str, int], seed: int = 1) -> None:
        self.names = list(name_instruments(instruments))
        self.mix = mix
        self.data = bytearray()
        self.frames: list[Frame] = []
        self.position = 0
        self._random = random.Random(seed)
        self._books = [Book(*_price(name)) for name in self.names]
        self._trades = [0] * instruments
        self._change_id = _CHANGE_ID
        kinds = self._random.choices(list(mix), list(mix.values()), k=count)
        for kind in kinds:
            index = self._random.randrange(instruments)
            self._append(kind, index, getattr(self, f"_write_{kind}")(index))
        self._close_chains()

    @property
    def channels(self) -> list[str]:
        """The channels to subscribe to, the last one included."""
        return [CHANNELS[kind].format(name) for kind in self.mix for name in self.names] + [LAST_CHANNEL]

    def take(self, count: int, now_ms: int, mark: int | None = None, ahead: int = 0) -> tuple[memoryview, int]:
        """Return the next frames and how many they are, at most `count`, with time (ms since 1970) and mark written in.

        `ahead` frames are left out before them. What was taken and sent is behind after `advance`.
        """
        first = (self.position + ahead) % len(self.frames)
        frames = self.frames[first : first + count]
        data, stamp = self.data, b"%d" % now_ms
        for frame in frames:
            for at in frame.times:
                data[at : at + 13] = stamp
        if mark is not None:
            digits = b"%d" % mark
            for frame in frames:
                data[frame.mark : frame.mark + 16] = digits
        return memoryview(data)[frames[0].start : frames[-1].end], len(frames)

    def advance(self, count: int) -> None:
        """Go on by `count` frames and make those behind ready for the next time round."""
        data, total = self.data, len(self.frames)
        for n in range(count):
            frame = self.frames[(self.position + n) % total]
            if frame.kind == "book":
                _add(data, frame.counters, 12, total)
            elif frame.kind == "trade":
                _add(data, frame.counters, 9, self._trades[frame.instrument])
        self.position = (self.position + count) % total

    def take_snapshot(self, instrument: str, now_ms: int) -> bytes:
        """Return a book's snapshot frame, from which its next change on the tape goes on."""
        book = self._books[self.names.index(instrument)]
        change_id = book.last_id
        if book.frames:
            at = bisect_left(book.frames, self.position) % len(book.frames)
            before = self.frames[book.frames[at]].counters[1]
            change_id = int(self.data[before : before + 12])
        sides = [
            ",".join(f'["new",{price:.10g},10.0]' for price, there in zip(prices, present, strict=True) if there)
            for prices, present in zip(book.prices, book.present, strict=True)
        ]
        return frame_text(
            _envelope(
                CHANNELS["book"].format(instrument),
                f'{{"timestamp":{now_ms},"type":"snapshot","change_id":{change_id},"instrument_name":"{instrument}",'
                f'"bids":[{sides[0]}],"asks":[{sides[1]}]}}',
            )
        )

    def _write_book(self, index: int) -> str:
        book, change_id = self._books[index], self._change_id
        self._change_id += 1
        bids, asks = self._change_levels(book)
        text = (
            f'{{"timestamp":~TIME~,"type":"change","change_id":~{change_id}~,"instrument_name":"{self.names[index]}",'
            f'"bids":[{bids}],"asks":[{asks}],"prev_change_id":~{book.last_id or change_id}~}}'
        )
        book.frames.append(len(self.frames))
        book.last_id = change_id
        return text

    def _change_levels(self, book: Book) -> list[str]:
        """Change one to four levels; the first one bears the mark, so it is no deletion and stands first."""
        texts: list[list[tuple[bool, int, str]]] = [[], []]
        first = self._random.randrange(2)
        for n in range(self._random.choices((1, 2, 3, 4), (60, 25, 10, 5))[0]):
            side = first if n == 0 else self._random.choice((first, 1))
            level = self._random.randrange(_SIDE)
            there = book.present[side][level]
            gone = n > 0 and there and self._random.random() < 0.5
            book.present[side][level] = not gone
            action = "delete" if gone else "change" if there else "new"
            amount = "0.0" if gone else f"{self._random.randrange(1, 50000)}.0"
            texts[side].append((n > 0, level, f'["{action}",{book.prices[side][level]:.10g},{amount}]'))
        return _mark_first([",".join(text for _, _, text in sorted(side)) for side in texts])

    def _write_trade(self, index: int) -> str:
        name, (mid, tick) = self.names[index], _price(self.names[index])
        trades = []
        for n in range(self._random.choices((1, 2), (85, 15))[0]):
            price = mid + tick * self._random.randrange(-40, 40)
            amount = "~MARK~" if n == 0 else f"{self._random.randrange(1, 5000)}.0"
            trades.append(
                f'{{"timestamp":~TIME~,"price":{price:.10g},"amount":{amount},"direction":"{"sell" if n else "buy"}",'
                f'"index_price":{mid - tick / 4:.10g},"instrument_name":"{name}",'
                f'"trade_seq":~{_TRADE_SEQ + self._trades[index]}~,"mark_price":{mid + tick / 4:.10g},'
                f'"tick_direction":{n},"contracts":1.0,"trade_id":"{self._random.randrange(10**8, 10**9)}"}}'
            )
            self._trades[index] += 1
        return f"[{','.join(trades)}]"

    def _write_ticker(self, index: int) -> str:
        return _write_ticker(self.names[index], *_price(self.names[index]), self._random)

    def _write_quote(self, index: int) -> str:
        name, (mid, tick) = self.names[index], _price(self.names[index])
        best = self._random.randrange(1, 20)
        return (
            f'{{"timestamp":~TIME~,"instrument_name":"{name}","best_ask_price":{mid + tick * best:.10g},'
            f'"best_bid_price":{mid - tick * best:.10g},"best_ask_amount":{best * 1000}.0,"best_bid_amount":~MARK~}}'
        )

    def _append(self, kind: str, index: int, data: str) -> None:
        """Add a frame; what stands between two ~ is a field that is written over later."""
        parts = _envelope(CHANNELS[kind].format(self.names[index]), data).split("~")
        text, fields = "", []
        for n, part in enumerate(parts):
            if n % 2:
                fields.append((part, len(text)))
                part = {"TIME": "1" * 13, "MARK": str(MARK)}.get(part, part)
            text += part
        frame = frame_text(text)
        base = len(self.data) + len(frame) - len(text)
        self.frames.append(
            Frame(
                start=len(self.data),
                end=len(self.data) + len(frame),
                times=tuple(base + at for word, at in fields if word == "TIME"),
                mark=next(base + at for word, at in fields if word == "MARK"),
                counters=tuple(base + at for word, at in fields if word not in ("TIME", "MARK")),
                kind=kind,
                instrument=index,
            )
        )
        self.data += frame

    def _close_chains(self) -> None:
        """Let each book's first change follow its last one of the round before."""
        for book in self._books:
            if book.frames:
                before = self.frames[book.frames[0]].counters[1]
                self.data[before : before + 12] = b"%d" % (book.last_id - len(self.frames))


def name_instruments(count: int) -> Iterator[str]:
    """Names of `count` instruments: two perpetuals, then options."""
    yield from ("BTC-PERPETUAL", "ETH-PERPETUAL")[:count]
    for n in range(count - 2):
        day, strike = ("27MAR27", "25JUN27", "24SEP27", "31DEC27")[n % 4], 40000 + n // 16 * 500
        yield f"{('BTC', 'ETH')[n // 4 % 2]}-{day}-{strike}-{'CP'[n // 8 % 2]}"


def _price(name: str) -> tuple[float, float]:
    """A mid price and a tick."""
    return {"BTC-PERPETUAL": (92280.25, 0.5), "ETH-PERPETUAL": (3187.225, 0.05)}.get(name, (0.0821, 0.0001))


def _mark_first(sides: list[str]) -> list[str]:
    """Put the mark in place of the first amount of a change."""
    side = 0 if sides[0] else 1
    first, _, rest = sides[side].partition("]")
    sides[side] = f"{first.rpartition(',')[0]},~MARK~]{rest}"
    return sides


def _write_ticker(name: str, mid: float, tick: float, rng: random.Random) -> str:
    best = rng.randrange(1, 20)
    common = (
        f'{{"timestamp":~TIME~,"state":"open","stats":{{"high":{mid * 1.02:.10g},"low":{mid * 0.97:.10g},'
        f'"price_change":{rng.randrange(100, 999) / 100},"volume":{rng.randrange(1000, 10000) / 100}}},'
        f'"index_price":92263.55,"instrument_name":"{name}",'
        f'"last_price":{mid + tick * best:.10g},"settlement_price":{mid:.10g},"min_price":{mid * 0.9:.10g},'
        f'"max_price":{mid * 1.1:.10g},"open_interest":{rng.randrange(10**6, 10**7)}.0,"mark_price":{mid:.10g},'
        f'"best_ask_price":{mid + tick * best:.10g},"best_bid_price":{mid - tick * best:.10g},'
        f'"estimated_delivery_price":92263.55,"best_ask_amount":{best * 1000}.0,"best_bid_amount":~MARK~,'
    )
    if name.endswith("PERPETUAL"):
        return common + '"interest_value":0.0028213400122472977,"current_funding":0.0,"funding_8h":0.00001742}'
    return common + (
        f'"mark_iv":{rng.randrange(4000, 6000) / 100},"bid_iv":{rng.randrange(4000, 5000) / 100},'
        f'"ask_iv":{rng.randrange(5000, 6000) / 100},"underlying_price":92284.31,"underlying_index":"BTC-27MAR27",'
        f'"interest_rate":0.0,"greeks":{{"delta":0.{rng.randrange(10000, 99999)},"gamma":0.00002,"vega":61.23152,'
        f'"theta":-43.27654,"rho":15.{rng.randrange(10000, 99999)}}}}}'
    )


def _envelope(channel: str, data: str) -> str:
    return f'{{"jsonrpc":"2.0","method":"subscription","params":{{"channel":"{channel}","data":{data}}}}}'


def frame_text(text: str) -> bytes:
    """Frame one text message as a WebSocket server does (RFC 6455: final, unmasked)."""
    payload = text.encode()
    if len(payload) < 126:
        return struct.pack("!BB", 0x81, len(payload)) + payload
    if len(payload) < 1 << 16:
        return struct.pack("!BBH", 0x81, 126, len(payload)) + payload
    return struct.pack("!BBQ", 0x81, 127, len(payload)) + payload


def last_payload(now_ms: int) -> str:
    """The message that ends a run, shorter than any other."""
    return _envelope(
        LAST_CHANNEL,
        f'{{"timestamp":{now_ms:013},"instrument_name":"LAST-PERPETUAL","best_ask_price":2,"best_bid_price":1,'
        f'"best_ask_amount":1,"best_bid_amount":1}}',
    )


LAST_SIZE = len(last_payload(0))
"""Bytes of that message."""

DEEP_SIZE = DEEP_LEVELS * 20
"""Only messages that hold the deep book have as many bytes."""


def frame_deep_snapshot(now_ms: int) -> bytes:
    """The frame of the deep book's snapshot."""
    sides = [
        ",".join(f'["new",{price},{n % 977 + 1}.0]' for n, price in enumerate(prices))
        for prices in ((50_000 - n / 2 for n in range(DEEP_LEVELS)), (50_000.5 + n / 2 for n in range(DEEP_LEVELS)))
    ]
    data = f'"change_id":{_CHANGE_ID},"instrument_name":"DEEP-PERPETUAL","bids":[{sides[0]}],"asks":[{sides[1]}]'
    return frame_text(_envelope(DEEP_CHANNEL, f'{{"timestamp":{now_ms},"type":"snapshot",{data}}}'))


def _add(data: bytearray, places: tuple[int, ...], width: int, step: int) -> None:
    for at in places:
        data[at : at + width] = b"%d" % (int(data[at : at + width]) + step)
