"""The configuration: every refusal is one line that says where and what to write instead."""

import os
import re
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector.channels import KINDS, parse_channel, share_topic
from collector.config import (
    Config,
    ConfigError,
    Connection,
    build_config,
    check_together,
    load_config,
    read_connection,
    take_secrets,
)
from collector.config.clashes import Placed, Places
from collector.config.keys import KEYS
from collector.defaults import default_control, default_runtime_dir
from tests.support import REPOSITORY

URL = "wss://www.deribit.com/ws/api/v2"
HEAD = f'[[connection]]\nname = "a"\nurl = "{URL}"\n'
KEYS_IN_PLACE = {"DESK_CLIENT_ID": "anna", "DESK_CLIENT_SECRET": "hush-hush"}
SECRETS = (
    "secrets do not belong in the file; put them in the environment as DERIBIT_CLIENT_ID and DERIBIT_CLIENT_SECRET"
)


def load(folder: Path, text: str, environ: dict[str, str] | None = None) -> Config:
    path = folder / "desk.toml"
    path.write_text(text)
    return load_config(path, {"XDG_RUNTIME_DIR": "/run/user/7"} if environ is None else environ)


def refuse(folder: Path, text: str, environ: dict[str, str] | None = None) -> str:
    """The line of the refusal, without the folder."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, environ)
    line = str(caught.value)
    assert "\n" not in line
    return line.replace(f"{folder}/", "")


def two(first: str, second: str) -> str:
    """Two connections, a and b, with these further lines."""
    return f'{HEAD}{first}\n[[connection]]\nname = "b"\nurl = "{URL}"\n{second}\n'


REFUSED: dict[str, tuple[str, str]] = {
    # the file as a whole
    "not TOML": ("[[connection]]\nname = futures\n", "desk.toml: not TOML: Invalid value (at line 2, column 8)"),
    "nested too deep": ("a = " + "[" * 100_000, "desk.toml: not TOML: "),
    "a number of ten thousand digits": ("a = 1" + "0" * 10_000, "desk.toml: not TOML: "),
    "no connection": ("", "desk.toml: there is no connection; write at least one [[connection]] with name and url"),
    "empty list of connections": ("connection = []", "desk.toml: there is no connection; write at least one"),
    "one bracket": (HEAD.replace("[[connection]]", "[connection]"), "write [[connection]] with two brackets"),
    "unknown table": ("[colector]\n" + HEAD, "desk.toml: unknown table or key colector; did you mean [collector]?"),
    "unlike any table": (
        "[zzz]\n" + HEAD,
        "unknown table or key zzz; there are [collector], [exchange], [[connection]]",
    ),
    "misspelt connection": (HEAD.replace("ction]]", "tion]]"), "key connetion; did you mean [[connection]]?"),
    "no table": ("collector = 5\n" + HEAD, "desk.toml: collector must be a table; write [collector]"),
    "key outside": ('url = "x"\n' + HEAD, "desk.toml: key url stands outside a table; write it under [[connection]]"),
    "scheduling": ('[collector]\nscheduling = "fifo"\n' + HEAD, 'desk.toml: [collector]: scheduling must be "batch"'),
    "http": ('[collector]\nhttp = ":9000"\n' + HEAD, 'desk.toml: [collector]: http comes later; write http = "" or'),
    # keys and types
    "unknown key": (HEAD + "timout = 5.0", "desk.toml: [[connection]] a: timout is no key of this table; did you mean"),
    "unlike any key": (HEAD + "zzz = 5.0", "zzz is no key of this table; there are name, url, channels, publish,"),
    "odd key": (HEAD + '"a\\nb" = 5.0', "desk.toml: [[connection]] a: 'a\\nb' is no key of this table"),
    "unknown key of collector": (
        "[collector]\nruntimedir = 1\n" + HEAD,
        "[collector]: runtimedir is no key of this table; did you mean runtime_dir?",
    ),
    "unknown key of exchange": (
        "[exchange]\nports = 1\n" + HEAD,
        "desk.toml: [exchange]: ports is no key of this table; did you mean port?",
    ),
    "no name": (
        f'[[connection]]\nurl = "{URL}"',
        'desk.toml: [[connection]] number 1: name is missing; write for example name = "futures"',
    ),
    "no url": ('[[connection]]\nname = "a"', f'[[connection]] a: url is missing; write for example url = "{URL}"'),
    "string for number": (
        HEAD + 'timeout = "5"',
        "[[connection]] a: timeout must be a number of seconds; write for example timeout = 5.0",
    ),
    "true for seconds": (
        HEAD + "timeout = true",
        "timeout must be a number of seconds; write for example timeout = 5.0",
    ),
    "true for integer": (HEAD + "queue = true", "queue must be a whole number; write for example queue = 100000"),
    "float for integer": (
        HEAD + "retry_count = 3.0",
        "retry_count must be a whole number; write for example retry_count = 3",
    ),
    "number for boolean": (
        HEAD + "cancel_on_disconnect = 1",
        "must be true or false; write for example cancel_on_disconnect = false",
    ),
    "number for string": (
        HEAD + "publish = 5601",
        'publish must be a string; write for example publish = "tcp://127.0.0.1:5601"',
    ),
    "date for string": (HEAD + "publish = 2026-01-01", "publish must be a string; write for example publish ="),
    "string for list": (
        HEAD + 'channels = "quote.X"',
        "channels must be a list of strings; write for example channels",
    ),
    "number in list": (
        HEAD + 'channels = ["quote.X", 5]',
        'channels: item 2 must be a string; write for example channels = ["book.BTC-PERPETUAL.100ms"]',
    ),
    "empty channel": (HEAD + 'channels = [""]', "channels: item 1 is 0 characters long; write 1 to 200"),
    "list for headers": (HEAD + "headers = []", "headers must be a table of strings; write for example headers = {"),
    # names
    "name used twice": (HEAD + HEAD, "desk.toml: [[connection]] a: name is used twice; write for example a-2"),
    "bad name": (
        HEAD.replace('"a"', '"Futures 1"'),
        "number 1: name 'Futures 1' may hold only a-z, 0-9 and -; write for example futures-1",
    ),
    "name like an option": (HEAD.replace('"a"', '"-a"'), "name -a may hold only a-z, 0-9 and -; write for example a"),
    "empty name": (HEAD.replace('"a"', '""'), "name '' may hold only a-z, 0-9 and -; write for example futures"),
    "newline in name": (HEAD.replace('"a"', '"a\\n"'), r"name 'a\n' may hold only a-z, 0-9 and -; write for example a"),
    "long name": (HEAD.replace('"a"', f'"{"a" * 41}"'), "name is 41 characters long; write at most 40"),
    "name of our own": (
        HEAD.replace('"a"', '"exchange"'),
        "name exchange is taken by the collector itself; write for example exchange-1",
    ),
    # numbers
    "milliseconds": (
        HEAD + "timeout = 5000",
        "desk.toml: [[connection]] a: timeout = 5000 looks like milliseconds; times are in seconds, write 5.0",
    ),
    "milliseconds of delay": (
        HEAD + "retry_delay = 250",
        "retry_delay = 250 looks like milliseconds; times are in seconds, write 0.25",
    ),
    "milliseconds of heartbeat": (
        HEAD + "heartbeat_interval = 30_000",
        "looks like milliseconds; times are in seconds, write 30.0",
    ),
    "heartbeat below the floor": (
        HEAD + "heartbeat_interval = 5",
        "heartbeat_interval = 5 is out of range; write 10 to 600 seconds, for example 30.0",
    ),
    "no time": (HEAD + "timeout = 0", "timeout = 0 is out of range; write 0.05 to 120 seconds, for example 5.0"),
    "time before time": (
        HEAD + "timeout = -1.5",
        "timeout = -1.5 is out of range; write 0.05 to 120 seconds, for example 5.0",
    ),
    "nan": (HEAD + "timeout = nan", "timeout = nan is out of range; write 0.05 to 120 seconds, for example 5.0"),
    "infinity": (HEAD + "timeout = inf", "timeout = inf is out of range; write 0.05 to 120 seconds, for example 5.0"),
    "beyond floats": (
        HEAD + "timeout = 1" + "0" * 400,
        "timeout = a huge number is out of range; write 0.05 to 120 seconds, for example 5.0",
    ),
    "no attempts": (HEAD + "retry_count = 0", "retry_count = 0 is out of range; write 1 to 1000000, for example 3"),
    "endless queue": (HEAD + "queue = 0", "queue = 0 is out of range; write 1 to 10000000, for example 100000"),
    "bad port": (
        "[exchange]\nport = 65536\n" + HEAD,
        "[exchange]: port = 65536 is out of range; write 0 to 65535, for example 0",
    ),
    # endpoints
    "beyond loopback": (
        HEAD + 'publish = "tcp://0.0.0.0:5601"',
        "publish tcp://0.0.0.0:5601 listens beyond this machine, "
        "which waits for encryption; write tcp://127.0.0.1:5601",
    ),
    "any interface": (
        HEAD + 'publish = "tcp://*:5601"',
        "publish tcp://*:5601 listens beyond this machine, which waits ",
    ),
    "other host": (
        HEAD + 'publish = "tcp://desk.example.com:5601"',
        "listens beyond this machine, which waits for encryption; write tcp://127.0.0.1:5601",
    ),
    "control beyond loopback": (
        '[collector]\ncontrol = "tcp://10.0.0.5:5600"\n' + HEAD,
        "desk.toml: [collector]: control "
        "tcp://10.0.0.5:5600 listens beyond this machine, which waits for encryption; write tcp://127.0.0.1:5600",
    ),
    "control anywhere": (
        '[collector]\ncontrol = "tcp://127.0.0.1:*"\n' + HEAD,
        "control tcp://127.0.0.1:* has no fixed port, nobody could find it; write tcp://127.0.0.1:5600",
    ),
    "IPv6": (HEAD + 'publish = "tcp://[::1]:5601"', "is IPv6, which is not offered; write tcp://127.0.0.1:5601"),
    "no port": (
        HEAD + 'publish = "tcp://127.0.0.1"',
        "publish tcp://127.0.0.1 needs a host and a port; write for example",
    ),
    "no such port": (
        HEAD + 'publish = "tcp://127.0.0.1:70000"',
        "has no such port; write 1 to 65535, or * for any free",
    ),
    "no such address": (HEAD + 'publish = "tcp://127.0.0.999:5"', "listens beyond this machine,"),
    "leading zero": (HEAD + 'publish = "tcp://127.0.0.01:5"', "listens beyond this machine,"),
    "other digits": (HEAD + 'publish = "tcp://127.0.0.١:5"', "listens beyond this machine,"),
    "no endpoint": (
        HEAD + 'publish = "127.0.0.1:5601"',
        "publish 127.0.0.1:5601 is no endpoint to listen on; write tcp://127.0.0.1:5601",
    ),
    "other transport": (
        HEAD + 'publish = "inproc://a"',
        "publish inproc://a is no endpoint to listen on; write tcp://127.0.0.1:5601",
    ),
    "relative path": (
        HEAD + 'publish = "ipc://a.pub"',
        "publish ipc://a.pub needs an absolute path; write for example ipc:///run/user/7/collector/a.pub",
    ),
    "abstract socket": (
        HEAD + 'publish = "ipc://@a"',
        "publish ipc://@a needs an absolute path; write for example ipc:///run/user/7/collector/a.pub",
    ),
    "directory": (
        HEAD + 'publish = "ipc:///tmp/"',
        "publish ipc:///tmp/ names a directory; write for example ipc:///run/user/7/collector/a.pub",
    ),
    "relative path of control": (
        '[collector]\ncontrol = "ipc://control"\n' + HEAD,
        "[collector]: control ipc://control needs an absolute path; write for example "
        "ipc:///run/user/7/collector/control",
    ),
    "path too long": (
        HEAD + f'publish = "ipc:///{"p" * 107}"',
        "has a path of 108 bytes, the system takes 107; write a shorter path",
    ),
    "path too long in bytes": (
        HEAD + f'publish = "ipc:///{"ö" * 54}"',
        "has a path of 109 bytes, the system takes 107",
    ),
    "default control too long": (
        f'[collector]\nruntime_dir = "/{"d" * 99}"\n' + HEAD,
        "desk.toml: [collector]: control ipc:"
        f"///{'d' * 99}/control has a path of 108 bytes, the system takes 107; write a shorter path "
        "(it is the default: write another runtime_dir under [collector])",
    ),
    "default publish too long": (
        f'[collector]\nruntime_dir = "/{"d" * 98}"\n' + HEAD.replace('"a"', '"futures"'),
        f"[[connection]] futures: publish ipc:///{'d' * 98}/futures.pub has a path of 111 bytes, the system takes 107",
    ),
    "relative runtime_dir": (
        '[collector]\nruntime_dir = "run"\n' + HEAD,
        'desk.toml: [collector]: runtime_dir must be an absolute path; write "/run/collector"',
    ),
    "same port": (
        two('publish = "tcp://127.0.0.1:5601"', 'publish = "tcp://localhost:5601"'),
        "desk.toml: [[connection]] b: publish tcp://127.0.0.1:5601 is also publish of a; write another port",
    ),
    "same path": (
        two('publish = "ipc:///tmp/x"', 'publish = "ipc:///tmp/../tmp//x"'),
        "[[connection]] b: publish ipc:///tmp/x is also publish of a; write another path",
    ),
    "path of a default": (
        two("", 'publish = "ipc:///run/user/7/collector/a.pub"'),
        "is also publish of a; write another ",
    ),
    "port of control": (
        '[collector]\ncontrol = "tcp://127.0.0.1:5601"\n' + HEAD + 'publish = "tcp://127.0.0.1:5601"',
        "publish tcp://127.0.0.1:5601 is also control under [collector]; write another port",
    ),
    "path of control": (
        HEAD + 'publish = "ipc:///run/user/7/collector/control"',
        "publish ipc:///run/user/7/collector/control is also control under [collector]; write another path",
    ),
    "no such directory": (
        HEAD + 'publish = "ipc:///nowhere/a.pub"',
        "desk.toml: [[connection]] a: publish ipc:///nowhere/a.pub lies in no directory; make /nowhere, or write for "
        "example ipc:///run/user/7/collector/a.pub",
    ),
    "a file for a directory": (HEAD + 'publish = "ipc:///dev/null/a.pub"', "lies in no directory; make /dev/null, or"),
    "no such directory in the runtime directory": (
        HEAD + 'publish = "ipc:///run/user/7/collector/x/a.pub"',
        "lies in no directory; make /run/user/7/collector/x, or",
    ),
    "no directory of control": (
        '[collector]\ncontrol = "ipc:///nowhere/control"\n' + HEAD,
        "desk.toml: [collector]: control ipc:///nowhere/control lies in no directory; make /nowhere, or write for "
        "example ipc:///run/user/7/collector/control",
    ),
    **{
        f"the collector's own {name}": (
            HEAD + f'publish = "ipc:///run/user/7/collector/{name}"',
            f"desk.toml: [[connection]] a: publish ipc:///run/user/7/collector/{name} is taken by the "
            "collector itself; write for example ipc:///run/user/7/collector/a.pub",
        )
        for name in ("lock", "a.ledger", "b.ledger", "a.ledger.new", "credits-1", "credits-1.calls")
    },
    "the runtime directory": (HEAD + 'publish = "ipc:///run/user/7/collector"', "is taken by the collector itself;"),
    "control on the lock": (
        '[collector]\nruntime_dir = "/x"\ncontrol = "ipc:///x/lock"\n' + HEAD,
        "desk.toml: [collector]: control ipc:///x/lock is taken by the collector itself; write",
    ),
    "control on what is removed at each start": (
        '[collector]\nruntime_dir = "/x"\ncontrol = "ipc:///x/control.pub"\n' + HEAD,
        "control ipc:///x/control.pub is taken by the collector itself; write for example ipc:///x/control",
    ),
    "port of the exchange": (
        "[exchange]\nport = 5601\n" + HEAD + 'publish = "tcp://127.0.0.1:5601"',
        "publish tcp://127.0.0.1:5601 is also port under [exchange]; write another port",
    ),
    # channels
    "interval": (
        HEAD + 'channels = ["book.BTC-PERPETUAL.50ms"]',
        "desk.toml: [[connection]] a: channels: "
        "'book.BTC-PERPETUAL.50ms': interval '50ms' is not offered (raw, 100ms, agg2)",
    ),
    "form": (HEAD + 'channels = ["ticker.BTC-PERPETUAL"]', "ticker channels have the form ticker.INSTRUMENT.INTERVAL"),
    "not a channel": (
        HEAD + 'channels = ["book BTC"]',
        "channels: 'book BTC' is not a channel name (letters, digits, . _ -)",
    ),
    "family": (
        HEAD + 'channels = ["trade.BTC-PERPETUAL.raw"]',
        "channels: trade.BTC-PERPETUAL.raw: no channels are called trade; did you mean trades?",
    ),
    "topic": (
        HEAD + 'channels = ["deribit.trade.BTC-PERPETUAL.100ms"]',
        "channels: deribit.trade.BTC-PERPETUAL.100ms is a topic; write its channel, as trades.BTC-PERPETUAL.100ms",
    ),
    "pattern": (
        HEAD + 'channels = ["book.BTC-*.*"]',
        "channels: 'book.BTC-*.*': one part may be a pattern, the instrument; write for example book.BTC-*.100ms",
    ),
    "pattern's interval": (
        HEAD + 'channels = ["book.BTC-*.50ms"]',
        "channels: 'book.BTC-*.50ms': interval '50ms' is not offered (raw, 100ms, agg2)",
    ),
    "pattern's condition": (
        HEAD + 'channels = ["ticker.{knd=option}.100ms"]',
        "channels: 'ticker.{knd=option}.100ms': no condition is called knd; did you mean kind?",
    ),
    "pattern without login": (
        HEAD + 'channels = ["book.*{kind=spot}.raw"]',
        "channels: book.*{kind=spot}.raw needs a login; write book.*{kind=spot}.100ms, or credentials = ...",
    ),
    "many patterns": (
        HEAD + f"channels = {[f'quote.{number}*' for number in range(101)]}",
        "desk.toml: [[connection]] a: channels: there are 101 patterns; write at most 100, each for more",
    ),
    "pattern twice": (
        two('channels = ["quote.*"]', 'channels = ["quote.*"]'),
        "desk.toml: [[connection]] b: channels: quote.* stands in connection a too; write it once",
    ),
    "channel twice": (
        HEAD + 'channels = ["quote.X", "quote.X"]',
        "desk.toml: [[connection]] a: channels: quote.X stands twice; write it once",
    ),
    "channel in two": (
        two('channels = ["quote.X"]', 'channels = ["quote.X"]'),
        "desk.toml: [[connection]] b: channels: quote.X stands in connection a too; write it once",
    ),
    "wide and narrow": (
        HEAD + 'channels = ["trades.BTC-PERPETUAL.100ms", "trades.future.BTC.100ms"]',
        "channels: trades.future.BTC.100ms would feed the same topics as trades.BTC-PERPETUAL.100ms; write one of them",
    ),
    "wide and narrow of two": (
        two('channels = ["trades.any.any.100ms"]', 'channels = ["trades.BTC_USDC.100ms"]'),
        "[[connection]] b: channels: trades.BTC_USDC.100ms would feed the same topics as "
        "trades.any.any.100ms of connection a; write one of them",
    ),
    "wide and wider": (
        HEAD + 'channels = ["trades.option.ETH.100ms", "trades.any.ETH.100ms"]',
        "would feed the same topics",
    ),
    "spot pairs of two currencies": (
        HEAD + 'channels = ["trades.spot.BTC.100ms", "trades.any.ETH.100ms"]',
        "trades.any.ETH.100ms would feed the same topics as trades.spot.BTC.100ms; write one of them",
    ),
    "any and one currency": (
        HEAD + 'channels = ["trades.option.any.100ms", "trades.option.ETH.100ms"]',
        "trades.option.ETH.100ms would feed the same topics as trades.option.any.100ms; write one of them",
    ),
    "listings in two": (
        two('channels = ["instrument.state.any.any"]', 'channels = ["instrument.creation.any.any"]'),
        "instrument.creation.any.any would feed the same topics as instrument.state.any.any of connection",
    ),
    "platform in two": (
        two('channels = ["platform_state"]', 'channels = ["platform_state.public_methods_state"]'),
        "would feed the same topics as platform_state of connection a; write one of them",
    ),
    "states twice": (
        HEAD + 'channels = ["instrument.state.any.any", "instrument.state.option.BTC"]',
        "would feed the same ",
    ),
    # logins and secrets
    "raw without login": (
        HEAD + 'channels = ["book.BTC-PERPETUAL.raw"]',
        "channels: book.BTC-PERPETUAL.raw needs a login; write book.BTC-PERPETUAL.100ms, or credentials = ...",
    ),
    "private without login": (
        HEAD + 'channels = ["user.portfolio.any"]',
        "channels: user.portfolio.any is private; write credentials = ... or leave it out",
    ),
    "ranking without login": (
        HEAD + 'channels = ["deribit_price_ranking.btc_usd.raw"]',
        "channels: deribit_price_ranking.btc_usd.raw needs a login; write credentials = ... or leave it out",
    ),
    "cancelling without login": (
        HEAD + "cancel_on_disconnect = true",
        "cancel_on_disconnect needs a login; write credentials = ... or leave it out",
    ),
    "no such credentials": (
        HEAD + 'credentials = "DESK"',
        "desk.toml: [[connection]] a: credentials = DESK: set DESK_CLIENT_ID and DESK_CLIENT_SECRET in the environment "
        "in which the collector is started",
    ),
    "a secret for a prefix": (
        HEAD + 'credentials = "hUsh-9f8a7s6df"',
        "desk.toml: [[connection]] a: credentials must be the"
        " prefix of two environment variables; write for example DERIBIT, and set DERIBIT_CLIENT_ID",
    ),
    "client_secret": (HEAD + 'client_secret = "hUsh"', f"desk.toml: [[connection]] a: client_secret: {SECRETS}"),
    "api_key": (HEAD + 'api_key = "hUsh"', f"[[connection]] a: api_key: {SECRETS}"),
    "password": ('[collector]\npassword = "hUsh"\n' + HEAD, f"desk.toml: [collector]: password: {SECRETS}"),
    "secret outside": ('client_secret = "hUsh"\n' + HEAD, f"desk.toml: client_secret: {SECRETS}"),
    "table of secrets": ('[secrets]\nx = "hUsh"\n' + HEAD, f"desk.toml: secrets: {SECRETS}"),
    "header": (HEAD + 'headers = { Authorization = "Bearer hUsh" }', f"a: headers: Authorization: {SECRETS}"),
    "login under another name": (HEAD + 'headers = { X-Api = "Basic hUsh" }', f"a: headers: X-Api: {SECRETS}"),
    "header with dashes": (HEAD + 'headers = { X-API-Key = "hUsh" }', f"a: headers: X-API-Key: {SECRETS}"),
    "login in headers": (HEAD + 'headers = { CF-Access-Client-Id = "hUsh" }', f"CF-Access-Client-Id: {SECRETS}"),
    "private key": (HEAD + 'headers = { Private-Key = "hUsh" }', f"a: headers: Private-Key: {SECRETS}"),
    "secret in the url": (
        HEAD.replace("wss://", "wss://anna:hUsh@"),
        "url: a user or password stands before the host; ",
    ),
    "token in the url": (HEAD.replace("v2", "v2?access_token=hUsh"), f"[[connection]] a: url: {SECRETS}"),
    "key in the url": (HEAD.replace("v2", "v2?api-key=hUsh"), f"[[connection]] a: url: {SECRETS}"),
    # URL and headers
    "scheme": (HEAD.replace("wss", "https"), "url begins with https://; write wss://www.deribit.com/ws/api/v2"),
    "scheme without a host": (
        HEAD.replace(URL, "file:///x"),
        "url begins with file://; write for example wss://www.deribit.com/ws/api/v2",
    ),
    "scheme at home": (
        HEAD.replace(URL, "http://[::1]:8080/"),
        "url begins with http://; write ws://[::1]:8080/ws/api/v2",
    ),
    "no URL": (
        HEAD.replace(URL, "www.deribit.com"),
        "url www.deribit.com is no URL; write for example wss://www.deribit.com/ws/api/v2",
    ),
    "misspelt practice": (HEAD.replace(URL, "practise"), 'url practise is no URL; did you mean "practice"?'),
    "no host": (
        HEAD.replace(URL, "wss:///ws/api/v2"),
        "url needs a host, no port 0 and no #; write for example wss://www.deribit.com/ws/api/v2",
    ),
    "port of the URL": (
        HEAD.replace(URL, "wss://www.deribit.com:99999/"),
        "url is malformed; write for example wss://www.deribit.com/ws/api/v2",
    ),
    "space in the URL": (
        HEAD.replace(URL, "wss://www deribit"),
        "url holds a space or a letter that URLs cannot; write for",
    ),
    "no path": (HEAD.replace("/ws/api/v2", ""), "url has no path; write wss://www.deribit.com/ws/api/v2"),
    "no exchange": (
        HEAD.replace(URL, "practice?faults=reset"),
        "desk.toml: [[connection]] a: url practice needs the practice exchange; write [exchange]",
    ),
    "fault of a practice URL": (
        "[exchange]\n" + HEAD.replace(URL, "practice?faults=gap:5,rset:6"),
        "desk.toml: [[connection]] a: url: no fault 'rset'; did you mean reset?",
    ),
    "form of a fault": (
        "[exchange]\n" + HEAD.replace(URL, "practice?faults=reset:soon"),
        "[[connection]] a: url: fault 'reset': 'soon' does not have the form reset:SECONDS",
    ),
    "key of a practice URL": (
        "[exchange]\n" + HEAD.replace(URL, "practice?fault=reset"),
        "[[connection]] a: url: fault is no key of it; write for example practice?faults=reset:6",
    ),
    "fault of the exchange": (
        '[exchange]\nfaults = "zzz"\n' + HEAD,
        "desk.toml: [exchange]: faults: no fault 'zzz'; `collector exchange --list-faults` lists them",
    ),
    "header that is a number": (
        HEAD + "headers = { X = 5 }",
        'headers: X must be a string of printable ASCII; write for example X = "desk-7"',
    ),
    "header with a line end": (
        HEAD + 'headers = { X = "a\\r\\nY: b" }',
        "headers: X must be a string of printable ASCII",
    ),
    "bad header name": (
        HEAD + 'headers = { "X Y" = "5" }',
        "headers: 'X Y' is no header name; write letters, digits and -",
    ),
    "header of the upgrade": (
        HEAD + 'headers = { Sec-WebSocket-Key = "x" }',
        "belongs to the WebSocket upgrade itself; leave it out",
    ),
    "method": (HEAD + 'send_allow = ["buy"]', "send_allow: buy is no method; write for example private/buy"),
    # how many
    "too many": (
        "".join(HEAD.replace('"a"', f'"a{n}"') for n in range(33)),
        "desk.toml: 33 connections, Deribit takes 32 from one address; write more channels into fewer [[connection]]",
    ),
    "too many for practice": (
        "[exchange]\n" + "".join(HEAD.replace('"a"', f'"a{n}"').replace(URL, "practice") for n in range(33)),
        "33 connections, Deribit takes 32",
    ),
}


def test_a_default_directory_that_cannot_be_shown_is_refused_with_a_way_out(tmp_path: Path) -> None:
    line = refuse(tmp_path, HEAD, {"XDG_RUNTIME_DIR": "/run/a\x01b"})
    assert line.startswith(r"desk.toml: [collector]: control 'ipc:///run/a\x01b/collector/control' has characters")
    assert line.endswith("(it is the default: write another runtime_dir under [collector])")


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    text, expected = REFUSED[case]
    line = refuse(tmp_path, text)
    assert line.startswith("desk.toml: ")
    assert expected in line
    assert "hush" not in line.lower()


CREDENTIALS: dict[str, tuple[dict[str, str], str]] = {
    "no secret": (
        {"DESK_CLIENT_ID": "anna"},
        "DESK_CLIENT_SECRET is not in the environment; set it, or DESK_CLIENT_SECRET_FILE to a file that holds it",
    ),
    "no id": (
        {"DESK_CLIENT_SECRET": "hush"},
        "DESK_CLIENT_ID is not in the environment; set it, or DESK_CLIENT_ID_FILE",
    ),
    "empty id": ({"DESK_CLIENT_ID": "", "DESK_CLIENT_SECRET": "hush"}, "DESK_CLIENT_ID is not in the environment"),
    "both": (
        KEYS_IN_PLACE | {"DESK_CLIENT_SECRET_FILE": "/x"},
        "both DESK_CLIENT_SECRET and DESK_CLIENT_SECRET_FILE are set; set one of them",
    ),
    "two lines": (
        {"DESK_CLIENT_ID": "anna", "DESK_CLIENT_SECRET": "hush\nhush"},
        "DESK_CLIENT_SECRET does not hold one line",
    ),
    "no file": (
        {"DESK_CLIENT_ID": "anna", "DESK_CLIENT_SECRET_FILE": "/nowhere/hidden"},
        "DESK_CLIENT_SECRET_FILE names a file that cannot be read (No such file or directory); correct the path, or "
        "who may read it",
    ),
    "a device": (
        {"DESK_CLIENT_ID": "anna", "DESK_CLIENT_SECRET_FILE": "/dev/zero"},
        "DESK_CLIENT_SECRET_FILE does not name a regular file; give it the path of one",
    ),
    "a directory": (
        {"DESK_CLIENT_ID_FILE": "/tmp", "DESK_CLIENT_SECRET": "hush"},
        "DESK_CLIENT_ID_FILE does not name a reg",
    ),
}


@pytest.mark.parametrize("case", CREDENTIALS)
def test_credentials_that_are_not_whole_are_refused(case: str, tmp_path: Path) -> None:
    environ, expected = CREDENTIALS[case]
    line = refuse(tmp_path, HEAD + 'credentials = "DESK"', dict(environ))
    assert line.startswith(f"desk.toml: [[connection]] a: credentials = DESK: {expected}")
    assert "hush" not in line


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"hush\nhush\n", b"hush\x00"])
def test_a_secret_file_that_holds_no_secret_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(content)
    environ = {"DESK_CLIENT_ID": "anna", "DESK_CLIENT_SECRET_FILE": str(tmp_path / "secret")}
    line = refuse(tmp_path, HEAD + 'credentials = "DESK"', environ)
    assert line.endswith("DESK_CLIENT_SECRET_FILE does not hold one line of text; set it to the bare value")


def test_a_secret_that_is_too_long_is_refused_not_cut(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    environ = {"DESK_CLIENT_ID": "anna", "DESK_CLIENT_SECRET_FILE": str(secret)}
    secret.write_text("x" * 4096)
    config = load(tmp_path, HEAD + 'credentials = "DESK"', dict(environ))
    assert len(config.secrets["DESK"].client_secret) == 4096
    secret.write_text("x" * 4097)
    line = refuse(tmp_path, HEAD + 'credentials = "DESK"', dict(environ))
    assert line.endswith("DESK_CLIENT_SECRET_FILE does not hold one line of text; set it to the bare value")


def test_credentials_over_plain_text_are_refused(tmp_path: Path) -> None:
    text = HEAD.replace("wss://", "ws://") + 'credentials = "DESK"'
    line = refuse(tmp_path, text, dict(KEYS_IN_PLACE))
    assert line.endswith("url would send credentials without encryption; write wss://www.deribit.com/ws/api/v2")
    for host in ("127.0.0.1.evil.example", "127.1.evil", "localhost.evil.example", "x127.0.0.1"):
        line = refuse(tmp_path, text.replace("www.deribit.com", host), dict(KEYS_IN_PLACE))
        assert f"url would send credentials without encryption; write wss://{host}/" in line


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    cases = {
        tmp_path / "none.toml": "none.toml: no such file; write the path of a configuration",
        tmp_path: "cannot be read (Is a directory); write the path of a readable file",
        tmp_path / "latin.toml": "latin.toml: not TOML: byte 5 is not UTF-8; save the file as UTF-8",
        Path(
            "/proc/self/mem"
        ): "/proc/self/mem: cannot be read (Input/output error); write the path of a readable file",
        Path("/dev/zero"): "/dev/zero: larger than 16 MiB; is this the right file?",
    }
    (tmp_path / "latin.toml").write_bytes(b'x = "\xe9"')
    for path, expected in cases.items():
        with pytest.raises(ConfigError, match=re.escape(expected)):
            load_config(path, {})


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert load(tmp_path, "\ufeff" + HEAD).connections == load(tmp_path, HEAD).connections


def test_defaults_are_those_of_the_table(tmp_path: Path) -> None:
    config = load(tmp_path, HEAD)
    (connection,) = config.connections
    for name, key in KEYS["connection"].items():
        if name not in ("name", "url", "publish", "credentials"):
            assert getattr(connection, name) == key.default
    assert connection.publish == "ipc:///run/user/7/collector/a.pub"
    assert config.runtime_dir == Path("/run/user/7/collector")
    assert config.control == "ipc:///run/user/7/collector/control"
    assert config.exchange is None


def test_everything_can_be_said(tmp_path: Path) -> None:
    text = f"""
        [collector]
        runtime_dir = "/run/desk"
        control = "tcp://localhost:5600"
        http = ""
        scheduling = "batch"
        read_pause = 0.005
        [exchange]
        port = 8080
        faults = "flood"
        [[connection]]
        name = "a"
        url = "{URL}"
        publish = "tcp://localhost:0"
        channels = ["book.BTC-PERPETUAL.raw", "user.portfolio.any", "something.new"]
        headers = {{ "User-Agent" = "desk-7" }}
        timeout = 7
        retry_count = 1
        retry_delay = 0.5
        heartbeat_interval = 10
        credentials = "DESK"
        cancel_on_disconnect = true
        send_allow = ["private/cancel_all"]
        queue = 5
        [[connection]]
        name = "b"
        url = "practice?faults=reset"
        """
    environ = dict(KEYS_IN_PLACE)
    config = load(tmp_path, text, environ)
    first, second = config.connections
    assert first == Connection(
        "a", URL, ("book.BTC-PERPETUAL.raw", "user.portfolio.any", "something.new"), "tcp://127.0.0.1:*",
        {"User-Agent": "desk-7"}, 7.0, 1, 0.5, 10.0, "DESK", True, ("private/cancel_all",), 5, (),
    )  # fmt: skip
    assert isinstance(first.timeout, float)
    assert (first.is_practice, second.is_practice, second.publish) == (False, True, "ipc:///run/desk/b.pub")
    assert config.control == "tcp://127.0.0.1:5600"
    assert (config.scheduling, config.read_pause) == ("batch", 0.005)
    assert config.exchange is not None
    assert (config.exchange.port, config.exchange.faults) == (8080, "flood")
    assert environ == {}
    assert config.secrets["DESK"].client_secret == "hush-hush"
    assert "hush" not in repr(config) + repr(config.secrets)


@pytest.mark.parametrize(
    "channels",
    [
        ["instrument.state.any.any", "instrument.creation.any.any"],
        ["platform_state", "platform_state.public_methods_state"],
        ["book.BTC-PERPETUAL.100ms", "book.BTC-PERPETUAL.agg2", "book.BTC-PERPETUAL.none.10.100ms"],
        ["trades.option.any.100ms", "trades.BTC-PERPETUAL.100ms", "trades.future.ETH.100ms"],
        ["trades.option.BTC.100ms", "trades.option.ETH.100ms", "trades.option.BTC.agg2"],
        ["trades.future.BTC.100ms", "trades.future.USDC.100ms", "trades.option.USDC.100ms", "trades.spot.USDC.100ms"],
        ["trades.future.BTC.100ms", "trades.BTC_USDC-PERPETUAL.100ms", "trades.BTC_USDC.100ms"],
        ["ticker.BTC-PERPETUAL.100ms", "incremental_ticker.BTC-PERPETUAL"],
    ],
)
def test_channels_that_may_stand_together(channels: list[str], tmp_path: Path) -> None:
    assert load(tmp_path, HEAD + f"channels = {channels}").connections[0].channels == tuple(channels)


def test_channels_of_one_instrument_feed_one_topic_only_if_their_names_are_the_same() -> None:
    """So only those that feed the topics of many are compared with others."""
    families = "quote", "incremental_ticker", "ticker", "book", "perpetual", "chart.trades", "trades", "user"
    subjects, groups = ("A", "incremental", "none-10-100ms"), ("", "none.10", "5.20")
    intervals = "", "raw", "100ms", "agg2", "1", "60"
    topics: dict[str, str] = {}
    for parts in product(families, subjects, groups, intervals):
        name = ".".join(filter(None, parts))
        with suppress(ValueError):
            if (topic := parse_channel(name).topic) is not None:
                assert topics.setdefault(topic, name) == name
    assert len(topics) > 100


def test_connections_without_a_fixed_port_never_clash(tmp_path: Path) -> None:
    config = load(tmp_path, two('publish = "tcp://127.0.0.1:*"', 'publish = "tcp://127.0.0.1:0"'))
    assert {connection.publish for connection in config.connections} == {"tcp://127.0.0.1:*"}


def test_secrets_leave_the_environment(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("from-a-file\n")
    environ = {
        "DESK_CLIENT_ID": " anna ", "DESK_CLIENT_SECRET_FILE": str(tmp_path / "secret"), "PATH": "/bin",
        "OTHER_CLIENT_ID": "bert", "CLIENT_ID": "none of ours",
    }  # fmt: skip
    secrets = take_secrets(environ)
    assert environ == {"PATH": "/bin", "CLIENT_ID": "none of ours"}
    assert (secrets["DESK"].client_id, secrets["DESK"].client_secret) == ("anna", "from-a-file")
    assert secrets["OTHER"].fault.startswith("OTHER_CLIENT_SECRET is not in the environment")
    assert "from-a-file" not in repr(secrets)


def test_where_a_collector_is_found() -> None:
    assert default_runtime_dir({"XDG_RUNTIME_DIR": "/run/user/7"}) == Path("/run/user/7/collector")
    assert default_runtime_dir({"XDG_RUNTIME_DIR": "relative"}) == Path(f"/tmp/collector-{os.getuid()}")
    assert default_control({}) == f"ipc:///tmp/collector-{os.getuid()}/control"
    assert default_control({"COLLECTOR_CONTROL": "tcp://127.0.0.1:5600"}) == "tcp://127.0.0.1:5600"


@pytest.mark.parametrize("name", ["demo", "deribit", "testnet"])
def test_shipped_configurations_are_accepted(name: str) -> None:
    environ = {"DERIBIT_TEST_CLIENT_ID": "anna", "DERIBIT_TEST_CLIENT_SECRET": "hush"}
    config = load_config(REPOSITORY / "configs" / f"{name}.toml", environ)
    assert all(connection.channels for connection in config.connections)
    assert (config.exchange is not None) == (name == "demo")


@pytest.mark.parametrize("group", ["none", "1", "250"])
def test_a_book_may_be_grouped(group: str) -> None:
    assert parse_channel(f"book.BTC-PERPETUAL.{group}.10.100ms").grouped


@pytest.mark.parametrize(
    "name",
    ["deribit_price_index.btc_usd.100ms", "deribit_price_index.btc_usd.raw", "deribit_volatility_index.btc_usd.100ms",
     "estimated_expiration_price.btc_usd.100ms", "deribit_price_index", "markprice.option.btc_usd",
     "markprice.options.btc_usd.100ms", "instrument.sate.any.any", "instrument.state.option",
     "chart.trade.BTC-PERPETUAL.60", "chart.trades.BTC-PERPETUAL", "platform_state.public_methods",
     "platform_state.raw"],
)  # fmt: skip
def test_a_channel_of_a_known_family_that_does_not_exist_is_refused_with_the_form_of_those_that_do(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^'{name}': {name.split('.')[0]} channels have the form "):
        parse_channel(name)


@pytest.mark.parametrize("group", ["nonesuch", "none1", "d5", "0d5", "0", "3", "1000", "all"])
def test_a_group_that_is_not_offered_is_refused(group: str) -> None:
    with pytest.raises(ValueError, match=f"group '{group}' is not offered"):
        parse_channel(f"book.BTC-PERPETUAL.{group}.10.100ms")


def test_many_channels_are_compared_quickly(tmp_path: Path) -> None:
    """It ends within the time that a test may take: comparing each with each would not."""
    narrow = tuple(f"trades.BTC-{strike}-C.100ms" for strike in range(20_000))
    wide = tuple(f"trades.option.C{number}.100ms" for number in range(20_000))
    (a,) = load(tmp_path, HEAD).connections
    check_together([replace(a, channels=narrow), replace(a, name="b", publish="ipc:///tmp/b", channels=wide)])


CLASHING = st.builds(
    "{}.{}".format,
    st.sampled_from(["trades", "instrument.state", "instrument.creation"]),
    st.builds("{}.{}.raw".format, st.sampled_from(KINDS), st.sampled_from(["BTC", "ETH", "any"])),
).map(lambda name: name.removesuffix(".raw") if name.startswith("instrument") else name) | st.sampled_from(
    ["trades.BTC-PERPETUAL.raw", "trades.BTC_USDC.raw", "trades.ETH-1JAN27-5-C.raw", "trades.ETH-PERPETUAL.100ms",
     "platform_state", "platform_state.public_methods_state", "quote.BTC-PERPETUAL"]
)  # fmt: skip


@given(st.lists(CLASHING, unique=True), CLASHING)
def test_what_feeds_the_same_topics_is_what_that_comparing_each_pair_finds(names: list[str], name: str) -> None:
    places = Places()
    placed = [Placed(f"owner of {each}", parse_channel(each)) for each in names]
    for each in placed:
        places.add(each)
    channel = parse_channel(name)
    assert sorted(places.find(channel)) == sorted(each for each in placed if share_topic(each.channel, channel))


def test_what_a_connection_is_leaving_stands_in_the_way_of_others_and_of_itself_once_it_is_wanted_again() -> None:
    narrow, wide = parse_channel("trades.BTC-PERPETUAL.100ms"), parse_channel("trades.future.BTC.100ms")
    places = Places()
    places.add(Placed("a", narrow), is_leaving=True)
    assert places.find_clash(Placed("b", narrow)) == Placed("a", narrow)
    assert places.find_clash(Placed("b", wide)) == Placed("a", narrow)
    places.place(Placed("a", wide))
    places.place(Placed("a", wide))  # what stands already may be asked for again
    with pytest.raises(ValueError, match=r"^trades.future.BTC.100ms of a feeds the same topics$"):
        places.place(Placed("a", narrow))

    places = Places()
    places.add(Placed("a", narrow), is_leaving=True)
    places.place(Placed("a", narrow))
    with pytest.raises(ValueError, match=r"^trades.BTC-PERPETUAL.100ms of a feeds the same topics$"):
        places.place(Placed("a", wide))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
WORDS = st.sampled_from(
    ["tcp://127.0.0.1:5601", "ipc:///tmp/x", "ipc://", "tcp://[", "wss://[x", "practice", URL, "DESK", "a", "b",
     "trades.any.any.raw", "book.BTC-PERPETUAL.100ms", "wss://\udcff", "ipc:///\udcff", "http://x:y", "//", "", "\0"]
)  # fmt: skip


def tables(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    """Tables with the right keys and wrong values, now and then a right one or a key too many."""
    anything = VALUES | WORDS | st.lists(WORDS, max_size=4)
    return st.dictionaries(st.sampled_from(sorted(KEYS[kind])) | st.text(max_size=5), anything, max_size=8)


@settings(max_examples=300)
@given(
    st.fixed_dictionaries(
        {"connection": st.lists(tables("connection"), max_size=4) | VALUES},
        optional={"collector": tables("collector") | VALUES, "exchange": tables("exchange") | VALUES},
    )
    | st.dictionaries(st.text(), VALUES, max_size=4)
)
def test_nothing_but_a_config_error(values: dict[str, Any]) -> None:
    environ = dict(KEYS_IN_PLACE)
    refusal = ""
    try:
        build_config(values, Path("x"), environ, take_secrets(environ))
    except ConfigError as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert len(refusal) < 2000


@settings(max_examples=300)
@given(tables("connection"), WORDS, VALUES | WORDS)
def test_a_connection_is_read_or_refused(table: dict[str, Any], publish: str, channel: Any) -> None:
    secrets = take_secrets(dict(KEYS_IN_PLACE))
    whole = {"name": "a", "url": URL, "publish": publish, "channels": [channel], **table}
    try:
        connection = read_connection(whole, "connect", Path("/run"), secrets)
        check_together([connection])
        assert read_connection(connection.to_map(), "again", Path("/run"), secrets) == connection
    except ConfigError as error:
        refusal = str(error)
    else:
        return
    assert refusal.startswith(("connect: ", "[[connection]] "))


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    path = Path("/proc/self/fd") / str(_memory_file(data))
    try:
        with pytest.raises(ConfigError):
            load_config(path, {})
    finally:
        os.close(int(path.name))


def _memory_file(data: bytes) -> int:
    descriptor = os.memfd_create("config")
    os.write(descriptor, data)
    return descriptor
