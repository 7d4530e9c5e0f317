"""What all kinds of worker share: the spec and the lifeline, ready, beats, requests, stop, and the exit code.

A worker process is this shell around one object of its kind, made by `create_worker(spec)` in
`workers/<kind>/worker.py`. The shell talks with the supervisor over the link (see collector/link.py); what the
worker does for a living goes on beside it in the same event loop, so that a stuck loop shows as missed beats.
"""

import asyncio
import errno
import gc
import logging
import os
import resource
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any, Protocol

import setproctitle

from collector.lifecycle import BEAT_INTERVAL, ORPHAN_GRACE, Exit
from collector.link import open_link
from collector.log import start_log
from collector.messages import ControlError
from collector.sockets import advise

new_event_loop: Callable[[], asyncio.AbstractEventLoop]
try:
    from uvloop import new_event_loop
except ImportError:  # it is not built for every platform; asyncio's own loop does the same more slowly
    from asyncio import new_event_loop

TAKEN_BY_ORPHAN = ORPHAN_GRACE + 0.5
"""Seconds after which what listens on an endpoint is no worker that a killed supervisor has left."""

SHORTAGES = frozenset({
    errno.EAGAIN, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC
})  # fmt: skip
"""What the system may have again a moment later: no fault of the spec."""

log = logging.getLogger("actor")


class Worker(Protocol):
    """What a kind of worker must offer. It sets `news` when the supervisor should hear of it before the next beat."""

    news: asyncio.Event

    async def start(self) -> dict[str, Any]:
        """Bind the sockets; return the endpoints for `ready`. Raises OSError if it cannot bind."""

    async def run(self) -> Exit:
        """Live until done; return why it ended."""

    def report(self) -> dict[str, Any]:
        """The small map that goes with each beat."""

    async def answer(self, op: str, arguments: dict[str, Any]) -> Any:
        """Carry out one request; cancelled at its deadline. Raises ControlError to refuse it."""

    def take_events(self) -> list[dict[str, Any]]:
        """What happened since the last beat that the supervisor must know: maps with an `event`."""

    def stop(self) -> None:
        """Have run() return Exit.STOPPED soon."""


