"""Recorded frames go out byte for byte, in order, with the recording's own pace or another."""

import time
from pathlib import Path

import pytest

from tests.exchange_client import connect, exchange
from tests.support import collector, in_loop, running

LINES = [
    '{"jsonrpc": "2.0", "method": "subscription", "params": {"channel": "book.X-1.raw", "data": {"a": 2.2e3}}}',
    '{"jsonrpc":"2.0","id":1,"result":["passed over"]}',
    '{"params":{"data":[1.0],"channel":"user.anything.at.all"},"method":"subscription","jsonrpc":"2.0"}',
    "not json",
    '{"jsonrpc":"2.0","method":"subscription","params":{"channel":"nobody.listens","data":null}}',
    '{"jsonrpc":"2.0","method":"subscription","params":{"channel":"book.X-1.raw","data":{"a": 2.30}}}',
]
CHANNELS = ["book.X-1.raw", "user.anything.at.all"]


def write_capture(path: Path, gap: float) -> None:
    head = "wss://www.deribit.com/ws/api/v2"
    rows = [f"{head} <-> 100.0", f'{head} <- 100.5: {{"id":1,"method":"public/subscribe"}}']
    rows += [f"{101.0 + gap * place}: {line}" for place, line in enumerate(LINES)]
    path.write_text("\n".join(rows) + "\n")


@in_loop
async def test_json_lines_go_out_unchanged_to_who_subscribed(tmp_path: Path) -> None:
    path = tmp_path / "frames.jsonl"
    path.write_text("\n".join(LINES))
    with exchange("--replay", str(path)) as (url, _):
        async with connect(url) as client, connect(url) as other:
            await client.log_in()
            refused = await other.ask("public/subscribe", channels=CHANNELS[:1])
            assert refused["error"]["code"] == 13778
            await other.ask("public/subscribe", channels=["nobody.knows", "quote.BTC-PERPETUAL"])
            answer = await client.ask("private/subscribe", channels=CHANNELS, label="mine")
            assert answer["result"] == sorted(CHANNELS, reverse=True)
            await client.wait(lambda: len(client.texts) >= 5, "the frames")
            assert client.texts[2:] == [LINES[0], LINES[2], LINES[5]]
            await other.wait_data("quote.BTC-PERPETUAL", 3)


@pytest.mark.parametrize(("speed", "gap", "least"), [("1", 0.1, 0.5), ("0.5", 0.1, 1.0), ("0", 100.0, 0.0)])
@in_loop
async def test_a_capture_keeps_its_pace(tmp_path: Path, speed: str, gap: float, least: float) -> None:
    """At speed 0 it has none: what was recorded over minutes comes at all."""
    path = tmp_path / "capture"
    write_capture(path, gap)
    with exchange("--replay", str(path), "--speed", speed) as (url, _):
        async with connect(url) as client:
            await client.log_in()
            start = time.monotonic()
            await client.ask("private/subscribe", channels=CHANNELS)
            await client.wait(lambda: len(client.texts) >= 5, "the last frame")
            assert time.monotonic() - start >= least


def test_a_recording_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.write_text('{"jsonrpc":"2.0","id":1,"result":[]}\n')
    with running(*collector("exchange", "--replay", str(path))) as program:
        assert program.wait_exit() == 2
        assert "no recorded notification" in program.text()
        assert "Traceback" not in program.text()
