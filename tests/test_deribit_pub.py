"""The PUB socket: what ZeroMQ's own subscribers see of it, and what becomes of those that are slow, wrong or gone."""

import errno
import fcntl
import logging
import os
import resource
import select
import socket
import sys
import termios
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils.monitor import recv_monitor_message

from tests.pipeline import short_directory
from tests.support import running, wait_until
from workers.deribit.publishing.peer import BLOCK, MAX_LENGTH, MAX_PREFIXES, MAX_UNSENT, Peer
from workers.deribit.publishing.pub import HEAR_AT_ONCE, RESERVE, PubSocket, Route
from workers.deribit.publishing.zmtp import (
    GREETING,
    MAX_HEARD,
    READY,
    SIGNATURE,
    WRONG_TYPE,
    Conversation,
    NoSubscriber,
    Wish,
    encode_command,
    encode_property,
    encode_size,
)

# -- what is said, without sockets ------------------------------------------------------------------------------------

SUB_READY = encode_command(b"READY", encode_property(b"Socket-Type", b"SUB") + encode_property(b"Identity", b""))


def frame(body: bytes) -> bytes:
    return encode_size(len(body)) + body


@st.composite
def conversations(draw: st.DrawFn) -> tuple[bytes, list[Wish]]:
    """What a subscriber says after its READY, and what it wishes by that."""
    said, wishes = b"", []
    for kind in draw(st.lists(st.sampled_from(["message", "command", "ping", "noise", "long", "unknown"]), max_size=8)):
        prefix, is_wanted = draw(st.binary(max_size=300)), draw(st.booleans())
        if kind == "message":
            said += frame(bytes([is_wanted]) + prefix)
        elif kind == "command":
            said += encode_command(b"SUBSCRIBE" if is_wanted else b"CANCEL", prefix)
        elif kind == "ping":
            said += encode_command(b"PING", b"\0\1" + prefix[:16])
        elif kind == "long":
            long = prefix + b"\xff" * MAX_HEARD
            said += frame(b"\1" + long) if is_wanted else encode_command(b"SUBSCRIBE", long)
        else:
            said += frame(b"\2" + prefix) if kind == "noise" else encode_command(b"HELLO", prefix)
        if kind in ("message", "command"):
            wishes.append(Wish(prefix, is_wanted))
    return said, wishes


@given(conversations(), st.lists(st.integers(1, 80) | st.integers(1, MAX_HEARD)))
def test_a_conversation_is_understood_however_it_is_cut(said: tuple[bytes, list[Wish]], sizes: list[int]) -> None:
    text, expected = GREETING + SUB_READY + said[0], said[1]
    whole, (wishes, answer) = Conversation(), Conversation().hear(text)
    assert wishes == expected
    assert answer.startswith(READY)
    pieces, at = [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    heard = [whole.hear(piece) for piece in [*pieces, text[at:]]]
    assert [wish for wishes, _ in heard for wish in wishes] == expected
    assert b"".join(part for _, part in heard) == answer
    assert whole.is_ready


def test_nobody_subscribes_before_it_has_said_what_it_is() -> None:
    said = encode_command(b"SUBSCRIBE", b"a")
    assert Conversation().hear(GREETING + said + SUB_READY + said)[0] == [Wish(b"a", True)]


def test_who_can_speak_a_later_zmtp_is_answered_in_ours() -> None:
    """By the RFC it is the newer one that gives in."""
    later = GREETING[:10] + b"\x04" + GREETING[11:]
    assert Conversation().hear(later + SUB_READY) == ([], READY)


def test_a_heartbeat_is_answered_with_what_it_brings() -> None:
    conversation = Conversation()
    conversation.hear(GREETING + SUB_READY)
    assert conversation.hear(encode_command(b"PING", b"\0\1context")) == ([], encode_command(b"PONG", b"context"))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "no ZMTP"),
        (b"\x01\x00", "no ZMTP"),
        (b"\xff" + bytes(9), "no ZMTP"),
        (SIGNATURE + b"\x01\x01", "older ZMTP"),
        (SIGNATURE + b"\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32), "CURVE"),
        (GREETING + frame(b"\1"), "before READY"),
        (GREETING + encode_command(b"READY", encode_property(b"Socket-Type", b"PULL")), "PULL"),
        (GREETING + encode_command(b"READY", b""), "no type"),
        (GREETING + encode_command(b"READY", b"\x0bSocket-Type\xff\xff\xff\xffSUB"), "breaks off"),
        (GREETING + encode_command(b"ERROR", b"\4nope"), "nope"),
        (GREETING + encode_size(MAX_HEARD + 1), "before READY"),
    ],
)
def test_who_is_no_subscriber_is_refused(said: bytes, reason: str) -> None:
    with pytest.raises(NoSubscriber, match=reason):
        Conversation().hear(said)


