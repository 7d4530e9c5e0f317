"""One WebSocket from its opening to its end. The only module that imports aiohttp: another client could stand here.

Text goes out; frames come in by all that was read from the system together.
"""

import asyncio
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Any, Self

import aiohttp

from workers.deribit.connection.together import Resumed
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
        self._taking: tuple[Coroutine[Any, Any, Any], Any] | None = None
        self._end: aiohttp.WSMessage | None = None

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
        frames: list[bytes] = []
        receive = self._socket.receive
        message = await self._receive()
        while message.type is TEXT or message.type is BINARY:
            frames.append(message.data)
            taking = receive()
            try:
                # Stepped by hand, since only so it shows whether it has to wait: then all that was read has been taken.
                waits_for = taking.send(None)
            except StopIteration as done:
                message = done.value
            else:
                self._taking = (taking, waits_for)
                return frames
        self._end = message
        if frames:
            return frames
        raise Lost(self._explain_end(message))

    async def _receive(self) -> Any:
        """The next message: what the last reading began to wait for, or the end that it met."""
        if self._end is not None:
            return self._end
        taking, self._taking = self._taking, None
        return await (self._socket.receive() if taking is None else Resumed(*taking))

    def _explain_end(self, message: Any) -> str:
        if message.type is aiohttp.WSMsgType.ERROR:
            return f"broken frame: {message.data}"
        if message.type is aiohttp.WSMsgType.CLOSE:
            return f"closed by the exchange: {message.data} {message.extra or ''}".rstrip()
        return f"the connection broke off (code {self._socket.close_code})"

    async def close(self) -> None:
        """Close in order; cut if the peer does not answer the close frame for CLOSE_TIMEOUT."""
        taking, self._taking = self._taking, None
        if taking is not None:
            taking[0].close()  # aiohttp must not believe that somebody is reading still
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
