"""Control and Subscriber on real sockets, against a peer that the test drives message by message."""

import math
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

import collector
from collector import Control, ControlError, OrderBook, Subscriber
from collector.cli.render import format_line
from collector.client.control import NobodyAnswers
from collector.client.questions import Questions
from collector.client.stream import ANSWERED_WITHIN, MAX_TOPICS, Loss, LossError, Message, SequenceCheck
from collector.client.subscriber import UNNAMED
from collector.lifecycle import Exit
from collector.messages import Topic, decode, encode, parse_topic
from tests.support import as_no_root, running, wait_until
from workers.deribit import ExchangeError, Lost, Refused

START = 1_790_000_000_000_000_000
TOPIC = "deribit.index.btc_usd.raw"


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def peer(context: Any, tmp_path: Path) -> Any:
    """A control endpoint whose answers the test writes itself."""
    router = context.socket(zmq.ROUTER)
    router.bind(f"ipc://{tmp_path}/control")
    return router


@pytest.fixture
def publisher(context: Any) -> Any:
    xpub = context.socket(zmq.XPUB)
    xpub.bind("tcp://127.0.0.1:*")
    return xpub


def endpoint_of(bound: Any) -> str:
    return str(bound.getsockopt_string(zmq.LAST_ENDPOINT))


def take_request(peer: Any) -> tuple[list[bytes], dict[str, Any]]:
    assert peer.poll(10_000), "no request came"
    *envelope, body = peer.recv_multipart()
    return envelope, decode(body)


