"""From messages to subscribers: numbering, gaps, the ledger, the ZeroMQ socket, late subscribers."""