@given(st.binary(max_size=400))
def test_nothing_but_no_subscriber_is_raised(noise: bytes) -> None:
    for said in (noise, GREETING + noise, GREETING + SUB_READY + noise, GREETING + encode_command(b"READY", noise)):
        try:
            Conversation().hear(said)
        except NoSubscriber:
            continue


# -- with ZeroMQ at the other end -------------------------------------------------------------------------------------

ENDPOINTS = ["tcp://127.0.0.1:*", "ipc"]


@contextmanager
def publishing(kind: str = "ipc", queue: int = 0, patience: float = 30.0) -> Iterator[tuple[PubSocket, str]]:
    with short_directory() as directory:
        pub = PubSocket(queue, patience)
        endpoint = pub.bind(f"ipc://{directory}/pub" if kind == "ipc" else kind)
        try:
            yield pub, endpoint
        finally:
            pub.close(0.0)


@contextmanager
def reading(pub: PubSocket, endpoint: str, *prefixes: bytes, kind: int = zmq.SUB, **options: int) -> Iterator[Any]:
    """A subscriber of libzmq whose subscriptions have come."""
    with zmq.Context() as context, context.socket(kind) as reader:
        reader.setsockopt(zmq.RCVTIMEO, 10_000)
        reader.setsockopt(zmq.LINGER, 0)
        for option, value in options.items():
            reader.setsockopt(getattr(zmq, option), value)
        reader.connect(endpoint)
        before = pub.subscriptions
        for prefix in prefixes:
            if kind == zmq.SUB:
                reader.setsockopt(zmq.SUBSCRIBE, prefix)
            else:
                reader.send(b"\1" + prefix)
        serve(pub, lambda: pub.subscriptions >= before + len(prefixes), "its subscriptions")
        yield reader


def serve(pub: PubSocket, fact: Callable[[], Any], what: str) -> Any:
    def look() -> Any:
        pub.poll()
        return fact()

    return wait_until(look, what)


def send(pub: PubSocket, *messages: tuple[bytes, bytes]) -> None:
    pub.send([(find_route(topic), payload) for topic, payload in messages])


find_route = cache(Route)
"""One for each topic, as those who send have it: what it knows of one socket's subscribers must not reach another's."""


@pytest.mark.parametrize("kind", ENDPOINTS)
@pytest.mark.parametrize("reader_kind", [zmq.SUB, zmq.XSUB])
def test_each_gets_what_it_has_subscribed_to(kind: str, reader_kind: int) -> None:
    sizes = (0, 1, 255, 256, 65_536, 3_000_000)
    with (
        publishing(kind) as (pub, endpoint),
        reading(pub, endpoint, b"", kind=reader_kind) as all_of_it,
        reading(pub, endpoint, b"a.", b"long", kind=reader_kind) as some,
    ):
        messages = [(b"a.%d" % size, bytes(size)) for size in sizes] + [
            (b"b", b"1"),
            (b"long" * 80, b"2"),
            (b"a", b"3"),
        ]
        send(pub, *messages)
        send(pub, (b"a.end", b""))

        def hear(reader: Any) -> list[tuple[bytes, ...]]:
            """Both sides by turns: the system does not take all at once."""
            heard: list[tuple[bytes, ...]] = []
            while not heard or heard[-1][0] != b"a.end":
                pub.poll()
                if reader.poll(5):
                    heard.append(tuple(reader.recv_multipart()))
            return heard[:-1]

        assert hear(all_of_it) == messages
        assert hear(some) == [message for message in messages if message[0][:2] == b"a." or message[0][:4] == b"long"]


