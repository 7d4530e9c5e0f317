"""The judge: what one subscriber received, against what really happened on the exchange."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from collector.client.orderbook import OrderBook
from collector.client.stream import Message, read_message
from collector.client.verify import Verifier

Levels = tuple[tuple[tuple[float, float], ...], tuple[tuple[float, float], ...]]
"""Bids and asks, best first."""

AFTER_REPAIR = "a repair"


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

    `trades`: by instrument, by trade_seq. `owed`: by topic of trades, the first trade_seq that must have come or be
    named as missing; `waived`: those that need not, since nothing that came later could have shown them. `lost`: those
    that the exchange does not have any more; only they may be named. `books`: by topic, the levels at each change_id.
    `final`: by topic, the change_ids at which a book may end. `allowed`: rules of the verifier that faults break.
    """

    def __init__(self) -> None:
        self.trades: dict[str, dict[int, Traded]] = defaultdict(dict)
        self.owed: dict[str, int] = {}
        self.waived: dict[str, set[int]] = defaultdict(set)
        self.lost: dict[str, set[int]] = defaultdict(set)
        self.books: dict[str, dict[int, Levels]] = defaultdict(dict)
        self.final: dict[str, set[int]] = {}
        self.allowed: set[str] = set()


def judge(record: list[Received], truth: Truth, is_whole: bool = True) -> Iterator[str]:
    """What is wrong with what was received. `is_whole`: from the first message on, not as a late subscriber."""
    verifier = Verifier()
    topics: dict[str, list[Message]] = defaultdict(list)
    for topic, payload, at in record:
        for finding in verifier.check(topic, payload, at):
            if finding.rule not in truth.allowed:
                yield f"{finding.rule}: {finding.topic}: {finding.text}"
        topics[topic.decode()].append(read_message(topic, payload))
    for topic in sorted(topics.keys() | truth.final.keys()):
        kind = topic.split(".")[1]
        if kind == "book":
            yield from judge_book(topic, topics[topic], truth)
        elif kind == "trade" and is_whole:
            yield from judge_trades(topic, topics[topic], truth)
    for topic in sorted(truth.owed.keys() - topics.keys() if is_whole else ()):
        yield from judge_trades(topic, [], truth)


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
    """What one topic of trades said."""

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.epoch = 0
        self.reborn = False
        self.came: dict[int, int] = {}
        self.named: set[int] = set()
        self.gaps: dict[tuple[int, int], Message] = {}
        self.repairs: Counter[tuple[int, int]] = Counter()

    def take(self, message: Message, true: dict[int, Traded]) -> Iterator[str]:
        """Take the next message; say what is wrong with it."""
        if message.epoch != self.epoch:
            self.epoch, self.reborn = message.epoch, False
        if message.type == "gap" and not message.is_join:
            self.gaps[message.epoch, message["id"]] = message
            self.reborn = self.reborn or message["reason"] == "restart"
        elif message.type == "repair":
            yield from self._take_repair(message)
        elif message.type == "trade":
            yield from self._take_trade(message, true)

    def _take_repair(self, message: Message) -> Iterator[str]:
        key = message.epoch, message["gap"]
        gap = self.gaps.get(key)
        self.repairs[key] += 1
        if gap is None or not gap.get("healing"):
            yield f"repair: {self.topic}: of gap {message['gap']}, which was not announced as healing"
        for first, last in message["missing"]:
            run = set(range(first, last + 1))
            if came := [seq for seq in sorted(run) if self.came.get(seq) == message.epoch]:
                yield f"repair: {self.topic}: names {show_runs(came)}, which came"
            self.named |= run

    def _take_trade(self, message: Message, true: dict[int, Traded]) -> Iterator[str]:
        seq = message["trade_seq"]
        said = Traded(message["trade_id"], message["price"], message["amount"], message["side"])
        if true.get(seq) != said:
            yield f"trade: {self.topic}: {seq} is {said}, it was {true.get(seq)}"
        if seq in self.came and not (message.get("backfilled") and self.reborn and self.came[seq] < message.epoch):
            yield f"trade: {self.topic}: {seq} comes twice"
        if seq in self.named and not message.get("backfilled"):
            yield f"trade: {self.topic}: {seq} comes after a repair named it as missing"
        self.came[seq] = message.epoch


def judge_trades(topic: str, messages: list[Message], truth: Truth) -> Iterator[str]:
    """Whether received and named as missing together are what was sent, exactly."""
    instrument = topic.split(".")[2]
    true, account = truth.trades[instrument], Account(topic)
    for message in messages:
        yield from account.take(message, true)
    for (epoch, number), gap in account.gaps.items():
        repairs, is_last = account.repairs[epoch, number], epoch == account.epoch
        if gap.get("healing") and repairs != 1 and (is_last or repairs):
            yield f"repair: {topic}: {repairs} repairs of gap {number}"
    owed = truth.owed.get(topic)
    if owed is None:
        return
    while owed in truth.lost[instrument] and owed not in account.came:
        owed += 1  # the first ones of all, of which the exchange itself has nothing any more
    expected = {seq for seq in true if seq >= owed} - truth.waived[topic]
    if silent := expected - account.came.keys() - account.named:
        yield f"trade: {topic}: never came and not named: {show_runs(silent)} of {owed} to {max(expected)}"
    if idle := account.named - truth.lost[instrument] - account.came.keys():
        yield f"trade: {topic}: named as missing though the exchange has them: {show_runs(idle)}"


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
