"""What is done once a second for each channel holds nothing up, however many there are."""

import asyncio
import time
from itertools import pairwise

from tests.deribit_support import in_loop, make_spec
from tests.pipeline import short_directory
from workers.deribit.feeds.rhythm import SECOND
from workers.deribit.rpc.codec import DATA_PREFIX
from workers.deribit.watching.patrol import SLICE
from workers.deribit.worker import create_worker

CHANNELS = [f"quote.BTC-{number}" for number in range(3 * SLICE)]


def build_quote(channel: str) -> bytes:
    """A frame of a quote without a price."""
    return DATA_PREFIX + channel.encode() + b'","data":{"timestamp":1700000000000}}}'


@in_loop
async def test_between_looks_at_some_channels_the_loop_turns() -> None:
    """Topics that have spoken and were told no state yet are all told theirs at the next look."""
    with short_directory() as directory:
        worker = create_worker(make_spec("ws://127.0.0.1:9", str(directory), CHANNELS))
        worker.take_frames([build_quote(channel) for channel in CHANNELS], time.time_ns())
        told = [worker.publisher.published]
        patrol = asyncio.create_task(worker.patrol.run())
        while worker.publisher.published < 2 * len(CHANNELS):
            await asyncio.sleep(0)  # one turn of the loop, as a read would have
            told.append(worker.publisher.published)
        patrol.cancel()
        await asyncio.wait([patrol])
        assert all(feed.stream.status for feed in worker.feeds.values())
        steps = [after - before for before, after in pairwise(told)]
        assert max(steps) <= SLICE + 1  # and a heartbeat
        worker.publisher.close()
        worker.ledger.close()


def test_what_comes_after_the_clock_was_set_back_ends_a_silence_too() -> None:
    now, hour = time.time_ns(), 3600 * SECOND
    with short_directory() as directory:
        worker = create_worker(make_spec("ws://127.0.0.1:9", str(directory), CHANNELS[:1]))
        (feed,) = worker.feeds.values()
        worker.take_frames([build_quote(CHANNELS[0])], now)
        feed.mute_since = feed.last_ts
        worker.statuses.tell(feed, "stale", "mute")
        worker.patrol._judge_feeds([feed], now)
        assert feed.condition == ("stale", "mute")
        worker.take_frames([build_quote(CHANNELS[0])], now - hour)
        worker.patrol._judge_feeds([feed], now - hour)
        assert feed.condition == ("live", "")
        worker.publisher.close()
        worker.ledger.close()
