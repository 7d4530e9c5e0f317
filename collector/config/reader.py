"""The configuration: one TOML file and the environment, read here and nowhere else, into typed, frozen values.

Whatever is wrong is refused before anything starts, in one line: file, table, key, and what to write instead.
"""

import os
import re
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from collector.channels import Channel, parse_channel
from collector.config.clashes import check_together
from collector.config.credentials import Credentials, take_secrets
from collector.config.endpoints import Endpoint, parse_endpoint
from collector.config.keys import KEYS, SECRET_ADVICE, ConfigError, read_table, show, sounds_secret, suggest, within
from collector.config.patterns import is_pattern, parse_pattern
from collector.config.urls import check_headers, check_url
from collector.config.values import Config, Connection, Exchange
from collector.defaults import default_runtime_dir
from collector.faults import parse_faults
from collector.messages import EXCHANGE

MAX_FILE = 16 << 20
"""Bytes of a configuration file."""

MAX_PATTERNS = 100
"""Patterns of one connection: each is held against all instruments, again and again."""

_NAME = re.compile(r"[a-z0-9][a-z0-9-]*\Z")
_PREFIX = re.compile(r"[A-Z][A-Z0-9_]*\Z")
_METHOD = re.compile(r"(public|private)/[a-z0-9_]+\Z")
_RESERVED = ("exchange", "collector", "supervisor")

_FILES = ("lock", "*.ledger", "*.ledger.new", "credits-*")
"""What the collector makes in its runtime directory besides sockets; of those it removes *.pub at each start."""

DOCUMENTED = (
    "trades", "book", "ticker", "quote", "incremental_ticker", "perpetual", "chart", "markprice", "instrument",
    "deribit_price_index", "deribit_price_ranking", "deribit_price_statistics", "deribit_volatility_index",
    "estimated_expiration_price", "platform_state", "announcements", "block_rfq", "block_trade_confirmations", "user",
)  # fmt: skip
"""First words of the channels that Deribit documents; a near miss of one is taken for a slip of the pen."""


