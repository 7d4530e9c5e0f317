"""The exchange's own list of instruments, by REST beside the WebSocket: public/get_instruments.

A plain HTTP request in a thread of its own: it is asked rarely, and neither `plan` nor the supervisor shall import what
the workers need. The thread is a daemon, so that an exchange which never answers holds up no end.
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from collector import __version__
from collector.aside import run_aside
from collector.config.patterns import Instrument, read_instrument
from collector.words import printable

QUESTION = "/api/v2/public/get_instruments?currency=any"

MAX_ANSWER = 64 << 20
"""Bytes of an answer that are taken; all of Deribit's instruments were measured at 5.1 MB."""

HEADERS = {"Accept": "application/json", "User-Agent": f"deribit-collector/{__version__}"}
"""Sent unless the configuration has its own: some hosts refuse what Python would call itself."""


class Unreachable(Exception):
    """The list could not be had; one line names the host and says why. Another attempt may help."""

    def __init__(self, line: str) -> None:
        super().__init__(printable(line[:250]))


class Catalogue:
    """What one exchange lists. `url` is the WebSocket's; REST is http(s)://<same host>/api/v2.

    `timeout` is how long it may be silent, `max_seconds` how long one answer may take as a whole; in seconds.
    """

    max_seconds = 30.0

    def __init__(self, url: str, headers: Mapping[str, str], timeout: float) -> None:
        parts = urlsplit(url)
        self.host = parts.netloc.rpartition("@")[2]
        self._secure = parts.scheme == "wss"
        given = {name.lower() for name in headers}
        self._headers = {name: text for name, text in HEADERS.items() if name.lower() not in given} | dict(headers)
        self._timeout = timeout
        self._offset = time.time() - time.monotonic()
        self._sharing: asyncio.Task[dict[str, Instrument]] | None = None

    def read_ms(self) -> int:
        """Ms since 1970 by the exchange's clock, as its last answer told; by ours before. No step of ours moves it."""
        return int((time.monotonic() + self._offset) * 1000)

    async def fetch(self) -> dict[str, Instrument]:
        """All instruments by name. Raises Unreachable."""
        try:
            return await run_aside(self.read_all, "catalogue")
        except RuntimeError as error:
            raise Unreachable(f"the list cannot be asked for ({error})") from None

    async def share(self) -> dict[str, Instrument]:
        """The same as `fetch`, but an answer that somebody waits for already will do. Raises Unreachable."""
        if self._sharing is None or self._sharing.done():
            self._sharing = asyncio.create_task(self.fetch())
            # Nobody may wait for it any more when it fails.
            self._sharing.add_done_callback(lambda task: task.cancelled() or task.exception())
        return dict(await asyncio.shield(self._sharing))

    def read_all(self) -> dict[str, Instrument]:
        """The same as `fetch`, for programs without an event loop."""
        rows = self._ask()
        listed = {each.name: each for row in rows if (each := read_instrument(row))} if isinstance(rows, list) else {}
        if not listed:  # never taken for the truth: it would end every subscription
            raise Unreachable(f"{self.host} lists no instruments")
        return listed

    def _ask(self) -> Any:
        """The `result` of the answer. Raises Unreachable."""
        try:
            status, body = self._get()
        except (OSError, HTTPException, ValueError, RuntimeError) as error:  # a host that is no host; no more threads
            why = getattr(error, "strerror", None) or error or type(error).__name__
            raise Unreachable(f"{self.host} cannot be reached ({why})") from None
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = None
        match answer:
            case {"usOut": int(sent)} if 0 < sent < 1 << 62:
                self._offset = sent / 1e6 - time.monotonic()
        match answer:
            case {"result": result} if status == 200:
                return result
            case {"error": {"code": code, "message": message}}:
                raise Unreachable(f"{self.host} answered {str(code)[:20]} {str(message)[:100]}")
        raise Unreachable(f"{self.host} answered with HTTP {status} and no list")

    def _get(self) -> tuple[int, bytes]:
        connection = (HTTPSConnection if self._secure else HTTPConnection)(self.host, timeout=self._timeout)
        connection.connect()
        # The timeout is that of one read: who sends a byte now and then, of the headers too, would hold us for ever.
        is_late = threading.Event()
        guard = threading.Timer(self.max_seconds, _shut, (connection.sock, is_late))
        guard.daemon = True
        guard.start()
        try:
            connection.request("GET", QUESTION, headers=self._headers)
            response = connection.getresponse()
            body = response.read(MAX_ANSWER + 1)
            if len(body) > MAX_ANSWER:
                raise OSError(f"the answer had no end after {MAX_ANSWER} bytes")
            return response.status, body
        finally:
            guard.cancel()
            connection.close()
            if is_late.is_set():
                raise TimeoutError(f"the answer had no end after {self.max_seconds:g} s")


def _shut(end: socket.socket, is_late: threading.Event) -> None:
    is_late.set()
    with suppress(OSError):  # the other end was faster
        end.shutdown(socket.SHUT_RDWR)
