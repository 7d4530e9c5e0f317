"""What the tests of the connection to Deribit share: a client or a worker in the test's own loop, on real sockets.

Each test names the faults that the practice exchange is to have for its connections; nothing else differs from a run.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from collector.lifecycle import Exit
from tests.pipeline import Subscriber, short_directory
from tests.support import PATIENCE
from workers.deribit import Client, Listener, Login
from workers.deribit.healing.fetch import Ask, Healing, Page
from workers.deribit.worker import Worker, create_worker

BOOK, TRADES = "book.BTC-PERPETUAL.100ms", "trades.BTC-PERPETUAL.100ms"
TICKER, QUOTE = "ticker.BTC-PERPETUAL.100ms", "quote.BTC-PERPETUAL"
LOGIN = Login("practice", "practice")

QUICK: dict[str, Any] = {"retry_count": 100, "retry_delay": 0.02}
"""Settings of a connection that is soon back."""

_seeds = count(1)


def name_faults(url: str, faults: str) -> str:
    """The URL with these faults, told apart from those of every other test: `first` and `skip` count by their text."""
    return f"{url}?faults=seed:{next(_seeds)},{faults}" if faults else url


async def wait_for(fact: Callable[[], Any], what: str, timeout: float = PATIENCE) -> Any:
    """Return fact() as soon as it is true; fail with `what` if it does not become true."""
    end = time.monotonic() + timeout
    while not (value := fact()):
        assert time.monotonic() < end, f"waited {timeout:.0f} s in vain for {what}"
        await asyncio.sleep(0.005)
    return value


class Ear(Listener):
    """Keeps all that a client tells."""

    def __init__(self) -> None:
        self.states: list[tuple[str, str]] = []
        self.frames: list[bytes] = []
        self.malformed: list[tuple[bytes, str]] = []
        self.confirmed: list[str] = []
        self.refused: dict[str, str] = {}

    def take_frame(self, frame: bytes, receive_ts: int) -> None:
        self.frames.append(frame)

    def take_malformed(self, frame: bytes, reason: str) -> None:
        self.malformed.append((frame, reason))

    def change_state(self, state: str, reason: str) -> None:
        self.states.append((state, reason))

    def confirm_channels(self, names: list[str]) -> None:
        self.confirmed += names

    def refuse_channels(self, names: list[str], reason: str) -> None:
        self.refused |= dict.fromkeys(names, reason)

    def find(self, state: str) -> list[str]:
        """The reasons with which this state was entered, in order."""
        return [reason for entered, reason in self.states if entered == state]

    def count_frames(self, channel: str) -> int:
        """How many data frames of a channel have come."""
        return sum(f'"channel":"{channel}"'.encode() in frame for frame in self.frames)

    async def wait_frames(self, channels: Iterable[str], more: int = 2) -> None:
        """Wait until each of the channels has sent some more frames."""
        wanted = {channel: self.count_frames(channel) + more for channel in channels}
        await wait_for(lambda: all(self.count_frames(c) >= n for c, n in wanted.items()), f"frames of {wanted}")


@asynccontextmanager
async def connected(
    url: str, faults: str = "", *, live: bool = True, channels: Iterable[str] = (), **settings: Any
) -> AsyncIterator[tuple[Client, Ear]]:
    """A client for the length of a block; `live` waits until it is."""
    ear = Ear()
    client = Client(name_faults(url, faults), listener=ear, **{**QUICK, **settings})
    client.reconciler.subscriptions.ask(list(channels))
    connecting = asyncio.create_task(client.connect())
    try:
        if live:
            await connecting
        yield client, ear
    finally:
        await client.close()
        await asyncio.gather(connecting, return_exceptions=True)


Script = Callable[[dict[str, Any], int], dict[str, Any] | None]
"""What a server answers to params, the n-th (1, 2 ...) of their method: members of the answer, None for the usual.

