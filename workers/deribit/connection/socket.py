"""One WebSocket from its opening to its end. The only module that imports aiohttp: another client could stand here.

Text goes out; frames come in by all that was read from the system together.
"""

import asyncio
import types
from collections.abc import Generator, Mapping
from contextlib import suppress
from typing import Any, Self

import aiohttp

from workers.deribit.rpc.errors import Lost

MAX_FRAME = 16 << 20
"""Bytes of one frame that are taken; Deribit's largest (an instrument list) was measured at 5.1 MB."""

CLOSE_TIMEOUT = 1.0
"""Seconds that a peer gets to answer our close frame."""

CUT = (ConnectionError, aiohttp.ClientError, RuntimeError)
"""What aiohttp raises for a send on a socket that has just gone."""

TEXT, BINARY = aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY


class Socket:
    """An open WebSocket: `open`, `send`, `read`, `close`."""

    def __init__(self, session: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse[Any]) -> None:
        self._session = session
        self._socket = socket
        self._frames: list[bytes] = []
        self._end: Any = None
        self._pump = self._take_frames()
        self._waits_for: Any = None

    @classmethod
    async def open(cls, url: str, headers: Mapping[str, str], timeout: float) -> Self:
        """Connect within `timeout` seconds. Raises Lost, which says why not."""
        session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        try:
            async with asyncio.timeout(timeout):
                return cls(session, await _connect(session, url, headers))
        except BaseException as error:
            await session.close()
            raise _explain_failure(error, timeout) from None

    async def send(self, text: str) -> None:
        """Send one text frame. Raises Lost if the socket has just gone."""
        try:
            await self._socket.send_str(text)
        except CUT as error:
            raise Lost(f"cut while sending: {error}") from None

    async def read(self) -> list[bytes]:
        """Wait for the next frames; all that were read from the system together, in order.

        What came before the end is given first; then it raises Lost, which says how it ended.
        """
        if self._end is None:
            await self._drive()
        frames, self._frames = self._frames, []
        if frames:
            return frames
        raise Lost(self._explain_end(self._end))

    async def _take_frames(self) -> Any:
        """Take frames until the end of the socket; return what ended it."""
        receive = self._socket.receive
        while True:
            message = await receive()
            if message.type is TEXT or message.type is BINARY:
                self._frames.append(message.data)
            else:
                return message

    @types.coroutine
    def _drive(self) -> Generator[Any, Any, None]:
        """Let `_take_frames` run until it has some and has to wait: then all that was read has been taken.

        A coroutine stepped by hand shows when it waits. This step is the only cost of knowing it, once a read.
        """
        pump, waits_for, self._waits_for = self._pump, self._waits_for, None
        try:
            waits_for = waits_for or pump.send(None)
            while not self._frames:
                try:
                    sent = yield waits_for
                except BaseException as error:  # also a cancellation is the coroutine's to answer
                    waits_for = pump.throw(error)
                else:
                    waits_for = pump.send(sent)
        except StopIteration as done:
            self._end = done.value
        else:
            self._waits_for = waits_for

    def _explain_end(self, message: Any) -> str:
        if message.type is aiohttp.WSMsgType.ERROR:
            return f"broken frame: {message.data}"
        if message.type is aiohttp.WSMsgType.CLOSE:
            return f"closed by the exchange: {message.data} {message.extra or ''}".rstrip()
        return f"the connection broke off (code {self._socket.close_code})"

    async def close(self) -> None:
        """Close in order; cut if the peer does not answer the close frame for CLOSE_TIMEOUT."""
        self._pump.close()  # aiohttp must not believe that somebody is reading still
        with suppress(TimeoutError, *CUT):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._socket.close()
        await self._session.close()


async def _connect(
    session: aiohttp.ClientSession, url: str, headers: Mapping[str, str]
) -> aiohttp.ClientWebSocketResponse[Any]:
    timeout = aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT)
    return await session.ws_connect(url, headers=headers, max_msg_size=MAX_FRAME, timeout=timeout, decode_text=False)


def _explain_failure(error: BaseException, timeout: float) -> BaseException:
    """Lost for what can go wrong with a connection; anything else as it is."""
    if isinstance(error, aiohttp.WSServerHandshakeError):
        hint = " (32 connections are allowed from one address)" if error.status == 429 else ""
        return Lost(f"HTTP {error.status} instead of a WebSocket{hint}")
    if isinstance(error, TimeoutError):
        return Lost(f"no connection within {timeout:g} s")
    if isinstance(error, (aiohttp.ClientError, OSError, ValueError)):
        return Lost(str(error).replace(" ssl:default", "") or type(error).__name__)
    return error
