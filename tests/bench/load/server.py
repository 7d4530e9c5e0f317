"""The load server: speaks as much of Deribit's protocol as a collector's bootstrap needs, then plays a tape.

One process, one thread, blocking writes: it must be faster than any client. It is steered through a pipe with
(verb, arguments) and reports back with (event, facts); all times are monotonic ns.
"""

import base64
import hashlib
import json
import re
import selectors
import socket
import ssl
import time
from multiprocessing.connection import Connection
from typing import Any

from tests.bench.load.tape import DEEP_CHANNEL, MARK, Tape, frame_deep_snapshot, frame_text, last_payload
from tests.bench.place import pin, set_timer_slack

CHUNK = 512
"""Frames in one write at full speed: some 200 KB."""

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def send_time() -> int:
    """Now, as the mark of a frame (the time since `MARK`'s origin fits for 92 days of uptime)."""
    return MARK + time.monotonic_ns()


class Client:
    """One accepted socket: an HTTP request at first, a WebSocket after its upgrade."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.buffer = bytearray()
        self.upgraded = False
        self.channels: set[str] = set()

    def receive(self) -> bool:
        """Read what is there; False when the other side is gone."""
        try:
            data = self.socket.recv(1 << 20)
            while data and isinstance(self.socket, ssl.SSLSocket) and self.socket.pending():
                data += self.socket.recv(1 << 20)  # no selector sees what has been decrypted already
        except (ConnectionError, ssl.SSLError):
            data = b""
        self.buffer += data
        return bool(data)

    def take_http(self) -> bytes | None:
        """Return the head of one HTTP request if it is complete."""
        head, end, rest = bytes(self.buffer).partition(b"\r\n\r\n")
        if not end:
            return None
        self.buffer[:] = rest
        return head

    def take_frame(self) -> tuple[int, bytes] | None:
        """Return opcode and payload of one WebSocket frame if it is complete (a client's frames are masked)."""
        data = self.buffer
        if len(data) < 2:
            return None
        opcode, length, at = data[0] & 15, data[1] & 127, 2
        if length > 125:
            size = 2 if length == 126 else 8
            length, at = int.from_bytes(data[2 : 2 + size], "big"), 2 + size
        if len(data) < at + 4 + length:
            return None
        key = bytes(data[at : at + 4]) * (length // 4 + 1)
        masked = data[at + 4 : at + 4 + length]
        del data[: at + 4 + length]
        plain = int.from_bytes(masked, "big") ^ int.from_bytes(key[:length], "big")
        return opcode, plain.to_bytes(length, "big")


class Server:
    """The listener, its clients and the tape."""

    def __init__(self, tape: Tape, pipe: Connection, tls: ssl.SSLContext | None) -> None:
        self.tape = tape
        self.tls = tls
        self.deep = frame_deep_snapshot(time.time_ns() // 1_000_000)
        self.pipe = pipe
        self.clients: dict[int, Client] = {}
        self.running = True
        self.selector = selectors.DefaultSelector()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(pipe, selectors.EVENT_READ)

    def run(self) -> None:
        """Serve until told to stop."""
        self.report("listening", port=self.listener.getsockname()[1], channels=self.tape.channels)
        while self.running:
            self.serve(None)

    def report(self, event: str, **facts: Any) -> None:
        """Tell the one who steers."""
        self.pipe.send((event, {"time": time.monotonic_ns(), **facts}))

    def serve(self, timeout: float | None, steered: bool = True) -> None:
        """Do what the sockets, and the pipe unless a load is under way, ask for."""
        for key, _ in self.selector.select(timeout):
            if key.fileobj is self.listener:
                self.accept()
            elif key.fileobj is self.pipe:
                if steered:
                    self.obey(*self.pipe.recv())
            else:
                client = self.clients[key.fd]
                try:
                    self.read(client)
                except ConnectionError:  # gone before it had its answer
                    self.drop(client)

    def obey(self, verb: str, arguments: dict[str, Any]) -> None:
        """Carry out one order of the one who steers."""
        match verb:
            case "full":
                self.play(self.play_full, **arguments)
            case "paced":
                self.play(self.play_paced, **arguments)
            case _:
                self.running = False

    def accept(self) -> None:
        """Take a new client."""
        sock, _ = self.listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.tls is not None:
            sock = self.tls.wrap_socket(sock, server_side=True)
        self.clients[sock.fileno()] = Client(sock)
        self.selector.register(sock, selectors.EVENT_READ)

    def drop(self, client: Client) -> None:
        """Forget a client and cut it."""
        self.selector.unregister(client.socket)
        del self.clients[client.socket.fileno()]
        client.socket.close()

    def read(self, client: Client) -> None:
        """Answer what one client sent."""
        if not client.receive():
            return self.drop(client)
        if not client.upgraded:
            head = client.take_http()
            return None if head is None else self.answer_http(client, head)
        while (frame := client.take_frame()) is not None:
            opcode, payload = frame
            if opcode == 1:
                self.answer(client, json.loads(payload))
            elif opcode == 9:
                client.socket.sendall(bytes([0x8A, len(payload)]) + payload)
            elif opcode == 8:
                client.socket.sendall(bytes([0x88, len(payload)]) + payload)
                return self.drop(client)
        return None

    def answer_http(self, client: Client, head: bytes) -> None:
        """Upgrade to a WebSocket, or answer a REST request."""
        key = re.search(rb"(?im)^sec-websocket-key: *(\S+)", head)
        if key:
            accept = base64.b64encode(hashlib.sha1(key[1] + _GUID).digest())
            client.socket.sendall(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
            )
            client.upgraded = True
            return
        method = head.split(b" ", 2)[1].partition(b"?")[0].removeprefix(b"/api/v2/").decode()
        body = json.dumps({"jsonrpc": "2.0", "result": self.call(client, method, {})}).encode()
        client.socket.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
        client.socket.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)

    def answer(self, client: Client, request: dict[str, Any]) -> None:
        """Answer one JSON-RPC request; new books begin with their snapshots."""
        before = set(client.channels)
        result = self.call(client, request["method"], request.get("params", {}))
        now = time.time_ns() // 1000
        reply = {"jsonrpc": "2.0", "id": request.get("id"), "result": result}
        reply |= {"usIn": now, "usOut": now, "usDiff": 1, "testnet": False}
        out = [frame_text(json.dumps(reply, separators=(",", ":")))]
        for channel in sorted(client.channels - before):
            if channel == DEEP_CHANNEL:
                out.append(self.deep)
            elif channel.startswith("book."):
                out.append(self.tape.take_snapshot(channel.split(".")[1], now // 1000))
        client.socket.sendall(b"".join(out))
        if client.channels != before:
            self.report("subscribed", count=len(client.channels))

    def call(self, client: Client, method: str, params: dict[str, Any]) -> Any:
        """The result of one method."""
        match method.split("/")[-1]:
            case "subscribe":
                client.channels |= set(params["channels"])
                return sorted(params["channels"], reverse=True)
            case "unsubscribe":
                client.channels -= set(params["channels"])
                return sorted(params["channels"], reverse=True)
            case "hello" | "test":
                return {"version": "1.2.26"}
            case "get_time":
                return time.time_ns() // 1_000_000
            case "get_instruments":
                return []
            case name if name.startswith("get_last_trades"):
                return {"trades": [], "has_more": False}
        return "ok"

    def play(self, play: Any, **arguments: Any) -> None:
        """Play a part of the tape to the client that subscribed, then the frame that ends it."""
        client = [client for client in self.clients.values() if client.channels][-1]
        start = time.monotonic_ns()
        try:
            count = play(client.socket, **arguments)
            client.socket.sendall(frame_text(last_payload(time.time_ns() // 1_000_000)))
            self.report("sent", count=count, start=start, end=time.monotonic_ns())
        except ConnectionError as error:
            self.report("broken", reason=f"the measured program cut the connection: {error}")

    def play_full(self, sock: socket.socket, count: int) -> int:
        """Send `count` frames (once round the tape at most) as fast as the other side takes them."""
        sent = 0
        while sent < count:
            data, taken = self.tape.take(min(CHUNK, count - sent), time.time_ns() // 1_000_000, ahead=sent)
            sock.sendall(data)
            sent += taken
            self.serve(0, steered=False)
        self.tape.advance(count)
        return sent

    def play_paced(self, sock: socket.socket, rate: int, burst: int, seconds: float) -> int:
        """Send `burst` frames in one write, `rate / burst` times a second, each with the time of its sending."""
        interval, sent = burst * 1e9 / rate, 0
        start = time.monotonic_ns()
        served = start
        while (due := start + sent // burst * interval) < start + seconds * 1e9:
            now = time.monotonic_ns()
            if now < due:
                time.sleep((due - now) / 1e9)
            data, taken = self.tape.take(burst, time.time_ns() // 1_000_000, send_time())
            sock.sendall(data)
            self.tape.advance(taken)
            sent += taken
            if now - served > 20_000_000:
                served = now
                self.serve(0, steered=False)
        return sent


def serve(pipe: Connection, cpu: int | None, tape: tuple[int, int, dict[str, int]], certificate: str = "") -> None:
    """Entry of the process: build the tape, then serve; over TLS with a certificate."""
    pin(cpu)
    set_timer_slack(1)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if certificate else None
    if tls is not None:
        tls.load_cert_chain(certificate)
    Server(Tape(*tape), pipe, tls).run()