def in_thread(work: Callable[[], Any]) -> Callable[[], Any]:
    """Start work; return a function that waits for it and gives its result, or what it raised."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def join() -> Any:
        thread.join(20)
        assert outcome, "it did not end"
        return outcome[0]

    return join


def wait_subscribed(publisher: Any, count: int = 1) -> None:
    for _ in range(count):
        assert publisher.poll(10_000), "nobody subscribed"
        assert publisher.recv()[0] == 1


def index_message(seq: int, price: float = 1.0, **keys: Any) -> list[bytes]:
    payload = {
        "type": "index", "exchange": "deribit", "instrument": "btc_usd", "epoch": START, "seq": seq,
        "exchange_ts": START, "receive_ts": START, "price": price, **keys,
    }  # fmt: skip
    return [TOPIC.encode(), encode(payload)]


# -- Control --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda c: c.get_state(), {"op": "get_state"}),
        (lambda c: c.get_state("futures"), {"op": "get_state", "connection": "futures"}),
        (lambda c: c.subscribe("futures", ["a.b"]), {"op": "subscribe", "connection": "futures", "channels": ["a.b"]}),
        (lambda c: c.subscribe("f", "a.b"), {"op": "subscribe", "connection": "f", "channels": ["a.b"]}),
        (lambda c: c.unsubscribe("f", "a.b"), {"op": "unsubscribe", "connection": "f", "channels": ["a.b"]}),
        (lambda c: c.unsubscribe("f", ("a.b",)), {"op": "unsubscribe", "connection": "f", "channels": ["a.b"]}),
        (lambda c: c.connect({"name": "f"}), {"op": "connect", "connection": {"name": "f"}}),
        (lambda c: c.close("f"), {"op": "close", "connection": "f"}),
        (lambda c: c.send("f", "public/test"), {"op": "send", "connection": "f", "method": "public/test"}),
        (
            lambda c: c.send("f", "public/x", {"a": 1}),
            {"op": "send", "connection": "f", "method": "public/x", "params": {"a": 1}},
        ),
    ],
)
def test_each_method_sends_its_request_and_returns_the_result(peer: Any, call: Any, expected: dict[str, Any]) -> None:
    with Control(endpoint_of(peer), timeout=7) as control:
        answer = in_thread(lambda: call(control))
        before = time.time_ns()
        envelope, request = take_request(peer)
        assert abs(request.pop("deadline") - before - 7_000_000_000) < 5_000_000_000
        assert request == expected
        peer.send_multipart([*envelope, encode({"ok": True, "result": {"done": 1}})])
        assert answer() == {"done": 1}


def test_refusal_carries_code_message_and_the_exchanges_own_error(peer: Any) -> None:
    with Control(endpoint_of(peer)) as control:
        answer = in_thread(lambda: control.send("f", "public/auth"))
        envelope, _ = take_request(peer)
        raw = {"code": 13004, "message": "invalid_credentials"}
        error = {"code": "exchange_error", "message": "refused", "data": raw}
        peer.send_multipart([*envelope, encode({"ok": False, "error": error})])
        raised = answer()
        assert isinstance(raised, ControlError)
        assert (raised.code, raised.message, raised.data) == ("exchange_error", "refused", raw)


def test_lost_reply_blocks_nothing_and_a_late_one_answers_nobody(peer: Any) -> None:
    with Control(endpoint_of(peer), timeout=0.1) as control:
        lost = in_thread(control.get_state)
        first, _ = take_request(peer)
        raised = lost()
        assert isinstance(raised, ControlError)
        assert raised.code == "timeout"
        assert endpoint_of(peer) in raised.message
        control.timeout = 10
        answer = in_thread(lambda: control.get_state("second"))
        second, request = take_request(peer)
        assert request["connection"] == "second"
        peer.send_multipart([*first, encode({"ok": True, "result": {"for": "first"}})])
        peer.send_multipart([*second, encode({"ok": True, "result": {"for": "second"}})])
        assert answer() == {"for": "second"}
        control.timeout = 0.1
        lost = in_thread(control.get_state)
        take_request(peer)
        peer.send_multipart([*second, encode({"ok": True, "result": {"for": "second"}})])
        assert isinstance(lost(), ControlError)


@pytest.mark.parametrize(
    "reply",
    [
        b"", b"\xc1", encode([1]), encode({"ok": False}), b"\x91" * 5000, encode({"ok": 1}),
        encode({"ok": True, "result": ["no map"]}),
    ],
)  # fmt: skip
def test_garbage_for_an_answer_is_an_internal_error(peer: Any, reply: bytes) -> None:
    with Control(endpoint_of(peer)) as control:
        answer = in_thread(control.get_state)
        envelope, _ = take_request(peer)
        peer.send_multipart([*envelope, reply])
        raised = answer()
        assert isinstance(raised, ControlError)
        assert raised.code == "internal"


def test_missing_or_abandoned_socket_file_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "control"
    with Control(f"ipc://{path}", timeout=3600) as control:
        with pytest.raises(ControlError, match=r"^no collector runs at ipc:///.*there is no such socket file"):
            control.get_state()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
        with pytest.raises(ControlError, match="left behind"):
            control.get_state()
    with Control(f"ipc://{tmp_path}") as control, pytest.raises(ControlError, match="is no socket"):
        control.get_state()


@pytest.mark.parametrize("is_there", [False, True])
def test_a_socket_file_that_is_closed_to_us_is_not_said_to_be_anybodys(tmp_path: Path, is_there: bool) -> None:
    command = as_no_root(sys.executable, "-m", "collector", "state", "--control", f"ipc://{tmp_path}/control")
    with socket.socket(socket.AF_UNIX) as listener:
        if is_there:
            listener.bind(f"{tmp_path}/control")
        (tmp_path / ("control" if is_there else "")).chmod(0)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        tmp_path.chmod(0o700)
    assert (done.returncode, "or its directory, is closed to you; start one" in done.stderr) == (1, True), done.stderr


def test_a_stopped_collector_with_its_queue_full_is_waited_for_no_longer_than_the_timeout(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/control")
        listener.listen(0)  # and nobody accepts
        with Control(f"ipc://{tmp_path}/control", timeout=0.05) as control:
            for _ in range(3):
                assert isinstance(in_thread(control.get_state)(), NobodyAnswers)


def test_who_asks_on_and_on_where_nobody_listens_is_told_so_each_time() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # and nobody else has the port
        with Control(f"tcp://127.0.0.1:{deaf.getsockname()[1]}", timeout=0.001) as control:
            for _ in range(2000):  # more than may wait in a socket
                control.send_request("get_state")
            with pytest.raises(NobodyAnswers, match="nobody answered"):
                control.get_state()


@pytest.mark.parametrize(
    "endpoint", ["nonsense", "tcp://127.0.0.1", *(f"tcp://127.0.0.1:{n}" for n in (0, 65_536, 10**20))]
)
def test_no_endpoint_is_refused_with_what_to_write(endpoint: str) -> None:
    with pytest.raises(ValueError, match="write ipc:///path or tcp://host:port"):
        Control(endpoint)


@pytest.mark.parametrize("timeout", [None, "5", 0, -1.0, 1e10, float("nan")])
def test_a_timeout_that_cannot_be_one_is_refused_with_what_to_give(timeout: Any) -> None:
    for make in (Control, lambda timeout: Subscriber(timeout=timeout)):
        with pytest.raises(ValueError, match=r"^timeout=.*: give seconds, for example 5\.0$"):
            make(timeout=timeout)


@pytest.mark.parametrize("queue", [-1, 1 << 31, None, "5", 1.5])
def test_a_queue_that_cannot_be_one_is_refused_with_what_to_give(queue: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"queue={queue!r}: give a number of messages, 0 for any number")):
        Subscriber("ipc:///nowhere/pub", queue=queue)


def test_what_is_disconnected_says_so(peer: Any) -> None:
    control, subscriber = Control(endpoint_of(peer)), Subscriber("ipc:///nowhere/pub")
    calls = control.get_state, subscriber.receive, lambda: subscriber.subscribe("x"), lambda: subscriber.unsubscribe("")
    with subscriber:
        pass
    control.disconnect()
    control.disconnect()
    for call in calls:
        with pytest.raises(zmq.ZMQError, match=r"^it was disconnected; make a new one$"):
            call()


def test_the_public_names_can_be_seen_and_had() -> None:
    assert set(collector.__all__) <= set(dir(collector))
    assert all(hasattr(collector, name) for name in collector.__all__)


def test_import_takes_no_event_loop_along() -> None:
    program = "import sys, collector.client; print(*{'asyncio', 'aiohttp', 'rich', 'workers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ControlError("exchange_error", "refused", {"code": 10009}), "exchange_error: refused"),
        (NobodyAnswers("nobody answers"), "nobody answers"),
        (LossError(Loss(Topic("deribit", "index", "btc_usd", "raw"), "malformed")), f"{TOPIC}: malformed: "),
        (ExchangeError({"code": 10009, "message": "not_enough_funds"}), "10009 not_enough_funds"),
        (Refused("the credentials are no good", Exit.CREDENTIALS), "the credentials are no good"),
        (Lost("a reset", {"code": 11051}), "a reset"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_reach_another_process_whole(error: Exception, text: str) -> None:
    copied = pickle.loads(pickle.dumps(error))
    assert (type(copied), str(copied), vars(copied)) == (type(error), text, vars(error))


def test_what_was_not_left_in_order_does_not_hold_up_the_collection_of_garbage() -> None:
    """An error that is kept keeps the frame that it came through, and with it a Subscriber that could not be made."""
    program = """
