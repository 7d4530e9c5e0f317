"""Subscribers in other languages, on other implementations of ZeroMQ, against a running collector.

Each folder beside this file is one small program. make interop builds it in build/interop, with the very libraries that
its lock file names. A language whose tools are not on this machine is skipped.
"""

import json
import os
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import pytest

from tests.collected import collected
from tests.pipeline import exchange, find_port, subscribed
from tests.support import REPOSITORY, Program, running, wait_until
from workers.deribit.publishing.pub import PubSocket, Route

pytestmark = [
    pytest.mark.skipif(not os.environ.get("COLLECTOR_INTEROP"), reason="COLLECTOR_INTEROP is not set"),
    pytest.mark.timeout(900),  # the first build of each language fetches its libraries and compiles them
]


class Language(NamedTuple):
    """What must be installed for it, how to build, and what to run."""

    tool: str
    build: str
    run: str


LANGUAGES = {
    "go": Language("go", "go build -o subscribe .", "./subscribe"),
    "rust": Language("cargo", "cargo build --quiet --locked", "target/debug/subscribe"),
    "java": Language(
        "mvn", "mvn -q -B package dependency:copy-dependencies", "java -cp target/classes:target/dependency/* Subscribe"
    ),
    "node": Language("npm", "npm ci", "node subscribe.mjs"),
}

TRADES = "deribit.trade."
BOOK = "deribit.book.BTC-PERPETUAL.100ms"
MARKS = "deribit.mark_prices.btc_usd.raw"
CHANNELS = [
    "trades.BTC-PERPETUAL.100ms", "trades.ETH-PERPETUAL.100ms", "ticker.BTC-PERPETUAL.100ms",
    "book.BTC-PERPETUAL.100ms", "book.ETH-PERPETUAL.100ms", "markprice.options.btc_usd",
]  # fmt: skip

Message = tuple[str, dict[str, Any]]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A practice exchange that is busy, and has many options: their mark prices make long messages."""
    with exchange(find_port(), "--rate", "1500", "--options", "2000") as program:
        yield program.wait_line(r"ws://\S+/ws/api/v2")[0]


def build(name: str) -> Path:
    """Build a language's program, which takes no time if nothing has changed; return the directory to run it in."""
    if shutil.which(LANGUAGES[name].tool) is None:
        pytest.skip(f"there is no {LANGUAGES[name].tool} on this machine")
    place = REPOSITORY / "build" / "interop" / name
    shutil.copytree(Path(__file__).with_name(name), place, dirs_exist_ok=True)
    subprocess.run(LANGUAGES[name].build.split(), cwd=place, check=True)
    return place


@contextmanager
def subscribing(name: str, endpoint: str, *prefixes: str) -> Iterator[Program]:
    """Run a language's program: the later prefixes it asks for after 100 messages, the first it gives up after 200."""
    with running(*LANGUAGES[name].run.split(), endpoint, *prefixes, cwd=build(name)) as program:
        yield program


def parse(lines: list[str]) -> list[Message]:
    """What a program has printed: topics and messages."""
    parts = [line.split(" ", 1) for line in lines]
    return [(topic, json.loads(text)) for topic, text in parts]


def find_holes(messages: list[Message]) -> list[Message]:
    """Those whose seq does not follow on the one before on the same topic, in the same epoch."""
    last: dict[tuple[str, int], int] = {}
    holes = []
    for topic, message in messages:
        life, seq = (topic, message["epoch"]), message["seq"]
        if life in last and seq != last[life] + (not message.get("join")):
            holes.append((topic, message))
        last[life] = seq
    return holes


def find_types(messages: list[Message], **keys: Any) -> dict[str, set[str]]:
    """By topic, the types of those messages whose keys have the given values."""
    types = defaultdict(set)
    for topic, message in messages:
        if all(message.get(key) == value for key, value in keys.items()):
            types[topic].add(message["type"])
    return types


