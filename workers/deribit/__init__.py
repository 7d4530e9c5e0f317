"""One connection to Deribit. `Client` can be used by itself: one WebSocket that stays connected."""

from workers.deribit.connection.bootstrap import Login
from workers.deribit.connection.client import Client
from workers.deribit.connection.listener import Listener
from workers.deribit.rpc.errors import ExchangeError, Lost, NotConnected, Refused

__all__ = ["Client", "ExchangeError", "Listener", "Login", "Lost", "NotConnected", "Refused"]
