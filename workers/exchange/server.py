"""The exchange's sockets: WebSocket on /ws/api/v2, HTTP on /api/v2, and the clock that drives the market."""

import asyncio
import base64
import binascii
import contextlib
import logging
import socket
import ssl
import struct
import time
from collections import Counter
from typing import Any

import msgspec
from aiohttp import WSCloseCode, WSMsgType, web

from collector.faults import Faults, parse_faults
from workers.exchange.exchange import Counts, Exchange, find_failure
from workers.exchange.protocol.connection import CLOSE, TEXT, Connection
from workers.exchange.protocol.distort import distort_envelope
from workers.exchange.protocol.rpc import MAX_REQUEST, NO_ID, Call, RpcError, encode_answer, read_call
from workers.exchange.protocol.session import Session
from workers.exchange.protocol.socket_methods import SOCKET_METHODS, Context, carry_out

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 32
"""Of one client address; the next upgrade gets HTTP 429."""

STEP = 0.02
"""Seconds between two moves of the market."""

CLOSE_TIMEOUT = 1.0
"""Seconds that a client gets to answer our close frame."""

ROOM = 1 << 16
"""Bytes that the transport may hold of fragments."""

_FINAL = (WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR)


class Server:
    """Serves one exchange."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.port = 0
        self._sockets: set[_Socket] = set()
        self._opening: Counter[str] = Counter()  # upgrades that are being answered, by client address
        self._counts: Counts = Counter()
        self._runner: web.AppRunner | None = None

    @property
    def connections(self) -> int:
        """How many WebSockets are open."""
        return sum(not served.connection.session.ended for served in self._sockets)

    @property
    def url(self) -> str:
        scheme = "wss" if self.exchange.settings.certificate else "ws"
        host = self.exchange.settings.host
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}/ws/api/v2"

    async def start(self) -> None:
        """Bind and serve. Raises OSError if the port is taken or the certificate cannot be read."""
        settings = self.exchange.settings
        tls = _read_certificate(settings.certificate)
        app = web.Application(client_max_size=MAX_REQUEST * 4)
        app.router.add_get("/ws/api/v2", self._serve_socket)
        for path in ("/api/v2", "/api/v2/{method:.*}"):
            app.router.add_route("*", path, self._serve_http)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, settings.host, settings.port, backlog=512, ssl_context=tls)
        try:
            await site.start()
        except OSError:
            await self._runner.cleanup()
            raise
        self.port = self._runner.addresses[0][1]

    async def run(self, stopped: asyncio.Event) -> None:
        """Let the market live until stopped; then close every connection in order."""
        try:
            while not stopped.is_set():
                now = time.time()
                for connected in list(self._sockets):
                    connected.connection.tick(now)
                self.exchange.advance(int(now * 1000))  # after it: what is sent has the time that it is now
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stopped.wait(), STEP)
        finally:
            await self._end()

    async def _end(self) -> None:
        for connected in list(self._sockets):
            connected.connection.close(WSCloseCode.GOING_AWAY, "the exchange stops")
        deadline = time.monotonic() + 1.5
        while self._sockets and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        for connected in list(self._sockets):
            connected.cut(False)
        if self._runner is not None:
            await self._runner.cleanup()
        self.exchange.oracle.close()

    # WebSocket

    async def _serve_socket(self, request: web.Request) -> web.StreamResponse:
        address = request.remote or ""
        if self._is_full(address):
            return web.Response(status=429, text="Too Many Requests\n")
        try:
            faults = self.exchange.draw_faults(request.query.get("faults"))
        except ValueError as error:
            log.warning("a connection refused: %s", error)
            return web.Response(status=400, text=f"{error}\n")
        self._opening[address] += 1  # before anything else may come in between
        try:
            await asyncio.sleep(faults.number("slow_open") + 2 * faults.number("delay") / 1000.0)
            if "429" in faults:
                return web.Response(status=429, text="Too Many Requests\n")
            if "refuse" in faults or request.transport is None:
                return web.Response(status=int(faults.number("refuse", 503)), text="refused on request\n")
            response = await _open_response(request)
            served = _Socket(request, response, self.exchange, faults)
            self._sockets.add(served)
        finally:
            self._opening[address] -= 1
        try:
            await served.serve()
        finally:
            self._sockets.discard(served)
        return response

    def _is_full(self, address: str) -> bool:
        """Whether a client address has as many connections as it may, those that are just being opened among them."""
        limit = int(self.exchange.faults.number("connections", MAX_CONNECTIONS))  # 0 is any number
        held = sum(not s.connection.session.ended for s in self._sockets if s.connection.address == address)
        return bool(limit) and held + self._opening[address] >= limit

    # HTTP

    async def _serve_http(self, request: web.Request) -> web.Response:
        now, faults = time.time(), Faults()
        call = Call(NO_ID, "", {})
        try:
            call = await _read_http(request)
            faults = self._find_http_faults(request)
            slow = find_failure(faults, "slow", call.method, self._counts)
            await asyncio.sleep((slow.value if slow else 0.0) + 2 * faults.number("delay") / 1000.0)
            outcome: Any = await self._ask(request, call, faults, int(now * 1000))
        except RpcError as error:
            outcome = error
        clock, us_in, us_out = int(faults.number("clock") * 1000), int(now * 1e6), int(time.time() * 1e6)
        body = encode_answer(call.id, outcome, us_in + clock, max(us_in + 1, us_out) + clock)
        body = distort_envelope(body, faults)
        status = 400 if isinstance(outcome, RpcError) else 200
        return web.Response(
            body=body, status=status, content_type="application/json", headers={"cache-control": "no-store"}
        )

    def _find_http_faults(self, request: web.Request) -> Faults:
        try:
            return parse_faults(request.query["faults"]) if "faults" in request.query else self.exchange.faults
        except ValueError as error:
            raise RpcError(10001, str(error)) from None

    async def _ask(self, request: web.Request, call: Call, faults: Faults, now: int) -> Any:
        failure = find_failure(faults, "error", call.method, self._counts)
        if failure is not None:
            raise RpcError(int(failure.value))
        if call.method in SOCKET_METHODS:
            raise RpcError(10030)
        session = Session(0)
        await _log_in(request, self.exchange, session, now)
        context = Context(self.exchange, session, _Nobody(), faults, call.params or {}, now, self._counts)
        return carry_out(call.method, context).result


def _read_certificate(path: str | None) -> ssl.SSLContext | None:
    if path is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(path)
    except OSError as error:  # it does not name the file
        raise OSError(f"certificate {path}: {error.strerror}; write a PEM file with certificate and key") from None
    return context


class _Nobody:
    """A subscriber that never gets anything: HTTP."""

    def deliver(self, frame: Any) -> None:
        """Never called: nothing is subscribed over HTTP."""


def _build_frame(first: int, payload: bytes) -> bytes:
    """A server's frame that begins with this byte (RFC 6455, section 5.2)."""
    size = len(payload)
    if size < 126:
        return bytes([first, size]) + payload
    width, mark = (2, 126) if size < 1 << 16 else (8, 127)
    return bytes([first, mark]) + size.to_bytes(width, "big") + payload


