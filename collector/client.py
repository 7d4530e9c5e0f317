"""For Python programs: `Control` asks a running collector, `Subscriber` reads what it publishes."""

import errno
import os
import socket
import time
from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Literal, Self

import zmq

from collector.messages import ControlError, decode_reply, encode
from collector.stream import MAX_PAYLOAD, Loss, LossError, Message, SequenceCheck, describe_malformed, read_message

MAX_REPLY = 64 << 20
"""Bytes of a control reply that are taken."""

GRACE = 0.5
"""Seconds that a reply may come after the deadline: the collector's own word on a timeout says more than ours."""

FIND_EVERY = 2.0
"""Seconds between two questions for connections that have been added or have moved."""

LOOK_EVERY = 0.1
"""Seconds between two looks for the answer; also between two questions while no connection is known."""


class _Socket:
    """One ZeroMQ socket in a context of its own, so that closing it leaves nothing behind."""

    def __init__(self, kind: int) -> None:
        self._context = zmq.Context()
        self.socket: zmq.Socket[bytes] = self._context.socket(kind)
        self.socket.setsockopt(zmq.LINGER, 0)

    def disconnect(self) -> None:
        """Leave; the collector goes on. The end of a `with` block does the same."""
        self._context.destroy(linger=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.disconnect()


class Control(_Socket):
    """Asks a running collector; each method waits for the answer, or raises ControlError (see messages.CODES).

    `endpoint`: the control endpoint; None is COLLECTOR_CONTROL, else the default one. `timeout`: seconds for each
    request, sent along as its deadline: what the collector has not done by then it will not do. After a timeout the
    same object can be used again.
    """

    def __init__(self, endpoint: str | None = None, timeout: float = 5.0) -> None:
        super().__init__(zmq.REQ)
        self.endpoint = endpoint or find_control()
        self.timeout = timeout
        # A lost reply must not block the next request, and a late one must not be taken for its answer.
        self.socket.setsockopt(zmq.REQ_RELAXED, 1)
        self.socket.setsockopt(zmq.REQ_CORRELATE, 1)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_REPLY)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        try:
            self.socket.connect(self.endpoint)
        except zmq.ZMQError as error:
            self.disconnect()
            raise ValueError(
                f"{self.endpoint!r} is no endpoint ({error}); write ipc:///path or tcp://host:port"
            ) from None

    def connect(self, table: dict[str, Any]) -> dict[str, Any]:
        """Add a connection: a table as in the configuration file. Returns its state, once it is live."""
        return self._ask_map("connect", connection=table)

    def subscribe(self, name: str, channels: Iterable[str]) -> dict[str, Any]:
        """Ask for channels. Returns {"channels": {channel: True, or {"code", "message"}}}."""
        return self._ask_map("subscribe", connection=name, channels=list(channels))

    def unsubscribe(self, name: str, channels: Iterable[str]) -> dict[str, Any]:
        """Give channels up. Returns the same as subscribe."""
        return self._ask_map("unsubscribe", connection=name, channels=list(channels))

    def send(self, name: str, method: str, params: dict[str, Any] | None = None) -> Any:
        """Send one request to the exchange; returns its result, raw. Its own error is in ControlError.data."""
        return self.ask("send", connection=name, method=method, params=params)

    def close(self, name: str) -> dict[str, Any]:
        """End a connection for good; returns its final state."""
        return self._ask_map("close", connection=name)

    def get_state(self, name: str | None = None) -> dict[str, Any]:
        """The state of one connection, or {name: state} of all."""
        return self._ask_map("get_state", **({"connection": name} if name else {}))

    def ask(self, op: str, **arguments: Any) -> Any:
        """Send one request and wait for its result."""
        check_listener(self.endpoint)
        self.send_request(op, **arguments)
        if not self.socket.poll(int((self.timeout + GRACE) * 1000)):
            raise ControlError("timeout", self._explain_silence())
        return decode_reply(self.socket.recv(), MAX_REPLY)

    def _ask_map(self, op: str, **arguments: Any) -> dict[str, Any]:
        result = self.ask(op, **arguments)
        if not isinstance(result, dict):
            raise ControlError("internal", f"{self.endpoint} answered {op} with a {type(result).__name__}, not a map")
        return result

    def send_request(self, op: str, **arguments: Any) -> None:
        """Send a request without waiting; it replaces one that is still unanswered."""
        given = {key: value for key, value in arguments.items() if value is not None}
        deadline = time.time_ns() + int(self.timeout * 1e9)
        try:
            self.socket.send(encode({"op": op, **given, "deadline": deadline}), zmq.NOBLOCK)
        except zmq.Again:
            raise ControlError("timeout", self._explain_silence()) from None

    def _explain_silence(self) -> str:
        return (
            f"nobody answered at {self.endpoint} within {self.timeout:g} s; is a collector running there, and is it "
            "not stopped? (collector run FILE; --control or COLLECTOR_CONTROL names another endpoint)"
        )


def find_control() -> str:
    """The control endpoint that is asked unless one is given."""
    given = os.environ.get("COLLECTOR_CONTROL")
    if given:
        return given
    from collector.config import default_control  # only where it is needed: it takes longer than the request

    return default_control(os.environ)


