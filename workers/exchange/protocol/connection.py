"""One WebSocket connection: what comes in becomes answers and frames in its outbox.

No I/O: the server moves the bytes.
"""

from collections import Counter, deque
from copy import copy
from random import Random
from typing import Any, NamedTuple, Protocol

from collector.faults import EXCHANGE_FAULTS, FOREVER, Faults
from workers.exchange.channels.hub import Frame
from workers.exchange.exchange import Counts, Exchange, find_failure
from workers.exchange.market.market import MAX_BEHIND
from workers.exchange.protocol.distort import Distortion, distort_envelope, make_nonsense
from workers.exchange.protocol.lateness import Lateness
from workers.exchange.protocol.rpc import (
    NO_ID,
    Call,
    RpcError,
    encode_answer,
    encode_heartbeat,
    encode_notification,
    read_call,
    refuse_param,
)
from workers.exchange.protocol.session import IDLE, Credits, Session
from workers.exchange.protocol.socket_methods import Context, carry_out, end_session

TEXT, BINARY, CLOSE = 1, 2, 8
MAX_WAITING = 32 << 20
"""Bytes that may wait for a client that does not read; more and it is cut."""

LAST_WORDS = 5.0
"""Seconds that a client gets to read what comes before a close frame."""

_NONSENSE = ("garbage", "bad_json", "deep_json", "odd_json")


class Outgoing(NamedTuple):
    """One frame to send, not before `due` (seconds). Of CLOSE the payload is the reason and `code` the code."""

    due: float
    opcode: int
    payload: bytes
    code: int = 0


class Transport(Protocol):
    """What the server does for a connection."""

    def wake(self) -> None:
        """There is something in the outbox."""

    def cut(self, reset: bool) -> None:
        """End the TCP connection now, without a close frame; `reset` with RST."""


