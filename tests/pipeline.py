"""The whole way as separate programs: an exchange, a running collector, and a subscriber on a real socket."""

import json
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgpack
import zmq

from collector.client.verify import Finding, Verifier
from collector.messages import decode_reply, encode
from tests.support import PATIENCE, Program, collector, running


@contextmanager
def short_directory() -> Iterator[Path]:
    """A directory whose path leaves room for the names of Unix sockets in it."""
    path = Path(tempfile.mkdtemp(prefix="c-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def find_port() -> int:
    """A TCP port of this machine that is free just now, as are the next three: those that shards would take.

    It lies below those that the system gives to connections, which come and go.
    """
    while True:
        port = secrets.choice(range(12_000, 32_000))
        with suppress(OSError), ExitStack() as probes:
            for each in range(port, port + 4):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", each))
            return port


def write_config(directory: Path, connections: dict[str, dict[str, Any]], **sections: dict[str, Any]) -> Path:
    """Write a configuration: connections by name, and other tables; return its path."""
    own = {"runtime_dir": str(directory / "run"), **sections.pop("collector", {})}
    tables = [("[collector]", own)]
    tables += [(f"[{name}]", table) for name, table in sections.items()]
    tables += [("[[connection]]", {"name": name, **table}) for name, table in connections.items()]
    # JSON's strings, numbers, booleans and lists are TOML's as well.
    lines = [
        "\n".join([head, *(f"{key} = {json.dumps(value)}" for key, value in table.items())]) for head, table in tables
    ]
    path = directory / "collector.toml"
    path.write_text("\n\n".join(lines) + "\n")
    return path


class Subscriber:
    """A SUB socket that takes everything; `messages` holds (topic, payload) in the order received.

    `findings` are the rules of the wire that they break.
    """

    def __init__(self, *endpoints: str) -> None:
        self.messages: list[tuple[str, dict[str, Any]]] = []
        self.findings: list[Finding] = []
        self._verifier = Verifier()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 10)
        self._socket.subscribe(b"")
        for endpoint in endpoints:
            self._socket.connect(endpoint)

    def listen_until(self, fact: Callable[[], Any], what: str, timeout: float = PATIENCE) -> Any:
        """Receive until fact() is true, and return it; fail with `what` if it does not become true."""
        end = time.monotonic() + timeout
        while not (value := fact()):
            assert time.monotonic() < end, f"waited {timeout:.0f} s in vain for {what}; {len(self.messages)} messages"
            if self._socket.poll(100):
                self.messages.append(self._receive())
        return value

    def _receive(self) -> tuple[str, dict[str, Any]]:
        topic, payload = self._socket.recv_multipart()
        self.findings += self._verifier.check(topic, payload, now_ns=time.time_ns())
        return topic.decode(), msgpack.unpackb(payload, strict_map_key=True)

    def check(self, *broken: str) -> None:
        """No rule of the wire is broken, but for those that what the exchange sends breaks.

        Heartbeats may come late on a busy machine.
        """
        found = [each for each in self.findings if each.rule not in ("heartbeat", *broken)]
        assert not found, found

    def find(self, prefix: str, **keys: Any) -> list[dict[str, Any]]:
        """The payloads received on topics of a prefix, whose keys have the given values."""
        return [
            payload
            for topic, payload in self.messages
            if topic.startswith(prefix) and all(payload.get(key) == value for key, value in keys.items())
        ]

    def wait_for(self, prefix: str, timeout: float = PATIENCE, **keys: Any) -> dict[str, Any]:
        """Receive until such a message is among those received; return the first."""
        found = self.listen_until(lambda: self.find(prefix, **keys), f"{prefix} with {keys}", timeout)
        return dict(found[0])

    def close(self) -> None:
        self._context.destroy(linger=0)


@contextmanager
def subscribed(*endpoints: str) -> Iterator[Subscriber]:
    """Subscribe for the length of a `with` block."""
    subscriber = Subscriber(*endpoints)
    try:
        yield subscriber
    finally:
        subscriber.close()


@contextmanager
def exchange(port: int, *options: str) -> Iterator[Program]:
    """Run the practice exchange on a port until the end of the block; it listens when this begins."""
    with running(*collector("exchange", "--port", str(port), *options)) as program:
        program.wait_line(rf"^listening on \S+:{port}/", stream="out")
        yield program


def ask(control: str, op: str, **arguments: Any) -> Any:
    """Make one control request; return the result. Raises ControlError if it is refused."""
    context = zmq.Context()
    try:
        requester = context.socket(zmq.REQ)
        requester.setsockopt(zmq.RCVTIMEO, 10_000)
        requester.connect(control)
        requester.send(encode({"op": op, **arguments}))
        return decode_reply(requester.recv())
    finally:
        context.destroy(linger=0)
