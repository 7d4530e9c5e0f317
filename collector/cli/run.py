"""`collector run`: start the supervisor and stay until asked to stop."""

import asyncio
import logging
import multiprocessing.util
import os
import signal
import sys
import time
from itertools import count
from typing import TYPE_CHECKING

import click
import zmq

from collector import __version__
from collector.cli import Command
from collector.cli.options import ONE_WISH, fail, ignore_rotation, read_name
from collector.config import Config, ConfigError, load_config
from collector.config.urls import hide_secrets
from collector.log import start_log
from collector.sockets import advise, remove_socket
from collector.supervisor.commands import Commands
from collector.supervisor.control import ControlServer
from collector.supervisor.runtime import RuntimeDir, Unavailable, allow_files
from collector.supervisor.supervisor import Supervisor
from collector.words import say_count

if TYPE_CHECKING:
    from collector.cli.watch import View

REFRESH = 3600
"""Seconds between touches of the files in the runtime directory; systemd removes what is ten days old from /tmp."""

log = logging.getLogger(__name__)


@click.command(cls=Command)
@click.argument("file", type=read_name)
@click.option("--watch", "live_view", is_flag=True, help="Show the messages as they are published.")
@click.pass_context
def run(ctx: click.Context, file: str, live_view: bool) -> None:
    """Run the collector on FILE until it is asked to stop (Ctrl-C, SIGTERM).

    Exit codes: 0 asked to stop, 1 something failed for good, 2 wrong configuration, 3 the exchange refused the
    credentials, 129, 130 or 143 if a second signal forced the end (SIGHUP, SIGINT, SIGTERM).
    """
    start_log("supervisor", ctx.obj["log_level"])
    try:
        config = load_config(file, os.environ)
        os.umask(os.umask(0o077) & 0o077)  # what we make, and what all workers make, is open to ourselves at least
        allow_files(len(config.connections) + (config.exchange is not None))
        directory = RuntimeDir(config.runtime_dir, f"{config.path}: [collector]")
    except ConfigError as error:
        fail(str(error), 2)
    except Unavailable as error:
        fail(str(error))
    try:
        code = asyncio.run(_collect(config, directory, ctx.obj["log_level"], live_view))
    except zmq.ZMQError as error:
        fail(f"{config.path}: [collector] control {config.control} cannot be bound: {error}{advise(error.errno)}")
    sys.exit(code)


async def _collect(config: Config, directory: RuntimeDir, log_level: str, live_view: bool) -> int:
    supervisor = Supervisor(config, log_level, directory.begin_epoch)
    stopping = Stopping(supervisor)
    commands = Commands(supervisor)
    control = ControlServer(config.control, commands.answer)
    serving, guarding = supervisor.guard(control.serve()), supervisor.guard(_guard_files(directory, control))
    _greet(config, control.endpoint)
    if live_view:
        from collector.cli.watch import View  # only a person who watches needs what draws

        stopping.view = View(control.endpoint)
    try:
        code = await supervisor.run()
    finally:
        serving.cancel()
        guarding.cancel()
        control.close()
        remove_socket(config.control)
        is_shown = stopping.view is None or stopping.view.close()
    log.info("ended")
    code = stopping.forced or code
    if not is_shown:  # the interpreter would wait for output that nobody takes
        multiprocessing.util._run_finalizers()  # type: ignore[attr-defined]  # the forkserver's directory
        logging.shutdown()
        os._exit(code)
    return code


async def _guard_files(directory: RuntimeDir, control: ControlServer) -> None:
    """Keep the runtime directory from being cleared out, and make it anew where that happens all the same."""
    trouble = ""
    for second in count():
        await asyncio.sleep(1.0)
        if second % REFRESH == 0:
            directory.refresh()
        try:
            directory.restore()
            control.restore()
            trouble = ""
        except (ConfigError, Unavailable, OSError, zmq.ZMQError) as error:
            if str(error) != trouble:
                log.error("files were removed and cannot be made again: %s", error)
            trouble = str(error)


def _greet(config: Config, control: str) -> None:
    log.info("collector %s, %s", __version__, config.path)
    for connection in config.connections:
        words = say_count(len(connection.channels), "channel")
        if connection.patterns:
            words += f" and {say_count(len(connection.patterns), 'pattern')}"
        log.info("%s: %s of %s", connection.name, words, hide_secrets(connection.url))
    log.info("control on %s", control)
    log.info("Ctrl-C stops (SIGTERM to pid %d does too)", os.getpid())


class Stopping:
    """Signals: the first one asks for an end in order, a later one forces it."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.forced = 0
        self.view: View | None = None
        self._asked_at: float | None = None
        self._supervisor = supervisor
        ignore_rotation()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup means it
                loop.add_signal_handler(number, self._take, number)

    def _take(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            log.info("%s: stopping", number.name)
            if self.view is not None:
                self.view.leave()  # it has the terminal, and the log would be held back until all have ended
            self._supervisor.end(0)
            return
        if now - self._asked_at < ONE_WISH:
            return
        self.forced = 128 + number
        log.warning("%s again: forced", number.name)
        self._supervisor.kill()
        asyncio.get_running_loop().call_later(1.0, os._exit, self.forced)  # whatever still hangs
