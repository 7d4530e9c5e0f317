"""What goes over the sockets of one client, one after the other: requests, their answers, and all frames that come."""

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import msgspec

from workers.deribit.connection.listener import Listener
from workers.deribit.connection.pace import Pace
from workers.deribit.connection.socket import Socket
from workers.deribit.rpc.codec import DATA_PREFIX, START, Data, Heartbeat, Reply, decode_frame, encode_request
from workers.deribit.rpc.errors import ExchangeError, Lost, NotConnected

HIDDEN = b"(not shown)"
"""What is told of a frame that holds a secret."""


class Traffic:
    """Numbers and counts go on over all sockets. `heed(error, method)` hears of each error in an answer, first of all.

    `requests` is the number of the newest request, `waiting` holds those without an answer: no answer can be taken for
    another's. `timeout` bounds the opening of a socket, and each request that names none of its own.

    Neither `client_secret` nor a token that was sent is told if the exchange repeats it. (A signature is soon stale.)
    """

    frames = 0
    malformed = 0
    requests = 0
    _stamp = 0
    _bytes = 0
    _socket: Socket | None = None

    def __init__(
        self, listener: Listener, heed: Callable[[ExchangeError, str], None], timeout: float, read_pause: float,
        client_secret: str,
    ) -> None:  # fmt: skip
        self.waiting: dict[int | None, tuple[str, asyncio.Future[Any]]] = {}
        self._listener = listener
        self._heed = heed
        self._timeout = timeout
        self._pace = Pace(read_pause)
        self._answering: set[asyncio.Task[None]] = set()
        self._secrets: dict[str, bytes] = {}
        self._note_secrets({"client_secret": client_secret})  # whoever repeats it may know it from elsewhere

    async def open(self, url: str, headers: Mapping[str, str]) -> None:
        """Connect. Raises Lost, which says why not."""
        self._socket = await Socket.open(url, headers, self._timeout)

    async def follow(self) -> None:
        """Take what comes until the end of the socket. Raises Lost, or what the listener raises."""
        assert self._socket is not None
        try:
            await self._socket.follow(self._take)
        except Lost as error:
            words = str(error)  # those of a close may repeat a login
            for secret in self._secrets.values():
                words = words.replace(secret.decode(), "***")
            raise Lost(words) from None

    async def send(self, method: str, params: dict[str, Any] | None = None, timeout: float | None = None) -> Any:
        """Send one request; return its result. Raises ExchangeError, TimeoutError, NotConnected or Lost."""
        if self._socket is None:
            raise NotConnected("there is no connection")
        self.requests = number = self.requests + 1
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.waiting[number] = method, answer
        self._note_secrets(params or {})
        try:
            async with asyncio.timeout(timeout or self._timeout):
                await self._socket.send(encode_request(number, method, params or {}))
                return await answer
        finally:
            del self.waiting[number]

    def end(self) -> Socket | None:
        """No answer comes any more; return the socket, which is to be closed."""
        for _, answer in self.waiting.values():
            if not answer.done():
                answer.set_exception(Lost("the connection ended before the answer came"))
                answer.exception()  # where nobody waits any more, nobody need be told
        socket, self._bytes, self._socket = self._socket, self.bytes_read, None
        return socket

    @property
    def bytes_read(self) -> int:
        """Bytes read from all sockets so far."""
        return self._bytes + (self._socket.bytes_read if self._socket is not None else 0)

    def read_clock(self) -> int:
        """Now, in ns since 1970; while a burst is handed out, the time at which it was read."""
        return self._stamp or time.time_ns()

    def _take(self, frames: list[bytes]) -> None:
        """Take the frames that were read together."""
        self._stamp = stamp = time.time_ns()  # one time for all of them
        self.frames += len(frames)
        # A slice is compared, since `startswith` costs more (measured).
        data = [frame for frame in frames if frame[:START] == DATA_PREFIX or self._take_other(frame)]
        if data:
            self._listener.take_frames(data, stamp)
        self._stamp = 0
        if self._pace.should_pause(self.frames, stamp):
            # Not asyncio's sleep: its timers know whole ms, and would wake for each frame that comes meanwhile.
            time.sleep(self._pace.pause)

    def _take_other(self, frame: bytes) -> bool:
        """Take a frame that does not begin as data do; true if it is data all the same."""
        try:
            found = decode_frame(frame)
        except ValueError as error:
            self._take_bad(frame, str(error))
            return False
        if isinstance(found, Reply):
            self._take_reply(found, frame)
        elif isinstance(found, Heartbeat) and found.kind == "test_request":
            task = asyncio.create_task(self._answer_test())
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)
        return isinstance(found, Data)

    def _take_reply(self, reply: Reply, frame: bytes) -> None:
        method, answer = self.waiting.get(reply.number, ("", None))
        error = reply.error
        if error is not None:
            if method in ("", "public/auth"):  # the first may be one that came too late
                told = error.hide(self._secrets.values())
                frame, error = frame if told is error else HIDDEN, told  # it may spell it in another way than we do
            self._heed(error, method)
        if answer is None:
            if reply.number is None or not 0 < reply.number <= self.requests:  # else nobody waits for it any more
                what = f"an error that answers no request of ours: {error}"
                self._take_bad(frame, what if error else "an answer to no request of ours")
        elif not answer.done():
            answer.set_exception(error) if error else answer.set_result(reply.result)

    def _note_secrets(self, params: dict[str, Any]) -> None:
        """Note what of a login may not be told."""
        for key in ("client_secret", "refresh_token"):
            if isinstance(secret := params.get(key), str) and secret:
                self._secrets[key] = msgspec.json.encode(secret)[1:-1]

    def _take_bad(self, frame: bytes, reason: str) -> None:
        self.malformed += 1
        # An answer that nobody can place may be the one that holds the tokens, or repeats a login.
        is_secret = any(word in frame for word in (b"_token", b"client_secret", *self._secrets.values()))
        self._listener.take_malformed(HIDDEN if is_secret else frame, reason)

    async def _answer_test(self) -> None:
        """Deribit closes the connection (4000) when a test_request stays unanswered; nothing may hold this up."""
        with suppress(ExchangeError, Lost, TimeoutError):
            await self.send("public/test")
