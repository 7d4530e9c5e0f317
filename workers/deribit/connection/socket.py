"""One WebSocket from its opening to its end. The only module that imports aiohttp: another client could stand here.

Text goes out; frames come in by all that was read from the system together, in the very call that read them.
"""

import asyncio
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from errno import ECONNRESET
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

import aiohttp

from collector.words import printable
from workers.deribit.connection.framing import MAX_FRAME, Framing
from workers.deribit.rpc.errors import Lost

CLOSE_TIMEOUT = 1.0
"""Seconds that a peer gets to answer our close frame."""

WORDS, WORDS_TIMEOUT = 200, 0.5
"""Bytes of a refusal's body that are shown, and seconds that they get to come."""

LONGEST_PAUSE = 300
"""Seconds: a refusal that asks for a longer pause is obeyed for so long."""

CUT = (ConnectionError, aiohttp.ClientError, RuntimeError)
"""What aiohttp raises for a send on a socket that has just gone."""

ENDED = (aiohttp.ServerDisconnectedError, aiohttp.ClientConnectionResetError)
"""What it raises where the server hangs up before its answer is whole."""

CONNECT_FAILED = r"(?:\[Errno (\d+)\] )?Connect call failed"
"""What asyncio says for every number, which it names where it tells of several addresses."""

DATA = (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY)
"""Kinds of message that are a frame."""

Take = Callable[[list[bytes]], None]


class Tap:
    """Stands before aiohttp's parser: takes the data frames out, and hands the rest on to it.

    aiohttp queues each message and wakes a task for it; at everyday rates that costs more than the message's own way.
    """

    def __init__(self) -> None:
        self.reader: Any = None
        self.bytes_read = 0
        self.failure: BaseException | None = None
        self._framing = Framing()
        self._early: list[bytes] = []
        self._take: Take = self._early.extend

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """Take what was read; see aiohttp's parser for what is returned."""
        framing = self._framing
        self.bytes_read += len(data)
        if not framing.is_foreign:
            frames, data = framing.cut(data)
            if frames:
                self._hand_over(frames)
            if not data:
                return False, b""
        done: tuple[bool, bytes] = self.reader.feed_data(data)
        return done

    def feed_eof(self) -> None:
        """Nothing will come any more."""
        self.reader.feed_eof()

    def open(self, take: Take) -> None:
        """Hand frames over from now on, at first those that have come already."""
        self._take = take
        if self._early:
            self._hand_over(self._early)

    def shut(self) -> None:
        """Let frames fall from now on."""
        self._take = _let_fall

    def _hand_over(self, frames: list[bytes]) -> None:
        try:
            self._take(frames)
        except Exception as error:
            self.failure = error  # for the one who waits for the end, which comes now: the loop closes the transport
            self.shut()
            raise


def read_certificates() -> int:
    """Read all that OpenSSL wants to know of the trusted certificates; return how many there are.

    It does so at the first handshake else, and keeps it: what is read before a fork, workers share. They are those of
    the context that aiohttp makes once for all sessions.
    """
    return len(aiohttp.connector._SSL_CONTEXT_VERIFIED.get_ca_certs(binary_form=True))


def _let_fall(frames: list[bytes]) -> None:
    """Take frames that nobody wants any more."""


