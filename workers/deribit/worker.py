"""The worker process of one Deribit connection: client, feeds and publisher put together."""

import asyncio
import logging
import os
import time
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from collector.channels import LISTINGS
from collector.lifecycle import FINAL_EXITS, Exit
from collector.words import say_count
from workers.deribit.channels import Channels
from workers.deribit.commands import SLICE, Commands
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
from workers.deribit.intake import FIRST_VALUES, Intake
from workers.deribit.publishing.joins import Joins
from workers.deribit.publishing.ledger import Ledger
from workers.deribit.publishing.publisher import Publisher
from workers.deribit.publishing.streams import Topics
from workers.deribit.watching.patrol import Patrol
from workers.deribit.watching.statuses import FAILED, MUTE, OVER, STOPPED, Statuses

log = logging.getLogger("deribit")

LAST_WORDS = 2.0
"""Seconds from the end of an instrument to the last frames of its channels: the slowest (agg2) speak once a second."""

WINDING_UP = 2.0
"""Seconds that what was cancelled may take at the end: a socket waits one for the exchange's close frame."""


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


class Worker(Listener):
    """One connection of the configuration: its parts put together, and what they have to tell each other."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.name: str = spec["name"]
        self.epoch: int = spec["epoch"]
        self.news = asyncio.Event()
        self.ledger = Ledger(Path(spec["runtime_dir"]) / f"{self.name}.ledger", fresh=spec["fresh"])
        self.topics = Topics(self.epoch, self.ledger)
        self._tasks: set[asyncio.Task[None]] = set()
        self.publisher = Publisher(spec["connection"]["publish"], spec["connection"]["queue"], self.ledger)
        self.joins = Joins(self.publisher, self.topics)
        self.client = create_client(spec, self)
        self.healer = Healer(self.client, self.publisher)
        self.statuses = Statuses(self.publisher, self.topics, self.name, self.client)
        self.channels = Channels(self.client.reconciler.subscriptions, self.topics, self.statuses, self.healer)
        self.feeds = self.channels.feeds
        self.patrol = Patrol(
            self.name, self.feeds, self.client, self.publisher, self.statuses, self.topics, self.channels.take_up
        )
        self.intake = Intake(self.channels, self.publisher, self.patrol, self.client.session, self._attend)
        self.commands = Commands(self.client, self.channels, self.healer, self.publisher)
        self._is_following = bool(spec.get("follow"))
        self.channels.add(spec["channels"])
        if self._is_following:
            self.channels.add(list(LISTINGS), is_asked=False)  # its channels come from patterns
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
            self._end()
        return self.client.exit

    def _end(self) -> None:
        """Close all. It waits for slow subscribers, but for less time than the supervisor waits for beats."""
        self.commands.end()
        self.joins.end()
        self.healer.close()
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
            "bytes": self.client.traffic.bytes_read,
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

    def get_state(self) -> dict[str, Any]:
        """All there is to know of this connection."""
        feeds, state = self.feeds.values(), self.client.get_state()
        state["channels"]["mute"] = [feed.channel.name for feed in feeds if feed.condition == MUTE]
        return (
            state
            | self.report()
            | {
                "epoch": self.epoch,
                "publish": self.publisher.endpoint,
                "lag": self.patrol.lag.describe(),
                "latency": self.intake.latency.describe(),
                "gaps": self.topics.gaps,
                "resyncs": self.patrol.resyncs,
                "duplicates": sum(feed.duplicates for feed in feeds),
                "repaired": self.topics.repaired,
                "missing": self.topics.missing,
                "healing": sum(feed.count_healing() for feed in feeds if isinstance(feed, TradeFeed)),
                "dropped": sum(feed.dropped for feed in feeds),
                "malformed": self.intake.malformed,
                "unknown": self.intake.unknown,
            }
        )

    async def answer(self, op: str, arguments: dict[str, Any]) -> Any:
        """Carry out one command, or say how the connection is, also after its end. Raises ControlError."""
        if op == "get_state":
            return self.get_state()
        return await self.commands.answer(op, arguments)

    # -- what the client tells (see connection.listener) --------------------------------------------------------------

    def take_frames(self, frames: list[bytes], receive_ts: int) -> None:
        """Take the frames of one read."""
        self.intake.take_frames(frames, receive_ts)

    def take_malformed(self, frame: bytes, reason: str) -> None:
        """Count and log a frame that is not what it should be."""
        self.intake.take_malformed(frame, reason)

    def change_state(self, state: str, reason: str) -> None:
        """Say it on the connection's status topic; a lost connection is a loss on every topic."""
        said = f"{state}: {reason}" if reason else state
        log.log(logging.WARNING if state in ("backoff", "failed") else logging.INFO, "%s", said)
        with self.publisher.gather():
            if state in ("backoff", "failed"):
                self._lose_all()
            elif state == "bootstrapping":
                self.intake.first_until = NEVER
            elif state == "live":
                self.patrol.begin()
            elif state == "closed":
                for feed in self.feeds.values():
                    if feed.condition[0] != "expired":
                        self.channels.say_last(feed, STOPPED)
            self.statuses.tell_connection(state, reason)
        self.news.set()

    def _lose_all(self) -> None:
        for feed in self.feeds.values():
            if feed.condition[0] != "expired":
                feed.lose("disconnect", self.client.read_clock())
                if self.client.exit in FINAL_EXITS:  # no later life builds it up again
                    self.channels.say_last(feed, FAILED)
                else:
                    self.statuses.tell(feed, "recovering", "disconnect")
        self.patrol.lose()

    def confirm_channels(self, names: list[str]) -> None:
        """A channel with no state of its own to build up is live once the exchange sends it."""
        with self.publisher.gather():
            for name in names:
                if (feed := self.feeds.get(name.encode())) is not None:
                    self._confirm(feed)

    def _confirm(self, feed: Feed) -> None:
        self.intake.first_until = time.monotonic() + FIRST_VALUES
        feed.rhythm.restart(feed.last_ts, time.monotonic_ns())
        if feed.is_complete:
            self.statuses.tell(feed, "live", "")
        else:
            feed.waiting_since = time.monotonic()
            self.statuses.tell_awaited(feed)
        if isinstance(feed, ListingFeed):
            self.channels.events.append({"event": "listening"})
        if isinstance(feed, TradeFeed):
            feed.confirm(time.time_ns())
            self.healer.heal(feed)

    def refuse_channels(self, names: list[str], reason: str) -> None:
        """Say on the topic of each that it will not come."""
        level = logging.INFO if reason == EXPIRED else logging.WARNING
        log.log(level, "%s refused (%s): %s", say_count(len(names), "channel"), reason, " ".join(names[:5]))
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
            for start in range(0, len(names), SLICE):  # hundreds may end together, and what comes may not wait for it
                self.client.reconciler.expire(names[start : start + SLICE])
                await asyncio.sleep(0)
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