def test_a_prefix_that_is_given_up_is_no_longer_sent() -> None:
    """XSUB tells of each subscription but, of as many unsubscriptions, of the last alone."""
    with publishing() as (pub, endpoint), reading(pub, endpoint, b"a", b"bb", kind=zmq.XSUB) as reader:
        reader.send(b"\1a")
        assert wait_until(lambda: pub.poll(0.1), "the repeated wish") == [Wish(b"a", True)]
        send(pub, (b"a", b"1"))
        for unwanted in (b"never", b"a", b"a"):
            reader.send(b"\0" + unwanted)
        serve(pub, lambda: pub.subscriptions == 1, "it to be given up")
        send(pub, (b"a", b"2"), (b"bb", b"3"))
        assert [reader.recv_multipart() for _ in range(2)] == [[b"a", b"1"], [b"bb", b"3"]]
        assert dict(pub._peers[0].lengths) == {2: 1}  # nothing is looked up any more for what is given up


PROXY = """
import sys, zmq
context = zmq.Context()
inside, outside = context.socket(zmq.XSUB), context.socket(zmq.XPUB)
inside.connect(sys.argv[1])
outside.bind(sys.argv[1] + ".proxy")
zmq.proxy(inside, outside)
"""


def test_a_proxy_may_stand_between() -> None:
    """It passes on what its subscribers wish."""
    with (
        publishing() as (pub, endpoint),
        running(sys.executable, "-c", PROXY, endpoint),
        reading(pub, f"{endpoint}.proxy", b"a", b"b") as reader,
    ):
        reader.unsubscribe(b"a")
        serve(pub, lambda: pub.subscriptions == 1, "one to be given up")
        send(pub, (b"a", b"1"), (b"b", b"2" * 300), (b"c", b"3"), (b"b", b""))
        assert [reader.recv_multipart() for _ in range(2)] == [[b"b", b"2" * 300], [b"b", b""]]


def test_who_leaves_takes_its_subscriptions_along() -> None:
    with publishing() as (pub, endpoint), reading(pub, endpoint, b"a") as stays:
        with reading(pub, endpoint, b"a", b"b"):
            assert pub.subscriptions == 3
        serve(pub, lambda: pub.subscriptions == 1, "the end of one")
        send(pub, (b"a", b"1"))
        assert stays.recv_multipart() == [b"a", b"1"]


def test_nothing_is_kept_of_who_has_left() -> None:
    """Not by a topic, either, on which nothing more is ever said."""
    with publishing() as (pub, endpoint), reading(pub, endpoint, b""):
        with reading(pub, endpoint, b""):
            send(pub, (b"a", b"1"), (b"quiet", b"1"))
            stays, left = pub._peers
            held = weakref.ref(left.socket)
            del left
        serve(pub, lambda: pub._peers == [stays], "it to leave")
        assert held() is None
        send(pub, (b"a", b"2"))
        assert list(pub._groups) == [(stays,)]


def test_heartbeats_of_a_subscriber_are_answered() -> None:
    """It would end the connection, and come back: more subscriptions than one would be seen."""
    with publishing() as (pub, endpoint):
        options = {"HEARTBEAT_IVL": 50, "HEARTBEAT_TIMEOUT": 2000, "HEARTBEAT_TTL": 10_000}
        with reading(pub, endpoint, b"", **options) as reader:
            end, ended = time.monotonic() + 3, False
            while time.monotonic() < end:  # longer than it waits for an answer
                pub.poll(0.02)
                ended = ended or pub.subscriptions != 1
            assert not ended
            send(pub, (b"a", b"1"))
            assert reader.recv_multipart() == [b"a", b"1"]
        serve(pub, lambda: not pub.subscriptions, "it to leave")
        with reading(pub, endpoint, b"", **options) as reader:  # that it does leave whom it hears nothing of
            ended = reader.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            assert ended.poll(10_000), "nothing is answered meanwhile"
            reader.disable_monitor()

            def hear() -> list[Wish]:
                reader.poll(1)  # libzmq says again what it wants once it is asked for messages
                return pub.poll(0.1)

            assert wait_until(hear, "it to come back") == [Wish(b"", True)]


