"""One connection with patterns: expanded from the exchange's own list before its start, and kept equal to that list.

Workers tell of listings and ends as they happen; a look at the whole list, some minutes apart and after 08:00 UTC,
when instruments expire and new ones are listed, finds what was missed.
"""

import asyncio
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

from collector.channels import parse_channel
from collector.config import ConfigError, Connection
from collector.config.clashes import Placed
from collector.config.patterns import expand, is_instrument
from collector.lifecycle import MAX_RESTARTS, Exit, backoff_delay
from collector.planning.catalogue import Catalogue, Unreachable
from collector.planning.instruments import Instruments
from collector.planning.shards import assign, count_shards, find_unit, spread, weigh
from collector.words import say_count

if TYPE_CHECKING:
    from collector.supervisor.supervisor import Entry, Supervisor

CHECK = 300.0
"""Seconds between two looks at the whole list."""

MARKS = (5.0, 65.0, 150.0)
"""Seconds after 08:00 UTC at which it is looked at too: what is listed, settled or late by then."""

RECHECK = 5.0
"""Seconds between two looks at least, whatever happens; and between two attempts at what another connection holds."""

AGAIN = 30.0
"""Seconds from a look that failed to the next one."""

BREATH = 0.2
"""Seconds in which what workers tell is gathered: a new series comes one by one, and each round costs some requests."""

MAX_ROWS = 50_000
"""Events that wait to be taken; what is beyond them, a look at the whole list finds."""

_DAY, _EIGHT = 86_400.0, 8 * 3_600.0

log = logging.getLogger(__name__)


def find_next_check(now: float) -> float:
    """Seconds from `now` (s since 1970) to the next regular look at the whole list."""
    since = (now - _EIGHT) % _DAY
    return min(CHECK, *(mark - since for mark in MARKS if mark > since), _DAY + MARKS[0] - since)


