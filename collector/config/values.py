"""What a configuration is once it has been read: typed, frozen values."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from collector.config.credentials import Credentials
from collector.config.urls import PRACTICE


@dataclass(frozen=True, slots=True)
class Connection:
    """One [[connection]] table: one worker process, one WebSocket. Times are in seconds.

    `channels` are those that the file names one by one; `patterns` stand for more (see collector.config.patterns).
    """

    name: str
    url: str
    channels: tuple[str, ...]
    publish: str
    headers: Mapping[str, str]
    timeout: float
    retry_count: int
    retry_delay: float
    heartbeat_interval: float
    credentials: str | None
    cancel_on_disconnect: bool
    send_allow: tuple[str, ...]
    queue: int
    patterns: tuple[str, ...]

    def to_map(self) -> dict[str, Any]:
        """Return it as a plain dict, as it stands in the file and travels to a worker."""
        table = {**asdict(self), "channels": [*self.channels, *self.patterns], "send_allow": list(self.send_allow)}
        del table["patterns"]
        return table

    @property
    def is_practice(self) -> bool:
        """Whether it goes to the practice exchange of [exchange]."""
        return self.url.partition("?")[0] == PRACTICE


@dataclass(frozen=True, slots=True)
class Exchange:
    """The [exchange] table: the practice exchange that the supervisor runs too. Port 0 is any free one."""

    port: int
    faults: str


@dataclass(frozen=True, slots=True)
class Config:
    """One configuration file and the secrets of the environment, checked."""

    path: Path
    runtime_dir: Path
    control: str
    scheduling: str
    read_pause: float
    exchange: Exchange | None
    connections: tuple[Connection, ...]
    secrets: Mapping[str, Credentials] = field(repr=False)
