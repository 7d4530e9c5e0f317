"""Collects Deribit's market data and publishes it on ZeroMQ.

The names below are the whole public interface; they are imported on first use, so that
`import collector` stays cheap for the command line.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from collector.client.control import Control
    from collector.client.orderbook import NotInSync, OrderBook
    from collector.client.stream import Loss, LossError, Message
    from collector.client.subscriber import Subscriber
    from collector.config import Config, ConfigError, load_config
    from collector.messages import ControlError, Topic, parse_topic

_HOMES = {
    "Config": "config",
    "ConfigError": "config",
    "Control": "client.control",
    "ControlError": "messages",
    "Loss": "client.stream",
    "LossError": "client.stream",
    "Message": "client.stream",
    "NotInSync": "client.orderbook",
    "OrderBook": "client.orderbook",
    "Subscriber": "client.subscriber",
    "Topic": "messages",
    "load_config": "config",
    "parse_topic": "messages",
}

__all__ = [
    "Config", "ConfigError", "Control", "ControlError", "Loss", "LossError", "Message", "NotInSync", "OrderBook",
    "Subscriber", "Topic", "__version__", "load_config", "parse_topic",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'collector' has no attribute {name!r}")
    return getattr(import_module(f"collector.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
