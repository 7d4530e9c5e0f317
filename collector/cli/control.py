"""Commands that ask a running collector: state, connect, subscribe, unsubscribe, send, close."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from collector.cli import Command
from collector.cli.facts import print_facts, print_table
from collector.cli.options import asking_options, control_option, exit_on_error, exit_unread, read_name, timeout_option
from collector.client.control import Control
from collector.words import printable


@click.command(cls=Command)
@click.argument("name", type=read_name, required=False)
@asking_options("5s")
def state(name: str | None, control: str | None, timeout: float, as_json: bool) -> None:
    """Show how all connections are, or all there is to know of one."""
    with exit_on_error(), Control(control, timeout) as asked:
        found = asked.get_state(name)
        if name is None and not as_json:
            print_table(found)
        else:
            print_state(found, as_json)


@click.command(cls=Command)
@click.argument("name", type=read_name)
@click.argument("channels", metavar="[CHANNEL]...", nargs=-1)
@click.option("--from", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
              help="Take the [[connection]] table of that name from a configuration file.")  # fmt: skip
@click.option("--url", help="Where to connect, e.g. wss://www.deribit.com/ws/api/v2.")
@click.option("--publish", metavar="ENDPOINT", help="Where to publish [default: NAME.pub in the runtime directory].")
@click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help="Any further key of the table; repeatable.")
@asking_options("30s")
def connect(
    name: str, channels: tuple[str, ...], file: Path | None, url: str | None, publish: str | None,
    settings: tuple[str, ...], control: str | None, timeout: float, as_json: bool,
) -> None:  # fmt: skip
    """Add a connection to a running collector, and wait until it is live.

    \b
    collector connect sol quote.SOL_USDC-PERPETUAL --url wss://www.deribit.com/ws/api/v2
    collector connect options --from configs/deribit.toml      (again, after it was closed or has failed)
    """
    settings_advice = "" if file or settings else "any key of the table can be given: --set KEY=VALUE"
    state_advice = f"collector state {name} shows what comes of it"
    # A connection that was never live is not kept: no state shows how it is.
    with exit_on_error(bad_request=settings_advice, timeout=state_advice, not_connected=""):
        wanted = {"name": name, "url": url, "publish": publish, "channels": list(channels) or None}
        given = {key: value for key, value in wanted.items() if value is not None}
        further = dict(map(read_setting, settings))
        if twice := given.keys() & further:
            raise ValueError(f"--set {min(twice)}: that is given beside it already; leave one of them out")
        table = (read_table(file, name) if file else {}) | further | given
        if not table.get("url"):
            example = "--url wss://www.deribit.com/ws/api/v2"
            raise ValueError(f"{name} has no URL to connect to; add {example}, or --from FILE that has its table")
        with Control(control, timeout) as asked:
            print_state(asked.connect(table), as_json)


KEPT = "the wish is kept; collector state NAME shows what comes of it"


def channel_command(act: Callable[..., None]) -> click.Command:
    """A command that changes the channels of one connection."""
    channels = click.argument("channels", metavar="CHANNEL...", nargs=-1, required=True)
    return click.command(cls=Command)(click.argument("name", type=read_name)(channels(asking_options("5s")(act))))


@channel_command
def subscribe(name: str, channels: tuple[str, ...], control: str | None, timeout: float, as_json: bool) -> None:
    """Subscribe a connection to further channels.

    Ends with 1 if one is refused, or only kept because the connection is not live. What the exchange refuses stays
    asked for, and is tried again every ten minutes and on the next connection, until it is given up with unsubscribe.
    """
    with exit_on_error(timeout=KEPT), Control(control, timeout) as asked:
        result = asked.subscribe(name, channels)
        # What the exchange refuses it may give another time, so the wish stands.
        notes = {
            channel: f"still asked for; to give it up: collector unsubscribe {name} {channel}"
            for channel, outcome in result.get("channels", {}).items()
            if isinstance(outcome, Mapping) and outcome.get("code") == "exchange_error"
        }
        print_channels(result, "subscribed", as_json, notes)


@channel_command
def unsubscribe(name: str, channels: tuple[str, ...], control: str | None, timeout: float, as_json: bool) -> None:
    """Give up channels of a connection.

    Ends with 1 if one was not asked for, or may not be given up.
    """
    with exit_on_error(), Control(control, timeout) as asked:
        # To give up what nobody asked for is no error to the collector: only the names say whether it was meant.
        known = asked.get_state(name).get("channels") or {"asked": channels}
        unasked = f"was not asked for; what is, says: collector state {name}"
        notes = {channel: unasked for channel in channels if channel not in known["asked"]}
        with exit_on_error(timeout=KEPT):
            print_channels(asked.unsubscribe(name, channels), "unsubscribed", as_json, notes)


@click.command(cls=Command)
@click.argument("name", type=read_name)
@click.argument("method")
@click.argument("params", required=False)
@control_option
@timeout_option("5s")
def send(name: str, method: str, params: str | None, control: str | None, timeout: float) -> None:
    """Send one request to the exchange and print its result as JSON.

    \b
    collector send futures public/get_time
    collector send futures public/ticker '{"instrument_name": "BTC-PERPETUAL"}'
    """
    try:
        arguments = json.loads(params) if params else None
        if not isinstance(arguments, dict | None):
            raise ValueError(f"this is a {type(arguments).__name__}")
    except (ValueError, RecursionError) as error:
        words = f'write a JSON object, like \'{{"currency": "BTC"}}\' ({error})'
        raise click.BadParameter(words, param_hint="PARAMS") from None
    with exit_on_error(), Control(control, timeout) as asked:
        print_json(asked.send(name, method, arguments))


@click.command(cls=Command)
@click.argument("name", type=read_name)
@asking_options("10s")
def close(name: str, control: str | None, timeout: float, as_json: bool) -> None:
    """End a connection and its worker for good; the others go on."""
    with exit_on_error(), Control(control, timeout) as asked:
        print_state(asked.close(name), as_json)


def read_table(file: Path, name: str) -> dict[str, Any]:
    """The [[connection]] table of that name in a configuration file. Raises ValueError."""
    from collector.config import ConfigError  # only here: the other commands must start fast
    from collector.config.reader import read_toml

    try:
        tables = {str(table["name"]): dict(table) for table in read_toml(file).get("connection", [])}
    except ConfigError as error:
        raise ValueError(f"{file}: {error}") from None
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{file}: connections are [[connection]] tables, each with a name") from None
    if name not in tables:
        raise ValueError(f"{file}: there is no [[connection]] {name!r}; there are {', '.join(tables) or 'none'}")
    return tables[name]


def read_setting(text: str) -> tuple[str, Any]:
    """Read KEY=VALUE, the value as in TOML, or as text where it is none. Raises ValueError."""
    import tomllib

    key, found, value = text.partition("=")
    if not found or not key.strip():
        raise ValueError(f"--set {text!r}: write KEY=VALUE, for example --set timeout=3")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return key.strip(), value.strip()


def print_json(value: Any) -> None:
    """Print a value as JSON: indented for a person, in one line for a program."""
    click.echo(json.dumps(value, indent=2 if sys.stdout.isatty() else None, default=str))


def print_state(found: dict[str, Any], as_json: bool) -> None:
    """Print the state of one connection."""
    if as_json:
        print_json(found)
    else:
        print_facts(found)


def print_channels(result: dict[str, Any], done: str, as_json: bool, notes: Mapping[str, str]) -> None:
    """Print what became of each channel, and what there is to note; exit with 1 if one was refused or has a note."""
    channels = result.get("channels", {})
    refused = {name: describe_refusal(outcome) for name, outcome in channels.items() if outcome is not True}
    code = 1 if refused or notes else 0
    with exit_unread(code):
        if as_json:
            print_json(result)
        for name in channels:
            if words := [said[name] for said in (refused, notes) if name in said]:
                click.echo(printable(f"collector: {name}: {'; '.join(words)}"), err=True)
            elif not as_json:
                click.echo(printable(f"{name}  {done}"))
    sys.exit(code)


def describe_refusal(outcome: Any) -> str:
    """What a channel's refusal says."""
    if not isinstance(outcome, Mapping):
        return str(outcome)
    return f"{outcome.get('code', 'refused')}: {outcome.get('message', '')}"