With `close`, the words of a close frame, it closes in the same breath.
"""


@asynccontextmanager
async def scripted(stem: str, script: Script) -> AsyncIterator[str]:
    """A server in the test's own loop, for answers that the practice exchange does not give; yields its URL.

    The methods that begin with `stem` are answered by the script, others as on good days.
    """
    seen: Counter[str] = Counter()

    async def serve(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(timeout=1.0)
        await socket.prepare(request)
        async for message in socket:
            asked = json.loads(message.data)
            method, params = asked["method"], asked["params"]
            seen[method] += 1
            answer = script(params, seen[method]) if method.startswith(stem) else None
            answer = answer or {"result": make_result(method, params)}
            words = answer.pop("close", None)
            await socket.send_json({"jsonrpc": "2.0", "id": asked["id"], **answer})
            if words is not None:
                await socket.close(message=words)
        return socket

    application = web.Application()
    application.router.add_get("/", serve)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"ws://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


def make_result(method: str, params: dict[str, Any]) -> Any:
    """What an exchange answers on good days, of a bootstrap."""
    results: dict[str, Any] = {
        "public/auth": {"access_token": "a", "refresh_token": "r", "expires_in": 900},
        "public/get_time": time.time_ns() // 1_000_000,
    }
    return params.get("channels") or results.get(method, "ok")


def encode_data(channel: str, data: Any) -> bytes:
    """A frame as the exchange sends it."""
    params = {"channel": channel, "data": data}
    return msgspec.json.encode({"jsonrpc": "2.0", "method": "subscription", "params": params})


def make_trade(seq: int, **more: Any) -> dict[str, Any]:
    """A trade as a frame of the exchange has it."""
    trade = {"instrument_name": "BTC-PERPETUAL", "trade_seq": seq, "trade_id": str(seq), "price": 1.5, "amount": 1.0}
    return {**trade, "direction": "buy", **more}


def run_healing(healing: Healing, answer: Callable[[Ask], Page | None]) -> list[Ask]:
    """Answer all that it asks; return that."""
    asked: list[Ask] = []
    page = None
    with suppress(StopIteration):
        while True:
            step = healing.send(page)
            page = answer(step) if isinstance(step, Ask) else None
            asked += [step] if isinstance(step, Ask) else []
    return asked


def answer_nothing(_: Ask) -> Page:
    """The exchange knows of no trade that is asked for."""
    return Page([], False)


class Hearer(Subscriber):
    """A subscriber in the same loop as the worker: it takes what is there and never waits; what it hears is verified.

    `heard` holds all of it in order, `messages` what is numbered, `joins` the answers to late subscribers.
    """

    def __init__(self, *endpoints: str, prefixes: Iterable[str] = ("",)) -> None:
        super().__init__()
        self._socket.unsubscribe(b"")
        for prefix in prefixes:
            self._socket.subscribe(prefix.encode())
        for endpoint in endpoints:
            self._socket.connect(endpoint)
        self.heard: list[tuple[str, dict[str, Any]]] = []
        self.joins: list[tuple[str, dict[str, Any]]] = []

    def drain(self) -> None:
        """Take all that has arrived."""
        while self._socket.poll(0):
            message = self._receive()
            self.heard.append(message)
            (self.joins if message[1].get("join") else self.messages).append(message)

    async def hear(self, fact: Callable[[], Any], what: str, timeout: float = PATIENCE) -> Any:
        """Receive until fact() is true, and return it."""

        def look() -> Any:
            self.drain()
            return fact()

        return await wait_for(look, what, timeout)

    async def hear_of(
        self, prefix: str, least: int = 1, timeout: float = PATIENCE, **keys: Any
    ) -> list[dict[str, Any]]:
        """Receive until so many such messages are there; return all of them."""
        found: list[dict[str, Any]] = await self.hear(
            lambda: f if len(f := self.find(prefix, **keys)) >= least else None,
            f"{least} of {prefix} with {keys}", timeout,
        )  # fmt: skip
        return found


class Collecting:
    """One worker at work, and a subscriber that hears all of it from the first message on."""

    def __init__(self, worker: Worker, hearer: Hearer) -> None:
        self.worker = worker
        self.hearer = hearer

    async def ask(self, op: str, timeout: float = 10.0, **arguments: Any) -> Any:
        """What the supervisor would ask of it."""
        return await asyncio.wait_for(self.worker.answer(op, {"epoch": time.time_ns(), **arguments}), timeout)

    async def get_state(self) -> dict[str, Any]:
        """The worker's part of the state map."""
        state: dict[str, Any] = await self.ask("get_state")
        return state


def make_spec(url: str, directory: str, channels: Iterable[str], **settings: Any) -> dict[str, Any]:
    """The spec of a worker named `w`; `login` puts the practice exchange's key in."""
    login = settings.pop("login", None)
    more: dict[str, Any] = {key: settings.pop(key) for key in ("epoch", "fresh", "follow") if key in settings}
    connection = {
        "url": url, "headers": {}, "timeout": 5.0, "heartbeat_interval": 30.0, "publish": f"ipc://{directory}/w.pub",
        "queue": 100_000, "cancel_on_disconnect": False, **QUICK, **settings,
    }  # fmt: skip
    return {
        "name": "w", "kind": "deribit", "epoch": time.time_ns(), "fresh": True, "runtime_dir": directory,
        "channels": list(channels), "connection": connection, "credentials": login and login._asdict(),
        "scheduling": "normal", "read_pause": 0.0, "log_level": "debug", **more,
    }  # fmt: skip


@contextmanager
def living(directory: Path, *channels: str, fresh: bool = False, **spec: Any) -> Iterator[Worker]:
    """One more life of a worker, that is not connected."""
    worker = create_worker(make_spec("ws://127.0.0.1:9/ws/api/v2", str(directory), channels, fresh=fresh) | spec)
    try:
        yield worker
    finally:
        worker.publisher.close()
        worker.ledger.close()


@asynccontextmanager
async def collecting(
    url: str, faults: str = "", *channels: str, breaks: str = "", **settings: Any
) -> AsyncIterator[Collecting]:
    """Run a worker for the length of a block, at a `place` of its own; the subscriber is there before it connects, and
    hears no rule broken.

    But for one that what the exchange sends `breaks`, and for the rhythm of heartbeats on a busy machine.
    """
    with nullcontext(settings.pop("place")) if "place" in settings else short_directory() as directory:
        worker = create_worker(make_spec(name_faults(url, faults), str(directory), channels, **settings))
        endpoint = (await worker.start())["publish"]
        hearer = Hearer(endpoint)
        await wait_for(lambda: worker.publisher.subscriptions, "the subscription")
        running = asyncio.create_task(worker.run())
        try:
            yield Collecting(worker, hearer)
        finally:
            worker.stop()
            code = await asyncio.wait_for(running, 8)
            hearer.drain()
            hearer.close()
        hearer.check(breaks)
        assert code in (Exit.STOPPED, worker.client.exit)
