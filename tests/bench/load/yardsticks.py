"""Three yardsticks beside the worker, each the whole of a process: what a message costs at least, and what it costs
if written as everybody does.

receive: takes the frames and does nothing. relay: passes each frame on, unchanged. plain: decodes with json, builds a
dict, encodes with msgpack, publishes with send_multipart.
"""

import asyncio
import json
import os
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from typing import Any

import aiohttp
import msgpack
import uvloop
import zmq

from tests.bench.load.tape import LAST_CHANNEL, LAST_SIZE


async def receive(ws: Any, publisher: zmq.Socket[bytes]) -> None:
    """Take messages until the last."""
    take = ws.receive
    while len((await take()).data) > LAST_SIZE:
        pass


async def relay(ws: Any, publisher: zmq.Socket[bytes]) -> None:
    """Pass messages on until the last."""
    take, send = ws.receive, publisher.send
    size = LAST_SIZE + 1
    while size > LAST_SIZE:
        data = (await take()).data
        send(data)
        size = len(data)


async def plain(ws: Any, publisher: zmq.Socket[bytes]) -> None:
    """Decode, build, encode, publish, until the last."""
    sequence: dict[str, int] = defaultdict(int)
    channel = ""
    while channel != LAST_CHANNEL:
        params = json.loads((await ws.receive()).data)["params"]
        channel, data = params["channel"], params["data"]
        family, instrument, *interval = channel.split(".")
        kind = {"trades": "trade"}.get(family, family)
        topic = f"deribit.{kind}.{instrument}.{interval[0] if interval else 'raw'}"
        for item in data if isinstance(data, list) else [data]:
            sequence[topic] += 1
            message = build(kind, instrument, item, sequence[topic])
            publisher.send_multipart([topic.encode(), msgpack.packb(message)])


def build(kind: str, instrument: str, item: dict[str, Any], seq: int) -> dict[str, Any]:
    """One normalised message, as a dict."""
    message = {
        "type": kind,
        "exchange": "deribit",
        "instrument": instrument,
        "epoch": 1,
        "seq": seq,
        "exchange_ts": item.pop("timestamp") * 1_000_000,
        "receive_ts": time.time_ns(),
    }
    if kind == "book":
        message["kind"] = {"change": "delta"}.get(item["type"], item["type"])
        message["change_id"] = item["change_id"]
        message["prev_change_id"] = item.get("prev_change_id")
        message["bids"] = [[price, amount] for _, price, amount in item["bids"]]
        message["asks"] = [[price, amount] for _, price, amount in item["asks"]]
        return message
    message.update(item.pop("stats", {}))
    message.update(item.pop("greeks", {}))
    message.update(item)
    return message


PROGRAMS: dict[str, Callable[[Any, zmq.Socket[bytes]], Awaitable[None]]] = {
    "receive": receive,
    "relay": relay,
    "plain": plain,
}


async def follow(pipe: Connection, program: str, url: str, channels: list[str], endpoint: str) -> None:
    """Subscribe, run a yardstick until the last message, tell when that was, wait to be ended."""
    publisher = zmq.Context().socket(zmq.PUB)
    publisher.sndhwm = 0
    publisher.bind(endpoint)
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(url, max_msg_size=16 << 20, decode_text=program == "plain") as ws,
    ):
        for first in range(0, len(channels), 500):
            params = {"channels": channels[first : first + 500]}
            await ws.send_str(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "public/subscribe", "params": params}))
            while "id" not in json.loads((await ws.receive()).data):
                pass  # snapshots of the call before
        await PROGRAMS[program](ws, publisher)
        pipe.send(("last", {"time": time.monotonic_ns()}))
        await asyncio.to_thread(pipe.recv)


def run(pipe: Connection, program: str, url: str, channels: list[str], endpoint: str, batch: bool) -> None:
    """Entry of the process."""
    if batch:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    uvloop.run(follow(pipe, program, url, channels, endpoint))
