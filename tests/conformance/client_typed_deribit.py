"""typed-deribit against the exchange at the given address, with its validation on; prints what it received as JSON.

Every payload is checked by the client against its own models of Deribit's documents.
"""

import asyncio
import json
import sys
from typing import Any

from typed_deribit.core.transport.ws import SocketRpcStreamClient
from typed_deribit.market_data import MarketData
from typed_deribit.session import Session
from typed_deribit.streams import Streams

INSTRUMENT = "BTC-PERPETUAL"


async def take(stream: Any, count: int) -> list[Any]:
    async with stream as events:
        taken = []
        async for event in events:
            taken.append(event)
            if len(taken) == count:
                return taken
    raise SystemExit(f"the stream ended after {len(taken)} of {count}")


async def main(host: str) -> None:
    async with SocketRpcStreamClient.new(f"ws://{host}/ws/api/v2", heartbeat_interval=10) as client:
        markets = MarketData.new(client, ws_client=client)
        instruments = await markets.get_instruments("BTC")
        streams = Streams(client=client).market_data
        book, trades, ticker = await asyncio.gather(
            take(streams.book(INSTRUMENT, interval="100ms"), 5),
            take(streams.trades_by_instrument(INSTRUMENT, interval="100ms"), 1),
            take(streams.ticker(INSTRUMENT, interval="100ms"), 3),
        )
        await Session.new(client, ws_client=client).disable_heartbeat()
    print(
        json.dumps({"markets": len(instruments), "book": book, "trades": trades[0], "ticker": ticker[-1]}, default=str)
    )


asyncio.run(main(sys.argv[1]))
