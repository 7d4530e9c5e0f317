"""The URL and headers of a connection: what is taken, and where a secret or a slip hides in them. No I/O."""

import re
from collections.abc import Mapping
from typing import Any

from collector.config.keys import SECRET_ADVICE, ConfigError, show, sounds_secret, suggest, within
from collector.faults import parse_faults

PRACTICE = "practice"
"""The url of a connection to the practice exchange of [exchange]; a query may choose faults."""

_EXAMPLE = "wss://www.deribit.com/ws/api/v2"
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}\Z")
_LOGIN = re.compile(r"(basic|bearer|deri-hmac-sha256) +\S+\Z", re.I)
_HANDSHAKE = re.compile(r"upgrade|connection|host|content-length|transfer-encoding|sec-websocket-.*", re.I)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name alone."""
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


def check_url(url: str, login: bool) -> None:
    """Refuse a URL to which no WebSocket could go, or that holds a secret or would show one. Raises ConfigError."""
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"url holds a space or a letter that URLs cannot; write for example {_EXAMPLE}")
    base, _, query = url.partition("?")
    if any(sounds_secret(part.partition("=")[0]) for part in query.split("&")):
        raise ConfigError(f"url: {SECRET_ADVICE}")
    if base == PRACTICE:
        return _check_faults(query)
    if "://" not in url:
        advice = f'did you mean "{PRACTICE}"?' if suggest(base, [PRACTICE]) else f"write for example {_EXAMPLE}"
        raise ConfigError(f"url {show(base)} is no URL; {advice}")
    _check_parts(url, login)


def _check_faults(query: str) -> None:
    from urllib.parse import parse_qsl  # dear to import, as below

    for key, text in parse_qsl(query, keep_blank_values=True):
        if key != "faults":
            raise ConfigError(f"url: {show(key)} is no key of it; write for example practice?faults=reset:6")
        with within("url"):
            parse_faults(text)


def _check_parts(url: str, login: bool) -> None:
    from urllib.parse import urlsplit  # dear to import, and only `run`, `plan` and `connect` come here

    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ConfigError(f"url is malformed; write for example {_EXAMPLE}") from None
    if "@" in parts.netloc:
        raise ConfigError(f"url: a user or password stands before the host; {SECRET_ADVICE}")
    if parts.scheme not in ("ws", "wss"):
        instead = "ws" if is_loopback(host) else "wss"
        better = f"{instead}://{parts.netloc}/ws/api/v2" if host else f"for example {_EXAMPLE}"
        raise ConfigError(f"url begins with {show(parts.scheme)}://; write {better}")
    if not host or port == 0 or parts.fragment:
        raise ConfigError(f"url needs a host, no port 0 and no #; write for example {_EXAMPLE}")
    if login and parts.scheme == "ws" and not is_loopback(host):
        raise ConfigError(f"url would send credentials without encryption; write wss://{parts.netloc}/ws/api/v2")
    if parts.path in ("", "/") and host.endswith("deribit.com"):
        raise ConfigError(f"url has no path; write {parts.scheme}://{parts.netloc}/ws/api/v2")


def name_host(url: str) -> str:
    """The host of a checked URL in one spelling, with the port if it is not the usual one."""
    from urllib.parse import urlsplit  # as above

    parts = urlsplit(url)
    return parts.netloc.lower().removesuffix(":443" if parts.scheme == "wss" else ":80") or PRACTICE


def hide_secrets(url: str) -> str:
    """A URL as it may be shown: without user, password, or query (but for the practice exchange's faults)."""
    from urllib.parse import urlsplit, urlunsplit  # as above

    parts = urlsplit(url)
    query = parts.query if parts.query.startswith("faults=") and "&" not in parts.query else ""
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query))


def check_headers(headers: Mapping[Any, Any]) -> None:
    """Refuse headers that are not text, would break the upgrade, or hold a secret. Values are never shown."""
    for name, value in headers.items():
        here = f"headers: {show(name)}"
        if not isinstance(name, str) or not _HEADER.match(name):
            raise ConfigError(f"{here} is no header name; write letters, digits and -")
        if sounds_secret(name) or _LOGIN.match(str(value).strip()):
            raise ConfigError(f"{here}: {SECRET_ADVICE}")
        if _HANDSHAKE.fullmatch(name):
            raise ConfigError(f"{here} belongs to the WebSocket upgrade itself; leave it out")
        if not isinstance(value, str) or not value.isascii() or not value.isprintable() or len(value) > 4000:
            raise ConfigError(f'{here} must be a string of printable ASCII; write for example {name} = "desk-7"')
