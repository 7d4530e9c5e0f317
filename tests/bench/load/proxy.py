"""A TCP proxy that holds back all that it passes on: the distance to an exchange, on one machine.

Connecting to it takes no time, so what a client waits for beyond that is whole round trips. It reports each
connection as it accepts it, and cuts all of them when it is told to.
"""

import asyncio
import time
from multiprocessing.connection import Connection
from typing import Any

from tests.bench.place import pin


class Proxy:
    """Passes connections on to one port of this machine; each read goes out `delay` seconds later, each way."""

    def __init__(self, pipe: Connection, port: int, delay: float) -> None:
        self.pipe = pipe
        self.port = port
        self.delay = delay
        self.writers: set[asyncio.StreamWriter] = set()

    async def run(self) -> None:
        """Serve until the process is ended."""
        server = await asyncio.start_server(self.carry, "127.0.0.1", 0)
        asyncio.get_running_loop().add_reader(self.pipe.fileno(), self.cut)
        self.report("listening", port=server.sockets[0].getsockname()[1])
        await server.serve_forever()

    def report(self, event: str, **facts: Any) -> None:
        """Tell the one who steers."""
        self.pipe.send((event, {"time": time.monotonic_ns(), **facts}))

    def cut(self) -> None:
        """Cut all connections at once, with what is on its way."""
        self.pipe.recv()
        self.report("cut")
        for writer in self.writers:
            writer.transport.abort()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection until either side ends it."""
        self.report("accepted")
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers |= {writer, far_writer}
        try:
            await asyncio.gather(self.pump(reader, far_writer), self.pump(far_reader, writer), return_exceptions=True)
        finally:
            self.writers -= {writer, far_writer}

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one direction."""
        loop = asyncio.get_running_loop()
        try:
            while data := await reader.read(1 << 16):
                loop.call_later(self.delay, pass_on, writer, data)
        finally:
            loop.call_later(self.delay, writer.close)


def pass_on(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Send what was held back, if there is still somebody to take it."""
    if not writer.is_closing():
        writer.write(data)


def serve(pipe: Connection, cpu: int | None, port: int, delay: float) -> None:
    """Entry of the process."""
    pin(cpu)
    asyncio.run(Proxy(pipe, port, delay).run())
