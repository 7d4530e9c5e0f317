"""The judge: what one subscriber received, against what really happened on the exchange."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import dropwhile
from typing import Any, NamedTuple

from collector.client.orderbook import OrderBook
from collector.client.stream import Message, read_message
from collector.client.verify import Verifier

Levels = tuple[tuple[tuple[float, float], ...], tuple[tuple[float, float], ...]]
"""Bids and asks, best first."""

COUNT = 10**12
"""More than any trade_seq: from one count of the exchange to the next."""


class Received(NamedTuple):
    """The two frames of one message, and when they came (ns)."""

    topic: bytes
    payload: bytes
    at: int


class Traded(NamedTuple):
    """What is true of one trade."""

    trade_id: str
    price: float
    amount: float
    side: str


class Truth:
    """What really happened, and what a subscriber may expect of it.

    `trades`: by instrument, by number: its trade_seq, and COUNT more each time that the exchange began to count anew.
    `owed`: by topic of trades, the first trade_seq that must have come or be
    named as missing; `waived`: those that need not, since nothing that came later could have shown them. `lost`: those
    that the exchange does not have any more; only they may be named. `books`: by topic, the levels at each change_id.
    `final`: by topic, the change_ids at which a book may end. `allowed`: rules of the verifier that faults break.
    `is_mean`: the exchange refused requests for longer than anybody would ask, or did not tell by time what it has:
    then trades that it has may be named as missing.
    """

    def __init__(self) -> None:
        self.trades: dict[str, dict[int, Traded]] = defaultdict(dict)
        self.owed: dict[str, int] = {}
        self.waived: dict[str, set[int]] = defaultdict(set)
        self.lost: dict[str, set[int]] = defaultdict(set)
        self.books: dict[str, dict[int, Levels]] = defaultdict(dict)
        self.final: dict[str, set[int]] = {}
        self.allowed: set[str] = set()
        self.is_mean = False
        self._numbers: dict[tuple[str, str], int] = {}

    def note(self, instrument: str, count: int, seq: int, traded: Traded) -> None:
        """Something was traded: with this trade_seq of that count."""
        number = self._numbers[instrument, traded.trade_id] = count * COUNT + seq
        self.trades[instrument][number] = traded

    def find(self, trade: dict[str, Any]) -> int:
        """The number of a trade as the exchange sends it."""
        return self._numbers[trade["instrument_name"], trade["trade_id"]]

    def find_said(self, message: Message) -> int:
        """The number of a trade as it was published; its trade_seq if the exchange never had it."""
        said: int = message["trade_seq"]
        return self._numbers.get((message.instrument, message["trade_id"]), said)


def judge(record: list[Received], truth: Truth, is_whole: bool = True) -> Iterator[str]:
    """What is wrong with what was received. `is_whole`: from the first message on, not as a late subscriber."""
    verifier = Verifier()
    topics: dict[str, list[Message]] = defaultdict(list)
    for topic, payload, at in record:
        for finding in verifier.check(topic, payload, now_ns=at):
            if finding.rule not in truth.allowed:
                yield f"{finding.rule}: {finding.topic}: {finding.text}"
        topics[topic.decode()].append(read_message(topic, payload))
    for name in sorted(topics.keys() | truth.final.keys()):
        kind = name.split(".")[1]
        if kind == "book":
            yield from judge_book(name, topics[name], truth)
        elif kind == "trade" and is_whole:
            yield from judge_trades(name, topics[name], truth)
    for name in sorted(truth.owed.keys() - topics.keys() if is_whole else ()):
        yield from judge_trades(name, [], truth)


def judge_book(topic: str, messages: list[Message], truth: Truth) -> Iterator[str]:
    """Whether the book that a reader keeps is the exchange's at each change, and at the end up to date."""
    book = OrderBook()
    wrong = 0
    for message in messages:
        if book.apply(message) and book.in_sync:
            true = truth.books[topic].get(book.change_id)
            if true is not None and _take_levels(book) != true:
                wrong += 1
                if wrong == 1:
                    yield f"book: {topic}: at change {book.change_id} it is not the exchange's (seq {message.seq})"
    final = truth.final.get(topic)
    if final is not None and not book.in_sync:
        yield f"book: {topic}: not in sync at the end"
    elif final is not None and book.change_id not in final:
        yield f"book: {topic}: ends at change {book.change_id}, not {sorted(final)[-3:]}"


def _take_levels(book: OrderBook) -> Levels:
    return tuple(map(tuple, book.get_depth(None)))  # type: ignore[return-value]