import collector, gc

def fail(**where):
    try:
        collector.Subscriber(**where)
    except (TypeError, ValueError, collector.ControlError) as error:
        kept = error

fail(prefix="misspelt")
fail(endpoints="nonsense")
fail(control="ipc:///nowhere/control")
for kind in (collector.Control, collector.Subscriber):
    left = kind("tcp://127.0.0.1:9")
    left.itself = left
    del left
print(gc.collect() > 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("True\n", "")


# -- Subscriber -----------------------------------------------------------------------------------------------------


def test_messages_come_typed(publisher: Any) -> None:
    with Subscriber(endpoint_of(publisher), ["deribit.index."]) as subscriber:
        wait_subscribed(publisher)
        publisher.send_multipart(index_message(1, price=5.5))
        message = subscriber.receive(10)
        assert isinstance(message, Message)
        assert str(message.topic) == TOPIC
        assert (message.type, message.instrument, message.interval, message.seq) == ("index", "btc_usd", "raw", 1)
        assert (message.epoch, message.exchange_ts, message.receive_ts, message.is_join) == (START, START, START, False)
        assert message["price"] == 5.5
        assert message.get("iv") is None
        assert dict(message)["type"] == "index"
        assert subscriber.receive(0.01) is None


def test_thousands_of_prefixes_all_arrive(publisher: Any) -> None:
    """ZeroMQ queues subscriptions as messages: without a word it would drop what is beyond its high-water mark."""
    prefixes = [f"deribit.quote.I-{number}." for number in range(3000)]
    with Subscriber(endpoint_of(publisher), prefixes):
        wait_subscribed(publisher, len(prefixes))


def test_as_many_messages_wait_for_a_slow_reader_as_its_queue_holds(context: Any) -> None:
    publisher = context.socket(zmq.XPUB)
    publisher.setsockopt(zmq.XPUB_NODROP, 1)
    publisher.setsockopt(zmq.SNDTIMEO, 10_000)
    publisher.bind("tcp://127.0.0.1:*")
    with Subscriber([endpoint_of(publisher)], queue=50_000) as subscriber:
        wait_subscribed(publisher)
        for seq in range(1, 40_001):  # of libzmq's own 1,000, and what the kernel takes, there is room for a third
            publisher.send_multipart(index_message(seq, more="x" * 500))
        for seq in range(1, 40_001):
            item = subscriber.receive(10)
            assert isinstance(item, Message)
            assert item.seq == seq


@pytest.mark.parametrize("prefixes", [TOPIC, parse_topic(TOPIC), [parse_topic(TOPIC)]], ids=["text", "topic", "list"])
def test_a_topic_is_a_prefix_as_its_text_is(publisher: Any, prefixes: Any) -> None:
    with Subscriber(endpoint_of(publisher), prefixes):
        assert publisher.poll(10_000)
        assert publisher.recv() == b"\x01" + TOPIC.encode()


def test_a_signal_that_comes_to_another_thread_is_heeded() -> None:
    program = """
import signal, threading
import collector

threading.Thread(target=threading.Event().wait, daemon=True).start()
with collector.Subscriber("tcp://127.0.0.1:9") as subscriber:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    print("begins", flush=True)
    try:
        subscriber.receive()
    except KeyboardInterrupt:
        print("ended")
"""
    with running(sys.executable, "-c", program) as reader:
        reader.wait_line("begins")
        wait_until(lambda: psutil.Process(reader.pid).status() == psutil.STATUS_SLEEPING, "it to wait")
        reader.process.send_signal(signal.SIGINT)
        reader.wait_line("ended")


def test_a_misspelt_wish_about_losses_is_refused() -> None:
    with pytest.raises(ValueError, match="on_loss='rasie': write raise or report"):
        Subscriber("tcp://127.0.0.1:9", on_loss="rasie")  # type: ignore[arg-type]


def test_prefixes_come_and_go_and_what_went_by_meanwhile_is_no_loss(publisher: Any) -> None:
    other = "deribit.index.eth_usd."
    with Subscriber(endpoint_of(publisher), other) as subscriber:
        wait_subscribed(publisher)
        for _ in range(2):
            subscriber.subscribe(parse_topic(TOPIC))
        wait_subscribed(publisher)
        publisher.send_multipart(index_message(1))
        assert subscriber.receive(10).seq == 1  # type: ignore[union-attr]
        subscriber.unsubscribe(TOPIC)
        publisher.send_multipart(index_message(3))
        with pytest.raises(LossError):  # it has been subscribed to once more
            subscriber.receive(10)
        assert subscriber.receive(10).seq == 3  # type: ignore[union-attr]
        subscriber.unsubscribe(TOPIC)
        with pytest.raises(ValueError, match="is no prefix that is subscribed to"):
            subscriber.unsubscribe(TOPIC)
        subscriber.subscribe("deribit.")
        wait_until(lambda: publisher.poll(10_000) and publisher.recv() == b"\x01deribit.", "the new prefix")
        publisher.send_multipart(index_message(9))
        assert subscriber.receive(10).seq == 9  # type: ignore[union-attr]


def test_loss_on_the_way_is_raised_and_the_reader_goes_on_behind_it(publisher: Any) -> None:
    with Subscriber(endpoint_of(publisher)) as subscriber:
        wait_subscribed(publisher)
        for seq in (1, 2, 7):
            publisher.send_multipart(index_message(seq))
        items: Iterator[Any] = iter(subscriber)
        assert [next(items)["seq"], next(items)["seq"]] == [1, 2]
        with pytest.raises(LossError, match="messages 3 to 6 were lost on the way to this subscriber") as raised:
            subscriber.receive(10)
        assert raised.value.loss[1:5] == ("sequence", START, 3, 6)
        after = subscriber.receive(10)
        assert after is not None
        assert after.seq == 7  # type: ignore[union-attr]


def test_reported_losses_stand_in_the_stream(publisher: Any) -> None:
    later = START + 5
    sent = [
        index_message(4, join=True),
        index_message(5),
        index_message(5, join=True),
        index_message(5),
        index_message(9, join=True),
        index_message(10),
        index_message(1, epoch=later),
        index_message(11),
        index_message(3, epoch=later),
    ]
    expected: list[Any] = [
        4, 5, 5, ("repeated", 5, 5), ("sequence", 6, 9), 9, 10,
        ("anew", 0, 0), 1, ("epoch", 0, 0), ("sequence", 2, 2), 3,
    ]  # fmt: skip
    with Subscriber([endpoint_of(publisher)], on_loss="report") as subscriber:
        wait_subscribed(publisher)
        for frames in sent:
            publisher.send_multipart(frames)
        got = [subscriber.receive(10) for _ in expected]
    shown = [(item.reason, item.first, item.last) if isinstance(item, Loss) else item and item.seq for item in got]
    assert shown == expected
    assert str(got[9]) == f"{TOPIC}: epoch: {START} after {later}: two have published this topic"


def test_what_is_lost_of_heartbeats_is_not_asked_for(context: Any) -> None:
    """Nobody answers: it would be asked for again with each that comes, and the worker would look up all topics."""
    publisher = context.socket(zmq.XPUB)
    publisher.setsockopt(zmq.XPUB_VERBOSE, 1)
    publisher.bind("tcp://127.0.0.1:*")
    topic = "deribit.heartbeat.w.1s"
    beat: dict[str, Any] = {"type": "heartbeat", "instrument": "w", "wire": 1, "connection": "w", "state": "live"}
    with Subscriber([endpoint_of(publisher)], on_loss="report") as subscriber:
        wait_subscribed(publisher)
        for seq in (1, 3, 4):
            _, payload = index_message(seq, published=seq, lag=None, **beat)
            publisher.send_multipart([topic.encode(), payload])
        for seq in (1, 3):
            publisher.send_multipart(index_message(seq))
        items = [subscriber.receive(10) for _ in range(7)]
        lost = [item.topic and item.topic.type for item in items if isinstance(item, Loss)]
        assert lost == ["heartbeat", "index"]
        for wish in (b"\x01", b"\x00"):  # it keeps no prefix: after months there would be more than a worker takes
            assert publisher.poll(10_000)
            assert publisher.recv() == wish + TOPIC.encode()


def test_a_topic_can_be_asked_for_again_and_is_at_once_only_once(context: Any) -> None:
    publisher = context.socket(zmq.XPUB)
    publisher.setsockopt(zmq.XPUB_VERBOSE, 1)
    publisher.bind("tcp://127.0.0.1:*")
    other = "deribit.index.eth_usd.raw"
    with Subscriber([endpoint_of(publisher)]) as subscriber:
        wait_subscribed(publisher)
        for topic in (TOPIC, TOPIC, other):
            subscriber.ask_again(parse_topic(topic))
        for wish in (b"\x01" + TOPIC.encode(), b"\x00" + TOPIC.encode(), b"\x01" + other.encode()):
            assert publisher.poll(10_000)
            assert publisher.recv() == wish


def test_what_may_not_be_asked_for_yet_is_asked_for_later_though_its_topic_is_quiet(context: Any) -> None:
    publisher = context.socket(zmq.XPUB)
    publisher.setsockopt(zmq.XPUB_VERBOSE, 1)
    publisher.bind("tcp://127.0.0.1:*")
    with Subscriber([endpoint_of(publisher)], on_loss="report") as subscriber:
        wait_subscribed(publisher)
        for frames in (index_message(1), index_message(3), index_message(3, join=True), index_message(5)):
            publisher.send_multipart(frames)
        items = [subscriber.receive(10) for _ in range(6)]
        assert [isinstance(item, Loss) for item in items] == [False, True, False, False, True, False]
        for wish in (b"\x01", b"\x00"):  # for the first loss
            assert publisher.poll(10_000)
            assert publisher.recv() == wish + TOPIC.encode()
        wait_until(lambda: subscriber.receive(0.1) is None and publisher.poll(0), "the question for the second one")
        publisher.recv_multipart()
        publisher.send_multipart(index_message(5, join=True))
        assert (answer := subscriber.receive(10)) is not None
        assert (answer.topic, subscriber._questions.put_off) == (parse_topic(TOPIC), {})


def test_what_was_lost_is_asked_for_until_its_answer_has_come_and_then_no_more(context: Any) -> None:
    publisher = context.socket(zmq.XPUB)
    publisher.setsockopt(zmq.XPUB_VERBOSE, 1)
    publisher.bind("tcp://127.0.0.1:*")
    other = "deribit.index.eth_usd.raw"
    with Subscriber([endpoint_of(publisher)], on_loss="report") as subscriber:
        wait_subscribed(publisher)

        def tell(*messages: list[bytes]) -> None:
            subscriber._questions._asked.clear()  # the last question was so long ago
            for frames in messages:
                publisher.send_multipart(frames)
                assert subscriber.receive(10) is not None

        tell(index_message(1), index_message(3))
        assert subscriber.receive(10) is not None  # behind the loss
        tell(index_message(4))  # to the first question there was no answer
        tell(index_message(4, join=True), index_message(5))
        subscriber.ask_again(parse_topic(other))
        asked: list[str] = []
        while len(asked) < 3:
            assert publisher.poll(10_000)
            wish = publisher.recv()
            asked += [wish[1:].decode()] if wish[0] else []
        assert asked == [TOPIC, TOPIC, other]


def test_what_is_not_read_any_more_does_not_come_from_what_waited(publisher: Any) -> None:
    with Subscriber([endpoint_of(publisher)], on_loss="report", prefixes=["deribit.index."]) as subscriber:
        wait_subscribed(publisher)
        for seq in (1, 3, 5):
            publisher.send_multipart(index_message(seq))
        losses = [isinstance(subscriber.receive(10), Loss) for _ in range(4)]
        assert (losses, len(subscriber._questions.put_off)) == ([False, True, False, True], 1)
        subscriber.unsubscribe("deribit.index.")  # the message behind the loss waits still
        assert subscriber.receive(0.1) is None
        assert (subscriber._questions.unanswered, subscriber._questions.put_off) == (set(), {})


def test_who_loses_on_and_on_asks_ever_more_rarely_and_soon_again_once_that_is_over() -> None:
    """Each answer goes to all readers of the topic, and comes at once here."""
    topic, questions, asked = parse_topic(TOPIC), Questions(), []
    for tenth in [*range(2500), 5000, 5001, *range(5011, 5020)]:
        if questions.want(topic, tenth / 10):
            asked.append(tenth / 10)
            questions.unanswered.discard(topic)
    assert asked == [0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 63.0, 123.0, 183.0, 243.0, 500.0, 501.1]
    assert questions.unanswered == {topic}
    questions.settle(topic)  # another reader's answer is ours, too
    assert questions.unanswered == set()
    assert questions.list_due(9999.0) == []


def test_topics_of_years_are_forgotten_for_new_ones_but_not_those_that_speak() -> None:
    sequence = SequenceCheck(lambda: START)

    def follow(instrument: str, seq: int) -> Loss | None:
        envelope = {"type": "index", "epoch": START, "seq": seq, "exchange_ts": START, "receive_ts": START}
        return sequence.follow(Message(Topic("deribit", "index", instrument, "raw"), envelope))

    for number in range(MAX_TOPICS):
        assert follow(f"old-{number}", 1) is None
    assert follow("old-0", 2) is None
    assert follow("new", 7) is None
    assert follow("new", 8) is None
    assert follow("old-1", 7) is None  # it is a new one too
    assert (lost := follow("old-0", 4)) is not None
    assert (lost.reason, lost.first, lost.last) == ("sequence", 3, 3)


LATER = START + 2 * ANSWERED_WITHIN


@pytest.mark.parametrize(
    ("topic", "keys", "now", "missed"),
    [
        (TOPIC, {}, LATER, 2),
        (TOPIC, {"type": "status", "state": "live"}, LATER, 2),
        ("deribit.ticker.BTC-PERPETUAL.100ms", {"state": "closed"}, LATER, 2),
        (TOPIC, {"seq": 1}, LATER, 0),
        (TOPIC, {"join": True}, LATER, 0),
        (TOPIC, {"receive_ts": START + 1}, LATER, 0),
        (TOPIC, {}, START + 1, 0),
        (TOPIC, {"type": "status", "state": "closed"}, LATER, 0),
        (TOPIC, {"type": "status", "state": "expired"}, LATER, 0),
        ("deribit.status.a.connection", {}, LATER, 0),
        ("deribit.heartbeat.a.1s", {}, LATER, 0),
    ],
    ids=[
        "amid its numbers", "status", "a closed market", "from the first on", "joined", "said soon and read late",
        "by the reader's clock", "left", "ended", "connection", "heartbeat",
    ],
)  # fmt: skip
def test_a_topic_that_is_new_long_after_it_was_asked_for_has_lost_what_came_before_its_first_message(
    topic: str, keys: dict[str, Any], now: int, missed: int
) -> None:
    clock = START
    sequence, parsed = SequenceCheck(lambda: clock), parse_topic(topic)
    sequence.note_asked()
    clock = now
    envelope = {"type": parsed.type, "epoch": START, "seq": 3, "exchange_ts": START, "receive_ts": LATER, **keys}
    lost = sequence.follow(Message(parsed, envelope))
    assert lost == (Loss(parsed, "sequence", START, 1, missed) if missed else None)


def test_what_is_asked_for_anew_may_be_heard_amid_its_numbers(publisher: Any) -> None:
    with Subscriber([endpoint_of(publisher)], prefixes="a.") as subscriber:
        asked = [subscriber._sequence._asked_at]
        subscriber.subscribe("b.")
        asked.append(subscriber._sequence._asked_at)
        subscriber._connect(["tcp://127.0.0.1:9"])
        asked.append(subscriber._sequence._asked_at)
        assert 0 < asked[0] < asked[1] < asked[2]


def test_iterating_goes_on_behind_a_loss_that_was_raised(publisher: Any) -> None:
    with Subscriber([endpoint_of(publisher)]) as subscriber:
        wait_subscribed(publisher)
        for seq in (1, 3, 4):
            publisher.send_multipart(index_message(seq))
        items = iter(subscriber)

        def take() -> int:
            item = next(items)
            return item.seq if isinstance(item, Message) else 0

        assert take() == 1
        with pytest.raises(LossError, match="message 2 was lost"):
            take()
        assert [take(), take()] == [3, 4]


def test_what_is_no_topic_is_neither_read_nor_asked_for(publisher: Any) -> None:
    with pytest.raises(TypeError, match=r"a prefix is text or a Topic, not b'deribit\.'"):
        Subscriber([endpoint_of(publisher)], prefixes=b"deribit.")  # type: ignore[arg-type]
    with Subscriber([endpoint_of(publisher)]) as subscriber, pytest.raises(TypeError, match="None is no Topic"):
        subscriber.ask_again(OrderBook().topic)  # type: ignore[arg-type]


STATUS: dict[str, Any] = {"type": "status", "state": "live", "connection": "b"}
RESTART: dict[str, Any] = {"type": "gap", "id": 1, "reason": "restart", "from_ts": START, "to_ts": START}
REPAIR: dict[str, Any] = {"type": "repair", "gap": 1, "repaired": 0, "missing": []}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, [{"seq": 1, **STATUS}, {"seq": 2}], [1, "anew", 2]),
        ({}, [{"seq": 1, **RESTART}, {"seq": 2}], [1, 2]),
        (STATUS, [{"seq": 1}], [1]),
        ({}, [{"seq": 4}, {"seq": 5}], ["anew", 4, 5]),
        ({}, [{"seq": 2, **RESTART}], ["sequence", 2]),
        ({}, [{"seq": 2, "join": True, **RESTART}], ["sequence", 2]),
        ({}, [{"seq": 0, "join": True}], ["anew", 0]),
        ({}, [{"seq": 1, **REPAIR}, {"seq": 2}], [1, "anew", 2]),
    ],
    ids=[
        "no gap", "gap", "no data before", "dropped as well", "gap after a drop", "joined gap", "joined data",
        "a repair",
    ],
)  # fmt: skip
def test_data_of_a_new_epoch_without_a_gap_are_a_loss_once(
    publisher: Any, before: dict[str, Any], after: list[dict[str, Any]], expected: list[int | str]
) -> None:
    with Subscriber([endpoint_of(publisher)], on_loss="report") as subscriber:
        wait_subscribed(publisher)
        for keys in [{"seq": 3, **before}, *({"epoch": START + 5, **keys} for keys in after)]:
            publisher.send_multipart(index_message(**keys))
        got = [subscriber.receive(10) for _ in [before, *expected]]
        assert [item.reason if isinstance(item, Loss) else item and item.seq for item in got] == [3, *expected]
        assert subscriber.receive(0) is None


