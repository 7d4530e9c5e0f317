"""`collector plan`: what a configuration would do, and whether the exchange's limits allow it."""

import json
import os
import sys
from collections.abc import Iterator

import click
from msgspec import to_builtins

from collector.cli import Command
from collector.cli.options import exit_unread, fail, read_name
from collector.cli.render import pad_rows
from collector.config import Config, ConfigError, load_config
from collector.planning.plan import Listing, Plan, PlannedConnection, PlannedPattern, make_plan
from collector.supervisor.runtime import check_runtime_dir
from collector.words import say_count


@click.command(cls=Command)
@click.argument("file", type=read_name)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def plan(file: str, as_json: bool) -> None:
    """Say what FILE would do: connections, channels, endpoints, calls, and time at the exchange's rates.

    Nothing is started. The exchange is asked for its instruments only if FILE has patterns to expand.
    Exit codes: 1 if it could not be asked, 2 if the configuration is refused.
    """
    try:
        config = load_config(file, os.environ)
        check_runtime_dir(config.runtime_dir, f"{config.path}: [collector]")
        listing = _list_instruments(config)
        made = make_plan(config, listing)
    except ConfigError as error:
        fail(str(error), 2)
    code = 1 if listing.failures else 0
    with exit_unread(code):
        click.echo(json.dumps(to_builtins(made), indent=2) if as_json else "\n".join(write_plan(made)))
    for failure in dict.fromkeys(listing.failures.values()):
        click.echo(f"collector: patterns stay unexpanded: {failure}", err=True)
    sys.exit(code)


def _list_instruments(config: Config) -> Listing:
    patterned = {c.url: c for c in config.connections if c.patterns and not c.is_practice}
    if not patterned:
        return Listing()
    from collector.planning.catalogue import Catalogue, Unreachable  # what speaks HTTP is dear to load

    now, listed, failures = 0, {}, {}
    for url, connection in patterned.items():
        catalogue = Catalogue(url, connection.headers, connection.timeout)
        try:
            listed[url] = catalogue.read_all()
            now = catalogue.read_ms()  # as `run` does it
        except Unreachable as error:
            failures[url] = str(error)
    return Listing(now, listed, failures)


def write_plan(plan: Plan) -> Iterator[str]:
    """Write a plan as lines for people."""
    used = f"{len(plan.connections)} of {plan.connections_limit} connections"
    yield f"{plan.path}: {used} (REST requests in flight count too)"
    yield ""
    yield from map(_join, pad_rows([_HEADINGS, *map(_write_row, plan.connections)]))
    yield ""
    if plan.patterns:
        yield from map(_join, pad_rows([("pattern", "connection", "channels"), *map(_write_pattern, plan.patterns)]))
        yield ""
    yield f"quiet market {_QUIET}"
    yield f"control      {plan.control}"
    if plan.exchange:
        yield f"exchange     {plan.exchange}, the practice exchange"
    for pool in plan.pools:
        login = f"as {pool.login}" if pool.login else "without login"
        yield (
            f"subscribed   {', '.join(pool.connections)} at {pool.host} {login}: "
            f"{say_count(pool.calls, 'call')}, {_say_seconds(pool.seconds)}"
        )
    for note in plan.notes:
        yield f"note         {note}"


_QUIET = "messages a second, estimated; a busy market has many times that, and so has the practice exchange"

_HEADINGS = ("connection", "publish", "channels", "quiet market", "calls", "largest", "login")


def _write_pattern(planned: PlannedPattern) -> tuple[str, ...]:
    number = "not known yet" if planned.channels is None else str(planned.channels or "none now")
    return planned.pattern, planned.connection, number


def _write_row(connection: PlannedConnection) -> tuple[str, ...]:
    types = ", ".join(f"{number} {type}" for type, number in connection.types.items())
    return (
        connection.name,
        connection.publish,
        f"{len(connection.channels)}{f' ({types})' if types else ''}",
        f"{connection.rate:.0f}/s",
        str(len(connection.calls)),
        f"{max((call.bytes for call in connection.calls), default=0)} B",
        connection.login or "no",
    )


def _join(cells: list[str]) -> str:
    return "  ".join(cells).rstrip()


def _say_seconds(seconds: float) -> str:
    return f"{seconds:.1f} s and the round trips" if seconds else "at once"
