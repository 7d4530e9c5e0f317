"""The worker process of one Deribit connection: client, feeds and publisher put together."""

import asyncio
import logging
import os
import time
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from collector.lifecycle import Exit
from collector.messages import ControlError
from workers.deribit.channels import Channels
from workers.deribit.connection.bootstrap import Login
from workers.deribit.connection.client import Client
from workers.deribit.connection.credits import share_pools
from workers.deribit.connection.listener import Listener
from workers.deribit.connection.session import NEVER
from workers.deribit.connection.subscriptions import EXPIRED
from workers.deribit.feeds.feed import Feed
from workers.deribit.feeds.listings import ListingFeed
from workers.deribit.feeds.trades.feed import TradeFeed
from workers.deribit.healing.heal import Healer
from workers.deribit.publishing.joins import Joins
from workers.deribit.publishing.ledger import Ledger
from workers.deribit.publishing.payloads import Book
from workers.deribit.publishing.publisher import Publisher
from workers.deribit.publishing.streams import Published, Topics
from workers.deribit.rpc.codec import DATA_PREFIX, Data, decode_frame
from workers.deribit.rpc.errors import ExchangeError, Lost, NotConnected
from workers.deribit.watching.patrol import Patrol
from workers.deribit.watching.samples import Samples
from workers.deribit.watching.statuses import OVER, STOPPED, UNSUBSCRIBED, Statuses

log = logging.getLogger("deribit")

START = len(DATA_PREFIX)

LAST_WORDS = 2.0
"""Seconds from the end of an instrument to the last frames of its channels: the slowest (agg2) speak once a second."""

LAST_HEALING = 10.0
"""Seconds that trades of an instrument that has ended may still be healed once the supervisor gives its channel up."""

WINDING_UP = 2.0
"""Seconds that what was cancelled may take at the end: a socket waits one for the exchange's close frame."""

FIRST_VALUES = 1.0
"""Seconds in which what a channel says first may come, once the exchange has confirmed it; what is no older counts."""

SAMPLE_EVERY = 20_000_000
"""Time between samples of latency and lag, in ns."""


FIRST_PART, GROWTH = 32, 3
"""Frames of a burst that are sent first, and how many times as many each later part has (measured; see cut_burst)."""


def create_worker(spec: dict[str, Any]) -> "Worker":
    """The worker that a spec describes (see workers.actor)."""
    if spec["scheduling"] == "batch":
        schedule_in_batch()
    return Worker(spec)


def schedule_in_batch() -> None:
    """Never interrupt other programs when there is something to do: throughput for latency (threads inherit this).

    Any user may do it; only Linux can.
    """
    with suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def create_client(spec: dict[str, Any], listener: Listener) -> Client:
    """The WebSocket that a spec describes."""
    settings, login = spec["connection"], spec.get("credentials")
    return Client(
        settings["url"], settings["headers"], settings["timeout"], settings["retry_count"],
        settings["retry_delay"], settings["heartbeat_interval"],
        login=Login(login["client_id"], login["client_secret"]) if login else None,
        cancel_on_disconnect=settings["cancel_on_disconnect"], read_pause=spec["read_pause"], listener=listener,
        pools=share_pools(pool) if (pool := spec.get("pool")) else None,
    )  # fmt: skip


def cut_burst(frames: list[bytes]) -> list[list[bytes]]:
    """The frames of one read in parts that are sent one after the other, each longer than the one before.

    The first of a burst need not wait for the last; where more has come than can be kept up with, sends are few.
    """
    parts, length = [], FIRST_PART
    while len(frames) > length:
        parts.append(frames[:length])
        frames = frames[length:]
        length *= GROWTH
    parts.append(frames)
    return parts