@pytest.mark.parametrize(
    ("language", "scheme"),
    [(name, scheme) for name in LANGUAGES for scheme in ("tcp", "ipc") if (name, scheme) != ("java", "ipc")],
)
def test_it_reads_what_it_wants_whole_and_reads_on_after_a_restart(language: str, scheme: str, url: str) -> None:
    """The ipc of JeroMQ is TCP by another name, for itself only."""
    build(language)  # which may take minutes: the reference would have to catch up with all that comes meanwhile
    connection = {"url": url, "retry_delay": 0.05, "channels": CHANNELS}
    if scheme == "tcp":
        connection["publish"] = f"tcp://127.0.0.1:{find_port()}"
    with collected({"a": connection}, exchange=None) as collector:
        endpoint = collector.wait_state("a")["publish"]
        assert endpoint.startswith(scheme)
        with subscribed(endpoint) as reference:
            reference.wait_for(BOOK)
            with subscribing(language, endpoint, TRADES, BOOK, MARKS) as program:

                def wait_for(fact: Callable[[], bool], what: str) -> list[Message]:
                    """All that it has printed once something is so; the reference listens meanwhile."""
                    reference.listen_until(lambda: fact() or program.process.poll() is not None, what)
                    assert program.process.poll() is None, program.text()[-4000:]
                    return parse(list(program.out))

                heard = wait_for(lambda: len(program.out) >= 300, "300 messages")
                wait_for(lambda: heard[-1] in reference.messages, "the reference to get the last of them too")
                assert [each for each in heard if each not in reference.messages] == []
                assert all(topic.startswith(TRADES) for topic, _ in heard[:100])
                assert {topic for topic, _ in heard if not topic.startswith(TRADES)} == {BOOK, MARKS}
                assert find_holes(heard) == []
                joins = find_types(heard, join=True)
                assert joins[f"{TRADES}BTC-PERPETUAL.100ms"] == {"status"}
                assert joins[BOOK] == {"status", "book"}
                assert joins[MARKS] == {"status", "mark_prices"}
                sizes = [len(msgpack.packb(message)) for _, message in heard]
                assert min(sizes) < 256
                assert max(sizes) > 8192
                wait_for(
                    lambda: not any(line.startswith(TRADES) for line in program.out[-20:]),
                    "the end of what it has given up",
                )

                count, epoch = len(program.out), heard[0][1]["epoch"]
                collector.find_process("a").kill()

                def find_new() -> dict[str, set[str]]:
                    new = [each for each in parse(program.out[count:]) if each[1]["epoch"] > epoch]
                    return find_types(new)

                heard = wait_for(
                    lambda: "book" in find_new()[BOOK] and "mark_prices" in find_new()[MARKS],
                    "data from the worker's successor",
                )
                assert set(find_new()) == {BOOK, MARKS}
                assert find_holes(heard) == []
                assert set(find_types(heard, type="gap", reason="restart")) == {BOOK, MARKS}
        assert "is no subscriber" not in collector.program.text()


@pytest.mark.parametrize("language", ["go", "rust", "java"])
def test_thousands_of_prefixes_are_asked_for_also_when_it_comes_back(language: str) -> None:
    """Subscriber on Node drops those beyond 1,000, as libzmq does unless its queue is told to have no end."""
    count = 5000
    prefixes = [f"deribit.ticker.BTC-{number}." for number in range(count)]
    with publishing() as (pub, endpoint), subscribing(language, endpoint, "a", *prefixes):
        serve(pub, 1)
        pub.send([(Route(b"a"), msgpack.packb({"seq": number})) for number in range(100)])
        serve(pub, 1 + count)
        pub._leave(pub._peers[0])
        assert pub.subscriptions == 0
        serve(pub, 1 + count)


@contextmanager
def publishing() -> Iterator[tuple[PubSocket, str]]:
    pub = PubSocket(0)
    try:
        yield pub, pub.bind("tcp://127.0.0.1:*")
    finally:
        pub.close(0.0)


def serve(pub: PubSocket, subscriptions: int) -> None:
    """Let it subscribe, until there are so many."""

    def look() -> bool:
        pub.poll()
        return pub.subscriptions == subscriptions

    wait_until(look, f"{subscriptions} subscriptions")