class Connection:
    """The exchange's side of one socket. Times are seconds since 1970, or of its `age`: since it was opened."""

    def __init__(self, exchange: Exchange, faults: Faults, transport: Transport, now: float, address: str) -> None:
        exchange.opened += 1
        self._exchange, self._transport = exchange, transport
        self._faults = faults = copy(faults)  # which ends for this connection alone
        self._is_sound = not faults.keys() - {fault.name for fault in EXCHANGE_FAULTS}
        self.session = Session(exchange.opened)
        self.outbox: deque[Outgoing] = deque()
        self.waiting = 0
        self.silent = False
        self._now, self._age, self._cut_at = now, 0.0, FOREVER
        self.address = address
        self._limit = faults.number("credits") if "credits" in faults else None
        self._own = Credits(now, self._limit) if exchange.settings.own_credits else None
        self.delay = faults.number("delay") / 1000.0
        self._rng = Random(int(faults.number("seed", exchange.settings.seed * 1000 + self.session.number)))
        self._distortion = Distortion(faults, self._rng, self._report)
        self._lateness = Lateness(faults)
        self._counts: Counts = Counter()
        self._done: set[str] = set()
        self._periodic = {name: faults.number(name) for name in _NONSENSE if name in faults}
        self._flooded = 0.0
        self._note("opened", faults=faults.text)

    # Out

    def deliver(self, frame: Frame) -> None:
        """Take a data frame for the client."""
        if self.session.ended or self._is_mute(frame.channel):
            return
        label = self.session.subscriptions.get(frame.channel)
        if label is not None and not frame.recorded:
            frame = Frame(frame.channel, frame.data, frame.feed, label=label)
        if self._is_sound:  # most are: the way through all faults costs half as much again
            return self._send(frame.text)
        for text in self._distortion.apply(frame):
            self._send_data(text)

    def _is_mute(self, channel: str) -> bool:
        return any(s.text in ("*", channel) and self._age >= s.at for s in self._faults.all("mute"))

    def has_begun(self, name: str) -> bool:
        """Whether the time has come for a fault that begins so many SECONDS after opening."""
        return self._age >= self._faults.number(name, FOREVER)

    def _send_data(self, text: bytes) -> None:
        self._lateness.hold(text, self._age)
        self._release(self._age)
        self._bound_waiting()

    def _release(self, until: float) -> None:
        for text in self._lateness.take_due(until):
            self._send(text)

    def _say(self, text: bytes) -> None:
        self._send(distort_envelope(text, self._faults))

    def _send(self, payload: bytes, opcode: int = TEXT, code: int = 0) -> None:
        if self.silent or self.session.ended:
            return
        self.waiting += len(payload)
        self.outbox.append(Outgoing(self._now + self.delay, opcode, payload, code))
        self.session.last_sent = self._age
        self._transport.wake()
        self._bound_waiting()

    def _bound_waiting(self) -> None:
        if self.waiting + self._lateness.size > self._faults.number("slow_reader", MAX_WAITING):
            self.cut("connection_too_slow")

    def close(self, code: int, reason: str) -> None:
        """Send a close frame behind what waits already; a client that does not come to read it is cut in the end."""
        self._send(reason.encode(), CLOSE, code)
        self._cut_at = FOREVER if self.silent else self._age + LAST_WORDS
        self.end(reason or f"close {code}")

    def cut(self, reason: str, reset: bool = False) -> None:
        """End the TCP connection now."""
        self.end(reason)
        self._transport.cut(reset)

    def end(self, reason: str) -> None:
        """Forget the connection, once; the reason goes to the oracle."""
        if not self.session.ended:
            self.session.ended = True
            end_session(self._exchange, self.session, self)
            self._note("ended", reason=reason)

    def _note(self, event: str, **more: Any) -> None:
        self._exchange.oracle.note(event, connection=self.session.number, **more)

    def _report(self, fault: str, frame: Frame) -> None:
        data: Any = frame.data
        ids = {k: data[k] for k in ("change_id", "prev_change_id") if k in data} if isinstance(data, dict) else {}
        if isinstance(data, list) and frame.channel.startswith("trades."):
            ids = {"trades": [[trade["instrument_name"], trade["trade_seq"]] for trade in data]}
        self._note("fault", fault=fault, channel=frame.channel, **ids)

    def _report_request(self, fault: str, call: Call) -> None:
        self._note("fault", fault=fault, method=call.method, timestamp=int(self._now * 1000))

    # In

    def find_pause(self, text: str | bytes) -> float:
        """Seconds to wait before this request is carried out."""
        if "slow" not in self._faults:
            return 0.0
        try:
            setting = find_failure(self._faults, "slow", read_call(text).method, self._counts)
        except RpcError:
            return 0.0
        return setting.value if setting else 0.0

    def receive(self, text: str | bytes, now: float) -> None:
        """Carry out one request; its answer and the first frames go to the outbox."""
        if self.session.ended or self.silent:
            return
        self._note_time(now)
        self.session.last_request = self._age
        if self.session.heartbeat is not None and "deaf" not in self._faults:
            self.session.heartbeat.answer()
        try:
            call = read_call(text)
        except RpcError as error:
            self._answer(NO_ID, error)
            return
        if find_failure(self._faults, "no_reply", call.method, self._counts) is None:
            self._carry_out(call)
        else:
            self._report_request("no_reply", call)

    def _carry_out(self, call: Call) -> None:
        ms, params = int(self._now * 1000), call.params or {}
        try:
            self._check(call, ms)
            context = Context(self._exchange, self.session, self, self._faults, params, ms, self._counts)
            reply = carry_out(call.method, context)
        except RpcError as error:
            self._answer(call.id, error)
            if error.code == 10028:
                self.close(1008, "too_many_requests")
            return
        if reply.silent:
            self.close(1000, "")
            return
        self._distortion.forget_others(self.session.subscriptions)
        late = "ack_late" in self._faults
        if not late:
            self._answer(self._find_id(call), reply.result)
        for frame in reply.frames:
            self.deliver(frame)
        if late:
            self._answer(self._find_id(call), reply.result)

    def _check(self, call: Call, ms: int) -> None:
        if not self._find_credits(ms).spend(call.method, self._now):
            raise RpcError(10028)
        failure = find_failure(self._faults, "error", call.method, self._counts)
        if failure is not None:
            self._report_request("error", call)
            raise RpcError(int(failure.value))
        if "maintenance" in self._done:
            raise RpcError(11051)
        if call.params is None:
            raise refuse_param("params", "must be an object")  # its form on the wire is not known

    def _find_credits(self, ms: int) -> Credits:
        """The pools that pay: the account's where somebody is logged in, else the address's."""
        login = self.session.login if self.session.is_logged_in(ms) else None
        payer = f"account {login.client_id}" if login else f"address {self.address}"
        return self._own or self._exchange.find_credits(payer, self._limit, self._now)

    def _find_id(self, call: Call) -> Any:
        wrong = find_failure(self._faults, "wrong_id", call.method, self._counts)
        return call.id if wrong is None else 999_999_999

    def _answer(self, id: Any, outcome: Any) -> None:
        us_in = int(self._now * 1e6) + int(self._faults.number("clock") * 1000)
        self._say(encode_answer(id, outcome, us_in, us_in + 60 + self.session.number % 40))

    # Time

    def tick(self, now: float) -> None:
        """Do what is due: heartbeats, the idle cut, timed faults."""
        self._note_time(now)
        if self._age >= self._cut_at:
            self._transport.cut(False)
        if self.session.ended:
            return
        if self._faults:
            self._run_timed_faults()
        heartbeat = self.session.heartbeat
        if heartbeat is not None and "no_heartbeat" not in self._faults and not self.silent:
            for kind in heartbeat.find_due(self._age, self.session.last_sent):
                if kind == "close":
                    self.close(4000, "heartbeat close")
                else:
                    self._say(encode_heartbeat(kind))
        elif self.session.is_idle(self._age, self._faults.number("idle", IDLE)):
            self.cut("idle")

    def _note_time(self, now: float) -> None:
        """Where the clock was set, or all stood still, it has not grown older: as for the market."""
        by, self._now = now - self._now, now
        if abs(by) * 1000 <= MAX_BEHIND:
            self._age += by

    def _run_timed_faults(self) -> None:
        if self.has_begun("until"):
            self._recover()
            return
        self._release(self._age)
        self._run_endings()
        if self.session.ended:
            return
        for name, due in self._periodic.items():
            if self._age >= due:
                self._periodic[name] = self._age + max(0.05, self._faults.number(name))
                self._send_nonsense(name)
        for place, setting in enumerate(self._faults.all("oversized")):
            if self._age >= setting.at and self._once(f"oversized {place}"):
                self._send_nonsense("oversized", setting.value)
        if "flood" in self._faults:
            self._flood()

    def _recover(self) -> None:
        self._faults.clear()
        self.silent = False
        self._release(FOREVER)
        self._done.clear()

    def _run_endings(self) -> None:
        for setting in self._faults.all("close"):
            if self._age >= setting.at:
                self.close(int(setting.value), "closed on request")
        for name, reset in (("reset", True), ("drop", False)):
            if self.has_begun(name):
                self.cut(name, reset)
        if self.has_begun("half_open") and self._once("half_open"):
            self.silent = True
            self._note("silent")
        if self.has_begun("maintenance"):
            self._maintain()

    def _maintain(self) -> None:
        if self._once("maintenance") and "platform_state" in self.session.subscriptions:
            self._say(encode_notification("platform_state", {"maintenance": True}))
        if self._age - self._faults.number("maintenance") >= 1.0:
            self.cut("maintenance")

    def _once(self, name: str) -> bool:
        first = name not in self._done
        self._done.add(name)
        return first

    def _send_nonsense(self, kind: str, number: float = 0.0) -> None:
        for is_text, payload in make_nonsense(kind, self._rng, number):
            self._send(payload, TEXT if is_text else BINARY)
        self._note("fault", fault=kind)

    def _flood(self) -> None:
        texts = [text for channel, text in self._distortion.repeatable.items() if not self._is_mute(channel)]
        due = int((self._age - self._flooded) * self._faults.number("flood"))
        if texts and due and not self.session.ended:
            self._flooded += due / self._faults.number("flood")
            for place in range(min(due, 20_000)):
                self._send_data(texts[place % len(texts)])