def test_heartbeats_of_a_new_epoch_are_no_loss() -> None:
    """No gap comes on their topic: that the worker was restarted is no loss of theirs."""
    sequence, topic = SequenceCheck(), parse_topic("deribit.heartbeat.a.1s")
    for epoch in (START, START + 5):
        envelope = {"type": "heartbeat", "epoch": epoch, "seq": 1, "exchange_ts": 0, "receive_ts": epoch}
        message = Message(topic, envelope)
        assert not sequence.is_anew(message)
        assert sequence.follow(message) is None


def test_a_type_that_came_later_than_this_program_is_read(publisher: Any) -> None:
    topic = "deribit.rumour.btc_usd.raw"
    with Subscriber([endpoint_of(publisher)]) as subscriber:
        wait_subscribed(publisher)
        publisher.send_multipart([topic.encode(), index_message(1, type="rumour")[1]])
        message = subscriber.receive(10)
        assert isinstance(message, Message)
        assert (str(message.topic), message.type, message["price"]) == (topic, "rumour", 1.0)
        assert "rumour" in format_line(message)


CLOSED: dict[str, Any] = {"type": "status", "state": "closed", "reason": "unsubscribed", "connection": "b"}


@pytest.mark.parametrize("word", [RESTART, REPAIR, CLOSED])
def test_a_last_word_of_who_fed_the_topic_before_is_passed_over(publisher: Any, word: dict[str, Any]) -> None:
    with Subscriber([endpoint_of(publisher)]) as subscriber:
        wait_subscribed(publisher)
        sent = [index_message(7), index_message(1, epoch=START + 5, **RESTART), index_message(8, **word)]
        for frames in [*sent, index_message(2, epoch=START + 5)]:
            publisher.send_multipart(frames)
        got = [subscriber.receive(10) for _ in range(3)]
        assert [isinstance(item, Message) and item.seq for item in got] == [7, 1, 2]
        publisher.send_multipart(index_message(9, **word))
        assert subscriber.receive(0.05) is None