class Account:
    """What one topic of trades said. Trades have their number in the truth."""

    def __init__(self, topic: str, truth: Truth) -> None:
        self.topic = topic
        self.truth = truth
        self.epoch = 0
        self.reborn = False
        self.retold = False
        self.count = 0
        self.came: dict[int, int] = {}
        self.named: set[int] = set()
        self.under: dict[int, int] = {}
        self.gaps: dict[tuple[int, int], Message] = {}
        self.repairs: Counter[tuple[int, int]] = Counter()

    def take(self, message: Message) -> Iterator[str]:
        """Take the next message; say what is wrong with it."""
        if message.epoch != self.epoch:
            self.epoch, self.reborn, self.retold = message.epoch, False, False
        if message.type == "gap" and not message.is_join:
            self._take_gap(message)
        elif message.type == "repair":
            yield from self._take_repair(message)
        elif message.type == "trade":
            yield from self._take_trade(message)

    def _take_gap(self, message: Message) -> None:
        self.gaps[message.epoch, message["id"]] = message
        self.reborn = self.reborn or message["reason"] == "restart"
        if "missing_from" not in message:
            self.under.clear()  # the exchange may count anew from here
            self.retold = self.retold or message["reason"] == "restart"
        elif not message["healing"]:
            start, first = self.count * COUNT, message["missing_from"]
            if (last := message.get("missing_to")) is not None:
                self.named.update(range(start + first, start + last + 1))
            else:
                numbers = self.truth.trades[message.instrument]
                self.named.update(number for number in numbers if number >= start + first)

    def _take_repair(self, message: Message) -> Iterator[str]:
        key = message.epoch, message["gap"]
        gap = self.gaps.get(key)
        self.repairs[key] += 1
        if gap is None or not gap.get("healing"):
            yield f"repair: {self.topic}: of gap {message['gap']}, which was not announced as healing"
        for first, last in message["missing"]:
            run = {self.count * COUNT + seq for seq in range(first, last + 1)}
            if came := [number for number in sorted(run) if self.came.get(number) == message.epoch]:
                yield f"repair: {self.topic}: names {show_runs(came)}, which came"
            self.named |= run

    def _take_trade(self, message: Message) -> Iterator[str]:
        seq, number = message["trade_seq"], self.truth.find_said(message)
        said = Traded(message["trade_id"], message["price"], message["amount"], message["side"])
        true = self.truth.trades[message.instrument].get(number)
        if true != said:
            yield f"trade: {self.topic}: {seq} is {said}, it was {true}"
        if self.under.setdefault(seq, number) != number:
            yield f"trade: {self.topic}: {seq} is said of another trade than before, and no gap tells of a new count"
        backfilled = message.get("backfilled")
        may_repeat = backfilled or (self.retold and number >= COUNT)  # of a new count that is told twice: wire.md
        if number in self.came and not (may_repeat and self.reborn and self.came[number] < message.epoch):
            yield f"trade: {self.topic}: {show_runs([number])} comes twice"
        if number in self.named and not backfilled:
            yield f"trade: {self.topic}: {show_runs([number])} comes after a repair named it as missing"
        self.count = max(self.count, number // COUNT)
        self.came[number] = message.epoch


def judge_trades(topic: str, messages: list[Message], truth: Truth) -> Iterator[str]:
    """Whether received and named as missing together are what was sent, exactly."""
    instrument = topic.split(".")[2]
    account = Account(topic, truth)
    for message in messages:
        yield from account.take(message)
    for (epoch, number), gap in account.gaps.items():
        repairs, is_last = account.repairs[epoch, number], epoch == account.epoch
        if gap.get("healing") and repairs != 1 and (is_last or repairs):
            yield f"repair: {topic}: {repairs} repairs of gap {number}"
    expected = list_expected(topic, account, truth)
    if silent := expected - account.came.keys() - account.named:
        yield f"trade: {topic}: never came and not named: {show_runs(silent)} of {show_runs(expected)}"
    idle = account.named & truth.trades[instrument].keys() - truth.lost[instrument] - account.came.keys()
    if idle and not truth.is_mean:
        yield f"trade: {topic}: named as missing though the exchange has them: {show_runs(idle)}"


def list_expected(topic: str, account: Account, truth: Truth) -> set[int]:
    """What must have come, or been named. Of an older count the exchange has nothing any more."""
    instrument = topic.split(".")[2]
    true, lost, came = truth.trades[instrument], truth.lost[instrument], account.came
    start = max(true, default=0) // COUNT * COUNT
    numbers = sorted(number for number in true if number >= max(start, truth.owed.get(topic, math.inf)))
    # The first ones of all, of which the exchange itself has nothing any more, nothing can show.
    return set(dropwhile(lambda number: number in lost and number not in came, numbers)) - truth.waived[topic]


def show_runs(numbers: Iterable[int]) -> str:
    """Numbers as runs: 1-3 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(f"{a}-{b}" if a != b else f"{a}" for a, b in runs)


def describe_message(received: Received) -> dict[str, Any]:
    """One message for people: its topic and what matters of its payload."""
    payload = read_message(received.topic, received.payload).payload
    short = {k: v for k, v in payload.items() if k not in ("exchange", "bids", "asks", "instrument", "price", "amount")}
    return {"topic": received.topic.decode(), **short}
