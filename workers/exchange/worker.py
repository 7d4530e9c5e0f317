"""The practice exchange as a worker process: reads the spec, serves until it is asked to stop."""

import asyncio
import os
import time
from typing import Any

from collector.lifecycle import Exit
from collector.messages import ControlError
from workers.exchange.exchange import Exchange, Settings
from workers.exchange.protocol.auth import read_keys
from workers.exchange.replay import read_recording
from workers.exchange.server import Server

KEYS = "PRACTICE_KEYS"
"""Environment variable with the accepted keys, `id:secret,id:secret`; unset: practice:practice."""


class ExchangeWorker:
    """One life of the exchange."""

    def __init__(self, settings: Settings) -> None:
        self.server = Server(Exchange(settings, int(time.time() * 1000)))
        self.news = asyncio.Event()
        self._stopped = asyncio.Event()

    async def start(self) -> dict[str, Any]:
        """Bind; return the URL that clients connect to. Raises OSError if the port is taken."""
        await self.server.start()
        return {"url": self.server.url}

    async def run(self) -> Exit:
        """Serve until stopped."""
        await self.server.run(self._stopped)
        return Exit.STOPPED

    def report(self) -> dict[str, Any]:
        """Say how many connections there are, and have been."""
        return {"state": "live", "connections": self.server.connections, "opened": self.server.exchange.opened}

    def take_events(self) -> list[dict[str, Any]]:
        """Tell the supervisor of nothing."""
        return []

    async def answer(self, op: str, arguments: dict[str, Any]) -> Any:
        """Answer get_state; the exchange has no other ops."""
        if op == "get_state":
            return self.report()
        raise ControlError("unknown_op", f"the practice exchange has no op {op[:40]!r}")

    def stop(self) -> None:
        """Ask it to stop."""
        self._stopped.set()


def create_worker(spec: dict[str, Any]) -> ExchangeWorker:
    """Make the worker of a spec: port, faults, and optionally what else `Settings` has, and `replay` (paths).

    Raises ValueError for unknown faults or recordings, OSError for unreadable files.
    """
    names = ("host", "port", "faults", "seed", "rate", "options", "oracle", "speed", "own_credits", "certificate")
    recording = tuple(frame for path in spec.get("replay") or () for frame in read_recording(path))
    given = {name: spec[name] for name in names if spec.get(name) is not None}
    return ExchangeWorker(Settings(**given, recording=recording, keys=read_keys(os.environ.get(KEYS, ""))))