def test_what_cannot_be_read_is_a_loss_and_hurts_nobody(publisher: Any) -> None:
    good = index_message(1)
    bad = [
        [b"", b""], [b"x"], [*good, b"third"], [good[0], b"\xc1"], [good[0], good[1][:-3]], [b"\xff.b.c.d", good[1]],
        [b"deribit.quote.btc_usd.raw", good[1]], [good[0], b"\xdf\xff\xff\xff\xff"], [good[0], b"\x81" * 9000],
        [good[0], b"\x90"], [good[0], good[1].replace(b"price", b"prize")],
    ]  # fmt: skip
    with Subscriber(endpoint_of(publisher), on_loss="report") as subscriber:
        wait_subscribed(publisher)
        for frames in [*bad, good]:
            publisher.send_multipart(frames)
        losses = [subscriber.receive(10) for _ in bad]
        assert [loss.reason for loss in losses if isinstance(loss, Loss)] == ["malformed"] * len(bad)
        assert isinstance(subscriber.receive(10), Message)


def test_endpoints_are_found_by_the_control_channel_also_later_ones(context: Any, peer: Any, publisher: Any) -> None:
    second = context.socket(zmq.XPUB)
    second.bind("tcp://127.0.0.1:*")

    def answer(states: Any) -> None:
        envelope, request = take_request(peer)
        assert request["op"] == "get_state"
        peer.send_multipart([*envelope, encode({"ok": True, "result": states})])

    started = in_thread(lambda: Subscriber(control=endpoint_of(peer)))
    states = {"one": {"publish": endpoint_of(publisher)}, "odd": 5, "starting": {"publish": None}}
    answer({**states, "unbound": {"publish": "tcp://127.0.0.1:*"}})
    with started() as subscriber:
        wait_subscribed(publisher)
        received = in_thread(lambda: subscriber.receive(20))
        answer(["no map"])
        take_request(peer)  # this one is never answered, as if the collector were restarting
        answer({**states, "two": {"publish": endpoint_of(second)}})
        wait_subscribed(second)
        second.send_multipart(index_message(1))
        assert received().seq == 1
        assert subscriber.endpoints == {endpoint_of(publisher), endpoint_of(second)}


