"""The practice exchange: a market that moves by itself and speaks Deribit's protocol, with faults on request.

Read in this order: instruments, pricing, book, market (a market without time or sockets of its own), feeds (what
each channel says of it), rpc, session, methods (the protocol), faults (what may go wrong), server (sockets).
"""
