"""`Subscriber` reads what a collector publishes, and sees what was lost on the way."""

import math
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Literal, Self

import zmq

from collector.client.control import Control, OwnSocket
from collector.client.questions import Questions
from collector.client.stream import (
    MAX_PAYLOAD,
    Loss,
    LossError,
    Message,
    SequenceCheck,
    describe_malformed,
    read_message,
)
from collector.messages import ControlError, Topic, decode_reply, list_names

FIND_EVERY = 2.0
"""Seconds between two questions for connections that have been added or have moved."""

LOOK_EVERY = 0.1
"""Seconds between two looks for the answer; also between it and the next question while no connection is known."""

HEED_EVERY = 1.0
"""Seconds after which waiting is left for a moment: a signal that has come just before it, or to another thread, does
not end it.
"""

UNNAMED = 10.0
"""Seconds after which an endpoint that the collector names no more is left. One that is soon back is kept."""


class Subscriber(OwnSocket):
    """Yields Messages from one or more publishing endpoints, and watches that none is lost on the way.

    `endpoints`: one or several; None finds them, also those that come later, by asking the collector at `control`
    (an endpoint; None is the default one), and keeps them in `found` by the connection's name; `timeout`: seconds that
    it gets for the first answer. `prefixes`: of the topics to read, e.g. "deribit.book.BTC-PERPETUAL.". `on_loss`:
    "raise" raises LossError where messages were dropped on the way to this reader, cannot be read, or may be missing
    because their topic is fed anew; "report" yields the Loss in its place. After dropped ones the current full message
    of their topic comes, as for a late subscriber. `queue`: messages that may wait here for a slow reader. For one
    thread only: to end it from another one, let it `receive(0.5)` until a threading.Event is set.

        with Subscriber(prefixes=["deribit.trade."], on_loss="report") as subscriber:
            for item in subscriber:
                if isinstance(item, Loss):
                    print("lost:", item)
                elif item.type == "trade":  # gap, repair and status come on the same topics
                    print(item.instrument, item["price"])
    """

    _finder: Control | None = None

    def __init__(
        self,
        endpoints: str | Iterable[str] | None = None,
        prefixes: str | Topic | Iterable[str | Topic] = ("",),
        control: str | None = None,
        on_loss: Literal["raise", "report"] = "raise",
        queue: int = 100_000,
        timeout: float = 5.0,
    ) -> None:
        super().__init__(zmq.SUB)
        if on_loss not in ("raise", "report"):
            raise ValueError(f"on_loss={on_loss!r}: write raise or report")
        if not isinstance(queue, int) or not 0 <= queue < 1 << 31:
            raise ValueError(f"queue={queue!r}: give a number of messages, 0 for any number")
        self.endpoints: set[str] = set()
        self.found: dict[str, str] = {}
        self.lifeless: set[str] = set()  # those of them that had no worker when it was asked
        self._prefixes: list[str] = []
        self._unnamed: dict[str, float] = {}  # since when
        self._raises = on_loss == "raise"
        self._sequence = SequenceCheck(time.time_ns)
        self._waiting: deque[Message] = deque()
        self._questions = Questions()
        self._look_at = 0.0
        self._ask_at = 0.0
        self.socket.setsockopt(zmq.RCVHWM, queue)
        self.socket.setsockopt(zmq.SNDHWM, 0)  # subscriptions are queued like messages, and dropped like them
        self.socket.setsockopt(zmq.RECONNECT_IVL, 20)  # a restarted worker waits half a second for us
        self.socket.setsockopt(zmq.MAXMSGSIZE, 2 * MAX_PAYLOAD)
        for prefix in [prefixes] if isinstance(prefixes, str | bytes | Topic) else prefixes:
            self.subscribe(prefix)
        if endpoints is None:
            self._finder = Control(control, timeout)
            self._find(self._finder.get_state())
            self._hang_up(self._finder)
        else:
            self._connect(list_names(endpoints))

    def subscribe(self, prefix: str | Topic) -> None:
        """Read the topics that begin so, too; what each holds now comes first, as for any late subscriber."""
        text = str(prefix) if isinstance(prefix, Topic) else prefix
        if not isinstance(text, str):
            raise TypeError(f"a prefix is text or a Topic, not {text!r}")
        self.socket.subscribe(text)
        self._prefixes.append(text)
        self._sequence.note_asked()

    def unsubscribe(self, prefix: str | Topic) -> None:
        """Take back one subscription to a prefix; what has come for it and was not read is dropped.

        Raises ValueError if there is none.
        """
        text = str(prefix) if isinstance(prefix, Topic) else prefix
        if text not in self._prefixes:
            raise ValueError(f"{text!r} is no prefix that is subscribed to")
        self._prefixes.remove(text)
        self.socket.unsubscribe(text)
        for topic in self._sequence.forget_all_but(self._prefixes):
            self._questions.settle(topic)
        self._waiting = deque(each for each in self._waiting if str(each.topic).startswith(tuple(self._prefixes)))

    def _connect(self, endpoints: Iterable[str]) -> None:
        for endpoint in sorted(set(endpoints) - self.endpoints):
            self._connect_socket(endpoint)
            self.endpoints.add(endpoint)
            self._sequence.note_asked()

    def _find(self, states: Any) -> None:
        self.found = find_endpoints(states)
        self.lifeless = {name for name in self.found if states[name].get("pid", "unsaid") is None}
        self._connect(self.found.values())
        now, gone = time.monotonic(), self.endpoints.difference(self.found.values())
        self._unnamed = {endpoint: self._unnamed.get(endpoint, now) for endpoint in gone}

    def _leave_unnamed(self) -> None:
        """Who published there has moved, or ended: whoever binds such a port next is a stranger.

        Only while nothing waits: it would be lost, and libzmq aborts amid a message.
        """
        before = time.monotonic() - UNNAMED
        for endpoint in [endpoint for endpoint, since in self._unnamed.items() if since <= before]:
            self.socket.disconnect(endpoint)
            self.endpoints.remove(endpoint)
            del self._unnamed[endpoint]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Message | Loss:
        while (item := self.receive()) is None:  # a generator would be at its end after the first LossError
            pass
        return item

    def receive(self, timeout: float | None = None) -> Message | Loss | None:
        """The next message (or loss), or None if none comes within `timeout` seconds (None: wait for ever)."""
        if self._waiting:
            return self._waiting.popleft()
        end = time.monotonic() + (math.inf if timeout is None else timeout)
        while True:
            frames = self.receive_frames(end - time.monotonic())
            if frames is None:
                return None
            item = self._take(frames)
            if item is not None:
                return item

    def _take(self, frames: list[bytes]) -> Message | Loss | None:
        """What came as these frames; None for what says nothing any more. Raises LossError."""
        try:
            message = read_message(*frames)
        except ValueError as error:
            return self._report(describe_malformed(frames[0], error))
        if self._sequence.is_outdated(message):
            return None
        is_anew = self._sequence.is_anew(message)
        loss = self._sequence.follow(message)
        is_lost = loss is not None and loss.reason == "sequence"
        if message.is_join:
            self._questions.settle(message.topic)
        elif (is_lost or message.topic in self._questions.unanswered) and message.topic.type != "heartbeat":
            self.ask_again(message.topic)  # heartbeats are not said again
        if is_anew:
            detail = "it is fed anew, and no gap says what is missing before this"
            loss, is_lost = Loss(message.topic, "anew", message.epoch, detail=detail), True
        if loss is None:
            return message
        if is_lost:
            self._waiting.append(message)
        return self._report(loss)

    def ask_again(self, topic: Topic) -> None:
        """Have the current full message of a topic said again, as this does by itself after a loss that it sees.

        For an OrderBook that waits for a snapshot. Ask as often as you like: what was asked for a moment ago is not
        asked for again before a second is over, or more (see Questions).
        """
        if not isinstance(topic, Topic):  # an OrderBook that has heard nothing knows none yet
            raise TypeError(f"{topic!r} is no Topic")
        if self._questions.want(topic, time.monotonic()):
            # A publisher answers each subscription, also one that is taken back at once. Kept, they would pile up.
            self.socket.subscribe(str(topic))
            self.socket.unsubscribe(str(topic))

    def _ask_put_off(self) -> None:
        for topic in self._questions.list_due(time.monotonic()):
            self.ask_again(topic)

    def _report(self, loss: Loss) -> Loss:
        if self._raises:
            raise LossError(loss)
        return loss

    def receive_frames(self, timeout: float) -> list[bytes] | None:
        """The frames of the next message, unread and unchecked, or None if none comes within `timeout` seconds."""
        end = time.monotonic() + timeout
        while True:
            self._find_more()
            try:
                return self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                # Both rarely; this is the way of each message that comes alone.
                if self._unnamed:
                    self._leave_unnamed()
                if self._questions.put_off:
                    self._ask_put_off()
            longest = LOOK_EVERY if self._finder is not None or self._questions.put_off else HEED_EVERY
            rest = min(end - time.monotonic(), longest)
            if rest <= 0:
                return None
            self.socket.poll(max(1, int(rest * 1000)))

    def _find_more(self) -> None:
        """Ask for endpoints now and then, without ever waiting for the answer; a collector that is away may return."""
        now = time.monotonic()
        if self._finder is None or now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY
        try:
            if self._finder.socket.poll(0):
                reply = self._finder.socket.recv(zmq.NOBLOCK)  # a late answer to a former question is passed over
                self._hang_up(self._finder)
                self._find(decode_reply(reply))
                if not self.found:
                    self._ask_at = now
            elif now >= self._ask_at:
                self._ask_at = now + FIND_EVERY
                self._hang_up(self._finder)  # questions would pile up where nobody takes them
                self._finder.socket.connect(self._finder.endpoint)
                self._finder.send_request("get_state")
        except (ControlError, ValueError, zmq.Again):
            pass  # it is asked again

    def _hang_up(self, finder: Control) -> None:
        """Hold no connection until the next question: a supervisor without a descriptor left is aborted by libzmq."""
        with suppress(zmq.ZMQError):  # it is not connected
            finder.socket.disconnect(finder.endpoint)
            # libzmq's own thread has a word on this, and ends it once the socket has taken that in.
            zmq.zmq_poll([(finder.socket.fileno(), zmq.POLLIN)], int(LOOK_EVERY * 1000))
            finder.socket.poll(0)

    def disconnect(self) -> None:
        """Leave all endpoints. The end of a `with` block does the same."""
        super().disconnect()
        if self._finder is not None:
            self._finder.disconnect()


def find_endpoints(states: Any) -> dict[str, str]:
    """Where each connection publishes, by name, from what get_state returns for all of them. Raises ValueError."""
    if not isinstance(states, dict):
        raise ValueError(f"the connections are a {type(states).__name__}, not a map: this is no collector")
    found = {name: state.get("publish") for name, state in states.items() if isinstance(state, dict)}
    # A port that the system chooses is `*` until the worker has bound it.
    return {name: end for name, end in found.items() if isinstance(end, str) and end and not end.endswith(":*")}