def test_who_knows_no_connection_asks_again_at_once_and_a_refusal_is_no_end(peer: Any) -> None:
    def answer(**reply: Any) -> None:
        envelope, _ = take_request(peer)
        peer.send_multipart([*envelope, encode(reply)])

    started = in_thread(lambda: Subscriber(control=endpoint_of(peer)))
    answer(ok=True, result={})
    with started() as subscriber:
        wait_until(lambda: subscriber._find_more() or peer.poll(0), "the next question")
        later = subscriber._ask_at
        answer(ok=True, result={})
        wait_until(lambda: subscriber._find_more() or subscriber._ask_at < later, "the wish to ask at once")
        wait_until(lambda: subscriber._find_more() or peer.poll(0), "the question after it")
        answer(ok=False, error={"code": "internal", "message": "a fault"})
        assert subscriber._finder is not None
        assert subscriber._finder.socket.poll(10_000)
        subscriber._look_at = 0.0
        assert subscriber.receive(0) is None


def test_between_two_questions_it_keeps_no_connection_to_the_supervisor(context: Any, publisher: Any) -> None:
    peer = context.socket(zmq.ROUTER)
    peer.bind("tcp://127.0.0.1:*")  # on ipc one more hangs up: it looks first whether anybody listens
    hung_up = peer.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def answer() -> None:
        envelope, _ = take_request(peer)
        peer.send_multipart([*envelope, encode({"ok": True, "result": {"one": {"publish": endpoint_of(publisher)}}})])

    started = in_thread(lambda: Subscriber(control=endpoint_of(peer)))
    answer()
    with started() as subscriber:
        assert hung_up.poll(10_000), "its first connection is held until it is used again"
        hung_up.recv_multipart()
        wait_until(lambda: subscriber._find_more() or peer.poll(0), "the next question")
        answer()
        subscriber._ask_at = math.inf  # no other question ends it
        wait_until(lambda: subscriber._find_more() or hung_up.poll(0), "the end of the connection")
    peer.disable_monitor()