class Follower:
    """Expands the patterns of one connection, starts what it becomes, and follows the exchange's list.

    Two tasks do that: `_follow` takes what workers tell and adjusts what is asked for, `_look` brings the whole list
    from time to time.
    """

    def __init__(self, supervisor: "Supervisor", entry: "Entry") -> None:
        self._supervisor = supervisor
        self._entry = entry
        self.name = entry.connection.name
        self.patterns = entry.connection.patterns
        self._catalogue: Catalogue
        self._instruments: Instruments
        self._shards: list[Entry] = []  # the connections that carry the channels
        self._named: set[str] = set()  # the channels that are asked for whatever the patterns are
        self._ours: dict[str, Entry] = {}  # the channels, and the shard of each
        self._held_elsewhere: dict[str, Placed] = {}  # channels in whose way another connection's stands
        self._rows: list[dict[str, Any]] = []  # what was told and is still to be taken
        self._woken = asyncio.Event()  # there is something to take, or what is wanted may have changed
        self._outdated = asyncio.Event()  # something has happened that nobody told

    # before the start

    async def expand(self) -> Exit | None:
        """Expand the patterns and put in place what they need; return why, if that cannot be done.

        It takes as many attempts as a connection that was never live may make.
        """
        connection = self._entry.connection
        self._catalogue = self._supervisor.find_catalogue(connection)
        attempts = connection.retry_count * (MAX_RESTARTS + 1)
        for attempt in count(1):
            try:
                listed = await self._catalogue.share()  # who asked first goes on first, and stays where two meet
                break
            except Unreachable as error:
                if attempt == attempts:
                    return self._give_up(Exit.GAVE_UP, f"the exchange's list of instruments could not be had: {error}")
                delay = backoff_delay(attempt, connection.retry_delay, random.random())
                log.warning("%s: patterns cannot be expanded: %s; asked again in %.1f s", self.name, error, delay)
                self._entry.keeper.report["last_error"] = {"message": str(error)}
                await asyncio.sleep(delay)
        self._instruments = Instruments(listed)
        return self._put_in_place()

    def _put_in_place(self) -> Exit | None:
        if self._entry.keeper.is_stopping:  # in this very turn of the loop
            return None
        # What was wished while the list was waited for, somebody was told to be kept.
        connection = replace(self._entry.connection, channels=tuple(self._entry.channels))
        self._named.update(self._entry.channels)
        now, taken = self._catalogue.read_ms(), self._supervisor.list_places()
        try:
            found, shards, _ = spread(connection, self._instruments.known, now, taken)
            if len(shards) > 1 and not self._entry.from_file:
                raise ConfigError(f"{self.name}: patterns that need {len(shards)} connections must stand in the file")
            self._supervisor.check_beside(shards, self._entry)
        except ConfigError as error:
            return self._give_up(Exit.BAD_SPEC, str(error))
        for pattern, number in found.items():
            level = logging.INFO if number else logging.WARNING
            log.log(level, "%s: %s: %s", self.name, pattern, say_count(number, "channel"))
        self._start(shards)
        return None

    def _start(self, shards: list[Connection]) -> None:
        unwanted = set(self._entry.wishes.list_leaving())
        asked = [replace(s, channels=tuple(name for name in s.channels if name not in unwanted)) for s in shards]
        if len(shards) == 1:
            self._entry.channels.update(dict.fromkeys(asked[0].channels))
            self._shards = [self._entry]
        else:
            log.info("%s: spread over %s", self.name, ", ".join(shard.name for shard in shards))
            self._shards = [self._supervisor.start_connection(s, from_file=True, follower=self) for s in asked]
            self._entry.keeper.stop()  # they run in its place
        self._ours = {name: e for e, shard in zip(self._shards, shards, strict=True) for name in shard.channels}
        self._supervisor.guard(self._follow())

    def _give_up(self, code: Exit, reason: str) -> Exit:
        log.error("%s: %s: not started", self.name, reason)
        self._entry.keeper.report["last_error"] = {"message": reason}
        return code

    def list_shards(self) -> list[str]:
        """The names of the connections that carry its channels; none before the exchange's list has come."""
        return [shard.keeper.name for shard in self._shards]

    def keep(self, names: Iterable[str]) -> None:
        """Note channels that are asked for by name: they stay, whatever becomes of the patterns."""
        self._named.update(names)

    def release(self, names: Iterable[str]) -> None:
        """Note channels that are given up by name: what becomes of them is the patterns' matter again."""
        self._named.difference_update(names)

    def has_found(self, name: str) -> bool:
        """Whether a channel is asked for only since a pattern stands for it."""
        return name in self._ours and name not in self._named

    def count_left(self) -> dict[str, int]:
        """How many channels that its patterns stand for are left to which other connection."""
        return dict(Counter(other.owner for other in self._held_elsewhere.values()))

    def leave(self, names: Iterable[str]) -> None:
        """Let go of those that only a pattern has brought: another connection names them."""
        self._let_go([name for name in names if self.has_found(name)], "left to who names them")
        self._woken.set()

    # what workers tell

    def take_event(self, event: dict[str, Any]) -> None:
        """Note what a worker tells (see workers.deribit.feeds.listings)."""
        match event:
            case {"event": "instrument", "row": {"instrument_name": name} as row} if is_instrument(name):
                if len(self._rows) < MAX_ROWS:
                    self._rows.append(row)
                else:
                    self._outdated.set()
            case {"event": "listening"}:  # what happened before, it cannot have heard
                self._outdated.set()
        self._woken.set()

    # what happens to others

    def lose(self, ended: "Entry") -> None:
        """Say what becomes of the channels of a connection that has ended for good."""
        self._woken.set()  # it may have been the last
        names = [shard.keeper.name for shard in self._shards if not shard.keeper.is_over]
        if ended in self._shards and names and not self._supervisor.is_stopping:
            count = say_count(len(ended.channels), "channel")
            log.warning(
                "%s: %s has ended for good (%s), and its %s with it; new instruments go to %s",
                self.name, ended.keeper.name, ended.keeper.state, count, ", ".join(names),
            )  # fmt: skip

    # from then on

    async def _follow(self) -> None:
        """Take what workers tell as it comes. Nobody is waited for: the next rows concern others too."""
        looking = self._supervisor.guard(self._look())
        while not self._supervisor.is_stopping and not all(shard.keeper.is_over for shard in self._shards):
            rows, self._rows = self._rows, []
            if self._instruments.take_rows(rows):
                self._outdated.set()
            told = {row["instrument_name"] for row in rows} & self._instruments.known.keys()
            self._adjust({name for name in told if self._instruments.known[name].state == "open"})
            await asyncio.sleep(BREATH)
            await self._wait()
            self._woken.clear()
        looking.cancel()

    async def _wait(self) -> None:
        """Wait until there is something to take, or to be had of another connection."""
        while not self._woken.is_set() and all(map(self._supervisor.holds, self._held_elsewhere.values())):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), RECHECK if self._held_elsewhere else None)

    async def _look(self) -> None:
        """Look at the whole list beside that: in time, and soon where something has happened that nobody told."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(find_next_check(self._catalogue.read_ms() / 1000)):
                    await asyncio.sleep(RECHECK)
                    await self._outdated.wait()
            while not await self._check():
                await asyncio.sleep(AGAIN)

    async def _check(self) -> bool:
        """Take the whole list; return False if it cannot be had."""
        self._outdated.clear()  # what happens from now on, this look may be too early for
        self._instruments.begin_look()
        try:
            listed = await self._catalogue.fetch()
        except Unreachable as error:
            log.warning("%s: the list of instruments is not checked: %s", self.name, error)
            return False
        finally:
            self._woken.set()  # also where it has failed: time goes on, and some leave their patterns by it
        if self._instruments.take_list(listed, self._catalogue.read_ms()):
            self._outdated.set()
        return True

    def _adjust(self, again: set[str]) -> None:
        """Have the workers ask for what is listed now, and let go of the rest; ask `again` for these instruments.

        None is waited for: a worker may heal for seconds what has expired, or be stuck.
        """
        now = self._catalogue.read_ms()
        wanted: dict[str, str] = {}
        for channels in expand(self.patterns, self._instruments.known, now).values():
            wanted |= channels
        gone = [name for name in self._ours if name not in wanted and name not in self._named]
        new = [name for name in wanted if name not in self._ours]
        repeated = {
            name: shard for name, instrument in wanted.items()
            if instrument in again and (shard := self._ours.get(name)) is not None and name in shard.channels
        }  # fmt: skip
        listed = {name for name, each in self._instruments.known.items() if each.is_listed(now)}
        self._let_go([name for name in gone if parse_channel(name).instrument not in listed], "expired", "expired")
        self._let_go([name for name in gone if parse_channel(name).instrument in listed], "of no pattern any more")
        if placed := self._place(new):
            log.info("%s: %s new: %s ...", self.name, say_count(len(placed), "channel"), next(iter(placed)))
        self._ask("subscribe", repeated | placed)

    def _place(self, new: list[str]) -> dict[str, "Entry"]:
        """Give new channels their shards; those that would feed another connection's topics get none for now."""
        living = [shard for shard in self._shards if not shard.keeper.is_over]
        if not new or not living:
            self._held_elsewhere.clear()
            return {}
        held = {name: living.index(shard) for name, shard in self._ours.items() if shard in living}
        numbers = assign(weigh([*held, *new]), len(living), {find_unit(name): held[name] for name in held})
        taken = self._supervisor.list_places()
        placed: dict[str, Entry] = {}
        left: dict[str, Placed] = {}
        for name in new:
            shard = living[numbers[find_unit(name)]]
            here = Placed(shard.connection.name, parse_channel(name))
            if other := taken.find_clash(here):
                left[name] = other
                continue
            taken.add(here)
            shard.channels[name] = None
            placed[name] = self._ours[name] = shard
        self._note_held_elsewhere(left)
        if placed:
            self._note_crowd(list(held), list(placed), len(living))
        return placed

    def _note_crowd(self, before: list[str], new: list[str], count: int) -> None:
        """Say when the channels become more than so many connections should carry: no further one is started."""
        channels = [*before, *new]
        if count_shards(weigh(before)) <= count < (needed := count_shards(weigh(channels))):
            log.warning(
                "%s: %s on %s, more than these should carry: the next start spreads them over %d",
                self.name, say_count(len(channels), "channel"), say_count(count, "connection"), needed,
            )  # fmt: skip

    def _note_held_elsewhere(self, left: dict[str, Placed]) -> None:
        news: dict[str, list[str]] = defaultdict(list)
        for name, other in left.items():
            if name not in self._held_elsewhere:
                news[other.owner].append(name)
        for owner, names in news.items():
            count, some = say_count(len(names), "channel"), " ".join(names[:5])
            log.warning("%s: %s not asked for now: %s feeds the same topics: %s", self.name, count, owner, some)
        self._held_elsewhere = left

    def _let_go(self, names: list[str], why: str, reason: str = "") -> None:
        """Want these no more; what was given up by name already is only forgotten."""
        shards = {name: self._ours.pop(name) for name in names}
        asked = {name: shard for name, shard in shards.items() if name in shard.channels}
        if not asked:
            return
        log.info("%s: %s %s: %s ...", self.name, say_count(len(asked), "channel"), why, next(iter(asked)))
        for name, shard in asked.items():
            del shard.channels[name]
        self._ask("unsubscribe", asked, reason)

    def _ask(self, op: str, shards: Mapping[str, "Entry"], reason: str = "") -> None:
        """Have each worker carry out its part; one that does not hear it now is told later (see wishes).

        The wishes stand at once: no channel may seem free before its worker has heard that it is given up.
        """
        groups: dict[Entry, list[str]] = defaultdict(list)
        for name, shard in shards.items():
            groups[shard].append(name)
        for shard, group in groups.items():
            shard.wishes.tell(op, group, reason)
