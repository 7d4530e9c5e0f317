"""The practice exchange: a market that moves by itself and speaks Deribit's protocol, with faults on request.

Read in this order: `market` (instruments, books and trades), `channels` (what each channel says of them), `protocol`
(requests, logins, limits, faults; their table is collector/faults.py), then exchange (what all connections share),
server (sockets and clock) and worker.
"""