def test_questions_do_not_pile_up_while_the_collector_is_away(peer: Any, publisher: Any) -> None:
    """Else each of its readers would ask a restarted one as often as they had asked in vain."""
    control = endpoint_of(peer)
    started = in_thread(lambda: Subscriber(control=control))
    envelope, _ = take_request(peer)
    peer.send_multipart([*envelope, encode({"ok": True, "result": {"one": {"publish": endpoint_of(publisher)}}})])
    with started() as subscriber:
        peer.unbind(control)
        for _ in range(5):
            subscriber._ask_at = 0.0  # so long ago
            wait_until(lambda: subscriber._find_more() or subscriber._ask_at, "a question")
        peer.bind(control)
        envelope, _ = take_request(peer)
        peer.send_multipart([*envelope, encode({"ok": True, "result": {"two": {"publish": endpoint_of(publisher)}}})])
        wait_until(lambda: subscriber._find_more() or "two" in subscriber.found, "the answer to the first that came")


def test_an_endpoint_that_is_named_no_more_is_left_once_all_of_it_is_read(peer: Any, publisher: Any) -> None:
    """Where the system chooses the port, a restarted collector has another, and a stranger may bind the one before."""
    one = {"one": {"publish": endpoint_of(publisher)}}

    def answer(states: Any) -> None:
        envelope, _ = take_request(peer)
        peer.send_multipart([*envelope, encode({"ok": True, "result": states})])

    def answer_next(states: Any) -> None:
        wait_until(lambda: subscriber._find_more() or peer.poll(0), "the next question")
        answer(states)

    started = in_thread(lambda: Subscriber(control=endpoint_of(peer)))
    answer(one)
    with started() as subscriber:
        wait_subscribed(publisher)
        publisher.send_multipart(index_message(1))
        assert subscriber.socket.poll(10_000)
        answer_next({})
        wait_until(lambda: subscriber._find_more() or subscriber._unnamed, "the answer")
        since = dict(subscriber._unnamed)
        for _ in range(2):  # when the second of these questions comes, the answer to the first has been taken
            answer_next({})
        assert subscriber._unnamed == since
        subscriber._unnamed[endpoint_of(publisher)] -= UNNAMED  # so long ago
        assert subscriber.receive(10).seq == 1
        assert subscriber.receive(0.01) is None
        answer_next(one)
        assert publisher.poll(10_000)
        assert publisher.recv() == b"\x00"
        wait_until(lambda: subscriber._find_more() or publisher.poll(0), "its return")
        wait_subscribed(publisher)
