"""What a running collector says of itself, as a person reads it: the table of its connections, and all facts of one."""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import click

from collector.cli.render import pad_rows
from collector.words import printable, say_count

COLORS = {"live": "green", "failed": "red", "closed": "red", "backoff": "yellow"}


def print_table(states: dict[str, Any]) -> None:
    """Print one line a connection."""
    if not states:
        click.echo("no connections (`collector connect` adds one)")
        return
    rows = [[show(state) for show in COLUMNS.values()] for _, state in sorted(states.items())]
    for name, state, *others in pad_rows([COLUMNS, *rows]):
        click.echo("  ".join([name, click.style(state, fg=COLORS.get(state.rstrip())), *others]).rstrip())
    for name, found in sorted(states.items()):
        if found.get("last_error"):
            click.echo(printable(f"{name}: last error: {show_error(found['last_error'])}"))
        channels = found.get("channels") or {}
        if refused := channels.get("refused"):
            channel, reason = next(iter(refused.items()))
            click.echo(printable(f"{name}: {say_count(len(refused), 'channel')} refused: {channel}: {reason}"))
        if mute := channels.get("mute"):
            click.echo(printable(f"{name}: {say_count(len(mute), 'channel')} mute: {mute[0]}"))


def print_facts(facts: Mapping[str, Any], indent: str = "") -> None:
    """Print a map as a person reads it: first what fits on a line each, then maps and lists below their key."""
    # Only at the top are keys ours: further down stand names of channels, which imply no unit.
    lines = {key: show_fact("" if indent else key, value) for key, value in facts.items() if not _is_long(key, value)}
    width = max(map(len, lines), default=0)
    for key in sorted(lines, key=lambda key: _FIRST.index(key) if key in _FIRST else len(_FIRST)):
        click.echo(printable(f"{indent}{key.ljust(width)}  {lines[key]}"))
    for key, value in facts.items():
        if _is_long(key, value):
            click.echo(printable(f"{indent}{key}{_show_number(value)}"))
            if isinstance(value, Mapping):
                print_facts(value, indent + "  ")
            else:
                click.echo("".join(f"{indent}  {printable(str(item))}\n" for item in value), nl=False)


_FIRST = ("name", "state", "since", "last_error", "url", "publish", "pid")


def _is_long(key: str, value: Any) -> bool:
    """Whether a value needs lines of its own."""
    is_one_fact = key == "last_error" or _is_spread(value)
    return bool(value) and isinstance(value, list | tuple | Mapping) and not is_one_fact


def _show_number(value: Any) -> str:
    """How many there are below a key; of a map of lists each list says it for itself."""
    is_map_of_lists = isinstance(value, Mapping) and any(isinstance(each, list | Mapping) for each in value.values())
    return "" if is_map_of_lists else f" ({len(value)})"


def _is_spread(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"p50", "p99"}


def show_fact(key: str, value: Any) -> str:
    """One value, with the unit that its key implies."""
    if value is None or value in ("", {}, []):
        return "-"
    if key in ("since", "epoch") or key.endswith("_ts"):
        return f"{show_time(value)}  ({show_age(value)} ago)" if value else "-"
    if _is_spread(value):
        return f"{show_milliseconds(value['p50'])} median, {show_milliseconds(value['p99'])} 99th percentile"
    if key in ("clock_offset", "clock_error"):
        return f"{value / 1e6:.1f} ms"
    if key in ("bytes", "memory"):
        return f"{value / 1e6:,.1f} MB"
    if key == "rate":
        return f"{value:,.1f} messages/s"
    if key == "cpu":
        return f"{value:.1%} of a core"
    return show_error(value) if key == "last_error" else str(value)


def show_time(ns: int) -> str:
    """A time of ours, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(ns / 1e9))


def show_age(ns: int) -> str:
    """How long ago a time was, in its two largest units."""
    seconds = max(0, int((time.time_ns() - ns) / 1e9))
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d {hours % 24}h"
    if hours:
        return f"{hours}h {minutes % 60}m"
    return f"{minutes}m {seconds % 60}s" if minutes else f"{seconds}s"


def show_milliseconds(seconds: float) -> str:
    """A short time."""
    return f"{seconds:,.1f} s" if abs(seconds) >= 10 else f"{seconds * 1e3:,.1f} ms"


def show_error(error: Any) -> str:
    """An error on one line: the exchange's as it came, ours in its words."""
    ours = error["message"] if isinstance(error, Mapping) and set(error) == {"message"} else error
    return (ours if isinstance(ours, str) else json.dumps(error, default=str))[:300]


def _show_channels(state: Mapping[str, Any]) -> str:
    channels = state.get("channels") or {}
    return f"{len(channels.get('confirmed', ()))}/{len(channels.get('asked', ()))}"


def _show_lag(state: Mapping[str, Any]) -> str:
    lag = state.get("lag") or {}
    return " / ".join(show_milliseconds(lag[key]) for key in ("p50", "p99") if key in lag) or "-"


COLUMNS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "NAME": lambda state: str(state.get("name", "?")),
    "STATE": lambda state: str(state.get("state", "?")),
    "SINCE": lambda state: show_age(state["since"]) if state.get("since") else "-",
    "CHANNELS": _show_channels,
    "MSG/S": lambda state: f"{state.get('rate') or 0:,.0f}",
    "LAG P50 / P99": _show_lag,
    "GAPS": lambda state: str(state.get("gaps", "-")),
    "RECONNECTS": lambda state: str(state.get("reconnects", "-")),
    "RESTARTS": lambda state: str(state.get("restarts", "-")),
    "PUBLISHES AT": lambda state: str(state.get("publish") or "-"),
}
"""The table of `collector state`: title and how to show it. CHANNELS is confirmed / asked for."""
