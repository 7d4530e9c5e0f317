"""The shell around a worker: what is left of one that fails in its own code, and when it ends."""

import asyncio
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import msgpack
import pytest

from collector.lifecycle import Exit
from collector.messages import encode
from tests.support import PATIENCE, REPOSITORY, wait_until
from workers.actor import main

LAST = {"last_error": {"message": "nobody is there"}}


class Failing:
    """A kind of worker that fails as soon as it has been told to fail; whatever else it is asked it answers huge.

    Some of that is told by name: to fail in the answer or in the next report, to report what is huge, to hang; or to
    end in order, and report LAST.
    """

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self._failing = asyncio.Event()
        self._report: dict[str, Any] | None = {}

    async def start(self) -> dict[str, Any]:
        return {}

    async def run(self) -> Exit:
        await self._failing.wait()
        if self._report == LAST:
            return Exit.GAVE_UP
        raise RuntimeError("its own fault")

    def report(self) -> dict[str, Any]:
        if self._report is None:
            raise RuntimeError("no report")
        return self._report | {}

    async def answer(self, op: str, arguments: dict[str, Any]) -> Any:
        if op == "raise":
            raise RuntimeError("no answer")
        if op == "hang":
            time.sleep(3600)
        self._report = {"break": None, "inflate": {"huge": 1 << 64}, "end": LAST}.get(op, self._report)
        if op not in ("fail", "end"):
            return {"huge": 1 << 64}
        # A look-up of a name that nobody answers goes on, whoever has given it up; loops have threads for it.
        asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)
        self._failing.set()

    def take_events(self) -> list[dict[str, Any]]:
        return []

    def stop(self) -> None:
        print("told to stop", file=sys.stderr)


def create_worker(spec: dict[str, Any]) -> Failing:
    return Failing()


def live_failing(end: socket.socket) -> None:
    sys.modules["workers.failing.worker"] = sys.modules[__name__]
    main("failing", end)


@contextmanager
def failing(*more: dict[str, Any]) -> Iterator[tuple[BaseProcess, socket.socket, Any]]:
    """Such a worker as a process, our end of its link, and the messages that come there.

    `more` is sent together with its spec.
    """
    ours, theirs = socket.socketpair()
    process = multiprocessing.get_context("spawn").Process(target=live_failing, args=(theirs,))
    process.start()
    theirs.close()
    ours.settimeout(PATIENCE)
    try:
        spec = {"kind": "spec", "spec": {"name": "failing", "log_level": "info"}}
        ours.sendall(b"".join(map(encode, [spec, *more])))
        messages = read_messages(ours)
        assert next(message for message in messages if message["kind"] == "ready")
        yield process, ours, messages
    finally:
        ours.close()
        process.join(PATIENCE)
        process.kill()


def request(number: int, op: str) -> bytes:
    return encode({"kind": "request", "id": number, "op": op, "deadline": 1 << 62, "arguments": {}})


def test_a_worker_that_has_crashed_ends_with_its_code_and_is_not_stopped_again(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with failing() as (process, link, messages):
        link.sendall(request(1, "fail"))
        reports = (message["report"] for message in messages if message["kind"] == "beat")
        error = next(report["last_error"] for report in reports if "last_error" in report)
        assert error == {"message": "RuntimeError: its own fault"}
    assert process.exitcode == Exit.CRASHED
    log = capfd.readouterr().err
    assert "RuntimeError: its own fault" in log
    assert "told to stop" not in log, "after its end"


def test_an_answer_that_messagepack_cannot_hold_is_said_to_be_that() -> None:
    with failing() as (_, link, messages):
        link.sendall(request(7, "send"))
        reply = next(message for message in messages if message["kind"] == "reply")
        assert (reply["id"], reply["ok"], reply["error"]["code"]) == (7, False, "internal")
        assert reply["error"]["message"].startswith("it was carried out, but MessagePack cannot hold the answer: Int")
        link.sendall(request(8, "fail"))


def test_an_answer_that_fails_is_said_to_be_that(capfd: pytest.CaptureFixture[str]) -> None:
    with failing() as (_, link, messages):
        link.sendall(request(7, "raise"))
        reply = next(message for message in messages if message["kind"] == "reply")
        assert (reply["id"], reply["ok"], reply["error"]["code"]) == (7, False, "internal")
        link.sendall(request(8, "fail"))
    assert "RuntimeError: no answer" in capfd.readouterr().err


def test_a_worker_that_fails_in_its_report_ends_with_that() -> None:
    with failing() as (process, link, messages):
        link.sendall(request(7, "break"))
        reports = (message["report"] for message in messages if message["kind"] == "beat")
        error = next(report["last_error"] for report in reports if "last_error" in report)
        assert error == {"message": "RuntimeError: no report"}
    assert process.exitcode == Exit.CRASHED


def test_what_a_worker_has_to_say_at_its_end_is_said() -> None:
    with failing() as (process, link, messages):
        link.sendall(request(7, "end"))
        reports = (message["report"] for message in messages if message["kind"] == "beat")
        assert next(report for report in reports if report.items() >= LAST.items())
    assert process.exitcode == Exit.GAVE_UP


def test_a_report_that_messagepack_cannot_hold_is_a_sign_of_life_all_the_same() -> None:
    with failing() as (_, link, messages):
        link.sendall(request(7, "inflate"))
        assert next(message for message in messages if message["kind"] == "beat" and not message["report"])
        link.sendall(request(8, "fail"))


@pytest.mark.parametrize("how", ["before it has started", "by a signal"])
def test_a_worker_is_told_to_stop(how: str, capfd: pytest.CaptureFixture[str]) -> None:
    with failing(*([{"kind": "stop"}] if how != "by a signal" else [])) as (process, link, messages):
        assert process.pid is not None
        assert next(message for message in messages if message["kind"] == "beat"), "it runs"
        if how == "by a signal":
            os.kill(process.pid, signal.SIGTERM)
        wait_until(lambda: "told to stop" in capfd.readouterr().err, "its stop")
        link.sendall(request(1, "fail"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_a_terminal_sends_to_all_is_left_to_the_supervisor(number: signal.Signals) -> None:
    with failing() as (process, link, messages):
        assert process.pid is not None
        os.kill(process.pid, number)
        for _ in range(3):  # one may have been under way
            assert next(message for message in messages if message["kind"] == "beat")
        link.sendall(request(8, "fail"))


def test_a_worker_that_hangs_does_not_outlive_its_supervisor() -> None:
    with failing() as (process, link, messages):
        link.sendall(request(7, "raise") + request(8, "hang"))
        assert next(message for message in messages if message["kind"] == "reply")
    assert process.exitcode == Exit.ORPHANED


def read_messages(link: socket.socket) -> Any:
    unpacker = msgpack.Unpacker()
    end = time.monotonic() + PATIENCE
    while data := link.recv(65536):
        assert time.monotonic() < end, "beats, and not what is waited for"
        unpacker.feed(data)
        yield from unpacker


MEASURED = """
import resource
from workers.actor import Usage
usage = Usage()
before = usage.measure()["memory"]
resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
print(usage.measure()["memory"] / before)
"""


def test_the_memory_of_a_worker_is_told_in_bytes_also_where_no_file_can_be_opened() -> None:
    share = float(subprocess.check_output([sys.executable, "-c", MEASURED], cwd=REPOSITORY, timeout=20))
    assert 0.9 < share < 1.5
