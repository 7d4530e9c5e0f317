"""The shell around a worker: what is left of one that fails in its own code."""

import asyncio
import multiprocessing
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import msgpack
import pytest

from collector.lifecycle import Exit
from collector.messages import encode
from tests.support import REPOSITORY
from workers.actor import main


class Failing:
    """A kind of worker that fails as soon as it has been told to fail; whatever else it is asked it answers huge."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self._failing = asyncio.Event()

    async def start(self) -> dict[str, Any]:
        return {}

    async def run(self) -> Exit:
        await self._failing.wait()
        raise RuntimeError("its own fault")

    def report(self) -> dict[str, Any]:
        return {}

    async def answer(self, op: str, arguments: dict[str, Any]) -> Any:
        if op != "fail":
            return {"huge": 1 << 64}
        # A look-up of a name that nobody answers goes on, whoever has given it up; loops have threads for it.
        asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)
        self._failing.set()

    def take_events(self) -> list[dict[str, Any]]:
        return []

    def stop(self) -> None:
        print("stopped after its end", file=sys.stderr)


def create_worker(spec: dict[str, Any]) -> Failing:
    return Failing()


def live_failing(end: socket.socket) -> None:
    sys.modules["workers.failing.worker"] = sys.modules[__name__]
    main("failing", end)


@contextmanager
def failing() -> Iterator[tuple[BaseProcess, socket.socket, Any]]:
    """Such a worker as a process, our end of its link, and the messages that come there."""
    ours, theirs = socket.socketpair()
    process = multiprocessing.get_context("spawn").Process(target=live_failing, args=(theirs,))
    process.start()
    theirs.close()
    ours.settimeout(20)
    try:
        ours.sendall(encode({"kind": "spec", "spec": {"name": "failing", "log_level": "info"}}))
        messages = read_messages(ours)
        assert next(message for message in messages if message["kind"] == "ready")
        yield process, ours, messages
    finally:
        ours.close()
        process.join(20)


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
    assert "stopped after its end" not in log


def test_an_answer_that_messagepack_cannot_hold_is_said_to_be_that() -> None:
    with failing() as (_, link, messages):
        link.sendall(request(7, "send"))
        reply = next(message for message in messages if message["kind"] == "reply")
        assert (reply["id"], reply["ok"], reply["error"]["code"]) == (7, False, "internal")
        assert reply["error"]["message"].startswith("it was carried out, but MessagePack cannot hold the answer: Int")
        link.sendall(request(8, "fail"))


def read_messages(link: socket.socket) -> Any:
    unpacker = msgpack.Unpacker()
    while data := link.recv(65536):
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
