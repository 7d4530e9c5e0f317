"""The rules of the wire, checked on what a subscriber receives. No I/O, no clock.

`Verifier.check` takes the two frames of a message and returns what is wrong with it. It knows only the wire:
nothing here shares code with the worker that publishes.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from collector.client.rules import create_checks
from collector.client.rules.check import Check, Fault, Now
from collector.client.rules.heartbeats import LAST, SILENCE
from collector.client.rules.trades import Trades
from collector.client.stream import MAX_TOPICS, Message, SequenceCheck, read_envelope
from collector.messages import EXCHANGE, Topic
from collector.schema import SCHEMA, find_faults

RULES = {
    "envelope": "two frames: a topic of four parts, and a map with the seven keys that says the same",
    "schema": "each type has its keys, with values of the right kind",
    "sequence": "seq rises by one on each topic, and starts again with 1 in a new epoch",
    "epoch": "the epoch of a topic never falls, but for the last words of who fed it before",
    "join": "a join repeats what was said last, the book as it stands, and comes to whoever joins",
    "gap": "gaps have rising ids, stand between data, and before what follows a lost connection",
    "chain": "each delta follows the change before it; first, and after a gap, comes a snapshot",
    "crossed": "the best bid of a book is below its best ask",
    "duplicate": "a trade comes once, but for marked repeats after a restart",
    "hole": "trade_seq rises by one; a hole has been announced by a gap",
    "repair": "after healing, each trade of a gap has come, and is counted, or is named as missing, once",
    "time": "receive_ts does not fall on a topic, nor is it ahead; both times are in ns",
    "status": "states are words of the wire; after expired nothing comes",
    "heartbeat": "each connection says once a second that it lives",
}
"""Each rule and what it asks."""


class Finding(NamedTuple):
    """One thing that is wrong: the rule (a key of RULES), the topic, and what was seen."""

    rule: str
    topic: str
    text: str


class Verifier:
    """Checks every message of a wire against RULES, and counts. `topics` has the checks of each topic."""

    def __init__(self) -> None:
        self.messages = 0
        self.wrong: Counter[str] = Counter()
        self.topics: dict[Topic, list[Check]] = {}
        self._read = 0
        self._sequence = SequenceCheck()
        self._expected: dict[str, int] = {}

    def expect(self, connection: str, steady_ns: int) -> None:
        """From now on heartbeats of this connection should come."""
        self._expected.setdefault(connection, steady_ns)

    def check(self, *frames: bytes, now_ns: int, steady_ns: int | None = None) -> list[Finding]:
        """Check the next message, which came at `now_ns`, however many frames it has. Returns what is wrong with it.

        `steady_ns` is the same time by a clock that nobody sets; without it our own is taken for one.
        """
        self.messages += 1
        now = Now(now_ns, now_ns if steady_ns is None else steady_ns)
        try:
            message = read_envelope(*frames)
        except ValueError as error:
            return self._count(frames[0][:200].decode(errors="replace"), [("envelope", str(error))])
        return self._count(str(message.topic), self._find_faults(message, now))

    def finish(self, steady_ns: int) -> list[Finding]:
        """Say at the end what should have come and has not."""
        heard = {topic.instrument for topic in self.topics if topic.type == "heartbeat"}
        findings: list[Finding] = []
        for name, since in self._expected.items():
            if name not in heard and steady_ns - since > SILENCE:
                fault = ("heartbeat", f"none in {(steady_ns - since) / 1e9:.1f} s")
                findings += self._count(f"{EXCHANGE}.heartbeat.{name}.1s", [fault])
        for topic, checks in self.topics.items():
            for check in checks:
                findings += self._count(str(topic), check.finish(steady_ns))
        return findings

    def count_checks(self) -> Counter[str]:
        """How often each rule was put to the test."""
        counts = Counter({"envelope": self.messages} | dict.fromkeys(("schema", "sequence", "epoch"), self._read))
        for checks in self.topics.values():
            for check in checks:
                counts.update(dict.fromkeys(check.rules, check.count))
        return counts

    def count_missing(self) -> tuple[int, int]:
        """Gaps on trades that wait for their repair, and trades that stay missing: announced, so no rule is broken."""
        checks = [check for checks in self.topics.values() for check in checks if isinstance(check, Trades)]
        return sum(check.healing for check in checks), sum(check.missing for check in checks)

    def _find_faults(self, message: Message, now: Now) -> Iterator[Fault]:
        shape = SCHEMA.get(message.type)
        faults = [f"there is no type {message.type!r:.60}"] if shape is None else find_faults(message.payload, shape)
        if faults:
            yield "schema", "; ".join(faults)
        elif message.type == "status":
            self._take_status(message, now.steady)
        if message.seq == 0 and not message.is_join:
            yield "sequence", "seq 0 on a message that is no join"
        if self._sequence.is_outdated(message):
            return
        loss = self._sequence.follow(message)
        if loss is not None:
            yield "epoch" if loss.reason == "epoch" else "sequence", str(loss).partition(": ")[2]
            if loss.reason != "sequence":
                return
        if message.topic not in self.topics:
            if len(self.topics) >= MAX_TOPICS:
                yield "envelope", f"more than {MAX_TOPICS} topics"
                return
            self.topics[message.topic] = create_checks(message.topic.type)
        self._read += 1
        for check in self.topics[message.topic]:
            if loss is not None:
                check.forget()
            if not faults:
                check.count += 1
                yield from check.check(message, now)

    def _take_status(self, message: Message, now: int) -> None:
        """Whoever says something has heartbeats too, until its connection is closed or has given up."""
        name = message["connection"]
        if message["state"] not in LAST:
            self.expect(name, now)
        elif message.topic.type == "status":
            self._expected.pop(name, None)
            for check in self.topics.get(Topic(EXCHANGE, "heartbeat", name, "1s"), ()):
                check.forget()

    def _count(self, topic: str, faults: Iterable[Fault]) -> list[Finding]:
        findings = [Finding(rule, topic, text) for rule, text in faults]
        self.wrong.update(finding.rule for finding in findings)
        return findings
