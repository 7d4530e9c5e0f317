"""Properties: whatever comes in, names, control messages and links are decoded, or refused in the one way they name."""

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector.channels import parse_channel
from collector.link import open_link
from collector.messages import (
    CODES,
    OPS,
    ControlError,
    Request,
    decode,
    decode_reply,
    decode_request,
    encode,
    parse_topic,
)
from workers.deribit.rpc.codec import Data, Heartbeat, Reply, decode_frame

bounded = settings(max_examples=300)

NOW = 1_700_000_000_000_000_000

SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=20)
)


def nest(scalars: st.SearchStrategy[Any], keys: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5))


PACKED = nest(SCALARS | st.binary(max_size=20), st.text(max_size=8)).map(encode)
LITTLE = st.text(max_size=8)
FRAME_KEYS = st.sampled_from(["jsonrpc", "id", "method", "params", "result", "error", "channel", "type", "code"])
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "op": st.sampled_from([*OPS, "", "CONNECT"]) | SCALARS,
        "connection": st.just("a") | SCALARS | st.dictionaries(LITTLE, SCALARS, max_size=2),
        "deadline": st.integers(-5, 2**64 - 1) | SCALARS,
        "channels": st.lists(st.text(max_size=250) | SCALARS, max_size=3) | SCALARS,
        "method": LITTLE | SCALARS,
        "params": st.dictionaries(LITTLE, SCALARS, max_size=2) | SCALARS,
        "unknown": SCALARS,
    },
).map(encode)
BYTES = st.binary(max_size=300) | st.sampled_from(
    [
        b"\x91" * 5000 + b"\xc0",  # deep
        b"\xdf\xff\xff\xff\xff",  # a map, an array, bytes of four thousand million
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc7\x05\xff",  # a timestamp of five bytes
        b"\x81\xc0\x01",  # a map whose key is nil
    ]
)


def attempt(call: Callable[..., Any], *arguments: Any) -> Any:
    """What the call gives, or the error with which it refuses; any other error fails the test."""
    try:
        return call(*arguments)
    except (ValueError, ControlError) as error:
        return error


@bounded
@given(BYTES | nest(SCALARS, FRAME_KEYS).map(lambda value: json.dumps(value).encode()))
def test_any_frame_is_classified_or_refused(frame: bytes) -> None:
    assert isinstance(attempt(decode_frame, frame), (Reply, Data, Heartbeat, ValueError))


@bounded
@given(st.text(max_size=60) | st.from_regex(r"(trades|book|ticker|platform_state|user)(\.[A-Za-z0-9_.-]{0,12}){0,5}"))
def test_any_channel_name_feeds_a_topic_or_is_refused(name: str) -> None:
    channel = attempt(parse_channel, name)
    if isinstance(channel, ValueError):
        assert "\n" not in str(channel)
    elif channel.topic is not None:
        assert parse_topic(channel.topic).interval == channel.interval


@pytest.mark.parametrize("part", ["", "a b", "a\t", "a\n", "a.b", "*", "a*", ">", "\0"])
def test_what_no_nats_subject_may_hold_stands_in_no_topic(part: str) -> None:
    assert isinstance(attempt(parse_topic, f"deribit.quote.{part}.raw"), ValueError)


@bounded
@given(st.text(max_size=60) | st.from_regex(r"[a-z.]{0,12}\.[A-Z-]{0,12}\.\w{0,5}"))
def test_any_topic_is_parsed_back_or_refused(text: str) -> None:
    topic = attempt(parse_topic, text)
    assert isinstance(topic, ValueError) or str(topic) == text


@bounded
@given(BYTES | PACKED | REQUESTS)
def test_any_control_request_is_taken_or_refused(data: bytes) -> None:
    request = attempt(decode_request, data, NOW)
    if isinstance(request, ControlError):
        assert request.code in CODES
        assert len(str(request)) < 300
    else:
        assert isinstance(request, Request)
        assert request.op in OPS
        assert type(request.deadline) is int


@bounded
@given(BYTES | PACKED)
def test_any_control_reply_is_taken_or_raised(data: bytes) -> None:
    assert not isinstance(attempt(decode_reply, data), ValueError)


@bounded
@given(BYTES | PACKED)
def test_any_message_is_decoded_or_refused(data: bytes) -> None:
    attempt(decode, data)


@pytest.mark.parametrize("op", OPS)
def test_a_request_of_more_than_1_mib_is_refused(op: str) -> None:
    def build(size: int) -> bytes:
        connection: Any = {} if op == "connect" else "a"
        request = {"op": op, "connection": connection, "channels": ["a"], "method": "public/test", "padding": ""}
        return encode(request | {"padding": "x" * (size - len(encode(request)) - 4)})  # four more for its length

    assert len(build(1 << 20)) == 1 << 20
    assert isinstance(attempt(decode_request, build(1 << 20), NOW), Request)
    error = attempt(decode_request, build((1 << 20) + 1), NOW)
    assert isinstance(error, ControlError)
    assert error.code == "bad_request"


def test_a_request_without_a_deadline_has_5_s() -> None:
    assert decode_request(encode({"op": "get_state"}), NOW).deadline == NOW + 5_000_000_000


async def pass_over_link(chunks: list[bytes]) -> tuple[list[Any], list[str]]:
    """Send chunks down a real socket pair into a link, then close it; return what it received and why it ended."""
    ours, theirs = socket.socketpair()
    received: list[Any] = []
    ended: asyncio.Queue[str] = asyncio.Queue()
    await open_link(theirs, received.append, ended.put_nowait)
    with ours:
        for chunk in chunks:
            try:
                ours.sendall(chunk)
            except OSError:  # it has cut us off already, rightly
                break
            await asyncio.sleep(0)
    reasons = [await asyncio.wait_for(ended.get(), 5)]
    await asyncio.sleep(0)
    while not ended.empty():
        reasons.append(ended.get_nowait())
    return received, reasons


@settings(bounded, max_examples=100)
@given(st.lists(BYTES | PACKED, max_size=4))
def test_any_bytes_on_a_link_end_it_once(chunks: list[bytes]) -> None:
    received, reasons = asyncio.run(pass_over_link(chunks))
    assert len(reasons) == 1
    assert all(isinstance(message, dict) for message in received)


def test_a_list_as_long_as_the_exchange_may_send_crosses_a_link() -> None:
    message = {"kind": "reply", "result": [0] * (2 << 20)}
    stream = encode(message)
    chunks = [stream[at : at + 65_536] for at in range(0, len(stream), 65_536)]
    assert asyncio.run(pass_over_link(chunks)) == ([message], ["end of file"])


@settings(bounded, max_examples=100)
@given(st.lists(st.dictionaries(LITTLE, SCALARS, max_size=4), max_size=5), st.lists(st.integers(0, 400), max_size=5))
def test_messages_cross_a_link_however_they_are_cut(messages: list[dict[str, Any]], cuts: list[int]) -> None:
    stream = b"".join(map(encode, messages))
    places = sorted(cuts)
    chunks = [stream[start:end] for start, end in zip([0, *places], [*places, None], strict=True)]
    received, reasons = asyncio.run(pass_over_link(chunks))
    assert received == messages
    assert reasons == ["end of file"]
