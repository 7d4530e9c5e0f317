"""One connection to Deribit. `Client` can be used by itself: one WebSocket that stays connected, five functions."""

from workers.deribit.bootstrap import Login
from workers.deribit.connection import Client
from workers.deribit.errors import ExchangeError, Lost, NotConnected, Refused
from workers.deribit.listener import Listener

__all__ = ["Client", "ExchangeError", "Listener", "Login", "Lost", "NotConnected", "Refused"]
