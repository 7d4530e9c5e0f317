"""A worker's life, rehearsed once in the forkserver when this module is loaded.

Python fills caches when code runs first, and each worker would fill its own: written to, a page is shared no more.
What has run before the fork stays shared (measured: 9.6 -> 8.8 MB an idle worker), as does what OpenSSL keeps of the
certificates that are trusted (0.5 MB over TLS). No other process is concerned.
"""

import asyncio
import logging
import os
import socket
import tempfile
from contextlib import suppress
from typing import Any

from collector.lifecycle import Exit
from collector.log import start_log
from workers.actor import new_event_loop
from workers.deribit.connection.socket import read_certificates
from workers.deribit.worker import create_worker


def rehearse() -> Exit:
    """Let a worker try to connect to a port on which nobody listens; it gives up.

    Nothing of it is left but libuv's threads, idle: uvloop resolves by them even an address. Libuv starts its own anew
    in each process that is forked.
    """
    with tempfile.TemporaryDirectory() as directory, socket.socket() as nobody, open(os.devnull, "wb") as nowhere:
        nobody.bind(("127.0.0.1", 0))
        start_log("rehearsal", "info", nowhere.fileno())
        spec = build_spec(f"ws://127.0.0.1:{nobody.getsockname()[1]}", directory)
        try:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                return runner.run(live(spec))
        finally:
            logging.basicConfig(force=True, handlers=[], level=logging.WARNING)


def build_spec(url: str, directory: str) -> dict[str, Any]:
    """The spec of a worker that makes one attempt."""
    connection = {
        "url": url, "headers": {}, "timeout": 1.0, "retry_count": 1, "retry_delay": 0.1, "heartbeat_interval": 30.0,
        "cancel_on_disconnect": False, "publish": f"ipc://{directory}/publish", "queue": 1000,
    }  # fmt: skip
    return {
        "name": "rehearsal", "epoch": 1, "fresh": True, "runtime_dir": directory, "scheduling": "normal",
        "read_pause": 0.0, "channels": ["book.BTC-PERPETUAL.100ms"], "connection": connection,
    }  # fmt: skip


async def live(spec: dict[str, Any]) -> Exit:
    """The whole life of one worker."""
    worker = create_worker(spec)
    await worker.start()
    return await worker.run()


with suppress(Exception):  # workers can do without
    rehearse()
    read_certificates()
