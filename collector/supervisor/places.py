"""All channels asked for on all connections, in a form in which a clash is found without comparing each pair."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from collector.channels import Channel, parse_channel, share_topic
from collector.config.clashes import may_share

if TYPE_CHECKING:
    from collector.supervisor.supervisor import Entry


class Places:
    """The channels of some connections: where each stands, and whether another one may stand beside them.

    Those of a connection that has ended for good, and is only still shown, do not count.
    """

    def __init__(self, entries: "Iterable[Entry]") -> None:
        self._narrow: dict[str, tuple[str, Channel]] = {}
        self._wide: list[tuple[str, Channel]] = []
        for entry in entries:
            for name in () if entry.keeper.is_over else entry.channels:
                self._add(entry.keeper.name, parse_channel(name))

    def _add(self, owner: str, channel: Channel) -> None:
        if channel.topic is None:
            self._wide.append((owner, channel))
        else:
            self._narrow[channel.topic] = (owner, channel)

    def place(self, owner: str, channel: Channel) -> None:
        """Add a channel of a connection. Raises ValueError if another one would feed a topic of it too."""
        for other in self._find_rivals(channel):
            if (owner, channel) == other:
                return
            if not may_share(other, (owner, channel)):
                raise ValueError(f"{other[1].name} of {other[0]} feeds the same topics")
        self._add(owner, channel)

    def _find_rivals(self, channel: Channel) -> list[tuple[str, Channel]]:
        if channel.topic is None:
            near = [*self._wide, *self._narrow.values()]
        else:
            near = [*self._wide, *filter(None, [self._narrow.get(channel.topic)])]
        return [other for other in near if share_topic(other[1], channel)]