def main(kind: str, end: socket.socket) -> None:
    """Live one life of one worker at the end of a link, then leave with its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor decides what it means
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    gc.freeze()  # what the forkserver loaded stays shared: a collection would touch, and so copy, every page of it
    _watch_lifeline(end)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        code = runner.run(Actor(kind).live(end))
        logging.shutdown()
        os._exit(int(code))  # to close the loop is to wait for its threads; a name that nobody resolves holds one long


def _watch_lifeline(end: socket.socket) -> None:
    """End the process some seconds after its supervisor, even if its event loop is stuck."""
    watched = end.dup()

    def wait() -> None:
        poll = select.poll()
        poll.register(watched, 0)  # 0: report nothing but the hang-up
        poll.poll()
        time.sleep(ORPHAN_GRACE)
        os._exit(Exit.ORPHANED)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


class Actor:
    """One worker's life as the supervisor sees it."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._worker: Worker | None = None
        self._stopping = False
        self._link_ended = asyncio.Event()
        self._answering: set[asyncio.Task[None]] = set()
        self._usage = Usage()

    async def live(self, end: socket.socket) -> Exit:
        """Take the spec, start, run; return why it ended."""
        self._spec: asyncio.Future[dict[str, Any] | None] = asyncio.get_running_loop().create_future()
        self._link = await open_link(end, self._receive, self._lose_link)
        spec = await self._spec
        if spec is None:
            return Exit.ORPHANED
        setproctitle.setproctitle(f"collector: {spec['name']}")
        start_log(spec["name"], spec["log_level"])
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stop)
        code = await self._start(spec)
        orphaned = self._link_ended.is_set()
        await self._leave()
        return Exit.ORPHANED if orphaned else code

    async def _start(self, spec: dict[str, Any]) -> Exit:
        try:
            worker: Worker = import_module(f"workers.{self._kind}.worker").create_worker(spec)
            endpoints = await self._bind(worker)
        except (OSError, ValueError) as error:
            if self._stopping:
                return Exit.STOPPED
            number = error.errno if isinstance(error, OSError) else None
            if number in SHORTAGES:
                return self._fail(Exit.CRASHED, f"cannot start just now: {error}")
            return self._fail(Exit.BAD_SPEC, f"cannot start: {error}{advise(number)}")
        except Exception as error:
            return self._crash(error)
        self._link.send({"kind": "ready", "endpoints": endpoints})
        self._worker = worker
        if self._stopping:
            worker.stop()
        try:
            return await self._run(worker)
        except Exception as error:
            return self._crash(error)
        finally:
            self._worker = None  # the end of the link would have it stopped once more

    async def _bind(self, worker: Worker) -> dict[str, Any]:
        """Start it; what is in use is waited for as long as the orphan of a killed supervisor may hold it."""
        end = time.monotonic() + TAKEN_BY_ORPHAN
        is_told = False
        while True:
            try:
                return await worker.start()
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > end or self._stopping:
                    raise
                if not is_told:
                    log.warning("%s; tried for %g s", error, TAKEN_BY_ORPHAN)
                is_told = True
            await asyncio.sleep(0.1)

    async def _run(self, worker: Worker) -> Exit:
        beats = asyncio.create_task(self._send_beats(worker))
        run = asyncio.create_task(worker.run())
        await asyncio.wait((beats, run), return_when=asyncio.FIRST_COMPLETED)
        if not run.done():
            await beats  # it ends only by an error, which is the worker's
        beats.cancel()
        code = await run
        self._send_report(worker.report())
        return code

    def _crash(self, error: Exception) -> Exit:
        log.error("crashed", exc_info=error)
        return self._fail(Exit.CRASHED, f"{type(error).__name__}: {error}")

    def _fail(self, code: Exit, message: str) -> Exit:
        log.error("%s", message)
        self._send_report({"last_error": {"message": message[:500]}})
        return code

    async def _send_beats(self, worker: Worker) -> None:
        while True:
            for event in worker.take_events():
                self._send({"kind": "event", **event})
            worker.news.clear()
            self._send_report(worker.report())
            with suppress(TimeoutError):
                async with asyncio.timeout(BEAT_INTERVAL):
                    await worker.news.wait()

    def _send_report(self, report: dict[str, Any]) -> None:
        report |= self._usage.measure()
        if self._send({"kind": "beat", "report": report}):
            self._send({"kind": "beat", "report": {}})  # alive all the same

    async def _leave(self) -> None:
        """Close the link once the supervisor has the last report; a stopped one is not waited for."""
        self._link.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._link_ended.wait(), ORPHAN_GRACE)

    def _receive(self, message: dict[str, Any]) -> None:
        match message:
            case {"kind": "request", "id": number, "op": op, "deadline": deadline, "arguments": arguments}:
                task = asyncio.create_task(self._answer(number, op, arguments, deadline))
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)
            case {"kind": "stop"}:
                self._stop()
            case {"kind": "spec", "spec": spec} if not self._spec.done():
                self._spec.set_result(spec)
            case _:
                log.error("not understood on the link: %.100r", message.get("kind"))

    def _lose_link(self, reason: str) -> None:
        log.debug("link: %s", reason)
        self._link_ended.set()
        if not self._spec.done():
            self._spec.set_result(None)
        self._stop()

    def _stop(self) -> None:
        self._stopping = True
        if self._worker is not None:
            self._worker.stop()

    async def _answer(self, number: int, op: str, arguments: dict[str, Any], deadline: int) -> None:
        head = {"kind": "reply", "id": number}
        try:
            reply = head | {"ok": True, "result": await self._carry_out(op, arguments, deadline)}
        except ControlError as error:
            reply = head | {"ok": False, "error": error.to_map()}
        except Exception:
            log.exception("%s failed", op)
            failure = ControlError("internal", "the worker failed to answer; see its log")
            reply = head | {"ok": False, "error": failure.to_map()}
        if why := self._send(reply):
            failure = ControlError("internal", f"it was carried out, but MessagePack cannot hold the answer: {why}")
            self._send(head | {"ok": False, "error": failure.to_map()})

    def _send(self, message: dict[str, Any]) -> str:
        """Send what may hold anything that the exchange wrote; return why not, if that has no form in MessagePack."""
        try:
            self._link.send(message)
        except (ValueError, TypeError, OverflowError) as error:
            log.error("%s cannot be sent to the supervisor: %s", message["kind"], error)
            return str(error)
        return ""

    async def _carry_out(self, op: str, arguments: dict[str, Any], deadline: int) -> Any:
        left = (deadline - time.time_ns()) / 1e9
        if left <= 0:  # this process may have been stopped for a while: an old request must not be carried out
            raise ControlError("expired", "the deadline had passed before the worker saw the request")
        if self._worker is None:
            raise ControlError("not_connected", "the worker is still starting")
        try:
            async with asyncio.timeout(left):
                return await self._worker.answer(op, arguments)
        except TimeoutError:
            raise ControlError(
                "timeout", "no answer within the deadline; whether it was carried out is not known"
            ) from None


class Usage:
    """What this process uses: measured from one beat to the next."""

    def __init__(self) -> None:
        self._seen = time.monotonic(), time.process_time()
        self._statm = os.open("/proc/self/statm", os.O_RDONLY)  # at once: later no descriptor may be left

    def measure(self) -> dict[str, Any]:
        """CPU as a share of one core since the last call (1.0 is all of it); resident memory in bytes."""
        now, used = time.monotonic(), time.process_time()
        then, before = self._seen
        self._seen = now, used
        resident = int(os.pread(self._statm, 64, 0).split()[1]) * resource.getpagesize()
        return {"cpu": round((used - before) / max(now - then, 1e-3), 4), "memory": resident}
