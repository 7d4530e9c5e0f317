"""What a configuration would do at the exchange, and what that costs there. Pure: no I/O, no clock."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from msgspec import Struct

from collector.channels import LISTINGS, parse_channel
from collector.config import Config, Connection, Credentials, check_together
from collector.config.clashes import Placed, Places
from collector.config.keys import within
from collector.config.patterns import Instrument
from collector.config.urls import name_host
from collector.limits import (
    CALL_BURST,
    CALL_COST,
    CALL_REFILL,
    MAX_CONNECTIONS,
    SUBSCRIBE_BURST,
    SUBSCRIBE_COST,
    chunk_channels,
    estimate_seconds,
    measure_call,
)  # fmt: skip
from collector.planning.shards import Spread, estimate_rate, spread
from collector.words import say_count

BOOTSTRAP = ("public/hello", "public/set_heartbeat", "public/get_time")
"""Calls of each bootstrap besides subscribing."""


class Call(Struct, frozen=True):
    """One subscribe call: how many channels, and bytes of JSON."""

    method: str
    channels: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Listing:
    """What is known of the instruments of the exchanges: by URL, or why not; `now` is in ms."""

    now: int = 0
    listed: Mapping[str, Mapping[str, Instrument]] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)


class PlannedPattern(Struct, frozen=True):
    """One pattern: how many channels it stands for, None while unknown."""

    connection: str
    pattern: str
    channels: int | None


class PlannedConnection(Struct, frozen=True):
    """One worker. `types` counts its channels by the type of message; `rate` is messages a second in a quiet market."""

    name: str
    url: str
    publish: str
    login: str
    channels: tuple[str, ...]
    types: dict[str, int]
    rate: float
    bootstrap: tuple[str, ...]
    calls: tuple[Call, ...]
    seconds: float


class Pool(Struct, frozen=True):
    """Connections that draw on the same credits, and the seconds until all of them are subscribed."""

    host: str
    login: str
    connections: tuple[str, ...]
    calls: int
    seconds: float


class Plan(Struct, frozen=True):
    """The whole: `notes` say what works, but may surprise."""

    path: str
    runtime_dir: str
    control: str
    exchange: str
    patterns: tuple[PlannedPattern, ...]
    connections: tuple[PlannedConnection, ...]
    pools: tuple[Pool, ...]
    connections_limit: int
    notes: tuple[str, ...]


def make_plan(config: Config, listing: Listing = Listing()) -> Plan:
    """Work out what a checked configuration would do. Raises ConfigError for what only shows in expanded patterns."""
    with within(str(config.path)):
        expanded = _expand(config, listing)
        shards = [shard for _, found in expanded for shard in found.shards]
        check_together(shards, config.control, config.exchange.port if config.exchange else None)
    patterns = tuple(
        PlannedPattern(connection.name, pattern, found.found.get(pattern))
        for connection, found in expanded for pattern in connection.patterns
    )  # fmt: skip
    connections = tuple(
        _plan_connection(shard, LISTINGS if connection.patterns else ())
        for connection, found in expanded for shard in found.shards
    )  # fmt: skip
    pools = tuple(_plan_pools(connections, config.secrets))
    notes = _find_notes(connections, pools, {each.connection for each in patterns})
    return Plan(
        path=str(config.path),
        runtime_dir=str(config.runtime_dir),
        control=config.control,
        exchange=f"127.0.0.1:{config.exchange.port or '*'}" if config.exchange else "",
        patterns=patterns,
        connections=connections,
        pools=pools,
        connections_limit=MAX_CONNECTIONS,
        notes=(*_find_unexpanded(config, listing), *_find_left(expanded), *notes),
    )


def _expand(config: Config, listing: Listing) -> list[tuple[Connection, Spread]]:
    """What runs in the place of each connection: itself, where it has no patterns or the exchange's list is not known.

    What another connection names is left to it. Patterns that meet, or meet a channel of many instruments, stay as they
    are, and so are refused: a running collector leaves that to who had it first, but the file can say what is meant.
    """
    named = Places()
    for connection in config.connections:
        for channel in map(parse_channel, connection.channels):
            if channel.topic is not None:
                named.add(Placed(connection.name, channel))
    return [(connection, _spread(connection, listing, named)) for connection in config.connections]


def _spread(connection: Connection, listing: Listing, named: Places) -> Spread:
    listed = listing.listed.get(connection.url)
    if not connection.patterns or listed is None:
        return Spread({}, [connection], set())
    return spread(connection, listed, listing.now, named)


def _find_unexpanded(config: Config, listing: Listing) -> Iterator[str]:
    for connection in config.connections:
        if connection.patterns and connection.url not in listing.listed:
            why = listing.failures.get(connection.url) or "the practice exchange starts with the collector"
            yield f"{connection.name} stays unexpanded: {why}"


def _find_left(expanded: Iterable[tuple[Connection, Spread]]) -> Iterator[str]:
    for connection, found in expanded:
        if found.left:
            some = " ".join(sorted(found.left)[:5])
            yield f"{connection.name} leaves to others what they name, {say_count(len(found.left), 'channel')}: {some}"


def _plan_connection(connection: Connection, besides: tuple[str, ...]) -> PlannedConnection:
    """Plan one connection, which asks for some channels `besides` its own."""
    calls = tuple(plan_calls(dict.fromkeys([*connection.channels, *besides])))
    return PlannedConnection(
        name=connection.name,
        url=connection.url,
        publish=connection.publish,
        login=connection.credentials or "",
        channels=connection.channels,
        types=Counter(parse_channel(name).type for name in connection.channels),
        rate=round(sum(map(estimate_rate, connection.channels)), 1),
        bootstrap=_list_bootstrap(connection),
        calls=calls,
        seconds=estimate_seconds(len(calls)),
    )


def plan_calls(channels: Iterable[str]) -> Iterable[Call]:
    """Cut channels into the subscribe calls that ask for them: before the login for those that need none."""
    groups: dict[tuple[bool, str], list[str]] = {
        (False, "public/subscribe"): [], (True, "public/subscribe"): [], (True, "private/subscribe"): [],
    }  # fmt: skip
    for name in channels:
        channel = parse_channel(name)
        groups[channel.needs_login, "private/subscribe" if channel.is_private else "public/subscribe"].append(name)
    for (_, method), names in groups.items():
        for chunk in chunk_channels(names, method):
            yield Call(method, len(chunk), measure_call(chunk, method))


def _list_bootstrap(connection: Connection) -> tuple[str, ...]:
    login = ("public/auth",) if connection.credentials else ()
    cancel = ("private/enable_cancel_on_disconnect",) if connection.cancel_on_disconnect else ()
    return (*login, *BOOTSTRAP, *cancel)


def _plan_pools(connections: Iterable[PlannedConnection], secrets: Mapping[str, Credentials]) -> Iterable[Pool]:
    members: dict[tuple[str, str], list[PlannedConnection]] = defaultdict(list)
    for connection in connections:
        client_id = secrets[connection.login].client_id if connection.login else ""
        members[name_host(connection.url), client_id].append(connection)
    for (host, _), group in members.items():
        login = ", ".join(dict.fromkeys(connection.login for connection in group))
        calls = sum(len(connection.calls) for connection in group)
        others = sum(len(connection.bootstrap) for connection in group)
        seconds = max(estimate_seconds(calls), estimate_seconds(others, CALL_COST, CALL_BURST, CALL_REFILL))
        yield Pool(host, login, tuple(connection.name for connection in group), calls, seconds)


def _find_notes(
    connections: tuple[PlannedConnection, ...], pools: tuple[Pool, ...], patterned: set[str]
) -> Iterable[str]:
    if len(connections) == MAX_CONNECTIONS:
        yield f"all {MAX_CONNECTIONS} connections are used: none is left for REST requests or a browser on this address"
    for connection in connections:
        if not connection.channels and connection.name not in patterned:
            yield f"{connection.name} has no channels until control subscribes it to some"
    for pool in pools:
        if pool.calls * SUBSCRIBE_COST > SUBSCRIBE_BURST and len(pool.connections) > 1:
            yield (
                f"{len(pool.connections)} connections share one pool of credits at {pool.host}: of {pool.calls} "
                f"subscribe calls {SUBSCRIBE_BURST // SUBSCRIBE_COST} go at once, the rest in turn"
            )
        if not pool.login and pool.host != "practice":
            yield f"{pool.host} without login: what it allows an address is unpublished; reckoned as for an account"
