"""ccxt's pro client against the exchange at the given address; prints what it received as one JSON map."""

import asyncio
import json
import sys

import ccxt.pro


async def main(host: str) -> None:
    exchange = ccxt.pro.deribit({"urls": {"api": {"rest": f"http://{host}", "ws": f"ws://{host}/ws/api/v2"}}})
    symbol = "BTC/USD:BTC"
    try:
        markets = await exchange.load_markets()
        book = await exchange.watch_order_book(symbol)
        first = book["nonce"] or book["timestamp"]
        while (book["nonce"] or book["timestamp"]) == first:
            book = await exchange.watch_order_book(symbol)
        trades = await exchange.watch_trades(symbol)
        ticker = await exchange.watch_ticker(symbol)
    finally:
        await exchange.close()
    top = {"bid": book["bids"][0][0], "ask": book["asks"][0][0], "levels": len(book["bids"]) + len(book["asks"])}
    trade = {key: trades[-1][key] for key in ("id", "price", "amount", "side")}
    print(json.dumps({
        "markets": len(markets), "book": top, "trade": trade,
        "ticker": {key: ticker[key] for key in ("bid", "ask", "last")},
    }))  # fmt: skip


asyncio.run(main(sys.argv[1]))
