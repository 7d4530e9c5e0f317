"""Options and exits that the reading commands share."""

import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from collector.cli import INTERRUPTED
from collector.messages import ControlError
from collector.words import printable

ADVICE = {
    "not_connected": "`collector state` shows how it is",
    "expired": "--timeout gives it more time",
    "internal": "see the collector's log",
}
"""What to do about a control error, where its message does not say."""


def read_duration(text: str) -> float:
    """Seconds, from text such as 60, 60s, 1.5m or 2h; for click options."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h|)", text.strip(), re.ASCII)
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not 0 < seconds <= 366 * 86400:
        raise click.BadParameter(f"{text!r} is no length of time; write for example 60s, 5m or 2h")
    return seconds


def read_name(text: str) -> str:
    """A connection's name, or a file's; for click arguments. None at all would be all of them, or where we are."""
    if not text:
        raise click.BadParameter("it is empty (a shell variable that is not set?)")
    return text


control_option = click.option(
    "--control",
    metavar="ENDPOINT",
    help="Control endpoint of the collector [default: COLLECTOR_CONTROL, else that of the default runtime directory].",
)
endpoint_option = click.option(
    "--endpoint", "endpoints", metavar="ENDPOINT", multiple=True,
    help="Where to read; repeatable [default: the endpoints that the collector reports].",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def timeout_option(default: str) -> Callable[[Any], Any]:
    """The option for how long an answer is waited for."""
    return click.option(
        "--timeout", type=read_duration, metavar="TIME", default=default, show_default=True,
        help="How long to wait for the answer.",
    )  # fmt: skip


def asking_options(timeout: str) -> Callable[[Any], Any]:
    """The options of a command that asks a running collector: where it is, how long to wait, how to print."""
    return lambda command: control_option(timeout_option(timeout)(json_option(command)))


def for_option(default: str | None) -> Callable[[Any], Any]:
    """The option for how long messages are read."""
    return click.option(
        "--for", "duration", type=read_duration, metavar="TIME", default=default, show_default=default is not None,
        help="How long to read, e.g. 60s or 5m.",
    )  # fmt: skip


def ignore_rotation() -> None:
    """Ignore the signals by which programs that rotate logs ask for a new file: there is none to open anew.

    What is started from here inherits this.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


ONE_WISH = 0.3
"""Seconds after a signal in which another one says the same: some programs signal both the process and its group."""


class Ending:
    """Takes SIGTERM as Ctrl-C: who draws on a terminal gives it back, and a verdict so far is worth having then too.

    A loop asks `has_come` as well: of the KeyboardInterrupt alone it might never hear. pyzmq's wheels for Python 3.12
    and newer run Python code while they raise zmq.Again, and what a handler raises amid that is dropped.
    """

    def __init__(self) -> None:
        self._asked_at = -math.inf
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell has it for what runs in the background
                signal.signal(number, self._take)

    def has_come(self) -> bool:
        """Whether a signal has asked for the end."""
        return self._asked_at > -math.inf

    def _take(self, *_: object) -> None:
        now = time.monotonic()
        if now - self._asked_at >= ONE_WISH:
            self._asked_at = now
            raise KeyboardInterrupt


def fail(message: str, code: int = 1) -> NoReturn:
    """End with one line on stderr."""
    click.echo(printable(f"collector: {message}"), err=True)
    sys.exit(code)


@contextmanager
def exit_unread(code: int = 0) -> Iterator[None]:
    """End with `code`, and quietly, if the reader of our output has gone, as `| head` does: nobody is left to tell.

    With 1 and a word on stderr if it cannot be written otherwise, as on a full disk.
    """
    try:
        yield
    except BrokenPipeError:
        drop_output()
        sys.exit(code)
    except OSError as error:
        drop_output()
        fail(f"the output cannot be written: {error.strerror or error}")


def drop_output() -> None:
    """Write no more to a reader that has gone: what is still to be written would fail once more at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@contextmanager
def exit_on_error(interrupted: int = INTERRUPTED, **advice: str) -> Iterator[None]:
    """End with exit code 1 and what to do, if the collector refuses or does not answer; quietly if nobody reads on.

    `interrupted`: the exit code after Ctrl-C. `advice`: what to do about errors of these codes, where a command knows
    more than ADVICE.
    """
    try:
        with exit_unread():
            yield
    except ControlError as error:
        cure = (ADVICE | advice).get(error.code) if type(error) is ControlError else ""  # else nobody has heard it
        fail(str(error) + (f" ({cure})" if cure else ""))
    except ValueError as error:
        fail(str(error), 2)
    except KeyboardInterrupt:
        sys.exit(interrupted)
