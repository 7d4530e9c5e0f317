"""One WebSocket to Deribit: connect, send, subscribe, unsubscribe, get_state, close - and stay connected in between.

A `Client` can be used by itself from any asyncio program:

    client = Client("wss://www.deribit.com/ws/api/v2", listener=MyListener())
    await client.connect()
    await client.subscribe(["trades.BTC-PERPETUAL.100ms"])
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from typing import Any

from collector.lifecycle import CONNECTION, FINAL_EXITS, Exit, Machine, backoff_delay
from collector.messages import list_names
from workers.deribit.connection.bootstrap import Login
from workers.deribit.connection.credits import Pool, create_pools
from workers.deribit.connection.listener import Listener
from workers.deribit.connection.reconcile import Reconciler
from workers.deribit.connection.session import Session
from workers.deribit.connection.together import do_together
from workers.deribit.connection.traffic import Traffic
from workers.deribit.rpc.errors import (
    PAUSES,
    TOO_MANY_REQUESTS,
    ExchangeError,
    Lost,
    NotConnected,
    Refused,
    find_reaction,
)

log = logging.getLogger("deribit")

LASTED = 10.0
"""Seconds live after which failed attempts are forgotten."""

UPKEEP, RECONCILING = 0.25, 1.0
"""Seconds between looks at silence and tokens, and at subscriptions: a look at these goes through all channels."""


class Client:
    """One connection, with the six connection settings; times in seconds.

    `read_pause` is rested between reads while frames come fast, one by one (see pace.py).
    `login` is used where given. `retry_count` failed attempts in a row end it: state `failed`, and `exit` says why.
    So does whatever the listener raises; each later call but get_state raises it again. `pools`: the credits of
    subscribing, and of all other calls, where they are shared with others.
    """

    exit = Exit.STOPPED
    failure = "closed"
    attempts = 0
    reconnects = 0
    last_error: Any = None
    _not_before = 0.0  # monotonic: the exchange wants no other connection until then
    _wanted_by: ExchangeError | None = None  # the answer that says so
    _life: asyncio.Task[None] | None = None
    _verdict: asyncio.Future[None] | None = None
    _is_closing = False

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str] | None = None,
        timeout: float = 5.0,
        retry_count: int = 3,
        retry_delay: float = 1.0,
        heartbeat_interval: float = 30.0,
        *,
        login: Login | None = None,
        cancel_on_disconnect: bool = False,
        read_pause: float = 0.0,
        listener: Listener | None = None,
        pools: tuple[Pool, Pool] | None = None,
    ) -> None:
        self.url = url
        self.headers = dict(headers or {})
        self.timeout = timeout
        self.retry_count, self.retry_delay = max(1, retry_count), retry_delay
        self.heartbeat_interval = heartbeat_interval
        self.listener = listener or Listener()
        subscribing, calls = pools or create_pools()
        secret = login.client_secret if login is not None else ""
        self.traffic = Traffic(self.listener, self._heed_error, timeout, read_pause, secret)
        self.session = Session(self.traffic.send, calls, login, heartbeat_interval, cancel_on_disconnect)
        self.reconciler = Reconciler(self.traffic.send, self.session, subscribing, self.listener, self.spawn)
        self.machine = Machine(CONNECTION, "closed")
        self.since = time.time_ns()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._live = asyncio.Event()

    def cut(self, reason: str) -> None:
        """Give the connection up, and connect anew."""
        self._end_by(Lost(reason))

    # -- what a program does with it ----------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Connect and return once live; from then on stay connected. Raises Lost or Refused if that fails for good."""
        if self._life is None:
            self.start().add_done_callback(log_failure)
        live, life = asyncio.create_task(self.wait_live()), self.start()
        try:
            await asyncio.wait({live, life}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            live.cancel()
        self._raise_end()

    async def send(self, method: str, params: dict[str, Any] | None = None, timeout: float | None = None) -> Any:
        """Send one request; return its result. Raises ExchangeError, TimeoutError, NotConnected or Lost."""
        self._raise_breakdown()
        if not self.is_live:  # before, the login may be still to come, and that orders die with the connection
            state = self.machine.state
            raise NotConnected(f"the connection {'has just been lost' if state == 'live' else f'is not live: {state}'}")
        return await self.traffic.send(method, params, timeout)

    async def subscribe(self, channels: str | Iterable[str]) -> dict[str, Any]:
        """Ask for one or more channels, also at each later bootstrap. Returns {name: True, or {code, message}}.

        While the connection is not live, or is lost meanwhile, the wish is kept. Raises ValueError for a name that
        cannot be a channel, and Lost or Refused once it was closed or has failed for good.
        """
        names = list_names(channels)
        self._raise_end()
        self.reconciler.subscriptions.ask(names)
        await self._settle_beside(names)
        return {name: self.reconciler.describe_wish(name) for name in names}

    async def unsubscribe(self, channels: str | Iterable[str]) -> dict[str, Any]:
        """Want these channels no more. Returns {name: True} for each. Raises Lost or Refused as subscribe does."""
        names = list_names(channels)
        self._raise_end()
        self.reconciler.subscriptions.drop(names)
        await self._settle_beside([])
        return dict.fromkeys(names, True)

    async def _settle_beside(self, channels: list[str]) -> None:
        """Settle as part of this connection, with which it ends, for as long as the caller waits.

        What waits for credits then is asked for by the upkeep, all in one call; what was sent is seen through.
        """
        if self.is_live:
            settling = self.spawn(self.reconciler.settle(channels))
            try:
                await asyncio.wait({settling})
            finally:
                settling.cancel()
            if not settling.cancelled():
                with suppress(Lost, Refused):  # what came to nothing is done by the upkeep, or the next bootstrap
                    settling.result()  # raises what the listener raises, which ends the connection too

    def get_state(self) -> dict[str, Any]:
        """The connection as it is now; times in ns since 1970, the clock's offset and its error in ns."""
        subscriptions = self.reconciler.subscriptions
        return {
            "state": self.machine.state,
            "since": self.since,
            "url": self.url,
            "attempts": self.attempts,
            "reconnects": self.reconnects,
            "authenticated": self.session.logged_in,
            "channels": {
                "asked": list(subscriptions.asked),
                "confirmed": sorted(subscriptions.confirmed),
                "refused": dict(subscriptions.refused),
            },
            "messages": self.traffic.frames,
            "bytes": self.traffic.bytes_read,
            "malformed": self.traffic.malformed,
            "clock_offset": self.session.clock_offset,
            "clock_error": self.session.clock_error,
            "last_error": self.last_error,
        }

    async def close(self) -> None:
        """Close in order: close frame, its answer awaited for CLOSE_TIMEOUT at most, then the socket.

        Who gives up waiting for it changes nothing of that.
        """
        begins = self.machine.allows("close")  # else it is closing, has ended, or has not begun
        try:
            if begins:
                self._apply("close", "asked to")
        finally:
            self._is_closing = True
            if self._life is not None:
                if begins:
                    self._life.cancel()
                await asyncio.wait({self._life})
        self._raise_breakdown()

    def _raise_end(self) -> None:
        """Raise what has ended this client, if it has ended, or is about to."""
        self._raise_breakdown()
        if self._is_closing or (self._life is not None and self._life.done()):
            raise Refused(self.failure, self.exit) if self.exit in FINAL_EXITS else Lost(self.failure)

    def _raise_breakdown(self) -> None:
        """Nobody awaits the life of a client: what broke it is told by each call that follows."""
        if self._life is not None and self._life.done() and not self._life.cancelled():
            self._life.result()

    # -- staying connected --------------------------------------------------------------------------------------------

    def start(self) -> asyncio.Task[None]:
        """Begin to live, without waiting for anything: the task ends when it is closed or has failed for good.

        `exit` and `failure` then say why. It raises what the listener raises.
        """
        if self._life is None:
            self._life = asyncio.create_task(self._live_on())
        return self._life

    async def _live_on(self) -> None:
        try:
            await self._stay_until_closed()
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            self.last_error = {"message": failure}
            self._fail("broke", Exit.CRASHED, failure)
            raise

    async def _stay_until_closed(self) -> None:
        try:
            if not self._is_closing:
                await self._stay_connected()
        except asyncio.CancelledError:
            assert self._life is not None
            if self.machine.state != "closing" or self._life.uncancel():
                raise  # somebody else wants it ended, too
            self._apply("ended", "")

    async def _stay_connected(self) -> None:
        self._apply("connect", "")
        while self.machine.state != "failed":
            try:
                await self._run_connection()
            except Lost as error:
                await self._back_off(error)
            except Refused as error:
                self._fail("refused", error.exit, str(error))

    async def _back_off(self, loss: Lost) -> None:
        reason, raw, pause = str(loss), loss.raw, self._not_before - time.monotonic()
        if pause > 0 and raw is None and self._wanted_by:  # the exchange ends what it wants a pause of
            raw, reason = self._wanted_by.told, f"{reason}, after {self._wanted_by}"
        self.last_error = raw or {"message": reason}
        pause = max(pause, loss.pause)
        self.reconnects += self.machine.state == "live"
        self._apply("lost", f"{reason}; no other attempt for {math.ceil(pause)} s" if pause > 0 else reason)
        if self.attempts >= self.retry_count:
            await asyncio.sleep(pause)  # who starts the next life knows nothing of it
            tries = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts in a row"
            return self._fail("exhausted", Exit.GAVE_UP, f"{tries} came to nothing, the last: {reason}")
        # After a good life the first attempt comes almost at once; only failures wait.
        first = self.retry_delay if self.attempts else min(self.retry_delay, 0.05)
        # What a pause is wanted of comes back spread, too.
        delay = pause + backoff_delay(max(1, self.attempts), first, random.random())
        await asyncio.sleep(delay)
        self._apply("retry", f"attempt {self.attempts + 1} of {self.retry_count}, after {delay:.2f} s")

    def _fail(self, event: str, code: Exit, failure: str) -> None:
        self.exit, self.failure = code, failure
        self._apply(event, failure)

    async def _run_connection(self) -> None:
        self.attempts += 1
        ends: list[asyncio.Future[None]] = []
        try:
            await self.traffic.open(self.url, self.headers)
            self.last_error = None  # not before: an attempt may take long, and why it is made must be told meanwhile
            self._apply("opened", "")
            self._verdict = asyncio.get_running_loop().create_future()
            ends = [self._verdict, asyncio.create_task(self.traffic.follow()), asyncio.create_task(self._serve())]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)  # gather may miss that we are cancelled
            first = next(end for end in ends if end.done())
        finally:
            failures = await self._end_connection(ends)
        for refusal in failures:
            if isinstance(refusal, Refused):  # the close that came with it was known sooner
                raise refusal
        first.result()

    async def _end_connection(self, ends: list[asyncio.Future[None]]) -> list[Any]:
        """End all that belongs to one connection, also where the owner closes amid this; return what tasks raised."""
        self._live.clear()
        socket = self.traffic.end()
        for task in (*ends, *self._tasks):
            task.cancel()
        try:
            return await asyncio.gather(*ends, *self._tasks, return_exceptions=True)
        finally:
            try:
                if socket is not None:
                    await socket.close()
            finally:
                for task in self._tasks:  # begun amid this: nothing of one connection goes on in the next
                    task.cancel()
                self.session.end()
                self.reconciler.end()

    async def _serve(self) -> None:
        await do_together(self._bootstrap(), self.reconciler.reconcile())
        self._apply("bootstrapped", "")
        self._live.set()
        # Side by side, since each may have to wait: for an answer, or for credits.
        await do_together(
            self._watch_silence(),
            repeat(self.session.keep_up, UPKEEP),
            repeat(self.reconciler.keep_up, RECONCILING),
        )

    async def _bootstrap(self) -> None:
        """Greet, log in, then what needs the login, whatever of the rest is still to be subscribed to."""
        await self.session.send_first_requests()
        await do_together(self.session.enable_cancel(), self.reconciler.reconcile())

    async def _watch_silence(self) -> None:
        live_since = heard = time.monotonic()
        frames = self.traffic.frames
        while True:
            await asyncio.sleep(UPKEEP)
            now = time.monotonic()
            if now - live_since > LASTED:
                self.attempts = 0
            if self.traffic.frames > frames:
                frames, heard = self.traffic.frames, now
            if now - heard > 1.5 * self.heartbeat_interval:
                await self._prove_life(heard)

    async def _prove_life(self, heard: float) -> None:
        """A half-open socket gives no sign at all: ask before it is cut. Raises Lost if there is no answer."""
        try:
            await self.send("public/test")
        except ExchangeError:
            pass  # an answer all the same
        except TimeoutError:
            silence = time.monotonic() - heard
            raise Lost(f"no frame for {silence:.1f} s and no answer to public/test") from None

    @property
    def is_live(self) -> bool:
        """Whether it is live, and not about to be cut."""
        return self._live.is_set()

    async def wait_live(self) -> None:
        """Wait until it is live."""
        await self._live.wait()

    def read_clock(self) -> int:
        """Now, in ns since 1970; while a burst is handed out, the time at which it was read."""
        return self.traffic.read_clock()

    def _heed_error(self, error: ExchangeError, method: str) -> None:
        """What an error asks of us, whoever sent the request: at once, since the exchange may cut right behind it."""
        self.last_error = error.told
        not_before = time.monotonic() + PAUSES.get(find_reaction(error.code), 0.0)
        if not_before > self._not_before:
            self._not_before, self._wanted_by = not_before, error
        if error.code == TOO_MANY_REQUESTS:
            pool = self.reconciler.credits if method.endswith("/subscribe") else self.session.credits
            pool.shrink(time.monotonic())

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do something beside the reading, no longer than this connection lasts."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._note_done)
        return task

    def _note_done(self, task: asyncio.Task[Any]) -> None:
        """What has failed ends the connection; but what only came to nothing is done by the upkeep."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, Lost):
            self._end_by(error)

    def _end_by(self, error: BaseException) -> None:
        if self._verdict is not None and not self._verdict.done():
            self._verdict.set_exception(error)

    def _apply(self, event: str, reason: str) -> None:
        if self._is_closing and event not in ("ended", "broke"):
            return  # whatever came in the meantime: it is being closed
        old = self.machine.state
        if (state := self.machine.apply(event)) != old:
            self.since = time.time_ns()
            self.listener.change_state(state, reason)


async def repeat(work: Callable[[float], Awaitable[None]], pause: float) -> None:
    """Do the same again and again, and tell it the (monotonic) time."""
    while True:
        await asyncio.sleep(pause)
        await work(time.monotonic())


def log_failure(life: asyncio.Task[None]) -> None:
    """Say at once what broke the life of a client: it may be long until somebody calls it again."""
    if not life.cancelled() and (error := life.exception()) is not None:
        log.error("the connection has ended by an error", exc_info=error)
