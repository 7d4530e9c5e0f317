"""ZeroMQ endpoints on which the collector listens: which ones are allowed, and when two clash. No I/O."""

import os
import re
import sys
from typing import NamedTuple

MAX_IPC_PATH = 107 if sys.platform == "linux" else 103
"""Bytes of a Unix socket's path: sockaddr_un holds one more, the final zero (108 on Linux, 104 elsewhere)."""

_LOOPBACK = re.compile(r"127(?:\.(?:0|[1-9][0-9]{0,2})){3}\Z")
_TCP = re.compile(r"(?P<host>\[[^\]]*\]|[^:\[\]]*):(?P<port>[0-9]{1,6}|\*)\Z", re.ASCII)


class Endpoint(NamedTuple):
    """Where a socket listens: `place` is a path or an address, `port` 0 for ipc and for any free port."""

    scheme: str
    place: str
    port: int

    def __str__(self) -> str:
        if self.scheme == "ipc":
            return f"ipc://{self.place}"
        return f"tcp://{self.place}:{self.port or '*'}"

    @property
    def is_fixed(self) -> bool:
        """Whether it is known before the socket is bound; only such endpoints can clash."""
        return self.scheme == "ipc" or self.port != 0


def parse_endpoint(text: str, example: str = "ipc:///run/collector/NAME.pub") -> Endpoint:
    """Read an endpoint to listen on, in one spelling for each (localhost is 127.0.0.1, paths are normalised).

    Raises ValueError, in words that follow the endpoint and say what to write instead: a path as in `example`.
    """
    scheme, found, rest = text.partition("://")
    if found and scheme == "ipc":
        return Endpoint("ipc", _check_path(rest, example), 0)
    if found and scheme == "tcp":
        return _parse_tcp(rest)
    raise ValueError(f"is no endpoint to listen on; write tcp://127.0.0.1:5601 or {example}")


def _check_path(path: str, example: str) -> str:
    if not path.isprintable():
        raise ValueError("has characters in its path that cannot be shown; write another path")
    if not path.startswith("/"):
        raise ValueError(f"needs an absolute path; write for example {example}")
    if path.endswith("/"):
        raise ValueError(f"names a directory; write for example {example}")
    size = len(os.fsencode(path))
    if size > MAX_IPC_PATH:
        raise ValueError(f"has a path of {size} bytes, the system takes {MAX_IPC_PATH}; write a shorter path")
    return os.path.normpath(path).replace("//", "/")


def _parse_tcp(rest: str) -> Endpoint:
    match = _TCP.match(rest)
    if match is None:
        raise ValueError("needs a host and a port; write for example tcp://127.0.0.1:5601")
    host = "127.0.0.1" if match["host"].lower() == "localhost" else match["host"]
    if host == "[::1]":
        raise ValueError("is IPv6, which is not offered; write tcp://127.0.0.1:" + match["port"])
    if not _LOOPBACK.match(host) or any(int(part) > 255 for part in host.split(".")):
        raise ValueError(
            "listens beyond this machine, which waits for encryption; write tcp://127.0.0.1:" + match["port"]
        )
    port = 0 if match["port"] == "*" else int(match["port"])
    if port > 65535:
        raise ValueError("has no such port; write 1 to 65535, or * for any free one")
    return Endpoint("tcp", host, port)
