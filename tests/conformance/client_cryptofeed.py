"""cryptofeed against the exchange at the given address, logged in, on raw channels; prints what it received as JSON.

At a break of a book's chain, or a delete of a level that its book does not hold, it begins again with a new snapshot;
hence their number is told. It speaks TLS only: SSL_CERT_FILE and REQUESTS_CA_BUNDLE name the certificate to trust.
"""

import asyncio
import json
import os
import sys
from collections import defaultdict
from typing import Any

from cryptofeed import FeedHandler
from cryptofeed.connection import WebsocketEndpoint
from cryptofeed.defines import L1_BOOK, L2_BOOK, TICKER, TRADES
from cryptofeed.exchanges import Deribit

WANTED = {L2_BOOK: 60, TRADES: 1, TICKER: 3, L1_BOOK: 3}
received: dict[str, list[Any]] = defaultdict(list)


def keep(channel: str) -> Any:
    async def callback(event: Any, receipt_timestamp: float) -> None:
        received[channel].append(event)
        if channel == L2_BOOK and event.delta is None:  # looked at now: the book is one object that lives on
            received["snapshots"].append(event)

    return callback


def show(event: Any) -> dict[str, Any]:
    shown = event.to_dict(numeric_type=float)
    shown.pop("raw", None)
    if "book" in shown:
        shown["book"] = {side: len(levels) for side, levels in shown["book"].items()}
    return dict(shown)


async def main(host: str) -> None:
    Deribit.websocket_endpoints = [WebsocketEndpoint(f"wss://{host}/ws/api/v2")]
    Deribit.rest_endpoints[0].address = f"https://{host}"
    keys = {"key_id": os.environ["CLIENT_ID"], "key_secret": os.environ["CLIENT_SECRET"]}
    feeds = FeedHandler(config={"uvloop": False, "log": {"disabled": True}, "deribit": keys})
    feed = Deribit(
        config={"deribit": keys}, symbols=["BTC-USD-PERP"], channels=list(WANTED),
        callbacks={channel: keep(channel) for channel in WANTED},
    )  # fmt: skip
    feeds.add_feed(feed)
    feeds.run(start_loop=False, install_signal_handlers=False)
    while any(len(received[channel]) < count for channel, count in WANTED.items()):
        await asyncio.sleep(0.05)
    await feeds.stop_async()
    last = {channel: show(received[channel][-1]) for channel in WANTED}
    print(json.dumps({**last, "snapshots": len(received["snapshots"])}, default=str))


asyncio.run(main(sys.argv[1]))
