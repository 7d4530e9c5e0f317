"""`collector tail`: see the messages, live on a terminal, as JSON lines for programs."""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from collector.cli import Command, is_dumb
from collector.cli.options import Ending, control_option, endpoint_option, exit_on_error, for_option, json_option
from collector.cli.render import format_line
from collector.client.stream import Loss, Message
from collector.client.subscriber import Subscriber
from collector.words import printable

if TYPE_CHECKING:
    from collector.cli.live import Board

Items = Iterator[Message | Loss | None]
"""Messages as they come; None where none came for a moment."""

LINES = 10
"""Lines a second at most where nobody asked for every message."""

MAX_LOSSES = 100
"""Gaps, repairs and losses that wait for their line at most: the last ones."""

SILENT = 3.0
"""Seconds without any message after which a reader may wonder whether the prefix is right."""

REDRAW = 0.25
"""Seconds between two pictures of the live view."""

HEARTBEATS = "deribit.heartbeat."
"""What the live view reads besides, to say of each connection how it is."""


@click.command(cls=Command)
@click.argument("prefixes", metavar="[PREFIX]...", nargs=-1)
@endpoint_option
@control_option
@click.option("--count", type=click.IntRange(1), metavar="N", help="End after N messages.")
@for_option(None)
@json_option
def tail(
    prefixes: tuple[str, ...], endpoints: tuple[str, ...], control: str | None, count: int | None,
    duration: float | None, as_json: bool,
) -> None:  # fmt: skip
    """Show the messages whose topic begins with one of the PREFIXes (all, if none is given).

    On a terminal as a live view; piped, or with --json, every message as one line of JSON.

    \b
    collector tail deribit.trade. deribit.book.BTC-PERPETUAL.
    collector tail --for 2s deribit.ticker.BTC-PERPETUAL. | jq '.last_price // empty'
    """
    ending = Ending()
    is_drawn = not as_json and choose_view() is draw_live
    besides = [HEARTBEATS] if is_drawn and prefixes and count is None else []
    with (
        exit_on_error(interrupted=0),
        Subscriber(endpoints or None, [*(prefixes or [""]), *besides], control, on_loss="report") as subscriber,
    ):
        silence = Silence(subscriber, prefixes)
        items = read(subscriber, ending.has_come, count, duration)
        if as_json or not sys.stdout.isatty():
            write_json(silence.watch(items, says_yet=True))
        else:
            choose_view()(subscriber, silence.watch(items, says_yet=False), ["Ctrl-C leaves; the collector goes on"])
        silence.tell_end()


def read(
    subscriber: Subscriber, is_ended: Callable[[], bool], count: int | None = None, duration: float | None = None
) -> Items:
    """Yield until so many messages have come, or the time is over, or `is_ended`."""
    end = None if duration is None else time.monotonic() + duration
    while (end is None or time.monotonic() < end) and not is_ended():
        item = subscriber.receive(0)
        if item is None:
            yield None
            item = subscriber.receive(0.1)
        if item is not None:
            yield item
        if isinstance(item, Message) and count is not None:
            count -= 1
            if count == 0:
                return


class Silence:
    """Says on stderr that nothing comes, from where nothing comes, and what the cause may be."""

    def __init__(self, subscriber: Subscriber, prefixes: tuple[str, ...]) -> None:
        self._subscriber = subscriber
        self._prefixes = prefixes
        self._is_broken = False

    def watch(self, items: Items, says_yet: bool) -> Items:
        """Pass the items on; with `says_yet`, say it once if none has come for SILENT seconds."""
        due = time.monotonic() + SILENT
        for item in items:
            self._is_broken = self._is_broken or self._is_asked_for(item)
            if says_yet and not self._is_broken and time.monotonic() > due:
                says_yet = False
                self._say("nothing yet")
            yield item

    def _is_asked_for(self, item: Message | Loss | None) -> bool:
        return str(item.topic).startswith(self._prefixes or "") if isinstance(item, Message) else item is not None

    def tell_end(self) -> None:
        """Say it if nothing came until the end."""
        if not self._is_broken:
            self._say("nothing came")

    def _say(self, said: str) -> None:
        wanted = f" on topics that begin with {' or '.join(map(repr, self._prefixes))}" if self._prefixes else ""
        where = ", ".join(map(_show_endpoint, sorted(self._subscriber.endpoints))) or "no connection"
        advice = (
            "a topic is like deribit.trade.BTC-PERPETUAL.100ms; `collector state` shows what is collected, and where"
        )
        click.echo(printable(f"collector: {said}{wanted} from {where}; {advice}"), err=True)


