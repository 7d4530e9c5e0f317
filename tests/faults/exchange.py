"""An exchange in a few lines of pure code: it trades, keeps a history, and loses and swaps frames by chance."""

import json
from collections import Counter, defaultdict, deque
from random import Random
from typing import Any, NamedTuple

from tests.faults.judge import Levels, Traded, Truth

OPTIONS = tuple(f"BTC-27MAR27-{strike}-C" for strike in (90000, 100000, 110000, 120000))
TRADED = ("BTC-PERPETUAL", "ETH-PERPETUAL", *OPTIONS)
PERIOD = 100
"""ms between the frames of a channel that is not raw."""
DAY = 86_400_000
"""ms for which Deribit keeps trades: to a request for an earlier time it answers that there is nothing, not even of the
time since, and to one for an earlier number with those that are kept.
"""

FAR_BEHIND = 3000
"""ms by which the history of some follows their stream: so much that a lookup at once finds nothing."""


class Loss(NamedTuple):
    """How likely each frame suffers what (shares of 1)."""

    drop: float = 0.0
    repeat: float = 0.0
    swap: float = 0.0
    prev0: float = 0.0
    resnapshot: float = 0.0
    no_snapshot: float = 0.0


class Item(NamedTuple):
    """What is on its way to the worker: a frame of a line (`garbled`: nobody can read it), an ack (names) or an answer
    (to whom, page).
    """

    kind: str
    line: "Line | None" = None
    data: Any = None
    whom: Any = None


class Line:
    """One channel: what waits for its next frame."""

    def __init__(self, channel: str, instruments: tuple[str, ...]) -> None:
        self.channel = channel
        self.family, self.interval = channel.split(".")[0], channel.split(".")[-1]
        self.instruments = instruments
        self.pending: list[dict[str, Any]] = []
        self.levels: tuple[dict[float, float], dict[float, float]] = ({}, {})
        self.change_id = 0
        self.held: Any = None

    def name_topic(self, instrument: str) -> str:
        return f"deribit.{'trade' if self.family == 'trades' else 'book'}.{instrument}.{self.interval}"

    def encode(self, data: Any) -> bytes:
        params = {"channel": self.channel, "data": data}
        frame = {"jsonrpc": "2.0", "method": "subscription", "params": params}
        return json.dumps(frame, separators=(",", ":")).encode()


