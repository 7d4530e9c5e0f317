"""What cannot stand side by side: connections of one name, sockets on one endpoint, channels that feed one topic."""

from collections import defaultdict
from collections.abc import Container, Sequence
from typing import NamedTuple

from collector.channels import Channel, guess_currencies, parse_channel, share_topic
from collector.config.endpoints import Endpoint, parse_endpoint
from collector.config.keys import ConfigError
from collector.config.values import Connection
from collector.limits import MAX_CONNECTIONS

_Key = tuple[str, str, str]
"""Type, interval and currency."""

_EACH = "*"
"""Stands for each currency, where all channels of a type and interval are wanted."""


class Placed(NamedTuple):
    """A channel, and the name of the connection that has it."""

    owner: str
    channel: Channel


def check_together(
    connections: Sequence[Connection], control: str = "", exchange_port: int | None = 0, running: Container[str] = ()
) -> None:
    """Check what only shows across connections. Raises ConfigError.

    `exchange_port` is None where no practice exchange runs; `running` names those that stand already, and come first:
    the others are compared with them.
    """
    if len(connections) > MAX_CONNECTIONS:
        raise ConfigError(
            f"{len(connections)} connections, Deribit takes {MAX_CONNECTIONS} from one address; "
            "write more channels into fewer [[connection]]"
        )
    names: set[str] = set()
    for connection in connections:
        if (name := connection.name) in names:
            raise ConfigError(f"[[connection]] {name}: name is used twice; write for example {name}-2")
        names.add(name)
        if connection.is_practice and exchange_port is None:
            raise ConfigError(f"[[connection]] {name}: url practice needs the practice exchange; write [exchange]")
    _check_endpoints(connections, control, exchange_port)
    _check_repeats(connections, running)
    _check_topics([Placed(c.name, parse_channel(name)) for c in connections for name in c.channels], running)


def _check_endpoints(connections: Sequence[Connection], control: str, exchange_port: int | None) -> None:
    owners: dict[Endpoint, str] = {}
    if exchange_port:
        owners[Endpoint("tcp", "127.0.0.1", exchange_port)] = "port under [exchange]"
    claims = [("control under [collector]", "[collector]: control", control)] if control else []
    claims += [(f"publish of {c.name}", f"[[connection]] {c.name}: publish", c.publish) for c in connections]
    for who, where, text in claims:
        endpoint = parse_endpoint(text)
        if endpoint in owners:
            advice = "another path" if endpoint.scheme == "ipc" else "another port"
            raise ConfigError(f"{where} {endpoint} is also {owners[endpoint]}; write {advice}")
        if endpoint.is_fixed:  # else the system chooses one that is free
            owners[endpoint] = who


def _check_repeats(connections: Sequence[Connection], running: Container[str]) -> None:
    """What is written twice; patterns that meet in some instrument are found once they are expanded."""
    owners: dict[str, str] = {}
    for connection in connections:
        for name in (*connection.channels, *connection.patterns):
            if name in owners and connection.name not in running:
                place = "twice" if owners[name] == connection.name else f"in connection {owners[name]} too"
                raise ConfigError(f"[[connection]] {connection.name}: channels: {name} stands {place}; write it once")
            owners[name] = connection.name


def _check_topics(placed: list[Placed], running: Container[str]) -> None:
    places = Places()
    for here in placed:
        if here.owner not in running and (other := places.find_clash(here)):
            place = "" if other.owner == here.owner else f" of connection {other.owner}"
            raise ConfigError(
                f"[[connection]] {here.owner}: channels: {here.channel.name} would feed the same topics as "
                f"{other.channel.name}{place}; write one of them"
            )
        places.add(here)


class Places:
    """Channels in such order that those which feed a topic of another one are found without comparing each pair.

    Narrow ones feed one topic; wide ones those of a currency, or of any. There are few wide ones of one currency.
    """

    def __init__(self) -> None:
        self._topics: dict[str, list[Placed]] = defaultdict(list)  # of two, all but one are leaving
        self._narrow: dict[_Key, list[Placed]] = defaultdict(list)
        self._wide: dict[_Key, list[Placed]] = defaultdict(list)
        self._leaving: set[Placed] = set()

    def add(self, placed: Placed, is_leaving: bool = False) -> None:
        """Add a channel of a connection, which it may just be leaving."""
        channel = placed.channel
        if is_leaving:
            self._leaving.add(placed)
        else:
            self._leaving.discard(placed)
        if channel.topic is not None:
            self._topics[channel.topic].append(placed)
        index = self._wide if channel.topic is None else self._narrow
        for currency in (*_list_currencies(channel), _EACH):
            index[channel.type, channel.interval, currency].append(placed)

    def place(self, here: Placed) -> None:
        """Add a channel of a connection. Raises ValueError if another one would feed a topic of it too."""
        if other := self.find_clash(here):
            raise ValueError(f"{other.channel.name} of {other.owner} feeds the same topics")
        self.add(here)

    def find_clash(self, here: Placed) -> Placed | None:
        """One beside which a channel may not stand; what its connection is leaving is none: it is told in order."""
        for other in self.find(here.channel):
            is_left = other.owner == here.owner and other in self._leaving
            if other != here and not is_left and not _may_share(other, here):
                return other
        return None

    def find(self, channel: Channel) -> list[Placed]:
        """Those that feed a topic of the channel too."""
        near: list[Placed] = []
        if channel.topic is not None:
            near += self._topics.get(channel.topic, ())
        for currency in [_EACH] if channel.currency == "any" else [*_list_currencies(channel), "any"]:
            key = channel.type, channel.interval, currency
            near += self._wide.get(key, ())
            if channel.topic is None:
                near += self._narrow.get(key, ())
        return [each for each in dict.fromkeys(near) if share_topic(each.channel, channel)]  # some stand in two places


def _list_currencies(channel: Channel) -> frozenset[str]:
    """Under which currencies a channel may have rivals: all that have spot pairs may meet, whatever their own."""
    if channel.instrument:
        return guess_currencies(channel.instrument)
    return frozenset({channel.currency, "spot"} if channel.has_spot else {channel.currency})


def _may_share(one: Placed, other: Placed) -> bool:
    """Different events of one connection on one topic are numbered in one row, so they may stand together."""
    if one.owner != other.owner:
        return False
    if one.channel.type == "instrument":
        return one.channel.name.split(".")[1] != other.channel.name.split(".")[1]
    return one.channel.type == "platform" and one.channel.name != other.channel.name