def check_listener(endpoint: str) -> None:
    """Raise ControlError at once where it is sure that nobody listens on an ipc endpoint: ZeroMQ would only wait."""
    path = endpoint.removeprefix("ipc://")
    if path == endpoint or path.startswith("@"):
        return
    reasons = {
        errno.ENOENT: "there is no such socket file",
        errno.ECONNREFUSED: "its socket file was left behind by one that is gone",
        errno.EACCES: "its socket file belongs to another user",
    }
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            if error.errno not in reasons:
                return  # ZeroMQ will say it, or wait
            raise ControlError(
                "timeout",
                f"no collector answers at {endpoint}: {reasons[error.errno]}; "
                "start one (collector run FILE), or name its endpoint (--control or COLLECTOR_CONTROL)",
            ) from None


class Subscriber(_Socket):
    """Yields Messages from one or more publishing endpoints, and watches that none is lost on the way.

    `endpoints`: one or several; None finds them, also those that come later, by asking the collector at `control`
    (an endpoint; None is the default one), and keeps them in `found` by the connection's name; `timeout`: seconds that
    it gets for the first answer. `prefixes`: of the topics to read, e.g. "deribit.book.BTC-PERPETUAL.". `on_loss`:
    "raise" raises LossError where messages were dropped on the way to this reader or cannot be read; "report" yields
    the Loss in its place. `queue`: messages that may wait here for a slow reader.

        with Subscriber(prefixes=["deribit.trade."]) as subscriber:
            for message in subscriber:
                print(message.instrument, message["price"])
    """

    def __init__(
        self,
        endpoints: str | Iterable[str] | None = None,
        prefixes: str | Iterable[str] = ("",),
        control: str | None = None,
        on_loss: Literal["raise", "report"] = "raise",
        queue: int = 100_000,
        timeout: float = 5.0,
    ) -> None:
        super().__init__(zmq.SUB)
        self.endpoints: set[str] = set()
        self.found: dict[str, str] = {}
        self._raises = on_loss == "raise"
        self._sequence = SequenceCheck()
        self._waiting: deque[Message] = deque()
        self._finder: Control | None = None
        self._look_at = 0.0
        self._ask_at = 0.0
        self.socket.setsockopt(zmq.RCVHWM, queue)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 20)  # a restarted worker waits half a second for us
        self.socket.setsockopt(zmq.MAXMSGSIZE, 2 * MAX_PAYLOAD)
        for prefix in [prefixes] if isinstance(prefixes, str) else prefixes:
            self.socket.setsockopt(zmq.SUBSCRIBE, prefix.encode())
        if endpoints is None:
            self._finder = Control(control, timeout)
            self._find(self._finder.get_state())
        else:
            self._connect([endpoints] if isinstance(endpoints, str) else endpoints)

    def _connect(self, endpoints: Iterable[str]) -> None:
        for endpoint in sorted(set(endpoints) - self.endpoints):
            try:
                self.socket.connect(endpoint)
            except zmq.ZMQError as error:
                raise ValueError(
                    f"{endpoint!r} is no endpoint ({error}); write ipc:///path or tcp://host:port"
                ) from None
            self.endpoints.add(endpoint)

    def _find(self, states: dict[str, Any]) -> None:
        self.found = find_endpoints(states)
        self._connect(self.found.values())

    def __iter__(self) -> Iterator[Message | Loss]:
        while True:
            item = self.receive()
            if item is not None:
                yield item

    def receive(self, timeout: float | None = None) -> Message | Loss | None:
        """The next message (or loss), or None if none comes within `timeout` seconds (None: wait for ever)."""
        if self._waiting:
            return self._waiting.popleft()
        frames = self.receive_frames(timeout)
        if frames is None:
            return None
        try:
            message = read_message(*_expect_two(frames))
        except ValueError as error:
            return self._report(describe_malformed(frames[0], error))
        loss = self._sequence.follow(message)
        if loss is None:
            return message
        if loss.reason == "sequence":
            self._waiting.append(message)
        return self._report(loss)

    def _report(self, loss: Loss) -> Loss:
        if self._raises:
            raise LossError(loss)
        return loss

    def receive_frames(self, timeout: float | None = None) -> list[bytes] | None:
        """The frames of the next message, unread and unchecked, or None if none comes within `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            self._find_more()
            try:
                return self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                pass
            longest = 3600.0 if self._finder is None else LOOK_EVERY
            rest = longest if end is None else min(end - time.monotonic(), longest)
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
                self._find(decode_reply(self._finder.socket.recv(), MAX_REPLY))
            elif now >= self._ask_at:
                self._finder.send_request("get_state")
                self._ask_at = now + (FIND_EVERY if self.found else LOOK_EVERY)
        except (ControlError, ValueError):
            pass  # it is asked again

    def disconnect(self) -> None:
        """Leave all endpoints. The end of a `with` block does the same."""
        super().disconnect()
        if self._finder is not None:
            self._finder.disconnect()


def _expect_two(frames: list[bytes]) -> list[bytes]:
    if len(frames) != 2:
        raise ValueError(f"{len(frames)} frames instead of topic and payload")
    return frames


def find_endpoints(states: dict[str, Any]) -> dict[str, str]:
    """Where each connection publishes, by name, from what get_state returns for all of them."""
    found = {name: state.get("publish") for name, state in states.items() if isinstance(state, dict)}
    return {name: endpoint for name, endpoint in found.items() if isinstance(endpoint, str) and endpoint}