async def _read_http(request: web.Request) -> Call:
    path = request.match_info.get("method", "").strip("/")
    body = await request.read() if request.can_read_body else b""
    if len(body) > MAX_REQUEST:
        raise RpcError(-32600)
    if body.strip():
        call = read_call(body)
        return call._replace(method=path or call.method)
    query = request.query.items()
    return Call(NO_ID, path, {key: _read_query_value(value) for key, value in query if key != "faults"})


def _read_query_value(value: str) -> Any:
    try:
        read = msgspec.json.decode(value)
    except msgspec.DecodeError:
        return value
    return read if isinstance(read, int | float | bool) else value


async def _log_in(request: web.Request, exchange: Exchange, session: Session, now: int) -> None:
    kind, _, text = request.headers.get("Authorization", "").partition(" ")
    if kind.lower() == "bearer":
        session.login = exchange.authority.check_token(text.strip(), now, 0)
        return
    if kind.lower() == "basic":
        params = _read_basic(text)
    elif kind.lower() == "deri-hmac-sha256":
        params = _read_signature(text)
        params["data"] = f"{request.method}\n{request.raw_path}\n{(await request.read()).decode(errors='replace')}\n"
    else:
        return
    session.login = exchange.authority.grant(params, now, 0, 60.0)[0]


def _read_basic(text: str) -> dict[str, Any]:
    try:
        client_id, _, secret = base64.b64decode(text.strip()).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        raise RpcError(13004) from None
    return {"grant_type": "client_credentials", "client_id": client_id, "client_secret": secret}


