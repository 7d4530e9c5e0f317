"""`Control` asks a running collector."""

import errno
import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn, Self, cast

import zmq

from collector.defaults import default_control
from collector.messages import MAX_REPLY, ControlError, decode_reply, encode, list_names

GRACE = 0.5
"""Seconds that a reply may come after the deadline: the collector's own word on a timeout says more than ours."""


class NobodyAnswers(ControlError):
    """No collector had a word on it: the error is ours, and its code, `timeout`, none of a collector's."""

    def __init__(self, message: str) -> None:
        super().__init__("timeout", message)
        self.args = (message,)

    def __str__(self) -> str:
        return self.message


class _Disconnected:
    """Stands in the place of a socket that was closed, whose own errors do not say as much."""

    def __getattr__(self, name: str) -> NoReturn:
        raise zmq.ZMQError(errno.ENOTSOCK, "it was disconnected; make a new one")


class OwnSocket:
    """One ZeroMQ socket in a context of its own, so that closing it leaves nothing behind. For one thread only."""

    def __init__(self, kind: int) -> None:
        self._context = zmq.Context()
        self.socket: zmq.Socket[bytes] = self._context.socket(kind)
        self.socket.setsockopt(zmq.LINGER, 0)

    def _connect_socket(self, endpoint: str) -> None:
        port = endpoint.rpartition(":")[2]
        try:
            if endpoint.startswith("tcp://") and port.isdecimal() and not 0 < int(port[:6]) < 65536:
                raise zmq.ZMQError(errno.EINVAL, "there is no such port")  # libzmq would wait for it for ever
            self.socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise ValueError(f"{endpoint!r} is no endpoint ({error}); write ipc:///path or tcp://host:port") from None

    def disconnect(self) -> None:
        """Leave; the collector goes on. The end of a `with` block does the same."""
        if self._context.closed:
            return
        self.socket.close()  # while garbage is collected the context knows of it no more, and would wait for it
        self._context.destroy(linger=0)
        self.socket = cast(Any, _Disconnected())

    def __del__(self) -> None:
        if hasattr(self, "socket"):  # else it was never made
            self.disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.disconnect()


class Control(OwnSocket):
    """Asks a running collector; each method waits for the answer, or raises ControlError (see messages.CODES).

    `endpoint`: the control endpoint; None is COLLECTOR_CONTROL, else the default one. `timeout`: seconds for each
    request, sent along as its deadline. What the collector has not begun by then it will not do; what it has begun goes
    on: a connection is still brought up, or closed. Channels that were asked for or given up stay so. After a timeout
    the same object can be used again. For one thread only.
    """

    def __init__(self, endpoint: str | None = None, timeout: float = 5.0) -> None:
        if not isinstance(timeout, int | float) or not 0 < timeout < 1e9:
            raise ValueError(f"timeout={timeout!r}: give seconds, for example 5.0")
        super().__init__(zmq.REQ)
        self.endpoint = endpoint or default_control(os.environ)
        self.timeout = timeout
        # A lost reply must not block the next request, and a late one must not be taken for its answer.
        self.socket.setsockopt(zmq.REQ_RELAXED, 1)
        self.socket.setsockopt(zmq.REQ_CORRELATE, 1)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_REPLY)
        self._connect_socket(self.endpoint)

    def connect(self, table: dict[str, Any]) -> dict[str, Any]:
        """Add a connection: a table as in the configuration file. Returns its state, once it is live."""
        return self._ask_map("connect", connection=table)

    def subscribe(self, name: str, channels: str | Iterable[str]) -> dict[str, Any]:
        """Ask for one or more channels. Returns {"channels": {channel: True, or {"code", "message"}}}."""
        return self._ask_map("subscribe", connection=name, channels=list_names(channels))

    def unsubscribe(self, name: str, channels: str | Iterable[str]) -> dict[str, Any]:
        """Give up channels. Returns the same as subscribe."""
        return self._ask_map("unsubscribe", connection=name, channels=list_names(channels))

    def send(self, name: str, method: str, params: dict[str, Any] | None = None) -> Any:
        """Send one request to the exchange; returns its result, raw. Its own error is in ControlError.data."""
        return self.ask("send", connection=name, method=method, params=params)

    def close(self, name: str) -> dict[str, Any]:
        """End a connection for good; returns its final state."""
        return self._ask_map("close", connection=name)

    def get_state(self, name: str | None = None) -> dict[str, Any]:
        """The state of one connection, or {name: state} of all."""
        return self._ask_map("get_state", connection=name)

    def ask(self, op: str, **arguments: Any) -> Any:
        """Send one request and wait for its result."""
        check_listener(self.endpoint)
        self.send_request(op, **arguments)
        end = time.monotonic() + self.timeout + GRACE
        while self.socket.poll(max(0, int((end - time.monotonic()) * 1000))):
            with suppress(zmq.Again):  # a late answer to a former request is passed over
                return decode_reply(self.socket.recv(zmq.NOBLOCK))
        raise NobodyAnswers(
            f"nobody answered at {self.endpoint} within {self.timeout:g} s; is a collector running there, and is it "
            "not stopped? (collector run FILE; --control or COLLECTOR_CONTROL names another endpoint)"
        )

    def _ask_map(self, op: str, **arguments: Any) -> dict[str, Any]:
        result = self.ask(op, **arguments)
        if not isinstance(result, dict):
            raise ControlError("internal", f"{self.endpoint} answered {op} with a {type(result).__name__}, not a map")
        return result

    def send_request(self, op: str, **arguments: Any) -> None:
        """Send a request without waiting; it replaces one that is still unanswered.

        Raises ValueError for arguments that MessagePack cannot hold: dates, integers of more than 64 bits.
        """
        given = {key: value for key, value in arguments.items() if value is not None}
        deadline = time.time_ns() + int(self.timeout * 1e9)
        try:
            request = encode({"op": op, **given, "deadline": deadline})
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"{op}: this cannot be sent: {error}") from None
        with suppress(zmq.Again):  # as many wait as may: nobody takes any, and none is answered
            self.socket.send(request, zmq.NOBLOCK)


def check_listener(endpoint: str) -> None:
    """Raise NobodyAnswers at once where it is sure that nobody listens on an ipc endpoint: ZeroMQ would only wait."""
    path = endpoint.removeprefix("ipc://")
    if path == endpoint:
        return
    reasons = {
        errno.ENOENT: "no collector runs at {}: there is no such socket file",
        errno.ECONNREFUSED: "no collector runs at {}: it is no socket, or was left behind by one that is gone",
        errno.EACCES: "no collector can be asked at {}: the socket file, or its directory, is closed to you",
    }
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # a collector that is stopped answers nobody once its queue is full
        try:
            probe.connect(path)
        except OSError as error:
            if error.errno not in reasons:
                return  # ZeroMQ will say it, or wait
            advice = "start one (collector run FILE), or name its endpoint (--control or COLLECTOR_CONTROL)"
            raise NobodyAnswers(f"{reasons[error.errno].format(endpoint)}; {advice}") from None
