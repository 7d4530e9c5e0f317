"""The control socket: takes requests from plain REQ clients, answers each on its own, survives whatever comes."""

import asyncio
import errno
import logging
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import zmq
import zmq.asyncio

from collector.messages import ControlError, Request, decode_request, encode_reply
from collector.sockets import is_socket, remove_socket

MAX_REQUEST = 64 << 20
"""Bytes of a frame up to which an answer is given (bad_request beyond messages.MAX_CONTROL); then the peer is cut."""

MAX_PENDING = 512
"""Requests that are worked on at the same time; one more is answered at once, undone."""

SLACK = 0.2
"""Seconds after its deadline that a command has to say itself what came of it."""

log = logging.getLogger(__name__)


class ControlServer:
    """Answers control requests by `answer(request)`, one task for each, so that a slow one holds up nobody."""

    def __init__(self, endpoint: str, answer: Callable[[Request], Awaitable[Any]]) -> None:
        self._answer = answer
        self._pending: set[asyncio.Task[None]] = set()
        self._was_full = False
        self._context = zmq.asyncio.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST)
        try:
            self._bind(endpoint)
        except zmq.ZMQError:
            self.close()
            raise
        self.endpoint: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def _bind(self, endpoint: str) -> None:
        remove_socket(endpoint)
        scheme, _, path = endpoint.partition("://")
        if scheme == "ipc" and os.path.lexists(path):  # ZeroMQ would remove it, whoever listens there
            raise zmq.ZMQError(errno.EADDRINUSE if is_socket(path) else errno.EEXIST)
        mask = os.umask(0o177)  # an ipc socket is for its owner alone, wherever it lies
        try:
            self._socket.bind(endpoint)
        finally:
            os.umask(mask)

    def restore(self) -> None:
        """Listen anew if somebody removed the file of an ipc endpoint. Raises zmq.ZMQError."""
        scheme, _, path = self.endpoint.partition("://")
        if scheme != "ipc" or os.path.lexists(path):
            return
        with suppress(zmq.ZMQError):  # an earlier attempt may have come so far
            self._socket.unbind(self.endpoint)
        self._bind(self.endpoint)
        log.warning("%s was removed: listens there again", path)

    async def serve(self) -> None:
        """Take requests until cancelled."""
        while True:
            frames = await self._socket.recv_multipart()
            is_full = len(self._pending) >= MAX_PENDING
            self._note_pending(is_full)
            task = asyncio.create_task(self._handle(frames, is_full))
            self._pending.add(task)
            task.add_done_callback(self._pending.discard)
            await asyncio.sleep(0)  # under a flood recv never waits, and all else would

    def _note_pending(self, is_full: bool) -> None:
        if is_full and not self._was_full:
            log.warning("%d control requests are waiting: further ones are refused", MAX_PENDING)
        self._was_full = is_full or (self._was_full and len(self._pending) > MAX_PENDING // 2)

    async def _handle(self, frames: list[bytes], full: bool) -> None:
        envelope, body = _open_envelope(frames)
        try:
            reply = encode_reply(await self._work(body, full))
        except ControlError as error:
            reply = encode_reply(error=error)
        except Exception:
            log.exception("a control request failed")
            reply = encode_reply(error=ControlError("internal", "a fault of the collector; see its log"))
        await self._socket.send_multipart([*envelope, reply])

    async def _work(self, body: bytes | None, full: bool) -> Any:
        now = time.time_ns()
        if body is None:
            raise ControlError("bad_request", "a request is an empty frame and one MessagePack map (a REQ socket's)")
        request = decode_request(body, now)
        if full:
            raise ControlError(
                "internal", f"{MAX_PENDING} requests are waiting; this one was not carried out, try later"
            )
        if request.deadline <= now:
            raise ControlError("expired", "the deadline had passed on arrival")
        try:
            async with asyncio.timeout((request.deadline - now) / 1e9 + SLACK):
                return await self._answer(request)
        except TimeoutError:
            raise ControlError("timeout", f"{request.op}: no answer within the deadline") from None

    def close(self) -> None:
        """Stop listening; who still waits gets no answer."""
        for task in self._pending:
            task.cancel()
        self._context.destroy(linger=200)


def _open_envelope(frames: list[bytes]) -> tuple[list[bytes], bytes | None]:
    """Split what came into the frames that lead the answer back and the request; None if it is no request."""
    try:
        end = frames.index(b"", 1) + 1
    except ValueError:
        return frames[:1], None
    body = frames[end:]
    return frames[:end], body[0] if len(body) == 1 else None
