"""The log of a program whose reader has stopped: the data go on, and what could not be written is counted."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from collector.log import MAX_WAITING, _say_missing
from collector.words import say_count
from tests.collected import QUICK
from tests.pipeline import ask, short_directory, subscribed, write_config
from tests.support import REPOSITORY, collector

CHATTER = f"""
import logging, sys
from collector.log import start_log
start_log("chatter", "info")
for number in range({MAX_WAITING} + 500):
    logging.info("line %d", number)
print("said", flush=True)
sys.stdin.readline()
logging.info("the last one")
"""


FORGED = """
import logging
from collector.log import start_log
start_log("worker", "info")
try:
    raise RuntimeError("refused\\n2026-11-23T06:09:17.268Z INFO    supervisor: ended\\x1b[2J")
except RuntimeError:
    logging.exception("a request failed")
"""
"""An error whose text is made to look like a record, and clears the screen."""


@contextmanager
def full_pipe() -> Iterator[tuple[int, int]]:
    """Both ends of a pipe into which not one byte more goes."""
    reading, writing = os.pipe()
    try:
        os.set_blocking(writing, False)
        try:
            while os.write(writing, b"."):
                pass
        except BlockingIOError:
            os.set_blocking(writing, True)
        yield reading, writing
    finally:
        os.close(reading)


def read_to_end(reading: int) -> list[str]:
    """The lines that were written after what filled the pipe, when the last writer is gone."""
    with os.fdopen(os.dup(reading)) as pipe:
        return pipe.read().lstrip(".").splitlines()


@pytest.mark.parametrize("is_blocking", [True, False])
def test_lines_wait_for_their_reader_and_those_beyond_are_counted(is_blocking: bool) -> None:
    with full_pipe() as (reading, writing):
        os.set_blocking(writing, is_blocking)  # the programs that share it share this too
        chatter = subprocess.Popen(
            [sys.executable, "-c", CHATTER], cwd=REPOSITORY, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=writing,
        )  # fmt: skip
        os.close(writing)
        assert chatter.stdout is not None
        assert chatter.stdin is not None
        assert chatter.stdout.readline() == "said\n", "it was held up"
        with os.fdopen(os.dup(reading)) as pipe:
            held = [pipe.readline().lstrip(".") for _ in range(MAX_WAITING)]
            chatter.stdin.write("\n")
            chatter.stdin.flush()
            rest = pipe.readlines()
        assert chatter.wait(20) == 0
    numbers = [int(line.split()[-1]) for line in [*held, *rest] if re.search(r"line \d+$", line)]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) >= MAX_WAITING
    assert rest[-1].endswith("chatter: the last one\n")
    missing = MAX_WAITING + 500 - len(numbers)
    assert f"WARNING chatter: {missing} lines missing here: could not be written" in rest[-2]


@pytest.mark.parametrize(("number", "said"), [(0, "0 lines"), (1, "1 line"), (2, "2 lines"), (2000, "2,000 lines")])
def test_one_is_one(number: int, said: str) -> None:
    assert say_count(number, "line") == said
    assert _say_missing(number).getMessage().startswith(f"{said} missing here")


def test_the_text_of_an_error_cannot_pass_for_a_record() -> None:
    program = subprocess.run([sys.executable, "-c", FORGED], cwd=REPOSITORY, text=True, capture_output=True, timeout=20)
    records = [line for line in program.stderr.splitlines() if not line.startswith("  ")]
    assert [record.rpartition(" ERROR   ")[2] for record in records] == ["worker: a request failed"]
    assert "RuntimeError: refused" in program.stderr
    assert "\\x1b[2J" in program.stderr


@pytest.mark.parametrize(("other", "priority"), [(0, "<3>"), (1, "")])
def test_each_line_has_its_priority_where_the_journal_reads_it(other: int, priority: str) -> None:
    reading, writing = os.pipe()
    status = os.fstat(writing)
    environment = os.environ | {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + other}"}
    subprocess.run([sys.executable, "-c", FORGED], cwd=REPOSITORY, stderr=writing, env=environment, timeout=20)
    os.close(writing)
    lines = read_to_end(reading)
    os.close(reading)
    assert len(lines) > 3
    assert {line[: len(priority)] for line in lines} == {priority}
    assert re.match(r"\d{4}-\d\d-\d\dT", lines[0].removeprefix(priority))


def test_data_and_control_go_on_while_nobody_reads_the_log() -> None:
    with short_directory() as directory, full_pipe() as (reading, writing):
        run = start_unread(directory, writing)
        try:
            control = f"ipc://{directory}/run/control"
            with subscribed(f"ipc://{directory}/run/a.pub") as subscriber:
                subscriber.wait_for("deribit.quote.", type="quote")
                os.kill(ask(control, "get_state", connection="a")["pid"], signal.SIGKILL)
                subscriber.wait_for("deribit.quote.", type="gap", reason="restart")
                subscriber.wait_for("deribit.status.", type="status", state="live")
            run.send_signal(signal.SIGTERM)
            assert run.wait(20) == 0
            lines = read_to_end(reading)
        finally:
            run.kill()
    assert lines == [], "somebody took what filled the pipe"


def start_unread(directory: Path, stderr: int) -> subprocess.Popen[bytes]:
    """Run a collector that writes its log there."""
    config = write_config(directory, {"a": QUICK}, exchange={})
    run = subprocess.Popen(collector("run", str(config)), stderr=stderr, cwd=REPOSITORY)
    os.close(stderr)
    return run