class Worker(Listener):
    """One connection of the configuration."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.name: str = spec["name"]
        self.epoch: int = spec["epoch"]
        self.news = asyncio.Event()
        self.ledger_path = Path(spec["runtime_dir"]) / f"{self.name}.ledger"
        self.ledger = Ledger(self.ledger_path, fresh=spec["fresh"])
        self.topics = Topics(self.epoch, self.ledger)
        self.malformed = 0
        self.unknown = 0
        self.latency = Samples()
        self._sampled = 0
        self._first_until = 0.0  # monotonic
        self._newest: Published = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._has_ended = False
        self.publisher = Publisher(spec["connection"]["publish"], spec["connection"]["queue"], self.ledger)
        self.joins = Joins(self.publisher, self.topics)
        self.client = create_client(spec, self)
        self.healer = Healer(self.client, self.publisher)
        clocks = self.client.read_clock, self.client.session.read_exchange_clock
        self.statuses = Statuses(self.publisher, self.topics, self.name, *clocks)
        self.channels = Channels(self.client.reconciler.subscriptions, self.topics, self.statuses, self.healer)
        self.feeds = self.channels.feeds
        self.patrol = Patrol(self.name, self.feeds, self.client, self.publisher, self.statuses, self.topics)
        self._is_following = bool(spec.get("follow"))
        self.channels.add(spec["channels"])
        if self._is_following:
            self.channels.follow_listings()
        self.channels.take_over()

    # -- the life of a worker (see workers.actor) ---------------------------------------------------------------------

    async def start(self) -> dict[str, Any]:
        """Bind the publisher. Raises OSError if its endpoint is taken."""
        endpoint = self.publisher.bind()
        self.joins.watch()
        return {"publish": endpoint}

    async def run(self) -> Exit:
        """Collect until stopped or failed for good."""
        life = self.client.start()
        others = [asyncio.create_task(self.patrol.run()), asyncio.create_task(self.healer.run())]
        try:
            done, _ = await asyncio.wait((life, *others), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            tasks = life, *others, *self._tasks
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=WINDING_UP)
            await self._end()
        return self.client.exit

    async def _end(self) -> None:
        """Close all: from now on nothing is said, for the publisher is closed by a thread of its own."""
        self._has_ended = True
        self.joins.end()
        self.healer.close()
        try:
            await asyncio.to_thread(self.publisher.close)
        except RuntimeError:  # the system allows no further thread
            self.publisher.close()
        self.ledger.close()

    def stop(self) -> None:
        """End in order: close frame, then what is still queued for subscribers."""
        self._spawn(self.client.close())

    def report(self) -> dict[str, Any]:
        """What each beat tells the supervisor."""
        return {
            "state": self.client.machine.state,
            "messages": self.publisher.published,
            "bytes": self.client.bytes_read,
            "rate": self.patrol.rate,
            "last_message_ts": self.patrol.last_ts,
            "reconnects": self.client.reconnects,
            "attempts": self.client.attempts,
            "last_error": self.client.last_error,
        }

    def take_events(self) -> list[dict[str, Any]]:
        """What happened at the exchange since the last beat that the supervisor must know."""
        events = self.channels.take_events()
        return events if self._is_following else []

    async def answer(self, op: str, arguments: dict[str, Any]) -> Any:
        """Carry out one command. Raises ControlError."""
        commands = {
            "subscribe": self._subscribe, "unsubscribe": self._unsubscribe,
            "send": self._send, "get_state": self._get_state,
        }  # fmt: skip
        if op not in commands:
            raise ControlError("unknown_op", f"a connection has no op {op!r}")
        if self._has_ended and op != "get_state":
            raise ControlError("not_connected", "the connection has ended")
        try:
            return await commands[op](arguments)
        except ExchangeError as error:
            raise ControlError("exchange_error", str(error), error.raw) from None
        except NotConnected as error:
            raise ControlError("not_connected", str(error)) from None
        except Lost as error:
            raise ControlError("not_connected", f"{error}; whether it was carried out is not known") from None
        except ValueError as error:
            raise ControlError("bad_request", str(error)) from None

    async def _subscribe(self, arguments: dict[str, Any]) -> dict[str, Any]:
        names = arguments["channels"]
        with self.publisher.gather():
            self.channels.take_up(names, arguments["epoch"])
        return {"channels": await self.client.subscribe(names)}

    async def _unsubscribe(self, arguments: dict[str, Any]) -> dict[str, Any]:
        names = arguments["channels"]
        condition = OVER if arguments.get("reason") == "expired" else UNSUBSCRIBED
        if condition is OVER:
            self.channels.add(names)  # an earlier life may have had them: then it is said all the same
        try:
            left = await self.client.unsubscribe(names)
            if condition is OVER:
                await self._heal_last(names)
            return {"channels": left}
        finally:
            if not self._has_ended:  # else a later life says it, if this one has not
                with self.publisher.gather():
                    self.channels.leave(names, *condition)

    async def _heal_last(self, names: list[str]) -> None:
        """The last trades of instruments that have ended may have been lost: fetch them, if that can be soon."""
        feeds = [feed for name in names if isinstance(feed := self.feeds.get(name.encode()), TradeFeed)]
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_HEALING):
                await self.healer.finish(feeds)

    async def _send(self, arguments: dict[str, Any]) -> Any:
        # The deadline of the command bounds it, not the connection's own timeout.
        return await self.client.send(arguments["method"], arguments.get("params"), timeout=3600)

    async def _get_state(self, arguments: dict[str, Any]) -> dict[str, Any]:
        feeds = self.feeds.values()
        return (
            self.client.get_state()
            | self.report()
            | {
                "epoch": self.epoch,
                "publish": self.publisher.endpoint,
                "lag": self.patrol.lag.describe(),
                "latency": self.latency.describe(),
                "gaps": self.topics.gaps,
                "resyncs": self.patrol.resyncs,
                "duplicates": sum(feed.duplicates for feed in feeds),
                "repaired": self.healer.repaired,
                "missing": self.healer.missing,
                "healing": sum(feed.count_healing() for feed in feeds if isinstance(feed, TradeFeed)),
                "dropped": sum(feed.dropped for feed in feeds),
                "crossed": sum(feed.crossed for feed in feeds),
                "emptied": sum(feed.emptied for feed in feeds),
                "malformed": self.malformed,
                "unknown": self.unknown,
            }
        )

    # -- what the client tells (see connection.listener) --------------------------------------------------------------

    def take_frames(self, frames: list[bytes], receive_ts: int) -> None:
        """Take the frames of one read, and a sample of what they say of latency and lag: no more often than needed."""
        for part in cut_burst(frames):
            self._take_part(part, receive_ts)
        if abs(receive_ts - self._sampled) > SAMPLE_EVERY:  # the clock may have been set back
            self._sample(receive_ts)

    def _take_part(self, frames: list[bytes], receive_ts: int) -> None:
        """The path of each message: find the feed by the channel in the bytes, normalise, publish."""
        find_feed, publish = self.feeds.get, self.publisher.publish
        self.publisher.is_gathering = True
        newest: Published = []
        for frame in frames:
            feed = find_feed(frame[START : frame.find(b'"', START)]) or self._find_feed(frame)
            if feed is None:
                continue
            try:
                published = feed.take(frame, receive_ts)
            except ValueError as error:
                self.take_malformed(frame, f"{feed.channel.name}: {error}")
                feed.skip(frame, receive_ts)
            else:
                if published:
                    publish(published, receive_ts)
                    newest, feed.last_ts = published, receive_ts
            if feed.changed:
                self._attend(feed)
        self.publisher.flush()
        if newest:
            self._newest, self.patrol.last_ts = newest, receive_ts

    def _find_feed(self, frame: bytes) -> Feed | None:
        """The feed of a frame with its keys in another order, or its channel in other letters.

        None, counted, for a channel that nobody asked for.
        """
        try:
            found = decode_frame(frame)
        except ValueError as error:
            self.take_malformed(frame, str(error))
            return None
        feed = self.channels.find_feed(found.channel) if isinstance(found, Data) else None
        if feed is None:
            self.unknown += 1
            log.debug("data of a channel that was not asked for: %.200r", frame)
        return feed

    def take_malformed(self, frame: bytes, reason: str) -> None:
        """Count and log a frame that is not what it should be; the log is kept short when many come."""
        self.malformed += 1
        if self.malformed <= 10 or self.malformed % 1000 == 0:
            log.warning("malformed frame %d: %.300s: %.120r", self.malformed, reason, frame)

    def _sample(self, receive_ts: int) -> None:
        self._sampled = receive_ts
        self.latency.add(time.time_ns() - receive_ts)
        if self._newest:
            message = self._newest[-1][1]
            exchange_ts = message["exchange_ts"] if isinstance(message, dict) else message.exchange_ts
            lag = receive_ts + self.client.session.clock_offset - exchange_ts
            # What was asked for bears the time of its last change, which may be any.
            is_old = lag > FIRST_VALUES * 1e9 and time.monotonic() < self._first_until
            is_old |= isinstance(message, Book) and message.reason in ("subscribe", "resync")
            if exchange_ts and not is_old:
                self.patrol.take_lag(lag)
            self._newest = []

    def change_state(self, state: str, reason: str) -> None:
        """Say it on the connection's status topic; a lost connection is a loss on every topic."""
        said = f"{state}: {reason}" if reason else state
        log.log(logging.WARNING if state in ("backoff", "failed") else logging.INFO, "%s", said)
        with self.publisher.gather():
            if state in ("backoff", "failed"):
                self._lose_all()
            elif state == "bootstrapping":
                self._first_until = NEVER
            elif state == "live":
                self.patrol.begin()
                self.healer.resume()
            elif state == "closed":
                for feed in self.feeds.values():
                    if feed.condition[0] != "expired":
                        self.channels.say_last(feed, *STOPPED)
            self.statuses.tell_connection(state, reason)
        self.news.set()

    def _lose_all(self) -> None:
        for feed in self.feeds.values():
            feed.lose("disconnect", self.client.read_clock())
            if feed.condition[0] != "expired":
                self.statuses.tell(feed, "recovering", "disconnect")
        self.patrol.lose()

    def confirm_channels(self, names: list[str]) -> None:
        """A channel with no state of its own to build up is live once the exchange sends it."""
        with self.publisher.gather():
            for name in names:
                if (feed := self.feeds.get(name.encode())) is not None:
                    self._confirm(feed)

    def _confirm(self, feed: Feed) -> None:
        self._first_until = time.monotonic() + FIRST_VALUES
        feed.rhythm.restart(time.time_ns())
        if feed.is_complete:
            self.statuses.tell(feed, "live", "")
        if isinstance(feed, ListingFeed):
            self.channels.events.append({"event": "listening"})
        if isinstance(feed, TradeFeed):
            feed.confirm(time.time_ns())
            self.healer.heal(feed)

    def refuse_channels(self, names: list[str], reason: str) -> None:
        """Say on the topic of each that it will not come."""
        log.warning("%d channels refused (%s): %s", len(names), reason, " ".join(names[:5]))
        with self.publisher.gather():
            for name in names:
                feed = self.feeds.get(name.encode())
                if reason == EXPIRED and isinstance(feed, TradeFeed):
                    self._spawn(self._end_trades(feed))
                elif feed is not None:
                    self.statuses.tell(feed, "expired" if reason == EXPIRED else "refused", reason)

    # -- what follows from it -----------------------------------------------------------------------------------------

    def _attend(self, feed: Feed) -> None:
        """A book has come into or out of step, a hole in the trades has been seen, an instrument has ended."""
        feed.changed = False
        if isinstance(feed, TradeFeed):
            self.healer.heal(feed)
        elif isinstance(feed, ListingFeed):
            self._spawn(self._leave_ended(feed))
        elif feed.is_complete:
            feed.waits = 0
            self.statuses.tell(feed, "live", "")
        else:
            self.statuses.tell(feed, "recovering", "sequence")
            self.patrol.resync(feed)

    async def _leave_ended(self, listing: ListingFeed) -> None:
        """Leave the channels of instruments that have ended, once each has said its last; then tell the supervisor."""
        while count := len(listing.ended):
            await asyncio.sleep(LAST_WORDS)
            events = listing.ended[:count]
            instruments = {event["row"]["instrument_name"] for event in events}
            names = [feed.channel.name for feed in self.feeds.values() if feed.channel.instrument in instruments]
            self.client.reconciler.expire(names)
            self.channels.events += events
            del listing.ended[:count]

    async def _end_trades(self, feed: TradeFeed) -> None:
        """Its instrument has ended, and its last trades may have been lost: nothing may follow the word."""
        await self.healer.finish([feed])
        if not feed.is_ended and self.client.reconciler.subscriptions.refused.get(feed.channel.name) == EXPIRED:
            self.statuses.tell(feed, *OVER)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