@pytest.mark.parametrize("kind", ENDPOINTS)
def test_a_subscriber_that_is_behind_misses_nothing_within_its_queue(kind: str) -> None:
    count, size = 3000, 20_000  # more than the system takes, and libzmq at the other end
    with publishing(kind, queue=count) as (pub, endpoint), reading(pub, endpoint, b"", RCVHWM=10) as reader:
        for number in range(count):
            send(pub, (b"%d" % number, b"%d" % number * (size // len(b"%d" % number))))
        assert pub._peers[0].waiting > 0
        numbers: list[int] = []
        while len(numbers) < count:
            pub.poll()
            if reader.poll(5):
                topic, payload = reader.recv_multipart()
                assert payload.startswith(topic * 10)
                numbers.append(int(topic))
        assert numbers == list(range(count))
        assert pub._peers[0].waiting == 0


@contextmanager
def one_peer(queue: int) -> Iterator[tuple[Peer, socket.socket]]:
    """A subscriber as the publisher knows it, and its own end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.settimeout(10)
        yield Peer(ours, "pid 1", queue, 0.0), theirs


def fill(peer: Peer) -> int:
    """Write messages of 1000 letters until some wait. Returns how many."""
    count = 0
    while not peer.unsent:
        peer.write(b"a" * 1000, 1)
        count += 1
    return count


def read_until_writable(peer: Peer, theirs: socket.socket) -> bytes:
    heard = b""
    while not select.select([], [peer.socket], [], 0)[1]:
        heard += theirs.recv(1 << 16)
    return heard


def test_what_comes_while_some_waits_stays_behind_it() -> None:
    with one_peer(queue=0) as (peer, theirs):
        size = 1000 * fill(peer)
        heard = read_until_writable(peer, theirs)
        peer.write(b"end", 1)
        while len(heard) < size + 3:
            if peer.unsent:
                peer.write_more()
            heard += theirs.recv(1 << 16)
        assert heard == b"a" * size + b"end"
        assert (peer.waiting, peer.unsent, len(peer.marks)) == (0, 0, 0)


def test_what_waits_is_never_moved_as_a_whole() -> None:
    """However much it is: it lies in blocks, each of which goes out, and is let go, by itself."""
    with one_peer(queue=0) as (peer, theirs):
        for _ in range(40 * BLOCK // 100_000):
            peer.write(bytes(100_000), 1)
        assert len(peer.blocks) > 20
        assert max(len(block) for block in peer.blocks) < BLOCK + 100_000
        assert sum(len(block) for block in peer.blocks) == peer.unsent
        while peer.unsent:
            read_until_writable(peer, theirs)
            peer.write_more()
        assert not peer.blocks


def test_one_that_says_nothing_after_all_is_not_gone() -> None:
    with one_peer(queue=0) as (peer, theirs):
        assert peer.hear(1) == []
        theirs.close()
        with pytest.raises(ConnectionResetError):
            peer.hear(1)


def test_each_time_that_a_subscriber_is_too_slow_is_told_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    with one_peer(queue=1) as (peer, theirs), caplog.at_level(logging.WARNING):
        for missed in (2, 3):
            fill(peer)
            for _ in range(missed):
                peer.write(b"missed", 1)
            while peer.unsent:
                assert b"missed" not in read_until_writable(peer, theirs)
                peer.write_more()
            assert caplog.messages == [
                "a subscriber (pid 1) is too slow, with 1 message waiting for it: it will miss some",
                f"the slow subscriber (pid 1) is up to date again; it missed {missed} messages",
            ]
            caplog.clear()


def test_what_ipc_has_is_served_as_soon_as_the_system_has_taken_it() -> None:
    with one_peer(queue=0) as (peer, _):
        peer.write(b"unread", 1)
        assert peer.is_served
        fill(peer)
        assert not peer.is_served


def test_large_messages_do_not_pile_up_for_one_that_reads_nothing(caplog: pytest.LogCaptureFixture) -> None:
    large = bytes(MAX_UNSENT // 4)
    with one_peer(queue=1000) as (peer, _), caplog.at_level(logging.WARNING):
        for _ in range(6):
            peer.write(large, 1)
        assert peer.dropped == 1  # some of the first lies in the system's buffer, so that five are held
        assert peer.unsent < MAX_UNSENT + len(large)
        assert "a subscriber (pid 1) is too slow, with 5 messages waiting for it: it will miss some" in caplog.messages


def test_a_subscriber_that_is_too_slow_misses_what_is_beyond_its_queue_and_no_other_does(
    caplog: pytest.LogCaptureFixture,
) -> None:
    queue, size = 100, 20_000
    with (
        publishing(queue=queue) as (pub, endpoint),
        reading(pub, endpoint, b"", RCVHWM=10) as slow,
        reading(pub, endpoint, b"", RCVHWM=0) as quick,
        caplog.at_level(logging.WARNING),
    ):
        sent = heard = 0
        while sent < 500 or "too slow" not in caplog.text:
            send(pub, (b"%d" % sent, bytes(size)))
            sent += 1
            assert sent < 100_000
            assert quick.recv_multipart()[0] == b"%d" % heard
            heard += 1
        for _ in range(50):
            send(pub, (b"lost", bytes(size)))
            assert quick.recv_multipart()[0] == b"lost"
        assert pub._peers[0].waiting <= queue + 1

        numbers: list[bytes] = []

        def drain() -> bool:
            while slow.poll(5):
                numbers.append(slow.recv_multipart()[0])
            return "up to date again; it missed" in caplog.text

        serve(pub, drain, "all that waits to be taken")
        send(pub, (b"end", b""))
        while not numbers or numbers[-1] != b"end":
            numbers.append(slow.recv_multipart()[0])
        assert b"lost" not in numbers
        assert numbers[:-1] == [b"%d" % number for number in range(len(numbers) - 1)]  # one run, and then nothing


@pytest.mark.parametrize("kind", ENDPOINTS)
def test_who_is_behind_may_leave(kind: str) -> None:
    """Then it is heard of both that it is gone and that it could be written to."""
    with publishing(kind) as (pub, endpoint):
        with reading(pub, endpoint, b"", RCVHWM=1):
            while not pub._peers[0].unsent:
                send(pub, (b"a", bytes(100_000)))
        serve(pub, lambda: not pub._peers, "it to leave")


def test_what_waits_is_sent_before_it_closes_and_no_longer_than_it_may() -> None:
    count, size = 1000, 20_000
    with publishing() as (pub, endpoint), reading(pub, endpoint, b"", RCVHWM=10) as slow:
        send(pub, *[(b"%d" % number, bytes(size)) for number in range(count)])
        began = time.monotonic()
        pub.close(0.3)
        assert time.monotonic() - began >= 0.3
        assert int(slow.recv_multipart()[0]) == 0
    with publishing() as (pub, endpoint), reading(pub, endpoint, b"", RCVHWM=0) as quick:
        send(pub, *[(b"%d" % number, bytes(size)) for number in range(count)])
        pub.close(20.0)
        assert [int(quick.recv_multipart()[0]) for _ in range(count)] == list(range(count))


def listens(place: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(place) == 0


def test_what_the_system_holds_for_a_subscriber_is_not_lost_when_it_closes() -> None:
    """TCP would drop it where the subscriber has said something that was not heard, or goes on to speak."""
    with publishing(ENDPOINTS[0]) as (pub, endpoint), socket.socket() as slow, ThreadPoolExecutor() as pool:
        place = "127.0.0.1", int(endpoint.rpartition(":")[2])
        slow.settimeout(10)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(place)
        slow.sendall(GREETING + SUB_READY + frame(b"\1"))
        serve(pub, lambda: pub.subscriptions, "its subscription")
        send(pub, (b"a", bytes(200_000)), (b"end", b""))
        slow.sendall(encode_command(b"PING", b"\0\1"))

        def hear() -> bytes:
            wait_until(lambda: not listens(place), "it to begin to close")
            heard = b""
            while data := slow.recv(1 << 16):
                heard += data
            return heard

        heard = pool.submit(hear)
        pub.close(20.0)
        assert b"end" in heard.result()


# -- peers that are none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\n\r\n", GREETING + encode_size(1 << 40), os.urandom(500)], ids=["http", "size", "noise"]
)
@pytest.mark.parametrize("kind", ENDPOINTS)
def test_a_peer_that_speaks_something_else_is_let_go_and_the_others_stay(kind: str, said: bytes) -> None:
    with publishing(kind) as (pub, endpoint), reading(pub, endpoint, b"") as reader:
        with socket.socket(socket.AF_UNIX if kind == "ipc" else socket.AF_INET) as stranger:
            stranger.settimeout(10)
            place = endpoint.split("://")[1]
            stranger.connect(place if kind == "ipc" else ("127.0.0.1", int(place.rpartition(":")[2])))
            serve(pub, lambda: len(pub._peers) == 2, "the stranger")
            stranger.sendall(said)
            serve(pub, lambda: len(pub._peers) == 1, "the stranger to be let go")
        send(pub, (b"a", b"1"))
        assert reader.recv_multipart() == [b"a", b"1"]


def test_who_asks_for_answers_and_reads_none_does_not_fill_the_memory() -> None:
    ping = encode_command(b"PING", b"\0\1" + b"x" * 16) * 200
    assert len(ping) < HEAR_AT_ONCE
    with publishing() as (pub, endpoint), socket.socket(socket.AF_UNIX) as hostile:
        hostile.connect(endpoint[6:])
        hostile.sendall(GREETING + SUB_READY)
        serve(pub, lambda: pub._peers and pub._peers[0].conversation.is_ready, "its greeting")
        hostile.settimeout(5)
        (peer,) = pub._peers
        while peer.unsent <= BLOCK:
            hostile.sendall(ping)
            pub.poll()
        for _ in range(200):
            hostile.sendall(ping)
            pub.poll()
        assert peer.unsent < BLOCK + 200_000


def test_who_subscribes_without_end_is_let_go(caplog: pytest.LogCaptureFixture) -> None:
    with publishing() as (pub, endpoint), socket.socket(socket.AF_UNIX) as hostile:
        hostile.connect(endpoint[6:])
        serve(pub, lambda: pub._peers, "the hostile one")
        said = memoryview(GREETING + SUB_READY + b"".join(frame(b"\1%d" % each) for each in range(MAX_PREFIXES + 1)))
        hostile.setblocking(False)
        while said and pub._peers:
            with suppress(BlockingIOError, BrokenPipeError):
                said = said[hostile.send(said) :]
            pub.poll(0.01)
        serve(pub, lambda: not pub._peers, "it to be let go")
        assert f"it has subscribed to {MAX_PREFIXES} prefixes" in caplog.text
        assert pub.subscriptions == 0


def count_unheard(pub: PubSocket) -> int:
    """Bytes that the system has for it from all peers."""
    counts = [fcntl.ioctl(peer.socket, termios.FIONREAD, bytes(4)) for peer in pub._peers]
    return sum(int.from_bytes(count, sys.byteorder) for count in counts)


def test_however_many_say_however_much_the_loop_goes_on_soon() -> None:
    crowd = 20
    with publishing() as (pub, endpoint), ExitStack() as stack:
        hostile = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(crowd)]
        for each in hostile:
            each.settimeout(10)
            each.connect(endpoint[6:])
            each.sendall(GREETING + SUB_READY)
        serve(pub, lambda: sum(peer.conversation.is_ready for peer in pub._peers) == crowd, "all of them")
        for each in hostile:
            each.sendall(frame(b"") * 10_000 + frame(b"\1a"))
        unheard = count_unheard(pub)
        assert unheard > 20_000 * crowd
        pub.poll()
        assert 0 < unheard - count_unheard(pub) <= HEAR_AT_ONCE + crowd
        serve(pub, lambda: pub.subscriptions == crowd, "all that they say")


def test_a_prefix_that_is_longer_than_any_topic_is_passed_over() -> None:
    topic = b"a" * MAX_LENGTH
    with publishing() as (pub, endpoint), reading(pub, endpoint, topic, kind=zmq.XSUB) as reader:
        (peer,) = pub._peers
        for said in (b"\1" + topic + b"b", b"\1c"):
            reader.send(said)
        serve(pub, lambda: pub.subscriptions > 1, "the one behind it")
        assert peer.prefixes == {topic, b"c"}
        for said in (b"\0" + topic + b"b", b"\0c"):
            reader.send(said)
        serve(pub, lambda: pub.subscriptions == 1, "one that is given up")
        assert (peer.prefixes, peer.lengths) == ({topic}, Counter({MAX_LENGTH: 1}))


def test_a_socket_of_another_type_is_let_go_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with publishing() as (pub, endpoint), zmq.Context() as context, context.socket(zmq.PULL) as wrong:
        wrong.connect(endpoint)
        serve(pub, lambda: "it is a PULL" in caplog.text and not pub._peers, "it to be let go")


def test_a_socket_of_another_type_is_told_and_does_not_come_again() -> None:
    with publishing() as (pub, endpoint), socket.socket(socket.AF_UNIX) as wrong:
        wrong.settimeout(10)
        wrong.connect(endpoint[6:])
        wrong.sendall(GREETING + encode_command(b"READY", encode_property(b"Socket-Type", b"PULL")))
        serve(pub, lambda: pub._strangers, "it to be let go")
        assert wrong.recv(1000) == GREETING + WRONG_TYPE
        assert wrong.recv(1000) == b""
        with socket.socket(socket.AF_UNIX) as gone:
            gone.connect(endpoint[6:])
            serve(pub, lambda: pub._peers, "one that does not wait for its answer")
            gone.sendall(GREETING + encode_command(b"READY", encode_property(b"Socket-Type", b"PULL")))
        serve(pub, lambda: pub._strangers == 2, "it to be let go")
    with publishing() as (pub, endpoint), zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        seen = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED)
        dealer.connect(endpoint)
        serve(pub, lambda: seen.poll(0), "it to see the end")
        assert recv_monitor_message(seen)["event"] == zmq.EVENT_DISCONNECTED
        assert not seen.poll(300)  # else the next attempt would be announced at once
        dealer.disable_monitor()


@pytest.mark.parametrize("kind", ENDPOINTS)
def test_strangers_that_come_again_and_again_are_named_and_do_not_fill_the_log(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    names = {}
    with publishing(kind) as (pub, endpoint):
        for before in (*range(15), *range(995, 1005)):
            pub._strangers = before
            with socket.socket(socket.AF_UNIX if kind == "ipc" else socket.AF_INET) as stranger:
                stranger.connect(endpoint[6:] if kind == "ipc" else ("127.0.0.1", int(endpoint.rpartition(":")[2])))
                names[before + 1] = f"pid {os.getpid()}" if kind == "ipc" else "{}:{}".format(*stranger.getsockname())
                serve(pub, lambda: pub._peers, "the stranger")
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                serve(pub, lambda: not pub._peers, "the stranger to be let go")
    said = "a peer ({}) is no subscriber, and is let go: it speaks no ZMTP; {} so far"
    assert caplog.messages == [said.format(names[number], number) for number in (*range(1, 11), 1000)]


def test_who_never_says_what_it_is_goes_when_another_comes() -> None:
    with publishing(patience=0.0) as (pub, endpoint), socket.socket(socket.AF_UNIX) as silent:
        silent.connect(endpoint[6:])
        first = serve(pub, lambda: pub._peers, "the silent one")[0]
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(endpoint[6:])
            silent.sendall(b"\xff")  # what it says is heard of behind the other, when it has gone
            serve(pub, lambda: first not in pub._peers, "it to be let go")
            assert len(pub._peers) == 1


def test_and_when_nobody_comes_it_goes_too() -> None:
    """Where no more descriptors are left nobody can come as long as it stays. A subscriber stays."""
    with (
        publishing(patience=0.0) as (pub, endpoint),
        reading(pub, endpoint, b"") as reader,
        socket.socket(socket.AF_UNIX) as silent,
    ):
        silent.connect(endpoint[6:])
        serve(pub, lambda: len(pub._peers) == 2, "the silent one")
        pub.restore()
        assert len(pub._peers) == 1
        send(pub, (b"a", b"1"))
        assert reader.recv_multipart() == [b"a", b"1"]


def test_where_no_more_fit_one_that_leaves_makes_room(caplog: pytest.LogCaptureFixture) -> None:
    with publishing() as (pub, endpoint), socket.socket(socket.AF_UNIX) as next_one:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(endpoint[6:])
            old = serve(pub, lambda: pub._peers[:], "the first")
            os.close(free := os.dup(0))
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            try:
                next_one.connect(endpoint[6:])
                serve(pub, lambda: "no more subscribers until there is room" in caplog.text, "the log to say so")
                assert not select.select([pub], [], [], 0)[0]  # and it is not asked again and again
                assert caplog.text.count("no more subscribers") == 1
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        serve(pub, lambda: pub._peers and pub._peers != old, "the next one")


def test_the_last_descriptors_are_no_subscribers(caplog: pytest.LogCaptureFixture) -> None:
    """The worker needs one to connect to the exchange again."""
    with publishing() as (pub, endpoint), ExitStack() as stack:
        crowd = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2)]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(map(int, os.listdir("/dev/fd")))
        while (free := os.dup(0)) < highest:  # what other tests have left open may lie above what is free
            stack.callback(os.close, free)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1 + RESERVE, hard))
        try:
            for each in crowd:
                each.connect(endpoint[6:])
            serve(pub, lambda: "no more subscribers until there is room" in caplog.text, "the log to say so")
            assert len(pub._peers) == 1
            for _ in range(RESERVE):
                stack.callback(os.close, os.dup(0))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_where_there_is_room_again_the_next_one_is_let_in_though_nobody_left(caplog: pytest.LogCaptureFixture) -> None:
    with publishing() as (pub, endpoint), reading(pub, endpoint, b""), socket.socket(socket.AF_UNIX) as next_one:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        os.close(free := os.dup(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            next_one.connect(endpoint[6:])
            serve(pub, lambda: "no more subscribers until there is room" in caplog.text, "the log to say so")
            pub.restore()  # once a second
            pub.poll(0.01)
            assert caplog.text.count("no more subscribers") == 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        pub.restore()
        serve(pub, lambda: len(pub._peers) == 2, "the next one")
        with socket.socket(socket.AF_UNIX) as last:
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            try:
                last.connect(endpoint[6:])
                serve(pub, lambda: caplog.text.count("no more subscribers") == 2, "the log to say it again")
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- where it listens -------------------------------------------------------------------------------------------------


def test_an_endpoint_that_is_taken_is_refused_and_left_alone() -> None:
    for kind in ENDPOINTS:
        with publishing(kind) as (pub, endpoint):
            with pytest.raises(OSError, match="in use"):
                PubSocket(0).bind(endpoint)
            pub.restore()  # finds nothing to do
            with reading(pub, endpoint, b"") as reader:
                send(pub, (b"a", b"1"))
                assert reader.recv_multipart() == [b"a", b"1"]


def test_a_port_can_be_taken_again_at_once_though_there_were_subscribers() -> None:
    """By the successor of a worker that was killed: what has not yet ended of its connections is no listener."""
    with publishing(ENDPOINTS[0]) as (pub, endpoint), reading(pub, endpoint, b""):
        pub.close(0.0)
        again = PubSocket(0)
        assert again.bind(endpoint) == endpoint
        again.close(0.0)


def test_where_the_socket_file_was_removed_it_listens_anew() -> None:
    """Who comes then may get the descriptor of the listener before."""
    with publishing() as (pub, endpoint), socket.socket(socket.AF_UNIX) as reader:
        descriptor = pub._listener and pub._listener.fileno()
        os.unlink(endpoint[6:])
        pub.restore()
        reader.connect(endpoint[6:])
        (peer,) = serve(pub, lambda: pub._peers, "who comes")
        assert peer.socket.fileno() == descriptor


def test_the_socket_file_of_a_dead_one_is_replaced_and_no_other_file(tmp_path: Path) -> None:
    with short_directory() as directory:
        path = Path(directory) / "pub"
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(f"{path}")
        pub = PubSocket(0)
        assert pub.bind(f"ipc://{path}") == f"ipc://{path}"
        pub.close(0.0)
        assert not path.exists()
        path.write_text("precious")
        with pytest.raises(FileExistsError):
            PubSocket(0).bind(f"ipc://{path}")
        assert path.read_text() == "precious"


def test_the_socket_file_of_one_that_is_alive_but_does_not_accept_is_left_alone() -> None:
    """A listener that is stopped, with as many waiting as may wait; and a socket that is of another type."""
    with short_directory() as directory, socket.socket(socket.AF_UNIX) as stopped:
        stopped.bind(f"{directory}/stopped")
        stopped.listen(0)
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        for each in waiting:
            each.setblocking(False)
        assert errno.EAGAIN in [each.connect_ex(f"{directory}/stopped") for each in waiting]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.bind(f"{directory}/other")
            for name in ("stopped", "other"):
                with pytest.raises(OSError, match="in use"):
                    PubSocket(0).bind(f"ipc://{directory}/{name}")
                assert (directory / name).is_socket()
        for each in waiting:
            each.close()
