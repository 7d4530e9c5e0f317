"""A plain client for tests of the practice exchange: aiohttp and json, nothing of the collector."""

import asyncio
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp

from tests.support import Program, collector, running

TIMEOUT = 15.0
KEYS = {"grant_type": "client_credentials", "client_id": "practice", "client_secret": "practice"}
"""The parameters of a login."""


@contextmanager
def exchange(
    *options: str, own_credits: bool = True, env: dict[str, str] | None = None
) -> Iterator[tuple[str, Program]]:
    """Run the practice exchange; give its WebSocket URL and the process.

    The clients of several tests use it at once and do not know of each other, hence `own_credits`.
    """
    with running(*collector("exchange", *["--own-credits"] * own_credits, *options), env=env) as program:
        url = program.wait_line(r"^listening on (wss?://127\.0\.0\.1:\d+/ws/api/v2)$", stream="out")[1]
        yield url, program


def get(url: str, method: str, body: Any = None, **query: Any) -> tuple[int, dict[str, Any]]:
    """Ask over HTTP: GET with the query, or POST with a JSON body; the status and the decoded answer."""
    base = url.replace("ws", "http", 1).replace("/ws/api/v2", "/api/v2")
    tail = "&".join(f"{key}={value}" for key, value in query.items())
    path = f"{base}/{method}".rstrip("/") + (f"?{tail}" if tail else "")
    data = None if body is None else json.dumps(body).encode()
    return fetch(urllib.request.Request(path, data, {"Content-Type": "application/json"}))


def fetch(request: urllib.request.Request) -> tuple[int, dict[str, Any]]:
    """Make a request to this machine, through no proxy that the environment may name; the status and the answer."""
    # Whom it trusts is read anew each time, and only where it matters: that takes milliseconds.
    tls = ssl.create_default_context() if request.type == "https" else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=tls))
    try:
        with opener.open(request, timeout=TIMEOUT) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


class Client:
    """One WebSocket. Everything received is kept in `texts`, in order, until it ends (`closed`)."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.texts: list[str] = []
        self.closed: tuple[int | None, str] | None = None
        self._arrived = asyncio.Event()
        self._id = 0
        self.reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while True:
            message = await self.socket.receive()
            if message.type is aiohttp.WSMsgType.TEXT:
                self.texts.append(message.data)
            elif message.type is aiohttp.WSMsgType.BINARY:
                self.texts.append(repr(message.data))
            else:
                self.closed = (self.socket.close_code, str(message.extra or ""))
            self._arrived.set()
            if self.closed is not None:
                return

    async def wait(self, fact: Callable[[], Any], what: str, timeout: float = TIMEOUT) -> Any:
        """Return fact() as soon as it is true; it is asked again after each frame."""
        try:
            async with asyncio.timeout(timeout):
                while not (value := fact()):
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            raise AssertionError(f"waited in vain for {what}; last: {[t[:200] for t in self.texts[-3:]]}") from None
        return value

    def messages(self) -> list[dict[str, Any]]:
        """All frames so far that are JSON objects."""
        found = []
        for text in self.texts:
            try:
                found.append(json.loads(text))
            except ValueError:
                continue
        return [message for message in found if isinstance(message, dict)]

    def data(self, channel: str) -> list[Any]:
        """The data of all notifications of a channel so far."""
        found = [m["params"] for m in self.messages() if m.get("method") == "subscription" and m.get("params")]
        return [params["data"] for params in found if params["channel"] == channel]

    async def wait_data(self, channel: str, count: int = 1) -> list[Any]:
        """Wait until a channel has sent so many frames; return them all."""
        found: list[Any] = await self.wait(
            lambda: d if len(d := self.data(channel)) >= count else None, f"{count} of {channel}"
        )
        return found

    async def send(self, text: str) -> None:
        await self.socket.send_str(text)

    async def ask(self, method: str, params: Any = None, **named: Any) -> dict[str, Any]:
        """Send a request, return the whole answer."""
        self._id += 1
        number = self._id
        given = named if params is None else params
        await self.send(json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": given}))
        answer: dict[str, Any] = await self.wait(
            lambda: next((m for m in self.messages() if m.get("id") == number), None), f"the answer to {method}"
        )
        return answer

    async def subscribe(self, *channels: str, way: str = "public") -> None:
        """Subscribe to channels that the exchange has, publicly or by the `private` method."""
        answer = await self.ask(f"{way}/subscribe", channels=list(channels))
        assert sorted(answer["result"]) == sorted(channels)

    async def log_in(self) -> dict[str, Any]:
        result: dict[str, Any] = (await self.ask("public/auth", KEYS))["result"]
        return result


class Line:
    """Where a connection without a socket would send; `is_cut` once it has been cut."""

    is_cut = False

    def wake(self) -> None: ...

    def cut(self, reset: bool) -> None:
        self.is_cut = True


@asynccontextmanager
async def connect(url: str, faults: str | None = None, **options: Any) -> AsyncIterator[Client]:
    """Open a WebSocket for the length of a block."""
    target = url if faults is None else f"{url}?faults={faults}"
    async with (
        aiohttp.ClientSession() as session,
        # Not aiohttp's own context: that is made once, before SSL_CERT_FILE may be set.
        session.ws_connect(target, max_msg_size=1 << 26, ssl=ssl.create_default_context(), **options) as socket,
    ):
        client = Client(socket)
        try:
            yield client
        finally:
            client.reader.cancel()
            await asyncio.gather(client.reader, return_exceptions=True)


def apply_book(levels: dict[str, dict[float, float]], data: dict[str, Any]) -> None:
    """Put one frame of a full book into {"bids": {price: amount}, "asks": ...}."""
    if data["type"] == "snapshot":
        levels["bids"], levels["asks"] = {}, {}
    for side in ("bids", "asks"):
        for action, price, amount in data[side]:
            if action == "delete" or not amount:
                levels[side].pop(float(price), None)
            else:
                levels[side][float(price)] = float(amount)
