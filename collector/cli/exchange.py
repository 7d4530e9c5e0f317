"""`collector exchange`: the practice exchange alone."""

import asyncio
import signal
import sys
from typing import Any

import click

from collector.cli import Command
from collector.cli.options import exit_unread, ignore_rotation

PACE = click.FloatRange(0, 100_000)
"""More than any machine can do; without a bound the first step of the market might have no end."""


@click.command(cls=Command)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=0, type=click.IntRange(0, 65535), show_default=True, help="Port; 0 is any free one.")
@click.option(
    "--faults", default="", metavar="SPEC", help="NAME:ARG,NAME:ARG for every connection whose URL names none."
)
@click.option("--list-faults", is_flag=True, help="Print what can go wrong on request, and end.")
@click.option("--seed", default=1, show_default=True, help="The same seed gives the same market.")
@click.option(
    "--rate", default=200.0, type=PACE, show_default=True, help="Book events a second, all instruments together."
)
@click.option("--options", default=240, type=click.IntRange(0), show_default=True, help="How many options are listed.")
@click.option("--oracle", type=click.Path(dir_okay=False), help="Append to this file what really happens (JSON lines).")
@click.option(
    "--replay",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="Send the recorded frames of this file.",
)
@click.option("--speed", default=1.0, type=PACE, show_default=True, help="Pace of the replay; 0 is all at once.")
@click.option("--own-credits", is_flag=True, help="No connection draws on another's request credits.")
@click.option(
    "--certificate", type=click.Path(dir_okay=False), help="Serve TLS with this PEM file (certificate and key)."
)
def exchange(list_faults: bool, **spec: Any) -> None:
    """Run the practice exchange: it speaks Deribit's protocol, and no network is needed.

    Client id and secret are practice and practice, or those in PRACTICE_KEYS (id:secret,id:secret).
    """
    from collector.faults import list_faults as describe_faults

    if list_faults:
        with exit_unread():
            click.echo(describe_faults())
        return
    try:
        asyncio.run(_serve(spec))
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except OSError as error:
        click.echo(f"collector exchange: {error}", err=True)
        sys.exit(1)


async def _serve(spec: dict[str, Any]) -> None:
    from workers.exchange.worker import create_worker

    worker = create_worker(spec)
    ignore_rotation()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, worker.stop)
    endpoints = await worker.start()
    with exit_unread(1):
        click.echo(f"listening on {endpoints['url']}")
    await worker.run()
