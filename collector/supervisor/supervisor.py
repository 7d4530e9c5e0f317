"""The supervisor: one keeper for each connection, and one for the practice exchange; starts, watches and stops them."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from collector.channels import parse_channel
from collector.config import Config, Connection, Credentials, check_together
from collector.config.clashes import Placed, Places
from collector.config.urls import name_host
from collector.lifecycle import STOP_GRACE, Exit
from collector.planning.catalogue import Catalogue
from collector.sockets import remove_socket
from collector.supervisor.follower import Follower
from collector.supervisor.keeper import Keeper
from collector.supervisor.process import Spawner
from collector.supervisor.wishes import Wishes

EXCHANGE_NAME = "exchange"

TICK = 0.25
"""Seconds between two looks at who is overdue."""

EXCHANGE_GRACE = 1.5
"""Seconds that the practice exchange has to stop: with STOP_GRACE before it, all is over within 5 s."""

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Entry:
    """One connection: how it is configured, the channels asked for now, its keeper, and who follows its patterns."""

    connection: Connection
    channels: dict[str, None]
    keeper: Keeper
    from_file: bool
    follower: Follower | None = None
    keeping: asyncio.Task[None] = field(init=False)
    wishes: Wishes = field(init=False)

    def __post_init__(self) -> None:
        self.wishes = Wishes(self.keeper)
        self.keeper.take_sign = self.wishes.catch_up

    def list_leaving(self) -> list[str]:
        """The channels that are given up, and that it may still feed: its worker may not know of that yet."""
        leaving = self.wishes.list_leaving() if self.keeper.pid is not None else []
        return [name for name in leaving if name not in self.channels]

    def has_found(self, name: str) -> bool:
        """Whether a channel is asked for only since a pattern stands for it."""
        return self.follower is not None and self.follower.has_found(name)

    @property
    def bound(self) -> str:
        """Where it publishes: as bound once it is, else as configured."""
        return str(self.keeper.endpoints.get("publish", self.connection.publish))


class Supervisor:
    """All workers of one collector. `run` is its life; `entries` are the connections by name."""

    def __init__(self, config: Config, log_level: str, begin_epoch: Callable[[], int]) -> None:
        self.config = config
        self.entries: dict[str, Entry] = {}
        self.exchange: Keeper | None = None
        self._log_level = log_level
        self._begin_epoch = begin_epoch
        self._spawner = Spawner()
        self._pools: dict[tuple[str, str], int] = {}
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._exchange_keeping: asyncio.Task[None]
        self._guarded: set[asyncio.Task[None]] = set()
        self._logins: dict[str, Credentials] = {}
        self._catalogues: dict[tuple[Any, ...], Catalogue] = {}

    async def run(self) -> int:
        """Start all, watch them until `end` or until no connection is left, stop all; return the exit code."""
        watching = self.guard(self._watch())
        self._remove_pools()  # what a killed supervisor left is out of date
        self._remove_orphaned()
        try:
            if self.config.exchange is not None:
                self._start_exchange()
            for connection in self.config.connections:
                self.start_connection(connection, from_file=True)
            return await self._ended
        finally:
            if watching.done():  # by a fault: then nobody kills who does not stop
                asyncio.get_running_loop().call_later(STOP_GRACE, self.kill)
            await self._stop()
            watching.cancel()
            self._remove_pools()

    @property
    def is_stopping(self) -> bool:
        """Whether all is being stopped: nothing may be started any more."""
        return self._ended.done()

    def end(self, code: int) -> None:
        """Have `run` stop all in order and return the code."""
        if not self._ended.done():
            self._ended.set_result(code)

    def kill(self) -> None:
        """Kill all workers at once: a second signal forces the end."""
        for keeper in self._keepers():
            keeper.stop()
            keeper.kill()

    def _keepers(self) -> list[Keeper]:
        keepers = [entry.keeper for entry in self.entries.values()]
        return [*keepers, self.exchange] if self.exchange is not None else keepers

    # the practice exchange

    def _start_exchange(self) -> None:
        self.exchange = Keeper(
            EXCHANGE_NAME, EXCHANGE_NAME, 0.2, self._spawner, self._begin_epoch, self._build_exchange_spec
        )
        self._exchange_keeping = self.guard(self.exchange.keep())
        self._exchange_keeping.add_done_callback(self._end_exchange)

    def _end_exchange(self, _: object) -> None:
        """The practice exchange has ended; for those who connect to it there is nothing left if that was for good."""
        if self.exchange is not None and self.exchange.machine.state == "failed":
            error = self.exchange.last_error
            reason = error.get("message") if isinstance(error, dict) else error
            log.error("the practice exchange cannot run: %s", reason or "see above")
            self.end(1)

    @property
    def exchange_port(self) -> int:
        """The port of the practice exchange. Workers know it by that of its first life: later ones take the same."""
        assert self.exchange is not None
        assert self.config.exchange is not None
        return urlsplit(self.exchange.endpoints.get("url", "")).port or self.config.exchange.port

    def _build_exchange_spec(self, keeper: Keeper) -> dict[str, Any]:
        assert self.config.exchange is not None
        return self._build_spec(keeper) | {"port": self.exchange_port, "faults": self.config.exchange.faults}

    # connections

    def start_connection(self, connection: Connection, *, from_file: bool, follower: Follower | None = None) -> Entry:
        """Start a connection that was checked to stand beside the others, and keep it. `follower`: who split it off."""
        name = connection.name
        keeper = Keeper(
            name, "deribit", connection.retry_delay, self._spawner, self._begin_epoch, self._build_connection_spec
        )
        entry = Entry(connection, dict.fromkeys(connection.channels), keeper, from_file, follower)
        if connection.patterns:
            entry.follower = Follower(self, entry)
        if entry.follower is not None:
            keeper.take_event = entry.follower.take_event
        self.entries[name] = entry
        entry.keeping = self.guard(keeper.keep(self._prepare(entry)))
        entry.keeping.add_done_callback(lambda _: self._end_connection(entry))
        return entry

    async def _prepare(self, entry: Entry) -> Exit | None:
        """Wait for what a connection needs before its first start; return why, if it cannot be had."""
        if entry.connection.is_practice and self.exchange is not None:
            await self.exchange.wait_settled()
        while any(entry.channels.keys() & other.list_leaving() for other in self._list_lasting(entry)):
            await asyncio.sleep(TICK)  # see take_from_patterns
        return await entry.follower.expand() if entry.connection.patterns and entry.follower else None

    def find_catalogue(self, connection: Connection) -> Catalogue:
        """What the exchange of a connection lists: one for all that ask it in the same way."""
        url = self.resolve_url(connection)
        way = url.partition("?")[0], *sorted(connection.headers.items()), connection.timeout
        return self._catalogues.setdefault(way, Catalogue(url, connection.headers, connection.timeout))

    def check_beside(self, connections: list[Connection], known: Entry | None) -> None:
        """Check that these can stand beside those that run, without the one that they replace. Raises ConfigError.

        What they name is not in their way where another has it by a pattern alone (see take_from_patterns), or leaves
        it just now: they start once that is done.
        """
        named = {name for connection in connections for name in connection.channels}
        others = []
        for entry in self._list_lasting(known):
            kept = [name for name in entry.channels if not (name in named and entry.has_found(name))]
            kept += [name for name in entry.list_leaving() if name not in named]
            patterns = entry.follower.patterns if entry.follower is not None else ()
            others.append(replace(entry.connection, channels=tuple(kept), patterns=patterns, publish=entry.bound))
        port = None if self.config.exchange is None else self.exchange_port
        names = [other.name for other in others]
        check_together([*others, *connections], self.config.control, port, names)

    def take_from_patterns(self, entry: Entry) -> None:
        """Have others give up what a new connection names and their patterns alone have brought: names come first.

        It starts once their workers have heard that.
        """
        for other in self._list_lasting(entry):
            if other.follower is not None:
                other.follower.leave(other.channels.keys() & entry.channels.keys())

    def list_places(self) -> Places:
        """Where all channels stand."""
        places = Places()
        for entry in self._list_lasting():
            for channel in entry.channels:
                places.add(Placed(entry.keeper.name, parse_channel(channel)))
            for channel in entry.list_leaving():
                places.add(Placed(entry.keeper.name, parse_channel(channel)), is_leaving=True)
        return places

    def holds(self, placed: Placed) -> bool:
        """Whether a connection still has a channel, or may still feed it."""
        entry, name = self.entries.get(placed.owner), placed.channel.name
        if entry is None or entry.keeper.is_over:
            return False
        return name in entry.channels or name in entry.list_leaving()

    def list_lasting_shards(self, name: str) -> list[str]:
        """The connections over which one of that name is spread, without those that have ended for good."""
        lasting = self._list_lasting()
        return [entry.keeper.name for entry in lasting if entry.follower is not None and entry.follower.name == name]

    def _list_lasting(self, but: Entry | None = None) -> list[Entry]:
        """The connections without those that have ended for good, and are only still shown."""
        return [entry for entry in self.entries.values() if entry is not but and not entry.keeper.is_over]

    def _build_connection_spec(self, keeper: Keeper) -> dict[str, Any]:
        entry = self.entries[keeper.name]
        connection = entry.connection
        login = self._read_login(connection)
        entry.wishes.note_spec()
        # At `*` too it comes back where its subscribers wait: else they would never hear that messages were lost.
        # But the port may be another's by now, and who was never live has lost nothing.
        may_return = keeper.was_live and keeper.exit_code != Exit.BAD_SPEC
        publish = entry.bound if may_return else connection.publish
        return self._build_spec(keeper) | {
            "connection": connection.to_map() | {"url": self.resolve_url(connection), "publish": publish},
            "channels": list(entry.channels),
            "follow": entry.follower is not None,
            "pool": self._find_pool(connection, login),
            "credentials": {"client_id": login.client_id, "client_secret": login.client_secret} if login else None,
        }

    def _read_login(self, connection: Connection) -> Credentials | None:
        """Its key, as the files hold it now; as it was before if they cannot be read any more."""
        if not connection.credentials:
            return None
        known = self._logins.get(connection.credentials, self.config.secrets[connection.credentials])
        login = known.read_again()
        if login.fault:
            log.error("%s: %s; the key of before is used", connection.name, login.fault)
            return known
        self._logins[connection.credentials] = login
        return login

    def _find_pool(self, connection: Connection, login: Credentials | None) -> str:
        """Where the credits lie that a connection shares with all that use the same key (or none) at the same host."""
        place = name_host(self.resolve_url(connection)), login.client_id if login else ""
        number = self._pools.setdefault(place, len(self._pools) + 1)
        return str(self.config.runtime_dir / f"credits-{number}")

    def _remove_pools(self) -> None:
        for path in self.config.runtime_dir.glob("credits-*"):
            _remove(path)

    def _remove_orphaned(self) -> None:
        """Remove the sockets of a killed supervisor's workers: one that is stopped would serve its own for ever.

        Nobody else listens in a directory that is ours, and locked.
        """
        for path in self.config.runtime_dir.glob("*.pub"):
            if path.is_socket():
                _remove(path)

    def _build_spec(self, keeper: Keeper) -> dict[str, Any]:
        return {
            "name": keeper.name,
            "epoch": keeper.epoch,
            "fresh": not keeper.endpoints,  # no earlier life came so far as to say anything
            "runtime_dir": str(self.config.runtime_dir),
            "log_level": self._log_level,
            "scheduling": self.config.scheduling,
            "read_pause": self.config.read_pause,
        }

    def resolve_url(self, connection: Connection) -> str:
        """The URL to connect to: `practice` stands for that of the practice exchange."""
        if not connection.is_practice or self.exchange is None or "url" not in self.exchange.endpoints:
            return connection.url
        query = urlsplit(connection.url).query
        return urlunsplit(urlsplit(str(self.exchange.endpoints["url"]))._replace(query=query))

    def _end_connection(self, entry: Entry) -> None:
        """A connection has ended for good.

        The collector goes on while another one runs. One that was added at run time ends it only where one of the file
        has failed too, and is neither closed nor connected again since.
        """
        keeper = entry.keeper
        self._remove_left(keeper)
        if keeper.machine.state == "stopped" and self.entries.get(keeper.name) is entry:
            del self.entries[keeper.name]
        if entry.follower is not None:
            entry.follower.lose(entry)
        if keeper.machine.state != "failed":
            return
        left = [*(each for each in self.entries.values() if each is not entry), entry]  # `connect` may have removed it
        if not all(each.keeper.is_over for each in left):
            return
        if any(each.from_file and each.keeper.machine.state == "failed" for each in left):
            log.error("no connection is left")
            self.end(3 if any(each.keeper.exit_code == Exit.CREDENTIALS for each in left) else 1)

    def _remove_left(self, keeper: Keeper) -> None:
        """Remove what a killed worker leaves: the file of the socket that it bound, and its ledger."""
        remove_socket(str(keeper.endpoints.get("publish", "")))
        _remove(self.config.runtime_dir / f"{keeper.name}.ledger")

    def guard(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start what no collector can go on without: an error of it is said, and ends all."""
        task = asyncio.create_task(work)
        self._guarded.add(task)
        task.add_done_callback(self._look_for_fault)
        return task

    def _look_for_fault(self, task: asyncio.Task[None]) -> None:
        self._guarded.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("a fault of the supervisor itself", exc_info=error)
            self.end(1)

    # all of them

    async def _watch(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(TICK)
            now = time.monotonic()
            # Who was stopped or starved itself cannot tell a late beat from one that it has not read yet.
            pause = max(0.0, now - last - 4 * TICK)
            last = now
            for keeper in self._keepers():
                keeper.watch(now, pause)

    async def _stop(self) -> None:
        """End all in order: the connections, then the exchange that they talk with. The watch kills stragglers."""
        self.end(1)  # if it is a fault that has brought us here
        for entry in list(self.entries.values()):
            entry.keeper.stop()
        # What one of them ended by, `guard` has said.
        await asyncio.gather(*(entry.keeping for entry in self.entries.values()), return_exceptions=True)
        if self.exchange is not None:
            self.exchange.stop(EXCHANGE_GRACE)
            await asyncio.gather(self._exchange_keeping, return_exceptions=True)


def _remove(path: Path) -> None:
    """Remove a file; what cannot be removed is said, and holds up nothing."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.error("%s cannot be removed: %s", path, error.strerror)
