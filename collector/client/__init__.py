"""For Python programs: `Control` asks a running collector, `Subscriber` and `OrderBook` read what it publishes."""
