"""One worker kept alive over its lives: started, watched, asked, killed when it is stuck, restarted, given up."""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Coroutine
from typing import Any, TypeVar

from collector.lifecycle import (
    BEAT_INTERVAL,
    BEATS_MISSED,
    FINAL_EXITS,
    MAX_RESTARTS,
    PROCESS,
    READY_TIMEOUT,
    STEADY_AFTER,
    STOP_GRACE,
    Exit,
    Machine,
    backoff_delay,
)
from collector.messages import ControlError
from collector.supervisor.process import (
    NOT_STARTED,
    UNKNOWN_EXIT,
    Child,
    Spawner,
    describe_exit,
    kill_forkserver,
    start_child,
)

Result = TypeVar("Result")

MAX_ASKED = 64
"""Requests that one worker may owe answers to."""

SPAWN_TIMEOUT = 60.0
"""Seconds that a worker's process may take to exist: the forkserver may have to start first, on a busy machine."""

log = logging.getLogger(__name__)

BEAT_READ = BEAT_INTERVAL + 0.05
"""Seconds after a beat from which the next one should be waiting in the link."""

_OVERDUE = {"starting": "was not ready", "running": "gave no sign of life", "stopping": "did not stop"}
"""What to say of a process that owes us a word in each state."""

_STATES = {
    "waiting": "starting",
    "starting": "starting",
    "running": "starting",
    "backoff": "backoff",
    "stopping": "closing",
    "stopped": "closed",
    "failed": "failed",
}
"""What a connection's state is called until its worker says it, and when there is none."""


