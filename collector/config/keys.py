"""The keys of the configuration file: type, default, bounds and meaning of each, and the checks of single values.

The tables below are the only place that knows them; the documentation is checked against them. No I/O, no clock.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple


class ConfigError(Exception):
    """What is wrong with a configuration, in one line: file, table, key, and what to write instead."""

    def __init__(self, line: str) -> None:
        super().__init__(" ".join(line.split()))


@contextmanager
def within(where: str) -> Iterator[None]:
    """Begin each error with where it is. A ValueError is what a single value's reader says of it."""
    try:
        yield
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None


REQUIRED: Any = object()
"""Stands as the default of a key that has none."""


class Key(NamedTuple):
    """One key: `type` is one of TYPES, `example` a TOML literal, `low` and `high` bound a number or a text's length."""

    type: str
    default: Any
    example: str
    meaning: str
    low: float = 0
    high: float = float("inf")


TYPES: dict[str, tuple[Any, str]] = {
    "string": ((str,), "a string"),
    "seconds": ((int, float), "a number of seconds"),
    "integer": ((int,), "a whole number"),
    "boolean": ((bool,), "true or false"),
    "list of strings": ((list,), "a list of strings"),
    "table of strings": ((dict,), "a table of strings"),
}

KEYS: dict[str, dict[str, Key]] = {
    "collector": {
        "runtime_dir": Key("string", "", '"/run/collector"', "directory of sockets, lock and ledgers, mode 0700"),
        "control": Key("string", "", '"ipc:///run/collector/control"', "endpoint of the control channel"),
        "http": Key("string", "", '""', "metrics, health and dashboard; comes later, must be empty"),
        "scheduling": Key(
            "string", "normal", '"normal"', "normal, or batch: workers do not interrupt other programs (Linux)"
        ),
        "read_pause": Key(
            "seconds", 0.0001, "0.0001", "rest between reads above 8,000 frames/s, for less CPU; 0: never", 0, 0.01
        ),
    },
    "exchange": {
        "port": Key("integer", 0, "0", "port of the practice exchange on 127.0.0.1; 0 is any free one", 0, 65535),
        "faults": Key("string", "", '""', "faults that every connection meets there", 0, 1000),
    },
    "connection": {
        "name": Key("string", REQUIRED, '"futures"', "its name in state, logs, topics and the process list", 1, 40),
        "url": Key("string", REQUIRED, '"wss://www.deribit.com/ws/api/v2"', 'the WebSocket, or "practice"', 1, 2000),
        "channels": Key("list of strings", (), '["book.BTC-PERPETUAL.100ms"]', "channels, or patterns of them", 1, 200),
        "publish": Key("string", "", '"tcp://127.0.0.1:5601"', "endpoint that subscribers connect to"),
        "headers": Key("table of strings", {}, '{ "User-Agent" = "desk-7" }', "sent with the upgrade"),
        "timeout": Key("seconds", 5.0, "5.0", "bound of one connection attempt and of one request", 0.05, 120),
        "retry_count": Key("integer", 3, "3", "attempts in a row before the worker gives up", 1, 1_000_000),
        "retry_delay": Key(
            "seconds", 1.0, "1.0", "pause after a first failed attempt; doubles, at most 60 s, with jitter", 0.01, 60
        ),
        "heartbeat_interval": Key("seconds", 30.0, "30.0", "Deribit's heartbeat; its floor is 10", 10, 600),
        "credentials": Key("string", "", '"DERIBIT"', "prefix of the environment variables that hold the key", 1, 32),
        "cancel_on_disconnect": Key("boolean", False, "false", "cancel orders on a lost connection"),
        "send_allow": Key("list of strings", (), '["private/buy"]', "further methods that control may send", 1, 100),
        "queue": Key("integer", 100_000, "100000", "messages held for a slow subscriber", 1, 10_000_000),
    },
}

_SECRET = re.compile(
    r"secret|passw|passphrase|api[-_]?key|token|client[-_]?id|private[-_]?key|signature|cookie|authorization", re.I
)
SECRET_ADVICE = (
    "secrets do not belong in the file; put them in the environment as DERIBIT_CLIENT_ID and DERIBIT_CLIENT_SECRET "
    'and write credentials = "DERIBIT" under [[connection]]'
)


def sounds_secret(name: str) -> bool:
    """Whether a key, header or parameter of that name would hold a secret."""
    return _SECRET.search(name) is not None


def suggest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the known word that was probably meant, or ""."""
    from difflib import get_close_matches  # wanted only when something is wrong already

    close = get_close_matches(word.lower()[:100], list(known), 1, cutoff)
    return close[0] if close else ""


def read_table(table: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the values of all keys of a table of that kind, defaults filled in.

    Raises ConfigError for a key unknown or missing, a wrong type, a number out of bounds.
    """
    keys = KEYS[kind]
    for name in table:
        if name not in keys:
            raise ConfigError(_explain_unknown(name, keys))
    return {name: _read_value(table.get(name), name, key) for name, key in keys.items()}


def _explain_unknown(name: Any, keys: Mapping[str, Key]) -> str:
    shown = show(name)
    close = suggest(str(name), keys)
    if sounds_secret(str(name)):
        return f"{shown}: {SECRET_ADVICE}"
    if close:
        return f"{shown} is no key of this table; did you mean {close}?"
    return f"{shown} is no key of this table; there are {', '.join(keys)}"


def show(value: Any) -> str:
    """A value as an error line shows it: short, on one line, never with control characters."""
    if isinstance(value, str) and re.fullmatch(r"[\w.\-]{1,60}", value, re.ASCII):
        return value
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**18 else "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read_value(value: Any, name: str, key: Key) -> Any:
    if value is None:  # never in TOML, but a program may say so through the control channel
        if key.default is REQUIRED:
            raise ConfigError(f"{name} is missing; write for example {name} = {key.example}")
        return key.default
    types, words = TYPES[key.type]
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise ConfigError(f"{name} must be {words}; write for example {name} = {key.example}")
    if key.type in ("seconds", "integer"):
        return _read_number(value, name, key)
    if key.type == "list of strings":
        return _read_list(value, name, key)
    if key.type == "string" and len(value) > key.high:
        raise ConfigError(f"{name} is {len(value)} characters long; write at most {key.high:.0f}")
    return value


def _read_number(value: float, name: str, key: Key) -> float:
    if not key.low <= value <= key.high:  # also catches nan
        if key.type == "seconds" and value >= 100 and 1000 * key.low <= value <= 1000 * key.high:
            raise ConfigError(f"{name} = {value} looks like milliseconds; times are in seconds, write {value / 1000}")
        span = f"{key.low:.10g} to {key.high:.10g}{' seconds' if key.type == 'seconds' else ''}"
        raise ConfigError(f"{name} = {show(value)} is out of range; write {span}, for example {key.example}")
    return float(value) if key.type == "seconds" else value


def _read_list(value: list[Any], name: str, key: Key) -> tuple[str, ...]:
    for number, item in enumerate(value, 1):
        if not isinstance(item, str):
            raise ConfigError(f"{name}: item {number} must be a string; write for example {name} = {key.example}")
        if not key.low <= len(item) <= key.high:
            raise ConfigError(f"{name}: item {number} is {len(item)} characters long; write 1 to {key.high:.0f}")
    return tuple(value)