def _read_signature(text: str) -> dict[str, Any]:
    """Read `id=ID,ts=MS,nonce=NONCE,sig=HEX`; what is signed is signed as in a login over WebSocket."""
    given = dict(part.strip().partition("=")[::2] for part in text.split(","))
    names = {"client_id": "id", "timestamp": "ts", "nonce": "nonce", "signature": "sig"}
    return {"grant_type": "client_signature", **{name: given.get(key) for name, key in names.items()}}


async def _open_response(request: web.Request) -> web.WebSocketResponse:
    """Answer the upgrade; HTTP 400 (by aiohttp's exception) to what is none."""
    response = web.WebSocketResponse(autoping=False, autoclose=False, timeout=1.0, max_msg_size=4 << 20)
    await response.prepare(request)
    if (transport := request.transport) is not None:
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return response


class _Socket:
    """Moves the bytes of one connection: a reader, and a writer that empties its outbox."""

    def __init__(
        self, request: web.Request, response: web.WebSocketResponse, exchange: Exchange, faults: Faults
    ) -> None:
        self.response = response
        self.connection = Connection(exchange, faults, self, time.time(), request.remote or "")
        self._request = request
        self._ready = asyncio.Event()
        self._closing = False

    async def serve(self) -> None:
        """Read and write until either side ends."""
        writer = asyncio.create_task(self._write())
        try:
            await self._read()
        finally:
            self.connection.end("closed by the client")
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    def wake(self) -> None:
        self._ready.set()

    def cut(self, reset: bool) -> None:
        transport = self._request.transport
        if transport is None:
            return
        if reset:
            linger = struct.pack("ii", 1, 0)
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.abort()

    async def _send_fragments(self, payload: bytes) -> None:
        """aiohttp sends whole frames only; and it alone is told when there is room again."""
        first, second = payload[: len(payload) // 2], payload[len(payload) // 2 :]
        if (transport := self._request.transport) is not None:
            transport.write(_build_frame(0x01, first) + _build_frame(0x89, b"") + _build_frame(0x80, second))
            while transport.get_write_buffer_size() > ROOM and not transport.is_closing():
                await asyncio.sleep(STEP)

    async def _read(self) -> None:
        while True:
            message = await self.response.receive()
            if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                await self._take(message.data)
            elif message.type is WSMsgType.PING and not self.connection.silent:
                await asyncio.sleep(2 * self.connection.delay)
                with contextlib.suppress(ConnectionError):
                    await self.response.pong(message.data)
            elif message.type is WSMsgType.CLOSE:
                await self._wait_in_silence()
                await self._end_in_order()
                return
            elif message.type in _FINAL:
                return

    async def _end_in_order(self) -> None:
        """Answer a close frame; the one that answers ours is the end."""
        self.connection.end("closed by the client")
        if not self._closing:
            await self.response.close()
        elif (transport := self._request.transport) is not None:
            transport.close()

    async def _close(self, code: int, reason: bytes) -> None:
        """Say that it is over. What comes until the answer is read all the same.

        Unread it would make the end a reset, which may overtake the last answers: aiohttp's own `close` does not wait
        for the client's where another task is reading.
        """
        self._closing = True
        payload = code.to_bytes(2, "big") + reason if code else b""
        await self.response.send_frame(payload, WSMsgType.CLOSE)
        asyncio.get_running_loop().call_later(CLOSE_TIMEOUT, self.cut, False)

    async def _wait_in_silence(self) -> None:
        """A half-open socket does not answer a close frame either: until it is cut, or the silence ends."""
        while self.connection.silent and self._request.transport is not None:
            await asyncio.sleep(0.02)

    async def _take(self, text: str | bytes) -> None:
        pause = self.connection.find_pause(text)
        if pause:
            await asyncio.sleep(pause)
        if delay := self.connection.delay:
            asyncio.get_running_loop().call_later(delay, lambda: self.connection.receive(text, time.time()))
        else:
            self.connection.receive(text, time.time())

    async def _write(self) -> None:
        outbox = self.connection.outbox
        with contextlib.suppress(ConnectionError):
            while True:
                await self._ready.wait()
                self._ready.clear()
                while outbox:
                    late = outbox[0].due - time.time()
                    if late > 0:
                        await asyncio.sleep(min(late, self.connection.delay))  # the clock may be set back
                    frame = outbox.popleft()
                    if frame.opcode == CLOSE:
                        return await self._close(frame.code, frame.payload)
                    if frame.opcode == TEXT and self.connection.has_begun("fragments"):
                        await self._send_fragments(frame.payload)
                    else:
                        await self.response.send_frame(frame.payload, WSMsgType(frame.opcode))
                    self.connection.waiting -= len(frame.payload)
