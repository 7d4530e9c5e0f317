"""The command line: one small module a group of commands, imported only when one of its commands is used.

Only `exchange` imports aiohttp and workers: a command should answer at once.
"""

import os
import sys
from importlib import import_module
from io import TextIOWrapper
from typing import Any

import click

from collector import __version__

COMMANDS = {
    "run": ("run", "Run the collector on FILE until it is asked to stop"),
    "plan": ("plan", "Say what FILE would do, and whether Deribit's limits allow it"),
    "state": ("control", "Show how all connections are, or one in full"),
    "connect": ("control", "Add a connection to a running collector"),
    "subscribe": ("control", "Subscribe a connection to further channels"),
    "unsubscribe": ("control", "Give up channels of a connection"),
    "send": ("control", "Send one request to the exchange, print its result"),
    "close": ("control", "End a connection for good; the others go on"),
    "tail": ("tail", "Show the messages, live"),
    "verify": ("verify", "Check every rule of the wire, print a verdict"),
    "exchange": ("exchange", "Run the practice exchange: Deribit's protocol, no network"),
}
"""Each command: the module beside this one that holds it, as a click command of the same name, and what
`collector --help` says of it, which need not import them all to say so."""

INTERRUPTED = 130
"""The exit code after Ctrl-C of what was not done: as a shell says it of a program that SIGINT has ended."""


class Command(click.Command):
    """A command; its help and version, which click writes while it reads the arguments, may find the disk full too."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        try:
            return super().make_context(*args, **options)
        except OSError:
            from collector.cli.options import exit_unread  # it needs this module

            with exit_unread():
                raise


class _Lazy(Command, click.Group):
    def main(self, *args: Any, **options: Any) -> Any:
        fill_closed_files()
        return super().main(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not ctx.resilient_parsing:  # a shell that completes wants no errors
            from difflib import get_close_matches

            for meant in get_close_matches(args[0], COMMANDS, 1):
                ctx.fail(f"No such command {args[0]!r}. Did you mean {meant!r}?")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"collector.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


def is_dumb() -> bool:
    """Whether the terminal, by its own name, can show lines and no more."""
    return os.environ.get("TERM", "dumb") in ("dumb", "unknown", "")


def fill_closed_files() -> None:
    """Put /dev/null in the place of stdin, stdout and stderr that are closed.

    Whatever is opened next would be taken for them: the forkserver dies of that.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it has the least number that is free
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)


@click.command(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="collector")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="How much is logged to stderr.",
)
@click.pass_context
def main(ctx: click.Context, log_level: str) -> None:
    """Collect Deribit's market data and publish it on ZeroMQ."""
    ctx.obj = {"log_level": log_level}
    if is_dumb() or os.environ.get("NO_COLOR"):
        ctx.color = False
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what the terminal's encoding lacks, as Latin-1 an ellipsis