class Exchange:
    """The market, its history, and one connection's pipe. Times are ms of its own clock."""

    def __init__(self, rng: Random, now: int, loss: Loss, truth: Truth) -> None:
        self.rng, self.now, self.loss, self.truth = rng, now, loss, truth
        self.lines = [
            Line("trades.BTC-PERPETUAL.raw", ("BTC-PERPETUAL",)),
            Line("trades.ETH-PERPETUAL.100ms", ("ETH-PERPETUAL",)),
            Line("trades.option.BTC.raw", OPTIONS),
            Line("book.BTC-PERPETUAL.raw", ("BTC-PERPETUAL",)),
            Line("book.ETH-PERPETUAL.100ms", ("ETH-PERPETUAL",)),
        ]
        self.history: dict[str, deque[dict[str, Any]]] = defaultdict(deque)
        self.garble = 0.0
        """How likely a frame that arrives cannot be read."""
        self.behind = rng.choice((0, 0, 150, 400))
        self.subscribed: set[Line] = set()
        self.known: dict[Line, int] = {}
        self.pipe: deque[Item] = deque()
        self.books: dict[str, tuple[dict[float, float], dict[float, float]]] = {}
        self.change_id = rng.randrange(1, 10**9)
        if self.change_id % 5 == 0:
            self.behind = FAR_BEHIND
        self._trade_id = rng.randrange(1, 10**6)
        self.arrived: set[str] = set()
        self.shown: dict[str, int] = {}
        """By topic of trades, the last of which the worker could know that it came or was lost."""
        self._counts: Counter[str] = Counter()
        self._numbers: Counter[str] = Counter()
        for name in ("BTC-PERPETUAL", "ETH-PERPETUAL", *OPTIONS[:2]):
            self._seed(name)

    def _seed(self, name: str) -> None:
        """Trades of the time before, and a book."""
        for age in range(self.rng.choice((0, 3, 8)), 0, -1):
            self._add_trade(name, self.now - 60_000 * age)
        self.books[name] = (
            {100.0 - n: 10.0 * n for n in range(1, 6)},
            {100.0 + n: 10.0 * n for n in range(1, 6)},
        )
        for line in self.lines:
            if line.family == "book" and name in line.instruments:
                self._flush_book(line)

    # what happens

    def _add_trade(self, name: str, timestamp: int) -> dict[str, Any]:
        self._trade_id += 1
        self._numbers[name] += 1
        side = self.rng.choice(("buy", "sell"))
        trade: dict[str, Any] = {
            "instrument_name": name, "trade_seq": self._numbers[name], "trade_id": str(self._trade_id),
            "price": self.rng.randrange(1, 9999) / 2, "amount": float(self.rng.randrange(1, 99)), "direction": side,
            "timestamp": timestamp, "index_price": 1.5, "mark_price": 1.5, "tick_direction": 0,
        }  # fmt: skip
        traded = Traded(trade["trade_id"], trade["price"], trade["amount"], side)
        self.truth.note(name, self._counts[name], trade["trade_seq"], traded)
        self.history[name].append(trade)
        return trade

    def trade(self, name: str, count: int, forget: float = 0.0) -> None:
        """So many trades of one instrument at once; the history forgets each with that chance."""
        for _ in range(count):
            trade = self._add_trade(name, self.now)
            if self.rng.random() < forget:
                self.history[name].pop()
                self.truth.lost[name].add(self.truth.find(trade))
            for line in self.lines:
                if line.family == "trades" and name in line.instruments:
                    line.pending.append(trade)
        self._flush_raw(name)

    def change_book(self, name: str) -> None:
        """One change of a few levels, never crossed."""
        bids, asks = self.books[name]
        for side, base, sign in ((bids, 100.0, -1), (asks, 100.0, 1)):
            for _ in range(self.rng.randrange(3)):
                price = base + sign * self.rng.randrange(1, 12)
                amount = float(self.rng.choice((0, 5, 10, 20)))
                side[price] = amount
                if not amount:
                    del side[price]
        self.change_id += self.rng.randrange(1, 9)
        self._flush_raw(name)

    def _flush_raw(self, name: str) -> None:
        for line in self.lines:
            if line.interval == "raw" and name in line.instruments:
                self._flush(line)

    def pass_time(self, ms: int) -> None:
        """Let the clock go on; the channels that are not raw speak at each PERIOD."""
        before, self.now = self.now, self.now + ms
        if before // PERIOD != self.now // PERIOD:
            for line in self.lines:
                if line.interval != "raw":
                    self._flush(line)
        for name, kept in self.history.items():
            while kept and kept[0]["timestamp"] < self.now - DAY:
                self.truth.lost[name].add(self.truth.find(kept.popleft()))

    def _flush(self, line: Line) -> None:
        if line.family == "book":
            self._flush_book(line)
        elif line.pending:
            trades, line.pending = line.pending, []
            self._send(line, trades)

    def _flush_book(self, line: Line) -> None:
        name = line.instruments[0]
        sides = []
        for old, new in zip(line.levels, self.books[name], strict=True):
            changed = {
                price: new.get(price, 0.0) for price in old.keys() | new.keys() if old.get(price) != new.get(price)
            }
            sides.append([[_ACTIONS[p in old, p in new], p, a] for p, a in sorted(changed.items())])
        if not any(sides):
            return
        before, line.change_id = line.change_id, self.change_id
        line.levels = (dict(self.books[name][0]), dict(self.books[name][1]))
        self.truth.books[line.name_topic(name)][line.change_id] = sort_levels(line.levels)
        data = {"type": "change", "timestamp": self.now, "instrument_name": name, "change_id": line.change_id,
                "prev_change_id": before, "bids": sides[0], "asks": sides[1]}  # fmt: skip
        self._send(line, data)

    def build_snapshot(self, line: Line) -> dict[str, Any]:
        """The book as its channel has it."""
        bids, asks = ([["new", p, a] for p, a in sorted(side.items())] for side in line.levels)
        return {"type": "snapshot", "timestamp": self.now, "instrument_name": line.instruments[0],
                "change_id": line.change_id, "bids": bids[::-1], "asks": asks}  # fmt: skip

    # the connection

    def _send(self, line: Line, data: Any) -> None:
        if line not in self.subscribed:
            return self._owe(line, data)
        chance = self.rng.random
        if chance() < self.loss.drop:
            return
        if line.family == "book":
            if chance() < self.loss.prev0:
                data = {**data, "prev_change_id": 0}
            elif chance() < self.loss.resnapshot:
                data = self.build_snapshot(line)
        if line.held is None and chance() < self.loss.swap:
            line.held = data
            return
        self._put(line, data)
        if chance() < self.loss.repeat:
            self._put(line, data)
        self._release(line)

    def release(self) -> None:
        """What is late comes now."""
        for line in self.lines:
            self._release(line)

    def _release(self, line: Line) -> None:
        if line.held is not None:
            held, line.held = line.held, None
            self._put(line, held)

    def _put(self, line: Line, data: Any) -> None:
        self.pipe.append(Item("frame", line, data))

    def _owe(self, line: Line, trades: Any) -> None:
        """What a channel that was once confirmed loses with its connection must come all the same, or be named."""
        if line.family != "trades" or line not in self.known:
            return
        for trade in trades:
            name, number = trade["instrument_name"], self.truth.find(trade)
            if number not in self.truth.lost[name] and trade["timestamp"] >= self.known[line]:
                self.truth.owed.setdefault(line.name_topic(name), number)

    def subscribe(self, lines: list[Line], late: bool = False) -> None:
        """Subscribe: the ack, then (late: after) the snapshots of books."""
        self.subscribed.update(lines)
        ack = Item("ack", data=lines)
        snapshots = [
            Item("frame", line, self.build_snapshot(line))
            for line in lines
            if line.family == "book" and self.rng.random() >= self.loss.no_snapshot
        ]
        self.pipe.extend([*snapshots, ack] if late else [ack, *snapshots])

    def unsubscribe(self, line: Line) -> None:
        self.subscribed.discard(line)
        line.held = None

    def answer(self, method: str, params: dict[str, Any], whom: Any) -> None:
        """Answer a request for trades, from a history that may be a little behind."""
        trades = self._select(params)
        size = min(params["count"], self.rng.choice((12, 20, 1000)))
        self.pipe.append(Item("answer", data=(trades[:size], len(trades) > size), whom=whom))

    def _select(self, params: dict[str, Any]) -> list[dict[str, Any]]:
        if params.get("start_timestamp", self.now) < self.now - DAY:
            return []
        names = [params["instrument_name"]] if "instrument_name" in params else OPTIONS
        assert params.get("currency", "BTC") == "BTC"
        assert params.get("kind", "option") == "option"
        assert params["sorting"] == "asc"
        found = [
            trade for name in names for trade in self.history[name] if trade["timestamp"] <= self.now - self.behind
        ]
        bounds = {"start_seq": 1, "end_seq": -1, "start_timestamp": 1, "end_timestamp": -1}
        for key, sign in bounds.items():
            field = "trade_seq" if key.endswith("seq") else "timestamp"
            if key in params:
                found = [trade for trade in found if (trade[field] - params[key]) * sign >= 0]
        return sorted(found, key=lambda trade: (trade["timestamp"], int(trade["trade_id"])))

    def take(self) -> Item:
        """What arrives at the worker next."""
        item = self.pipe.popleft()
        if item.kind == "frame" and self.garble and self.rng.random() < self.garble:
            item = item._replace(kind="garbled")
        if item.kind == "ack":
            for line in item.data:
                self.known.setdefault(line, self.now)
        elif item.line is not None and item.line.family == "trades":
            for trade in item.data:
                topic = item.line.name_topic(trade["instrument_name"])
                number = self.truth.find(trade)
                # What nobody could read, and the history forgot, is known from what follows, if anything does.
                if item.kind == "frame" or number not in self.truth.lost[trade["instrument_name"]]:
                    self._show(topic, number)
                if item.kind == "frame":
                    self.truth.owed.setdefault(topic, self.truth.find(trade))
                    self.arrived.add(topic)
            if item.kind == "garbled":
                self._owe(item.line, item.data)
        return item

    def _show(self, topic: str, number: int) -> None:
        self.shown[topic] = max(self.shown.get(topic, 0), number)

    def reset(self) -> None:
        """It forgets its history and begins to count anew: trades from a lower number, books from any."""
        for line in self.lines:
            if line.pending:
                self._flush(line)
        self.release()
        for name in TRADED:
            self.truth.lost[name] |= self.truth.trades[name].keys()
            self._counts[name] += 1
            self._numbers[name] = self.rng.choice((0, 0, self._numbers[name] // 2))
            self.history[name].clear()
        self.change_id = self.rng.randrange(1, 10**9)
        self.behind = min(self.behind, 400)  # a new count of a few trades is not found where they show so late
        # What the worker never heard of, it cannot miss.
        self.truth.owed = {topic: number for topic, number in self.truth.owed.items() if topic in self.arrived}

    def cut(self) -> None:
        """The connection is gone, with all that was on its way."""
        for item in self.pipe:
            if item.line is not None:
                self._owe(item.line, item.data)
        self.pipe.clear()
        for line in self.lines:
            for name in line.instruments if line.family == "trades" else ():
                known = self.truth.trades[name].keys() - self.truth.lost[name]
                self._show(line.name_topic(name), max(known, default=0))
        for line in self.subscribed:
            line.held = None
        self.subscribed.clear()


_ACTIONS = {(False, True): "new", (True, True): "change", (True, False): "delete"}


def sort_levels(levels: tuple[dict[float, float], dict[float, float]]) -> Levels:
    """Bids and asks, best first."""
    return tuple(sorted(levels[0].items(), reverse=True)), tuple(sorted(levels[1].items()))