def load_config(path: str | os.PathLike[str], environ: MutableMapping[str, str]) -> Config:
    """Read and check a file. Takes the secrets out of `environ`. Raises ConfigError."""
    secrets = take_secrets(environ)
    where = str(path) if str(path).isprintable() else repr(str(path))
    with within(where):
        return build_config(read_toml(path), Path(path), environ, secrets)


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError."""
    import tomllib  # only `run` and `plan` read files; the other commands must start fast

    try:
        with open(path, "rb") as file:
            text = file.read(MAX_FILE + 1)
        if len(text) > MAX_FILE:
            raise ConfigError(f"larger than {MAX_FILE >> 20} MiB; is this the right file?")
        return tomllib.loads(text.decode("utf-8-sig"))  # Windows' editors write a BOM
    except FileNotFoundError:
        raise ConfigError("no such file; write the path of a configuration, or copy one of configs/") from None
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror}); write the path of a readable file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"not TOML: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not TOML: {str(error)[:200]}") from None


def build_config(
    tables: Mapping[str, Any], path: Path, environ: Mapping[str, str], secrets: Mapping[str, Credentials]
) -> Config:
    """Check what a file holds. Raises ConfigError."""
    _check_tables(tables)
    with within("[collector]"):
        collector = read_table(tables.get("collector", {}), "collector")
        runtime_dir = _read_runtime_dir(collector["runtime_dir"], environ)
        control = _read_control(collector["control"], runtime_dir)
        if collector["http"]:
            raise ConfigError('http comes later; write http = "" or leave it out')
        if collector["scheduling"] not in ("batch", "normal"):
            raise ConfigError('scheduling must be "batch" or "normal"')
    exchange = _read_exchange(tables)
    connections = tuple(
        read_connection(table, f"[[connection]] {_label(table, number)}", runtime_dir, secrets)
        for number, table in enumerate(tables["connection"], 1)
    )
    check_together(connections, control, exchange.port if exchange else None)
    return Config(
        path, runtime_dir, control, collector["scheduling"], collector["read_pause"], exchange, connections, secrets
    )


def _label(table: Mapping[str, Any], number: int) -> str:
    name = table.get("name")
    return name if isinstance(name, str) and _NAME.match(name) and len(name) <= 40 else f"number {number}"


def _check_tables(tables: Mapping[str, Any]) -> None:
    for name, value in tables.items():
        if name not in KEYS:
            raise ConfigError(_explain_table(name, value))
        if name != "connection" and not isinstance(value, dict):
            raise ConfigError(f"{name} must be a table; write [{name}]")
    connections = tables.get("connection", [])
    if not isinstance(connections, list) or not all(isinstance(table, dict) for table in connections):
        raise ConfigError("connection must be a list of tables; write [[connection]] with two brackets")
    if not connections:
        raise ConfigError("there is no connection; write at least one [[connection]] with name and url")


def _explain_table(name: str, value: Any) -> str:
    if sounds_secret(name):
        return f"{show(name)}: {SECRET_ADVICE}"
    heads = {table: "[[connection]]" if table == "connection" else f"[{table}]" for table in KEYS}
    home = next((heads[table] for table in KEYS if name in KEYS[table]), "")
    if home and not isinstance(value, dict):
        return f"key {name} stands outside a table; write it under {home}"
    close = suggest(name, KEYS)
    advice = f"did you mean {heads[close]}?" if close else f"there are {', '.join(heads.values())}"
    return f"unknown table or key {show(name)}; {advice}"


def _read_runtime_dir(text: str, environ: Mapping[str, str]) -> Path:
    if not text:
        return default_runtime_dir(environ)
    if not text.startswith("/") or not text.isprintable():
        raise ConfigError('runtime_dir must be an absolute path; write "/run/collector"')
    return Path(os.path.normpath(text))


def _read_control(text: str, runtime_dir: Path) -> str:
    control = _read_endpoint(text, f"ipc://{runtime_dir}/control", "control", runtime_dir)
    if control.endswith(":*"):
        raise ConfigError(f"control {control} has no fixed port, nobody could find it; write tcp://127.0.0.1:5600")
    return control


def _read_exchange(tables: Mapping[str, Any]) -> Exchange | None:
    if "exchange" not in tables:
        return None
    with within("[exchange]"):
        exchange = Exchange(**read_table(tables["exchange"], "exchange"))
        with within("faults"):
            parse_faults(exchange.faults, "exchange")
    return exchange


def _read_endpoint(text: str, default: str, name: str, runtime_dir: Path) -> str:
    try:
        endpoint = parse_endpoint(text or default, default)
    except ValueError as error:
        cure = "" if text else " (it is the default: write another runtime_dir under [collector])"
        raise ConfigError(f"{name} {show_endpoint(text or default)} {error}{cure}") from None
    files = _FILES if name == "publish" else (*_FILES, "*.pub")
    if fault := _find_fault(endpoint, files, runtime_dir):
        raise ConfigError(f"{name} {endpoint} {fault} for example {default}")
    return str(endpoint)


def _find_fault(endpoint: Endpoint, files: Iterable[str], runtime_dir: Path) -> str:
    """Why no socket can be made there, up to what to write instead; "" if it can.

    The runtime directory is made at need. What is closed to us may be open to who will run it.
    """
    path = Path(endpoint.place)
    if endpoint.scheme != "ipc":
        return ""
    if runtime_dir.is_relative_to(path) or (path.parent == runtime_dir and any(map(path.match, files))):
        return "is taken by the collector itself; write"
    try:
        is_there = runtime_dir.is_relative_to(path.parent) or bool(os.stat(f"{path.parent}/."))
    except OSError as error:
        is_there = not isinstance(error, FileNotFoundError | NotADirectoryError)
    return "" if is_there else f"lies in no directory; make {path.parent}, or write"


def show_endpoint(text: str) -> str:
    """An endpoint as an error line shows it: whole if it is printable and short."""
    return text if text.isprintable() and len(text) <= 200 else repr(text[:100])


def read_connection(
    table: Mapping[str, Any], where: str, runtime_dir: Path, secrets: Mapping[str, Credentials]
) -> Connection:
    """Check one [[connection]] table by itself; `where` begins each error. Raises ConfigError.

    Whether it can stand beside the others is for `check_together` to say.
    """
    with within(where):
        values = read_table(table, "connection")
        _check_name(values["name"])
        default = f"ipc://{runtime_dir}/{values['name']}.pub"
        values["publish"] = _read_endpoint(values["publish"], default, "publish", runtime_dir)
        values["credentials"] = _check_credentials(table.get("credentials"), secrets)
        check_url(values["url"], bool(values["credentials"]))
        check_headers(values["headers"])
        values["patterns"] = tuple(filter(is_pattern, values["channels"]))
        with within("channels"):
            _check_channels(values)
        values["channels"] = tuple(name for name in values["channels"] if not is_pattern(name))
        _check_sending(values)
    return Connection(**values)


def _check_name(name: str) -> None:
    if not _NAME.match(name):
        better = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-") or "futures"
        raise ConfigError(f"name {show(name)} may hold only a-z, 0-9 and -; write for example {better[:40]}")
    if name in _RESERVED:
        raise ConfigError(f"name {name} is taken by the collector itself; write for example {name}-1")


def _check_credentials(prefix: str | None, secrets: Mapping[str, Credentials]) -> str | None:
    if prefix is None:
        return None
    if not _PREFIX.match(prefix):  # never shown: it may be the secret itself
        raise ConfigError(
            "credentials must be the prefix of two environment variables; write for example DERIBIT, "
            "and set DERIBIT_CLIENT_ID and DERIBIT_CLIENT_SECRET"
        )
    if prefix not in secrets:
        raise ConfigError(
            f"credentials = {prefix}: set {prefix}_CLIENT_ID and {prefix}_CLIENT_SECRET in the environment in which "
            "the collector is started"
        )
    if fault := secrets[prefix].read_again().fault:
        raise ConfigError(f"credentials = {prefix}: {fault}")
    return prefix


def _check_channels(values: Mapping[str, Any]) -> None:
    if (number := len(values["patterns"])) > MAX_PATTERNS:
        raise ConfigError(f"there are {number} patterns; write at most {MAX_PATTERNS}, each for more")
    for name in values["channels"]:
        check_family(name)
        channel = parse_channel(parse_pattern(name).write_channel("INSTRUMENT") if is_pattern(name) else name)
        check_login(channel, name, bool(values["credentials"]))


def check_family(name: str) -> None:
    """Raise ValueError for a topic, and for a channel whose first word is nearly one of Deribit's."""
    family = name.partition(".")[0]
    if family == EXCHANGE:
        raise ValueError(f"{show(name)} is a topic; write its channel, as trades.BTC-PERPETUAL.100ms")
    if family not in DOCUMENTED and (meant := suggest(family, DOCUMENTED, 0.7)):
        raise ValueError(f"{show(name)}: no channels are called {show(family)}; did you mean {meant}?")


def check_login(channel: Channel, written: str, login: bool) -> None:
    """Raise ValueError for a channel that needs a login where there is none."""
    if login or not channel.needs_login:
        return
    if channel.has_intervals:
        raise ValueError(f"{written} needs a login; write {written[:-3]}100ms, or credentials = ...")
    what = "is private" if channel.is_private else "needs a login"
    raise ValueError(f"{written} {what}; write credentials = ... or leave it out")


def _check_sending(values: Mapping[str, Any]) -> None:
    if values["cancel_on_disconnect"] and not values["credentials"]:
        raise ConfigError("cancel_on_disconnect needs a login; write credentials = ... or leave it out")
    for method in values["send_allow"]:
        if not _METHOD.match(method):
            raise ConfigError(f"send_allow: {show(method)} is no method; write for example private/buy")
