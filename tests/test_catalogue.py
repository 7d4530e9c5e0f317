"""The exchange's list: from the practice exchange as it is, and from servers that are not what they should be."""

import asyncio
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from collector import __version__
from collector.planning.catalogue import Catalogue, Unreachable
from tests.pipeline import exchange, find_port
from tests.support import Program, no_more_threads, running

RUDE = """
import socket, sys, time
kind, port = sys.argv[1], int(sys.argv[2])
answers = {
    "silence": b"", "garbage": b"\\x00\\xff" * 500, "html": b"HTTP/1.1 200 OK\\r\\nContent-Length: 6\\r\\n\\r\\n<html>",
    "deep": b"HTTP/1.0 200 OK\\r\\n\\r\\n" + b"[" * 200_000, "bytes": b"HTTP/1.0 200 OK\\r\\n\\r\\n\\xff\\xfe{",
    "empty": b'HTTP/1.0 200 OK\\r\\n\\r\\n{"result": []}', "null": b"HTTP/1.0 200 OK\\r\\n\\r\\nnull",
    "rows": b'HTTP/1.0 200 OK\\r\\n\\r\\n{"result": [1, {}, {"instrument_name": "a b"}, {"instrument_name": null}]}',
    "map": b'HTTP/1.0 200 OK\\r\\n\\r\\n{"result": {"instrument_name": "BTC-1"}}',
    "short": b'HTTP/1.1 200 OK\\r\\nContent-Length: 5000\\r\\n\\r\\n{"result": [',
    "moved": b"HTTP/1.0 301 Moved\\r\\nLocation: http://elsewhere/\\r\\n\\r\\n",
    "banned": b'HTTP/1.0 403 No\\r\\n\\r\\n{"error": {"code": 12005, "message": "ip_banned"}}',
    "endless": b'HTTP/1.0 200 OK\\r\\n\\r\\n' + b" " * (65 << 20), "trickle": b'HTTP/1.0 200 OK\\r\\n\\r\\n',
    "trickling headers": b'HTTP/1.0 200 OK\\r\\nX-Slow: ',
    "trickling chunks": b'HTTP/1.1 200 OK\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n5;slow=',
}
def trickle(peer):
    for _ in range(600):
        peer.sendall(b" ")
        time.sleep(0.05)
    print("all was taken", flush=True)

server = socket.create_server(("127.0.0.1", port))
print("listening", flush=True)
while True:
    peer, _ = server.accept()
    print(peer.recv(65536).decode(), flush=True)
    try:
        peer.sendall(answers[kind])
        if kind.startswith("trickl"):
            trickle(peer)
    except OSError:
        pass
    if kind != "silence":
        peer.close()
"""
"""A server that answers everything with the same bytes."""


@contextmanager
def rude(kind: str, **headers: str) -> Iterator[tuple[Catalogue, Program]]:
    port = find_port()
    with running(sys.executable, "-c", RUDE, kind, str(port)) as program:
        program.wait_line("listening")
        yield Catalogue(f"ws://127.0.0.1:{port}/ws/api/v2", headers, 0.5), program


