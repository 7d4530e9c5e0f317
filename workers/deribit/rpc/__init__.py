"""Deribit's JSON-RPC: requests, replies, errors."""
