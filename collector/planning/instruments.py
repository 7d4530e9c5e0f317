"""The instruments of one exchange as time goes on: by its whole list now and then, by what is told in between. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from collector.channels import ENDED
from collector.config.patterns import Instrument, read_instrument


class Instruments:
    """What is known of the instruments: `known` has by name also those that have ended since the last look at the list.

    A look takes its time: what is told meanwhile, the list may be too old for.
    """

    def __init__(self, listed: Mapping[str, Instrument]) -> None:
        self.known = dict(listed)
        self._missing: set[str] = set()  # those that the last look did not find, and the next one decides on
        self._told: set[str] = set()  # those of which something was told since the look began, known or not
        self._times: dict[str, int] = {}  # when (ms) the exchange said last what was told of each

    def begin_look(self) -> None:
        """The whole list is asked for from now on."""
        self._told.clear()

    def take_list(self, listed: Mapping[str, Instrument], now: int) -> bool:
        """Take the whole list at `now` (ms); return whether another look is needed soon.

        What is missing there is gone if the next look misses it too, or if it had to expire.
        """
        found = {name: each for name, each in listed.items() if name not in self._told}
        found |= {name: self.known[name] for name in self._told & self.known.keys()}
        missing = {name for name, each in self.known.items() if name not in found and each.is_listed(now)}
        self._missing = missing - self._missing
        self.known = {name: self.known[name] for name in self._missing} | found
        self._times = {name: at for name, at in self._times.items() if name in self.known}
        return bool(self._missing)

    def take_rows(self, rows: Iterable[dict[str, Any]]) -> bool:
        """Take what workers told; return whether a look is needed, since the listing of one was never told.

        An end is told late, once the channels have said their last: it may be listed again by then.
        """
        is_outdated = False
        for row in sorted(rows, key=lambda row: "kind" not in row):  # its state may be told before its listing
            name, state, at = row["instrument_name"], row.get("state"), row.get("timestamp")
            if isinstance(at, int) and at < self._times.get(name, 0):
                continue
            if "kind" in row and (instrument := read_instrument(row)) is not None:
                self.known[name] = instrument
            elif name in self.known and isinstance(state, str):
                self.known[name] = replace(self.known[name], state=state)
            elif state not in ENDED:  # who has ended without being known is not wanted either
                is_outdated = True
                continue
            self._told.add(name)
            if isinstance(at, int):
                self._times[name] = at
        return is_outdated