ANSWERS = {
    "silence": "cannot be reached (timed out)",
    "garbage": "cannot be reached (",
    "html": "answered with HTTP 200 and no list",
    "deep": "answered with HTTP 200 and no list",
    "bytes": "answered with HTTP 200 and no list",
    "null": "answered with HTTP 200 and no list",
    "empty": "lists no instruments",
    "rows": "lists no instruments",
    "map": "lists no instruments",
    "short": "answered with HTTP 200 and no list",
    "moved": "answered with HTTP 301 and no list",
    "banned": "answered 12005 ip_banned",
    "endless": "cannot be reached (the answer had no end after",
    "trickle": "cannot be reached (the answer had no end after 0.5 s)",
    "trickling headers": "cannot be reached (the answer had no end after 0.5 s)",
    "trickling chunks": "cannot be reached (the answer had no end after 0.5 s)",
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_bad_answer_is_one_line_that_names_the_host(kind: str) -> None:
    with rude(kind) as (catalogue, program):
        if kind.startswith("trickl"):
            catalogue.max_seconds = 0.5  # the server goes on for 30 s
        with pytest.raises(Unreachable) as caught:
            catalogue.read_all()
        line = str(caught.value)
        assert line.startswith(f"{catalogue.host} ")
        assert ANSWERS[kind] in line
        assert line.isprintable()
        assert len(line) < 300
        assert "all was taken" not in program.out


@pytest.mark.parametrize(
    ("headers", "said"), [({}, f"User-Agent: deribit-collector/{__version__}"), ({"user-agent": "x"}, "user-agent: x")]
)
def test_it_says_who_asks(headers: dict[str, str], said: str) -> None:
    with rude("null", **headers) as (catalogue, program):
        with pytest.raises(Unreachable):
            catalogue.read_all()
        program.wait_line("Accept: application/json", stream="out")
        assert [line for line in program.out if "agent" in line.lower()] == [said]


def test_the_list_of_the_practice_exchange() -> None:
    port = find_port()
    with exchange(port, "--options", "100"):
        catalogue = Catalogue(f"ws://127.0.0.1:{port}/ws/api/v2?faults=mute", {"X-Desk": "7"}, 5.0)
        listed = catalogue.read_all()
        assert asyncio.run(catalogue.fetch()) == listed
        perpetual = listed["BTC-PERPETUAL"]
        assert (perpetual.kind, perpetual.expiry, perpetual.settlement, perpetual.state) == ("future", 0, "BTC", "open")
        options = [each for each in listed.values() if each.kind == "option"]
        assert len(options) == 100
        assert all(each.expiry and each.strike and each.option_type in ("call", "put") for each in options)


@pytest.mark.parametrize(
    "url",
    ["ws://127.0.0.1:9/ws/api/v2", "wss://127.0.0.1:9/ws/api/v2", f"ws://{'a' * 64}.invalid/", "wss://no.invalid/"],
)
def test_nobody_there_names_the_host(url: str) -> None:
    catalogue = Catalogue(url, {}, 1.0)
    with pytest.raises(Unreachable, match=r"(127.0.0.1:9|\.invalid) cannot be reached \("):
        catalogue.read_all()


def test_where_no_thread_can_be_started_another_attempt_may_help() -> None:
    catalogue = Catalogue("ws://127.0.0.1:9/", {}, 1.0)
    with no_more_threads(), pytest.raises(Unreachable, match="cannot be asked for"):
        asyncio.run(catalogue.fetch())
    with rude("null") as (listening, _), no_more_threads(), pytest.raises(Unreachable, match="cannot be reached"):
        listening.read_all()
    with pytest.raises(Unreachable, match="cannot be reached"):
        asyncio.run(catalogue.fetch())


@pytest.mark.parametrize("kind", ["banned", "empty"])
def test_who_asks_while_somebody_waits_shares_the_answer(kind: str) -> None:
    async def ask(catalogue: Catalogue) -> Sequence[object]:
        return await asyncio.gather(catalogue.share(), catalogue.share(), return_exceptions=True)

    with rude(kind) as (catalogue, program):
        for _ in range(2):
            assert [type(outcome) for outcome in asyncio.run(ask(catalogue))] == [Unreachable, Unreachable]
        program.end()
        assert len([line for line in program.out if line.startswith("GET ")]) == 2


def test_an_answer_that_fails_when_nobody_waits_for_it_any_more_is_no_fault() -> None:
    said: list[object] = []

    async def ask(catalogue: Catalogue) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
        waiting = asyncio.create_task(catalogue.share())
        await asyncio.sleep(0)
        waiting.cancel()
        assert catalogue._sharing is not None
        await asyncio.wait((catalogue._sharing,))
        catalogue._sharing = None
        gc.collect()  # a task that nobody has asked for its error says so when it goes

    with rude("silence") as (catalogue, program):
        asyncio.run(ask(catalogue))
        program.wait_line("GET ")
    assert not said


def test_it_knows_the_exchanges_clock() -> None:
    port = find_port()
    with exchange(port, "--faults", "clock:-86400000"):
        catalogue = Catalogue(f"ws://127.0.0.1:{port}/ws/api/v2", {}, 5.0)
        assert abs(catalogue.read_ms() / 1000 - time.time()) < 3600
        catalogue.read_all()
        assert abs(catalogue.read_ms() / 1000 + 86_400 - time.time()) < 3600
