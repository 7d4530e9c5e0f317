"""Trades: numbered by the exchange, so that every hole is seen, announced and - later - healed."""
