"""Recorded frames go the whole way (exchange, worker, PUB, subscriber); each message is compared with its frame.

The folder of recordings is named by COLLECTOR_FRAMES. Each recording runs twice: as it is, where most books lack the
frames before and after (a change that continues nothing is owed a gap, or nothing), and with a made-up snapshot
before each such change, so that the change itself has to come through.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.collected import overheard
from tests.frames_checker import FrameReader, compare_all
from tests.support import FRAMES

pytestmark = pytest.mark.skipif(not FRAMES, reason="COLLECTOR_FRAMES names no folder of recorded frames")

Frames = list[str]

LAST = (
    '{"jsonrpc":"2.0","method":"subscription","params":{"channel":"quote.LAST","data":{"timestamp":1,'
    '"instrument_name":"LAST","best_bid_price":1.0,"best_bid_amount":1.0,"best_ask_price":2.0,"best_ask_amount":1.0}}}'
)
"""Ends each replay: whoever has its message has those of all frames before it."""


def read_lines(path: Path) -> Frames:
    """One frame a line."""
    return path.read_text().splitlines()


def read_capture(path: Path) -> Frames:
    """cryptofeed's capture: the frames received stand behind a time."""
    return [found[1] for line in path.read_text().splitlines() if (found := re.match(r"[\d.]+: (\{.*)", line))]


def read_printed(path: Path) -> Frames:
    """One frame a file, indented: white space outside strings goes, every number keeps its spelling."""
    texts = [file.read_text() for file in sorted(path.parent.glob(path.name))]
    return [re.sub(r'("(?:[^"\\]|\\.)*")|\s+', lambda found: found[1] or "", text) for text in texts]


RECORDINGS: dict[str, tuple[str, Callable[[Path], Frames], int]] = {
    "capture-2021": ("cryptofeed/DERIBIT.ws.1.0", read_capture, 135),
    "bodies-2021-2023": ("misc/crypto-msg-parser-2021-2023.jsonl", read_lines, 19),
    "oddities-2019-2024": ("misc/tardis-node-2019-2024.jsonl", read_lines, 18),
    "documents-2025": ("misc/official-docs-examples-2025-11.jsonl", read_lines, 39),
    "printed-2025-2026": ("nautilus/ws_*.json", read_printed, 10),
}
"""Where each recording is, how it is read, and how many frames of channels it holds."""


def read_recording(name: str) -> Frames:
    """The notifications of one recording, in order, each as sent."""
    path, read, count = RECORDINGS[name]
    frames = [frame for frame in read(Path(FRAMES) / path) if json.loads(frame).get("method") == "subscription"]
    assert len(frames) == count
    return frames


def bridge(frames: Frames) -> Iterator[str]:
    """Put a snapshot that it continues before each change that continues nothing."""
    chains: dict[str, int] = {}
    for frame in frames:
        params = json.loads(frame)["params"]
        channel, data = params["channel"], params["data"]
        if channel.startswith("book.") and "change_id" in data:
            previous = data.get("prev_change_id")
            if data.get("type") != "snapshot" and previous and chains.get(channel) != previous:
                made = {**data, "type": "snapshot", "change_id": previous, "bids": [], "asks": []}
                del made["prev_change_id"]
                yield json.dumps({"method": "subscription", "params": {"channel": channel, "data": made}})
            chains[channel] = data["change_id"]
        yield frame


def list_channels(frames: Iterable[str]) -> list[str]:
    return sorted({json.loads(frame)["params"]["channel"] for frame in frames})


@pytest.mark.parametrize("way", ["as it is", "bridged"])
@pytest.mark.parametrize("name", RECORDINGS)
def test_recorded_frames_come_through(name: str, way: str, tmp_path: Path) -> None:
    frames = read_recording(name)
    frames = [*(bridge(frames) if way == "bridged" else frames), LAST]
    received = replay(frames, tmp_path)
    reader = FrameReader()
    owed = [message for frame in frames for message in reader.read(frame)]
    assert len(owed) > len(frames) // 2
    assert compare_all(owed, received) == []


def replay(frames: Frames, folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Run the frames through exchange, collector and subscriber; return what was received up to the last one."""
    recording = folder / "frames.jsonl"
    recording.write_text("\n".join(frames) + "\n")
    options = ("--replay", str(recording), "--speed", "0")
    with overheard(list_channels(frames), "", *options) as (_, ear):  # recordings are old, and LAST has no time
        ear.wait_for("deribit.quote.LAST.raw", type="quote")
    return ear.messages
