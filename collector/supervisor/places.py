"""All channels asked for on all connections, in a form in which a clash is found without comparing each pair."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from collector.channels import Channel, parse_channel
from collector.config.clashes import Rivals, may_share

if TYPE_CHECKING:
    from collector.supervisor.supervisor import Entry


class Places:
    """The channels of some connections: where each stands, and whether another one may stand beside them.

    Those of a connection that has ended for good, and is only still shown, do not count.
    """

    def __init__(self, entries: "Iterable[Entry]") -> None:
        self._rivals = Rivals()
        self._leaving: set[tuple[str, Channel]] = set()
        for entry in entries:
            if entry.keeper.is_over:
                continue
            leaving = entry.list_leaving()
            for name in (*entry.channels, *leaving):
                self._rivals.add((entry.keeper.name, parse_channel(name)))
            self._leaving.update((entry.keeper.name, parse_channel(name)) for name in leaving)

    def place(self, owner: str, channel: Channel) -> None:
        """Add a channel of a connection. Raises ValueError if another one would feed a topic of it too."""
        for other in self._rivals.find(channel):
            if (owner, channel) == other:
                return
            if other[0] == owner and other in self._leaving:
                continue  # what it is told comes in order
            if not may_share(other, (owner, channel)):
                raise ValueError(f"{other[1].name} of {other[0]} feeds the same topics")
        self._rivals.add((owner, channel))