class Response(aiohttp.ClientWebSocketResponse[Any]):
    """aiohttp's WebSocket with a tap.

    aiohttp sets its parser here, and hands what it then finds here to its protocol. Should another version not do so,
    all frames come by `receive`, more slowly.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.tap = Tap()
        super().__init__(*arguments, **options)

    @property
    def _parser(self) -> Any:
        return self.tap

    @_parser.setter
    def _parser(self, reader: Any) -> None:
        if reader is not None:  # aiohttp lets go of it before the last bytes have come
            self.tap.reader = reader


class Socket:
    """An open WebSocket: `open`, `send`, `follow`, `close`."""

    def __init__(self, session: aiohttp.ClientSession, socket: Response) -> None:
        self._session = session
        self._socket = socket

    @classmethod
    async def open(cls, url: str, headers: Mapping[str, str], timeout: float) -> Self:
        """Connect within `timeout` seconds. Raises Lost, which says why not."""
        session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None), ws_response_class=Response, auto_decompress=False,
            raise_for_status=_explain_refusal if _is_bare(url, headers) else _tell_refusal, trace_configs=[_STAYING],
        )  # fmt: skip
        session._retry_connection = False  # else a server that hangs up is asked twice at once
        try:
            async with asyncio.timeout(timeout):
                return cls(session, await _connect(session, url, headers))
        except BaseException as error:
            await session.close()
            raise _explain_failure(error, url, timeout) from None

    async def send(self, text: str) -> None:
        """Send one text frame. Raises Lost if the socket has just gone."""
        try:
            await self._socket.send_str(text)
        except CUT as error:
            raise Lost(f"cut while sending: {error}") from None

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""
        return self._socket.tap.bytes_read

    async def follow(self, take: Take) -> None:
        """Hand frames to `take`, all that were read from the system together, until the end of the socket.

        Raises Lost, which says how it ended, or what `take` raises.
        """
        tap = self._socket.tap
        try:
            tap.open(take)
            while (message := await self._receive()).type in DATA:
                take([message.data])  # fragments and the like: no frames of the tap come any more
        finally:
            tap.shut()
        raise tap.failure or Lost(self._explain_end(message))

    async def _receive(self) -> Any:
        try:
            return await self._socket.receive()
        except CUT as error:  # a ping was to be answered on a socket that has just gone
            raise self._socket.tap.failure or Lost(f"cut while a ping was answered: {error}") from None

    def _explain_end(self, message: Any) -> str:
        if message.type is aiohttp.WSMsgType.ERROR:
            return f"broken frame: {message.data}"
        if message.type is aiohttp.WSMsgType.CLOSE:
            return f"closed by the exchange: {message.data or 'no code'} {message.extra or ''}".rstrip()
        return f"the connection broke off (code {self._socket.close_code})"

    async def close(self) -> None:
        """Close in order; cut if the peer does not answer the close frame for CLOSE_TIMEOUT."""
        # aiohttp takes a cancelled `receive` for the end of it all: it would cut at once, and the unread data of a busy
        # connection make that a reset, which may overtake the close frame.
        self._socket._close_code = None
        try:
            with suppress(TimeoutError, *CUT):
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await self._socket.close()
        finally:  # also where the owner is closed amid this
            # Over TLS it would wait 30 s more for the last word of a peer that has gone, or read all that is late.
            self._socket._writer.transport.abort()
            await self._session.close()


async def _connect(session: aiohttp.ClientSession, url: str, headers: Mapping[str, str]) -> Any:
    timeout = aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT)
    return await session.ws_connect(url, headers=headers, max_msg_size=MAX_FRAME, timeout=timeout, decode_text=False)


async def _refuse_redirect(*_: Any) -> None:
    """Raise Lost: what is sent along is for the host of the file alone, and the place may be an echo of it."""
    raise Lost("redirected to another address: write the exchange's own as url")


_STAYING = aiohttp.TraceConfig()
_STAYING.on_request_redirect.append(_refuse_redirect)


def _is_bare(url: str, headers: Mapping[str, str]) -> bool:
    """Whether nothing is sent that may be secret: a server could say it again, in other words than ours."""
    parts = urlsplit(url)
    keys = {key for key, _ in parse_qsl(parts.query, keep_blank_values=True)}
    return not headers and "@" not in parts.netloc and keys <= {"faults"}


async def _tell_refusal(response: aiohttp.ClientResponse, words: str = "") -> None:
    """Raise Lost for an answer that is no upgrade."""
    if response.status != 101:
        pause = _parse_pause(response.headers.get("Retry-After", ""))
        hint = " (32 connections are allowed from one address)" if response.status == 429 else ""
        raise Lost(f"HTTP {response.status} instead of a WebSocket{hint}{': ' if words else ''}{words}", pause=pause)


def _parse_pause(said: str) -> int:
    """The seconds of a Retry-After; 0 where it is no number: a date is by a clock that may be wrong."""
    return min(LONGEST_PAUSE, int(said)) if re.fullmatch("[0-9]{1,9}", said) else 0


async def _explain_refusal(response: aiohttp.ClientResponse) -> None:
    """The same, with the first line of its text. It may be any server: little of it is read, and only text."""
    body = b""
    is_text = response.content_type in ("text/plain", "application/json")  # a page begins with its head, no words
    if response.status != 101 and is_text and "Content-Encoding" not in response.headers:
        with suppress(TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(WORDS_TIMEOUT):
                while part := await response.content.read(WORDS - len(body)):
                    body += part
    line = body.strip().partition(b"\n")[0].decode(errors="replace").strip()
    await _tell_refusal(response, printable(line))


def _explain_failure(error: BaseException, url: str, timeout: float) -> BaseException:
    """Lost for what can go wrong with a connection; anything else as it is."""
    if isinstance(error, aiohttp.ClientResponseError):  # its own text would show the URL, and what was received
        words = re.split("[^A-Za-z0-9 -]", error.message)[0]  # what was received stands behind a colon or in quotes
        return Lost(f"the answer is no WebSocket's: {words.strip()}")
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        cause = error.certificate_error
        return Lost(f"the certificate of {error.host} is not trusted: {getattr(cause, 'verify_message', cause)}")
    if isinstance(error, aiohttp.ClientConnectorError):
        cause = error.os_error
        # None where the server hangs up amid the handshake; of several addresses each has failed by a cause of its own.
        said = cause.strerror or str(cause) or "the server ended the connection"
        words = re.sub(CONNECT_FAILED, lambda found: os.strerror(int(found[1] or cause.errno or 0)), said)
        return Lost(f"Cannot connect to host {error.host}:{error.port} [{words}]")
    if isinstance(error, ENDED) or (isinstance(error, OSError) and error.errno == ECONNRESET):
        # The text of the first would show what had come of the answer, that of the second tells of a closing transport.
        return Lost("the server ended the connection before it answered")
    if isinstance(error, TimeoutError):
        return Lost(f"no connection to {urlsplit(url).netloc.rpartition('@')[2]} within {timeout:g} s")
    if isinstance(error, (aiohttp.ClientError, OSError, ValueError)):
        return Lost(str(error) or type(error).__name__)
    return error
