"""One connection's channels spread over as many connections as they need, evenly by expected rate. No I/O, no clock.

An instrument's channels stay together, and the instrument keeps its place when others come and go: each one has an
order of preference by a hash of its name, and takes the first place that still has room.
"""

from collections.abc import Mapping
from dataclasses import replace
from hashlib import blake2b
from itertools import chain
from math import ceil
from pathlib import PurePath
from typing import NamedTuple

from collector.channels import guess_kind, parse_channel
from collector.config import Connection
from collector.config.clashes import Places
from collector.config.endpoints import parse_endpoint
from collector.config.keys import ConfigError
from collector.config.patterns import Instrument, expand
from collector.limits import MAX_CHANNELS, MAX_CONNECTIONS

MAX_RATE = 500.0
"""Expected messages a second in a quiet market that one connection should carry: bursts are tens of times that, and
what a worker takes is some 100,000."""

SLACK = 1.1
"""How far above the even share a connection may come, so that instruments can keep their places."""

RATES = {
    "book": 1.3, "ticker": 1.2, "quote": 5.0, "trade": 0.2, "funding": 1.6, "candle": 0.2, "index": 1.0,
    "volatility": 1.0, "expiration_price": 1.0, "mark_prices": 1.0, "instrument": 0.1, "platform": 2.6,
}  # fmt: skip
"""Messages a second on one 100ms channel of a perpetual. Measured in production, quiet, September 2026, the median of
131 perpetuals for books; trades, quotes and tickers between those of BTC_USDC and ALGO_USDC."""

KIND_SHARES = {"future": 0.5, "option": 0.1, "spot": 0.5, "future_combo": 0.1, "option_combo": 0.05}
"""What other kinds send beside a perpetual: estimates, for balance only."""

INTERVAL_SHARES = {"raw": 3.0, "agg2": 0.4}
"""What other intervals send beside 100ms; agg2 is measured, raw is an estimate."""


def estimate_rate(name: str) -> float:
    """Expected messages a second on a channel."""
    channel = parse_channel(name)
    rate = RATES.get(channel.type, 0.1)
    if channel.type == "trade" and not channel.instrument:
        return rate * 25
    if channel.type in ("quote", "book", "ticker", "trade", "candle") and "PERPETUAL" not in channel.instrument:
        rate *= KIND_SHARES[guess_kind(channel.instrument)]
    return rate * (INTERVAL_SHARES.get(channel.interval, 1.0) if channel.type in ("book", "ticker", "trade") else 1.0)


class Weight(NamedTuple):
    """What one instrument brings: messages a second and channels."""

    rate: float
    channels: int


class Spread(NamedTuple):
    """A connection expanded: `found` counts each pattern's channels; `shards` run in its place, without patterns.

    `left` are the channels that its patterns stand for too, and that are left to other connections.
    """

    found: dict[str, int]
    shards: list[Connection]
    left: set[str]


def spread(connection: Connection, listed: Mapping[str, Instrument], now: int, taken: Places) -> Spread:
    """Expand a connection's patterns over the instruments listed at `now` (ms), over one or more connections.

    What would feed a topic of what other connections have `taken` is left to these. Raises ConfigError if more
    connections are needed than the exchange allows, or an endpoint cannot be had.
    """
    expanded = expand(connection.patterns, listed, now)
    left = {
        name for name in set(chain(*expanded.values())) - set(connection.channels)
        if any(owner != connection.name for owner, _ in taken.find(parse_channel(name)))
    }  # fmt: skip
    found = {pattern: len(channels.keys() - left) for pattern, channels in expanded.items()}
    channels = [name for name in dict.fromkeys(chain(connection.channels, *expanded.values())) if name not in left]
    weights = weigh(channels)
    count = count_shards(weights)
    if count == 1:
        return Spread(found, [replace(connection, channels=tuple(channels), patterns=())], left)
    if count > MAX_CONNECTIONS:
        raise ConfigError(
            f"[[connection]] {connection.name}: channels: {len(channels)} channels need {count} connections, Deribit "
            f"takes {MAX_CONNECTIONS} from one address; narrow the patterns"
        )
    places = assign(weights, count, {})
    shares: list[list[str]] = [[] for _ in range(count)]
    for name in channels:
        shares[places[find_unit(name)]].append(name)
    return Spread(found, [_make_shard(connection, number, share) for number, share in enumerate(shares, 1)], left)


def find_unit(channel: str) -> str:
    """What keeps its place as a whole: an instrument, or a channel that stands for no single one."""
    return parse_channel(channel).instrument or channel


def weigh(channels: list[str]) -> dict[str, Weight]:
    """What each instrument among the channels brings."""
    weights: dict[str, Weight] = {}
    for name in channels:
        before = weights.get(find_unit(name), Weight(0.0, 0))
        weights[find_unit(name)] = Weight(before.rate + estimate_rate(name), before.channels + 1)
    return weights


def count_shards(weights: Mapping[str, Weight]) -> int:
    """How many connections are needed; those that the exchange allows may be fuller than others."""
    part = max(
        sum(weight.channels for weight in weights.values()) / MAX_CHANNELS,
        sum(weight.rate for weight in weights.values()) / MAX_RATE,
    )
    return 1 if part <= 1 else max(ceil(part), min(ceil(part * SLACK), MAX_CONNECTIONS))


def assign(weights: Mapping[str, Weight], count: int, held: Mapping[str, int]) -> dict[str, int]:
    """Give each instrument a place (0, 1, ... `count` - 1); those in `held` keep theirs."""
    rates, channels = [0.0] * count, [0] * count
    places: dict[str, int] = {}

    def put(name: str, place: int) -> None:
        places[name] = place
        rates[place] += weights[name].rate
        channels[place] += weights[name].channels

    for name in weights.keys() & held.keys():
        put(name, held[name])
    most_rate = SLACK * sum(weight.rate for weight in weights.values()) / count
    most_channels = SLACK * sum(weight.channels for weight in weights.values()) / count
    for name in sorted(weights.keys() - held.keys(), key=lambda name: (-weights[name].rate, name)):
        rate, number = weights[name]
        roomy = [p for p in range(count) if rates[p] + rate <= most_rate and channels[p] + number <= most_channels]
        emptiest = min(range(count), key=lambda place: (rates[place], place))
        put(name, next((place for place in prefer(name, count) if place in roomy), emptiest))
    return places


def prefer(name: str, count: int) -> list[int]:
    """The places in the order that a name prefers them: by hash, so that it depends on nothing else."""
    digest = blake2b(name.encode(), digest_size=2 * MAX_CONNECTIONS).digest()
    return sorted(range(count), key=lambda place: digest[2 * place : 2 * place + 2])


def _make_shard(connection: Connection, number: int, channels: list[str]) -> Connection:
    name = f"{connection.name}-{number}"
    try:
        publish = str(parse_endpoint(shift_endpoint(connection.publish, number)))
    except ValueError as error:
        raise ConfigError(f"[[connection]] {name}: publish {error}") from None
    return replace(connection, name=name, publish=publish, channels=tuple(channels), patterns=())


def shift_endpoint(text: str, number: int) -> str:
    """Where shard `number` publishes: the following tcp ports, or NAME-1.pub, NAME-2.pub ..."""
    endpoint = parse_endpoint(text)
    if endpoint.scheme == "tcp":
        return f"tcp://{endpoint.place}:{endpoint.port + number - 1 if endpoint.port else '*'}"
    path = PurePath(endpoint.place)
    return f"ipc://{path.with_name(f'{path.stem}-{number}{path.suffix}')}"
