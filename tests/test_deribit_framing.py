"""Frames cut out of what is read, wherever a read ends; they are put together here by the RFC's rules."""

import time
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from workers.deribit.connection.framing import MAX_FRAME, Framing

TEXT, BINARY, CLOSE, PING, PONG = 0x81, 0x82, 0x88, 0x89, 0x8A
START, MIDDLE, COMPRESSED = 0x01, 0x00, 0xC1


def build_frame(first: int, payload: bytes, masked: bool = False) -> bytes:
    """One frame of a server."""
    size, mask = len(payload), 128 if masked else 0
    if size < 126:
        head = bytes([first, mask | size])
    elif size < 1 << 16:
        head = bytes([first, mask | 126]) + size.to_bytes(2, "big")
    else:
        head = bytes([first, mask | 127]) + size.to_bytes(8, "big")
    return head + (b"\0\0\0\0" if masked else b"") + payload


def cut_all(reads: list[bytes]) -> tuple[list[bytes], bytes]:
    """All frames, and all that is left to aiohttp; from a foreign frame on that is everything."""
    framing, frames, others = Framing(), [], b""
    for data in reads:
        if framing.is_foreign:
            others += data
            continue
        found, left = framing.cut(data)
        frames += found
        others += left
    return frames, others


SIZES = st.sampled_from([0, 1, 2, 3, 4, 5, 124, 125, 126, 127, 128, 300, 65_535, 65_536, 70_000])
DATA = st.tuples(st.sampled_from([TEXT, BINARY]), SIZES)
CONTROLS = st.tuples(st.sampled_from([PING, PONG]), st.integers(0, 125))


@given(st.lists(DATA | CONTROLS, max_size=12), st.lists(st.integers(0, 400_000), max_size=12), st.booleans())
@example([(PING, 0)], [1], False)
@example([(TEXT, 65_536), (TEXT, 3)], [1, 2, 5, 9, 10, 11, 12], True)
def test_frames_are_found_wherever_reads_end(kinds: list[tuple[int, int]], cuts: list[int], by_byte: bool) -> None:
    payloads = [bytes([65 + number]) * size for number, (_, size) in enumerate(kinds)]
    built = [build_frame(first, payload) for (first, _), payload in zip(kinds, payloads, strict=True)]
    stream = b"".join(built)
    head = 300 if by_byte else 0
    ends = sorted({0, *range(min(head, len(stream))), *(cut for cut in cuts if cut < len(stream)), len(stream)})
    frames, others = cut_all([stream[start:end] for start, end in pairwise(ends)])
    assert frames == [payload for (first, _), payload in zip(kinds, payloads, strict=True) if first < CLOSE]
    assert others == b"".join(frame for (first, _), frame in zip(kinds, built, strict=True) if first >= CLOSE)


@pytest.mark.parametrize("first", [START, MIDDLE, COMPRESSED, 0xA1, 0x83, 0x09, CLOSE, 0x8B, 0x8F])
@pytest.mark.parametrize("size", [3, 200])
@pytest.mark.parametrize("cut", [3, 1000])
def test_all_is_left_to_aiohttp_from_a_frame_on_that_is_none_of_ours(first: int, size: int, cut: int) -> None:
    foreign = build_frame(first, b"x" * size) + build_frame(TEXT, b"after")
    frames, others = cut_all([build_frame(TEXT, b"before") + foreign[:cut], foreign[cut:]])
    assert (frames, others) == ([b"before"], foreign)


def test_a_masked_frame_is_left_to_aiohttp() -> None:
    masked = build_frame(TEXT, b"hello", masked=True)
    assert cut_all([masked[:1], masked[1:]]) == ([], masked)


def test_a_frame_that_would_be_too_long_is_left_to_aiohttp_before_it_has_come() -> None:
    head = bytes([TEXT, 127]) + (MAX_FRAME + 1).to_bytes(8, "big")
    assert cut_all([head[:9], head[9:], b"x" * 10]) == ([], head + b"x" * 10)


@pytest.mark.parametrize("first", [PING, PONG])
def test_a_control_frame_that_is_too_long_is_left_to_aiohttp_before_it_has_come(first: int) -> None:
    head = bytes([first, 127]) + (1 << 20).to_bytes(8, "big")
    assert cut_all([build_frame(TEXT, b"before") + head[:2], head[2:]]) == ([b"before"], head)


def test_many_pings_in_one_read_are_not_copied_again_for_each() -> None:
    """Else the time grows with their square: the loop stands still meanwhile, and the worker seems dead."""
    pings = build_frame(PING, b"") * (1 << 20)
    began = time.process_time()
    assert cut_all([pings]) == ([], pings)
    assert time.process_time() - began < 60


def test_a_long_frame_is_not_looked_at_again_for_each_read() -> None:
    """Else the time grows with the square of its length, as that of the pings above."""
    framing, payload = Framing(), b"y" * (MAX_FRAME // 2)
    frame = build_frame(TEXT, payload)
    reads = [frame[at : at + 1400] for at in range(0, len(frame), 1400)]
    began = time.process_time()
    assert all(framing.cut(read) == ([], b"") for read in reads[:-1])
    assert framing.cut(reads[-1]) == ([payload], b"")
    assert time.process_time() - began < 1.5
