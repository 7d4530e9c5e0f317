"""The rules of books."""

from collections.abc import Iterator

from collector.client.orderbook import Side
from collector.client.rules.check import AHEAD, SECOND, Check, Fault, Now
from collector.client.stream import Message

_NOT_ASKED = frozenset({"closed", "expired", "refused"})


class Chain(Check):
    """One book: its chain of change ids and its levels."""

    rules = ("chain", "crossed")

    def __init__(self) -> None:
        super().__init__()
        self._change_id: int | None = None
        self._awaiting = False
        self._complete = False
        self._crossed = False
        self._left = False
        self._began: int | None = None
        self._bids, self._asks = Side(descending=True), Side(descending=False)

    def check(self, message: Message, now: Now) -> Iterator[Fault]:
        if message.seq == 1 and not message.is_join:  # of a new epoch
            self._break(awaiting=True)
        if self._began is None:
            self._began = now.steady
        if message.type == "gap" and not message.is_join:
            yield from self._take_gap(message)
        elif message.type == "status":
            self._left |= message["state"] in _NOT_ASKED
        elif message.type == "book" and message["kind"] == "delta":
            yield from self._take_delta(message)
        elif message.type == "book":
            yield from self._take_snapshot(message)

    def finish(self, now: int) -> Iterator[Fault]:
        if self._began and self._change_id is not None and not self._complete and now - self._began > AHEAD:
            yield "join", f"no snapshot in {(now - self._began) / SECOND:.1f} s, only deltas"

    def forget(self) -> None:
        self._break(awaiting=False)
        self._began = 0  # the snapshot that we got may have been among them

    def _break(self, awaiting: bool) -> None:
        self._change_id, self._awaiting, self._complete = None, awaiting, False

    def _take_gap(self, message: Message) -> Iterator[Fault]:
        said = message.get("last_change_id")
        if None not in (said, self._change_id) and said != self._change_id:
            yield "chain", f"the gap says that change {said} was the last, it was {self._change_id}"
        self._break(awaiting=True)

    def _take_delta(self, message: Message) -> Iterator[Fault]:
        before = message.get("prev_change_id")
        if self._awaiting:
            yield "chain", f"delta {message['change_id']} where a snapshot was due"
            self._break(awaiting=False)
        elif before is None:
            yield "chain", f"delta {message['change_id']} does not say which change it follows"
        elif self._change_id not in (None, before):
            yield "chain", f"delta {message['change_id']} follows {before}, the last was {self._change_id}"
            self._break(awaiting=False)
        self._change_id = message["change_id"]
        if self._complete:
            self._bids.apply(message["bids"])
            self._asks.apply(message["asks"])
            yield from self._compare_best()

    def _take_snapshot(self, message: Message) -> Iterator[Fault]:
        if message.is_join and self._change_id is not None:
            yield from self._compare_join(message)
            if self._complete:
                return
        elif "reason" not in message:
            yield "schema", "a snapshot without a reason"
        elif message["reason"] != "exchange" and self._change_id is not None and not self._left:
            yield "gap", f"a snapshot for a new subscription after change {self._change_id}, and no gap before it"
        self._left = False
        self._change_id, self._awaiting, self._complete = message["change_id"], False, True
        for side, name in ((self._bids, "bids"), (self._asks, "asks")):
            side.replace(message[name])
            if side.get_levels() != [tuple(level) for level in message[name]]:
                yield "schema", f"the {name} of a snapshot are not best first, each price once, no amount 0"
        yield from self._compare_best()

    def _compare_join(self, message: Message) -> Iterator[Fault]:
        if message["change_id"] != self._change_id:
            yield "join", f"the book at change {message['change_id']}, the stream is at {self._change_id}"
        elif self._complete and any(
            side.get_levels() != [tuple(level) for level in message[name]]
            for name, side in (("bids", self._bids), ("asks", self._asks))
        ):
            yield "join", f"the book at change {self._change_id} is not what snapshot and deltas give"

    def _compare_best(self) -> Iterator[Fault]:
        bid, ask = self._bids.best_price, self._asks.best_price
        crossed = bid is not None and ask is not None and bid >= ask
        if crossed and not self._crossed:
            yield "crossed", f"bid {bid} against ask {ask} at change {self._change_id}"
        self._crossed = crossed