class Keeper:
    """One worker over its lives. `build_spec(keeper)` makes the spec of each, for its epoch."""

    def __init__(
        self, name: str, kind: str, first_delay: float, spawner: Spawner,
        begin_epoch: Callable[[], int], build_spec: Callable[["Keeper"], dict[str, Any]],
    ) -> None:  # fmt: skip
        self.name = name
        self.kind = kind
        self.machine = Machine(PROCESS, "waiting")
        self.since = time.time_ns()
        self.epoch = 0
        self.restarts = 0
        self.endpoints: dict[str, Any] = {}
        self.report: dict[str, Any] = {}
        self.exit_code: int | None = None
        self.was_live = False
        self.begin_epoch = begin_epoch
        self.take_event: Callable[[dict[str, Any]], None] | None = None
        self.take_sign: Callable[[], None] = lambda: None  # called with each beat of one that can be asked
        self._changed = asyncio.Event()
        self._first_delay = first_delay
        self._spawner = spawner
        self._build_spec = build_spec
        self._child: Child | None = None
        self._is_spawning = False
        self._stopping = asyncio.Event()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._number = 0
        self._limit = self._due = 0.0
        self._heard_at = 0.0
        self._live_since: float | None = None
        self._cause = ""  # of its end, where more is known than its exit code

    # what is known of it

    @property
    def pid(self) -> int | None:
        """The process of this life, if there is one."""
        return self._child.pid if self._child is not None else None

    @property
    def state(self) -> str:
        """The worker's own word while it runs, else what the supervisor does with it."""
        if self.machine.state == "running" and self._heard_at:
            return str(self.report.get("state", "live"))
        return _STATES[self.machine.state]

    @property
    def is_live(self) -> bool:
        """Whether a running worker does what it is for: nobody but itself says so."""
        return self.state == "live"

    @property
    def is_stopping(self) -> bool:
        """Whether it was asked to end: no wish will be carried out any more."""
        return self._stopping.is_set()

    @property
    def is_over(self) -> bool:
        """Whether there will be no other life."""
        return self.machine.state in ("stopped", "failed")

    @property
    def last_error(self) -> Any:
        """What went wrong last, in the words of whoever said it; None if nothing did."""
        return self.report.get("last_error")

    def describe(self) -> dict[str, Any]:
        """What the supervisor itself knows."""
        return {
            "name": self.name,
            "state": self.state,
            "since": self.since,
            "pid": self.pid,
            "epoch": self.epoch,
            "restarts": self.restarts,
        }

    async def wait_settled(self) -> None:
        """Wait until it is live, or there will be no other life."""
        while not self.is_live and not self.is_over:
            await self._changed.wait()

    # its lives

    async def keep(self, preparation: Coroutine[Any, Any, Exit | None] | None = None) -> None:
        """Run one life after another until it is stopped or fails for good.

        Begins when `preparation` is over, if given; fails for good at once with the exit code that this may return.
        """
        if preparation is not None:
            refusal = await self._until_stopped(preparation)
            if refusal is not None and not self.is_stopping:
                self.exit_code = refusal
                return self._apply("give_up")
        failures = 0
        while not self.is_stopping:
            self.exit_code = code = await self._live()
            if self.is_stopping:
                return
            was_steady = self._live_since is not None and time.monotonic() - self._live_since >= STEADY_AFTER
            failures = 1 if was_steady else failures + 1
            if self._is_hopeless(code, failures):
                return self._apply("give_up")
            await self._back_off(code, failures)

    async def _until_stopped(self, work: Coroutine[Any, Any, Result]) -> Result | None:
        """What the work returns; None, and it is given up, if we are stopped before it is done."""
        working, stopping = asyncio.create_task(work), asyncio.create_task(self._stopping.wait())
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not working.done():
            working.cancel()
            return None
        return working.result()

    def _begin_life(self) -> None:
        self._apply("start")
        self.epoch = self.begin_epoch()
        self._live_since = None
        self._heard_at = 0.0
        self._cause = ""

    async def _live(self) -> int:
        self._begin_life()
        try:
            self._child = await self._start()
        except OSError as error:
            level = logging.INFO if self.is_stopping else logging.ERROR
            reason = f"cannot be started: {error or type(error).__name__}"
            log.log(level, "%s: %s", self.name, reason)
            self._cause = self._cause or reason
            return self._end_life(NOT_STARTED)
        if self._child is None:
            return self._end_life(Exit.STOPPED)
        if self.is_stopping:
            self._child.kill()
        else:
            self._expect(READY_TIMEOUT)
        self._child.send({"kind": "spec", "spec": self._build_spec(self)})
        return self._end_life(await self._child.wait())

    async def _start(self) -> Child | None:
        """Start a process once it is our turn; None if we are stopped before. Raises OSError."""
        if not await self._until_stopped(self._spawner.turn.acquire()):
            return None
        self._is_spawning = True
        try:
            if not self.is_stopping:
                self._expect(SPAWN_TIMEOUT)
            return await start_child(self._spawner, self.kind, self._receive)
        finally:
            self._is_spawning = False
            self._spawner.turn.release()

    def _end_life(self, code: int) -> int:
        self._child = None
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(self._refuse("ended before it answered; whether it was carried out is not known"))
        self._asked.clear()
        self._apply("exited")
        return code

    def _is_hopeless(self, code: int, failures: int) -> bool:
        # What has run as configured can run so again: that somebody sits on its endpoint passes.
        if code in FINAL_EXITS or (code == Exit.BAD_SPEC and not self.was_live):
            log.error("%s: %s: not started again", self.name, describe_exit(code))
            return True
        if not self.was_live and failures > MAX_RESTARTS:
            log.error("%s: %s: never live in %d starts, given up", self.name, describe_exit(code), failures)
            self._note_death(code, f"never live in {failures} starts, given up")
            return True
        return False

    async def _back_off(self, code: int, failures: int) -> None:
        delay = backoff_delay(failures, self._first_delay, random.random())
        log.warning("%s: %s; started again in %.1f s", self.name, describe_exit(code), delay)
        self._note_death(code, f"started again {delay:.1f} s after that")
        try:
            await asyncio.wait_for(self._stopping.wait(), delay)
        except TimeoutError:
            self.restarts += 1

    def _note_death(self, code: int, outcome: str) -> None:
        """Say in its place what a process that was struck down could not say itself: its next life forgets it."""
        if self._cause or code < 0 or code == UNKNOWN_EXIT:
            cause = self._cause or f"{'was ' if code < 0 else ''}{describe_exit(code)}"
            self.report["last_error"] = {"message": f"the worker process {cause}; {outcome}"}

    def stop(self, grace: float = STOP_GRACE) -> None:
        """Ask it to end in order within `grace` seconds, and not to come back. `keep` returns when it is gone."""
        self._stopping.set()
        if self.machine.allows("stop"):
            self._apply("stop")
            self._expect(grace)
        if self._child is not None:
            self._child.resume()
            self._child.send({"kind": "stop"})

    def kill(self) -> None:
        """Kill this life's process, if there is one."""
        if self._child is not None:
            self._child.kill()

    def watch(self, now: float, pause: float) -> None:
        """Take its beats; kill it if it is overdue, not counting a `pause` in which the supervisor itself was away."""
        self._due += pause
        if self._child is None:
            if self._is_spawning and now >= self._due:
                self._end_spawn()
            return
        if now >= self._heard_at + BEAT_READ:
            self._child.resume()
        if now < self._due:
            return
        self._cause = f"{_OVERDUE[self.machine.state]} in {self._limit:g} s: killed"
        log.error("%s: pid %s %s", self.name, self.pid, self._cause)
        self._child.kill()
        self._expect(self._limit)

    def _end_spawn(self) -> None:
        if kill_forkserver():
            self._cause = f"was not started in {self._limit:g} s"
            level = logging.INFO if self.is_stopping else logging.ERROR  # it may just not be loaded yet
            log.log(level, "%s: %s: the forkserver does not answer, and is killed", self.name, self._cause)

    def _expect(self, seconds: float) -> None:
        """Expect what it owes us next within so many seconds from now; else `watch` kills it."""
        self._limit = seconds
        self._due = time.monotonic() + seconds

    def _apply(self, event: str) -> None:
        state, old = self.state, self.machine.state
        new = self.machine.apply(event)
        log.debug("%s: process %s, %s -> %s", self.name, event, old, new)
        self._note_state(state)

    def _note_state(self, before: str) -> None:
        if self.state != before:
            self.since = time.time_ns()
            self._changed.set()
            self._changed = asyncio.Event()

    # what it says

    def _receive(self, message: dict[str, Any]) -> None:
        match message:
            case {"kind": "beat", "report": dict(report)}:
                self._take_report(report)
            case {"kind": "reply", "id": number, "ok": bool()} if (answer := self._asked.pop(number, None)) is not None:
                _settle(answer, message)
            case {"kind": "reply"}:
                outcome = error.get("code") if isinstance(error := message.get("error"), dict) else "ok"
                log.debug("%s: a late answer: %s", self.name, outcome)
            case {"kind": "ready", "endpoints": dict(endpoints)} if self.machine.state == "starting":
                self.endpoints = endpoints
                log.info("%s: ready, pid %s, %s", self.name, self.pid, _write_endpoints(endpoints))
                self._expect(BEATS_MISSED)
                self._apply("ready")
            case {"kind": "ready"} if self.machine.state == "stopping":
                pass
            case {"kind": "event"} if self.take_event is not None:
                self.take_event(message)
            case _:
                log.error("%s: not understood on the link: %.100r", self.name, message)

    def _take_report(self, report: dict[str, Any]) -> None:
        before = self.state
        self._note_facts(report)
        if self.machine.state != "running":
            return
        self._heard_at = time.monotonic()
        self._expect(BEATS_MISSED)
        if self.is_live:
            self.was_live = True
            self._live_since = self._live_since or time.monotonic()
            if self._child is not None and not self._asked:
                self._child.pause()  # its next beat is read by `watch`, with those of others: what costs is the waking
        self._note_state(before)
        self.take_sign()

    def add_report(self, facts: dict[str, Any]) -> None:
        """Keep what it told in answer to a question. Its state only beats tell: who waits for one is woken by those."""
        self._note_facts(facts, {"state"})

    def _note_facts(self, facts: dict[str, Any], but: Collection[str] = ()) -> None:
        """What went wrong last is told until it is live again: a later life, or attempt, of the worker forgets it."""
        if self.last_error and facts.get("state", "live") != "live" and facts.get("last_error") is None:
            but = {*but, "last_error"}
        self.report |= {key: value for key, value in facts.items() if key not in but}

    async def ask(self, op: str, arguments: dict[str, Any], deadline: int) -> Any:
        """Have the worker carry out a request; return its result. Raises ControlError, at once if it is not running."""
        if self.machine.state != "running" or self._child is None:
            raise self._refuse(f"is not running ({self.state})")
        if len(self._asked) >= MAX_ASKED:
            raise self._refuse(f"owes {MAX_ASKED} answers already; this request was not carried out")
        self._number += 1
        number = self._number
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        request = {"kind": "request", "id": number, "op": op, "deadline": deadline, "arguments": arguments}
        self._child.resume()
        try:
            if not self._child.send(request):
                raise self._refuse("does not read its link; this request was not carried out")
            async with asyncio.timeout((deadline - time.time_ns()) / 1e9):
                return await answer
        except TimeoutError:
            raise ControlError("timeout", f"{self.name} did not answer within the deadline") from None
        finally:
            self._asked.pop(number, None)

    def _refuse(self, reason: str) -> ControlError:
        return ControlError("not_connected", f"the worker of {self.name} {reason}")


def _settle(answer: asyncio.Future[Any], message: dict[str, Any]) -> None:
    if answer.done():
        return
    if message["ok"]:
        return answer.set_result(message.get("result"))
    error = message.get("error")
    if not isinstance(error, dict):
        error = {"code": "internal", "message": "the worker answered with garbage"}
    answer.set_exception(ControlError(str(error.get("code")), str(error.get("message")), error.get("data")))


def _write_endpoints(endpoints: dict[str, Any]) -> str:
    words = {"publish": "publishes on", "url": "listens on"}
    return ", ".join(f"{words.get(key, key)} {value}" for key, value in endpoints.items())
