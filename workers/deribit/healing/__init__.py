"""Trades that were missed, fetched from the exchange and published late."""