def _show_endpoint(endpoint: str) -> str:
    is_shut = endpoint.startswith("ipc:///") and not os.access(endpoint.removeprefix("ipc://"), os.W_OK)
    return f"{endpoint} (not there, or closed to you)" if is_shut else endpoint


def write_json(items: Items) -> None:
    """Write each message as one line of JSON, each loss as one line on stderr."""
    import msgspec

    encode = msgspec.json.Encoder().encode
    out = sys.stdout.buffer
    for item in items:
        if isinstance(item, Message):
            out.write(encode({"topic": str(item.topic), **item.payload}) + b"\n")
        elif item is not None:
            click.echo(printable(f"collector: {item}"), err=True)
        else:
            out.flush()
    out.flush()


def choose_view() -> Callable[[Subscriber, Items, list[str]], None]:
    """What shows messages, with notes above them: the live view on a terminal that can draw it, else lines."""
    return draw_live if sys.stdout.isatty() and not is_dumb() else write_lines


def draw_live(subscriber: Subscriber, items: Items, notes: list[str]) -> None:
    """The live view, until there are no more items."""
    from rich.console import Console
    from rich.live import Live

    from collector.cli.live import Board

    console = Console()
    board = Board(notes)
    # What is printed beside the view, as a traceback, belongs to who holds stderr: the held log, or a file.
    with Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as live:
        _draw_items(items, board, lambda: live.update(board.render(console), refresh=True), subscriber)


def _draw_items(items: Items, board: "Board", redraw: Callable[[], None], subscriber: Subscriber) -> None:
    """Apart from the `with` of its caller: Python 3.13 heeds a signal between two rounds of a loop outside it."""
    due = 0.0
    for item in items:
        if item is not None:
            board.take(item)
        if time.monotonic() >= due:
            board.endpoints, board.lifeless = subscriber.found, subscriber.lifeless
            redraw()
            due = time.monotonic() + REDRAW


def write_lines(subscriber: Subscriber, items: Items, notes: list[str]) -> None:
    """A line for a message now and then, few enough to read: losses first, then the topic shown longest ago."""
    for note in [*notes, f"(at most {LINES} messages a second are shown; `collector tail --json` has them all)"]:
        click.echo(note)
    told: dict[str, str] = {}
    shown: dict[object, float] = {}
    waiting: dict[object, Message] = {}
    losses: deque[Message | Loss] = deque(maxlen=MAX_LOSSES)  # the next message of their topic comes at once
    due = time.monotonic()
    for item in items:
        for name, endpoint in subscriber.found.items():
            if told.get(name) != endpoint:
                told[name] = endpoint
                click.echo(printable(f"{name} publishes at {endpoint}"))
        if isinstance(item, Loss) or (item is not None and item.type in ("gap", "repair") and not item.is_join):
            losses.append(item)
        elif item is not None and not item.is_join:
            waiting[item.topic] = item
        if (losses or waiting) and time.monotonic() >= due:
            due = time.monotonic() + 1 / LINES
            if losses:
                click.echo(format_line(losses.popleft()))
                continue
            topic = min(waiting, key=lambda topic: shown.get(topic, 0.0))
            click.echo(format_line(waiting[topic]))
            shown[topic] = due
            waiting.clear()
